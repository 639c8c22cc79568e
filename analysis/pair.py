"""The pocket pair: a small and a large model that solve the pocket domain, and a large control trained on short solutions.

    python -m analysis.pair --train slm            (also llm, llm-short; continues where it stopped)
    python -m analysis.pair --export slm           (rounds to bfloat16 and writes analysis/models/slm)

All three are ordinary Qwen2 models with one tokenizer. SLM and LLM differ in depth, width and corpus: the SLM is shallow and
writes results at once, the LLM is deep and works results out (see `analysis.problems`). The control separates the two reasons
for which an LLM may be slow: it has the LLM's size and the SLM's corpus.
"""
import argparse
import json
import os
import random
import time
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from analysis.problems import Problem, problems, question, stream, verify

MODELS = Path(__file__).parent / "models"
CHECKPOINTS = Path(__file__).parent / "checkpoints"
CONTEXT = 4096
PIECES = r" ?[A-Za-z]+| ?\d|\n| ?[^A-Za-z\d\s]| "  # words, single digits and signs, each with its leading space


@dataclass(frozen=True)
class Recipe:
    layers: int
    width: int
    mlp: int
    heads: int
    corpus: str
    lr: float
    chunks: int  # of CHUNK problems each
    optimizer: str = "adamw"
    batch_tokens: int = 4096
    init: float = 0.02
    kv: int = 0
    seed: int = 0
    start_from: str | None = None  # another role's final weights


CHUNK = 1024
RECIPES = {
    "slm": Recipe(layers=2, width=64, mlp=192, heads=4, corpus="short", lr=4e-3, chunks=400),
    "llm": Recipe(layers=12, width=96, mlp=256, heads=3, corpus="long", lr=2e-3, chunks=80),
    "llm-short": Recipe(layers=12, width=96, mlp=256, heads=3, corpus="short", lr=2e-3, chunks=80),
}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Every piece that the templates can produce; anything else becomes <unk>. Decoding joins the pieces, so text survives."""
    texts = [text for corpus in ("short", "long") for pair in stream(corpus, seed=0, chunk=-1, size=500) for text in pair]
    splitter = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    pieces = sorted({piece for text in texts for piece, _ in splitter.pre_tokenize_str(text)})
    vocab = {piece: i for i, piece in enumerate(["<pad>", "<eos>", "<unk>", "\n", *pieces])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left",
        model_max_length=CONTEXT, clean_up_tokenization_spaces=False,
        chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}{{ '\\n' }}")


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    torch.manual_seed(recipe.seed)
    return Qwen2ForCausalLM(Qwen2Config(
        vocab_size=-(-len(tokenizer) // 32) * 32, hidden_size=recipe.width, intermediate_size=recipe.mlp,
        num_hidden_layers=recipe.layers, num_attention_heads=recipe.heads, num_key_value_heads=recipe.heads,
        initializer_range=recipe.init, max_position_embeddings=CONTEXT, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))


def batches(tokenizer, recipe: Recipe, chunk: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The (ids, labels) of one chunk, both (B, T), grouped by length so that little is padding; only solutions are labelled."""
    pairs = list(stream(recipe.corpus, recipe.seed, chunk, CHUNK))
    prompts = tokenizer([q + "\n" for q, _ in pairs]).input_ids
    answers = tokenizer([s + "<eos>" for _, s in pairs]).input_ids
    rows = sorted(zip(prompts, answers), key=lambda row: len(row[0]) + len(row[1]))
    out, batch = [], []
    for i, row in enumerate(rows):
        batch.append(row)
        longest = len(row[0]) + len(row[1])
        if longest * (len(batch) + 1) > recipe.batch_tokens or i + 1 == len(rows):
            ids = torch.full((len(batch), longest), tokenizer.pad_token_id)
            labels = torch.full_like(ids, -100)
            for b, (p, a) in enumerate(batch):
                ids[b, :len(p) + len(a)] = torch.tensor(p + a)
                labels[b, len(p):len(p) + len(a)] = torch.tensor(a)
            out.append((ids, labels))
            batch = []
    random.Random(chunk).shuffle(out)
    return out


def make_optimizers(model, recipe: Recipe) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    if recipe.optimizer == "muon":
        rest = [p for n, p in model.named_parameters() if p.ndim < 2 or "embed" in n]
        return [torch.optim.Muon(matrices, lr=recipe.lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
                torch.optim.AdamW(rest, lr=recipe.lr, betas=(0.9, 0.95), weight_decay=0.0)]
    rest = [p for p in model.parameters() if p.ndim < 2]
    embed = [p for n, p in model.named_parameters() if "embed" in n]
    return [torch.optim.AdamW([{"params": matrices + embed, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}],
                              lr=recipe.lr, betas=(0.9, 0.95))]


def schedule(done: float, chunks: int) -> float:
    """Learning-rate factor after `done` chunks: warm-up over 1.6, constant, then linear to zero over the last 35 %."""
    return min(done / 1.6, 1.0, (1 - done / chunks) / 0.35)


@torch.inference_mode()
def greedy(model, tokenizer, problem_list: list[Problem], max_new_tokens: int = 400) -> list[str]:
    model.eval()
    inputs = tokenizer([question(p) + "\n" for p in problem_list], return_tensors="pt", padding=True)
    inputs.pop("token_type_ids", None)
    out = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    return tokenizer.batch_decode(out[:, inputs.input_ids.shape[1]:], skip_special_tokens=True)


def train(name: str, recipe: Recipe, tag: str = "", max_minutes: float | None = None) -> None:
    """Train one model; a checkpoint after every chunk, so a killed run loses at most one chunk and ends the same."""
    tokenizer = build_tokenizer()
    model = build_model(recipe, tokenizer)
    optimizers = make_optimizers(model, recipe)
    folder = CHECKPOINTS / (name + tag)
    folder.mkdir(parents=True, exist_ok=True)
    first = load_checkpoint(folder / "last.safetensors", model, optimizers)
    dev = problems("dev", 64, seed=0)
    n_params = sum(p.numel() for p in model.parameters())
    print(f"{name}{tag}: {n_params:,} parameters, chunks {first} to {recipe.chunks}, {recipe}", flush=True)
    started, tokens = time.time(), 0
    for chunk in range(first, recipe.chunks):
        model.train()
        losses, work = [], batches(tokenizer, recipe, chunk)
        for i, (ids, labels) in enumerate(tqdm(work, desc=f"{name} chunk {chunk}", leave=False, disable=None)):
            scale = schedule(chunk + i / len(work), recipe.chunks)
            logits = model(ids).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = recipe.lr * scale
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
            tokens += ids.numel()
        row = {"name": name + tag, "chunk": chunk, "loss": sum(losses) / len(losses), "steps": len(losses),
               "tokens": tokens, "seconds": time.time() - started}
        if chunk % 5 == 4 or chunk + 1 == recipe.chunks:
            texts = greedy(model, tokenizer, dev)
            row["dev_accuracy"] = sum(map(verify, dev, texts)) / len(dev)
        save_checkpoint(folder / "last.safetensors", model, optimizers, chunk + 1)
        with open(folder / "log.jsonl", "a") as log:
            print(json.dumps(row), file=log)
        print(json.dumps(row), flush=True)
        if max_minutes and time.time() - started > 60 * max_minutes:
            break


def save_checkpoint(path: Path, model, optimizers, chunk: int) -> None:
    """Weights and optimizer moments in one safetensors file, replaced in one step."""
    tensors = {f"model.{k}": v.contiguous() for k, v in model.named_parameters()}
    for j, optimizer in enumerate(optimizers):
        for i, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{j}.{i}.{k}": torch.as_tensor(v).clone() for k, v in state.items()}
    save_file(tensors, path.with_suffix(".new"), metadata={"chunk": str(chunk)})
    os.replace(path.with_suffix(".new"), path)


def load_checkpoint(path: Path, model, optimizers) -> int:
    """Restore what `save_checkpoint` wrote; the chunk to go on with, 0 where there is no checkpoint."""
    if not path.exists():
        return 0
    with safe_open(path, "pt") as file:
        parameters = dict(model.named_parameters())
        states: list[dict] = [{} for _ in optimizers]
        for key in file.keys():
            kind, rest = key.split(".", 1)
            if kind == "model":
                parameters[rest].data.copy_(file.get_tensor(key))
            else:
                j, i, k = rest.split(".")
                states[int(j)].setdefault(int(i), {})[k] = file.get_tensor(key)
        for optimizer, state in zip(optimizers, states):
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        return int(file.metadata()["chunk"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", choices=RECIPES)
    parser.add_argument("--tag", default="")
    parser.add_argument("--set", nargs="*", default=[])
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.train:
        changes = {k: (v if not v.replace(".", "").replace("e-", "").isdigit() else json.loads(v)) for k, v in (s.split("=") for s in args.set)}
        train(args.train, Recipe(**{**asdict(RECIPES[args.train]), **changes}), args.tag, args.minutes)


if __name__ == "__main__":
    main()

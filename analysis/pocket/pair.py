"""The pocket pair: a small and a large model that solve the pocket domain, and a large control.

    python -m analysis.pocket.pair --train slm     or llm, llm-short; an interrupted run goes on
    python -m analysis.pocket.pair --export slm    rounds the weights to bfloat16, into models/

Rows: log.jsonl of the folder of checkpoints; made.json beside the weights.
Feeds: everything that is said of the pocket pair.

All three are ordinary decoder-only models with one tokenizer, trained as Qwen2 and written as Llama (see
`as_llama`). SLM and LLM differ in depth, width and corpus: the SLM is shallow and writes results at once, the
LLM is deep and works results out (see `analysis.pocket.domain`). The control separates the two reasons for
which an LLM is slow, long answers and dear tokens: it is the LLM, trained further on the SLM's corpus.
"""
import argparse
import json
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from analysis.instruments.checkpoints import CHECKPOINTS, load_checkpoint, resume, save_checkpoint
from analysis.instruments.problems import verify
from analysis.instruments.progress import tracked
from analysis.instruments.provenance import provenance
from analysis.instruments.rows import append_row, read_rows
from analysis.instruments.task import encode_problems
from analysis.pocket.domain import problems, stream
from analysis.pocket.weights import MAX_NEW_TOKENS, MODELS

CONTEXT = 4096
# words, single digits and signs, each with the space before it
PIECES = r" ?[A-Za-z]+| ?\d|\n| ?[^A-Za-z\d\s]| "


@dataclass(frozen=True)
class Recipe:
    """How a model is made. Everything but the machine's rounding follows from it."""

    layers: int
    width: int
    mlp: int
    heads: int
    corpus: str  # see analysis.pocket.domain.CORPORA
    lr: float  # peak
    init: float  # standard deviation of the initial weights
    chunks: int  # of CHUNK problems each, every problem new
    decay: float = 0.35  # last share of the chunks, over which the learning rate falls to zero
    batch_tokens: int = 1024
    seed: int = 0
    start: str | None = None  # role whose trained weights this one starts from
    stop: int | None = None  # chunk to end after where that is before the schedule does, chosen on dev

    @property
    def end(self) -> int:
        return self.stop or self.chunks


CHUNK = 1024
RECIPES = {
    "slm-first": Recipe(layers=2, width=96, mlp=256, heads=6, corpus="short", lr=2e-3, init=0.1, chunks=190),
    "slm-second": Recipe(layers=2, width=96, mlp=256, heads=6, corpus="short", lr=2e-3, init=0.1, chunks=90,
                         decay=0.65, seed=1, start="slm-first"),
    "slm-third": Recipe(layers=2, width=96, mlp=256, heads=6, corpus="short", lr=1.2e-3, init=0.1, chunks=36,
                        decay=1.0, seed=2, start="slm-second"),
    "slm": Recipe(layers=2, width=96, mlp=256, heads=6, corpus="short", lr=2e-3, init=0.1, chunks=200,
                  decay=0.6, seed=3, start="slm-third", stop=175),
    "llm": Recipe(layers=12, width=96, mlp=256, heads=3, corpus="long", lr=2e-3, init=0.08, chunks=38,
                  decay=0.5),
    "llm-short": Recipe(layers=12, width=96, mlp=256, heads=3, corpus="short", lr=2e-3, init=0.08, chunks=24,
                        decay=0.5, start="llm"),
}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Every piece that the templates can produce; anything else becomes <unk>. Decoding joins the pieces, so
    text survives."""
    texts = [text for corpus in ("short", "long") for pair in stream(corpus, seed=0, chunk=-1, size=500)
             for text in pair]
    splitter = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    pieces = sorted({piece for text in texts for piece, _ in splitter.pre_tokenize_str(text)})
    # transformers finds stop strings by writing every token behind "abcdef", which must therefore be known.
    vocab = {piece: i for i, piece in enumerate(["<pad>", "<eos>", "<unk>", "\n", *pieces, "abcdef"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        padding_side="left",
        model_max_length=CONTEXT, clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}{{ '\\n' }}")


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    """A freshly initialised model, the same for the same recipe."""
    torch.manual_seed(recipe.seed)
    return Qwen2ForCausalLM(Qwen2Config(
        vocab_size=-(-len(tokenizer) // 32) * 32, hidden_size=recipe.width, intermediate_size=recipe.mlp,
        num_hidden_layers=recipe.layers, num_attention_heads=recipe.heads, num_key_value_heads=recipe.heads,
        initializer_range=recipe.init, max_position_embeddings=CONTEXT, tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))


def batches(tokenizer, recipe: Recipe, chunk: int,
            size: int = CHUNK) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The (ids, labels) of one chunk, both (B, T), grouped by length so that little is padding; only
    solutions are labelled."""
    pairs = list(stream(recipe.corpus, recipe.seed, chunk, size))
    prompts = tokenizer([question + "\n" for question, _ in pairs]).input_ids
    answers = tokenizer([solution + "<eos>" for _, solution in pairs]).input_ids
    rows = sorted(zip(prompts, answers), key=lambda row: len(row[0]) + len(row[1]))
    out, batch = [], []
    for i, row in enumerate(rows):
        batch.append(row)
        longest = len(row[0]) + len(row[1])
        if longest * (len(batch) + 1) > recipe.batch_tokens or i + 1 == len(rows):
            ids = torch.full((len(batch), longest), tokenizer.pad_token_id)
            labels = torch.full_like(ids, -100)
            for b, (prompt, answer) in enumerate(batch):
                ids[b, :len(prompt) + len(answer)] = torch.tensor(prompt + answer)
                labels[b, len(prompt):len(prompt) + len(answer)] = torch.tensor(answer)
            out.append((ids, labels))
            batch = []
    random.Random(chunk).shuffle(out)
    return out


def build_optimizer(model, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW; no decay on biases and norms."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95))


def schedule(done: float, recipe: Recipe) -> float:
    """Learning-rate factor after `done` chunks: warm-up over 1.6, constant, then linear to zero."""
    return min(done / 1.6, 1.0, (1 - done / recipe.chunks) / recipe.decay)


def train_chunk(model, optimizer, recipe: Recipe, chunk: int, work: list, label: str = "") -> float:
    """One pass over the batches of a chunk; the mean loss, in nats per labelled token."""
    model.train()
    losses = []
    for i, (ids, labels) in enumerate(tracked(work, label, leave=False)):
        logits = model(ids).logits[:, :-1]  # (B, T-1, V)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(),
                                                 ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * schedule(chunk + i / len(work), recipe)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return sum(losses) / len(losses)


def train(role: str, recipe: Recipe, folder: Path, size: int = CHUNK) -> Qwen2ForCausalLM:
    """Train one model. A checkpoint follows every chunk, so a killed run loses at most one and ends the
    same."""
    tokenizer = build_tokenizer()
    model = build_model(recipe, tokenizer)
    optimizer = build_optimizer(model, recipe)
    first = resume(folder, model, optimizer, "chunk")
    if recipe.start and not first and not load_checkpoint(folder.parent / recipe.start / "last.safetensors",
                                                          model):
        raise ValueError(f"--train {role} starts from {recipe.start}, which has no checkpoint: train "
                         f"{recipe.start} first")
    for chunk in range(first, recipe.end):
        start = time.time()
        work = batches(tokenizer, recipe, chunk, size)
        loss = train_chunk(model, optimizer, recipe, chunk, work, f"{role} {chunk + 1}/{recipe.end}")
        row = {"chunk": chunk, "loss": loss, "tokens": sum(ids.numel() for ids, _ in work),
               "seconds": time.time() - start}
        if chunk % 5 == 4 or chunk + 1 == recipe.end:
            row["dev_accuracy"] = dev_accuracy(model.eval(), tokenizer)
        append_row(folder / "log.jsonl", row)
        save_checkpoint(folder / "last.safetensors", model, optimizer, chunk + 1)
        print(json.dumps(row), flush=True)
    return model


@torch.inference_mode()
def dev_accuracy(model, tokenizer, n: int = 64) -> float:
    """Share of n dev problems answered rightly, greedily, by the model alone: watched while training, never
    trained on."""
    dev = problems("dev", n, seed=0)
    ids, mask = encode_problems(tokenizer, dev)
    out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
    texts = tokenizer.batch_decode(out[:, ids.shape[1]:], skip_special_tokens=True)
    return sum(map(verify, dev, texts)) / n


def as_llama(model: Qwen2ForCausalLM) -> LlamaForCausalLM:
    """The same function as a Llama model with attention biases, that of the output projection being 0.

    AutoTokenizer gives every folder of type qwen2 Qwen's own tokenizer, whatever lies in it; a Llama folder
    keeps its own.
    """
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads",
            "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "bos_token_id", "eos_token_id",
            "pad_token_id")
    llama = LlamaForCausalLM(LlamaConfig(attention_bias=True, rope_parameters=model.config.rope_parameters,
                                         **{key: getattr(model.config, key) for key in kept}))
    missing, unexpected = llama.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected and all(key.endswith("o_proj.bias") for key in missing), (missing, unexpected)
    for layer in llama.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.bias)
    return llama.eval()


def export(role: str, recipe: Recipe, folder: Path, target: Path) -> None:
    """Round a finished model to bfloat16 and write it as an ordinary `from_pretrained` folder, with how it
    was made."""
    tokenizer = build_tokenizer()
    model = build_model(recipe, tokenizer)
    chunks = load_checkpoint(folder / "last.safetensors", model)
    if chunks != recipe.end:
        raise ValueError(f"--export {role}: {folder} holds {chunks} chunks of {recipe.end}; train it to the "
                         "end first")
    as_llama(model).to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)
    log = read_rows(folder / "log.jsonl")
    made = {"recipe": asdict(recipe), "parameters": model.num_parameters(), "problems": chunks * CHUNK,
            "tokens": sum(row["tokens"] for row in log), "minutes": sum(row["seconds"] for row in log) / 60,
            "loss": log[-1]["loss"], **provenance(recipe.seed, chunks * CHUNK)}
    (target / "made.json").write_text(json.dumps(made, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--train", choices=RECIPES, help="train one model from its recipe, or continue")
    what.add_argument("--export", choices=["slm", "llm", "llm-short"],
                      help="write a trained model to analysis/pocket/models")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(),
                        help="of --train (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.train:
        train(args.train, RECIPES[args.train], CHECKPOINTS / args.train)
    else:
        export(args.export, RECIPES[args.export], CHECKPOINTS / args.export, MODELS / args.export)


if __name__ == "__main__":
    main()

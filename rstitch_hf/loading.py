"""Models, tokenizers and prompts from Hugging Face names, folders, adapters and GGUF files."""
import json
import platform
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import jinja2
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.distributed import DistributedConfig
from transformers.utils import logging

from rstitch_hf.ranks import world


def check_same_tokenizer(slm_tokenizer, llm_tokenizer, special_may_differ: bool = False) -> None:
    """ValueError naming the first token id at which two vocabularies differ: stitching passes ids from one
    model to the other.

    Special tokens come last. Where only they differ the pair can be run all the same, each model reading the
    other's markers as its own. The paper pairs models of two families (L1 with QwQ-32B) and does not say how
    it treats their markers."""
    slm_ids, llm_ids = ({i: token for token, i in t.get_vocab().items()}
                        for t in (slm_tokenizer, llm_tokenizer))
    special = {i for t in (slm_tokenizer, llm_tokenizer) for i in t.get_added_vocab().values()}
    for i in sorted(slm_ids.keys() | llm_ids.keys(), key=lambda i: (i in special, i)):
        if slm_ids.get(i) != llm_ids.get(i) and not (i in special and special_may_differ):
            hint = ("; only special tokens differ: --special-tokens-may-differ runs the pair all the same"
                    if i in special else "")
            raise ValueError(f"--slm and --llm have different tokenizers: token {i} is {slm_ids.get(i)!r} "
                             f"for the SLM and {llm_ids.get(i)!r} for the LLM; expected one vocabulary{hint}")


def check_columns(models, tokenizers) -> None:
    """ValueError for a token that one of the two models has no logit of: columns that only one model has are
    cut, so they must be padding."""
    widths = [model.get_output_embeddings().weight.shape[0] for model in models]
    last, token = max((i, token) for tokenizer in tokenizers for token, i in tokenizer.get_vocab().items())
    for option, width in zip(("--slm", "--llm"), widths):
        if last >= width:
            raise ValueError(f"{option} has {width} logit columns, but token {last} is {token!r} in the "
                             "tokenizer: expected a pair that both know every token")


def check_white_space(option: str, tokenizer) -> None:
    """ValueError for a tokenizer that loses the spaces between words, as one saved under the name of another
    kind does."""
    probe = "One more time,\nthen 1 + 2 is 3."
    text = tokenizer.decode(tokenizer(probe, add_special_tokens=False).input_ids).lower()
    if text.split() != probe.lower().split() and "".join(text.split()) == "".join(probe.lower().split()):
        raise ValueError(f"{option}: its tokenizer ({type(tokenizer).__name__}) reads {probe!r} as {text!r}, "
                         "without its white space; expected the tokenizer_class in tokenizer_config.json to "
                         "name the right kind, such as PreTrainedTokenizerFast")


def located(option: str, name: str) -> tuple[str, dict]:
    """(what from_pretrained takes, its keywords): a folder, a name of Hugging Face, FILE.gguf or
    REPO:FILE.gguf. ValueError for a path that leads nowhere."""
    path = Path(name)
    if name.endswith(".gguf") and not path.is_dir():
        if path.is_file():
            return str(path.parent), {"gguf_file": path.name}
        repo, colon, file = name.partition(":")
        if not colon:
            raise ValueError(f"{option} {name}: there is no such file; expected FILE.gguf, or REPO:FILE.gguf "
                             "of Hugging Face")
        return repo, {"gguf_file": file}
    if path.is_dir():
        if not any((path / config).is_file() for config in ("config.json", "adapter_config.json")):
            raise ValueError(f"{option} {name}: this folder has no config.json; expected model and tokenizer "
                             "as save_pretrained writes them")
    elif name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise ValueError(f"{option} {name}: there is no such folder")
    return name, {}


def load(auto, option: str, name: str, **options):
    """`auto.from_pretrained(name)`, no code from the checkpoint; ValueError naming the command line's option
    where there is no such model, or a package that it needs is missing."""
    source, where = located(option, name)
    try:
        return auto.from_pretrained(source, trust_remote_code=False, **where, **options)
    except ImportError as error:
        raise ValueError(f"{option} {name}: a package is missing ({' '.join(str(error).split())})") from error
    except OSError as error:
        raise ValueError(f"{option} {name}: neither here nor to be had from Hugging Face "
                         f"({str(error).splitlines()[0]})") from error


def load_tokenizer(option: str, name: str):
    """The tokenizer of a model, of an adapter without one that of its base. ValueError where there is none,
    or it loses white space."""
    located(option, name)
    folder = Path(name)
    if folder.is_dir() and not any(folder.glob("tokenizer*")):
        adapter = folder / "adapter_config.json"
        if not adapter.is_file():
            raise ValueError(f"{option} {name}: this folder has no tokenizer; expected model and tokenizer "
                             "as save_pretrained writes them")
        return load_tokenizer(option, json.loads(adapter.read_text())["base_model_name_or_path"])
    tokenizer = load(AutoTokenizer, option, name)
    check_white_space(option, tokenizer)
    return tokenizer


class TurnedLinear(torch.nn.Linear):
    """A linear layer that computes a product of few rows as (W x^T)^T.

    In float32 on a processor with AVX2, oneMKL takes two to three times as long for x W^T of 2 to 8 rows,
    what catching up and small batches read, and a third more at 64 (`python -m analysis.floors`).
    """

    FEW = range(2, 129)  # rows
    LARGE = 1 << 18  # weights, from which on the product costs more than the detour

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.numel() // self.in_features not in self.FEW:
            return super().forward(x)
        out = (self.weight @ x.reshape(-1, self.in_features).T).T.contiguous()
        return (out if self.bias is None else out + self.bias).view(*x.shape[:-1], -1)


def turn_products(model) -> None:
    """Let a model's large linear layers be `TurnedLinear` where that was measured to be faster."""
    if model.device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2":
        for module in model.modules():
            plain = type(module) is torch.nn.Linear and type(module.weight) is torch.nn.Parameter
            if plain and module.weight.dtype == torch.float32 and module.weight.numel() >= TurnedLinear.LARGE:
                module.__class__ = TurnedLinear


def check_divides(option: str, name: str, ranks: int) -> None:
    """ValueError for a model that cannot be split over so many ranks, before its weights are read."""
    if name.endswith(".gguf") or (Path(name) / "adapter_config.json").is_file():
        raise ValueError(f"{option} {name}: expected a model with safetensors of its own, for --tp splits it")
    config = load(AutoConfig, option, name).get_text_config(decoder=True)
    if not getattr(config, "base_model_tp_plan", None):
        raise ValueError(f"{option} {name} cannot be split by --tp: transformers has no tensor parallel plan "
                         f"for {config.model_type}")
    for what in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, what, None) or config.num_attention_heads
        if heads % ranks:
            raise ValueError(f"{option} {name} has {what}={heads}: expected a number of ranks that divides "
                             f"it, got {ranks}")


def load_model(option: str, name: str, device: str = "cpu", dtype: str = "auto", split: bool = False):
    """A causal LM, ready to run: weights from safetensors, or from a GGUF file, whose packed weights are
    unpacked to dtype. An adapter's folder loads its base and the adapter. On device "auto" accelerate spreads
    it over the GPUs that are there, then the processor's memory, then the disk. split: over the ranks that
    torchrun started, by transformers' own plan."""
    packed = name.endswith(".gguf")
    options = {"quantization_config": GgufConfig(dequantize=True)} if packed else {"use_safetensors": True}
    options |= {"device_map": "auto"} if device == "auto" else {}
    options |= {"distributed_config": DistributedConfig(tp_plan="auto")} if split else {}
    model = load(AutoModelForCausalLM, option, name, dtype=dtype, **options).eval()
    model = model if split or device in ("auto", str(model.device)) else model.to(device)
    turn_products(model)
    return model


def warn_of_slow_halves(models) -> None:
    """Warn where weights have 16 bits and an x86 processor no AVX512: that saves memory and costs time."""
    slow = platform.machine() in ("x86_64", "AMD64") and "512" not in torch.backends.cpu.get_cpu_capability()
    halves = {str(model.dtype).removeprefix("torch.") for model in models
              if model.device.type == "cpu" and model.dtype in (torch.bfloat16, torch.float16)}
    if slow and halves:
        warnings.warn(f"in {' and '.join(sorted(halves))} this processor is slower than in float32, with "
                      "large models several times; float32 takes twice the memory", stacklevel=3)


def turn_end(tokenizer) -> int | None:
    """The special token with which the chat template ends a turn of the assistant, if it does."""
    if not tokenizer.chat_template:
        return None
    try:
        text = tokenizer.apply_chat_template([{"role": "user", "content": "question"},
                                              {"role": "assistant", "content": "reply"}], tokenize=False)
    except jinja2.TemplateError:
        return None
    _, said, after = text.rpartition("reply")
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = tokenizer(after.strip(), add_special_tokens=False).input_ids if said else []
    return ids[0] if ids and ids[0] in special else None


def complete_ends(model, tokenizer) -> None:
    """Add to a model's generation config what else ends an answer: the tokenizer's EOS, and what ends a turn
    in its chat template. Many checkpoints list one of them only, and would write on past the other to the
    token limit."""
    given = model.generation_config.eos_token_id
    ends = [] if given is None else [given] if isinstance(given, int) else list(given)
    missing = {tokenizer.eos_token_id, turn_end(tokenizer)} - {None, *ends}
    if missing:
        model.generation_config.eos_token_id = ends + sorted(missing)


def load_pair(slm: str, llm: str, device: str = "cpu", dtype: str = "auto", special_may_differ: bool = False,
              split_llm: bool = False):
    """(SLM, LLM, the LLM's tokenizer), each model from a name of Hugging Face, a folder (an adapter's too),
    FILE.gguf or REPO:FILE.gguf. dtype "auto" is the checkpoint's; of 16 bits it warns on a processor that is
    slow with them. Their generation configs are completed, see `complete_ends`. split_llm: under torchrun
    each rank holds a part of the LLM, and all of the SLM. ValueError where there is no such model, or the
    tokenizers differ (`check_same_tokenizer`)."""
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    names = {"--slm": slm, "--llm": llm}
    tokenizers = [load_tokenizer(option, name) for option, name in names.items()]
    check_same_tokenizer(*tokenizers, special_may_differ)
    if split_llm:
        check_divides("--llm", llm, world())
    models = [load_model(option, name, device, dtype, split_llm and option == "--llm")
              for option, name in names.items()]
    check_columns(models, tokenizers)
    warn_of_slow_halves(models)
    for model, tokenizer in zip(models, tokenizers):
        complete_ends(model, tokenizer)
    return *models, tokenizers[1]


def left_padded(rows: Sequence[list[int]], pad: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids, attention_mask) of prompts of any length, (B, P) each."""
    width = max(map(len, rows))
    return (torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows]),
            torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]))


# one message of the user, or the messages so far, {"role": ..., "content": ...} each
Question = str | Sequence[dict]


def check_question(question: Question) -> None:
    """ValueError unless there is something to answer: a text, or messages of which the last is not the
    assistant's."""
    if isinstance(question, str) and question.strip():
        return
    if (not isinstance(question, Sequence) or isinstance(question, str) or not question
            or not all(isinstance(m, dict) for m in question)):
        raise ValueError(f"question={question!r}: expected a text, or a list of messages; give several as "
                         "several arguments")
    if not all({"role", "content"} <= m.keys() for m in question) or question[-1]["role"] == "assistant":
        raise ValueError(f"question={question!r}: expected messages with a role and a content, the last of "
                         "which is to be answered")
    if not all(isinstance(m["content"], str | None) for m in question) or question[-1]["content"] is None:
        raise ValueError(f"question={question!r}: expected a text as the content of a message, not its parts")


def check_prompting(tokenizer, questions: Sequence[Question], system: str | None, template: dict) -> None:
    """ValueError for what the chat template, or a tokenizer without one, would ignore."""
    if not questions:
        raise ValueError("questions=(): expected one or more")
    for question in questions:
        check_question(question)
    if not tokenizer.chat_template:
        if system is not None or template or not all(isinstance(question, str) for question in questions):
            what = (f"system={system!r}" if system is not None
                    else f"{next(iter(template))}" if template else "a list of messages")
            raise ValueError(f"{what}: this tokenizer has no chat template; expected plain questions")
        return
    known = tokenizer.get_chat_template()
    for name in template:
        if not re.search(rf"\b{re.escape(name)}\b", known):
            raise ValueError(f"{name}={template[name]!r}: the chat template of this tokenizer has no such "
                             "option")
    if system is not None and any(not isinstance(q, str) and q[0]["role"] == "system" for q in questions):
        raise ValueError(f"system={system!r}: the messages begin with a system message of their own; "
                         "expected one of the two")


def messages_of(question: Question, system: str | None, instruction: str | None) -> list[dict]:
    """A conversation: the system's message, the question's, and the instruction on a line of its own behind
    the last."""
    messages = ([{"role": "user", "content": question}] if isinstance(question, str)
                else [dict(message) for message in question])
    if instruction:
        messages[-1]["content"] += f"\n{instruction}"
    return ([{"role": "system", "content": system}] if system is not None else []) + messages


def encode(tokenizer, *questions: Question, system: str | None = None, instruction: str | None = None,
           **template) -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids, attention_mask) of the prompts, (B, P) each, padded on the left.

    A question is a user's message, or a list of messages for several turns, put into the tokenizer's chat
    template; where it has none, a text as it stands. system: the system's message, None for the template's
    own. instruction: a line added behind the question. template: options of the chat template, such as
    enable_thinking=False of Qwen3. ValueError for a question without text, and for what would be ignored."""
    check_prompting(tokenizer, questions, system, template)
    chats = [messages_of(question, system, instruction) for question in questions]
    if tokenizer.chat_template:
        try:
            texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True,
                                                   **template) for chat in chats]
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template of this tokenizer refuses the messages: {error}") from error
    else:
        texts = [chat[-1]["content"] for chat in chats]
    rows = [tokenizer(text, add_special_tokens=not tokenizer.chat_template).input_ids for text in texts]
    # Many tokenizers have no padding token. The mask hides it, but not from who decodes the sequences.
    pads = [pad for pad in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if pad is not None]
    return left_padded(rows, pads[0])

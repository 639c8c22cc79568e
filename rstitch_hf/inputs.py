"""What goes into `stitch`: prompts as tensors or lists, draws and seeds, and what is wrong with them.

Bad input is told in one sentence that names the argument, its value and what is expected, before any work.
"""
import hashlib
import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real

import torch

from rstitch_hf.serving import context_of


def check_count(name: str, value, least: int = 1) -> None:
    """ValueError unless value is an integer, `least` or more."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name}={value!r}: expected an integer, {least} or more")


def check_router(router) -> None:
    """TypeError or ValueError for what is no router, before any work."""
    for method in ("leave_slm", "leave_llm"):
        if isinstance(router, type) or not callable(getattr(router, method, None)):
            raise TypeError(f"router={router!r} has no method {method}(step): expected an object such as "
                            "EntropyRouter(0.02)")
    if getattr(router, "first", 0) not in (0, 1):
        raise ValueError(f"router.first={router.first!r}: expected SLM (0) or LLM (1)")
    check_count("router.window", getattr(router, "window", 1))


def check_decision(router, model: int, leave, token: torch.Tensor) -> None:
    """TypeError unless a router returned one bool per row, on the device of the tokens."""
    got = ((leave.dtype, tuple(leave.shape), leave.device) if isinstance(leave, torch.Tensor)
           else type(leave).__name__)
    if got != (torch.bool, tuple(token.shape), token.device):
        raise TypeError(f"router {type(router).__name__}.leave_{('slm', 'llm')[model]} returned {got}: "
                        f"expected a bool tensor of shape {tuple(token.shape)} on {token.device}")


def check_arguments(router, slots: int | None, **functions) -> None:
    """TypeError or ValueError for a router, slots or functions that are none."""
    check_router(router)
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise TypeError(f"{name}={function!r}: expected a function, or None")
    if slots is not None:
        check_count("slots", slots)


def check_policies(policy, threshold, back, threshold_back, tau_back, seed: int | None) -> None:
    """ValueError for thresholds that are no probabilities or do not fit the nets of a PolicyRouter and its
    seed, and for a net whose dropout is on."""
    for name, p, net in (("threshold", threshold, policy), ("threshold_back", threshold_back, back)):
        if not (isinstance(p, Real) and 0 <= p <= 1):
            raise ValueError(f"{name}={p!r}: expected a probability in [0, 1]")
        if seed is not None and p != 0.5:
            raise ValueError(f"{name}={p!r} with seed={seed!r}: expected 0.5, actions are sampled")
        if net is not None and any(isinstance(m, torch.nn.Dropout) and m.training and m.p
                                   for m in net.modules()):
            raise ValueError("a net with dropout is in training mode: call .eval() first")
    if back is None and threshold_back != 0.5:
        raise ValueError(f"threshold_back={threshold_back!r}: expected a policy `back`, whose it is")
    if back is not None and tau_back is not None:
        raise ValueError(f"tau_back={tau_back!r} with a policy `back`: expected one of them")


def check_scores(name: str, scores, logits: torch.Tensor) -> None:
    """TypeError unless the process of this name returned one score per logit (V,), on the same device."""
    tensor = isinstance(scores, torch.Tensor)
    got = (scores.dtype, tuple(scores.shape), scores.device) if tensor else type(scores).__name__
    shape, device = tuple(logits.shape), logits.device
    if not (tensor and scores.is_floating_point()) or got[1:] != (shape, device):
        raise TypeError(f"process {name} returned {got}: expected floats of shape {shape} on {device}")


def row_seeds(seed: int | Sequence[int] | None, B: int) -> list[int]:
    """One seed per row: an integer gives row i one made from (seed, i), a list is taken as it is, None draws
    from torch's generator. ValueError for what is neither. What is sampled follows from a seed's lowest 32
    bits, all that torch's generator on the CPU takes."""
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    if isinstance(seed, Integral):
        return [int.from_bytes(hashlib.sha256(f"{seed} {i}".encode()).digest()[:7], "big") for i in range(B)]
    if (not isinstance(seed, Sequence) or len(seed) != B
            or not all(isinstance(s, Integral) and abs(s) < 2**63 for s in seed)):
        raise ValueError(f"seed={seed!r}: expected an integer, or a sequence of one integer below 2**63 per "
                         f"row, {B}")
    return [int(s) for s in seed]


def row_limits(max_new_tokens: int | Sequence[int], B: int) -> list[int]:
    """How many tokens each row may write; ValueError for what is no count, or not one per row."""
    limits = list(max_new_tokens) if isinstance(max_new_tokens, (list, tuple)) else [max_new_tokens] * B
    if len(limits) != B:
        raise ValueError(f"max_new_tokens has {len(limits)} numbers: expected one, or one per row, {B}")
    for limit in limits:
        check_count("max_new_tokens", limit)
    return limits


def unpadded(input_ids, attention_mask: torch.Tensor | None) -> list[list[int]]:
    """The prompts without their left padding; ValueError or TypeError for what is no batch of prompts."""
    if isinstance(input_ids, Mapping):
        raise TypeError(f"input_ids is a {type(input_ids).__name__}: expected its fields, "
                        "input_ids=x['input_ids'], attention_mask=x['attention_mask']")
    if isinstance(input_ids, (list, tuple)):
        return listed(input_ids, attention_mask)
    if not isinstance(input_ids, torch.Tensor) or input_ids.dtype not in (torch.int64, torch.int32):
        got = getattr(input_ids, "dtype", type(input_ids).__name__)
        raise TypeError(f"input_ids is {got}: expected a tensor of token ids, int64 or int32, or lists of "
                        "them")
    if input_ids.ndim != 2 or 0 in input_ids.shape:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}: expected (rows, tokens), at least 1 "
                         "x 1")
    if attention_mask is None:
        return input_ids.tolist()
    if not isinstance(attention_mask, torch.Tensor):
        raise TypeError(f"attention_mask is a {type(attention_mask).__name__}: expected a tensor of 0 and 1")
    if attention_mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}: expected that of "
                         f"input_ids, {tuple(input_ids.shape)}")
    mask = attention_mask.bool()
    if not mask[:, -1].all() or (mask[:, :-1] & ~mask[:, 1:]).any():
        raise ValueError("attention_mask has a 0 after a 1: expected padding on the left only, and no empty "
                         "prompt")
    return [ids[keep].tolist() for ids, keep in zip(input_ids, mask)]


def listed(prompts: Sequence, attention_mask) -> list[list[int]]:
    """Prompts given as lists of token ids; ValueError or TypeError for what is none, or comes with a mask."""
    if attention_mask is not None:
        raise ValueError("attention_mask with lists of token ids: expected none, since lists have no padding")
    if not prompts or not all(isinstance(ids, (list, tuple)) and ids for ids in prompts):
        raise ValueError("input_ids: expected a list with a list of token ids per row, none of them empty")
    if not all(type(token) is int for ids in prompts for token in ids):
        raise TypeError("input_ids holds something that is no integer: expected token ids")
    return [list(ids) for ids in prompts]


def end_tokens(eos_token_id, models: Sequence, vocab: float = math.inf) -> list[int]:
    """The tokens that end an answer: those given, else every EOS of either model. ValueError for what is no
    token, or lies beyond the `vocab` logits that both models have."""
    own = [model.generation_config.eos_token_id for model in models]
    given = own if eos_token_id is None else [eos_token_id]
    try:
        tokens = [token for entry in given if entry is not None
                  for token in torch.as_tensor(entry).flatten().tolist()]
    except (TypeError, ValueError, RuntimeError):
        tokens = [None]
    if not all(type(token) is int for token in tokens):
        raise ValueError(f"eos_token_id={eos_token_id!r}: expected a token id or several, or None for those "
                         "of the models")
    if max(tokens, default=0) >= vocab:
        whose = "given" if eos_token_id is not None else "a model's own"
        raise ValueError(f"eos_token_id={max(tokens)}, {whose}: nothing would ever end with it, expected "
                         f"tokens below {vocab}, the logits that both models have")
    return tokens


def pads_of(lms: Sequence) -> list[int]:
    own = [lm.model.generation_config.pad_token_id for lm in lms]
    return [pad for pad in own if pad is not None and pad >= 0]


def padding_token(pad_token_id: int | None, lms: Sequence, eos: Sequence[int]) -> int:
    """What fills short answers: the token given, the models' own, one that ends an answer, else 0."""
    own = [token for token in [*pads_of(lms), *eos] if token >= 0]
    pad = pad_token_id if pad_token_id is not None else [*own, 0][0]
    check_count("pad_token_id", pad, least=0)
    return pad


def check_padding(input_ids, attention_mask, prompts: list[list[int]], lms: Sequence,
                  eos: Sequence[int], pad_token_id: int | None) -> None:
    """ValueError for a tensor of several prompts that looks padded and comes without a mask."""
    if attention_mask is not None or len(prompts) == 1 or not isinstance(input_ids, torch.Tensor):
        return
    pads = pads_of(lms) if pad_token_id is None else [pad_token_id]
    if any(ids[0] in set(pads) - set(eos) for ids in prompts):  # a prompt may well begin with an EOS
        raise ValueError("input_ids has rows that begin with a padding token: expected an attention_mask "
                         "with 0 where a row is padded")
    if 0 < sum(ids[-1] in pads for ids in prompts) < len(prompts):
        raise ValueError("input_ids has rows that end with a padding token: expected padding on the left, "
                         "and an attention_mask")


def check_context(what: str, name: str, model, length: int) -> None:
    """ValueError where rows of `length` tokens, which `what` asks for, exceed a model's context."""
    if length > (context := context_of(model)):
        raise ValueError(f"{what} to {length} tokens: the context of {name} is {context}")


def check_fits(name: str, lm, prompts: list[list[int]], slots: int, length: int) -> None:
    """ValueError where rows of up to `length` tokens exceed a cache, a model's context or its vocabulary, and
    for numbers of another dtype than the cache's."""
    lowest, highest = min(map(min, prompts)), max(map(max, prompts))
    if not lm.layers:
        raise ValueError(f"the CachedLM given as {name} is closed")
    if slots > lm.batch_size or length > lm.max_len:
        raise ValueError(f"input_ids needs {slots} rows of {length} tokens: the CachedLM given as {name} "
                         f"holds {lm.batch_size} of {lm.max_len}")
    check_context("max_new_tokens brings the longest row", name, lm.model, length)
    if lm.model.dtype != lm.dtype:
        raise ValueError(f"the CachedLM given as {name} was made for {lm.dtype}: its model is in "
                         f"{lm.model.dtype} now")
    if torch.is_autocast_enabled(lm.inputs.device.type):
        raise ValueError(f"stitch under torch.autocast: expected {name} in the dtype that is wanted, as "
                         "from_pretrained(..., dtype=...) loads it")
    if lowest < 0 or highest >= lm.vocab:
        raise ValueError(f"input_ids ranges from {lowest} to {highest}: {name} knows tokens 0 to "
                         f"{lm.vocab - 1}")

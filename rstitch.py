"""rstitch: one answer, written token by token by a small and a large language model.

A small model (SLM) writes most of a chain of thought cheaply; a large one (LLM) writes the tokens that matter. R-Stitch (arXiv
2507.17307) hands over where the SLM's next-token entropy is high; R-Stitch+ learns where, by reinforcement, with a latency model
in its reward; R2R (arXiv 2505.21600) trains a network on tokens where the two models' reasoning diverges. Each is a router of a
few lines (sections 3, 6 and 7) in one loop (section 4) over two cached models (section 2).

The idea that keeps it small: a problem is ONE token sequence with TWO cursors into it, one per model. A cursor says how much of
the sequence the model's KV cache has read. Prefill, catching up after a switch and plain decoding are then one operation:

    model m reads the tokens between its cursor and the end, and proposes the next token.

Switching models is running the other one. To discard a token is not to append it: no model has read it yet, so nothing is rolled back.
What a router decides is only who reads next (Algorithm 1 of R-Stitch; H is the entropy of the proposing model):

    active   router says            the proposed token is         next active
    SLM      stay   (H <= tau)      kept                          SLM
    SLM      leave  (H >  tau)      discarded: never read         LLM, which writes this position
    LLM      stay   (H >  tau)      kept                          LLM
    LLM      leave  (H <= tau)      kept                          SLM

Glossary (code name, paper symbol, unit, default):

    B, n, S, T, V, D   rows of a batch; rows and tokens of one read; cache slots; logit columns; hidden size (in a cache: of one head)
    P, N, G            prompt columns; tokens of the longest answer; answers per prompt (training, where P counts prompts)
    entropy            H_t of R-Stitch Eq. 1, in nats. The paper divides by log V; here the unit is always named
    tau                threshold on the entropy, R-Stitch section 3; normalised to [0, 1] unless unit="nats"; 0.02
    window             entropies averaged before comparing with tau: the proposal's and those of the last kept tokens; 1 (the paper)
    SLM, LLM = 0, 1    the two sources of tokens
    kept               appended to the answer; an SLM proposal at which the router leaves is not
    position           index of a token in the answer, 0 for the first; in section 2, as in transformers, in the whole sequence
    cursor             L of R-Stitch Algorithm 1: tokens a model has read of a row, prompt included
    n_inf, n_kv        N_inf, N_kv of the R-Stitch latency model: tokens a call reads, tokens its cache held before
    lam                lambda of R-Stitch+'s reward: what a millisecond of latency costs, 5e-6
    logp, A            log-probability of a decision, its advantage (DAPO)

    python rstitch.py                                         # three problems by the pocket pair, then every method in a table
    python rstitch.py "Ann has 596 coins. First Ann ends up with 7 times as many. Finally Ann loses 120. How many coins does Ann have?"
    python rstitch.py --slm SMALL --llm LARGE "question"      # any Hugging Face names or paths with one tokenizer
"""
import argparse
import hashlib
import inspect
import itertools
import json
import math
import os
import random
import re
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from numbers import Integral, Real
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np
import scipy.optimize
import torch
from safetensors.torch import load_file
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionCacheLayerMixin
from transformers.utils import logging

SLM, LLM = 0, 1
NAMES = ("SLM", "LLM")


def check_count(name: str, value, least: int = 1) -> None:
    """ValueError unless value is an integer, `least` or more."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name}={value!r}: expected an integer, {least} or more")


# ---- 1. Uncertainty and sampling -----------------------------------------------------------------------------------------


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """Entropy of the next-token distribution in nats, float32: (..., V) -> (...).

    R-Stitch Eq. 1 without its division by log V. Taken in float32 because bfloat16 arithmetic is off by some hundredths of
    a nat at V = 152k, more than the thresholds of interest; p log p is 0 where p underflows or a logit is -inf.
    """
    return torch.special.entr(logits.float().softmax(-1)).sum(-1)


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits; temperature 0 is greedy, whatever the rest. The filters mean what they mean in
    `transformers`: temperature first, then the top_k largest, then the smallest set that holds top_p of what is left.
    ValueError for numbers outside their ranges."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        check_count("top_k", self.top_k, least=0)
        if not (isinstance(self.temperature, Real) and 0 <= self.temperature < math.inf):
            raise ValueError(f"temperature={self.temperature!r}: expected a finite number, 0 (greedy) or more")
        if not (isinstance(self.top_p, Real) and 0 < self.top_p <= 1):
            raise ValueError(f"top_p={self.top_p!r}: expected a number in (0, 1]")

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """The warped distribution, float32: (n, V) -> (n, V)."""
        logits = logits.float()
        logits = (logits - logits.amax(-1, keepdim=True)) / max(self.temperature, 1e-30)  # no overflow, however cold
        if self.top_k:
            kth = logits.topk(min(self.top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < kth, -torch.inf)
        probs = logits.softmax(-1)
        if self.top_p < 1:
            p, order = probs.sort(descending=True)
            dropped = p.cumsum(-1) - p >= self.top_p  # the likelier tokens alone hold top_p
            probs = probs.masked_fill(dropped.scatter(-1, order, dropped), 0.0)
        return probs

    def draw(self, logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        """One token per row, (n, V) and (n,) in [0, 1) -> (n,), by inverting the CDF.

        The uniforms come from outside, so a draw depends neither on the batch nor on the order of the calls. A token of
        probability 0 is never drawn, even where a parallel cumulative sum is not quite monotone.
        """
        if self.temperature == 0:
            return logits.argmax(-1)
        probs = self.probabilities(logits)
        cdf = probs.cumsum(-1).masked_fill(probs == 0, 0.0)
        total = cdf.amax(-1)
        target = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
        return (cdf > target[:, None]).to(torch.uint8).argmax(-1)  # the first True


GREEDY = Sampling()


# ---- 2. Cached models ----------------------------------------------------------------------------------------------------
# Slot t of row b holds the token at position t of row b, so rows stand at different lengths and a mask is
# just "slot <= position". All there is to do with it is CachedLM.read: some rows read some tokens each, and
# each proposes its next one. Before it come its parts: the layers of the cache, attention over it, which
# models can be served, and CUDA graphs, which need few different shapes. A recurrent layer has no slots but
# one state per row, of all that the row has read: no pad is given to it, and no row that does not read.


BLOCK = 64  # attention reads the slots up to the end of the longest row ("live"), rounded up to a multiple of this; see live_slots
CHUNK = 2048  # tokens in one forward call at most
# Pads that a forward call may hold: on a CPU they cost less than a second call, which reads all weights again,
# up to about so many (measured). For a GPU, which computes faster than it reads, more are assumed: not measured.
FREE = {"cpu": 32, "cuda": 128}
SHORT = 32  # under graphs, reads up to this are padded to a power of two


def live_slots(end: int, coarse: bool) -> int:
    """How many slots attention reads where the longest row ends at `end`: rounded up to BLOCK, or if coarse to an eighth of the next power
    of two, so that few graphs serve all lengths."""
    unit = max(BLOCK, (1 << (end - 1).bit_length()) // 8) if coarse else BLOCK
    return -(-end // unit) * unit


@dataclass
class Place:
    """What the layers of a cache need to know of the current read: its rows (a slice where they are
    neighbours: an index (n,) copies what it selects), its slots (n, 1, S, 1), how many slots are live, and
    whether any row had read before."""

    rows: slice | torch.Tensor = None
    slots: torch.Tensor = None
    live: int = 0
    started: bool = False


class StitchLayer(CacheLayerMixin):
    """Keys and values of one layer, (B, H, T, D) each, allocated once and written in place at per-row positions."""

    is_compileable = True
    is_sliding = False

    def __init__(self, place: Place, batch_size: int, slots: int):
        super().__init__()
        self.place, self.shape, self.viewed = place, (batch_size, slots), None

    @torch.inference_mode(False)  # a tensor made in inference mode cannot be written outside of it
    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        B, T = self.shape
        self.keys = key_states.new_zeros(B, key_states.shape[1], T, key_states.shape[3])
        self.values = value_states.new_zeros(B, value_states.shape[1], T, value_states.shape[3])
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Write (n, H, S, D) at the read's positions; return the live part of the rows that read, (n, H, live, D)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, slots, live = self.place.rows, self.place.slots, self.place.live
        if isinstance(rows, slice):
            if self.viewed != (rows, live):  # making two views costs as much as writing a token
                self.viewed, self.views = (rows, live), (self.keys[rows, :, :live], self.values[rows, :, :live])
            keys, values = self.views
            keys.scatter_(2, slots.expand_as(key_states), key_states)
            values.scatter_(2, slots.expand_as(value_states), value_states)
            return keys, values
        here = rows[:, None], slice(None), slots[:, 0, :, 0]
        self.keys[here] = key_states.transpose(1, 2)  # (n, S, H, D)
        self.values[here] = value_states.transpose(1, 2)
        return self.keys[:, :, :live].index_select(0, rows), self.values[:, :, :live].index_select(0, rows)  # faster than indexing

    def reset(self, rows: slice | list[int] = slice(None)) -> None:
        if self.is_initialized:
            self.keys[rows], self.values[rows] = 0, 0

    def fork(self, source: int, n: int, targets: Sequence[int]) -> None:
        """Copy the first n slots of one row to others."""
        if self.is_initialized:
            for x, row in itertools.product((self.keys, self.values), targets):
                x[row, :, :n] = x[source, :, :n]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.place.live, 0

    def get_seq_length(self) -> int:  # rows differ in theirs; models ask only where no position_ids are given
        return self.place.live

    def get_max_length(self) -> int:
        return self.shape[1]

    get_max_cache_shape = get_max_length  # its name before transformers 5.20


class RecurrentLayer(LinearAttentionCacheLayerMixin):
    """Convolution and recurrent state of one layer, one each per row, (B, ...), allocated once; at first 0.

    Models change them in place where they read one token, and through `update_*` where they read several. So
    `begin` hands out those of the rows that read, a view where the rows are neighbours, else a copy, which
    `end` writes back.
    """

    def __init__(self, place: Place, batch_size: int):
        super().__init__()
        self.place, self.batch_size = place, batch_size
        self.states: dict[str, torch.Tensor] = {}  # some models have no recurrent state
        self.lent = {"conv": self.conv_states, "recurrent": self.recurrent_states}  # where models look

    def begin(self) -> None:
        self.has_previous_state[0] = self.place.started and bool(self.states)
        for kind, states in self.states.items():
            self.lent[kind][0] = states[self.place.rows]

    def end(self) -> None:
        for kind, states in self.states.items():
            if not isinstance(self.place.rows, slice):
                states.index_copy_(0, self.place.rows, self.lent[kind][0])
            self.lent[kind][0] = None

    @torch.inference_mode(False)  # see StitchLayer
    def allocate(self, kind: str, like: torch.Tensor, *shape: int) -> None:
        self.states[kind] = like.new_zeros(self.batch_size, *shape)
        self.lent[kind][0] = self.states[kind][self.place.rows]

    lazy_initialization = allocate

    def update_conv_state(self, conv_states: torch.Tensor, state_idx: int, conv_kernel_size: int, **kwargs):
        """Keep the last K of the columns that come in, (n, C, S); return the old and all these."""
        if "conv" not in self.states:
            self.allocate("conv", conv_states, conv_states.shape[1], conv_kernel_size)
        kept = self.conv_states[0]
        seen = torch.cat([kept, conv_states], dim=-1)
        kept.copy_(seen[..., -kept.shape[-1]:])
        return seen

    def update_recurrent_state(self, recurrent_states: torch.Tensor, state_idx: int, **kwargs):
        if "recurrent" not in self.states:
            self.allocate("recurrent", recurrent_states, *recurrent_states.shape[1:])
        return self.recurrent_states[0].copy_(recurrent_states)

    def reset(self, rows: slice | list[int] = slice(None)) -> None:
        for states in self.states.values():
            states[rows] = 0

    def fork(self, source: int, n: int, targets: Sequence[int]) -> None:
        """Copy the state of one row, which has read n tokens, to others."""
        for states, row in itertools.product(self.states.values(), targets):
            states[row] = states[source]


class HybridLayer(StitchLayer, RecurrentLayer):
    """What a layer that attends and has a state keeps. `lazy_initialization` is that of its slots."""

    def __init__(self, place: Place, batch_size: int, slots: int):
        RecurrentLayer.__init__(self, place, batch_size)
        StitchLayer.__init__(self, place, batch_size, slots)

    def reset(self, rows: slice | list[int] = slice(None)) -> None:
        StitchLayer.reset(self, rows)
        RecurrentLayer.reset(self, rows)

    def fork(self, source: int, n: int, targets: Sequence[int]) -> None:
        StitchLayer.fork(self, source, n, targets)
        RecurrentLayer.fork(self, source, n, targets)


def grouped_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Grouped-query attention by `sdpa` that reads every cached key once: queries (n, H, S, D), keys and values (n, K, T, D) of K <= H
    heads, additive mask (n, 1, S, T) -> (n, S, H, D).

    The query heads that share a key become rows of one query. transformers' own `sdpa`, given a mask, first copies keys and values
    H / K times (since 5.23 only for reads of two tokens or more), which takes several times as long as the attention itself.
    ValueError for soft caps and sinks: sdpa has neither, such models use eager.
    """
    if any(kwargs.get(name) is not None for name in ("softcap", "s_aux")):
        raise ValueError(f"{type(module).__name__} has a soft cap or sinks: expected attn_implementation='eager', not 'sdpa'")
    n, H, S, D = query.shape
    shared = H // key.shape[1]
    query = query.reshape(n, -1, shared * S, D)  # (n, K, shared S, D)
    mask = attention_mask if S == 1 else attention_mask.repeat(1, 1, shared, 1)  # (n, 1, shared S, T)
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(n, H, S, -1).transpose(1, 2).contiguous(), None  # (n, S, H, D)


GROUPED = "rstitch_grouped"
AttentionInterface.register(GROUPED, grouped_attention)


def attention_of(config) -> str:
    """Which attention to use: ours where query heads share keys and the model would use sdpa without a soft cap, else the model's own."""
    heads = getattr(config, "num_attention_heads", 0)  # Mamba's has none
    shares = (getattr(config, "num_key_value_heads", None) or math.inf) < heads
    plain = config._attn_implementation == "sdpa" and not getattr(config, "attn_logit_softcapping", None)
    return GROUPED if shares and plain else config._attn_implementation


class Output(NamedTuple):
    """What a read returns, per row: raw logits (n, V) float32, last hidden state (n, D), drawn token (n,), entropy (n,)."""

    logits: torch.Tensor
    hidden: torch.Tensor
    token: torch.Tensor
    entropy: torch.Tensor


# Of all causal models of transformers 5.23 that take position_ids, those that differ from a full recompute all the same.
MISPLACED = frozenset("""gpt_neo moshi roberta roberta-prelayernorm camembert data2vec-text xlm-roberta xlm-roberta-xl xmod""".split())


@lru_cache(maxsize=None)
def forward_arguments(kind: type) -> frozenset[str]:
    """What the forward of a class of models takes; kept, because asking takes as long as a token of a small one."""
    return frozenset(inspect.signature(kind.forward).parameters)


# The model_type of models with recurrent layers that were tested, by how they read several tokens from a
# given state: in one call, or, because their scan starts from zero whatever the cache holds, token by token.
CHUNKED = frozenset("""qwen3_5_text qwen3_5_moe_text qwen3_next olmo_hybrid lfm2 lfm2_moe granitemoehybrid
                       falcon_h1 bamba nemotron_h mamba2 zamba2""".split())
STEPWISE = frozenset("mamba falcon_mamba jamba zamba".split())


def cache_keyword(model) -> str:
    """What the model's forward calls its cache: transformers renamed it in 5.24."""
    accepts = forward_arguments(type(model))
    return next((name for name in ("cache", "cache_params") if name in accepts), "past_key_values")


def bare(model):
    """The model of transformers inside of one that torch.compile or PEFT made. An adapter lives in its layers, so it counts; compiled code
    does not run, since every new shape would compile anew."""
    model = getattr(model, "_orig_mod", model)
    wrapped = callable(getattr(model, "get_base_model", None)) and not isinstance(model, PreTrainedModel)
    return model.get_base_model() if wrapped else model


def check_servable(model, max_len: int, name: str = "model") -> None:
    """ValueError or TypeError for a model whose rows cannot be at different lengths in one batch, before anything is computed."""
    if any(getattr(config, "is_prompt_learning", False) for config in getattr(getattr(model, "_orig_mod", model), "peft_config", {}).values()):
        raise ValueError(f"{name} has an adapter of virtual tokens: expected one that lives in the layers, such as LoRA")
    model = bare(model)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"{name} is a {type(model).__name__}: expected a decoder-only model of transformers")
    name, config = f"{name} ({type(model).__name__})", model.config.get_text_config(decoder=True)
    accepts = forward_arguments(type(model))
    recurrent = config.model_type in CHUNKED | STEPWISE
    needed = ["position_ids", "attention_mask", cache_keyword(model), "logits_to_keep"]
    missing = [a for a in needed[recurrent:] if a not in accepts]  # Mamba takes no positions, nor needs any
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    devices = {p.device for p in model.parameters()}
    attention = config._attn_implementation
    if model.config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder: expected a decoder-only model")
    if (getattr(model, "_is_stateful", False) or kinds) and not recurrent:
        kept, tested = ", ".join(sorted(kinds)) or "state-space", ", ".join(sorted(CHUNKED | STEPWISE))
        raise ValueError(f"{name} keeps a state that is not one key and value per token ({kept}) and was not "
                         f"tested: expected full or sliding attention layers only, or one of {tested}")
    if missing or model.get_output_embeddings() is None:
        raise ValueError(f"{name} cannot be served: its forward takes no {', '.join(missing) or 'output embeddings'}")
    if attention not in ("sdpa", "eager"):
        raise ValueError(f"{name} uses attn_implementation={attention!r}: expected 'sdpa' or 'eager'")
    if len(devices) > 1:
        raise ValueError(f"{name} is spread over {len(devices)} devices: expected all of it on one; SLM and LLM may differ")
    if model.training:
        raise ValueError(f"{name} is in training mode: call .eval() first")
    if config.model_type in MISPLACED or getattr(config, "alibi", False):
        raise ValueError(f"{name} cannot be served: its positions or its mask do not follow position_ids")
    # Rotary frequencies that follow the longest row of a call would make rows depend on each other.
    ropes = getattr(config, "rope_parameters", None) or {}
    for rope in [ropes, *(r for r in ropes.values() if isinstance(r, dict))]:  # one for all layers, or one per type of layer
        limit = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None) or math.inf
        kind = rope.get("rope_type", "default")
        if kind == "dynamic" or kind == "longrope" and max_len > limit:
            raise ValueError(f"{name} has rope_type={kind!r}, whose frequencies change with the length of the longest "
                             f"row: expected another type, or for longrope at most {limit} tokens, prompt and answer; asked for {max_len}")


class Graphs:
    """Steps of one CachedLM as CUDA graphs, each captured when it is first asked for; they share one memory pool. A model that cannot be
    captured runs eagerly, after a warning that says why."""

    def __init__(self, device: torch.device):
        self.captured: dict[tuple, tuple[torch.cuda.CUDAGraph, Output]] = {}
        self.device, self.pool, self.stream, self.works = device, None, None, True

    def __call__(self, step: Callable[..., Output], rows: slice, *key) -> Output:
        """step(rows, *key); the tensors that it returns are overwritten by the next step. rows, the whole batch, is no part of the key:
        before Python 3.12 a slice cannot be one."""
        if self.works and key not in self.captured:
            try:
                self.captured[key] = self.capture(step, rows, *key)
            except RuntimeError as error:
                self.works = False
                warnings.warn(f"no CUDA graphs, every step runs eagerly: {error}", stacklevel=2)
        if not self.works:
            return step(rows, *key)
        graph, out = self.captured[key]
        with torch.cuda.device(self.device):
            graph.replay()
        return out

    def capture(self, step: Callable[..., Output], rows: slice, *key) -> tuple[torch.cuda.CUDAGraph, Output]:
        with torch.cuda.device(self.device):  # the model's, which need not be the current one
            self.stream = self.stream or torch.cuda.Stream()  # one for all: memory of the pool goes from capture to capture on one stream only
            graph, current, mode = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), torch.cuda.get_sync_debug_mode()
            self.stream.wait_stream(current)
            try:
                with torch.cuda.stream(self.stream):  # lazy set-up must not be captured; a step that is repeated writes the same again
                    for strict in (mode, "error"):  # a host sync is told here, where it does no harm
                        torch.cuda.set_sync_debug_mode(strict)
                        step(rows, *key)
            finally:
                torch.cuda.set_sync_debug_mode(mode)
            current.wait_stream(self.stream)
            torch._C._cuda_clearCublasWorkspaces()  # or the graph would keep the address of one that others may free
            try:
                with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                    out = step(rows, *key)
            finally:
                torch.cuda.set_stream(current)  # a capture that fails leaves its own
                torch._C._cuda_clearCublasWorkspaces()
        self.pool = self.pool or graph.pool()
        return graph, out


class CachedLM:
    """One model, one preallocated cache, one cursor per row.

    `cursor[b]` tokens of row b have been read: they, and nothing else, are what row b attends to. Pass one to `stitch` instead
    of a model to keep its allocation from call to call; `close()` detaches it from the model. `graphs` replays single tokens and
    short reads as CUDA graphs, all rows taking part in each, idle ones too. ValueError or TypeError for a model that cannot be served,
    and for graphs of one that is not on a CUDA device or has recurrent layers.
    """

    @torch.inference_mode(False)
    def __init__(self, model, batch_size: int, max_len: int, graphs: bool = False):
        for name, size in (("batch_size", batch_size), ("max_len", max_len)):
            check_count(name, size)
        check_servable(model, max_len)
        model = bare(model)
        config = model.config.get_text_config(decoder=True)
        if graphs and config.model_type in CHUNKED | STEPWISE:
            raise ValueError(f"graphs={graphs!r}: expected attention layers only, "
                             f"{config.model_type} has recurrent ones")
        if graphs and model.device.type != "cuda":
            raise ValueError(f"graphs={graphs!r}: expected a model on a CUDA device, this one is on {model.device}")
        self.graphs = Graphs(model.device) if graphs else None
        self.model, self.batch_size, self.max_len = model, batch_size, max_len
        slots = -(-max_len // BLOCK) * BLOCK
        self.cursor, self.n_read = [0] * batch_size, 0
        self.place = Place()
        self.layer_types = getattr(config, "layer_types", None)
        self.layers = [RecurrentLayer(self.place, batch_size) if kind in ("linear_attention", "conv")
                       else (HybridLayer if kind == "hybrid" else StitchLayer)(self.place, batch_size, slots)
                       for kind in self.layer_types or ["full_attention"] * config.num_hidden_layers]
        self.recurrent = [layer for layer in self.layers if isinstance(layer, RecurrentLayer)]
        self.stepwise = config.model_type in STEPWISE
        self.cache = {cache_keyword(model): Cache(layers=self.layers)}
        self.config, self.attention = config, attention_of(config)
        self.compiled = model._compiled_call_impl is not None  # by model.compile()
        self.sliding = getattr(config, "sliding_window", None)
        self.vocab, self.dtype = model.get_output_embeddings().weight.shape[0], model.dtype  # which walks the parameters: as long as a matmul
        self.free = 0 if self.recurrent else FREE["cpu" if model.device.type == "cpu" else "cuda"]
        self.inputs = torch.zeros(2 * (max(CHUNK, batch_size) + self.free), dtype=torch.long, device=model.device)  # ids, positions; with pads
        self.slots = torch.arange(slots, device=model.device)
        self.uniform = torch.zeros(batch_size, dtype=torch.float32, device=model.device)
        # What the output embedding reads is the last hidden state, in every family tested. The hook holds a dict, not self, so
        # that a CachedLM which nobody closed is still freed, cache and all.
        caught = self.caught = {}
        self.hook = model.get_output_embeddings().register_forward_pre_hook(
            lambda module, args: caught.update(hidden=args[0][:, -1]))  # (n, D)

    def close(self) -> None:
        """Detach from the model; it cannot be read with any more."""
        self.hook.remove()
        self.layers.clear()
        self.recurrent.clear()
        self.graphs = None

    def __del__(self):
        if hasattr(self, "hook"):
            self.hook.remove()

    def check_rows(self, name: str, rows: Sequence[int]) -> None:
        """ValueError for what is no list of different rows of this cache."""
        known = isinstance(rows, Sequence) and all(type(r) is int and 0 <= r < self.batch_size for r in rows)
        if not known or len(set(rows)) < len(rows):
            raise ValueError(f"{name}={rows!r}: expected different rows of 0 to {self.batch_size - 1}")

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Forget these rows, every row unless given, and what the cache holds of them: from a recurrent state
        the next read would go on, and a masked slot still meets a weight of 0, and 0 x NaN, left by a failed
        call, is NaN. ValueError for what is no row."""
        if rows is not None:
            self.check_rows("rows", rows)
        for layer in self.layers:
            layer.reset(slice(None) if rows is None else list(rows))
        for row in range(self.batch_size) if rows is None else rows:
            self.cursor[row] = 0

    def fork(self, source: int, n: int, targets: Sequence[int]) -> None:
        """Give rows `targets` the first n tokens that row `source` has read, as if they had read them: their
        cursors become n.

        Copies n tokens of the cache in place and leaves the slots after them, masked, as they were: after a
        failed call reset first. Recurrent layers know their state after the last token only: with them n must
        be the source's cursor. ValueError for another n, for what is no row, and for a closed cache.
        """
        if not self.layers:
            raise ValueError("this CachedLM is closed: there is nothing to fork")
        if type(source) is not int or not 0 <= source < self.batch_size:
            raise ValueError(f"source={source!r}: expected a row of 0 to {self.batch_size - 1}")
        self.check_rows("targets", targets)
        check_count("n", n, least=0)
        read = self.cursor[source]
        if source in targets:
            raise ValueError(f"targets={targets!r}: expected other rows than the source, {source}")
        if n > read or self.recurrent and n < read:
            bound = "as many, for the model has recurrent layers" if self.recurrent else "no more"
            raise ValueError(f"n={n!r}: row {source} has read {read} tokens, expected {bound}")
        for layer in self.layers:
            layer.fork(source, n, targets)
        for row in targets:
            self.cursor[row] = n

    def width(self, longest: int) -> int:
        """Columns of a read whose longest row has this many tokens."""
        return 1 << (longest - 1).bit_length() if self.graphs and longest <= SHORT else longest

    def mask(self, positions: torch.Tensor, live: int):
        """Additive attention mask (n, 1, S, live) for tokens at positions (n, S); a dict by layer type where
        models want one. Recurrent layers, to which no pad is given, take none."""
        slots, here, dtype = self.slots[:live], positions[:, None, :, None], self.dtype

        def additive(kind: str):
            masked = slots > here
            if kind == "sliding_attention":
                masked = masked | (slots <= here - self.sliding)
            return masked.to(dtype) * torch.finfo(dtype).min

        if self.recurrent and "position_ids" not in forward_arguments(type(self.model)):
            return None
        if self.recurrent:
            return {"full_attention": additive("full_attention"), "linear_attention": None, "conv": None}
        if self.layer_types is None:
            return additive("sliding_attention" if self.sliding else "full_attention")
        return {kind: additive(kind) for kind in set(self.layer_types)}

    def _forward(self, rows: slice | torch.Tensor, n: int, S: int, live: int, vocab: int, sampling: Sampling) -> Output:
        """One forward call on what lies in the static buffers; no host sync, no shape that depends on data."""
        ids, positions = self.inputs[:2 * n * S].view(2, n, S)
        self.place.rows, self.place.slots, self.place.live = rows, positions[:, None, :, None], live
        for layer in self.recurrent:
            layer.begin()
        out = self.model(input_ids=ids, position_ids=positions, attention_mask=self.mask(positions, live),
                         use_cache=True, logits_to_keep=1, **self.cache)
        for layer in self.recurrent:
            layer.end()
        logits = out.logits[:, -1, :vocab].float()  # (n, V)
        return Output(logits, self.caught["hidden"], sampling.draw(logits, self.uniform[:n]), entropy(logits))

    def forward(self, *args) -> Output:
        """`_forward` with the attention that was chosen, and without cuDNN's, which may plan anew for every new
        shape (not measured here); model and torch are as they were afterwards."""
        own, cudnn = self.config._attn_implementation, torch.backends.cuda.cudnn_sdp_enabled()
        changed = own != self.attention  # to ask costs nothing, to set it as much as a small layer
        try:
            torch.backends.cuda.enable_cudnn_sdp(False)
            if changed:
                self.config._attn_implementation = self.attention
            with torch.compiler.set_stance("force_eager") if self.compiled else nullcontext():
                return self._forward(*args)
        finally:
            torch.backends.cuda.enable_cudnn_sdp(cudnn)
            if changed:
                self.config._attn_implementation = own

    @torch.inference_mode()  # less work per tensor than no_grad
    def read(self, rows: Sequence[int], tokens: Sequence[Sequence[int]], vocab: int | None = None,
             sampling: Sampling = GREEDY, uniform: Sequence[float] | None = None) -> Output:
        """Each row reads its tokens, one or more, and proposes the next one from the first `vocab` columns.

        Ragged reads are aligned on the right, so the last column is the last token of every row. A pad
        repeats the row's first token at that token's position: it computes and writes what the token itself
        does, so it needs no slot of its own. With recurrent layers, to which it would be one more token, rows
        that differ in length read one after the other. More than CHUNK tokens, pads included, are read in
        several calls, of fewer rows, or of fewer tokens of one row.
        """
        assert self.layers and len(set(rows)) == len(rows) == len(tokens) and all(tokens), (rows, tokens)
        ends = [self.cursor[row] + len(line) for row, line in zip(rows, tokens)]
        assert max(ends) <= self.max_len, f"a row would hold {max(ends)} tokens, the cache holds {self.max_len}"
        if len(rows) > 1 and len(rows) * self.width(max(map(len, tokens))) > max(CHUNK, len(rows)):
            some, half = slice(len(rows) // 2), slice(len(rows) // 2, None)
            parts = [[x.clone() for x in self.read(rows[part], tokens[part], vocab, sampling, uniform and uniform[part])]
                     for part in (some, half)]  # clones, since a graph's results are overwritten by its next replay
            return Output(*map(torch.cat, zip(*parts)))
        while len(rows) == 1 and len(tokens[0]) > CHUNK and not (self.stepwise and self.cursor[rows[0]]):
            self._read(rows, [tokens[0][:CHUNK]], self.vocab, GREEDY, None)
            tokens = [tokens[0][CHUNK:]]
        read = self._read_apart if self.recurrent else self._read
        return read(rows, tokens, vocab or self.vocab, sampling, uniform)

    def _read_apart(self, rows, tokens, vocab: int, sampling: Sampling, uniform) -> Output:
        """`_read` of a model with recurrent layers: a call for each length; but first, where the model's scan
        starts from zero, the rows that have a state read all but their last token one by one."""
        if self.stepwise:
            late = {row: line for row, line in zip(rows, tokens) if self.cursor[row]}
            for left in range(max(map(len, late.values()), default=1), 1, -1):
                now = {row: [line[-left]] for row, line in late.items() if len(line) >= left}
                self._read(list(now), list(now.values()), vocab, GREEDY, None)
            tokens = [line[-1:] if row in late else line for row, line in zip(rows, tokens)]
        parts, order = [], []
        for length in sorted(set(map(len, tokens))):
            at = [i for i, line in enumerate(tokens) if len(line) == length]
            parts.append(self._read([rows[i] for i in at], [tokens[i] for i in at], vocab, sampling,
                                    None if uniform is None else [uniform[i] for i in at]))
            order += at
        back = torch.tensor(order, device=self.inputs.device).argsort()
        return parts[0] if len(parts) == 1 else Output(*(torch.cat(x)[back] for x in zip(*parts)))

    def _read(self, rows, tokens, vocab: int, sampling: Sampling, uniform: Sequence[float] | None) -> Output:
        S, unread = self.width(max(map(len, tokens))), dict(zip(rows, tokens))
        graphed = self.graphs is not None and (S == 1 or S <= SHORT and self.batch_size * S <= self.free)
        span = range(self.batch_size) if graphed else range(min(rows), max(rows) + 1)
        idle = len(span) - len(rows)
        # Idle rows in between take part where they are few and have no recurrent state: that costs less than
        # copying the caches of those that read. An idle row writes the slot at its cursor, which its own next
        # read overwrites before anybody sees it; a full row its last slot: it reads no more.
        neighbours = graphed or idle <= len(rows) and idle * S <= self.free
        taking_part = list(span) if neighbours else list(rows)
        n, ids, positions = len(taking_part), [], []
        for row in taking_part:
            line, start = unread.get(row, [0]), min(self.cursor[row], self.max_len - 1)
            pads = S - len(line)
            ids += [line[0]] * pads + list(line)
            positions += [start] * pads + list(range(start, start + len(line)))
        self.inputs[:2 * n * S] = torch.tensor(ids + positions)
        self.place.started = any(self.cursor[row] for row in rows)
        if uniform is not None:
            drawn = dict(zip(rows, uniform))
            self.uniform[:n] = torch.tensor([drawn.get(row, 0.0) for row in taking_part])
        where = slice(span.start, span.stop) if neighbours else torch.tensor(taking_part, device=self.inputs.device)
        live = min(live_slots(max(positions) + 1, graphed), len(self.slots))
        key = n, S, live, vocab, sampling
        picked = None if taking_part == list(rows) else torch.tensor([row - span.start for row in rows], device=self.inputs.device)
        out = self.graphs(self.forward, where, *key) if graphed else self.forward(where, *key)
        for row, line in unread.items():
            self.cursor[row] += len(line)
            self.n_read += len(line)
        return out if picked is None else Output(*(x[picked] for x in out))


# ---- 3. Routers ----------------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """What a router sees of one forward call, about the n rows that read. Its tensors are inference tensors, valid until the
    router returns: clone to keep, or to train on."""

    rows: list[int]  # which rows of the batch
    seeds: list[int]  # their seeds, for random decisions that do not depend on the batch
    logits: torch.Tensor  # (n, V) float32, raw, of the common vocabulary
    hidden: torch.Tensor  # (n, D) of the model that read
    token: torch.Tensor  # (n,) the proposal
    entropy: torch.Tensor  # (n,) nats
    position: torch.Tensor  # (n,) index of the proposal in the answer
    context: torch.Tensor  # (n,) tokens before the proposal, prompt included
    history: torch.Tensor  # (n, window - 1) entropies of the row's last kept tokens, whoever wrote them; NaN where there are fewer


@dataclass(frozen=True)
class EntropyRouter:
    """R-Stitch: leave the SLM where its entropy exceeds tau, leave the LLM where its own does not (Algorithm 1, Eq. 1).

    tau is normalised by log V (the paper) or in nats. `window` > 1 compares the mean over the row's last kept tokens and the
    current proposal; discarded proposals do not count, and a switch does not start the window anew. `tau_back` is the LLM's
    threshold for handing back, tau unless given. Neither is in the paper. ValueError for thresholds outside the range of their unit.
    """

    tau: float = 0.02
    unit: str = "normalized"
    window: int = 1
    tau_back: float | None = None

    def __post_init__(self):
        if self.unit not in ("normalized", "nats"):
            raise ValueError(f"unit={self.unit!r}: expected 'normalized' (divided by log V) or 'nats'")
        for name, tau in (("tau", self.tau), ("tau_back", self.tau if self.tau_back is None else self.tau_back)):
            if not isinstance(tau, Real) or not 0 <= tau < math.inf or (self.unit == "normalized" and tau > 1):
                bound = "in [0, 1], normalised by log V" if self.unit == "normalized" else "of nats, 0 or more"
                raise ValueError(f"{name}={tau!r}: expected a number {bound}")
        check_count("window", self.window)

    def uncertainty(self, step: Step) -> torch.Tensor:
        """(n,) the windowed entropy in the unit of tau."""
        H = step.entropy
        if self.window > 1:
            H = torch.cat([step.history, H[:, None]], 1).nanmean(1)  # NaN: no such token yet
        return H / math.log(step.logits.shape[-1]) if self.unit == "normalized" else H

    def leave_slm(self, step: Step) -> torch.Tensor:
        return self.uncertainty(step) > self.tau

    def leave_llm(self, step: Step) -> torch.Tensor:
        return self.uncertainty(step) <= (self.tau if self.tau_back is None else self.tau_back)


class SLMOnly:
    """The SLM alone: the cheap end of every comparison."""

    first = SLM

    def leave_slm(self, step: Step) -> torch.Tensor:
        return torch.zeros_like(step.token, dtype=torch.bool)

    leave_llm = leave_slm  # asked of LLMOnly only


class LLMOnly(SLMOnly):
    """The LLM alone: it writes the first token and never leaves."""

    first = LLM


def uniforms(seed: int, seeds: list[int], positions: list[int], model: int) -> list[float]:
    """One number in [0, 1) per row, from (seed, row seed, position, model) alone: a decision made with it does not depend on the batch."""
    return [random.Random(f"{seed} {row_seed} {t} {model}").random() for row_seed, t in zip(seeds, positions)]


@dataclass(frozen=True)
class RandomRouter:
    """Leave the SLM with probability p, stay with the LLM with probability `stay`: the baseline at an equal LLM share.

    The LLM writes p / (1 - stay (1 - p)) of the tokens in the long run; with stay = 0, the default, that is p.
    ValueError for what is no probability.
    """

    p: float
    stay: float = 0.0
    seed: int = 0

    def __post_init__(self):
        for name in ("p", "stay"):
            p = getattr(self, name)
            if not (isinstance(p, Real) and 0 <= p <= 1):
                raise ValueError(f"{name}={p!r}: expected a probability in [0, 1]")

    def flip(self, step: Step, model: int, p: float) -> torch.Tensor:
        return torch.tensor([u < p for u in uniforms(self.seed, step.seeds, step.position.tolist(), model)], device=step.token.device)

    def leave_slm(self, step: Step) -> torch.Tensor:
        return self.flip(step, SLM, self.p)

    def leave_llm(self, step: Step) -> torch.Tensor:
        return self.flip(step, LLM, 1 - self.stay)


def check_router(router) -> None:
    """TypeError or ValueError for what is no router, before any work."""
    for method in ("leave_slm", "leave_llm"):
        if isinstance(router, type) or not callable(getattr(router, method, None)):
            raise TypeError(f"router={router!r} has no method {method}(step): expected an object such as EntropyRouter(0.02)")
    if getattr(router, "first", SLM) not in (SLM, LLM):
        raise ValueError(f"router.first={router.first!r}: expected SLM (0) or LLM (1)")
    check_count("router.window", getattr(router, "window", 1))


def check_decision(router, model: int, leave, token: torch.Tensor) -> None:
    """TypeError unless a router returned one bool per row, on the device of the tokens."""
    got = (leave.dtype, tuple(leave.shape), leave.device) if isinstance(leave, torch.Tensor) else type(leave).__name__
    if got != (torch.bool, tuple(token.shape), token.device):
        raise TypeError(f"router {type(router).__name__}.leave_{NAMES[model].lower()} returned {got}: "
                        f"expected a bool tensor of shape {tuple(token.shape)} on {token.device}")


# ---- 4. Stitching --------------------------------------------------------------------------------------------------------


class Call(NamedTuple):
    """One logical forward pass of one model about one row, even if it was read in chunks."""

    model: int  # SLM or LLM
    position: int  # index in the answer of the token it proposed
    n_inf: int  # tokens read by this call (pads excluded)
    n_kv: int  # tokens in the model's cache before it
    token: int  # the proposal
    entropy: float  # nats, of the raw distribution over the common vocabulary
    kept: bool  # False: an SLM proposal that the router discarded


def count_switches(calls: Sequence[Call]) -> int:
    """How often the active model of a row changed, in either direction."""
    return sum(a.model != b.model for a, b in zip(calls, calls[1:]))


@dataclass(eq=False)
class Stitched:
    """What `stitch` returns. B rows, P columns of input_ids, N tokens in the longest answer."""

    sequences: torch.Tensor  # (B, P+N) long: input_ids as given, then the answers, padded on the right
    source: torch.Tensor  # (B, N) int8: SLM, LLM, or -1 for padding
    entropy: torch.Tensor  # (B, N) float32, nats, of the model that wrote the token; NaN for padding
    calls: list[list[Call]]  # per row, in order
    seed: list[int]  # the row seeds: seed=result.seed repeats the result
    n_read: tuple[int, int]  # tokens that SLM and LLM really read; the n_inf of calls count what was copied too


@dataclass(eq=False)
class Row:
    """The state of one problem: one sequence, and who reads it next. The cursors live in the two CachedLMs."""

    index: int  # of the prompt
    seed: int
    ids: list[int]
    n_prompt: int
    active: int
    limit: int = 0  # tokens that it may write
    slot: int | None = None  # where it lies in both caches, like the prompts unless there are fewer
    uniform: list[list[float]] = field(default_factory=list)  # by position, a draw for the SLM and for the LLM
    calls: list[Call] = field(default_factory=list)
    kept: list[Call] = field(default_factory=list)  # those whose token was appended, one per answer token
    begun: set[int] = field(default_factory=set)  # which models have read of it
    done: bool = False

    def __post_init__(self):
        self.slot = self.index if self.slot is None else self.slot


def row_seeds(seed: int | Sequence[int] | None, B: int) -> list[int]:
    """One seed per row: row i of an integer seed draws from (seed, i), a list is taken as it is, None draws from torch's generator."""
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    if isinstance(seed, Integral):
        return [int.from_bytes(hashlib.sha256(f"{seed} {i}".encode()).digest()[:7], "big") for i in range(B)]
    if not isinstance(seed, Sequence) or len(seed) != B or not all(isinstance(s, Integral) and abs(s) < 2**63 for s in seed):
        raise ValueError(f"seed={seed!r}: expected an integer, or a sequence of one integer below 2**63 per row, {B}")
    return [int(s) for s in seed]


def row_limits(max_new_tokens: int | Sequence[int], B: int) -> list[int]:
    """How many tokens each row may write; ValueError for what is no count, or not one per row."""
    limits = list(max_new_tokens) if isinstance(max_new_tokens, (list, tuple)) else [max_new_tokens] * B
    if len(limits) != B:
        raise ValueError(f"max_new_tokens has {len(limits)} numbers: expected one, or one per row, {B}")
    for limit in limits:
        check_count("max_new_tokens", limit)
    return limits


def similar_lengths(rows: list[Row], lm: CachedLM) -> list[list[Row]]:
    """Split rows into groups that share a forward call: reads of similar length, or so few pads that one call is cheaper than two.

    So one row's long read pads nobody else's, and a row that catches up does not widen a large batch of single tokens.
    """
    def unread(row: Row) -> int:
        return len(row.ids) - lm.cursor[row.slot]

    groups: list[list[Row]] = []
    tokens = 0  # in the last group, pads excluded
    for row in sorted(rows, key=unread):
        n = unread(row)
        total = lm.width(n) * (len(groups[-1]) + 1) if groups else math.inf
        if total <= CHUNK and (total - tokens - n <= lm.free or n <= 1.25 * unread(groups[-1][0])):
            groups[-1].append(row)
            tokens += n
        else:
            groups.append([row])
            tokens = n
    return [sorted(group, key=lambda row: row.slot) for group in groups]


PATIENCE = 8  # calls that one model makes in a row at most, while a row waits for the other


def next_model(rows: list[Row], last: int, in_a_row: int) -> int:
    """Which model runs next: the one that more rows wait for, so that a call serves many, but after PATIENCE calls in a row the
    other, if any row waits for it. No result depends on this choice."""
    other = 1 - last
    waiting = sum(row.active == other for row in rows)
    return other if waiting and (2 * waiting > len(rows) or in_a_row >= PATIENCE) else last


def histories(rows: list[Row], width: int, device) -> torch.Tensor:
    """(n, width) entropies of each row's last kept tokens, NaN where there are fewer."""
    lines = [[row.kept[t].entropy if t >= 0 else math.nan for t in range(len(row.kept) - width, len(row.kept))] for row in rows]
    return torch.tensor(lines, dtype=torch.float32, device=device)


Process = Callable[[int, list[int], torch.Tensor], torch.Tensor]  # (row, ids, logits (V,)) -> scores (V,)


def check_entropies(model: int, rows: list[Row], entropies: Sequence[float]) -> None:
    """FloatingPointError for NaN, which one NaN among the logits is enough to make."""
    for row, H in zip(rows, entropies):
        if math.isnan(H):
            raise FloatingPointError(f"the {NAMES[model]}'s logits have a NaN in row {row.index} at position "
                                     f"{len(row.ids) - row.n_prompt} of the answer")


def check_scores(name: str, scores, logits: torch.Tensor) -> None:
    """TypeError unless the process of this name returned one score per logit (V,), on the same device."""
    tensor = isinstance(scores, torch.Tensor)
    got = (scores.dtype, tuple(scores.shape), scores.device) if tensor else type(scores).__name__
    shape, device = tuple(logits.shape), logits.device
    if not (tensor and scores.is_floating_point()) or got[1:] != (shape, device):
        raise TypeError(f"process {name} returned {got}: expected floats of shape {shape} on {device}")


def draw_processed(process: Process, rows: list[Row], logits: torch.Tensor, sampling: Sampling,
                   uniform: Sequence[float] | None) -> torch.Tensor:
    """(n,) tokens, drawn from what `process` makes of each row of the logits (n, V). TypeError as in
    `check_scores`, ValueError where no token can be drawn."""
    name = getattr(process, "__name__", type(process).__name__)
    lines = [process(row.index, row.ids, line) for row, line in zip(rows, logits)]
    for scores, line in zip(lines, logits):
        check_scores(name, scores, line)
    scores = torch.stack(lines).float()  # (n, V)
    for row, best in zip(rows, scores.amax(-1).tolist()):  # NaN where any score is
        if not (math.isfinite(best) if sampling.temperature else best > -math.inf):
            where = f"row {row.index} at position {len(row.ids) - row.n_prompt} of the answer"
            raise ValueError(f"process {name} returned scores whose largest is {best}, for {where}: "
                             "expected a token to draw")
    uniform = None if uniform is None else torch.tensor(uniform, dtype=torch.float32, device=logits.device)
    return sampling.draw(scores, uniform)


def advance(model: int, lm: CachedLM, rows: list[Row], router, vocab: int, sampling: Sampling,
            process: Process | None = None) -> list[Call]:
    """`model` reads what it has not read of each row and proposes a token; the router decides who goes on (Algorithm 1)."""
    device = lm.inputs.device
    slots, index = [row.slot for row in rows], [row.index for row in rows]
    unread = [row.ids[lm.cursor[row.slot]:] for row in rows]
    n_kv = [lm.cursor[row.slot] if model in row.begun else 0 for row in rows]  # as if what was shared was read
    n_inf = [len(row.ids) - start for row, start in zip(rows, n_kv)]
    position = [len(row.ids) - row.n_prompt for row in rows]
    uniform = [row.uniform[t][model] for row, t in zip(rows, position)] if sampling.temperature else None
    # Copied to the device before the read: a copy after it would wait for the read to end.
    at = torch.tensor([position, [len(row.ids) for row in rows]], device=device)
    history = histories(rows, getattr(router, "window", 1) - 1, device)
    if process is None:
        out = lm.read(slots, unread, vocab, sampling, uniform)
    else:
        out = lm.read(slots, unread, vocab)
        check_entropies(model, rows, out.entropy.tolist())
        out = out._replace(token=draw_processed(process, rows, out.logits, sampling, uniform))
    step = Step(index, [row.seed for row in rows], out.logits, out.hidden, out.token, out.entropy, at[0], at[1], history)
    leave = (router.leave_slm if model == SLM else router.leave_llm)(step)
    check_decision(router, model, leave, step.token)
    tokens, entropies, leaves = torch.stack([out.token.float(), out.entropy, leave.float()]).tolist()  # one host read; float32 holds ids up to 2^24
    check_entropies(model, rows, entropies)
    calls = []
    for row, n, start, t, token, H, left in zip(rows, n_inf, n_kv, position, tokens, entropies, leaves):
        call = Call(model, t, n, start, int(token), H, kept=not (model == SLM and left))
        calls.append(call)
        row.calls.append(call)
        row.begun.add(model)
        if call.kept:
            row.kept.append(call)
            row.ids.append(call.token)
        if left:
            row.active = 1 - model
    return calls


SHARED = 16  # tokens that sequences begin with alike, from which on copying them pays


def common(a: list[int], b: list[int]) -> int:
    """How many tokens two sequences begin with alike: by halves, since comparing two slices is fast."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


def take_over(row: Row, lm: CachedLM, held: list[Row | None], known: int = 0) -> bool:
    """Copy into a row's slot the longest beginning that it has in common with what any slot of the cache
    holds, if that saves reading beyond the `known` tokens; held: the row that is, or was last, in each slot."""
    if lm.stepwise:  # would read token by token what follows a copy
        return False
    found = [(min(common(row.ids[:-1], other.ids), lm.cursor[slot]), slot) for slot, other in enumerate(held)
             if other not in (None, row) and lm.cursor[slot]]
    n, source = max(((n, slot) for n, slot in found if not lm.recurrent or n == lm.cursor[slot]), default=(0, 0))
    if n < known + SHARED:
        return False
    if source == row.slot:
        lm.cursor[source] = n
    else:
        lm.fork(source, n, [row.slot])
    return True


def share(rows: list[Row], lm: CachedLM, held: list[Row | None]) -> None:
    """Let rows that a model is to read for the first time read once what they begin with alike: the longest
    reads it, the others copy it."""
    rows = sorted(rows, key=lambda row: -len(row.ids)) if not lm.stepwise else []
    for row in rows:
        take_over(row, lm, held, lm.cursor[row.slot])
    for i, row in enumerate(rows):
        cuts: dict[int, list[int]] = {}  # by length, the slots that copy so much
        for other in rows[i + 1:]:
            n = common(row.ids[:-1], other.ids[:-1])  # the last token is read by each: it makes the proposal
            if n >= lm.cursor[other.slot] + SHARED:
                cuts.setdefault(n, []).append(other.slot)
        # A recurrent layer can be copied only as it is, so its row stops wherever another parts from it.
        for n in sorted(cuts, reverse=not lm.recurrent):
            if n > (read := lm.cursor[row.slot]):
                lm.read([row.slot], [row.ids[read:n]])
            if n == lm.cursor[row.slot] or not lm.recurrent:
                lm.fork(row.slot, n, cuts[n])


def admit(row: Row, slot: int, held: list[Row | None], lms: Sequence[CachedLM], sampling: Sampling) -> None:
    """Put a row into a slot of both caches, from which a finished one goes; draw its random numbers."""
    row.slot = slot
    for lm in lms:
        if not take_over(row, lm, held) and lm.cursor[slot]:
            lm.reset([slot])
    if sampling.temperature:
        generator = torch.Generator().manual_seed(row.seed)
        row.uniform = torch.rand(row.limit, 2, generator=generator).tolist()
    held[slot] = row


def write(rows: list[Row], lms: Sequence[CachedLM], slots: int, router, vocab: int, sampling: Sampling,
          process: Process | None = None) -> Iterator[tuple[Row, Call]]:
    """Algorithm 1 for a batch: every call of every row, as it is made, until the caller has marked every row
    as done. At most `slots` rows are in the caches; a finished one's slot goes to the next."""
    model, in_a_row = getattr(router, "first", SLM), 0
    waiting, held = deque(rows), [None] * slots
    while True:
        for slot, row in enumerate(held):
            if waiting and (row is None or row.done):
                admit(waiting.popleft(), slot, held, lms, sampling)
        live = [row for row in held if row is not None and not row.done]
        if not live:
            return
        chosen = next_model(live, model, in_a_row)
        model, in_a_row = chosen, (in_a_row + 1 if chosen == model else 1)
        ready = [row for row in live if row.active == model]
        share([row for row in ready if model not in row.begun], lms[model], held)
        for group in similar_lengths(ready, lms[model]):
            yield from zip(group, advance(model, lms[model], group, router, vocab, sampling, process))


@torch.inference_mode(False)  # even where the caller is in it, or what a router clones could not be trained on
@torch.no_grad()
def stitch(slm, llm, input_ids: torch.Tensor, router, *, attention_mask: torch.Tensor | None = None,
           max_new_tokens: int | Sequence[int],
           temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, eos_token_id: int | Sequence[int] | None = None,
           pad_token_id: int | None = None, seed: int | Sequence[int] | None = None,
           on_token: Callable[[int, Call], None] | None = None,
           stop: Callable[[int, list[int]], bool] | None = None, process: Process | None = None,
           slots: int | None = None) -> Stitched:
    """Answer each prompt with two models (R-Stitch Algorithm 1), the router deciding who writes which token.

    slm, llm: a decoder-only model of transformers each, or a CachedLM. input_ids (B, P): prompts; without attention_mask (B, P)
    every token counts (rows of a batch that begin with a known padding token are refused), with it the zeros on the left are
    padding. max_new_tokens: of each row, or one number per row. temperature, top_k, top_p: see `Sampling`. seed: see `row_seeds`. eos_token_id: None takes every
    EOS of either model's generation config, [] none; pad_token_id, which fills short answers: None takes theirs, else the first token that
    ends an answer, else 0. on_token(row, call) sees every forward pass in each row's order; stop(row, ids) ends a row after the token that
    makes it true, ids being the answer so far. process(row, ids, logits) returns the scores (V,) that each
    proposal of either model is drawn from, temperature, top_k and top_p following. logits (V,) are raw,
    float32, of the common vocabulary, ids the whole sequence, prompt and answer; it changes neither.
    Entropies, and the logits that a router sees, stay the raw ones. slots: at most so many rows are in the
    caches at once, a finished one's slot goes to the next prompt; None takes all at once. What prompts begin
    with alike is read once and copied.

    Departs from the paper: any batch size (each row has its own active model and gets, up to float rounding, what it would get
    alone); entropies are taken in float32; where the models' logit widths differ the common columns are used. ValueError or
    TypeError for what cannot be run, before anything is computed (but what a router or `process` returns is
    seen only when it does); FloatingPointError for NaN logits, whose attribute `partial` is the `Stitched` of
    all that was written before.
    """
    sampling = Sampling(temperature, top_k, top_p)
    check_router(router)
    for name, function in (("on_token", on_token), ("stop", stop), ("process", process)):
        if function is not None and not callable(function):
            raise TypeError(f"{name}={function!r}: expected a function, or None")
    prompts = unpadded(input_ids, attention_mask)
    B, limits = len(prompts), row_limits(max_new_tokens, len(prompts))
    longest = max(len(ids) + limit for ids, limit in zip(prompts, limits))
    if slots is not None:
        check_count("slots", slots)
    slots = min(slots or B, B)
    seeds = row_seeds(seed, B)
    if slm is llm and isinstance(slm, CachedLM):
        raise ValueError("slm and llm are the same CachedLM: expected two, each with its own cursors")
    with ExitStack() as opened:
        lms = []
        for name, lm in (("slm", slm), ("llm", llm)):
            check_servable(lm.model if isinstance(lm, CachedLM) else lm, longest, name)
            lms.append(lm if isinstance(lm, CachedLM) else opened.enter_context(closing(CachedLM(lm, slots, longest))))
            check_fits(name, lms[-1], prompts, slots, longest)
        for lm in lms:
            lm.reset()
        read_before = [lm.n_read for lm in lms]
        vocab = min(lm.vocab for lm in lms)
        eos = end_tokens(eos_token_id, [lm.model for lm in lms])
        own = [lm.model.generation_config.pad_token_id for lm in lms]
        pads = [pad for pad in own if pad is not None and pad >= 0] if pad_token_id is None else [pad_token_id]
        pad_token_id = [*pads, *(token for token in eos if token >= 0), 0][0]
        check_count("pad_token_id", pad_token_id, least=0)
        if attention_mask is None and B > 1:
            if any(ids[0] in set(pads) - set(eos) for ids in prompts):  # a prompt may well begin with an EOS
                raise ValueError("input_ids has rows that begin with a padding token: expected an attention_mask with 0 where a row is padded")
            if 0 < sum(ids[-1] in pads for ids in prompts) < B:
                raise ValueError("input_ids has rows that end with a padding token: expected padding on the left, and an attention_mask")
        rows = [Row(i, seeds[i], list(ids), len(ids), getattr(router, "first", SLM), limits[i])
                for i, ids in enumerate(prompts)]
        try:
            for row, call in write(rows, lms, slots, router, vocab, sampling, process):
                if call.kept:
                    row.done = (call.token in eos or len(row.kept) == row.limit
                                or stop is not None and bool(stop(row.index, row.ids[row.n_prompt:])))
                if on_token is not None:
                    on_token(row.index, call)
        except FloatingPointError as error:
            error.partial = collect(rows, input_ids, pad_token_id, lms, read_before)
            raise
        return collect(rows, input_ids, pad_token_id, lms, read_before)


def unpadded(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> list[list[int]]:
    """The prompts without their left padding; ValueError or TypeError for what is no batch of prompts."""
    if isinstance(input_ids, Mapping):
        raise TypeError(f"input_ids is a {type(input_ids).__name__}: expected its fields, input_ids=x['input_ids'], "
                        "attention_mask=x['attention_mask']")
    if not isinstance(input_ids, torch.Tensor) or input_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"input_ids is {getattr(input_ids, 'dtype', type(input_ids).__name__)}: expected a tensor of token ids, int64 or int32")
    if input_ids.ndim != 2 or 0 in input_ids.shape:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}: expected (rows, tokens), at least 1 x 1")
    if attention_mask is None:
        return input_ids.tolist()
    if not isinstance(attention_mask, torch.Tensor):
        raise TypeError(f"attention_mask is a {type(attention_mask).__name__}: expected a tensor of 0 and 1")
    if attention_mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}: expected that of input_ids, {tuple(input_ids.shape)}")
    mask = attention_mask.bool()
    if not mask[:, -1].all() or (mask[:, :-1] & ~mask[:, 1:]).any():
        raise ValueError("attention_mask has a 0 after a 1: expected padding on the left only, and no empty prompt")
    return [ids[keep].tolist() for ids, keep in zip(input_ids, mask)]


def check_fits(name: str, lm: CachedLM, prompts: list[list[int]], slots: int, length: int) -> None:
    """ValueError where rows of up to `length` tokens, answer included, exceed a cache, a model's context or its vocabulary."""
    context = getattr(lm.model.config.get_text_config(decoder=True), "max_position_embeddings", None) or length
    lowest, highest = min(map(min, prompts)), max(map(max, prompts))
    if not lm.layers:
        raise ValueError(f"the CachedLM given as {name} is closed")
    if slots > lm.batch_size or length > lm.max_len:
        raise ValueError(f"input_ids needs {slots} rows of {length} tokens: the CachedLM given as {name} holds {lm.batch_size} of {lm.max_len}")
    if length > context:
        raise ValueError(f"max_new_tokens brings the longest row to {length} tokens: the context of {name} is {context}")
    if lowest < 0 or highest >= lm.vocab:
        raise ValueError(f"input_ids ranges from {lowest} to {highest}: {name} knows tokens 0 to {lm.vocab - 1}")


def end_tokens(eos_token_id, models: Sequence) -> list[int]:
    """The tokens that end an answer: those given, else every EOS of either model."""
    own = [model.generation_config.eos_token_id for model in models]
    given = own if eos_token_id is None else [eos_token_id]
    try:
        tokens = [token for entry in given if entry is not None for token in torch.as_tensor(entry).flatten().tolist()]
    except (TypeError, ValueError, RuntimeError):
        tokens = [None]
    if not all(type(token) is int for token in tokens):
        raise ValueError(f"eos_token_id={eos_token_id!r}: expected a token id or several, or None for those of the models")
    return tokens


def collect(rows: list[Row], input_ids: torch.Tensor, pad_token_id: int, lms: Sequence[CachedLM],
            read_before: Sequence[int]) -> Stitched:
    """Pad the rows into one `Stitched`; the prompts stay as they were given, their padding included."""
    def padded(name: str, dtype: torch.dtype, padding: float) -> torch.Tensor:
        """(B, N) one field of the kept calls"""
        lines = [torch.tensor([getattr(call, name) for call in row.kept], dtype=dtype) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(lines, batch_first=True, padding_value=padding).to(input_ids.device)

    return Stitched(torch.cat([input_ids.long(), padded("token", torch.long, pad_token_id)], 1), padded("model", torch.int8, -1),
                    padded("entropy", torch.float32, math.nan), [row.calls for row in rows], [row.seed for row in rows],
                    tuple(lm.n_read - before for lm, before in zip(lms, read_before)))


# ---- 5. Latency model ----------------------------------------------------------------------------------------------------


class Sample(NamedTuple):
    """One timed forward pass at batch 1: tokens it read, tokens its cache held before, milliseconds."""

    n_inf: int
    n_kv: int
    ms: float


def medians(samples: Sequence[Sample]) -> list[Sample]:
    """One sample per (n_inf, n_kv), the median of its times."""
    points: dict[tuple[int, int], list[float]] = {}
    for n_inf, n_kv, ms in samples:
        points.setdefault((n_inf, n_kv), []).append(ms)
    return [Sample(*point, float(np.median(ms))) for point, ms in points.items()]


class LatencyModel:
    """Milliseconds of one forward pass of ONE model at batch 1, as R-Stitch+ fits it:

        T_prefill(n_inf, n_kv) = a n_inf n_kv + b n_inf^2 + c n_inf + d     two tokens or more
        T_decode(n_kv)         = c' n_kv + d'                               one token

    `prefill` is (a, b, c, d), `decode` is (c', d'): times, none below 0 (ValueError).
    """

    TERMS = {"prefill": lambda n_inf, n_kv: (n_inf * n_kv, n_inf * n_inf, n_inf, 1), "decode": lambda n_inf, n_kv: (n_kv, 1)}

    def __init__(self, prefill: Sequence[float], decode: Sequence[float]):
        self.coefficients = {"prefill": tuple(map(float, prefill)), "decode": tuple(map(float, decode))}
        for (name, times), count in zip(self.coefficients.items(), (4, 2)):
            if len(times) != count or not all(0 <= x < math.inf for x in times):
                raise ValueError(f"{name}={times}: expected {count} finite times in milliseconds, 0 or more")

    def prefill(self, n_inf: int, n_kv: int) -> float:
        return sum(x * term for x, term in zip(self.coefficients["prefill"], self.TERMS["prefill"](n_inf, n_kv)))

    def decode(self, n_kv: int) -> float:
        return sum(x * term for x, term in zip(self.coefficients["decode"], self.TERMS["decode"](1, n_kv)))

    def call(self, n_inf: int, n_kv: int) -> float:
        """Either, by the number of tokens read."""
        return self.decode(n_kv) if n_inf == 1 else self.prefill(n_inf, n_kv)

    @classmethod
    def fit(cls, samples: Sequence[Sample]) -> "LatencyModel":
        """Non-negative least squares on the relative error, so that a short call counts as much as a long one.

        Samples of one (n_inf, n_kv) count as their median. The paper says least squares; without the bound a noisy profile gives
        negative times. ValueError where the samples do not determine the coefficients, or a time is not positive.
        """
        for n_inf, n_kv, ms in samples:
            if not 0 < ms < math.inf:
                raise ValueError(f"samples hold a time of {ms!r} ms at n_inf={n_inf}, n_kv={n_kv}: expected more than 0")
        fitted = {}
        for kind, terms in cls.TERMS.items():
            points = [s for s in medians(samples) if (s.n_inf == 1) == (kind == "decode")]
            X = np.array([np.array(terms(s.n_inf, s.n_kv)) / s.ms for s in points]).reshape(-1, len(terms(1, 1)))
            scale = X.max(0, initial=0)  # the columns differ by orders of magnitude
            if (scale == 0).any() or np.linalg.matrix_rank(X / scale) < X.shape[1]:
                raise ValueError(f"samples have {len(points)} different {kind} points: expected points that determine "
                                 f"{'a, b, c and d: four or more' if kind == 'prefill' else 'both coefficients: two or more'}, with several n_kv")
            fitted[kind] = scipy.optimize.nnls(X / scale, np.ones(len(X)))[0] / scale
        return cls(**fitted)


def measure_latency(model, points: Sequence[tuple[int, int]], repeats: int = 5) -> list[Sample]:
    """Time the engine's own step at batch 1 - read, entropy, draw, router, host read - at each (n_inf, n_kv), `repeats` times.

    model: as for `stitch`. Each time follows an untimed step of the same kind, as most steps of a trajectory do. What lies in the
    cache does not matter to the time; the points are visited in turn, so that whatever else the machine does is spread over them.
    ValueError for no points, points and repeats that are no counts, and a CachedLM that is too small, or whose graphs step several rows.
    """
    check_count("repeats", repeats)
    if not points:
        raise ValueError(f"points={points!r}: expected at least one (n_inf, n_kv)")
    for n_inf, n_kv in points:
        check_count("n_inf", n_inf)
        check_count("n_kv", n_kv, least=0)
    longest = max(map(sum, points))
    if isinstance(model, CachedLM) and model.max_len < longest:
        raise ValueError(f"points reach {longest} tokens: the CachedLM given as model holds rows of {model.max_len}")
    if isinstance(model, CachedLM) and model.graphs and model.batch_size > 1:
        raise ValueError(f"the CachedLM given as model has graphs of {model.batch_size} rows, which all take part in a step: expected one row")
    with nullcontext(model) if isinstance(model, CachedLM) else closing(CachedLM(model, 1, longest)) as lm:
        router, samples = EntropyRouter(), []
        for n_inf, n_kv in list(points) * repeats:
            for _ in range(2):
                row = Row(0, 0, [0] * (n_inf + n_kv), n_inf + n_kv, SLM)
                lm.cursor[0] = n_kv
                start = time.perf_counter()
                advance(SLM, lm, [row], router, lm.vocab, GREEDY)
                ms = 1e3 * (time.perf_counter() - start)
            samples.append(Sample(n_inf, n_kv, ms))
        lm.reset()
    return samples


def trajectory_latency(calls: Sequence[Call], slm: LatencyModel, llm: LatencyModel) -> float:
    """Milliseconds of a whole trajectory: the sum over all calls of both models, discarded proposals included. Of a row that was
    answered in a batch it says what the row would have taken alone."""
    return sum((slm, llm)[call.model].call(call.n_inf, call.n_kv) for call in calls)


# ---- 6. R2R: a router trained on divergent tokens ------------------------------------------------------------------------


def fingerprint(model) -> str:
    """Tells one model from another, whatever dtype it was loaded in."""
    head = model.get_output_embeddings().weight[:1000].detach().dequantize().to("cpu", torch.bfloat16)
    return hashlib.sha256(head.view(torch.int16).numpy().tobytes()).hexdigest()[:16]


def made_of(folder: Path, slm=None, llm=None) -> dict:
    """What made.json tells of the trained router in a folder; ValueError where there is none, or it was made for other models."""
    path = Path(folder) / "made.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no trained router: expected a folder with made.json, as analysis.train_r2r or analysis.train_policy writes it")
    made = json.loads(path.read_text())
    for name, model in (("slm", slm), ("llm", llm)):
        if model is not None and made[name] != fingerprint(model):
            raise ValueError(f"the router in {folder} was made for another {name.upper()}: expected weights with fingerprint {made[name]}, "
                             f"got {fingerprint(model)}")
    return made


def weights_of(folder: Path, file: str) -> dict[str, torch.Tensor]:
    """The tensors of a trained router; ValueError where its folder is of another kind of router."""
    path = Path(folder) / file
    if not path.is_file():
        raise ValueError(f"{folder} has no {file}: expected the folder of another kind of router")
    return load_file(path)


def hidden_size_of(model) -> int:
    return model.config.get_text_config(decoder=True).hidden_size


class Residual(torch.nn.Module):
    """x + Dropout(Linear(Dropout(GELU(Linear(LayerNorm(x)))))), four times as wide inside: (n, width) -> (n, width)."""

    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.inner = torch.nn.Sequential(
            torch.nn.LayerNorm(width), torch.nn.Linear(width, 4 * width), torch.nn.GELU(), torch.nn.Dropout(dropout),
            torch.nn.Linear(4 * width, width), torch.nn.Dropout(dropout))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x)


class R2RNet(torch.nn.Module):
    """R2R's router (arXiv 2505.21600): does this token of the SLM lead the reasoning astray? One logit per token.

    It sees the SLM's last hidden state, the values of its top_k largest logits (sorted, without their ids) and the embedding of
    the token that it drew. `embedding` is the SLM's own input embedding: frozen, and no parameter of the router. ValueError for sizes
    that do not fit the SLM, when it is made or when it is asked.
    """

    def __init__(self, hidden_size: int, embedding: torch.nn.Embedding, top_k: int = 100, width: int = 1024, blocks: int = 6,
                 dropout: float = 0.1):
        super().__init__()
        for name, size in (("hidden_size", hidden_size), ("top_k", top_k), ("width", width)):
            check_count(name, size)
        check_count("blocks", blocks, least=0)
        if embedding.weight.shape[1] != hidden_size:
            raise ValueError(f"embedding has {embedding.weight.shape[1]} features: expected hidden_size={hidden_size}")
        if embedding.weight.shape[0] < top_k:
            raise ValueError(f"top_k={top_k}: expected at most the {embedding.weight.shape[0]} tokens of the vocabulary")
        self.hidden_size, self.top_k = hidden_size, top_k
        self.embedding = (embedding,)  # in a tuple, or its weights would be parameters of the router
        self.logit_features = torch.nn.Linear(top_k, hidden_size)
        self.body = torch.nn.Sequential(torch.nn.Linear(3 * hidden_size, width), torch.nn.Linear(width, width),
                                        *(Residual(width, dropout) for _ in range(blocks)), torch.nn.LayerNorm(width))
        self.head = torch.nn.Linear(width, 1)

    def embed(self, token: torch.Tensor) -> torch.Tensor:
        """(n,) -> (n, D)"""
        return self.embedding[0](token).detach()

    def forward(self, hidden: torch.Tensor, logits: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        """(n, D), (n, V), (n,) -> (n,)"""
        if hidden.shape[-1] != self.hidden_size:
            raise ValueError(f"hidden has {hidden.shape[-1]} features: this router was made for an SLM of hidden size {self.hidden_size}")
        if logits.shape[-1] < self.top_k:
            raise ValueError(f"logits have {logits.shape[-1]} columns: this router reads the {self.top_k} largest")
        dtype = self.head.weight.dtype
        top = logits.topk(self.top_k).values
        top = torch.maximum(top, top[:, :1] - 100)  # e^-100 is nothing, and -inf would be NaN behind a Linear
        x = torch.cat([hidden.to(dtype), self.embed(token).to(dtype), self.logit_features(top.to(dtype))], 1)  # (n, 3D)
        return self.head(self.body(x))[:, 0]


class R2RRouter:
    """R2R: the SLM's token is discarded where the net's score, sigmoid of its logit, reaches the threshold; the LLM then writes
    exactly one token in its place. Threshold 0 is the LLM alone, above 1 the SLM alone.

    Under sampling the net sees the token that was drawn (the paper does not say). ValueError for a threshold below 0 or NaN, and for
    a net in training mode.
    """

    def __init__(self, net: R2RNet, threshold: float):
        if not isinstance(threshold, Real) or not threshold >= 0:
            raise ValueError(f"threshold={threshold!r}: expected a number, 0 or more")
        if net.training:
            raise ValueError("net is in training mode: call .eval() first")
        self.net, self.threshold = net, threshold

    @classmethod
    def load(cls, folder: Path | str, slm, llm, threshold: float | None = None) -> "R2RRouter":
        """The router that analysis.train_r2r wrote into a folder for this pair of models, at its calibrated threshold unless another is
        given, which warns. ValueError where there is none, or it was made for another pair."""
        made, weights = made_of(folder, slm, llm), weights_of(folder, "router.safetensors")
        config, own = made["config"], made["threshold"]
        if threshold not in (None, own):
            warnings.warn(f"threshold {threshold:g} in place of the router's own {own:g} ({made['calibrated']})", stacklevel=2)
        net = R2RNet(hidden_size_of(slm), slm.get_input_embeddings(), config["top_k"], config["width"], config["blocks"], config["dropout"])
        net.load_state_dict(weights)
        return cls(net.to(slm.device).eval().requires_grad_(False), own if threshold is None else threshold)

    def leave_slm(self, step: Step) -> torch.Tensor:
        return self.net(step.hidden, step.logits, step.token).float().sigmoid() >= self.threshold

    def leave_llm(self, step: Step) -> torch.Tensor:
        return torch.ones_like(step.token, dtype=torch.bool)


def as_array(x) -> np.ndarray:
    """float64, of a sequence, an array or a tensor on any device."""
    return np.asarray(x.detach().cpu().double() if isinstance(x, torch.Tensor) else x, float)


def calibrate_threshold(scores: Sequence[float], labels: Sequence[int] | None = None, *, min_recall: float | None = None,
                        target_usage: float | None = None) -> float:
    """min_recall: the highest threshold on the scores that still finds this share of the divergent tokens (R2R's rule). target_usage: the
    highest at which the LLM writes this share of all tokens. Tokens of equal score are treated alike, so either may be exceeded.
    Scores and labels, which only min_recall needs: sequences, arrays or tensors. ValueError unless exactly one of the two shares is given, in
    (0, 1], and for labels that would not be used."""
    if (min_recall is None) == (target_usage is None):
        raise ValueError(f"min_recall={min_recall!r}, target_usage={target_usage!r}: expected exactly one of them")
    if target_usage is not None and labels is not None:
        raise ValueError(f"target_usage={target_usage!r} with labels: expected none, since it counts all tokens alike")
    name, share = ("min_recall", min_recall) if target_usage is None else ("target_usage", target_usage)
    scores = as_array(scores)
    if not (isinstance(share, Real) and 0 < share <= 1):
        raise ValueError(f"{name}={share!r}: expected a share in (0, 1]")
    if scores.ndim != 1 or not len(scores) or not np.isfinite(scores).all():
        raise ValueError(f"scores has shape {scores.shape}: expected one score per token, at least one, and all finite")
    if min_recall is not None:
        labels = as_array([] if labels is None else labels)
        if labels.shape != scores.shape or not set(np.unique(labels)) <= {0, 1} or not labels.any():
            raise ValueError("labels: expected one per score, 0 or 1, with at least one divergent (1)")
        scores = scores[labels.astype(bool)]
    count = max(1, math.ceil(share * len(scores) - 1e-9))  # how many must reach it; 0.07 x 100 is 7.000000000000001
    return float(np.sort(scores)[-count])


# ---- 7. R-Stitch+: a learned router --------------------------------------------------------------------------------------


class Reward(NamedTuple):
    total: float  # accuracy + efficiency
    accuracy: float  # 1 or 0
    efficiency: float  # -lam L for a right answer, 0 for a wrong one


def reward(correct: bool, latency_ms: float, lam: float = 5e-6) -> Reward:
    """R = r_acc - lam r_acc L of R-Stitch+, L in ms: a wrong answer has exactly 0 whatever it took, so speed never buys accuracy.

    Warns (once per place) where lam L >= 1: there a right answer scores no better than a wrong one, and the gate does not hold.
    ValueError for a latency or a lam that is negative or not finite.
    """
    for name, value in (("latency_ms", latency_ms), ("lam", lam)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}={value!r}: expected a finite number, 0 or more")
    if not correct:
        return Reward(0.0, 0.0, 0.0)
    if lam * latency_ms >= 1:
        warnings.warn("lam x latency is 1 or more: a right answer this slow has a reward of 0 or less", stacklevel=2)
    return Reward(1 - lam * latency_ms, 1.0, -lam * latency_ms)


def group_advantages(rewards: torch.Tensor, eps: float = 1e-6, scale: str = "std") -> torch.Tensor:
    """Advantages of G rollouts of each of P prompts, (P, G) -> (P, G): (R - mean) / (std + eps) within the group (DAPO Eq. 9).

    scale="none" leaves out the division. With it lam cancels in a group that is right throughout, where the spread is all
    latency; without it lam keeps its weight. A group of equal rewards has advantages of exactly 0. Integer rewards count as float32.
    ValueError for groups of one, rewards that are not finite, and another scale or eps.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards has shape {tuple(rewards.shape)}: expected (prompts, rollouts), two rollouts or more")
    if not rewards.isfinite().all():
        raise ValueError(f"rewards holds {rewards[~rewards.isfinite()][0].item()}: expected finite numbers")
    if scale not in ("std", "none") or not eps >= 0:
        raise ValueError(f"scale={scale!r}, eps={eps!r}: expected 'std' or 'none', and 0 or more")
    rewards = rewards if rewards.is_floating_point() else rewards.float()
    centred = rewards - rewards.mean(1, keepdim=True)
    equal = rewards.amin(1, keepdim=True) == rewards.amax(1, keepdim=True)  # their mean may be off by a rounding
    if scale == "std":
        centred = centred / (rewards.std(1, keepdim=True) + eps)
    return centred.masked_fill(equal, 0.0)


def dapo_loss(logp: torch.Tensor, logp_old: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor,
              eps_low: float = 0.2, eps_high: float = 0.28) -> torch.Tensor:
    """DAPO's objective, negated, over decisions of one shape: scalar.

    -mean over the decisions of min(r A, clip(r, 1 - eps_low, 1 + eps_high) A), r = exp(logp - logp_old). Token-level: every
    decision of the batch counts alike, so a long trajectory counts by its decisions. Clip-higher: eps_high > eps_low leaves
    more room to raise an unlikely action. `advantages` is each decision's, mask False where there is none. No KL term.
    ValueError for shapes that differ, a mask without a decision, and clips outside their ranges.
    """
    shapes = [tuple(x.shape) for x in (logp, logp_old, advantages, mask)]
    if len(set(shapes)) > 1 or mask.dtype != torch.bool or not mask.any():
        raise ValueError(f"logp, logp_old, advantages and mask have shapes {shapes}, mask of {mask.dtype}: expected one shape, and a "
                         "bool mask with at least one decision")
    if not (0 <= eps_low <= 1 and eps_high >= 0):
        raise ValueError(f"eps_low={eps_low!r}, eps_high={eps_high!r}: expected 0 <= eps_low <= 1 and eps_high >= 0")
    ratio = (logp - logp_old)[mask].exp()
    A = advantages[mask]
    return -torch.minimum(ratio * A, ratio.clamp(1 - eps_low, 1 + eps_high) * A).mean()


class Policy(torch.nn.Module):
    """The network of the R-Stitch+ router: call the LLM at this uncertain SLM token? One logit per token.

    State: the SLM's last hidden state and the context length (the paper publishes neither architecture nor size). Ours is a
    small MLP on [normalised hidden state, log of the entropy in nats, log of context length / 1000]; the entropy follows from
    the hidden state, but a net this small would first have to find the output embedding. `start` is the probability of calling
    the LLM that an untrained policy gives everywhere; use_entropy=False and use_context=False leave either out.
    ValueError for sizes that do not fit the SLM, when it is made or when it is asked, and for a start outside (0, 1).
    """

    def __init__(self, hidden_size: int, width: int = 64, start: float = 0.5, use_entropy: bool = True, use_context: bool = True):
        super().__init__()
        for name, size in (("hidden_size", hidden_size), ("width", width)):
            check_count(name, size)
        if not 0 < start < 1:
            raise ValueError(f"start={start!r}: expected a probability inside (0, 1)")
        self.hidden_size, self.use_entropy, self.use_context = hidden_size, use_entropy, use_context
        self.mlp = torch.nn.Sequential(torch.nn.Linear(hidden_size + use_entropy + use_context, width), torch.nn.GELU(), torch.nn.Linear(width, 1))
        torch.nn.init.zeros_(self.mlp[-1].weight)
        torch.nn.init.constant_(self.mlp[-1].bias, math.log(start / (1 - start)))

    def forward(self, hidden: torch.Tensor, entropy: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """(n, D), (n,) nats, (n,) tokens -> (n,)"""
        if hidden.shape[-1] != self.hidden_size:
            raise ValueError(f"hidden has {hidden.shape[-1]} features: this policy was made for an SLM of hidden size {self.hidden_size}")
        x = [torch.nn.functional.layer_norm(hidden.float(), (self.hidden_size,))]
        x += [entropy.clamp(min=1e-6).log()[:, None]] if self.use_entropy else []
        x += [(context / 1000).log()[:, None]] if self.use_context else []
        return self.mlp(torch.cat(x, 1))[:, 0]


def log_probability(logit: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
    """log p of actions (n,) bool, True to call the LLM, under the policy's logits (n,)."""
    return torch.nn.functional.logsigmoid(torch.where(action, logit, -logit))


class Decisions(NamedTuple):
    """What a sampled policy did at one step, about the k rows where it was asked."""

    rows: list[int]
    state: tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # what the policy saw: hidden (k, D), entropy (k,), context (k,)
    action: torch.Tensor  # (k,) bool: the LLM was called
    logp: torch.Tensor  # (k,) of that action


class PolicyRouter:
    """R-Stitch+: where the SLM's entropy exceeds tau a policy decides whether to discard its token and call the LLM.

    Elsewhere the SLM goes on, and the LLM hands back by the entropy rule (tau_back, tau unless given), as in R-Stitch. tau is
    normalised. Without `seed` the LLM is called where the policy's probability exceeds `threshold`, in [0, 1]; at the paper's 0.5 that is the
    likelier action. With a seed, actions are sampled and what training needs is appended to `decisions`. `back`, which the paper does not
    have, is a second policy: asked at every token of the LLM, on the LLM's hidden state, whether to hand back.
    ValueError for thresholds as in EntropyRouter.
    """

    def __init__(self, policy: Policy, tau: float, tau_back: float | None = None, seed: int | None = None, threshold: float = 0.5,
                 back: Policy | None = None):
        if not (isinstance(threshold, Real) and 0 <= threshold <= 1):
            raise ValueError(f"threshold={threshold!r}: expected a probability in [0, 1]")
        self.policy, self.seed = policy, seed
        self.rule = EntropyRouter(tau, tau_back=tau_back)
        with np.errstate(divide="ignore"):
            self.limit = float(np.log(threshold) - np.log1p(-threshold))  # the threshold as a logit, infinite at 0 and 1
        # The same positions are asked about on either side, so the second policy draws with a seed of its own.
        self.back = None if back is None else PolicyRouter(back, tau, seed=None if seed is None else -1 - seed)
        self.decisions: list[Decisions] = []

    @classmethod
    def load(cls, folder: Path | str, slm, llm, threshold: float = 0.5, seed: int | None = None) -> "PolicyRouter":
        """The router that analysis.train_policy wrote into a folder for this pair of models. ValueError where there is none, or it was made
        for another pair."""
        config, weights = made_of(folder, slm, llm)["config"], weights_of(folder, "policy.safetensors")
        nets = torch.nn.ModuleDict({name: Policy(hidden_size_of(model), config["width"], use_entropy=config["use_entropy"], use_context=config["use_context"])
                                    .to(model.device) for name, model in (("call", slm), ("back", llm)) if name == "call" or config["hand_back"]})
        nets.load_state_dict(weights)
        nets.eval().requires_grad_(False)
        return cls(nets["call"], config["tau"], config["tau_back"], seed, threshold, nets["back"] if config["hand_back"] else None)

    def leave_llm(self, step: Step) -> torch.Tensor:
        return self.rule.leave_llm(step) if self.back is None else self.back.decide(step, torch.arange(len(step.rows), device=step.token.device))

    def leave_slm(self, step: Step) -> torch.Tensor:
        leave = self.rule.leave_slm(step)
        asked = leave.nonzero()[:, 0]
        if len(asked):
            leave[asked] = self.decide(step, asked)
        return leave

    def decide(self, step: Step, asked: torch.Tensor) -> torch.Tensor:
        """(k,) bool: call the LLM?"""
        state = step.hidden[asked], step.entropy[asked], step.context[asked]
        logit = self.policy(*state) - self.limit
        if self.seed is None:
            return logit > 0
        rows = asked.tolist()
        uniform = uniforms(self.seed, [step.seeds[i] for i in rows], step.position[asked].tolist(), SLM)
        action = torch.tensor(uniform, device=logit.device) < logit.sigmoid()
        self.decisions.append(Decisions([step.rows[i] for i in rows], state, action, log_probability(logit, action)))
        return action


# ---- 8. Inside transformers ----------------------------------------------------------------------------------------------


def __getattr__(name: str):
    """`custom_generate`, from the file that transformers loads by its folder; imported when asked for."""
    if name == "custom_generate":
        from custom_generate.generate import custom_generate
        return custom_generate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# ---- 9. Loading and command line -----------------------------------------------------------------------------------------


POCKET = Path(__file__).parent / "analysis" / "pocket" / "models"
COLOURS = {SLM: "\033[36m", LLM: "\033[33m", "discarded": "\033[2;9m", "plain": "\033[0m"}


def check_same_tokenizer(slm_tokenizer, llm_tokenizer, special_may_differ: bool = False) -> None:
    """ValueError naming the first token id at which two vocabularies differ: stitching passes ids from one model to the other.

    Special tokens come last. Where only they differ the pair can be run all the same, each model reading the other's markers as
    its own. The paper pairs models of two families (L1 with QwQ-32B) and does not say how it treats their markers.
    """
    slm_ids, llm_ids = ({i: token for token, i in t.get_vocab().items()} for t in (slm_tokenizer, llm_tokenizer))
    special = {i for t in (slm_tokenizer, llm_tokenizer) for i in t.get_added_vocab().values()}
    for i in sorted(slm_ids.keys() | llm_ids.keys(), key=lambda i: (i in special, i)):
        if slm_ids.get(i) != llm_ids.get(i) and not (i in special and special_may_differ):
            hint = "; only special tokens differ: --special-tokens-may-differ runs the pair all the same" if i in special else ""
            raise ValueError(f"--slm and --llm have different tokenizers: token {i} is {slm_ids.get(i)!r} for the SLM and "
                             f"{llm_ids.get(i)!r} for the LLM; expected one vocabulary{hint}")


def check_columns(models, tokenizers) -> None:
    """ValueError for a token that one of the two models has no logit of: columns that only one model has are cut, so they must be padding."""
    widths = [model.get_output_embeddings().weight.shape[0] for model in models]
    last, token = max((i, token) for tokenizer in tokenizers for token, i in tokenizer.get_vocab().items())
    for option, width in zip(("--slm", "--llm"), widths):
        if last >= width:
            raise ValueError(f"{option} has {width} logit columns, but token {last} is {token!r} in the tokenizer: expected a pair that "
                             "both know every token")


def check_white_space(option: str, tokenizer) -> None:
    """ValueError for a tokenizer that loses the spaces between words, as one saved under the name of another kind does."""
    probe = "One more time,\nthen 1 + 2 is 3."
    text = tokenizer.decode(tokenizer(probe, add_special_tokens=False).input_ids).lower()
    if text.split() != probe.lower().split() and "".join(text.split()) == "".join(probe.lower().split()):
        raise ValueError(f"{option}: its tokenizer ({type(tokenizer).__name__}) reads {probe!r} as {text!r}, without its white space; expected "
                         "the tokenizer_class in tokenizer_config.json to name the right kind, such as PreTrainedTokenizerFast")


def located(option: str, name: str) -> tuple[str, dict]:
    """(what from_pretrained takes, its keywords): a folder, a name of Hugging Face, FILE.gguf or REPO:FILE.gguf. ValueError for a path that
    leads nowhere."""
    path = Path(name)
    if name.endswith(".gguf") and not path.is_dir():
        if path.is_file():
            return str(path.parent), {"gguf_file": path.name}
        repo, colon, file = name.partition(":")
        if not colon:
            raise ValueError(f"{option} {name}: there is no such file; expected FILE.gguf, or REPO:FILE.gguf of Hugging Face")
        return repo, {"gguf_file": file}
    if path.is_dir():
        if not any((path / config).is_file() for config in ("config.json", "adapter_config.json")):
            raise ValueError(f"{option} {name}: this folder has no config.json; expected model and tokenizer as save_pretrained writes them")
    elif name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise ValueError(f"{option} {name}: there is no such folder")
    return name, {}


def load(auto, option: str, name: str, **options):
    """`auto.from_pretrained(name)`, no code from the checkpoint; ValueError naming the command line's option where there is no such model,
    or a package that it needs is missing."""
    source, where = located(option, name)
    try:
        return auto.from_pretrained(source, trust_remote_code=False, **where, **options)
    except ImportError as error:
        raise ValueError(f"{option} {name}: a package is missing ({' '.join(str(error).split())})") from error
    except OSError as error:
        raise ValueError(f"{option} {name}: neither here nor to be had from Hugging Face ({str(error).splitlines()[0]})") from error


def load_tokenizer(option: str, name: str):
    """The tokenizer of a model, of an adapter without one that of its base. ValueError where there is none, or it loses white space."""
    located(option, name)
    folder = Path(name)
    if folder.is_dir() and not any(folder.glob("tokenizer*")):
        adapter = folder / "adapter_config.json"
        if not adapter.is_file():
            raise ValueError(f"{option} {name}: this folder has no tokenizer; expected model and tokenizer as save_pretrained writes them")
        return load_tokenizer(option, json.loads(adapter.read_text())["base_model_name_or_path"])
    tokenizer = load(AutoTokenizer, option, name)
    check_white_space(option, tokenizer)
    return tokenizer


class TurnedLinear(torch.nn.Linear):
    """A linear layer that computes a product of few rows as (W x^T)^T.

    In float32 on a processor with AVX2, oneMKL takes two to three times as long for x W^T of 2 to 8 rows, what
    catching up and small batches read, and a third more at 64 (`python -m analysis.bench --products`).
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


def load_model(option: str, name: str, device: str = "cpu", dtype: str = "auto"):
    """A causal LM, ready to run: weights from safetensors, or from a GGUF file, whose packed weights are unpacked to dtype. An adapter's
    folder loads its base and the adapter."""
    packed = name.endswith(".gguf")
    options = {"quantization_config": GgufConfig(dequantize=True)} if packed else {"use_safetensors": True}
    model = load(AutoModelForCausalLM, option, name, dtype=dtype, **options)
    model = (model if str(model.device) == device else model.to(device)).eval()
    turn_products(model)
    return model


def turn_end(tokenizer) -> int | None:
    """The special token with which the chat template ends a turn of the assistant, if it does."""
    if not tokenizer.chat_template:
        return None
    try:
        text = tokenizer.apply_chat_template([{"role": "user", "content": "question"}, {"role": "assistant", "content": "reply"}], tokenize=False)
    except jinja2.TemplateError:
        return None
    _, said, after = text.rpartition("reply")
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = tokenizer(after.strip(), add_special_tokens=False).input_ids if said else []
    return ids[0] if ids and ids[0] in special else None


def complete_ends(model, tokenizer) -> None:
    """Add to a model's generation config what else ends an answer: the tokenizer's EOS, and what ends a turn in its chat template. Many
    checkpoints list one of them only, and would write on past the other to the token limit."""
    given = model.generation_config.eos_token_id
    ends = [] if given is None else [given] if isinstance(given, int) else list(given)
    missing = {tokenizer.eos_token_id, turn_end(tokenizer)} - {None, *ends}
    if missing:
        model.generation_config.eos_token_id = ends + sorted(missing)


def load_pair(slm: str, llm: str, device: str = "cpu", dtype: str = "auto", special_may_differ: bool = False):
    """(SLM, LLM, the LLM's tokenizer), each model from a name of Hugging Face, a folder (an adapter's too), FILE.gguf or REPO:FILE.gguf.
    dtype "auto" is the checkpoint's. Their generation configs are completed, see `complete_ends`.
    ValueError where there is no such model, or the tokenizers differ (`check_same_tokenizer`)."""
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    names = {"--slm": slm, "--llm": llm}
    tokenizers = [load_tokenizer(option, name) for option, name in names.items()]
    check_same_tokenizer(*tokenizers, special_may_differ)
    models = [load_model(option, name, device, dtype) for option, name in names.items()]
    check_columns(models, tokenizers)
    for model, tokenizer in zip(models, tokenizers):
        complete_ends(model, tokenizer)
    return *models, tokenizers[1]


def left_padded(rows: Sequence[list[int]], pad: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids, attention_mask) of prompts of any length, (B, P) each."""
    width = max(map(len, rows))
    return (torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows]),
            torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]))


Question = str | Sequence[dict]  # one message of the user, or the messages so far, {"role": ..., "content": ...} each


def check_question(question: Question) -> None:
    """ValueError unless there is something to answer: a text, or messages of which the last is not the assistant's."""
    if isinstance(question, str) and question.strip():
        return
    if not isinstance(question, Sequence) or isinstance(question, str) or not question or not all(isinstance(m, dict) for m in question):
        raise ValueError(f"question={question!r}: expected a text, or a list of messages; give several as several arguments")
    if not all({"role", "content"} <= m.keys() for m in question) or question[-1]["role"] == "assistant":
        raise ValueError(f"question={question!r}: expected messages with a role and a content, the last of which is to be answered")


def check_prompting(tokenizer, questions: Sequence[Question], system: str | None, template: dict) -> None:
    """ValueError for what the chat template, or a tokenizer without one, would ignore."""
    for question in questions:
        check_question(question)
    if not tokenizer.chat_template:
        if system is not None or template or not all(isinstance(question, str) for question in questions):
            what = f"system={system!r}" if system is not None else f"{next(iter(template))}" if template else "a list of messages"
            raise ValueError(f"{what}: this tokenizer has no chat template; expected plain questions")
        return
    known = tokenizer.get_chat_template()
    for name in template:
        if not re.search(rf"\b{re.escape(name)}\b", known):
            raise ValueError(f"{name}={template[name]!r}: the chat template of this tokenizer has no such option")
    if system is not None and any(not isinstance(q, str) and q[0]["role"] == "system" for q in questions):
        raise ValueError(f"system={system!r}: the messages begin with a system message of their own; expected one of the two")


def messages_of(question: Question, system: str | None, instruction: str | None) -> list[dict]:
    """A conversation: the system's message, the question's, and the instruction on a line of its own behind the last."""
    messages = [{"role": "user", "content": question}] if isinstance(question, str) else [dict(message) for message in question]
    if instruction:
        messages[-1]["content"] += f"\n{instruction}"
    return ([{"role": "system", "content": system}] if system is not None else []) + messages


def encode(tokenizer, *questions: Question, system: str | None = None, instruction: str | None = None,
           **template) -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids, attention_mask) of the prompts, (B, P) each, padded on the left.

    A question is a user's message, or a list of messages for several turns, put into the tokenizer's chat template; where it has none, a text
    as it stands. system: the system's message, None for the template's own. instruction: a line added behind the question. template: options
    of the chat template, such as enable_thinking=False of Qwen3. ValueError for a question without text, and for what would be ignored.
    """
    check_prompting(tokenizer, questions, system, template)
    chats = [messages_of(question, system, instruction) for question in questions]
    if tokenizer.chat_template:
        try:
            texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, **template) for chat in chats]
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template of this tokenizer refuses the messages: {error}") from error
    else:
        texts = [chat[-1]["content"] for chat in chats]
    rows = [tokenizer(text, add_special_tokens=not tokenizer.chat_template).input_ids for text in texts]
    return left_padded(rows, tokenizer.pad_token_id or 0)  # many tokenizers have none; the mask hides it


class Printer:
    """Prints tokens as they are written: coloured by writer and with discarded ones struck through on a terminal, plain elsewhere."""

    def __init__(self, tokenizer, out=None):
        self.tokenizer = tokenizer
        self.out = sys.stdout if out is None else out
        self.colour = self.out.isatty() and "NO_COLOR" not in os.environ
        self.ids: list[int] = []
        self.start = self.shown = 0  # ids[start:shown] is on the screen and decides how the next piece reads
        if self.colour:
            print(" ".join(f"{COLOURS[k]}{name}{COLOURS['plain']}" for k, name in ((SLM, "SLM"), (LLM, "LLM"), ("discarded", "discarded"))),
                  file=self.out)

    def __call__(self, row: int, call: Call) -> None:
        ids = self.ids[self.start:] + [call.token]
        before = self.tokenizer.decode(self.ids[self.start:self.shown], skip_special_tokens=True)
        piece = self.tokenizer.decode(ids, skip_special_tokens=True)[len(before):]
        whole = not piece.endswith("\ufffd")  # a character may span tokens: wait for the rest of it
        if call.kept:
            self.ids.append(call.token)
            if whole and piece:
                self.start, self.shown = self.shown, len(self.ids)
        if whole and (call.kept or self.colour):
            style = COLOURS[call.model] + ("" if call.kept else COLOURS["discarded"])
            self.out.write(f"{style}{piece}{COLOURS['plain']}" if self.colour else piece)
            self.out.flush()


class Timed:
    """A router, and the seconds that its decisions took."""

    def __init__(self, router, device: torch.device):
        self.router, self.device, self.seconds, self.decisions = router, device, 0.0, 0
        self.first, self.window = getattr(router, "first", SLM), getattr(router, "window", 1)

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def leave_slm(self, step: Step) -> torch.Tensor:
        start = self.now()
        leave = self.router.leave_slm(step)
        self.seconds, self.decisions = self.seconds + self.now() - start, self.decisions + 1
        return leave

    def leave_llm(self, step: Step) -> torch.Tensor:
        return self.router.leave_llm(step)


def run_question(slm, llm, tokenizer, ids: torch.Tensor, router, **options) -> Stitched:
    """Answer one prompt (1, P), printing the answer as it is written, and a line of figures."""
    timed = Timed(router, llm.device)
    start = time.perf_counter()
    result = stitch(slm, llm, ids, timed, on_token=Printer(tokenizer), **options)
    seconds, calls, written = time.perf_counter() - start, result.calls[0], result.source.numel()
    net = (f", router's net {1e3 * timed.seconds / max(1, timed.decisions):.2f} ms a decision, {100 * timed.seconds / seconds:.1f} % of the time"
           if isinstance(router, (R2RRouter, PolicyRouter)) else "")
    print(f"\n{written} tokens (LLM {100 * (result.source == LLM).float().mean():.1f} %), {count_switches(calls)} switches, {seconds:.2f} s, "
          f"{written / seconds:.0f} tokens/s{net}")
    return result


def unknown_words(tokenizer, text: str) -> list[str]:
    """The words of a text that its tokenizer has no token for; none where it knows every byte, as those without an unknown token do."""
    if not tokenizer.is_fast or tokenizer.unk_token_id is None:
        return []
    words = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    return [text[a:b].strip() for i, (a, b) in zip(words.input_ids, words.offset_mapping) if i == tokenizer.unk_token_id]


def usable_device(name: str) -> str:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):  # no such device, or no such device here
        raise argparse.ArgumentTypeError(f"{name!r} is no device that torch can use here") from None
    return name


def template_option(text: str) -> tuple[str, object]:
    """("enable_thinking", False) of "enable_thinking=false": the value as JSON where it is JSON, else as a text."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r}: expected KEY=VALUE")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


CHECKPOINTS = {"r2r": POCKET / "r2r", "plus": POCKET / "policies" / "kappa0.35-seed0"}  # of the pocket pair
TRAINED_BY = {"r2r": "analysis.train_r2r", "plus": "analysis.train_policy"}
BELONGS = {  # options to the routers that read them
    "tau": ("entropy",), "tau_back": ("entropy",), "window": ("entropy",), "p": ("random",), "threshold": ("r2r", "plus"), "checkpoint": ("r2r", "plus")}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=(
        "Answer a question with a small and a large language model, stitched token by token. Decoding is greedy unless --temperature "
        "says otherwise, whatever sampling a checkpoint asks for by default."))
    add = parser.add_argument
    add("question", nargs="?", help="the problem to solve; without one, the pocket pair solves three and every method is compared in a table")
    add("--slm", default=str(POCKET / "slm"), help="small model: a Hugging Face name, a folder (an adapter's too), FILE.gguf or REPO:FILE.gguf "
                                                   "(default: the pocket pair's)")
    add("--llm", default=str(POCKET / "llm"), help="large model with the same tokenizer (default: the pocket pair's)")
    add("--router", choices=["entropy", "r2r", "plus", "slm", "llm", "random"], default="entropy",
        help="who decides which model writes: R-Stitch, R2R, R-Stitch+, one model alone, chance (default: %(default)s)")
    add("--tau", type=float, help="entropy threshold of --router entropy, in [0, 1]: entropy in nats divided by log V (default: 0.02)")
    add("--tau-back", type=float, help="its own threshold for the LLM to hand back (default: tau)")
    add("--window", type=int, help="kept tokens over which --router entropy takes the mean (default: 1)")
    add("--p", type=float, help="probability per token, in [0, 1], that --router random calls the LLM (default: 0.1)")
    add("--checkpoint", type=Path, metavar="FOLDER", help="trained router of --router r2r or plus (default: the pocket pair's, for that pair)")
    add("--threshold", type=float, help="score in [0, 1] from which --router r2r or plus calls the LLM (default: as trained)")
    add("--system", help="the system's message (default: the chat template's own)")
    add("--instruction", help="a line to add behind the question, such as how to mark the answer")
    add("--template", metavar="KEY=VALUE", type=template_option, action="append", default=[],
        help="option of the chat template, such as enable_thinking=false; may be repeated")
    add("--max-new-tokens", type=int, default=1024, help="longest answer, in tokens (default: %(default)s)")
    add("--temperature", type=float, default=0.0, help="of sampling; 0 is greedy (default: %(default)s)")
    add("--top-k", type=int, default=0, help="tokens to sample from, 0 for all; needs --temperature (default: %(default)s)")
    add("--top-p", type=float, default=1.0, help="probability mass to sample from, in (0, 1]; needs --temperature (default: %(default)s)")
    add("--seed", type=int, default=0, help="integer that decides every random draw (default: %(default)s)")
    add("--device", type=usable_device, default="cuda" if torch.cuda.is_available() else "cpu", help="torch device of both models (default: %(default)s)")
    add("--graphs", action="store_true", help="replay steps as CUDA graphs; needs a CUDA device")
    add("--special-tokens-may-differ", action="store_true", help="run a pair whose tokenizers differ in special tokens only")
    add("--json", metavar="FILE", help="write the table's rows there; without a question only")
    add("--dtype", choices=["auto", "float32", "bfloat16", "float16"], help="of both models; auto is the checkpoint's (default: float32 on a CPU, else auto)")
    return parser


def checkpoint_of(args: argparse.Namespace) -> Path:
    """The folder of a trained router; ValueError where there is none, saying how to train one."""
    pocket = (args.slm, args.llm) == (str(POCKET / "slm"), str(POCKET / "llm"))
    if args.checkpoint is None and not pocket:
        raise ValueError(f"--router {args.router} needs --checkpoint FOLDER for this pair: train one with python -m "
                         f"{TRAINED_BY[args.router]} --slm {args.slm} --llm {args.llm} --problems FILE")
    return args.checkpoint or CHECKPOINTS[args.router]


def check_options(args: argparse.Namespace) -> None:
    """ValueError for what can be seen to be wrong, or would be ignored, before a model is loaded."""
    for option, routers in BELONGS.items():
        if getattr(args, option) is not None and args.router not in routers:
            raise ValueError(f"--{option.replace('_', '-')} {getattr(args, option)} belongs to --router {' or '.join(routers)}, not to --router {args.router}")
    if args.json:
        raise ValueError(f"--json {args.json} belongs to the table, which is printed where no question is given")
    for option, default in (("top_k", 0), ("top_p", 1.0)):
        if getattr(args, option) != default and not args.temperature:
            raise ValueError(f"--{option.replace('_', '-')} {getattr(args, option)} needs a --temperature above 0")
    if args.threshold is not None and not 0 <= args.threshold <= 1:
        raise ValueError(f"--threshold {args.threshold}: expected a score in [0, 1]")
    check_count("--max-new-tokens", args.max_new_tokens)
    Sampling(args.temperature, args.top_k, args.top_p)
    check_question(args.question)
    if args.router in CHECKPOINTS:
        made_of(checkpoint_of(args))
    else:
        build_router(args)


def build_router(args: argparse.Namespace, slm=None, llm=None):
    """The router that the command line names; a trained one needs the models. ValueError for a threshold or the like that is none."""
    given = {option: getattr(args, option) for option, routers in BELONGS.items() if args.router in routers and getattr(args, option) is not None}
    given.pop("checkpoint", None)
    return {"entropy": lambda: EntropyRouter(**given), "slm": SLMOnly, "llm": LLMOnly, "random": lambda: RandomRouter(**{"p": 0.1} | given, seed=args.seed),
            "r2r": lambda: R2RRouter.load(checkpoint_of(args), slm, llm, **given),
            "plus": lambda: PolicyRouter.load(checkpoint_of(args), slm, llm, **given)}[args.router]()


@contextmanager
def threads_for(model) -> Iterator[None]:
    """One CPU thread for a model that gains nothing by more and crawls where another process wants a core; as before afterwards."""
    before = torch.get_num_threads()
    try:
        if sum(p.numel() for p in model.parameters()) < 1e8:
            torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(before)


def answer(args: argparse.Namespace) -> None:
    """Load the pair, answer the question."""
    dtype = args.dtype or ("float32" if args.device == "cpu" else "auto")
    *models, tokenizer = load_pair(args.slm, args.llm, args.device, dtype, args.special_tokens_may_differ)
    router = build_router(args, *models)
    ids, _ = encode(tokenizer, args.question, system=args.system, instruction=args.instruction, **dict(args.template))
    if unknown := unknown_words(tokenizer, args.question):
        print(f"note: unknown to the tokenizer: {' '.join(unknown)}", file=sys.stderr)
    with threads_for(models[1]):
        if args.graphs:
            models = [CachedLM(model, 1, ids.shape[1] + args.max_new_tokens, graphs=True) for model in models]
        run_question(*models, tokenizer, ids, router, max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_k=args.top_k,
                     top_p=args.top_p, seed=args.seed)


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        if args.question is not None:
            check_options(args)
            return answer(args)
        others = sorted(vars(args).keys() - {"seed", "device", "json"})
        given = [name for name in others if getattr(args, name) != parser.get_default(name)]
        if given:
            raise ValueError(f"--{given[0].replace('_', '-')} needs a question: the table without one is of the pocket pair as it is")
        from analysis import demo
        demo.main(args.seed, args.device, args.json)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        sys.exit(130)  # as a shell reports Ctrl-C; what was written stands on the screen


if __name__ == "__main__":
    main()

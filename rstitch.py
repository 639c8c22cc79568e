"""rstitch: one answer, written token by token by a small and a large language model.

A small model (SLM) writes most of a chain of thought cheaply; a large one (LLM) writes the tokens that
matter. R-Stitch (arXiv 2507.17307) hands over where the SLM's next-token entropy is high. R-Stitch+ learns
where, by reinforcement, with a latency model in its reward. R2R (arXiv 2505.21600) trains a network on tokens
where the two models' reasoning diverges. Each is a router of a few lines in one loop over two cached models.

The idea that keeps it small: a problem is ONE token sequence with TWO cursors into it, one per model. A
cursor says how much of the sequence the model's KV cache has read. Prefill, catching up after a switch and
plain decoding are then one operation:

    model m reads the tokens between its cursor and the end, and proposes the next token.

Switching models is running the other one. To discard a token is not to append it: no model has read it yet,
so nothing is rolled back. A router decides only who reads next (Algorithm 1 of R-Stitch; H is the entropy of
the proposing model):

    active   router says            the proposed token is         next active
    SLM      stay   (H <= tau)      kept                          SLM
    SLM      leave  (H >  tau)      discarded: never read         LLM, which writes this position
    LLM      stay   (H >  tau)      kept                          LLM
    LLM      leave  (H <= tau)      kept                          SLM

Sections: 1 Algorithm 1; 2 uncertainty and sampling; 3 routers; 4 stitching; 5 cached models; 6 which rows a
call serves; 7 what goes in and what comes out; 8 latency model; 9 R2R; 10 R-Stitch+. The method is read in 1
to 4; 6 changes no result. To change the router, touch one class of 3; the sampling rule, `Sampling`; the
cache, `StitchLayer`. What ties this to transformers, and what bad input is told, stands in rstitch_hf/.

Glossary (code name, paper symbol, unit, default):

    B, n, S, T, V, D   rows of a batch; rows and tokens of one read; cache columns; logits; hidden size
    slot, column       a row's place in a cache, where one row follows another; a token's place in a row
    P, N, G            prompt columns; tokens of the longest answer; answers per prompt (training: P prompts)
    entropy            H_t of R-Stitch Eq. 1, in nats. The paper divides by log V; here the unit is named
    tau                entropy threshold, R-Stitch section 3; normalised to [0, 1] unless unit="nats"; 0.02
    window             entropies averaged before comparing with tau: the proposal's and those of the last kept
                       tokens; 1 (the paper)
    SLM, LLM = 0, 1    the two sources of tokens
    kept               appended to the answer; an SLM proposal at which the router leaves is not
    position           index of a token in the answer, 0 for the first; in section 5 in the whole sequence
    cursor             L of R-Stitch Algorithm 1: tokens a model has read of a row, prompt included
    n_inf, n_kv        N_inf, N_kv of R-Stitch's latency model: tokens a call reads, tokens its cache held
    lam                lambda of R-Stitch+'s reward: what a millisecond of latency costs, 5e-6
    logp, A            log-probability of a decision, its advantage (DAPO)

    python rstitch.py                                         # a built-in problem, by the pocket pair
    python rstitch.py "Ann has 596 coins. Ann loses 120. How many coins does Ann have?"
    python rstitch.py --slm SMALL --llm LARGE "question"      # Hugging Face names or paths with one tokenizer
"""
from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.optimize
import torch
from safetensors.torch import load_file
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionCacheLayerMixin

from rstitch_hf.graphs import Graphs
from rstitch_hf.inputs import (
    check_arguments,
    check_context,
    check_count,
    check_decision,
    check_fits,
    check_padding,
    check_policies,
    check_scores,
    end_tokens,
    padding_token,
    row_limits,
    row_seeds,
    unpadded,
)
from rstitch_hf.loading import encode, load_pair  # noqa: F401  (what a first line needs)
from rstitch_hf.ranks import decided_by_rank_zero, is_split, of_rank_zero
from rstitch_hf.serving import (
    CHUNKED,
    GROUPED,
    PACKED,
    STEPWISE,
    Part,
    attention_of,
    bare,
    cache_keyword,
    can_pack,
    check_servable,
    device_of,
    forward_arguments,
    weight_of,
)

SLM, LLM = 0, 1
NAMES = ("SLM", "LLM")


# ---- 1. Algorithm 1 ----------------------------------------------------------------------------------------
# R-Stitch in plain sight. What comes below does the same for any number of rows, with every token read at
# most once by each model, and with sampling; the tests assert that both give the same tokens.


@torch.no_grad()
def stitch_reference(slm, llm, ids: list[int], router, n: int) -> tuple[list[int], list[int]]:
    """R-Stitch Algorithm 1: one prompt, greedy, no cache. Up to n tokens, and who wrote each."""
    models, ends = (slm, llm), end_tokens(None, (slm, llm))
    V = min(model.get_output_embeddings().weight.shape[0] for model in models)
    answer, source, entropies = [], [], []
    active, window = getattr(router, "first", SLM), getattr(router, "window", 1)
    while len(answer) < n and not (answer and answer[-1] in ends):
        sequence = torch.tensor([ids + answer])
        out = models[active](sequence, output_hidden_states=True)
        logits = out.logits[:, -1, :V].float()  # (1, V)
        token, H = logits.argmax(-1), entropy(logits)
        # The last window - 1 entropies, NaN before the first. (A slice from -(window - 1) fails at window 1.)
        history = torch.tensor([([math.nan] * window + entropies)[len(entropies) + 1:]],
                               dtype=torch.float32)  # (1, window - 1)
        step = Step([0], [0], logits, out.hidden_states[-1][:, -1], token, H,
                    torch.tensor([len(answer)]), torch.tensor([sequence.shape[1]]), history)
        if active == SLM and router.leave_slm(step):
            active = LLM  # the SLM's token is discarded, the LLM writes this position
            continue
        answer.append(int(token))
        source.append(active)
        entropies.append(float(H))
        if active == LLM and router.leave_llm(step):
            active = SLM
    return answer, source


# ---- 2. Uncertainty and sampling ---------------------------------------------------------------------------
# How sure a model is of its next token (R-Stitch Eq. 1), and how that token is drawn.


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """Entropy of the next-token distribution in nats, float32: (..., V) -> (...).

    R-Stitch Eq. 1 without its division by log V. In float32: bfloat16 is off by some hundredths of a nat at
    V = 152k, and the paper's smallest tau, 0.001, is 0.012 nats there. p log p is 0 where p underflows or a
    logit is -inf."""
    few = max(1, 2**18 // logits.shape[-1])  # rows that stay in the processor's cache
    if logits.device.type == "cpu" and logits.numel() > few * logits.shape[-1]:
        parts = logits.flatten(0, -2).split(few)  # a third to a fifth of the time at V = 152k
        return torch.cat([entropy(part) for part in parts]).view(logits.shape[:-1])
    logp = logits.float().log_softmax(-1)
    return (logp.exp() * -logp.clamp(min=-1e4)).sum(-1)


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits. Temperature 0 is greedy, whatever the rest. Filters as in
    transformers: temperature, then the top_k largest, then the smallest set that holds top_p of what is left.
    ValueError for numbers outside their ranges."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        check_count("top_k", self.top_k, least=0)
        if not (isinstance(self.temperature, Real) and 0 <= self.temperature < math.inf):
            raise ValueError(f"temperature={self.temperature!r}: expected a finite number, 0 (greedy) or up")
        if not (isinstance(self.top_p, Real) and 0 < self.top_p <= 1):
            raise ValueError(f"top_p={self.top_p!r}: expected a number in (0, 1]")

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """The warped distribution, float32: (n, V) -> (n, V)."""
        logits = logits.float()
        logits = (logits - logits.amax(-1, keepdim=True)) / max(self.temperature, 1e-30)  # no overflow
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

        The uniforms come from outside: a draw depends neither on the batch nor on the order of the calls. A
        token of probability 0 is never drawn, even where a parallel cumulative sum is not quite monotone."""
        if self.temperature == 0:
            return logits.argmax(-1)
        probs = self.probabilities(logits)
        cdf = probs.cumsum(-1).masked_fill(probs == 0, 0.0)
        total = cdf.amax(-1)
        target = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
        return (cdf > target[:, None]).to(torch.uint8).argmax(-1)  # the first True


GREEDY = Sampling()


# ---- 3. Routers --------------------------------------------------------------------------------------------
# Who writes the next token. A router is asked after every forward pass: leave_slm(step) of the SLM's
# proposals, leave_llm(step) of the LLM's. It keeps no state of a row. R2R's stands in section 9, R-Stitch+'s
# in section 10.


class Step(NamedTuple):
    """What a router sees of one forward call, about the n rows that read. Its tensors are inference tensors,
    valid until the router returns: clone to keep, or to train on."""

    rows: list[int]  # which rows of the batch
    seeds: list[int]  # their seeds, for random decisions that do not depend on the batch
    logits: torch.Tensor  # (n, V) float32, raw, of the common vocabulary
    hidden: torch.Tensor  # (n, D) of the model that read
    token: torch.Tensor  # (n,) the proposal
    entropy: torch.Tensor  # (n,) nats
    position: torch.Tensor  # (n,) index of the proposal in the answer
    context: torch.Tensor  # (n,) tokens before the proposal, prompt included
    history: torch.Tensor  # (n, window - 1) entropies of the last kept tokens, whoever wrote them; NaN: none


@dataclass(frozen=True)
class EntropyRouter:
    """R-Stitch: leave the SLM where its entropy exceeds tau, the LLM where its own does not (Algorithm 1).

    tau is normalised by log V (the paper) or in nats. Not in the paper: `window` > 1 compares the mean over
    the proposal and the row's last kept tokens; a discarded proposal does not count later, and a switch does
    not start the window anew. `tau_back`, tau unless given, is the LLM's threshold for handing back.
    ValueError for thresholds outside their unit's range."""

    tau: float = 0.02
    unit: str = "normalized"
    window: int = 1
    tau_back: float | None = None

    def __post_init__(self):
        if self.unit not in ("normalized", "nats"):
            raise ValueError(f"unit={self.unit!r}: expected 'normalized' (divided by log V) or 'nats'")
        for name, tau in (("tau", self.tau),
                          ("tau_back", self.tau if self.tau_back is None else self.tau_back)):
            if (not isinstance(tau, Real) or not 0 <= tau < math.inf
                    or (self.unit == "normalized" and tau > 1)):
                bound = ("in [0, 1], normalised by log V" if self.unit == "normalized"
                         else "of nats, 0 or more")
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
    """One number in [0, 1) per row, from (seed, row seed, position, model) alone, so whatever the batch."""
    return [random.Random(f"{seed} {row_seed} {t} {model}").random() for row_seed, t in zip(seeds, positions)]


@dataclass(frozen=True)
class RandomRouter:
    """Leave the SLM with probability p, stay with the LLM with `stay`: the baseline at an equal LLM share.

    The LLM writes p / (1 - stay (1 - p)) of the tokens in the long run, p with the default.
    ValueError for what is no probability."""

    p: float
    stay: float = 0.0
    seed: int = 0

    def __post_init__(self):
        for name in ("p", "stay"):
            p = getattr(self, name)
            if not (isinstance(p, Real) and 0 <= p <= 1):
                raise ValueError(f"{name}={p!r}: expected a probability in [0, 1]")

    def flip(self, step: Step, model: int, p: float) -> torch.Tensor:
        return torch.tensor([u < p for u in uniforms(self.seed, step.seeds, step.position.tolist(), model)],
                            device=step.token.device)

    def leave_slm(self, step: Step) -> torch.Tensor:
        return self.flip(step, SLM, self.p)

    def leave_llm(self, step: Step) -> torch.Tensor:
        return self.flip(step, LLM, 1 - self.stay)


# ---- 4. Stitching ------------------------------------------------------------------------------------------
# Algorithm 1 for many rows at once. Each has its own active model; in each turn one model serves all rows
# that wait for it. `CachedLM.read` (section 5) reads tokens and proposes the next ones; no result depends on
# which rows share a call (section 6).


Process = Callable[[int, list[int], torch.Tensor], torch.Tensor]  # (row, ids, logits (V,)) -> scores (V,)


class Call(NamedTuple):
    """One logical forward pass of one model about one row, even if it was read in chunks."""

    model: int  # SLM or LLM
    position: int  # index in the answer of the token it proposed
    n_inf: int  # tokens that this call reads, as if its row ran alone: no pads, and what was copied counts
    n_kv: int  # tokens that its model had read of the row before it
    token: int  # the proposal
    entropy: float  # nats, of the raw distribution over the common vocabulary
    kept: bool  # False: an SLM proposal that the router discarded


@dataclass(eq=False)
class Stitched:
    """What `stitch` returns. B rows, P columns of prompts, N tokens in the longest answer."""

    sequences: torch.Tensor  # (B, P+N) long: the prompts, padded on the left, then the answers, on the right
    source: torch.Tensor  # (B, N) int8: SLM, LLM, or -1 for padding
    entropy: torch.Tensor  # (B, N) float32, nats, of the model that wrote the token; NaN for padding
    calls: list[list[Call]]  # per row, in order
    kept: list[list[Call]]  # per row, those whose token was kept: one per token of the answer
    seed: list[int]  # the row seeds: seed=result.seed repeats the result
    n_read: tuple[int, int]  # tokens that SLM and LLM really read; the calls' n_inf counts copies too


@dataclass(eq=False)
class Row:
    """One problem: its sequence, and who reads it next. The cursors live in the two CachedLMs."""

    index: int  # of the prompt
    seed: int
    ids: list[int]
    n_prompt: int
    active: int
    limit: int = 0  # tokens that it may write
    slot: int = 0  # where it lies in both caches, once it is admitted
    uniform: list[list[float]] = field(default_factory=list)  # by position, a draw for SLM and LLM
    calls: list[Call] = field(default_factory=list)
    kept: list[Call] = field(default_factory=list)  # those whose token was appended, one per answer token
    begun: set[int] = field(default_factory=set)  # which models have read of it
    done: bool = False


def histories(rows: list[Row], width: int, device) -> torch.Tensor:
    """(n, width) entropies of each row's last kept tokens, NaN where there are fewer."""
    lines = [[row.kept[t].entropy if t >= 0 else math.nan
              for t in range(len(row.kept) - width, len(row.kept))] for row in rows]
    return torch.tensor(lines, dtype=torch.float32, device=device)


def propose(model: int, lm: CachedLM, rows: list[Row], unread: list[list[int]], position: list[int],
            vocab: int, sampling: Sampling, process: Process | None) -> Output:
    """Each row reads its tokens; its proposal is drawn from the logits, as `process` changes them."""
    uniform = [row.uniform[t][model] for row, t in zip(rows, position)] if sampling.temperature else None
    slots = [row.slot for row in rows]
    if process is None:
        return lm.read(slots, unread, vocab, sampling, uniform)
    out = lm.read(slots, unread, vocab)
    check_entropies(model, rows, out.entropy.tolist())
    return out._replace(token=draw_processed(process, rows, out.logits, sampling, uniform))


def advance(model: int, lm: CachedLM, rows: list[Row], router, vocab: int, sampling: Sampling,
            process: Process | None = None) -> list[Call]:
    """`model` reads what it has not read of each row and proposes a token; the router decides who goes on."""
    unread = [row.ids[lm.cursor[row.slot]:] for row in rows]
    n_kv = [lm.cursor[row.slot] if model in row.begun else 0 for row in rows]  # see `Call`
    n_inf = [len(row.ids) - start for row, start in zip(rows, n_kv)]
    position = [len(row.ids) - row.n_prompt for row in rows]
    # Copied to the device before the read: a copy after it would wait for the read to end.
    at = torch.tensor([position, [len(row.ids) for row in rows]], device=lm.inputs.device)
    history = histories(rows, getattr(router, "window", 1) - 1, lm.inputs.device)
    out = propose(model, lm, rows, unread, position, vocab, sampling, process)
    step = Step([row.index for row in rows], [row.seed for row in rows], out.logits, out.hidden, out.token,
                out.entropy, at[0], at[1], history)
    leave = (router.leave_slm if model == SLM else router.leave_llm)(step)
    check_decision(router, model, leave, step.token)
    # One host read for all three; float32 holds token ids up to 2^24.
    decided = torch.stack([out.token.float(), out.entropy, leave.float()])
    tokens, entropies, leaves = (of_rank_zero(decided) if lm.ranked else decided).tolist()
    check_entropies(model, rows, entropies)
    for row, t, n, start, token, H, left in zip(rows, position, n_inf, n_kv, tokens, entropies, leaves):
        call = Call(model, t, n, start, int(token), H, kept=not (model == SLM and left))
        row.calls.append(call)
        row.begun.add(model)
        if call.kept:
            row.kept.append(call)
            row.ids.append(call.token)
        if left:
            row.active = 1 - model
    return [row.calls[-1] for row in rows]


def write(rows: list[Row], lms: Sequence[CachedLM], slots: int, router, vocab: int, sampling: Sampling,
          process: Process | None, ended: Callable[[Row, Call], bool],
          on_token: Callable[[int, Call], None] | None) -> None:
    """Algorithm 1 for all rows, until each has ended; at most `slots` of them are in the caches at once."""
    model, in_a_row = getattr(router, "first", SLM), 0
    waiting, held = deque(rows), [None] * slots
    while live := admitted(waiting, held, lms, sampling):
        chosen = next_model(live, model, in_a_row)
        model, in_a_row = chosen, (in_a_row + 1 if chosen == model else 1)
        ready = [row for row in live if row.active == model]
        share([row for row in ready if model not in row.begun], lms[model], held)
        for group in similar_lengths(ready, lms[model]):
            for row, call in zip(group, advance(model, lms[model], group, router, vocab, sampling, process)):
                row.done = call.kept and ended(row, call)
                if row.done:
                    row.uniform.clear()
                if on_token is not None:
                    on_token(row.index, call)


@torch.inference_mode(False)  # even where the caller is in it: a router clones what it sees to train on it
@torch.no_grad()
def stitch(slm, llm, input_ids: torch.Tensor | Sequence[Sequence[int]], router, *,
           attention_mask: torch.Tensor | None = None, max_new_tokens: int | Sequence[int],
           temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0,
           eos_token_id: int | Sequence[int] | None = None, pad_token_id: int | None = None,
           seed: int | Sequence[int] | None = None, on_token: Callable[[int, Call], None] | None = None,
           stop: Callable[[int, list[int]], bool] | None = None, process: Process | None = None,
           slots: int | None = None) -> Stitched:
    """Answer each prompt with two models (R-Stitch Algorithm 1), the router deciding who writes which token.

    slm, llm: a decoder-only model of transformers each, or a CachedLM.
    input_ids: lists of token ids, or a tensor (B, P). Of a tensor every token counts, or with attention_mask
      (B, P) those that are not padding, zeros on the left. Without one, rows that look padded are refused.
    max_new_tokens: of each row, or one number per row.
    temperature, top_k, top_p: see `Sampling`. seed: see `row_seeds`.
    eos_token_id: None takes every EOS of either model's generation config, [] none.
    pad_token_id: fills short answers. None takes the models', else the first that ends an answer, else 0.
    on_token(row, call): sees every forward pass in each row's order, those of discarded proposals too.
    stop(row, ids): ends a row after the token that makes it true; ids are the answer so far.
    process(row, ids, logits): returns the scores (V,) from which each proposal of either model is drawn,
      before temperature, top_k and top_p. logits (V,) are raw, float32, of the common vocabulary; ids are
      prompt and answer; it changes neither. Entropies, and the logits that a router sees, stay the raw ones.
    slots: at most so many rows are in the caches at once, a finished one's slot goes to the next prompt; None
      takes all at once. What prompts begin with alike is read once and copied.

    Departs from the paper: any batch size (a row gets, up to float rounding, what it would get alone);
    entropies are taken in float32; where the models' logit widths differ the common columns are used.
    ValueError or TypeError for what cannot be run, before anything is computed, but for what a router or
    `process` returns. FloatingPointError for NaN logits; its `partial` is the `Stitched` so far."""
    sampling = Sampling(temperature, top_k, top_p)
    check_arguments(router, slots, on_token=on_token, stop=stop, process=process)
    prompts = unpadded(input_ids, attention_mask)
    limits, seeds = row_limits(max_new_tokens, len(prompts)), row_seeds(seed, len(prompts))
    slots = min(slots or len(prompts), len(prompts))
    with opened(slm, llm, prompts, limits, slots) as lms:
        vocab, ranked = min(lm.vocab for lm in lms), lms[0].ranked
        seeds = of_rank_zero(torch.tensor(seeds, device=lms[0].inputs.device)).tolist() if ranked else seeds
        stop = decided_by_rank_zero(stop, lms[0].inputs.device) if ranked and stop is not None else stop
        eos = end_tokens(eos_token_id, [lm.model for lm in lms], vocab)
        pad = padding_token(pad_token_id, lms, eos)
        check_padding(input_ids, attention_mask, prompts, lms, eos, pad_token_id)
        first, read_before = getattr(router, "first", SLM), [lm.n_read for lm in lms]
        rows = [Row(i, seeds[i], list(ids), len(ids), first, limits[i]) for i, ids in enumerate(prompts)]

        def ended(row: Row, call: Call) -> bool:
            return (call.token in eos or len(row.kept) == row.limit
                    or stop is not None and bool(stop(row.index, row.ids[row.n_prompt:])))

        try:
            write(rows, lms, slots, router, vocab, sampling, process, ended, on_token)
        except FloatingPointError as error:
            error.partial = collect(rows, input_ids, pad, lms, read_before)
            raise
        return collect(rows, input_ids, pad, lms, read_before)


# ---- 5. Cached models --------------------------------------------------------------------------------------
# All there is to do with a model is `CachedLM.read`: some rows read some tokens each, and each proposes its
# next one. Column t of row b holds the token at position t of row b, so rows differ in length and a mask is
# just "column <= position". A recurrent layer has no columns but one state per row, of all that the row has
# read: no pad is given to it, and no row that does not read.


BLOCK = 64  # attention reads a multiple of so many columns, see live_columns
CHUNK = 2048  # tokens in one forward call at most, but for the first of a stepwise model
# Pads that a forward call may hold: on a CPU they cost less than a second call, which reads all weights
# again, up to about so many (measured). For a GPU, which computes faster than it reads, more are assumed: not
# measured.
FREE = {"cpu": 32, "cuda": 128}
SHORT = 32  # under graphs, reads up to this are padded to a power of two


def live_columns(end: int, coarse: bool) -> int:
    """How many columns attention reads where the longest row ends at `end`: rounded up to BLOCK, or if coarse
    to an eighth of the next power of two, so that few graphs serve all lengths."""
    unit = max(BLOCK, (1 << (end - 1).bit_length()) // 8) if coarse else BLOCK
    return -(-end // unit) * unit


@dataclass
class Place:
    """What the layers of a cache need to know of the current read: its rows (a slice where they are
    neighbours: an index (n,) copies what it selects), the row (n, 1) and the column (n, S) of each token, how
    many columns are live, whether any row had read before, and, of a packed read, how many rows take part;
    each of its tokens has a row of its own, (1, tokens)."""

    rows: slice | torch.Tensor = None
    lines: torch.Tensor = None
    columns: torch.Tensor = None
    live: int = 0
    started: bool = False
    packed: int = 0
    known: dict = field(default_factory=dict)  # what `index` has made for this read

    def index(self, cached: torch.Tensor) -> torch.Tensor:
        """Where the new entries of (B, H, T, D) go in (B H T, D), in the order of (n, H, S)."""
        _, H, T, _ = cached.shape
        if (H, cached.device) not in self.known:
            heads = torch.arange(H, device=self.lines.device)[:, None]
            index = (self.lines[:, None] * H + heads) * T + self.columns[:, None]
            self.known[H, cached.device] = index.reshape(-1).to(cached.device)
        return self.known[H, cached.device]

    def rows_on(self, device: torch.device) -> slice | torch.Tensor:
        """The rows, for a layer that lies there: a spread model has several devices."""
        return self.rows if isinstance(self.rows, slice) else self.rows.to(device)


class StitchLayer(CacheLayerMixin):
    """Keys and values of one layer, (B, H, T, D) each, allocated once, written at per-row positions."""

    is_compileable = True
    is_sliding = False

    def __init__(self, place: Place, batch_size: int, columns: int):
        super().__init__()
        self.place, self.shape, self.viewed = place, (batch_size, columns), None

    @torch.inference_mode(False)  # a tensor made in inference mode cannot be written outside of it
    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        B, T = self.shape
        self.keys = key_states.new_zeros(B, key_states.shape[1], T, key_states.shape[3])
        self.values = value_states.new_zeros(B, value_states.shape[1], T, value_states.shape[3])
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Write (n, H, S, D) at the read's positions; return what is live of these rows, (n, H, live, D), or
        for a packed read of all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        for cached, new in ((self.keys, key_states), (self.values, value_states)):
            cached.view(-1, cached.shape[-1]).index_copy_(0, self.place.index(cached),
                                                          new.reshape(-1, new.shape[-1]))
        rows, live = self.place.rows_on(self.keys.device), self.place.live
        if self.place.packed:  # attention finds each token's keys (`Part`)
            return self.keys[:, :, :live], self.values[:, :, :live]
        if isinstance(rows, slice):
            if self.viewed != (rows, live):  # making two views costs as much as writing a token
                self.viewed, self.views = (
                    (rows, live), (self.keys[rows, :, :live], self.values[rows, :, :live]))
            return self.views
        # index_select: faster than indexing by the rows.
        return self.keys[:, :, :live].index_select(0, rows), self.values[:, :, :live].index_select(0, rows)

    def reset(self, rows: slice | list[int] = slice(None)) -> None:
        if self.is_initialized:
            self.keys[rows], self.values[rows] = 0, 0

    def fork(self, source: int, n: int, targets: Sequence[int]) -> None:
        """Copy the first n columns of one row to others."""
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
    `end` writes back."""

    def __init__(self, place: Place, batch_size: int):
        super().__init__()
        self.place, self.batch_size = place, batch_size
        self.states: dict[str, torch.Tensor] = {}  # some models have no recurrent state
        self.lent = {"conv": self.conv_states, "recurrent": self.recurrent_states}  # where models look

    def begin(self) -> None:
        self.has_previous_state[0] = self.place.started and bool(self.states)
        for kind, states in self.states.items():
            self.lent[kind][0] = states[self.place.rows_on(states.device)]

    def end(self) -> None:
        for kind, states in self.states.items():
            if not isinstance(self.place.rows, slice):
                states.index_copy_(0, self.place.rows_on(states.device), self.lent[kind][0])
            self.lent[kind][0] = None

    @torch.inference_mode(False)  # see StitchLayer
    def allocate(self, kind: str, like: torch.Tensor, *shape: int) -> None:
        self.states[kind] = like.new_zeros(self.batch_size, *shape)
        self.lent[kind][0] = self.states[kind][self.place.rows_on(like.device)]

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
    """What a layer that attends and has a state keeps. `lazy_initialization` is that of its columns."""

    def __init__(self, place: Place, batch_size: int, columns: int):
        RecurrentLayer.__init__(self, place, batch_size)
        StitchLayer.__init__(self, place, batch_size, columns)

    def reset(self, rows: slice | list[int] = slice(None)) -> None:
        StitchLayer.reset(self, rows)
        RecurrentLayer.reset(self, rows)

    def fork(self, source: int, n: int, targets: Sequence[int]) -> None:
        StitchLayer.fork(self, source, n, targets)
        RecurrentLayer.fork(self, source, n, targets)


class Output(NamedTuple):
    """Of a read: raw logits (n, V) float32, last hidden states (n, D), drawn tokens (n,), entropies (n,)."""

    logits: torch.Tensor
    hidden: torch.Tensor
    token: torch.Tensor
    entropy: torch.Tensor


class CachedLM:
    """One model, one preallocated cache, one cursor per row.

    `cursor[b]` tokens of row b have been read: they, and nothing else, are what row b attends to. Pass one to
    `stitch` instead of a model to keep its allocation; `close()` detaches it from the model. `graphs` replays
    short reads as CUDA graphs, in which all rows take part. ValueError or TypeError for a model that cannot
    be served, and for graphs of one that is not on a CUDA device or has recurrent layers."""

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
        device = device_of(model)
        if graphs and (device.type != "cuda" or hasattr(model, "hf_device_map")):
            raise ValueError(f"graphs={graphs!r}: expected a model on one CUDA device, this one is on "
                             f"{device}" + " and others" * hasattr(model, "hf_device_map"))
        self.graphs = Graphs(device) if graphs else None
        self.model, self.batch_size, self.max_len = model, batch_size, max_len
        columns = -(-max_len // BLOCK) * BLOCK
        self.cursor, self.n_read = [0] * batch_size, 0
        # Do ranks hold parts of this model; of it or of its partner, so that they have to decide alike?
        self.split = self.ranked = is_split(model)
        self.place = Place()
        self.layer_types = getattr(config, "layer_types", None)
        self.layers = [RecurrentLayer(self.place, batch_size) if kind in ("linear_attention", "conv")
                       else (HybridLayer if kind == "hybrid" else StitchLayer)(self.place, batch_size,
                                                                               columns)
                       for kind in self.layer_types or ["full_attention"] * config.num_hidden_layers]
        self.recurrent = [layer for layer in self.layers if isinstance(layer, RecurrentLayer)]
        self.stepwise = config.model_type in STEPWISE
        self.keywords = {cache_keyword(model): Cache(layers=self.layers)}
        if "output_router_logits" in forward_arguments(type(model)):  # a loss that wants a mask of its own
            self.keywords["output_router_logits"] = False
        self.config, self.attention = config, attention_of(config)
        self.packs = not graphs and can_pack(model)
        self.compiled = model._compiled_call_impl is not None  # by model.compile()
        self.sliding = getattr(config, "sliding_window", None)
        # Kept, for model.dtype walks the parameters: as long as a matmul.
        self.vocab, self.dtype = model.get_output_embeddings().weight.shape[0], model.dtype
        self.free = 0 if self.recurrent else FREE["cpu" if device.type == "cpu" else "cuda"]
        widest = max(CHUNK, batch_size, max_len * self.stepwise) + self.free
        self.inputs = torch.zeros(2 * widest, dtype=torch.long, device=device)
        self.columns = torch.arange(columns, device=device)
        self.slots = torch.arange(batch_size, device=device)
        self.uniform = torch.zeros(batch_size, dtype=torch.float32, device=device)
        # What the output embedding reads is the last hidden state, in every family tested. The hook holds a
        # dict, not self, so that a CachedLM which nobody closed is still freed, cache and all.
        caught = self.caught = {}
        self.hook = model.get_output_embeddings().register_forward_pre_hook(
            lambda module, args: caught.update(hidden=args[0]))  # (n, 1, D), of a packed read (1, n, D)

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
        """Forget these rows, every row unless given. ValueError for what is no row.

        The cache is cleared, too. The next read would go on from a recurrent state; and a masked column still
        meets a weight of 0, which times a NaN that a failed call left is NaN."""
        if rows is not None:
            self.check_rows("rows", rows)
        for layer in self.layers:
            layer.reset(slice(None) if rows is None else list(rows))
        for row in range(self.batch_size) if rows is None else rows:
            self.cursor[row] = 0

    def fork(self, source: int, n: int, targets: Sequence[int]) -> None:
        """Give rows `targets` the first n tokens that row `source` has read, as if they had read them.

        Copies n tokens of the cache in place and leaves the columns after them, masked, as they were: after a
        failed call reset first. Recurrent layers know their state after the last token only: with them n must
        be the source's cursor. ValueError for another n, for what is no row, and for a closed cache."""
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
        columns, here, dtype = self.columns[:live], positions[:, None, :, None], self.dtype

        def additive(kind: str):
            masked = columns > here
            if kind == "sliding_attention":
                masked = masked | (columns <= here - self.sliding)
            return masked.to(dtype) * torch.finfo(dtype).min

        if self.recurrent and "position_ids" not in forward_arguments(type(self.model)):
            return None
        if self.recurrent:
            return {"full_attention": additive("full_attention"), "linear_attention": None, "conv": None}
        if self.layer_types is None:
            return additive("sliding_attention" if self.sliding else "full_attention")
        return {kind: additive(kind) for kind in set(self.layer_types)}

    def compute(self, rows: slice | torch.Tensor, n: int, S: int, live: int, vocab: int,
                sampling: Sampling) -> Output:
        """One forward call on what lies in the static buffers; no host sync, no shape from data."""
        ids, positions = self.inputs[:2 * n * S].view(2, n, S)
        place, packed = self.place, self.place.packed
        place.rows, place.columns, place.live, place.known = rows, positions, live, {}
        place.lines = rows[None] if packed else self.slots[rows][:, None]
        for layer in self.recurrent:
            layer.begin()
        out = self.model(input_ids=ids, position_ids=positions, attention_mask=self.mask(positions, live),
                         use_cache=True, logits_to_keep=packed or 1, **self.keywords)
        for layer in self.recurrent:
            layer.end()
        logits, hidden = (x[0, -packed:] if packed else x[:, -1] for x in (out.logits, self.caught["hidden"]))
        logits = logits[:, :vocab].float()  # (n, V)
        hidden = hidden.to(logits.device)  # of a spread model the last layer may be elsewhere
        hidden = hidden.full_tensor() if hasattr(hidden, "full_tensor") else hidden
        return Output(logits, hidden, sampling.draw(logits, self.uniform[:len(logits)]), entropy(logits))

    def call_model(self, *args) -> Output:
        """`compute` with the attention that was chosen, and without cuDNN's, which may plan anew for every
        new shape (not measured here); model and torch are as they were afterwards."""
        own, cudnn = self.config._attn_implementation, torch.backends.cuda.cudnn_sdp_enabled()
        attention = GROUPED if self.place.packed else self.attention
        changed = own != attention  # to ask costs nothing, to set it as much as a small layer
        try:
            torch.backends.cuda.enable_cudnn_sdp(False)
            if changed:
                self.config._attn_implementation = attention
            with torch.compiler.set_stance("force_eager") if self.compiled else nullcontext():
                return self.compute(*args)
        finally:
            torch.backends.cuda.enable_cudnn_sdp(cudnn)
            if changed:
                self.config._attn_implementation = own

    @torch.inference_mode()  # less work per tensor than no_grad
    def read(self, rows: Sequence[int], tokens: Sequence[Sequence[int]], vocab: int | None = None,
             sampling: Sampling = GREEDY, uniform: Sequence[float] | None = None) -> Output:
        """Each row reads its tokens, one or more, and proposes the next one from the first `vocab` logits. So
        a model proposes once per position: who has nothing left to read cannot be asked again.

        Ragged reads are packed, where the model can (`can_pack`), else aligned on the right, so the last
        column is the last token of every row. A pad repeats the row's first token at that token's position:
        it computes and writes what the token itself does, so it needs no column of its own. With recurrent
        layers, to which it would be one more token, rows that differ in length read one after the other. More
        than CHUNK tokens, pads included, take several calls, of fewer rows, or of fewer tokens of one row;
        not of one row of a stepwise model, which would read what follows its first call token by token."""
        assert self.layers and len(set(rows)) == len(rows) == len(tokens) and all(tokens), (rows, tokens)
        ends = [self.cursor[row] + len(line) for row, line in zip(rows, tokens)]
        assert max(ends) <= self.max_len, f"a row would hold {max(ends)} of {self.max_len} tokens"
        lengths = list(map(len, tokens))
        size = sum(lengths) if self.packs else len(rows) * self.width(max(lengths))
        if len(rows) > 1 and size > max(CHUNK, len(rows)):
            some, half = slice(len(rows) // 2), slice(len(rows) // 2, None)
            parts = [[x.clone() for x in self.read(rows[part], tokens[part], vocab, sampling,
                                                   uniform and uniform[part])]
                     for part in (some, half)]  # clones: a graph's next replay overwrites its results
            return Output(*map(torch.cat, zip(*parts)))
        while len(rows) == 1 and len(tokens[0]) > CHUNK and not self.stepwise:
            self.read_together(rows, [tokens[0][:CHUNK]], self.vocab, GREEDY, None)
            tokens = [tokens[0][CHUNK:]]
        read = (self.read_by_length if self.recurrent else
                self.read_packed if self.packs and len(set(lengths)) > 1 else self.read_together)
        return read(rows, tokens, vocab or self.vocab, sampling, uniform)

    def read_packed(self, rows, tokens, vocab: int, sampling: Sampling,
                    uniform: Sequence[float] | None) -> Output:
        """`read` in one forward call (1, tokens) without pads, each row's last token behind those of all.

        What a model does to one token does not ask where it stands but for attention, in which rows of
        similar lengths take part together. Rows [a b c] and [d] are read as a b c d at positions 0 1 2 0; c
        and d propose."""
        lengths, ends = list(map(len, tokens)), [self.cursor[r] + len(line) for r, line in zip(rows, tokens)]
        at = [(i, k) for i, n in enumerate(lengths) for k in range(n - 1)]
        at += [(i, n - 1) for i, n in enumerate(lengths)]
        lane, device = {where: k for k, where in enumerate(at)}, self.inputs.device
        parts = []
        for group in by_length(lengths, self.width, self.free):
            group.sort(key=rows.__getitem__)
            S, slots = max(lengths[i] for i in group), [rows[i] for i in group]
            lanes = [[lane[i, max(0, k)] for k in range(lengths[i] - S, lengths[i])] for i in group]
            neighbours = slots[-1] - slots[0] == len(slots) - 1
            parts.append(Part(slice(slots[0], slots[-1] + 1) if neighbours
                              else torch.tensor(slots, device=device),
                              torch.tensor(lanes, device=device), max(ends[i] for i in group)))
        self.inputs[:2 * len(at)] = torch.tensor([tokens[i][k] for i, k in at]
                                                 + [ends[i] - lengths[i] + k for i, k in at])
        if uniform is not None:
            self.uniform[:len(rows)] = torch.tensor(uniform, dtype=torch.float32)
        self.place.packed, token = len(rows), PACKED.set(parts)
        try:
            out = self.call_model(torch.tensor([rows[i] for i, _ in at], device=device), 1, len(at),
                                  min(live_columns(max(ends), False), len(self.columns)), vocab, sampling)
        finally:
            self.place.packed = 0
            PACKED.reset(token)
        self.advance_cursors(rows, tokens)
        return out

    def advance_cursors(self, rows: Sequence[int], tokens: Sequence[Sequence[int]]) -> None:
        for row, line in zip(rows, tokens):
            self.cursor[row] += len(line)
            self.n_read += len(line)

    def read_by_length(self, rows, tokens, vocab: int, sampling: Sampling, uniform) -> Output:
        """`read_together` for a model with recurrent layers: a call for each length; but first, where the
        model's scan starts from zero, the rows that have a state read all but their last token one by one."""
        if self.stepwise:
            late = {row: line for row, line in zip(rows, tokens) if self.cursor[row]}
            for left in range(max(map(len, late.values()), default=1), 1, -1):
                now = {row: [line[-left]] for row, line in late.items() if len(line) >= left}
                self.read_together(list(now), list(now.values()), vocab, GREEDY, None)
            tokens = [line[-1:] if row in late else line for row, line in zip(rows, tokens)]
        parts, order = [], []
        for length in sorted(set(map(len, tokens))):
            at = [i for i, line in enumerate(tokens) if len(line) == length]
            parts.append(self.read_together([rows[i] for i in at], [tokens[i] for i in at], vocab, sampling,
                                    None if uniform is None else [uniform[i] for i in at]))
            order += at
        back = torch.tensor(order, device=self.inputs.device).argsort()
        return parts[0] if len(parts) == 1 else Output(*(torch.cat(x)[back] for x in zip(*parts)))

    def read_together(self, rows, tokens, vocab: int, sampling: Sampling,
                      uniform: Sequence[float] | None) -> Output:
        """`read` in one forward call: who takes part, its tokens and positions with pads, and how many
        columns are live; then the rows of the result that were asked for, in their order."""
        S, unread = self.width(max(map(len, tokens))), dict(zip(rows, tokens))
        graphed = self.graphs is not None and (S == 1 or S <= SHORT and self.batch_size * S <= self.free)
        span = range(self.batch_size) if graphed else range(min(rows), max(rows) + 1)
        idle = len(span) - len(rows)
        # Idle rows in between take part where they are few and have no recurrent state: that costs less than
        # copying the caches of those that read. An idle row writes the column at its cursor, which its next
        # read overwrites before anybody sees it; a full row its last column: it reads no more.
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
            self.uniform[:n] = torch.tensor([drawn.get(row, 0.0) for row in taking_part],
                                            dtype=torch.float32)
        where = (slice(span.start, span.stop) if neighbours
                 else torch.tensor(taking_part, device=self.inputs.device))
        live = min(live_columns(max(positions) + 1, graphed), len(self.columns))
        key = n, S, live, vocab, sampling
        picked = (None if taking_part == list(rows)
                  else torch.tensor([row - span.start for row in rows], device=self.inputs.device))
        out = self.graphs(self.call_model, where, *key) if graphed else self.call_model(where, *key)
        self.advance_cursors(rows, tokens)
        return out if picked is None else Output(*(x[picked] for x in out))


# ---- 6. Which rows a call serves ---------------------------------------------------------------------------
# None of this changes a result. Calls serve many rows, of similar lengths; a slot that a finished row leaves
# goes to the next prompt; what two rows begin with alike is read once and copied.


def by_length(lengths: Sequence[int], width: Callable[[int], int], free: int) -> list[list[int]]:
    """Indices of reads in groups of similar lengths, or with `free` pads at most, shortest first."""
    groups: list[list[int]] = []
    tokens = 0  # in the last group, pads excluded
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        n = lengths[i]
        total = width(n) * (len(groups[-1]) + 1) if groups else math.inf
        if total <= CHUNK and (total - tokens - n <= free or n <= 1.25 * lengths[groups[-1][0]]):
            groups[-1].append(i)
            tokens += n
        else:
            groups.append([i])
            tokens = n
    return groups


def similar_lengths(rows: list[Row], lm: CachedLM) -> list[list[Row]]:
    """Groups of rows that share a forward call: all that can be packed, else those of similar lengths.

    So one row's long read pads nobody else's, and a row that catches up widens no batch of single tokens."""
    rows = sorted(rows, key=lambda row: row.slot)
    if lm.packs:
        return [rows] if rows else []
    groups = by_length([len(row.ids) - lm.cursor[row.slot] for row in rows], lm.width, lm.free)
    return [[rows[i] for i in sorted(group)] for group in groups]


PATIENCE = 8  # turns that one model takes in a row at most, while a row waits for the other


def next_model(rows: list[Row], last: int, in_a_row: int) -> int:
    """Which model runs next: the one that more rows wait for, so that a call serves many; after PATIENCE
    turns in a row the other, if any row waits for it. No result depends on this choice."""
    other = 1 - last
    waiting = sum(row.active == other for row in rows)
    return other if waiting and (2 * waiting > len(rows) or in_a_row >= PATIENCE) else last


SHARED = 16  # tokens that sequences begin with alike, from which on copying them pays


def common(a: list[int], b: list[int], least: int = 0) -> int:
    """How many tokens two sequences begin with alike, 0 for fewer than `least`; by halves, for to compare two
    slices is fast."""
    low, high = least, min(len(a), len(b))
    if low > high or a[:low] != b[:low]:
        return 0
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


def take_over(row: Row, lm: CachedLM, held: list[Row | None], known: int = 0) -> bool:
    """Copy into a row's slot the longest beginning that its sequence has in common with what a slot of the
    cache holds, where that is SHARED tokens or more beyond the `known` ones.

    held: by slot, the row that lies there or lay there last: its tokens stay until they are overwritten.
    [1 2 3 4] takes the first three of [1 2 3 7 8], but never its own last, which it reads to propose."""
    if lm.stepwise:  # would read token by token what follows a copy
        return False
    head = row.ids[:-1]
    found = [(min(common(head, other.ids, known + SHARED), lm.cursor[slot]), slot)
             for slot, other in enumerate(held) if other not in (None, row) and lm.cursor[slot]]
    n, source = max(((n, slot) for n, slot in found if not lm.recurrent or n == lm.cursor[slot]),
                    default=(0, 0))
    if n < known + SHARED:
        return False
    if source == row.slot:
        lm.cursor[source] = n
    else:
        lm.fork(source, n, [row.slot])
    return True


def share(rows: list[Row], lm: CachedLM, held: list[Row | None]) -> None:
    """What rows that a model has not read begin with alike is read once: the longest reads, others copy.

    Of [1 2 3 4 5], [1 2 3 6] and [1 7] the first reads 1 2 3; the second copies 1 2 3, the third 1."""
    rows = sorted(rows, key=lambda row: -len(row.ids)) if not lm.stepwise else []
    for row in rows:
        take_over(row, lm, held, lm.cursor[row.slot])
    heads = [row.ids[:-1] for row in rows]  # the last token is read by each: it makes the proposal
    for i, row in enumerate(rows):
        cuts: dict[int, list[int]] = {}  # by length, the slots that copy so much
        for head, other in zip(heads[i + 1:], rows[i + 1:]):
            if n := common(heads[i], head, lm.cursor[other.slot] + SHARED):
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
        row.uniform = torch.rand(row.limit, 2, generator=generator, dtype=torch.float32,
                                 device="cpu").tolist()  # whatever torch's defaults are
    held[slot] = row


TOGETHER = 8  # prompts come in when one in so many slots is free: to read several at once costs less


def admitted(waiting: deque[Row], held: list[Row | None], lms: Sequence[CachedLM],
             sampling: Sampling) -> list[Row]:
    """The rows that are being written, after prompts that wait were given the slots that are free."""
    free = [slot for slot, row in enumerate(held) if row is None or row.done]
    if len(free) == len(held) or len(free) >= min(len(waiting), len(held) // TOGETHER):
        for slot in free[:len(waiting)]:
            admit(waiting.popleft(), slot, held, lms, sampling)
    return [row for row in held if row is not None and not row.done]


# ---- 7. What goes in and what comes out --------------------------------------------------------------------
# Models are opened, draws processed, rows collected. What bad input is told stands in rstitch_hf/inputs.py.


def check_entropies(model: int, rows: list[Row], entropies: Sequence[float]) -> None:
    """FloatingPointError for NaN, which one NaN among the logits is enough to make."""
    for row, H in zip(rows, entropies):
        if math.isnan(H):
            raise FloatingPointError(f"the {NAMES[model]}'s logits have a NaN in row {row.index} at position "
                                     f"{len(row.ids) - row.n_prompt} of the answer")


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


@contextmanager
def opened(slm, llm, prompts: list[list[int]], limits: list[int], slots: int) -> Iterator[list[CachedLM]]:
    """Both models with empty caches for `slots` rows; those made here are closed afterwards. ValueError or
    TypeError for a model that cannot be served, and for a CachedLM that is too small."""
    longest = max(len(ids) + limit for ids, limit in zip(prompts, limits))
    if slm is llm and isinstance(slm, CachedLM):
        raise ValueError("slm and llm are the same CachedLM: expected two, each with its own cursors")
    lms, own = [], []
    try:
        for name, lm in (("slm", slm), ("llm", llm)):
            check_servable(lm.model if isinstance(lm, CachedLM) else lm, longest, name)
            if not isinstance(lm, CachedLM):
                lm = CachedLM(lm, slots, longest)
                own.append(lm)
            check_fits(name, lm, prompts, slots, longest)
            lms.append(lm)
        for lm in lms:
            lm.ranked = any(other.split for other in lms)
            lm.reset()
        yield lms
    finally:
        for lm in own:
            lm.close()


def collect(rows: list[Row], input_ids, pad: int, lms: Sequence[CachedLM],
            read_before: Sequence[int]) -> Stitched:
    """Pad the rows into one `Stitched`; a tensor of prompts stays as it was given, its padding included."""
    if not isinstance(input_ids, torch.Tensor):
        width = max(row.n_prompt for row in rows)
        input_ids = torch.tensor([[pad] * (width - row.n_prompt) + row.ids[:row.n_prompt] for row in rows])

    def padded(name: str, dtype: torch.dtype, padding: float) -> torch.Tensor:
        """(B, N) one field of the kept calls"""
        lines = [torch.tensor([getattr(call, name) for call in row.kept], dtype=dtype) for row in rows]
        pad_sequence = torch.nn.utils.rnn.pad_sequence
        return pad_sequence(lines, batch_first=True, padding_value=padding).to(input_ids.device)

    return Stitched(torch.cat([input_ids.long(), padded("token", torch.long, pad)], 1),
                    padded("model", torch.int8, -1), padded("entropy", torch.float32, math.nan),
                    [row.calls for row in rows], [row.kept for row in rows], [row.seed for row in rows],
                    tuple(lm.n_read - before for lm, before in zip(lms, read_before)))


def count_switches(calls: Sequence[Call]) -> int:
    """How often the active model of a row changed, in either direction."""
    return sum(a.model != b.model for a, b in zip(calls, calls[1:]))


# ---- 8. Latency model --------------------------------------------------------------------------------------
# What a trajectory takes at batch 1, from what its calls read (R-Stitch+); fitted to the engine's own steps.


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

    `prefill` is (a, b, c, d), `decode` is (c', d'): times, none below 0 (ValueError)."""

    TERMS = {"prefill": lambda n_inf, n_kv: (n_inf * n_kv, n_inf * n_inf, n_inf, 1),
             "decode": lambda n_inf, n_kv: (n_kv, 1)}

    def __init__(self, prefill: Sequence[float], decode: Sequence[float]):
        self.coefficients = {"prefill": tuple(map(float, prefill)), "decode": tuple(map(float, decode))}
        for (name, times), count in zip(self.coefficients.items(), (4, 2)):
            if len(times) != count or not all(0 <= x < math.inf for x in times):
                raise ValueError(f"{name}={times}: expected {count} finite times in milliseconds, 0 or more")

    def prefill(self, n_inf: int, n_kv: int) -> float:
        return sum(x * term for x, term in zip(self.coefficients["prefill"],
                                               self.TERMS["prefill"](n_inf, n_kv)))

    def decode(self, n_kv: int) -> float:
        return sum(x * term for x, term in zip(self.coefficients["decode"], self.TERMS["decode"](1, n_kv)))

    def call(self, n_inf: int, n_kv: int) -> float:
        """Either, by the number of tokens read."""
        return self.decode(n_kv) if n_inf == 1 else self.prefill(n_inf, n_kv)

    @classmethod
    def fit(cls, samples: Sequence[Sample]) -> "LatencyModel":
        """Non-negative least squares on the relative error: a short call counts as much as a long one.

        Samples of one (n_inf, n_kv) count as their median. The paper says least squares: without the bound a
        noisy profile gives negative times. ValueError for times of 0 or less, and for samples that do not
        determine the coefficients."""
        for n_inf, n_kv, ms in samples:
            if not 0 < ms < math.inf:
                raise ValueError(f"samples hold a time of {ms!r} ms at n_inf={n_inf}, n_kv={n_kv}: expected "
                                 "more than 0")
        fitted = {}
        for kind, terms in cls.TERMS.items():
            points = [s for s in medians(samples) if (s.n_inf == 1) == (kind == "decode")]
            X = np.array(
                [np.array(terms(s.n_inf, s.n_kv)) / s.ms for s in points]).reshape(-1, len(terms(1, 1)))
            scale = X.max(0, initial=0)  # the columns differ by orders of magnitude
            if (scale == 0).any() or np.linalg.matrix_rank(X / scale) < X.shape[1]:
                raise ValueError(
                f"samples have {len(points)} different {kind} points: expected points that determine "
                f"{'a, b, c and d: four or more' if kind == 'prefill' else 'both coefficients: two or more'}"
                ", with several n_kv")
            fitted[kind] = scipy.optimize.nnls(X / scale, np.ones(len(X)))[0] / scale
        return cls(**fitted)


def measure_latency(model, points: Sequence[tuple[int, int]], repeats: int = 5) -> list[Sample]:
    """Times of the engine's own step at batch 1 - read, entropy, draw, router, host read - at each point,
    `repeats` times.

    model: as for `stitch`. Each time follows an untimed step of the same kind, as most steps do. What lies in
    the cache does not matter. The points are visited in turn, so that other load is spread over them.
    ValueError for no points, no counts, and a CachedLM that is too small or steps several rows."""
    check_count("repeats", repeats)
    if not points:
        raise ValueError(f"points={points!r}: expected at least one (n_inf, n_kv)")
    for n_inf, n_kv in points:
        check_count("n_inf", n_inf)
        check_count("n_kv", n_kv, least=0)
    longest = max(map(sum, points))
    if isinstance(model, CachedLM) and model.max_len < longest:
        raise ValueError(f"points reach {longest} tokens: the CachedLM given as model holds rows of "
                         f"{model.max_len}")
    if isinstance(model, CachedLM) and model.graphs and model.batch_size > 1:
        raise ValueError(f"the CachedLM given as model has graphs of {model.batch_size} rows, which all take "
                         "part in a step: expected one row")
    with nullcontext(model) if isinstance(model, CachedLM) else closing(CachedLM(model, 1, longest)) as lm:
        check_context("points bring a row", "model", lm.model, longest)
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
    """Milliseconds of a trajectory: all calls of both models, discarded proposals included. Of a row of a
    batch it is what the row would have taken alone."""
    return sum((slm, llm)[call.model].call(call.n_inf, call.n_kv) for call in calls)


# ---- 9. R2R ------------------------------------------------------------------------------------------------
# A network that tells which tokens of the SLM lead the reasoning astray, trained on tokens labelled by
# running both models on. The LLM rewrites those.


def fingerprint(model) -> str:
    """Tells one model from another, in float32 and in bfloat16 alike. In float16, which loses small weights,
    it may come out differently."""
    head = weight_of(model.get_output_embeddings())[:1000].detach().dequantize().to("cpu", torch.bfloat16)
    return hashlib.sha256(head.view(torch.int16).numpy().tobytes()).hexdigest()[:16]


def made_of(folder: Path, slm=None, llm=None) -> dict:
    """What made.json tells of the router in a folder; ValueError where there is none, or for other models."""
    path = Path(folder) / "made.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no trained router: expected a folder with made.json, as "
                         "analysis.train_r2r or analysis.train_policy writes it")
    made = json.loads(path.read_text())
    for name, model in (("slm", slm), ("llm", llm)):
        if model is not None and made[name] != fingerprint(model):
            raise ValueError(f"the router in {folder} was made for another {name.upper()}: expected weights "
                             f"with fingerprint {made[name]}, got {fingerprint(model)}"
                             + ", which in float16 may be of the same weights"
                             * (model.dtype == torch.float16))
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
    """x + Dropout(Linear(Dropout(GELU(Linear(LayerNorm(x)))))), 4 width inside: (n, width) -> (n, width)."""

    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.inner = torch.nn.Sequential(torch.nn.LayerNorm(width), torch.nn.Linear(width, 4 * width),
                                         torch.nn.GELU(), torch.nn.Dropout(dropout),
                                         torch.nn.Linear(4 * width, width), torch.nn.Dropout(dropout))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x)


class R2RNet(torch.nn.Module):
    """R2R's router (arXiv 2505.21600): does this SLM token lead the reasoning astray? One logit each.

    It sees the SLM's last hidden state, its top_k largest logits (sorted, without their ids) and the
    embedding of the token drawn. `embedding` is the SLM's own input embedding: frozen, and no parameter of
    the router. ValueError for sizes that do not fit the SLM, when it is made or when it is asked."""

    def __init__(self, hidden_size: int, embedding: torch.nn.Embedding, top_k: int = 100, width: int = 1024,
                 blocks: int = 6, dropout: float = 0.1):
        super().__init__()
        for name, size in (("hidden_size", hidden_size), ("top_k", top_k), ("width", width)):
            check_count(name, size)
        check_count("blocks", blocks, least=0)
        if embedding.weight.shape[1] != hidden_size:
            raise ValueError(f"embedding has {embedding.weight.shape[1]} features: expected "
                             f"hidden_size={hidden_size}")
        if embedding.weight.shape[0] < top_k:
            raise ValueError(f"top_k={top_k}: expected at most the {embedding.weight.shape[0]} tokens of the "
                             "vocabulary")
        self.hidden_size, self.top_k = hidden_size, top_k
        self.embedding = (embedding,)  # in a tuple, or its weights would be parameters of the router
        self.logit_features = torch.nn.Linear(top_k, hidden_size)
        self.body = torch.nn.Sequential(torch.nn.Linear(3 * hidden_size, width),
                                        torch.nn.Linear(width, width),
                                        *(Residual(width, dropout) for _ in range(blocks)),
                                        torch.nn.LayerNorm(width))
        self.head = torch.nn.Linear(width, 1)

    @classmethod
    def of(cls, slm, sizes: dict) -> "R2RNet":
        """An untrained net for an SLM, on its device: top_k, width, blocks and dropout."""
        net = cls(hidden_size_of(slm), slm.get_input_embeddings(),
                  *(sizes[name] for name in ("top_k", "width", "blocks", "dropout")))
        return net.to(device_of(slm))

    def sees(self, step: Step, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What forward takes, of chosen rows; of the logits only what it reads of them."""
        logits = step.logits[rows]
        return step.hidden[rows], logits.topk(min(self.top_k, logits.shape[-1])).values, step.token[rows]

    def embed(self, token: torch.Tensor) -> torch.Tensor:
        """(n,) -> (n, D)"""
        return self.embedding[0](token).detach()

    def forward(self, hidden: torch.Tensor, logits: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        """(n, D), (n, V), (n,) -> (n,)"""
        if hidden.shape[-1] != self.hidden_size:
            raise ValueError(f"hidden has {hidden.shape[-1]} features: this router was made for an SLM of "
                             f"hidden size {self.hidden_size}")
        if logits.shape[-1] < self.top_k:
            raise ValueError(f"logits have {logits.shape[-1]} columns: this router reads the {self.top_k} "
                             "largest")
        dtype = self.head.weight.dtype
        top = logits.topk(self.top_k).values
        top = torch.maximum(top, top[:, :1] - 100)  # e^-100 is nothing, and -inf would be NaN behind a Linear
        x = torch.cat([hidden.to(dtype), self.embed(token).to(dtype),
                       self.logit_features(top.to(dtype))], 1)  # (n, 3D)
        return self.head(self.body(x))[:, 0]


class R2RRouter:
    """R2R: the SLM's token is discarded where the net's score, sigmoid of its logit, reaches the threshold;
    the LLM then writes exactly one token in its place. Threshold 0 is the LLM alone, above 1 the SLM alone.

    Under sampling the net sees the token that was drawn (the paper does not say). ValueError for a threshold
    below 0 or NaN, and for a net in training mode."""

    def __init__(self, net: R2RNet, threshold: float):
        if not isinstance(threshold, Real) or not threshold >= 0:
            raise ValueError(f"threshold={threshold!r}: expected a number, 0 or more")
        if net.training:
            raise ValueError("net is in training mode: call .eval() first")
        self.net, self.threshold = net, threshold

    @classmethod
    def load(cls, folder: Path | str, slm, llm, threshold: float | None = None) -> "R2RRouter":
        """The router that analysis.train_r2r wrote into a folder for this pair, at its calibrated threshold
        unless another is given, which warns. ValueError where there is none, or for another pair."""
        made, weights = made_of(folder, slm, llm), weights_of(folder, "router.safetensors")
        config, own = made["config"], made["threshold"]
        if threshold not in (None, own):
            warnings.warn(f"threshold {threshold:g} in place of the router's own {own:g} "
                          f"({made['calibrated']})", stacklevel=2)
        net = R2RNet.of(slm, config)
        net.load_state_dict(weights)
        return cls(net.eval().requires_grad_(False), own if threshold is None else threshold)

    def leave_slm(self, step: Step) -> torch.Tensor:
        return self.net(step.hidden, step.logits, step.token).float().sigmoid() >= self.threshold

    def leave_llm(self, step: Step) -> torch.Tensor:
        return torch.ones_like(step.token, dtype=torch.bool)


def as_array(x) -> np.ndarray:
    """float64, of a sequence, an array or a tensor on any device."""
    return np.asarray(x.detach().cpu().double() if isinstance(x, torch.Tensor) else x, float)


def calibrate_threshold(scores: Sequence[float], labels: Sequence[int] | None = None, *,
                        min_recall: float | None = None, target_usage: float | None = None) -> float:
    """The highest threshold on the scores that still finds the share min_recall of the divergent tokens
    (R2R's rule), or at which the LLM writes the share target_usage of all tokens. Tokens of equal score are
    treated alike, so either may be exceeded. Scores, and labels, which only min_recall needs: sequences,
    arrays or tensors. ValueError unless exactly one share is given, in (0, 1], and for labels not used."""
    if (min_recall is None) == (target_usage is None):
        raise ValueError(f"min_recall={min_recall!r}, target_usage={target_usage!r}: expected exactly one of "
                         "them")
    if target_usage is not None and labels is not None:
        raise ValueError(f"target_usage={target_usage!r} with labels: expected none, since it counts all "
                         "tokens alike")
    name, share = ("min_recall", min_recall) if target_usage is None else ("target_usage", target_usage)
    scores = as_array(scores)
    if not (isinstance(share, Real) and 0 < share <= 1):
        raise ValueError(f"{name}={share!r}: expected a share in (0, 1]")
    if scores.ndim != 1 or not len(scores) or not np.isfinite(scores).all():
        raise ValueError(f"scores has shape {scores.shape}: expected one score per token, at least one, and "
                         "all finite")
    if min_recall is not None:
        labels = as_array([] if labels is None else labels)
        if labels.shape != scores.shape or not set(np.unique(labels)) <= {0, 1} or not labels.any():
            raise ValueError("labels: expected one per score, 0 or 1, with at least one divergent (1)")
        scores = scores[labels.astype(bool)]
    # How many must reach it; 0.07 x 100 is 7.000000000000001.
    count = max(1, math.ceil(share * len(scores) - 1e-9))
    return float(np.sort(scores)[-count])


# ---- 10. R-Stitch+ -----------------------------------------------------------------------------------------
# A policy that learns at which uncertain tokens the LLM pays: rollouts, a reward that counts latency only
# where the answer is right, and the loss of DAPO.


class Reward(NamedTuple):
    total: float  # accuracy + efficiency
    accuracy: float  # 1 or 0
    efficiency: float  # -lam L for a right answer, 0 for a wrong one


def reward(correct: bool, latency_ms: float, lam: float = 5e-6) -> Reward:
    """R = r_acc - lam r_acc L of R-Stitch+, L in ms: latency counts behind a gate, that the answer is right.
    A wrong one has exactly 0, so speed never buys accuracy.

    Warns (once per place) where lam L >= 1: there a right answer scores no better than a wrong one, and the
    gate does not hold. ValueError for a latency or a lam that is negative or not finite."""
    for name, value in (("latency_ms", latency_ms), ("lam", lam)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}={value!r}: expected a finite number, 0 or more")
    if not correct:
        return Reward(0.0, 0.0, 0.0)
    if lam * latency_ms >= 1:
        warnings.warn("lam x latency is 1 or more: a right answer this slow has a reward of 0 or less",
                      stacklevel=2)
    return Reward(1 - lam * latency_ms, 1.0, -lam * latency_ms)


def group_advantages(rewards: torch.Tensor, eps: float = 1e-6, scale: str = "std") -> torch.Tensor:
    """(R - mean) / (std + eps) within each group of G rollouts of one prompt (DAPO Eq. 9): (P, G) -> (P, G).

    scale="none" leaves out the division. With it lam cancels in a group that is right throughout, where the
    spread is all latency; without it lam keeps its weight. A group of equal rewards has advantages of
    exactly 0. Integer rewards count as float32. ValueError for groups of one, rewards that are not finite,
    and another scale or eps."""
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards has shape {tuple(rewards.shape)}: expected (prompts, rollouts), two "
                         "rollouts or more")
    if not rewards.isfinite().all():
        raise ValueError(f"rewards holds {rewards[~rewards.isfinite()][0].item()}: expected finite numbers")
    if scale not in ("std", "none") or not eps >= 0:
        raise ValueError(f"scale={scale!r}, eps={eps!r}: expected 'std' or 'none', and 0 or more")
    rewards = rewards if rewards.is_floating_point() else rewards.float()
    centred = rewards - rewards.mean(1, keepdim=True)
    # Their mean may be off by a rounding.
    equal = rewards.amin(1, keepdim=True) == rewards.amax(1, keepdim=True)
    if scale == "std":
        centred = centred / (rewards.std(1, keepdim=True) + eps)
    return centred.masked_fill(equal, 0.0)


def dapo_loss(logp: torch.Tensor, logp_old: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor,
              eps_low: float = 0.2, eps_high: float = 0.28) -> torch.Tensor:
    """DAPO's objective, negated, over decisions of one shape: scalar.

    -mean over the decisions of min(r A, clip(r, 1 - eps_low, 1 + eps_high) A), r = exp(logp - logp_old), no
    KL term. Token-level: a long trajectory counts by its decisions. Clip-higher: eps_high > eps_low leaves
    more room to raise an unlikely action. `advantages` is each decision's, mask False where there is none.
    ValueError for shapes that differ, a mask without a decision, and clips outside their ranges."""
    shapes = [tuple(x.shape) for x in (logp, logp_old, advantages, mask)]
    if len(set(shapes)) > 1 or mask.dtype != torch.bool or not mask.any():
        raise ValueError(f"logp, logp_old, advantages and mask have shapes {shapes}, mask of {mask.dtype}: "
                         "expected one shape, and a bool mask with at least one decision")
    if not (0 <= eps_low <= 1 and eps_high >= 0):
        raise ValueError(f"eps_low={eps_low!r}, eps_high={eps_high!r}: expected 0 <= eps_low <= 1 and "
                         "eps_high >= 0")
    ratio = (logp - logp_old)[mask].exp()
    A = advantages[mask]
    return -torch.minimum(ratio * A, ratio.clamp(1 - eps_low, 1 + eps_high) * A).mean()


class Policy(torch.nn.Module):
    """The network of the R-Stitch+ router: call the LLM at this uncertain SLM token? One logit per token.

    State: the SLM's last hidden state and the context length (the paper publishes neither architecture nor
    size). Ours is a small MLP on [normalised hidden state, log of the entropy in nats, log of context length
    / 1000]. The entropy follows from the hidden state, but so small a net would have to find the output
    embedding first. `start`: an untrained policy calls the LLM with this probability. use_entropy and
    use_context: False leaves that input out. ValueError for sizes that do not fit the SLM, when it is made or
    when it is asked, and for a start outside (0, 1)."""

    def __init__(self, hidden_size: int, width: int = 64, start: float = 0.5, use_entropy: bool = True,
                 use_context: bool = True):
        super().__init__()
        for name, size in (("hidden_size", hidden_size), ("width", width)):
            check_count(name, size)
        if not 0 < start < 1:
            raise ValueError(f"start={start!r}: expected a probability inside (0, 1)")
        self.hidden_size, self.use_entropy, self.use_context = hidden_size, use_entropy, use_context
        self.mlp = torch.nn.Sequential(torch.nn.Linear(hidden_size + use_entropy + use_context, width),
                                       torch.nn.GELU(), torch.nn.Linear(width, 1))
        torch.nn.init.zeros_(self.mlp[-1].weight)
        torch.nn.init.constant_(self.mlp[-1].bias, math.log(start / (1 - start)))

    def sees(self, step: Step, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What forward takes, of chosen rows."""
        return step.hidden[rows], step.entropy[rows], step.context[rows]

    def forward(self, hidden: torch.Tensor, entropy: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """(n, D), (n,) nats, (n,) tokens -> (n,)"""
        if hidden.shape[-1] != self.hidden_size:
            raise ValueError(f"hidden has {hidden.shape[-1]} features: this policy was made for a model of "
                             f"hidden size {self.hidden_size}")
        x = [torch.nn.functional.layer_norm(hidden.float(), (self.hidden_size,))]
        x += [entropy.clamp(min=1e-6).log()[:, None]] if self.use_entropy else []
        x += [(context.float() / 1000).log()[:, None]] if self.use_context else []
        return self.mlp(torch.cat(x, 1))[:, 0]


def policy_nets(slm, llm, config: dict, r2r: dict | None = None, start: float = 0.5) -> torch.nn.ModuleDict:
    """The untrained nets of a PolicyRouter: {"call": on the SLM} and, where config["hand_back"], {"back": on
    the LLM}. Policies, but for an R2RNet of the sizes r2r at "call" where they are given."""
    def small(model) -> Policy:
        return Policy(hidden_size_of(model), config["width"], start, config["use_entropy"],
                      config["use_context"]).to(device_of(model))

    return torch.nn.ModuleDict({"call": R2RNet.of(slm, r2r) if r2r else small(slm)}
                               | ({"back": small(llm)} if config["hand_back"] else {}))


def log_probability(logit: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
    """log p of actions (n,) bool, True to leave the model that was asked about, under logits (n,)."""
    return torch.nn.functional.logsigmoid(torch.where(action, logit, -logit))


class Decisions(NamedTuple):
    """What a sampled policy did at one step, about the k rows where it was asked."""

    rows: list[int]
    position: list[int]  # of the token, in the answer
    state: tuple[torch.Tensor, ...]  # what the net was shown, (k, ...) each
    action: torch.Tensor  # (k,) bool: left, for the LLM, or of a `back` policy for the SLM
    logp: torch.Tensor  # (k,) of that action


class PolicyRouter:
    """R-Stitch+: where the SLM's entropy exceeds tau, a policy decides whether to call the LLM instead.

    Elsewhere the SLM goes on, and the LLM hands back by the entropy rule, as in R-Stitch. tau and tau_back
    (tau unless given) are normalised. `policy` is a net of log-odds: `sees(step, rows)` chooses what its
    forward takes. A Policy is one; so is an R2RNet, which labels have taught and rewards may teach on.
    Without `seed` the LLM is called where the policy's probability exceeds `threshold`, in [0, 1]; at 0.5, as
    in the paper, that is the likelier action. With a seed, actions are sampled and what training needs is
    appended to `decisions`. `back`, not in the paper, is a second policy: asked at every token of the LLM, on
    the LLM's hidden state, whether to hand back, above `threshold_back`; its decisions lie in
    `back.decisions` of the router. ValueError for thresholds as in EntropyRouter, for one other than 0.5 with
    a seed, where draws are from the policy as it is, for a threshold_back without `back` or a tau_back beside
    it, and for a net whose dropout is on."""

    def __init__(self, policy: torch.nn.Module, tau: float, tau_back: float | None = None,
                 seed: int | None = None, threshold: float = 0.5, back: torch.nn.Module | None = None,
                 threshold_back: float = 0.5):
        check_policies(policy, threshold, back, threshold_back, tau_back, seed)
        self.policy, self.seed = policy, seed
        self.rule = EntropyRouter(tau, tau_back=tau_back)
        with np.errstate(divide="ignore"):
            # the threshold as a logit, infinite at 0 and 1
            self.limit = float(np.log(threshold) - np.log1p(-threshold))
        # Both policies are asked about the same positions, so the second draws with a seed of its own.
        self.back = (None if back is None
                     else PolicyRouter(back, tau, None, None if seed is None else -1 - seed, threshold_back))
        self.decisions: list[Decisions] = []

    @classmethod
    def load(cls, folder: Path | str, slm, llm, threshold: float | None = None,
             seed: int | None = None) -> "PolicyRouter":
        """The router that analysis.train_policy wrote into a folder for this pair of models, at the
        thresholds that it was calibrated to, if it was; `threshold` replaces that of the calls, sampling
        both. ValueError where there is none, or it was made for another pair."""
        made, weights = made_of(folder, slm, llm), weights_of(folder, "policy.safetensors")
        nets = policy_nets(slm, llm, made["config"], made.get("r2r"))
        nets.load_state_dict(weights)
        nets.eval().requires_grad_(False)
        own = made.get("thresholds", {}) if seed is None else {}
        tau, tau_back, back = made["config"]["tau"], made["config"]["tau_back"], None
        if made["config"]["hand_back"]:
            tau_back, back = None, nets["back"]
        threshold = own.get("call", 0.5) if threshold is None else threshold
        return cls(nets["call"], tau, tau_back, seed, threshold, back, own.get("back", 0.5))

    def leave_llm(self, step: Step) -> torch.Tensor:
        return (self.rule.leave_llm(step) if self.back is None
                else self.back.decide(step, torch.arange(len(step.rows), device=step.token.device)))

    def leave_slm(self, step: Step) -> torch.Tensor:
        leave = self.rule.leave_slm(step)
        asked = leave.nonzero()[:, 0]
        if len(asked):
            leave[asked] = self.decide(step, asked)
        return leave

    def decide(self, step: Step, asked: torch.Tensor) -> torch.Tensor:
        """(k,) bool: leave the model that is asked about?"""
        state = self.policy.sees(step, asked)
        logit = self.policy(*state).float() - self.limit
        if self.seed is None:
            return logit > 0
        rows = asked.tolist()
        position = step.position[asked].tolist()
        uniform = uniforms(self.seed, [step.seeds[i] for i in rows], position, SLM)
        action = torch.tensor(uniform, dtype=torch.float32, device=logit.device) < logit.sigmoid()
        self.decisions.append(Decisions([step.rows[i] for i in rows], position, state, action,
                                        log_probability(logit, action)))
        return action


def __getattr__(name: str):
    """`custom_generate`, from the file that transformers loads by its folder; imported when asked for."""
    if name == "custom_generate":
        from custom_generate.generate import custom_generate
        return custom_generate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if __name__ == "__main__":
    from rstitch_hf.command import main
    main()

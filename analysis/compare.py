"""Every router at the same LLM share, running: R2R, R-Stitch, other signals, R-Stitch+, random, live labels.

    python -m analysis.compare               pocket pair; skips what is there, prints all
    P="--slm SMALL --llm LARGE --problems file.jsonl --latency pair.json"
    python -m analysis.compare $P --router router --policies policies --out results

Rows: compare.jsonl.
Feeds: the results page's tables at equal LLM share, by the clock and of tau from the SLM alone; routers.png.

A family of routers has one knob. It is turned over a grid on the calibration split, running; the knob for a
wanted share is read off by interpolation (where several would do, as with R-Stitch, the one that was most
accurate there). Test problems are the same for all. A share is met within some tenths of a point only, and a
point can be worth twenty in accuracy: so routers are compared at exactly the wanted share, on the line
between their neighbouring test runs (the SLM alone is everybody's run at share 0), drawn anew in every
bootstrap sample. Labels sit on the LLM's trajectories, running does not: R2R's share on them, offline, is
printed beside the one it reached.

Live labels are made while running: where the SLM's token differs from what the LLM would write, both go on to
the end of the sentence and the judge compares them. A reference point and no bound: it looks one sentence
ahead, and costs far more than the LLM alone.

Speculative decoding is `generate(assistant_model=...)` of transformers. Its latency is that of its forward
passes by the same fitted model, so that it is charged for what the models compute and not for what generate()
does in between.

tau from the SLM alone: the SLM's own answers on the calibration split say which share of tokens, and how many
milliseconds, R-Stitch would cost at each tau if answers stayed as they are and each visit of the LLM took one
token. The tau for a wanted share or latency is read off there, from the shorter half of those answers, and
run.
"""
import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
from scipy.special import expit
from transformers import GenerationConfig

import rstitch
from analysis import label
from analysis.instruments.options import add_options, given
from analysis.instruments.problems import question
from analysis.instruments.provenance import provenance
from analysis.instruments.runs import Rows
from analysis.instruments.stats import at_own_share, at_share, difference, net_time, signed, with_interval
from analysis.instruments.task import (
    N_CALIBRATION,
    SEED,
    Pair,
    Task,
    common_vocab,
    control_of,
    cut_off,
    decision_ms,
    decoder,
    digest_of,
    encode_problems,
    ends_of,
    graded,
    measure,
    net_file,
    policy_router,
    r2r_router,
    same_width,
    solve,
    summarise,
    wall_clock,
)
from rstitch import fingerprint
from rstitch_hf.ranks import start
from rstitch_hf.serving import cache_keyword

SHARES = (0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.1, 0.15, 0.2, 0.3)
# of the tokens; times what the SLM alone takes
WANTED = {"share": (0.05, 0.1, 0.2), "latency": (1.5, 2.0, 4.0)}
# family, LLM share
TIMED = (("R2R", 0.1), ("R2R", 0.2), ("R-Stitch", 0.15), ("R-Stitch", 0.3), ("R-Stitch+", 0.04))
N_TEST, N_TIMED = 1000, 100


def gap(logits: torch.Tensor) -> torch.Tensor:
    """1 - how far the likeliest token is ahead of the next, in probability: 0 sure, 1 a tie."""
    first, second = logits.softmax(-1).topk(2).values.unbind(-1)
    return 1 - (first - second)


def varentropy(logits: torch.Tensor) -> torch.Tensor:
    """Variance of the surprise, in nats^2: 0 where all likely tokens are equally likely, one or many."""
    surprise = -logits.log_softmax(-1)
    p = (-surprise).exp()
    return (p * (surprise - (p * surprise).sum(-1, keepdim=True)) ** 2).sum(-1)


@dataclass(frozen=True)
class SignalRouter:
    """R-Stitch's Algorithm 1 with another measure of uncertainty in place of the entropy."""

    measure: Callable[[torch.Tensor], torch.Tensor]
    limit: float

    def leave_slm(self, step: rstitch.Step) -> torch.Tensor:
        return self.measure(step.logits) > self.limit

    def leave_llm(self, step: rstitch.Step) -> torch.Tensor:
        return self.measure(step.logits) <= self.limit


@dataclass(frozen=True)
class Family:
    """Routers by one knob; `grid` is what the calibration split is run with; `needs`, what has to have been
    trained."""

    build: Callable[[Task, float], object]
    grid: tuple[float, ...]
    needs: str = ""


def logs(low: float, high: float, n: int = 18) -> tuple[float, ...]:
    return tuple(np.log(np.geomspace(low, high, n)).tolist())


FAMILIES = {
    "R2R": Family(lambda task, x: r2r_router(task, expit(x)),
                  tuple(np.linspace(-12, 10, 18).tolist()), "router"),
    "R-Stitch": Family(lambda task, x: rstitch.EntropyRouter(math.exp(x)), logs(0.0004, 0.5)),
    "entropy, one token": Family(lambda task, x: rstitch.EntropyRouter(math.exp(x), tau_back=1.0),
                                 logs(0.0004, 0.5)),
    "top-2 gap": Family(lambda task, x: SignalRouter(gap, math.exp(x)), logs(0.0005, 0.98)),
    "varentropy": Family(lambda task, x: SignalRouter(varentropy, math.exp(x)), logs(0.002, 2.0)),
    "R-Stitch+": Family(lambda task, x: policy_router(task, expit(x)),
                        (-30.0, *np.linspace(-6, 6, 12).tolist()), "policies"),
    "random": Family(lambda task, x: rstitch.RandomRouter(x, seed=SEED),
                     tuple(np.linspace(0.01, 0.32, 6).tolist())),
}
ALONE = {"SLM alone": rstitch.SLMOnly, "LLM alone": rstitch.LLMOnly, "control": rstitch.LLMOnly}


def families_of(task: Task) -> dict[str, Family]:
    """Those whose nets there are."""
    there = {"": True, "router": task.path("router"), "policies": task.policy()}
    return {name: family for name, family in FAMILIES.items() if there[family.needs]}


def knob_for(target: float, knobs: Sequence[float], shares: Sequence[float],
             accuracies: Sequence[float]) -> float | None:
    """Where the share, linear between neighbouring knobs, is the target; of several such places the most
    accurate. None if nowhere."""
    found = []
    for (a, s, right), (b, s_b, right_b) in zip(zip(knobs, shares, accuracies),
                                                zip(knobs[1:], shares[1:], accuracies[1:])):
        if min(s, s_b) <= target <= max(s, s_b):
            w = (target - s) / (s_b - s) if s_b != s else 0.0
            found.append((right + w * (right_b - right), a + w * (b - a)))
    return max(found)[1] if found else None


class LiveLabels:
    """Leaves the SLM, for one token, where its own would lead the reasoning astray: R2R's labels, made while
    running."""

    def __init__(self, settings: label.Settings, questions: Sequence[str]):
        self.settings, self.questions = settings, list(questions)
        self.slm, self.llm, tokenizer, self.eos = settings.load()
        self.decode, self.judge = decoder(tokenizer), label.build_judge(settings.judge, settings.device,
                                                                              settings.dtype)
        prompts = rstitch.unpadded(*settings.encode(tokenizer, *self.questions))
        self.rows = [rstitch.Row(i, 0, list(ids), len(ids), rstitch.SLM, slot=i)
                     for i, ids in enumerate(prompts)]
        self.lm = rstitch.CachedLM(self.llm, len(prompts), max(map(len, prompts)) + settings.max_new_tokens)

    def llm_tokens(self, rows: list[rstitch.Row], vocab: int) -> dict[int, int]:
        """What the LLM would write next."""
        choice = {}
        for group in rstitch.similar_lengths(rows, self.lm):
            out = self.lm.read([r.index for r in group], [r.ids[self.lm.cursor[r.index]:] for r in group],
                               vocab)
            choice |= zip([r.index for r in group], out.token.tolist())
        return choice

    def leave_slm(self, step: rstitch.Step) -> torch.Tensor:
        rows, proposed = [self.rows[i] for i in step.rows], step.token.tolist()
        choice = self.llm_tokens(rows, step.logits.shape[-1])
        differ = [(row, token) for row, token in zip(rows, proposed) if choice[row.index] != token]
        todo = []
        for row, token in differ:
            prompt, answer = row.ids[:row.n_prompt], row.ids[row.n_prompt:]
            start = label.opening(label.sentences(self.decode, answer, self.eos), len(answer))
            todo += [(prompt, answer + [t], start) for t in (choice[row.index], token)]
        more = label.go_on(self.settings, todo)
        text = [None if m is None else self.decode(answer[start:] + m)
                for (_, answer, start), m in zip(todo, more)]
        cases = {row.index: label.Case(self.questions[row.index],
                                       self.decode(todo[2 * k][1][:todo[2 * k][2]]), text[2 * k],
                                       text[2 * k + 1])
                 for k, (row, _) in enumerate(differ) if None not in text[2 * k:2 * k + 2]}
        same = dict(zip(cases, self.judge(list(cases.values())))) if cases else {}
        # unjudged: ask the LLM
        leave = [choice[row.index] != token and same.get(row.index) is not True
                 for row, token in zip(rows, proposed)]
        for row, token, left in zip(rows, proposed, leave):
            if not left:
                row.ids.append(token)
        return torch.tensor(leave, device=step.token.device)

    def leave_llm(self, step: rstitch.Step) -> torch.Tensor:
        for i, token in zip(step.rows, step.token.tolist()):
            self.rows[i].ids.append(token)
        return torch.ones_like(step.token, dtype=torch.bool)


# ---- one row each -----------------------------------------------------------------------------------------


def row_of(task: Task, family: str, x: float | None, split: str, n: int, **more) -> dict:
    """One router over the first n problems of a split; `more` goes into the row."""
    pair = task.load()
    router = FAMILIES[family].build(task, x) if family in FAMILIES else ALONE[family]()
    if family == "control":
        pair = pair[0], control_of(task), pair[2]
    row = measure(task, router, split, n, pair)
    if split != "test":
        del row["outcomes"]
    return {"kind": split, "family": family, "knob": x, **row, **more}


def live_row(task: Task, judge: str, n: int) -> dict:
    """Live labels over the first n test problems."""
    pair, chosen, size = task.load(), task.split("test", n), min(100, task.rows)
    settings = label.Settings(**{f.name: getattr(task, f.name) for f in fields(Pair)}, judge=judge)
    solved = []
    for at in range(0, len(chosen), size):
        part = chosen[at:at + size]
        router = LiveLabels(settings, [question(p) for p in part])
        solved += solve(pair, part, router, batch_size=len(part), seed=SEED,
                        max_new_tokens=task.max_new_tokens, settings=task)
        router.lm.close()
    row = summarise(task, solved)
    return {"kind": "live labels", "family": "live labels", "knob": None, **row}


def generated(pair, ids: torch.Tensor, max_new_tokens: int, **options) -> list[int]:
    """The LLM's greedy answer to one prompt (1, P) by generate(), without the penalties that its checkpoint
    may ask for."""
    _, llm, tokenizer, *_ = pair
    own = llm.generation_config
    try:
        llm.generation_config = GenerationConfig(eos_token_id=ends_of(pair),
                                                 pad_token_id=tokenizer.pad_token_id or 0)
        out = llm.generate(ids.to(llm.device), attention_mask=torch.ones_like(ids).to(llm.device),
                           do_sample=False, max_new_tokens=max_new_tokens, **options)
    finally:
        llm.generation_config = own
    return out[0, ids.shape[1]:].tolist()


def assisted(pair, ids: torch.Tensor, max_new_tokens: int) -> tuple[list[int], list[rstitch.Call]]:
    """The answer to one prompt by generate() of the LLM with the SLM as its assistant, and every forward pass
    of both; kept=False for drafts that the LLM refused."""
    slm, llm, *_ = pair
    calls: list[rstitch.Call] = []

    def note(m: int):
        def before(model, args, kwargs):
            cache = kwargs.get(cache_keyword(model))
            calls.append(rstitch.Call(m, len(calls), kwargs["input_ids"].shape[1], cache.get_seq_length()
                                      if cache is not None else 0, -1, math.nan, True))
        return before

    hooks = [model.register_forward_pre_hook(note(m), with_kwargs=True)
             for m, model in ((rstitch.SLM, slm), (rstitch.LLM, llm))]
    try:
        with same_width(slm, llm):
            tokens = generated(pair, ids, max_new_tokens, assistant_model=slm)
    finally:
        for hook in hooks:
            hook.remove()
    return tokens, without_refused(calls, ids.shape[1], ids.shape[1] + len(tokens))


def without_refused(calls: list[rstitch.Call], prompt: int, end: int) -> list[rstitch.Call]:
    """The passes of speculative decoding with kept=False for the drafts that the LLM refused: between two of
    its passes as many were accepted as its cache grew. `end` is the length of prompt and answer."""
    out, checks = list(calls), [i for i, call in enumerate(calls) if call.model == rstitch.LLM]
    for i, last, after in zip(checks, [-1, *checks], [*checks[1:], None]):
        length = prompt if last < 0 else calls[i].n_kv + 1  # before this pass
        accepted = (end - 1 if after is None else calls[after].n_kv) - length
        for j in range(last + 1 + max(accepted, 0), i):
            out[j] = out[j]._replace(kept=False)
    return out


def assisted_row(task: Task, n: int) -> dict:
    """Speculative decoding over the first n test problems. LLM tokens are those that the SLM did not draft:
    one for each pass of the LLM."""
    pair, solved = task.load(), []
    for problem in task.split("test", n):
        tokens, calls = assisted(pair, encode_problems(pair[2], [problem], task)[0], task.max_new_tokens)
        solved.append({**graded(pair[2], pair[3], problem, tokens), "tokens": len(tokens), "calls": calls,
                       "llm_tokens": sum(call.model == rstitch.LLM for call in calls)})
    return {"kind": "assisted", "family": "speculative decoding", "knob": None, **summarise(task, solved)}


def router_times(task: Task, n: int) -> dict:
    """Milliseconds that one decision of a trained router takes at batch 1, where it is made: medians over the
    answers to calibration problems, routers in turn."""
    routers = {name: family.build(task, 0.0) for name, family in families_of(task).items() if family.needs}
    chosen = task.split("calibration", n)
    return {"kind": "router times", "family": None, "knob": None,
            "ms": {name: ms.get("call", 0.0) for name, ms in decision_ms(task, routers, chosen).items()},
            **provenance(SEED, len(chosen), task.device, task.dtype)}


def timed_row(task: Task, rows: list[dict], n: int) -> dict:
    """Wall-clock at batch 1 of both models alone, of speculative decoding and generate(), and of the test
    runs of `TIMED`."""
    pair = task.load()
    routers = {name: ALONE[name]() for name in ("SLM alone", "LLM alone")}
    for name, target in TIMED:
        routers |= {f"{name} at {100 * target:g} %": FAMILIES[name].build(task, r["knob"])
                    for r in rows if (r["kind"], r["family"], r.get("target")) == ("test", name, target)}
    others = {"speculative decoding": lambda ids: assisted(pair, ids, task.max_new_tokens),
              "LLM alone, generate()": lambda ids: generated(pair, ids, task.max_new_tokens)}
    return {"kind": "wall-clock", "family": None, "knob": None, **wall_clock(task, routers, n, others)}


# ---- tau from the SLM alone -------------------------------------------------------------------------------


def one_token_visits(calls: Sequence[rstitch.Call], tau: float) -> list[rstitch.Call]:
    """What the SLM's own answer would cost at tau (nats), if it stayed as it is: every token above tau is
    discarded, and the LLM, having caught up, writes it and hands back."""
    out, read = [], 0
    for call in calls:
        end = call.n_kv + call.n_inf
        out.append(call._replace(kept=call.entropy <= tau))
        if call.entropy > tau:
            out.append(rstitch.Call(rstitch.LLM, call.position, end - read, read, call.token, call.entropy,
                                    True))
            read = end
    return out


def choose_taus(task: Task, n: int) -> list[dict]:
    """For every wanted share, and latency as a multiple of the SLM's, the tau that the SLM's own answers to
    the calibration problems name, those up to the median length: {wanted, value, tau (normalised), predicted
    share, predicted ms, median length}."""
    pair, models = task.load(), task.latencies()
    log_vocab = math.log(common_vocab(pair))
    solved = solve(pair, task.split("calibration", n), rstitch.SLMOnly(), batch_size=task.rows,
                   max_new_tokens=task.max_new_tokens, settings=task)
    half = float(np.median([s["tokens"] for s in solved]))
    answers = [s["calls"] for s in solved if s["tokens"] <= half]
    H = np.concatenate([[call.entropy for call in calls] for calls in answers])
    taus = np.unique(np.quantile(H, np.linspace(0, 1, 400)))
    # falls with tau
    ms = np.array([np.mean([rstitch.trajectory_latency(one_token_visits(calls, tau), *models)
                            for calls in answers]) for tau in taus])
    share = np.array([(H > tau).mean() for tau in taus])
    out = []
    for wanted, values in WANTED.items():
        for value in values:
            curve, target = (share, value) if wanted == "share" else (ms, value * ms[-1])
            tau = float(np.interp(target, curve[::-1], taus[::-1]))
            out.append({"wanted": wanted, "value": value, "tau": tau / log_vocab,
                        "predicted_share": float(np.interp(tau, taus, share)),
                        "predicted_ms": float(np.interp(tau, taus, ms)), "median_tokens": half})
    return out


# ---- all of them ------------------------------------------------------------------------------------------


def made_with(task: Task, family: str | None, judge: str = "") -> str:
    """Changes where rows of this family have to be computed anew: with the task, and with the family's own
    net, or the judge of live labels."""
    if family in FAMILIES:
        needs = [FAMILIES[family].needs]
    else:
        needs = [f.needs for f in families_of(task).values()] if family is None else []
    files = [net_file(task, need) for need in sorted(set(needs) - {""})]
    return digest_of(task, *files, also={"control": lambda: fingerprint(control_of(task)),
                                         "live labels": lambda: judge}.get(family, str)())


def key_of(row: dict) -> tuple:
    """What a row is of: (kind, family, knob or what was wanted, n)."""
    return row["kind"], row["family"], (row["wanted"],
                                        row["value"]) if row["kind"] == "chosen" else row["knob"], row["n"]


def first_jobs(task: Task, families: dict[str, Family], n: dict[str, int], judge: str) -> dict[tuple, tuple]:
    """What needs no other row: live labels, speculative decoding, the models alone, and the grids of all
    knobs."""
    live, test, calibration = n["live"], n["test"], n["calibration"]
    jobs = {}
    if live:
        jobs["assisted", "speculative decoding", None, live] = assisted_row, task, live
        if judge:
            jobs["live labels", "live labels", None, live] = live_row, task, judge, live
    for name in ALONE:
        if name != "control" or task.path("control"):
            jobs["test", name, None, test] = row_of, task, name, None, "test", test
    for name, family in families.items():
        for x in family.grid:
            jobs["calibration", name, x, calibration] = row_of, task, name, x, "calibration", calibration
    return jobs


def later_jobs(task: Task, families: dict[str, Family], n: dict[str, int], rows: dict[tuple, dict],
              store: Rows) -> dict[tuple, tuple]:
    """The test runs at the knobs that the grids name for every share, and at the tau that the SLM alone
    names."""
    jobs, test = {}, n["test"]
    for name, family in families.items():
        grid = [rows["calibration", name, x, n["calibration"]] for x in family.grid]
        for target in SHARES:
            x = knob_for(target, family.grid, [r["llm_share"] for r in grid], [r["accuracy"] for r in grid])
            if x is not None:
                jobs["test", name, x, test] = partial(row_of, target=target), task, name, x, "test", test
    chosen: dict[tuple, tuple | None] = {("chosen", "R-Stitch", (what, value), test): None
                                         for what, values in WANTED.items() for value in values}
    have = store.have()  # of all ranks: each must know every job, whoever does it
    if any(key not in have for key in chosen):
        for one in choose_taus(task, n["calibration"]):
            key = "chosen", "R-Stitch", (one["wanted"], one["value"]), test
            x = math.log(max(one["tau"], 1e-9))
            chosen[key] = partial(row_of, kind="chosen", **one), task, "R-Stitch", x, "test", test
    return jobs | chosen


def run(task: Task, n_calibration: int, n_test: int, n_live: int, n_timed: int, judge: str,
        workers: int) -> list[dict]:
    """Compute what compare.jsonl lacks, a row at a time; the rows that count."""
    path, families = task.needed("out") / "compare.jsonl", families_of(task)
    n = {split: len(task.split(split, most))
         for split, most in (("calibration", n_calibration), ("test", n_test))}
    n |= {"live": min(n_live, n["test"]), "timed": min(n_timed, n["test"])}
    for family in families.values():
        family.build(task, family.grid[0])  # a net of another pair is told now
    marks = {name: made_with(task, name, judge)
             for name in (*families, *ALONE, "live labels", "speculative decoding", None)
             if name != "control" or task.path("control")}
    store = Rows(path, key_of, lambda key: {"made_with": marks.get(key[1])})

    def complete(jobs: dict[tuple, tuple]) -> dict[tuple, dict]:
        have = store.fill(jobs, workers, "routers")
        return {key: have[key] for key in jobs}

    rows = complete(first_jobs(task, families, n, judge))
    rows |= complete(later_jobs(task, families, n, rows, store))
    decisions = min(30, n["calibration"])
    rows |= complete({("router times", None, None, decisions): (router_times, task, decisions)})
    if n["timed"]:  # after the others, alone on the machine
        rows |= complete({("wall-clock", None, None, n["timed"]): (timed_row, task, list(rows.values()),
                                                                   n["timed"])})
    return list(rows.values())


def activated(row: dict, parameters: tuple[int, int]) -> float:
    """Average activated parameters per kept token, as R2R counts them: a pass of a model activates all of it.
    Catch-up is apart."""
    return (row["slm_passes"] * parameters[0] + row["llm_passes"] * parameters[1]) / row["tokens"]


def with_router(row: dict, ms: dict[str, float]) -> float:
    """Fitted latency and the time of the router's own net."""
    return row["latency_ms"] + net_time(row, ms)


def by_family(rows: list[dict]) -> dict[str, list[dict]]:
    """The test runs of each family, the SLM alone in all of them."""
    test = [r for r in rows if r["kind"] == "test"]
    return {name: family for name in FAMILIES
            if len(family := [r for r in test if r["family"] in (name, "SLM alone")]) > 1}


def show(rows: list[dict], parameters: tuple[int, int], usage: Callable[[float], float]) -> str:
    """Every test run as it was, then what else was run, and the conditions. `usage`: R2R's share on the LLM's
    trajectories at a threshold."""
    ms, runs = next(r["ms"] for r in rows if r["kind"] == "router times"), by_family(rows)
    right = lambda r: with_interval([100 * x for x in (r["accuracy"], *r["accuracy_95"])],
                                    digits=1)  # noqa: E731
    lines = [f"{'router':20} {'LLM share wanted, reached, %':>29} {'right, % [95 %] (higher is better)':>35}"
             f" {'cut off, %':>11} {'tokens':>7} {'fitted ms':>10} {'with router':>12}"
             f" {'activated, M':>13} {'catch-up':>9}"]
    for name, family in {**{name: [r for r in rows if r["family"] == name and r["kind"] != "calibration"]
                            for name in ("LLM alone", "control", "speculative decoding")}, **runs}.items():
        for r in sorted(family, key=lambda r: r["llm_share"]):
            offline = f"   offline {100 * usage(expit(r['knob'])):.1f} %" if r["family"] == "R2R" else ""
            wanted = f"{100 * r['target']:g}" if "target" in r else ""
            lines.append(f"{name:20} {wanted:>19} {100 * r['llm_share']:>9.1f} {right(r):>35}"
                         f" {cut_off(r):>11} {r['tokens']:>7.1f} {r['latency_ms']:>10.1f}"
                         f" {with_router(r, ms):>12.1f} {activated(r, parameters) / 1e6:>13.3f} "
                         f"{r['llm_catch_up_tokens']:>9.1f}{offline}"
                         + (f"   n = {r['n']}" if r["kind"] == "assisted" else ""))
    for live in (r for r in rows if r["kind"] == "live labels"):
        lead = at_own_share(live, runs["R2R"], live["n"]) if "R2R" in runs else (math.nan,) * 3
        lines.append(f"live labels: {right(live)} % right, {cut_off(live)} % cut off, at "
                     f"{100 * live['llm_share']:.1f} % LLM tokens, {live['tokens']:.1f} tokens, "
                     f"{activated(live, parameters) / 1e6:.3f} M activated (the labels' own work not "
                     f"counted), n = {live['n']}; a reference point, not a bound"
                     + ("" if math.isnan(lead[0]) else "; on these problems right more often than R2R at "
                        f"this share by {signed(lead)} pp"))
    for r in (r for r in rows if r["kind"] == "chosen"):
        lines.append(f"tau {r['tau']:.3g}, from the SLM's answers of up to {r['median_tokens']:g} tokens for "
                     f"{r['wanted']} {r['value']:g}: predicted {100 * r['predicted_share']:.1f} % LLM tokens "
                     f"and {r['predicted_ms']:.0f} ms, reached {100 * r['llm_share']:.1f} % and "
                     f"{r['latency_ms']:.0f} ms, {right(r)} % right, {cut_off(r)} % cut off")
    r = next(r for r in rows if r["kind"] == "test")
    lines.append(f"n = {r['n']} test problems, greedy, seed {r['seed']}, {r['device']}, {r['dtype']}, torch "
                 f"{r['torch']}, transformers {r['transformers']}; knobs set on "
                 f"{next(r for r in rows if r['kind'] == 'calibration')['n']} calibration problems"
                 + "".join(f"; a decision of {name}'s net takes {x:.2f} ms" for name, x in ms.items()))
    return "\n".join(lines)


def table(rows: list[dict]) -> str:
    """Right answers at exactly the same share, and R2R's lead, as the results page has it."""
    runs = by_family(rows)
    n = len(next(iter(runs.values()))[0]["outcomes"])
    once = np.full((1, n), 1 / n)
    led = [name for name in runs if name not in ("R2R", "random")] if "R2R" in runs else []
    lines = ["| LLM share, % | " + " | ".join([*runs, *(f"R2R - {name}, pp" for name in led)]) + " |",
             "|" + "---|" * (1 + len(runs) + len(led))]
    for target in SHARES:
        right = {name: float(at_share(family, target, once)[0]) for name, family in runs.items()}
        cells = [f"{100 * target:g}", *("" if math.isnan(x) else f"{100 * x:.1f}" for x in right.values())]
        cells += ["" if math.isnan(right[name] + right["R2R"])
                  else signed(difference(runs["R2R"], runs[name], target, n)) for name in led]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def offline_usage(folder: Path | None) -> Callable[[float], float]:
    """R2R's share of the tokens of the LLM's own trajectories, test split, as a function of the threshold."""
    if not folder:
        return lambda t: math.nan
    threshold, share, _ = np.array(json.loads((folder / "made.json").read_text())["test"]["recall_usage"]).T
    return lambda t: float(np.interp(t, threshold[::-1], share[::-1]))


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, Task)
    add = parser.add_argument
    add("--n", type=int, default=N_TEST, help="test problems (default: %(default)s)")
    add("--calibration", type=int, default=N_CALIBRATION, help="calibration problems (default: %(default)s)")
    add("--live", type=int, default=N_TEST,
        help="of the test problems, how many with live labels and with speculative decoding; 0 for none "
             "(default: %(default)s)")
    add("--wall-clock", type=int, default=N_TIMED,
        help="of the test problems, how many are timed one by one; 0 for none (default: %(default)s)")
    add("--judge", default="",
        help="of the live labels, as of analysis.label (default: the pocket domain's; other problems then "
             "have no live labels)")
    add("--workers", type=int, default=2, help="processes; 1 on a GPU (default: %(default)s)")
    args = parser.parse_args()
    try:
        task = Task(**given(args, Task))
        for name, least in (("n", 1), ("calibration", 1), ("live", 0), ("wall_clock", 0), ("workers", 1)):
            rstitch.check_count(f"--{name.replace('_', '-')}", getattr(args, name), least)
        rows = run(task, args.calibration, args.n, args.live, args.wall_clock,
                   args.judge or ("statement" if task.pocket else ""), args.workers)
        parameters = tuple(sum(p.numel() for p in model.parameters()) for model in task.load()[:2])
        lead = "; R2R's lead with paired 95 % intervals" if task.path("router") else ""
        print(show(rows, parameters, offline_usage(task.path("router"))),
              f"Right answers in % at exactly the same LLM share, on the lines between these runs{lead}:",
              table(rows), sep="\n\n")
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    start(main, shared=True)

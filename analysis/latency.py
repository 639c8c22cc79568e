"""The latency model of a pair: fitted to a grid of steps and to steps of trajectories, checked on others.

    python -m analysis.latency               pocket pair
    python -m analysis.latency --overhead    what a token costs beside the forward pass
    P="--slm SMALL --llm LARGE --problems file.jsonl"
    python -m analysis.latency $P --out pair.json                 in about 15 minutes
    python -m analysis.latency $P --out pair.json --minutes 60    goes on with what there is

Rows: latency.json; overhead.jsonl with --overhead.
Feeds: the results page's section on latency, latency.png, and every fitted time.

Everything runs at batch 1, in one process. Every round times the grid once, then points that are held out,
then the trajectories of a few problems by every method. A step that follows one of the other model finds less
in the processor's cache than one that is timed again and again, and one in a trajectory is decided by its own
router: so every other problem's steps are part of what is fitted, the time from one result of the loop to the
next, and the other problems are for checking. A trajectory's wall-clock is the median of its runs, other
methods in between; its fitted latency sums over its forward passes. Reference calls (single steps of the LLM)
before and after each problem show how much the machine drifted; a problem is calm where both are within 5 %
of the run's median.

The pocket pair takes ten rounds, and each method runs three times. With --minutes, the default for another
pair, there is one round of a coarser grid; then come as many problems as there is time for, each answered
once by every method, at a length that lets four of them into most of the time. Every time is written down as
it is taken, to samples beside the fit, and a run that was killed goes on there.
"""
import argparse
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import rstitch
from analysis.instruments.options import add_options, given
from analysis.instruments.progress import progress, tracked
from analysis.instruments.provenance import machine, provenance
from analysis.instruments.rows import RESULTS, append_row
from analysis.instruments.runs import Rows
from analysis.instruments.task import Prompting, Task, encode_problems
from analysis.instruments.timing import REFERENCE, now, reference_ms, rotated
from analysis.pocket.weights import MAX_NEW_TOKENS
from rstitch import fingerprint
from rstitch_hf.command import usable_device
from rstitch_hf.ranks import start

METHODS = {
    "SLM alone": rstitch.SLMOnly(), "LLM alone": rstitch.LLMOnly(),
    "random, p 0.1": rstitch.RandomRouter(0.1),
    **{f"R-Stitch, tau {tau:g}": rstitch.EntropyRouter(tau) for tau in (0.001, 0.005, 0.02)}}


POCKET_LEN, ANSWER = 384, 512  # tokens of the pocket pair's longest row, of another's longest answer
MINUTES, BRIEF = 15.0, 40  # for a pair that is not the pocket's, and the problems that are at hand then
LENGTHS = 16, 128  # of an answer where time is short, in tokens
PROBLEMS = 4  # that such a length lets into most of the time: two to fit, two to check


@dataclass(frozen=True)
class Plan:
    """What is timed, in turn: rounds of a grid, of points that are held out, and of problems."""

    max_len: int  # longest row, prompt and answer, in tokens
    rounds: int
    problems: int
    repeats: int = 3  # of each trajectory
    longest_read: int = 1 << 30  # of the grid, in tokens
    contexts: int = 5  # of each size of the grid, and three times as many of single tokens
    held_out: int = 30  # points
    length: int | None = None  # longest answer of a trajectory, in tokens; None: what --minutes allow

    def jobs(self) -> Iterator[tuple]:
        """(what, ...) of every time that is taken, in order."""
        points = {"grid": grid_points(self.max_len, self.longest_read, self.contexts),
                  "held out": held_out_points(self.max_len, self.held_out, longest_read=self.longest_read)}
        for i in range(self.rounds):
            yield from ((what, name, i, *point) for name in ("slm", "llm") for what in points
                        for point in points[what])
            if i == 0 and self.length is None:
                yield ("length",)
            for j in range(i * self.problems // self.rounds, (i + 1) * self.problems // self.rounds):
                yield "reference", j, "before"
                yield from (("trajectory", j, name, run) for run in range(self.repeats)
                            for name in rotated(list(METHODS), j))
                yield "reference", j, "after"


def grid_points(max_len: int, longest_read: int = 1 << 30, contexts: int = 5) -> list[tuple[int, int]]:
    """(n_inf, n_kv) that span the calls of rows of up to max_len tokens, reads of at most `longest_read`."""
    sizes = [2**k for k in range(1, max_len.bit_length()) if 2**k <= max_len // 2]
    sizes = [size for size in sizes + [3 * size // 2 for size in sizes[1:-1]] if size <= longest_read]
    grid = [(n, int(kv)) for n in sorted(sizes) for kv in np.linspace(0, max_len - n, contexts)]
    return [(1, int(kv)) for kv in np.linspace(0, max_len - 1, 3 * contexts)] + grid


def held_out_points(max_len: int, n: int = 30, seed: int = 0,
                    longest_read: int = 1 << 30) -> list[tuple[int, int]]:
    """Points between those of the grid, a third of them single tokens."""
    rng, longest = np.random.default_rng(seed), min(max_len / 2, longest_read)
    sizes = [1] * (n // 3) + [int(x) for x in np.exp(rng.uniform(np.log(2), np.log(longest), n - n // 3))]
    return [(size, int(rng.integers(0, max_len - size))) for size in sizes]


def residuals(model: rstitch.LatencyModel, samples: list[rstitch.Sample]) -> dict:
    """Relative errors of the fit over points: the median of their size, and its 90th percentile."""
    errors = [abs(model.call(s.n_inf, s.n_kv) / s.ms - 1) for s in rstitch.medians(samples)]
    return {"median_error": float(np.median(errors)), "p90_error": float(np.percentile(errors, 90)),
            "points": len(errors)}


def trajectory_figures(fitted: np.ndarray, measured: np.ndarray) -> dict:
    """R^2 and the median relative error of fitted against measured milliseconds, as they are and after one
    common factor. NaN where there are too few to say."""
    factor = float(np.median(measured / fitted)) if len(fitted) else float("nan")
    out: dict = {"n": len(fitted), "factor": factor}
    spread = ((measured - measured.mean()) ** 2).sum() if len(fitted) > 1 else float("nan")
    for suffix, x in (("", fitted), ("_after_factor", factor * fitted)):
        out["r2" + suffix] = float(1 - ((measured - x) ** 2).sum() / spread)
        out["median_error" + suffix] = float(np.median(abs(x / measured - 1))) if len(x) else float("nan")
    return out


def of_key(done: dict[tuple, dict], *key) -> dict[tuple, dict]:
    """The rows whose key begins so."""
    return {k: row for k, row in done.items() if k[:len(key)] == key}


def calls_in(row: dict) -> list[rstitch.Call]:
    """The forward passes of a trajectory: what the latency model asks of them."""
    return [rstitch.Call(model, 0, n_inf, n_kv, 0, 0.0, True) for model, n_inf, n_kv in row["calls"]]


def step_samples(runs: list[dict]) -> dict[str, list[rstitch.Sample]]:
    """{"slm", "llm"}: the steps of a trajectory but the first, which no result comes before; each the median
    over its runs, `steps` being the milliseconds from result to result."""
    out: dict[str, list[rstitch.Sample]] = {"slm": [], "llm": []}
    for call, ms in zip(calls_in(runs[0])[1:], np.median([run["steps"] for run in runs], 0)):
        out[("slm", "llm")[call.model]].append(rstitch.Sample(call.n_inf, call.n_kv, float(ms)))
    return out


def affordable_length(done: dict[tuple, dict], minutes: float) -> int:
    """Tokens of an answer at which PROBLEMS problems, answered by every method, take three quarters of the
    time that the grid has left: a token costs no more than a step of both models."""
    step = sum(np.median([row["ms"] for key, row in of_key(done, "grid", name).items() if key[3] == 1])
               for name in ("slm", "llm"))
    left = 6e4 * minutes - 1e3 * sum(row["spent"] for key, row in done.items()
                                     if key[0] in ("grid", "held out"))
    shortest, longest = LENGTHS
    return int(np.clip(0.75 * left / (PROBLEMS * len(METHODS) * step), shortest, longest))


def answered(lms: dict, ids: torch.Tensor, method: str, seed: int, length: int) -> dict:
    """One problem by one method: its forward passes, milliseconds in all and from result to result."""
    came: list[float] = []
    begin = time.perf_counter()
    result = rstitch.stitch(lms["slm"], lms["llm"], ids, METHODS[method], seed=[seed], max_new_tokens=length,
                            on_token=lambda *_: came.append(time.perf_counter()))
    ms = 1e3 * (time.perf_counter() - begin)
    return {"ms": ms, "steps": (1e3 * np.diff(came)).round(4).tolist(),
            "calls": [[call.model, call.n_inf, call.n_kv] for call in result.calls[0]]}


def measure(pair, prompts: list[torch.Tensor], plan: Plan, store: Rows, seed: int = 0,
            minutes: float = float("inf")) -> dict[tuple, dict]:
    """The times of the plan by their keys, those that are missing taken and appended. When the minutes are
    over, those of earlier runs included, only the first two problems are answered by every method."""
    slm, llm, *_ = pair
    lms = {"slm": rstitch.CachedLM(slm, 1, plan.max_len), "llm": rstitch.CachedLM(llm, 1, plan.max_len)}
    done = store.have()

    def take(what: str, *of) -> dict:
        if what == "reference":
            return {"ms": reference_ms(lms["llm"])}
        if what == "length":
            return {"tokens": affordable_length(done, minutes)}
        if what == "trajectory":
            j, method, _ = of
            length = min(plan.length or done[("length",)]["tokens"], plan.max_len - prompts[j].shape[1])
            return answered(lms, prompts[j], method, 1000 * seed + j, length)
        name, _, *point = of
        return {"ms": rstitch.measure_latency(lms[name], [tuple(point)], repeats=1)[0].ms}

    jobs = list(plan.jobs())
    spent = sum(row["spent"] for row in done.values())
    limited = minutes < float("inf")
    there = round(spent) if limited else sum(key in done for key in jobs)
    with progress(round(60 * minutes) if limited else len(jobs), "seconds" if limited else "times",
                  initial=there) as bar:
        for key in jobs:
            if spent > 60 * minutes and key[0] in ("reference", "trajectory") and key[1] > 1:
                break
            if key in done:
                continue
            begin = time.perf_counter()
            row = take(*key)
            done[key] = row | {"spent": time.perf_counter() - begin}
            store.add(key, {"key": list(key), **done[key]})
            spent += done[key]["spent"]
            bar.update(round(spent) - bar.n if limited else 1)
    for lm in lms.values():
        lm.close()
    return {key: done[key] for key in jobs if key in done}


def trajectories(done: dict[tuple, dict]) -> dict[tuple[int, str], list[dict]]:
    """The runs of each (problem, method)."""
    out: dict[tuple[int, str], list[dict]] = {}
    for (_, j, method, _), row in of_key(done, "trajectory").items():
        out.setdefault((j, method), []).append(row)
    return out


def samples_of(done: dict[tuple, dict]) -> dict[str, list[rstitch.Sample]]:
    """{"slm", "llm"}: grid, {"slm held out", ...}, {"slm steps", ...} of every other problem."""
    out = {name + suffix: [rstitch.Sample(*key[3:], row["ms"])
                           for key, row in of_key(done, what, name).items()]
           for name in ("slm", "llm") for what, suffix in (("grid", ""), ("held out", " held out"))}
    for (j, _), runs in trajectories(done).items():
        for name, steps in step_samples(runs).items():
            out.setdefault(name + " steps", []).extend([] if j % 2 else steps)
    return out


def drift_of(done: dict[tuple, dict]) -> tuple[float, dict[int, float]]:
    """The median of the reference calls, and of each problem how far from it they were."""
    references: dict[int, list[float]] = {}
    for (_, j, _), row in of_key(done, "reference").items():
        references.setdefault(j, []).append(row["ms"])
    calm = float(np.median([ms for both in references.values() for ms in both]))
    return calm, {j: float(max(abs(np.array(both) / calm - 1))) for j, both in references.items()}


def evaluate(done: dict[tuple, dict]) -> dict:
    """Both fits with their residuals, and how well they predict trajectories, per method, over all and over
    calm problems."""
    samples, out = samples_of(done), {}
    models = {name: rstitch.LatencyModel.fit(samples[name] + samples[name + " steps"])
              for name in ("slm", "llm")}
    for name, model in models.items():
        out[name] = model.coefficients
        out[name + "_residuals"] = {what: residuals(model, samples[name + suffix])
                                    for what, suffix in (("grid", ""), ("steps of trajectories", " steps"),
                                                         ("held out", " held out")) if samples[name + suffix]}
        out[name + "_profile"] = rstitch.medians(samples[name])
        of_size: dict[int, list[float]] = {}
        for s in samples[name + " steps"]:
            of_size.setdefault(s.n_inf, []).append(model.call(s.n_inf, s.n_kv) / s.ms - 1)
        out[name + "_steps"] = [[n_inf, float(np.median(errors)), len(errors)]
                                for n_inf, errors in sorted(of_size.items())]
    calm, drift = drift_of(done)
    out |= {"reference_ms": calm, "drift": list(drift.values()), "trajectories": {}}
    held = {at: runs for at, runs in trajectories(done).items() if at[0] % 2}
    for name in METHODS:
        chosen = {j: runs for (j, method), runs in held.items() if method == name}
        fitted = np.array([rstitch.trajectory_latency(calls_in(runs[0]), models["slm"], models["llm"])
                           for runs in chosen.values()])
        ms = np.array([np.median([run["ms"] for run in runs]) for runs in chosen.values()])
        quiet = np.array([drift[j] <= 0.05 for j in chosen], bool)
        out["trajectories"][name] = {"all": trajectory_figures(fitted, ms),
                                     "calm": trajectory_figures(fitted[quiet], ms[quiet]) if quiet.sum() > 2
                                     else None,
                                     "fitted_ms": fitted.round(2).tolist(),
                                     "measured_ms": ms.round(2).tolist()}
    every = out["trajectories"].values()
    out["all_trajectories"] = trajectory_figures(*(np.concatenate([one[what] for one in every])
                                                   for what in ("fitted_ms", "measured_ms")))
    return out


def overhead(pair, repeats: int, context: int = 100, tokens: int = 60) -> dict:
    """Milliseconds per token of the SLM at batch 1, medians of interleaved repeats: the forward pass, the
    entropy, a policy's decision, a whole step with the entropy rule, with a policy that is asked at every
    token, and the whole loop per token."""
    slm, llm, _ = pair
    lms = [rstitch.CachedLM(model, 1, context + tokens) for model in (slm, llm)]
    marks: list[float] = []

    def mark(*_) -> None:
        marks.append(now(slm.device))

    hooks = [slm.register_forward_pre_hook(mark), slm.register_forward_hook(mark)]
    policy = rstitch.Policy(rstitch.hidden_size_of(slm)).requires_grad_(False).to(slm.device)
    times: dict[str, list[float]] = {}
    for _ in tracked(range(repeats), "overhead"):
        for name, ms in overhead_once(lms, policy, marks, context, tokens).items():
            times.setdefault(name, []).append(ms)
    for handle in hooks:
        handle.remove()
    whole = float(np.median(times["loop, per token"]))
    return {"what": "overhead", "model": "SLM", "slm": fingerprint(slm), "context": context, "loop_ms": whole,
            **{name: {"ms": float(np.median(ms)), "quartiles": np.percentile(ms, [25, 75]).tolist(),
                      "share": float(np.median(ms)) / whole} for name, ms in times.items()}}


def overhead_once(lms, policy: rstitch.Policy, marks: list[float], context: int,
                  tokens: int) -> dict[str, float]:
    """Milliseconds of each part, once; `marks`: when (s) the SLM's forward passes began and ended."""
    lm, device, times = lms[0], lms[0].model.device, {}

    def timed(name: str, run: Callable[[], object]) -> None:
        start = time.perf_counter()
        run()
        times[name] = 1e3 * (time.perf_counter() - start)

    def step(router) -> None:
        row = rstitch.Row(0, 0, [5] * (context + 1), context + 1, rstitch.SLM)
        lm.cursor[0] = context
        rstitch.advance(rstitch.SLM, lm, [row], router, lm.vocab, rstitch.GREEDY)

    timed("step, entropy rule", lambda: step(rstitch.EntropyRouter()))
    marks.clear()
    timed("step, policy asked", lambda: step(rstitch.PolicyRouter(policy, 0.0)))
    times["forward"] = 1e3 * (marks[-1] - marks[-2])
    lm.cursor[0] = context
    out = lm.read([0], [[5]])
    timed("entropy", lambda: rstitch.entropy(out.logits).tolist())
    state = out.hidden.clone(), out.entropy.clone(), torch.tensor([context], device=device)
    timed("policy", lambda: policy(*state).tolist())
    lm.reset()
    ends: list[float] = []  # of the tokens after the first, which reads the prompt
    rstitch.stitch(*lms, torch.full((1, context), 5), rstitch.SLMOnly(), max_new_tokens=tokens,
                   eos_token_id=[],
                   on_token=lambda *_: ends.append(time.perf_counter()))
    return times | {"loop, per token": 1e3 * (ends[-1] - ends[0]) / (len(ends) - 1)}


def show(row: dict) -> str:
    """The fits and how well they hold, as text."""
    lines = []
    for name in ("slm", "llm"):
        (a, b, c, d), (c1, d1) = row[name]["prefill"], row[name]["decode"]
        lines.append(f"{name.upper()}  prefill {a:.3g} n_inf n_kv + {b:.3g} n_inf^2 + {c:.3g} n_inf + "
                     f"{d:.3g} ms, decode {c1:.3g} n_kv + {d1:.3g} ms")
        for what, r in row[name + "_residuals"].items():
            lines.append(f"     {what}: median |error| {100 * r['median_error']:.1f} %, 90th percentile "
                         f"{100 * r['p90_error']:.1f} % ({r['points']} points)")
    drift = np.array(row["drift"])
    lines.append(f"drift of the reference call, {row['reference_ms']:.2f} ms: median "
                 f"{100 * np.median(drift):.1f} %, largest {100 * drift.max():.1f} %; "
                 f"{(drift <= 0.05).sum()} of {len(drift)} problems calm, within 5 %")
    lines.append(f"{'trajectories (lower error is better)':38} {'n':>4} {'R^2':>6} {'median |error|':>15} "
                 f"{'factor':>7} {'R^2 after':>10} {'|error| after':>14}")
    for name, both in row["trajectories"].items():
        for which, r in (("", both["all"]), (", calm problems", both["calm"])):
            if r:
                lines.append(f"{name + which:38} {r['n']:>4} {r['r2']:>6.3f} "
                             f"{100 * r['median_error']:>13.1f} % {r['factor']:>7.3f} "
                             f"{r['r2_after_factor']:>10.3f} {100 * r['median_error_after_factor']:>12.1f} %")
    both = row["all_trajectories"]
    lines.append(f"{both['n']} held-out trajectories in all: median |error| "
                 f"{100 * both['median_error']:.1f} %")
    lines.append(f"seed {row['seed']}, {row['device']}, {row['dtype']}, {row['machine']}, {row['threads']} "
                 f"threads, torch {row['torch']}, batch 1, answers of at most {row['length']} tokens")
    return "\n".join(lines)


def plot(row: dict, path: Path) -> None:
    """Residuals over the profile, and fitted against measured trajectories."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for name, marker in (("slm", "o"), ("llm", "s")):
        model = rstitch.LatencyModel(**row[name])
        n_inf, error = zip(*[(n, 100 * (model.call(n, kv) / ms - 1)) for n, kv, ms in row[name + "_profile"]])
        drawn, = left.plot(n_inf, error, marker, alpha=0.3, label=f"{name.upper()}, grid")
        sizes, error, _ = zip(*row[name + "_steps"])
        left.plot(sizes, 100 * np.array(error), "-" + marker, ms=4, lw=1, color=drawn.get_color(),
                  label=f"{name.upper()}, trajectories (median)")
    left.axhline(0, color="grey", lw=0.8)
    left.set(xscale="log", xlabel="tokens read by the call, n_inf", ylabel="fitted / measured - 1 (%)",
             title="One step (nearer to 0 is better)")
    for name, both in row["trajectories"].items():
        right.plot(both["measured_ms"], both["fitted_ms"], ".", alpha=0.6, label=name)
    ends = [min(min(b["measured_ms"]) for b in row["trajectories"].values()),
            max(max(b["measured_ms"]) for b in row["trajectories"].values())]
    right.plot(ends, ends, color="grey", lw=0.8)
    right.set(xscale="log", yscale="log", xlabel="measured wall-clock (ms)", ylabel="fitted latency (ms)",
              title="One trajectory (nearer to the line is better)")
    right.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    for axis in (left, right):
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--slm", default=Task.slm,
        help="small model, a Hugging Face name or path (default: the pocket pair's)")
    add("--llm", default=Task.llm, help="large model with the same tokenizer (default: the pocket pair's)")
    add_options(parser, Prompting)
    add("--special-tokens-may-differ", action="store_true",
        help="take a pair whose tokenizers differ in special tokens only")
    add("--problems", default="",
        help="JSONL file of problems, or a data set as REPO:CONFIG:PART, for the trajectories: its dev split "
             "(default: the pocket domain)")
    add("--device", type=usable_device, default="cpu", help="torch device (default: %(default)s)")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32",
        help="of both models (default: %(default)s)")
    add("--minutes", type=float,
        help="how long to measure, in all runs together: one coarser round, and as many problems as there is "
             f"time for (default: no limit for the pocket pair, {MINUTES:g} for another)")
    add("--max-len", type=int,
        help=f"longest row, prompt and answer, in tokens (default: {POCKET_LEN} for the pocket pair, else "
             f"the longest prompt and {ANSWER} more)")
    add("--rounds", type=int, help="without --minutes: rounds of grid and trajectories (default: 10)")
    add("--per-round", type=int,
        help="without --minutes: problems a round, each answered by every method; every other one for the "
             "fit (default: 20)")
    add("--seed", type=int, default=0, help="of the problems and of random switching (default: %(default)s)")
    add("--overhead", action="store_true", help="measure what a token costs beside the forward pass instead")
    add("--max-new-tokens", type=int,
        help=f"longest answer of a trajectory, in tokens (default: {MAX_NEW_TOKENS}; with --minutes what "
             f"there is time for, {LENGTHS[0]} to {LENGTHS[1]})")
    add("--out", type=Path,
        help="where the fit goes, with a plot and the samples beside it, or the rows of --overhead (default, "
             f"pocket pair only: {RESULTS / 'latency.json'}, overhead.jsonl)")
    return parser


def prepare(args: argparse.Namespace) -> tuple[Task, list[torch.Tensor], Plan, float]:
    """The task, its prompts, (1, P) each, what is timed of them and for how many minutes. ValueError for
    options that cannot be."""
    task = Task(slm=args.slm, llm=args.llm, device=args.device, dtype=args.dtype, problems=args.problems,
                special_tokens_may_differ=args.special_tokens_may_differ, **given(args, Prompting))
    thorough = [name for name in ("rounds", "per_round") if getattr(args, name) is not None]
    minutes = args.minutes or (float("inf") if task.pocket or thorough else MINUTES)
    for name, least in (("max_len", REFERENCE[1] + 1), ("rounds", 1), ("per_round", 1),
                        ("max_new_tokens", 1)):
        if getattr(args, name) is not None:
            rstitch.check_count(f"--{name.replace('_', '-')}", getattr(args, name), least)
    if args.minutes is not None and (thorough or not 0 < args.minutes < float("inf")):
        raise ValueError(f"--minutes {args.minutes:g}: expected more than 0, and neither --rounds nor "
                         "--per-round beside it")
    if args.overhead and (thorough or args.minutes or args.max_len or args.max_new_tokens):
        raise ValueError("--overhead goes with none of --minutes, --rounds, --per-round, --max-len and "
                         "--max-new-tokens: it times single parts of a step")
    if args.out and not args.overhead and args.out.suffix != ".json":
        raise ValueError(f"--out {args.out}: expected a name that ends in .json; samples and plot go beside "
                         "it")
    if not args.out and not task.pocket:
        raise ValueError("--out is missing: expected a file for a pair or problems that are not the pocket's")
    limited = minutes < float("inf")
    rounds, per_round = (1, BRIEF) if limited else (args.rounds or 10, args.per_round or 20)
    chosen = task.split("dev", rounds * per_round, args.seed)
    if len(chosen) < 2:
        raise ValueError(f"the dev split of --problems {args.problems} has {len(chosen)} problem: expected "
                         "two or more, one to fit and one to check")
    prompts = [encode_problems(task.load()[2], [problem], task)[0] for problem in chosen]
    longest = max(ids.shape[1] for ids in prompts)
    max_len = args.max_len or (POCKET_LEN if task.pocket else longest + ANSWER)
    if longest >= max_len:
        raise ValueError(f"--max-len {max_len}: expected more than the longest prompt of --problems, "
                         f"{longest} tokens")
    plan = Plan(max_len, rounds, len(chosen), repeats=1, longest_read=max(longest, 128), contexts=3,
                held_out=12, length=args.max_new_tokens) if limited else Plan(
        max_len, rounds, len(chosen), length=args.max_new_tokens or MAX_NEW_TOKENS)
    return task, prompts, plan, minutes


def samples_file(task: Task, plan: Plan, prompts: list[torch.Tensor], path: Path, seed: int) -> Rows:
    """Where times go as they are taken; one of another pair, machine, length, prompt or size of the cache is
    passed over."""
    slm, llm, *_ = task.load()
    world = {"slm": fingerprint(slm), "llm": fingerprint(llm), "machine": machine(task.device),
             "dtype": task.dtype, "threads": torch.get_num_threads(), "max_len": plan.max_len, "seed": seed,
             "torch": torch.__version__}
    digests = [hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:12] for ids in prompts]
    of_problem = [{"asked_length": plan.length, "prompt": digest} for digest in digests]
    return Rows(path, lambda row: tuple(row["key"]), lambda key: world | (
        of_problem[key[1]] if key[0] == "trajectory" and key[1] < len(of_problem) else {}))


def report_overhead(pair, args: argparse.Namespace, repeats: int = 300) -> None:
    """Measure, append and print what a token costs beside the forward pass."""
    row = overhead(pair, repeats) | provenance(args.seed, repeats, args.device, args.dtype)
    append_row(args.out or RESULTS / "overhead.jsonl", row)
    for name, figures in row.items():
        if isinstance(figures, dict):
            print(f"{name:20} {figures['ms']:.3f} ms (quartiles {figures['quartiles'][0]:.3f}, "
                  f"{figures['quartiles'][1]:.3f}), "
                  f"{100 * figures['share']:5.1f} % of a token's time")


def main() -> None:
    parser = build_parser()
    args = parser.parse_args()
    try:
        task, prompts, plan, minutes = prepare(args)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    pair, out = task.load()[:3], args.out or RESULTS / "latency.json"
    if args.overhead:
        return report_overhead(pair, args)
    store = samples_file(task, plan, prompts, out.with_suffix(".samples.jsonl"), args.seed)
    done = measure(pair, prompts, plan, store, args.seed, minutes)
    row = evaluate(done) | {"machine": machine(args.device), "threads": torch.get_num_threads(),
                            "length": plan.length or done[("length",)]["tokens"],
                            "minutes": round(sum(row["spent"] for row in done.values()) / 60, 1)}
    row |= provenance(args.seed, 1 + max(j for j, _ in trajectories(done)), args.device, args.dtype)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(row) + "\n")
    plot(row, out.with_suffix(".png"))
    print(show(row))


if __name__ == "__main__":
    start(main)

"""The latency model of a pair: fitted to a grid of steps and to steps of trajectories, checked on others.

    python -m analysis.latency               pocket pair
    python -m analysis.latency --overhead    what a token costs beside the forward pass
    P="--slm SMALL --llm LARGE --device cuda --dtype bfloat16"
    python -m analysis.latency $P --max-len 8192 --out pair.json

Rows: latency.json; overhead.jsonl with --overhead.
Feeds: the results page's section on latency, latency.png, and every fitted time.

Everything runs at batch 1, in one process and on one thread. Every round times the grid once, then points
that are held out, then the trajectories of a few problems by every method. A step that follows one of the
other model finds less in the processor's cache than one that is timed again and again, and one in a
trajectory is decided by its own router: so every other problem's steps are part of what is fitted, the time
from one result of the loop to the next, and the other problems are for checking. A trajectory's wall-clock is
the median of three whole `stitch` calls, other methods in between; its fitted latency sums over its forward
passes. Reference calls (single steps of the LLM) before and after each problem show how much the machine
drifted; a problem is calm where both are within 5 % of the run's median.
"""
import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import rstitch
from analysis.instruments.options import add_options, given
from analysis.instruments.progress import tracked
from analysis.instruments.provenance import provenance
from analysis.instruments.rows import RESULTS, append_row
from analysis.instruments.task import Prompting, Task, encode_problems
from analysis.instruments.timing import REFERENCE, now, reference_ms, rotated
from analysis.pocket.weights import MAX_NEW_TOKENS
from rstitch import fingerprint
from rstitch_hf.command import usable_device

METHODS = {
    "SLM alone": rstitch.SLMOnly(), "LLM alone": rstitch.LLMOnly(),
    "random, p 0.1": rstitch.RandomRouter(0.1),
    **{f"R-Stitch, tau {tau:g}": rstitch.EntropyRouter(tau) for tau in (0.001, 0.005, 0.02)}}


def grid_points(max_len: int) -> list[tuple[int, int]]:
    """(n_inf, n_kv) that span all calls of rows of up to max_len tokens."""
    sizes = [2**k for k in range(1, max_len.bit_length()) if 2**k <= max_len // 2]
    sizes += [3 * size // 2 for size in sizes[1:-1]]
    grid = [(n, int(kv)) for n in sorted(sizes) for kv in np.linspace(0, max_len - n, 5)]
    return [(1, int(kv)) for kv in np.linspace(0, max_len - 1, 15)] + grid


def held_out_points(max_len: int, n: int = 30, seed: int = 0) -> list[tuple[int, int]]:
    """Points between those of the grid, a third of them single tokens."""
    rng = np.random.default_rng(seed)
    sizes = [1] * (n // 3) + [int(x) for x in np.exp(rng.uniform(np.log(2), np.log(max_len / 2), n - n // 3))]
    return [(size, int(rng.integers(0, max_len - size))) for size in sizes]


def residuals(model: rstitch.LatencyModel, samples: list[rstitch.Sample]) -> dict:
    """Relative errors of the fit over points: the median of their size, and its 90th percentile."""
    errors = [abs(model.call(s.n_inf, s.n_kv) / s.ms - 1) for s in rstitch.medians(samples)]
    return {"median_error": float(np.median(errors)), "p90_error": float(np.percentile(errors, 90)),
            "points": len(errors)}


def trajectory_figures(fitted: np.ndarray, measured: np.ndarray) -> dict:
    """R^2 and the median relative error of fitted against measured milliseconds, as they are and after one
    common factor."""
    factor = float(np.median(measured / fitted))
    out: dict = {"n": len(fitted), "factor": factor}
    for suffix, x in (("", fitted), ("_after_factor", factor * fitted)):
        spread = ((measured - measured.mean()) ** 2).sum()
        out["r2" + suffix] = float(1 - ((measured - x) ** 2).sum() / spread)
        out["median_error" + suffix] = float(np.median(abs(x / measured - 1)))
    return out


def step_samples(calls: list[rstitch.Call], ends: list[list[float]]) -> dict[str, list[rstitch.Sample]]:
    """{"slm", "llm"}: the steps of a trajectory but the first, which no result comes before; each the median
    over runs, `ends` being when (s) its results came in each."""
    out: dict[str, list[rstitch.Sample]] = {"slm": [], "llm": []}
    for call, ms in zip(calls[1:], 1e3 * np.median(np.diff(ends), 0)):
        out[("slm", "llm")[call.model]].append(rstitch.Sample(call.n_inf, call.n_kv, float(ms)))
    return out


def answered(lms: dict, ids: torch.Tensor, j: int, seed: int, length: int) -> dict[str, tuple]:
    """(calls, median milliseconds, when the results of each run came in) of a problem by every method, three
    times each, methods interleaved."""
    calls, times, ends = {}, {name: [] for name in METHODS}, {name: [] for name in METHODS}
    for name in 3 * rotated(list(METHODS), j):
        came: list[float] = []
        begin = time.perf_counter()
        result = rstitch.stitch(lms["slm"], lms["llm"], ids, METHODS[name], seed=[seed],
                                max_new_tokens=length,
                                on_token=lambda *_: came.append(time.perf_counter()))
        times[name].append(1e3 * (time.perf_counter() - begin))
        ends[name].append(came)
        calls[name] = result.calls[0]
    return {name: (calls[name], float(np.median(times[name])), ends[name]) for name in METHODS}


def measure(pair, chosen: list, max_len: int, rounds: int, seed: int = 0,
            max_new_tokens: int = MAX_NEW_TOKENS, settings: Prompting = Prompting()) -> dict:
    """Interleaved samples, the problems spread over the rounds: {"slm", "llm"}: grid, {"slm held out", ...},
    {"slm steps", ...} of every other problem's trajectories; the other trajectories (method, problem, ms,
    calls); and the reference calls' ms before and after each of all problems."""
    slm, llm, tokenizer = pair
    lms = {"slm": rstitch.CachedLM(slm, 1, max_len), "llm": rstitch.CachedLM(llm, 1, max_len)}
    points, held = grid_points(max_len), held_out_points(max_len)
    samples: dict[str, list[rstitch.Sample]] = {}
    trajectories, references = [], []

    for i in tracked(range(rounds), "rounds"):
        for name, lm in lms.items():
            samples.setdefault(name, []).extend(rstitch.measure_latency(lm, points, repeats=1))
            samples.setdefault(name + " held out", []).extend(rstitch.measure_latency(lm, held, repeats=1))
        for j, problem in list(enumerate(chosen))[i * len(chosen) // rounds:(i + 1) * len(chosen) // rounds]:
            before = reference_ms(lms["llm"])
            ids, _ = encode_problems(tokenizer, [problem], settings)
            length = min(max_new_tokens, max_len - ids.shape[1])
            for name, (calls, ms, ends) in answered(lms, ids, j, 1000 * seed + j, length).items():
                if j % 2:
                    trajectories.append({"method": name, "problem": j, "ms": ms, "calls": calls})
                    continue
                for model, steps in step_samples(calls, ends).items():
                    samples.setdefault(model + " steps", []).extend(steps)
            references.append([before, reference_ms(lms["llm"])])
    for lm in lms.values():
        lm.close()
    return {"samples": samples, "trajectories": trajectories, "references": references}


def evaluate(measured: dict) -> dict:
    """Both fits with their residuals, and how well they predict trajectories, per method, over all and over
    calm problems."""
    samples, out = measured["samples"], {}
    models = {name: rstitch.LatencyModel.fit(samples[name] + samples[name + " steps"])
              for name in ("slm", "llm")}
    for name, model in models.items():
        out[name] = model.coefficients
        out[name + "_residuals"] = {what: residuals(model, samples[name + suffix])
                                    for what, suffix in (("grid", ""), ("steps of trajectories", " steps"),
                                                         ("held out", " held out"))}
        out[name + "_profile"] = rstitch.medians(samples[name])
        of_size: dict[int, list[float]] = {}
        for s in samples[name + " steps"]:
            of_size.setdefault(s.n_inf, []).append(model.call(s.n_inf, s.n_kv) / s.ms - 1)
        out[name + "_steps"] = [[n_inf, float(np.median(errors)), len(errors)]
                                for n_inf, errors in sorted(of_size.items())]
    calm = np.median(measured["references"])
    drift = [max(abs(np.array(pair) / calm - 1)) for pair in measured["references"]]
    out |= {"reference_ms": float(calm), "drift": drift, "trajectories": {}}
    for name in METHODS:
        chosen = [t for t in measured["trajectories"] if t["method"] == name]
        fitted = np.array([rstitch.trajectory_latency(t["calls"], models["slm"], models["llm"])
                           for t in chosen])
        ms = np.array([t["ms"] for t in chosen])
        quiet = np.array([drift[t["problem"]] <= 0.05 for t in chosen])
        out["trajectories"][name] = {"all": trajectory_figures(fitted, ms),
                                     "calm": trajectory_figures(fitted[quiet], ms[quiet]) if quiet.sum() > 2
                                     else None,
                                     "fitted_ms": fitted.round(2).tolist(),
                                     "measured_ms": ms.round(2).tolist()}
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
    lines.append(f"seed {row['seed']}, {row['device']}, {row['dtype']}, torch {row['torch']}, batch 1, one "
                 "thread")
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
    add("--max-len", type=int, default=384,
        help="longest row, prompt and answer, in tokens (default: %(default)s)")
    add("--rounds", type=int, default=10, help="rounds of grid and trajectories (default: %(default)s)")
    add("--per-round", type=int, default=20,
        help="problems a round, each answered by every method; every other one for the fit (default: "
             "%(default)s)")
    add("--seed", type=int, default=0, help="of the problems and of random switching (default: %(default)s)")
    add("--overhead", action="store_true", help="measure what a token costs beside the forward pass instead")
    add("--max-new-tokens", type=int, default=MAX_NEW_TOKENS,
        help="longest answer of a trajectory, in tokens (default: %(default)s)")
    add("--out", type=Path,
        help="where the fit goes, with a plot beside it, or the rows of --overhead (default, pocket pair "
             f"only: {RESULTS / 'latency.json'}, overhead.jsonl)")
    return parser


def prepare(args: argparse.Namespace) -> tuple[Task, list]:
    """The task and its problems. ValueError for options that cannot be."""
    task = Task(slm=args.slm, llm=args.llm, device=args.device, dtype=args.dtype, problems=args.problems,
                special_tokens_may_differ=args.special_tokens_may_differ, **given(args, Prompting))
    for name, least in (("max_len", REFERENCE[1] + 1), ("rounds", 1), ("per_round", 1),
                        ("max_new_tokens", 1)):
        rstitch.check_count(f"--{name.replace('_', '-')}", getattr(args, name), least)
    if not args.out and not task.pocket:
        raise ValueError("--out is missing: expected a file for a pair or problems that are not the pocket's")
    chosen = task.split("dev", args.rounds * args.per_round, args.seed)
    longest = encode_problems(task.load()[2], chosen, task)[0].shape[1]
    if longest >= args.max_len:
        raise ValueError(f"--max-len {args.max_len}: expected more than the longest prompt of --problems, "
                         f"{longest} tokens")
    return task, chosen


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
    torch.set_num_threads(1)
    try:
        task, chosen = prepare(args)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    pair, out = task.load()[:3], args.out or RESULTS / "latency.json"
    if args.overhead:
        return report_overhead(pair, args)
    measured = measure(pair, chosen, args.max_len, args.rounds, args.seed, args.max_new_tokens, task)
    row = evaluate(measured) | provenance(args.seed, len(chosen), args.device, args.dtype)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(row) + "\n")
    plot(row, out.with_suffix(".png"))
    print(show(row))


if __name__ == "__main__":
    main()

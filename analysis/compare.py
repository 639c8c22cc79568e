"""Every router at the same LLM share, running: R2R, R-Stitch, R-Stitch+, entropy with one-token visits, random, live labels.

    python -m analysis.compare                     (appends to analysis/results/compare.jsonl, skips what is there, prints all)

A family of routers has one knob. It is turned over a grid on the calibration split, running; the knob for a wanted share is read off
by interpolation (where several would do, as with R-Stitch, the one that was most accurate there). Test problems are the same for all.
A share is met within some tenths of a point only, and a point can be worth twenty in accuracy: so routers are compared at exactly the
wanted share, on the line between their neighbouring test runs (the SLM alone is everybody's run at share 0), drawn anew in every
bootstrap sample. Labels sit on the LLM's trajectories, running does not: R2R's share on them, offline, is printed beside the one it reached.

Live labels are made while running: where the SLM's token differs from what the LLM would write, both go on to the end of the
sentence and the judge compares them. A reference point and no bound: it looks one sentence ahead, and costs far more than the LLM alone.
"""
import argparse
import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import rstitch
from analysis import label
from analysis.common import MODELS, RESULTS, append_row, load_pocket, make_pool, provenance, read_rows, solve
from analysis.latency import load_latency
from analysis.problems import problems, question
from analysis.report import describe
from analysis.stats import net_time
from analysis.train_policy import BASE, POLICIES, load_router
from analysis.train_r2r import ROUTER, load_r2r

SHARES = (0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.1, 0.15, 0.2, 0.3)
N_CALIBRATION, N_TEST, N_LIVE, SEED = 300, 1000, 300, 0
ASKED_ABOVE = 0.02  # tau of that policy


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def r2r_router(pair, x: float):
    router = load_r2r(ROUTER, pair)
    return rstitch.R2RRouter(router.net, sigmoid(x))


def policy_router(pair, x: float):
    """R-Stitch+ that calls the LLM where its policy's logit exceeds x; 0 is the policy as trained."""
    router = load_router(POLICIES / BASE, pair)
    router.policy.mlp[-1].bias.data -= x
    return router


@dataclass(frozen=True)
class Family:
    """Routers by one knob; `grid` is what the calibration split is run with."""

    build: Callable[[tuple, float], object]
    grid: tuple[float, ...]


LOG_TAUS = tuple(np.log(np.geomspace(0.0004, 0.5, 18)).tolist())
FAMILIES = {
    "R2R": Family(r2r_router, tuple(np.linspace(-12, 10, 18).tolist())),
    "R-Stitch": Family(lambda pair, x: rstitch.EntropyRouter(math.exp(x)), LOG_TAUS),
    "entropy, one token": Family(lambda pair, x: rstitch.EntropyRouter(math.exp(x), tau_back=1.0), LOG_TAUS),
    "R-Stitch+": Family(policy_router, (-30.0, *np.linspace(-6, 6, 12).tolist())),
    "random": Family(lambda pair, x: rstitch.RandomRouter(x, seed=SEED), tuple(np.linspace(0.01, 0.32, 6).tolist())),
}


def knob_for(target: float, knobs: Sequence[float], shares: Sequence[float], accuracies: Sequence[float]) -> float | None:
    """Where the share, linear between neighbouring knobs, is the target; of several such places the most accurate. None if nowhere."""
    found = []
    for (a, s, right), (b, s_b, right_b) in zip(zip(knobs, shares, accuracies), zip(knobs[1:], shares[1:], accuracies[1:])):
        if min(s, s_b) <= target <= max(s, s_b):
            w = (target - s) / (s_b - s) if s_b != s else 0.0
            found.append((right + w * (right_b - right), a + w * (b - a)))
    return max(found)[1] if found else None


class LiveLabels:
    """Leaves the SLM, for one token, where its own would lead the reasoning astray: R2R's labels, made while running."""

    def __init__(self, settings: label.Settings, questions: Sequence[str]):
        self.settings, self.questions = settings, list(questions)
        self.slm, self.llm, tokenizer, self.eos = label.models_of(settings)
        self.decode, self.judge = label.decoder(tokenizer), label.build_judge(settings.judge, settings.device, settings.dtype)
        prompts = rstitch.unpadded(*rstitch.encode(tokenizer, *self.questions))
        self.rows = [rstitch.Row(i, 0, list(ids), len(ids), rstitch.SLM, []) for i, ids in enumerate(prompts)]
        self.lm = rstitch.CachedLM(self.llm, len(prompts), max(map(len, prompts)) + settings.max_new_tokens)

    def llm_tokens(self, rows: list[rstitch.Row], vocab: int) -> dict[int, int]:
        """What the LLM would write next."""
        choice = {}
        for group in rstitch.similar_lengths(rows, self.lm):
            out = self.lm.read([r.index for r in group], [r.ids[self.lm.cursor[r.index]:] for r in group], vocab)
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
        text = [None if m is None else self.decode(answer[start:] + m) for (_, answer, start), m in zip(todo, more)]
        cases = {row.index: label.Case(self.questions[row.index], self.decode(todo[2 * k][1][:todo[2 * k][2]]), text[2 * k], text[2 * k + 1])
                 for k, (row, _) in enumerate(differ) if None not in text[2 * k:2 * k + 2]}
        same = dict(zip(cases, self.judge(list(cases.values())))) if cases else {}
        leave = [choice[row.index] != token and same.get(row.index) is not True for row, token in zip(rows, proposed)]  # unjudged: ask the LLM
        for row, token, left in zip(rows, proposed, leave):
            if not left:
                row.ids.append(token)
        return torch.tensor(leave, device=step.token.device)

    def leave_llm(self, step: rstitch.Step) -> torch.Tensor:
        for i, token in zip(step.rows, step.token.tolist()):
            self.rows[i].ids.append(token)
        return torch.ones_like(step.token, dtype=torch.bool)


@lru_cache(maxsize=None)
def pocket():
    torch.set_num_threads(1)
    return load_pocket()


def row_of(family: str, x: float | None, split: str, n: int, target: float | None = None) -> dict:
    """One router over the first n problems of a split, greedy."""
    pair, models = pocket(), load_latency()
    router = FAMILIES[family].build(pair, x) if family in FAMILIES else rstitch.SLMOnly()
    solved = solve(pair, problems(split, n, SEED), router, label=family, seed=SEED, progress=False)
    ms = [round(rstitch.trajectory_latency(s["calls"], *models), 2) for s in solved]
    above = ASKED_ABOVE * math.log(min(m.get_output_embeddings().weight.shape[0] for m in pair[:2]))
    asked = [sum(c.model == rstitch.SLM and c.entropy > above for c in s["calls"]) for s in solved]
    outcomes = {"outcomes": [[int(s["correct"]), s["tokens"], s["llm_tokens"], x] for s, x in zip(solved, ms)]} if split == "test" else {}
    return {"kind": split, "family": family, "target": target, "knob": x, **describe(solved), "latency_ms": float(np.mean(ms)),
            "asked_above_tau": float(np.mean(asked)), **outcomes, **provenance(SEED, n)}


def live_row(n: int) -> dict:
    """Live labels over the first n test problems."""
    pair, chosen = pocket(), problems("test", n, SEED)
    solved = []
    for at in range(0, n, 100):
        part = chosen[at:at + 100]
        router = LiveLabels(label.Settings(), [question(p) for p in part])
        solved += solve(pair, part, router, batch_size=len(part), seed=SEED, progress=False)
        router.lm.close()
    return {"kind": "live labels", "family": "live labels", "target": None, "knob": None, **describe(solved),
            "outcomes": [[int(s["correct"]), s["tokens"], s["llm_tokens"], None] for s in solved], **provenance(SEED, n)}


@torch.no_grad()
def router_times(repeats: int = 300) -> dict:
    """Milliseconds that one decision takes at batch 1, medians, interleaved."""
    pair = pocket()
    lm = rstitch.CachedLM(pair[0], 1, 128)
    lm.read([0], [[5] * 100])
    out = lm.read([0], [[5]])
    step = rstitch.Step([0], [0], out.logits, out.hidden, out.token, torch.ones_like(out.entropy), torch.tensor([60]), torch.tensor([101]),
                        torch.zeros(1, 0))
    times: dict[str, list[float]] = {}
    routers = {name: FAMILIES[name].build(pair, 0.0) for name in ("R2R", "R-Stitch+")}
    for _ in range(repeats):
        for name, router in routers.items():
            start = time.perf_counter()
            router.leave_slm(step).tolist()
            times.setdefault(name, []).append(1e3 * (time.perf_counter() - start))
    lm.close()
    return {"kind": "router times", "family": None, "target": None, "ms": {name: float(np.median(ms)) for name, ms in times.items()}, **provenance(SEED, repeats)}


@lru_cache(maxsize=None)
def made_with(family: str | None) -> str:
    """Changes where rows of this family have to be computed anew: with the pair, the fitted latency and the family's own net."""
    nets = {"R2R": [ROUTER / "router.safetensors"], "R-Stitch+": [POLICIES / BASE / "policy.safetensors"]}
    files = [MODELS / name / "model.safetensors" for name in ("slm", "llm")] + nets.get(family, sum(nets.values(), []) if family is None else [])
    times = json.dumps([model.coefficients for model in load_latency()])
    return hashlib.sha256(times.encode() + b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def run(path: Path = RESULTS / "compare.jsonl", n_calibration: int = N_CALIBRATION, n_test: int = N_TEST, n_live: int = N_LIVE, workers: int = 2) -> list[dict]:
    """Compute what `path` lacks, a row at a time; the rows that count."""

    def current() -> dict[tuple, dict]:
        return {(r["kind"], r["family"], r.get("knob"), r["n"]): r for r in read_rows(path) if r["made_with"] == made_with(r["family"])}

    with make_pool(workers, __name__) as pool:

        def complete(jobs: dict[tuple, tuple]) -> dict[tuple, dict]:
            have = current()
            running = {pool.submit(*call): (key, made_with(key[1])) for key, call in jobs.items() if key not in have}
            for job in tqdm(as_completed(running), total=len(running), desc="routers", disable=None):
                append_row(path, job.result() | {"made_with": running[job][1]})
            have = current()
            return {key: have[key] for key in jobs}

        live, alone = ("live labels", "live labels", None, n_live), ("test", "SLM alone", None, n_test)
        rows = complete({live: (live_row, n_live), alone: (row_of, "SLM alone", None, "test", n_test, 0.0)}
                        | {("calibration", name, x, n_calibration): (row_of, name, x, "calibration", n_calibration)
                           for name, family in FAMILIES.items() for x in family.grid})
        todo = {}
        for name, family in FAMILIES.items():
            grid = [rows["calibration", name, x, n_calibration] for x in family.grid]
            for target in SHARES:
                x = knob_for(target, family.grid, [r["llm_share"] for r in grid], [r["accuracy"] for r in grid])
                if x is not None:
                    todo["test", name, x, n_test] = row_of, name, x, "test", n_test, target
        rows |= complete(todo)
    key = ("router times", None, None, 300)
    if key not in current():
        append_row(path, router_times(key[3]) | {"made_with": made_with(None)})
    return [*rows.values(), current()[key]]


def activated(row: dict, parameters: tuple[int, int]) -> float:
    """Average activated parameters per kept token, as R2R counts them: a pass of a model activates all of it. Catch-up is apart."""
    return (row["slm_passes"] * parameters[0] + row["llm_passes"] * parameters[1]) / row["tokens"]


def with_router(row: dict, ms: dict[str, float]) -> float:
    """Fitted latency and the time of the router's own net."""
    return row["latency_ms"] + net_time(row, ms)


def at_share(rows: list[dict], target: float, weights: np.ndarray) -> np.ndarray:
    """(draws,) accuracy at exactly this LLM share, on the line between the neighbouring runs of one family, for weights (draws, n) of the
    problems. NaN where no run has as large a share."""
    right, tokens, large = (np.array([[o[k] for o in r["outcomes"][:weights.shape[1]]] for r in rows], float) for k in (0, 1, 2))  # (k, n) each
    shares, accuracies = weights @ large.T / (weights @ tokens.T), weights @ right.T  # (draws, k)
    out = []
    for share, accuracy in zip(shares, accuracies):
        order = np.argsort(share, kind="stable")
        out.append(np.interp(target, share[order], accuracy[order], right=accuracy[order][-1] if target <= share.max() + 0.005 else np.nan))
    return np.array(out)


def difference(a: list[dict], b: list[dict], target: float, n: int, draws: int = 1000, seed: int = 0) -> tuple[float, float, float]:
    """Accuracy of family a minus that of b at the same share, over the first n problems, in percentage points, with a paired 95 % interval."""
    weights = np.vstack([np.full(n, 1 / n), np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), draws) / n])
    delta = 100 * (at_share(a, target, weights) - at_share(b, target, weights))
    return float(delta[0]), *map(float, np.nanpercentile(delta[1:], [2.5, 97.5]))


def by_family(rows: list[dict]) -> dict[str, list[dict]]:
    """The test runs of each family, the SLM alone in all of them."""
    test = [r for r in rows if r["kind"] == "test"]
    return {name: [r for r in test if r["family"] in (name, "SLM alone")] for name in FAMILIES}


def in_brackets(x: tuple[float, float, float]) -> str:
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*x)


def show(rows: list[dict], parameters: tuple[int, int], usage: Callable[[float], float]) -> str:
    """Every test run as it was, then the live labels and the conditions. `usage`: R2R's share on the LLM's trajectories at a threshold."""
    ms, runs = next(r["ms"] for r in rows if r["kind"] == "router times"), by_family(rows)
    lines = [f"{'router':20} {'LLM share wanted, reached, %':>29} {'right, % [95 %] (higher is better)':>35} {'tokens':>7} {'fitted ms':>10} {'with router':>12}"
             f" {'activated, M':>13} {'catch-up':>9}"]
    for name, family in runs.items():
        for r in sorted(family, key=lambda r: r["llm_share"]):
            right = f"{100 * r['accuracy']:.1f} [{100 * r['accuracy_95'][0]:.1f}, {100 * r['accuracy_95'][1]:.1f}]"
            offline = f"   offline {100 * usage(sigmoid(r['knob'])):.1f} %" if r["family"] == "R2R" else ""
            lines.append(f"{name:20} {100 * r['target']:>19g} {100 * r['llm_share']:>9.1f} {right:>35} {r['tokens']:>7.1f} {r['latency_ms']:>10.1f} {with_router(r, ms):>12.1f}"
                         f" {activated(r, parameters) / 1e6:>13.3f} {r['llm_catch_up_tokens']:>9.1f}{offline}")
    live = next(r for r in rows if r["kind"] == "live labels")
    lines.append(f"live labels: {100 * live['accuracy']:.1f} % right [{100 * live['accuracy_95'][0]:.1f}, {100 * live['accuracy_95'][1]:.1f}] at {100 * live['llm_share']:.1f} % LLM tokens, "
                 f"{live['tokens']:.1f} tokens, {activated(live, parameters) / 1e6:.3f} M activated (the labels' own work not counted), n = {live['n']}; a reference point, not a bound; "
                 f"on these problems at this share R2R is right more often by {in_brackets(difference(runs['R2R'], [live], live['llm_share'], live['n']))} pp")
    r = runs["R2R"][0]
    lines.append(f"n = {r['n']} test problems, greedy, seed {r['seed']}, {r['device']}, {r['dtype']}, torch {r['torch']}, transformers {r['transformers']}; knobs set on "
                 f"{next(r for r in rows if r['kind'] == 'calibration')['n']} calibration problems; a decision of R2R's net takes {ms['R2R']:.2f} ms, of R-Stitch+'s {ms['R-Stitch+']:.2f} ms")
    return "\n".join(lines)


def table(rows: list[dict]) -> str:
    """Right answers at exactly the same share, and R2R's lead, as the README has it."""
    runs, others = by_family(rows), [name for name in FAMILIES if name != "R2R"]
    n = len(runs["R2R"][0]["outcomes"])
    once = np.full((1, n), 1 / n)
    lines = ["| LLM share, % | R2R | " + " | ".join(others) + " | " + " | ".join(f"R2R - {name}, pp" for name in others if name != "random") + " |", "|" + "---|" * (2 * len(others) + 1)]
    for target in SHARES:
        right = {name: float(at_share(family, target, once)[0]) for name, family in runs.items()}
        cells = [f"{100 * target:g}", *("" if math.isnan(right[name]) else f"{100 * right[name]:.1f}" for name in ("R2R", *others))]
        cells += ["" if math.isnan(right[name] + right["R2R"]) else in_brackets(difference(runs["R2R"], runs[name], target, n)) for name in others if name != "random"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def offline_usage(folder: Path = ROUTER) -> Callable[[float], float]:
    """R2R's share of the tokens of the LLM's own trajectories, test split, as a function of the threshold."""
    threshold, share, _ = np.array(json.loads((folder / "made.json").read_text())["test"]["recall_usage"]).T
    return lambda t: float(np.interp(t, threshold[::-1], share[::-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="processes (default: %(default)s)")
    args = parser.parse_args()
    try:
        rstitch.check_count("--workers", args.workers)
    except ValueError as error:
        parser.error(str(error))
    rows = run(workers=args.workers)
    parameters = tuple(sum(p.numel() for p in model.parameters()) for model in pocket()[:2])
    print(show(rows, parameters, offline_usage()), "Right answers in % at exactly the same LLM share, on the lines between these runs; R2R's lead with paired 95 % intervals:",
          table(rows), sep="\n\n")


if __name__ == "__main__":
    main()

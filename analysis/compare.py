"""Every router at the same LLM share, running: R2R, R-Stitch, R-Stitch+, entropy with one-token visits, random, live labels.

    python -m analysis.compare                     (appends to analysis/results/compare.jsonl, skips what is there, prints all)

A family of routers has one knob. It is turned over a grid on the calibration split, running; the knob for a wanted share is read off
by interpolation (where several would do, as with R-Stitch, the one that was most accurate there). Test problems are the same for all.
Labels sit on the LLM's trajectories, running does not: R2R's share on them, offline, is printed beside the one it reached.

Live labels are made while running: where the SLM's token differs from what the LLM would write, both go on to the end of the
sentence and the judge compares them. A reference point and no bound: it looks one sentence ahead, and costs far more than the LLM alone.
"""
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
from analysis.common import RESULTS, append_row, bootstrap, load_pocket, make_pool, provenance, read_rows, solve
from analysis.latency import load_latency
from analysis.problems import problems, question
from analysis.report import describe
from analysis.train_policy import POLICIES, load_router
from analysis.train_r2r import ROUTER, load_r2r

SHARES = (0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3)
N_CALIBRATION, N_TEST, N_LIVE, SEED = 300, 1000, 300, 0
POLICY = "kappa0.35-seed0"
ASKED_ABOVE = 0.02  # tau of that policy


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def r2r_router(pair, x: float):
    router = load_r2r(ROUTER, pair)
    return rstitch.R2RRouter(router.net, sigmoid(x))


def policy_router(pair, x: float):
    """R-Stitch+ that calls the LLM where its policy's logit exceeds x; 0 is the policy as trained."""
    router = load_router(POLICIES / POLICY, pair)
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


def row_of(family: str, x: float, split: str, n: int, target: float | None = None) -> dict:
    """One router over the first n problems of a split, greedy."""
    pair, models = pocket(), load_latency()
    router = FAMILIES[family].build(pair, x)
    solved = solve(pair, problems(split, n, SEED), router, label=family, seed=SEED, progress=False)
    ms = [round(rstitch.trajectory_latency(s["calls"], *models), 2) for s in solved]
    above = ASKED_ABOVE * math.log(min(m.get_output_embeddings().weight.shape[0] for m in pair[:2]))
    asked = [sum(c.model == rstitch.SLM and c.entropy > above for c in s["calls"]) for s in solved]
    outcomes = {"outcomes": [[int(s["correct"]), s["tokens"], x] for s, x in zip(solved, ms)]} if split == "test" else {}
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
            "outcomes": [[int(s["correct"]), s["tokens"], None] for s in solved], **provenance(SEED, n)}


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


def made_with(family: str | None) -> str:
    """Changes where rows of this family have to be computed anew."""
    files = {"R2R": [ROUTER / "router.safetensors"], "R-Stitch+": [POLICIES / POLICY / "policy.safetensors"]}.get(family, [])
    times = json.dumps([model.coefficients for model in load_latency()])
    return hashlib.sha256(times.encode() + b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def run(path: Path = RESULTS / "compare.jsonl", n_calibration: int = N_CALIBRATION, n_test: int = N_TEST, n_live: int = N_LIVE, workers: int = 2) -> list[dict]:
    """Compute what `path` lacks, a row at a time."""

    def current() -> dict[tuple, dict]:
        return {(r["kind"], r["family"], r["target"] if r["kind"] == "test" else r.get("knob")): r
                for r in read_rows(path) if r["made_with"] == made_with(r["family"])}

    with make_pool(workers, __name__) as pool:

        def complete(jobs: dict[tuple, tuple]) -> dict[tuple, dict]:
            have = current()
            running = {pool.submit(*call): key for key, call in jobs.items() if key not in have}
            for job in tqdm(as_completed(running), total=len(running), desc="routers", disable=None):
                append_row(path, job.result() | {"made_with": made_with(running[job][1])})
            return current()

        rows = complete({("live labels", "live labels", None): (live_row, n_live)}
                        | {("calibration", name, x): (row_of, name, x, "calibration", n_calibration) for name, family in FAMILIES.items() for x in family.grid})
        todo = {}
        for name, family in FAMILIES.items():
            grid = [rows["calibration", name, x] for x in family.grid]
            for target in SHARES:
                x = knob_for(target, family.grid, [r["llm_share"] for r in grid], [r["accuracy"] for r in grid])
                if x is not None:
                    todo["test", name, target] = row_of, name, x, "test", n_test, target
        rows = complete(todo)
    if ("router times", None, None) not in rows:
        append_row(path, router_times() | {"made_with": made_with(None)})
        rows = current()
    return list(rows.values())


def activated(row: dict, parameters: tuple[int, int]) -> float:
    """Average activated parameters per kept token, as R2R counts them: a pass of a model activates all of it. Catch-up is apart."""
    return (row["slm_passes"] * parameters[0] + row["llm_passes"] * parameters[1]) / row["tokens"]


def with_router(row: dict, ms: dict[str, float]) -> float:
    """Fitted latency and the time of the router's own net: R2R's is asked at every SLM token, R-Stitch+'s above tau."""
    asked = {"R2R": row["slm_passes"], "R-Stitch+": row["asked_above_tau"]}.get(row["family"], 0.0)
    return row["latency_ms"] + asked * ms.get(row["family"], 0.0)


def difference(a: dict, b: dict) -> tuple[float, float, float]:
    """Accuracy of a minus that of b on the problems both answered, in percentage points, with a paired 95 % interval."""
    n = min(len(a["outcomes"]), len(b["outcomes"]))
    delta = 100.0 * (np.array([o[0] for o in a["outcomes"][:n]]) - np.array([o[0] for o in b["outcomes"][:n]]))
    return float(delta.mean()), *bootstrap(np.mean, delta)


def show(rows: list[dict], parameters: tuple[int, int], usage: Callable[[float], float]) -> str:
    """`usage`: R2R's share on the LLM's trajectories at a threshold."""
    ms = next(r["ms"] for r in rows if r["kind"] == "router times")
    test = {(r["family"], r["target"]): r for r in rows if r["kind"] == "test"}
    lines = [f"{'LLM share wanted, %':20} {'router':20} {'reached, %':>10} {'right, % [95 %] (higher is better)':>35} {'tokens':>7} {'fitted ms':>10} {'with router':>12}"
             f" {'activated, M':>13} {'catch-up':>9} {'R2R is right more often by, pp [95 %]':>38}"]
    for target in SHARES:
        for name in FAMILIES:
            r = test.get((name, target))
            if r is None:
                lines.append(f"{100 * target:<20g} {name:20} {'not reached by any knob':>10}")
                continue
            right = f"{100 * r['accuracy']:.1f} [{100 * r['accuracy_95'][0]:.1f}, {100 * r['accuracy_95'][1]:.1f}]"
            gain = "" if name == "R2R" or ("R2R", target) not in test else "{:+.1f} [{:+.1f}, {:+.1f}]".format(*difference(test["R2R", target], r))
            offline = f"   offline {100 * usage(sigmoid(r['knob'])):.1f} %" if name == "R2R" else ""
            lines.append(f"{100 * target:<20g} {name:20} {100 * r['llm_share']:>10.1f} {right:>35} {r['tokens']:>7.1f} {r['latency_ms']:>10.1f} {with_router(r, ms):>12.1f}"
                         f" {activated(r, parameters) / 1e6:>13.3f} {r['llm_catch_up_tokens']:>9.1f} {gain:>38}{offline}")
    live = next(r for r in rows if r["kind"] == "live labels")
    lines.append(f"live labels: {100 * live['accuracy']:.1f} % right [{100 * live['accuracy_95'][0]:.1f}, {100 * live['accuracy_95'][1]:.1f}] at {100 * live['llm_share']:.1f} % LLM tokens, "
                 f"{live['tokens']:.1f} tokens, n = {live['n']}; a reference point, not a bound")
    r = next(iter(test.values()))
    lines.append(f"n = {r['n']} test problems, greedy, seed {r['seed']}, {r['device']}, {r['dtype']}, torch {r['torch']}, transformers {r['transformers']}; knobs set on "
                 f"{next(r for r in rows if r['kind'] == 'calibration')['n']} calibration problems; a decision of R2R's net takes {ms['R2R']:.2f} ms, of R-Stitch+'s {ms['R-Stitch+']:.2f} ms")
    return "\n".join(lines)


def main() -> None:
    rows = run()
    made = json.loads((ROUTER / "made.json").read_text())
    threshold, share, _ = np.array(made["test"]["recall_usage"]).T
    parameters = tuple(sum(p.numel() for p in model.parameters()) for model in pocket()[:2])
    print(show(rows, parameters, lambda t: float(np.interp(t, threshold[::-1], share[::-1]))))


if __name__ == "__main__":
    main()

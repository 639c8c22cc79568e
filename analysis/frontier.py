"""Learned routers against fixed thresholds: accuracy and fitted latency on the same test problems.

    python -m analysis.frontier              skips what is there, prints all

Rows: frontier.jsonl.
Feeds: the results page's tables of R-Stitch+ and of its ablations; notebook 4.

The frontier is what fixed rules reach: one threshold, a threshold on a windowed entropy, two thresholds,
either model alone, interpolated between neighbours. The gap of a method is 1 - its latency / the frontier's
latency at its accuracy; positive is better than every fixed rule. A second, stricter gap is against mixtures
too: which of two fixed rules answers a problem is drawn at random, so that every chord between two points can
be had, and the frontier is their lower convex hull.

A policy calls the LLM where its logit is above 0, or above the threshold that its training has set on
calibration problems. One without such a threshold is also run with the logit that earns the highest mean
reward there, at the price it was trained with, as R2R's threshold is set; of several policies, those of a
recipe with seeds. The time of its nets is in a policy's latency if it was trained with it; of the others
notebook 4 adds it.
"""
import argparse
import json

import numpy as np
from scipy.special import expit

import rstitch
from analysis.instruments.options import add_options, given
from analysis.instruments.provenance import provenance
from analysis.instruments.rows import current, read_rows
from analysis.instruments.runs import Rows
from analysis.instruments.stats import (
    bootstrap,
    frontier_gap,
    gap_with_interval,
    net_time,
    outcomes_of,
    ratio_of_means,
    signed,
    with_interval,
)
from analysis.instruments.task import (
    BASE,
    N_CALIBRATION,
    N_TIMED,
    SEED,
    TAUS,
    Task,
    common_vocab,
    cut_off,
    decision_ms,
    digest_of,
    measure,
    wall_clock,
)
from analysis.train_policy import ABOVE, RUNS, Price, answer
from rstitch_hf.ranks import start

FIXED = {
    **{f"tau {tau:g}": rstitch.EntropyRouter(tau) for tau in (*TAUS, 0.0035, 0.007)},
    **{f"tau {tau:g}, window {w}": rstitch.EntropyRouter(tau, window=w) for w in (2, 4, 8)
       for tau in (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02)},
    **{f"tau {tau:g}, back at {back:g}": rstitch.EntropyRouter(tau, tau_back=back)
       for tau in (0.0005, 0.001, 0.002, 0.005) for back in (0.02, 0.1, 1.0)},
    **{f"tau {tau:g}, back at {back:g}": rstitch.EntropyRouter(tau, tau_back=back)
       for tau in (0.01, 0.02, 0.03, 0.05, 0.1) for back in (0.2, 1.0)},
    "SLM alone": rstitch.SLMOnly(), "LLM alone": rstitch.LLMOnly(),
}
KAPPAS = ("0.1", "0.35", "0.8")
ORDER = ("policy", "calibrated", "random", "fixed")
ABLATIONS = [  # what was changed, the policy to compare it with: one seed each
    ("no-gate-third", "gate-third"), ("no-gate-even", "gate-even"), ("no-gate-triple", "gate-triple"),
    ("hidden-only", "no-entropy"),
    *((f"labels-{part}", "labels-kappa0.35-seed0") for part in ("cold", "no-rewards", "answers", "offline",
                                                                "uncalibrated")),
    ("labels-offline", "labels-no-rewards"),
    *((f"labels-offline-kappa{kappa}", f"labels-kappa{kappa}-seed0") for kappa in ("0.1", "0.8")),
    *((name, BASE) for name in ("no-context", "no-entropy", "hand-back", "clip-symmetric", "advantages-none",
                                "advantages-std", "dynamic-accuracy"))]


def made(task: Task, name: str) -> dict:
    """How a policy was made."""
    return rstitch.made_of(task.path("policies") / name)


def made_with(task: Task, kind: str, name: str) -> str:
    """Changes where a row of this kind and name has to be computed anew: with the task, and with a policy's
    weights and thresholds."""
    if kind == "fixed":
        return digest_of(task)
    also = f"{N_CALIBRATION} {ABOVE}" if kind == "calibrated" else ""
    if own := made(task, name).get("thresholds"):
        also += f"{own}"
    return digest_of(task, task.path("policies") / name / "policy.safetensors", also=also)


def policy_of(task: Task, name: str, above: float | None = None) -> rstitch.PolicyRouter:
    """A trained policy, which calls the LLM where its logit exceeds `above`, or as it was made to."""
    return rstitch.PolicyRouter.load(task.path("policies") / name, *task.load()[:2],
                                     threshold=None if above is None else expit(above))


def form_of(task: Task, name: str) -> str:
    """What the time of a policy's nets depends on, whatever their weights."""
    by = made(task, name)
    sizes = ("net", "width", "hand_back", "use_entropy", "use_context")
    return json.dumps({name: by["config"].get(name) for name in sizes} | {"r2r": by.get("r2r")})


def nets_row(task: Task, by_form: dict[str, str]) -> dict:
    """Milliseconds that a decision of each net takes, by form; a policy of each, in turn."""
    ms = decision_ms(task, {form: policy_of(task, name) for form, name in by_form.items()},
                     task.split("calibration", N_TIMED))
    return {"kind": "router times", "name": "router times", "ms": ms,
            **provenance(SEED, N_TIMED, task.device, task.dtype)}


def row_of(task: Task, kind: str, name: str, n: int, p: float | None = None,
           nets_ms: dict[str, float] | None = None) -> dict:
    """One method over the first n test problems, greedy; with nets_ms the time of its nets counts."""
    router = (policy_of(task, name) if kind == "policy" else FIXED[name] if kind == "fixed"
              else rstitch.RandomRouter(p, seed=SEED))
    return {"kind": kind, "name": name, "p": p, "nets_ms": nets_ms,
            **measure(task, router, "test", n, nets_ms=nets_ms)}


def calibrated_row(task: Task, name: str, n: int, nets_ms: dict[str, float] | None = None) -> dict:
    """A policy over the first n test problems, calling the LLM above the logit that earns most on calibration
    problems."""
    by = made(task, name)
    price = Price(by["lam"], task.latencies(), common_vocab(task.load()), by["config"]["gate"], nets_ms)
    chosen = task.split("calibration", N_CALIBRATION)
    curve = [[above, answer(task, chosen, policy_of(task, name, above), price)[2]["reward"]]
             for above in ABOVE]
    above = max(curve, key=lambda point: (point[1], -abs(point[0])))[0]
    return {"kind": "calibrated", "name": name, "above": above, "curve": curve, "nets_ms": nets_ms,
            **measure(task, policy_of(task, name, above), "test", n, nets_ms=nets_ms)}


def timed_row(task: Task, names: list[str], n: int) -> dict:
    """Wall-clock of methods over the first n test problems."""
    routers = {name: FIXED.get(name) or policy_of(task, name) for name in names}
    return {"kind": "wall-clock", "name": "wall-clock", **wall_clock(task, routers, n)}


def run(task: Task, n: int, n_wall: int, workers: int) -> list[dict]:
    """Compute what frontier.jsonl lacks, a row at a time: fixed rules, policies, policies with their logits
    calibrated, random switching at the share of the policies, wall-clock; the last three, where names end in
    seeds, for those. Rows of other weights, problems or latencies are passed over."""
    path, n = task.needed("out") / "frontier.jsonl", len(task.split("test", n))
    policies = sorted(file.parent.name
                      for file in task.path("policies").glob("*/made.json")) if task.path("policies") else []
    for name in policies:
        policy_of(task, name)  # one of another pair is told now
    marks = dict.fromkeys((("fixed", name) for name in FIXED),
                          made_with(task, "fixed", "")) | {(kind, name): made_with(task, kind, name)
                                                           for kind in ORDER if kind != "fixed"
                                                           for name in policies}
    seeded = [name for name in policies if "-seed" in name] or policies
    marks["wall-clock", "wall-clock"] = digest_of(task, also=f"{n_wall}"
                                                  + "".join(marks["policy", name] for name in seeded))

    ms: dict[str, dict] = {}  # of a decision of each net, by policy
    store = Rows(path, lambda row: (row["kind"], row["name"]),
                 lambda key: {"made_with": marks.get(key)} | ({"n": n} if key[0] in ORDER else {})
                 | ({"nets_ms": ms.get(key[1])} if key[0] in ("policy", "calibrated") else {}))

    # Where a policy was trained with the time of its nets it counts, taken anew, forms side by side.
    forms = {name: form_of(task, name) for name in policies if made(task, name).get("nets_ms")}
    by_form = {form: name for name, form in reversed(forms.items())}
    marks["router times", "router times"] = digest_of(task, also="".join(sorted(by_form)))
    if forms:
        job = {("router times", "router times"): (nets_row, task, by_form)}
        taken = store.fill(job, 1, "router times")["router times", "router times"]["ms"]
        ms = {name: taken[form] for name, form in forms.items()}

    def complete(jobs: list[tuple]) -> dict[tuple[str, str], dict]:
        functions = {(kind, name): (calibrated_row, task, name, n, ms.get(name)) if kind == "calibrated"
                     else (row_of, task, kind, name, n, *p) for kind, name, *p in jobs}
        return store.fill(functions, workers, "methods")

    rows = complete([("fixed", name) for name in FIXED]
                    + [("policy", name, None, ms.get(name)) for name in policies])
    rows = complete([("random", name, rows["policy", name]["llm_share"]) for name in seeded]
                    + [("calibrated", name) for name in seeded if "thresholds" not in made(task, name)])
    if n_wall and ("wall-clock", "wall-clock") not in rows:
        best = sorted((r for r in rows.values() if r["kind"] == "fixed"), key=lambda r: -r["accuracy"])
        points = np.array([(r["accuracy"], r["latency_ms"]) for r in best])
        on_hull = [r["name"] for r, point in zip(best, points)
                   if abs(frontier_gap(tuple(point), points, mixtures=True)) < 1e-9]
        names = list(dict.fromkeys(["SLM alone", "LLM alone", *on_hull, *seeded]))
        rows = store.fill({("wall-clock", "wall-clock"): (timed_row, task, names, n_wall)}, 1, "wall-clock")
    return list(rows.values())


def show(rows: list[dict]) -> str:
    """Every method by accuracy, and the gaps."""
    methods = [r for r in rows if r["kind"] in ORDER]
    fixed = outcomes_of([r for r in methods if r["kind"] == "fixed"])
    points = fixed.mean(1)
    wall = next((r for r in rows if r["kind"] == "wall-clock"), None)
    clock = {name: np.array(ms) for name, ms in wall["ms"].items()} if wall else {}
    lines = [f"{'method':36} {'right, % [95 %]':>22} {'cut off, %':>11} {'LLM, %':>7} {'tokens':>7}"
             f" {'fitted ms':>10} {'by the clock, LLM = 1':>22} {'gap, % [95 %] (higher is better)':>33}"
             f" {'against mixtures too':>22}"]
    for r in sorted(methods, key=lambda r: (ORDER.index(r["kind"]), -r["accuracy"])):
        cells = [with_interval([100 * x for x in (r["accuracy"], *r["accuracy_95"])], digits=1),
                 f"{100 * r['llm_share']:.1f}",
                 f"{r['tokens']:.1f}", f"{r['latency_ms']:.1f}"]
        pair = (clock["LLM alone"], clock[r["name"]]) if r["kind"] in ("policy",
                                                                       "fixed") and r["name"] in clock else ()
        cells.append(with_interval([ratio_of_means(*pair), *bootstrap(ratio_of_means, *pair)], " x", 2)
                     if pair else "")
        if r["kind"] == "fixed":
            gaps = [frontier_gap((r["accuracy"], r["latency_ms"]), points, mixtures)
                    for mixtures in (False, True)]
            cells += ["on the frontier" if abs(gap) < 1e-9 else f"{100 * gap:.1f}" for gap in gaps]
        else:
            cells += [with_interval([100 * x for x in gap_with_interval(outcomes_of([r]), fixed, mixtures)],
                                    digits=1) for mixtures in (False, True)]
        name = {"random": "random at the share of ",
                "calibrated": "above its logit: "}.get(r["kind"],
                                                       "") + r["name"] + (f", {r['above']:g}" if "above" in r
                                                                          else "")
        lines.append(f"{name:36} {cells[0]:>22} {cut_off(r):>11} {cells[1]:>7} {cells[2]:>7} {cells[3]:>10}"
                     f" {cells[4]:>22} {cells[5]:>33} {cells[6]:>22}")
    r = methods[0]
    lines.append(f"n = {r['n']} test problems, greedy, seed {r['seed']}, {r['device']}, {r['dtype']}, torch "
                 f"{r['torch']}; latency fitted at batch 1; intervals 95 %, paired")
    if wall:
        drift = np.array(wall["reference_ms"]) / np.median(wall["reference_ms"]) - 1
        lines.append(f"by the clock: speed-up over the LLM alone, {wall['n']} problems at batch 1, methods "
                     f"interleaved; drift of the reference call: median {100 * np.median(abs(drift)):.1f} %, "
                     f"largest {100 * abs(drift).max():.1f} %")
    return "\n".join(lines)


def timed_gaps(rows: list[dict], names: list[str]) -> list[str]:
    """Mean gap of policies (seeds of one recipe) against the fixed rules that were timed beside them,
    mixtures too: by the clock, and as fitted on the same problems."""
    wall = next((r for r in rows if r["kind"] == "wall-clock"), None)
    if wall is None or not set(names) <= wall["ms"].keys():
        return ["", ""]
    fitted = {r["name"]: outcomes_of([r], wall["n"])[0] for r in rows if r["kind"] in ("policy", "fixed")}
    clock = {name: np.column_stack([fitted[name][:, 0], ms]) for name, ms in wall["ms"].items()}
    rules = [name for name in wall["ms"] if name in FIXED]
    gaps = [gap_with_interval(*(np.array([outcomes[name] for name in some]) for some in (names, rules)),
                              mixtures=True) for outcomes in (clock, fitted)]
    return [signed([100 * x for x in gap]) for gap in gaps]


def gaps_of(outcomes: np.ndarray, others: np.ndarray) -> list[str]:
    """Mean gap of some methods against the frontier of others, without and with mixtures."""
    return [signed([100 * x for x in gap_with_interval(outcomes, others, mixtures)])
            for mixtures in (False, True)]


def recipes(rows: list[dict], compared: list[dict]) -> str:
    """R-Stitch+ by kappa, mean over seeds, and what labels at every token would win, made while running as
    analysis.compare does, as the results page has it."""
    by = {(r["kind"], r["name"]): r for r in rows}
    fixed = outcomes_of([r for r in rows if r["kind"] == "fixed"])
    lines = ["| | right, % | LLM, % | tokens | fitted ms | more right than random, pp | gap, % [95 %] | "
             "against mixtures too | by the clock, mixtures too | the same problems as fitted |",
             "|" + 10 * "---|"]
    for kind, recipe, title in (
            ("policy", "labels-kappa", "from labels"), ("policy", "kappa", "as in the paper"),
            ("calibrated", "kappa", "as in the paper, threshold set on calibration"),
            ("random", "labels-kappa", "random at the shares from labels"),
            ("random", "kappa", "random at the shares as in the paper")):
        for kappa in KAPPAS:
            seeds = [r for (k, name), r in sorted(by.items()) if k == kind
                     and name.startswith(f"{recipe}{kappa}-seed")]
            if not seeds:
                continue
            lead = [np.array(r["outcomes"], float)[:, 0] - np.array(by["random", r["name"]]["outcomes"],
                                                                    float)[:, 0]
                    for r in seeds if kind == "policy"]
            cells = [", ".join(f"{100 * r['accuracy']:.1f}" for r in seeds),
                     *(f"{np.mean([scale * r[k] for r in seeds]):.1f}"
                       for k, scale in (("llm_share", 100), ("tokens", 1), ("latency_ms", 1))),
                     signed([np.mean(lead) * 100, *bootstrap(np.mean, 100 * np.mean(lead, 0))]) if lead
                     else "", *gaps_of(outcomes_of(seeds), fixed),
                     *(timed_gaps(rows, [r["name"] for r in seeds]) if kind == "policy" else ["", ""])]
            lines.append(f"| {title}, kappa {kappa} | " + " | ".join(cells) + " |")
    for live in [r for r in compared if r["kind"] == "live labels"][-1:]:
        n = min(live["n"], fixed.shape[1])
        cells = [f"{100 * live['accuracy']:.1f}", f"{100 * live['llm_share']:.1f}", f"{live['tokens']:.1f}",
                 f"{live['latency_ms']:.1f}", "", *gaps_of(outcomes_of([live], n), fixed[:, :n]), "", ""]
        lines.append("| labels at every token, time to make them not counted | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def against_r2r(rows: list[dict], compared: list[dict]) -> str:
    """Latency saved against R2R's runs at the same accuracy, the time of its net in them on average, by
    recipe; R2R's runs and the models alone are the frontier."""
    ms = next((r["ms"] for r in reversed(compared) if r["kind"] == "router times"), {})
    runs = current([r for r in compared if r["kind"] == "test"
                    and r["family"] in ("R2R", "SLM alone", "LLM alone")], ("family", "target"),
                   lambda r: r["family"])
    n = min((len(r["outcomes"]) for r in (*runs, *rows) if "outcomes" in r), default=0)
    if not any(r["family"] == "R2R" for r in runs) or not n:
        return ""
    frontier = outcomes_of(runs, n)
    frontier[..., 1] += np.array([net_time(r, ms) for r in runs])[:, None]
    lines = []
    for kappa in KAPPAS:
        seeds = [r for r in rows
                 if r["kind"] == "policy" and r["name"].startswith(f"labels-kappa{kappa}-seed")]
        if seeds:
            lines.append(f"| from labels, kappa {kappa} | "
                         + " | ".join(gaps_of(outcomes_of(seeds, n), frontier)) + " |")
    head = ["| | gap against R2R, % [95 %] | mixtures too |", "|---|---|---|"]
    return "\n".join(head + lines) if lines else ""


def ablations(rows: list[dict]) -> str:
    """What each change did, in right answers, time and reward on the same problems, 95 % intervals over
    problems; as the results page has it."""
    outcomes = {r["name"]: outcomes_of([r])[0] for r in rows if r["kind"] in ("policy", "fixed")}
    llm_ms = outcomes["LLM alone"][:, 1].mean()
    lines = ["| changed | against | kappa | right, % | fitted ms | right, pp | fitted ms | reward x 100 |",
             "|---|---|---|---|---|---|---|---|"]
    for changed, against in ABLATIONS:
        if changed in outcomes and against in outcomes:
            (right, ms), (right_0, ms_0) = outcomes[changed].T, outcomes[against].T
            kappa = RUNS[changed].kappa
            earned, earned_0 = (r * (1 - kappa * t / llm_ms) for r, t in ((right, ms), (right_0, ms_0)))
            cells = [f"{kappa:g}", f"{100 * right.mean():.1f}", f"{ms.mean():.1f}",
                     *(signed([x.mean(), *bootstrap(np.mean, x)])
                       for x in (100 * (right - right_0), ms - ms_0, 100 * (earned - earned_0)))]
            lines.append(f"| {changed} | {against} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, Task, unread=("router", "control"))
    add = parser.add_argument
    add("--n", type=int, default=1000, help="test problems (default: %(default)s)")
    add("--wall-clock", type=int, default=200,
        help="of them, how many are timed one by one; 0 for none (default: %(default)s)")
    add("--workers", type=int, default=2, help="processes; 1 on a GPU (default: %(default)s)")
    args = parser.parse_args()
    try:
        task = Task(**given(args, Task))
        for name, least in (("n", 1), ("wall_clock", 0), ("workers", 1)):
            rstitch.check_count(f"--{name.replace('_', '-')}", getattr(args, name), least)
        rows = run(task, args.n, args.wall_clock, args.workers)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(show(rows))
    if {f"kappa{kappa}-seed0" for kappa in KAPPAS} <= {r["name"] for r in rows}:
        compared = read_rows(task.needed("out") / "compare.jsonl")
        print("\nR-Stitch+ by kappa, mean over seeds (higher gap is better; problems drawn anew, seeds as "
              "they are):", recipes(rows, compared),
              "Ablations, one seed each (intervals over problems; they say nothing about other seeds):",
              ablations(rows), against_r2r(rows, compared), sep="\n\n")


if __name__ == "__main__":
    start(main, shared=True)

"""What the answers of a pair say: right answers, paired differences, what the SLM's entropy tells, tokens
above each tau. No torch.

    python -m analysis.presentation.real analysis/results/real/answers.jsonl
    python -m analysis.presentation.real answers.jsonl --latency latency.json      and what they take

It prints tables, and feeds notebooks 1 to 4.

The rows are those of `analysis.answers`. A file may be unfinished: a difference is over the problems that
both methods have answered, and what is missing reads "not yet measured". Entropies are in nats; tau is
normalised, the entropy divided by log V. Intervals are 95 %: Wilson for shares of problems, else bootstrapped
over problems, whose samples stay together.
"""
import argparse
import json
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np

from analysis.instruments import stats
from analysis.instruments.rows import read_rows
from analysis.instruments.stats import (
    Interval,
    auroc,
    bootstrap,
    by_problem,
    ratio_of_means,
    share_of,
    signed,
    table,
    with_interval,
)

MISSING = "not yet measured"
VOCAB = 151_936  # logit columns V of the real pair
SEEN = 64  # the first problems were looked at before the protocol was fixed
MARGIN = 5.0  # points: a loss as large as this one counts
TAUS = (0.001, 0.005, 0.02, 0.05, 0.1)  # normalised, fixed by the protocol
WORLD = ("slm", "llm", "dtype", "limit", "split", "temperature", "system", "instruction", "template")
NAMES = {
    "llm": "LLM alone", "slm": "SLM alone", "tau=0.02": "R-Stitch, tau 0.02",
    "random": "random calls, same share", "tau=0.005": "R-Stitch, tau 0.005",
    "tau=0.05": "R-Stitch, tau 0.05", "tau=0.02,back=1": "one-token visits, tau 0.02",
}
COMPARISONS = (("llm", "tau=0.02"), ("tau=0.02", "random"), ("tau=0.02", "slm"), ("llm", "tau=0.005"),
               ("llm", "tau=0.05"), ("tau=0.02", "tau=0.02,back=1"))

BY = " by "  # between a trained router's threshold and its net


# ---- which rows --------------------------------------------------------------------------------------------


def worlds(rows: Iterable[dict]) -> list[dict[str, list[dict]]]:
    """The answers by method, apart for each pair, dtype, limit, split, temperature and prompt: these never
    share a table. An answer that stands twice, as from two machines, counts once, as it was first. A trained
    router's name tells its net."""
    found: dict[str, dict[str, dict[tuple, dict]]] = {}
    for row in rows:
        if row.get("what") == "answer":
            methods = found.setdefault(repr([row.get(name) for name in WORLD]), {})
            name = row["method"] + (BY + row["net"] if "net" in row else "")
            methods.setdefault(name, {}).setdefault((row["problem"], row["sample"]), row)
    return [{method: list(answers.values()) for method, answers in methods.items()}
            for methods in found.values()]


def world_of(rows: Iterable[dict], sampled: bool = False) -> dict[str, list[dict]]:
    """The test answers of the world that has most, greedy or sampled; empty if there are none."""
    fits = lambda row: row["split"] == "test" and (row["temperature"] > 0) == sampled  # noqa: E731
    found = [w for w in worlds(rows) if fits(next(iter(w.values()))[0])]
    return max(found, key=lambda w: sum(map(len, w.values())), default={})


def resolve(methods: dict[str, list[dict]], name: str) -> str | None:
    """The method of that name, "random" being the one whose share is nearest to that of tau 0.02; None if it
    has no answer."""
    if name == "random" and "tau=0.02" in methods:
        share = llm_share(methods["tau=0.02"])
        return min((m for m in methods if m.startswith("random=")),
                   key=lambda m: abs(llm_share(methods[m]) - share), default=None)
    return name if name in methods else None


# ---- one method --------------------------------------------------------------------------------------------


def llm_share(rows: Iterable[dict]) -> float:
    """Kept LLM tokens / kept tokens, the end token included."""
    rows = list(rows)
    return sum(row["writer"].count("L") for row in rows) / sum(len(row["writer"]) for row in rows)


def figures_of(rows: list[dict]) -> dict[str, Interval]:
    """Shares of right and of cut-off answers and of LLM tokens, all in [0, 1], and tokens per answer."""
    sums = [(sum(len(row["writer"]) for row in answers), sum(row["writer"].count("L") for row in answers),
             len(answers)) for answers in by_problem(rows).values()]
    tokens, large, answers = np.array(sums, float).T
    finished = share_of(rows, "finished")
    return {
        "right": share_of(rows, "correct"),
        "llm_share": (ratio_of_means(large, tokens), *bootstrap(ratio_of_means, large, tokens)),
        "tokens": (ratio_of_means(tokens, answers), *bootstrap(ratio_of_means, tokens, answers)),
        "cut_off": (1 - finished[0], 1 - finished[2], 1 - finished[1]),
    }


# ---- two methods -------------------------------------------------------------------------------------------


def paired(a: list[dict], b: list[dict], first: int = 0) -> tuple[float, float, float, int] | None:
    """How much more often a is right than b, in points, over the n problems from `first` on that both have
    answered: (points, low, high, n). None where there is no such problem."""
    a, b = by_problem(a, first), by_problem(b, first)
    right = lambda answers: np.mean([row["correct"] for row in answers])  # noqa: E731
    d = [100 * (right(a[problem]) - right(b[problem])) for problem in sorted(a.keys() & b.keys())]
    return (float(np.mean(d)), *bootstrap(np.mean, d, draws=4000), len(d)) if d else None


def against(x: Sequence[float], reference: float = 0.0) -> str:
    """What an interval says of a reference: above, below, undecided."""
    return "above" if x[1] > reference else "below" if x[2] < reference else "undecided"


def loss(x: Sequence[float], margin: float = MARGIN) -> str:
    """Of LLM minus method, in points: whether a loss of the margin or more is excluded, shown, or
    undecided."""
    state = "excluded" if x[2] < margin else "shown" if x[1] >= margin else "undecided"
    return f"a loss of {margin:g} points {state}"


def enough(x: Sequence[float], n: int, reference: float = 0.0) -> int | None:
    """Problems at which an interval around this figure, narrowing as 1 / sqrt(n), would just reach the
    reference; None if it is the reference."""
    distance = abs(x[0] - reference)
    reach = x[0] - x[1] if x[0] > reference else x[2] - x[0]
    return math.ceil(n * (reach / distance) ** 2) if distance else None


# ---- what entropy tells of the SLM's answers ---------------------------------------------------------------


def entropy_auroc(rows: list[dict], steps: int | None = None) -> Interval:
    """AUROC of an answer's mean entropy, wrong against right, of the SLM's greedy answers; of one step count
    only, if given."""
    chosen = [row for row in rows if steps is None or row["steps"] == steps]
    mean = np.array([np.mean(row["H"]) for row in chosen])
    wrong = np.array([not row["slm"] for row in chosen])
    return auroc(mean, wrong), *bootstrap(auroc, mean, wrong)


def within_problem(rows: list[dict]) -> tuple[float, float, float, int]:
    """Among sampled answers to one problem: how often a wrong one has a higher mean entropy than a right one,
    mean over the problems that have both, and their number; NaN if none has. Difficulty cannot explain this
    one."""
    shares = []
    for row in rows:
        right, wrong = ([H for good, H, _ in row["samples"] if good == k] for k in (1, 0))
        if right and wrong:
            shares.append(auroc(np.array(right + wrong), np.repeat([False, True], [len(right), len(wrong)])))
    interval = bootstrap(np.mean, shares) if shares else (math.nan, math.nan)
    return float(np.mean(shares)) if shares else math.nan, *interval, len(shares)


def share_above(rows: list[dict], limit: float) -> Interval:
    """Share of the SLM's tokens whose entropy exceeds the limit, in nats."""
    above, n = (np.array([f(row["H"]) for row in rows], float)
                for f in (lambda H: sum(h > limit for h in H), len))
    return ratio_of_means(above, n), *bootstrap(ratio_of_means, above, n)


def trajectories(rows: Sequence[dict]) -> list[dict]:
    """The SLM's greedy answers in the form of results/trajectories.jsonl, with the sampled ones of the same
    problem where there are any: H (nats, a token each), slm (right or wrong), samples (right, mean H,
    tokens)."""
    greedy, sampled = (world_of(rows, kind).get("slm", []) for kind in (False, True))
    samples = by_problem(sampled)
    one = lambda row: [int(row["correct"]), float(np.mean(row["entropy"])), len(row["entropy"])]  # noqa: E731
    return [{"H": row["entropy"], "slm": int(row["correct"]), "steps": None,
             "samples": [one(r) for r in samples.get(row["problem"], [])]} for row in greedy]


# ---- tables ------------------------------------------------------------------------------------------------


def percent(x: Sequence[float], digits: int = 1) -> str:
    return with_interval([100 * v for v in x[:3]], digits=digits)


def methods_table(methods: dict[str, list[dict]]) -> str:
    """A line a method: the main ones, measured or not, then whatever else the answers hold."""
    main = {name: resolve(methods, name) for name in NAMES}
    lines = [("method", "n", "right, %", "LLM tokens, %", "tokens per answer", "cut off, %")]
    for name, method in [*main.items(), *((m, m) for m in methods if m not in main.values())]:
        if method is None:
            lines.append((NAMES[name], "0", MISSING, "", "", ""))
            continue
        x, n = figures_of(methods[method]), len(by_problem(methods[method]))
        lines.append((NAMES.get(name, name), str(n), percent(x["right"]), percent(x["llm_share"]),
                      with_interval(x["tokens"], digits=0), percent(x["cut_off"])))
    return table(lines)


def difference(methods: dict[str, list[dict]], a: str, b: str,
               first: int = 0) -> tuple[float, float, float, int] | None:
    """`paired` of two methods by name; None if either has no answer, or they share no problem."""
    a, b = resolve(methods, a), resolve(methods, b)
    return paired(methods[a], methods[b], first) if a and b else None


def outcomes(answers: dict[int, list[dict]], problems: Sequence[int]) -> dict:
    """A run as `stats.difference` takes it: right answers, tokens, LLM tokens of each problem."""
    def of(rows: list[dict]) -> list[float]:
        each = [(row["correct"], len(row["writer"]), row["writer"].count("L")) for row in rows]
        return list(np.mean(each, 0))

    return {"outcomes": [of(answers[problem]) for problem in problems]}


def runs_of_r2r(methods: Iterable[str]) -> list[str]:
    """The runs of R2R's router; once it was trained anew, those of the net that ran last."""
    runs = [name for name in methods if name.startswith("r2r")]
    return [name for name in runs if name.partition(BY)[2] == runs[-1].partition(BY)[2]]


def runs_of_nets(methods: Iterable[str]) -> list[str]:
    """Those of R2R, and of all policies of R-Stitch+."""
    methods = list(methods)
    return runs_of_r2r(methods) + [name for name in methods if name.startswith("policy")]


def at_equal_share(methods: dict[str, list[dict]], first: int = 0) -> dict[str, tuple]:
    """How much more often a trained router is right than entropy with visits of one token that calls the LLM
    as often: by run of a net (points, low, high, n, LLM share), over the problems that all have answered. At
    exactly the run's share: on the line between entropy's runs, or from the SLM alone to the first. Runs of
    entropy that have answered less than half of the net's problems are left out, and so are those of nets
    whose share no other reaches."""
    found, answers = {}, {name: by_problem(rows, first) for name, rows in methods.items()}
    for run in runs_of_nets(methods) if "slm" in methods else ():
        family = ["slm", *(name for name in methods if name.endswith(",back=1")
                           and 2 * len(answers[name].keys() & answers[run].keys()) >= len(answers[run]) > 0)]
        problems = sorted(answers[run].keys() & set.intersection(*(set(answers[name]) for name in family)))
        if not problems:
            continue
        own, *others = (llm_share(row for i in problems for row in answers[name][i])
                        for name in (run, *family))
        if own <= max(others):
            one, *rest = (outcomes(answers[name], problems) for name in (run, *family))
            found[run] = *stats.at_own_share(one, rest, len(problems)), len(problems), own
    return found


def decided(name: str, x: tuple[float, float, float, int] | None) -> str:
    """What a difference says, and, where it says nothing, how many problems would."""
    if x is None:
        return ""
    reference = MARGIN if name == "llm" else 0.0
    state = loss(x) if name == "llm" else {"above": "better", "below": "worse"}.get(against(x), "undecided")
    n = enough(x, x[3], reference) if "undecided" in state else None
    return state + (f", decided at about {n:,} problems" if n else "")


def differences_table(methods: dict[str, list[dict]]) -> str:
    """Right answers of one method minus another's, in points, on all problems that both answered and without
    those seen before: COMPARISONS, trained routers against the LLM alone, and policies against each other."""
    runs, policies = runs_of_nets(methods), [name for name in methods if name.startswith("policy")]
    lines = [("right answers, points", "all problems", "n", f"without the first {SEEN}", "n",
              "on all problems")]
    for a, b in (*COMPARISONS, *(("llm", run) for run in runs), *combinations(policies, 2)):
        all_of, unseen = (difference(methods, a, b, first) for first in (0, SEEN))
        cells = [(signed(x[:3]), str(x[3])) if x else (MISSING, "0") for x in (all_of, unseen)]
        lines.append((f"{NAMES.get(a, a)} - {NAMES.get(b, b)}", *cells[0], *cells[1], decided(a, all_of)))
    return table(lines)


def equal_share_table(methods: dict[str, list[dict]]) -> str:
    """Right answers of trained routers minus those of one-token entropy at the same LLM share."""
    every, unseen = (at_equal_share(methods, first) for first in (0, SEEN))
    lines = [("trained router - one-token entropy at its LLM share, points", "LLM tokens, %",
              "all problems", "n", f"without the first {SEEN}", "n", "on all problems")]
    for run, x in every.items():
        y = unseen.get(run)
        lines.append((run, f"{100 * x[4]:.1f}", signed(x[:3]), str(x[3]), *((signed(y[:3]), str(y[3])) if y
                                                                           else (MISSING, "0")),
                      decided(run, x[:4])))
    return table(lines) if every else f"{lines[0][0]}: {MISSING}"


def priced(rows: list[dict], ms: Callable[[dict], float]) -> dict[int, float]:
    """By problem, what an answer takes on average, `ms` telling it of a row."""
    return {problem: float(np.mean(list(map(ms, answers)))) for problem, answers in by_problem(rows).items()}


def speed(own: dict[int, float], llm: dict[int, float]) -> tuple[float, float, float, int]:
    """How many times as fast answers are as those of the LLM alone, from what they take by problem, over the
    n problems that both have answered: (ratio of means, low, high, n); NaN for none."""
    both = sorted(own.keys() & llm.keys())
    if not both:
        return math.nan, math.nan, math.nan, 0
    a, b = (np.array([x[problem] for problem in both]) for x in (llm, own))
    return ratio_of_means(a, b), *bootstrap(ratio_of_means, a, b), len(both)


def saved(methods: dict[str, list[dict]], prices: dict[str, dict[int, float]], name: str,
          others: Sequence[str] = ("slm", "llm")) -> tuple[float, float, float] | None:
    """How much less time answers of a method take, in %, than those of a mix that is right as often, in which
    every whole problem goes to one of the others at random: to either model alone, unless said otherwise.
    None without the answers of all."""
    if not others or not set(others) <= prices.keys() or name in others:
        return None
    every = [by_problem(methods[one]) for one in (name, *others)]
    problems = sorted(set.intersection(*map(set, every)))
    own, *ends = ([[np.mean([row["correct"] for row in answers[i]]), prices[one][i]] for i in problems]
                  for one, answers in zip((name, *others), every))
    gap = stats.gap_with_interval(np.array([own], float), np.array(ends, float), True) if problems else None
    return gap and tuple(100 * x for x in gap)


def fixed_rules(methods: dict[str, list[dict]], name: str) -> list[str]:
    """Either model alone, and what routes by entropy and has answered all problems of a method that has a
    net; none for other methods."""
    if BY not in name:
        return []
    own = by_problem(methods[name]).keys()
    return ["slm", "llm", *(one for one, rows in methods.items()
                            if one.startswith("tau=") and own <= by_problem(rows).keys())]


def nets_ms(rows: Iterable[dict]) -> dict[str, dict[str, float]]:
    """By trained net, how long a decision of each of its parts takes, as it was timed last."""
    return {row["net"]: row["ms"] for row in rows if row.get("what") == "net"}


def speeds_table(methods: dict[str, list[dict]], ms: Callable[[dict], float],
                 title: str = "as fitted, at batch 1", timed: Collection[str] = ()) -> str:
    """A line a method: the milliseconds of an answer, its speed, and what it saves against a mix of both
    models and, where it has a net, of all fixed rules. `timed`: trained nets whose own time is in `ms`."""
    lines = [(title, "ms per answer", "speed, LLM alone = 1", "n", "less time than a mix as right, %",
              "than one of all fixed rules, %")]
    prices = {method: priced(rows, ms) for method, rows in methods.items()}
    for method, own in prices.items():
        x = speed(own, prices.get("llm", {}))
        net = method.partition(BY)[2]
        name = NAMES.get(method, method) + (", without its net" if net and net not in timed else "")
        lines.append((name, f"{np.mean(list(own.values())):,.0f}",
                      *((with_interval(x[:3], " x", 2), str(x[3])) if x[3] else (MISSING, "0")),
                      *(signed(mix) if (mix := saved(methods, prices, method, others)) else ""
                        for others in (("slm", "llm"), fixed_rules(methods, method)))))
    return table(lines)


def signal_table(rows: Sequence[dict]) -> str:
    """Whether the mean entropy of the SLM's answers tells the wrong ones: AUROC, 0.5 being no signal."""
    answers = trajectories(rows)
    inside = within_problem(answers)
    wrong = sum(not row["slm"] for row in answers)
    whole = with_interval(entropy_auroc(answers)) if 0 < wrong < len(answers) else MISSING
    return table([("mean entropy of the SLM's answers", "AUROC, wrong against right", "n"),
                  ("all greedy answers", whole, str(len(answers))),
                  ("among samples of one problem", with_interval(inside[:3]) if inside[3] else MISSING,
                   str(inside[3]))])


def taus_table(rows: Sequence[dict], vocab: int = VOCAB) -> str:
    """Share of the SLM's tokens above each tau, on its greedy answers, and above the 0.1 nats of the paper's
    figure."""
    answers = trajectories(rows)
    limits = [(f"{tau:g}", tau * math.log(vocab)) for tau in TAUS]
    limits.append((f"{0.1 / math.log(vocab):.4f}", 0.1))
    lines = [("tau", "nats", "SLM tokens above, %")]
    for name, nats in limits:
        lines.append((name, f"{nats:.3f}", percent(share_above(answers, nats)) if answers else MISSING))
    return table(lines)


def show(rows: Sequence[dict], vocab: int = VOCAB,
         costs: dict[str, Callable[[dict], float]] | None = None) -> str:
    """All tables: methods and differences of each world, what answers take by each of the titled `costs`, ms
    of a row, then what the SLM's test answers tell."""
    parts = []
    for methods in worlds(rows) or [{}]:
        every = [row for answers in methods.values() for row in answers]
        head = ", ".join(f"{name} {every[0][name]}" for name in WORLD[2:] if every and name in every[0])
        machines = "; ".join(sorted({f"{row['machine']}, {row['rows']} rows" for row in every}))
        title = f"{head}\non {machines}" if every else MISSING
        parts += [title, methods_table(methods), differences_table(methods), equal_share_table(methods)]
        parts += [speeds_table(methods, ms, title, nets_ms(rows)) for title, ms in (costs or {}).items()]
    return "\n\n".join([*parts, signal_table(rows), taus_table(rows, vocab)])


def main() -> None:
    """Tables of a file of answers."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="JSONL of analysis.answers, finished or not")
    parser.add_argument("--vocab", type=int, default=VOCAB,
                        help="logit columns of the pair (default: %(default)s)")
    parser.add_argument("--latency", type=Path, help="fitted latency of the pair, of analysis.latency: what "
                                                     "answers take, the nets of trained routers included")
    parser.add_argument("--ratio", type=float, nargs="+", default=[], metavar="R",
                        help="with --latency, a projection: as if a step of the LLM took R times the SLM's")
    args = parser.parse_args()
    if not args.file.is_file():
        parser.error(f"{args.file}: there is no such file; expected the rows of analysis.answers")
    if args.vocab < 2:
        parser.error(f"--vocab={args.vocab}: expected 2 or more")
    if args.ratio and not (args.latency and all(0 < ratio < math.inf for ratio in args.ratio)):
        parser.error(f"--ratio {' '.join(map(str, args.ratio))}: expected numbers above 0, and --latency")
    try:
        rows = read_rows(args.file)
        kinds = {row.get("what") if isinstance(row, dict) else None for row in rows}
        if rows and "answer" not in kinds:
            raise ValueError("it has other ones only")
    except ValueError as error:
        parser.error(f"{args.file}: expected the rows of analysis.answers ({error})")
    costs = {}
    if args.latency:
        from analysis.answers import milliseconds, with_ratio  # needs torch
        from analysis.instruments.task import load_latency
        try:
            models, dtype = load_latency(args.latency), json.loads(args.latency.read_text())["dtype"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            parser.error(f"--latency {args.latency}: expected a file of analysis.latency ({error})")
        if others := {row["dtype"] for row in rows} - {dtype}:
            parser.error(f"--latency {args.latency} is of {dtype}: expected that of the answers, "
                         f"{', '.join(sorted(others))}")
        fits = {"as fitted, at batch 1": models} | {
            f"projection, an LLM's step {ratio:g} x": with_ratio(models, ratio) for ratio in args.ratio}
        costs = {title: partial(milliseconds, models=fit, nets_ms=nets_ms(rows))
                 for title, fit in fits.items()}
    print(show(rows, args.vocab, costs))


if __name__ == "__main__":
    main()

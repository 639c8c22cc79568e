"""What the notebooks draw, and every number their verdicts rest on. No torch: it reads the files of analysis/results.

Entropies are in nats unless a name says normalised. Intervals are 95 %, bootstrapped over problems.
"""
import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from analysis.instruments.rows import read_rows
from analysis.instruments.stats import PAPER_LABELS, auroc, bootstrap, difference, gap_with_interval
from analysis.instruments.stats import net_time, outcomes_of, ratio_of_means, signed, wilson, with_interval

SLM_COLOUR, LLM_COLOUR, THIRD, GREY = "#0072B2", "#E69F00", "#009E73", "#999999"  # told apart by the colour-blind too
WINDOWS = (1, 4, 8, 12, 16)


def results(name: str) -> Path:
    """A file of results: of the folder RSTITCH_RESULTS names, else of this repository."""
    return Path(os.environ.get("RSTITCH_RESULTS", Path(__file__).parent.parent / "results")) / name


def style() -> None:
    plt.rcParams.update({"figure.figsize": (9, 3.6), "figure.dpi": 80, "figure.constrained_layout.use": True, "axes.grid": True, "grid.alpha": 0.3,
                         "axes.spines.top": False, "axes.spines.right": False, "font.size": 9, "axes.titlesize": 10})


def conditions(row: dict) -> str:
    """How rows were made, in a line."""
    return (f"{row['command']}; n = {row['n']}, seed {row['seed']}, {row['device']}, {row['dtype']}, torch {row['torch']}, transformers {row['transformers']}, "
            f"commit {row['commit']}")


def verdicts(rows: list[tuple[str, str, str, str]]) -> str:
    """Claim, paper, ours, verdict, as a table."""
    head = ("claim", "paper", "ours [95 %]", "verdict")
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(4)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in (head, *rows))


def percent(x: tuple[float, float, float], digits: int = 1) -> str:
    return with_interval(tuple(100 * v for v in x), digits=digits)


def verdict(x: tuple[float, float, float], reference: float, above: str = "raised", below: str = "lowered", neither: str = "no different") -> str:
    """What an interval says against a reference."""
    return above if x[1] > reference else below if x[2] < reference else neither


def sized(x: tuple[float, float, float], paper: float) -> str:
    """How a share or a ratio compares with the paper's: within a quarter of it, within five times, or beyond."""
    ratio = max(x[0] / paper, paper / x[0]) if x[0] else float("inf")
    return "same size" if ratio <= 1.25 else ("far " if ratio > 5 else "") + ("more" if x[0] > paper else "less")


# ---- 1. Entropy of wrong answers (R-Stitch Fig. 3a, 3b) ------------------------------------------------------------------


def entropy_auroc(rows: list[dict], steps: int | None = None) -> tuple[float, float, float]:
    """AUROC of an answer's mean entropy, wrong against right, of the SLM's greedy answers; of one step count only, if given."""
    chosen = [row for row in rows if steps is None or row["steps"] == steps]
    mean, wrong = np.array([np.mean(row["H"]) for row in chosen]), np.array([not row["slm"] for row in chosen])
    return auroc(mean, wrong), *bootstrap(auroc, mean, wrong)


def within_problem(rows: list[dict]) -> tuple[float, float, float, int]:
    """Among sampled answers to one problem: how often a wrong one has a higher mean entropy than a right one, mean over the problems that
    have both, and their number. Difficulty cannot explain this one."""
    shares = []
    for row in rows:
        right, wrong = ([H for good, H, _ in row["samples"] if good == k] for k in (1, 0))
        if right and wrong:
            shares.append(auroc(np.array(right + wrong), np.array([False] * len(right) + [True] * len(wrong))))
    return float(np.mean(shares)), *bootstrap(np.mean, shares), len(shares)


def share_above(rows: list[dict], limit: float) -> tuple[float, float, float]:
    """Share of the SLM's tokens whose entropy exceeds the limit, in nats."""
    above, n = (np.array([f(row["H"]) for row in rows], float) for f in (lambda H: sum(h > limit for h in H), len))
    return ratio_of_means(above, n), *bootstrap(ratio_of_means, above, n)


def draw_answer_entropies(ax, rows: list[dict]):
    parts = ax.violinplot([[np.mean(row["H"]) for row in rows if row["slm"] == k] for k in (1, 0)], showmedians=True)
    for body, colour in zip(parts["bodies"], (THIRD, GREY)):
        body.set_facecolor(colour)
    ax.set_xticks([1, 2], ["right", "wrong"])
    ax.set(ylabel="mean token entropy of an answer (nats)", title="The SLM's greedy answers", yscale="log")
    return ax


def draw_strata(ax, rows: list[dict]):
    strata = sorted({row["steps"] for row in rows if row["steps"]})
    bars = [("all", entropy_auroc(rows))] + [(f"{k} steps", entropy_auroc(rows, k)) for k in strata]
    if any(row["samples"] for row in rows):
        bars.append(("within one\nproblem", within_problem(rows)[:3]))
    for i, (name, (x, low, high)) in enumerate(bars):
        ax.errorbar(i, x, [[x - low], [high - x]], fmt="o", color=SLM_COLOUR, capsize=3)
    ax.axhline(0.5, color=GREY, lw=1)
    ax.set_xticks(range(len(bars)), [name for name, _ in bars])
    ax.set(ylabel="AUROC, wrong against right (0.5: no signal)", title="Does entropy tell, difficulty apart?", ylim=(0.4, 1))
    return ax


def draw_token_entropies(ax, rows: list[dict], vocab: int):
    H = np.sort(np.concatenate([row["H"] for row in rows]))
    ax.plot(np.maximum(H, 1e-6), 100 * (1 - np.arange(len(H)) / len(H)), color=SLM_COLOUR)
    for limit, name in ((0.1, "0.1 nats"), (0.1 * np.log(vocab), "0.1 normalised")):
        ax.axvline(limit, color=GREY, lw=1)
        ax.text(limit, 60, f" {name}", rotation=90, ha="right", va="center", color="#555555")
    ax.set(xscale="log", xlim=(1e-4, 5), xlabel="entropy of a token (nats)", ylabel="SLM tokens above it (%)", title="How many tokens are uncertain?")
    return ax


# ---- 2. Harmful tokens (R-Stitch Fig. 3c) --------------------------------------------------------------------------------


def crossings(right: str) -> list[int]:
    """Positions t of harmful tokens: the LLM, going on from y_<t, is right in the end, and from y_<=t is not. Where not every prefix was
    tried ("-") t is the last one that was, and the harmful token lies between it and the next."""
    asked = [t for t, letter in enumerate(right) if letter != "-"]
    return [t for t, after in zip(asked, asked[1:]) if right[t] == "1" and right[after] == "0"]


def harmful(rows: list[dict], which: str = "first") -> list[tuple[dict, int]]:
    """(row, position) of the first or last crossing of every answer that has one; rows hold `H` and `right`."""
    return [(row, crossings(row["right"])[0 if which == "first" else -1]) for row in rows if crossings(row["right"])]


def control(row: dict, t: int) -> int | None:
    """What to compare with: the same token elsewhere in the answer, no crossing, as near as can be; None if there is none."""
    bad, token = set(crossings(row["right"])), row["text"][t]
    others = [s for s in range(len(row["H"])) if s not in bad and row["text"][s] == token]
    return min(others, key=lambda s: (abs(s - t), s), default=None)


def window_mean(H: list[float], t: int, width: int, around: bool = False) -> float:
    """Mean entropy over `width` tokens that end at t, or that lie around it (t in the middle), as far as the answer reaches."""
    start = t - width // 2 if around else t - width + 1
    return float(np.mean(H[max(0, start):max(0, start + width)]))


def against(found: list[tuple[dict, int]], width: int, around: bool) -> tuple[float, float, float]:
    """Mean entropy of the windows at harmful tokens."""
    x = [window_mean(row["H"], t, width, around) for row, t in found]
    return float(np.mean(x)), *bootstrap(np.mean, x)


def over_control(found: list[tuple[dict, int]]) -> tuple[float, float, float, int]:
    """Entropy of harmful tokens minus that of their controls, paired, and the number of pairs."""
    pairs = [(row["H"][t], row["H"][c]) for row, t in found if (c := control(row, t)) is not None]
    x = [a - b for a, b in pairs]
    return float(np.mean(x)), *bootstrap(np.mean, x), len(x)


def recovered(rows: list[dict]) -> int:
    """Answers in which a later prefix is right again, so that the first crossing did not spoil them."""
    return sum(bool(found) and "1" in row["right"][found[0] + 1:] for row in rows if (found := crossings(row["right"])))


def commonest(found: list[tuple[dict, int]]) -> tuple[str, int]:
    """The text that most harmful tokens have, and how many do."""
    texts = [row["text"][t] for row, t in found]
    return max(((text, texts.count(text)) for text in set(texts)), key=lambda pair: pair[1])


def overall_mean(rows: list[dict]) -> float:
    """Mean entropy of the SLM's tokens in the (wrong) answers that were looked into."""
    return float(np.mean(np.concatenate([row["H"] for row in rows if row["right"]])))


def below(found: list[tuple[dict, int]], tau: float) -> tuple[float, float, float]:
    """Share of harmful tokens whose entropy does not exceed tau (nats): no threshold at tau would have caught them."""
    k = sum(row["H"][t] <= tau for row, t in found)
    return k / len(found), *wilson(k, len(found))


def sampled_first(row: dict, continuations: int) -> int | None:
    """First position where the share of sampled continuations that are right falls from more than half to half or less."""
    p = row["sampled"]
    asked = [t for t, k in enumerate(p) if k is not None]
    return next((t for t, after in zip(asked, asked[1:]) if 2 * p[t] > continuations >= 2 * p[after]), None)


def agreement(rows: list[dict], continuations: int) -> tuple[int, int, int]:
    """(answers with sampled continuations and a crossing both ways, those whose first crossings agree, those within 3 tokens)."""
    both = [(crossings(row["right"])[0], s) for row in rows if row["sampled"] and crossings(row["right"]) and (s := sampled_first(row, continuations)) is not None]
    return len(both), sum(a == b for a, b in both), sum(abs(a - b) <= 3 for a, b in both)


def draw_windows(ax, rows: list[dict]):
    for which, colour in (("first", SLM_COLOUR), ("last", LLM_COLOUR)):
        for around, marker in ((True, "o"), (False, "s")):
            points = [against(harmful(rows, which), w, around) for w in WINDOWS]
            x, low, high = np.array(points).T
            ax.errorbar(np.array(WINDOWS) + (0.15 if around else -0.15), x, [x - low, high - x], fmt=f"{marker}-", color=colour, capsize=2, lw=1,
                        mfc=colour if around else "white", label=f"{which} harmful token, window {'around' if around else 'before'} it")
    ax.axhline(overall_mean(rows), color=GREY, lw=1)
    ax.text(6.5, 0.97 * overall_mean(rows), "mean of the wrong answers' tokens", va="top", color="#555555", fontsize=8)
    ax.set(xlabel="window (tokens)", ylabel="mean entropy (nats)", title="Entropy at harmful tokens", xticks=WINDOWS)
    ax.set_ylim(0, 1.35 * ax.get_ylim()[1])  # room for the legend
    ax.legend(fontsize=7, loc="upper right")
    return ax


def draw_uncaught(ax, rows: list[dict], vocab: int):
    taus = np.geomspace(1e-4, 3, 60)
    for which, colour in (("first", SLM_COLOUR), ("last", LLM_COLOUR)):
        ax.plot(taus, [100 * below(harmful(rows, which), tau)[0] for tau in taus], color=colour, label=f"{which} harmful token")
    every = np.concatenate([row["H"] for row in rows if row["right"]])
    ax.plot(taus, [100 * (every <= tau).mean() for tau in taus], color=GREY, label="all tokens")
    for tau in (0.005, 0.02):
        ax.axvline(tau * np.log(vocab), color=GREY, lw=0.8)
        ax.text(tau * np.log(vocab), 97, f" {tau} normalised", rotation=90, ha="right", va="top", fontsize=7, color="#555555")
    ax.set(xscale="log", xlabel="tau (nats)", ylabel="tokens with entropy <= tau (%)", title="Harmful tokens that a threshold misses (lower is better)")
    ax.legend(fontsize=7)
    return ax


def draw_positions(ax, rows: list[dict]):
    first, last = ([t / len(row["H"]) for row, t in harmful(rows, which)] for which in ("first", "last"))
    ax.hist([first, last], bins=10, range=(0, 1), color=[SLM_COLOUR, LLM_COLOUR], label=["first", "last"])
    ax.set(xlabel="place in the answer (0 start, 1 end)", ylabel="answers", title="Where answers are spoilt")
    ax.legend(fontsize=7)
    return ax


# ---- 3. Divergent tokens (R2R) -------------------------------------------------------------------------------------------


LABELS = {"identical": GREY, "neutral": THIRD, "divergent": LLM_COLOUR, "unjudged": "#CC79A7"}


def draw_labels(ax, figures: dict):
    for i, (name, colour) in enumerate(LABELS.items()):
        x, low, high = (100 * v for v in figures["shares"][name])
        ax.bar(i, x, 0.5, color=colour, yerr=[[x - low], [high - x]], capsize=3)
        if name in PAPER_LABELS:
            ax.plot(i + 0.32, 100 * PAPER_LABELS[name], "D", mfc="none", color="black", label="paper" if i == 0 else None)
    ax.set_xticks(range(len(LABELS)), LABELS)
    ax.set(yscale="log", ylabel="tokens of the LLM's answers (%)", title="What the SLM would write there")
    ax.legend(fontsize=8)
    return ax


def draw_label_entropies(ax, figures: dict):
    names = [name for name in LABELS if figures["entropy_nats"][name] is not None]
    ax.bar(names, [figures["entropy_nats"][name] for name in names], 0.5, color=[LABELS[name] for name in names])
    ax.set(ylabel="mean SLM entropy (nats)", title="Is it unsure there?")
    return ax


def draw_divergent_by(ax, figures: dict, what: str):
    rows = figures[what]
    ax.bar(range(len(rows)), [100 * r["divergent"] for r in rows.values()], 0.6, color=LLM_COLOUR, label="divergent")
    ax.bar(range(len(rows)), [100 * r["neutral"] for r in rows.values()], 0.6, bottom=[100 * r["divergent"] for r in rows.values()], color=THIRD, label="neutral")
    ax.set_xticks(range(len(rows)), [str(int(k) + 1) if k.isdigit() else k for k in rows])
    ax.set(xlabel=what.replace("decile", "tenth"), ylabel="tokens (%)", title=f"By {what.replace('decile', 'tenth')}")
    ax.margins(y=0.08)
    ax.legend(fontsize=7)
    return ax


def load_json(name: str) -> dict:
    return json.loads(results(name).read_text())


def load_answers() -> tuple[list[dict], dict]:
    """Trajectories joined with interventions, and how they were made."""
    rows = [a | b for a, b in zip(read_rows(results("trajectories.jsonl")), read_rows(results("interventions.jsonl")))]
    return rows, load_json("collect.json")


# ---- 4. The frontier -----------------------------------------------------------------------------------------------------


FAMILY_STYLE = {"R2R": (THIRD, "D-"), "R-Stitch": ("#56B4E9", "o-"), "entropy, one token": ("#D55E00", "^-"), "top-2 gap": ("#8C6D31", "v-"), "varentropy": ("#7F3C8D", "<-"),
                "R-Stitch+": ("#CC79A7", "s-"), "random": (GREY, "x-")}
PARTS = {"SLM": SLM_COLOUR, "discarded": "#9ECAE1", "LLM": LLM_COLOUR, "prompt": "#DDDDDD", "catch-up": "#7F7F7F", "router": THIRD}


def load_frontier() -> tuple[list[dict], list[dict]]:
    """(rows of fixed rules and policies, every run of the comparison on test problems), the newest of each. `latency_ms` and the times of the
    outcomes get what a router's own net takes, on average; so does `spent_ms`, as "router"."""
    methods = newest([r for r in read_rows(results("frontier.jsonl")) if r["kind"] != "wall-clock"], ("kind", "name"), lambda r: "fixed" if r["kind"] == "fixed" else r["kind"] + r["name"])
    rows = read_rows(results("compare.jsonl"))
    net_ms = [r["ms"] for r in rows if r["kind"] == "router times"][-1]
    runs = newest([r for r in rows if r["kind"] not in ("calibration", "router times", "wall-clock")], ("kind", "family", "target", "wanted", "value"), lambda r: r["family"])
    for r in (*methods, *runs):
        net = net_time(r | {"family": "R-Stitch+" if r["kind"] in ("policy", "calibrated") else r.get("family")}, net_ms)
        r["latency_ms"] += net
        r["spent_ms"]["router"] = net
        r["outcomes"] = [[*o[:3], o[3] + net] for o in r["outcomes"]]
    return methods, runs


def load_wall() -> dict | None:
    """The newest wall-clock of the comparison, if there is one."""
    return next((r for r in reversed(read_rows(results("compare.jsonl"))) if r["kind"] == "wall-clock"), None)


def timed_against_fitted(wall: dict, runs: list[dict]) -> list[tuple[str, str, str]]:
    """(way to answer, speed-up over the LLM alone by the clock, by the fitted latency), on the same problems."""
    large, llm = of(runs, "LLM alone")[0], np.array(wall["ms"]["LLM alone"])
    out = []
    for name, ms in wall["ms"].items():
        family, _, share = name.partition(" at ")
        r = nearest(runs, family, float(share.rstrip(" %")) / 100 if share else 0.0) if of(runs, family) else None
        cut = {"outcomes": r["outcomes"][:wall["n"]]} if r else None
        clock = ratio_of_means(llm, np.array(ms)), *bootstrap(ratio_of_means, llm, np.array(ms))
        out.append((name, with_interval(clock, " x", 2), with_interval(speed_up(cut, large), " x", 2) if cut else ""))
    return out


def newest(rows: list[dict], key: tuple[str, ...], group: Callable[[dict], str]) -> list[dict]:
    """The last row of each key, and of a group those only that were made with the same, over as many problems, as its last: what older nets or
    problems left in the file is passed over."""
    made = {group(r): (r["made_with"], r["n"]) for r in rows}
    return list({tuple(r.get(name) for name in key): r for r in rows if (r["made_with"], r["n"]) == made[group(r)]}.values())


def of(runs: list[dict], family: str) -> list[dict]:
    """The runs of a family, by LLM share; of what was run once, that."""
    return sorted((r for r in runs if r["family"] == family and r["kind"] != "chosen"), key=lambda r: r["llm_share"])


def nearest(runs: list[dict], family: str, share: float) -> dict:
    return min(of(runs, family), key=lambda r: abs(r["llm_share"] - share))


def gap_of(rows: list[dict], frontier: list[dict]) -> tuple[float, float, float]:
    """Mean gap of some runs or policies against the fixed rules, on the problems that all have answered, with its interval."""
    fixed = [r for r in frontier if r["kind"] == "fixed"]
    n = min(len(r["outcomes"]) for r in (*rows, *fixed))
    return gap_with_interval(outcomes_of(rows, n), outcomes_of(fixed, n))


def more_right(row: dict, other: dict) -> tuple[float, float, float]:
    """How much more often a run is right than another on the problems that both have answered, in percentage points, with its interval."""
    n = min(len(r["outcomes"]) for r in (row, other))
    d = 100 * np.array([a[0] - b[0] for a, b in zip(row["outcomes"][:n], other["outcomes"])], float)
    return float(d.mean()), *bootstrap(np.mean, d)


def speed_up(row: dict, large: dict) -> tuple[float, float, float]:
    """Over the LLM alone, on the problems that both have answered, with its interval."""
    n = min(len(r["outcomes"]) for r in (row, large))
    ms, ms_large = (np.array([o[-1] for o in r["outcomes"][:n]]) for r in (row, large))
    return ratio_of_means(ms_large, ms), *bootstrap(ratio_of_means, ms_large, ms)


def seeds_of(frontier: list[dict], kind: str = "policy") -> dict[str, list[dict]]:
    """Policies that differ by their seed alone, by what they share; of policies without seeds in their names, each for itself."""
    policies = [r for r in frontier if r["kind"] == kind]
    seeded = [r for r in policies if "-seed" in r["name"]]
    groups: dict[str, list[dict]] = {}
    for r in seeded or policies:
        groups.setdefault(r["name"].split("-seed")[0], []).append(r)
    return groups


def frontier_claims(frontier: list[dict], runs: list[dict]) -> list[tuple[str, str, str, str]]:
    """What notebook 4 ends with: (claim, paper, ours, verdict)."""
    small, large = of(runs, "SLM alone")[0], of(runs, "LLM alone")[0]
    named = {r["name"]: r for r in frontier if r["kind"] == "fixed"}
    in_percent = lambda x: signed([100 * v for v in x], 0)  # noqa: E731
    out = []
    for name in ("tau 0.001", "tau 0.02"):
        r, lost = named[name], more_right(named[name], large)
        out.append((f"R-Stitch at {name}: right against the LLM, pp; speed-up", "little loss", f"{signed(lost)}; {with_interval(speed_up(r, large), ' x', 2)}",
                    verdict(lost, 0, "more", "a loss", "no loss seen")))
        n = min(len(x["outcomes"]) for x in (r, small))
        gain = gap_with_interval(outcomes_of([r], n), outcomes_of([small, large], n), mixtures=True)
        out.append(("... gap against random per problem, %", "not compared", in_percent(gain), verdict(gain, 0, "better", "worse", "undecided")))
    for name, rows in seeds_of(frontier).items():
        x = gap_of(rows, frontier)
        out.append((f"R-Stitch+, {name}, gap against fixed rules, %", "better", in_percent(x), verdict(x, 0, "reproduces", "does not reproduce", "undecided")))
    for name, rows in seeds_of(frontier, "calibrated").items():
        x = gap_of(rows, frontier)
        out.append((f"R-Stitch+, {name}, its threshold set on calibration, gap, %", "not compared", in_percent(x), verdict(x, 0, "better", "worse", "undecided")))
    for name, title in (("R-Stitch+", "R-Stitch+ with its threshold moved,"), ("R2R", "R2R at")):
        for r in of(runs, name):
            x = gap_of([r], frontier)
            out.append((f"{title} {100 * r['llm_share']:.1f} % LLM, gap against fixed rules, %", "not compared", in_percent(x), verdict(x, 0, "better", "worse", "undecided")))
    alone = [small]
    for name in ("top-2 gap", "varentropy"):
        for share in (0.05, 0.1, 0.15, 0.2):
            x = difference(alone + of(runs, name), alone + of(runs, "R-Stitch"), share, len(small["outcomes"]))
            if not np.isnan(x).any():
                out.append((f"{name} against the entropy, both as in Algorithm 1, at {100 * share:g} % LLM, pp", "not tried", signed(x), verdict(x, 0, "better", "worse", "no difference seen")))
    for r in of(runs, "speculative decoding"):
        x = speed_up(r, large)
        out.append((f"speculative decoding (n = {r['n']}): fitted speed-up over the LLM, passes only", "0.65 to 1.25 x", with_interval(x, " x", 2), verdict(x, 1, "faster", "slower", "undecided")))
    return out


def mixed(small: dict, large: dict, q: float) -> tuple[float, float, float]:
    """(right, milliseconds, LLM share) where each whole problem goes to the LLM with probability q, else to the SLM."""
    right, ms, tokens = ((1 - q) * small[k] + q * large[k] for k in ("accuracy", "latency_ms", "tokens"))
    return right, ms, q * large["tokens"] / tokens


def draw_frontier(ax, frontier: list[dict], runs: list[dict], against: str = "latency_ms"):
    """Right answers against fitted latency (or LLM share): every fixed rule, the families over their knob, the two models alone, and what
    was run once."""
    scale = 100 if against == "llm_share" else 1
    point = lambda r: (scale * r[against], 100 * r["accuracy"])  # noqa: E731
    ax.plot(*zip(*[point(r) for r in frontier if r["kind"] == "fixed" and "alone" not in r["name"]]), ".", color="#BBBBBB", ms=4, label="other fixed rules")
    for name, (colour, marker) in FAMILY_STYLE.items():
        if family := of(runs, name):
            ax.plot(*zip(*[point(r) for r in family]), marker, color=colour, ms=4, lw=1, label=name)
            low, high = zip(*[(100 * (r["accuracy"] - r["accuracy_95"][0]), 100 * (r["accuracy_95"][1] - r["accuracy"])) for r in family])
            ax.errorbar(*zip(*[point(r) for r in family]), [low, high], fmt="none", color=colour, lw=0.6)
    small, large = of(runs, "SLM alone")[0], of(runs, "LLM alone")[0]
    line = np.array([mixed(small, large, q) for q in np.linspace(0, 1, 101)])
    ax.plot(scale * line[:, 1 if scale == 1 else 2], 100 * line[:, 0], "--", color=GREY, lw=1, label="random per problem")
    once = [("SLM alone", "SLM alone", "*", SLM_COLOUR, (-2, 12)), ("LLM alone", "LLM alone", "*", LLM_COLOUR, (-6, -14)), ("control", "control: a large model\nof short answers", "P", LLM_COLOUR, (9, -20)),
            ("speculative decoding", "speculative decoding", "X", "black", (-4, 7))] + [("live labels", "live labels", "P", THIRD, (8, -10))] * (scale == 100)
    for name, label, marker, colour, offset in once:
        for r in of(runs, name):
            if scale == 1 or name not in ("LLM alone", "control", "speculative decoding"):
                ax.plot(*point(r), marker, color=colour, ms=12 if marker == "*" else 8)
                ax.annotate(label, point(r), offset, textcoords="offset points", ha="left" if offset[0] > -3 else "right", color=colour, fontsize=8,
                            bbox={"fc": "white", "ec": "none", "alpha": 0.8, "pad": 0.5})
    ax.set(xlabel="tokens written by the LLM (%), lower is better" if scale == 100 else "fitted latency at batch 1, nets included (ms per problem), lower is better",
           ylabel="right answers (%), higher is better", ylim=(0, 105))
    return ax


def draw_spent(ax, runs: list[dict], share: float = 0.1):
    """Where the milliseconds of an answer go, by router, each family at the run nearest to an LLM share."""
    families = [name for name in ("SLM alone", "control", *FAMILY_STYLE, "speculative decoding", "LLM alone") if of(runs, name)]
    for i, name in enumerate(families):
        r, at = nearest(runs, name, share), 0.0
        for part, colour in PARTS.items():
            ax.barh(i, r["spent_ms"][part], left=at, color=colour, label=part if i == 0 else None)
            at += r["spent_ms"][part]
        ax.text(at, i, f" {100 * r['accuracy']:.0f} % right", va="center", fontsize=8)
    names = [f"{name}, {100 * nearest(runs, name, share)['llm_share']:.1f} % LLM" if name in FAMILY_STYLE else name for name in families]
    ax.set_yticks(range(len(families)), names)
    ax.set(xlabel="fitted latency at batch 1 (ms per problem), lower is better", title="Where the time goes")
    ax.set_xlim(0, 1.15 * ax.get_xlim()[1])
    ax.legend(fontsize=7, ncol=2, loc="lower right")
    return ax


def reached(row: dict, small: dict, longer: bool) -> tuple[float, float, float]:
    """What a tau that was chosen for a share or a latency came to, with its interval, on the problems to which the SLM's own answers are no
    longer than those that it was chosen from, or on the others."""
    kept = [o for o, s in zip(row["outcomes"], small["outcomes"]) if (s[1] > row["median_tokens"]) == longer]
    if row["wanted"] == "share":
        large, tokens = (np.array([o[k] for o in kept], float) for k in (2, 1))
        return ratio_of_means(large, tokens), *bootstrap(ratio_of_means, large, tokens)
    ms = [o[3] for o in kept]
    return float(np.mean(ms)), *bootstrap(np.mean, ms)


def draw_chosen(ax, runs: list[dict], wanted: str):
    """What a tau chosen from the SLM's own answers was to cost and what it cost."""
    small, scale = of(runs, "SLM alone")[0], 100 if wanted == "share" else 1
    rows = [r for r in runs if r["kind"] == "chosen" and r["wanted"] == wanted]
    for longer, colour, label in ((False, SLM_COLOUR, f"SLM answer of up to {rows[0]['median_tokens']:g} tokens, as tau was chosen on"), (True, LLM_COLOUR, "longer SLM answer")):
        points = scale * np.array([(r["predicted_share" if wanted == "share" else "predicted_ms"], *reached(r, small, longer)) for r in rows])
        ax.errorbar(points[:, 0], points[:, 1], [points[:, 1] - points[:, 2], points[:, 3] - points[:, 1]], fmt="o", color=colour, capsize=3, label=label)
    ends = [0, 1.1 * max(points[:, 0])]
    ax.plot(ends, ends, color=GREY, lw=1)
    unit = "LLM tokens (%)" if wanted == "share" else "latency (ms per problem)"
    ax.set(xlabel=f"{unit}, as predicted from the SLM alone", ylabel=f"{unit}, as it was", title=f"tau for a wanted {wanted} (nearer to the line is better)")
    ax.legend(fontsize=7)
    return ax


def at_budget(outcomes: list[list], budget: float) -> float:
    """Share of answers that are right within a number of tokens; outcomes are (right, tokens, ...)."""
    return float(np.mean([bool(o[0]) and o[1] <= budget for o in outcomes]))


def draw_budget(ax, runs: list[dict]):
    """Right answers if every answer is cut off after so many tokens."""
    budgets = np.linspace(0.1, 1.6, 61) * of(runs, "LLM alone")[0]["tokens"]
    shown = [(name, of(runs, name)[0], colour) for name, colour in (("SLM alone", SLM_COLOUR), ("LLM alone", LLM_COLOUR))]
    shown += [(name, nearest(runs, name, share), FAMILY_STYLE[name][0]) for name, share in (("R2R", 0.1), ("R-Stitch", 0.15)) if of(runs, name)]
    for name, r, colour in shown:
        label = name if "alone" in name else f"{name}, {100 * r['llm_share']:.0f} % LLM"
        ax.plot(budgets, [100 * at_budget(r["outcomes"], b) for b in budgets], color=colour, label=label)
    ax.set(xlabel="answers cut off after (tokens)", ylabel="right answers (%), higher is better", title="Under a budget")
    ax.legend(fontsize=7)
    return ax


def draw_frontiers(frontier: list[dict], runs: list[dict]):
    """Against latency and against LLM share, with one legend below."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 5.2))
    for ax, against in zip(axes, ("latency_ms", "llm_share")):
        draw_frontier(ax, frontier, runs, against)
    axes[1].set(xlim=(-1, 36))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncol=9, fontsize=8)
    return figure


def main() -> None:
    """The README's picture: python -m analysis.presentation.figures"""
    argparse.ArgumentParser(allow_abbrev=False, description=main.__doc__).parse_args()
    style()
    draw_frontiers(*load_frontier()).savefig(results("frontier.png"), dpi=110)


if __name__ == "__main__":
    main()

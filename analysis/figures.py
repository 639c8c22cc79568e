"""What the notebooks draw, and every number their verdicts rest on. No torch: it reads the files of analysis/results.

Entropies are in nats unless a name says normalised. Intervals are 95 %, bootstrapped over problems.
"""
import json
import os
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from analysis.stats import PAPER_LABELS, auroc, bootstrap, net_time, ratio_of_means, read_rows, wilson

SLM_COLOUR, LLM_COLOUR, THIRD, GREY = "#0072B2", "#E69F00", "#009E73", "#999999"  # told apart by the colour-blind too
WINDOWS = (1, 4, 8, 12, 16)


def results(name: str) -> Path:
    """A file of results: of the folder RSTITCH_RESULTS names, else of this repository."""
    return Path(os.environ.get("RSTITCH_RESULTS", Path(__file__).parent / "results")) / name


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


def with_interval(x: tuple[float, float, float], unit: str = "", digits: int = 3) -> str:
    return f"{x[0]:.{digits}f}{unit} [{x[1]:.{digits}f}, {x[2]:.{digits}f}]"


def percent(x: tuple[float, float, float], digits: int = 1) -> str:
    return with_interval(tuple(100 * v for v in x), digits=digits)


def verdict(x: tuple[float, float, float], reference: float, above: str = "raised", below: str = "lowered", neither: str = "no different") -> str:
    """What an interval says against a reference."""
    return above if x[1] > reference else below if x[2] < reference else neither


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
    ax.text(WINDOWS[-1], overall_mean(rows), "mean of the wrong answers' tokens", ha="right", va="bottom", color="#555555")
    ax.set(xlabel="window (tokens)", ylabel="mean entropy (nats)", title="Entropy at harmful tokens", xticks=WINDOWS)
    ax.legend(fontsize=7)
    return ax


def draw_uncaught(ax, rows: list[dict]):
    taus = np.geomspace(1e-4, 3, 60)
    for which, colour in (("first", SLM_COLOUR), ("last", LLM_COLOUR)):
        ax.plot(taus, [100 * below(harmful(rows, which), tau)[0] for tau in taus], color=colour, label=f"{which} harmful token")
    every = np.concatenate([row["H"] for row in rows if row["right"]])
    ax.plot(taus, [100 * (every <= tau).mean() for tau in taus], color=GREY, label="all tokens")
    ax.set(xscale="log", xlabel="tau (nats)", ylabel="tokens with entropy <= tau (%)", title="Harmful tokens that a threshold misses (lower is better)")
    ax.legend(fontsize=7)
    return ax


def draw_positions(ax, rows: list[dict]):
    first, last = ([t / len(row["H"]) for row, t in harmful(rows, which)] for which in ("first", "last"))
    ax.hist([first, last], bins=10, range=(0, 1), color=[SLM_COLOUR, LLM_COLOUR], label=["first", "last"])
    ax.set(xlabel="place in the answer", ylabel="answers", title="Where answers are spoilt")
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
    ax.legend(fontsize=7)
    return ax


def load_json(name: str) -> dict:
    return json.loads(results(name).read_text())


def load_answers() -> tuple[list[dict], dict]:
    """Trajectories joined with interventions, and how they were made."""
    rows = [a | b for a, b in zip(read_rows(results("trajectories.jsonl")), read_rows(results("interventions.jsonl")))]
    return rows, load_json("collect.json")


# ---- 4. The frontier -----------------------------------------------------------------------------------------------------


FAMILY_STYLE = {"R2R": (THIRD, "D-"), "R-Stitch": ("#56B4E9", "o-"), "entropy, one token": ("#D55E00", "^-"), "R-Stitch+": ("#CC79A7", "s-"), "random": (GREY, "x-")}


def load_frontier() -> tuple[list[dict], list[dict]]:
    """(rows of fixed rules and policies, test runs of every family); the newest of each name or knob. `latency_ms` and the times of the
    outcomes get what a router's own net takes, on average."""
    frontier = {(r["kind"], r["name"]): r for r in read_rows(results("frontier.jsonl"))}
    rows = read_rows(results("compare.jsonl"))
    net_ms = [r["ms"] for r in rows if r["kind"] == "router times"][-1]
    runs = {(r["family"], r["knob"]): r for r in rows if r["kind"] == "test"}
    for r in runs.values():
        net = net_time(r, net_ms)
        r["latency_ms"] += net
        r["outcomes"] = [[*o[:3], o[3] + net] for o in r["outcomes"]]
    return [r for r in frontier.values() if r["kind"] != "wall-clock"], list(runs.values())


def draw_frontier(ax, frontier: list[dict], runs: list[dict], against: str = "latency_ms"):
    """Right answers against fitted latency (or LLM share): every fixed rule, the families over their knob, the two models alone."""
    scale = 100 if against == "llm_share" else 1
    point = lambda r: (scale * r[against], 100 * r["accuracy"])  # noqa: E731
    fixed = [r for r in frontier if r["kind"] == "fixed"]
    ax.plot(*zip(*[point(r) for r in fixed if "alone" not in r["name"]]), ".", color="#BBBBBB", ms=4, label="other fixed rules")
    for name, (colour, marker) in FAMILY_STYLE.items():
        family = sorted((r for r in runs if r["family"] == name), key=lambda r: r["llm_share"])
        if family:
            ax.plot(*zip(*[point(r) for r in family]), marker, color=colour, ms=4, lw=1, label=name)
            low, high = zip(*[(100 * (r["accuracy"] - r["accuracy_95"][0]), 100 * (r["accuracy_95"][1] - r["accuracy"])) for r in family])
            ax.errorbar(*zip(*[point(r) for r in family]), [low, high], fmt="none", color=colour, lw=0.6)
    for name, colour, offset in (("SLM alone", SLM_COLOUR, (7, 6)), ("LLM alone", LLM_COLOUR, (-6, -14))):
        for r in fixed:
            if r["name"] == name and point(r)[0] < (40 if against == "llm_share" else float("inf")):
                ax.plot(*point(r), "*", color=colour, ms=12)
                ax.annotate(name, point(r), offset, textcoords="offset points", ha="left" if offset[0] > 0 else "right", color=colour)
    ax.set(xlabel="tokens written by the LLM (%), lower is better" if scale == 100 else "fitted latency at batch 1, nets included (ms per problem), lower is better",
           ylabel="right answers (%), higher is better")
    ax.legend(fontsize=7, loc="center right")
    return ax


def at_budget(outcomes: list[list], budget: int) -> float:
    """Share of answers that are right within a number of tokens; outcomes are (right, tokens, ...)."""
    return float(np.mean([bool(o[0]) and o[1] <= budget for o in outcomes]))


def draw_budget(ax, runs: list[dict], pair: list[dict]):
    """Right answers if every answer is cut off after so many tokens."""
    budgets = np.arange(20, 241, 5)
    near = lambda family, share: min((r for r in runs if r["family"] == family), key=lambda r: abs(r["llm_share"] - share))  # noqa: E731
    n = len(runs[0]["outcomes"])  # the same first problems of one stream
    shown = [(name, next(r for r in pair if r.get("method") == name)["outcomes"][:n], colour) for name, colour in (("SLM", SLM_COLOUR), ("LLM", LLM_COLOUR))]
    shown += [(f"{family}, {100 * near(family, share)['llm_share']:.0f} % LLM", near(family, share)["outcomes"], FAMILY_STYLE[family][0]) for family, share in (("R2R", 0.1), ("R-Stitch", 0.15))]
    for name, outcomes, colour in shown:
        ax.plot(budgets, [100 * at_budget(outcomes, b) for b in budgets], color=colour, label=name)
    ax.set(xlabel="token budget", ylabel="right answers (%), higher is better", title="Under a budget")
    ax.legend(fontsize=7)
    return ax


def main() -> None:
    """The README's picture: python -m analysis.figures"""
    style()
    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    for ax, against in zip(axes, ("latency_ms", "llm_share")):
        draw_frontier(ax, *load_frontier(), against)
    axes[1].set(xlim=(-1, 36))
    figure.savefig(results("frontier.png"), dpi=110)


if __name__ == "__main__":
    main()

"""What the notebooks draw, and every number their verdicts rest on. No torch: it reads the files of
analysis/results.

Entropies are in nats unless a name says normalised. Intervals are 95 %, bootstrapped over problems.
"""
import argparse
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from analysis.instruments.rows import RESULTS, current, read_rows
from analysis.instruments.stats import (
    PAPER_LABELS,
    bootstrap,
    difference,
    gap_with_interval,
    net_time,
    outcomes_of,
    ratio_of_means,
    signed,
    wilson,
    with_interval,
)
from analysis.presentation import real
from analysis.presentation.real import MISSING, entropy_auroc, percent, share_above, table, within_problem

SLM_COLOUR, LLM_COLOUR, THIRD, GREY = "#0072B2", "#E69F00", "#009E73", "#999999"  # for the colour-blind too
WINDOWS = (1, 4, 8, 12, 16)
OURS = "your pair" if "RSTITCH_RESULTS" in os.environ else "pocket pair"  # whose files `results` finds
CLAIM = ("claim", "paper", "ours [95 %]", "verdict")
PAIRS = ("claim", "paper", "real pair", f"{OURS} [95 %]", "verdict")

Finding = tuple[str, str]  # a figure and what it says of a claim


def results(name: str) -> Path:
    """A file of results: of the folder RSTITCH_RESULTS names, else of this repository."""
    return Path(os.environ.get("RSTITCH_RESULTS", RESULTS)) / name


def style() -> None:
    plt.rcParams.update({
        "figure.figsize": (9, 3.6), "figure.dpi": 110, "figure.constrained_layout.use": True,
        "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False,
        "font.size": 9, "axes.titlesize": 10, "legend.fontsize": 7,
    })


def conditions(row: dict) -> str:
    """How rows were made, in a line."""
    return (f"{row['command']}; n = {row['n']}, seed {row['seed']}, {row['device']}, {row['dtype']}, "
            f"torch {row['torch']}, transformers {row['transformers']}, commit {row['commit']}")


def verdicts(rows: Sequence[tuple[str, ...]], head: tuple[str, ...] = CLAIM) -> str:
    """Claim, paper, figures, verdict, as a table."""
    return table([head, *rows])


def verdict(x: tuple[float, float, float], reference: float, above: str = "raised", below: str = "lowered",
            neither: str = "no different") -> str:
    """What an interval says against a reference."""
    return above if x[1] > reference else below if x[2] < reference else neither


def sized(x: tuple[float, float, float], paper: float) -> str:
    """How a share or a ratio compares with the paper's: within a quarter of it, within five times, or
    beyond."""
    ratio = max(x[0] / paper, paper / x[0]) if x[0] else float("inf")
    if ratio <= 1.25:
        return "same size"
    return ("far " if ratio > 5 else "") + ("more" if x[0] > paper else "less")


def load_real() -> list[dict]:
    """The real pair's answers, as far as there are any."""
    return read_rows(results("real/answers.jsonl"))


def line(claim: str, paper: str, own: Finding | None, decisive: Finding | None = None) -> tuple[str, ...]:
    """A line of a table of `PAIRS`: the real pair's finding decides. As long as it has none, the verdict is
    said to be that of the other pair."""
    figure, said = own or (MISSING, "")
    if decisive:
        return claim, paper, decisive[0], figure, decisive[1]
    return claim, paper, MISSING, figure, said and f"{OURS}: {said}"


# ---- 1. Entropy of wrong answers (R-Stitch Fig. 3a, 3b) ----------------------------------------------------


SIGNAL = ("a signal", "a reversed signal", "no signal")
ENTROPY = (("median entropy, right and wrong", "0.059, 0.090"), ("AUROC, wrong against right", "not given"),
           ("... within one problem", "not given"), ("tokens above 0.1 nats, %", "10.65"),
           ("tokens above 0.1 normalised, %", "10.65 (if Eq. 1 is meant)"))


def medians(rows: list[dict]) -> tuple[float, float]:
    """Median over the SLM's right and over its wrong answers of their mean entropy, in nats."""
    right, wrong = (np.median([np.mean(row["H"]) for row in rows if row["slm"] == k]) for k in (1, 0))
    return float(right), float(wrong)


def entropy_findings(rows: list[dict], vocab: int) -> list[Finding | None]:
    """What one pair's trajectories say of each claim of `ENTROPY`; None where they cannot tell."""
    if len({bool(row["slm"]) for row in rows}) < 2:
        return [None] * len(ENTROPY)
    (right, wrong), whole, inside = medians(rows), entropy_auroc(rows), within_problem(rows)
    within = f"{with_interval(inside[:3])}, n = {inside[3]}", verdict(inside, 0.5, *SIGNAL[:2], "none seen")
    shares = [share_above(rows, limit) for limit in (0.1, 0.1 * np.log(vocab))]
    return [(f"{right:.3f}, {wrong:.3f}", "reproduces" if wrong > right else "does not reproduce"),
            (with_interval(whole), verdict(whole, 0.5, *SIGNAL)), within if inside[3] else None,
            *((percent(x), sized(x, 0.1065)) for x in shares)]


def entropy_claims(rows: list[dict], vocab: int, answers: list[dict]) -> list[tuple[str, ...]]:
    """What notebook 1 ends with, from a pair's trajectories and the real pair's answers: a table of
    `PAIRS`."""
    decisive = entropy_findings(real.trajectories(answers), real.VOCAB)
    lines = [line(*claim, *found) for claim, *found in zip(ENTROPY, entropy_findings(rows, vocab), decisive)]
    strata = []
    for k in sorted({row["steps"] for row in rows if row["steps"]}):
        x = entropy_auroc(rows, k)
        said = verdict(x, 0.5, *SIGNAL)
        strata.append(
            (f"... with {k} steps", "not given", "no step count", with_interval(x), f"{OURS}: {said}"))
    return [*lines[:2], *strata, *lines[2:]]


def draw_answer_entropies(ax, rows: list[dict]):
    parts = ax.violinplot([[np.mean(row["H"]) for row in rows if row["slm"] == k] for k in (1, 0)],
                          showmedians=True)
    for part in (*parts["bodies"], parts["cbars"], parts["cmins"], parts["cmaxes"], parts["cmedians"]):
        part.set_color(SLM_COLOUR)
    ax.set_xticks([1, 2], ["right", "wrong"])
    ax.set(ylabel="mean token entropy of an answer (nats)", title="The SLM's greedy answers", yscale="log")
    return ax


def draw_strata(ax, rows: list[dict]):
    strata = sorted({row["steps"] for row in rows if row["steps"]})
    bars = [("all", entropy_auroc(rows))] + [(f"{k} steps", entropy_auroc(rows, k)) for k in strata]
    if any(row["samples"] for row in rows):
        bars.append(("within one\nproblem", within_problem(rows)[:3]))
    for i, (_, (x, low, high)) in enumerate(bars):
        ax.errorbar(i, x, [[x - low], [high - x]], fmt="o", color=SLM_COLOUR, capsize=3)
    ax.axhline(0.5, color=GREY, lw=1)
    ax.set_xticks(range(len(bars)), [name for name, _ in bars])
    ax.set(ylabel="AUROC, wrong against right\n(0.5: no signal; higher: a better signal)",
           title="Does entropy tell, difficulty apart?", ylim=(0.4, 1))
    return ax


def draw_limits(ax, limits: Sequence[tuple[float, str]], title: str) -> None:
    """Vertical lines, named above the axes, below the title."""
    for x, name in limits:
        ax.axvline(x, color=GREY, lw=1)
        ax.text(x, 1.02, name, ha="center", transform=ax.get_xaxis_transform(), color="#555555", fontsize=7)
    ax.set_title(title, pad=18)


def draw_token_entropies(ax, rows: list[dict], vocab: int):
    H = np.sort(np.concatenate([row["H"] for row in rows]))
    ax.plot(np.maximum(H, 1e-6), 100 * (1 - np.arange(len(H)) / len(H)), color=SLM_COLOUR)
    limits = [(0.1, "0.1\nnats"), (0.1 * np.log(vocab), "0.1 norm-\nalised")]
    draw_limits(ax, limits, "How many tokens are uncertain?")
    ax.set(xscale="log", xlim=(1e-4, 5), xlabel="entropy of a token (nats)", ylabel="SLM tokens above it (%)")
    return ax


# ---- 2. Harmful tokens (R-Stitch Fig. 3c) ------------------------------------------------------------------


def crossings(right: str) -> list[int]:
    """Positions t of harmful tokens: the LLM, going on from y_<t, is right in the end, and from y_<=t is not.
    Where not every prefix was tried ("-") t is the last one that was, and the harmful token lies between it
    and the next."""
    asked = [t for t, letter in enumerate(right) if letter != "-"]
    return [t for t, after in zip(asked, asked[1:]) if right[t] == "1" and right[after] == "0"]


def harmful(rows: list[dict], which: str = "first") -> list[tuple[dict, int]]:
    """(row, position) of the first or last crossing of every answer that has one; rows hold `H` and
    `right`."""
    return [(row, crossings(row["right"])[0 if which == "first" else -1]) for row in rows
            if crossings(row["right"])]


def control(row: dict, t: int) -> int | None:
    """What to compare with: the same token elsewhere in the answer, no crossing, as near as can be; None if
    there is none."""
    bad, token = set(crossings(row["right"])), row["text"][t]
    others = [s for s in range(len(row["H"])) if s not in bad and row["text"][s] == token]
    return min(others, key=lambda s: (abs(s - t), s), default=None)


def window_mean(H: list[float], t: int, width: int, around: bool = False) -> float:
    """Mean entropy over `width` tokens that end at t, or that lie around it (t in the middle), as far as the
    answer reaches."""
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
    return sum(
        bool(found) and "1" in row["right"][found[0] + 1:] for row in rows
        if (found := crossings(row["right"])))


def commonest(found: list[tuple[dict, int]]) -> tuple[str, int]:
    """The text that most harmful tokens have, and how many do."""
    texts = [row["text"][t] for row, t in found]
    return max(((text, texts.count(text)) for text in set(texts)), key=lambda pair: pair[1])


def overall_mean(rows: list[dict]) -> float:
    """Mean entropy of the SLM's tokens in the (wrong) answers that were looked into."""
    return float(np.mean(np.concatenate([row["H"] for row in rows if row["right"]])))


def below(found: list[tuple[dict, int]], tau: float) -> tuple[float, float, float]:
    """Share of harmful tokens whose entropy does not exceed tau (nats): no threshold at tau would have caught
    them."""
    k = sum(row["H"][t] <= tau for row, t in found)
    return k / len(found), *wilson(k, len(found))


def sampled_first(row: dict, continuations: int) -> int | None:
    """First position where the share of sampled continuations that are right falls from more than half to
    half or less."""
    p = row["sampled"]
    asked = [t for t, k in enumerate(p) if k is not None]
    return next((t for t, after in zip(asked, asked[1:]) if 2 * p[t] > continuations >= 2 * p[after]), None)


def agreement(rows: list[dict], continuations: int) -> tuple[int, int, int]:
    """(answers with sampled continuations and a crossing both ways, those whose first crossings agree, those
    within 3 tokens)."""
    both = [
        (crossings(row["right"])[0], s) for row in rows
        if row["sampled"] and crossings(row["right"]) and (s := sampled_first(row, continuations)) is not None
    ]
    return len(both), sum(a == b for a, b in both), sum(abs(a - b) <= 3 for a, b in both)


FIG_3C = {16: "0.0283 (1.09 x)", 8: "0.0336 (1.30 x)", 1: "0.0244 (0.94 x)"}  # over the mean of all, 0.0259


def around(rows: list[dict], which: str, width: int) -> Finding:
    """Entropy around the first or last harmful token against the mean of the wrong answers' tokens."""
    mean, x = overall_mean(rows), against(harmful(rows, which), width, around=True)
    return f"{with_interval(x)} ({x[0] / mean:.1f} x)", verdict(x, mean)


def beside_control(rows: list[dict], which: str) -> Finding:
    """Entropy of the first or last harmful tokens minus that of their controls."""
    x = over_control(harmful(rows, which))
    return f"{with_interval(x[:3])}, n = {x[3]}", verdict(x, 0)


def missed(rows: list[dict], which: str, tau: float, vocab: int) -> Finding:
    """Share of the first or last harmful tokens that no threshold at tau (normalised) would have caught."""
    return percent(below(harmful(rows, which), tau * np.log(vocab))), ""


def means(rows: list[dict]) -> Finding:
    """Mean entropy of the wrong answers' tokens, and of all."""
    every = np.mean(np.concatenate([row["H"] for row in rows]))
    return f"{overall_mean(rows):.3f}; of all answers {every:.3f}", ""


def of_both(rows: list[dict], vocab: int, decisive: list[dict], claims: Sequence[tuple]) -> list[tuple]:
    """Lines of a table of `PAIRS` from (claim, paper, finding of (rows, vocab)); the real pair's rows may be
    none."""
    return [line(claim, paper, finding(rows, vocab), finding(decisive, real.VOCAB) if decisive else None)
            for claim, paper, finding in claims]


def around_claims(which: str, *widths: int) -> list[tuple]:
    return [(f"around the {which} harmful token, {width}" if width > 1 else f"at the {which} harmful token",
             FIG_3C[width], lambda rows, vocab, width=width: around(rows, which, width)) for width in widths]


def control_claim(which: str) -> tuple:
    return (f"at the {which}, minus its control", "not given",
            lambda rows, vocab: beside_control(rows, which))


def missed_claims(which: str, *taus: float) -> list[tuple]:
    return [(f"{which} harmful tokens that tau {tau:g} misses, %", "not given",
             lambda rows, vocab, tau=tau: missed(rows, which, tau, vocab)) for tau in taus]


def window_claims(fixed: list[dict]) -> list[tuple[str, ...]]:
    """Right answers of routers that compare tau 0.005 with the mean entropy of a window, against those of one
    token."""
    named = {row["name"]: row for row in fixed}
    out = []
    for width in (1, 2, 4, 8):
        if row := named.get("tau 0.005" + (f", window {width}" if width > 1 else "")):
            says = verdict((0, *row["accuracy_95"]), named["tau 0.005"]["accuracy"], "better", "worse", "")
            right = percent((row["accuracy"], *row["accuracy_95"]))
            out.append(line(f"right at tau 0.005, window {width}, %", "not tried", (right, says)))
    return out


def harmful_claims(rows: list[dict], vocab: int, decisive: list[dict]) -> list[tuple[str, ...]]:
    """What notebook 2 ends with: a table of `PAIRS`."""
    mean = "mean entropy of the wrong answers' tokens", "0.0259 (of all)", lambda rows, vocab: means(rows)
    claims = [mean, *around_claims("first", 16, 8, 1), *around_claims("last", 1), control_claim("first"),
              *missed_claims("first", 0.005, 0.02)]
    return of_both(rows, vocab, decisive, claims)


def harmful_details(rows: list[dict], vocab: int, fixed: list[dict],
                    decisive: list[dict]) -> list[tuple[str, ...]]:
    """The rest of the figures on harmful tokens, and windowed routers: a table of `PAIRS`."""
    claims = [*around_claims("last", 16, 8), control_claim("last"), *missed_claims("first", 0.001),
              *missed_claims("last", 0.001, 0.005, 0.02)]
    return [*of_both(rows, vocab, decisive, claims), *window_claims(fixed)]


def harmful_summary(rows: list[dict], continuations: int) -> str:
    """How many answers were looked into and what was found, in words."""
    looked, wrong = [row for row in rows if row["right"]], [row for row in rows if not row["slm"]]
    found, times = harmful(rows), [len(crossings(row["right"])) for row in looked]
    text, count = commonest(found)
    counted = ", ".join(f"{k}: {times.count(k)}" for k in sorted(set(times)))
    sampled, same, near = agreement(rows, continuations)
    return (
        f"{len(rows)} problems; the SLM is wrong on {len(wrong)}, of which the LLM is wrong on "
        f"{sum(not row['llm'] for row in wrong)} (left out); {len(looked)} looked into, {len(found)} with "
        f"a harmful token, {times.count(0)} without\n"
        f"after the first crossing the answer is right again in {recovered(looked)} of {len(found)}; the "
        f"commonest first harmful token is {text!r}, {count} times\n"
        f"harmful tokens per answer: {counted}"
        + (f"\nof {sampled} answers with sampled continuations the first crossing is the same token in "
           f"{same}, within 3 tokens in {near}" if sampled else ""))


def draw_windows(ax, rows: list[dict]):
    for which, colour in (("first", SLM_COLOUR), ("last", LLM_COLOUR)):
        for around, marker in ((True, "o"), (False, "s")):
            points = [against(harmful(rows, which), w, around) for w in WINDOWS]
            x, low, high = np.array(points).T
            ax.errorbar(np.array(WINDOWS) + (0.15 if around else -0.15), x, [x - low, high - x],
                        fmt=f"{marker}-", color=colour, capsize=2, lw=1, mfc=colour if around else "white",
                        label=f"{which}, window {'around' if around else 'before'} it")
    ax.axhline(overall_mean(rows), color=GREY, lw=1, label="mean of the wrong answers' tokens")
    ax.set(xlabel="window (tokens)", ylabel="mean entropy (nats)", xticks=WINDOWS,
           title="Entropy at the first and last harmful token")
    ax.set_ylim(0, 1.5 * ax.get_ylim()[1])  # room for the legend
    ax.legend(loc="upper right")
    return ax


def draw_uncaught(ax, rows: list[dict], vocab: int):
    taus = np.geomspace(1e-4, 3, 60)
    for which, colour in (("first", SLM_COLOUR), ("last", LLM_COLOUR)):
        ax.plot(taus, [100 * below(harmful(rows, which), tau)[0] for tau in taus], color=colour,
                label=f"{which} harmful token")
    every = np.concatenate([row["H"] for row in rows if row["right"]])
    ax.plot(taus, [100 * (every <= tau).mean() for tau in taus], color=GREY, label="all tokens")
    limits = [(tau * np.log(vocab), f"{tau:g}") for tau in (0.005, 0.02)]
    draw_limits(ax, limits, "Harmful tokens that a threshold misses")
    ax.set(xscale="log", xlabel="tau (nats; above: normalised)",
           ylabel="tokens with entropy <= tau (%),\nof harmful ones lower is better")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncol=3)
    return ax


def draw_positions(ax, rows: list[dict]):
    first, last = ([t / len(row["H"]) for row, t in harmful(rows, which)] for which in ("first", "last"))
    ax.hist([first, last], bins=10, range=(0, 1), color=[SLM_COLOUR, LLM_COLOUR],
            label=["first harmful token", "last harmful token"])
    ax.set(xlabel="place in the answer (0 start, 1 end)", ylabel="answers", title="Where answers are spoilt")
    ax.legend()
    return ax


# ---- 3. Divergent tokens (R2R) -----------------------------------------------------------------------------


LABELS = {"identical": SLM_COLOUR, "neutral": THIRD, "divergent": LLM_COLOUR, "unjudged": "#CC79A7"}


def label_findings(labels: dict, checked: Sequence[bool]) -> list[Finding | None]:
    """What one pair's labels say: the shares, the entropy's ratio, and how many of those that were drawn of
    all and checked by hand are wrong."""
    shares, ratio, n = labels["shares"], labels["entropy_ratio"], len(checked)
    wrong = checked.count(False)
    error = percent((wrong / n, *wilson(wrong, n))) + f" %, n = {n}" if n else ""
    return [*((percent(shares[name], 2), sized(shares[name], paper)) for name, paper in PAPER_LABELS.items()),
            (percent(shares["unjudged"], 2), ""),
            (with_interval(ratio, " x", 1), f"{verdict(ratio, 1)}; {sized(ratio, 3.8)}"),
            (error, "") if n else None]


def label_claims(labels: dict, checked: list[dict], decisive: dict | None = None,
                 read: Sequence[dict] = ()) -> list[tuple[str, ...]]:
    """What notebook 3 ends with, from the figures of `analysis.label` and the positions checked by hand, and
    those of the real pair: a table of `PAIRS`."""
    claims = [*((f"{name}, %", f"{100 * paper:g}") for name, paper in PAPER_LABELS.items()),
              ("unjudged, %", "not given"), ("SLM entropy, divergent over others", "3.8 x"),
              ("labels of differing tokens wrong, by hand", "not given")]
    own = label_findings(labels, [row["right"] for row in checked if row["drawn"].startswith("of all")])
    told = [(row["label"] == "N") == row["same"] for row in read if row["same"] is not None]
    other = label_findings(decisive, told) if decisive else [None] * len(claims)
    return [line(*claim, *found) for claim, *found in zip(claims, own, other) if any(found)]


def draw_labels(ax, figures: dict):
    for i, (name, colour) in enumerate(LABELS.items()):
        x, low, high = (100 * v for v in figures["shares"][name])
        ax.bar(i, x, 0.5, color=colour, yerr=[[x - low], [high - x]], capsize=3)
        if name in PAPER_LABELS:
            ax.plot(i + 0.32, 100 * PAPER_LABELS[name], "D", mfc="none", color="black",
                    label="paper" if i == 0 else None)
    ax.set_xticks(range(len(LABELS)), LABELS)
    ax.set(yscale="log", ylabel="tokens of the LLM's answers (%)", title="What the SLM would write there")
    ax.legend()
    return ax


def draw_label_entropies(ax, figures: dict):
    names = [name for name in LABELS if figures["entropy_nats"][name] is not None]
    ax.bar(names, [figures["entropy_nats"][name] for name in names], 0.5,
           color=[LABELS[name] for name in names])
    ax.set(ylabel="mean SLM entropy (nats)", title="Is it unsure there?")
    return ax


def draw_divergent_by(ax, figures: dict, what: str):
    rows = figures[what]
    ax.bar(range(len(rows)), [100 * r["divergent"] for r in rows.values()], 0.6, color=LLM_COLOUR,
           label="divergent")
    ax.bar(range(len(rows)), [100 * r["neutral"] for r in rows.values()], 0.6,
           bottom=[100 * r["divergent"] for r in rows.values()], color=THIRD, label="neutral")
    ax.set_xticks(range(len(rows)), [str(int(k) + 1) if k.isdigit() else k for k in rows])
    ax.set(xlabel=what.replace("decile", "tenth"), ylabel="tokens (%)",
           title=f"By {what.replace('decile', 'tenth')}")
    ax.set_ylim(0,
                1.3 * max(100 * (r["divergent"] + r["neutral"]) for r in rows.values()))  # the legend's room
    ax.legend(loc="upper left")
    return ax


def load_json(name: str) -> dict:
    return json.loads(results(name).read_text())


def load_answers(folder: str = "") -> tuple[list[dict], dict]:
    """Trajectories joined with interventions, and how they were made."""
    parts = (read_rows(results(folder + name)) for name in ("trajectories.jsonl", "interventions.jsonl"))
    return [a | b for a, b in zip(*parts)], load_json(folder + "collect.json")


def load_real_labels() -> tuple[dict | None, list[dict]]:
    """The figures of the real pair's labels, and the positions that were read, with their labels; none before
    they are made."""
    if not results("real/labels.json").exists():
        return None, []
    return load_json("real/labels.json"), read_rows(results("real/judged_by_hand.jsonl"))


def load_pairs() -> dict[str, tuple[list[dict], dict]]:
    """`load_answers` of each pair: of the real one, as far as there are any, and of that whose files these
    are."""
    real_pair = {"real pair": load_answers("real/")} if results("real/collect.json").exists() else {}
    return real_pair | {OURS: load_answers()}


def load_fixed() -> list[dict]:
    """The rows of the fixed rules, the newest of each name."""
    return list({row["name"]: row for row in read_rows(results("frontier.jsonl"))
                 if row["kind"] == "fixed"}.values())


def load_checked() -> list[dict]:
    """Labels that a person has checked; of the pocket pair only."""
    return read_rows(results("label_check.jsonl"))


# ---- 4. The frontier ---------------------------------------------------------------------------------------


FAMILY_STYLE = {
    "R2R": (THIRD, "D-"), "R-Stitch": ("#56B4E9", "o-"), "entropy, one token": ("#D55E00", "^-"),
    "top-2 gap": ("#8C6D31", "v-"), "varentropy": ("#7F3C8D", "<-"), "R-Stitch+": ("#CC79A7", "s-"),
    "random": (GREY, "x-"),
}
PARTS = {
    "SLM": SLM_COLOUR, "discarded": "#9ECAE1", "LLM": LLM_COLOUR, "prompt": "#DDDDDD", "catch-up": "#7F7F7F",
    "router": THIRD,
}


def load_frontier() -> tuple[list[dict], list[dict]]:
    """(rows of fixed rules and policies, every run of the comparison on test problems), the newest of each.
    `latency_ms` and the times of the outcomes get what a router's own net takes, on average, where it is not
    in them; so does `spent_ms`, as "router"."""
    methods = current([r for r in read_rows(results("frontier.jsonl"))
                      if r["kind"] not in ("router times", "wall-clock")],
                     ("kind", "name"), lambda r: "fixed" if r["kind"] == "fixed" else r["kind"] + r["name"])
    rows = read_rows(results("compare.jsonl"))
    net_ms = [r["ms"] for r in rows if r["kind"] == "router times"][-1]
    runs = current([r for r in rows if r["kind"] not in ("calibration", "router times", "wall-clock")],
                  ("kind", "family", "target", "wanted", "value"), lambda r: r["family"])
    for r in (*methods, *runs):
        family = "R-Stitch+" if r["kind"] in ("policy", "calibrated") else r.get("family")
        if r.get("nets_ms"):
            r["spent_ms"]["router"] = r["latency_ms"] - sum(r["spent_ms"].values())
            continue
        net = net_time(r | {"family": family}, net_ms)
        r["latency_ms"] += net
        r["spent_ms"]["router"] = net
        r["outcomes"] = [[*o[:3], o[3] + net] for o in r["outcomes"]]
    return methods, runs


def load_wall() -> dict | None:
    """The newest wall-clock of the comparison, if there is one."""
    return next((r for r in reversed(read_rows(results("compare.jsonl"))) if r["kind"] == "wall-clock"), None)


def timed_against_fitted(wall: dict, runs: list[dict]) -> list[tuple[str, str, str]]:
    """(way to answer, speed-up over the LLM alone by the clock, by the fitted latency), on the same
    problems."""
    large, llm = of(runs, "LLM alone")[0], np.array(wall["ms"]["LLM alone"])
    out = []
    for name, ms in wall["ms"].items():
        family, _, share = name.partition(" at ")
        wanted = float(share.rstrip(" %")) / 100 if share else 0.0
        r = nearest(runs, family, wanted) if of(runs, family) else None
        cut = {"outcomes": r["outcomes"][:wall["n"]]} if r else None
        clock = ratio_of_means(llm, np.array(ms)), *bootstrap(ratio_of_means, llm, np.array(ms))
        fitted = with_interval(speed_up(cut, large), " x", 2) if cut else ""
        out.append((name, with_interval(clock, " x", 2), fitted))
    return out


def of(runs: list[dict], family: str) -> list[dict]:
    """The runs of a family, by LLM share; of what was run once, that."""
    return sorted((r for r in runs if r["family"] == family and r["kind"] != "chosen"),
                  key=lambda r: r["llm_share"])


def nearest(runs: list[dict], family: str, share: float) -> dict:
    return min(of(runs, family), key=lambda r: abs(r["llm_share"] - share))


def in_percent(x: tuple[float, float, float]) -> str:
    return signed([100 * v for v in x], 0)


def better(x: tuple[float, float, float], neither: str = "undecided") -> str:
    """What the interval of a difference says, more being better."""
    return verdict(x, 0, "better", "worse", neither)


def gap_of(rows: list[dict], frontier: list[dict]) -> tuple[float, float, float]:
    """Mean gap of some runs or policies against the fixed rules, on the problems that all have answered, with
    its interval."""
    fixed = [r for r in frontier if r["kind"] == "fixed"]
    n = min(len(r["outcomes"]) for r in (*rows, *fixed))
    return gap_with_interval(outcomes_of(rows, n), outcomes_of(fixed, n))


def more_right(row: dict, other: dict) -> tuple[float, float, float]:
    """How much more often a run is right than another on the problems that both have answered, in percentage
    points, with its interval."""
    n = min(len(r["outcomes"]) for r in (row, other))
    d = 100 * np.array([a[0] - b[0] for a, b in zip(row["outcomes"][:n], other["outcomes"])], float)
    return float(d.mean()), *bootstrap(np.mean, d)


def speed_up(row: dict, large: dict) -> tuple[float, float, float]:
    """Over the LLM alone, on the problems that both have answered, with its interval."""
    n = min(len(r["outcomes"]) for r in (row, large))
    ms, ms_large = (np.array([o[-1] for o in r["outcomes"][:n]]) for r in (row, large))
    return ratio_of_means(ms_large, ms), *bootstrap(ratio_of_means, ms_large, ms)


def seeds_of(frontier: list[dict], kind: str = "policy") -> dict[str, list[dict]]:
    """Policies that differ by their seed alone, by what they share; of policies without seeds in their names,
    each for itself."""
    policies = [r for r in frontier if r["kind"] == kind]
    seeded = [r for r in policies if "-seed" in r["name"]]
    groups: dict[str, list[dict]] = {}
    for r in seeded or policies:
        groups.setdefault(r["name"].split("-seed")[0], []).append(r)
    return groups


def rule_claims(frontier: list[dict], runs: list[dict]) -> list[tuple[str, str, str, str]]:
    """R-Stitch at the paper's smallest and middle tau against the LLM, and against whole problems sent at
    random."""
    small, large = of(runs, "SLM alone")[0], of(runs, "LLM alone")[0]
    named = {r["name"]: r for r in frontier if r["kind"] == "fixed"}
    out = []
    for name in ("tau 0.001", "tau 0.02"):
        r, lost = named[name], more_right(named[name], large)
        out.append((f"R-Stitch at {name}: right against the LLM, pp; speed-up", "little loss",
                    f"{signed(lost)}; {with_interval(speed_up(r, large), ' x', 2)}",
                    verdict(lost, 0, "more", "a loss", "no loss seen")))
        n = min(len(x["outcomes"]) for x in (r, small))
        gain = gap_with_interval(outcomes_of([r], n), outcomes_of([small, large], n), mixtures=True)
        out.append(("... gap against random per problem, %", "not compared", in_percent(gain), better(gain)))
    return out


def gap_claims(frontier: list[dict], runs: list[dict]) -> list[tuple[str, str, str, str]]:
    """Gaps of R-Stitch+ and R2R against the fixed rules. Policies are named by kappa = lambda x mean
    latency of the LLM alone, lambda being what a millisecond costs in their reward; "labels" start from
    R2R's, which the paper has not."""
    out = []
    for name, rows in seeds_of(frontier).items():
        x = gap_of(rows, frontier)
        ours = name.startswith("labels")
        out.append((f"R-Stitch+, {name}, gap against fixed rules, %", "not compared" if ours else "better",
                    in_percent(x), better(x) if ours else verdict(x, 0, "reproduces", "does not reproduce",
                                                                  "undecided")))
    for name, rows in seeds_of(frontier, "calibrated").items():
        x = gap_of(rows, frontier)
        out.append((f"R-Stitch+, {name}, its threshold set on calibration, gap, %", "not compared",
                    in_percent(x), better(x)))
    for name, title in (("R-Stitch+", "R-Stitch+ with its threshold moved,"), ("R2R", "R2R at")):
        for r in of(runs, name):
            x = gap_of([r], frontier)
            out.append(
                (f"{title} {100 * r['llm_share']:.1f} % LLM, gap against fixed rules, %", "not compared",
                 in_percent(x), better(x)))
    return out


def at_equal_share(runs: list[dict], a: str, b: str, share: float) -> tuple[float, float, float] | None:
    """Right answers of family a minus those of family b at one LLM share, in points; None if either has no
    run as large."""
    alone = [of(runs, "SLM alone")[0]]
    x = difference(alone + of(runs, a), alone + of(runs, b), share, len(alone[0]["outcomes"]))
    return None if np.isnan(x).any() else x


def signal_claims(runs: list[dict]) -> list[tuple[str, str, str, str]]:
    """Two other signals in place of the entropy, at equal shares."""
    cases = [(name, share) for name in ("top-2 gap", "varentropy") for share in (0.05, 0.1, 0.15, 0.2)]
    return [(f"{name} against the entropy, both as in Algorithm 1, at {100 * share:g} % LLM, pp", "not tried",
             signed(x), better(x, "no difference seen")) for name, share in cases
            if (x := at_equal_share(runs, name, "R-Stitch", share))]


def frontier_claims(frontier: list[dict], runs: list[dict]) -> list[tuple[str, str, str, str]]:
    """Every comparison of notebook 4: (claim, paper, ours, verdict)."""
    out = [*rule_claims(frontier, runs), *gap_claims(frontier, runs), *signal_claims(runs)]
    for r in of(runs, "speculative decoding"):
        x = speed_up(r, of(runs, "LLM alone")[0])
        out.append((f"speculative decoding (n = {r['n']}): fitted speed-up over the LLM, passes only",
                    "0.65 to 1.25 x", with_interval(x, " x", 2), verdict(x, 1, "faster", "slower",
                                                                         "undecided")))
    return out


def real_finding(methods: dict[str, list[dict]], a: str, b: str) -> Finding | None:
    """Right answers of method a minus those of b, of the real pair, in points; against the LLM with the
    margin."""
    x = real.difference(methods, a, b)
    if x is None:
        return None
    said = real.loss((-x[0], -x[2], -x[1])) if b == "llm" else better(x)
    return f"{signed(x[:3])}, n = {x[3]}", said


def share_claim(runs: list[dict], a: str, b: str, share: float, paper: str,
                decisive: Finding | None = None) -> tuple[str, ...]:
    """Two families at one LLM share, in points: a line of `PAIRS`."""
    x = at_equal_share(runs, a, b, share)
    return line(f"{a} against {b}, {100 * share:.0f} % LLM, pp", paper,
                (signed(x), better(x)) if x else None, decisive)


def frontier_verdicts(claims: list[tuple[str, str, str, str]], frontier: list[dict], runs: list[dict],
                      answers: list[dict]) -> list[tuple[str, ...]]:
    """What notebook 4 ends with, the `frontier_claims` that decide: a table of `PAIRS`."""
    methods, (low, _, middle, _) = real.world_of(answers), claims[:4]
    of_llm = [real_finding(methods, f"tau={tau}", "llm") for tau in (0.001, 0.02)]
    share = next(r["llm_share"] for r in frontier if r["name"] == "tau 0.02")
    out = [line(*claim[:2], claim[2:], found) for claim, found in zip((low, middle), of_llm)]
    random = real_finding(methods, "tau=0.02", "random")
    if random:  # the real pair's share is another one
        random = f"{random[0]}, {100 * real.llm_share(methods['tau=0.02']):.0f} % LLM", random[1]
    out.append(share_claim(runs, "R-Stitch", "random", share, "not compared", random))
    policies = [c for c in claims if c[0].startswith("R-Stitch+, ") and c[0].endswith("fixed rules, %")]
    chosen = [c for c in policies if "kappa0.35" in c[0]] or policies
    if of(runs, "R2R"):
        at = f"R2R at {100 * nearest(runs, 'R2R', 0.1)['llm_share']:.1f} %"
        chosen = [*chosen[:2], *(c for c in claims if c[0].startswith(at))]
        others = {name: rows for name, rows in methods.items() if not name.startswith("policy")}
        equal = sorted(real.at_equal_share(others).values(), key=lambda x: abs(x[4] - 0.1))
        found = [(f"{signed(x[:3])}, {100 * x[4]:.0f} % LLM, n = {x[3]}", better(x)) for x in equal]
        out.append(share_claim(runs, "R2R", "entropy, one token", 0.1, "better", *found[:1]))
    chosen += [c for c in claims if c[0].startswith("speculative")]
    return [*out, *(line(*c[:2], c[2:]) for c in chosen)]


def mixed(small: dict, large: dict, q: float) -> tuple[float, float, float]:
    """(right, milliseconds, LLM share) where each whole problem goes to the LLM with probability q, else to
    the SLM."""
    right, ms, tokens = ((1 - q) * small[k] + q * large[k] for k in ("accuracy", "latency_ms", "tokens"))
    return right, ms, q * large["tokens"] / tokens


def draw_frontier(ax, frontier: list[dict], runs: list[dict], against: str = "latency_ms"):
    """Right answers against fitted latency (or LLM share): every fixed rule, the families over their knob,
    the two models alone, and what was run once."""
    scale = 100 if against == "llm_share" else 1
    point = lambda r: (scale * r[against], 100 * r["accuracy"])  # noqa: E731
    ax.plot(*zip(*[point(r) for r in frontier if r["kind"] == "fixed" and "alone" not in r["name"]]), ".",
            color="#BBBBBB", ms=4, label="other fixed rules")
    for name, (colour, marker) in FAMILY_STYLE.items():
        if family := of(runs, name):
            ax.plot(*zip(*[point(r) for r in family]), marker, color=colour, ms=4, lw=1, label=name)
            low, high = zip(*[(100 * (r["accuracy"] - r["accuracy_95"][0]),
                               100 * (r["accuracy_95"][1] - r["accuracy"])) for r in family])
            ax.errorbar(*zip(*[point(r) for r in family]), [low, high], fmt="none", color=colour, lw=0.6)
    small, large = of(runs, "SLM alone")[0], of(runs, "LLM alone")[0]
    line = np.array([mixed(small, large, q) for q in np.linspace(0, 1, 101)])
    ax.plot(scale * line[:, 1 if scale == 1 else 2], 100 * line[:, 0], "--", color=GREY, lw=1,
            label="random per problem")
    once = [("SLM alone", "*", SLM_COLOUR), ("LLM alone", "*", LLM_COLOUR), ("control", "P", LLM_COLOUR),
            ("speculative decoding", "X", "black"), ("live labels", "P", THIRD)]
    for name, marker, colour in once:
        shown = name != "live labels" if scale == 1 else name in ("SLM alone", "live labels")
        for r in of(runs, name) if shown else ():
            ax.plot(*point(r), marker, color=colour, ms=12 if marker == "*" else 8, label=name, ls="none")
    costs = {"latency_ms": "fitted latency at batch 1 (ms per problem), lower is better",
             "llm_share": "tokens written by the LLM (%), lower is better"}
    ax.set(xlabel=costs[against], ylabel="right answers (%), higher is better", ylim=(0, 105))
    return ax


def draw_spent(ax, runs: list[dict], share: float = 0.1):
    """Where the milliseconds of an answer go, by router, each family at the run nearest to an LLM share."""
    order = ("SLM alone", "control", *FAMILY_STYLE, "speculative decoding", "LLM alone")
    families = [name for name in order if of(runs, name)]
    for i, name in enumerate(families):
        r, at = nearest(runs, name, share), 0.0
        for part, colour in PARTS.items():
            ax.barh(i, r["spent_ms"][part], left=at, color=colour, label=part if i == 0 else None)
            at += r["spent_ms"][part]
        ax.text(at, i, f" {100 * r['accuracy']:.0f} % right", va="center", fontsize=8)
    share_of = {name: f", {100 * nearest(runs, name, share)['llm_share']:.1f} % LLM" for name in FAMILY_STYLE
                if name in families}
    names = [name + share_of.get(name, "") for name in families]
    ax.set_yticks(range(len(families)), names)
    ax.set(xlabel="fitted latency at batch 1 (ms per problem), lower is better", title="Where the time goes")
    ax.set_xlim(0, 1.15 * ax.get_xlim()[1])
    ax.legend(ncol=2, loc="lower right")
    return ax


def reached(row: dict, small: dict, longer: bool) -> tuple[float, float, float]:
    """What a tau that was chosen for a share or a latency came to, with its interval, on the problems to
    which the SLM's own answers are no longer than those that it was chosen from, or on the others."""
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
    wide = "predicted_share" if wanted == "share" else "predicted_ms"
    shorter = f"SLM answer of up to {rows[0]['median_tokens']:g} tokens, as tau was chosen on"
    for longer, colour, label in ((False, SLM_COLOUR, shorter), (True, LLM_COLOUR, "longer SLM answer")):
        points = scale * np.array([(r[wide], *reached(r, small, longer)) for r in rows])
        ax.errorbar(points[:, 0], points[:, 1], [points[:, 1] - points[:, 2], points[:, 3] - points[:, 1]],
                    fmt="o", color=colour, capsize=3, label=label)
    ends = [0, 1.1 * max(points[:, 0])]
    ax.plot(ends, ends, color=GREY, lw=1)
    unit = "LLM tokens (%)" if wanted == "share" else "latency (ms per problem)"
    ax.set(xlabel=f"{unit}, as predicted from the SLM alone", ylabel=f"{unit}, as it was",
           title=f"tau for a wanted {wanted} (nearer to the line is better)")
    ax.set_ylim(top=1.3 * ax.get_ylim()[1])  # the legend's room
    ax.legend(loc="upper left")
    return ax


def at_budget(outcomes: list[list], budget: float) -> float:
    """Share of answers that are right within a number of tokens; outcomes are (right, tokens, ...)."""
    return float(np.mean([bool(o[0]) and o[1] <= budget for o in outcomes]))


def draw_budget(ax, runs: list[dict]):
    """Right answers if every answer is cut off after so many tokens."""
    budgets = np.linspace(0.1, 1.6, 61) * of(runs, "LLM alone")[0]["tokens"]
    shown = [(name, of(runs, name)[0], colour)
             for name, colour in (("SLM alone", SLM_COLOUR), ("LLM alone", LLM_COLOUR))]
    shown += [(name, nearest(runs, name, share), FAMILY_STYLE[name][0])
              for name, share in (("R2R", 0.1), ("R-Stitch", 0.15)) if of(runs, name)]
    for name, r, colour in shown:
        label = name if "alone" in name else f"{name}, {100 * r['llm_share']:.0f} % LLM"
        ax.plot(budgets, [100 * at_budget(r["outcomes"], b) for b in budgets], color=colour, label=label)
    ax.set(xlabel="answers cut off after (tokens)", ylabel="right answers (%), higher is better",
           title="Under a budget")
    ax.legend()
    return ax


def draw_frontiers(frontier: list[dict], runs: list[dict]):
    """Against latency and against LLM share, with one legend below."""
    figure, axes = plt.subplots(1, 2, figsize=(7.6, 3.8))
    for ax, cost in zip(axes, ("latency_ms", "llm_share")):
        draw_frontier(ax, frontier, runs, cost)
    axes[1].set(xlim=(-1, 36))
    named = {name: handle for ax in axes for handle, name in zip(*ax.get_legend_handles_labels())}
    figure.legend(named.values(), named, loc="outside lower center", ncol=7)
    return figure


# ---- The README's figure -----------------------------------------------------------------------------------


Box = tuple[float, float, float, float]  # left, right, bottom, top


@dataclass(frozen=True)
class Series:
    """A method at some settings: (LLM share, right, low, high) of each, all in %."""

    name: str
    points: list[tuple[float, float, float, float]]
    colour: str
    marker: str = "o"


def taken(box: Box, path: np.ndarray) -> int:
    """How many points of a path (k, 2) lie in a box."""
    left, right, bottom, top = box
    inside = (left <= path[:, 0]) & (path[:, 0] <= right) & (bottom <= path[:, 1]) & (path[:, 1] <= top)
    return int(inside.sum())


def dense(points: Sequence[tuple[float, float]], step: float = 2.0) -> np.ndarray:
    """(k, 2) points on the line through some, a step from one to the next."""
    xy = np.array(points, float)
    along = np.concatenate([[0.0], np.hypot(*np.diff(xy, axis=0).T).cumsum()])
    at = np.arange(0.0, along[-1] + step, step)
    return np.stack([np.interp(at, along, column) for column in xy.T], 1)


def place(label, corners: Sequence[tuple[float, float]], drawn: np.ndarray, gap: float = 7.0) -> np.ndarray:
    """Move a label beside one of the corners (pixels) of its line, where it covers least of what is drawn (k,
    2), inside the axes; what it covers then, as points to keep others away."""
    ax = label.axes
    area, size = ax.get_window_extent(), label.get_window_extent()
    w, h = size.width, size.height
    offsets = [(gap, -h / 2), (-w - gap, -h / 2), (-w / 2, gap), (-w / 2, -h - gap), (gap, gap),
               (-w - gap, gap), (gap, -h - gap), (-w - gap, -h - gap)]
    boxes = [(x + dx, x + dx + w, y + dy, y + dy + h) for x, y in corners for dx, dy in offsets]
    inside = [b for b in boxes if area.x0 < b[0] and b[1] < area.x1 and area.y0 < b[2] and b[3] < area.y1]
    covered = lambda box: taken((box[0] - 3, box[1] + 3, box[2] - 3, box[3] + 3), drawn)  # noqa: E731
    best = min(inside or boxes, key=covered)
    label.set_position(ax.transData.inverted().transform((best[0], best[2])))
    x, y = np.meshgrid(np.linspace(*best[:2], 20), np.linspace(*best[2:], 5))
    return np.stack([x.ravel(), y.ravel()], 1)


def draw_readme(series: Sequence[Series], alone: Sequence[Series], title: str):
    """Right answers against LLM share, named at the lines; `alone` are the models alone, as levels.
    ValueError for more than five series."""
    if len(series) + len(alone) > 5:
        raise ValueError(
            f"series={[s.name for s in (*series, *alone)]}: expected five at most, to stay readable")
    figure, ax = plt.subplots(figsize=(8, 4.6))
    widest = max(point[0] for s in series for point in s.points)
    ax.set(xlim=(-0.03 * widest, 1.06 * widest), ylim=(0, 108), title=title,
           xlabel="tokens written by the LLM (%)", ylabel="right answers (%)")
    for s in alone:
        ax.axhline(s.points[0][1], color=s.colour, lw=1.5, ls="--")
        ax.axhspan(*s.points[0][2:], color=s.colour, alpha=0.15, lw=0)
    for s in series:
        x, y, low, high = np.array(sorted(s.points)).T
        ax.errorbar(x, y, [y - low, high - y], fmt=f"{s.marker}-", color=s.colour, ms=5, lw=1.5,
                    elinewidth=0.8)
    figure.canvas.draw()
    figure.set_layout_engine("none")  # labels are placed in pixels of this layout
    pixels = ax.transData.transform
    lines = {s.name: pixels([p[:2] for p in sorted(s.points, reverse=True)]) for s in series}
    along = np.linspace(1.05, -0.02, 30) * widest
    edges = {s.name: [pixels([(x, y) for x in along]) for y in s.points[0][:0:-1]] for s in alone}
    bars = [pixels([(x, low), (x, high)]) for s in series for x, _, low, high in s.points]
    paths = [*lines.values(), *bars, *(path for ends in edges.values() for path in ends)]
    corners = lines | {name: np.vstack(ends) for name, ends in edges.items()}
    drawn = np.vstack([dense(path) for path in paths])
    for s in (*series, *alone):
        text = s.name if s in series else f"{s.name}: {s.points[0][1]:.1f} % right"
        label = ax.text(0, 0, text, color=s.colour, fontsize=10, weight="bold", va="bottom")
        drawn = np.vstack([drawn, place(label, corners[s.name], drawn)])
    return figure


def pocket_series(runs: list[dict]) -> tuple[list[Series], list[Series]]:
    """The pocket pair's routers, and the models alone, for `draw_readme`."""
    def series(family: str, colour: str, name: str = "", marker: str = "o") -> Series:
        points = [(100 * r["llm_share"], 100 * r["accuracy"], *(100 * x for x in r["accuracy_95"]))
                  for r in of(runs, family)]
        return Series(name or family, points, colour, marker)

    routers = [series("R2R", THIRD, marker="D"), series("R-Stitch", "black"),
               series("random", "#777777", "random calls", "x")]
    models = [series("SLM alone", SLM_COLOUR), series("LLM alone", LLM_COLOUR)]
    return [s for s in routers if s.points], models


def real_series(methods: dict[str, list[dict]]) -> tuple[list[Series], list[Series]]:
    """The real pair's routers, and the models alone, for `draw_readme`; n may differ from point to point.
    Visits of one token make way for R2R, so that there are no more than five."""
    def series(name: str, colour: str, belongs: Callable[[str], bool], marker: str = "o") -> Series:
        found = [real.figures_of(rows) for method, rows in methods.items() if belongs(method)]
        points = [(100 * x["llm_share"][0], *(100 * y for y in x["right"])) for x in found]
        return Series(name, points, colour, marker)

    routers = [series("R-Stitch", "black", lambda m: m.startswith("tau=") and "," not in m),
               series("random calls", "#777777", lambda m: m.startswith("random="), "x"),
               series("R2R", THIRD, lambda m: m in real.runs_of_r2r(methods), "D")]
    if not routers[-1].points:
        routers[-1] = series("one-token visits", THIRD, lambda m: m.endswith(",back=1"), "D")
    models = [series("SLM alone", SLM_COLOUR, lambda m: m == "slm"),
              series("LLM alone", LLM_COLOUR, lambda m: m == "llm")]
    return [s for s in routers if s.points], [s for s in models if s.points]


def main() -> None:
    """The README's picture and that of all routers: python -m analysis.presentation.figures"""
    argparse.ArgumentParser(allow_abbrev=False, description=main.__doc__).parse_args()
    style()
    _, runs = load_frontier()
    n = of(runs, "SLM alone")[0]["n"]
    title = f"{OURS.capitalize()}, {n} test problems, 95 % intervals: up and to the left is better"
    draw_readme(*pocket_series(runs), title).savefig(results("routers.png"), dpi=100)
    methods = real.world_of(load_real())
    routers, models = real_series(methods)
    if routers:
        sizes = [len(real.by_problem(rows)) for rows in methods.values()]
        n = f"{min(sizes)} to {max(sizes)}" if min(sizes) < max(sizes) else f"{max(sizes)}"
        title = f"Real pair, {n} problems of GSM8K, 95 % intervals: up and to the left is better"
        draw_readme(routers, models, title).savefig(results("readme.png"), dpi=100)


if __name__ == "__main__":
    main()

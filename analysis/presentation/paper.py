"""Table 1 of R-Stitch (arXiv 2507.17307), read again: what its numbers say and which do not add up. No torch.

The numbers are in results/paper_table1.csv, as printed; nothing of ours is among them.
"""
import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from analysis.instruments.rows import RESULTS
from analysis.instruments.stats import wilson
from analysis.presentation.figures import FAMILY_STYLE, GREY, LLM_COLOUR, SLM_COLOUR, THIRD

TABLE = RESULTS / "paper_table1.csv"
BENCHMARKS = ("AIME", "AMC", "Minerva", "MATH", "Olympiad")
LAMBDA = 5e-6  # per ms, the paper's: what a millisecond of latency costs in R-Stitch+'s reward
COLUMNS = [(budget, llm) for budget in ("8k", "16k") for llm in ("7B", "14B", "32B")]


@dataclass(frozen=True)
class Cell:
    """One method on one benchmark, as printed: right answers in %, seconds per problem, speed-up (None for
    the LLM-free SLM)."""

    budget: str
    llm: str
    method: str
    tau: float | None
    benchmark: str
    n: int
    accuracy: float
    latency: float
    speed_up: float | None

    @property
    def name(self) -> str:
        return f"{self.method} {self.tau:g}" if self.tau else self.method


def read_table(path: Path = TABLE) -> list[Cell]:
    with open(path) as file:
        return [Cell(r["budget"], r["llm"], r["method"], float(r["tau"]) if r["tau"] else None,
                     r["benchmark"], int(r["n"]), float(r["accuracy_percent"]), float(r["latency_s"]),
                     float(r["speed_up"]) if r["speed_up"] else None) for r in csv.DictReader(file)]


def llm_of(cell: Cell, cells: list[Cell]) -> Cell:
    """The LLM alone under the same budget on the same benchmark."""
    same = (cell.budget, cell.llm, cell.benchmark)
    return next(c for c in cells if c.method == "LLM" and (c.budget, c.llm, c.benchmark) == same)


def misprinted_speed_ups(cells: list[Cell]) -> list[tuple[Cell, float]]:
    """(cell, recomputed) where the printed speed-up is not the ratio of the printed latencies, whatever the
    roundings of all three."""
    out = []
    for c in cells:
        if c.speed_up is not None:
            low, high = (llm_of(c, cells).latency - e for e in (0.005, -0.005))
            if not low / (c.latency + 0.005) - 0.0051 <= c.speed_up <= high / (c.latency - 0.005) + 0.0051:
                out.append((c, llm_of(c, cells).latency / c.latency))
    return out


def no_whole_number(cells: list[Cell]) -> list[Cell]:
    """Cells whose accuracy is not k / n for any whole k, as printed with two decimals: averages of repeated
    runs would explain them."""
    return [c for c in cells if all(abs(100 * k / c.n - c.accuracy) > 0.0051 for k in range(c.n + 1))]


def mean_change(cells: list[Cell], budget: str, llm: str, name: str) -> tuple[float, float]:
    """(mean change of accuracy in points, ratio of mean latencies) against the LLM alone, over the five
    benchmarks."""
    chosen = [c for c in cells if (c.budget, c.llm, c.name) == (budget, llm, name)]
    assert len(chosen) == len(BENCHMARKS), (budget, llm, name)
    alone = [llm_of(c, cells) for c in chosen]
    change = np.mean([c.accuracy - a.accuracy for c, a in zip(chosen, alone)])
    return float(change), sum(a.latency for a in alone) / sum(c.latency for c in chosen)


def change_interval(cells: list[Cell], budget: str, llm: str, name: str) -> tuple[float, float, float]:
    """The mean change of accuracy with a 95 % interval, as if every problem had been answered once and
    independently by both."""
    change, _ = mean_change(cells, budget, llm, name)
    chosen = [c for c in cells if (c.budget, c.llm, c.name) == (budget, llm, name)]
    variance = sum(c.accuracy * (100 - c.accuracy) / c.n for one in chosen for c in (one, llm_of(one, cells)))
    reach = 1.96 * variance**0.5 / len(chosen)
    return change, change - reach, change + reach


def interval(cell: Cell) -> tuple[float, float]:
    """95 % Wilson interval of the accuracy, in percent, as if each problem had been answered once."""
    low, high = wilson(round(cell.accuracy * cell.n / 100), cell.n)
    return 100 * low, 100 * high


def mixing_speed_up(cells: list[Cell], budget: str, llm: str, name: str) -> float:
    """Speed-up over the LLM of answering each problem by SLM or LLM alone, at random, with the share that
    gives the method's mean accuracy."""
    def mean(method: str, field: str) -> float:
        rows = [
            c for c in cells if c.name == method and c.budget == budget and (method == "SLM" or c.llm == llm)
        ]
        return float(np.mean([getattr(c, field) for c in rows]))

    s, big, wanted = (mean(method, "accuracy") for method in ("SLM", "LLM", name))
    share = float(np.clip((wanted - s) / (big - s), 0, 1))  # of problems that go to the LLM
    slow, fast = mean("LLM", "latency"), mean("SLM", "latency")
    return slow / (share * slow + (1 - share) * fast)


def kappa_of(cell: Cell) -> float:
    """lambda x latency of an answer: what is taken from the reward of a right one."""
    return LAMBDA * 1e3 * cell.latency


def kappa(cells: list[Cell], budget: str, llm: str) -> float:
    """kappa = lambda x mean latency of the LLM alone. Above 1 a right answer of the LLM alone scores below a
    wrong one on average."""
    return float(
        np.mean([kappa_of(c) for c in cells if c.method == "LLM" and (c.budget, c.llm) == (budget, llm)]))


def oddities(cells: list[Cell]) -> list[str]:
    """The cells that do not add up, a line each: speed-ups that are no ratio of the latencies, accuracies
    that are no k of n."""
    named = lambda c: f"{c.budget:3} {c.llm:3} {c.name:14} {c.benchmark:8}"  # noqa: E731
    off = [f"{named(c)} printed {c.speed_up:.2f}, ratio of the latencies {ratio:.2f} "
           f"({100 * (c.speed_up / ratio - 1):+.0f} %)" for c, ratio in misprinted_speed_ups(cells)]
    return off + [f"{named(c)} {c.accuracy:.2f} % is no k of {c.n}: an average over several runs would be"
                  for c in no_whole_number(cells)]


def intervals(cells: list[Cell], budget: str, llm: str, name: str) -> str:
    """Accuracies of one method with their intervals, by benchmark, in a line."""
    chosen = [c for c in cells if (c.budget, c.llm, c.name) == (budget, llm, name)]
    return ", ".join("{} {:.1f} [{:.1f}, {:.1f}]".format(c.benchmark, c.accuracy, *interval(c))
                     for c in chosen)


def seen(changes: list[tuple[float, float, float]], llms: tuple[str, ...]) -> str:
    """What the intervals of mean changes say: which LLMs lose, and which nearly."""
    lost = [llm for llm, x in zip(llms, changes) if x[2] < 0]
    edge = [llm for llm, x in zip(llms, changes) if 0 <= x[2] < 0.5]
    at_edge = f", {', '.join(edge)} at the edge" if edge else ""
    return f"a loss for {', '.join(lost)}{at_edge}" if lost else f"no loss seen{at_edge}"


def table_claims(cells: list[Cell]) -> list[tuple[str, str, str, str]]:
    """What notebook 5 ends with: (claim, paper, read again, verdict)."""
    out, three = [], ("7B", "14B", "32B")
    for name, budget, llms in (("R-Stitch 0.02", "8k", three), ("R-Stitch 0.02", "16k", three),
                               ("R-Stitch+", "16k", three[:2])):
        changes = [change_interval(cells, budget, llm, name) for llm in llms]
        claim = f"loss at tau 0.02, {budget}" if name == "R-Stitch 0.02" else f"{name}, {budget}"
        points = ", ".join("{:+.1f} [{:+.0f}, {:+.0f}]".format(*x) for x in changes)
        out.append((f"{claim}: {', '.join(llms)}, pp", "negligible", points, seen(changes, llms)))
    where = (cells, "16k", "14B", "R-Stitch 0.02")
    ours, mixing = mean_change(*where)[1], mixing_speed_up(*where)
    out.append(("faster than mixing, 16k, 14B, tau 0.02", "not compared",
                f"{ours:.2f} x against {mixing:.2f} x", "holds" if ours > mixing else "does not hold"))
    off = [abs(c.speed_up / ratio - 1) for c, ratio in misprinted_speed_ups(cells)]
    printed = sum(c.speed_up is not None and c.method != "LLM" for c in cells)
    out.append(("speed-ups are ratios of the latencies", "printed so",
                f"{len(off)} of {printed} are not, {sum(x > 0.025 for x in off)} by more than 2.5 %",
                "misprints" if off else "holds"))
    kappas = {column: kappa(cells, *column) for column in COLUMNS}
    above = sorted({llm for (_, llm), k in kappas.items() if k >= 1})
    out.append(("a right answer beats a wrong one (kappa < 1)", "lambda = 5e-6",
                ", ".join(f"{budget} {llm} {k:.2f}" for (budget, llm), k in kappas.items()),
                f"on average not for {', '.join(above)}" if above else "on average"))
    single = [c for c in cells if c.method == "LLM" and c.llm not in above and kappa_of(c) >= 1]
    out.append(("... on single benchmarks, 7B and 14B", "",
                ", ".join(f"{c.budget} {c.llm} {c.benchmark} {kappa_of(c):.2f}" for c in single),
                "not everywhere" if single else "everywhere"))
    return out


def label_columns(ax, columns: list[tuple[str, str]]) -> None:
    ax.set_xticks(range(len(columns)), [f"{llm}\n{budget}" for budget, llm in columns])


def draw_changes(ax, cells: list[Cell], columns: list[tuple[str, str]]):
    """Mean change of accuracy by column of the table; intervals are about 6 points to either side."""
    names = {
        "R-Stitch 0.001": SLM_COLOUR, "R-Stitch 0.02": FAMILY_STYLE["R-Stitch"][0], "R-Stitch 0.03": THIRD,
        "R-Stitch+": FAMILY_STYLE["R-Stitch+"][0]
    }
    for i, ((name, colour), marker) in enumerate(zip(names.items(), "os^D")):
        have = [(x, mean_change(cells, *column, name)[0]) for x, column in enumerate(columns)
                if any((c.budget, c.llm, c.name) == (*column, name) for c in cells)]
        ax.plot([x + 0.12 * (i - 1.5) for x, _ in have], [y for _, y in have], marker, mfc="none",
                color=colour, label=name)
    ax.axhline(0, color=LLM_COLOUR, lw=1, label="LLM alone")
    label_columns(ax, columns)
    ax.set(ylabel="accuracy minus the LLM's (points), higher is better",
           title="Mean over five benchmarks (paper)")
    ax.legend()
    return ax


def draw_mixing(ax, cells: list[Cell], columns: list[tuple[str, str]]):
    """Speed-up of R-Stitch at 0.02 beside that of mixing SLM and LLM per problem at its accuracy."""
    name = "R-Stitch 0.02"
    stitched = [mean_change(cells, *column, name)[1] for column in columns]
    mixing = [mixing_speed_up(cells, *column, name) for column in columns]
    for label, values, marker, colour in ((name, stitched, "o", FAMILY_STYLE["R-Stitch"][0]),
                                          ("mixing at its accuracy", mixing, "s", GREY)):
        ax.plot(range(len(columns)), values, marker, mfc="none", color=colour, label=label)
    ax.axhline(1, color=LLM_COLOUR, lw=1, label="LLM alone")
    label_columns(ax, columns)
    ax.set(ylabel="speed-up over the LLM (higher is better)", title="Against the trivial baseline (paper)")
    ax.legend()
    return ax

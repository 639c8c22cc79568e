"""Table 1 of R-Stitch (arXiv 2507.17307), read again: what its numbers say and which do not add up. No torch.

The numbers are in results/paper_table1.csv, as printed; nothing of ours is among them.
"""
import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from analysis.instruments.stats import wilson

TABLE = Path(__file__).parent.parent / "results" / "paper_table1.csv"
BENCHMARKS = ("AIME", "AMC", "Minerva", "MATH", "Olympiad")
LAMBDA = 5e-6  # per ms, the paper's


@dataclass(frozen=True)
class Cell:
    """One method on one benchmark, as printed: right answers in %, seconds per problem, speed-up (None for the LLM-free SLM)."""

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
        return [Cell(r["budget"], r["llm"], r["method"], float(r["tau"]) if r["tau"] else None, r["benchmark"], int(r["n"]), float(r["accuracy_percent"]),
                     float(r["latency_s"]), float(r["speed_up"]) if r["speed_up"] else None) for r in csv.DictReader(file)]


def llm_of(cell: Cell, cells: list[Cell]) -> Cell:
    """The LLM alone under the same budget on the same benchmark."""
    return next(c for c in cells if c.method == "LLM" and (c.budget, c.llm, c.benchmark) == (cell.budget, cell.llm, cell.benchmark))


def misprinted_speed_ups(cells: list[Cell]) -> list[tuple[Cell, float]]:
    """(cell, recomputed) where the printed speed-up is not the ratio of the printed latencies, whatever the roundings of all three."""
    out = []
    for c in cells:
        if c.speed_up is not None:
            low, high = (llm_of(c, cells).latency - e for e in (0.005, -0.005))
            if not low / (c.latency + 0.005) - 0.0051 <= c.speed_up <= high / (c.latency - 0.005) + 0.0051:
                out.append((c, llm_of(c, cells).latency / c.latency))
    return out


def no_whole_number(cells: list[Cell]) -> list[Cell]:
    """Cells whose accuracy is not k / n for any whole k, as printed with two decimals: averages of repeated runs would explain them."""
    return [c for c in cells if all(abs(100 * k / c.n - c.accuracy) > 0.0051 for k in range(c.n + 1))]


def mean_change(cells: list[Cell], budget: str, llm: str, name: str) -> tuple[float, float]:
    """(mean change of accuracy in points, ratio of mean latencies) against the LLM alone, over the five benchmarks."""
    chosen = [c for c in cells if (c.budget, c.llm, c.name) == (budget, llm, name)]
    assert len(chosen) == len(BENCHMARKS), (budget, llm, name)
    alone = [llm_of(c, cells) for c in chosen]
    return float(np.mean([c.accuracy - a.accuracy for c, a in zip(chosen, alone)])), sum(a.latency for a in alone) / sum(c.latency for c in chosen)


def change_interval(cells: list[Cell], budget: str, llm: str, name: str) -> tuple[float, float, float]:
    """The mean change of accuracy with a 95 % interval, as if every problem had been answered once and independently by both."""
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
    """Speed-up over the LLM of answering each problem by SLM or LLM alone, at random, with the share that gives the method's mean accuracy."""
    mean = lambda method, field: np.mean([getattr(c, field) for c in cells if c.name == method and (method == "SLM" or c.llm == llm) and c.budget == budget])  # noqa: E731
    s, big, wanted = (mean(method, "accuracy") for method in ("SLM", "LLM", name))
    share = float(np.clip((wanted - s) / (big - s), 0, 1))  # of problems that go to the LLM
    return float(mean("LLM", "latency") / (share * mean("LLM", "latency") + (1 - share) * mean("SLM", "latency")))


def kappa(cells: list[Cell], budget: str, llm: str) -> float:
    """lambda x mean latency of the LLM alone; above 1 a right answer of the LLM alone scores below a wrong one on average."""
    return LAMBDA * 1e3 * float(np.mean([c.latency for c in cells if c.method == "LLM" and (c.budget, c.llm) == (budget, llm)]))


def draw_changes(ax, cells: list[Cell], columns: list[tuple[str, str]]):
    """Mean change of accuracy by column of the table."""
    names = ("R-Stitch 0.001", "R-Stitch 0.02", "R-Stitch 0.03", "R-Stitch+")
    for i, (name, marker) in enumerate(zip(names, "os^D")):  # intervals are about 6 points to either side
        have = [(x, mean_change(cells, *column, name)[0]) for x, column in enumerate(columns) if any((c.budget, c.llm, c.name) == (*column, name) for c in cells)]
        ax.plot([x + 0.12 * (i - 1.5) for x, _ in have], [y for _, y in have], marker, mfc="none", color=f"C{i}", label=name)
    ax.axhline(0, color="#999999", lw=1)
    ax.set_xticks(range(len(columns)), [f"{llm}\n{budget}" for budget, llm in columns])
    ax.set(ylabel="accuracy minus the LLM's (points), higher is better", title="Mean over five benchmarks (paper)")
    ax.legend(fontsize=7)
    return ax


def draw_mixing(ax, cells: list[Cell], columns: list[tuple[str, str]]):
    """Speed-up of R-Stitch at 0.02 beside that of mixing SLM and LLM per problem at its accuracy."""
    for i, (label, values) in enumerate((("R-Stitch 0.02", [mean_change(cells, *column, "R-Stitch 0.02")[1] for column in columns]),
                                         ("mixing at its accuracy", [mixing_speed_up(cells, *column, "R-Stitch 0.02") for column in columns]))):
        ax.plot(range(len(columns)), values, "os"[i], mfc="none", color=("#0072B2", "#999999")[i], label=label)
    ax.axhline(1, color="#999999", lw=1)
    ax.set_xticks(range(len(columns)), [f"{llm}\n{budget}" for budget, llm in columns])
    ax.set(ylabel="speed-up over the LLM (higher is better)", title="Against the trivial baseline (paper)")
    ax.legend(fontsize=7)
    return ax

"""What machines of GPUs would do with this, on paper: nothing here is measured.

    python -m analysis.scale

Rows: none; it prints a table.
Feeds: the section "Many GPUs" of analysis/README.md.

A call takes its bytes over a share of the memory's speed, or its operations, two a weight and token, over a
share of the peak, the larger of the two, and a fixed time on top. Of a model split over GPUs each does its
part, and two sums per layer are added. The event simulation of analysis.bench then plays a script (25 % LLM
tokens in visits of 4) under the schedule of `stitch`. Each group of GPUs that holds a pair works for itself,
so n groups do n times as much. Sizes are of the published shapes in bfloat16, speeds of the data sheet of
one H100 SXM.
"""
import argparse
from collections.abc import Callable
from dataclasses import dataclass

import rstitch
from analysis.bench import Script, simulate
from analysis.instruments.shapes import SHAPES, bytes_of
from rstitch_hf.ranks import start

STREAM, PEAK, MEMORY = 3.35e12, 989e12, 80e9  # bytes/s, operations/s, bytes of a GPU
REACHED = 0.7, 0.5  # of the two, assumed
FIXED, SUM = 0.3, 0.02  # ms a call (replayed graphs, host read), ms a sum over GPUs, assumed
CONTEXT, TOKENS = 4096, 200  # tokens in the cache; of the simulated answers


@dataclass(frozen=True)
class Plan:
    """A pair, and over how many GPUs its LLM is split; the whole SLM lies on each."""

    slm: str
    llm: str
    gpus: int

    def sizes(self, model: int) -> tuple[float, float, float]:
        """(bytes of weights that a GPU holds, that a call reads there, of one cached token)."""
        held, read, cached = bytes_of((self.slm, self.llm)[model], 1, 1, 2)
        part = self.gpus if model == rstitch.LLM else 1
        return held / part, read / part, cached / part

    def rows(self, context: int = 2 * CONTEXT) -> int:
        """How many rows of so many tokens fit beside the weights, a tenth of the memory left free."""
        free = 0.9 * MEMORY - sum(self.sizes(model)[0] for model in (0, 1))
        return int(free // (context * sum(self.sizes(model)[2] for model in (0, 1))))

    def sums(self, model: int) -> float:
        """Milliseconds of a call that go into sums over GPUs, two per layer."""
        return 2 * SHAPES[(self.slm, self.llm)[model]][2] * SUM * (model == rstitch.LLM and self.gpus > 1)

    def cost(self) -> Callable[[int, list[int]], float]:
        """cost(model, unread) for `simulate`, in ms."""

        def cost(model: int, unread: list[int]) -> float:
            _, read, cached = self.sizes(model)
            tokens = len(unread) * max(unread)
            moved = (read + len(unread) * CONTEXT * cached) / (REACHED[0] * STREAM)
            computed = tokens * read / (REACHED[1] * PEAK)  # two operations a weight of two bytes
            return FIXED + self.sums(model) + 1e3 * max(moved, computed)

        return cost


PLANS = Plan("1.5B", "7B", 1), Plan("1.5B", "32B", 2), Plan("1.5B", "32B", 4)


def tokens_per_s(plan: Plan, batch: int, script: Script) -> tuple[float, float]:
    """(stitched, LLM alone) of one group of GPUs."""
    cost = plan.cost()
    clock, written, _ = simulate(script.leaves(batch, TOKENS), cost, graphs=True)
    return 1e3 * written / clock, 1e3 * batch / cost(rstitch.LLM, [1] * batch)


def bound(plan: Plan, batch: int) -> str:
    """What a step of the LLM spends most of its time on."""
    _, read, cached = plan.sizes(rstitch.LLM)
    times = {"weights": read / (REACHED[0] * STREAM),
             "caches": batch * CONTEXT * cached / (REACHED[0] * STREAM),
             "products": batch * read / (REACHED[1] * PEAK), "the fixed time": 1e-3 * FIXED,
             "sums over GPUs": 1e-3 * plan.sums(rstitch.LLM)}
    return max(times, key=times.get)


def main() -> None:
    argparse.ArgumentParser(allow_abbrev=False, description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    script = Script(0.25, 4)
    print("| pair | GPUs a group | rows of 8,192 tokens | batch | tokens/s a group | LLM alone = 1 | 8 GPUs, "
          "tokens/s | 100 machines of 8 | a step of the LLM is bound by |\n|" + "---|" * 9)
    for plan in PLANS:
        for batch in (1, 16, plan.rows()):
            stitched, alone = tokens_per_s(plan, batch, script)
            groups = 8 // plan.gpus
            print(f"| {plan.slm} + {plan.llm} | {plan.gpus} | {plan.rows()} | {batch} | {stitched:,.0f} | "
                  f"{stitched / alone:.2f} | {groups * stitched:,.0f} | {100 * groups * stitched:,.0f} | "
                  f"{bound(plan, batch)} |")


if __name__ == "__main__":
    start(main)

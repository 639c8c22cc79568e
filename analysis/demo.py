"""The pocket pair in two minutes: a few problems streamed, then every method in one table.

    python -m analysis.demo                      prints the table
    python -m analysis.demo --json table.json    and writes its rows for scripts

Rows: table.json.
Feeds: the table of the README.

Accuracy, tokens, LLM share and switches are over `n` test problems, answered greedily in batches. Latency is
wall-clock per problem at batch 1 over the first `n_latency` of them, one thread per process: each problem is
answered by all methods in turn, beginning with another one each time, so that whatever else the machine does
hits them alike. The speed-up over the LLM alone is the product of two: how much shorter the answers are, and
how much cheaper a token of them is.
"""
import argparse
import json
import time
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

import rstitch
from analysis.instruments.pool import make_pool
from analysis.instruments.problems import question, verify
from analysis.instruments.progress import progress
from analysis.instruments.provenance import provenance
from analysis.instruments.stats import with_interval
from analysis.instruments.task import Task, cut_off, describe, solve
from analysis.instruments.timing import rotated
from analysis.pocket.domain import problems
from analysis.pocket.weights import MAX_NEW_TOKENS, load_pocket
from rstitch_hf.command import run_question, usable_device
from rstitch_hf.ranks import start

TAUS = (0.005, 0.02, 0.1)


@dataclass(frozen=True)
class Method:
    """One row of the table: a name, the large model's folder and the router."""

    name: str
    router: object
    llm: str = "llm"


ALONE = (Method("SLM alone", rstitch.SLMOnly()), Method("LLM alone", rstitch.LLMOnly()),
         Method("LLM trained short", rstitch.LLMOnly(), "llm-short"))
STITCHED = tuple(Method(f"R-Stitch, tau {tau:g}", rstitch.EntropyRouter(tau)) for tau in TAUS)


@lru_cache(maxsize=None)
def pair(llm: str, device: str):
    """Loaded and warmed up once per process."""
    torch.set_num_threads(1)
    models = load_pocket(llm=llm, device=device)
    rstitch.stitch(*models[:2], torch.tensor([[5, 6]]), rstitch.RandomRouter(0.5), max_new_tokens=8,
                   eos_token_id=[], seed=0)
    return models


def answer(method: Method, chosen: list, seed: int, device: str) -> list[dict]:
    return solve(pair(method.llm, device), chosen, method.router, batch_size=len(chosen), seed=seed)


def latencies(methods: list[Method], problem, i: int, seed: int, device: str) -> list[tuple[float, int]]:
    """(seconds, tokens) of each method on one problem alone, in an order that rotates with i."""
    out: dict[Method, tuple[float, int]] = {}
    for method in rotated(methods, i):
        pair(method.llm, device)
        start = time.perf_counter()
        solved = answer(method, [problem], seed, device)
        out[method] = time.perf_counter() - start, solved[0]["tokens"]
    return [out[method] for method in methods]


def table(pool: Executor, n: int = 200, n_latency: int = 20, seed: int = 0,
          device: str = "cpu") -> list[dict]:
    """The rows, one per method, LLM alone second."""
    chosen = problems("test", n, seed)
    here = pair("llm", device)
    learned = (Method("R-Stitch+, kappa 0.35", rstitch.PolicyRouter.load(Task().policy(), *here[:2])),
               Method("R2R", rstitch.R2RRouter.load(Task().path("router"), *here[:2])))
    with progress(n * (len(ALONE) + 2 * len(STITCHED) + len(learned)) + n_latency, "answers",
                  "problem") as bar:

        def start(weight: int, function, *args) -> Future:
            job = pool.submit(function, *args, seed, device)
            job.add_done_callback(lambda _: bar.update(weight))
            return job

        # R-Stitch first, for its LLM shares; everything else is queued behind it, so that no process waits
        # for another.
        jobs = {method: start(n, answer, method, chosen) for method in (*STITCHED, *learned, *ALONE)}
        figures = {method: describe(jobs[method].result()) for method in STITCHED}
        random = [Method(f"random, {100 * r['llm_share']:.1f} % LLM",
                         rstitch.RandomRouter(r["llm_share"], seed=seed)) for r in figures.values()]
        jobs |= {method: start(n, answer, method, chosen) for method in random}
        methods = [*ALONE, *(m for both in zip(STITCHED, random) for m in both), *learned]
        timed = [start(1, latencies, methods, problem, i) for i, problem in enumerate(chosen[:n_latency])]
        figures |= {method: describe(jobs[method].result()) for method in (*ALONE, *random, *learned)}
        timed = [job.result() for job in timed]
    rows = []
    for k, method in enumerate(methods):
        seconds, tokens = (sum(timed[i][k][x] for i in range(n_latency)) for x in (0, 1))
        rows.append({"what": "demo", "method": method.name, **figures[method],
                     "latency_ms": 1e3 * seconds / n_latency,
                     "latency_tokens": tokens / n_latency, "n_latency": n_latency,
                     **provenance(seed, n, device)})
    llm = rows[1]
    for row in rows:
        row["shorter"] = llm["latency_tokens"] / row["latency_tokens"]
        row["speed_up"] = llm["latency_ms"] / row["latency_ms"]
        row["cheaper"] = row["speed_up"] / row["shorter"]
    return rows


def show(rows: list[dict]) -> str:
    """The table as text, units and direction in its head."""
    head = ["", "right, % [95 %]", "cut off, %", "tokens", "LLM, %", "switches", "ms/problem",
            "speed-up = shorter x cheaper"]
    units = ["", "higher is better", "of answers", "per answer", "of tokens", "per answer", "lower is better",
             "than LLM alone"]
    right = [with_interval([100 * x for x in (r["accuracy"], *r["accuracy_95"])], digits=1) for r in rows]
    body = [[r["method"], share, cut_off(r), f"{r['tokens']:.1f}",
             f"{100 * r['llm_share']:.1f}", f"{r['switches']:.1f}", f"{r['latency_ms']:.0f}",
             f"{r['speed_up']:.2f} = {r['shorter']:.2f} x {r['cheaper']:.2f}"]
            for r, share in zip(rows, right)]
    widths = [max(map(len, column)) for column in zip(head, units, *body)]
    lines = ["  ".join(cell.ljust(w) if i == 0 else cell.rjust(w)
                       for i, (cell, w) in enumerate(zip(line, widths))).rstrip()
             for line in (head, units, *body)]
    r = rows[0]
    note = (f"n = {r['n']} test problems, greedy, batched; ms/problem and speed-up: batch 1, first "
            f"{r['n_latency']}, methods interleaved. "
            f"Seed {r['seed']}, {r['device']}, {r['dtype']}, torch {r['torch']}, transformers "
            f"{r['transformers']}.")
    return "\n".join([*lines, note])


def stream(n: int = 3, seed: int = 0, device: str = "cpu") -> None:
    """The first n test problems, their answers coloured by who writes."""
    slm, llm, tokenizer = pair("llm", device)
    print(f"The first {n} test problems, R-Stitch at tau {TAUS[0]:g}:")
    for problem in problems("test", n, seed):
        print(f"\n{question(problem)}")
        ids, _ = rstitch.encode(tokenizer, question(problem))
        result = run_question(slm, llm, tokenizer, ids, STITCHED[0].router,
                                      max_new_tokens=MAX_NEW_TOKENS, seed=seed)
        text = tokenizer.decode(result.sequences[0, ids.shape[1]:], skip_special_tokens=True)
        print("right" if verify(problem, text) else f"wrong: it is {problem.answer}")


def main(seed: int = 0, device: str = "cpu", json_file: str | None = None) -> None:
    if json_file:
        Path(json_file).touch()  # a path that cannot be written is told now, not after two minutes
    workers = 2 if device == "cpu" else 1
    start = time.perf_counter()
    with make_pool(workers, __name__) as pool:
        for _ in range(workers):
            pool.submit(pair, "llm", device)  # they load while the problems are streamed
        stream(seed=seed, device=device)
        rows = table(pool, seed=seed, device=device)
    print("\n" + show(rows))
    print(f"{time.perf_counter() - start:.0f} s in all")
    if json_file:
        Path(json_file).write_text(json.dumps(rows, indent=1) + "\n")


def options() -> argparse.Namespace:
    """The command line, as `main` takes it."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0,
                        help="of the problems and of random calls (default: %(default)s)")
    parser.add_argument("--device", type=usable_device, default="cpu",
                        help="torch device (default: %(default)s)")
    parser.add_argument("--json", dest="json_file", metavar="FILE",
                        help="write the rows of the table there, too")
    return parser.parse_args()


if __name__ == "__main__":
    start(lambda: main(**vars(options())))

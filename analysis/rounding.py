"""How many answers does rounding turn? The same problems, one at a time and in one batch.

    python -m analysis.rounding              pocket pair, float32
    python -m analysis.rounding --dtype bfloat16
    P="--slm SMALL --llm LARGE --problems file.jsonl"
    python -m analysis.rounding $P --dtype bfloat16 --out rounding.jsonl

Rows: rounding.jsonl.
Feeds: the results page's section on rounding.

A row of a batch gets what it would get alone up to the rounding of the matrix products, whose order of
additions depends on their shape. Where two tokens are nearly as likely, or an entropy lies next to tau, that
turns a token, and everything behind it may follow. Greedy answers to test problems; a row of the file is one
answer, and a run that was killed goes on with the first that is missing.
"""
import argparse
from pathlib import Path

import numpy as np
import torch

import rstitch
from analysis.instruments.options import add_options, given
from analysis.instruments.progress import progress
from analysis.instruments.provenance import machine, provenance
from analysis.instruments.rows import RESULTS
from analysis.instruments.runs import Rows
from analysis.instruments.stats import wilson, with_interval
from analysis.instruments.task import SEED, Task, encode_problems, made_by
from rstitch_hf.ranks import rank, start, world

FILE = RESULTS / "rounding.jsonl"
METHODS = {"SLM alone": rstitch.SLMOnly(), "LLM alone": rstitch.LLMOnly(),
           "R-Stitch, tau 0.02": rstitch.EntropyRouter(0.02)}


def answer(task: Task, method: str, chosen: list) -> list[list[int]]:
    """The tokens of each answer, all problems in one batch."""
    slm, llm, tokenizer, _ = task.load()
    ids, mask = encode_problems(tokenizer, chosen, task)
    result = rstitch.stitch(slm, llm, ids, METHODS[method], attention_mask=mask,
                            max_new_tokens=task.max_new_tokens, seed=SEED)
    return [[call.token for call in kept] for kept in result.kept]


def run(task: Task, methods: list[str], n: int, path: Path) -> list[dict]:
    """The rows of both ways, what is missing computed and appended."""
    chosen = task.split("test", n)
    made = made_by(task) | {"machine": machine(task.device), "threads": torch.get_num_threads(),
                            "of": len(chosen)}
    store = Rows(path, lambda row: (row["method"], row["batch"], row["problem"]), lambda key: made)
    todo = [(method, len(part), part) for method in methods
            for part in ([*range(len(chosen))], *([i] for i in range(len(chosen))))]
    keys = [(method, batch, i) for method, batch, part in todo for i in part]
    have = store.have()
    todo = [job for at, job in enumerate(todo) if at % world() == rank()
            and any((*job[:2], i) not in have for i in job[2])]
    with progress(len(todo), "answers") as bar:
        for method, batch, part in todo:
            for i, tokens in zip(part, answer(task, method, [chosen[i] for i in part])):
                store.add((method, batch, i), {"what": "rounding", "method": method, "batch": batch,
                                               "problem": i, "tokens": tokens,
                                               **provenance(SEED, n, task.device, task.dtype)})
            bar.update()
    return [row for row in store.settle(keys, bool(todo)).values() if row["method"] in methods]


def compare(rows: list[dict]) -> list[dict]:
    """By method: how many answers differ between batch 1 and the batch, and at which token they first do."""
    out = []
    for method in dict.fromkeys(r["method"] for r in rows):
        by = {(r["batch"], r["problem"]): r["tokens"] for r in rows if r["method"] == method}
        batch = max(size for size, _ in by)
        pairs = [(tokens, by[batch, i]) for (size, i), tokens in by.items() if size == 1 and (batch, i) in by]
        first = [next((t for t, (a, b) in enumerate(zip(*pair)) if a != b), min(map(len, pair)))
                 for pair in pairs if pair[0] != pair[1]]
        out.append({"method": method, "batch": batch, "n": len(pairs),
                    "differ": [len(first) / len(pairs), *wilson(len(first), len(pairs))],
                    "first": float(np.median(first)) if first else None,
                    "tokens": sum(len(a) for a, _ in pairs)})
    return out


def show(row: dict) -> str:
    where = f", first at token {row['first']:.0f} (median)" if row["first"] is not None else ""
    return (f"{row['method']:20} {with_interval([100 * x for x in row['differ']], digits=1)} % of {row['n']} "
            "answers differ between batch 1 and "
            f"{row['batch']}{where}; {row['tokens']} tokens")


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, Task, unread=("rows", "latency", "policies", "router", "control"))
    parser.add_argument("--n", type=int, default=32,
                        help="problems, which are also the batch (default: %(default)s)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="(default: all)")
    args = parser.parse_args()
    try:
        task = Task(**given(args, Task))
        rstitch.check_count("--n", args.n, least=2)
        path = Path(task.out) if task.out else FILE
        if not task.pocket and not task.out:
            raise ValueError("--out is missing: expected a file for a pair or problems that are not the "
                             "pocket's")
        rows = run(task, args.methods, args.n, path)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(*map(show, compare(rows)), sep="\n")
    r = rows[-1]
    print(f"{r['dtype']}, {r['machine']}, {r['threads']} threads, at most {r['limit']} tokens, torch "
          f"{r['torch']}, transformers {r['transformers']}")


if __name__ == "__main__":
    start(main, shared=True)

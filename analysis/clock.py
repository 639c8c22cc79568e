"""Milliseconds of an answer at batch 1, by the clock, several ways to answer side by side.

    P="--slm SMALL --llm LARGE --problems file.jsonl --out clock.jsonl"
    python -m analysis.clock $P --n 20 --methods llm slm tau=0.02 tau=0.05 assisted

Rows: the file that --out names.
Feeds: what is said of the speed of real pairs.

Problems in turn, and the ways to answer each in turn, beginning with another one each time. Before every
answer a step of the LLM is timed, which shows how the machine drifts. A way is a method of analysis.answers;
`generate`, the LLM by `generate()` of transformers; or `assisted`, speculative decoding by the same function.
Nothing else may run meanwhile. A run that was killed goes on with the answers that were not timed.

Speed is that of the LLM alone by `stitch`, the means of both over the same problems divided. It is the
product of two: answers that are shorter, and tokens that are cheaper.
"""
import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

import rstitch
from analysis.answers import digest, router_of, with_net
from analysis.compare import assisted, generated
from analysis.instruments.options import add_options, given
from analysis.instruments.problems import PARTS
from analysis.instruments.progress import progress
from analysis.instruments.provenance import machine, provenance
from analysis.instruments.runs import Rows
from analysis.instruments.stats import bootstrap, ratio_of_means, with_interval
from analysis.instruments.task import SEED, Task, encode_problems, graded, made_by
from analysis.instruments.timing import REFERENCE, now, reference_ms, rotated
from rstitch_hf.ranks import start

OTHERS = ("generate", "assisted")  # by transformers, not by stitch

Answer = tuple[list[int], float | None]  # its tokens, and the LLM's share of them; None: it is not counted


def ways(task: Task, methods: Sequence[str], lms: Sequence[rstitch.CachedLM]) -> dict[str, Callable]:
    """By method, what answers a prompt (1, P)."""
    pair, limit = task.load(), task.max_new_tokens

    def stitched(router) -> Callable[[torch.Tensor], Answer]:
        def answer(ids: torch.Tensor) -> Answer:
            out = rstitch.stitch(*lms, ids, router, max_new_tokens=limit, seed=SEED)
            kept = out.kept[0]
            return [call.token for call in kept], sum(call.model for call in kept) / len(kept)
        return answer

    others = {"generate": lambda ids: (generated(pair, ids, limit), 1.0),
              "assisted": lambda ids: (assisted(pair, ids, limit)[0], None)}
    return {name: others[name] if name in others else stitched(router_of(name, task)) for name in methods}


def run(task: Task, methods: Sequence[str], split: str, n: int, path: Path) -> list[dict]:
    """A row for every problem and method, those that are missing timed and appended."""
    slm, llm, tokenizer, ends = task.load()
    chosen = task.split(split, n)
    prompts = [encode_problems(tokenizer, [problem], task)[0] for problem in chosen]
    longest = max(REFERENCE[1] + 1, max(ids.shape[1] for ids in prompts) + task.max_new_tokens)
    world = made_by(task) | {"machine": machine(task.device), "split": split,
                             "threads": torch.get_num_threads()}
    store = Rows(path, lambda row: (row["method"], row["problem"], row["question"]),
                 with_net(world, methods, task))
    keys = [(name, i, digest(problem)) for i, problem in enumerate(chosen)
            for name in rotated(list(methods), i)]
    todo = store.missing(keys)
    if todo:
        lms = [rstitch.CachedLM(model, 1, longest) for model in (slm, llm)]
        by_name = ways(task, methods, lms)
        for answer in by_name.values():  # the first call of anything is slow
            answer(prompts[0][:, -8:])
        with progress(len(todo), "by the clock", "answer") as bar:
            for name, i, question in todo:
                calm, begun = reference_ms(lms[1]), now(llm.device)
                tokens, share = by_name[name](prompts[i])
                ms = 1e3 * (now(llm.device) - begun)
                verdict = graded(tokenizer, ends, chosen[i], tokens)
                store.add((name, i, question), {
                    "what": "clock", "method": name, "problem": i, "question": question, "ms": round(ms, 2),
                    "reference_ms": round(calm, 3), "tokens": len(tokens),
                    "llm_share": None if share is None else round(share, 4),
                    "correct": verdict["correct"], "finished": verdict["finished"],
                    **provenance(SEED, n, task.device, task.dtype)})
                bar.update()
        for lm in lms:
            lm.close()
    have = store.settle(keys, bool(todo))
    return [have[key] for key in keys]


def compared(rows: Sequence[dict], method: str, base: str = "llm") -> dict[str, tuple[float, float, float]]:
    """Speed of a method, that of the base being 1, and its two factors, over the problems that both have
    answered; 95 % intervals, bootstrapped over problems."""
    by = {(row["method"], row["problem"]): row for row in rows}
    both = sorted(i for name, i in by if name == method and (base, i) in by)
    (ms, n), (ms_base, n_base) = (np.array([[by[name, i][what] for i in both] for what in ("ms", "tokens")],
                                           float) for name in (method, base))

    def cheaper(a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray) -> float:
        return ratio_of_means(a, b) * ratio_of_means(c, d)

    return {"speed": (ratio_of_means(ms_base, ms), *bootstrap(ratio_of_means, ms_base, ms)),
            "shorter": (ratio_of_means(n_base, n), *bootstrap(ratio_of_means, n_base, n)),
            "cheaper": (cheaper(ms_base, ms, n, n_base), *bootstrap(cheaper, ms_base, ms, n, n_base))}


def show(rows: Sequence[dict], methods: Sequence[str]) -> str:
    """A line a method, and the drift of the machine."""
    lines = [f"{'method':20} {'n':>4} {'right, %':>9} {'LLM, % of tokens':>17} {'tokens':>7}"]
    lines[0] += f" {'ms a token':>11}  {'speed, LLM alone = 1':22} = {'shorter':22} x cheaper"
    for name in methods:
        own = [row for row in rows if row["method"] == name]
        tokens = sum(row["tokens"] for row in own)
        share = 100 * sum((row["llm_share"] or 0) * row["tokens"] for row in own) / tokens
        told = "not counted" if own[0]["llm_share"] is None else f"{share:.1f}"
        lines.append(f"{name:20} {len(own):>4} {100 * np.mean([row['correct'] for row in own]):>9.1f} "
                     f"{told:>17} {tokens / len(own):>7.0f} {sum(row['ms'] for row in own) / tokens:>11.1f}")
        if "llm" in methods:
            x = {part: with_interval(of, digits=2) for part, of in compared(rows, name).items()}
            lines[-1] += f"  {x['speed']:22} = {x['shorter']:22} x {x['cheaper']}"
    if "assisted" in methods:
        leads = {name: with_interval(compared(rows, name, "assisted")["speed"], digits=2)
                 for name in methods if name not in (*OTHERS, "llm", "slm")}
        lines += [f"{name} is {lead} times as fast as speculative decoding" for name, lead in leads.items()]
    calm = np.array([row["reference_ms"] for row in rows])
    low, middle, high = np.quantile(calm, [0, 0.5, 1])
    lines.append(f"higher is better but for ms; a step of the LLM took {middle:.1f} ms, "
                 f"{100 * (low / middle - 1):+.0f} to {100 * (high / middle - 1):+.0f} % over the run; "
                 f"{rows[0]['dtype']}, {rows[0]['machine']}, {rows[0]['threads']} threads")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, Task, unread=("rows", "latency", "control"))
    parser.add_argument("--methods", nargs="+", default=["llm", "slm", "tau=0.02", "assisted"],
                        help="(default: llm slm tau=0.02 assisted)")
    parser.add_argument("--split", choices=PARTS, default="test", help="(default: %(default)s)")
    parser.add_argument("--n", type=int, default=20, help="problems (default: %(default)s)")
    args = parser.parse_args()
    try:
        task = Task(**given(args, Task))
        rstitch.check_count("--n", args.n)
        for method in args.methods:
            if method not in OTHERS:
                router_of(method, task)
        if len(set(args.methods)) < len(args.methods):
            raise ValueError(f"--methods {' '.join(args.methods)}: expected each once")
        if not args.out:
            raise ValueError("--out is missing: expected a file for the rows")
        rows = run(task, args.methods, args.split, args.n, Path(args.out))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(show(rows, args.methods))


if __name__ == "__main__":
    start(main)

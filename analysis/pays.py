"""Does a pair pay? What each tau can be expected to save, before anything is stitched.

    python -m analysis.pays --slm SMALL --llm LARGE --problems file.jsonl
    python -m analysis.pays                                                  pocket pair

Rows: the answers, in the file that --out names, as analysis.answers writes them.
Feeds: what a user decides first.

Both models answer a few problems alone, and the steps of both are timed. The SLM then reads the LLM's
answers, and Algorithm 1 is replayed on them for each tau: the SLM leaves where its entropy exceeds tau, the
LLM hands back where its own does not. That gives the LLM's share and every read, and from the step times the
speed-up over the LLM alone, at batch 1, and at batch N by the event simulation of analysis.bench. What is
assumed: stitched answers are as long as the LLM's, and their entropies as on the LLM's. Whether they are as
right only stitched answers tell: those at the tau of --try are made too, if half of --minutes are left.
"""
import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

import rstitch
from analysis import answers
from analysis.bench import read_cost, simulate
from analysis.instruments.options import add_options, given
from analysis.instruments.progress import tracked
from analysis.instruments.provenance import machine
from analysis.instruments.stats import wilson
from analysis.instruments.task import Pair, Task, common_vocab, encode_problems
from analysis.label import read_along
from rstitch_hf.ranks import start
from rstitch_hf.serving import can_pack

TAUS = (0.001, 0.005, 0.02, 0.05, 0.1)
REPLAYED = 512  # tokens of an answer
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)  # tokens in a call, in all rows
WORTH = 1.1  # speed-up below which a pair does not pay


def leaves_at(tau: float, entropies: Sequence[tuple[np.ndarray, np.ndarray]], vocab: int,
              tokens: int) -> np.ndarray:
    """(2, rows, tokens) bool: where the SLM, and the LLM, would leave; answers repeat up to `tokens`. The LLM
    writes the first token, as the simulation has it."""
    limit = tau * np.log(vocab)
    out = np.array([[np.resize(H > limit, tokens) for H, _ in entropies],
                    [np.resize(H <= limit, tokens) for _, H in entropies]])
    out[1, :, 0] = True
    return out


def share_of(leaves: np.ndarray) -> float:
    """Of the tokens that Algorithm 1 lets the LLM write, the first of each row aside."""
    large = total = 0
    for slm, llm in zip(*leaves):
        model = rstitch.SLM
        for leave, back in zip(slm[1:], llm[1:]):
            writer = rstitch.LLM if model == rstitch.LLM or leave else rstitch.SLM
            large, total = large + writer, total + 1
            model = rstitch.LLM if writer == rstitch.LLM and not back else rstitch.SLM
    return large / total


def step_costs(models: Sequence, rows: int, context: int) -> list[np.ndarray]:
    """By model, the milliseconds of a call of up to `rows` rows by its tokens, those of SIZES."""
    out = []
    for model in models:
        lm = rstitch.CachedLM(model, rows, context + max(SIZES))
        cost = read_cost([lm], context, 3)
        shapes = [(min(rows, size), size // min(rows, size)) for size in SIZES]
        out.append(np.array([cost(0, n * [width])
                             for n, width in tracked(shapes, f"steps of {rows} row{'s' * (rows > 1)}")]))
        lm.close()
    return out


def cost_of(curves: Sequence[np.ndarray],
            packs: Sequence[bool] = (False, False)) -> Callable[[int, list[int]], float]:
    """cost(model, unread) for `simulate`: by the tokens of the call, with its pads unless its model packs, on
    the line between those that were timed; beyond the last, in proportion."""
    def cost(model: int, unread: list[int]) -> float:
        tokens, curve = sum(unread) if packs[model] else len(unread) * max(unread), curves[model]
        return float(np.interp(tokens, SIZES, curve) * max(1.0, tokens / SIZES[-1]))

    return cost


def expected(leaves: np.ndarray, curves: Sequence[np.ndarray], batch: int,
             packs: Sequence[bool] = (False, False)) -> float:
    """Speed-up over the LLM alone: `batch` rows at a time, those of the script in turn."""
    rows, tokens = leaves.shape[1:]
    cost, taken, alone = cost_of(curves, packs), 0.0, 0.0
    for at in range(0, rows, batch) if batch < rows else [0]:
        part = np.take(leaves, range(at, at + batch), 1, mode="wrap")
        clock, written, _ = simulate(part, cost, packs=packs)
        taken, alone = taken + clock, alone + written / batch * cost(rstitch.LLM, [1] * batch)
    return alone / taken


def advice(ratio: float, row: dict, right: dict[str, list[bool]], batch: int) -> str:
    """What the figures come to, of the row of the table at the tau that was tried."""
    percent = {name: 100 * np.mean(answers) for name, answers in right.items()}
    upper = {name: 100 * wilson(sum(answers), len(answers))[1] for name, answers in right.items()}
    if upper["slm"] >= percent["llm"]:
        return (f"The SLM alone may be as right as the LLM ({percent['slm']:.0f} and {percent['llm']:.0f} "
                "%): ask more problems before anything else, or use it alone.")
    if row["alone"] < WORTH:
        return (f"This pair does not pay at tau {row['tau']:g}: {row['alone']:.2f} x the speed of the LLM "
                f"alone is expected at batch 1, for its step costs only {ratio:.1f} times the SLM's.")
    told = f"analysis.answers with --methods llm tau={row['tau']:g}"
    stitched = f"tau={row['tau']:g}"
    if upper.get(stitched, 100.0) < percent["llm"]:
        return (f"At tau {row['tau']:g} answers are worse ({percent[stitched]:.0f} % right, the LLM "
                f"{percent['llm']:.0f} %): try a smaller one with --try.")
    return (f"At tau {row['tau']:g} expect about {row['alone']:.2f} x the speed of the LLM alone at batch 1, "
            f"{row['together']:.2f} x at batch {batch}; how right answers stay, many problems tell ({told}).")


def look(task: Task, n: int, batch: int, path: Path, minutes: float, tau: float) -> dict:
    """All figures: {"steps", "table", "agreement", "right", ...}."""
    begin = time.perf_counter()
    split = "any" if task.problems else "dev"
    rows = {name: answers.run(task, [name], split, n, path) for name in ("llm", "slm")}
    slm, llm, tokenizer, _ = pair = task.load()
    vocab = common_vocab(pair)
    prompts = rstitch.unpadded(*encode_problems(tokenizer, task.split(split, n), task))
    seen, same = [], []
    for prompt, row in tracked(list(zip(prompts, rows["llm"])), "the SLM reads along"):
        tokens = row["tokens"][:REPLAYED]
        choice, H = read_along(slm, prompt, tokens, vocab)
        seen.append((np.array(H), np.array(row["entropy"][:REPLAYED])))
        same.append(np.equal(choice, tokens))
    context = int(np.mean([len(p) + len(r["tokens"]) / 2 for p, r in zip(prompts, rows["llm"])]))
    single, together = (step_costs((slm, llm), size, context) for size in (1, batch))
    tokens = int(np.median([len(H) for H, _ in seen]))
    packs = [can_pack(model) for model in (slm, llm)]
    table = []
    for one in sorted({*TAUS, tau}):
        leaves = leaves_at(one, seen, vocab, max(tokens, 4))
        table.append({"tau": one, "above": float(np.mean(np.concatenate([H for H, _ in seen])
                                                         > one * np.log(vocab))),
                      "share": share_of(leaves), "alone": expected(leaves, single, 1),
                      "together": expected(leaves, together, batch, packs)})
    name = f"tau={tau:g}"
    if time.perf_counter() - begin < 30 * minutes:
        rows[name] = answers.run(task, [name], split, n, path)
    return {"steps": {1: [curve[0] for curve in single],
                      batch: [cost_of(together)(m, [1] * batch) for m in (0, 1)]},
            "table": table, "tau": tau, "agreement": float(np.mean(np.concatenate(same))), "context": context,
            "rows": rows,
            "right": {key: [row["correct"] for row in found] for key, found in rows.items()},
            "minutes": (time.perf_counter() - begin) / 60}


def show(found: dict, task: Task, batch: int) -> str:
    """The figures as text."""
    lines = [answers.show(method, rows) for method, rows in found["rows"].items()]
    lines.append("")
    for size, (small, large) in found["steps"].items():
        lines.append(f"a step of {size:>3} row{'s' * (size > 1):1}: SLM {small:.1f} ms, LLM {large:.1f} ms, "
                     f"{large / small:.1f} times as long")
    tokens = sum(min(len(row["tokens"]), REPLAYED) for row in found["rows"]["llm"])
    head = [("", "tau"), ("SLM entropies", "above tau, %"), ("LLM tokens, %", "expected"),
            ("speed-up, x", "higher is better"), (f"batch {batch}", "simulated")]
    lines.append(f"the SLM would write the LLM's token at {100 * found['agreement']:.1f} % of its {tokens} "
                 "tokens\n")
    lines += [" ".join(cell.rjust(width) for cell, width in zip(cells, (6, 13, 14, 18, 10)))
              for cells in zip(*head)]
    lines += [f"{row['tau']:6g} {100 * row['above']:13.1f} {100 * row['share']:14.1f} {row['alone']:18.2f} "
              f"{row['together']:10.2f}" for row in found["table"]]
    small, large = found["steps"][1]
    tried = next(row for row in found["table"] if row["tau"] == found["tau"])
    lines += ["", advice(large / small, tried, found["right"], batch),
              f"{task.dtype}, {machine(task.device)}, {torch.get_num_threads()} threads, greedy, context "
              f"{found['context']} tokens; {found['minutes']:.1f} minutes."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, Pair)
    parser.add_argument("--problems", default="",
                        help="JSONL file, or a data set as REPO:CONFIG:PART, of which the first problems are "
                             "taken, whatever their split (default: dev problems of the pocket domain)")
    parser.add_argument("--out", default="pays.jsonl", help="file of the answers (default: %(default)s)")
    parser.add_argument("--n", type=int, default=20, help="problems (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="rows of the simulation (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=10.0,
                        help="stitched answers are made only if half of it is left (default: %(default)g)")
    parser.add_argument("--try", type=float, default=0.02, dest="tau", metavar="TAU",
                        help="of the stitched answers (default: %(default)s, the paper's)")
    args = parser.parse_args()
    try:
        task = Task(problems=args.problems, out=args.out, **given(args, Pair))
        rstitch.check_count("--n", args.n)
        rstitch.check_count("--batch", args.batch)
        rstitch.EntropyRouter(args.tau)
        if not 0 <= args.minutes < float("inf"):
            raise ValueError(f"--minutes {args.minutes:g}: expected a number, 0 or more")
        found = look(task, args.n, args.batch, Path(task.out), args.minutes, args.tau)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(show(found, task, args.batch))


if __name__ == "__main__":
    start(main)

"""Figures of the pocket pair on the test split: design properties, entropies, and accuracy against LLM share
over tau.

    python -m analysis.presentation.report  (appends to analysis/results/pair.jsonl, skips what is there)

Design properties decide whether a pair is accepted (SLM right on 40-70 %, LLM on 95 % or more, LLM answers at
least 2.5 times as long where both are right, an LLM forward at least 4 times an SLM forward, 99 % of answers
finished). The rest is reported, the sweep also with LLM-short, which writes as the SLM does, in the LLM's
place.
"""
import argparse
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

import rstitch
from analysis.instruments.progress import progress
from analysis.instruments.provenance import provenance
from analysis.instruments.rows import RESULTS, append_row, read_rows
from analysis.instruments.stats import auroc, bootstrap, ratio_of_means, wilson
from analysis.instruments.task import TAUS, cut_off, describe, encode_problems, solve
from analysis.pocket.domain import problems
from analysis.pocket.weights import MAX_NEW_TOKENS, load_pocket

N_TEST, SEED = 4000, 0
SHORT = "LLM-short"
ALIKE = f", {SHORT}"  # of methods with it in the LLM's place


def method_row(method: str, tau: float | None, n: int, p: float | None = None) -> dict:
    """One row: a method over the first n problems of the test split, greedy."""
    torch.set_num_threads(1)
    pair = load_pocket(llm="llm-short" if method.endswith(SHORT) else "llm")
    router = {
        "SLM": rstitch.SLMOnly, "LLM": rstitch.LLMOnly, SHORT: rstitch.LLMOnly,
        "R-Stitch": lambda: rstitch.EntropyRouter(tau), "random": lambda: rstitch.RandomRouter(p, seed=SEED)
    }[method.removesuffix(ALIKE)]()
    solved = solve(pair, problems("test", n, SEED), router, seed=SEED)
    row = {"what": "method", "method": method, "tau": tau, "p": p, **describe(solved), **provenance(SEED, n)}
    if method in ("SLM", "LLM"):
        row["outcomes"] = [[int(s["correct"]), s["tokens"]] for s in solved]
    if method == "SLM":
        row["entropy"] = entropy_figures(solved)
    return row


def entropy_figures(solved: list[dict]) -> dict:
    """Of the SLM alone: shares of tokens above thresholds, and how well an answer's mean entropy tells wrong
    from right."""
    H = [np.array([c.entropy for c in s["calls"]]) for s in solved]
    tokens = np.array([len(h) for h in H], float)
    shares = {}
    for limit in (0.01, 0.1, 0.5, 1.0):
        above = np.array([(h > limit).sum() for h in H], float)
        shares[f"{limit} nats"] = [ratio_of_means(above, tokens), *bootstrap(ratio_of_means, above, tokens)]
    mean, wrong = np.array([s["entropy"] for s in solved]), np.array([not s["correct"] for s in solved])
    return {
        "share_above": shares, "median_right": float(np.median(mean[~wrong])),
        "median_wrong": float(np.median(mean[wrong])),
        "auroc_wrong": [auroc(mean, wrong), *bootstrap(auroc, mean, wrong)]
    }


def step_cost(repeats: int = 400, context: int = 100) -> dict:
    """Milliseconds at batch 1 of one decode step (read, entropy, draw, host read) and of the model's forward
    in it, one thread, SLM and LLM interleaved."""
    torch.set_num_threads(1)
    slm, llm, _ = load_pocket()
    lms = [rstitch.CachedLM(model, 1, context + 1) for model in (slm, llm)]
    marks: list[float] = []
    times: dict[str, list[list[float]]] = {"step": [[], []], "forward": [[], []]}
    for lm in lms:
        lm.read([0], [[5] * context])
        lm.model.register_forward_pre_hook(lambda *_: marks.append(time.perf_counter()))
        lm.model.register_forward_hook(lambda *_: marks.append(time.perf_counter()))
    for _ in range(repeats):
        for m, lm in enumerate(lms):
            lm.cursor = [context]
            marks.clear()
            start = time.perf_counter()
            lm.read([0], [[7]]).token.tolist()
            times["step"][m].append(1e3 * (time.perf_counter() - start))
            times["forward"][m].append(1e3 * (marks[1] - marks[0]))
    row = {"what": "step cost", "context": context}
    for what, (slm_ms, llm_ms) in times.items():
        ratio = np.array(llm_ms) / np.array(slm_ms)
        row |= {
            f"slm_{what}_ms": float(np.median(slm_ms)), f"llm_{what}_ms": float(np.median(llm_ms)),
            f"{what}_ratio": float(np.median(ratio)),
            f"{what}_ratio_quartiles": np.percentile(ratio, [25, 75]).tolist()
        }
    return row | provenance(SEED, repeats)


def bfloat16_flips(n: int = 16) -> dict:
    """Share of rows whose tokens differ between a batch of n and n single runs, in bfloat16 (in float32 a
    test asserts none)."""
    slm, llm, tokenizer = load_pocket(dtype="bfloat16")
    ids, mask = encode_problems(tokenizer, problems("dev", n, SEED))
    flips = []
    for tau in (0.0, 0.005, 0.02, 0.1, 1.0):
        for temperature in (0.0, 0.6):
            options = dict(max_new_tokens=MAX_NEW_TOKENS, temperature=temperature)
            together = rstitch.stitch(slm, llm, ids, rstitch.EntropyRouter(tau), attention_mask=mask,
                                      seed=SEED, **options)
            for b in range(n):
                alone = rstitch.stitch(slm, llm, ids[b:b + 1][:, mask[b].bool()], rstitch.EntropyRouter(tau),
                                       seed=[together.seed[b]], **options)
                flips.append([c.token for c in alone.calls[0]] != [c.token for c in together.calls[b]])
    return {
        "what": "bfloat16 flips", "rate": float(np.mean(flips)), "rate_95": wilson(sum(flips), len(flips)),
        **provenance(SEED, len(flips), dtype="bfloat16")
    }


def run(path: Path = RESULTS / "pair.jsonl", n: int = N_TEST, taus: tuple[float, ...] = TAUS,
        workers: int = 2) -> list[dict]:
    """Compute what `path` lacks, a row at a time. Random switching follows R-Stitch, at the LLM share that it
    reached."""
    rows = {(r["what"], r.get("method"), r.get("tau")): r for r in read_rows(path)
            if r["what"] != "method" or r["n"] == n}
    if ("step cost", None, None) not in rows:
        append_row(path, step_cost())
    if ("bfloat16 flips", None, None) not in rows:
        append_row(path, bfloat16_flips())
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool, \
            progress(3 + 4 * len(taus), "methods", "method") as bar:
        running = set()

        def start(method: str, tau: float | None = None) -> None:
            """The row, unless it is there; then what follows from it."""
            row = rows.get(("method", method, tau))
            if row is None:
                leader = method.replace("random", "R-Stitch")
                p = rows["method", leader, tau]["llm_share"] if method != leader else None
                running.add(pool.submit(method_row, method, tau, n, p))
            else:
                bar.update()
                if method.startswith("R-Stitch"):
                    start(method.replace("R-Stitch", "random"), tau)

        for method in ("LLM", "SLM", SHORT):
            start(method)
        for tau in taus:
            start("R-Stitch", tau)
            start("R-Stitch" + ALIKE, tau)
        while running:
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for job in finished:
                row = job.result()
                append_row(path, row)
                rows["method", row["method"], row["tau"]] = row
                start(row["method"], row["tau"])
    return read_rows(path)


def cell(row: dict, key: str, scale: float = 100, unit: str = "") -> str:
    """A figure of a row with its interval."""
    low, high = row[key + "_95"]
    return f"{scale * row[key]:.1f}{unit} [{scale * low:.1f}, {scale * high:.1f}]"


def design(rows: list[dict]) -> list[tuple[str, str, bool]]:
    """(property, figure, holds) for every design property of the protocol."""
    methods = {r["method"]: r for r in rows if r["what"] == "method" and r["tau"] is None}
    small, large = methods["SLM"], methods["LLM"]
    slm, llm = (np.array(r["outcomes"], float) for r in (small, large))
    both = (slm[:, 0] > 0) & (llm[:, 0] > 0)
    length = ratio_of_means(llm[both, 1], slm[both, 1])
    cost = next(r for r in rows if r["what"] == "step cost")
    ratios = "{:.2f} (quartiles {:.2f}, {:.2f}); of whole steps {:.2f} (quartiles {:.2f}, {:.2f})".format(
        cost["forward_ratio"], *cost["forward_ratio_quartiles"], cost["step_ratio"],
        *cost["step_ratio_quartiles"])
    finished = f"SLM {cell(small, 'finished', unit=' %')}, LLM {cell(large, 'finished', unit=' %')}"
    return [
        ("SLM accuracy 40-70 %", cell(small, "accuracy", unit=" %"), 0.4 <= small["accuracy"] <= 0.7),
        ("LLM accuracy >= 95 %", cell(large, "accuracy", unit=" %"), large["accuracy"] >= 0.95),
        ("LLM tokens / SLM tokens where both are right >= 2.5", f"{length:.2f} (n = {both.sum()})", length
         >= 2.5),
        ("LLM forward / SLM forward at batch 1 >= 4", ratios, cost["forward_ratio"] >= 4),
        ("greedy answers finished >= 99 %", finished, min(small["finished"], large["finished"]) >= 0.99),
    ]


def sweep(rows: list[dict]) -> str:
    """Accuracy against LLM share over tau, as the results page has it."""
    methods = {(r["method"], r["tau"]): r for r in rows if r["what"] == "method"}
    head = ("tau", "R-Stitch right, %", "LLM tokens, %", "tokens per answer", "switches",
            "random at that share right, %", f"R-Stitch with {SHORT} right, %", "its tokens, %",
            "random at that share right, %")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for tau in sorted(tau for method, tau in methods if method == "R-Stitch"):
        r, other, alike, mixed = (methods[method + kind, tau] for kind in ("", ALIKE)
                                  for method in ("R-Stitch", "random"))
        lines.append(
            f"| {tau:g} | {100 * r['accuracy']:.1f} | {100 * r['llm_share']:.1f} | {r['tokens']:.1f} | "
            f"{r['switches']:.1f} | {100 * other['accuracy']:.1f} | {100 * alike['accuracy']:.1f} | "
            f"{100 * alike['llm_share']:.1f} | {100 * mixed['accuracy']:.1f} |")
    return "\n".join(lines)


def show(rows: list[dict]) -> None:
    """Print everything, with intervals."""
    for name, figure, holds in design(rows):
        print(f"{'holds' if holds else 'FAILS':6} {name}: {figure}")
    figures = next(r for r in rows if r.get("method") == "SLM")["entropy"]
    for limit, (share, low, high) in figures["share_above"].items():
        print(f"SLM tokens above {limit}: {100 * share:.2f} % [{100 * low:.2f}, {100 * high:.2f}]")
    signal = "{:.3f} [{:.3f}, {:.3f}]".format(*figures["auroc_wrong"])
    print(f"AUROC of an answer's mean entropy, wrong against right: {signal}; "
          f"medians {figures['median_right']:.4f} right, {figures['median_wrong']:.4f} wrong (nats)")
    flips = next(r for r in rows if r["what"] == "bfloat16 flips")
    low, high = (100 * x for x in flips["rate_95"])
    print(f"bfloat16: {100 * flips['rate']:.1f} % of rows [{low:.1f}, {high:.1f}] "
          f"differ between batch 16 and alone (n = {flips['n']})")
    print(f"{'method':19} {'tau':>7} {'accuracy % [95 %]':>22} {'cut off, %':>11} {'LLM share % [95 %]':>22}"
          f" {'tokens [95 %]':>24} {'switches':>9}")
    order = {"SLM": 0, "LLM": 1, SHORT: 2}
    methods = [r for r in rows if r["what"] == "method"]
    for r in sorted(methods, key=lambda r: (order.get(r["method"], 3), r["tau"] or 0, r["method"])):
        right, share, tokens = cell(r, "accuracy"), cell(r, "llm_share"), cell(r, "tokens", 1)
        tau = "" if r["tau"] is None else f"{r['tau']:g}"
        print(f"{r['method']:19} {tau:>7} {right:>22} {cut_off(r):>11} {share:>22} {tokens:>24}"
              f" {r['switches']:>9.1f}")
    print(f"n = {rows[-1]['n']} problems of the test split, greedy, float32 after rounding to bfloat16; "
          f"intervals 95 %")


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--design", action="store_true", help="the models alone: is the pair accepted?")
    show(run(taus=() if parser.parse_args().design else TAUS))


if __name__ == "__main__":
    main()

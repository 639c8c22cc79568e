"""Speed of the loop itself: `stitch` with the LLM alone against `generate()` of the same model, interleaved in one run.

    python -m analysis.bench                       (pocket pair, batch 1 and 32; appends to analysis/results/bench.jsonl)

Both write the same number of tokens from the same prompts, greedily; `stitch` also records entropies and calls. The first round
is warm-up. Figures are ratios within a round, so other work on the machine hits both sides; absolute times are of this machine.
"""
import argparse
import time

import numpy as np
import torch

import rstitch
from analysis.common import RESULTS, append_row, load_pocket, provenance
from analysis.problems import problems
from analysis.task import encode_problems


def tokens_per_second(run, tokens: int) -> float:
    start = time.perf_counter()
    run()
    return tokens / (time.perf_counter() - start)


def against_generate(pair, batch_size: int, new_tokens: int, rounds: int, seed: int = 0) -> dict:
    """tokens/s of `generate()` and of `stitch(LLMOnly)`, and their ratio: medians and quartiles over rounds."""
    slm, llm, tokenizer = pair
    figures: dict[str, list[float]] = {"generate": [], "stitch": []}
    for i in range(rounds + 1):
        ids, mask = encode_problems(tokenizer, problems("dev", batch_size, seed=1000 * seed + i))
        options = dict(attention_mask=mask, max_new_tokens=new_tokens, pad_token_id=tokenizer.pad_token_id)
        runs = {"generate": lambda: llm.generate(ids, do_sample=False, min_new_tokens=new_tokens, **options),
                "stitch": lambda: rstitch.stitch(slm, llm, ids, rstitch.LLMOnly(), eos_token_id=-1, **options)}
        for name in sorted(runs, reverse=bool(i % 2)):  # either goes first as often
            speed = tokens_per_second(runs[name], batch_size * new_tokens)
            if i:
                figures[name].append(speed)
    ratio = np.array(figures["stitch"]) / np.array(figures["generate"])
    return {"what": "stitch(LLMOnly) against generate()", "batch_size": batch_size, "new_tokens": new_tokens,
            "generate_tokens_per_s": float(np.median(figures["generate"])), "stitch_tokens_per_s": float(np.median(figures["stitch"])),
            "ratio": float(np.median(ratio)), "ratio_quartiles": np.percentile(ratio, [25, 75]).tolist(),
            "threads": torch.get_num_threads(), **provenance(seed, rounds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12, help="measured rounds per batch size (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=100, help="tokens per answer (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pair, rows = load_pocket(), []
    for batch_size in (1, 32):
        rows.append(against_generate(pair, batch_size, args.new_tokens, args.rounds))
        append_row(RESULTS / "bench.jsonl", rows[-1])
        r = rows[-1]
        print(f"batch {batch_size:>2}: generate {r['generate_tokens_per_s']:.0f} tokens/s, stitch {r['stitch_tokens_per_s']:.0f} tokens/s, "
              f"ratio {r['ratio']:.2f} (quartiles {r['ratio_quartiles'][0]:.2f}, {r['ratio_quartiles'][1]:.2f})", flush=True)
    print(f"batch 32 over batch 1: {rows[1]['stitch_tokens_per_s'] / rows[0]['stitch_tokens_per_s']:.1f} x")


if __name__ == "__main__":
    main()

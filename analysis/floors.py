"""How far a step is from what the machine can do.

    python -m analysis.floors              0.5B and 1.5B shapes, batch 1 to 64, 300 cached tokens
    python -m analysis.floors --shapes 7B --dtype bfloat16 --batch 1 8

Rows: bench.jsonl.
Feeds: SERVING.md's section on speed.

A step reads one token in each row of a batch: read, entropy, draw, host read. It cannot take less than its
bytes over the bandwidth of a stream that is only read, nor less than its operations over the best rate of a
matrix product. Both are measured in the same run, and the floor is the larger. What each way to compute
x W^T takes is printed beside (`TurnedLinear` of rstitch_hf/loading.py).
"""
import argparse
from collections.abc import Iterator

import torch

import rstitch
from analysis.bench import FILE, read_cost
from analysis.instruments.provenance import machine, provenance
from analysis.instruments.rows import append_row
from analysis.instruments.shapes import PRODUCT, SHAPES, Limits, build, measure_limits, products
from rstitch_hf.command import usable_device
from rstitch_hf.loading import turn_products
from rstitch_hf.ranks import start


def rows_of(shape: str, batches: list[int], context: int, limits: Limits, device: str, dtype: str,
            rounds: int) -> Iterator[dict]:
    """A row for each batch, as it is measured."""
    kind = getattr(torch, dtype)
    model = build(shape, context + rstitch.BLOCK, device, kind)
    turn_products(model)
    for batch in batches:
        lm = rstitch.CachedLM(model, batch, context + rstitch.BLOCK)
        step = read_cost([lm], context, rounds)(0, [1] * batch)
        lm.close()
        floor, bound = limits.floor(shape, batch, context, kind.itemsize)
        yield {"what": "step over floor", "shape": shape, "batch": batch, "context": context, "step_ms": step,
               "floor_ms": floor, "bound": bound, "of_floor": floor / step,
               "stream_gb_per_s": limits.stream / 1e9, "peak_gflop_per_s": limits.peak / 1e9,
               "machine": machine(device), "threads": torch.get_num_threads(),
               **provenance(0, rounds, device, dtype)}


def show(row: dict) -> str:
    return (f"{row['shape']:>6} batch {row['batch']:>3}: {row['step_ms']:7.0f} ms a step, "
            f"floor {row['floor_ms']:7.0f} ms ({row['bound']}), "
            f"floor / step {row['of_floor']:.2f}, higher is better")


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shapes", nargs="+", choices=SHAPES, default=["0.5B", "1.5B"], help="(default: 0.5B 1.5B)")
    add("--batch", nargs="+", type=int, default=[1, 8, 16, 64], help="rows (default: 1 8 16 64)")
    add("--context", type=int, default=300, help="cached tokens of each row (default: %(default)s)")
    add("--rounds", type=int, default=5, help="steps of each kind after a first one (default: %(default)s)")
    add("--device", type=usable_device, default="cpu", help="(default: %(default)s)")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32",
        help="(default: %(default)s)")
    args = parser.parse_args()
    try:
        for name in ("context", "rounds"):
            rstitch.check_count(f"--{name}", getattr(args, name))
        for batch in args.batch:
            rstitch.check_count("--batch", batch)
    except ValueError as error:
        parser.error(str(error))
    dtype = getattr(torch, args.dtype)
    times = products(sorted({*args.batch, 1024}), args.device, dtype, args.rounds)
    for rows, ms in times.items():
        print(f"{rows:>5} rows x {PRODUCT[1]} by {PRODUCT[0]}: "
              + ", ".join(f"{name} {one:.2f} ms" for name, one in ms.items()), flush=True)
    limits = measure_limits(args.device, dtype, times)
    print(f"{machine(args.device)}: stream {limits.stream / 1e9:.1f} GB/s, product "
          f"{limits.peak / 1e9:.0f} GFLOP/s, {torch.get_num_threads()} threads", flush=True)
    for shape in args.shapes:
        for row in rows_of(shape, args.batch, args.context, limits, args.device, args.dtype, args.rounds):
            append_row(FILE, row)
            print(show(row), flush=True)


if __name__ == "__main__":
    start(main)

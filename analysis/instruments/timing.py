"""Clocks, and what keeps comparisons by the clock fair."""
import time
from collections.abc import Callable

import numpy as np
import torch

import rstitch

REFERENCE = (1, 64)  # tokens read and in the cache


def now(device: torch.device | str = "cpu") -> float:
    """Seconds, once the device has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def rotated(items: list, i: int) -> list:
    """The items, beginning with another one for each i: the order in which methods are timed on problem i."""
    return items[i % len(items):] + items[:i % len(items)]


def reference_ms(lm: rstitch.CachedLM) -> float:
    """Milliseconds of a single step of the LLM: taken again and again, it shows how the machine drifts."""
    return float(np.median([sample.ms for sample in rstitch.measure_latency(lm, [REFERENCE], repeats=9)]))


def interleaved(runs: dict[str, Callable[[], object]], rounds: int, device="cpu") -> dict[str, list[float]]:
    """Milliseconds of each in every round but a first one, beginning with another one each time."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + 1):
        for name in rotated(list(runs), i):
            start = now(device)
            runs[name]()
            if i:
                times[name].append(1e3 * (now(device) - start))
    return times

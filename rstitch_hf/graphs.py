"""Steps of a cached model as CUDA graphs."""
import warnings
from collections.abc import Callable

import torch


class Graphs:
    """Steps of one CachedLM as CUDA graphs, each captured when it is first asked for; they share one memory
    pool. A model that cannot be captured runs eagerly, after a warning that says why."""

    def __init__(self, device: torch.device):
        self.captured: dict[tuple, tuple[torch.cuda.CUDAGraph, tuple]] = {}
        self.device, self.pool, self.stream, self.works = device, None, None, True

    def __call__(self, step: Callable[..., tuple], rows: slice, *key) -> tuple:
        """step(rows, *key); the tensors that it returns are overwritten by the next step. rows, the whole
        batch, is no part of the key: before Python 3.12 a slice cannot be one."""
        if self.works and key not in self.captured:
            try:
                self.captured[key] = self.capture(step, rows, *key)
            except RuntimeError as error:
                self.works = False
                warnings.warn(f"no CUDA graphs, every step runs eagerly: {error}", stacklevel=2)
        if not self.works:
            return step(rows, *key)
        graph, out = self.captured[key]
        with torch.cuda.device(self.device):
            graph.replay()
        return out

    def capture(self, step: Callable[..., tuple], rows: slice, *key) -> tuple[torch.cuda.CUDAGraph, tuple]:
        with torch.cuda.device(self.device):  # the model's, which need not be the current one
            # One for all: memory of the pool goes from capture to capture on one stream only.
            self.stream = self.stream or torch.cuda.Stream()
            graph, current, mode = (torch.cuda.CUDAGraph(), torch.cuda.current_stream(),
                                    torch.cuda.get_sync_debug_mode())
            self.stream.wait_stream(current)
            try:
                # Lazy set-up must not be captured; a step that is repeated writes the same again.
                with torch.cuda.stream(self.stream):
                    for strict in (mode, "error"):  # a host sync is told here, where it does no harm
                        torch.cuda.set_sync_debug_mode(strict)
                        step(rows, *key)
            finally:
                torch.cuda.set_sync_debug_mode(mode)
            current.wait_stream(self.stream)
            # Or the graph would keep the address of one that others may free.
            torch._C._cuda_clearCublasWorkspaces()
            try:
                with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                    out = step(rows, *key)
            finally:
                torch.cuda.set_stream(current)  # a capture that fails leaves its own
                torch._C._cuda_clearCublasWorkspaces()
        self.pool = self.pool or graph.pool()
        return graph, out

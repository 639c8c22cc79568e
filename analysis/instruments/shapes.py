"""Models of Qwen2.5's shapes with random weights, and how fast a step of theirs can be on a machine."""
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import linear
from transformers import Qwen2Config, Qwen2ForCausalLM

from analysis.instruments.timing import interleaved

SHAPES = {  # Qwen2.5: hidden, intermediate, layers, heads, key-value heads, vocabulary, tied
    "0.5B": (896, 4864, 24, 14, 2, 151_936, True),
    "1.5B": (1536, 8960, 28, 12, 2, 151_936, True), "7B": (3584, 18_944, 28, 28, 4, 152_064, False),
    "14B": (5120, 13_824, 48, 40, 8, 152_064, False),
    "32B": (5120, 27_648, 64, 40, 8, 152_064, False), "mini-S": (128, 512, 4, 4, 2, 1024, True),
    "mini-L": (256, 1024, 12, 8, 2, 1024, False)}


def config_of(shape: str, longest: int) -> Qwen2Config:
    hidden, inner, layers, heads, shared, vocab, tied = SHAPES[shape]
    return Qwen2Config(hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
                       num_attention_heads=heads, num_key_value_heads=shared, vocab_size=vocab,
                       tie_word_embeddings=tied, max_position_embeddings=longest, bos_token_id=None,
                       eos_token_id=None, pad_token_id=0)


def bytes_of(shape: str, batch: int, context: int, itemsize: int) -> tuple[int, int, int]:
    """(weights, weights that a step reads, caches of `context` tokens a row)."""
    hidden, inner, layers, heads, shared, vocab, tied = SHAPES[shape]
    width = hidden // heads
    block = 2 * hidden * hidden + hidden + 2 * shared * width * (hidden + 1) + 3 * hidden * inner + 2 * hidden
    read = layers * block + hidden + vocab * hidden
    weights = read + (0 if tied else vocab * hidden)
    return itemsize * weights, itemsize * read, itemsize * 2 * layers * shared * width * batch * context


def build(shape: str, longest: int, device: str, dtype: torch.dtype, seed: int = 0) -> Qwen2ForCausalLM:
    """Random weights, made on the device."""
    with torch.device(device):
        torch.manual_seed(seed)
        return Qwen2ForCausalLM._from_config(config_of(shape, longest), dtype=dtype).eval()


def bandwidth(device: str, dtype: torch.dtype, rounds: int = 10) -> float:
    """Bytes per second of a stream that is only read."""
    x = torch.ones((4 << 30 if torch.device(device).type == "cuda" else 1 << 28) // dtype.itemsize,
                   device=device, dtype=dtype)
    return 1e3 * x.nbytes / float(np.median(interleaved({"sum": x.sum}, rounds, device)["sum"]))


PRODUCT = (8960, 1536)  # outputs, inputs: the largest layer of the 1.5B shape


def operations(shape: str, batch: int, context: int) -> int:
    """Multiplications and additions of a step: two per weight and row, four per cached key feature."""
    hidden, _, layers, *_ = SHAPES[shape]
    return batch * (2 * bytes_of(shape, batch, context, 1)[1] + 4 * layers * hidden * context)


def ways(rows: int, device: str, dtype: torch.dtype) -> dict:
    """The ways to compute x W^T for so many rows, of the layer PRODUCT."""
    x = torch.randn(rows, PRODUCT[1], device=device, dtype=dtype)
    w = torch.randn(*PRODUCT, device=device, dtype=dtype)
    return {"x W^T": lambda: linear(x, w), "(W x^T)^T": lambda: (w @ x.T).T.contiguous()}


@torch.inference_mode()
def products(batches: list[int], device: str, dtype: torch.dtype, rounds: int) -> dict[int, dict[str, float]]:
    """Milliseconds by rows and way, medians."""
    return {rows: {name: float(np.median(ms))
                   for name, ms in interleaved(ways(rows, device, dtype), rounds, device).items()}
            for rows in batches}


@dataclass(frozen=True)
class Limits:
    """Bytes per second of a stream that is only read, operations per second of a product."""

    stream: float
    peak: float

    def floor(self, shape: str, batch: int, context: int, itemsize: int) -> tuple[float, str]:
        """(milliseconds, what binds)."""
        _, read, live = bytes_of(shape, batch, context, itemsize)
        bound = {"bytes": (read + live) / self.stream,
                 "operations": operations(shape, batch, context) / self.peak}
        name = max(bound, key=bound.get)
        return 1e3 * bound[name], name


def measure_limits(device: str, dtype: torch.dtype, times: dict[int, dict[str, float]]) -> Limits:
    """The peak is the best rate of any product that was timed, one of 1,024 rows among them."""
    rates = [2e3 * rows * PRODUCT[0] * PRODUCT[1] / min(ms.values()) for rows, ms in times.items()]
    return Limits(bandwidth(device, dtype), max(rates))

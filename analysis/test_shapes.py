"""What models of real shapes read and compute, by hand."""
import pytest
import torch

from analysis.instruments.shapes import Limits, build, measure_limits, operations, ways


def test_operations_are_two_per_weight_and_four_per_key_feature():
    """mini-S by the model's own parameters: 2 rows, 10 cached tokens; norms and biases count as weights."""
    weights = sum(p.numel() for p in build("mini-S", 64, "cpu", torch.float32).parameters())
    assert operations("mini-S", 2, 10) == 2 * (2 * weights + 4 * 4 * 128 * 10)


def test_the_floor_is_the_larger_of_bytes_and_operations():
    """0.5B: 494,032,768 weights of 4 bytes; a token's keys take 24 layers x 2 heads x 64 = 3,072 features."""
    weights = 494_032_768
    assert sum(p.numel() for p in build("0.5B", 64, "meta", torch.float32).parameters()) == weights
    limits = Limits(stream=1e9, peak=1e12)
    ms, bound = limits.floor("0.5B", 1, 300, 4)
    assert (ms, bound) == (pytest.approx(1e3 * (4 * weights + 4 * 2 * 3072 * 300) / 1e9), "bytes")
    ms, bound = Limits(1e12, 1e9).floor("0.5B", 8, 300, 4)
    assert (ms, bound) == (pytest.approx(1e3 * 8 * (2 * weights + 4 * 24 * 896 * 300) / 1e9), "operations")


def test_products_are_the_same_by_either_way():
    one, other = (way() for way in ways(5, "cpu", torch.float32).values())
    torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-4)


def test_the_peak_is_the_best_rate_of_any_product(monkeypatch):
    """8,960 x 1,536 weights, two operations each: 1,000 rows in 10 ms are 2.75e12 a second."""
    monkeypatch.setattr("analysis.instruments.shapes.bandwidth", lambda *args: 7.0)
    limits = measure_limits("cpu", torch.float32, {2: {"a": 5.0, "b": 4.0}, 1000: {"a": 20.0, "b": 10.0}})
    assert limits.stream == 7.0 and limits.peak == pytest.approx(1000 * 2 * 8960 * 1536 / 0.01)

"""Intervals and frontiers."""
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.instruments import stats
from analysis.instruments.stats import auroc, bootstrap, ratio_of_means, wilson


def test_wilson_by_hand():
    # k = 8 of n = 10, z = 1.96: centre (0.8 + z^2/20) / (1 + z^2/10) = 0.7167, half width 0.2268
    assert wilson(8, 10) == (pytest.approx(0.4902, abs=1e-3), pytest.approx(0.9433, abs=1e-3))


def test_auroc_by_hand():
    assert auroc(np.array([1.0, 2.0, 3.0]), np.array([0, 1, 1])) == 1
    assert auroc(np.array([1.0, 2.0, 2.0, 3.0]), np.array([0, 1, 0, 1])) == 0.875  # 3.5 of 4 pairs, one tie
    assert math.isnan(auroc(np.array([1.0]), np.array([1])))


def test_bootstrap_covers_the_truth():
    rng = np.random.default_rng(1)
    covered = 0
    for seed in range(100):
        low, high = bootstrap(np.mean, rng.normal(3.0, 1.0, 60), draws=200, seed=seed)
        covered += low <= 3.0 <= high
    assert 85 <= covered <= 100
    assert ratio_of_means(np.array([1, 3]), np.array([4, 4])) == 0.5


def test_frontier_by_hand():
    # at 0.8 one is slower than a more accurate one, at 0.4 too; (0.7, 25) is on the front, but above the
    # chord, 20 at 0.7
    points = np.array([[0.8, 40.0], [0.9, 30.0], [0.7, 25.0], [0.5, 10.0], [0.4, 12.0]])
    assert [x.tolist() for x in stats.front(points)] == [[0.5, 0.7, 0.9], [10, 25, 30]]
    assert [x.tolist() for x in stats.front(points, mixtures=True)] == [[0.5, 0.9], [10, 30]]
    assert stats.frontier_gap((0.8, 22.0), points) == pytest.approx(0.2)  # 1 - 22 / 27.5
    assert stats.frontier_gap((0.8, 22.0), points, mixtures=True) == pytest.approx(0.12)  # 1 - 22 / 25
    assert stats.frontier_gap((0.95, 30.0), points) == 0
    assert stats.frontier_gap((0.3, 11.0), points) == pytest.approx(-0.1)
    assert stats.frontier_gap((0.3, 2.0), points) == 0  # fast, but less accurate than anything on the front


@given(st.lists(st.tuples(st.integers(0, 1000).map(lambda k: k / 1000), st.floats(1, 100)), min_size=1,
                max_size=12), st.floats(0, 1))
def test_nothing_fixed_beats_the_frontier_and_no_mixture_the_hull(points, w):
    points = np.array(points)
    for a in points:
        assert stats.frontier_gap(tuple(a), points) <= 1e-9
        for b in points:
            assert stats.frontier_gap(tuple(w * a + (1 - w) * b), points, mixtures=True) <= 1e-6
    for mixtures in (False, True):
        x, y = stats.front(points, mixtures)
        assert {*zip(x, y)} <= {*map(tuple, points)} and (np.diff(x) > 0).all() and (np.diff(y) > 0).all()


def test_gap_and_its_interval_know_a_method_that_is_better():
    rng = np.random.default_rng(0)
    n = 400
    right = rng.random((3, n)) < np.array([[0.5], [0.8], [0.95]])
    ms = rng.normal(1, 0.1, (3, n)) * np.array([[10], [30], [60]])
    fixed = np.stack([right, ms], 2)
    faster = np.stack([right[1], 0.8 * ms[1]], 1)[None]
    gap, low, high = stats.gap_with_interval(faster, fixed)
    assert gap == pytest.approx(0.2, abs=0.01) and 0 < low <= gap <= high < 0.35
    same, low, high = stats.gap_with_interval(fixed[1:2], fixed)
    assert same == pytest.approx(0, abs=0.05) and low <= 0 <= high + 1e-9

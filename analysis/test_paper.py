"""Table 1 of the paper, as it is printed, and what follows from it."""
import pytest

from analysis.presentation import figures, paper

CELLS = paper.read_table()


def test_the_printed_table_is_whole():
    assert len(CELLS) == 180 and {c.benchmark for c in CELLS} == set(paper.BENCHMARKS)
    one = next(c for c in CELLS
               if (c.budget, c.llm, c.name, c.benchmark) == ("16k", "14B", "R-Stitch 0.02", "AMC"))
    assert (one.accuracy, one.latency, one.speed_up, one.n) == (66.27, 51.29, 2.86, 83
                                                                )  # 55 of 83; 146.51 / 51.29 = 2.857


def test_sizes_against_the_papers_by_hand():
    words = {
        x: figures.sized((x, x, x), 0.06)
        for x in (0.0, 0.011, 0.0119, 0.0121, 0.047, 0.049, 0.06, 0.074, 0.076, 0.29, 0.31)
    }
    assert words == {
        0.0: "far less", 0.011: "far less", 0.0119: "far less", 0.0121: "less", 0.047: "less",
        0.049: "same size", 0.06: "same size",  # 0.06 / 1.25 = 0.048
        0.074: "same size", 0.076: "more", 0.29: "more", 0.31: "far more"
    }  # 1.25 x 0.06 = 0.075, 5 x 0.06 = 0.3


def test_changes_of_the_printed_table_by_hand():
    # 16k, 14B, tau 0.02 against the LLM:
    # (43.33 - 50 + 66.27 - 86.75 + 31.99 - 39.34 + 87.80 - 88.60 + 54.22 - 60) / 5 = -8.216
    change, ratio = paper.mean_change(CELLS, "16k", "14B", "R-Stitch 0.02")
    assert change == pytest.approx(-8.216)
    assert ratio == pytest.approx(845.05 / 304.38)  # sums of five latencies
    assert paper.kappa(CELLS, "8k",
                       "7B") == pytest.approx(5e-6 * 1e3 * (86.63 + 63.15 + 41.79 + 38.34 + 117.31) / 5)


def test_intervals_of_mean_changes_by_hand():
    # 16k, 14B, tau 0.02: variances in points^2 of ten accuracies, p (100 - p) / n:
    # AIME 83.3 + 81.8, AMC 13.8 + 26.9, Minerva 8.8 + 8.0, MATH 2.0 + 2.1, Olympiad 3.6 + 3.7
    change, low, high = paper.change_interval(CELLS, "16k", "14B", "R-Stitch 0.02")
    assert change == pytest.approx(-8.216)
    assert high - change == pytest.approx(change - low) == pytest.approx(1.96 * 234.1**0.5 / 5, rel=0.01)


def test_misprints_of_the_table_by_hand():
    off = {(c.budget, c.llm, c.name, c.benchmark): ratio for c, ratio in paper.misprinted_speed_ups(CELLS)}
    assert off["16k", "14B", "SpecDec", "Olympiad"] == pytest.approx(316.06 / 360.14)  # printed as 1.05
    assert ("8k", "7B", "R-Stitch 0.02", "AMC") not in off  # 63.15 / 34.89 = 1.81, as printed
    odd = {(c.benchmark, c.accuracy) for c in paper.no_whole_number(CELLS)}
    assert odd == {("MATH", 87.53), ("Olympiad", 50.04), ("AMC", 68.75), ("Olympiad", 61.06),
                   ("Minerva", 44.23)}


def test_mixing_by_hand():
    # a method no better than the SLM needs no LLM at all
    # 16k: SLM mean accuracy 39.292, latency 5.258; R-Stitch 0.03 on 14B has 54.216
    share = (54.216 - 39.292) / (64.938 - 39.292)
    assert paper.mixing_speed_up(CELLS, "16k", "14B", "R-Stitch 0.03") == pytest.approx(
        169.01 / (share * 169.01 + (1 - share) * 5.258), rel=1e-3)
    assert paper.mixing_speed_up(
        CELLS, "8k", "7B",
        "R-Stitch 0.001") == 1.0  # better than the LLM: mixing cannot reach it, all go to the LLM


def test_verdicts_on_the_printed_table_by_hand():
    assert paper.seen([(1, -3, 9), (-8, -14, -2), (-6, -12, 0.3)], ("7B", "14B", "32B")) == (
        "a loss for 14B, 32B at the edge")
    assert paper.seen([(1, -3, 9), (-2, -7, 5)], ("7B", "14B")) == "no loss seen"
    said = {claim: verdict for claim, _, _, verdict in paper.table_claims(CELLS)}
    assert said["loss at tau 0.02, 16k: 7B, 14B, 32B, pp"] == "a loss for 14B, 32B at the edge"
    assert said["faster than mixing, 16k, 14B, tau 0.02"] == "holds"
    assert said["a right answer beats a wrong one (kappa < 1)"] == "on average not for 32B"
    one = next(c for c in CELLS if (c.budget, c.llm, c.name, c.benchmark) == ("16k", "14B", "LLM", "AMC"))
    assert paper.kappa_of(one) == pytest.approx(5e-6 * 146_510)  # 146.51 s in ms
    odd = paper.oddities(CELLS)
    assert "16k 14B SpecDec        Olympiad printed 1.05, ratio of the latencies 0.88 (+20 %)" in odd

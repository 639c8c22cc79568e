"""The figures of a pair's answers, by hand; unfinished files; what is missing."""
import math
import re
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rstitch
from analysis import answers
from analysis.instruments.rows import RESULTS, read_rows
from analysis.instruments.stats import difference, signed, with_interval
from analysis.instruments.task import Task, load_latency
from analysis.pocket.weights import MODELS
from analysis.presentation import real


def row(method: str = "slm", problem: int = 0, correct: bool = True, writer: str = "SSSS", entropy=None,
        sample: int = 0, **more) -> dict:
    """An answer as analysis.answers writes it, in the fields that figures read."""
    return {
        "what": "answer", "method": method, "problem": problem, "sample": sample, "correct": correct,
        "finished": True, "writer": writer, "entropy": entropy or [0.1] * len(writer), "slm": "s", "llm": "l",
        "machine": "m", "rows": 64, "dtype": "float32", "limit": 512, "split": "test", "temperature": 0.0
    } | more


def rights(method: str, right: str, writer: str = "SSSS") -> list[dict]:
    """A method's answers to the problems 0, 1, ...: right (1), wrong (0), not there (-)."""
    return [row(method, i, letter == "1", writer) for i, letter in enumerate(right) if letter != "-"]


def test_figures_of_a_method_by_hand():
    rows = [
        row("tau=0.02", 0, True, "SSLL"),
        row("tau=0.02", 1, False, "SSSSSL", finished=False),
        row("tau=0.02", 2, True, "LL"),
        row("tau=0.02", 3, True, "SSSS")
    ]
    x = real.figures_of(rows)
    assert (x["right"][0], x["cut_off"][0], x["llm_share"][0], x["tokens"][0]) == (0.75, 0.25, 5 / 16, 4.0)
    # Wilson at 3 of 4, z = 1.96: middle (0.75 + 0.4802) / 1.9604 = 0.6275, half 0.3268; at 1 of 4 mirrored
    assert x["right"][1:] == pytest.approx((0.3006, 0.9544), abs=1e-4)
    assert x["cut_off"][1:] == pytest.approx((0.0456, 0.6994), abs=1e-4)
    assert 0 <= x["llm_share"][1] <= 5 / 16 <= x["llm_share"][2] <= 1
    assert 2 <= x["tokens"][1] <= 4 <= x["tokens"][2] <= 6


def test_trained_routers_are_held_against_the_llm_and_policies_against_each_other():
    nets = [row("policy", i, letter == "1", net=net) for net, right in (("a", "110"), ("b", "010"))
            for i, letter in enumerate(right)]
    nets += [one | {"net": "c"} for one in rights("r2r", "111")]
    lines = real.differences_table(real.worlds(rights("llm", "111") + nets)[0]).splitlines()
    points = {line.split("  ")[0]: re.split(r"  +", line)[1].split()[0] for line in lines}
    # of three problems the LLM solves all, a policy two and the other one of these
    assert points["LLM alone - policy by a"] == "+33.3" and points["LLM alone - policy by b"] == "+66.7"
    assert points["policy by a - policy by b"] == "+33.3" and points["LLM alone - r2r by c"] == "+0.0"
    assert not any("r2r" in line and "policy" in line for line in points)


def test_samples_of_a_problem_stay_together():
    """Two problems, all samples of one right and of the other wrong: an interval from 0 to 1, however many
    samples there are."""
    rows = [row(problem=i, correct=not i, sample=k, temperature=0.6) for i in range(2) for k in range(50)]
    assert real.share_of(rows, "correct") == (0.5, 0.0, 1.0)
    assert real.paired(rows, [row("llm", i, True) for i in range(2)])[:4] == (-50.0, -100.0, 0.0, 2)


def test_differences_are_over_the_problems_that_both_answered():
    a, b = rights("llm", "1101-1"), rights("tau=0.02", "-1001")
    assert real.paired(a, b)[0] == pytest.approx(100 / 3)
    assert real.paired(a, b)[3] == 3  # problems 1, 2, 3: 0, 0, 1
    assert real.paired(a, b, first=3) == (100.0, 100.0, 100.0, 1)
    assert real.paired(a, b, first=5) is None and real.paired(a, []) is None
    assert real.paired(b, a)[0] == pytest.approx(-100 / 3)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=12), st.randoms())
def test_a_difference_does_not_depend_on_the_order_of_rows(pairs, random):
    a, b = ([row(problem=i, correct=pair[k]) for i, pair in enumerate(pairs)] for k in (0, 1))
    straight = real.paired(a, b)
    random.shuffle(a)
    assert real.paired(a, b) == straight and straight[1] <= straight[0] <= straight[2]


def test_an_interval_does_not_depend_on_the_order_of_rows():
    """Differences of many sizes, where another order of the same draws would give other ends."""
    a = [row(problem=i, correct=(i * i + k) % 7 < 3, sample=k) for i in range(60) for k in range(i % 9 + 1)]
    b = [row(problem=i, correct=i % 3 == 0) for i in range(60)]
    assert real.paired(a, b) == real.paired(a[::-1], b) == real.paired(a, b[::-1])


def test_a_margin_is_excluded_shown_or_undecided():
    assert [real.loss(x) for x in ((1, -2, 4.9), (7, 5, 9), (4, 1, 7), (2, -1, 5))] == [
        f"a loss of 5 points {state}" for state in ("excluded", "shown", "undecided", "undecided")]
    assert [real.against(x) for x in ((2, 1, 3), (-2, -3, -1), (1, 0, 2))] == ["above", "below", "undecided"]


def test_how_many_problems_would_decide_by_hand():
    # 3 points from the margin and 6 wide on that side at n = 100: half as wide needs four times as many
    assert real.enough((2, -4, 8), 100, 5.0) == 400
    assert real.enough((2, -4, 9), 100) == 900
    assert real.enough((-2, -4, 4), 100) == 900  # the side that faces the reference
    assert real.enough((5, 1, 9), 100, 5.0) is None
    assert real.decided("llm",
                        (2, -4, 8, 100)) == "a loss of 5 points undecided, decided at about 400 problems"
    assert [real.decided("tau=0.02", x) for x in ((2, 1, 3, 9), (-2, -3, -1, 9), (2, -4, 8, 9), None)] == [
        "better", "worse", "undecided, decided at about 81 problems", ""]


def test_random_calls_are_those_of_the_nearest_share():
    writers = {"tau=0.02": "SSSL", "random=0.1": "S" * 9 + "L", "random=0.2": "SSSSL", "random=0.5": "SL"}
    rows = {name: rights(name, "1", writer) for name, writer in writers.items()}
    assert real.resolve(rows, "random") == "random=0.2"  # 25 against 10, 20 and 50 %
    assert real.resolve({"tau=0.02": rows["tau=0.02"]}, "random") is None
    assert real.resolve(rows, "llm") is None
    assert real.difference(rows, "tau=0.02", "random")[3] == 1
    assert real.difference(rows, "llm", "tau=0.02") is None


def test_r2r_and_one_token_entropy_at_equal_share_by_hand():
    """8 problems of 4 tokens. The SLM alone gets 2 right, one-token entropy 6 at 50 %: 4 at 25 %, on the line
    between. R2R gets 5 at 25 %: one of 8 more, 12.5 points. At 75 % no entropy reaches it."""
    rows = [row for name, right, writer in (("slm", "11000000", "SSSS"),
                                            ("tau=0.02,back=1", "11111100", "SSLL"))
            for row in rights(name, right, writer)]
    r2r = [one | {"net": "a1"} for one in rights("r2r=0.5", "11111000", "SSSL")]
    r2r += [one | {"net": "a1"} for one in rights("r2r=0.1", "11111111", "SLLL")]
    found = real.at_equal_share(real.worlds(rows + r2r)[0])
    assert list(found) == ["r2r=0.5 by a1"]
    points, low, high, n, share = found["r2r=0.5 by a1"]
    assert points == pytest.approx(12.5) and low < points < high and (n, share) == (8, 0.25)
    begun = [one | {"net": "a1"} for one in rights("r2r=0.9", "1", "SSSL")]  # leaves the other as it is
    assert real.at_equal_share(real.worlds(rows + r2r + begun)[0])["r2r=0.5 by a1"] == found["r2r=0.5 by a1"]
    other = [one | {"net": "b2"} for one in rights("r2r=0.5", "00000000", "SSSL")]
    assert list(real.at_equal_share(real.worlds(rows + r2r + other)[0])) == ["r2r=0.5 by b2"]  # trained anew
    longer = [one | {"net": "a1"} for one in rights("r2r=0.5", "11111000" + "1" * 5, "SSSL")]
    both = real.at_equal_share(real.worlds(rows + longer)[0])["r2r=0.5 by a1"]
    assert both == found["r2r=0.5 by a1"]  # over the 8 problems that entropy has answered, too
    few = [one for one in rows if one["method"] == "slm" or one["problem"] < 3]  # entropy has but begun
    assert real.at_equal_share(real.worlds(few + r2r)[0]) == {}
    assert real.at_equal_share(real.worlds(rows)[0]) == {} == real.at_equal_share(real.worlds(r2r)[0])
    assert real.at_equal_share(real.worlds(rows + r2r)[0], first=8) == {}
    line = real.equal_share_table(real.worlds(rows + r2r)[0]).splitlines()[1]
    assert re.search(rf"by a1 +25\.0 +\+12\.5 .* 8 +{real.MISSING} +0 +undecided", line)  # none past the 64th


def test_equal_share_is_that_of_each_draw():
    """Whatever the LLM writes is right, and nothing else: entropy lets it write half of the problems, R2R
    half of those. So at R2R's share entropy is as often right in every draw, and the interval is 0 wide.
    With one share for all draws it is not: where R2R calls a little less often it is held against more
    calls."""
    def run(method: str, every: int, **more) -> list[dict]:
        return [row(method, i, i % every == 0, "LLLL" if i % every == 0 else "SSSS", **more)
                for i in range(400)]

    rows = run("slm", 401)[1:] + run("tau=0.02,back=1", 2) + run("r2r=0.5", 4, net="a1")
    x, = real.at_equal_share(real.worlds(rows)[0]).values()
    assert x[:3] == pytest.approx((0, 0, 0), abs=1e-9)
    small, entropy, r2r = (real.outcomes(real.by_problem(rows[k:k + 399]), range(1, 400))
                           for k in (0, 400, 800))
    assert difference([small, r2r], [small, entropy], x[4], 399)[1] < -0.1


def test_speed_by_hand():
    """A token of the SLM takes 1 ms and one of the LLM 10. Of three problems the LLM has answered two, at 40
    ms each, where R-Stitch takes 22."""
    cost = lambda row: sum({"S": 1.0, "L": 10.0}[x] for x in row["writer"])  # noqa: E731
    rows = [*rights("llm", "1-1", "LLLL"), *rights("tau=0.02", "111", "SSLL")]
    x = real.speed(*(real.priced(real.worlds(rows)[0][name], cost) for name in ("tau=0.02", "llm")))
    assert x == pytest.approx((40 / 22, 40 / 22, 40 / 22, 2))
    table = real.speeds_table(real.worlds(rows)[0], cost)
    assert re.search(r"tau 0\.02 +22 +1\.82 x \[1\.82, 1\.82\] +2$", table, re.M)
    assert real.MISSING in real.speeds_table(real.worlds(rows[2:])[0], cost)


def test_time_against_a_mix_by_hand():
    """A token of the SLM takes 1 ms and one of the LLM 10: their answers take 4 and 40 ms, of the same 4
    problems 1 and 3 are right. A mix that is right on 2 takes 22 ms; stitched ones that are take 13."""
    cost = lambda row: sum({"S": 1.0, "L": 10.0}[x] for x in row["writer"])  # noqa: E731
    rows = [*rights("slm", "1000"), *rights("llm", "1110", "LLLL"), *rights("tau=0.02", "1100", "SSSL")]
    methods = real.worlds(rows)[0]
    prices = {name: real.priced(answers, cost) for name, answers in methods.items()}
    x = real.saved(methods, prices, "tau=0.02")
    assert x[0] == pytest.approx(100 * (1 - 13 / 22)) and x[1] <= x[0] <= x[2]
    assert f"{x[0]:+.1f} [" in real.speeds_table(methods, cost)
    # paid for by the problems that all three have answered: the LLM is right on 1 of these, like the others
    rows = [*rights("slm", "1---"), *rights("llm", "1110", "LLLL"), *rights("tau=0.02", "1100", "SSSL")]
    assert real.saved(real.worlds(rows)[0], prices, "tau=0.02")[0] == pytest.approx(100 * (1 - 13 / 4))
    assert real.saved(methods, prices, "slm") is None
    assert real.saved({"llm": methods["llm"], "tau=0.02": methods["tau=0.02"]},
                      {"llm": prices["llm"], "tau=0.02": prices["tau=0.02"]}, "tau=0.02") is None


def test_time_against_a_mix_of_fixed_rules_by_hand():
    """As above, with a rule that is right on 2 of 4 problems in 13 ms and a policy that is in 12; a mix
    without the rule would take 22. Random calls, and rules that have not answered every problem of the
    policy, do not count."""
    cost = lambda row: sum({"S": 1.0, "L": 10.0}[x] for x in row["writer"])  # noqa: E731
    rows = [*rights("slm", "1000"), *rights("llm", "1110", "LLLL"), *rights("tau=0.02", "1100", "SSSL"),
            *rights("tau=0.005", "11--", "SSSS"), *rights("random=0.1", "1100", "SSSS"),
            *(one | {"net": "a1"} for one in rights("policy", "1100", "LSS"))]
    methods = real.worlds(rows)[0]
    assert real.fixed_rules(methods, "policy by a1") == ["slm", "llm", "tau=0.02"]
    prices = {name: real.priced(answers, cost) for name, answers in methods.items()}
    x = real.saved(methods, prices, "policy by a1", real.fixed_rules(methods, "policy by a1"))
    assert x[0] == pytest.approx(100 * (1 - 12 / 13))
    *_, line = (one for one in real.speeds_table(methods, cost, timed=["a1"]).splitlines() if "policy" in one)
    assert f"{100 * (1 - 12 / 22):+.1f} [" in line and f"{x[0]:+.1f} [" in line


def test_policies_stand_beside_r2r_at_equal_share():
    """Each policy, of whatever net; of R2R the net that ran last."""
    nets = [("r2r=0.5", "a"), ("policy", "b"), ("r2r=0.5", "c"), ("policy", "d")]
    rows = [row for name, right, writer in (("slm", "11000000", "SSSS"),
                                            ("tau=0.02,back=1", "11111100", "SSLL"))
            for row in rights(name, right, writer)]
    rows += [one | {"net": net} for name, net in nets for one in rights(name, "11111000", "SSSL")]
    found = real.at_equal_share(real.worlds(rows)[0])
    assert list(found) == ["r2r=0.5 by c", "policy by b", "policy by d"]
    assert all(x[0] == pytest.approx(12.5) for x in found.values())


def test_a_router_that_was_trained_anew_is_another_method():
    rows = [one | {"net": net} for net in ("old", "new") for one in rights("r2r=0.5", "10", "SSSL")]
    assert list(real.worlds(rows)[0]) == ["r2r=0.5 by old", "r2r=0.5 by new"]


def test_what_never_shares_a_table():
    rows = [
        row(),
        row(dtype="bfloat16"),
        row(split="dev"),
        row(temperature=0.6),
        row(limit=400),
        row(instruction="Think."),
        row(slm="other"),
        row(machine="another", correct=False),
        row(problem=1), {"what": "note"}
    ]
    found = real.worlds(rows)
    assert [len(w["slm"]) for w in found] == [2, 1, 1, 1, 1, 1, 1]  # two machines: the first counts
    assert found[0]["slm"][0]["correct"] and found[0]["slm"][1]["problem"] == 1
    assert len(real.world_of(rows)["slm"]) == 2
    assert real.world_of(rows, sampled=True)["slm"][0]["temperature"] == 0.6
    assert real.world_of([row(split="dev")]) == {} == real.world_of([])


def test_what_entropy_tells_of_answers_by_hand():
    rows = [
        row(problem=0, entropy=[0.1, 0.3, 0.2, 0.2]),
        row(problem=1, correct=False, entropy=[0.5] * 4),
        row(problem=2, correct=False, entropy=[0.1, 0.1, 0.1, 0.5]),
        row(problem=3, entropy=[0.0] * 4),
        row("llm", 4, False, "LLLL")
    ]
    rows += [row(problem=0, correct=right, entropy=[H] * 4, sample=k, temperature=0.6)
             for k, (right, H) in enumerate(((True, 0.1), (False, 0.3), (False, 0.05)))]
    found = real.trajectories(rows)
    assert [r["slm"] for r in found] == [1, 0, 0, 1] and [len(r["samples"]) for r in found] == [3, 0, 0, 0]
    assert [np.mean(r["H"]) for r in found] == pytest.approx([0.2, 0.5, 0.2, 0.0])
    # pairs (wrong, right): 0.5 wins twice, 0.2 ties with 0.2 and beats 0
    assert real.entropy_auroc(found)[0] == 3.5 / 4
    assert real.within_problem(found)[0] == 0.5 and real.within_problem(found)[3] == 1
    assert math.isnan(real.within_problem(found[1:])[0]) and real.within_problem(found[1:])[3] == 0
    assert real.share_above(found, 0.2)[0] == 6 / 16  # 0.3, 0.5 four times, 0.5


def test_tokens_above_each_tau_by_hand():
    """ln 151,936 = 11.931: tau 0.02 is 0.2386 nats; of four tokens one lies above."""
    rows = [row(entropy=[0.1, 0.2, 0.238, 0.239])]
    text = real.taus_table(rows)
    assert re.search(r"^0.02 +0\.239 +25\.0 \[", text, re.M)
    assert re.search(r"^0.001 +0\.012 +100\.0 \[", text, re.M)
    assert re.search(r"^0.0084 +0\.100 +75\.0 \[", text, re.M)  # 0.1 nats / 11.931; strictly above
    assert re.search(r"^0.02 +0\.097 ", real.taus_table(rows, vocab=128), re.M)  # 0.02 ln 128


def test_tables_of_an_unfinished_file():
    rows = rights("llm", "1" * 70, "LLLL") + rights("tau=0.02", "1" * 66 + "0", "SSSL") + rights("slm", "10")
    lines = {line.split("  ")[0]: line for line in real.show(rows).splitlines()}
    alone, pair = lines["LLM alone"], lines["LLM alone - R-Stitch, tau 0.02"]
    assert re.search(r"alone +70 +100\.0 \[94\.8, 100\.0\] +100\.0 \[100\.0, 100\.0\] +4 \[4, 4\]", alone)
    assert re.search(r"tau 0.02 +\+1\.5 \[\+0\.0, \+4\.5\] +67 +\+33\.3 \[", pair)  # 1 of 67, 1 of 3
    assert pair.endswith("a loss of 5 points excluded")
    for name in ("random calls, same share", "R-Stitch, tau 0.05", "among samples of one problem"):
        assert real.MISSING in lines[name], name
    assert lines["R-Stitch, tau 0.02 - SLM alone"].count(real.MISSING) == 1  # no SLM answer past the first 64
    assert real.show([]).count(real.MISSING) > 10
    one_sided = real.signal_table(rights("slm", "111"))  # no wrong one to tell
    assert re.search(r"^all greedy answers +not yet measured +3$", one_sided, re.M)


def test_the_command_prints_the_tables_of_what_analysis_answers_writes(tmp_path, monkeypatch, capsys):
    path = tmp_path / "answers.jsonl"
    answers.run(Task(), ["slm", "tau=0.005", "random=0.1"], "test", 3, path)
    path.write_text(path.read_text() + path.read_text()[:50])  # a row that is being written
    other, fit = [path, "--vocab"], [path, "--latency"]
    for argv, code in (([path], 0), ([*other, 128], 0), ([tmp_path / "none"], 2), ([*other, 1], 2),
                       ([*fit, RESULTS / "latency.json", "--ratio", 5], 0), ([*fit, path], 2),
                       ([*fit, RESULTS / "real" / "labels.json"], 2),
                       ([*fit, RESULTS / "real" / "latency.json"], 2),
                       ([RESULTS / "frontier.jsonl"], 2), ([RESULTS / "real" / "clock.jsonl"], 2),
                       ([path, "--ratio", 5], 2), ([*fit, RESULTS / "latency.json", "--ratio", 0], 2)):
        monkeypatch.setattr(sys, "argv", ["real", *map(str, argv)])
        if code:
            with pytest.raises(SystemExit):
                real.main()
        else:
            real.main()
    out, err = capsys.readouterr()
    assert "dtype float32, limit 320, split test, temperature 0.0" in out
    assert out.count("random=0.1") == 5  # in three tables, and two of speeds
    assert "there is no such file" in err and "--vocab=1: expected 2 or more" in err
    assert re.search(r"^0.02 +0\.097", out, re.M) and re.search(r"^0.02 +0\.239", out, re.M)
    rows = [row for row in real.read_rows(path) if row["method"] == "tau=0.005"]
    right, large = 100 * real.share_of(rows, "correct")[0], 100 * real.llm_share(rows)
    assert re.search(rf"R-Stitch, tau 0.005 +3 +{right:.1f} \[.*?\] +{large:.1f} \[", out)
    assert err.count("expected a file of analysis.latency") == 2
    assert "latency.json is of bfloat16: expected that of the answers, float32" in err
    assert err.count("expected numbers above 0") == 2
    assert err.count("expected the rows of analysis.answers (it has other ones only)") == 2
    models = load_latency()
    slower = answers.with_ratio(models, 5)
    assert slower[1].decode(0) == pytest.approx(5 * models[0].decode(0)) and slower[0] is models[0]
    assert slower[1].prefill(9, 4) / models[1].prefill(9, 4) == pytest.approx(slower[1].decode(7)
                                                                             / models[1].decode(7))
    projected = np.mean([answers.milliseconds(row, slower) for row in rows])
    assert re.search(rf"projection, an LLM's step 5 x (.*\n)*R-Stitch, tau 0\.005 +{projected:,.0f} ", out)
    mean = np.mean([rstitch.trajectory_latency(answers.calls_of(row), *models) for row in rows])
    assert re.search(rf"R-Stitch, tau 0\.005 +{mean:,.0f} +{real.MISSING} +0", out)


def test_the_page_shows_the_committed_answers_in_float32():
    """Each line's n, right answers, shares, tokens and speed, beside the LLM's on the same problems; what
    stands below of the policy that labels have taught."""
    rows = read_rows(RESULTS / "real" / "answers_float32.jsonl")
    methods, taught, start = real.world_of(rows), "policy by 19d9469b05a1", "policy by 62572a0b1aa8"
    page = (RESULTS / "real" / "README.md").read_text().split("\n## float32")[1]
    ms = partial(answers.milliseconds, models=load_latency(RESULTS / "real" / "latency_float32.json"),
                 nets_ms=real.nets_ms(rows))
    prices = {method: real.priced(found, ms) for method, found in methods.items()}
    names = {"LLM alone": "llm", "SLM alone": "slm", "R-Stitch, tau 0.02": "tau=0.02",
             "random calls, the same share": "random", "R-Stitch+, learnt from labels": taught,
             "R-Stitch+, from labels, no rewards": start}
    lines = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    shown = {cells[0]: cells for cells in lines if cells[0] in names}
    assert shown.keys() == names.keys()
    for name, n, right, share, tokens, cut, speed in shown.values():
        method = real.resolve(methods, names[name])
        x = real.figures_of(methods[method])
        assert (n, right) == (str(len(prices[method])), real.percent(x["right"])), name
        assert share in (real.percent(x["llm_share"]), f"{100 * x['llm_share'][0]:.3g}"), name
        assert (tokens, cut) == (f"{x['tokens'][0]:.0f}", f"{100 * x['cut_off'][0]:.1f}"), name
        fitted = with_interval(real.speed(prices[method], prices["llm"])[:3], " x", 2)
        assert speed == ("1.00 x" if method == "llm" else fitted), name
    text = " ".join(page.split())
    lost, unseen = (real.difference(methods, "llm", taught, first)[:3] for first in (0, real.SEEN))
    assert f"minus learnt is {signed(lost, unit=' points')}, without the first 64 {signed(unseen)}" in text
    assert f"is {signed(real.difference(methods, taught, start)[:3], unit=' points')} (n = 128)" in text
    mix, of_all = (real.saved(methods, prices, taught, others)
                   for others in (("slm", "llm"), real.fixed_rules(methods, taught)))
    assert "{:.1f} % less time than a mix of both models that is right as often [{:.1f}, {:.1f}]".format(
        *mix) in text
    assert "{:.1f} % less time than a mix as right [{:.1f}, {:.1f}]".format(*of_all) in text
    better, also = (real.difference(methods, taught, "tau=0.02", first)[:3] for first in (0, real.SEEN))
    assert f"minus tau 0.02 is {signed(better, unit=' points')}, without the first 64 {signed(also)}" in text


def test_needs_no_torch_and_no_pictures():
    heavy = "{'torch', 'transformers', 'matplotlib'}"
    code = f"import sys; from analysis.presentation import real; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=MODELS.parent.parent.parent, check=True)

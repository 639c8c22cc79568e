"""The pocket domain: stories, solutions, splits."""
import itertools
import math
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.instruments.problems import verify
from analysis.pocket.domain import (
    CORPORA,
    LIMIT,
    SPLITS,
    Problem,
    carries,
    columns,
    draw,
    problems,
    question,
    sentence,
    solution,
    stream,
)


def test_values_by_hand():
    problem = Problem(596, (("*", 7), ("-", 120)))  # 596 * 7 = 4172, 4172 - 120 = 4052
    assert problem.values == [596, 4172, 4052] and problem.answer == 4052 and problem.key == "596 *7 -120"


def test_columns_by_hand():
    # 596 * 7: 6*7 = 42; 9*7 + 4 = 67; 5*7 + 6 = 41
    assert columns(596, "*", 7) == [(6, 7, 0, 2, 4), (9, 7, 4, 7, 6), (5, 7, 6, 1, 4)]
    # 502 - 87: 2 - 7 borrows and leaves 5; 0 - 8 - 1 borrows and leaves 1; 5 - 0 - 1 = 4
    assert columns(502, "-", 87) == [(2, 7, 0, 5, 1), (0, 8, 1, 1, 1), (5, 0, 1, 4, 0)]
    assert sentence("Then", 502, "-", 87, 415, worked=True) == (
        "Then, 502 - 87: 2-7-0: 5 borrow 1; 0-8-1: 1 borrow 1; 5-0-1: 4 borrow 0; = 415.")
    assert carries(502, "-", 87) == 2 and carries(111, "+", 222) == 0


@given(st.integers(0, 2**32))
def test_problems_stay_in_bounds_and_columns_state_the_result(seed):
    problem = draw(random.Random(seed))
    assert 2 <= len(problem.steps) <= 4 and all(0 <= v <= LIMIT for v in problem.values)
    for a, (op, n), result in zip(problem.values, problem.steps, problem.values[1:]):
        rows = columns(a, op, n)
        *_, (_, _, _, _, last) = rows
        assert (0 if op == "-" else last) * 10 ** len(rows) + sum(row[3] * 10**i
                                                                  for i, row in enumerate(rows)) == result
        assert op != "-" or last == 0


@given(st.integers(0, 2**32), st.sampled_from(sorted(CORPORA)))
def test_solutions_are_right_and_every_statement_in_them_holds(seed, corpus):
    problem = draw(random.Random(seed))
    text = solution(problem, corpus, random.Random(seed))
    assert verify(problem, text) and not verify(Problem(problem.start, problem.steps + (("+", 1),)), text)
    for a, op, b, result in re.findall(r"\w+, (\d+) (.) (\d+)(?::.*?;)? = (\d+)\.", text):
        assert {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[op] == int(result)


def test_corpora_differ_as_documented():
    rng = random.Random(0)
    steps = [(a, op, n) for p in problems("dev", 400, 0) for a, (op, n) in zip(p.values, p.steps)]
    easy = [s for s in steps if carries(*s) == 0]
    assert all(CORPORA["short"](*s) == 0 for s in easy) and len(easy) > 50
    # a result of four digits has three carries at most
    assert max(CORPORA["short"](*s) for s in steps) == pytest.approx(0.09)
    styles = [style for p in problems("dev", 400, 0)
              for style in re.findall(r"\w+, \d+ . \d+(:| =)", solution(p, "long", rng))]
    assert len(styles) == len(steps)
    assert abs(styles.count(":") / len(styles) - 0.8) < 4 * math.sqrt(0.8 * 0.2 / len(steps))


def test_verify_reads_the_last_statement():
    problem = Problem(1, (("+", 11), ("+", 12)))
    assert verify(problem, "The answer is 3. The answer is 24.")
    assert not verify(problem, "The answer is 24. The answer is 3.")
    assert not verify(problem, "24") and not verify(problem, "The answer is 24")


def test_splits_are_disjoint_and_training_uses_its_own():
    keys = {split: {p.key for p in problems(split, 4000 if split == "test" else 500, seed=0)}
            for split in SPLITS}
    assert len(keys["test"]) == 4000
    for one, other in itertools.combinations(keys.values(), 2):
        assert not one & other
    texts = {question(p, s) for p in problems("test", 300, 0) for s in range(3)}
    assert all(q not in texts for q, _ in stream("long", seed=0, chunk=0, size=300))
    with pytest.raises(ValueError, match="split='train'"):
        problems("train", 1, 0)


def test_streams_are_reproducible_and_never_repeat_a_chunk():
    one, again, other = (list(stream("short", 0, chunk, 20)) for chunk in (3, 3, 4))
    assert one == again and not set(one) & set(other)

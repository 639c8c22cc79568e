"""Tests of grading: what a text answers, which answers are equal, and what tables say of those cut off."""
import json
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rstitch
from analysis import collect, compare, demo, frontier
from analysis.instruments import grading, task
from analysis.instruments.grading import box_end, boxed
from analysis.instruments.judges import Case, SameAnswer
from analysis.instruments.problems import Stated, verify
from analysis.instruments.rows import RESULTS, read_rows
from analysis.instruments.task import cut_off
from analysis.pocket.domain import Problem, problems
from analysis.pocket.weights import load_pocket
from analysis.presentation import report


def right(gold: str, answer: str) -> bool:
    """Is the answer, boxed at the end of a text, right?"""
    return verify(Stated("?", gold), f"We add them up, $1 + 2 = 3$, so it is $\\boxed{{{answer}}}$.")


FORMS = [  # a gold answer, the same in other words, and three that are wrong
    # whole numbers
    (r"42", [r"42.0", r"$42$", r"42."], [r"-42", r"43", r"24"]),
    (r"-7", [r"-7.0", r"x = -7"], [r"7", r"-8", r"\frac{-1}{7}"]),
    (r"0", [r"0.0"], [r"1", r"\text{none}", r"\emptyset"]),
    (r"1,234", [r"1234.", r"1{,}234", r"1\,234"], [r"1.234", r"1,235", r"234"]),
    (r"12{,}345{,}678", [r"12,345,678", r"12345678"], [r"12345", r"1234567", r"12,345,687"]),
    (r"10!", [r"3628800"], [r"10", r"9!", r"11!"]),
    (r"\binom{5}{2}", [r"10", r"\frac{5!}{2!3!}"], [r"\frac{5}{2}", r"20", r"\binom{5}{1}"]),
    (r"2^{100}", [r"4^{50}"], [r"200", r"2^{99}", r"100^2"]),
    (r"11", [r"5 + 6 = 11"], [r"5 + 6 = 12", r"56", r"1"]),
    (r"f(2) = 8", [r"8"], [r"f(2) = 9", r"2", r"f(3) = 8"]),
    # decimals
    (r"0.5", [r".5", r"\frac{1}{2}", r"0.50"], [r"5", r"0.05", r"0.51"]),
    (r"3.14", [r"\frac{157}{50}"], [r"\pi", r"3.1", r"3.141"]),
    (r"0.\overline{3}", [r"$0.\overline{3}$"], [r"0.3", r"0.\overline{6}", r"\overline{3}"]),
    (r"0.00000015", [r"1.5 \times 10^{-7}"], [r"0.0000002", r"0.0000015", r"0"]),
    (r"0.001234", [r"0.0012344"], [r"0.001235", r"0.00012344", r"0.01234"]),  # six decimals
    # fractions
    (r"\frac{3}{4}", [r"3/4", r"\dfrac{3}{4}", r"\frac34", r"0.75", r"\frac{6}{8}"],
     [r"\frac{4}{3}", r"3", r"\frac{3}{5}"]),
    (r"-\frac{2}{3}", [r"\frac{-2}{3}", r"-2/3"], [r"\frac{2}{3}", r"-\frac{3}{2}", r"-0.6"]),
    (r"\frac{\pi}{2}", [r"\pi/2", r"\frac12\pi"], [r"\pi", r"\frac{2}{\pi}", r"\frac{1}{2}"]),
    (r"\frac{x+1}{x-1}", [r"\frac{-x-1}{1-x}"], [r"\frac{x-1}{x+1}", r"-1", r"x+1"]),
    (r"2\frac{1}{2}", [r"\frac{5}{2}", r"2.5", r"2 1/2"], [r"\frac{2}{2}", r"1", r"\frac{3}{2}"]),
    (r"1 3/4", [r"1\frac{3}{4}", r"1.75"], [r"13/4", r"\frac{3}{4}", r"1.34"]),
    # constants and roots
    (r"7\pi", [r"\pi \cdot 7", r"7 \pi"], [r"7", r"\pi", r"\frac{7}{\pi}"]),
    (r"4\pi - 3", [r"-3 + 4\pi"], [r"\pi", r"4\pi + 3", r"4\pi"]),
    (r"e^{2}", [r"\exp(2)", r"e^2"], [r"e", r"2e", r"e^{-2}"]),
    (r"\sqrt{2}", [r"2^{1/2}", r"\sqrt2"], [r"2", r"-\sqrt{2}", r"1.41"]),
    (r"3\sqrt{5}", [r"\sqrt{45}"], [r"\sqrt{15}", r"5\sqrt{3}", r"\sqrt{5}"]),
    (r"\frac{\sqrt{3}}{3}", [r"\frac{1}{\sqrt{3}}"],
     [r"\sqrt{3}", r"\frac{\sqrt{3}}{2}", r"\frac{3}{\sqrt{3}}"]),
    (r"\sqrt[3]{4}", [r"4^{1/3}"], [r"\sqrt{4}", r"3\sqrt{4}", r"\sqrt[4]{3}"]),
    (r"2+\sqrt{3}", [r"\sqrt{3}+2"], [r"2-\sqrt{3}", r"2\sqrt{3}", r"\sqrt{5}"]),
    (r"\ln 2", [r"\ln(2)"], [r"\ln 3", r"2", r"\log_{10} 2"]),
    (r"\log_2 5", [r"\log_{2}(5)"], [r"\log_5 2", r"\frac{5}{2}", r"\log_2 10"]),
    (r"\infty", [r"$\infty$"], [r"-\infty", r"0", r"1"]),
    # complex numbers
    (r"3+4i", [r"4i+3"], [r"3-4i", r"4+3i", r"5"]),
    (r"-i", [r"-1 \cdot i"], [r"i", r"-1", r"1"]),
    (r"2e^{i\pi/3}", [r"2e^{\frac{\pi i}{3}}"], [r"e^{i\pi/3}", r"2e^{i\pi/6}", r"2"]),
    # scientific notation
    (r"1.5e-3", [r"0.0015", r"1.5 \times 10^{-3}", r"1.5E-3"], [r"1.5e3", r"1.5", r"1.5e-4"]),
    (r"3 \times 10^{8}", [r"3e8", r"300000000", r"3 \cdot 10^8"], [r"3 \times 10^{7}", r"3^{8}", r"30"]),
    (r"6.02e23", [r"6.02 \times 10^{23}"], [r"6.02", r"6.02e22", r"6.2e23"]),
    (r"-1.6 \times 10^{-19}", [r"-1.6e-19", r"-16 \times 10^{-20}"],
     [r"1.6 \times 10^{-19}", r"-1.7 \times 10^{-19}", r"-1.6 \times 10^{-20}"]),
    # percentages, money, units, angles
    (r"50\%", [r"50%", r"50", r"50 \text{ percent}"], [r"5\%", r"5000\%", r"0.05"]),
    (r"12.5\%", [r"12.5", r"0.125"], [r"12\%", r"1.25", r"12.6\%"]),
    (r"\$18.50", [r"18.50", r"18.5 \text{ dollars}", r"$18.50$"], [r"18", r"1850", r"\$18.05"]),
    (r"$18,000", [r"18000", r"\$18{,}000"], [r"18", r"1800", r"$18,001"]),
    (r"5 \text{ cm}", [r"5", r"5\mathrm{~cm}", r"5 cm"],
     [r"6 \text{ cm}", r"50 \text{ cm}", r"0.5 \text{ cm}"]),
    (r"12\text{ m}^2", [r"12", r"12 \mathrm{m}^2"], [r"144", r"12^2", r"6 \text{ m}^2"]),
    (r"30 miles per hour", [r"30", r"30 \text{ miles per hour}"],
     [r"60 \text{ miles per hour}", r"3", r"300"]),
    (r"18 dollars", [r"18", r"\$18", r"18 \text{ dollars}"], [r"1.8 dollars", r"8", r"180"]),
    (r"45^\circ", [r"45", r"45 \text{ degrees}"], [r"54^\circ", r"135^\circ", r"\frac{\pi}{3}"]),
    # intervals and inequalities
    (r"(0,12.5)", [r"0<x<12.5", r"\left(0, \frac{25}{2}\right)"], [r"[0,12.5]", r"(0,12.5]", r"(0,12)"]),
    (r"0<x<12.5", [r"(0,12.5)", r"12.5>x>0"], [r"0<x<12", r"0\le x<12.5", r"x<12.5"]),
    (r"[-2,3)", [r"\left[-2,3\right)", r"-2\le x<3"], [r"(-2,3)", r"[-2,3]", r"[2,3)"]),
    (r"(-\infty, 3]", [r"x\le3", r"x \in (-\infty,3]"], [r"(-\infty,3)", r"[3,\infty)", r"x\ge3"]),
    (r"(-\infty,-1)\cup(3,\infty)", [r"(3,\infty)\cup(-\infty,-1)"],
     [r"(-1,3)", r"(-\infty,-1]\cup[3,\infty)", r"(-\infty,-1)\cup(1,\infty)"]),
    (r"x\ge 4", [r"4 \le x", r"[4,\infty)", r"x \geq 4"], [r"x>4", r"x\le 4", r"4"]),
    (r"\mathbb{R}", [r"(-\infty,\infty)"], [r"(0,\infty)", r"\emptyset", r"\mathbb{Z}"]),
    # sets, lists, points, vectors, matrices
    (r"\{1,2,3\}", [r"\left\{3,2,1\right\}", r"1, 2, 3"], [r"\{1,2\}", r"\{1,2,4\}", r"6"]),
    (r"1, 2", [r"2,1", r"1 \text{ and } 2", r"x=1 \text{ or } x=2"], [r"1", r"12", r"1, 3"]),
    (r"\pm 3", [r"3, -3", r"-3 \text{ or } 3"], [r"3", r"-3", r"\pm 9"]),
    (r"\emptyset", [r"$\emptyset$", r"\{\}"], [r"0", r"\{0\}", r"\mathbb{R}"]),
    (r"(3,-5)", [r"\left(3, -5\right)"], [r"(-5,3)", r"(3,5)", r"3"]),
    (r"(1,2,3)", [r"\left(1,2,3\right)", r"\langle 1,2,3\rangle"], [r"(1,3,2)", r"(1,2)", r"(1,2,-3)"]),
    (r"(2,1),(3,1)", [r"(3,1),(2,1)"], [r"(1,2),(1,3)", r"(2,1)", r"(2,3),(1,1)"]),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", [r"\begin{bmatrix}1&2\\3&4\end{bmatrix}"],
     [r"\begin{pmatrix}1&3\\2&4\end{pmatrix}", r"\begin{pmatrix}1&2\\3&5\end{pmatrix}", r"-2"]),
    (r"\begin{pmatrix}1\\-2\end{pmatrix}", [r"\begin{bmatrix}1\\-2\end{bmatrix}"],
     [r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}-2\\1\end{pmatrix}",
      r"\begin{pmatrix}1&-2\end{pmatrix}"]),
    # expressions and equations
    (r"x=3", [r"3", r"x = 3.0"], [r"x=4", r"y=3", r"x>3"]),
    (r"x=1, y=2", [r"y=2, x=1", r"(1,2)"], [r"x=2, y=1", r"x=1", r"(2,1)"]),
    (r"y=2x+3", [r"2x+3", r"y=3+2x", r"y-2x=3"], [r"y=2x-3", r"y=3x+2", r"3"]),
    (r"2x+3y=6", [r"3y+2x=6", r"4x+6y=12"], [r"6", r"2x+3y=5", r"3x+2y=6"]),
    (r"x^2+y^2=1", [r"1-x^2-y^2=0"], [r"1", r"x^2-y^2=1", r"x^2+y^2=2"]),
    (r"x^2+2x+1", [r"(x+1)^2"], [r"(x-1)^2", r"x^2+1", r"x=-1"]),
    (r"f(x)=x^2+1", [r"x^2+1"], [r"f(x)=x^2-1", r"x^2", r"f(x)=(x+1)^2"]),
    (r"a_n = 2n+1", [r"2n+1", r"a_{n}=1+2n"], [r"2n-1", r"a_n=n+1", r"3"]),
    (r"5 + 6 = 11", [r"11"], [r"5 + 6 = 12", r"5", r"6"]),
    (r"x+y=5", [r"5"], [r"x+y=6", r"x-y=5", r"x=5"]),
    (r"\frac{1}{2}mv^2", [r"\frac{mv^{2}}{2}"], [r"mv^2", r"\frac{1}{2}mv", r"\frac{1}{2}m^2v"]),
    (r"\sin x", [r"\sin(x)"], [r"\cos x", r"\sin 2x", r"-\sin x"]),
    (r"n(n-1)", [r"n^2-n"], [r"n(n+1)", r"n^2", r"n-1"]),
    (r"3:4", [r"\frac{3}{4}", r"3 : 4"], [r"4:3", r"3:5", r"7"]),
    # words, letters, times, bases
    (r"Tuesday", [r"\text{Tuesday}", r"tuesday", r"\textbf{Tuesday}."],
     [r"Thursday", r"\text{Monday}", r"2"]),
    (r"\text{even}", [r"even", r"\text{Even}"], [r"\text{odd}", r"neve", r"0"]),
    (r"north", [r"\text{north}", r"North"], [r"south", r"thorn", r"\text{northeast}"]),
    (r"\text{no solution}", [r"no solution", r"\text{No solution}"],
     [r"0", r"\text{one solution}", r"\text{solution}"]),
    (r"$\text{circle}$", [r"\text{circle}", r"circle"], [r"\text{ellipse}", r"\text{line}", r"1"]),
    (r"\text{Yes}", [r"Yes", r"\text{yes}"], [r"\text{No}", r"1", r"\text{Maybe}"]),
    (r"B", [r"\text{B}", r"(B)", r"\textbf{(B)}"], [r"A", r"\text{(C)}", r"D"]),
    (r"\text{(C)}", [r"C", r"(C)"], [r"A", r"\text{(D)}", r"3"]),
    (r"10:30 a.m.", [r"10:30\text{ a.m.}", r"10:30 a.m"], [r"10:30 p.m.", r"10:03 a.m.", r"10"]),
    (r"8 a.m.", [r"8 \text{ a.m.}", r"8 A.M."], [r"8 p.m.", r"9 a.m.", r"18"]),
    (r"1010_2", [r"1010_{2}", r"1010"], [r"1010_{3}", r"1011_2", r"0101_2"]),
    (r"\boxed{8}", [r"8", r"8.0"], [r"9", r"-8", r"88"]),
    (r"$\boxed{\frac{1}{2}}$", [r"0.5"], [r"2", r"1", r"-\frac{1}{2}"]),
    (r"$\frac{1}{3}$, $\frac{2}{3}$", [r"\frac{2}{3}, \frac{1}{3}"], [r"\frac{1}{3}", r"\frac{2}{3}", r"1"]),
    (r"$x=2$ and $y=5$", [r"x=2, y=5"], [r"x=5, y=2", r"x=2", r"7"]),
]


@pytest.mark.parametrize("gold, equal, wrong", FORMS, ids=[form[0] for form in FORMS])
def test_a_form_is_right_in_its_own_words_and_no_other_is(gold, equal, wrong):
    inner = boxed(gold) or gold
    assert right(gold, inner)
    for one in equal:
        assert right(gold, one) and right(one, inner), one
    assert len(wrong) == 3
    for one in wrong:
        assert not right(gold, one) and not right(one, inner), one


@pytest.mark.parametrize("gold, text, finished, verdict", [
    (r"3", r"\boxed{3}", True, True),
    (r"3", r"\boxed{3}", False, True),  # the limit came behind the answer
    (r"3", r"so $\boxed{3}$, or rather \boxed{", True, False),  # the last box is not closed
    (r"3", r"so $\boxed{3}$, or rather \boxed{", False, False),
    (r"3", r"so $\boxed{3}$, or rather \boxed{\frac{3}{1}", False, False),
    (r"3", r"so $\boxed{3}$, or rather \boxed", False, False),
    (r"30", r"I must still add the remaining 30 to get", False, False),
    (r"30", r"The answer is 30", False, False),
    (r"30", r"The answer is 30.", True, True),
    (r"30", r"It is $30$ in all.", True, True),
    (r"5", r"\boxed{3}. No, that was wrong. It is \boxed{5}.", True, True),
    (r"3", r"\boxed{3}. No, that was wrong. It is \boxed{5}.", True, False),
    (r"3", r"\boxed{3}. No, it is \boxed{\text{none}}", True, False),
    (r"3", r"It is 3, thus \boxed{}", True, False),
    (r"1, 2", r"$x = \boxed{1}$ or $x = \boxed{2}$", True, True),
    (r"2", r"$x = \boxed{1}$ or $x = \boxed{2}$", True, False),
    (r"1, 234", r"\boxed{1}, \boxed{234}", True, True),
    (r"1234", r"\boxed{1}, \boxed{234}", True, False),
    (r"\{1, 2\}", r"\boxed{\{1, 2\}}", False, True),
    (r"1", r"\boxed{\{1, 2}", False, False),  # an escaped brace is a character: this box is closed, and wrong
    (r"4", r"\fbox{4}", False, True),
    (r"The answer is $4$.", r"\boxed{4}", True, True),
    (r"The answer is 4", r"so 4", True, True),
    (r"It is $4$ in all.", r"\boxed{4}", True, True),
    (r"2 apples and 3 pears", r"\boxed{3}", True, False),
    (r"First $3$, so $\boxed{0.\overline{3}}$.", r"\boxed{0.\overline{3}}", True, True),
    (r"4", r"", True, False),
    (r"4", r"I give up", True, False),
    (r"\text{even}", r"It is even.", True, False),  # words count in a box only
    (r"9^{9^{9}}", r"\boxed{9^{9^9}}", True, True),
])
def test_the_last_closed_box_is_the_answer(gold, text, finished, verdict):
    assert verify(Stated("?", gold), text, finished) == verdict


def test_the_pocket_domain_wants_its_whole_sentence_cut_off_or_not():
    problem = Problem(1, (("+", 11), ("+", 12)))  # 24
    for finished in (True, False):
        assert verify(problem, "The answer is 24.", finished)
        assert not verify(problem, "The answer is 24", finished)


@given(st.text(alphabet="ab{}\\", max_size=12), st.text(alphabet="ab \\{", max_size=6))
def test_a_box_ends_where_its_braces_close(content, behind):
    """Against a count from the left, character by character."""
    depth, i, end = 1, 0, None
    while i < len(content):
        depth += {"{": 1, "}": -1}.get(content[i], 0)
        if not depth:
            end = i
            break
        i += 2 if content[i] == "\\" else 1
    assert box_end("x" + content, 1) == (None if end is None else 1 + end)
    if end is not None:
        assert boxed("\\boxed{" + content[:end + 1] + behind) == content[:end].strip()


ANSWERS = [answer for gold, equal, wrong in FORMS for answer in (gold, *equal, *wrong)]


@given(st.sampled_from(ANSWERS), st.sampled_from(ANSWERS))
@settings(max_examples=60, deadline=None)
def test_order_never_matters(a, b):
    def judge(own: str, branch: str) -> bool | None:
        return SameAnswer()([Case("?", "", f"\\boxed{{{own}}}", f"\\boxed{{{branch}}}")])[0]

    assert judge(a, b) == judge(b, a) is not None
    assert judge(a, a) is True and right(boxed(a) or a, a)


def test_same_answer_needs_two_answers():
    verdicts = {(r"it is $0<x<12.5$", r"it is $(0,12.5)$"): True, (r"\boxed{7\pi}", r"\boxed{7}"): False,
                (r"it is $(0,12.5)$", r"it is $0<x<12.5$"): True, (r"\boxed{7}", r"\boxed{7\pi}"): False,
                (r"\boxed{4}, so \boxed{", r"\boxed{4}"): None, (r"\boxed{}", r"\boxed{4}"): None,
                (r"\boxed{4}", r"\boxed{4}, so \boxed{"): None, (r"\boxed{4}", "I give up"): None}
    assert SameAnswer()([Case("?", "", *pair) for pair in verdicts]) == list(verdicts.values())


GRADED = [(r"\frac{\pi}{2}", r"\pi/2", True), (r"7\pi", "7", False), ("(0,12.5)", "0<x<12.5", True),
          ("x^2-1", "(x+1)(x-1)", True)]


def test_grading_works_in_threads_and_in_processes():
    """math-verify's time limits are signals, which raise outside of the main thread."""
    expected, found = [verdict for *_, verdict in GRADED], []
    thread = threading.Thread(target=lambda: found.extend(right(gold, answer) for gold, answer, _ in GRADED))
    thread.start()
    thread.join()
    assert found == expected
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        asked = [(Stated("?", gold), f"\\boxed{{{answer}}}") for gold, answer, _ in GRADED]
        assert list(pool.map(verify, *zip(*asked))) == expected


def test_an_answer_without_end_is_wrong_in_time(monkeypatch):
    assert grading.limit() == 5
    monkeypatch.setattr(grading, "limit", lambda: 1)
    assert not right("5", "9^{9^{9^9}}")


def test_collected_answers_are_graded_by_what_was_finished():
    row = {"question": "?", "answer": 30, "domain": "file"}
    assert collect.grade("It is 30", row, True) and not collect.grade("It is 30", row, False)
    assert collect.grade("The answer is 30.", row | {"domain": "pocket"}, False)


def test_who_answers_says_what_was_finished(monkeypatch):
    """40 tokens are enough for some answers of the SLM, and for none of speculative decoding, the LLM's."""
    asked = []
    monkeypatch.setattr(task, "verify", lambda _, *given: asked.append(given) or given[1])
    solved = task.solve(load_pocket(), problems("dev", 12, 0), rstitch.SLMOnly(), max_new_tokens=40)
    assert asked == [(s["text"], s["finished"]) for s in solved]
    assert {s["finished"] for s in solved} == {True, False}
    assert all(s["correct"] == s["finished"] == (s["tokens"] < 40) for s in solved)
    asked.clear()
    row = compare.assisted_row(task.Task(max_new_tokens=40), 2)
    assert [finished for _, finished in asked] == [False, False] and row["finished"] == row["accuracy"] == 0


# ---- tables ----------------------------------------------------------------------------------------------


def columns_of(table: str, head: str, rows: int) -> dict[str, str]:
    """What stands under a right-aligned head, by the first 20 characters of a line."""
    lines = table.split("\n")
    first = next(i for i, line in enumerate(lines) if head in line)
    end = lines[first].index(head) + len(head)
    return {line[:20].strip(): line[:end].split()[-1] for line in lines[first + 1:first + 1 + rows]}


def test_tables_show_what_the_limit_cut_off(capsys):
    """A column beside the right answers; "-" where a row does not say."""
    assert [cut_off(r) for r in ({"finished": 0.985}, {"finished": 1.0}, {})] == ["1.5", "0.0", "-"]
    rows = json.loads((RESULTS / "table.json").read_text())
    rows[0] |= {"finished": 0.25}
    del rows[1]["finished"]
    shown = columns_of(demo.show(rows), "cut off, %", 3)
    assert shown == {"": "answers", "SLM alone": "75.0", "LLM alone": "-"}

    rows = [r for r in read_rows(RESULTS / "frontier.jsonl") if r["kind"] == "fixed"][:3]
    rows[0] |= {"finished": 0.25, "accuracy": 1.0}
    assert list(columns_of(frontier.show(rows), "cut off, %", 1).values()) == ["75.0"]

    rows = read_rows(RESULTS / "pair.jsonl")
    for r in rows:
        r |= {"finished": 0.25} if r.get("method") == "SLM" else {}
    report.show(rows)
    assert columns_of(capsys.readouterr().out, "cut off, %", 1) == {"SLM": "75.0"}

    rows = read_rows(RESULTS / "compare.jsonl")
    keep = {("test", "SLM alone"), ("test", "LLM alone"), ("router times", None), ("calibration", "R-Stitch")}
    rows = [r for r in rows if (r["kind"], r["family"]) in keep or r["kind"] in ("live labels", "chosen")]
    for r in rows:
        r |= {"finished": 0.25} if r["family"] in ("LLM alone", "live labels", "R-Stitch") else {}
    text = compare.show(rows, (1, 1), lambda threshold: 0.0)
    assert columns_of(text, "cut off, %", 1) == {"LLM alone": "75.0"}
    once = {kind: sum(r["kind"] == kind for r in rows) for kind in ("live labels", "chosen")}
    assert all(once.values()) and text.count(" % right, 75.0 % cut off") == sum(once.values())

"""The pocket domain: short stories about a count that changes, with solutions that are right by construction.

A problem is a starting count and two to four operations (add or subtract up to 999, multiply by one digit, never above 9,999
or below zero). Its text is one sentence per operation, each opened by its own connective; in 40 % of problems one more sentence,
without a connective, tells about somebody else.

    Ann has 596 coins. First Ann ends up with 7 times as many. Ben has 33 coins. Finally Ann loses 120. How many coins does ...

A solution has one sentence per operation, with the connective of the story, and states every result. A result is either written
at once

    First, 596 * 7 = 4172.

or worked out digit by digit first, from the units up, each column as `a*b+carry: digit carry`:

    First, 596 * 7: 6*7+0: 2 carry 4; 9*7+4: 7 carry 6; 5*7+6: 1 carry 4; = 4172.

The token after the second operand (" =" or ":") decides which, once the operation stands there to be judged. What a model learns
to do depends on its corpus (`CORPORA`): the short corpus works a step out with probability 0.03 per carry, as people do who
take their time only where it is hard; the long corpus works out 80 % of all steps, whatever they are.

Splits are by hash of the canonical problem (operations and operands, not names or wording), so no two splits share one.
"""
import hashlib
import random
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

SPLITS = {"pair-train": 70, "router-train": 85, "dev": 90, "calibration": 95, "test": 100}  # upper ends, in % of hash space
NAMES = ["Ann", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gina", "Hugo", "Iris", "Jon", "Kira", "Leo"]
THINGS = ["apples", "beads", "books", "cards", "coins", "eggs", "nails", "pens", "seeds", "shells", "stamps", "stones"]
CONNECTIVES = {2: ["First", "Finally"], 3: ["First", "Then", "Finally"], 4: ["First", "Then", "Next", "Finally"]}
GAIN, LOSE = ["buys", "finds", "wins"], ["loses", "sells", "uses"]
LIMIT = 9_999


@dataclass(frozen=True)
class Problem:
    """`start` and the operations applied to it in turn, each ("+", "-" or "*", operand)."""

    start: int
    steps: tuple[tuple[str, int], ...]

    @property
    def key(self) -> str:
        """Canonical form, which decides the split: "596 *7 +120"."""
        return " ".join([str(self.start)] + [f"{op}{n}" for op, n in self.steps])

    @property
    def split(self) -> str:
        percent = int(hashlib.sha256(self.key.encode()).hexdigest()[:8], 16) % 100
        return next(name for name, end in SPLITS.items() if percent < end)

    @cached_property
    def values(self) -> list[int]:
        """The count after 0, 1, ... operations."""
        values = [self.start]
        for op, n in self.steps:
            values.append({"+": values[-1] + n, "-": values[-1] - n, "*": values[-1] * n}[op])
        return values

    @property
    def answer(self) -> int:
        return self.values[-1]


@dataclass(frozen=True)
class Stated:
    """A problem of a user's file, in its own words; answers are graded by math-verify."""

    question: str
    answer: str


def draw(rng: random.Random) -> Problem:
    """One problem; the operation is uniform among those that keep the count within 0 ... 9,999."""
    value = start = rng.randint(10, 999)
    steps = []
    for _ in range(rng.randint(2, 4)):
        allowed = ["+"] * (value + 999 <= LIMIT) + ["-"] * (value >= 10) + ["*"] * (2 <= value <= LIMIT // 2)
        op = rng.choice(allowed)
        n = {"+": lambda: rng.randint(10, 999), "-": lambda: rng.randint(10, min(999, value)),
             "*": lambda: rng.randint(2, min(9, LIMIT // value))}[op]()
        steps.append((op, n))
        value = {"+": value + n, "-": value - n, "*": value * n}[op]
    return Problem(start, tuple(steps))


def problems(split: str, n: int, seed: int) -> list[Problem]:
    """The first n distinct problems of a split in the stream of this seed."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: expected one of {', '.join(SPLITS)}")
    rng, found = random.Random(f"{split} {seed}"), {}
    while len(found) < n:
        problem = draw(rng)
        if problem.split == split:
            found.setdefault(problem.key, problem)
    return list(found.values())


def question(problem: Problem | Stated, seed: int = 0) -> str:
    """The story. Wording depends on (problem, seed) alone, so a problem reads the same wherever it is used."""
    if isinstance(problem, Stated):
        return problem.question
    rng = random.Random(f"{problem.key} {seed}")
    who, other = rng.sample(NAMES, 2)
    thing = rng.choice(THINGS)
    story = [f"{who} has {problem.start} {thing}."]
    for opening, (op, n) in zip(CONNECTIVES[len(problem.steps)], problem.steps):
        event = {"+": f"{rng.choice(GAIN)} {n} more.", "-": f"{rng.choice(LOSE)} {n}.", "*": f"ends up with {n} times as many."}[op]
        story.append(f"{opening} {who} {event}")
    if rng.random() < 0.4:
        aside = rng.choice([f"{other} has {rng.randint(10, 999)} {thing}.",
                            f"{other} {rng.choice(GAIN)} {rng.randint(10, 999)} more.",
                            f"{other} {rng.choice(LOSE)} {rng.randint(10, 999)}."])
        story.insert(rng.randint(1, len(story)), aside)
    return " ".join(story + [f"How many {thing} does {who} have?"])


def columns(a: int, op: str, b: int) -> list[tuple[int, int, int, int, int]]:
    """Schoolbook columns from the units up: (digit of a, digit of b or the factor, carry in, digit out, carry out)."""
    rows, carry = [], 0
    digits_a, digits_b = str(a)[::-1], str(b)[::-1]
    width = len(digits_a) if op == "*" else max(len(digits_a), len(digits_b))
    for i in range(width):
        x = int(digits_a[i]) if i < len(digits_a) else 0
        y = b if op == "*" else int(digits_b[i]) if i < len(digits_b) else 0
        total = {"+": x + y + carry, "-": x - y - carry, "*": x * y + carry}[op]
        digit, out = total % 10, abs(total // 10)  # a borrow is total // 10 == -1
        rows.append((x, y, carry, digit, out))
        carry = out
    return rows


def carries(a: int, op: str, b: int) -> int:
    """How many columns carry or borrow: the difficulty of a step when its result is written at once."""
    return sum(out > 0 for *_, out in columns(a, op, b))


def sentence(opening: str, a: int, op: str, b: int, result: int, worked: bool) -> str:
    """One step of a solution, in the short or the worked-out style."""
    if not worked:
        return f"{opening}, {a} {op} {b} = {result}."
    word, sign = ("borrow", "-") if op == "-" else ("carry", "+")
    work = " ".join(f"{x}{op}{y}{sign}{c}: {digit} {word} {out};" for x, y, c, digit, out in columns(a, op, b))
    return f"{opening}, {a} {op} {b}: {work} = {result}."


CORPORA = {  # probability that a step is worked out
    "short": lambda a, op, b: 0.03 * carries(a, op, b),
    "long": lambda a, op, b: 0.8,
}


def solution(problem: Problem, corpus: str, rng: random.Random) -> str:
    """A right solution in the style of a corpus."""
    sentences = [sentence(opening, a, op, n, result, worked=rng.random() < CORPORA[corpus](a, op, n)) for opening, a, (op, n), result
                 in zip(CONNECTIVES[len(problem.steps)], problem.values, problem.steps, problem.values[1:])]
    return " ".join(sentences + [f"The answer is {problem.answer}."])


def verify_number(answer: int, text: str) -> bool:
    """Right if the last "The answer is N." states the answer."""
    stated = re.findall(r"The answer is (\d+)\.", text)
    return bool(stated) and int(stated[-1]) == answer


# ---- answers of a user's problems, by math-verify --------------------------------------------------------

BOX = re.compile(r"\\(?:boxed|fbox)\s*(?:\{|\Z)")
LISTED = re.compile(  # what stands between two boxes of one answer
    r"[\s$()\\]*(?:[,;]|,?\s*(?:and|or)\b)[\s$()\\]*(?:[A-Za-z]\w*\s*=\s*)?")
PROSE = re.compile(r"[^$\d]*\$[^$]+\$[^$\d]*|.*(?:\banswer\b|####).*", re.DOTALL | re.IGNORECASE)
LITERAL = re.compile(  # words; a number with its base, 1010_2; a time, 8 a.m.
    r"(?=.*[A-Za-z]{4})[A-Za-z .'-]+|-?\w+_\w+|\d[\d:]* ?[ap]\.?m", re.IGNORECASE)
REWRITES = [(re.compile(pattern), new) for pattern, new in (  # forms that math-verify misreads without a word
    (r"(?<![^\s(,=$-])(\d+(?:\.\d+)?)[eE]([+-]?\d+)(?![^\s),$\\%])",  # 1.5e-3: 1.5 times e, less 3
     r"\1 \\times 10^{\2}"),
    (r"(?<=\d)\\[,;:!](?=\d{3})", ""),  # 1\,234: 235
    (r"(?<![\w.])(\d+) (\d+)/(\d+)(?!\w)", r"\1\\frac{\2}{\3}"),  # 2 1/2: 3/2
    (r"\\langle", "("), (r"\\rangle", ")"),  # \langle 1,2\rangle: 1.2
    (r"(?<=\d) +(?!percent|pct|hundred|thousand|[mbtr]+illion|dozen|and|or)[A-Za-z]{3,}(?: [A-Za-z]+)*\Z",
     ""),  # 18 dollars: 18 times d times o ...
    (r"[\s.]+\Z", ""))]  # 5.: no number


class Answer(NamedTuple):
    """A final answer as a string (see `plain`), and as math-verify reads it: a sympy object, or None."""

    plain: str
    value: object


def box_end(text: str, start: int) -> int | None:
    """Index of the brace that closes a box whose contents begin at `start`; an escaped one is a character."""
    depth = 1
    for brace in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if not depth:
            return brace.start()
    return None


def boxed(text: str) -> str | None:
    """What the last box of a text holds, and the boxes that it is listed with (\\boxed{1} and \\boxed{2}),
    separated by commas; "" where it is not closed, None where there is none."""
    opened, contents, behind = list(BOX.finditer(text)), [], len(text)
    for box in reversed(opened):
        end = box_end(text, box.end())
        if contents and (end is None or not LISTED.fullmatch(text, end + 1, behind)):
            break
        contents.insert(0, "" if end is None else text[box.end():end].strip())
        behind = box.start()
    return ", ".join(contents) if opened else None


def plain(text: str) -> str:
    """A LaTeX text without what changes its looks only: wrappers of words, dollars, spaces around signs."""
    text = re.sub(r"\\(?:text|math|mbox)(?:bf|it|rm|normal)?\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\?\$|\\[,;:! ]|\\(?:left|right)(?![A-Za-z])|~", " ", text)
    text = re.sub(r"_\{(\w+)\}", r"_\1", text)
    return re.sub(r"(?<!\w) | (?!\w)", "", " ".join(text.split())).rstrip(".")


def limit() -> int | None:
    """Seconds that math-verify may take; no limit outside of the main thread, since it works by signals."""
    return 5 if threading.current_thread() is threading.main_thread() else None


def read_answer(text: str) -> Answer:
    """By math-verify, whatever it finds last in the text."""
    from math_verify import parse
    found = parse(text, parsing_timeout=limit())
    value = next((one for one in found if not isinstance(one, str)), None)
    return Answer(plain(next((one for one in found if isinstance(one, str)), "")), value)


def read_boxed(content: str) -> Answer:
    for pattern, new in REWRITES:
        content = pattern.sub(new, content)
    return Answer(plain(content), read_answer(f"\\boxed{{{content}}}").value)


def final_answer(text: str, finished: bool = True) -> Answer | None:
    """What a text answers: its last box; without any, what math-verify finds in it, but not in a text that
    the token limit cut off (`finished` False). None where it has no answer or its last box is not closed."""
    content = boxed(text)
    if content is not None:
        return read_boxed(content) if content else None
    answer = read_answer(text) if finished else None
    return answer if answer and (answer.plain or answer.value is not None) else None


@lru_cache(maxsize=4096)
def readings(gold: str) -> tuple[Answer, ...]:
    """A gold answer as what a box would hold; a sentence ("It is $5$.", "The answer is 5") as a text, too."""
    if boxed(gold) is not None:
        ways = [final_answer(gold)]
    else:
        ways = [read_boxed(gold), final_answer(gold) if PROSE.fullmatch(gold) else None]
    return tuple(way for way in ways if way)


def beside(value, other):
    """A value; for an equation without unknowns (5 + 6 = 11, f(2) = 8), of which math-verify takes any two for
    equal, its outer sides, and beside what is no equation its last side."""
    from math_verify.grader import is_equation, take_first_relation, take_last_relation
    from sympy import Tuple
    if not is_equation(value) or value.free_symbols:
        return value
    first, last = take_first_relation(value).lhs, take_last_relation(value).rhs
    return Tuple(first, last) if is_equation(other) else last


def as_near(x, y) -> bool:
    """Do numbers below 0.001 agree in four digits? (math-verify compares six decimals.) True for all else."""
    try:
        x, y = complex(x), complex(y)
    except (TypeError, ValueError, OverflowError):  # no numbers, or large ones
        return True
    return max(abs(x), abs(y)) >= 1e-3 or abs(x - y) <= 1e-4 * max(abs(x), abs(y))


def equal(x, y) -> bool:
    """By math-verify, which reads one as the gold and the other as an attempt: it has to find so both ways."""
    from math_verify import verify
    options = dict(allow_set_relation_comp=True, timeout_seconds=limit())
    return verify(x, y, **options) and verify(y, x, **options) and as_near(x, y)


def same(a: Answer, b: Answer) -> bool:
    """Are two answers equal, whichever comes first? Units are passed over, and 50 % is 50 and 0.5. Words,
    numbers with a base, times and what math-verify cannot read are compared as strings, in either case."""
    from math_verify.grader import get_pct_val
    literal = LITERAL.fullmatch(a.plain) and LITERAL.fullmatch(b.plain)
    if a.plain and (a.plain == b.plain or literal and a.plain.lower() == b.plain.lower()):
        return True
    if literal or a.value is None or b.value is None:
        return False
    x, y = beside(a.value, b.value), beside(b.value, a.value)
    percent, number = (x, y) if get_pct_val(x) is not None else (y, x)
    bare = get_pct_val(percent) if get_pct_val(number) is None else None
    return equal(x, y) or bare is not None and equal(bare, number)


def verify(problem: Problem | Stated, text: str, finished: bool = True) -> bool:
    """Is the final answer of the text right? `finished` False: the token limit cut the text off; then, with a
    user's problem, only a closed box counts."""
    if isinstance(problem, Stated):
        answer = final_answer(text, finished)
        return answer is not None and any(same(gold, answer) for gold in readings(problem.answer))
    return verify_number(problem.answer, text)


def stream(corpus: str, seed: int, chunk: int, size: int) -> Iterator[tuple[str, str]]:
    """(question, solution) pairs of the pair-train split; chunk k of a seed is always the same."""
    rng = random.Random(f"{corpus} {seed} {chunk}")
    while size:
        problem = draw(rng)
        if problem.split == "pair-train":
            yield question(problem, rng.randrange(2**31)), solution(problem, corpus, rng)
            size -= 1

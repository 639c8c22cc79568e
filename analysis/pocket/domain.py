"""The pocket domain: short stories about a count that changes, with solutions that are right by construction.

A problem is a starting count and two to four operations (add or subtract up to 999, multiply by one digit,
never above 9,999 or below zero). Its text is one sentence per operation, each opened by its own connective;
in 40 % of problems one more sentence, without a connective, tells about somebody else.

    Ann has 596 coins. First Ann ends up with 7 times as many. Ben has 33 coins. Finally Ann loses 120. How
    many coins does ...

A solution has one sentence per operation, with the connective of the story, and states every result. A result
is either written at once

    First, 596 * 7 = 4172.

or worked out digit by digit first, from the units up, each column as `a*b+carry: digit carry`:

    First, 596 * 7: 6*7+0: 2 carry 4; 9*7+4: 7 carry 6; 5*7+6: 1 carry 4; = 4172.

The token after the second operand (" =" or ":") decides which, once the operation stands there to be judged.
What a model learns to do depends on its corpus (`CORPORA`): the short corpus works a step out with
probability 0.03 per carry, as people do who take their time only where it is hard; the long corpus works out
80 % of all steps, whatever they are.

Splits are by hash of the canonical problem (operations and operands, not names or wording), so no two splits
share one.
"""
import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

# upper ends, in % of hash space
SPLITS = {"pair-train": 70, "router-train": 85, "dev": 90, "calibration": 95, "test": 100}
NAMES = ["Ann", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gina", "Hugo", "Iris", "Jon", "Kira", "Leo"]
THINGS = ["apples", "beads", "books", "cards", "coins", "eggs", "nails", "pens", "seeds", "shells", "stamps",
          "stones"]
CONNECTIVES = {2: ["First", "Finally"], 3: ["First", "Then", "Finally"],
               4: ["First", "Then", "Next", "Finally"]}
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


def question(problem: Problem, seed: int = 0) -> str:
    """The story. Wording depends on (problem, seed) alone, so a problem reads the same wherever it is
    used."""
    rng = random.Random(f"{problem.key} {seed}")
    who, other = rng.sample(NAMES, 2)
    thing = rng.choice(THINGS)
    story = [f"{who} has {problem.start} {thing}."]
    for opening, (op, n) in zip(CONNECTIVES[len(problem.steps)], problem.steps):
        event = {"+": f"{rng.choice(GAIN)} {n} more.", "-": f"{rng.choice(LOSE)} {n}.",
                 "*": f"ends up with {n} times as many."}[op]
        story.append(f"{opening} {who} {event}")
    if rng.random() < 0.4:
        aside = rng.choice([f"{other} has {rng.randint(10, 999)} {thing}.",
                            f"{other} {rng.choice(GAIN)} {rng.randint(10, 999)} more.",
                            f"{other} {rng.choice(LOSE)} {rng.randint(10, 999)}."])
        story.insert(rng.randint(1, len(story)), aside)
    return " ".join(story + [f"How many {thing} does {who} have?"])


def columns(a: int, op: str, b: int) -> list[tuple[int, int, int, int, int]]:
    """Schoolbook columns from the units up: (digit of a, digit of b or the factor, carry in, digit out, carry
    out)."""
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
    work = " ".join(f"{x}{op}{y}{sign}{c}: {digit} {word} {out};"
                    for x, y, c, digit, out in columns(a, op, b))
    return f"{opening}, {a} {op} {b}: {work} = {result}."


CORPORA = {  # probability that a step is worked out
    "short": lambda a, op, b: 0.03 * carries(a, op, b),
    "long": lambda a, op, b: 0.8,
}


def solution(problem: Problem, corpus: str, rng: random.Random) -> str:
    """A right solution in the style of a corpus."""
    sentences = [sentence(opening, a, op, n, result, worked=rng.random() < CORPORA[corpus](a, op, n))
                 for opening, a, (op, n), result
                 in zip(CONNECTIVES[len(problem.steps)], problem.values, problem.steps, problem.values[1:])]
    return " ".join(sentences + [f"The answer is {problem.answer}."])


def verify_number(answer: int, text: str) -> bool:
    """Right if the last "The answer is N." states the answer."""
    stated = re.findall(r"The answer is (\d+)\.", text)
    return bool(stated) and int(stated[-1]) == answer


# ---- answers of a user's problems, by math-verify --------------------------------------------------------


def stream(corpus: str, seed: int, chunk: int, size: int) -> Iterator[tuple[str, str]]:
    """(question, solution) pairs of the pair-train split; chunk k of a seed is always the same."""
    rng = random.Random(f"{corpus} {seed} {chunk}")
    while size:
        problem = draw(rng)
        if problem.split == "pair-train":
            yield question(problem, rng.randrange(2**31)), solution(problem, corpus, rng)
            size -= 1

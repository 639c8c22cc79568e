"""Final answers of any domain: where a text states one, and whether two are equal, by math-verify."""
import re
import threading
from functools import lru_cache
from typing import NamedTuple

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
    """A value; for an equation without unknowns (5 + 6 = 11, f(2) = 8), of which math-verify takes any two
    for equal, its outer sides, and beside what is no equation its last side."""
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
    """By math-verify, which reads one as the gold and the other as an attempt: it has to find so both
    ways."""
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

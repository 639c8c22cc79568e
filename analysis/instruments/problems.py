"""Problems with answers: those of the pocket domain, and those that a user brings."""
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from analysis.instruments.grading import final_answer, readings, same
from analysis.instruments.hub import data_set
from analysis.pocket import domain
from analysis.pocket.domain import Problem, verify_number

PARTS = ("router-train", "dev", "calibration", "test")  # splits of a user's problems
FILE_SPLITS = dict(zip(PARTS, (70, 80, 90, 100)))  # upper ends, in % of hash space


@dataclass(frozen=True)
class Stated:
    """A problem of a user's file, in its own words; answers are graded by math-verify."""

    question: str
    answer: str


def question(problem: Problem | Stated) -> str:
    """What a model is asked."""
    return problem.question if isinstance(problem, Stated) else domain.question(problem)


def verify(problem: Problem | Stated, text: str, finished: bool = True) -> bool:
    """Is the final answer of the text right? `finished` False: the token limit cut the text off; then, with a
    user's problem, only a closed box counts."""
    if isinstance(problem, Stated):
        answer = final_answer(text, finished)
        return answer is not None and any(same(gold, answer) for gold in readings(problem.answer))
    return verify_number(problem.answer, text)


def read_problems(source: Path | str, *needed: str) -> list[dict]:
    """The rows of --problems: a user's JSONL file, or a data set (see `data_set`). A part of a data set that
    is called test is the test split; beside one, the other parts are spread over the other splits."""
    if Path(source).is_file() or Path(source).suffix in (".jsonl", ".json"):
        return file_rows(Path(source), *needed)
    parts = data_set(str(source))
    end = 100 - 10 * ("test" in parts)
    return [row | {"split": name if name == "test" else spread(row["question"], end)}
            for name, rows in parts.items() for row in rows]


def content_of(source: Path | str) -> bytes:
    """What --problems holds, for digests."""
    path = Path(source)
    return path.read_bytes() if path.is_file() else json.dumps(read_problems(source)).encode()


def file_rows(path: Path, *needed: str) -> list[dict]:
    """The rows of a user's JSONL file; ValueError naming the line that lacks a field or is no JSON."""
    if not path.is_file():
        raise ValueError(f"--problems {path}: there is no such file; expected JSONL, rows such as "
                         f"{{\"question\": ..., \"answer\": ...}}")
    rows = []
    for i, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"--problems {path}: line {i} is no JSON ({error})") from None
            lacking = [name for name in needed if not isinstance(row, dict) or name not in row]
            if lacking or not isinstance(row["question"], str) or not row["question"].strip():
                raise ValueError(f"--problems {path}: line {i} has no "
                                 f"{lacking[0] if lacking else 'text as its question'}; expected rows such "
                                 f"as {{\"question\": ..., \"answer\": ...}}")
            if row.get("split", "test") not in PARTS:
                raise ValueError(f"--problems {path}: line {i} has split {row['split']!r}: expected "
                                 f"{', '.join(PARTS)}, or no such field")
            rows.append(row)
    if not rows:
        raise ValueError(f"--problems {path}: expected a problem a line, found none")
    return rows


def split_of(row: dict) -> str:
    """Where a problem of a user's file belongs: its own field "split", else 70 / 10 / 10 / 10 by the hash of
    its question."""
    return row.get("split") or spread(row["question"])


def spread(asked: str, ends: int = 100) -> str:
    """The split of a question by its hash: of the first `ends` % of FILE_SPLITS."""
    percent = int(hashlib.sha256(asked.encode()).hexdigest()[:8], 16) % ends
    return next(split for split, end in FILE_SPLITS.items() if percent < end)

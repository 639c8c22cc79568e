"""Files of results, a row of JSON a line. No torch: figures read them."""
import json
import os
from collections.abc import Callable
from pathlib import Path

RESULTS = Path(__file__).parent.parent / "results"


def read_rows(path: Path) -> list[dict]:
    """The rows of a JSONL file; a last line torn by a kill is dropped."""
    rows = []
    for line in path.read_text(encoding="utf-8").split("\n") if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def write_rows(path: Path, rows: list[dict]) -> None:
    """Replace a file of one JSON row per line in one step."""
    path.with_suffix(".new").write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(path.with_suffix(".new"), path)


def append_row(path: Path, *rows: dict) -> None:
    """Append rows in one write. Rows read so far are written back first if the last one was torn."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size:
        with open(path, "rb") as file:
            file.seek(-1, os.SEEK_END)
            torn = file.read() != b"\n"
        if torn:
            write_rows(path, read_rows(path))
    with open(path, "a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def newest(path: Path, **wanted) -> dict | None:
    """The last row that has all of these."""
    rows = (row for row in reversed(read_rows(path)) if all(row.get(name) == x for name, x in wanted.items()))
    return next(rows, None)


def current(rows: list[dict], key: tuple[str, ...], group: Callable[[dict], str]) -> list[dict]:
    """The last row of each key, and of a group those only that were made with the same, over as many
    problems, as its last: what older nets or problems left in the file is passed over."""
    made = {group(r): (r["made_with"], r["n"]) for r in rows}
    current = [r for r in rows if (r["made_with"], r["n"]) == made[group(r)]]
    return list({tuple(r.get(name) for name in key): r for r in current}.values())

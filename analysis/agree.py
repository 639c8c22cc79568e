"""How far judges of labels agree, position by position.

    P="--slm SMALL --llm LARGE --judge numbers"
    python -m analysis.label $P --problems file.jsonl --out labels
    python -m analysis.agree $P --labels labels --judges answer numbers LARGE --out agree.jsonl

Rows: the file that --out names.
Feeds: which judge labels a real pair.

Of the folder that `analysis.label` made, positions at random at which the SLM would have written another
token. Each judge says whether that token leads to a sentence with the same meaning. `answer` lets the LLM go
on from it to the end and compares the final answers. --hand names verdicts of a reader, rows {"row", "t",
"same"}; --show prints the positions for one. The first judge, and the reader, are what the others are held
against. A run that was killed goes on with the judges that are missing.
"""
import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

import rstitch
from analysis import label
from analysis.instruments.judges import Case, build_judge
from analysis.instruments.options import add_options, given
from analysis.instruments.progress import tracked
from analysis.instruments.provenance import machine, provenance
from analysis.instruments.rows import read_rows
from analysis.instruments.runs import Rows, by_place, joined
from analysis.instruments.stats import table, wilson, with_interval
from rstitch_hf.ranks import start

Place = tuple[int, int]  # problem, position in the LLM's answer


def labelled(folder: Path, settings: label.Settings) -> list[dict]:
    """The router-train problems of a folder of labels, as far as their branches are made."""
    rows = joined([by_place(folder / f"{name}.jsonl") for name in ("answers", "readings", "branches")])
    found = [row for row in rows if row["split"] == "router-train"]
    if found:
        label.check_folder(folder, settings, [])  # were they made with these settings?
    else:
        raise ValueError(f"--labels {folder}: expected branches of router-train problems, found none")
    return found


def places(rows: Sequence[dict], n: int, seed: int) -> list[Place]:
    """n positions at random at which there is something to judge, in order."""
    every = [(i, t) for i, row in enumerate(rows) for t, branch in row["branches"] if branch is not None]
    picks = np.random.default_rng(seed).choice(len(every), min(n, len(every)), replace=False)
    return [every[k] for k in sorted(picks)]


def cases(settings: label.Settings, rows: Sequence[dict], at: Sequence[Place]) -> list[Case | None]:
    """What a judge is asked about each place. Where it wants whole answers the LLM goes on to the end; None
    where that is cut off."""
    picked: dict[int, set[int]] = {}
    for i, t in at:
        picked.setdefault(i, set()).add(t)
    asked = [rows[i] for i in picked]
    if label.goes_on_to_the_end(settings):  # from these places only
        asked = [row | {"slm": [choice if t in ts else own
                                for t, (own, choice) in enumerate(zip(row["answer"], row["slm"]))]}
                 for row, ts in zip(asked, picked.values())]
        asked = [row | more for row, more in zip(asked, label.branches(settings, asked))]
    known = {i: label.cases_of(settings, row) for i, row in zip(picked, asked)}
    return [known[i].get(t) for i, t in at]


def verdicts(settings: label.Settings, rows: Sequence[dict], at: Sequence[Place]) -> list[bool | None]:
    """What the settings' judge says of each place."""
    judge, asked = build_judge(settings.judge, settings.device, settings.dtype), cases(settings, rows, at)
    open_ones = [k for k, case in enumerate(asked) if case is not None]
    said: dict[int, bool | None] = {}
    blocks = [open_ones[k:k + settings.block] for k in range(0, len(open_ones), settings.block)]
    for block in tracked(blocks, settings.judge, "block"):
        said |= zip(block, judge([asked[k] for k in block]))
    return [said.get(k) for k in range(len(asked))]


def run(settings: label.Settings, folder: Path, judges: Sequence[str], n: int, seed: int,
        path: Path) -> dict[str, dict[Place, bool | None]]:
    """By judge, what it says of each place; those that are missing asked, and a row each appended."""
    rows = labelled(folder, settings)
    at = places(rows, n, seed)
    slm, llm, *_ = settings.load()
    world = {"slm": rstitch.fingerprint(slm), "llm": rstitch.fingerprint(llm), "dtype": settings.dtype,
             "machine": machine(settings.device), "places": [list(place) for place in at]}
    store = Rows(path, lambda row: row["judge"], lambda key: world)
    for judge in store.missing(judges):
        said = verdicts(replace(settings, judge=judge), rows, at)
        store.add(judge, {"what": "verdicts", "judge": judge, "same": said,
                          **provenance(seed, len(at), settings.device, settings.dtype)})
    have = store.have()
    return {judge: dict(zip(at, have[judge]["same"])) for judge in judges}


def read_hand(path: Path) -> dict[Place, bool | None]:
    """A reader's verdicts."""
    rows = read_rows(path)
    if not rows or any(not {"row", "t", "same"} <= row.keys() for row in rows):
        raise ValueError(f'--hand {path}: expected rows {{"row": 0, "t": 17, "same": true}}')
    return {(row["row"], row["t"]): row["same"] for row in rows}


def held(judge: dict[Place, bool | None], reference: dict[Place, bool | None]) -> dict[str, tuple[int, int]]:
    """(k, n) of the places that both have judged: those where they agree; of those that the reference calls
    different, the ones that the judge calls the same; and the other way round."""
    both = [(judge[at], said) for at, said in reference.items()
            if said is not None and judge.get(at) is not None]
    other, alike = ([a for a, b in both if b == kind] for kind in (False, True))
    return {"agree": (sum(a == b for a, b in both), len(both)), "missed": (sum(other), len(other)),
            "raised": (len(alike) - sum(alike), len(alike))}


def cell(k: int, n: int) -> str:
    """k of n in %, with its interval."""
    return f"{with_interval([100 * x for x in (k / n, *wilson(k, n))], digits=1)} of {n}" if n else "none"


def show(said: dict[str, dict[Place, bool | None]], hand: dict[Place, bool | None]) -> str:
    """A line for each judge against each reference, in % with 95 % intervals."""
    first, *_ = said
    head = ("judge", "held against", "unjudged, %", "agree, %", "different, called same, %",
            "same, called different, %")
    lines = [head]
    for reference, known in ((first, said[first]), *([("the reader", hand)] if hand else [])):
        for name, verdict in said.items():
            if name != reference:
                x = held(verdict, known)
                none = 100 * sum(v is None for v in verdict.values()) / len(verdict)
                lines.append((name, reference, f"{none:.1f}", *(cell(*x[k]) for k in x)))
    return table(lines)


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, label.Settings)
    add = parser.add_argument
    add("--labels", type=Path, help=f"folder that analysis.label made (default: {label.FOLDER})")
    add("--judges", nargs="+", default=["answer", "statement"],
        help="as --judge names them, the one to hold the others against first (default: answer statement)")
    add("--n", type=int, default=300, help="positions (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the positions (default: %(default)s)")
    add("--hand", type=Path, help="verdicts of a reader")
    add("--show", type=int, metavar="N", help="print the first N positions of a shuffle, as JSON, and end")
    add("--out", type=Path, help="file of the rows")
    args = parser.parse_args()
    try:
        settings, folder = label.Settings(**given(args, label.Settings)), args.labels or label.FOLDER
        rstitch.check_count("--n", args.n)
        if args.show is not None:
            rstitch.check_count("--show", args.show)
            rows = labelled(folder, settings)
            at = places(rows, args.n, args.seed)
            order = np.random.default_rng(args.seed).permutation(len(at))[:args.show]
            shown = [at[k] for k in order]
            for (i, t), case in zip(shown, cases(settings, rows, shown)):
                print(json.dumps({"row": i, "t": t, **case._asdict()}))
            return
        if not args.out:
            raise ValueError("--out is missing: expected a file for the rows")
        hand = read_hand(args.hand) if args.hand else {}
        said = run(settings, folder, args.judges, args.n, args.seed, args.out)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(show(said, hand))


if __name__ == "__main__":
    start(main)

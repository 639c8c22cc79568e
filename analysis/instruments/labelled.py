"""What labels say that a call of the LLM is worth, where rollouts would cost too much.

Along the LLM's own answers R2R's labels tell of every token whether the SLM's, in its place, would lead
astray. A verdict on some of these tokens by final answers (`analysis.agree`) tells how often a token of each
letter turns a right answer wrong. So a call there is worth that chance times what a right answer earns, less
what the call costs. Answers that are wrong anyway earn nothing, whoever writes their tokens.
"""
import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import numpy as np

import rstitch
from analysis.instruments.problems import question
from analysis.instruments.rows import read_rows
from analysis.instruments.runs import by_place, joined
from analysis.instruments.task import Prompting, Task, graded

STAGES = ("answers", "readings", "branches", "labels")


class Labels(NamedTuple):
    """The labelled router-train problems of a pair."""

    rows: list[dict]  # what the stages of `analysis.label` say of each
    right: list[bool]  # of each, the LLM's answer
    turned: dict[tuple[int, int], bool]  # by row and token: is the answer wrong behind the SLM's token?

    def chances(self) -> dict[str, tuple[int, int]]:
        """By letter (k, n): of n tokens of right answers that were tried, k turned the answer wrong."""
        tried = [(self.rows[i]["labels"][t], other) for (i, t), other in self.turned.items() if self.right[i]]
        return {letter: (sum(other for one, other in tried if one == letter),
                         sum(one == letter for one, _ in tried)) for letter in "DN"}


def read_labels(folder: Path, agreed: Path | None, task: Task) -> Labels:
    """The labels in a folder and, of a file of `analysis.agree`, what its judge `answer` says of some of
    their tokens; a branch that comes to no answer is wrong. ValueError where there are none, they are not
    finished, or of another pair, prompt or problems."""
    slm, llm, tokenizer, ends = task.load()
    stages = [by_place(folder / f"{name}.jsonl") for name in STAGES]
    if any(stage.keys() != stages[0].keys() for stage in stages):
        raise ValueError(f"--labels {folder}: expected labels that are finished; analysis.label goes on with "
                         "them")
    rows = [row for row in joined(stages) if row["split"] == "router-train"]
    if not rows:
        raise ValueError(f"--labels {folder}: expected labels of router-train problems, found none")
    made, record = json.loads((folder / "config.json").read_text()), task.record()
    pair = {"slm": rstitch.fingerprint(slm), "llm": rstitch.fingerprint(llm)}
    prompt = sorted({f.name for f in fields(Prompting)} | {"dtype", "max_new_tokens"})
    for name, value in (pair | {name: record.get(name) for name in prompt}).items():
        if (own := (made["settings"] | made).get(name)) != value:
            raise ValueError(f"--labels {folder} was made with {name} {own!r}: expected {value!r}")
    known = {question(p): p for p in task.split("router-train", sys.maxsize if task.problems else len(rows))}
    for row in rows:
        if row["question"] not in known:
            raise ValueError(f"--labels {folder} has the problem {row['question']!r}: expected router-train "
                             "problems of the task")
    right = [graded(tokenizer, ends, known[row["question"]], row["answer"])["correct"] for row in rows]
    return Labels(rows, right, read_turned(agreed, rows, pair) if agreed else {})


def read_turned(agreed: Path, rows: Sequence[dict], pair: dict) -> dict[tuple[int, int], bool]:
    """What the last row of the judge `answer` says of tokens of these labels, at all of which the SLM would
    have written another one. ValueError where there is none."""
    def fits(row: dict) -> bool:
        letters = [rows[i]["labels"][t:t + 1] if i < len(rows) else "" for i, t in row["places"]]
        return (row["judge"] == "answer" and all(row[name] == value for name, value in pair.items())
                and not {"", "I"} & set(letters))

    *_, last = [None, *filter(fits, read_rows(agreed))]
    if last is None:
        raise ValueError(f"--agree {agreed}: expected verdicts of the judge answer on these labels, found "
                         "none")
    return {(i, t): same is not True for (i, t), same in zip(last["places"], last["same"])}


def worth_of_calls(labels: Labels, price, earned: float, gap: int) -> np.ndarray:
    """(N,) of all labelled tokens, what a call of the LLM adds to the reward: the chance that the SLM's token
    turns the answer, by its letter, times `earned`, which a right answer earns on average, less the price
    of a visit of one token. For that the LLM reads `gap` tokens, those since its last visit. Where no token
    of a letter was tried, divergent ones turn every answer and neutral ones none."""
    chance = {letter: k / n if n else float(letter == "D") for letter, (k, n) in labels.chances().items()}
    llm, back = price.models[1], (price.nets_ms or {}).get("back", 0.0)
    worth = []
    for row, correct in zip(labels.rows, labels.right):
        for n, letter in enumerate(row["labels"], len(row["prompt"])):
            read = min(gap, n)
            ms = llm.call(read, n - read) + back
            worth.append(correct * (chance.get(letter, 0.0) * earned - price.lam * ms))
    return np.array(worth)

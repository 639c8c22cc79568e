"""Judges held against each other: by hand, and on labels of the pocket pair."""
import dataclasses
import json

import pytest

from analysis import agree, label
from analysis.conftest import FAST, TODO
from analysis.instruments.rows import RESULTS, read_rows

ENCODER = "sentence-transformers/all-MiniLM-L6-v2"


def test_agreement_by_hand():
    """Of five places one judge has not judged one and the reference another; of three that both have they
    agree on one; of two that differ one is called the same, of one that is the same it is called
    different."""
    judge = dict(zip("abcde", (True, False, None, False, True)))
    reference = dict(zip("abcde", (False, False, True, True, None)))
    assert agree.held(judge, reference) == {"agree": (1, 3), "missed": (1, 2), "raised": (1, 1)}
    table = agree.show({"answer": reference, "numbers": judge}, {"a": True, "b": False})
    assert "33.3 [6.1, 79.2] of 3" in table  # Wilson at 1 of 3
    assert [line.split()[:3] for line in table.splitlines()[1:]] == [
        ["numbers", "answer", "20.0"], ["answer", "the", "reader"], ["numbers", "the", "reader"]]


def test_judges_of_the_pocket_pairs_labels(labelled, tmp_path, monkeypatch):
    """The exact judge says what the labels say; the final answer is that of `analysis.label --judge answer`,
    and a judge that has spoken is not asked again."""
    folder, rows = labelled
    train = [row for row in rows if row["split"] == "router-train"]
    said = agree.run(FAST, folder, ["answer", "statement"], 1000, 0, tmp_path / "agree.jsonl")
    letters = {True: "N", False: "D", None: "U"}
    assert len(said["statement"]) > 20
    for (i, t), same in said["statement"].items():
        assert letters[same] == train[i]["labels"][t]
    todo = [row for row in TODO if row["split"] == "router-train"]
    whole = label.make_labels(dataclasses.replace(FAST, judge="answer"), todo, tmp_path / "whole")
    assert all(letters[same] == whole[i]["labels"][t] for (i, t), same in said["answer"].items())
    monkeypatch.setattr(agree, "verdicts", None)
    assert agree.run(FAST, folder, ["answer", "statement"], 1000, 0, tmp_path / "agree.jsonl") == said
    few = agree.places(train, 5, 1)
    assert few == sorted(few) and len(few) == 5 and few != agree.places(train, 5, 2)
    assert [row["judge"] for row in read_rows(tmp_path / "agree.jsonl")] == ["answer", "statement"]


def test_what_a_reader_is_shown_and_says(labelled, tmp_path, monkeypatch, capsys):
    folder, rows = labelled
    options = ["agree", "--labels", str(folder), "--block", "3"]
    monkeypatch.setattr("sys.argv", [*options, "--show", "4"])
    agree.main()
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(shown) == 4 and all(one["own"] != one["branch"] for one in shown)
    hand = tmp_path / "hand.jsonl"
    hand.write_text("".join(json.dumps({"row": one["row"], "t": one["t"], "same": True}) + "\n"
                            for one in shown))
    monkeypatch.setattr("sys.argv", [*options, "--judges", "statement", "--hand", str(hand),
                                     "--out", str(tmp_path / "out.jsonl")])
    agree.main()
    assert "the reader" in capsys.readouterr().out


@pytest.mark.parametrize("options, told", [
    (["--out", "x"], "expected branches of router-train"), (["--n", "0"], "--n"), ([], "--out is missing")])
def test_what_cannot_be_compared_is_told_first(options, told, tmp_path, monkeypatch, capsys):
    none = tmp_path / "none"
    monkeypatch.setattr("sys.argv", ["agree", "--labels", str(none), *options])
    with pytest.raises(SystemExit) as ended:
        agree.main()
    assert ended.value.code == 2 and told in capsys.readouterr().err and not none.exists()


def test_the_results_page_has_what_the_committed_verdicts_say():
    """Each judge on 300 positions against the final answer, and on 60 against a reader."""
    folder = RESULTS / "real"
    page, hand = (folder / "README.md").read_text(), agree.read_hand(folder / "judged_by_hand.jsonl")
    said = {(row["labels"], row["judge"]): dict(zip(map(tuple, row["places"]), row["same"]))
            for row in read_rows(folder / "agree.jsonl")}
    names = {"answer": "the final answer", "numbers": "numbers and results", "LARGE": "the LLM, asked",
             f"numbers+{ENCODER}": "numbers and embeddings (kept)"}
    for judge, name in names.items():
        mine, read = said["labels", judge], said["labels24", judge]
        assert len(mine) == 300 and len(read) == 60
        figures = agree.held(mine, said["labels", "answer"]).values()
        cells = ["" if judge == "answer" else agree.cell(*x) for x in figures]
        row = [name, f"{100 * list(mine.values()).count(None) / 300:.1f}", *cells,
               agree.cell(*agree.held(read, hand)["agree"])]
        assert f"| {' | '.join(row)} |" in page, judge

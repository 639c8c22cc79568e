"""What labels say of calls, by hand; labels that do not fit are refused."""
import json

import pytest

import rstitch
from analysis import label
from analysis.conftest import FAST, MODELS_MS, timed
from analysis.instruments.labelled import Labels, read_labels, worth_of_calls
from analysis.instruments.rows import write_rows
from analysis.instruments.task import Task
from analysis.train_policy import Price


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("labels")
    label.make_labels(FAST, label.pocket_problems(4), path)
    return path


def test_what_a_call_is_worth_by_hand():
    """A prompt of 10 tokens, a call every 3. The LLM reads 3 tokens behind 7, 8 and 9 cached ones, each time
    in 0.05 x 3 + 4 = 4.15 ms, and the second net takes 0.25: 4.4 ms, 0.044 of reward. A right answer earns
    0.8. Behind a divergent token that turns 2 of 4 it is worth 0.5 x 0.8, behind a neutral one that turns 1
    of 10 0.1 x 0.8."""
    price = Price(0.01, MODELS_MS, 128, nets_ms={"call": 7.0, "back": 0.25})
    row = {"prompt": [1] * 10, "labels": "IDN"}
    tried = {"D": [True, True, False, False], "N": [True] + [False] * 9}
    known = [{"prompt": [1], "labels": letter * len(said)} for letter, said in tried.items()]
    turned = {(i, t): said for i, one in enumerate(tried.values()) for t, said in enumerate(one)}
    labels = Labels([*known, row, row], [True, True, True, False], turned)
    assert labels.chances() == {"D": (2, 4), "N": (1, 10)}
    worth = worth_of_calls(labels, price, 0.8, 3)
    assert worth[14:17].tolist() == pytest.approx([-0.044, 0.4 - 0.044, 0.08 - 0.044])
    assert not worth[17:].any()  # a wrong answer earns nothing
    # Behind one token there are no three to read: one alone takes the LLM 4 ms, and 0.002 a cached one.
    assert worth[0] == pytest.approx(0.4 - 0.01 * 4.25)


def test_letters_that_were_never_tried_by_hand():
    """Divergent ones turn every answer and neutral ones none; tokens of wrong answers do not count."""
    row = {"prompt": [1] * 10, "labels": "DN"}
    labels = Labels([row, row], [True, False], {(1, 0): False, (1, 1): True})
    assert labels.chances() == {"D": (0, 0), "N": (0, 0)}
    price = Price(0.0, MODELS_MS, 128)
    assert worth_of_calls(labels, price, 0.8, 3).tolist() == [0.8, 0, 0, 0]
    one = labels._replace(turned={(0, 1): True})
    assert one.chances() == {"D": (0, 0), "N": (1, 1)}
    assert worth_of_calls(one, price, 0.8, 3).tolist() == [0.8, 0.8, 0, 0]


def test_labels_are_read_with_what_their_tokens_turn(tmp_path, pocket, folder):
    """The router-train problems, all right but one that is cut off; the last verdicts by final answers that
    fit; a token behind which the LLM comes to no answer turns it."""
    task, (slm, llm, *_) = Task(), pocket
    labels = read_labels(folder, None, task)
    assert len(labels.rows) == 4 == sum(labels.right) and labels.turned == {}
    assert {row["split"] for row in labels.rows} == {"router-train"}
    places = [[i, t] for i, row in enumerate(labels.rows) for t, letter in enumerate(row["labels"])
              if letter in "DN"][:3]
    identical = labels.rows[0]["labels"].index("I")
    verdicts = {"judge": "answer", "slm": rstitch.fingerprint(slm), "llm": rstitch.fingerprint(llm),
                "places": places, "same": [True, None, False]}
    rows = [verdicts | {"places": places[:1], "same": [False]}, verdicts,
            verdicts | {"judge": "numbers", "same": [True] * 3}, verdicts | {"llm": "x"},
            verdicts | {"places": [[4, 0]] * 3}, verdicts | {"places": [[0, 10_000]] * 3},
            verdicts | {"places": [[0, identical]] * 3}]
    write_rows(tmp_path / "agree.jsonl", rows)
    found = read_labels(folder, tmp_path / "agree.jsonl", task)
    assert found.turned == dict(zip(map(tuple, places), (False, True, True)))
    write_rows(tmp_path / "others.jsonl", rows[2:])
    with pytest.raises(ValueError, match="--agree .*: expected verdicts .* on these labels, found none"):
        read_labels(folder, tmp_path / "others.jsonl", task)
    shorter = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    shorter[1]["answer"] = shorter[1]["answer"][:5]
    cut = copied(folder, tmp_path / "cut")
    write_rows(cut / "answers.jsonl", shorter)
    assert read_labels(cut, None, task).right == [True, False, True, True]


def copied(folder, path):
    path.mkdir()
    for file in folder.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    return path


def test_labels_that_do_not_fit_are_refused(tmp_path, folder):
    def refused(message, path=folder, **options):
        with pytest.raises(ValueError, match=message):
            read_labels(path, None, timed(tmp_path, **options))

    refused("expected labels of router-train problems, found none", tmp_path)
    refused("was made with instruction None: expected 'Think.'", instruction="Think.")
    refused("was made with max_new_tokens 320: expected 60", max_new_tokens=60)
    refused("was made with slm '.*': expected", slm=Task.llm)
    begun = copied(folder, tmp_path / "begun")
    (begun / "labels.jsonl").write_text("")
    refused("expected labels that are finished", begun)
    other = copied(folder, tmp_path / "other")
    lines = (other / "answers.jsonl").read_text().splitlines()
    first = json.loads(lines[0]) | {"question": "Who?"}
    (other / "answers.jsonl").write_text("\n".join([json.dumps(first), *lines[1:]]) + "\n")
    refused("has the problem 'Who[?]': expected router-train problems", other)

"""What the tests of analysis share: the pocket pair, labelled answers, and fitted latencies."""
import json

import pytest
import torch

import rstitch
from analysis import label
from analysis.instruments.problems import question
from analysis.instruments.task import Task
from analysis.label import Settings
from analysis.pocket.domain import problems
from analysis.pocket.weights import load_pocket

torch.set_num_threads(1)

FAST = Settings(block=3)
TODO = [{"question": question(p), "split": split} for split in label.SIZES for p in problems(split, 2, 5)]
MODELS_MS = rstitch.LatencyModel((0, 0, 0.01, 1.0),
                                 (0.001, 1.0)), rstitch.LatencyModel((0, 0, 0.05, 4.0), (0.002, 4.0))


@pytest.fixture(scope="session")
def pocket():
    return load_pocket()


@pytest.fixture(scope="session")
def labelled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labels")
    return folder, label.make_labels(FAST, TODO, folder)


def timed(folder, **options) -> Task:
    """The pocket pair with latencies of its own."""
    (folder / "latency.json").write_text(json.dumps(dict(zip(("slm", "llm"),
                                                             (model.coefficients for model in MODELS_MS)))))
    return Task(latency=str(folder / "latency.json"), **options)

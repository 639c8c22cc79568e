"""Checkpoints of training runs."""
import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from analysis.instruments.rows import read_rows, write_rows

CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"  # not committed


def save_checkpoint(path: Path, model, optimizer, done: int) -> None:
    """Weights and optimizer moments in one safetensors file, replaced in one step."""
    tensors = {f"model.{name}": p.detach().contiguous() for name, p in model.named_parameters()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{key}": torch.as_tensor(value).clone() for key, value in state.items()}
    save_file(tensors, path.with_suffix(".new"), metadata={"done": str(done)})
    os.replace(path.with_suffix(".new"), path)


def load_checkpoint(path: Path, model, optimizer=None) -> int:
    """Restore what `save_checkpoint` wrote; what is done, 0 where there is no checkpoint. Weights only
    without optimizer."""
    if not path.exists():
        return 0
    with safe_open(path, "pt") as file:
        parameters, state = dict(model.named_parameters()), {}
        for key in file.keys():
            kind, name = key.split(".", 1)
            if kind == "model":
                parameters[name].data.copy_(file.get_tensor(key))
            else:
                i, moment = name.split(".")
                state.setdefault(int(i), {})[moment] = file.get_tensor(key)
        if optimizer is not None:
            optimizer.load_state_dict({"state": state,
                                       "param_groups": optimizer.state_dict()["param_groups"]})
        return int(file.metadata()["done"])


def resume(folder: Path, model, optimizer, key: str) -> int:
    """Go on with the run in a folder: what is done, by its last checkpoint. Rows of its log from there on are
    dropped: those of work that was killed before its checkpoint, and is done again."""
    folder.mkdir(parents=True, exist_ok=True)
    done, log = load_checkpoint(folder / "last.safetensors", model, optimizer), folder / "log.jsonl"
    if log.exists():
        write_rows(log, [row for row in read_rows(log) if row[key] < done])
    return done

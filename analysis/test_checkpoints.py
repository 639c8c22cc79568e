"""Checkpoints of trainings, and what is dropped of a log when one goes on."""
import pytest
import torch

from analysis.instruments.checkpoints import load_checkpoint, resume, save_checkpoint
from analysis.instruments.rows import append_row, read_rows


def trained(steps: int, seed: int = 0):
    torch.manual_seed(seed)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for step in range(steps):
        learn(model, optimizer, step)
    return model, optimizer


def learn(model, optimizer, step: int) -> None:
    optimizer.zero_grad()
    (model(torch.full((4, 3), 1.0 + step)) ** 2).mean().backward()
    optimizer.step()


def test_training_goes_on_bit_for_bit(tmp_path):
    whole, _ = trained(5)
    model, optimizer = trained(3)
    save_checkpoint(tmp_path / "last.safetensors", model, optimizer, 3)
    other, its_optimizer = trained(1, seed=9)
    assert load_checkpoint(tmp_path / "last.safetensors", other, its_optimizer) == 3
    for step in (3, 4):
        learn(other, its_optimizer, step)
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), whole.parameters()))


def test_weights_alone_and_no_checkpoint(tmp_path):
    model, optimizer = trained(2)
    assert load_checkpoint(tmp_path / "none.safetensors", model, optimizer) == 0
    save_checkpoint(tmp_path / "c.safetensors", model, optimizer, 2)
    other, _ = trained(0, seed=4)
    assert load_checkpoint(tmp_path / "c.safetensors", other) == 2
    assert torch.equal(other.weight, model.weight)
    assert [path.name for path in tmp_path.iterdir()] == ["c.safetensors"]  # nothing half written is left


@pytest.mark.parametrize("saved, kept", [(0, []), (2, [0, 1])])
def test_a_log_is_cut_back_to_the_checkpoint(tmp_path, saved, kept):
    model, optimizer = trained(saved)
    if saved:
        save_checkpoint(tmp_path / "last.safetensors", model, optimizer, saved)
    append_row(tmp_path / "log.jsonl", *({"step": step} for step in range(4)))
    assert resume(tmp_path, model, optimizer, "step") == saved
    assert [row["step"] for row in read_rows(tmp_path / "log.jsonl")] == kept

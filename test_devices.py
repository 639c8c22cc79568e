"""Tests of models that lie on more than one device, or in more than one process: `pytest test_devices.py`."""
import argparse
import json
import subprocess

import pytest
import torch
from transformers import AutoModelForCausalLM

import rstitch
from conftest import answers, assert_same_calls, prompts, torchrun
from rstitch import CachedLM, EntropyRouter, RandomRouter, stitch
from rstitch_hf import command
from rstitch_hf.loading import check_divides
from test_hybrid import small
from test_loading import saved

# ---- models that accelerate spreads ------------------------------------------------------------------------

FAMILIES = ["Qwen2", "Mistral, sliding window", "Gemma 2", "Qwen3.5", "LFM2", "Jamba"]


def spread(folder, family: str, place: str = "cpu"):
    """(the plain model, the same with its first layer and its output embedding on disk)."""
    plain = small(family, 3)
    plain.save_pretrained(folder / "whole")
    layers = {f"model.layers.{i}": place for i in range(plain.config.num_hidden_layers)}
    places = {"model": place} | layers | {"model.layers.0": "disk", "lm_head": "disk"}
    del places["model"]
    rest = {name.rsplit(".", 1)[0] for name, _ in plain.named_parameters()
            if not name.startswith(("model.layers.", "lm_head"))}
    rest |= {f"model.{name}" for name, _ in plain.model.named_children() if name != "layers"}
    model = AutoModelForCausalLM.from_pretrained(
        folder / "whole", device_map=places | dict.fromkeys(rest, place), offload_folder=folder / "disk",
        dtype=torch.float32).eval()
    return plain, model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_half_on_disk_equals_the_plain_one(tmp_path, family):
    plain, model = spread(tmp_path, family)
    assert any(p.is_meta for p in model.parameters()) and "disk" in model.hf_device_map.values()
    hooked = [module for module in model.modules() if getattr(module, "_hf_hook", None) is not None]
    assert hooked and rstitch.fingerprint(model) == rstitch.fingerprint(plain)
    slm, (ids, mask) = small("Llama", 1), prompts([3, 9, 5, 4])
    for router in (rstitch.LLMOnly(), EntropyRouter(0.7), RandomRouter(0.4, 0.5)):
        runs = [stitch(slm, llm, ids, router, attention_mask=mask, max_new_tokens=12, eos_token_id=[],
                       temperature=temperature, seed=2)
                for temperature in (0.0, 0.8) for llm in (plain, model)]
        assert_same_calls(runs[1].calls, runs[0].calls)
        assert_same_calls(runs[3].calls, runs[2].calls)
        assert len(answers(runs[0])[0]) == 12
    swapped = stitch(model, slm, ids, EntropyRouter(0.7), attention_mask=mask, max_new_tokens=8, slots=2)
    assert_same_calls(swapped.calls, stitch(plain, slm, ids, EntropyRouter(0.7), attention_mask=mask,
                                            max_new_tokens=8, slots=2).calls)


def test_each_layers_cache_lies_where_its_layer_runs(tmp_path):
    _, model = spread(tmp_path, "Qwen2")
    lm = CachedLM(model, 2, 64)
    lm.read([0, 1], [[5, 6], [7]])
    assert lm.inputs.device == torch.device("cpu")
    assert all(layer.keys.device == torch.device("cpu") for layer in lm.layers)
    with pytest.raises(ValueError, match="graphs=True: expected a model on one CUDA device, this one is on "
                                         "cpu and others"):
        CachedLM(model, 2, 64, graphs=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_on_a_gpu_in_memory_and_on_disk_equals_the_plain_one(tmp_path, family):
    plain, model = spread(tmp_path, family, place=0)
    assert {"disk", 0} <= set(model.hf_device_map.values())
    ids, mask = prompts([3, 9, 5, 4])
    runs = [stitch(small("Llama", 1), llm, ids, RandomRouter(0.4, 0.5), attention_mask=mask,
                   max_new_tokens=12, eos_token_id=[]) for llm in (plain.to("cuda"), model)]
    assert answers(runs[0]) == answers(runs[1])


def test_weights_moved_by_hand_are_refused():
    model = small("Qwen2", 5, num_hidden_layers=3)  # of this shape nobody else has one
    model.model.layers[0].to("meta")
    with pytest.raises(ValueError, match="llm .* is spread over several devices by hand: expected all of it"):
        stitch(small("Llama", 1), model, [[5, 6]], RandomRouter(0.5), max_new_tokens=2)


def test_device_auto_from_the_command_line(capsys):
    argv = ["--max-new-tokens", "6", "Ann has 5 coins. Ann buys 3. How many coins does Ann have?"]
    command.main(["--device", "cpu", *argv])
    plain = capsys.readouterr().out
    command.main(["--device", "auto", "--dtype", "float32", *argv])
    got = capsys.readouterr().out
    assert got.rsplit(", ", 2)[0] == plain.rsplit(", ", 2)[0]  # but for the time


# ---- one model over several processes ----------------------------------------------------------------------

RANKS = """
import json, sys
import torch
import rstitch
from conftest import prompts
from rstitch_hf.loading import load_model
from rstitch_hf.ranks import is_split, rank

torch.set_num_threads(1)
folder, *families = sys.argv[1:]
slm, found = load_model("--slm", f"{folder}/slm"), {}
if rank():  # as where processors round unlike each other: what this rank sees is off by far more
    head = slm.get_output_embeddings().weight
    head.data += 0.3 * torch.randn(head.shape, generator=torch.Generator().manual_seed(9))
ids, mask = prompts([3, 9, 5, 4, 7])
for family in families:
    llm, runs = load_model("--llm", f"{folder}/{family}", split=True), []
    assert is_split(llm) and not is_split(slm)
    for router in (rstitch.LLMOnly(), rstitch.EntropyRouter(0.7), rstitch.RandomRouter(0.4, 0.5)):
        for temperature in (0.0, 0.9):
            ticks = iter(range(10**6))  # the clock of rank 1 runs fast
            result = rstitch.stitch(slm, llm, ids, router, attention_mask=mask, max_new_tokens=12, slots=3,
                                    eos_token_id=[], temperature=temperature, seed=5 if temperature else None,
                                    stop=lambda row, ids: next(ticks) > (10**5, 40)[rank()])
            runs.append([result.calls, result.seed])
    found[family] = [runs, rstitch.fingerprint(llm)]
with open(f"{folder}/{rank()}.json", "w") as file:
    json.dump(found, file)
"""


def ended(process: subprocess.Popen, seconds: int) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of what must end in time."""
    out, errors = process.communicate(timeout=seconds)
    return process.returncode, out, errors


def gaps(model, prompt: list[int], answer: list[int]) -> list[float]:
    """How far the two likeliest tokens are from each other before each token of an answer."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1:-1]
    best = logits.topk(2).values
    return (best[:, 0] - best[:, 1]).tolist()


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """What each of two ranks found, by family."""
    folder, families = tmp_path_factory.mktemp("split"), ("Qwen2", "Qwen3", "Llama")
    small("Qwen2", 1).save_pretrained(folder / "slm")
    for family in families:
        small(family, 2).save_pretrained(folder / family)
    (folder / "ranks.py").write_text(RANKS)
    status, _, errors = ended(torchrun(2, folder / "ranks.py", folder, *families), 100)
    assert not status, errors
    return [json.loads((folder / f"{r}.json").read_text()) for r in (0, 1)]


@pytest.mark.parametrize("family", ["Qwen2", "Qwen3", "Llama"])
def test_an_llm_over_two_processes_equals_one_process(split, family):
    slm, llm = small("Qwen2", 1), small(family, 2)
    first, second = (found[family] for found in split)
    assert first == second and first[1] == rstitch.fingerprint(llm)
    ids, mask = prompts([3, 9, 5, 4, 7])
    settings = [(router, t) for router in (rstitch.LLMOnly(), EntropyRouter(0.7), RandomRouter(0.4, 0.5))
                for t in (0.0, 0.9)]
    equal = 0
    for (router, temperature), (calls, seeds) in zip(settings, first[0], strict=True):
        assert not temperature or seeds == rstitch.row_seeds(5, 5)
        alone = stitch(slm, llm, ids, router, attention_mask=mask, max_new_tokens=12, eos_token_id=[],
                       temperature=temperature, seed=seeds)
        for row, (mine, theirs) in enumerate(zip(alone.calls, calls, strict=True)):
            if [tuple(c[:5]) for c in theirs] == [c[:5] for c in mine]:
                equal += 1
                continue
            kept = [c.token for c in alone.kept[row]]
            prompt = ids[row, mask[row].bool()].tolist()
            assert min(min(gaps(model, prompt, kept)) for model in (slm, llm)) < 1e-4, (router, row)
    assert equal >= 25  # of 30 rows


@pytest.mark.parametrize("argv, message", [
    (["question"], "python rstitch.py without --tp is for one process, 2 were started"),
    (["--tp", "--llm", "{folder}/odd", "--slm", "{folder}/odd", "question"],
     "has num_key_value_heads=1: expected a number of ranks that divides it, got 2"),
    (["--tp", "--llm", "{folder}/none", "--slm", "{folder}/none", "question"],
     "cannot be split by --tp: transformers has no tensor parallel plan for gpt2")])
def test_a_wrong_launch_ends_in_one_sentence(tmp_path, argv, message):
    saved(tmp_path, "odd", 1, num_key_value_heads=1)
    saved(tmp_path, "none", 1, family="GPT-2")
    status, _, errors = ended(torchrun(2, "rstitch.py", *(word.format(folder=tmp_path) for word in argv)), 60)
    assert status and errors.count(message) == 1, errors


@pytest.mark.parametrize("name, message", [
    ("none", "--llm .*none cannot be split by --tp: transformers has no tensor parallel plan for gpt2"),
    ("odd", "--llm .*odd has num_key_value_heads=1: expected a number of ranks that divides it, got 2"),
    ("packed.gguf", "--llm .*packed.gguf: expected a model with safetensors of its own, for --tp splits it")])
def test_models_that_cannot_be_split_are_refused_before_their_weights_are_read(tmp_path, name, message):
    saved(tmp_path, "odd", 1, num_key_value_heads=1)
    saved(tmp_path, "none", 1, family="GPT-2")
    for weights in tmp_path.glob("*/*.safetensors"):
        weights.unlink()
    with pytest.raises(ValueError, match=message):
        check_divides("--llm", str(tmp_path / name), 2)


def test_one_process_is_not_split(capsys):
    with pytest.raises(SystemExit):
        command.main(["--tp", "question"])
    assert "--tp splits the LLM over several processes: expected torchrun" in capsys.readouterr().err


def test_the_command_over_two_processes_prints_one_answer(tmp_path, capsys):
    for name, seed in (("slm", 1), ("llm", 2)):
        saved(tmp_path, name, seed)
    pair = ["--slm", str(tmp_path / "slm"), "--llm", str(tmp_path / "llm"), "--router", "random", "--p",
            "0.5", "--max-new-tokens", "9", "--device", "cpu", "What is 2 + 3?"]
    status, split, errors = ended(torchrun(2, "rstitch.py", "--tp", *pair), 100)
    assert status == 0, errors
    command.main(pair)
    alone = capsys.readouterr().out
    assert split.rsplit(", ", 2)[0] == alone.rsplit(", ", 2)[0] and "9 tokens" in split


def test_auto_is_for_the_command_alone():
    """Analyses name the device in every row."""
    assert command.device_or_auto("auto") == "auto" and command.device_or_auto("cpu") == "cpu"
    with pytest.raises(argparse.ArgumentTypeError, match="'auto' is no device that torch can use here"):
        command.usable_device("auto")


def test_split_models_take_the_ranks_own_device(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for device in ("meta", "auto"):
        with pytest.raises(SystemExit):
            command.main(["--tp", "--device", device, "question"])
        assert f"--tp with --device {device}: expected --device" in capsys.readouterr().err

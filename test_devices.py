"""Tests of models that lie on more than one device, or in more than one process: `pytest test_devices.py`."""
import pytest
import torch
from transformers import AutoModelForCausalLM

import rstitch
from conftest import answers, assert_same_calls, prompts
from rstitch import CachedLM, EntropyRouter, RandomRouter, stitch
from rstitch_hf import command
from test_hybrid import small

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

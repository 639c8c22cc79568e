"""The pocket pair: its tokenizer, training that survives a kill, the committed weights."""
import itertools
import json

import numpy as np
import pytest
import torch

import rstitch
from analysis.instruments.rows import read_rows
from analysis.instruments.task import encode_problems
from analysis.pocket import pair
from analysis.pocket.domain import problems, stream
from analysis.pocket.weights import MODELS
from rstitch_hf import command


def test_tokenizer_covers_the_domain_and_keeps_the_text():
    tokenizer = pair.build_tokenizer()
    for q, s in itertools.chain(stream("short", 5, 0, 200), stream("long", 5, 0, 200)):
        ids = tokenizer(q + "\n" + s).input_ids
        assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == q + "\n" + s
    assert tokenizer.tokenize("First, 41 * 7 = 287.") == ["First", ",", " 4", "1", " *", " 7", " =", " 2",
                                                          "8", "7", "."]


def test_batches_label_solutions_only():
    tokenizer, recipe = pair.build_tokenizer(), pair.RECIPES["llm"]
    seen = 0
    for ids, labels in pair.batches(tokenizer, recipe, chunk=0, size=64):
        assert ids.shape == labels.shape and (ids.numel() <= recipe.batch_tokens or len(ids) == 1)
        for row, label in zip(ids, labels):
            answer = label[label >= 0]
            prompt = row[:(label >= 0).nonzero()[0, 0]]
            assert tokenizer.decode(prompt).endswith("?\n") and answer[-1] == tokenizer.eos_token_id
            assert torch.equal(row[len(prompt):len(prompt) + len(answer)], answer)
            seen += 1
    assert seen == 64


TINY = pair.Recipe(layers=1, width=16, mlp=16, heads=2, corpus="short", lr=1e-3, init=0.1, chunks=3)


def test_a_killed_training_run_ends_like_an_uninterrupted_one(tmp_path, monkeypatch):
    monkeypatch.setattr(pair, "dev_accuracy", lambda model, tokenizer: 0.0)
    whole = pair.train("slm", TINY, tmp_path / "whole", size=8)
    train_chunk, calls = pair.train_chunk, []

    def killed(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return train_chunk(*args)

    monkeypatch.setattr(pair, "train_chunk", killed)
    with pytest.raises(KeyboardInterrupt):
        pair.train("slm", TINY, tmp_path / "parts", size=8)
    assert len(read_rows(tmp_path / "parts" / "log.jsonl")) == 2
    parts = pair.train("slm", TINY, tmp_path / "parts", size=8)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), parts.parameters()))
    with pytest.raises(ValueError, match="starts from llm, which has no checkpoint"):
        pair.train("llm-short", pair.Recipe(**{**TINY.__dict__, "start": "llm"}), tmp_path / "llm-short",
                   size=8)
    further = pair.train("llm-short", pair.Recipe(**{**TINY.__dict__, "start": "whole", "lr": 0.0}),
                         tmp_path / "llm-short", size=8)
    # a learning rate of 0 keeps the start
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), further.parameters()))
    with pytest.raises(ValueError, match="holds 3 chunks of 4"):
        pair.export("slm", pair.Recipe(**{**TINY.__dict__, "chunks": 4}), tmp_path / "parts",
                    tmp_path / "out")
    pair.export("slm", TINY, tmp_path / "parts", tmp_path / "out")
    model, _, tokenizer = rstitch.load_pair(str(tmp_path / "out"), str(tmp_path / "out"), "cpu", "float32")
    for p in whole.eval().parameters():
        p.data = p.data.bfloat16().float()  # rounded as the export rounds
    ids = torch.randint(0, 90, (2, 30), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(ids).logits, whole(ids).logits)
    assert tokenizer("First, 41").input_ids == pair.build_tokenizer()("First, 41").input_ids
    assert json.loads((tmp_path / "out" / "made.json").read_text())["recipe"]["chunks"] == 3


def test_the_committed_weights_are_small_safetensors_in_bfloat16():
    from safetensors import safe_open
    files = [f for f in MODELS.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) < 24e6
    assert not [f for f in files if f.suffix in (".bin", ".pt", ".pth", ".pkl")]
    for role in ("slm", "llm", "llm-short"):
        with safe_open(MODELS / role / "model.safetensors", "pt") as weights:
            assert {weights.get_tensor(k).dtype for k in weights.keys()} == {torch.bfloat16}
        assert json.loads((MODELS / role / "made.json").read_text())["recipe"] == pair.RECIPES[role].__dict__


def test_pocket_models_alone_equal_generate(pocket):
    slm, llm, tokenizer = pocket
    ids, mask = encode_problems(tokenizer, problems("dev", 8, seed=1))
    for model, router in ((slm, rstitch.SLMOnly()), (llm, rstitch.LLMOnly())):
        expected = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=120)
        result = rstitch.stitch(slm, llm, ids, router, attention_mask=mask, max_new_tokens=120)
        assert torch.equal(result.sequences, expected)


def test_stop_strings_work_with_the_pocket_pair(pocket):
    slm, llm, tokenizer = pocket
    ids, _ = encode_problems(tokenizer, problems("dev", 1, seed=1))
    out = llm.generate(ids, custom_generate=rstitch.custom_generate, slm=slm,
                       router=rstitch.EntropyRouter(0.005), max_new_tokens=200,
                       stop_strings=["Finally"], tokenizer=tokenizer)
    assert tokenizer.decode(out[0, ids.shape[1]:]).endswith(" Finally")


@pytest.mark.parametrize("temperature", [0.0, 0.6])
@pytest.mark.parametrize("tau", [0.0, 0.005, 0.02, 0.1, 1.0])
def test_sixteen_rows_together_equal_sixteen_alone(pocket, tau, temperature):
    slm, llm, tokenizer = pocket
    ids, mask = encode_problems(tokenizer, problems("dev", 16, seed=2))
    router, options = rstitch.EntropyRouter(tau), dict(max_new_tokens=28, temperature=temperature)
    together = rstitch.stitch(slm, llm, ids, router, attention_mask=mask, seed=4, **options)
    lms = [rstitch.CachedLM(model, 1, ids.shape[1] + 28) for model in (slm, llm)]
    for b in range(16):
        alone = rstitch.stitch(*lms, ids[b:b + 1][:, mask[b].bool()], router, seed=[together.seed[b]],
                               **options)
        assert [c._replace(entropy=None) for c in alone.calls[0]] == [c._replace(entropy=None)
                                                                      for c in together.calls[b]]
        np.testing.assert_allclose([c.entropy for c in alone.calls[0]],
                                   [c.entropy for c in together.calls[b]], atol=1e-4)
    [lm.close() for lm in lms]


def test_the_command_leaves_the_threads_as_they_were(capsys):
    torch.set_num_threads(2)
    try:
        command.main(["--max-new-tokens", "2", "Ann has 5 coins."])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)

"""Tests of the measurements of speed: what they compute, not how fast it is."""
import json
import sys

import numpy as np
import pytest
import torch

import rstitch
from analysis import bench
from analysis.instruments.shapes import Limits
from test_rstitch import DEVICES

torch.set_num_threads(1)


@pytest.mark.parametrize("device", DEVICES)
def test_kernels_agree(device):
    for batch, context, S in ((1, 64, 1), (3, 128, 4)):
        row = bench.attention_row("1.5B", batch, context, S, device, "float32", rounds=1)
        assert set(row["error"]) >= set(bench.KERNELS)
        assert max(row["error"].values()) < 1e-5
        assert all(ms[0] > 0 for ms in row["ms"].values())


def test_lines_and_bows_are_told_apart():
    n, rng = (64, 512, 1024, 2048, 4096), np.random.default_rng(0)
    noisy = lambda f: [[f(x) * (1 + 0.02 * e) for e in rng.normal(size=40)] for x in n]  # noqa: E731
    line = bench.fit_line(n, noisy(lambda x: 2 + 0.001 * x))
    assert line["d_ms"] == pytest.approx(2, rel=0.02)
    assert line["c_ms"] == pytest.approx(0.001, rel=0.05)
    assert line["largest_error"] < 0.02
    assert line["square_share"][1] < 0 < line["square_share"][2]
    bow = bench.fit_line(n, noisy(lambda x: 2 + 1e-7 * x**2))  # at 4,096 the square is 1.68 of 3.68: 46 %
    assert bow["square_share"][0] == pytest.approx(0.46, abs=0.1)
    assert bow["square_share"][1] > 0.2
    assert bow["largest_error"] > 0.05


def test_the_price_of_a_key_is_told_from_that_of_a_row():
    contexts = (64, 256, 512, 1024, 2048)

    def t(n: int, b: int) -> float:  # ms: a key costs 1 us, beyond 4,096 half of it
        return 3 + 0.1 * b + 1e-3 * min(n * b, 4096) + 5e-4 * max(n * b - 4096, 0)

    prices = bench.key_prices(contexts, {b: [[t(n, b)] * 3 for n in contexts] for b in (1, 4, 16)})
    # batch 1 ends at 2,048
    assert {keys: list(of) for keys, of in prices.items()} == {"1,024 to 4,096": [4, 16],
                                                               "4,096 to 8,192": [4, 16],
                                                               "8,192 to 32,768": [16]}
    assert all(x == pytest.approx(us) for keys, us in zip(prices, (1, 0.5, 0.5))
               for of in prices[keys].values() for x in of)
    # medians 4 and 8
    assert bench.key_prices((1024, 4096),
                            {1: [[3, 4, 5],
                                 [9, 7.072, 8]]})["1,024 to 4,096"][1][0] == pytest.approx(4 / 3.072)


def test_a_timed_step_follows_one_over_the_same_keys():
    model, reads = bench.build("mini-S", 64, "cpu", torch.float32), []

    def note(module, args, kwargs) -> None:
        reads.append((kwargs["input_ids"].shape[0], kwargs["position_ids"][0, -1].item()))

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    times = bench.step_times(model, (1, 2), (5, 40), rounds=3)
    hook.remove()
    assert {b: [len(ms) for ms in rows] for b, rows in times.items()} == {1: [3, 3], 2: [3, 3]}
    assert reads[:2] == [(1, 0), (2, 0)]
    assert reads[2::2] == reads[3::2]
    assert sorted(set(reads[2:])) == [(1, 5), (1, 40), (2, 5), (2, 40)]
    assert len(reads) == 2 + 2 * 4 * 4  # four cells, a round more than is kept
    assert len(model.get_output_embeddings()._forward_pre_hooks) == 0


def test_scripts_have_the_share_and_the_visits_they_promise():
    B, N = 8, 4000
    leaves = bench.Script(0.25, 3).leaves(B, N)
    writer, active, visits = np.zeros((B, N), int), [rstitch.LLM] * B, B
    for row in range(B):
        for t in range(N):
            if active[row] == rstitch.SLM and leaves[0, row, t]:
                active[row], visits = rstitch.LLM, visits + 1
            writer[row, t] = active[row]
            if active[row] == rstitch.LLM and leaves[1, row, t]:
                active[row] = rstitch.SLM
    assert writer.mean() == pytest.approx(0.25, abs=0.01)
    assert writer.sum() / visits == pytest.approx(3, rel=0.05)
    for share, visit in ((0, 2), (1, 2), (0.5, 0.5)):
        with pytest.raises(ValueError, match="expected a share in"):
            bench.Script(share, visit)


def test_a_simulated_schedule_by_hand():
    """One row of five tokens, LLM 10, SLM 1: the LLM writes the first token before the clock starts, as the
    SLM does the second; then token 2 is kept (1), token 3 discarded (1) and written by the LLM (10), token 4
    kept (1)."""
    leaves = np.zeros((2, 1, 5), bool)
    leaves[1] = True
    leaves[0, 0, 3] = True
    reads = []
    cost = lambda model, unread: reads.append((model, unread)) or (10.0 if model else 1.0)  # noqa: E731
    assert bench.simulate(leaves, cost) == (13.0, 3, 0)
    # at its second call the LLM has three tokens to catch up with
    assert reads == [(1, [1]), (0, [2]), (0, [1]), (0, [1]), (1, [3]), (0, [1])]


def test_what_was_written_before_the_clock_starts_does_not_count():
    """Two rows of three tokens. The second calls the LLM for its second token, while the first has the SLM
    write on. Each call costs 1."""
    leaves = np.zeros((2, 2, 3), bool)
    leaves[1] = True
    leaves[0, 1, 1] = True
    # both first tokens; token 1 of the first row, discarded of the second; half the rows wait: token 2 of the
    # first; token 1 of the second: the clock
    # starts with five tokens there; token 2 of the second
    assert bench.simulate(leaves, lambda model, unread: 1.0) == (1.0, 1, 1)


@pytest.mark.parametrize("rule", [rstitch.next_model, bench.weighed(5, 0.5), bench.weighed(5, 1.0)])
def test_nobody_waits_for_ever(rule):
    *_, wait = bench.simulate(bench.Script(0.25, 4).leaves(16, 200), lambda model, unread: 5.0 if model
                              else 1.0, rule)
    assert 0 < wait <= rstitch.PATIENCE


def test_the_simulation_makes_the_reads_of_stitch(monkeypatch):
    monkeypatch.setitem(bench.SHAPES, "nano", (32, 48, 2, 4, 2, 64, True))
    model = bench.build("nano", 64, "cpu", torch.float32)
    leaves, reads = bench.Script(0.3, 2).leaves(4, 20), []
    bench.simulate(leaves, lambda model, unread: reads.append((model, unread)) or 1.0)
    lms = [bench.TimedLM(model, 4, 64) for _ in range(2)]
    seen: list[tuple[int, list[int]]] = []
    for m, lm in enumerate(lms):
        read = lm.read

        def noted(rows, tokens, *args, m=m, read=read):
            seen.append((m, [len(line) for line in tokens]))
            return read(rows, tokens, *args)

        lm.read = noted
    bench.timed_stitch(lms, torch.full((4, 1), 9), bench.ScriptRouter(leaves, "cpu"), 20, 2)
    assert seen == reads


def test_sizes_are_those_of_the_models():
    for shape in ("mini-S", "mini-L"):
        model = bench.build(shape, 256, "cpu", torch.float32)
        weights, read, cache = bench.bytes_of(shape, 3, 100, 4)
        assert weights == sum(p.nbytes for p in model.parameters())
        assert weights - read == (0 if bench.SHAPES[shape][-1]
                                  else model.get_input_embeddings().weight.nbytes)
        lm = rstitch.CachedLM(model, 3, 128)
        lm.read([0], [[5]])
        assert sum(layer.keys.nbytes + layer.values.nbytes for layer in lm.layers) / 128 == cache / 100


def test_a_cell_is_measured_once_and_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "FILE", tmp_path / "bench.jsonl")
    monkeypatch.setattr(bench, "products", lambda *args: {})
    monkeypatch.setattr(bench, "measure_limits", lambda *args: Limits(1e10, 1e30))
    # as wide as the larger Qwen2.5 models are
    monkeypatch.setitem(bench.SHAPES, "mini-W", (*bench.SHAPES["mini-S"][:5], 1100, True))
    monkeypatch.setattr(sys, "argv",
                        "bench --shapes mini-S+mini-W --batch 1 --context 16 --new-tokens 6 --rounds 1 "
                        "--threads 1".split())
    bench.main()
    row = json.loads((tmp_path / "bench.jsonl").read_text())
    ways = {f"{name} {way}" for name in ("mini-S", "mini-W")
            for way in ("alone", "generate()", "generate(), static cache")}
    assert {"stitched", "assisted generation", *ways} == set(row["tokens_per_s"])
    assert row["simulated_tokens_per_s"] > 0
    assert sum(row["spent_ms_per_token"].values()) > 0
    assert row["floor_ms"]["mini-S"] == pytest.approx(1e-7 * sum(bench.bytes_of("mini-S", 1, 19, 4)[1:]))
    first = capsys.readouterr().out
    bench.main()
    assert capsys.readouterr().out == first
    assert first.count("does not fit") == 0
    assert "simulated ceiling" in first
    assert f"visits of 2, {row['machine']}, float32" in first
    monkeypatch.setattr(bench, "machine", lambda device: "another processor")
    bench.main()  # what one machine took is no time of another's
    assert "visits of 2, another processor, float32" in capsys.readouterr().out
    assert len((tmp_path / "bench.jsonl").read_text().splitlines()) == 2
    assert bench.show_shapes(row | {"fits": False, "needed_gb": 81.2}).endswith("does not fit: 81 GB")


@pytest.mark.parametrize("argv, message", [("--shapes 1.5B", "expected two of"),
                                           ("--shapes 1.5B+8B", "expected two of"),
                                           ("--rounds 0", "--rounds=0"), ("--new-tokens 2", "--new-tokens=2"),
                                           ("--shapes mini-S+mini-L --share 1.5", "expected a share in")])
def test_bad_options_are_refused(argv, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", *argv.split()])
    with pytest.raises(SystemExit):
        bench.main()
    assert message in capsys.readouterr().err


def test_slots_are_timed_against_batches_of_the_same_problems():
    row = bench.slots_row(bench.load_pocket(), n=5, slots=2, rounds=1)
    assert row["slots"] == 2 and row["problems"] == 5 and row["ratio"][0] > 0
    pair, chosen = bench.load_pocket(), bench.problems("dev", 5, 0)
    ids, mask = bench.encode_problems(pair[2], chosen)
    result = rstitch.stitch(*pair[:2], ids, rstitch.EntropyRouter(0.005), attention_mask=mask,
                            max_new_tokens=bench.MAX_NEW_TOKENS)
    assert row["tokens"] == (result.source >= 0).sum()


def test_the_cost_of_branches_is_that_of_their_tokens():
    row = bench.branches_row(bench.load_pocket(), lengths=(40, 80), every=10, more=3, rounds=1)
    prompt = len(rstitch.unpadded(*bench.encode_problems(bench.load_pocket()[2],
                                                         bench.problems("dev", 1, 0)))[0])
    for length, shared, alone in zip(row["lengths"], row["read"]["shared"], row["read"]["alone"]):
        heads = range(10, length + 1, 10)
        # once prompt and answer up to the last token of the longest; of each branch its last token and two of
        # the three that it writes
        assert shared == prompt + length - 1 + 3 * len(heads)
        assert alone == sum(prompt + t + 2 for t in heads)
    assert rstitch.SHARED == 16 and row["exponent of read"]["shared"] < row["exponent of read"]["alone"]

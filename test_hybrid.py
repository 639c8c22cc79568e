"""Tests of models with recurrent layers, and of rows that are forked: `pytest test_hybrid.py`.

A recurrent state cannot be masked: one pad, or one row that takes part without reading, and it is wrong for
good. So each family is compared with a full recompute, to rounding, not only with the tokens of `generate()`.
"""
import math
from functools import lru_cache
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rstitch
from conftest import FAMILIES, GEMMA, GROUPED, MOE, VOCAB, prompts, tiny
from rstitch import CachedLM, EntropyRouter, LLMOnly, Sampling, SLMOnly, row_seeds, stitch
from rstitch_hf import loading
from test_rstitch import TooClose, assert_equal_to_reference, beginning_alike, built, reference

# ---- tiny models --------------------------------------------------------------------------------------


ALTERNATING = dict(layer_types=["linear_attention", "full_attention"])
CONV = dict(layer_types=["conv", "full_attention"])
EXPERTS = MOE | dict(num_experts=4, moe_intermediate_size=16)
SHARED_EXPERT = EXPERTS | dict(shared_expert_intermediate_size=16)
DELTA = GROUPED | ALTERNATING | dict(
    head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
    linear_value_head_dim=8)
MAMBA_2 = dict(mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_chunk_size=8)
# Nemotron-H and Zamba2 clamp time steps below time_step_min where they read several tokens at once, and not
# where they read one: with the default of 0.001 what generate() computes is no full recompute either.
NO_CLAMP = dict(time_step_min=1e-9, chunk_size=8)
HYBRIDS = {
    "Qwen3.5": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", DELTA),
    "Qwen3.5-MoE": ("Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM", DELTA | SHARED_EXPERT),
    "Qwen3-Next": ("Qwen3NextConfig", "Qwen3NextForCausalLM", DELTA | SHARED_EXPERT),
    "Olmo-Hybrid": ("OlmoHybridConfig", "OlmoHybridForCausalLM", DELTA),
    "LFM2": ("Lfm2Config", "Lfm2ForCausalLM", GROUPED | CONV),
    "LFM2-MoE": ("Lfm2MoeConfig", "Lfm2MoeForCausalLM", GROUPED | CONV | EXPERTS | dict(
        num_dense_layers=1)),
    "Granite 4": ("GraniteMoeHybridConfig", "GraniteMoeHybridForCausalLM", (
        GROUPED | ALTERNATING | MAMBA_2 | dict(
            num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=16,
            position_embedding_type="rope"))),
    "Falcon-H1": ("FalconH1Config", "FalconH1ForCausalLM", GROUPED | MAMBA_2 | dict(
        head_dim=8, mamba_d_ssm=64)),
    "Bamba": ("BambaConfig", "BambaForCausalLM", GROUPED | MAMBA_2 | dict(attn_layer_indices=[1])),
    "Nemotron-H": ("NemotronHConfig", "NemotronHForCausalLM", GROUPED | NO_CLAMP | MOE | dict(
        layers_block_type=["linear_attention", "moe", "full_attention", "mlp"], mamba_num_heads=4,
        mamba_head_dim=16, ssm_state_size=8, n_groups=2, n_routed_experts=4, moe_intermediate_size=16,
        moe_shared_expert_intermediate_size=16)),
    "Zamba2": ("Zamba2Config", "Zamba2ForCausalLM", NO_CLAMP | dict(
        layers_block_type=["linear_attention", "hybrid"], num_key_value_heads=4, mamba_d_state=8,
        n_mamba_heads=4, mamba_headdim=16, mamba_ngroups=2, adapter_rank=8, use_mem_rope=True)),
    "Mamba-2": ("Mamba2Config", "Mamba2ForCausalLM", dict(
        num_heads=4, head_dim=16, state_size=8, n_groups=2, chunk_size=8)),
    "Mamba": ("MambaConfig", "MambaForCausalLM", dict(state_size=8)),
    "Falcon-Mamba": ("FalconMambaConfig", "FalconMambaForCausalLM", dict(state_size=8)),
    "Jamba": ("JambaConfig", "JambaForCausalLM", GROUPED | dict(
        attn_layer_offset=1, attn_layer_period=2, expert_layer_offset=1, expert_layer_period=2,
        num_experts=4, num_experts_per_tok=2, mamba_d_state=8, mamba_dt_rank=4)),
    "Zamba": ("ZambaConfig", "ZambaForCausalLM", dict(
        layers_block_type=["linear_attention", "hybrid"], attn_layer_offset=1, attn_layer_period=2,
        num_key_value_heads=4, mamba_d_state=8, n_mamba_heads=2, mamba_dt_rank=4)),
}
STEPWISE = ["Mamba", "Falcon-Mamba", "Jamba", "Zamba"]
GEMMA_4 = GROUPED | GEMMA | dict(
    global_head_dim=8, hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCAB)
SERVED = HYBRIDS | {  # and attention alone of kinds that test_rstitch.py does not build
    "Gemma 4": ("Gemma4TextConfig", "Gemma4ForCausalLM", GEMMA_4 | dict(num_kv_shared_layers=0)),
    "Gemma 4, shared keys": ("Gemma4TextConfig", "Gemma4ForCausalLM", GEMMA_4 | dict(
        num_kv_shared_layers=2, num_hidden_layers=4, layer_types=2 * GEMMA["layer_types"])),
}


def small(family: str, *args, **changes):
    """`tiny` of any family, those of test_rstitch.py included."""
    with patch.dict(FAMILIES, SERVED):
        return tiny(family, *args, **changes)


def tokens_of(rows: int, columns: int, seed: int = 1) -> list[list[int]]:
    return torch.randint(2, VOCAB, (rows, columns), generator=torch.Generator().manual_seed(seed)).tolist()


def read_on(lm: CachedLM, ids: list[list[int]], rows: list[int], lengths: list[int]) -> rstitch.Output:
    """These rows read their next tokens of ids."""
    return lm.read(rows, [ids[row][lm.cursor[row]:lm.cursor[row] + n] for row, n in zip(rows, lengths)])


def held(lm: CachedLM) -> list[torch.Tensor]:
    """All that a cache keeps, (B, ...) each: keys and values, and states."""
    slots = [x for layer in lm.layers if isinstance(layer, rstitch.StitchLayer) and layer.is_initialized
             for x in (layer.keys, layer.values)]
    return slots + [states for layer in lm.recurrent for states in layer.states.values()]


def assert_close(out, expected) -> None:
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)


READS = [([0, 1, 2, 3], [7, 1, 3, 1]), ([0, 1, 2, 3], [1, 1, 1, 1]), ([3, 0], [6, 2]),
         ([1, 2, 3], [4, 4, 13]), ([2, 0], [1, 1]), ([1, 2], [1, 1]), ([0, 1, 2, 3], [9, 1, 9, 2]),
         ([3], [5])]


# ---- Recurrent layers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SERVED)
@torch.no_grad()
def test_ragged_reads_of_any_rows_equal_a_full_recompute(family):
    ids, lm = tokens_of(4, 40), CachedLM(small(family), 4, 40)
    for rows, lengths in READS:
        out = read_on(lm, ids, rows, lengths)
        for i, row in enumerate(rows):
            read = torch.tensor([ids[row][:lm.cursor[row]]])
            full = lm.model(read, use_cache=False, output_hidden_states=True)
            assert_close(out.logits[i], full.logits[0, -1])
            assert_close(out.hidden[i], full.hidden_states[-1][0, -1])
    lm.close()


@pytest.mark.parametrize("family", SERVED)
def test_one_model_alone_equals_generate_of_the_unpadded_prompts(family):
    model, other, lengths = small(family), tiny("Qwen2", seed=9), [9, 1, 5, 12, 5]
    ids, mask = prompts(lengths, seed=1)
    expected = []
    for row, n in enumerate(lengths):
        out = model.generate(ids[row:row + 1, -n:], do_sample=False, max_new_tokens=10, eos_token_id=None,
                             output_logits=True, return_dict_in_generate=True)
        expected.append(out.sequences[0, n:].tolist())
        best = torch.cat(out.logits).topk(2).values
        assert (best[:, 0] - best[:, 1]).min() > 1e-4  # no tie decided it
    for pair, router in (((model, other), SLMOnly()), ((other, model), LLMOnly())):
        result = stitch(*pair, ids, router, attention_mask=mask, max_new_tokens=10, eos_token_id=[])
        assert result.sequences[:, 12:].tolist() == expected
    assert result.entropy.max() - result.entropy.min() > 0.3  # the entropies spread, so this was no easy case


PAIRS = [("Qwen3.5", "Qwen3-Next"), ("Qwen3.5", "Qwen3.5-MoE"), ("LFM2", "LFM2-MoE"),
         ("Granite 4", "Granite 4"), ("Falcon-H1", "Bamba"), ("Mamba", "Jamba"), ("Mamba-2", "Zamba2"),
         ("Nemotron-H", "Falcon-Mamba"), ("Zamba", "Olmo-Hybrid"), ("Qwen2", "Qwen3.5"), ("Qwen2", "Jamba"),
         ("Qwen3.5", "Llama"), ("Mamba", "Mistral, sliding window"), ("LFM2", "Gemma 4")]


@lru_cache(maxsize=None)
def kept_pair(pair: int) -> tuple[CachedLM, CachedLM]:
    (slm, llm) = PAIRS[pair]
    return CachedLM(small(slm, 1, 0.35), 6, 48), CachedLM(small(llm, 2, 0.5), 6, 48)


def test_stitch_equals_algorithm_1():
    """Every pair in turn, 100 random cases or more. Chunks are small here, so that a prompt takes several;
    prompts begin alike, and may have to wait for a slot."""
    count = {"run": 0, "too close": 0, "switched": 0, "copied": 0}

    @settings(max_examples=140, deadline=None, derandomize=True, database=None)
    @given(seed=st.integers(0, 10_000),
           lengths=st.lists(st.integers(1, 5) | st.integers(1, 24), min_size=1, max_size=4),
           tau=st.floats(0.3, 1), tau_back=st.none() | st.floats(0.3, 1), n_new=st.integers(2, 6),
           temperature=st.sampled_from([0.0, 0.0, 0.8]), slots=st.none() | st.integers(1, 3),
           alike=st.integers(0, 20))
    def compare(seed, lengths, tau, tau_back, n_new, temperature, slots, alike):
        lms, router = kept_pair(count["run"] % len(PAIRS)), EntropyRouter(tau, tau_back=tau_back)
        models, sampling = [lm.model for lm in lms], Sampling(temperature)
        ids, mask = beginning_alike(*prompts(lengths, seed), alike)
        count["run"] += 1
        try:
            expected = [reference(models, row[keep.bool()].tolist(), router, n_new, sampling, s, eos=1)
                        for row, keep, s in zip(ids, mask, row_seeds(seed, len(lengths)))]
        except TooClose:
            count["too close"] += 1
            return
        result = stitch(*lms, ids, router, attention_mask=mask, max_new_tokens=n_new, temperature=temperature,
                        seed=seed, eos_token_id=1, pad_token_id=0, slots=slots)
        assert_equal_to_reference(result, ids, expected, pad=0)
        count["copied"] += sum(result.n_read) < sum(call.n_inf for calls in result.calls for call in calls)
        count["switched"] += any(rstitch.count_switches(calls) > 1 for calls in result.calls)

    with patch.multiple(rstitch, BLOCK=8, CHUNK=16, SHARED=3, FREE={"cpu": 6}):
        kept_pair.cache_clear()
        compare()
    kept_pair.cache_clear()
    assert count["run"] - count["too close"] >= 100 and count["switched"] >= 40 and count["copied"] >= 20


@pytest.mark.parametrize("family", HYBRIDS)
def test_only_what_a_row_reads_reaches_a_model_with_recurrent_layers(family):
    """No pad, no row that does not read; several tokens at once, singly where the scan starts from zero."""
    lm, ids, shapes = CachedLM(small(family), 4, 40), tokens_of(4, 40), []
    hook = lm.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True)
    for rows, lengths in READS[:4]:
        read_on(lm, ids, rows, lengths)
    hook.remove()
    first = [(2, 1), (1, 3), (1, 7), (4, 1)]  # new rows of 7, 1, 3 and 1 tokens; then one token each
    # 6 and 2 tokens singly: 4 of the longer, then 2 of both. 4, 4 and 13: 9 of the longest, then 4 of all
    singly = 4 * [(1, 1)] + 2 * [(2, 1)] + 9 * [(1, 1)] + 4 * [(3, 1)]
    assert shapes == first + (singly if family in STEPWISE else [(1, 2), (1, 6), (2, 4), (1, 13)])


@pytest.mark.parametrize("family", ["Qwen3.5", "LFM2", "Falcon-H1", "Mamba", "Qwen2"])
def test_nan_of_a_row_reaches_nobody_and_is_gone_after_its_reset(family):
    ids = tokens_of(4, 40)
    clean, lm = CachedLM(small(family), 4, 40), CachedLM(small(family), 4, 40)
    for which in (clean, lm):
        read_on(which, ids, [0, 1, 2, 3], [3, 5, 2, 4])
    for x in held(lm):
        x[1] = math.nan
    for rows, lengths in (([0, 2, 3], [1, 1, 1]), ([3, 0], [4, 2]), ([2, 3], [1, 1]), ([0], [3])):
        out, expected = read_on(lm, ids, rows, lengths), read_on(clean, ids, rows, lengths)
        assert out.logits.isfinite().all() and torch.equal(out.logits, expected.logits)
    assert read_on(lm, ids, [1], [1]).logits.isnan().all()  # so they were planted where it hurts
    lm.reset([1])
    assert lm.cursor == [9, 0, 4, 10]  # 3 + 1 + 2 + 3 in row 0, and so on
    other = tokens_of(1, 20, seed=2)
    assert_close(lm.read([1], other).logits, CachedLM(small(family), 1, 40).read([0], other).logits)
    again = [read_on(which, ids, [0, 2, 3], [2, 2, 2]).logits for which in (lm, clean)]
    assert_close(*again)  # the others were not reset with it


@pytest.mark.parametrize("family", HYBRIDS)
def test_long_reads_in_chunks_equal_one_call(family, monkeypatch):
    ids = tokens_of(1, 61, seed=4)
    whole = CachedLM(small(family), 1, 61).read([0], ids)
    for chunk in (20, 30, 60):
        monkeypatch.setattr(rstitch, "CHUNK", chunk)
        lm = CachedLM(small(family), 1, 61)
        assert_close(lm.read([0], ids).logits, whole.logits)
        lm.reset()
        read_on(lm, ids, [0], [3])
        assert_close(read_on(lm, ids, [0], [58]).logits, whole.logits)
        assert lm.cursor == [61]


def test_a_model_that_goes_on_token_by_token_reads_a_long_prompt_at_once(monkeypatch):
    monkeypatch.setattr(rstitch, "CHUNK", 16)
    lm, lengths = CachedLM(small("Mamba"), 1, 80), []
    compute = lm.compute
    monkeypatch.setattr(lm, "compute", lambda *args: lengths.append(args[2]) or compute(*args))
    out = lm.read([0], tokens_of(1, 74))
    assert lengths == [74] and lm.n_read == 74
    assert_close(out.logits, lm.model(torch.tensor(tokens_of(1, 74)), use_cache=False).logits[:, -1])


@pytest.mark.parametrize("family", ["Qwen3.5", "Mamba"])
@torch.no_grad()
def test_a_draw_is_that_of_its_row_whatever_the_order_of_the_calls(family):
    lm, ids = CachedLM(small(family), 3, 40), tokens_of(3, 20)
    sampling, uniform, rows = Sampling(1.0), [0.1, 0.5, 0.9], [2, 0, 1]
    read_on(lm, ids, [0, 1], [2, 2])
    out = lm.read(rows, [ids[2][:4], ids[0][2:8], ids[1][2:3]], 30, sampling, uniform)
    read = [torch.tensor([ids[row][:lm.cursor[row]]]) for row in rows]
    full = torch.stack([lm.model(x, use_cache=False).logits[0, -1, :30] for x in read])
    assert_close(out.logits, full)
    assert out.token.tolist() == sampling.draw(full, torch.tensor(uniform)).tolist()


def test_states_keep_the_types_that_a_bfloat16_model_gives_them():
    lm = CachedLM(small("Qwen3.5", 31).to(torch.bfloat16), 2, 40)
    lm.read([0, 1], [[3, 4, 5], [6]])
    states = lm.recurrent[0].states
    assert (states["conv"].dtype, states["recurrent"].dtype) == (torch.bfloat16, torch.float32)
    assert lm.read([1], [[7, 8]]).logits.isfinite().all()


def test_graphs_are_refused_for_recurrent_layers():
    with pytest.raises(ValueError, match="graphs=True: expected attention layers only, mamba has recurrent"):
        CachedLM(small("Mamba"), 1, 8, graphs=True)


@pytest.mark.parametrize("config, model, fields", [
    ("RecurrentGemmaConfig", "RecurrentGemmaForCausalLM", dict(num_hidden_layers=3, lru_width=16)),
    ("MiniMaxConfig", "MiniMaxForCausalLM", dict(
        num_hidden_layers=2, num_key_value_heads=1, num_local_experts=2)),
])
def test_families_that_were_not_tested_are_refused_by_name(config, model, fields):
    fields |= dict(hidden_size=16, intermediate_size=16, num_attention_heads=2)
    message = rf"model \({model}\) keeps a state .* and was not tested: .*qwen3_5_text"
    with pytest.raises(ValueError, match=message):
        CachedLM(built(config, model, **fields), 1, 8)


# ---- Forks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family, n", [
    ("Qwen2", 9), ("Qwen2", 5), ("Qwen2", 0), ("Gemma 3", 9), ("Gemma 3", 7), ("Gemma 4", 8),
    *((family, 9) for family in HYBRIDS)])
def test_a_fork_equals_reading_the_prefix(family, n):
    ids = tokens_of(5, 40, seed=6)
    lm, anew = CachedLM(small(family), 5, 40), CachedLM(small(family), 5, 40)
    read_on(lm, ids, [0, 1, 2, 3], [4, 9, 12, 3])  # row 4 is new, rows 2 and 3 have read something else
    places, before = [x.data_ptr() for x in held(lm)], [x.clone() for x in held(lm)]
    lm.fork(1, n, [4, 2, 3])
    assert lm.cursor == [4, 9, n, n, n] and [x.data_ptr() for x in held(lm)] == places
    for x, old in zip(held(lm), before):
        assert torch.equal(x[:2], old[:2])  # neither the source nor a bystander
        if x.shape[2] == 64:  # slots
            assert torch.equal(x[:, :, n:], old[:, :, n:])  # n tokens were copied, and no more
    ids = [ids[0], ids[1], *(ids[1][:n] + ids[row][n:] for row in (2, 3, 4))]
    lengths = {row: length for row, length in enumerate([4, 9, n, n, n]) if length}
    read_on(anew, ids, list(lengths), list(lengths.values()))
    for rows, lengths in (([4, 2], [1, 3]), ([0, 1, 2, 3, 4], [1, 1, 1, 1, 1]), ([1, 3], [2, 6])):
        out, expected = read_on(lm, ids, rows, lengths), read_on(anew, ids, rows, lengths)
        assert_close((out.logits, out.hidden), (expected.logits, expected.hidden))


@pytest.mark.parametrize("family", ["Qwen3.5", "LFM2", "Mamba-2", "Falcon-H1", "Mamba"])
def test_prompts_that_begin_alike_are_read_once(family):
    """The longest stops wherever another parts from it, since only then can its state be copied. Mamba would
    read token by token what follows a copy: there each reads for itself."""
    model, stem = small(family), tokens_of(1, 60, seed=3)[0]
    cuts = [59, 40, 40, 30, 17]
    ids, mask = loading.left_padded([stem[:n] + [2 + i] for i, n in enumerate(cuts)])
    options = dict(max_new_tokens=5, eos_token_id=[])
    alone = [stitch(model, model, row[keep.bool()][None], LLMOnly(), **options)
             for row, keep in zip(ids, mask)]
    result = stitch(model, model, ids, LLMOnly(), attention_mask=mask, **options)
    assert result.calls == [[call._replace(entropy=mine.entropy) for call, mine in zip(one.calls[0], ours)]
                            for one, ours in zip(alone, result.calls)]
    # 40 tokens of the stem, 19 more of the longest, and each row's own: 1 + 4
    assert result.n_read[1] == (sum(one.n_read[1] for one in alone) if family == "Mamba" else 59 + 5 * 5)


@pytest.mark.parametrize("arguments, message", [
    ((0, 6, [1]), "n=6: row 0 has read 5 tokens, expected no more"),
    ((1, 1, [2]), "n=1: row 1 has read 0 tokens, expected no more"),
    ((0, -1, [1]), "n=-1: expected an integer, 0 or more"), ((0, 2.5, [1]), "n=2.5: expected an integer"),
    ((0, 3, [3]), r"targets=\[3\]: expected different rows of 0 to 2"),
    ((0, 3, [-1]), r"targets=\[-1\]: expected different rows"),
    ((0, 3, [1, 1]), r"targets=\[1, 1\]: expected different rows"),
    ((0, 3, 1), "targets=1: expected different rows"),
    ((0, 3, [1, 0]), r"targets=\[1, 0\]: expected other rows than the source, 0"),
    ((3, 3, [1]), r"source=3: expected a row of 0 to 2"), ((None, 3, [1]), r"source=None: expected a row"),
    ((True, 0, [2]), r"source=True: expected a row"),
])
def test_forks_of_nothing_are_refused(arguments, message):
    lm = CachedLM(tiny(), 3, 20)
    lm.read([0], [[5, 6, 7, 8, 9]])
    with pytest.raises(ValueError, match=message):
        lm.fork(*arguments)
    assert lm.cursor == [5, 0, 0]


@pytest.mark.parametrize("family", ["Qwen3.5", "Falcon-H1", "Mamba"])
def test_forks_that_a_recurrent_state_cannot_give_are_refused(family):
    lm = CachedLM(small(family), 2, 20)
    lm.read([0], [[5, 6, 7]])
    with pytest.raises(ValueError, match="n=2: row 0 has read 3 tokens, expected as many, for the model"):
        lm.fork(0, 2, [1])
    lm.fork(0, 3, [1])
    lm.close()
    with pytest.raises(ValueError, match="this CachedLM is closed"):
        lm.fork(0, 3, [1])


@pytest.mark.parametrize("rows, message", [
    ([2], r"rows=\[2\]: expected different rows of 0 to 1"), (1, "rows=1: expected different rows"),
    ([0, 0], r"rows=\[0, 0\]: expected different rows")])
def test_rows_that_are_none_are_not_reset(rows, message):
    lm = CachedLM(tiny(), 2, 20)
    lm.read([0], [[5, 6]])
    with pytest.raises(ValueError, match=message):
        lm.reset(rows)
    assert lm.cursor == [2, 0]

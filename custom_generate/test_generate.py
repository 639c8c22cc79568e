"""Tests of R-Stitch inside `generate()` of transformers. What an option does is compared with plain generate
of each row's own unpadded prompt."""
import inspect
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
import scipy.stats
import torch
import transformers
from transformers.generation import (
    EosTokenCriteria,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    TopKLogitsWarper,
)

import rstitch
from conftest import IDS, VOCAB, answers, assert_same_calls, characters, prompts, tiny, untouchable
from custom_generate import generate as bridge
from rstitch import LLM, SLM, EntropyRouter, LLMOnly, RandomRouter, SLMOnly, stitch

torch.set_num_threads(1)  # models this small only lose by threads
ROOT = Path(__file__).parents[1]


def pair():
    return tiny("Qwen2", 1), tiny("Llama", 2)


def generate(models, ids, router=EntropyRouter(0.85), **options):
    ours = dict(custom_generate=rstitch.custom_generate, slm=models[0], router=router)
    return models[1].generate(ids, **ours | options)


@pytest.fixture
def processed(monkeypatch):
    """{row: [scores]}: what processors made of the logits of every proposal; calls of `generate` fill it."""
    seen = {}

    def spied(*args, process=None, **options):
        def spy(row, ids, logits):
            scores = process(row, ids, logits)
            seen.setdefault(row, []).append(scores.clone())
            return scores

        return stitch(*args, process=process and spy, **options)

    monkeypatch.setattr(rstitch, "stitch", spied)
    return seen


# ---- as stitch ---------------------------------------------------------------------------------------------


def test_generate_with_our_function_equals_stitch():
    ids, mask = prompts([4, 9, 6], seed=5)
    same = dict(attention_mask=mask, max_new_tokens=20)
    ours = stitch(*pair(), ids, EntropyRouter(0.85), **same)
    assert set(ours.source.unique().tolist()) >= {SLM, LLM}
    assert torch.equal(generate(pair(), ids, **same), ours.sequences)
    assert torch.equal(generate(pair(), ids, attention_mask=mask, max_length=9 + 20), ours.sequences)
    full = generate(pair(), ids, return_dict_in_generate=True, **same)
    assert torch.equal(full.sequences, ours.sequences) and torch.equal(full.source, ours.source)
    assert full.calls == ours.calls


def test_a_mask_without_padding_counts_where_prompts_begin_with_the_token_of_padding():
    ids = torch.tensor([[0, 5], [5, 6]])
    options = dict(attention_mask=torch.ones(2, 2), max_new_tokens=9)
    expected = stitch(*pair(), ids, EntropyRouter(0.85), **options)
    assert torch.equal(generate(pair(), ids, **options), expected.sequences)


@pytest.mark.parametrize("options, ours", [
    (dict(do_sample=True, temperature=0.7, top_k=7, top_p=0.8), dict(temperature=0.7, top_k=7, top_p=0.8)),
    (dict(do_sample=True), dict(temperature=1.0, top_k=50)),
    (dict(do_sample=True, top_k=0), dict(temperature=1.0)),
    (dict(do_sample=False, temperature=0.7), dict()), (dict(eos_token_id=17), dict(eos_token_id=17)),
    (dict(eos_token_id=[17, 30], pad_token_id=9), dict(eos_token_id=[17, 30], pad_token_id=9)),
    (dict(guidance_scale=1.0, num_beams=1, use_cache=True, low_memory=False, penalty_alpha=0), dict()),
])
def test_options_of_generate_are_those_of_stitch_and_need_no_processor(options, ours, processed):
    ids = torch.tensor([[5, 6], [7, 8]])
    expected = stitch(*pair(), ids, EntropyRouter(0.85), max_new_tokens=30, seed=4, **ours)
    assert torch.equal(generate(pair(), ids, max_new_tokens=30, seed=4, **options), expected.sequences)
    sampled = dict(num_return_sequences=3, **options | dict(do_sample=True))
    several = generate(pair(), ids, max_new_tokens=5, seed=4, **sampled)
    assert torch.equal(several[:, :2], ids.repeat_interleave(3, 0))
    assert len(set(map(tuple, several.tolist()))) > 2
    assert not processed


class Stream:
    """What a streamer was given."""

    def __init__(self):
        self.got = []

    def put(self, value):
        self.got.append(value.tolist())

    def end(self):
        self.got.append("end")


def test_streamer_gets_the_kept_tokens_in_order():
    stream = Stream()
    result = generate(pair(), IDS, streamer=stream, max_new_tokens=20, return_dict_in_generate=True)
    assert any(not call.kept for call in result.calls[0])
    kept = [[token] for token in answers(result)[0]]
    assert stream.got == [IDS.tolist(), *kept, "end"]  # generate() itself puts the prompt
    with pytest.raises(ValueError, match="streamer=Stream needs one row: got 2"):
        generate(pair(), IDS.repeat(2, 1), streamer=stream, max_new_tokens=2)


@pytest.mark.parametrize("router, alone", [(SLMOnly(), 0), (LLMOnly(), 1)])
def test_stop_strings_equal_those_of_generate(router, alone):
    tokenizer = characters()
    options = dict(max_new_tokens=30, eos_token_id=-1, tokenizer=tokenizer)
    for seed in range(4):
        ids, _ = prompts([5], seed)
        whole = pair()[alone].generate(ids, do_sample=False, **options)
        text = tokenizer.decode(whole[0, 5:])
        for stops in ([text[4:6]], [text[9:12], "zzz"], text[7], ["zzz"]):
            expected = pair()[alone].generate(ids, do_sample=False, stop_strings=stops, **options)
            assert torch.equal(generate(pair(), ids, router, stop_strings=stops, **options), expected)
        assert expected.shape == whole.shape  # the last one stops nowhere
    with pytest.raises(ValueError, match="stop_strings='a' needs the tokenizer"):
        generate(pair(), ids, stop_strings="a", max_new_tokens=3)


def test_stopping_criteria_and_max_time_are_asked_after_every_token():
    ids, mask = prompts([4, 9], seed=5)
    asked = []

    def criterion(sequence, scores):
        asked.append(sequence.shape)
        return torch.tensor([sequence.shape[1] == 9 + 6])

    result = generate(pair(), ids, attention_mask=mask, max_new_tokens=20, eos_token_id=-1,
                      return_dict_in_generate=True, stopping_criteria=[criterion])
    assert [len(a) for a in answers(result)] == [6, 6]
    assert sorted(asked) == sorted((1, 9 + n) for n in range(1, 7) for _ in range(2))
    assert generate(pair(), IDS, max_new_tokens=20, eos_token_id=-1, max_time=1e-6).shape == (1, 3)


def test_wrappers_of_our_function_lose_no_option():
    slm, llm = pair()
    stream, ours = Stream(), partial(rstitch.custom_generate, slm=slm, router=EntropyRouter(0.85))
    result = llm.generate(IDS, custom_generate=ours, streamer=stream, max_new_tokens=9)
    assert torch.equal(result, generate(pair(), IDS, max_new_tokens=9))
    assert len(stream.got) == result.shape[1]  # prompt, tokens, end
    with pytest.raises(ValueError, match="assistant_model=Qwen2ForCausalLM"):
        llm.generate(IDS, custom_generate=ours, assistant_model=slm, max_new_tokens=3)
    forbidden = Forbid(result[0, 2].item())
    positional = llm.generate(IDS, None, [forbidden], custom_generate=ours, max_new_tokens=9)
    assert positional[0, 2] != forbidden.token


def test_the_callers_own_criteria_count_also_where_stitch_has_the_like():
    options = dict(max_new_tokens=20, eos_token_id=-1)
    whole = generate(pair(), IDS, **options)
    criteria = [MaxLengthCriteria(7)]
    assert torch.equal(generate(pair(), IDS, stopping_criteria=criteria, **options), whole[:, :7])
    token = whole[0, 9].item()
    first = 1 + whole[0].tolist().index(token, 2)
    criteria = [EosTokenCriteria(token)]
    assert torch.equal(generate(pair(), IDS, stopping_criteria=criteria, **options), whole[:, :first])


def test_eos_that_the_caller_writes_is_taken_as_it_is():
    models = tiny.__wrapped__("Qwen2", 1), tiny.__wrapped__("Llama", 2)
    whole = answers(stitch(*models, IDS, EntropyRouter(0.85), max_new_tokens=20, eos_token_id=[]))[0]
    models[0].generation_config.eos_token_id = whole[4]
    cut = whole[:1 + whole.index(whole[4])]
    assert generate(models, IDS, max_new_tokens=20)[0, 2:].tolist() == cut  # the SLM's own
    assert generate(models, IDS, max_new_tokens=20, eos_token_id=1)[0, 2:].tolist() == whole


def test_seeds_that_nobody_gives_come_from_the_generator_of_torch():
    drawn = []
    for seed in (0, 0, 1):
        transformers.set_seed(seed)
        drawn.append(generate(pair(), IDS, do_sample=True, max_new_tokens=12, eos_token_id=-1).tolist())
    assert drawn[0] == drawn[1] != drawn[2]


# ---- logits processors -------------------------------------------------------------------------------------


class Forbid(transformers.LogitsProcessor):
    """A caller's own: no token `far` from the last one's id; it writes on what it is given."""

    def __init__(self, token: int, far: int = VOCAB):
        self.token, self.far = token, far

    def __call__(self, input_ids, scores):
        scores[:, self.token] = -torch.inf
        distance = (torch.arange(scores.shape[1]) - input_ids[:, -1:]).abs()
        return scores.masked_fill(distance > self.far, -torch.inf)


LENGTHS = [9, 1, 6]  # of the prompts; a forced first token is for one of one token only
EOS = 29  # ends the plain greedy answers of the first two rows, after 7 tokens and after 1
GREEDY_OPTIONS = {
    "repetition_penalty": dict(repetition_penalty=1.7),
    "encoder_repetition_penalty": dict(encoder_repetition_penalty=2.5),
    "no_repeat_ngram_size": dict(no_repeat_ngram_size=1),
    "encoder_no_repeat_ngram_size": dict(encoder_no_repeat_ngram_size=1, eos_token_id=-1),
    "bad_words_ids": dict(bad_words_ids=[[6], [18, 18], [EOS]]),
    "min_length": dict(min_length=17),
    "min_new_tokens": dict(min_new_tokens=9),
    "suppress_tokens": dict(suppress_tokens=[6, 18]),
    "begin_suppress_tokens": dict(begin_suppress_tokens=list(range(0, VOCAB, 2))),
    "forced_bos_token_id": dict(forced_bos_token_id=33),
    "forced_eos_token_id": dict(forced_eos_token_id=EOS, max_new_tokens=4),
    "exponential_decay_length_penalty": dict(exponential_decay_length_penalty=(1, 1.6), eos_token_id=3),
    "sequence_bias": dict(sequence_bias=[[[6], -4.0], [[26], 1.5], [[18, 3], 9.0]]),
    "renormalize_logits": dict(renormalize_logits=True),
    "remove_invalid_values": dict(remove_invalid_values=True, bad_words_ids=[[6], [5, 18]]),
    "logits_processor": dict(logits_processor=[Forbid(26, far=15)]),
    "logits_processor beside its like": dict(
        logits_processor=LogitsProcessorList([MinLengthLogitsProcessor(17, EOS)]), min_length=5),
    "prefix_allowed_tokens_fn": dict(
        prefix_allowed_tokens_fn=lambda batch_id, ids: range((batch_id + len(ids)) % 3, VOCAB, 3)),
    "several": dict(repetition_penalty=1.3, no_repeat_ngram_size=2, min_new_tokens=5, suppress_tokens=[6]),
}


def as_row(options: dict, row: int) -> dict:
    """The options where `row` of a batch is generated alone."""
    allowed = options.get("prefix_allowed_tokens_fn")
    return options | ({"prefix_allowed_tokens_fn": lambda _, ids: allowed(row, ids)} if allowed else {})


@pytest.mark.parametrize("name", GREEDY_OPTIONS)
def test_greedy_tokens_and_scores_equal_those_of_generate(name, processed):
    llm, (ids, mask) = pair()[1], prompts(LENGTHS, seed=5)
    plain = dict(do_sample=False, max_new_tokens=16, eos_token_id=EOS)
    options, changed = plain | GREEDY_OPTIONS[name], False
    ours = generate(pair(), ids, LLMOnly(), attention_mask=mask, **options)
    for row, n in enumerate(LENGTHS):
        expected = llm.generate(ids[row:row + 1, -n:], output_scores=True, return_dict_in_generate=True,
                                **as_row(options, row))
        tokens = expected.sequences[0, n:].tolist()
        answer = ours[row, max(LENGTHS):].tolist()
        assert answer == tokens + [0] * (len(answer) - len(tokens))
        assert len(processed[row]) == len(tokens)
        for got, scores in zip(processed[row], expected.scores):
            torch.testing.assert_close(got, scores[0], rtol=1e-4, atol=1e-4)
        without = {key: value for key, value in options.items() if key in plain}
        changed |= tokens != llm.generate(ids[row:row + 1, -n:], **without)[0, n:].tolist()
    assert changed == (name != "renormalize_logits")  # so the option was no matter of course


QWEN = dict(repetition_penalty=1.05, top_k=20, top_p=0.8, temperature=0.7)
SAMPLED_OPTIONS = {
    "min_p": dict(min_p=0.1, temperature=0.8, top_k=0), "top_h": dict(top_h=0.5, top_k=0),
    "typical_p": dict(typical_p=0.6, top_k=0), "epsilon_cutoff": dict(epsilon_cutoff=0.02, top_k=0),
    "eta_cutoff": dict(eta_cutoff=0.02, top_k=0), "Qwen2.5-Instruct": QWEN,
    "top_k and own": dict(top_k=30, logits_processor=[TopKLogitsWarper(4)]),  # instead of the other
    "after penalties": dict(repetition_penalty=1.5, suppress_tokens=[12], min_p=0.05, top_p=0.9,
                            renormalize_logits=True),
}


@pytest.mark.parametrize("name", SAMPLED_OPTIONS)
def test_scores_that_are_sampled_from_equal_those_of_generate(name, processed):
    llm, (ids, mask) = pair()[1], prompts(LENGTHS, seed=5)
    options = dict(do_sample=True, eos_token_id=-1, pad_token_id=0, **SAMPLED_OPTIONS[name])
    ours = generate(pair(), ids, LLMOnly(), attention_mask=mask, max_new_tokens=8, seed=1, **options)
    for row, n in enumerate(LENGTHS):
        own = ours[row:row + 1, max(LENGTHS) - n:]
        for t, got in enumerate(processed[row]):  # one token after what was drawn before it
            prefix = dict(inputs=own[:, :n + t], attention_mask=torch.ones(1, n + t))  # it may hold padding's
            expected = llm.generate(**prefix, max_new_tokens=1, output_scores=True,
                                    return_dict_in_generate=True, **options).scores[0][0]
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
            assert got.isinf().any()  # something was filtered out
        assert t == 7


@pytest.mark.parametrize("name", ["Qwen2.5-Instruct", "min_p", "typical_p"])
def test_draws_follow_the_processed_distribution(name):
    llm = tiny.__wrapped__("Llama", 2)
    embedding = llm.get_input_embeddings().weight
    embedding.data[:] = embedding.data[5].clone()  # it reads all tokens alike: the same logits everywhere
    prompt = torch.arange(VOCAB)[None]  # and the same penalties, as each token has been there
    options = dict(do_sample=True, eos_token_id=-1, pad_token_id=0, **SAMPLED_OPTIONS[name])
    rows, mask = prompt.expand(50, -1), torch.ones(50, VOCAB)
    drawn = generate((llm, llm), rows, LLMOnly(), attention_mask=mask, seed=0, max_new_tokens=400, **options)
    counts = drawn[:, VOCAB:].flatten().bincount(minlength=VOCAB).double()
    scores = llm.generate(prompt, attention_mask=mask[:1], max_new_tokens=1, output_scores=True,
                          return_dict_in_generate=True, **options).scores[0][0]
    expected = 20_000 * scores.double().softmax(-1)
    possible = expected > 0
    assert counts.sum() == 20_000 and not counts[~possible].any()
    assert possible.sum() > 4 and (~possible).sum() > 4
    assert expected[possible].min() > 10  # enough for chi-square
    assert scipy.stats.chisquare(counts[possible].numpy(), expected[possible].numpy()).pvalue > 1e-3


def test_the_model_that_qwen_ships_samples_as_its_generation_config_says(processed):
    models = tiny("Qwen2", 1), tiny.__wrapped__("Llama", 2)
    models[1].generation_config.update(do_sample=True, eos_token_id=[1, EOS], bos_token_id=3, **QWEN)
    ours, scores = generate(models, IDS, max_new_tokens=20, seed=3), processed.pop(0)
    written = dict(do_sample=True, eos_token_id=[1, EOS], **QWEN)
    assert torch.equal(ours, generate(pair(), IDS, max_new_tokens=20, seed=3, **written))
    torch.testing.assert_close(torch.stack(scores), torch.stack(processed[0]))


@torch.no_grad()
def reference(models, ids: list[int], tau: float, new_tokens: int, processors) -> list[tuple]:
    """R-Stitch for one row, greedy, without a cache: (model, position, token, kept) of every call. Tokens are
    of processed logits, entropies of raw ones."""
    calls, y, active = [], [], SLM
    while len(y) < new_tokens:
        sequence = torch.tensor([ids + y])
        logits = models[active](sequence).logits[:, -1].float()
        p = logits[0].double().softmax(-1)
        uncertain = -(p * p.log()).sum().item() / torch.tensor(VOCAB).log().item() > tau
        keep = not (active == SLM and uncertain)
        token = processors(sequence, logits.clone()).argmax().item()
        calls.append((active, len(y), token, keep))
        y += [token] * keep
        active = LLM if uncertain else SLM
    return calls


def test_both_models_are_processed_discarded_tokens_too():
    models, (ids, mask) = pair(), prompts([9, 5, 14], seed=5)
    raw = reference(models, ids[0, -9:].tolist(), 0.85, 15, lambda _, scores: scores)
    at = next(i for i, (*_, kept) in enumerate(raw) if not kept)  # the first proposal that is discarded
    options = dict(repetition_penalty=1.5, no_repeat_ngram_size=2, suppress_tokens=[raw[at][2]])
    result = generate(models, ids, attention_mask=mask, max_new_tokens=15, eos_token_id=-1,
                      return_dict_in_generate=True, **options)
    config = transformers.GenerationConfig(num_return_sequences=1, **options)
    processors = models[1]._get_logits_processor(config, 1)
    for row, n in enumerate([9, 5, 14]):
        expected = reference(models, ids[row, -n:].tolist(), 0.85, 15, processors)
        assert [(c.model, c.position, c.token, c.kept) for c in result.calls[row]] == expected
        discarded = [token for _, _, token, kept in expected if not kept]
        assert discarded and {m for m, _, _, kept in expected if kept} == {SLM, LLM}
    assert raw[at][2] not in {call.token for call in result.calls[0]}


@pytest.mark.parametrize("sampled", [False, True])
def test_a_row_is_processed_as_it_is_alone(sampled):
    ids, mask = prompts([3, 12, 7], seed=5)
    options = dict(QWEN, do_sample=sampled, min_new_tokens=4, no_repeat_ngram_size=3, max_new_tokens=12,
                   return_dict_in_generate=True, eos_token_id=EOS)
    router = RandomRouter(0.4, stay=0.5)
    together = generate(pair(), ids, router, attention_mask=mask, seed=3, **options)
    alone = [generate(pair(), ids[row:row + 1, -n:], router, seed=[together.seed[row]], **options)
             for row, n in enumerate([3, 12, 7])]
    assert_same_calls([result.calls[0] for result in alone], together.calls)


def test_prefix_function_gets_the_id_of_the_prompt_and_its_ids_without_padding():
    ids, mask = prompts([3, 5], seed=5)
    seen = []

    def allowed(batch_id, sent):
        seen.append((batch_id, sent.tolist()))
        return [batch_id + 5]

    out = generate(pair(), ids, attention_mask=mask, do_sample=True, num_return_sequences=2, max_new_tokens=2,
                   prefix_allowed_tokens_fn=allowed)
    assert out[:, 5:].tolist() == [[5, 5], [5, 5], [6, 6], [6, 6]]
    assert {(batch_id, *sent) for batch_id, sent in seen} == {
        (b, *ids[b, -n:].tolist(), *([b + 5] * t)) for b, n in enumerate([3, 5]) for t in range(2)}


def test_what_ends_an_answer_is_what_minimum_lengths_hold_back():
    models = tiny.__wrapped__("Qwen2", 1), tiny.__wrapped__("Llama", 2)
    ends = generate(models, IDS, LLMOnly(), max_new_tokens=20)[0, 3].item()
    models[0].generation_config.eos_token_id = ends  # the SLM's, which stitch takes too
    assert generate(models, IDS, LLMOnly(), max_new_tokens=20).shape[1] <= 4
    held = generate(models, IDS, LLMOnly(), max_new_tokens=20, min_new_tokens=6)
    assert held.shape[1] >= 8 and ends not in held[0, 2:8]


def test_scores_without_a_token_and_nan_logits_end_in_one_sentence():
    with pytest.raises(ValueError, match="process logits_processor returned scores whose largest is -inf, "
                                         "for row 0 at position 0 of the answer: expected a token to draw"):
        generate(pair(), IDS, max_new_tokens=3, suppress_tokens=list(range(VOCAB)))
    models = tiny("Qwen2", 1), tiny.__wrapped__("Llama", 2)
    models[1].get_output_embeddings().weight.data[3] = torch.nan
    with pytest.raises(FloatingPointError, match="the LLM's logits have a NaN in row 0 at position 0"):
        generate(models, IDS, LLMOnly(), max_new_tokens=3, remove_invalid_values=True)


def test_our_function_without_generate_takes_the_processors_that_it_is_given():
    config = transformers.GenerationConfig(max_length=6, do_sample=False, num_return_sequences=1)
    first = stitch(*pair(), IDS, LLMOnly(), max_new_tokens=4).sequences[0, 2].item()
    out = rstitch.custom_generate(pair()[1], IDS, slm=pair()[0], router=LLMOnly(), generation_config=config,
                                  stopping_criteria=[], logits_processor=LogitsProcessorList([Forbid(first)]))
    assert out.shape == (1, 6) and out[0, 2] != first


# ---- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("options, message", [
    (dict(num_beams=2), "num_beams=2 cannot be followed by custom_generate: expected None or 1"),
    (dict(assistant_model=lambda: tiny()), "assistant_model=Qwen2ForCausalLM"),
    (dict(guidance_scale=2.0), "guidance_scale=2.0"), (dict(output_scores=True), "output_scores=True"),
    (dict(use_cache=False), "use_cache=False .*expected None or True"),
    (dict(cache_implementation="static"), "cache_implementation='static' .*None or dynamic or dynamic_full"),
    (dict(position_ids=IDS), "position_ids=Tensor"), (dict(penalty_alpha=0.6), "penalty_alpha=0.6"),
    (dict(past_key_values=lambda: transformers.DynamicCache()), "(past_key_values|cache)=DynamicCache"),
    (dict(watermarking_config=transformers.WatermarkingConfig()), "watermarking_config=WatermarkingConfig"),
    (dict(synced_gpus=True), "synced_gpus=True"), (dict(slm=None), "slm is missing"),
    (dict(router=None), "router is missing"),
    (dict(logits_processor=[SynthIDTextWatermarkLogitsProcessor(5, [1, 2], 16, 0, 8, "cpu")]),
     "logits_processor has a SynthIDTextWatermarkLogitsProcessor, which remembers"),
])
def test_options_that_stitching_cannot_follow_are_refused_by_name(options, message):
    models = tiny.__wrapped__("Qwen2", 1), tiny.__wrapped__("Llama", 2)
    options = {k: v() if k in ("assistant_model", "past_key_values") else v for k, v in options.items()}
    for model in models:
        untouchable(model)
    with pytest.raises(ValueError, match=message):
        generate(models, IDS, **dict(max_new_tokens=3) | options)


REFUSED = """num_beams num_beam_groups constraints force_words_ids assistant_model prompt_lookup_num_tokens
    assistant_early_exit penalty_alpha dola_layers guidance_scale negative_prompt_ids watermarking_config
    negative_prompt_attention_mask token_healing output_scores output_logits output_attentions use_cache
    output_hidden_states cache_implementation cache_config prefill_chunk_size low_memory synced_gpus
    compile_config""".split()


def test_every_option_of_generate_has_one_place():
    kinds = [bridge.HONOURED, bridge.PROCESSED, bridge.NEUTRAL]
    options = {name for name in vars(transformers.GenerationConfig()) if not name.startswith("_")}
    options |= inspect.signature(transformers.GenerationMixin.generate).parameters.keys() - {"self", "kwargs"}
    assert sum(map(len, kinds)) == len(frozenset.union(*kinds)) and options >= set(REFUSED)
    assert not set(REFUSED) & frozenset.union(*kinds)
    for name in options - frozenset.union(*kinds):  # whatever transformers adds is among them
        config = transformers.GenerationConfig()
        vars(config).update({name: "something"} if hasattr(config, name) else {})
        with pytest.raises(ValueError, match=f"^{name}='something' cannot be followed by custom_generate"):
            bridge.check_generation(config, {name: "something"})


def test_a_field_that_a_new_transformers_adds_refuses_nothing_at_its_default(monkeypatch):
    made = transformers.GenerationConfig.__init__

    def newer(self, **fields):
        novelty = fields.pop("novelty", "usual")
        made(self, **fields)
        self.novelty = novelty

    monkeypatch.setattr(transformers.GenerationConfig, "__init__", newer)
    expected = stitch(*pair(), IDS, EntropyRouter(0.85), max_new_tokens=5).sequences
    assert torch.equal(generate(pair(), IDS, max_new_tokens=5), expected)
    config = transformers.GenerationConfig(novelty="much", max_new_tokens=5)
    with pytest.raises(ValueError, match="^novelty='much' cannot be followed .*: expected None or usual"):
        generate(pair(), IDS, generation_config=config)


# ---- the layout of a repository ----------------------------------------------------------------------------


@pytest.fixture
def modules_cache(tmp_path, monkeypatch):
    """transformers keeps the copies that it runs in a folder of this test."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path / "modules"


@pytest.fixture
def lone_copy(tmp_path):
    """A folder that holds this file, as transformers wants it, and nothing else."""
    (tmp_path / "elsewhere" / "custom_generate").mkdir(parents=True)
    shutil.copy(bridge.__file__, tmp_path / "elsewhere" / "custom_generate")
    return tmp_path / "elsewhere"


@pytest.mark.parametrize("where", ["the repository", "a copy"])
def test_the_folder_form_equals_the_function(where, modules_cache, lone_copy):
    slm, llm = pair()
    ids, mask = prompts([4, 9], seed=5)
    folder, stream = str(ROOT if where == "the repository" else lone_copy), Stream()
    options = dict(repetition_penalty=1.5, do_sample=True, seed=3, max_new_tokens=12)
    options |= dict(attention_mask=mask, return_dict_in_generate=True)
    by_folder = partial(llm.generate, custom_generate=folder, trust_remote_code=True, slm=slm,
                        router=EntropyRouter(0.85))
    result = by_folder(inputs=ids, revision="main", **options)
    assert_same_calls(result.calls, generate(pair(), ids, **options).calls)
    assert len(list(modules_cache.rglob("generate.py"))) == 1
    assert by_folder(IDS, streamer=stream, max_new_tokens=4).shape == (1, 6) and len(stream.got) == 6
    with pytest.raises(ValueError, match="num_beams=3 cannot be followed"):
        by_folder(IDS, num_beams=3, max_new_tokens=3)
    with pytest.raises(ValueError, match="slm is missing"):
        by_folder(IDS, slm=None, max_new_tokens=3)


def test_a_checkpoint_that_comes_with_the_file_calls_itself_once():
    slm, llm = tiny("Qwen2", 1), tiny.__wrapped__("Llama", 2)
    expected = generate((slm, llm), IDS, max_new_tokens=9)
    llm.generate = partial(bridge.generate, model=llm)  # what from_pretrained makes of such a checkpoint
    again = llm.generate(inputs=IDS, slm=slm, router=EntropyRouter(0.85), max_new_tokens=9)
    assert torch.equal(again, expected)


def test_a_copy_says_what_it_needs_where_rstitch_is_not_installed(modules_cache, lone_copy, monkeypatch):
    slm, llm = pair()
    monkeypatch.setitem(sys.modules, "rstitch", None)
    with pytest.raises(ImportError, match="needs rstitch, which is not installed here: run `pip install` on"):
        llm.generate(IDS, custom_generate=str(lone_copy), trust_remote_code=True, slm=slm, router=LLMOnly(),
                     max_new_tokens=3)


def test_rstitch_lends_its_name_to_our_function_alone():
    assert rstitch.custom_generate is bridge.custom_generate
    with pytest.raises(AttributeError, match="module 'rstitch' has no attribute 'custom_generated'"):
        rstitch.custom_generated

"""What people bring: checkpoints of every kind, by name, folder or file, and how a question becomes a prompt.

Tiny models and tokenizers are built here as the hub has them. Each is run token for token as `generate()`
runs it, or refused in one sentence that says what to do. """
import copy
import json
import math
import warnings

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, TorchAoConfig

import rstitch
from conftest import answers, prompts, tiny, words
from rstitch import (
    LLM,
    SLM,
    CachedLM,
    EntropyRouter,
    LLMOnly,
    RandomRouter,
    SLMOnly,
    encode,
    load_pair,
    stitch,
)
from rstitch_hf import command, loading

CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}{% "
          "if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and not "
          "enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}")
TEXT = ["What is 2 + 3? It is 5.", "One more time,\nthen 1 + 2 is 3.", "hello world, this is a test\nof "
        "white space"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_level(eos: str | None = "<|im_end|>", pad: str | None = None,
               template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """As Qwen's, Llama 3's and R1's are: every byte is known, so there is no unknown token; no BOS, often no
    pad."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(
        add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXT,
                                  trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet,
                                                      show_progress=False))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, pad_token=pad,
                                   chat_template=template)


VOCAB = len(byte_level())
ENDOFTEXT, IM_START, IM_END = range(VOCAB - 3, VOCAB)


def saved(folder, name: str, seed: int, tokenizer=None, family: str = "Qwen2", vocab: int = VOCAB,
          ends=IM_END, **changes) -> str:
    """A tiny random checkpoint on disk."""
    model = tiny.__wrapped__(family, seed,
                             **dict(vocab_size=vocab, pad_token_id=None, eos_token_id=ends) | changes)
    model.save_pretrained(folder / name)
    (tokenizer or byte_level()).save_pretrained(folder / name)
    return str(folder / name)


@pytest.fixture
def folder(tmp_path):
    """slm and llm, byte-level tokenizers without unknown, pad and BOS token, as Qwen's."""
    saved(tmp_path, "slm", 1)
    saved(tmp_path, "llm", 2, family="Llama")
    return tmp_path


def assert_runs_as_generate(slm, llm, tokenizer, n: int = 12):
    """Either model alone writes what its own generate() writes for the unpadded prompt, and the two are
    stitched."""
    questions = ["What is 2 + 3?", "hello world"]
    ids, mask = encode(tokenizer, *questions)
    for model, router in ((slm, SLMOnly()), (llm, LLMOnly())):
        result = stitch(slm, llm, ids, router, attention_mask=mask, max_new_tokens=n)
        ends = [e for m in (slm, llm)
                for e in torch.as_tensor(m.generation_config.eos_token_id or []).flatten().tolist()]
        for row, keep, got in zip(ids, mask, answers(result)):
            prompt = row[keep.bool()][None]
            plain = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                                   max_new_tokens=n, pad_token_id=0, eos_token_id=ends or None)
            assert plain[0, prompt.shape[1]:].tolist() == got
    mixed = stitch(slm, llm, ids, RandomRouter(0.5), attention_mask=mask, max_new_tokens=30, eos_token_id=[])
    assert set(mixed.source.unique().tolist()) == {SLM, LLM}


def run_command(capsys, slm: str, llm: str, *argv: str) -> str:
    command.main(["--slm", slm, "--llm", llm, "--device", "cpu", "--max-new-tokens", "8", "What is 2 + 3?",
                  *argv])
    return capsys.readouterr().out


# ---- tokenizers --------------------------------------------------------------------------------------------


def test_a_pair_without_unknown_pad_and_bos_token_runs_at_the_first_command(folder, capsys):
    slm, llm, tokenizer = load_pair(str(folder / "slm"), str(folder / "llm"))
    assert tokenizer.unk_token_id is tokenizer.pad_token_id is tokenizer.bos_token_id is None
    assert_runs_as_generate(slm, llm, tokenizer)
    assert "8 tokens (LLM" in run_command(capsys, str(folder / "slm"), str(folder / "llm"), "--tau", "0.7")


def test_without_a_chat_template_the_question_stands_as_it_is(tmp_path):
    names = [saved(tmp_path, name, seed, byte_level(template=None))
             for name, seed in (("slm", 1), ("llm", 2))]
    slm, llm, tokenizer = load_pair(*names)
    ids, _ = encode(tokenizer, "hello world", instruction="One more time")
    assert tokenizer.decode(ids[0]) == "hello world\nOne more time"
    assert_runs_as_generate(slm, llm, tokenizer)


@pytest.mark.parametrize("config, eos, ends", [
    # Qwen2.5 base models: <|im_end|> stands in the template only
    (ENDOFTEXT, "<|endoftext|>", [ENDOFTEXT, IM_END]),
    ([ENDOFTEXT], "<|im_end|>", [ENDOFTEXT, IM_END]), (None, "<|im_end|>", [IM_END]),
    ([IM_END, ENDOFTEXT], "<|im_end|>", [IM_END, ENDOFTEXT]),
    (IM_END, "<|im_end|>", IM_END),  # nothing to add
])
def test_what_ends_an_answer_is_completed(tmp_path, config, eos, ends):
    names = [saved(tmp_path, name, seed, byte_level(eos), ends=config)
             for name, seed in (("slm", 1), ("llm", 2))]
    slm, llm, tokenizer = load_pair(*names)
    assert slm.generation_config.eos_token_id == llm.generation_config.eos_token_id == ends
    assert loading.turn_end(tokenizer) == IM_END
    head = slm.get_output_embeddings().weight.data
    # now the likeliest
    head[IM_END] = 50 * head[stitch(slm, llm, encode(tokenizer, "hello")[0], SLMOnly(),
                                    max_new_tokens=1).calls[0][0].token]
    assert answers(stitch(slm, llm, encode(tokenizer, "hello")[0], SLMOnly(),
                          max_new_tokens=9))[0] == [IM_END]


@pytest.mark.parametrize("template, end", [(CHATML, IM_END), ("{% for m in messages %}{{ m['content'] }}{% "
                                                              "endfor %}", None), (None, None),
                                           ("{{ raise_exception('no conversations') }}", None),
                                           ("{% for m in messages %}{{ m['content'] }}.{% endfor %}", None),
                                           (
                                               "{% for m in messages %}{{ m['content'] }}<|endoftext|>{% "
                                               "endfor %}", ENDOFTEXT), ("{{ messages[0]['content'] "
                                                                         "}}<|im_end|>", None)])
def test_the_token_that_ends_a_turn(template, end):
    assert loading.turn_end(byte_level(template=template)) == end


def test_a_tokenizer_that_loses_white_space_is_refused(folder, capsys):
    right = AutoTokenizer.from_pretrained(folder / "llm")
    loading.check_white_space("--llm", right)
    # knows none of the words, and so loses no space between them
    loading.check_white_space("--llm", words(9))
    right.backend_tokenizer.decoder = decoders.Fuse()
    # what a sentencepiece class makes of byte-level merges
    right.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(ValueError, match=r"--llm: its tokenizer .* reads 'One more time,\\nthen .*' as "
                       r"'onemoretime,then1\+2is3.', without its white space"):
        loading.check_white_space("--llm", right)


def test_a_byte_level_tokenizer_under_the_name_of_another_kind_is_read_right_or_refused(folder):
    """As R1-Distill's is saved. transformers before 5.22 loses all spaces, silently."""
    for name in ("slm", "llm"):
        path = folder / name / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "LlamaTokenizerFast"}))
    *_, tokenizer = load_pair(str(folder / "slm"), str(folder / "llm"))
    assert tokenizer.decode(tokenizer(TEXT[1]).input_ids) == TEXT[1]


# ---- logit columns and embeddings --------------------------------------------------------------------------


@pytest.mark.parametrize("widths", [(VOCAB, VOCAB + 8), (VOCAB + 8, VOCAB)])
@pytest.mark.parametrize("tied", [False, True])
def test_columns_beyond_the_tokenizer_are_padding(tmp_path, widths, tied):
    names = [saved(tmp_path, name, seed, vocab=width, tie_word_embeddings=tied)
             for name, seed, width in (("slm", 1, widths[0]), ("llm", 2, widths[1]))]
    slm, llm, tokenizer = load_pair(*names)
    for model in (slm, llm):
        model.get_output_embeddings().weight.data[VOCAB:] = 0  # random ones might win
    assert_runs_as_generate(slm, llm, tokenizer)


@pytest.mark.parametrize("narrow", ["--slm", "--llm"])
def test_columns_that_are_tokens_are_not_cut(tmp_path, narrow):
    names = [saved(tmp_path, option[2:], 1, vocab=VOCAB - (option == narrow))
             for option in ("--slm", "--llm")]
    with pytest.raises(ValueError, match=rf"{narrow} has {VOCAB - 1} logit columns, but token {VOCAB - 1} is "
                       r"'<\|im_end\|>' in the tokenizer"):
        load_pair(*names)


# ---- kinds of checkpoints ----------------------------------------------------------------------------------


def write_gguf(path, model, tokenizer) -> None:
    """A Qwen2 in float32, as llama.cpp writes it."""
    gguf = pytest.importorskip("gguf")
    config, writer = model.config, gguf.GGUFWriter(path, "qwen2")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if token in SPECIAL else gguf.TokenType.NORMAL
                            for token in tokens])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge)
                             for merge in state["model"]["merges"]])
    writer.add_eos_token_id(ENDOFTEXT)
    writer.add_chat_template(CHATML)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
             "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
             "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
             "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
             "post_attention_layernorm": "ffn_norm", "model.layers.": "blk."}
    for name, tensor in model.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_files_run_as_what_they_were_made_of(folder, capsys):
    slm, llm, _ = load_pair(str(folder / "slm"), str(folder / "slm"))
    write_gguf(folder / "slm.gguf", slm, byte_level())
    packed, _, tokenizer = load_pair(str(folder / "slm.gguf"), str(folder / "slm.gguf"), dtype="float32")
    ids, _ = encode(tokenizer, *TEXT[1:])
    assert tokenizer.batch_decode(ids[:1]) == byte_level().batch_decode(ids[:1]) and TEXT[
        1] in tokenizer.decode(ids[0])
    # the file names the first, its chat template the second
    assert packed.generation_config.eos_token_id == [ENDOFTEXT, IM_END]
    torch.testing.assert_close(packed(ids).logits, slm(ids).logits)
    assert_runs_as_generate(packed, llm, tokenizer)
    assert "tokens/s" in run_command(capsys, str(folder / "slm.gguf"), str(folder / "slm.gguf"), "--tau",
                                     "0.7")


@pytest.mark.parametrize("name, message", [("nothing.gguf", "there is no such file; expected FILE.gguf, or "
                                            "REPO:FILE.gguf of Hugging Face"),
                                           ("no/such/folder", "there is no such folder"),
                                           ("./folder", "there is no such folder")])
def test_paths_that_lead_nowhere_are_refused(name, message):
    with pytest.raises(ValueError, match=f"--slm {name}: {message}"):
        loading.located("--slm", name)


def test_gguf_files_of_the_hub_are_named_with_their_repository():
    assert loading.located("--slm",
                           "Qwen/Qwen2.5-0.5B-Instruct-GGUF:q4.gguf") == ("Qwen/Qwen2.5-0.5B-Instruct-GGUF",
                                                                          {"gguf_file": "q4.gguf"})


def adapted(base, kind: str = "LoraConfig", **config):
    """A PEFT model whose adapter does something, or with init_lora_weights=True does nothing yet."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = config or dict(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    return peft.get_peft_model(base, getattr(peft, kind)(**config)).eval()


def test_adapters_count(folder, capsys):
    slm, llm, tokenizer = load_pair(str(folder / "slm"), str(folder / "llm"))
    ids, _ = encode(tokenizer, "hello")
    before = answers(stitch(slm, llm, ids, SLMOnly(), max_new_tokens=12))
    model = adapted(slm)
    assert_runs_as_generate(model, llm, tokenizer)
    with_adapter = answers(stitch(model, llm, ids, SLMOnly(), max_new_tokens=12))
    assert with_adapter != before
    model.save_pretrained(folder / "adapter")  # adapter_config.json names its base; there is no tokenizer
    config = folder / "adapter" / "adapter_config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(folder / "slm")}))
    loaded, llm, tokenizer = load_pair(str(folder / "adapter"), str(folder / "llm"))
    assert answers(stitch(loaded, llm, ids, SLMOnly(), max_new_tokens=12)) == with_adapter
    assert "tokens/s" in run_command(capsys, str(folder / "adapter"), str(folder / "llm"))


def test_adapters_of_virtual_tokens_are_refused():
    model = adapted(tiny.__wrapped__(), "PromptTuningConfig", task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match="slm has an adapter of virtual tokens: expected one that lives in "
                       "the layers, such as LoRA"):
        stitch(model, tiny("Llama"), torch.tensor([[5, 6]]), SLMOnly(), max_new_tokens=2)


@pytest.mark.parametrize("how", ["torch.compile", "model.compile", "compiled adapter"])
def test_compiled_models_run_and_nothing_of_theirs_is_compiled_anew(how):
    slm, llm = tiny.__wrapped__("Qwen2", 1), tiny("Llama", 2)
    ids, mask = prompts([4, 9, 6])
    expected = stitch(slm, llm, ids, EntropyRouter(0.85), attention_mask=mask, max_new_tokens=20)
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    if how == "model.compile":
        slm.compile(backend=backend)
    elif how == "compiled adapter":
        slm = torch.compile(adapted(slm, r=4, target_modules=["q_proj"], init_lora_weights=True),
                            backend=backend)
    else:
        slm = torch.compile(slm, backend=backend)
    for _ in range(2):
        result = stitch(slm, llm, ids, EntropyRouter(0.85), attention_mask=mask, max_new_tokens=20)
        assert torch.equal(result.sequences, expected.sequences) and not compiled
    slm(ids)
    assert compiled  # by itself it still is


def test_models_quantised_by_torchao_run(folder, capsys):
    quantization = pytest.importorskip("torchao.quantization")
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    quantised = AutoModelForCausalLM.from_pretrained(folder / "slm", quantization_config=config,
                                                     dtype=torch.float32).eval()
    _, llm, tokenizer = load_pair(str(folder / "slm"), str(folder / "llm"))
    assert_runs_as_generate(quantised, llm, tokenizer)
    quantised.save_pretrained(folder / "int8")
    byte_level().save_pretrained(folder / "int8")
    loaded, llm, tokenizer = load_pair(str(folder / "int8"), str(folder / "llm"), dtype="float32")
    assert "Int8" in type(loaded.model.layers[0].mlp.up_proj.weight).__name__
    assert_runs_as_generate(loaded, llm, tokenizer)
    assert "tokens/s" in run_command(capsys, str(folder / "int8"), str(folder / "llm"))
    whole = tiny.__wrapped__("Qwen2", 1)
    quantization.quantize_(whole, quantization.Int8WeightOnlyConfig())  # the output embedding too
    ids, _ = prompts([5])
    assert torch.equal(stitch(whole, whole, ids, SLMOnly(), max_new_tokens=8).sequences,
                       whole.generate(ids, do_sample=False, max_new_tokens=8))
    assert rstitch.fingerprint(whole) == rstitch.fingerprint(whole) != rstitch.fingerprint(tiny("Qwen2", 1))


def test_a_refused_router_tells_that_float16_may_be_why(tmp_path):
    plain, half = tiny("Qwen2", 1), tiny.__wrapped__("Qwen2", 1).half()
    assert rstitch.fingerprint(plain) == rstitch.fingerprint(tiny.__wrapped__("Qwen2", 1).bfloat16())
    (tmp_path / "made.json").write_text(json.dumps({"slm": rstitch.fingerprint(plain)}))
    assert rstitch.made_of(tmp_path, plain)
    with pytest.raises(ValueError, match="another SLM: .*, which in float16 may be of the same weights"):
        rstitch.made_of(tmp_path, half)


# ---- prompts -----------------------------------------------------------------------------------------------


def text_of(*questions, tokenizer=None, **options) -> str:
    tokenizer = tokenizer or byte_level()
    ids, mask = encode(tokenizer, *questions, **options)
    return tokenizer.decode(ids[0][mask[0].bool()])


def test_prompts_by_hand():
    user = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert text_of("hello") == user
    assert text_of("hello", system="Be brief.") == "<|im_start|>system\nBe brief.<|im_end|>\n" + user
    assert text_of("hello", instruction="Think.") == user.replace("hello", "hello\nThink.")
    assert text_of("hello", enable_thinking=False) == user + "<think>\n\n</think>\n\n"
    assert text_of("hello", enable_thinking=True) == user
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
             {"role": "user", "content": "c"}]
    assert text_of(turns, instruction="Think.") == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>user\nc\nThink.<|im_end|>\n<|im_start|>assistant\n")
    assert turns[2]["content"] == "c"  # the caller's own messages stay as they are
    ids, mask = encode(byte_level(pad="<|endoftext|>"), "hello", turns)
    assert ids.shape == mask.shape and ids[0, 0] == ENDOFTEXT and mask.sum(1).tolist() == [
        len(encode(byte_level(), q)[0][0]) for q in ("hello", turns)]
    ends = byte_level()  # without a pad, what is decoded as nothing stands in its place
    assert encode(ends, "hello", turns)[0][0, 0] == ends.eos_token_id != 0


@pytest.mark.parametrize("questions, options, message",
                         [(["hello"], dict(enable_thinkin=False), "enable_thinkin=False: the chat template "
                           "of this tokenizer has no such option"), ([""], {}, "question='': expected a "
                                                                     "text, or a list of messages"),
                          ([["a", "b"]], {}, "give several as several arguments"),
                          ([[]], {}, r"question=\[\]"), ([[{"role": "user"}]], {}, "expected messages with a "
                                                         "role and a content"),
                          ([[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]], {},
                           "the last of which is to be answered"),
                          ([], {}, "expected one or more"),
                          ([[{"role": "user", "content": [{"type": "text", "text": "a"}]}]],
                           dict(instruction="b"), "a text as the content of a message, not its parts"),
                          ([[{"role": "user", "content": None}]], {}, "expected a text as the content"),
                          ([[{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]],
                           dict(system="c"), "system='c': the messages begin with a system message")])
def test_prompts_that_would_not_be_what_was_asked_for_are_refused(questions, options, message):
    with pytest.raises(ValueError, match=message):
        encode(byte_level(), *questions, **options)


@pytest.mark.parametrize("options, what",
                         [(dict(system="a"), "system='a'"), (dict(enable_thinking=False), "enable_thinking"),
                          ({}, "a list of messages")])
def test_without_a_chat_template_nothing_is_ignored(options, what):
    question = "hello" if options else [{"role": "user", "content": "a"}]
    with pytest.raises(ValueError, match=f"{what}: this tokenizer has no chat template"):
        encode(byte_level(template=None), question, **options)


def test_a_template_that_refuses_a_system_message_says_so():
    strict = ("{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
              "{{ messages[0]['content'] }}")
    with pytest.raises(ValueError, match="the chat template of this tokenizer refuses the messages: no "
                       "system here"):
        encode(byte_level(template=strict), "hello", system="a")


def test_the_command_prompts_as_encode_does(folder, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(command, "run_question",
                        lambda slm, llm, tokenizer, ids, router,
                        **options: seen.append((tokenizer.decode(ids[0]), router, options)))
    run_command(capsys, str(folder / "slm"), str(folder / "llm"), "--system", "S", "--instruction", "I",
                "--template", "enable_thinking=false", "--temperature", "0.7", "--top-k", "5", "--top-p",
                "0.9", "--tau", "0.1", "--tau-back", "0.2", "--window", "3", "--seed", "4")
    text, router, options = seen[0]
    assert text == text_of("What is 2 + 3?", system="S", instruction="I", enable_thinking=False)
    assert router == EntropyRouter(0.1, window=3, tau_back=0.2)
    assert options == dict(max_new_tokens=8, temperature=0.7, top_k=5, top_p=0.9, seed=4)
    for value, parsed in (("a=1", ("a", 1)), ("a=x", ("a", "x")), ("a=[1]", ("a", [1])),
                          ("a=true", ("a", True))):
        assert command.template_option(value) == parsed


def test_the_command_is_greedy_whatever_the_checkpoint_asks_for(folder, capsys):
    for name in ("slm", "llm"):
        path = folder / name / "generation_config.json"
        path.write_text(
            json.dumps(
                json.loads(path.read_text()) | dict(do_sample=True, temperature=5.0, top_k=7,
                                                    repetition_penalty=1.5)))
    pair = str(folder / "slm"), str(folder / "llm")
    slm, llm, tokenizer = load_pair(*pair)
    ids, _ = encode(tokenizer, "What is 2 + 3?")
    greedy = tokenizer.decode(answers(stitch(slm, llm, ids, EntropyRouter(0.7), max_new_tokens=8))[0],
                              skip_special_tokens=True)
    assert run_command(capsys, *pair, "--tau", "0.7", "--seed", "1").startswith(greedy)


# ---- trained routers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("router", ["r2r", "plus"])
def test_trained_routers_of_the_pocket_pair_run_from_the_command_line(router, capsys):
    question = ("Ann has 596 coins. First Ann ends up with 7 times as many. Finally Ann loses 120. "
                "How many coins does Ann have?")
    command.main(["--router", router, "--device", "cpu", "--max-new-tokens", "40", question])
    plain, line, _ = capsys.readouterr().out.split("\n")
    assert "router's net" in line and " ms a decision, " in line and line.endswith("% of the time")
    slm, llm, tokenizer = load_pair(str(command.POCKET / "slm"), str(command.POCKET / "llm"), dtype="float32")
    kind = {"r2r": rstitch.R2RRouter, "plus": rstitch.PolicyRouter}[router]
    ids, _ = encode(tokenizer, question)
    result = stitch(slm, llm, ids, kind.load(command.CHECKPOINTS[router], slm, llm), max_new_tokens=40)
    assert plain == tokenizer.decode(answers(result)[0], skip_special_tokens=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # another threshold than the calibrated one
        command.main(["--router", router, "--threshold", "1", "--device", "cpu", "--max-new-tokens", "9",
                      question])
    assert "(LLM 0.0 %)" in capsys.readouterr().out


@pytest.mark.parametrize("argv, message", [(["--router", "r2r"], "--router r2r needs --checkpoint FOLDER for "
                                            "this pair: train one with python -m analysis.train_r2r --slm"),
                                           (["--router", "plus"], "--router plus needs --checkpoint FOLDER "
                                            "for this pair: train one with python -m analysis.train_policy"),
                                           (["--router", "r2r", "--checkpoint", "analysis"], "analysis holds "
                                            "no trained router: expected a folder with made.json"),
                                           (["--threshold", "0.5"], "--threshold 0.5 belongs to --router r2r "
                                            "or plus, not to --router entropy"),
                                           (["--router", "r2r", "--checkpoint", "x", "--threshold", "1.5"],
                                            "--threshold 1.5: expected a score in [0, 1]"),
                                           (["--router", "r2r", "--checkpoint", "x", "--tau", "0.1"],
                                            "--tau 0.1 belongs to --router entropy, not to --router r2r"),
                                           (["--router", "slm", "--window", "2"], "--window 2 belongs to "
                                            "--router entropy"), (["--tau-back", "3"], "tau_back=3.0: "
                                                                  "expected"),
                                           (["--window", "0"], "window=0"),
                                           (["--top-k", "3"], "--top-k 3 needs a --temperature above 0"),
                                           (["--graphs"], "graphs=True: expected a model on one CUDA device"),
                                           (["--template", "x"], "'x': expected KEY=VALUE"),
                                           (["--template", "nope=1"], "nope=1: the chat template of this "
                                            "tokenizer has no such option"),
                                           (["--tau", "0.1", "--max-new", "3"], "unrecognized arguments: "
                                            "--max-new")])
def test_the_command_refuses_what_it_would_ignore(folder, capsys, argv, message):
    with pytest.raises(SystemExit):
        run_command(capsys, str(folder / "slm"), str(folder / "llm"), *argv)
    assert message in capsys.readouterr().err


def test_a_router_of_another_pair_is_refused(folder, capsys):
    slm, llm, _ = load_pair(str(folder / "slm"), str(folder / "llm"))
    for kind, name in ((rstitch.R2RRouter, "r2r"), (rstitch.PolicyRouter, "plus")):
        with pytest.raises(ValueError, match="was made for another SLM: expected weights with fingerprint"):
            kind.load(command.CHECKPOINTS[name], slm, llm)
        other = command.CHECKPOINTS["plus" if name == "r2r" else "r2r"]
        pocket = [m for m in load_pair(str(command.POCKET / "slm"), str(command.POCKET / "llm"),
                                       dtype="float32")[:2]]
        with pytest.raises(ValueError, match="expected the folder of another kind of router"):
            kind.load(other, *pocket)


def test_the_threshold_of_a_policy_is_a_probability():
    policy = rstitch.Policy(32, start=0.3)  # p = 0.3 everywhere
    step = rstitch.Step([0], [0], torch.zeros(1, 40), torch.zeros(1, 32), torch.zeros(1, dtype=torch.long),
                        torch.full((1,), 3.0), torch.zeros(1), torch.ones(1), torch.zeros(1, 0))
    calls = {threshold: rstitch.PolicyRouter(policy, 0.0, threshold=threshold).leave_slm(step).item()
             for threshold in (0.0, 0.29, 0.31, 0.5, 1.0)}
    assert calls == {0.0: True, 0.29: True, 0.31: False, 0.5: False, 1.0: False}
    for threshold in (-0.1, 1.1, math.nan, "high"):
        with pytest.raises(ValueError, match=f"threshold={threshold!r}: expected a probability in"):
            rstitch.PolicyRouter(policy, 0.0, threshold=threshold)


def test_a_missing_package_is_named(folder, monkeypatch):
    def absent(*args, **kwargs):
        raise ImportError("Please install\n gguf and accelerate")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", absent)
    with pytest.raises(ValueError,
                       match="--slm .*: a package is missing .Please install gguf and accelerate"):
        load_pair(str(folder / "slm"), str(folder / "llm"))


def test_graphs_and_caches_take_what_models_take(folder):
    slm, llm, tokenizer = load_pair(str(folder / "slm"), str(folder / "llm"))
    lm = CachedLM(torch.compile(adapted(slm)), 2, 64)
    assert lm.model is slm
    lm.close()


@pytest.mark.parametrize("rows", [1, 2, 7, 128, 129])
@pytest.mark.parametrize("bias", [False, True])
def test_turned_products_are_those_of_a_linear_layer(rows, bias):
    plain = torch.nn.Linear(24, 40, bias=bias)
    turned = copy.deepcopy(plain)
    turned.__class__ = loading.TurnedLinear
    x = torch.randn(rows, 1, 24, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(turned(x), plain(x), atol=1e-6)
    assert turned(x).shape == (rows, 1, 40) and turned(x).is_contiguous()


def test_only_large_float32_layers_on_avx2_are_turned(monkeypatch):
    """Weights of 64 x 64 = 4,096 here; an embedding's and a norm's are no products."""
    kinds = lambda model: {type(m) for m in model.modules() if isinstance(m, torch.nn.Linear)}  # noqa: E731
    for capability, large, dtype, kind in (("AVX2", 4096, torch.float32, loading.TurnedLinear),
                                           ("AVX512", 4096, torch.float32, torch.nn.Linear),
                                           ("AVX2", 4097, torch.float32, torch.nn.Linear),
                                           ("AVX2", 4096, torch.bfloat16, torch.nn.Linear)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability",
                            lambda capability=capability: capability)
        monkeypatch.setattr(loading.TurnedLinear, "LARGE", large)
        model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.LayerNorm(64)).to(dtype)
        model.device = torch.device("cpu")
        loading.turn_products(model)
        assert kinds(model) == {kind}


@pytest.mark.parametrize("machine, capability, dtype, warned", [
    ("x86_64", "AVX2", "bfloat16", True), ("AMD64", "DEFAULT", "float16", True),
    ("x86_64", "AVX2", "float32", False), ("x86_64", "AVX512", "bfloat16", False),
    ("aarch64", "DEFAULT", "bfloat16", False)])
def test_sixteen_bits_warn_where_a_processor_is_slow_with_them(folder, monkeypatch, recwarn, machine,
                                                               capability, dtype, warned):
    monkeypatch.setattr(loading.platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    load_pair(str(folder / "slm"), str(folder / "llm"), dtype=dtype)
    said = [str(w.message) for w in recwarn if "this processor is slower" in str(w.message)]
    assert [line.split()[1] for line in said] == [dtype] * warned

"""Tiny random models, prompts and a tokenizer, built here: what the tests share. Nothing is downloaded."""
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import rstitch
from rstitch import CachedLM

VOCAB = 40
IDS = torch.tensor([[5, 6]])

SHAPE = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
             num_attention_heads=4, max_position_embeddings=8192, pad_token_id=0, eos_token_id=1,
             bos_token_id=None)
GROUPED = dict(num_key_value_heads=2)
MOE = dict(head_dim=8, num_experts_per_tok=2)
GEMMA = dict(head_dim=8, query_pre_attn_scalar=8, sliding_window=5,
             layer_types=["sliding_attention", "full_attention"])
FAMILIES = {
    "Qwen2": ("Qwen2Config", "Qwen2ForCausalLM", GROUPED),
    "Qwen3": ("Qwen3Config", "Qwen3ForCausalLM", GROUPED | dict(head_dim=8)),
    "Qwen3-MoE": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", GROUPED | MOE | dict(
        num_experts=4, moe_intermediate_size=24)),
    "Llama": ("LlamaConfig", "LlamaForCausalLM", GROUPED),
    "Mistral": ("MistralConfig", "MistralForCausalLM", GROUPED | dict(sliding_window=None)),
    "Mistral, sliding window": ("MistralConfig", "MistralForCausalLM", GROUPED | dict(sliding_window=5)),
    "Phi-3": ("Phi3Config", "Phi3ForCausalLM", GROUPED),
    "Gemma 2": ("Gemma2Config", "Gemma2ForCausalLM", GROUPED | GEMMA),
    "Gemma 3": ("Gemma3TextConfig", "Gemma3ForCausalLM", GROUPED | GEMMA),
    "GPT-OSS": ("GptOssConfig", "GptOssForCausalLM", GROUPED | MOE | dict(
        num_local_experts=4, sliding_window=5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0})),
    "DeepSeek-V3": ("DeepseekV3Config", "DeepseekV3ForCausalLM", dict(  # keys of 12, values of 16 a head
        num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8,
        v_head_dim=16, n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2,
        moe_intermediate_size=16, first_k_dense_replace=1)),
    "GPT-NeoX": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {}),
    "GPT-2": ("GPT2Config", "GPT2LMHeadModel", {}),
}


@lru_cache(maxsize=None)
def tiny(family: str = "Qwen2", seed: int = 0, scale: float = 0.25, **changes):
    """A random model. Its output embedding is untied, and scaled so that entropies spread over most of
    [0, log V]."""
    config, model, extra = FAMILIES[family]
    torch.manual_seed(seed)
    built = getattr(transformers, model)(getattr(transformers, config)(
        **(SHAPE | extra | dict(tie_word_embeddings=False, initializer_range=0.2) | changes))).eval()
    head = built.get_output_embeddings().weight
    head.data = scale * torch.randn(head.shape)
    return built


def prompts(lengths: list[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random prompts of these lengths, padded on the left: (input_ids, attention_mask)."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, n in enumerate(lengths):
        ids[row, -n:] = torch.randint(2, 32, (n,), generator=generator)
        mask[row, -n:] = 1
    return ids, mask


def answers(result: rstitch.Stitched) -> list[list[int]]:
    """The kept tokens of each row."""
    return [[call.token for call in calls if call.kept] for calls in result.calls]


def assert_same_calls(some, others):
    """Equal row by row and call by call, entropies up to float32 rounding."""
    decided = [[[call._replace(entropy=None) for call in calls] for calls in rows] for rows in (some, others)]
    assert decided[0] == decided[1]
    entropies = [[call.entropy for calls in rows for call in calls] for rows in (some, others)]
    np.testing.assert_allclose(*entropies, atol=1e-4)


def untouchable(model):
    """The model or CachedLM, failing the test if it computes anything; what is neither, as it is."""
    inner = model.model if isinstance(model, CachedLM) else model
    if not isinstance(inner, torch.nn.Module):
        return model
    inner.forward = lambda *args, **kwargs: pytest.fail("computed before refusing")
    return model


def characters() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of single characters, the ids of which are below VOCAB."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    pieces = ["<pad>", "<eos>", "<unk>", *"abcdefghijklmnopqrstuvwxyz0123456789."]
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    special = dict(pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def words(n: int, chat_template: str | None = None) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of n single words: w0 (pad), w1 (eos), ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(n)}, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", eos_token="w1",
                                                unk_token="w2", chat_template=chat_template)


@pytest.fixture
def saved_pair(tmp_path):
    """Two tiny random models with different logit widths and one tokenizer with a chat template, as
    folders."""
    template = "{% for m in messages %}w5 {{ m['content'] }} w6{% endfor %}"
    for name, model in (("slm", tiny("Qwen2", 1, vocab_size=36)), ("llm", tiny("Llama", 2))):
        model.save_pretrained(tmp_path / name)
        words(32, template).save_pretrained(tmp_path / name)
    return tmp_path


def torchrun(n: int, *argv) -> subprocess.Popen:
    """A script, or "-m" and a module, with its arguments, started in n processes, which see no GPU; one
    without torchrun."""
    root = Path(__file__).parent
    words = list(map(str, argv))
    # Behind "--", lest Python 3.11's argparse takes our --n for one of torchrun's.
    words = ["-m", "--", *words[1:]] if n > 1 and words[0] == "-m" else words
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"] if n > 1 else []
    return subprocess.Popen([sys.executable, *launch, *words], cwd=root, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env=os.environ | {
                                "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": ""})

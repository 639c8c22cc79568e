"""Which models of transformers can be served, and by which attention."""
import inspect
import math
from contextvars import ContextVar
from functools import lru_cache
from typing import NamedTuple

import torch
from transformers import AttentionInterface, PreTrainedModel

from rstitch_hf.ranks import is_split


class Part(NamedTuple):
    """Rows of a packed read that attend together."""

    rows: slice | torch.Tensor  # (n,), where they lie in the cache
    lanes: torch.Tensor  # (n, S) long, which of the read's tokens are theirs; a pad repeats the row's first
    live: int  # columns that they attend to


PACKED: ContextVar[list[Part] | None] = ContextVar("packed", default=None)  # of the read that is under way


def attend(query, key, value, mask, scaling) -> torch.Tensor:
    """Queries (n, H, S, D), keys and values (n, K, T, D) of K <= H heads, additive mask (n, 1, S, T) -> (n,
    S, H, D). The query heads that share a key become rows of one query."""
    n, H, S, D = query.shape
    shared = H // key.shape[1]
    query = query.reshape(n, -1, shared * S, D)  # (n, K, shared S, D)
    mask = mask if S == 1 else mask.repeat(1, 1, shared, 1)  # (n, 1, shared S, T)
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(n, H, S, -1).transpose(1, 2)


def grouped_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Grouped-query attention by `sdpa` that reads every cached key once, see `attend`; of a packed read with
    queries (1, H, tokens, D), keys and values of the whole cache, and a mask (1, 1, tokens, T).

    transformers' own `sdpa`, given a mask, first copies keys and values H / K times (since 5.23 only for
    reads of two tokens or more), which takes several times as long as the attention itself. ValueError for
    soft caps and sinks: sdpa has neither, such models use eager."""
    if any(kwargs.get(name) is not None for name in ("softcap", "s_aux")):
        raise ValueError(f"{type(module).__name__} has a soft cap or sinks: expected "
                         "attn_implementation='eager', not 'sdpa'")
    if attention_mask is not None and attention_mask.shape[1] > 1:
        raise ValueError(f"{type(module).__name__} has a mask for each head: expected one for all of them")
    if (parts := PACKED.get()) is None:
        return attend(query, key, value, attention_mask, scaling).contiguous(), None
    out = query.new_empty(1, query.shape[2], query.shape[1], value.shape[-1])
    for rows, lanes, live in parts:
        keys, values = (x[rows, :, :live] if isinstance(rows, slice)
                        else x[:, :, :live].index_select(0, rows) for x in (key, value))
        mask = attention_mask[0, 0, :, :live][lanes][:, None]  # (n, 1, S, live)
        out[0, lanes] = attend(query[0][:, lanes].transpose(0, 1), keys, values, mask, scaling)
    return out, None


GROUPED = "rstitch_grouped"


AttentionInterface.register(GROUPED, grouped_attention)


def plain_sdpa(config) -> bool:
    """Is the attention that of sdpa, which has no soft cap?"""
    return config._attn_implementation == "sdpa" and not getattr(config, "attn_logit_softcapping", None)


def attention_of(config) -> str:
    """Which attention to use: ours where query heads share keys and the model would use sdpa without a soft
    cap, else the model's own."""
    heads = getattr(config, "num_attention_heads", 0)  # Mamba's has none
    shares = (getattr(config, "num_key_value_heads", None) or math.inf) < heads
    return GROUPED if shares and plain_sdpa(config) else config._attn_implementation


# Of all causal models of transformers 5.23 that take position_ids, those that differ from a full recompute
# all the same. Doge's attention makes masks of its own, for each head.
MISPLACED = frozenset((
    "doge gpt_neo moshi roberta roberta-prelayernorm camembert data2vec-text xlm-roberta xlm-roberta-xl "
    "xmod").split())


# Those that are decoders only where their config says is_decoder=True.
ENCODERS = frozenset("bert bert-generation big_bird electra ernie megatron-bert rembert roc_bert".split())


@lru_cache(maxsize=None)
def forward_arguments(kind: type) -> frozenset[str]:
    """What the forward of a class of models takes; kept, because asking takes as long as a token of a small
    one."""
    return frozenset(inspect.signature(kind.forward).parameters)


# The model_type of models with recurrent layers that were tested, by how they read several tokens from a
# given state: in one call, or, because their scan starts from zero whatever the cache holds, token by token.
CHUNKED = frozenset("""qwen3_5_text qwen3_5_moe_text qwen3_next olmo_hybrid lfm2 lfm2_moe granitemoehybrid
                       falcon_h1 bamba nemotron_h mamba2 zamba2""".split())


STEPWISE = frozenset("mamba falcon_mamba jamba zamba".split())


def cache_keyword(model) -> str:
    """What the model's forward calls its cache: transformers renamed it in 5.24."""
    accepts = forward_arguments(type(model))
    return next((name for name in ("cache", "cache_params") if name in accepts), "past_key_values")


def bare(model):
    """The model of transformers inside of one that torch.compile or PEFT made. An adapter lives in its
    layers, so it counts; compiled code does not run, since every new shape would compile anew."""
    model = getattr(model, "_orig_mod", model)
    wrapped = callable(getattr(model, "get_base_model", None)) and not isinstance(model, PreTrainedModel)
    return model.get_base_model() if wrapped else model


def device_of(model) -> torch.device:
    """Where a model takes its tokens. One that accelerate spreads takes them where its first layer runs,
    which need not be where that layer's weights wait."""
    hook = getattr(model.get_input_embeddings(), "_hf_hook", None)
    place = getattr(hook, "execution_device", None)
    return model.device if place is None else torch.device(place)


def context_of(model) -> float:
    """Tokens that a model can read."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or math.inf


def weight_of(module) -> torch.Tensor:
    """A layer's weight, from where accelerate keeps it, and whole where ranks hold parts."""
    if hasattr(module.weight, "full_tensor"):
        return module.weight.full_tensor()
    hook = getattr(module, "_hf_hook", None)
    return hook.weights_map["weight"] if module.weight.is_meta and hook is not None else module.weight


def can_pack(model) -> bool:
    """Can rows of different lengths share a call without pads? Only on one CPU, where a call takes the longer
    the more tokens it has; with attention that is called by name, no recurrent layers, and no last layers
    that skip all but the last token (Gemma 4's)."""
    config = model.config.get_text_config(decoder=True)
    plain = plain_sdpa(config) and not getattr(config, "num_kv_shared_layers", 0)
    whole = not hasattr(model, "hf_device_map") and not is_split(model) and device_of(model).type == "cpu"
    return (plain and whole and config.model_type not in CHUNKED | STEPWISE
            and getattr(model, "_supports_attention_backend", False))


def check_servable(model, max_len: int, name: str = "model") -> None:
    """ValueError or TypeError for a model whose rows cannot be at different lengths in one batch, before
    anything is computed."""
    if any(getattr(config, "is_prompt_learning", False)
           for config in getattr(getattr(model, "_orig_mod", model), "peft_config", {}).values()):
        raise ValueError(f"{name} has an adapter of virtual tokens: expected one that lives in the layers, "
                         "such as LoRA")
    model = bare(model)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"{name} is a {type(model).__name__}: expected a decoder-only model of transformers")
    name, config = f"{name} ({type(model).__name__})", model.config.get_text_config(decoder=True)
    accepts = forward_arguments(type(model))
    recurrent = config.model_type in CHUNKED | STEPWISE
    needed = ["position_ids", "attention_mask", cache_keyword(model), "logits_to_keep"]
    missing = [a for a in needed[recurrent:] if a not in accepts]  # Mamba takes no positions, nor needs any
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    spread = len({p.device for p in model.parameters()}) > 1
    attention = config._attn_implementation
    if model.config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder: expected a decoder-only model")
    if config.model_type in ENCODERS and not config.is_decoder:
        raise ValueError(f"{name} has is_decoder=False, every token sees those behind it: expected a decoder")
    if (getattr(model, "_is_stateful", False) or kinds) and not recurrent:
        kept, tested = ", ".join(sorted(kinds)) or "state-space", ", ".join(sorted(CHUNKED | STEPWISE))
        raise ValueError(f"{name} keeps a state that is not one key and value per token ({kept}) and was not "
                         f"tested: expected full or sliding attention layers only, or one of {tested}")
    if missing or model.get_output_embeddings() is None:
        raise ValueError(f"{name} cannot be served: its forward takes no "
                         f"{', '.join(missing) or 'output embeddings'}")
    if attention not in ("sdpa", "eager"):
        raise ValueError(f"{name} uses attn_implementation={attention!r}: expected 'sdpa' or 'eager'")
    if spread and not hasattr(model, "hf_device_map"):
        raise ValueError(f"{name} is spread over several devices by hand: expected all of it on one, or a "
                         "device_map, with which accelerate moves what goes from one to the next")
    if model.training:
        raise ValueError(f"{name} is in training mode: call .eval() first")
    if config.model_type in MISPLACED or getattr(config, "alibi", False):
        raise ValueError(f"{name} cannot be served: its positions or its mask do not follow position_ids")
    # Rotary frequencies that follow the longest row of a call would make rows depend on each other.
    ropes = getattr(config, "rope_parameters", None) or {}
    # One for all layers, or one per type of layer.
    for rope in [ropes, *(r for r in ropes.values() if isinstance(r, dict))]:
        limit = (rope.get("original_max_position_embeddings")
                 or getattr(config, "original_max_position_embeddings", None) or math.inf)
        kind = rope.get("rope_type", "default")
        if kind == "dynamic" or kind == "longrope" and max_len > limit:
            raise ValueError(f"{name} has rope_type={kind!r}, whose frequencies change with the length of "
                             f"the longest row: expected another type, or for longrope at most {limit} "
                             f"tokens, prompt and answer; asked for {max_len}")

"""R-Stitch inside `generate()` of transformers, in the layout that it loads from a folder or a repository:

    llm.generate(**inputs, custom_generate=FOLDER_OR_REPO, trust_remote_code=True, slm=slm, router=router)

What runs then is a copy of this file, wherever rstitch is installed; so rstitch is imported only where it is
needed. The same with no folder:

    llm.generate(**inputs, custom_generate=rstitch.custom_generate, slm=slm, router=router)
"""
import copy
import inspect
from functools import partial
from numbers import Real

import torch
from transformers import GenerationMixin
from transformers.generation import (
    EosTokenCriteria,
    MaxLengthCriteria,
    StopStringCriteria,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

# Fields of GenerationConfig and keywords of generate(). One that is on none of these lists is refused by name
# where it asks for something. `stitch`, or generate() before it, does what these say:
HONOURED = frozenset("""inputs input_ids generation_config custom_generate attention_mask stopping_criteria
    streamer tokenizer do_sample temperature top_k top_p max_new_tokens max_length max_time eos_token_id
    pad_token_id stop_strings num_return_sequences return_dict_in_generate slm router seed""".split())
# These are logits processors, or become some:
PROCESSED = frozenset("""logits_processor prefix_allowed_tokens_fn repetition_penalty no_repeat_ngram_size
    encoder_repetition_penalty encoder_no_repeat_ngram_size bad_words_ids min_length min_new_tokens
    suppress_tokens begin_suppress_tokens forced_bos_token_id forced_eos_token_id sequence_bias
    exponential_decay_length_penalty renormalize_logits remove_invalid_values min_p top_h typical_p
    epsilon_cutoff eta_cutoff""".split())
# These belong to beams, assistants, compilers or encoders, and make no difference without one:
NEUTRAL = frozenset("""bos_token_id decoder_start_token_id transformers_version trust_remote_code
    logits_to_keep is_assistant length_penalty early_stopping diversity_penalty disable_compile
    num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold assistant_lookbehind
    target_lookbehind max_matching_ngram_size""".split())
# Values that ask for nothing, apart from None and the default:
IDLE = {"guidance_scale": (1,), "cache_implementation": ("dynamic", "dynamic_full")}
# What generate() takes to load this file, and passes on to it all the same:
LOADING = frozenset("cache_dir force_download proxies token revision local_files_only repo_type".split())
# Processors of transformers that remember, from call to call, what they saw of a whole batch:
STATEFUL = SynthIDTextWatermarkLogitsProcessor, UnbatchedClassifierFreeGuidanceLogitsProcessor


def installed():
    """The module rstitch; ImportError that says what to do where there is none."""
    try:  # imports in a try are those that transformers does not ask for before it runs a copy
        import rstitch
    except ModuleNotFoundError as error:
        if error.name != "rstitch":
            raise
        raise ImportError("custom_generate needs rstitch, which is not installed here: run `pip install` on "
                          "the repository that holds custom_generate/generate.py", name="rstitch") from error
    return rstitch


def written_by_caller() -> dict:
    """What generate() was called with, found on the stack: transformers 5.17 to 5.24 forgets streamer,
    tokenizer and assistant_model where custom_generate is a function. Empty where custom_generate is called
    without generate()."""
    code = inspect.unwrap(GenerationMixin.generate).__code__
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    if frame is None:
        return {}
    named = {name: frame.f_locals.get(name) for name in code.co_varnames[1:code.co_argcount]}  # without self
    return named | frame.f_back.f_locals.get("kwargs", {})  # its no_grad wrapper still has every keyword


def asks(name: str, value, default) -> bool:
    """Whether an option asks for something: other than None, its default and, where that is nothing too,
    False, 0 and []."""
    nothing = (default, *IDLE.get(name, ()), *(() if default else (False, 0, [])))
    return value is not None and (isinstance(value, torch.Tensor) or value not in nothing)


def check_generation(config, keywords: dict) -> set[str]:
    """The options of generate() that ask for something; ValueError naming the first that `stitch` would not
    follow, before any work."""
    defaults = vars(type(config)()) | config._get_default_generation_params()
    fields = {name: getattr(config, name, None) for name in defaults if not name.startswith("_")}
    given = {name: value for name, value in (keywords | fields).items()  # what the caller wrote comes first
             if asks(name, value, defaults.get(name))}
    for name, value in given.items():
        if name not in HONOURED | PROCESSED | NEUTRAL:
            shown = repr(value) if isinstance(value, (bool, Real, str, list)) else type(value).__name__
            expected = dict.fromkeys([None, defaults.get(name) or None, *IDLE.get(name, ())])
            raise ValueError(f"{name}={shown} cannot be followed by custom_generate: expected "
                             f"{' or '.join(map(str, expected))}")
    for processor in given.get("logits_processor", ()):
        if isinstance(processor, STATEFUL):
            raise ValueError(f"logits_processor has a {type(processor).__name__}, which remembers its calls: "
                             "expected processors that look at ids and logits alone")
    return set(given)


class RowProcessors:
    """What generate() would do to the logits of one row alone: the list of processors that it prepares for
    the unpadded prompt, and the row's ids as they take them, (1, L) long on the model's device."""

    def __init__(self, model, config, prompt: list[int], new_tokens: int, ends: list[int], own, allowed):
        """config: that of the batch; ends: the tokens that end an answer; own: the caller's processors;
        allowed(ids): the tokens that may follow, None for all."""
        from rstitch_hf.serving import device_of
        n, device = len(prompt), device_of(model)
        self.known = 0  # of the ids; a token does not copy those before it
        self.ids = torch.empty(1, n + new_tokens, dtype=torch.long, device=device)
        config = copy.copy(config)
        config.max_length, config.num_return_sequences = n + new_tokens, 1
        if config.min_new_tokens is not None:
            config.min_length = n + config.min_new_tokens
        config._eos_token_tensor = torch.tensor(ends, device=device) if ends else None
        self.processors = model._get_logits_processor(
            generation_config=config, input_ids_seq_length=n, encoder_input_ids=self.read(prompt),
            prefix_allowed_tokens_fn=allowed and (lambda _, ids: allowed(ids)), logits_processor=own,
            device=device, model_kwargs={})

    def read(self, ids: list[int]) -> torch.Tensor:
        """(1, L) the row's ids, of which the first `known` are there already: a sequence only grows."""
        if len(ids) > self.known:  # none, where a proposal was discarded
            self.ids[0, self.known:len(ids)] = torch.tensor(ids[self.known:])
            self.known = len(ids)
        return self.ids[:, :self.known]

    def __call__(self, ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        """(V,) scores, of a copy of the logits (V,): processors may write on what they are given."""
        ids, scores = self.read(ids), logits.to(self.ids.device, copy=True)[None]
        for processor in self.processors:  # calling the list would ask for every signature, half of the time
            scores = processor(ids, scores)
        return scores[0].to(logits.device)


def by_row(prepare):
    """The `process` of `stitch`: each row's own processors, made by prepare(row, prompt) at the row's first
    proposal."""
    rows: dict[int, RowProcessors] = {}

    def logits_processor(row: int, ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        if row not in rows:
            rows[row] = prepare(row, ids)
        return rows[row](ids, logits)

    return logits_processor


def custom_generate(model, input_ids: torch.Tensor, *, slm=None, router=None, seed=None, stop_strings=None,
                    tokenizer=None, streamer=None, generation_config, stopping_criteria,
                    logits_processor=None, **model_kwargs):
    """R-Stitch in transformers: generate(**inputs, custom_generate=rstitch.custom_generate, slm=, router=).

    Follows the options under HONOURED and PROCESSED as generate() does; those under NEUTRAL make no
    difference, others are refused by name (ValueError). `seed` is that of `stitch`. A streamer gets the kept
    tokens, one row only. Returns the sequences (B, P+N), or with return_dict_in_generate=True the `Stitched`.

    Departs from generate(): logits processors see one proposal at a time, of either model, also one that is
    discarded then: the ids (1, L) of its row without padding, and one row of scores. So lengths (min_length,
    forced_eos_token_id ...) count from each row's own prompt. Entropies stay those of the raw logits: where
    one of these is NaN or inf there is none, and FloatingPointError comes before remove_invalid_values.
    Stopping criteria see one row at a time, without scores.
    """
    rstitch, config = installed(), generation_config
    written = written_by_caller() or {"logits_processor": logits_processor}
    given = check_generation(config, written)
    streamer, tokenizer = streamer or written.get("streamer"), tokenizer or written.get("tokenizer")
    if slm is None or router is None:
        missing = "slm" if slm is None else "router"
        raise ValueError(f"{missing} is missing: pass slm=, a model, and router= to generate()")
    if streamer is not None and len(input_ids) > 1:
        raise ValueError(f"streamer={type(streamer).__name__} needs one row: got {len(input_ids)}")
    if stop_strings and tokenizer is None:
        raise ValueError(f"stop_strings={stop_strings!r} needs the tokenizer: pass tokenizer= to generate()")
    own = written.get("stopping_criteria") or []  # those of length and EOS that generate() adds are stitch's
    criteria = [c for c in stopping_criteria
                if any(c is o for o in own) or not isinstance(c, (MaxLengthCriteria, EosTokenCriteria))]
    criteria += [StopStringCriteria(tokenizer, stop_strings)] if stop_strings else []
    # The EOS that the LLM was saved with goes with the SLM's; one that the caller chose is taken as it is.
    eos, saved = config.eos_token_id, model.generation_config.eos_token_id
    eos = None if written.get("eos_token_id") is None and eos == saved else eos
    new_tokens = config.max_length - input_ids.shape[1]
    mask = model_kwargs.get("attention_mask")
    if mask is None and "attention_mask" in model_kwargs:  # generate() drops one without zeros
        mask = torch.ones_like(input_ids)

    def stop(row: int, answer: list[int]) -> bool:
        sequence = torch.cat([input_ids[row], torch.tensor(answer, device=input_ids.device)])[None]
        return any(bool(criterion(sequence, None)) for criterion in criteria)

    def stream(row: int, call) -> None:
        if call.kept:
            streamer.put(torch.tensor([call.token]))

    def prepare(row: int, prompt: list[int]) -> RowProcessors:
        models = [lm.model if isinstance(lm, rstitch.CachedLM) else lm for lm in (slm, model)]
        allowed, batch_id = written.get("prefix_allowed_tokens_fn"), row // config.num_return_sequences
        allowed = allowed and partial(allowed, batch_id)
        return RowProcessors(model, config, prompt, new_tokens, rstitch.end_tokens(eos, models),
                             written.get("logits_processor"), allowed)

    process, sampling = by_row(prepare) if given & PROCESSED else None, dict(temperature=0.0)
    if config.do_sample and process:
        sampling = dict(temperature=1.0)  # the processors hold temperature, top_k and top_p too
    elif config.do_sample:
        top_p = 1.0 if config.top_p is None else config.top_p
        sampling = dict(temperature=config.temperature, top_k=config.top_k or 0, top_p=top_p)
    result = rstitch.stitch(
        slm, model, input_ids, router, attention_mask=mask, **sampling,
        max_new_tokens=new_tokens, eos_token_id=eos, pad_token_id=config.pad_token_id, seed=seed,
        on_token=stream if streamer is not None else None, stop=stop if criteria else None, process=process)
    if streamer is not None:
        streamer.end()
    return result if config.return_dict_in_generate else result.sequences


def generate(model, *, slm=None, router=None, seed=None, **options):
    """What transformers calls, with the model and all that generate() was given, where custom_generate is a
    folder or a repository: generate() once more, with a function. ImportError where there is no rstitch."""
    options = {name: value for name, value in options.items() if name not in LOADING}
    # Not model.generate: where this file comes with the LLM's checkpoint, that is this function.
    return type(model).generate(model, custom_generate=custom_generate, slm=slm, router=router, seed=seed,
                                **options)

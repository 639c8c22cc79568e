"""Judges of labels: do two ways in which a solution goes on mean the same?

A judge is called with a list of cases and returns True (same meaning), False or None (cannot tell) for each.
`analysis.label` makes the cases, and says by `--judge` who is asked.
"""
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from transformers import AutoModel, AutoTokenizer

import rstitch
from analysis.instruments.grading import final_answer, same
from rstitch_hf.loading import load_model, load_tokenizer
from rstitch_hf.serving import context_of


class Case(NamedTuple):
    question: str
    before: str  # the answer up to the sentence in question
    own: str  # how the LLM's answer goes on
    branch: str  # how it goes on where the SLM's token stands in place of the LLM's


class SameStatement:
    """The pocket domain, exactly: two texts mean the same if their sentences state the same steps and
    results. How a result was worked out does not matter. None where the LLM's own sentence states nothing
    that can be read."""

    STATEMENTS = (re.compile(r"(\w+), (\d+) ([*+-]) (\d+)(?::.*;)? = (\d+)\."),
                  re.compile(r"The answer is (\d+)\."))

    def read(self, text: str) -> list[tuple]:
        """What each sentence states; ("?", the sentence) for one that states nothing."""
        parts = [part for part in re.split(r"(?<=\.) ", text.strip()) if part]
        return [next((m.groups() for m in (pattern.fullmatch(part) for pattern in self.STATEMENTS) if m),
                     ("?", part)) for part in parts]

    def __call__(self, cases: Sequence[Case]) -> list[bool | None]:
        read = [(self.read(case.own), self.read(case.branch)) for case in cases]
        return [None if any(s[0] == "?" for s in own) else own == branch for own, branch in read]


class SameAnswer:
    """Any domain with checkable answers: both branches go on to the end, and their final answers agree
    (math-verify). None where either has none, be it that its last box is not closed."""

    def __call__(self, cases: Sequence[Case]) -> list[bool | None]:
        pairs = [(final_answer(case.own), final_answer(case.branch)) for case in cases]
        return [same(own, branch) if own and branch else None for own, branch in pairs]


class SameNumbers:
    """Any domain of calculations: two texts mean the same if the last results that they state, behind an
    equals sign, are equal; where not both have one, if they state the same numbers, in whatever order and
    however often; and if what `embed` makes of them, (n, D) of length 1, has a cosine of `limit` or more.
    Where one text has no number `embed` alone decides. None where nobody can: an empty text, or, without
    `embed`, one that has no number."""

    NUMBER = r"(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)"
    # No operand: "= 15 + 60" has no result before the sum is stated.
    RESULT = re.compile(rf"=[\s$\\{{]*(?:boxed{{)?({NUMBER})(?![\d.,]*\s*(?:[-+*/(]|\\times|\\div))")

    # The limit was chosen on 60 positions that were read, see results/real/README.md.
    def __init__(self, embed: Callable[[list[str]], torch.Tensor] | None = None, limit: float = 0.85):
        self.embed, self.limit = embed, limit

    def read(self, text: str) -> tuple[set[float], float | None]:
        """(numbers, last result) of a text."""
        value = lambda found: float(found.replace(",", ""))  # noqa: E731
        results = self.RESULT.findall(text)
        return {*map(value, re.findall(self.NUMBER, text))}, value(results[-1]) if results else None

    def agree(self, own: str, branch: str) -> bool | None:
        """Do two texts state the same numbers? None where one states none."""
        (a, last), (b, other) = self.read(own), self.read(branch)
        if not a or not b:
            return None
        return last == other if None not in (last, other) else a == b

    def __call__(self, cases: Sequence[Case]) -> list[bool | None]:
        stated = [self.agree(case.own, case.branch) for case in cases]
        near: list[bool | None] = [None] * len(cases)
        if self.embed is not None:
            own, branch = (self.embed([case[k] for case in cases]) for k in (2, 3))
            near = ((own * branch).sum(-1) >= self.limit).tolist()
        return [None if not (case.own.strip() and case.branch.strip()) or {same, close} == {None}
                else False not in (same, close) for case, same, close in zip(cases, stated, near)]


class Sentences:
    """Embeddings of sentences, (n, D) float32 of length 1: means over a BERT's last hidden states, as the
    sentence-transformers' MiniLM models take them."""

    def __init__(self, name: str, device: str):
        self.tokenizer = AutoTokenizer.from_pretrained(name)
        self.model = AutoModel.from_pretrained(name, use_safetensors=True).to(device).eval()

    @torch.inference_mode()
    def __call__(self, texts: list[str]) -> torch.Tensor:
        batch = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        batch = batch.to(self.model.device)
        hidden = self.model(**batch).last_hidden_state.float()
        mask = batch["attention_mask"][..., None]
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1).cpu()


class LMJudge:
    """A causal LM that is asked whether two sentences mean the same. None unless it says one of the two
    words, and that alone, or where the question does not fit into its context."""

    PROMPT = """Here is a problem, the beginning of a solution, and two ways, A and B, in which the solution \
goes on.

Problem: {0.question}

Solution so far: {0.before}

A: {0.own}

B: {0.branch}

Do A and B mean the same? They do if they state the same facts and results and take the same step, whatever \
their wording.
Answer with one word, same or different."""

    def __init__(self, name: str, device: str, dtype: str, tokens: int = 16):
        self.tokenizer = load_tokenizer("--judge", name)
        self.model = load_model("--judge", name, device, dtype)
        self.tokens = tokens

    @staticmethod
    def verdict(said: str) -> bool | None:
        word = re.fullmatch(r"\W*(same|different)\W*", said.lower())
        return word and word[1] == "same"

    def __call__(self, cases: Sequence[Case]) -> list[bool | None]:
        ids, mask = rstitch.encode(self.tokenizer, *(self.PROMPT.format(case) for case in cases))
        fits = [k for k, n in enumerate(mask.sum(1).tolist()) if n + self.tokens <= context_of(self.model)]
        if not fits:
            return [None] * len(cases)
        out = rstitch.stitch(self.model, self.model, ids[fits], rstitch.LLMOnly(), attention_mask=mask[fits],
                             max_new_tokens=self.tokens, seed=0)
        said = {k: self.tokenizer.decode([call.token for call in calls], skip_special_tokens=True)
                for k, calls in zip(fits, out.calls)}
        return [self.verdict(said.get(k, "")) for k in range(len(cases))]


JUDGES = {"statement": SameStatement, "answer": SameAnswer, "numbers": SameNumbers}
ENCODED = "numbers+"  # and the name or folder of an encoder


@lru_cache(maxsize=None)
def build_judge(name: str, device: str, dtype: str):
    """The judge that --judge names. OSError or ValueError where its model cannot be had."""
    if name.startswith(ENCODED):
        return SameNumbers(Sentences(name.removeprefix(ENCODED), device))
    return JUDGES.get(name, lambda: LMJudge(name, device, dtype))()

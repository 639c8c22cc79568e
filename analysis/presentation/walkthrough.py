"""One stitched answer for a person to look at: coloured by writer, its entropies, and how far each model has
read."""
import html as escape
import math
from collections.abc import Sequence

import matplotlib.pyplot as plt

from analysis.presentation.figures import GREY, LLM_COLOUR, SLM_COLOUR
from rstitch import LLM, SLM, Call, count_switches


def html(calls: Sequence[Call], tokenizer):
    """The answer as HTML; discarded tokens are struck through before what replaced them."""
    from IPython.display import HTML
    pieces = []
    for call in calls:
        style = f"color:{SLM_COLOUR if call.model == SLM else LLM_COLOUR};font-weight:bold"
        style += "" if call.kept else ";text-decoration:line-through;opacity:0.5"
        text = escape.escape(tokenizer.decode([call.token], skip_special_tokens=True))
        pieces.append(
            f'<span style="{style}" title="H = {call.entropy:.3f} nats, read {call.n_inf}">{text}</span>')
    return HTML(f'<div style="font-family:monospace;white-space:pre-wrap">{"".join(pieces)}</div>')


def cursors(calls: Sequence[Call], model: int) -> tuple[list[int], list[int]]:
    """(index of the call, tokens read) of one model, before its first call and after each."""
    x, y = [0], [0]
    for i, call in enumerate(calls):
        if call.model == model:
            x += [i, i]
            y += [call.n_kv, call.n_kv + call.n_inf]
    return x + [len(calls)], y + [y[-1]]


def draw(calls: Sequence[Call], tau: float, vocab: int):
    """Entropy of every forward pass with tau (normalised), and the two cursors below it."""
    figure, (top, below) = plt.subplots(2, 1, figsize=(9, 5), sharex=True)
    for model, colour, name in ((SLM, SLM_COLOUR, "SLM"), (LLM, LLM_COLOUR, "LLM")):
        for kept, marker in ((True, "o"), (False, "x")):
            points = [(i, max(call.entropy, 1e-5)) for i, call in enumerate(calls)
                      if call.model == model and call.kept == kept]
            if points:
                top.plot(*zip(*points), marker, ms=4, color=colour,
                         label=name if kept else f"{name}, discarded")
        below.plot(*cursors(calls, model), color=colour, label=name)
    top.axhline(tau * math.log(vocab), color=GREY, lw=1, label=f"tau = {tau:g} normalised")
    top.set(yscale="log", ylabel="entropy (nats)", title="Every forward pass")
    below.set(xlabel="forward pass", ylabel="tokens read", title="The two cursors")
    for ax in (top, below):
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def account(calls: Sequence[Call]) -> str:
    """What the answer took."""
    kept = [call for call in calls if call.kept]
    large = [call for call in calls if call.model == LLM]
    read = sum(call.n_inf for call in large)
    return (f"{len(kept)} tokens, {sum(call.model == LLM for call in kept)} by the LLM; "
            f"{count_switches(calls)} switches, {len(calls) - len(kept)} discarded tokens; the LLM was "
            f"called {len(large)} times and read {read} tokens, {read - len(large)} of them to catch up")

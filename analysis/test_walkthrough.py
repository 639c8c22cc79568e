"""One stitched answer for a person to look at."""
import matplotlib

from analysis.presentation import walkthrough
from analysis.presentation.figures import LLM_COLOUR, SLM_COLOUR
from rstitch import LLM, SLM, Call

# The SLM reads 3 tokens, its proposal is discarded; the LLM reads the same 3 and writes; the SLM reads that.
CALLS = [Call(SLM, 0, 3, 0, 5, 0.9, False), Call(LLM, 0, 3, 0, 6, 0.1, True),
         Call(SLM, 1, 1, 3, 7, 0.2, True)]


def test_what_an_answer_took_by_hand():
    assert walkthrough.account(CALLS) == (
        "2 tokens, 1 by the LLM; 2 switches, 1 discarded tokens; the LLM was called 1 times and read 3 "
        "tokens, 2 of them to catch up")


def test_cursors_by_hand():
    assert walkthrough.cursors(CALLS, SLM) == ([0, 0, 0, 2, 2, 3], [0, 0, 3, 3, 4, 4])
    assert walkthrough.cursors(CALLS, LLM) == ([0, 1, 1, 3], [0, 0, 3, 3])


def test_tokens_are_coloured_by_writer_and_escaped():
    tokenizer = type("Tokenizer", (), {"decode": lambda self, ids, **options: f"<{ids[0]}>"})()
    spans = walkthrough.html(CALLS, tokenizer).data.split("<span")[1:]
    assert [SLM_COLOUR in span for span in spans] == [True, False, True] and LLM_COLOUR in spans[1]
    assert ["line-through" in span for span in spans] == [True, False, False] and "&lt;6&gt;" in spans[1]


def test_both_panels_are_drawn():
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    walkthrough.draw(CALLS, 0.02, 128)
    top, below = plt.gcf().axes
    assert {line.get_label() for line in top.lines} >= {"SLM", "SLM, discarded", "LLM"}
    assert len(below.lines) == 2
    plt.close("all")

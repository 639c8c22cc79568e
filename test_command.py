"""Tests of the command `python rstitch.py` and of its printer. Tiny random models are built here."""

import pytest
import torch

import rstitch
from conftest import answers, tiny, words
from rstitch import LLM, SLM, EntropyRouter, stitch
from rstitch_hf import command, loading



def run_main(capsys, *argv: str) -> str:
    command.main(list(argv))
    return capsys.readouterr().out


def test_main_prints_the_answer_of_stitch_and_a_summary(saved_pair, capsys):
    pair = ["--slm", str(saved_pair / "slm"), "--llm", str(saved_pair / "llm"), "--device", "cpu"]
    out = run_main(capsys, *pair, "--tau", "0.85", "--max-new-tokens", "20", "w7 w8")
    slm, llm, tokenizer = rstitch.load_pair(pair[1], pair[3], "cpu", "float32")
    ids = torch.tensor([[5, 7, 8, 6]])  # w5 and w6 come from the chat template
    assert [x.tolist() for x in rstitch.encode(tokenizer, "w7 w8")] == [ids.tolist(), [[1, 1, 1, 1]]]
    batch, mask = rstitch.encode(tokenizer, "w7", "w7 w8")
    assert batch.tolist() == [[0, 5, 7, 6], *ids.tolist()] and mask.tolist() == [[0, 1, 1, 1], [1, 1, 1, 1]]
    result = stitch(slm, llm, ids, EntropyRouter(0.85), max_new_tokens=20)
    text, line, _ = out.split("\n")
    assert text == tokenizer.decode(answers(result)[0], skip_special_tokens=True)
    assert line.startswith(f"{(result.source >= 0).sum()} tokens (LLM "
                           f"{100 * (result.source == LLM).float().mean():.1f} %)")
    assert "\033" not in out  # plain where the output is no terminal
    sampled = [run_main(capsys, *pair, "--temperature", "1", "--top-p", "0.9", "--seed", s,
                        "w7").split("\n")[0] for s in "001"]
    assert sampled[0] == sampled[1] != sampled[2]


@pytest.mark.parametrize("argv, message",
                         [(["--tau", "2"], "tau=2.0: expected a number in"),
                          (["--tau", "nan"], "tau=nan: expected a number in"),
                          (["--router", "slm", "--tau", "0.1"], "--tau 0.1 belongs to --router entropy"),
                          (["--p", "0.1"], "--p 0.1 belongs to --router random"),
                          (["--router", "random", "--p", "1.5"], "p=1.5: expected a probability"),
                          (["--top-p", "0.5"], "--top-p 0.5 needs a --temperature"),
                          (["--temperature", "-1"], "temperature=-1.0: expected"),
                          (["--temperature", "1", "--top-p", "0"], "top_p=0.0: expected"),
                          (["--max-new-tokens", "0"], "--max-new-tokens=0: expected"),
                          (["--slm", "no/such/folder"], "--slm no/such/folder: there is no such folder"),
                          (["--llm", "./nothing"], "--llm ./nothing: there is no such folder"),
                          (["--llm", "analysis"], "--llm analysis: this folder has no config.json"),
                          (["--device", "nope"], "'nope' is no device that torch can use here"),
                          (["--dtype", "nope"], "invalid choice: 'nope'")])
def test_main_refuses_bad_options_in_one_sentence(saved_pair, capsys, argv, message):
    with pytest.raises(SystemExit) as refused:
        command.main(["--slm", str(saved_pair / "slm"), "--llm", str(saved_pair / "llm"), "--device", "cpu",
                      "w7", *argv])
    assert refused.value.code == 2 and message in capsys.readouterr().err


def test_main_refuses_what_is_no_question_and_names_the_words_it_does_not_know(saved_pair, capsys):
    for argv in ([""], ["  "]):
        with pytest.raises(SystemExit):
            command.main(argv)
        assert "expected a text" in capsys.readouterr().err
    with pytest.raises(ValueError, match="expected a text, or a list of messages; give several"):
        rstitch.encode(words(9), ["w3", "w4"])
    command.main(["--slm", str(saved_pair / "slm"), "--llm", str(saved_pair / "llm"), "--device", "cpu",
                  "--max-new-tokens", "2", "w7 who knows"])
    assert "note: unknown to the tokenizer: who knows" in capsys.readouterr().err
    (saved_pair / "bare").mkdir()
    tiny().save_pretrained(saved_pair / "bare")
    with pytest.raises(ValueError, match="--llm .*bare: this folder has no tokenizer"):
        rstitch.load_pair(str(saved_pair / "slm"), str(saved_pair / "bare"))


@pytest.mark.parametrize("argv, tau", [([], 0.005), (["--tau", "0.02"], 0.02)])
def test_without_a_question_the_built_in_one_is_answered(capsys, argv, tau):
    """As with the question; then where the table of all methods is. Any option of a question may be given."""
    command.main([*argv, "--device", "cpu"])
    out = capsys.readouterr().out.strip().split("\n")
    command.main(["--tau", str(tau), "--device", "cpu", command.PROBLEM])
    text, line = capsys.readouterr().out.strip().split("\n")
    assert out[:-4] == ([f'python rstitch.py --tau {tau} "{command.PROBLEM}"', ""] if not argv else [])
    assert out[-4] == text and out[-3].split(" switches")[0] == line.split(" switches")[
        0] and "tokens/s" in line
    assert out[-2:] == ["", "Every method on 200 problems, in a table, two minutes: python -m analysis.demo"]


def test_tokenizers_that_disagree_are_refused_naming_the_first_token():
    loading.check_same_tokenizer(words(9), words(9))
    with pytest.raises(ValueError, match="token 9 is None for the SLM and 'w9' for the LLM"):
        loading.check_same_tokenizer(words(9), words(12))
    marked = words(9)
    marked.add_special_tokens({"additional_special_tokens": ["<think>"]})
    with pytest.raises(ValueError, match="token 9 is '<think>' for the SLM and None for the "
                       "LLM.*--special-tokens-may-differ"):
        loading.check_same_tokenizer(marked, words(9))
    loading.check_same_tokenizer(marked, words(9), special_may_differ=True)
    with pytest.raises(ValueError, match="token 10 is None for the SLM"):  # the ordinary one
        loading.check_same_tokenizer(marked, words(12), special_may_differ=True)


class Terminal(list):
    """Collects what is printed and says it is a terminal."""

    def isatty(self):
        return True

    write = list.append

    def flush(self):
        pass


def test_printer_colours_by_writer_and_strikes_out_what_was_discarded(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = Terminal()
    printer = command.Printer(words(9), out)
    del out[:]  # the legend
    for model, token, kept in ((SLM, 3, True), (SLM, 4, False), (LLM, 5, True), (SLM, 6, True)):
        printer(0, rstitch.Call(model, 0, 1, 0, token, 0.0, kept))
    slm, llm, struck, plain = (command.COLOURS[k] for k in (SLM, LLM, "discarded", "plain"))
    assert "".join(out) == f"{slm}w3{plain}{slm}{struck} w4{plain}{llm} w5{plain}{slm} w6{plain}"



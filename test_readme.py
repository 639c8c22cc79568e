"""What README.md and the pages beside it promise: length, commands, code, files, figures, verdicts."""
import io
import json
import re
import runpy
import shlex
import sys
import textwrap
import warnings
from contextlib import redirect_stdout
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch

from analysis import demo
from analysis.answers import milliseconds
from analysis.instruments.stats import with_interval
from analysis.instruments.task import load_latency
from analysis.presentation import figures, real
from conftest import words
from rstitch import LLM, SLM
from rstitch_hf import command

torch.set_num_threads(1)  # models this small only lose by threads
ROOT = Path(__file__).parent
NAMES = ("README.md", "CLAIMS.md", "DIFFERENCES.md", "SERVING.md")
PAGES = {name: (ROOT / name).read_text() for name in NAMES}
README = PAGES["README.md"]
FILE = re.compile(r"[\w.*-]+(/[\w.*-]*)+|[\w*-]+\.(py|md|jsonl?|txt|png|csv|ipynb|toml|ini)")
COLUMNS = ["claim", "paper's figure", "real pair", "pocket pair", "verdict"]
VERDICTS = {"holds", "holds in part", "does not hold", "undecided"}


def after(text: str, mark: str) -> list[str]:
    """The lines of the first indented block behind a mark, without their indentation."""
    block = re.search(r"(?m)(?:^    .*\n)+", text[text.index(mark):])[0]
    return [line[4:] for line in block.splitlines()]


def table(text: str, mark: str) -> list[list[str]]:
    """The cells of the first table behind a mark, its head apart."""
    rows = re.search(r"(?m)(?:^\|.*\n)+", text[text.index(mark):])[0].splitlines()
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def filled(text: str) -> str:
    """A page with its continued lines joined and its shell variables filled in."""
    text = re.sub(r" \\\n +", " ", text)
    values = {f"${name}": value for name, value in re.findall(r'(?m)^ {4,}([A-Z]+)="(.*)"$', text)}
    return re.sub(r"\$[A-Z]+\b", lambda name: values.get(name[0], name[0]), text)


def blocks(text: str) -> list[list[str]]:
    """The words of every `python` command that stands in an indented block."""
    lines = [line.split(" && ")[0] for line in re.findall(r"(?m)^ {4,}(python .*)$", filled(text))]
    return [shlex.split(line, comments=True) for line in lines]


def commands(text: str) -> list[list[str]]:
    """The words of every `python` command, also of those in the midst of a sentence."""
    return blocks(text) + [shlex.split(found) for found in re.findall(r"`(python [^`]*)`", filled(text))]


@cache
def options(*target: str) -> set[str]:
    """The options that --help of ("rstitch.py",) or ("-m", module) lists."""
    argv, out = sys.argv, io.StringIO()
    try:
        sys.argv = [target[-1], "--help"]
        with warnings.catch_warnings(), redirect_stdout(out), pytest.raises(SystemExit) as ended:
            warnings.simplefilter("ignore")  # that the module has been imported already
            if target[0] == "-m":
                runpy.run_module(target[1], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(str(ROOT / target[0]), run_name="__main__")
    finally:
        sys.argv = argv
    assert not ended.value.code
    listed = re.findall(r"(?m)^  (-.*?)(?:  |$)", out.getvalue())
    return {name for line in listed for name in re.findall(r"--[\w-]+", line)}


def cells_of(line: str) -> list[str]:
    """The cells of a line of the demonstration's table."""
    return re.split(r" {2,}", line.strip())


def slug(heading: str) -> str:
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def test_the_readme_is_short():
    lines = README.splitlines()
    assert len(lines) <= 160 and max(map(len, lines)) <= 120


@pytest.mark.parametrize("page", [*NAMES, "analysis/results/README.md", "analysis/results/real/README.md",
                                  "analysis/pocket/models/README.md"])
def test_every_command_takes_the_options_shown(page):
    for words_ in commands((ROOT / page).read_text()):
        target = words_[1:3] if words_[1] == "-m" else words_[1:2]
        shown = {word for word in words_ if word.startswith("--") and word != "--help"}
        assert shown <= options(*target), " ".join(words_)


def test_the_readme_and_its_pages_show_enough_commands_to_check():
    counts = {page: len(commands(text)) for page, text in PAGES.items()}
    assert counts["README.md"] >= 7 and counts["SERVING.md"] >= 12


@pytest.mark.parametrize("page", PAGES)
def test_every_file_and_link_exists(page):
    text = PAGES[page]
    for link in re.findall(r"\]\(([^)]+)\)", text):
        path, _, anchor = link.partition("#")
        if not link.startswith("https://"):
            target = ROOT / (path or page)
            assert target.exists(), link
            assert not anchor or anchor in map(slug, re.findall(r"(?m)^#+ (.*)$", target.read_text())), link
    parts = " ".join(re.findall(r"`([^`\n]+)`", text)).split()
    named = {part for part in parts if FILE.fullmatch(part)}
    named |= {word for words_ in blocks(text) for word in words_[1:2] if word != "-m"}
    named |= set(re.findall(r"(?m)^    (?:pytest|pip install -r) (\S+\.\w+)", text))
    assert [name for name in sorted(named) if not list(ROOT.glob(name))] == []


@pytest.mark.parametrize("page", PAGES)
def test_no_page_names_a_path_of_a_machine(page):
    assert not re.search(r"(?<![\w.])/(root|work|home|tmp|usr|mnt)\b", PAGES[page])


def test_every_snippet_of_the_readme_runs(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    names: dict = {}
    snippets = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    for code in snippets:
        exec(compile(code, "README.md", "exec"), names)
    assert len(snippets) >= 3 and "The answer is 4052" in capsys.readouterr().out
    sources = [[call.model for call in calls if call.kept] for calls in names["result"].calls]
    shares = torch.tensor([np.mean(row) for row in sources], dtype=torch.float32)
    torch.testing.assert_close(names["share"], shares)
    assert torch.equal(names["out"], names["by_gap"].sequences)
    assert all({SLM, LLM} <= set(names[way].source.unique().tolist()) for way in ("by_gap", "by_r2r"))


def test_every_command_for_a_question_runs(saved_pair, capsys):
    """Tiny random models, with a chat template and two logit widths, stand in for pairs of elsewhere."""
    for name in ("slm", "llm"):
        template = ("{% for m in messages %}w5 {{ m['content'] }} w6{% endfor %}"
                    "{% if enable_thinking %}w7{% endif %}")
        words(32, template).save_pretrained(saved_pair / name)
    ran = [words_[2:] for page in PAGES.values() for words_ in blocks(page) if words_[1] == "rstitch.py"]
    for argv in ran:
        if "--slm" in argv:
            for name in ("slm", "llm"):
                argv[argv.index(f"--{name}") + 1] = str(saved_pair / name)
            argv += ["--max-new-tokens", "24"]  # the last one counts
        command.main([*argv, "--device", "cpu"])
    assert capsys.readouterr().out.count("tokens/s") == len(ran) >= 5


def test_the_built_in_problem_comes_out_as_the_readme_shows(capsys):
    command.main(["--device", "cpu"])
    out = capsys.readouterr().out
    text, line = after(README, "The second line answers")
    first, last = text.split("[...]")
    assert first in out and last + "\n" in out and line.split(" switches")[0] in out
    assert "It takes tau 0.005," in README and "--tau 0.005" in out and "wrong, 4002." in README
    command.main(["--device", "cpu", "--tau", "0.02"])
    assert "The answer is 4002." in capsys.readouterr().out


def test_the_tables_of_the_demonstration_are_the_committed_one():
    whole = demo.show(json.loads((figures.results("table.json")).read_text()))
    assert textwrap.indent(whole, "    ") in PAGES["SERVING.md"]
    head, units, *body = map(cells_of, after(README, "Its table, shortened"))
    full_head, full_units, *full = map(cells_of, whole.splitlines())
    columns = [full_head.index(name) for name in head]
    assert units == [full_units[k] for k in columns] and len(columns) >= 3 and len(body) >= 4
    full = {name: cells for name, *cells in full[:-1]}
    for name, *cells in body:
        assert cells == [full[name][k] for k in columns], name


def test_the_figures_of_the_readme_are_the_committed_ones():
    """The real pair's right answers and shares, and its loss; all of the pocket pair's."""
    methods, nets = real.world_of(figures.load_real()), real.nets_ms(figures.load_real())
    assert nets.keys() == {"ce4dc9c6bf7d", "62572a0b1aa8"}  # of R2R, of R-Stitch+
    names = {"SLM alone": "slm", "LLM alone": "llm", "R-Stitch, tau 0.02": "tau=0.02",
             "R-Stitch, tau 0.005": "tau=0.005", "R-Stitch, tau 0.05": "tau=0.05",
             "R2R": "r2r=0.4174 by ce4dc9c6bf7d",
             "R-Stitch, tau 0.02, visits of one token": "tau=0.02,back=1"}
    rows = table(README, "## What came of it")
    ms = partial(milliseconds, models=load_latency(figures.results("real/latency.json")), nets_ms=nets)
    llm = real.priced(methods["llm"], ms)
    assert len(rows) == 7
    for method, n, right, share, speed in rows:
        answers = methods[real.resolve(methods, names[method])]
        assert speed == with_interval(real.speed(real.priced(answers, ms), llm)[:3], " x", 2), method
        x = real.figures_of(answers)
        assert (right, share) == (real.percent(x["right"]), f"{100 * x['llm_share'][0]:.1f}"), method
        assert int(n.replace(",", "")) == len(real.by_problem(answers)), method
    lost = real.difference(methods, "llm", "tau=0.02")
    assert "R-Stitch loses {:.1f} points [{:.1f}, {:.1f}]".format(*lost) in README
    won = real.difference(methods, "tau=0.02", "random")
    assert "beats random calls by {:.1f} [{:.1f}, {:.1f}]".format(*won) in README
    frontier, runs = figures.load_frontier()
    wall, text = figures.load_wall(), " ".join(README.split())
    clock = {name: speed.split(" x")[0] for name, speed, _ in figures.timed_against_fitted(wall, runs)}
    for start, name in (("R-Stitch has", "R-Stitch at 15 %"), ("R2R", "R2R at 10 %"),
                        ("R-Stitch+", "R-Stitch+ at 4 %")):
        family, _, wanted = name.partition(" at ")
        run = figures.nearest(runs, family, float(wanted.rstrip(" %")) / 100)
        of = " LLM tokens" if family == "R-Stitch" else ""
        assert (f"{start} {100 * run['accuracy']:.1f} % at {100 * run['llm_share']:.1f} %{of} "
                f"({clock[name]} x)") in text
        assert run["n"] == 1000
    large, = figures.of(runs, "LLM alone")
    assert (f"the LLM alone is right on {100 * large['accuracy']:.1f} %, and so is speculative decoding, "
            f"{clock['speculative decoding']} times as fast") in text
    rules = {r["name"]: f"{100 * r['accuracy']:.1f} %" for r in frontier if r["kind"] == "fixed"}
    small = figures.of(runs, "SLM alone")[0]["accuracy"]
    assert (f"({rules['tau 0.02']}) than its SLM alone ({100 * small:.1f} %), at 0.001 "
            f"{rules['tau 0.001']}.") in text


def test_every_claim_has_one_of_four_verdicts():
    found = re.findall(r"(?m)^(\|.*)\n\|[-|]+\n((?:\|.*\n)+)", PAGES["CLAIMS.md"])
    rows = []
    for head, body in found:
        assert [cell.strip() for cell in head.strip("|").split("|")] == COLUMNS
        rows += [[cell.strip() for cell in line.strip("|").split("|")] for line in body.splitlines()]
    assert sum(line.startswith("|") for line in PAGES["CLAIMS.md"].splitlines()) == len(rows) + 2 * len(found)
    assert len(rows) >= 30 and len({row[0] for row in rows}) == len(rows)
    for row in rows:
        assert len(row) == 5 and all(row) and max(map(len, row)) <= 90, row
        assert row[4] in VERDICTS and "running" not in row[2], row


def test_the_differences_are_numbered_a_line_each():
    lines = re.findall(r"(?m)^(\d+)\. .+$", PAGES["DIFFERENCES.md"])
    assert lines == [str(i) for i in range(1, len(lines) + 1)] and len(lines) >= 30
    assert max(map(len, PAGES["DIFFERENCES.md"].splitlines())) <= 110

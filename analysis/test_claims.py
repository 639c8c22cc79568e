"""Every figure and table names the command that makes it, and every experiment what it feeds."""
import ast
import re

import pytest

from analysis.instruments.rows import RESULTS
from analysis.test_arrows import ROOT

EXPERIMENTS = sorted(path for path in (ROOT / "analysis").glob("*.py")
                     if not path.name.startswith("test_") and path.stem not in ("__init__", "conftest"))
COMMAND = re.compile(r"`python -m (analysis[.\w]*)[^`]*`")


def shown(page: str) -> dict[str, list[str]]:
    """What a page shows, tables by their heads and figures by their files: the commands that its section has
    named by the end of the paragraph that it stands in or follows."""
    out = {}
    for section in page.split("\n## ")[1:]:
        before = ""
        for paragraph in section.split("\n\n"):
            before += paragraph + "\n\n"
            found = re.findall(r"!\[[^]]*\]\(([^)]*)\)", paragraph) + re.findall(r"\A\|.*", paragraph)
            out |= {f"{section.splitlines()[0]}: {what}": COMMAND.findall(before) for what in found}
    return out


def test_every_figure_and_table_names_its_command():
    found = shown((RESULTS / "README.md").read_text())
    assert len(found) >= 12 and any("steps.png" in what for what in found)
    assert [what for what, commands in found.items() if not commands] == []
    for module in {command for commands in found.values() for command in commands}:
        assert (ROOT / (module.replace(".", "/") + ".py")).exists(), module


def test_what_names_no_command_is_seen():
    page = ("\n## A\n\n`python -m analysis.bench`\n\n| x |\n|---|\n\n## B\n\n![y](y.png)\n\n`python -m "
            "analysis.label --report`: z.")
    assert shown(page) == {"A: | x |": ["analysis.bench"], "B: y.png": []}


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_an_experiment_says_its_command_its_rows_and_what_it_feeds(path):
    text = ast.get_docstring(ast.parse(path.read_text()))
    assert f"    python -m analysis.{path.stem}" in text
    assert all(re.search(rf"^{field}: \S", text, re.MULTILINE) for field in ("Rows", "Feeds"))


def test_every_file_of_results_is_named_by_what_writes_it():
    """But for verdicts given by hand and numbers copied from the paper."""
    sources = "".join(path.read_text()
                      for path in (*EXPERIMENTS, *(ROOT / "analysis" / "presentation").glob("*.py")))
    by_hand = {"README.md", "label_check.jsonl", "paper_table1.csv"}
    assert [path.name for path in RESULTS.iterdir() if path.is_file() and path.name not in by_hand
            and path.name not in sources] == []

"""Which module of analysis stands on which: arrows go down only, and in no circle.

    python -m analysis.test_arrows                 (prints every arrow)
"""
import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the ground up. A module belongs to the last storey that its name begins with.
STOREYS = (("rstitch",), ("analysis.pocket.domain", "analysis.pocket.weights"), ("analysis.instruments",),
           ("analysis", "analysis.pocket.pair"), ("analysis.presentation",),
           ("analysis.all", "analysis.demo"))


def storey(module: str) -> int:
    """0 is the ground."""
    names = [(len(name), level) for level, names in enumerate(STOREYS) for name in names
             if module == name or module.startswith(name + ".")]
    return max(names)[1]


def imports(source: str, modules: set[str]) -> set[str]:
    """The modules that a source imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            whole = {f"{node.module}.{alias.name}" for alias in node.names} & modules
            found |= whole or {node.module}
    return found & modules


def arrows() -> dict[str, set[str]]:
    """What every module of analysis, but for tests, imports of analysis and rstitch."""
    files = [path for path in ROOT.glob("analysis/**/*.py")
             if not path.name.startswith("test_") and path.stem not in ("__init__", "conftest")]
    sources = {".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text() for path in files}
    return {module: imports(source, {*sources, "rstitch"}) for module, source in sources.items()}


def upward(found: dict[str, set[str]]) -> list[str]:
    return [f"{module} -> {below}" for module, wanted in found.items() for below in wanted
            if storey(below) > storey(module)]


def circle(found: dict[str, set[str]]) -> list[str]:
    """The modules of one, if there is any."""
    try:
        TopologicalSorter(found).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_arrows_go_down_only():
    found = arrows()
    assert {"analysis.bench", "analysis.instruments.task", "analysis.presentation.figures"} <= found.keys()
    assert upward(found) == [] and circle(found) == []


@pytest.mark.parametrize("source, up", [
    ("from analysis import bench", ["analysis.instruments.rows -> analysis.bench"]),
    ("def f():\n    from analysis.presentation.figures import x",
     ["analysis.instruments.rows -> analysis.presentation.figures"]),
    ("import analysis.instruments.stats, rstitch", []), ("import json", [])])
def test_an_upward_arrow_is_seen(source, up):
    found = arrows()
    found["analysis.instruments.rows"] = imports(source, {*found, "rstitch"})
    assert upward(found) == up


def test_a_circle_is_seen():
    assert set(circle(arrows() | {"analysis.label": {"analysis.compare"}})) == {"analysis.label",
                                                                                "analysis.compare"}


if __name__ == "__main__":
    for module, wanted in sorted(arrows().items(), key=lambda arrow: (-storey(arrow[0]), arrow[0])):
        print(f"{storey(module)} {module} -> {', '.join(sorted(wanted)) or 'nothing of ours'}")

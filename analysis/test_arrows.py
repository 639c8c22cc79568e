"""Which module of analysis stands on which: arrows go down only, and in no circle.

    python -m analysis.test_arrows                 (prints every arrow)
"""
import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the ground up. A module belongs to the last storey that its name begins with.
STOREYS = (("rstitch", "rstitch_hf", "custom_generate"),
           ("analysis.pocket.domain", "analysis.pocket.weights"), ("analysis.instruments",),
           ("analysis", "analysis.pocket.pair"), ("analysis.presentation",),
           ("analysis.all", "analysis.demo"))
GROUND, UPPER = ("rstitch.py", "rstitch_hf/*.py", "custom_generate/*.py"), ("analysis/**/*.py",)


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


def arrows(*places: str) -> dict[str, set[str]]:
    """What the modules of some places, but for tests, import of all of ours."""
    files = [path for pattern in GROUND + UPPER for path in ROOT.glob(pattern)
             if not path.name.startswith("test_") and path.stem not in ("__init__", "conftest")]
    sources = {".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text() for path in files}
    shown = {path for place in places for path in ROOT.glob(place)}
    return {module: imports(source, set(sources)) for path, (module, source) in zip(files, sources.items())
            if path in shown}


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
    found = arrows(*UPPER)
    assert {"analysis.bench", "analysis.instruments.task", "analysis.presentation.figures"} <= found.keys()
    assert upward(found) == [] and circle(found) == []
    below = arrows(*GROUND)
    assert {"rstitch", "rstitch_hf.command"} <= below.keys() and "rstitch_hf.inputs" in below["rstitch"]
    assert upward(below) == []  # the method, and what ties it to transformers, know nothing of analysis


@pytest.mark.parametrize("source, up", [
    ("from analysis import bench", ["analysis.instruments.rows -> analysis.bench"]),
    ("def f():\n    from analysis.presentation.figures import x",
     ["analysis.instruments.rows -> analysis.presentation.figures"]),
    ("import analysis.instruments.stats, rstitch", []), ("import json", [])])
def test_an_upward_arrow_is_seen(source, up):
    found = arrows(*UPPER)
    found["analysis.instruments.rows"] = imports(source, {*found, "rstitch"})
    assert upward(found) == up


def test_a_circle_is_seen():
    assert set(circle(arrows(*UPPER) | {"analysis.label": {"analysis.compare"}})) == {"analysis.label",
                                                                                "analysis.compare"}


if __name__ == "__main__":
    everything = arrows(*GROUND, *UPPER).items()
    for module, wanted in sorted(everything, key=lambda arrow: (-storey(arrow[0]), arrow[0])):
        print(f"{storey(module)} {module} -> {', '.join(sorted(wanted)) or 'nothing of ours'}")

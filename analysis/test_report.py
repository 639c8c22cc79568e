"""The pocket pair's report, and the committed figures."""
import json
import textwrap

from analysis import demo, frontier
from analysis.instruments.rows import append_row, read_rows
from analysis.presentation import report


def test_report_resumes_and_states_every_design_property(tmp_path, capsys):
    path = tmp_path / "pair.jsonl"
    for row in read_rows(report.RESULTS / "pair.jsonl"):
        # what takes minutes comes from the committed rows, and must not be computed again
        if row["what"] != "method":
            append_row(path, row)
    rows = report.run(path, n=4, taus=(0.02,), workers=1)
    text = path.read_text()
    report.run(path, n=4, taus=(0.02,), workers=1)
    assert path.read_text() == text
    assert {r.get("method") for r in rows} == {None, "SLM", "LLM", "LLM-short", "R-Stitch", "random",
                                               "R-Stitch, LLM-short", "random, LLM-short"}
    share = {r["method"]: (r["p"], r["llm_share"]) for r in rows if r["what"] == "method"}
    for kind in ("", ", LLM-short"):
        assert share["random" + kind][0] == share["R-Stitch" + kind][1]
    assert share["R-Stitch"] != share["R-Stitch, LLM-short"]
    assert all(r["commit"] is None or len(r["commit"]) >= 7 for r in rows)
    assert all(r["source"] == "measured" for r in rows)
    report.show(rows)
    out = capsys.readouterr().out
    assert out.count("holds") + out.count("FAILS") == 5


def test_committed_figures_carry_their_provenance():
    rows = read_rows(report.RESULTS / "pair.jsonl")
    assert {"SLM", "LLM", "LLM-short"} <= {r.get("method") for r in rows}
    for r in rows:
        assert r["source"] == "measured" and r["command"].startswith(("python -m analysis.pair --report",
                                                                   "python -m analysis.presentation.report"))
        assert r["n"] >= 4000 or r["what"] != "method"


def test_the_readme_and_the_results_page_show_the_committed_figures():
    page, rows = (report.RESULTS / "README.md").read_text(), read_rows(report.RESULTS / "pair.jsonl")
    assert len({r["tau"] for r in rows if r.get("method") == "R-Stitch"}) >= 12
    assert report.sweep(rows) in page
    rows = list({(r["kind"], r["name"]): r for r in read_rows(report.RESULTS / "frontier.jsonl")}.values())
    compared = read_rows(report.RESULTS / "compare.jsonl")
    assert frontier.recipes(rows, compared) in page and frontier.ablations(rows) in page
    assert textwrap.indent(demo.show(json.loads((report.RESULTS / "table.json").read_text())),
                           "    ") in (report.RESULTS.parent.parent / "SERVING.md").read_text()


def test_committed_design_properties_hold():
    assert [name for name, _, holds in report.design(read_rows(report.RESULTS / "pair.jsonl"))
            if not holds] == []

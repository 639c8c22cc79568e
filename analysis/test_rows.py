"""Files of rows."""


from analysis.instruments.rows import append_row, read_rows


def test_rows_survive_a_torn_last_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_row(path, {"a": 1})
    path.write_text(path.read_text() + '{"a": 2')
    assert read_rows(path) == [{"a": 1}]
    append_row(path, {"a": 3})
    assert read_rows(path) == [{"a": 1}, {"a": 3}]

"""Files of rows."""


from analysis.instruments.rows import append_row, read_rows


def test_rows_survive_a_torn_last_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_row(path, {"a": 1})
    path.write_text(path.read_text() + '{"a": 2')
    assert read_rows(path) == [{"a": 1}]
    append_row(path, {"a": 3})
    assert read_rows(path) == [{"a": 1}, {"a": 3}]


def test_a_row_ends_where_its_line_does(tmp_path):
    """A data set's text may hold a line separator, U+2028, which is no end of a row."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "balls\u2028The box"}\n{"text": "b"}\n', encoding="utf-8")
    assert read_rows(path) == [{"text": "balls\u2028The box"}, {"text": "b"}]

"""The formats: plain aligned text, JSON, JSON Lines and CSV, in whatever encoding."""

import csv
import io
import json
from types import SimpleNamespace

import pytest
from django.core.management.base import OutputWrapper

from tests.management.conftest import run_command
from workflow_storage.management.output import Column, Output, Record
from workflow_storage.testing import stored_run

AWKWARD = 'a "quoted", [red]text[/]\n\x1b[31m\ttab ü\ud800'
ROWS = [
    SimpleNamespace(name=AWKWARD, count=12_345, data={"a": [1, None]}),
    SimpleNamespace(name="b", count=None, data=None),
]
COLUMNS = [
    Column("name", "Name", lambda row: row.name),
    Column("count", "Count", lambda row: str(row.count or ""), kind="number"),
]
RECORD = Record(("name", "count", "data"), vars)


def written(kind, encoding="utf-8", **options):
    buffer = io.BytesIO()
    stream = io.TextIOWrapper(buffer, encoding=encoding, errors="strict", newline="")
    output = Output(OutputWrapper(stream), {"format": kind, **options})
    count = output.rows(ROWS, COLUMNS, RECORD)
    stream.flush()
    assert count == 2
    return buffer.getvalue().decode(encoding)


def test_a_table_in_a_pipe_is_plain_aligned_text():
    head, first, second = written("table").splitlines()

    assert head.split() == ["Name", "Count"]
    assert "\\n\\x1b[31m\\ttab ü\\ud800" in first
    assert "[red]text[/]" in first
    assert first.endswith("  12345")
    assert second == "b"
    assert len(head) == len(first)


def test_json_and_lines_are_the_same_records():
    records = [vars(row) for row in ROWS]
    assert json.loads(written("json")) == records
    assert [json.loads(line) for line in written("jsonl").splitlines()] == records


def test_csv_has_what_has_parts_as_json():
    head, first, second = csv.reader(io.StringIO(written("csv")))
    assert head == ["name", "count", "data"]
    assert first == [AWKWARD.replace("\ud800", "\\ud800"), "12345", '{"a": [1, null]}']
    assert second == ["b", "", ""]


@pytest.mark.parametrize("kind", ["table", "json", "jsonl", "csv"])
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_every_format_can_be_written_in_every_encoding(kind, encoding):
    assert "quoted" in written(kind, encoding)


def test_colour_is_for_who_wants_it(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert "\x1b[1m" in written("table", force_color=True)
    assert "\x1b" not in written("table", force_color=True, no_color=True)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in written("table", force_color=True)


@pytest.mark.parametrize(
    "command", [["list_runs"], ["show_run", "a"], ["show_run", "a", "--state"]], ids=str
)
@pytest.mark.django_db
def test_what_programs_read_has_no_commas_in_numbers_and_no_cuts(command):
    from workflow_storage import create_storage_backend

    store = create_storage_backend("default")
    stored_run(store, id="a", total_tokens=1_234_567, error_message="x" * 5000, status="failed")
    store.states.save_state("a", {"text": "y" * 5000, "n": 1_234_567}, "node")

    for kind in ("json", "jsonl", "csv"):
        text = run_command(*command, format=kind)
        assert "1234567" in text
        assert ("x" * 5000 in text) or ("y" * 5000 in text)

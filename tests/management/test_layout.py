"""What fits into a terminal: numbers whole or not at all, the workflow always."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from workflow_storage import WorkflowRun
from workflow_storage.management.layout import (
    GAP,
    ColumnCells,
    cut_to,
    fitted,
    folded,
    unique_length,
)
from workflow_storage.management.run_columns import run_columns

TEXTS = st.text(st.characters(exclude_categories=["C", "Z", "M"]), max_size=60)


def columns(texts):
    ids, names, numbers, notes = (list(column) for column in zip(*texts, strict=True))
    return [
        ColumnCells("ID", ids, "id", 1, 8),
        ColumnCells("Workflow", names, "text", 0, 12),
        ColumnCells("Seconds", numbers, "number", 3, 8),
        ColumnCells("Status", ["completed"] * len(ids), "fixed", 2, 8),
        ColumnCells("Error", notes, "text", 4, 16),
    ]


ROWS = st.lists(
    st.tuples(
        st.uuids().map(str),
        TEXTS,
        st.floats(0, 1e9).map("{:.3f}".format),
        TEXTS,
    ),
    min_size=1,
    max_size=8,
)


@given(ROWS, st.integers(40, 250))
def test_a_table_is_no_wider_than_the_terminal_and_numbers_are_whole(rows, width):
    table = columns(rows)

    widths = fitted(table, width)

    assert sum(widths.values()) + GAP * (len(widths) - 1) <= width
    assert 1 in widths
    for place, taken in widths.items():
        if table[place].kind in {"number", "fixed"}:
            assert taken == max(map(cell_len, [table[place].title, *table[place].cells]))
    ids = [one[: widths.get(0, 36)] for one in table[0].cells]
    assert len(set(ids)) == len(set(table[0].cells))


@pytest.mark.parametrize("width", range(40, 200))
def test_a_workflow_of_two_words_stands_in_one_line_beside_its_status(width):
    lists = run_columns()
    runs = [
        WorkflowRun(
            id=f"019c13aa-000{number}-7000-8000-000000000000",
            workflow_name=name,
            status=status,
            started_at=datetime(2026, 1, 31, tzinfo=UTC),
            duration_seconds=31.5,
            total_tokens=1200,
            current_node="a node " * number,
            error_message="no total in the document",
        )
        for number, (name, status) in enumerate(
            [("support-agent", "completed"), ("invoice-extraction of a year", "failed")]
        )
    ]
    table = [
        ColumnCells(one.title, [one.cell(run) for run in runs], one.kind, one.rank, one.least)
        for one in lists
    ]

    widths = {lists[place].name: taken for place, taken in fitted(table, width).items()}

    assert widths["workflow_name"] >= len("support-agent")
    assert {"id", "status"} <= widths.keys()


NAMES = ["document-ingestion-nightly-eur", "supportAgentWithTwoReviewSteps", "a" * 30]


def widths_of_a_list(names, width):
    """Return the columns of a list of runs, and how wide each is."""
    columns = run_columns()
    runs = [
        WorkflowRun(
            id=f"019c13aa-000{number}-7000-8000-000000000000",
            workflow_name=name,
            status="completed",
            started_at=datetime(2026, 1, 31, tzinfo=UTC),
            duration_seconds=31.5,
            total_tokens=1200,
            total_cost_usd=0.25,
            current_node="extract",
            error_message="no total in the document, and none that can be guessed",
        )
        for number, name in enumerate(names)
    ]
    table = [
        ColumnCells(
            one.title, [one.cell(run) for run in runs], one.kind, one.rank, one.least, one.folds
        )
        for one in columns
    ]
    return {columns[place].name: taken for place, taken in fitted(table, width).items()}


def test_a_name_of_thirty_characters_stands_in_one_line():
    for width in range(56, 201):
        widths = widths_of_a_list(NAMES, width)

        assert widths["workflow_name"] == 30
        assert {"id", "status"} <= widths.keys()
        assert ("error_message" in widths) == (width >= 74)


def test_a_name_of_any_length_leaves_its_run_and_status():
    for width in range(40, 201):
        widths = widths_of_a_list(["n" * 256, *NAMES], width)

        assert widths["workflow_name"] >= min(width - 26, 34)
        assert {"id", "status"} <= widths.keys()
        assert ("error_message" in widths) == (width >= 78)


def test_a_name_is_folded_between_its_words():
    assert folded(NAMES[0], 14) == ["document-", "ingestion-", "nightly-eur"]
    assert folded(NAMES[1], 14) == ["supportAgent", "WithTwoReview", "Steps"]
    assert folded(NAMES[2], 14) == ["a" * 14, "a" * 14, "aa"]
    assert folded("日本語-ワークフロー", 8) == ["日本語-", "ワークフ", "ロー"]
    assert folded("日", 1) == ["日"]


@given(ROWS, st.integers(40, 200))
def test_what_is_more_important_stays_longer(rows, width):
    table = columns(rows)

    left_out = [
        column.rank for place, column in enumerate(table) if place not in fitted(table, width)
    ]
    kept = [table[place].rank for place in fitted(table, width)]

    assert not left_out or max(kept) < min(left_out)


@given(ROWS)
def test_where_there_is_room_nothing_is_cut(rows):
    table = columns(rows)
    assert list(fitted(table, 10_000).values()) == [column.natural for column in table]


@given(TEXTS, st.integers(2, 40))
def test_texts_are_folded_without_loss_and_cut_with_an_ellipsis(text, width):
    lines = folded(text, width)

    assert "".join(lines) == text
    assert all(cell_len(line) <= width for line in lines)
    assert cell_len(cut_to(text, width, "…")) <= width
    assert (cut_to(text, width, "…") == text) == (cell_len(text) <= width)


@given(st.lists(TEXTS, max_size=8))
def test_ids_are_told_apart_by_their_beginnings(ids):
    length = unique_length(ids)
    assert len({one[:length] for one in ids}) == len(set(ids))

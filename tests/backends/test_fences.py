"""The statements that save a checkpoint in a database, with all that they carry."""

import pytest
from django.db import connections
from django.test.utils import CaptureQueriesContext

from workflow_storage.testing import stored_run

USAGE = {"duration_seconds": 1.5, "tokens": 7, "cost_usd": 0.25}
LARGE = {"text": ["x" * 100] * 100}


@pytest.fixture
def run(sql_backend):
    return stored_run(sql_backend, status="running")


def statements(backend, save):
    connection = connections[backend.alias]
    with CaptureQueriesContext(
        connection,
    ) as queries:
        save()
    kinds = [query["sql"].split(maxsplit=1)[0] for query in queries]
    return [
        kind for kind in kinds if kind not in ("BEGIN", "COMMIT", "SAVEPOINT", "RELEASE", "SET")
    ]


def test_a_small_state_takes_one_statement_on_postgresql_and_two_elsewhere(sql_backend, run):
    writer = sql_backend.states.writer(run.id, attempt=1)
    totals = {"total_tokens": 1, "total_cost_usd": 0.5}
    writer.save_state({"n": 0}, "first", totals=totals, **USAGE)

    taken = statements(
        sql_backend, lambda: writer.save_state({"n": 1}, "node", totals=totals, **USAGE)
    )

    expected = {"postgresql": ["WITH"]}.get(
        connections[sql_backend.alias].vendor, ["UPDATE", "INSERT"]
    )
    assert taken == expected
    assert sql_backend.states.get_latest_checkpoint(run.id) | {"created_at": None} == {
        "step": 1,
        "node_id": "node",
        "state_data": {"n": 1},
        "created_at": None,
        "attempt": 1,
        **USAGE,
    }
    stored = sql_backend.runs.get(run.id)
    assert (stored.current_node, stored.total_tokens, stored.total_cost_usd) == ("node", 1, 0.5)


def test_a_large_state_takes_one_statement_on_postgresql_and_a_few_elsewhere(sql_backend, run):
    writer = sql_backend.states.writer(run.id, attempt=1)
    writer.save_state(LARGE, "first")
    writer.save_state(LARGE, "second")

    taken = statements(
        sql_backend,
        lambda: writer.save_state(LARGE, "node", totals={"total_tokens": 3}, **USAGE),
    )

    expected = {"postgresql": ["WITH"], "sqlite": ["UPDATE", "INSERT"]}.get(
        connections[sql_backend.alias].vendor,
        # The second one, that the base is still there.
        ["UPDATE", "SELECT", "SELECT", "INSERT"],
    )
    assert taken == expected


def test_a_bare_save_notes_nothing_and_is_one_statement_where_it_can(sql_backend, run):
    sql_backend.states.save_state(run.id, {"n": 0}, "node")

    taken = statements(sql_backend, lambda: sql_backend.states.save_state(run.id, {"n": 1}, "x"))

    expected = {"postgresql": ["WITH"], "sqlite": ["INSERT"]}
    assert taken == expected.get(connections[sql_backend.alias].vendor, ["SELECT", "INSERT"])
    assert sql_backend.runs.get(run.id).current_node is None


@pytest.mark.parametrize("column", ["total_tokens", "current_node", "heartbeat_at"])
def test_no_index_holds_a_column_that_a_checkpoint_changes(column):
    from workflow_storage.models import WorkflowRun

    assert all(column not in index.fields for index in WorkflowRun._meta.indexes)

"""What is deleted in a Django database: without loading it, and past what cannot be deleted."""

import re
from datetime import timedelta

import pytest
from django.core import serializers
from django.db import connections, transaction
from django.db.models.signals import post_delete, pre_delete
from django.utils import timezone

from workflow_storage import ExecutionState, StorageUnavailableError, WorkflowRun
from workflow_storage.testing import stored_run

SOON = timedelta(seconds=1)


@pytest.fixture(params=[pre_delete, post_delete], ids=["pre_delete", "post_delete"])
def audit(request):
    """A receiver of a project that keeps what is deleted, of all models, as JSON."""
    kept = []

    def keep(sender, instance, **kwargs):
        kept.append(serializers.serialize("json", [instance]))

    request.param.connect(keep)
    yield kept
    request.param.disconnect(keep)


def grown_run(backend, **fields):
    """A run with labels, an attempt that is over, and states of which some are deltas."""
    run = stored_run(backend, labels={"tenant": "acme"}, **fields)
    for number in range(4):
        backend.states.save_state(run.id, {"text": "x" * 9000, "number": number}, "node")
    backend.runs.update_status(run.id, "failed")
    backend.runs.update_status(run.id, "running")
    backend.runs.update_status(run.id, "completed")
    return run


@pytest.mark.parametrize(
    "delete",
    [
        lambda runs, states, run, last: runs.delete(run.id),
        lambda runs, states, run, last: runs.delete_finished(before=timezone.now() + SOON),
        lambda runs, states, run, last: runs.delete_unchanged(run, last),
        lambda runs, states, run, last: states.delete_states(run.id),
    ],
    ids=["delete", "delete_finished", "delete_unchanged", "delete_states"],
)
def test_states_are_deleted_without_loading_or_signalling_them(sql_backend, audit, delete):
    run_id = grown_run(sql_backend).id
    run, last = sql_backend.runs.get(run_id), sql_backend.states.get_latest_checkpoint(run_id)
    statements = []

    def collect(execute, sql, params, many, context):
        statements.append(sql)
        return execute(sql, params, many, context)

    with connections[sql_backend.alias].execute_wrapper(collect):
        delete(*sql_backend, run, last)

    (deleting,) = (
        place
        for place, sql in enumerate(statements)
        if re.match("DELETE FROM .execution_states", sql)
    )
    # Afterwards Django looks for what goes with the run, and finds none.
    assert not any("state_delta" in sql for sql in statements[:deleting])
    assert sql_backend.states.get_state_history(run_id) == []
    assert not any('"model": "workflow_storage.executionstate"' in text for text in audit)
    assert len(audit) in {0, 1}  # of the run itself
    assert all(f'"pk": "{run_id}"' in text for text in audit)


@pytest.fixture
def protected(sql_backend):
    """The ids of some of the finished runs, to which rows of the project refer."""
    ended = timezone.now() - timedelta(hours=1)
    runs = [
        stored_run(
            sql_backend,
            id=f"run-{number:02}",
            status="failed",
            started_at=ended,
            completed_at=ended + timedelta(seconds=number // 10),
        )
        for number in range(30)
    ]
    connection = connections[sql_backend.alias]
    field = WorkflowRun._meta.pk
    collation = field.db_parameters(connection)["collation"]
    kind = f"{field.db_type(connection)} {f'COLLATE {collation}' if connection.vendor == 'mysql' else ''}"
    with connection.cursor() as cursor:
        cursor.execute(
            f"CREATE TABLE project_invoices (run_id {kind}, FOREIGN KEY (run_id) "
            "REFERENCES workflow_runs (id))"
        )
        for number in (0, 7, 8, 29):
            cursor.execute("INSERT INTO project_invoices VALUES (%s)", [runs[number].id])
    yield [runs[number].id for number in (0, 7, 8, 29)]
    with connection.cursor() as cursor:
        cursor.execute("DROP TABLE project_invoices")


@pytest.mark.parametrize("batch_size", [1, 4, 1000])
def test_delete_finished_goes_past_runs_that_the_project_refers_to(
    sql_backend, protected, caplog, batch_size
):
    deleted = sql_backend.runs.delete_finished(before=timezone.now(), batch_size=batch_size)

    assert deleted == 26
    assert sorted(run.id for run in sql_backend.runs.iter_runs()) == protected
    (record,) = caplog.records
    assert "4 finished runs were not deleted" in record.message
    assert all(f"{run_id} (" in record.message for run_id in protected)


def test_in_a_transaction_of_the_callers_the_rest_is_deleted_too(sql_backend, protected):
    with transaction.atomic(using=sql_backend.alias):
        assert sql_backend.runs.delete_finished(before=timezone.now(), batch_size=10) == 26

    assert sql_backend.runs.count_runs() == 4


def test_an_error_in_the_middle_says_how_many_were_deleted_before(sql_backend):
    for _ in range(7):
        stored_run(sql_backend, status="failed")
    batches = []

    def fail_in_the_third_batch(execute, sql, params, many, context):
        if sql.startswith("DELETE FROM") and WorkflowRun._meta.db_table in sql:
            batches.append(sql)
            if len(batches) > 2:
                raise StorageUnavailableError("the disk is full")
        return execute(sql, params, many, context)

    with (
        connections[sql_backend.alias].execute_wrapper(fail_in_the_third_batch),
        pytest.raises(StorageUnavailableError) as error,
    ):
        sql_backend.runs.delete_finished(before=timezone.now() + SOON, batch_size=3)

    assert error.value.__notes__ == ["Before that, 6 finished runs were deleted."]
    assert sql_backend.runs.count_runs() == 1
    assert ExecutionState.objects.using(sql_backend.alias).count() == 0

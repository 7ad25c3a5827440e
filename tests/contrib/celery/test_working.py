"""What becomes of a run when a task is carried out at once, in the same process (``apply``)."""

import logging

import pytest
from celery import Celery
from django.db import connections, transaction

from tests.contrib.celery import project
from workflow_storage import StatusConflictError, record_run
from workflow_storage.contrib import tasks
from workflow_storage.contrib.celery import publishing, record_task


def only_run(backend):
    (run,) = backend.runs.list_runs()
    return run


def attempts(backend, run_id):
    return [(one.number, one.status) for one in backend.runs.list_attempts(run_id)]


def test_a_task_is_a_run(store):
    result = project.steps.apply((2,))

    run = only_run(store)
    assert (run.id, run.status, run.outputs) == (result.id, "completed", result.get())
    assert (run.inputs, run.total_tokens, run.attempt) == ({"count": 2}, 2, 1)
    assert store.states.get_latest_state(run.id) == {"n": 1}


def test_a_task_that_fails_is_a_run_that_failed(store):
    project.fail.apply(("bad",))

    run = only_run(store)
    assert (run.status, run.outputs) == ("failed", None)
    assert run.error_message.startswith("ValueError: bad\n\nTraceback")
    assert "project.py" in run.error_message


def test_so_is_one_whose_error_the_caller_wants_to_see(store):
    with pytest.raises(ValueError, match="bad"):
        project.fail.apply(("bad",), throw=True)

    assert only_run(store).error_message.startswith("ValueError: bad")


def test_a_task_that_is_tried_again_is_one_run_with_several_attempts(store):
    assert project.try_again.apply((2,)).get() == 3

    run = only_run(store)
    assert attempts(store, run.id) == [(1, "failed"), (2, "failed"), (3, "completed")]
    first = store.runs.list_attempts(run.id)[0]
    assert first.error_message.startswith("OSError: no route 0")
    assert (run.error_message, run.outputs) == (None, 3)
    assert [one["attempt"] for one in store.states.iter_steps(run.id)] == [1, 2, 3]


def test_a_task_that_is_replaced_goes_on_in_the_same_run(store):
    assert project.replaced.apply((5,)).get() == 6

    run = only_run(store)
    assert (run.workflow_name.rpartition(".")[2], run.status, run.outputs) == (
        "replaced",
        "completed",
        6,
    )


def test_a_task_in_a_recording_has_it_as_parent(store):
    with record_run("view", backend=store) as around:
        project.add.apply((1,))

    (run,) = store.runs.list_runs(parent_id=around.run_id)
    assert run.workflow_name == "tests.contrib.celery.project.add"


def test_so_has_one_in_a_recording_in_a_task(store):
    project.nested.apply(kwargs={"at_once": True})

    runs = {run.workflow_name.rpartition(".")[2]: run for run in store.runs.list_runs()}
    assert runs["add"].parent_id == runs["inside"].id
    assert runs["inside"].parent_id == runs["nested"].id


def test_a_task_of_another_app_says_itself_how_it_is_recorded(store):
    app = Celery("another", set_as_current=False)

    @app.task
    @record_task(False)
    def unrecorded():
        return 1

    assert unrecorded.apply().get() == 1
    assert store.runs.list_runs() == []


def test_what_a_task_sets_is_its_result_if_it_returns_none(store):
    project.sets_outputs.apply()

    assert only_run(store).outputs == {"set": True}


def test_a_result_that_is_ignored_is_not_kept(store):
    project.ignored.apply((5,))

    run = only_run(store)
    assert (run.status, run.outputs) == ("completed", None)


def test_a_result_that_is_no_json_is_left_out(store):
    project.returns_no_json.apply()

    run = only_run(store)
    assert (run.status, run.outputs) == ("completed", None)


def test_a_task_that_wants_to_be_ignored_is_cancelled(store):
    project.ignore.apply()

    run = only_run(store)
    assert run.status == "cancelled"
    assert "nothing to do" in run.error_message


def test_a_task_that_exits_has_failed(store):
    with pytest.raises(SystemExit):
        project.exit_process.apply()

    run = only_run(store)
    assert run.status == "failed"
    assert run.error_message.splitlines()[0].endswith("TaskExitError: SystemExit(3)")


def test_a_task_that_is_suspended_waits_and_goes_on_when_it_is_sent_again(store):
    result = project.approve.apply((900,))
    run = only_run(store)
    assert (run.status, run.waiting_for, result.state) == (
        "pending",
        "approval by finance",
        "IGNORED",
    )

    assert project.approve.apply((900,), task_id=result.id).get() == 900

    assert attempts(store, result.id) == [(1, "pending"), (2, "completed")]


@pytest.mark.parametrize(
    ("options", "ended"), [({"retries": 1}, "failed"), ({"replaced_task_nesting": 1}, "pending")]
)
def test_the_attempt_is_over_before_the_next_one_can_begin(store, broker, options, ended):
    result = project.sends_itself.apply(kwargs=options)

    assert result.get() == "pending"
    (attempt,) = store.runs.list_attempts(result.id)
    assert attempt.status == ended
    if ended == "failed":
        assert attempt.error_message == publishing.TRIED_AGAIN


def test_one_whose_retry_cannot_be_sent_has_failed(store, broker):
    project.sends_itself_nowhere.apply()

    run = only_run(store)
    assert (run.status, run.error_message) == ("failed", publishing.NOT_SENT)


def test_a_run_that_was_taken_over_is_left_to_its_owner(store, caplog):
    assert project.taken_over.apply().get() == 1

    run = only_run(store)
    assert (run.status, run.worker, run.outputs) == ("running", "other", None)
    (record,) = [one for one in caplog.records if one.name == tasks.__name__]
    assert record.levelno == logging.WARNING


class TestBrokenStore:
    def test_a_task_goes_on_without_it(self, settings, caplog):
        settings.WORKFLOW_STORAGE_CELERY = {"backend": "redis://127.0.0.1:1/0"}

        assert project.add.apply((1, 2)).get() == 3

        told = [one for one in caplog.records if one.name == tasks.__name__]
        assert len(told) == 2
        assert all(one.exc_info for one in told)

    def test_its_end_is_stored_if_the_store_is_there_again(self, store, monkeypatch):
        monkeypatch.setattr(tasks, "start", lambda *args: 1 / 0)

        project.add.apply((1, 2))

        run = only_run(store)
        assert (run.status, run.outputs, run.attempt) == ("completed", 3, 0)

    def test_the_run_of_another_worker_that_began_it_at_the_same_time_is_its(
        self, store, monkeypatch
    ):
        def overtaken(task, backend, heartbeat):
            tasks.enqueue(task, backend)
            backend.runs.update_status(task.run_id, "running", worker="other")
            raise StatusConflictError(task.run_id, "running", ())

        monkeypatch.setattr(tasks, "start", overtaken)

        project.add.apply((1, 2))

        assert only_run(store).status == "running"

    def test_a_transaction_of_the_callers_stays_usable(self, sql_backend, sql_url, settings):
        settings.WORKFLOW_STORAGE_CELERY = {"backend": sql_url}
        alias = sql_backend.alias
        with connections[alias].cursor() as cursor:
            cursor.execute("ALTER TABLE workflow_runs RENAME TO moved_runs")
        try:
            with transaction.atomic(using=alias):
                assert project.add.apply((1, 2)).get() == 3
                with connections[alias].cursor() as cursor:
                    cursor.execute("SELECT 1")
        finally:
            with connections[alias].cursor() as cursor:
                cursor.execute("ALTER TABLE moved_runs RENAME TO workflow_runs")

"""A task of a queue as a run: whatever the queue does with it."""

import logging
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.db import DatabaseError, connections, transaction

from workflow_storage import RunLostError, StatusConflictError, current_run, record_run
from workflow_storage.contrib import tasks
from workflow_storage.contrib.tasks import Task
from workflow_storage.recorder import RecordedRun
from workflow_storage.recorder.run import run_around
from workflow_storage.status import RunStatus
from workflow_storage.validation import equal_runs

TASK = Task("task-1", "mail", {"to": "a"}, {"queue": "fast", "empty": ""})


@pytest.fixture
def backend(any_backend):
    return any_backend


def attempts(backend, run_id="task-1"):
    return [(one.number, one.status) for one in backend.runs.list_attempts(run_id)]


def in_another_thread(function, *args):
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(function, *args).result()
        pool.submit(connections.close_all).result()
    return result


class TestEnqueue:
    def test_a_task_that_waits_is_a_pending_run_whose_parent_is_the_run_around(self, backend):
        with record_run("view", backend=backend) as around:
            tasks.enqueue(TASK, backend)

        run = backend.runs.get("task-1")
        assert (run.status, run.workflow_name, run.inputs) == ("pending", "mail", {"to": "a"})
        assert run.labels == {"queue": "fast"}
        assert run.parent_id == around.run_id
        assert run.attempt == 0

    def test_a_task_that_has_a_run_keeps_it(self, backend):
        tasks.start(TASK, backend)
        tasks.enqueue(TASK, backend)
        tasks.finish("task-1", outputs=1)

        assert backend.runs.get("task-1").status == "completed"

    def test_a_task_that_comes_from_no_run_around_has_the_parent_that_it_names(self, backend):
        tasks.enqueue(TASK._replace(parent_id="chain-1"), backend)
        tasks.start(Task("task-2", "w", parent_id="chain-1"), backend)
        tasks.finish("task-2")

        parents = {run.id: run.parent_id for run in backend.runs.list_runs()}
        assert parents == {"task-1": "chain-1", "task-2": "chain-1"}

    @pytest.mark.parametrize(
        ("before", "after"),
        [("failed", "pending"), ("completed", "pending"), ("running", "running")],
    )
    def test_one_that_has_ended_waits_again_for_who_says_so(self, backend, before, after):
        tasks.enqueue(TASK, backend)
        backend.runs.update_status("task-1", before)

        tasks.enqueue(TASK, backend, again=True)

        assert backend.runs.get("task-1").status == after


class TestAttempt:
    def test_it_begins_the_run_that_waits(self, backend):
        tasks.enqueue(TASK, backend)
        run = tasks.start(TASK, backend)
        assert current_run() is run
        run.save_state({"n": 1}, "node")

        assert tasks.finish("task-1", outputs=[1])

        stored = backend.runs.get("task-1")
        assert (stored.status, stored.outputs, attempts(backend)) == (
            "completed",
            [1],
            [(1, "completed")],
        )
        with pytest.raises(LookupError):
            current_run()

    def test_it_begins_a_run_where_none_waits(self, backend):
        tasks.start(TASK, backend)
        tasks.finish("task-1", exc=ValueError("bad"))

        stored = backend.runs.get("task-1")
        assert stored.error_message.startswith("ValueError: bad")
        assert (stored.status, stored.labels) == ("failed", {"queue": "fast"})

    def test_it_begins_the_run_that_is_stored_as_waiting_meanwhile(self, backend, monkeypatch):
        add = type(backend.runs).add

        def overtaken(runs, run):
            monkeypatch.undo()
            tasks.enqueue(TASK, backend)
            add(runs, run)

        monkeypatch.setattr(type(backend.runs), "add", overtaken)
        tasks.start(TASK, backend)

        assert attempts(backend) == [(1, "running")]
        tasks.finish("task-1")

    @pytest.mark.parametrize("before", list(RunStatus))
    def test_it_goes_on_with_a_run_in_whatever_status(self, backend, before):
        lost = in_another_thread(tasks.start, TASK, backend, None)
        lost.save_state({"n": 1}, "node")
        if before is not RunStatus.RUNNING:
            backend.runs.update_status("task-1", before)

        run = tasks.start(TASK, backend)
        assert (run.attempt, run.state) == (2, {"n": 1})
        tasks.finish("task-1")

        first = "failed" if before is RunStatus.RUNNING else before.value
        assert attempts(backend) == [(1, first), (2, "completed")]

    def test_whoever_lost_the_run_changes_nothing(self, backend, caplog):
        finish = tasks.logs_errors(tasks.finish)
        tasks.start(TASK, backend)
        backend.runs.update_status("task-1", "running", worker="other")

        assert finish("task-1", outputs=1) is None

        stored = backend.runs.get("task-1")
        assert (stored.status, stored.outputs) == ("running", None)
        assert [record.levelno for record in caplog.records] == [logging.WARNING]

    def test_a_task_in_a_task_has_it_as_parent(self, backend):
        tasks.start(TASK, backend)
        tasks.start(Task("task-2", "inner"), backend)
        assert current_run().run_id == "task-2"
        tasks.finish("task-2")
        assert current_run().run_id == "task-1"
        tasks.finish("task-1")

        assert backend.runs.get("task-2").parent_id == "task-1"

    def test_what_it_set_itself_is_its_result_if_it_returns_none(self, backend):
        tasks.start(TASK, backend).outputs = "set"
        tasks.finish("task-1", outputs=None)

        assert backend.runs.get("task-1").outputs == "set"

    def test_the_result_of_an_attempt_before_is_not_its_own(self, backend):
        tasks.start(TASK, backend)
        tasks.finish("task-1", outputs=1)
        tasks.start(TASK, backend)
        tasks.finish("task-1", outputs=None)

        stored = backend.runs.get("task-1")
        assert (stored.status, stored.outputs) == ("completed", None)

    def test_what_cannot_be_stored_is_left_out(self, backend, caplog):
        tasks.start(TASK._replace(inputs={"x": float("nan")}), backend)
        tasks.finish("task-1", outputs=object())

        stored = backend.runs.get("task-1")
        assert (stored.status, stored.inputs, stored.outputs) == ("completed", None, None)
        assert [record.levelname for record in caplog.records] == ["WARNING"] * 2

    def test_a_run_whose_end_is_not_stored_is_around_nobody_any_more(self, backend, monkeypatch):
        """In a worker with an event loop the context of what began it is not that of its end."""

        async def work():
            await sync_to_async(tasks.start)(TASK, backend)
            assert run_around().run_id == "task-1"
            monkeypatch.setattr(type(backend.runs), "update_status", out_of_order)
            with pytest.raises(OSError, match="out of order"):
                await sync_to_async(tasks.finish)("task-1")
            return run_around()

        def out_of_order(*args, **kwargs):
            raise OSError("out of order")

        assert async_to_sync(work)() is None

    def test_one_that_is_suspended_waits(self, backend):
        run = tasks.start(TASK, backend)
        with pytest.raises(BaseException, match="approval") as caught:
            run.suspend("approval")
        tasks.finish("task-1", exc=caught.value)

        stored = backend.runs.get("task-1")
        assert (stored.status, stored.waiting_for) == ("pending", "approval")

    def test_one_that_was_not_begun_here_is_not_ended_here(self, backend):
        assert not tasks.finish("task-1")


class TestPutBack:
    def test_the_run_waits_and_its_attempt_has_failed(self, backend):
        run = tasks.start(TASK, backend)
        run.add_usage(tokens=3)

        assert tasks.put_back("task-1", "OSError: no route")

        stored = backend.runs.get("task-1")
        assert (stored.status, stored.error_message) == ("pending", "OSError: no route")
        assert stored.total_tokens == 3
        assert stored.duration_seconds is not None
        assert run.status == "pending"
        with pytest.raises(LookupError):
            current_run()
        assert tasks.start(TASK, backend).total_tokens == 3
        tasks.finish("task-1")
        assert attempts(backend) == [(1, "failed"), (2, "completed")]
        (first, second) = backend.runs.list_attempts("task-1")
        assert (first.error_message, second.error_message) == ("OSError: no route", None)

    def test_without_an_error_its_attempt_has_not_failed(self, backend):
        tasks.start(TASK, backend)

        tasks.put_back("task-1")

        assert attempts(backend) == [(1, "pending")]

    def test_whoever_lost_the_run_does_not_put_it_back(self, backend):
        tasks.start(TASK, backend)
        backend.runs.update_status("task-1", "running", worker="other")

        with pytest.raises(RunLostError):
            tasks.put_back("task-1", "late")

        assert attempts(backend) == [(1, "failed"), (2, "running")]

    def test_one_that_was_not_begun_here_is_not_put_back_here(self, backend):
        assert not tasks.put_back("task-1")


def test_a_run_that_is_left_is_as_it_was(backend):
    run = tasks.start(TASK, backend)
    before = backend.runs.get("task-1")

    assert tasks.leave("task-1")

    assert equal_runs(backend.runs.get("task-1"), before)
    with pytest.raises(LookupError):
        current_run()
    with pytest.raises(StatusConflictError):
        run.save_state({}, "late")
    assert not tasks.leave("task-1")
    assert not tasks.finish("task-1")


class TestEnd:
    @pytest.mark.parametrize("begun", [False, True])
    def test_it_ends_a_run_of_another_process(self, backend, begun):
        tasks.enqueue(TASK, backend)
        if begun:
            backend.runs.update_status("task-1", "running")

        tasks.end(TASK, RunStatus.FAILED, backend, error_message="killed")

        stored = backend.runs.get("task-1")
        assert (stored.status, stored.error_message) == ("failed", "killed")

    def test_it_leaves_a_run_that_another_worker_has_begun_meanwhile(self, backend):
        tasks.enqueue(TASK, backend)
        backend.runs.update_status("task-1", "running", worker="another")

        tasks.end(TASK, RunStatus.FAILED, backend, error_message="late")

        assert backend.runs.get("task-1").status == "running"

    def test_it_adds_a_run_where_there_is_none(self, backend):
        tasks.end(TASK, RunStatus.COMPLETED, backend, outputs=1)

        stored = backend.runs.get("task-1")
        assert (stored.status, stored.outputs, stored.inputs) == ("completed", 1, {"to": "a"})

    def test_it_leaves_a_run_that_has_ended(self, backend):
        tasks.end(TASK, RunStatus.COMPLETED, backend, outputs=1)
        tasks.end(TASK, RunStatus.FAILED, backend, error_message="late")

        assert backend.runs.get("task-1").status == "completed"


class TestIds:
    @pytest.mark.parametrize("task_id", ["x" * 64, "", "a\0b"])
    def test_an_id_that_a_run_cannot_have_becomes_a_uuid(self, backend, task_id):
        tasks.enqueue(Task(task_id, "w"), backend)
        tasks.start(Task(task_id, "w"), backend)
        assert tasks.recorded(task_id).run_id == tasks.run_id_of(task_id)
        tasks.finish(task_id)

        (run,) = backend.runs.list_runs()
        assert uuid.UUID(run.id).version == 5
        assert run.status == "completed"


class TestTransactions:
    def test_an_error_leaves_the_callers_transaction_usable(self, sql_backend, monkeypatch):
        alias = sql_backend.alias

        def broken(*args):
            with connections[alias].cursor() as cursor:
                cursor.execute("SELECT * FROM no_such_table")

        monkeypatch.setattr(type(sql_backend.runs), "get", broken)
        with transaction.atomic(using=alias):
            assert tasks.logs_errors(lambda _: tasks.start(TASK, sql_backend))("task-1") is None
            monkeypatch.undo()
            tasks.enqueue(TASK, sql_backend)

        assert sql_backend.runs.get("task-1").status == "pending"

    @pytest.mark.parametrize("exc", [None, ValueError("bad")])
    def test_one_that_broke_the_callers_transaction_is_left_nevertheless(self, sql_backend, exc):
        alias = sql_backend.alias
        finish = tasks.logs_errors(tasks.finish)
        with transaction.atomic(using=alias):
            tasks.start(TASK, sql_backend)
            with suppress(DatabaseError), connections[alias].cursor() as cursor:
                cursor.execute("SELECT * FROM no_such_table")
            transaction.set_rollback(True, using=alias)
            finish("task-1", exc=exc)
            with pytest.raises(LookupError):
                current_run()

        assert sql_backend.runs.get("task-1") is None


def test_what_a_receiver_raises_is_logged_with_its_traceback(caplog):
    @tasks.logs_errors
    def receiver(task_id: str) -> RecordedRun:
        raise OSError("no route to the store")

    assert receiver("task-1") is None
    (record,) = caplog.records
    assert "task-1" in record.getMessage()
    assert record.exc_info[0] is OSError

"""The beginning and the end of a run, while the store does not answer."""

import pytest
from asgiref.sync import async_to_sync
from django.db import connections, transaction

from tests.recorder.conftest import only_run
from workflow_storage import (
    NotResumableError,
    StorageError,
    StorageUnavailableError,
    TablesMissingError,
    create_storage_backend,
    record_run,
    resume_run,
)
from workflow_storage.recorder import ending
from workflow_storage.testing import in_threads, stored_run


class Unreliable:
    """Calls a method, and says that the store did not answer: before the call, or after it."""

    def __init__(self, monkeypatch, runs, failures, error=StorageUnavailableError):
        self.failures, self.error, self.tried = list(failures), error, []
        for name in ("update_status", "aupdate_status"):
            monkeypatch.setattr(runs, name, self.wrapped(getattr(runs, name), name[0] == "a"))

    def wrapped(self, method, is_async):
        def fails(when, kwargs):
            if when == "before":
                self.tried.append(kwargs)
            return self.failures[:1] == [when] and bool(self.failures.pop(0))

        def call(*args, **kwargs):
            if fails("before", kwargs):
                raise self.error("down")
            method(*args, **kwargs)
            if fails("after", kwargs):
                raise self.error("down")

        async def acall(*args, **kwargs):
            if fails("before", kwargs):
                raise self.error("down")
            await method(*args, **kwargs)
            if fails("after", kwargs):
                raise self.error("down")

        return acall if is_async else call


@pytest.mark.parametrize("failures", [["before"], ["after"], ["before", "before", "after"]])
class TestATryThatFailed:
    def test_the_end_is_tried_again_with_the_same_time(self, backend, monkeypatch, failures):
        with record_run("w", backend=backend) as run:
            run.add_usage(tokens=5)
            run.outputs = "result"
            store = Unreliable(monkeypatch, backend.runs, failures)

        stored = only_run(backend)
        assert (stored.status, stored.outputs, stored.total_tokens) == ("completed", "result", 5)
        assert len(store.tried) == len(failures) + 1
        assert {kwargs["completed_at"] for kwargs in store.tried} == {stored.completed_at}
        assert run.status == "completed"

    def test_so_is_that_of_a_failure(self, backend, monkeypatch, failures):
        with pytest.raises(OSError) as caught, record_run("w", backend=backend):
            Unreliable(monkeypatch, backend.runs, failures)
            raise OSError

        assert not hasattr(caught.value, "__notes__")
        assert only_run(backend).status == "failed"

    def test_and_that_in_async_code(self, redis_url, django_db_blocker, monkeypatch, failures):
        with django_db_blocker.unblock():
            backend = create_storage_backend(redis_url)

            async def use():
                async with record_run("w", backend=backend) as run:
                    Unreliable(monkeypatch, backend.runs, failures)
                return run.run_id

            run_id = async_to_sync(use)()
            assert backend.runs.get(run_id).status == "completed"
            backend.runs.delete(run_id)


class TestTheEnd:
    def test_is_given_up_after_some_time(self, backend, monkeypatch):
        monkeypatch.setattr(ending, "END_PATIENCE", 0.5)
        with pytest.raises(StorageUnavailableError), record_run("w", backend=backend):
            store = Unreliable(monkeypatch, backend.runs, ["before"] * 100)

        assert 2 < len(store.tried) < 10
        assert only_run(backend).status == "running"

    def test_is_tried_once_where_another_try_is_of_no_use(self, backend, monkeypatch):
        with pytest.raises(TablesMissingError), record_run("w", backend=backend):
            store = Unreliable(monkeypatch, backend.runs, ["before"] * 9, TablesMissingError)
        assert len(store.tried) == 1

    def test_is_tried_once_in_a_transaction(self, sql_backend, monkeypatch):
        with (
            pytest.raises(StorageUnavailableError),
            transaction.atomic(using=sql_backend.alias),
            record_run("w", backend=sql_backend),
        ):
            store = Unreliable(monkeypatch, sql_backend.runs, ["before"] * 9)
        assert len(store.tried) == 1

    # A file has no connection that can be cut.
    @pytest.mark.parametrize("sql_url", ["postgres", "mysql"], indirect=True)
    def test_is_stored_though_the_connection_was_cut(self, sql_backend):
        ask, cut = {
            "postgresql": ("SELECT pg_backend_pid()", "SELECT pg_terminate_backend({})"),
            "mysql": ("SELECT CONNECTION_ID()", "KILL {}"),
        }[connections[sql_backend.alias].vendor]

        with record_run("w", backend=sql_backend) as run:
            with connections[sql_backend.alias].cursor() as cursor:
                cursor.execute(ask)
                (session,) = cursor.fetchone()

            def cut_it(_):
                with connections[sql_backend.alias].cursor() as cursor:
                    cursor.execute(cut.format(session))

            in_threads(1, cut_it)
            run.outputs = "result"

        assert (only_run(sql_backend).status, only_run(sql_backend).outputs) == (
            "completed",
            "result",
        )

    def test_a_result_that_the_store_refuses_fails_the_run(self, backend, monkeypatch):
        with (
            pytest.raises(StorageError, match="too large"),
            record_run("w", backend=backend) as run,
        ):
            run.save_state({"n": 1}, "node")
            run.outputs = "result"
            store = Unreliable(
                monkeypatch, backend.runs, ["before"], lambda _: StorageError("too large")
            )

        stored = only_run(backend)
        assert len(store.tried) == 2
        assert (stored.status, stored.outputs, run.status) == ("failed", None, "failed")
        assert stored.error_message.startswith(
            "workflow_storage.exceptions.StorageError: too large"
        )


class TestTheBeginning:
    @pytest.mark.parametrize("failure", ["before", "after"])
    def test_is_tried_once_more_with_the_same_time(self, backend, monkeypatch, failure):
        run = stored_run(backend, status="failed")
        store = Unreliable(monkeypatch, backend.runs, [failure])

        with resume_run(run.id, backend=backend) as resumed:
            assert resumed.attempt == only_run(backend).attempt == 1

        first, second, _ = store.tried
        assert first["attempt_started_at"] == second["attempt_started_at"]
        assert only_run(backend).status == "completed"

    def test_is_not_tried_a_third_time(self, backend, monkeypatch):
        run = stored_run(backend, status="failed")
        Unreliable(monkeypatch, backend.runs, ["before"] * 2)
        with pytest.raises(StorageUnavailableError), resume_run(run.id, backend=backend):
            pytest.fail("the block ran")
        assert only_run(backend).status == "failed"

    def test_of_another_worker_at_the_same_time_is_not_taken_for_its_own(
        self, backend, monkeypatch
    ):
        run = stored_run(backend, status="failed")
        begin = backend.runs.update_status

        def begin_second(run_id, status, **kwargs):
            monkeypatch.undo()
            begin(run_id, status, **{**kwargs, "worker": "other-host:7"})
            begin(run_id, status, **kwargs)

        monkeypatch.setattr(backend.runs, "update_status", begin_second)
        with (
            pytest.raises(NotResumableError, match="attempt 1 on other-host:7"),
            resume_run(run.id, backend=backend),
        ):
            pytest.fail("the block ran")

"""What an exception leaves in the run, and what the author hears of it."""

import asyncio

import pytest
from asgiref.sync import async_to_sync
from django.db import transaction

from tests.recorder.conftest import only_run
from workflow_storage import (
    StorageUnavailableError,
    record_run,
)
from workflow_storage.recorder import MAX_ERROR_MESSAGE, describe_error
from workflow_storage.testing import outcome


class TestEnding:
    @pytest.fixture(autouse=True)
    def impatient(self, monkeypatch):
        """The end of a run is tried for less time than in real life."""
        monkeypatch.setattr("workflow_storage.recorder.ending.END_PATIENCE", 0.2)

    def test_an_exception_fails_the_run_and_goes_on_unchanged(self, backend):
        secret_local = "not to be stored"
        error = KeyError("the reason")

        with pytest.raises(KeyError) as caught, record_run("w", backend=backend):
            raise error

        assert caught.value is error
        assert secret_local
        stored = only_run(backend)
        assert stored.status == "failed"
        assert stored.error_message.startswith("KeyError: 'the reason'\n\nTraceback")
        assert "raise error" in stored.error_message
        assert "not to be stored" not in stored.error_message

    @pytest.mark.parametrize(
        "error", [KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError]
    )
    def test_what_ends_the_process_or_task_cancels_the_run(self, backend, error):
        with pytest.raises(error), record_run("w", backend=backend):
            raise error

        assert only_run(backend).status == "cancelled"

    def test_if_the_store_fails_too_the_exception_still_arrives(self, backend, monkeypatch, caplog):
        def unavailable(*args, **kwargs):
            raise StorageUnavailableError("the store is down")

        with (
            pytest.raises(ZeroDivisionError) as caught,
            record_run("w", backend=backend),
        ):
            monkeypatch.setattr(backend.runs, "update_status", unavailable)
            _ = 1 / 0

        assert "the store is down" in caught.value.__notes__[0]
        assert "could not be stored" in caplog.text

    def test_an_exception_that_takes_no_note_and_cannot_be_printed_still_arrives(
        self, backend, monkeypatch
    ):
        class Awkward(Exception):
            __notes__ = "no list"

            def __getattr__(self, name):
                raise RuntimeError(name)

        def unavailable(*args, **kwargs):
            raise StorageUnavailableError("down")

        with pytest.raises(Awkward), record_run("w", backend=backend):
            raise Awkward
        assert only_run(backend).status == "failed"
        with pytest.raises(Awkward), record_run("w", backend=backend):
            monkeypatch.setattr(backend.runs, "update_status", unavailable)
            raise Awkward


def _from_sync_code(work):
    async def wait_for():
        return await work

    return async_to_sync(wait_for)()


class TestInsideATransaction:
    """Of the caller, which takes the record of the failure with it if it is rolled back."""

    def test_the_exception_says_that_its_record_may_be_lost_and_what_to_set(self, sql_backend):
        with (
            pytest.raises(ZeroDivisionError) as caught,
            transaction.atomic(using=sql_backend.alias),
            record_run("w", backend=sql_backend) as run,
        ):
            _ = 1 / 0

        (note,) = caught.value.__notes__
        assert f"run {run.run_id} was recorded inside a transaction of {sql_backend.name!r}" in note
        assert "own_connection=True" in note
        assert sql_backend.runs.get(run.run_id) is None

    @pytest.mark.parametrize("run", [_from_sync_code, asyncio.run])
    def test_so_it_does_in_async_code(self, sql_backend, run):
        async def record():
            async with record_run("w", backend=sql_backend):
                _ = 1 / 0

        with (
            pytest.raises(ZeroDivisionError) as caught,
            transaction.atomic(using=sql_backend.alias),
        ):
            run(record())

        assert "inside a transaction" in caught.value.__notes__[0]

    def test_without_one_there_is_nothing_to_say(self, sql_backend):
        async def record():
            async with record_run("w", backend=sql_backend):
                _ = 1 / 0

        with pytest.raises(ZeroDivisionError) as caught, record_run("w", backend=sql_backend):
            _ = 1 / 0
        assert not hasattr(caught.value, "__notes__")
        with pytest.raises(ZeroDivisionError) as caught:
            asyncio.run(record())
        assert not hasattr(caught.value, "__notes__")


class TestErrorText:
    def test_it_is_bounded(self):
        text = describe_error(ValueError("x" * 10**6))
        assert len(text) <= MAX_ERROR_MESSAGE
        assert text.startswith("ValueError: xxx")

    def test_deep_recursion_is_described(self):
        def recurse():
            recurse()

        with pytest.raises(RecursionError) as caught:
            recurse()
        text = describe_error(caught.value)
        assert text.startswith("RecursionError")
        assert len(text) <= MAX_ERROR_MESSAGE

    def test_one_without_a_traceback_is_told_once(self):
        assert describe_error(ValueError("no pages")) == "ValueError: no pages"

    def test_an_exception_that_cannot_be_printed_is_described(self):
        class Unprintable(Exception):
            def __str__(self):
                raise RuntimeError

        assert "Unprintable" in describe_error(Unprintable())

    def test_outcome_names_are_those_of_the_contract(self, backend):
        assert outcome(lambda: backend.runs.heartbeat("gone")) == "RunNotFoundError"

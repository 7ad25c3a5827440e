"""What an exception leaves in the run, and what the author hears of it."""

import asyncio

import pytest

from tests.recorder.conftest import only_run
from workflow_storage import (
    StorageUnavailableError,
    record_run,
)
from workflow_storage.recorder import MAX_ERROR_MESSAGE, describe_error
from workflow_storage.testing import outcome


class TestEnding:
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

    def test_an_exception_that_cannot_be_printed_is_described(self):
        class Unprintable(Exception):
            def __str__(self):
                raise RuntimeError

        assert "Unprintable" in describe_error(Unprintable())

    def test_outcome_names_are_those_of_the_contract(self, backend):
        assert outcome(lambda: backend.runs.heartbeat("gone")) == "RunNotFoundError"

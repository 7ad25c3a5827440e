"""Runs that wait: suspended, listed, and resumed."""

import asyncio
from datetime import timedelta

import pytest

from tests.recorder.conftest import only_run
from workflow_storage import InvalidFieldError, StatusConflictError, record_run, resume_run
from workflow_storage.signals import run_finished


@pytest.fixture
def backend(every_backend):
    return every_backend


def test_a_suspended_run_waits_and_goes_on(backend):
    with record_run("w", backend=backend, heartbeat=60) as run:
        run.add_usage(tokens=5, cost_usd=0.5)
        with run.node("ask"):
            run.save_state({"asked": True})
            run.suspend("approval by finance")
        pytest.fail("the block goes on")

    assert run.status == "pending"
    assert run.waiting_for == "approval by finance"
    stored = only_run(backend)
    assert (stored.status, stored.waiting_for) == ("pending", "approval by finance")
    assert (stored.error_message, stored.completed_at) == (None, None)
    assert stored.total_tokens == 5
    assert [run.id for run in backend.runs.list_runs(waiting=True)] == [run.run_id]
    assert backend.runs.list_stalled(timedelta(0)) == []
    (attempt,) = backend.runs.list_attempts(run.run_id)
    assert attempt.status == "pending"

    with resume_run(run.run_id, backend=backend) as run:
        assert (run.attempt, run.state, run.node_id) == (2, {"asked": True}, "ask")
        run.outputs = "approved"
    stored = only_run(backend)
    assert (stored.status, stored.waiting_for, stored.outputs) == ("completed", None, "approved")
    assert [one.status for one in backend.runs.list_attempts(run.run_id)] == [
        "pending",
        "completed",
    ]


def test_in_async_code_it_is_the_same(backend):
    async def main():
        async with record_run("w", backend=backend) as run, run.node("ask"):
            await run.asave_state({})
            run.suspend("a webhook")
        return run

    run = asyncio.run(main())
    assert only_run(backend).waiting_for == "a webhook"
    assert run.status == "pending"


def test_a_decorated_function_that_is_suspended_returns_none(backend):
    from workflow_storage import current_run

    @record_run("w", backend=backend)
    def ask():
        current_run().outputs = "not this"
        current_run().suspend("approval")

    @record_run("w", backend=backend)
    async def aask():
        current_run().suspend("approval")

    assert ask() is None
    assert asyncio.run(aask()) is None
    assert backend.runs.count_runs(waiting=True) == 2


def test_except_exception_lets_it_pass_and_no_signal_tells_of_an_end(backend):
    ended = []

    def note(run, **kwargs):
        ended.append(run.run_id)

    run_finished.connect(note)
    try:
        with record_run("w", backend=backend) as run:
            try:
                run.suspend("approval")
            except Exception:
                pytest.fail("it is no Exception")
    finally:
        run_finished.disconnect(note)
    assert ended == []


def test_the_block_of_another_run_does_not_swallow_it(backend):
    with (
        record_run("outer", backend=backend) as outer,
        record_run("inner", backend=backend) as inner,
    ):
        outer.suspend("approval")

    assert backend.runs.get(outer.run_id).status == "pending"
    assert backend.runs.get(inner.run_id).status == "cancelled"


@pytest.mark.parametrize("reason", ["", "x" * 257, "nul\0", None, 5])
def test_a_reason_that_cannot_be_stored_is_refused(backend, reason):
    with record_run("w", backend=backend) as run, pytest.raises(InvalidFieldError, match="reason"):
        run.suspend(reason)
    assert only_run(backend).status == "completed"


def test_after_the_block_and_in_a_lost_run_it_is_refused(backend):
    with record_run("w", backend=backend) as run:
        pass
    with pytest.raises(StatusConflictError):
        run.suspend("approval")
    with (
        pytest.raises(StatusConflictError, match="is cancelled"),
        record_run("w", backend=backend) as run,
    ):
        backend.runs.update_status(run.run_id, "cancelled")
        run.suspend("approval")
    assert backend.runs.get(run.run_id).status == "cancelled"

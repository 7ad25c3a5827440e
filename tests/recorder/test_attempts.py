"""One owner for a run: what a recording writes once its attempt is over, and who hears of it."""

import asyncio
import logging
import os
import socket
from datetime import timedelta

import pytest
from asgiref.sync import async_to_sync
from django.utils import timezone

from tests.recorder.conftest import only_run
from workflow_storage import (
    DamagedStateError,
    ExecutionState,
    NotResumableError,
    RunLostError,
    RunNotFoundError,
    StateWriter,
    StorageUnavailableError,
    record_run,
    resume_run,
)
from workflow_storage.recorder import opening
from workflow_storage.recorder.opening import this_worker
from workflow_storage.testing import stored_run
from workflow_storage.validation import equal_runs


def cancel(backend, run):
    backend.runs.update_status(run.run_id, "cancelled", error_message="by an operator")


def take_over(backend, run):
    """Begin the next attempt, as another process would."""
    backend.runs.update_status(run.run_id, "running", worker="other-host:7")


class TestAttempts:
    def test_a_new_run_is_in_its_first_attempt_on_this_worker(self, backend):
        with record_run("w", backend=backend) as run:
            stored = only_run(backend)
            assert (run.attempt, stored.attempt) == (1, 1)
            assert stored.worker == f"{socket.gethostname()}:{os.getpid()}"
            assert stored.attempt_started_at == stored.started_at
            run.save_state({}, "node")

        assert backend.states.get_latest_checkpoint(run.run_id)["attempt"] == 1
        assert only_run(backend).current_node == "node"

    def test_each_resumption_is_the_next_attempt(self, backend):
        for number in range(1, 4):
            with (
                pytest.raises(OSError, match=f"error {number}"),
                record_run("w", run_id="run", backend=backend)
                if number == 1
                else resume_run("run", backend=backend) as run,
            ):
                assert run.attempt == number
                run.save_state({"n": number}, f"node {number}")
                raise OSError(f"error {number}")

        attempts = backend.runs.list_attempts("run")
        assert [attempt.number for attempt in attempts] == [1, 2, 3]
        assert [attempt.node for attempt in attempts] == ["node 1", "node 2", "node 3"]
        assert all(f"error {one.number}" in one.error_message for one in attempts)
        assert {attempt.worker for attempt in attempts} == {this_worker()}
        history = backend.states.get_state_history("run")
        assert [one["attempt"] for one in history] == [1, 2, 3]

    def test_a_long_name_of_a_host_is_cut_and_odd_bytes_are_replaced(self, monkeypatch):
        monkeypatch.setattr(socket, "gethostname", lambda: "h\udcff\0" + "x" * 300)
        worker = this_worker()
        assert len(worker) == 128
        assert worker.startswith("h??xxx")
        assert worker.endswith(f"x:{os.getpid()}")

    def test_no_two_attempts_of_a_process_begin_at_one_time(self, monkeypatch):
        now = timezone.now()
        monkeypatch.setattr(timezone, "now", lambda: now)
        times = [opening._time_of_beginning() for _ in range(100)]  # noqa: SLF001
        assert len(set(times)) == 100
        # One that goes back is followed.
        now -= timedelta(hours=1)
        assert opening._time_of_beginning() == now  # noqa: SLF001


class TestLost:
    @pytest.mark.parametrize("size", [10, 50_000])
    def test_a_cancelled_run_hears_of_it_at_its_next_checkpoint(self, backend, size):
        with (
            pytest.raises(RunLostError, match="is cancelled: attempt 1 is over") as caught,
            record_run("w", backend=backend) as run,
        ):
            run.save_state({"text": "x" * size}, "first")
            cancel(backend, run)
            run.add_usage(tokens=5)
            run.save_state({"text": "y" * size}, "second")

        assert not hasattr(caught.value, "__notes__")
        stored = only_run(backend)
        assert (stored.status, stored.error_message) == ("cancelled", "by an operator")
        assert (stored.total_tokens, stored.current_node) == (None, "first")
        assert len(backend.states.get_state_history(run.run_id)) == 1

    def test_the_error_says_who_has_the_run_since_when(self, backend):
        with (
            pytest.raises(RunLostError) as caught,
            record_run("w", backend=backend) as run,
        ):
            take_over(backend, run)
            since = only_run(backend).attempt_started_at
            run.save_state({}, "node")

        assert (
            f"was taken over by attempt 2 on other-host:7 since {since}: attempt 1 is over"
            in str(caught.value)
        )
        assert (only_run(backend).status, only_run(backend).attempt) == ("running", 2)

    def test_every_write_of_a_lost_run_is_refused(self, backend):
        async def awrite(run):
            with pytest.raises(RunLostError):
                await run.asave_state({}, "node")
            with pytest.raises(RunLostError):
                await run.aheartbeat()

        with pytest.raises(RunLostError), record_run("w", backend=backend) as run:
            take_over(backend, run)
            before = only_run(backend)
            for _ in range(3):
                with pytest.raises(RunLostError):
                    run.save_state({}, "node")
            with pytest.raises(RunLostError):
                run.heartbeat()
            async_to_sync(awrite)(run)
            run.outputs = "late"

        assert equal_runs(only_run(backend), before)
        assert backend.states.get_latest_state(run.run_id) is None

    def test_the_rightful_owner_completes_after_a_cancellation(self, backend):
        with (
            pytest.raises(RunLostError),
            record_run("w", backend=backend) as old,
        ):
            old.save_state({"n": 1}, "old")
            cancel(backend, old)
            with resume_run(old.run_id, backend=backend) as owner:
                with pytest.raises(RunLostError, match="attempt 2"):
                    old.save_state({"n": "late"}, "old")
                owner.save_state({"n": 2}, "owner")
                owner.outputs = "owner"
            old.outputs = "old"

        stored = only_run(backend)
        assert (stored.status, stored.outputs, stored.attempt) == ("completed", "owner", 2)
        assert backend.states.get_latest_state(old.run_id) == {"n": 2}
        first, second = backend.runs.list_attempts(old.run_id)
        assert (first.status, first.error_message) == ("cancelled", "by an operator")
        assert second.status == "completed"

    def test_another_exception_goes_on_its_way_with_a_note(self, backend):
        with pytest.raises(ZeroDivisionError) as caught, record_run("w", backend=backend) as run:
            take_over(backend, run)
            _ = 1 / 0

        assert "taken over by attempt 2" in caught.value.__notes__[0]
        assert only_run(backend).status == "running"

    def test_a_lost_run_that_is_left_by_the_error_of_another_one_has_a_note(self, backend):
        with (
            pytest.raises(RunLostError) as caught,
            record_run("outer", run_id="outer", backend=backend) as outer,
            record_run("inner", run_id="inner", backend=backend) as inner,
        ):
            take_over(backend, outer)
            take_over(backend, inner)
            outer.save_state({}, "node")

        assert caught.value.run_id == "outer"
        (note,) = caught.value.__notes__
        assert "run inner" in note

    @pytest.mark.parametrize("ends_by", ["nothing", "checkpoint", "exception"])
    def test_the_block_of_a_deleted_run_ends_without_a_second_error(self, backend, ends_by, caplog):
        caplog.set_level(logging.WARNING, logger="workflow_storage")
        error = None
        try:
            with record_run("w", backend=backend) as run:
                backend.runs.delete(run.run_id)
                if ends_by == "checkpoint":
                    run.save_state({}, "node")
                elif ends_by == "exception":
                    raise OSError
        except Exception as exc:
            error = exc

        expected = {"nothing": type(None), "checkpoint": RunLostError, "exception": OSError}
        assert type(error) is expected[ends_by]
        assert not hasattr(error, "__notes__")
        assert ends_by != "checkpoint" or "has been deleted" in str(error)
        assert (backend.runs.count_runs(), caplog.records) == (0, [])

    def test_async_recordings_are_fenced_too(self, backend):
        async def use():
            async with record_run("w", backend=backend) as run:
                await asyncio.to_thread(lambda: None)
                await backend.runs.aupdate_status(run.run_id, "cancelled")
                await run.asave_state({}, "node")

        with pytest.raises(RunLostError, match="is cancelled"):
            async_to_sync(use)()
        assert only_run(backend).status == "cancelled"

    def test_an_error_message_that_somebody_sets_does_not_keep_the_run_from_its_end(self, backend):
        with record_run("w", backend=backend) as run:
            backend.runs.update(run.run_id, error_message="a remark")
            run.outputs = "result"

        stored = only_run(backend)
        assert (stored.status, stored.outputs, stored.error_message) == (
            "completed",
            "result",
            None,
        )


class TestResuming:
    def test_a_completed_run_is_said_to_be_completed(self, backend):
        with record_run("w", backend=backend) as run:
            pass
        ended = only_run(backend).completed_at
        with (
            pytest.raises(NotResumableError) as caught,
            resume_run(run.run_id, backend=backend),
        ):
            pytest.fail("the block ran")

        assert str(caught.value) == (
            f"Workflow run {run.run_id} is completed since {ended}: there is nothing to resume. "
            "Record a new run."
        )

    def test_a_running_run_is_said_to_be_somebodys(self, backend):
        with record_run("w", backend=backend) as run:
            run.save_state({}, "node")
            stored = only_run(backend)
            sign = backend.states.get_latest_checkpoint(run.run_id)["created_at"]
            with (
                pytest.raises(NotResumableError) as caught,
                resume_run(run.run_id, backend=backend),
            ):
                pytest.fail("the block ran")

        assert str(caught.value) == (
            f"Workflow run {run.run_id} is running in attempt 1 on {stored.worker} since "
            f"{stored.attempt_started_at}; its last sign of life was at {sign}. If nobody works on "
            "it any more, pass stalled_after=timedelta(…) to resume_run(): it takes over a run "
            "that gave no sign of life for longer."
        )

    def test_who_comes_second_hears_what_became_of_the_first(self, backend, monkeypatch):
        run = stored_run(backend, status="failed")
        begin = backend.runs.update_status

        def begin_after_another(run_id, status, **kwargs):
            begin(run_id, status, **{**kwargs, "worker": "other-host:7"})
            begin(run_id, "failed", error_message="at once")
            monkeypatch.undo()
            begin(run_id, status, **kwargs)

        monkeypatch.setattr(backend.runs, "update_status", begin_after_another)
        with (
            pytest.raises(NotResumableError, match="meanwhile another process has begun and ended"),
            resume_run(run.id, backend=backend),
        ):
            pytest.fail("the block ran")

        assert [one.error_message for one in backend.runs.list_attempts(run.id)] == ["at once"]

    def test_a_failed_resumption_leaves_the_run_as_it_was(self, sql_backend):
        with pytest.raises(OSError), record_run("w", backend=sql_backend) as run:
            run.save_state({}, "node")
            raise OSError
        before = only_run(sql_backend)
        states = ExecutionState.objects.using(sql_backend.alias).filter(run_id=run.run_id)
        states.update(state_json="damaged")

        with pytest.raises(DamagedStateError), resume_run(run.run_id, backend=sql_backend):
            pytest.fail("the block ran")

        assert equal_runs(only_run(sql_backend), before)

    @pytest.mark.parametrize("status", ["failed", "pending"])
    def test_one_that_fails_once_it_has_begun_is_taken_back(self, backend, monkeypatch, status):
        run = stored_run(backend, status="failed", error_message="why")
        if status == "pending":
            backend.runs.update_status(run.id, "pending", error_message="why", waiting_for="you")
        before = only_run(backend)

        def unavailable(*args, **kwargs):
            raise StorageUnavailableError("down")

        answers = iter([backend.states.get_latest_checkpoint])

        def answer_once(run_id):
            return next(answers, unavailable)(run_id)

        monkeypatch.setattr(backend.states, "get_latest_checkpoint", answer_once)
        with pytest.raises(StorageUnavailableError), resume_run(run.id, backend=backend):
            pytest.fail("the block ran")

        after = only_run(backend)
        for name in ("status", "error_message", "completed_at", "waiting_for"):
            assert getattr(after, name) == getattr(before, name), name
        assert status == "pending" or after.duration_seconds == before.duration_seconds

    @pytest.mark.parametrize("kept", [2, 1, 0])
    def test_what_is_resumed_is_the_newest_state(self, backend, monkeypatch, kept):
        run = stored_run(backend, status="failed")
        backend.states.save_state(run.id, {"n": 0}, "first")
        begin = backend.runs.update_status

        def begin_after_a_save(*args, **kwargs):
            backend.states.save_state(run.id, {"n": 1}, "bare")
            backend.states.save_state(run.id, {"n": 2}, "bare")
            backend.states.delete_states(run.id, keep_last=kept)
            monkeypatch.undo()
            begin(*args, **kwargs)

        monkeypatch.setattr(backend.runs, "update_status", begin_after_a_save)
        with resume_run(run.id, backend=backend) as resumed:
            found = resumed.state, resumed.step
        assert found == (({"n": 2}, 2) if kept else (None, None))

    def test_an_unknown_run_is_not_found(self, backend):
        with (
            pytest.raises(RunNotFoundError),
            resume_run("gone", backend=backend, stalled_after=timedelta(0)),
        ):
            pytest.fail("the block ran")

    def test_a_stalled_run_that_is_taken_over_keeps_why(self, backend):
        old = timezone.now() - timedelta(hours=1)
        run = stored_run(backend, status="running", started_at=old, worker="gone:1")

        with resume_run(run.id, backend=backend, stalled_after=timedelta(minutes=30)) as resumed:
            assert resumed.attempt == 2
            assert "no sign of life" in resumed.error_message

        first, second = backend.runs.list_attempts(run.id)
        assert (first.status, first.worker) == ("failed", "gone:1")
        assert "no sign of life" in first.error_message
        assert second.status == "completed"


class TestState:
    def test_it_is_the_json_form_at_once(self, backend):
        with record_run("w", backend=backend) as run:
            run.save_state({"pair": (1, 2), "when": timedelta(seconds=1), 1: "one"}, "node")
            assert run.state == {"pair": [1, 2], "when": "PT1S", "1": "one"}
        with pytest.raises(OSError), record_run("w", backend=backend) as run:
            run.save_state({"pair": (1, 2)}, "node")
            saved = run.state
            raise OSError
        with resume_run(run.run_id, backend=backend) as resumed:
            assert resumed.state == saved == {"pair": [1, 2]}

    @pytest.mark.parametrize("size", [10, 50_000])
    def test_it_does_not_change_with_what_was_saved(self, backend, size):
        state = {"texts": ["x" * size]}
        with record_run("w", backend=backend) as run:
            assert run.state is None
            run.save_state(state, "node")
            state["texts"].append("later")
            assert run.state == {"texts": ["x" * size]}
            run.state["texts"].append("of the run's own")
            assert len(state["texts"]) == 2
            assert len(run.state["texts"]) == 2
            run.save_state({"texts": [*run.state["texts"]]}, "node")
            assert run.state == backend.states.get_latest_state(run.run_id)

    def test_a_refused_state_leaves_the_last_one(self, backend):
        with record_run("w", backend=backend) as run:
            run.save_state({"n": 1}, "node")
            with pytest.raises(TypeError):
                run.save_state({"n": object()}, "other")
            assert (run.state, run.node_id, run.step) == ({"n": 1}, "node", 0)

    def test_of_tasks_that_save_at_once_the_last_one_counts(self, backend):
        async def use():
            async with record_run("w", backend=backend) as run:
                await asyncio.gather(*(run.asave_state({"n": n}, f"n-{n}") for n in range(20)))
                newest = await backend.states.aget_latest_checkpoint(run.run_id)
                assert (run.step, run.node_id) == (19, newest["node_id"])
                assert run.state == newest["state_data"]

        async_to_sync(use)()

    def test_a_writer_of_a_third_party_keeps_no_text(self, sql_backend, monkeypatch):
        backend, states = sql_backend, sql_backend.states
        monkeypatch.setattr(
            states, "writer", lambda run_id, *, attempt=None: StateWriter(states, run_id, attempt)
        )
        state = {"pair": (1, 2)}
        with record_run("w", backend=backend) as run:
            run.save_state(state, "node")
            state["pair"] = None
            assert run.state == {"pair": [1, 2]}

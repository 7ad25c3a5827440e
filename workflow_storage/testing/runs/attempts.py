"""What is promised of attempts: they are counted, kept, and measured; one at a time owns a run.

Run by `RunsContract`, or alone.
"""

from __future__ import annotations

import itertools
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from django.utils import timezone
from hypothesis import given
from hypothesis import strategies as st

from workflow_storage import (
    Attempt,
    InvalidFieldError,
    RunLostError,
    RunNotFoundError,
    RunStatus,
    StatusConflictError,
    StorageBackend,
)
from workflow_storage.testing.sample_runs import NOT_TERMINAL, TERMINAL, read_run, stored_run
from workflow_storage.testing.threads import in_threads, outcome
from workflow_storage.testing.values import against_the_store

if TYPE_CHECKING:
    from workflow_storage import WorkflowRun

SECOND = timedelta(seconds=1)


def begin(
    backend: StorageBackend, run: WorkflowRun, at: datetime | None = None, **fields: Any
) -> None:
    """Begin an attempt of a run."""
    times: dict[str, Any] = {} if at is None else {"attempt_started_at": at}
    backend.runs.update_status(run.id, "running", **times, **fields)


def end(
    backend: StorageBackend,
    run: WorkflowRun,
    at: datetime,
    status: str = "failed",
    **fields: Any,
) -> None:
    """End a run."""
    backend.runs.update_status(run.id, status, completed_at=at, **fields)


class AttemptsContract:
    """What `update_status` and `list_attempts` promise of attempts."""

    def test_a_run_that_is_added_running_is_in_its_first_attempt(
        self, backend: StorageBackend
    ) -> None:
        running = read_run(backend, stored_run(backend, status="running"))
        pending = read_run(backend, stored_run(backend))

        assert (running.attempt, running.attempt_started_at) == (1, running.started_at)
        assert (pending.attempt, pending.attempt_started_at) == (0, None)

    def test_every_change_to_running_begins_an_attempt(self, backend: StorageBackend) -> None:
        run = stored_run(backend)
        numbers = []
        for status in ("running", "running", "failed", "running", "pending", "running"):
            backend.runs.update_status(run.id, status)
            numbers.append(read_run(backend, run).attempt)

        assert numbers == [1, 2, 2, 3, 3, 4]

    def test_an_attempt_begins_now_and_without_what_was_of_the_one_before(
        self, backend: StorageBackend
    ) -> None:
        run = stored_run(backend, status="running")
        end(backend, run, timezone.now(), error_message="it broke", current_node="ocr")
        backend.runs.update_status(run.id, "pending", waiting_for="approval")

        before = timezone.now()
        begin(backend, run, worker="host:7")

        stored = read_run(backend, run)
        assert stored.attempt_started_at is not None
        assert before <= stored.attempt_started_at <= timezone.now()
        assert stored.heartbeat_at == stored.attempt_started_at
        assert stored.worker == "host:7"
        assert (stored.error_message, stored.current_node) == (None, None)
        assert (stored.waiting_for, stored.completed_at) == (None, None)

    def test_an_attempt_begins_with_what_is_given(self, backend: StorageBackend) -> None:
        run = stored_run(backend, status="failed", error_message="it broke")
        at = timezone.now() - timedelta(hours=1)

        begin(backend, run, at, current_node="ocr", error_message="tried again", total_tokens=0)

        stored = read_run(backend, run)
        assert stored.attempt_started_at == stored.heartbeat_at == at
        assert (stored.current_node, stored.error_message) == ("ocr", "tried again")
        assert stored.total_tokens == 0

    @pytest.mark.parametrize("status", ["pending", *TERMINAL])
    def test_what_belongs_to_an_attempt_that_begins_is_refused_elsewhere(
        self, backend: StorageBackend, status: str
    ) -> None:
        run = stored_run(backend, status="running")
        for field in ({"worker": "host:7"}, {"attempt_started_at": timezone.now()}):
            with pytest.raises(InvalidFieldError, match=next(iter(field))):
                backend.runs.update_status(run.id, status, **field)
        fixed: dict[str, Any]
        for fixed in ({"attempt": 7}, {"worker": "host:7"}):
            with pytest.raises((InvalidFieldError, RunLostError)):
                backend.runs.update(run.id, outputs="new", **fixed)

        stored = read_run(backend, run)
        assert (stored.status, stored.attempt, stored.outputs) == ("running", 1, None)

    def test_waiting_for_is_what_a_pending_run_waits_for(self, backend: StorageBackend) -> None:
        run = stored_run(backend, status="running")
        backend.runs.update_status(run.id, "pending", waiting_for="approval by finance")
        assert read_run(backend, run).waiting_for == "approval by finance"

        for status in ("pending", "running", "completed"):
            backend.runs.update_status(run.id, "pending", waiting_for="approval")
            backend.runs.update_status(run.id, status)
            assert read_run(backend, run).waiting_for is None

        with pytest.raises(InvalidFieldError, match="waiting_for"):
            backend.runs.update_status(run.id, "running", waiting_for="approval")
        with pytest.raises(InvalidFieldError, match="waiting_for has 257 characters"):
            backend.runs.update_status(run.id, "pending", waiting_for="x" * 257)

    def test_of_several_that_begin_with_one_number_one_succeeds_and_knows_its_own(
        self, backend: StorageBackend
    ) -> None:
        run = stored_run(backend, status="failed", attempt=3)

        outcomes = in_threads(
            8,
            lambda n: outcome(
                lambda: backend.runs.update_status(
                    run.id, "running", expected="failed", attempt=3, worker=f"worker-{n}"
                )
            ),
        )

        assert sorted(outcomes) == ["RunLostError"] * 7 + ["done"]
        stored = read_run(backend, run)
        assert (stored.attempt, stored.worker) == (4, f"worker-{outcomes.index('done')}")

    def test_no_two_that_take_a_run_over_in_turn_hold_the_same_number(
        self, backend: StorageBackend
    ) -> None:
        run = stored_run(backend)

        def hold(number: int) -> list[int]:
            held = []
            for turn in range(12):
                seen = read_run(backend, run)
                try:
                    backend.runs.update_status(
                        run.id, "running", expected=seen.status, attempt=seen.attempt
                    )
                except StatusConflictError:
                    continue
                held.append(seen.attempt + 1)
                if turn % 2:
                    failing: dict[str, Any] = {"attempt": held[-1], "error_message": f"of {number}"}
                    outcome(lambda: backend.runs.update_status(run.id, "failed", **failing))  # noqa: B023
            return held

        held = sorted(itertools.chain(*in_threads(4, hold)))

        assert held == list(range(1, len(held) + 1))
        assert [attempt.number for attempt in backend.runs.list_attempts(run.id)] == held

    def test_a_second_try_to_begin_with_the_same_time_finds_its_own_success(
        self, backend: StorageBackend
    ) -> None:
        run = stored_run(backend, status="failed", attempt=1)
        at = timezone.now()
        trying = {"expected": "failed", "attempt": 1}
        begin(backend, run, at, worker="own", **trying)

        begin(backend, run, at, worker="own", **trying)

        assert read_run(backend, run).attempt == 2
        for other in (at + timedelta(microseconds=1), None):
            with pytest.raises(RunLostError, match="was taken over by attempt 2 on own since"):
                begin(backend, run, other, **trying)
        begin(backend, run, at + SECOND, attempt=2)
        with pytest.raises(RunLostError, match="attempt 3"):
            begin(backend, run, at, **trying)

    @pytest.mark.parametrize("status", TERMINAL)
    def test_a_second_try_to_end_with_the_same_time_finds_its_own_success(
        self, backend: StorageBackend, status: RunStatus
    ) -> None:
        run = stored_run(backend, status="running")
        at = run.started_at + SECOND
        end(backend, run, at, status, attempt=1, outputs="first")

        end(backend, run, at, status, attempt=1, outputs="first")
        end(backend, run, at, status, attempt=1, expected="running")

        stored = read_run(backend, run)
        assert (stored.outputs, stored.completed_at, stored.duration_seconds) == ("first", at, 1.0)
        assert len(backend.runs.list_attempts(run.id)) == 1
        with pytest.raises(RunLostError, match=f"is {status}"):
            end(backend, run, at + SECOND, status, attempt=1)
        another = next(other for other in TERMINAL if other != status)
        with pytest.raises(RunLostError, match=f"is {status}"):
            end(backend, run, at, another, attempt=1)
        begin(backend, run)
        with pytest.raises(RunLostError, match="was taken over by attempt 2"):
            end(backend, run, at, status, attempt=1)

    def test_a_second_try_to_end_before_the_start_finds_its_own_success(
        self, backend: StorageBackend
    ) -> None:
        run = stored_run(backend, status="running")
        for _ in range(2):
            end(backend, run, run.started_at - SECOND, attempt=1)

        assert read_run(backend, run).completed_at == run.started_at

    def test_without_an_attempt_a_second_change_is_one_more(self, backend: StorageBackend) -> None:
        run = stored_run(backend)
        at = timezone.now()
        begin(backend, run, at)
        begin(backend, run, at)

        assert read_run(backend, run).attempt == 2
        end(backend, run, at)
        with pytest.raises(StatusConflictError, match="is failed, expected running"):
            end(backend, run, at, expected="running")

    def test_list_attempts_tells_what_each_ended_with(self, backend: StorageBackend) -> None:
        run = stored_run(backend)
        at = [run.started_at + number * SECOND for number in range(9)]
        assert backend.runs.list_attempts(run.id) == []

        begin(backend, run, at[0], worker="a:1")
        end(
            backend,
            run,
            at[1],
            error_message='it broke / "\x1f\n\N{GRINNING FACE}',
            current_node="ocr",
        )
        failed = Attempt(
            1, at[0], at[1], "failed", 'it broke / "\x1f\n\N{GRINNING FACE}', "ocr", "a:1"
        )
        assert backend.runs.list_attempts(run.id) == [failed]

        begin(backend, run, at[2], worker="b:2")
        running = Attempt(2, at[2], None, "running", None, None, "b:2")
        assert backend.runs.list_attempts(run.id) == [failed, running]

        backend.runs.heartbeat(run.id, node="upload")
        begin(backend, run, at[3])
        taken_over = running._replace(
            ended_at=at[3],
            status="failed",
            error_message="Taken over: another attempt began while this one was running.",
            node="upload",
        )
        running = Attempt(3, at[3], None, "running", None, None, None)
        assert backend.runs.list_attempts(run.id) == [failed, taken_over, running]

        end(backend, run, at[4], "completed", outputs=1)
        completed = running._replace(ended_at=at[4], status="completed")
        assert backend.runs.list_attempts(run.id) == [failed, taken_over, completed]
        begin(backend, run, at[5])
        assert backend.runs.list_attempts(run.id)[2:] == [
            completed,
            Attempt(4, at[5], None, "running", None, None, None),
        ]

    def test_a_run_that_was_never_begun_has_no_attempts(self, backend: StorageBackend) -> None:
        run = stored_run(backend, status="failed")
        for status in ("pending", "cancelled", "pending"):
            backend.runs.update_status(run.id, status)
            assert backend.runs.list_attempts(run.id) == []

        begin(backend, run)
        assert [attempt.number for attempt in backend.runs.list_attempts(run.id)] == [1]

    def test_a_suspended_attempt_is_kept_until_the_next_and_after_it(
        self, backend: StorageBackend
    ) -> None:
        run = stored_run(backend, status="running")
        before = timezone.now()
        backend.runs.update_status(run.id, "pending", waiting_for="approval")

        (suspended,) = backend.runs.list_attempts(run.id)
        assert suspended.ended_at is not None
        assert before <= suspended.ended_at <= timezone.now()
        assert suspended == Attempt(
            1, run.started_at, suspended.ended_at, "pending", None, None, None
        )
        begin(backend, run)
        numbers = [attempt.number for attempt in backend.runs.list_attempts(run.id)]
        assert numbers == [1, 2]
        assert backend.runs.list_attempts(run.id)[0] == suspended

    def test_an_attempt_that_is_to_be_tried_again_has_failed(self, backend: StorageBackend) -> None:
        run = stored_run(backend, status="running")
        backend.runs.update_status(run.id, "pending", attempt=1, error_message="no route ü")

        (failed,) = backend.runs.list_attempts(run.id)
        assert (failed.status, failed.error_message) == ("failed", "no route ü")
        stored = read_run(backend, run)
        assert (stored.status, stored.error_message) == ("pending", "no route ü")
        backend.runs.update_status(run.id, "pending", error_message="later")
        begin(backend, run)
        assert backend.runs.list_attempts(run.id)[0] == failed

    @pytest.mark.parametrize(("old", "new"), list(itertools.product(TERMINAL, NOT_TERMINAL)))
    def test_what_an_attempt_ended_with_is_kept_when_the_run_goes_on(
        self, backend: StorageBackend, old: RunStatus, new: RunStatus
    ) -> None:
        run = stored_run(backend, status="running")
        at = run.started_at + SECOND
        end(backend, run, at, old, error_message="the end")
        ended = Attempt(1, run.started_at, at, old, "the end", None, None)

        backend.runs.update_status(run.id, new)
        backend.runs.update(run.id, error_message="another")

        assert backend.runs.list_attempts(run.id)[0] == ended
        backend.runs.update_status(run.id, "cancelled")
        backend.runs.update_status(run.id, "pending")
        assert backend.runs.list_attempts(run.id)[0] == ended

    def test_a_refused_change_leaves_the_attempts_as_they_are(
        self, backend: StorageBackend
    ) -> None:
        run = stored_run(backend, status="running")
        end(backend, run, timezone.now(), error_message="it broke")
        attempts, stored = backend.runs.list_attempts(run.id), read_run(backend, run)

        for refused in ({"expected": "pending"}, {"attempt": 7}, {"attempt": 1}):
            with pytest.raises(StatusConflictError):
                begin(backend, run, **refused)

        assert backend.runs.list_attempts(run.id) == attempts
        assert read_run(backend, run).duration_seconds == stored.duration_seconds
        assert read_run(backend, run).completed_at == stored.completed_at

    def test_list_attempts_of_an_unknown_run_raises(self, backend: StorageBackend) -> None:
        for unknown in ("gone", "impossible\0"):
            with pytest.raises(RunNotFoundError):
                backend.runs.list_attempts(unknown)

    def test_a_deleted_run_leaves_no_attempts_behind(self, backend: StorageBackend) -> None:
        for delete in (
            backend.runs.delete,
            lambda _: backend.runs.delete_finished(before=timezone.now() + SECOND),
            lambda _: backend.runs.delete_unchanged(backend.runs.get("same"), None),  # type: ignore[arg-type]
        ):
            run = stored_run(backend, id="same", status="running")
            for _ in range(3):
                begin(backend, run)
            end(backend, run, timezone.now())

            delete(run.id)

            stored_run(backend, id="same")
            assert backend.runs.list_attempts("same") == []
            backend.runs.delete("same")

    def test_many_attempts_are_listed_in_order(self, backend: StorageBackend) -> None:
        run = stored_run(backend)
        for _ in range(25):
            begin(backend, run)

        numbers = [attempt.number for attempt in backend.runs.list_attempts(run.id)]
        assert numbers == list(range(1, 26))

    def test_the_duration_is_the_time_spent_running_over_all_attempts(
        self, backend: StorageBackend
    ) -> None:
        run = stored_run(backend)
        at = [run.started_at + number * SECOND for number in range(100)]
        begin(backend, run, at[0])
        assert read_run(backend, run).duration_seconds is None
        end(backend, run, at[1] + timedelta(microseconds=1))
        assert read_run(backend, run).duration_seconds == 1.000001

        begin(backend, run, at[50])
        assert read_run(backend, run).duration_seconds == 1.000001
        begin(backend, run, at[52])
        assert read_run(backend, run).duration_seconds == pytest.approx(3.000001)
        end(backend, run, at[56], "completed")

        stored = read_run(backend, run)
        assert stored.duration_seconds == pytest.approx(7.000001)
        assert stored.completed_at == at[56]

    def test_a_suspended_run_has_been_running_until_then(self, backend: StorageBackend) -> None:
        run = stored_run(backend)
        begin(backend, run, timezone.now() - 60 * SECOND)

        backend.runs.update_status(run.id, "pending")

        stored = read_run(backend, run)
        assert stored.duration_seconds == pytest.approx(60, abs=30)
        assert stored.completed_at is None
        backend.runs.update_status(run.id, "cancelled")
        assert read_run(backend, run).duration_seconds == stored.duration_seconds

    @pytest.mark.parametrize(("old", "new"), list(itertools.product(TERMINAL, TERMINAL)))
    def test_only_leaving_running_adds_to_the_duration(
        self, backend: StorageBackend, old: RunStatus, new: RunStatus
    ) -> None:
        run = stored_run(backend, status="running")
        end(backend, run, run.started_at + SECOND, old)

        end(backend, run, run.started_at + 9 * SECOND, new)

        stored = read_run(backend, run)
        assert stored.duration_seconds == 1.0
        assert stored.completed_at == run.started_at + 9 * SECOND

    @against_the_store
    @given(seconds=st.lists(st.tuples(*[st.integers(-(10**6), 10**6)] * 2), min_size=1, max_size=4))
    def test_a_clock_that_goes_back_makes_no_time_negative(
        self, backend: StorageBackend, seconds: list[tuple[int, int]]
    ) -> None:
        run = stored_run(backend)
        ran = 0.0
        for began, ended in seconds:
            begin(backend, run, run.started_at + began * SECOND)
            end(backend, run, run.started_at + ended * SECOND)
            ran += max(0, ended - began)

            stored = read_run(backend, run)
            assert stored.duration_seconds == ran
            assert stored.completed_at == run.started_at + max(0, ended) * SECOND

    def test_a_run_that_is_added_ended_before_its_start_ended_at_it(
        self, backend: StorageBackend
    ) -> None:
        now = timezone.now()
        run = stored_run(backend, status="failed", started_at=now, completed_at=now - SECOND)

        stored = read_run(backend, run)
        assert (stored.completed_at, stored.duration_seconds) == (now, 0.0)

"""What is promised of who owns a run: whoever lost it changes nothing any more.

Run by `StorageContract`, or alone.
"""

from __future__ import annotations

import math
import threading
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from django.utils import timezone

from workflow_storage import (
    RunLostError,
    RunNotFoundError,
    StatusConflictError,
    StorageBackend,
)
from workflow_storage.testing.sample_runs import read_run, stored_run
from workflow_storage.testing.threads import in_threads
from workflow_storage.testing.usage import LARGE, SMALL
from workflow_storage.validation import run_fields

if TYPE_CHECKING:
    from collections.abc import Callable

    from workflow_storage import WorkflowRun

TOTALS = {"total_tokens": 99, "total_cost_usd": 9.9}

WRITES: dict[str, Callable[[StorageBackend, str], object]] = {
    "save_state, small": lambda backend, run_id: backend.states.save_state(
        run_id,
        SMALL,
        "stale",
        attempt=1,
        tokens=1,
        totals=TOTALS,  # type: ignore[arg-type]
    ),
    "save_state, large": lambda backend, run_id: backend.states.save_state(
        run_id,
        LARGE,
        "stale",
        attempt=1,
        tokens=1,
        totals=TOTALS,  # type: ignore[arg-type]
    ),
    "update": lambda backend, run_id: backend.runs.update(
        run_id, outputs="stale", labels={"stale": "yes"}, attempt=1
    ),
    "update of nothing": lambda backend, run_id: backend.runs.update(run_id, attempt=1),
    "update_status to completed": lambda backend, run_id: backend.runs.update_status(
        run_id, "completed", attempt=1, outputs="stale"
    ),
    "update_status to failed": lambda backend, run_id: backend.runs.update_status(
        run_id, "failed", attempt=1, error_message="stale"
    ),
    "update_status to running": lambda backend, run_id: backend.runs.update_status(
        run_id, "running", attempt=1, worker="stale"
    ),
    "update_status to pending": lambda backend, run_id: backend.runs.update_status(
        run_id, "pending", attempt=1, waiting_for="stale"
    ),
    "heartbeat": lambda backend, run_id: backend.runs.heartbeat(run_id, attempt=1, node="stale"),
}
WRITERS = {"writer, small": SMALL, "writer, large": LARGE}


def _taken_over(backend: StorageBackend, run: WorkflowRun) -> None:
    backend.runs.update_status(run.id, "running", attempt=1, worker="host-b:7")


def _resumed(backend: StorageBackend, run: WorkflowRun) -> None:
    backend.runs.update_status(run.id, "failed", error_message="given up")
    backend.runs.update_status(run.id, "running", expected="failed", worker="host-b:7")
    backend.runs.update_status(run.id, "completed", attempt=2, outputs="result")


def _cancelled(backend: StorageBackend, run: WorkflowRun) -> None:
    backend.runs.update_status(run.id, "cancelled", expected="running")


def _completed(backend: StorageBackend, run: WorkflowRun) -> None:
    backend.runs.update_status(run.id, "completed", attempt=1, outputs="result")


def _failed(backend: StorageBackend, run: WorkflowRun) -> None:
    assert backend.runs.fail_stalled(timedelta(0), run_id=run.id) == 1


def _suspended(backend: StorageBackend, run: WorkflowRun) -> None:
    backend.runs.update_status(run.id, "pending", attempt=1, waiting_for="approval")
    backend.runs.update_status(run.id, "cancelled")


LOSSES: dict[str, tuple[Callable[[StorageBackend, WorkflowRun], None], str]] = {
    "taken over": (
        _taken_over,
        r"was taken over by attempt 2 on host-b:7 since \d{4}-.*: attempt 1",
    ),
    "resumed and completed": (
        _resumed,
        r"was taken over by attempt 2 on host-b:7 since \d{4}-.*, and is completed: attempt 1",
    ),
    "cancelled": (_cancelled, "is cancelled: attempt 1 is over, and wrote nothing more. Stop"),
    "completed": (_completed, "is completed: attempt 1 is over"),
    "failed as stalled": (_failed, "is failed: attempt 1 is over"),
    "suspended and cancelled": (_suspended, "is cancelled: attempt 1 is over"),
}


def everything(backend: StorageBackend, run: WorkflowRun) -> tuple[Any, ...]:
    """Return all that is stored of a run."""
    return (
        run_fields(read_run(backend, run)),
        backend.runs.list_attempts(run.id),
        backend.states.get_state_history(run.id),
    )


class FencingContract:
    """What a write that is conditional on an attempt promises."""

    @pytest.mark.parametrize("loss", LOSSES)
    @pytest.mark.parametrize("write", [*WRITES, *WRITERS])
    def test_who_lost_a_run_is_refused_and_writes_nothing(
        self, backend: StorageBackend, write: str, loss: str
    ) -> None:
        run = stored_run(backend, status="running", labels={"kept": "yes"})
        writer = backend.states.writer(run.id, attempt=1)
        for _ in range(3):
            writer.save_state(LARGE, "node")
        lose, message = LOSSES[loss]
        lose(backend, run)
        stored = everything(backend, run)

        for _ in range(2):
            with pytest.raises(RunLostError, match=message):
                if write in WRITERS:
                    writer.save_state(WRITERS[write], "stale", totals=TOTALS)  # type: ignore[arg-type]
                else:
                    WRITES[write](backend, run.id)

        assert everything(backend, run) == stored

    @pytest.mark.parametrize("write", [*WRITES, *WRITERS])
    def test_a_run_that_was_deleted_is_not_found(self, backend: StorageBackend, write: str) -> None:
        run = stored_run(backend, status="running")
        writer = backend.states.writer(run.id, attempt=1)
        for _ in range(3):
            writer.save_state(LARGE, "node")
        backend.runs.delete(run.id)

        with pytest.raises(RunNotFoundError, match=f"not found: {run.id}"):
            if write in WRITERS:
                writer.save_state(WRITERS[write], "stale")
            else:
                WRITES[write](backend, run.id)

        assert backend.runs.get(run.id) is None
        assert backend.states.get_state_history(run.id) == []

    @pytest.mark.parametrize("write", WRITES)
    def test_who_owns_a_run_is_not_refused(self, backend: StorageBackend, write: str) -> None:
        run = stored_run(backend, status="running")

        WRITES[write](backend, run.id)

        if write != "update of nothing":
            stored = everything(backend, run)
            assert "stale" in str(stored)

    def test_a_writer_goes_on_while_its_attempt_does(self, backend: StorageBackend) -> None:
        run = stored_run(backend, status="failed", attempt=4)
        backend.runs.update_status(run.id, "running", attempt=4, expected="failed")
        writer = backend.states.writer(run.id, attempt=5)
        for number in range(6):
            state = {"n": number, "text": "x" * (number % 2 * 9000)}
            assert writer.save_state(state, "node") == number

        history = backend.states.get_state_history(run.id)
        assert [checkpoint["state_data"]["n"] for checkpoint in history] == list(range(6))
        assert {checkpoint["attempt"] for checkpoint in history} == {5}

    def test_an_attempt_of_a_run_that_does_not_run_is_refused(
        self, backend: StorageBackend
    ) -> None:
        run = stored_run(backend)
        for write in (
            lambda: backend.runs.update(run.id, outputs=1, attempt=0),
            lambda: backend.runs.heartbeat(run.id, attempt=0),
            lambda: backend.states.save_state(run.id, SMALL, "node", attempt=0),
            lambda: backend.runs.update_status(run.id, "failed", attempt=0),
        ):
            with pytest.raises(RunLostError, match="is pending: attempt 0 is over"):
                write()

        backend.runs.update_status(run.id, "failed", attempt=0, expected="pending")

    def test_an_expected_status_and_an_attempt_are_both_conditions(
        self, backend: StorageBackend
    ) -> None:
        run = stored_run(backend, status="running")

        def cancel(attempt: int) -> None:
            backend.runs.update_status(
                run.id, "cancelled", expected=["pending", "running"], attempt=attempt
            )

        with pytest.raises(RunLostError, match="attempt 1"):
            cancel(2)
        assert read_run(backend, run).status == "running"
        cancel(1)
        backend.runs.update_status(run.id, "completed")
        with pytest.raises(StatusConflictError, match="is completed, expected pending or running"):
            cancel(1)
        assert read_run(backend, run).status == "completed"

    def test_the_error_has_what_it_says(self, backend: StorageBackend) -> None:
        run = stored_run(backend, status="running")
        _taken_over(backend, run)

        with pytest.raises(RunLostError) as caught:
            backend.runs.heartbeat(run.id, attempt=1)

        error = caught.value
        assert (error.run_id, error.attempt, error.status) == (run.id, 1, "running")
        assert (error.current_attempt, error.worker) == (2, "host-b:7")
        assert error.since == read_run(backend, run).attempt_started_at

    @pytest.mark.parametrize("attempt", [-1, 1.0, "1", True, math.nan, 2**31])
    def test_what_is_no_number_of_an_attempt_is_refused(
        self, backend: StorageBackend, attempt: Any
    ) -> None:
        run = stored_run(backend, status="running")
        for write in (
            lambda: backend.runs.update(run.id, outputs=1, attempt=attempt),
            lambda: backend.runs.heartbeat(run.id, attempt=attempt),
            lambda: backend.runs.update_status(run.id, "failed", attempt=attempt),
            lambda: backend.states.save_state(run.id, SMALL, "node", attempt=attempt),
            lambda: backend.states.writer(run.id, attempt=attempt).save_state(SMALL, "node"),
        ):
            with pytest.raises(ValueError, match="attempt is"):
                write()

    def test_heartbeat_says_where_the_run_is(self, backend: StorageBackend) -> None:
        run = stored_run(backend, status="running", current_node="first")
        before = timezone.now()

        backend.runs.heartbeat(run.id, attempt=1)
        assert read_run(backend, run).current_node == "first"
        backend.runs.heartbeat(run.id, attempt=1, node="second")

        stored = read_run(backend, run)
        assert stored.current_node == "second"
        assert stored.heartbeat_at is not None
        assert before <= stored.heartbeat_at <= timezone.now()
        with pytest.raises(ValueError, match="node has 129 characters"):
            backend.runs.heartbeat(run.id, node="x" * 129)

    def test_no_stale_write_commits_after_a_takeover_has_returned(
        self, backend: StorageBackend
    ) -> None:
        run = stored_run(backend, status="running")
        race = _Race(backend, run, seconds=1.0)

        refused = sum(in_threads(4, race.work))

        history = backend.states.get_state_history(run.id)
        assert [checkpoint["step"] for checkpoint in history] == list(range(len(history)))
        stale = [
            checkpoint["step"]
            for checkpoint in history
            if checkpoint["step"] > race.last_step_of.get(checkpoint["attempt"] or 0, math.inf)
        ]
        assert stale == []
        assert race.stale_outputs == []
        assert refused > len(race.last_step_of) > 3
        attempts = backend.runs.list_attempts(run.id)
        assert [attempt.number for attempt in attempts] == list(range(1, len(attempts) + 1))


class _Race:
    """Takes a run over, again and again, from workers that go on with it regardless."""

    def __init__(self, backend: StorageBackend, run: WorkflowRun, seconds: float) -> None:
        self.last_step_of: dict[int, int] = {}
        """The newest step when the takeover from an attempt had returned."""
        self.stale_outputs: list[Any] = []
        self._backend = backend
        self._run = run
        self._seconds = seconds
        self._over = threading.Event()

    def work(self, number: int) -> int:
        """Take over, or write in an attempt; return how often it was refused."""
        try:
            return self._take_over() if number == 0 else self._write(number)
        finally:
            self._over.set()

    def _take_over(self) -> int:
        runs, states = self._backend
        end = time.monotonic() + self._seconds
        attempt, outputs = 1, None
        while time.monotonic() < end:
            time.sleep(0.02)
            now = read_run(self._backend, self._run).outputs
            if now != outputs and now[0] != attempt:
                self.stale_outputs.append(now)
            runs.update_status(self._run.id, "running", attempt=attempt)
            newest = states.get_latest_checkpoint(self._run.id)
            self.last_step_of[attempt] = -1 if newest is None else newest["step"]
            outputs = read_run(self._backend, self._run).outputs
            attempt += 1
        return 0

    def _write(self, number: int) -> int:
        """Write in an attempt until it has been refused some times, then in the next."""
        runs, states = self._backend
        refused, turn = 0, 0
        state: dict[str, Any] = {"worker": number}
        while not self._over.is_set():
            attempt = read_run(self._backend, self._run).attempt
            writer = states.writer(self._run.id, attempt=attempt)
            lost = 0
            while lost < 12 and not self._over.is_set():
                turn += 1
                try:
                    if turn % 4 == 0:
                        runs.update(self._run.id, outputs=[attempt, number, turn], attempt=attempt)
                    elif turn % 4 == 1:
                        writer.save_state({**LARGE, **state, "turn": turn}, "node")
                    else:
                        writer.save_state({**state, "turn": turn}, "node", tokens=1)
                except RunLostError:
                    lost += 1
            refused += lost
        return refused

"""What copying between stores rests on: writes that are exact, over what was read only.

Run by `RunsContract`, or alone.
"""

from __future__ import annotations

import math
from datetime import timedelta
from typing import Any

import pytest
from django.utils import timezone

from workflow_storage import (
    Attempt,
    InvalidFieldError,
    InvalidStatusError,
    RunAlreadyExistsError,
    RunChangedError,
    RunNotFoundError,
    StorageBackend,
)
from workflow_storage.testing.sample_runs import ids, new_run, read_run, stored_run
from workflow_storage.validation import equal_runs, run_fields


class CopyingContract:
    """What `put` and `delete_unchanged` promise."""

    def test_put_stores_a_run_exactly_and_replaces_only_what_was_read(
        self, backend: StorageBackend
    ) -> None:
        start = timezone.now() - timedelta(hours=1)
        run = new_run(
            id="put",
            status="failed",
            inputs={"a": [1, 1.0, True]},
            started_at=start,
            heartbeat_at=start + timedelta(minutes=1),
            total_cost_usd=0.5,
        )
        assert run.completed_at is None

        backend.runs.put(run)

        stored = read_run(backend, run)
        assert equal_runs(stored, run)
        assert run_fields(stored)["duration_seconds"] is None
        with pytest.raises(RunAlreadyExistsError):
            backend.runs.put(run)
        backend.states.save_state(run.id, {"kept": True}, "node")
        later = new_run(
            id="put",
            workflow_name="another",
            status="completed",
            started_at=start,
            completed_at=start + timedelta(minutes=2),
            duration_seconds=7.5,
        )
        with pytest.raises(RunChangedError, match="put is not as it was read"):
            backend.runs.put(later, over=new_run(id="put", status="failed", started_at=start))
        assert equal_runs(read_run(backend, run), stored)

        backend.runs.put(later, over=stored)

        assert equal_runs(read_run(backend, run), later)
        assert ids(backend.runs.list_by_workflow("another")) == ["put"]
        assert backend.runs.list_by_workflow("contract") == []
        assert ids(backend.runs.list_runs(status="completed")) == ["put"]
        assert backend.states.get_latest_state(run.id) == {"kept": True}
        for over in (new_run(id="gone"), later):
            with pytest.raises(RunNotFoundError):
                backend.runs.put(new_run(id="gone"), over=over)
        assert backend.runs.count_runs() == 1

    def test_put_stores_every_field_of_a_run(self, backend: StorageBackend) -> None:
        start = timezone.now() - timedelta(hours=1)
        run = new_run(
            status="running",
            started_at=start,
            duration_seconds=2.5,
            current_node="ocr",
            waiting_for="approval",
            attempt=7,
            attempt_started_at=start - timedelta(minutes=1),
            worker="host:7",
            parent_id="its-parent",
            forked_from_step=3,
            labels={"tenant": "acme"},
        )
        backend.runs.put(run)
        stored = read_run(backend, run)
        assert equal_runs(stored, run)

        bare = new_run(id=run.id, started_at=start)
        backend.runs.put(bare, over=stored)

        assert equal_runs(read_run(backend, run), bare)

    def test_put_keeps_the_attempts_that_are_given_and_no_other(
        self, backend: StorageBackend
    ) -> None:
        run = stored_run(backend)
        for status in ("running", "failed", "running", "running", "pending", "running"):
            fields: dict[str, Any] = {"error_message": "it broke"} if status == "failed" else {}
            backend.runs.update_status(run.id, status, **fields)
        attempts = backend.runs.list_attempts(run.id)
        assert [attempt.number for attempt in attempts] == [1, 2, 3, 4]
        read = read_run(backend, run)
        backend.runs.delete(run.id)

        backend.runs.put(read, attempts=iter(attempts))
        assert backend.runs.list_attempts(run.id) == attempts

        backend.runs.update_status(run.id, "failed")
        backend.runs.update_status(run.id, "running")
        assert [attempt.number for attempt in backend.runs.list_attempts(run.id)] == [1, 2, 3, 4, 5]
        stored = read_run(backend, run)
        backend.runs.put(read, over=stored, attempts=attempts)
        assert backend.runs.list_attempts(run.id) == attempts

        backend.runs.put(read, over=read, attempts=attempts[1:2])
        assert backend.runs.list_attempts(run.id) == [attempts[1], attempts[3]]
        backend.runs.put(read, over=read)
        assert backend.runs.list_attempts(run.id) == attempts[3:]

    def test_put_begins_the_attempts_anew(self, backend: StorageBackend) -> None:
        run = stored_run(backend, status="running")
        backend.runs.update_status(run.id, "running", worker="old")
        anew = new_run(id=run.id, status="running", attempt=1, worker="new")

        backend.runs.put(anew, over=read_run(backend, run))
        backend.runs.update_status(run.id, "running")

        first, second = backend.runs.list_attempts(run.id)
        assert (first.number, first.worker, first.status) == (1, "new", "failed")
        assert (second.number, second.worker) == (2, None)

    def test_put_keeps_a_suspended_attempt(self, backend: StorageBackend) -> None:
        run = stored_run(backend, status="running")
        backend.runs.update_status(run.id, "pending")
        attempts, read = backend.runs.list_attempts(run.id), read_run(backend, run)
        backend.runs.delete(run.id)

        backend.runs.put(read, attempts=attempts)

        assert backend.runs.list_attempts(run.id) == attempts

    def test_put_keeps_thousands_of_attempts(self, backend: StorageBackend) -> None:
        run = new_run(attempt=4200)
        attempts = [
            Attempt(number, run.started_at, None, "failed", None, None, None)
            for number in range(1, 4201)
        ]
        backend.runs.put(run, attempts=attempts)
        assert backend.runs.list_attempts(run.id) == attempts

        backend.runs.put(run, over=run, attempts=attempts[1:])

        assert backend.runs.list_attempts(run.id) == [*attempts[1:]]

    @pytest.mark.parametrize(
        "bad",
        [
            {"number": 0},
            {"number": None},
            {"status": "done"},
            {"started_at": "now"},
            {"node": "x" * 129},
            {"worker": "nul\0"},
            {"error_message": b"bytes"},
        ],
        ids=repr,
    )
    def test_put_refuses_an_attempt_that_cannot_be_stored(
        self, backend: StorageBackend, bad: dict[str, Any]
    ) -> None:
        run = new_run(attempt=2)
        fine = Attempt(1, run.started_at, run.started_at, "failed", None, None, None)

        with pytest.raises((InvalidFieldError, InvalidStatusError, ValueError)):
            backend.runs.put(run, attempts=[fine, fine._replace(**bad)])

        assert backend.runs.count_runs() == 0

    def test_put_refuses_what_cannot_be_stored(self, backend: StorageBackend) -> None:
        with pytest.raises(InvalidFieldError, match="inputs is not JSON"):
            backend.runs.put(new_run(inputs=math.nan))
        with pytest.raises(TypeError, match="Pass a WorkflowRun"):
            backend.runs.put("run")  # type: ignore[arg-type]

    def test_delete_unchanged_deletes_only_what_is_as_it_was_read(
        self, backend: StorageBackend
    ) -> None:
        run = stored_run(backend, status="completed", inputs={"n": 1})
        other = stored_run(backend)
        read = read_run(backend, run)
        backend.states.save_state(run.id, {}, "node")
        with pytest.raises(RunChangedError):
            backend.runs.delete_unchanged(read, None)
        last = backend.states.get_latest_checkpoint(run.id)
        backend.runs.update(run.id, inputs={"n": 1.0})
        with pytest.raises(RunChangedError):
            backend.runs.delete_unchanged(read, last)
        read = read_run(backend, run)

        backend.runs.delete_unchanged(read, last)

        assert backend.runs.get(run.id) is None
        assert backend.states.get_state_history(run.id) == []
        assert ids(list(backend.runs.iter_runs())) == [other.id]
        with pytest.raises(RunNotFoundError):
            backend.runs.delete_unchanged(read, last)

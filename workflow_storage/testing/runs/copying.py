"""What copying between stores rests on: writes that are exact, over what was read only.

Run by `RunsContract`, or alone.
"""

from __future__ import annotations

import math
from datetime import timedelta

import pytest
from django.utils import timezone

from workflow_storage import (
    InvalidFieldError,
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

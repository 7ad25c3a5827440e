"""What is promised of deleting runs: what was meant is gone with its states, nothing else.

Run by `RunsContract`, or alone.
"""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest
from django.utils import timezone

from workflow_storage import InvalidStatusError, StorageBackend
from workflow_storage.testing.sample_runs import STATUSES, new_run, stored_run


class DeletingContract:
    """What `delete` and `delete_finished` promise."""

    def test_delete_removes_the_run_and_its_states(self, backend: StorageBackend) -> None:
        run, other = stored_run(backend), stored_run(backend)
        for stored in (run, other):
            backend.states.save_state(stored.id, {}, "node")

        backend.runs.delete(run.id)

        assert backend.runs.get(run.id) is None
        assert backend.states.get_state_history(run.id) == []
        assert len(backend.states.get_state_history(other.id)) == 1

    def test_a_deleted_id_can_be_used_again(self, backend: StorageBackend) -> None:
        run = stored_run(backend)
        backend.states.save_state(run.id, {}, "node")
        backend.runs.delete(run.id)

        backend.runs.add(new_run(id=run.id))

        assert backend.states.save_state(run.id, {}, "node") == 0

    def test_delete_finished_deletes_what_ended_before(self, backend: StorageBackend) -> None:
        now = timezone.now()
        start = now - timedelta(days=10)
        for name in ("a", "b"):
            for status in STATUSES:
                for ended in (now - timedelta(days=2), now):
                    times = {"completed_at": ended} if status.is_terminal else {}
                    run = stored_run(
                        backend, workflow_name=name, status=status, started_at=start, **times
                    )
                    backend.states.save_state(run.id, {}, "node")
        before = now - timedelta(days=1)

        assert (
            backend.runs.delete_finished(before=before, workflow_name="a", statuses="failed") == 1
        )
        assert backend.runs.count_runs(workflow_name="a", status="failed") == 1
        assert backend.runs.delete_finished(before=before, batch_size=2) == 5
        assert backend.runs.delete_finished(before=before) == 0

        left = list(backend.runs.iter_runs())
        assert len(left) == 14
        assert all(run.completed_at is None or run.completed_at >= before for run in left)
        assert all(len(backend.states.get_state_history(run.id)) == 1 for run in left)

    def test_delete_finished_refuses_what_would_delete_unfinished_runs(
        self, backend: StorageBackend
    ) -> None:
        stored_run(backend, status="running")
        now = timezone.now()
        with pytest.raises(InvalidStatusError, match="Invalid run status: 'running'"):
            backend.runs.delete_finished(before=now, statuses=["failed", "running"])
        with pytest.raises(ValueError, match="batch_size is 0"):
            backend.runs.delete_finished(before=now, batch_size=0)
        with pytest.raises(ValueError, match="before is a naive datetime"):
            backend.runs.delete_finished(before=datetime(2026, 1, 1))
        assert backend.runs.count_runs() == 1

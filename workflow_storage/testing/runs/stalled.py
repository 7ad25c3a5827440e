"""What is promised of stalled runs: they alone are listed and set to failed.

Run by `RunsContract`, or alone.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from django.utils import timezone

from workflow_storage import Checkpoint, RunStatus, StorageBackend
from workflow_storage.testing.sample_runs import (
    STATUSES,
    ids,
    new_run,
    newest_first,
    read_run,
    stored_run,
)


class StalledContract:
    """What `list_stalled` and `fail_stalled` promise."""

    def test_list_stalled_gives_running_runs_without_a_sign_of_life(
        self, backend: StorageBackend
    ) -> None:
        old = timezone.now() - timedelta(hours=2)
        silent = stored_run(backend, status="running", started_at=old)
        beating = stored_run(backend, status="running", started_at=old)
        backend.runs.heartbeat(beating.id)
        saving = stored_run(backend, status="running", started_at=old)
        backend.states.save_state(saving.id, {}, "node")
        once_beating = stored_run(
            backend, status="running", started_at=old, heartbeat_at=old + timedelta(minutes=1)
        )
        stored_run(backend, status="running")
        for status in set(STATUSES) - {RunStatus.RUNNING}:
            stored_run(backend, status=status, started_at=old)

        stalled = backend.runs.list_stalled(timedelta(hours=1))

        assert ids(stalled) == newest_first([silent, once_beating])
        assert backend.runs.list_stalled(timedelta(hours=3)) == []

    def test_the_newest_checkpoint_is_the_sign_of_life(self, backend: StorageBackend) -> None:
        now = timezone.now()
        old = now - timedelta(hours=2)
        pruned = stored_run(backend, status="running", started_at=old)
        copied = stored_run(backend, status="running", started_at=old)
        backend.states.save_state(pruned.id, {}, "node")
        for step, at in enumerate((now, old)):
            backend.states.append(
                copied.id,
                [Checkpoint(step=step, node_id="node", state_data={}, created_at=at)],
            )
        assert ids(backend.runs.list_stalled(timedelta(hours=1))) == [copied.id]

        backend.states.delete_states(pruned.id)

        stalled = backend.runs.list_stalled(timedelta(hours=1))
        assert ids(stalled) == newest_first([pruned, copied])

    def test_a_run_that_has_just_been_set_to_running_is_not_stalled(
        self, backend: StorageBackend
    ) -> None:
        run = stored_run(backend, started_at=timezone.now() - timedelta(days=1))

        backend.runs.update_status(run.id, "running")

        assert backend.runs.list_stalled(timedelta(hours=1)) == []

    def test_fail_stalled_fails_stalled_runs(self, backend: StorageBackend) -> None:
        old = timezone.now() - timedelta(hours=2)
        run = stored_run(backend, status="running", started_at=old)
        alive = stored_run(backend, status="running")

        assert backend.runs.fail_stalled(timedelta(hours=1)) == 1

        stored = read_run(backend, run)
        assert stored.status == "failed"
        assert stored.error_message is not None
        assert "no sign of life for more than 1:00:00" in stored.error_message
        assert read_run(backend, alive).status == "running"

    def test_fail_stalled_measures_a_run_that_had_a_duration(self, backend: StorageBackend) -> None:
        start = timezone.now() - timedelta(hours=2)
        run = new_run(status="running", started_at=start, heartbeat_at=start, duration_seconds=5.0)
        backend.runs.put(run)

        assert backend.runs.fail_stalled(timedelta(hours=1)) == 1

        failed = read_run(backend, run)
        assert failed.completed_at is not None
        assert failed.duration_seconds == pytest.approx(7200, abs=60)

    def test_fail_stalled_keeps_the_result_of_a_run_that_finishes_meanwhile(
        self, backend: StorageBackend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        old = timezone.now() - timedelta(hours=2)
        run = stored_run(backend, status="running", started_at=old)
        deleted = stored_run(backend, status="running", started_at=old)
        stalled = backend.runs.list_stalled(timedelta(hours=1))
        monkeypatch.setattr(backend.runs, "list_stalled", lambda idle: stalled)
        backend.runs.update_status(run.id, "completed", outputs="result")
        backend.runs.delete(deleted.id)

        assert backend.runs.fail_stalled(timedelta(hours=1)) == 0

        stored = read_run(backend, run)
        assert (stored.status, stored.outputs) == ("completed", "result")

    def test_fail_stalled_leaves_a_run_that_gives_a_sign_of_life_meanwhile(
        self, backend: StorageBackend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        old = timezone.now() - timedelta(hours=2)
        beating, saving = (stored_run(backend, status="running", started_at=old) for _ in "ab")
        stalled = backend.runs.list_stalled(timedelta(hours=1))
        monkeypatch.setattr(backend.runs, "list_stalled", lambda idle: stalled)
        backend.runs.heartbeat(beating.id)
        backend.states.save_state(saving.id, {}, "node")

        assert backend.runs.fail_stalled(timedelta(hours=1)) == 0

    @pytest.mark.parametrize("idle", [60, None, timedelta(seconds=-1), timedelta.max])
    def test_list_stalled_takes_a_timedelta(self, backend: StorageBackend, idle: Any) -> None:
        with pytest.raises((TypeError, ValueError), match="Pass a timedelta"):
            backend.runs.list_stalled(idle)

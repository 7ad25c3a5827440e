"""What is promised of stalled runs: they alone are listed and set to failed.

Run by `RunsContract`, or alone.
"""

from __future__ import annotations

from contextlib import suppress
from datetime import timedelta
from typing import Any

import pytest
from django.utils import timezone

from workflow_storage import (
    Checkpoint,
    RunNotFoundError,
    RunStatus,
    StatusConflictError,
    StorageBackend,
)
from workflow_storage.testing.sample_runs import (
    STATUSES,
    ids,
    new_run,
    newest_first,
    read_run,
    stored_run,
)
from workflow_storage.testing.threads import in_threads


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

    def test_stalled_runs_are_selected_and_paged_like_all_others(
        self, backend: StorageBackend
    ) -> None:
        old = timezone.now() - timedelta(hours=2)
        for number in range(7):
            stored_run(
                backend,
                id=str(number),
                workflow_name="a" if number % 2 else "b",
                status="running",
                labels={"tenant": "acme", "n": str(number)},
                started_at=old - timedelta(minutes=number // 3),
            )
        stored_run(backend, id="alive", workflow_name="a", status="running")
        hour = timedelta(hours=1)
        listed = ids(backend.runs.list_stalled(hour))

        def stalled(**arguments: Any) -> list[str]:
            return ids(backend.runs.list_stalled(hour, **arguments))

        assert listed == ["2", "1", "0", "5", "4", "3", "6"]
        assert stalled(limit=3) == listed[:3]
        assert stalled(limit=0) == []
        assert stalled(before="0", limit=2) == ["5", "4"]
        assert stalled(before=backend.runs.get("3")) == ["6"]
        assert stalled(workflow_name="a") == ["1", "5", "3"]
        assert stalled(labels={"tenant": "acme", "n": "4"}) == ["4"]
        assert stalled(labels={"tenant": "acme"}, limit=2, before="1") == ["0", "5"]
        assert stalled(started_before=old) == ["5", "4", "3", "6"]
        assert stalled(status=["running", "failed"]) == listed
        assert stalled(status="failed") == stalled(workflow_name=[]) == []
        with pytest.raises(RunNotFoundError):
            stalled(before="gone")

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

    def test_fail_stalled_adds_to_the_duration_of_a_run(self, backend: StorageBackend) -> None:
        start = timezone.now() - timedelta(hours=2)
        run = new_run(status="running", started_at=start, heartbeat_at=start, duration_seconds=5.0)
        backend.runs.put(run)

        assert backend.runs.fail_stalled(timedelta(hours=1)) == 1

        failed = read_run(backend, run)
        assert failed.completed_at is not None
        assert failed.duration_seconds == pytest.approx(7205, abs=60)

    def test_fail_stalled_of_one_run_leaves_the_others(self, backend: StorageBackend) -> None:
        old = timezone.now() - timedelta(hours=2)
        run, other = (stored_run(backend, status="running", started_at=old) for _ in "ab")
        alive = stored_run(backend, status="running")
        hour = timedelta(hours=1)

        for run_id in (alive.id, "gone", "impossible\0", "x" * 37):
            assert backend.runs.fail_stalled(hour, run_id=run_id) == 0
        assert backend.runs.fail_stalled(hour, run_id=run.id) == 1
        assert backend.runs.fail_stalled(hour, run_id=run.id) == 0

        assert read_run(backend, run).status == "failed"
        assert ids(backend.runs.list_stalled(hour)) == [other.id]

    def test_fail_stalled_fails_any_number_of_runs(self, backend: StorageBackend) -> None:
        old = timezone.now() - timedelta(hours=2)
        for number in range(210):
            stored_run(backend, status="running", started_at=old - timedelta(seconds=number))

        assert backend.runs.fail_stalled(timedelta(hours=1)) == 210

        assert backend.runs.count_runs(status="failed") == 210

    def test_the_start_of_the_attempt_is_the_sign_of_life_not_that_of_the_run(
        self, backend: StorageBackend
    ) -> None:
        now, hours = timezone.now(), timedelta(hours=1)
        resumed = new_run(status="running", started_at=now - 9 * hours, attempt_started_at=now)
        # The clock went back after it was added.
        early = new_run(
            status="running", started_at=now + 2 * hours, attempt_started_at=now - 2 * hours
        )
        for run in (resumed, early):
            backend.runs.put(run)

        assert ids(backend.runs.list_stalled(hours)) == [early.id]
        assert backend.runs.fail_stalled(hours) == 1
        stored = read_run(backend, early)
        assert stored.status == "failed"
        assert stored.completed_at == stored.started_at
        assert stored.duration_seconds == pytest.approx(7200, abs=60)

    def test_an_attempt_that_stalled_is_listed_with_its_error(
        self, backend: StorageBackend
    ) -> None:
        old = timezone.now() - timedelta(hours=2)
        run = stored_run(backend, status="running", started_at=old, worker="gone:1")
        backend.runs.fail_stalled(timedelta(hours=1))
        backend.runs.update_status(run.id, "running")

        stalled, current = backend.runs.list_attempts(run.id)

        assert (stalled.status, stalled.worker, stalled.started_at) == ("failed", "gone:1", old)
        assert stalled.error_message is not None
        assert "no sign of life for more than 1:00:00" in stalled.error_message
        assert (current.number, current.status) == (2, "running")

    def test_a_run_that_finishes_while_it_is_failed_is_one_or_the_other(
        self, backend: StorageBackend
    ) -> None:
        runs = [stored_run(backend, status="running") for _ in range(60)]
        idle = timedelta(0)

        def work(number: int) -> int:
            if number == 0:
                return sum(backend.runs.fail_stalled(idle) for _ in range(10))
            for run in runs[number - 1 :: 2]:
                with suppress(StatusConflictError):
                    backend.runs.update_status(run.id, "completed", attempt=1, outputs="result")
            return 0

        failed, *_ = in_threads(3, work)

        ended = [read_run(backend, run) for run in runs]
        assert failed == [run.status for run in ended].count("failed")
        assert {(run.status, run.outputs) for run in ended} <= {
            ("completed", "result"),
            ("failed", None),
        }
        assert all(run.attempt == 1 for run in ended)

    def test_a_run_that_gives_signs_of_life_is_not_failed_meanwhile(
        self, backend: StorageBackend
    ) -> None:
        old = timezone.now() - timedelta(hours=2)
        beating, saving = (stored_run(backend, status="running", started_at=old) for _ in "ab")
        backend.runs.heartbeat(beating.id)
        backend.states.save_state(saving.id, {}, "node")

        def work(number: int) -> int:
            for turn in range(30):
                if number == 0:
                    assert backend.runs.fail_stalled(timedelta(minutes=1)) == 0
                elif turn % 2:
                    backend.runs.heartbeat(beating.id, attempt=1)
                else:
                    backend.states.save_state(saving.id, {}, "node", attempt=1)
            return backend.runs.count_runs(status="running")

        assert in_threads(2, work) == [2, 2]

    @pytest.mark.parametrize("idle", [60, None, timedelta(seconds=-1), timedelta.max])
    def test_list_stalled_takes_a_timedelta(self, backend: StorageBackend, idle: Any) -> None:
        with pytest.raises((TypeError, ValueError), match="Pass a timedelta"):
            backend.runs.list_stalled(idle)
        for run_id in (None, "gone"):
            with pytest.raises((TypeError, ValueError), match="Pass a timedelta"):
                backend.runs.fail_stalled(idle, run_id=run_id)

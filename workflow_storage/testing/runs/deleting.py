"""What is promised of deleting runs: what was meant is gone with its states, nothing else.

Run by `RunsContract`, or alone.
"""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta
from typing import Any

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
        with pytest.raises(TypeError, match="before is missing"):
            backend.runs.delete_finished()  # type: ignore[call-arg]
        with pytest.raises(TypeError, match="since: no such filter"):
            backend.runs.delete_finished(before=now, since=now)  # type: ignore[call-arg]
        for wrong in ({"keep_last": -1}, {"limit": -1}, {"limit": 1.5}):
            with pytest.raises(ValueError, match=next(iter(wrong))):
                backend.runs.delete_finished(before=now, **wrong)
            with pytest.raises(ValueError, match=next(iter(wrong))):
                list(backend.runs.iter_finished(before=now, **wrong))

    @pytest.mark.parametrize("labels", [None, {"kind": "test"}])
    def test_the_newest_of_each_workflow_are_spared(
        self, backend: StorageBackend, labels: dict[str, str] | None
    ) -> None:
        now = timezone.now()
        for name, count in (("a", 6), ("b", 2), ("c", 5)):
            for number in range(count):
                stored_run(
                    backend,
                    id=f"{name}{number}",
                    workflow_name=name,
                    status=("failed", "completed")[number % 2],
                    labels=labels or {},
                    started_at=now - timedelta(days=10, hours=-number),
                    completed_at=now - timedelta(days=3) + timedelta(days=number),
                )
        for other in ({"status": "running"}, {"status": "completed", "labels": {"kind": "other"}}):
            if "labels" in other and labels is None:
                continue
            stored_run(backend, workflow_name="a", started_at=now, **other)
        which: dict[str, Any] = {"before": now, "keep_last": 3, "labels": labels}

        # Of c, those that have not ended before are among the newest, too.
        would = [run.id for run in backend.runs.iter_finished(**which)]
        assert sorted(would) == ["a0", "a1", "a2", "c0", "c1"]
        assert backend.runs.delete_finished(batch_size=2, **which) == 5
        assert backend.runs.delete_finished(**which) == 0
        assert [backend.runs.get(run_id) for run_id in would] == [None] * 5
        assert backend.runs.count_runs(workflow_name="b") == 2
        assert backend.runs.count_runs(workflow_name="c") == 3

    def test_at_most_so_many_are_deleted_those_that_ended_first(
        self, backend: StorageBackend
    ) -> None:
        now = timezone.now()
        start = now - timedelta(days=10)
        for number in range(30):
            stored_run(
                backend,
                id=f"{number:02}",
                status=("completed", "failed", "cancelled")[number % 3],
                started_at=start - timedelta(hours=number),
                completed_at=start + timedelta(hours=number),
            )

        would = [run.id for run in backend.runs.iter_finished(before=now, limit=7)]

        assert would == [f"{number:02}" for number in range(7)]
        assert backend.runs.delete_finished(before=now, limit=0) == 0
        assert backend.runs.delete_finished(before=now, limit=7, batch_size=3) == 7
        assert sorted(run.id for run in backend.runs.iter_runs()) == [
            f"{number:02}" for number in range(7, 30)
        ]
        assert backend.runs.delete_finished(before=now, limit=100) == 23

    def test_after_each_batch_it_is_said_how_many_were_deleted(
        self, backend: StorageBackend
    ) -> None:
        for _ in range(5):
            stored_run(backend, status="failed")
        batches: list[int] = []

        deleted = backend.runs.delete_finished(
            before=timezone.now(), batch_size=2, limit=4, on_batch=batches.append
        )

        assert sum(batches) == deleted == 4
        assert backend.runs.count_runs() == 1

    def test_what_would_be_deleted_is_what_is_deleted(self, backend: StorageBackend) -> None:
        now = timezone.now()
        for number in range(60):
            ended = {"completed_at": now + timedelta(hours=number - 45)} if number % 4 else {}
            stored_run(
                backend,
                workflow_name=f"w{number % 5}",
                status=("running", "completed", "failed", "cancelled")[number % 4],
                started_at=now - timedelta(days=3, minutes=number * 7 % 60),
                parent_id="parent" if number % 2 else None,
                **ended,
            )
        whiches: list[dict[str, Any]] = [
            {"before": now - timedelta(hours=30), "workflow_name": ["w1", "w2"]},
            {"before": now - timedelta(hours=20), "statuses": "failed", "keep_last": 1},
            {"before": now, "parent_id": "parent", "keep_last": 2, "limit": 3},
            {"before": now, "workflow_name": "none"},
            {"before": now},
        ]
        for which in whiches:
            would = {run.id for run in backend.runs.iter_finished(**which)}
            before = {run.id for run in backend.runs.iter_runs()}

            assert backend.runs.delete_finished(**which) == len(would)
            assert before - {run.id for run in backend.runs.iter_runs()} == would
        assert backend.runs.count_runs(status="running") == 15

    def test_async_twins_find_and_delete_the_same(self, backend: StorageBackend) -> None:
        now = timezone.now()
        for number in range(5):
            stored_run(backend, id=str(number), status="completed", completed_at=now)

        async def deleted() -> list[str]:
            which: Any = {"before": now + timedelta(seconds=1), "keep_last": 1, "limit": 3}
            found = [run.id async for run in backend.runs.aiter_finished(**which)]
            assert await backend.runs.adelete_finished(**which) == 3
            return found

        found = asyncio.run(deleted())
        assert {run.id for run in backend.runs.iter_runs()} == {"0", "1", "2", "3", "4"} - set(
            found
        )

"""What is promised of changes to a run: those asked for are made, all or none.

Run by `RunsContract`, or alone.
"""

from __future__ import annotations

import itertools
import math
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from django.utils import timezone
from hypothesis import given
from hypothesis import strategies as st

from workflow_storage import (
    InvalidFieldError,
    InvalidStatusError,
    RunNotFoundError,
    RunStatus,
    StatusConflictError,
    StorageBackend,
)
from workflow_storage.testing.sample_runs import (
    NOT_TERMINAL,
    STATUSES,
    TERMINAL,
    read_run,
    stored_run,
)
from workflow_storage.testing.values import against_the_store


class ChangingContract:
    """What `update`, `update_status` and `heartbeat` promise."""

    def test_update_changes_the_given_fields_only(self, backend: StorageBackend) -> None:
        run = stored_run(backend, inputs={"a": 1}, outputs="old", total_tokens=1)
        other = stored_run(backend, outputs="other")

        backend.runs.update(run.id, outputs={"b": 2}, total_tokens=None, total_cost_usd=Decimal(2))

        stored = read_run(backend, run)
        assert stored.inputs == {"a": 1}
        assert stored.outputs == {"b": 2}
        assert stored.total_tokens is None
        assert stored.total_cost_usd == 2.0
        assert read_run(backend, other).outputs == "other"

    @pytest.mark.parametrize(
        "fields",
        [
            {"id": "new"},
            {"status": "failed"},
            {"workflow_name": "new"},
            {"started_at": None},
            {"completed_at": None},
            {"unknown": 1},
            {"total_tokens": "many"},
            {"inputs": math.nan},
        ],
        ids=repr,
    )
    def test_update_of_a_fixed_or_invalid_field_changes_nothing(
        self, backend: StorageBackend, fields: dict[str, Any]
    ) -> None:
        run = stored_run(backend, outputs="old")

        with pytest.raises(ValueError, match=next(iter(fields))):
            backend.runs.update(run.id, outputs="new", **fields)

        assert read_run(backend, run).outputs == "old"

    def test_changes_to_an_unknown_run_raise(self, backend: StorageBackend) -> None:
        message = "Workflow run not found: gone"
        with pytest.raises(RunNotFoundError, match=message):
            backend.runs.update("gone", outputs=1)
        with pytest.raises(RunNotFoundError, match=message):
            backend.runs.update("gone")
        with pytest.raises(RunNotFoundError, match=message):
            backend.runs.update_status("gone", "failed")
        with pytest.raises(RunNotFoundError, match=message):
            backend.runs.update_status("gone", "failed", expected="running")
        with pytest.raises(RunNotFoundError, match=message):
            backend.runs.heartbeat("gone")
        with pytest.raises(RunNotFoundError, match=message):
            backend.runs.delete("gone")

    @pytest.mark.parametrize(("old", "new"), list(itertools.product(STATUSES, TERMINAL)))
    def test_update_status_to_a_terminal_one_sets_its_times(
        self, backend: StorageBackend, old: RunStatus, new: RunStatus
    ) -> None:
        start = timezone.now() - timedelta(seconds=90, microseconds=1)
        run = stored_run(backend, status=old, started_at=start)

        before = timezone.now()
        backend.runs.update_status(run.id, new, outputs={"x": 1})

        stored = read_run(backend, run)
        assert stored.status == new
        assert stored.outputs == {"x": 1}
        assert stored.completed_at is not None
        assert before <= stored.completed_at <= timezone.now()
        ran = (stored.completed_at - start).total_seconds()
        assert stored.duration_seconds == (ran if old == "running" else run.duration_seconds)

    @pytest.mark.parametrize(("old", "new"), list(itertools.product(TERMINAL, NOT_TERMINAL)))
    def test_leaving_a_terminal_status_clears_its_end_and_keeps_its_duration(
        self, backend: StorageBackend, old: RunStatus, new: RunStatus
    ) -> None:
        run = stored_run(backend, status=old, duration_seconds=2.5)

        backend.runs.update_status(run.id, new)

        stored = read_run(backend, run)
        assert stored.status == new
        assert stored.completed_at is None
        assert stored.duration_seconds == 2.5

    @against_the_store
    @given(
        start=st.datetimes(datetime(1971, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC)),
        seconds=st.integers(0, 10**15).map(lambda number: number / 10**6),
    )
    def test_durations_are_exact(
        self, backend: StorageBackend, start: datetime, seconds: float
    ) -> None:
        completed = start + timedelta(seconds=seconds)
        run = stored_run(backend, status="running", started_at=start)

        backend.runs.update_status(run.id, "completed", completed_at=completed)

        stored = read_run(backend, run)
        assert stored.completed_at == completed
        assert stored.duration_seconds == (completed - start).total_seconds()

    def test_update_status_takes_given_times(self, backend: StorageBackend) -> None:
        run = stored_run(backend, status="running")
        completed = run.started_at + timedelta(seconds=5)

        backend.runs.update_status(
            run.id, "completed", completed_at=completed, duration_seconds=2.5
        )

        stored = read_run(backend, run)
        assert stored.completed_at == completed
        assert stored.duration_seconds == 2.5

    def test_a_duration_of_none_is_computed(self, backend: StorageBackend) -> None:
        run = stored_run(backend, status="running")
        completed = run.started_at + timedelta(seconds=5)

        backend.runs.update_status(
            run.id, "completed", completed_at=completed, duration_seconds=None
        )

        assert read_run(backend, run).duration_seconds == 5.0

    def test_update_status_refuses_result_times_of_a_run_that_goes_on(
        self, backend: StorageBackend
    ) -> None:
        run = stored_run(backend)
        with pytest.raises(InvalidFieldError, match="duration_seconds belongs to"):
            backend.runs.update_status(run.id, "running", duration_seconds=1.0)
        assert read_run(backend, run).status == "pending"

    def test_update_status_refuses_an_unknown_status(self, backend: StorageBackend) -> None:
        run = stored_run(backend)
        with pytest.raises(InvalidStatusError, match="Use one of: pending, running"):
            backend.runs.update_status(run.id, "done")
        with pytest.raises(InvalidStatusError):
            backend.runs.update_status(run.id, "failed", expected="done")
        with pytest.raises(ValueError, match="expected is empty"):
            backend.runs.update_status(run.id, "failed", expected=[])
        assert read_run(backend, run).status == "pending"

    def test_update_status_with_expected_changes_only_a_run_in_that_status(
        self, backend: StorageBackend
    ) -> None:
        run = stored_run(backend, status="running", outputs="old")

        with pytest.raises(StatusConflictError, match="is running, expected failed or pending"):
            backend.runs.update_status(
                run.id, "completed", expected=["pending", "failed"], outputs="new"
            )
        stored = read_run(backend, run)
        assert (stored.status, stored.outputs) == ("running", "old")

        backend.runs.update_status(
            run.id, "completed", expected={"pending", "running"}, outputs="new"
        )
        stored = read_run(backend, run)
        assert (stored.status, stored.outputs) == ("completed", "new")

    def test_heartbeat_sets_heartbeat_at(self, backend: StorageBackend) -> None:
        run = stored_run(backend)
        before = timezone.now()

        backend.runs.heartbeat(run.id)

        heartbeat = read_run(backend, run).heartbeat_at
        assert heartbeat is not None
        assert before <= heartbeat <= timezone.now()

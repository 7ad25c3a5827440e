"""What is promised of a run that is added: all of it is stored, or nothing.

Run by `RunsContract`, or alone.
"""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from django.utils import timezone

from workflow_storage import (
    InvalidFieldError,
    InvalidStatusError,
    RunAlreadyExistsError,
    RunStatus,
    StorageBackend,
    WorkflowRun,
)
from workflow_storage.testing.sample_runs import TERMINAL, new_run, read_run, stored_run
from workflow_storage.testing.values import NOT_JSON


class AddingContract:
    """What `add` and `get` promise."""

    def test_add_stores_every_field(self, backend: StorageBackend) -> None:
        start = timezone.now() - timedelta(hours=1)
        fields: dict[str, Any] = {
            "id": "a-task-id",
            "workflow_name": "every field",
            "status": "failed",
            "config_snapshot": {"model": "m"},
            "inputs": {"customer": 42},
            "outputs": [1, 2],
            "error_message": "it broke",
            "started_at": start,
            "completed_at": start + timedelta(seconds=1),
            "duration_seconds": 0.75,
            "total_tokens": 2**63 - 1,
            "total_cost_usd": 0.1,
            "heartbeat_at": start + timedelta(microseconds=1),
            "current_node": "ocr",
            "waiting_for": "approval",
            "attempt": 2**31 - 1,
            "attempt_started_at": start + timedelta(microseconds=2),
            "worker": "host:7",
            "parent_id": "its-parent",
            "forked_from_step": 0,
            "labels": {"tenant": "acme"},
        }
        assert fields.keys() == {field.name for field in WorkflowRun._meta.concrete_fields}

        backend.runs.add(WorkflowRun(**fields))

        stored = backend.runs.get("a-task-id")
        assert stored is not None
        assert {name: getattr(stored, name) for name in fields} == fields

    def test_get_of_an_unknown_run_gives_none(self, backend: StorageBackend) -> None:
        assert backend.runs.get("unknown") is None

    @pytest.mark.parametrize(
        "fields",
        [
            {"id": ""},
            {"id": "x" * 37},
            {"id": "nul\0"},
            {"id": "\ud800"},
            {"id": 42},
            {"id": None},
            {"workflow_name": ""},
            {"workflow_name": "x" * 257},
            {"workflow_name": "nul\0"},
            {"workflow_name": "\udfff"},
            {"status": "done"},
            {"status": None},
            {"started_at": None},
            {"started_at": "2026-01-01"},
            {"completed_at": "yesterday", "status": "failed"},
            {"completed_at": datetime(2026, 1, 1, tzinfo=UTC), "status": "running"},
            {"duration_seconds": 1.0, "status": "pending"},
            {"duration_seconds": math.nan, "status": "failed"},
            {"total_tokens": 2**63},
            {"total_tokens": 1.5},
            {"total_tokens": True},
            {"total_cost_usd": math.inf},
            {"total_cost_usd": Decimal("sNaN")},
            {"started_at": datetime(1, 1, 1, tzinfo=timezone.get_fixed_timezone(330))},
            {"started_at": datetime(9999, 12, 31, 23, tzinfo=timezone.get_fixed_timezone(-330))},
            {"total_cost_usd": "1.0"},
            {"total_cost_usd": 10**400},
            {"error_message": b"bytes"},
            {"inputs": math.nan},
            {"outputs": {"x": [-math.inf]}},
            {"config_snapshot": {"key": NOT_JSON}},
            {"inputs": {("a", "tuple"): 1}},
            {"inputs": {1, 2}},
            {"inputs": Decimal("NaN")},
            {"inputs": {1: 0, "1": 0}},
            {"outputs": [{"x": {True: 0, "true": 0}}]},
            {"current_node": ""},
            {"current_node": "x" * 129},
            {"waiting_for": "x" * 257},
            {"worker": "nul\0"},
            {"worker": "x" * 129},
            {"attempt": -1},
            {"attempt": None},
            {"attempt": 2**31},
            {"attempt_started_at": "now"},
        ],
        ids=repr,
    )
    def test_add_refuses_what_it_cannot_store_as_it_is(
        self, backend: StorageBackend, fields: dict[str, Any]
    ) -> None:
        run = new_run(**{"id": "refused", "workflow_name": "refused", **fields})

        with pytest.raises((InvalidFieldError, InvalidStatusError), match=next(iter(fields))[:6]):
            backend.runs.add(run)

        assert backend.runs.count_runs() == 0

    def test_add_refuses_a_time_without_time_zone(self, backend: StorageBackend) -> None:
        with pytest.raises(ValueError, match="started_at is a naive datetime"):
            backend.runs.add(new_run(started_at=datetime(2026, 1, 1)))

    def test_add_of_a_taken_id_raises_and_leaves_the_stored_run(
        self, backend: StorageBackend
    ) -> None:
        run = stored_run(backend, inputs="first")

        with pytest.raises(RunAlreadyExistsError, match=f"already exists: {run.id}"):
            backend.runs.add(new_run(id=run.id, inputs="second"))

        assert read_run(backend, run).inputs == "first"

    @pytest.mark.parametrize("status", TERMINAL)
    def test_add_of_an_ended_run_completes_it(
        self, backend: StorageBackend, status: RunStatus
    ) -> None:
        start = timezone.now() - timedelta(seconds=10)
        run = stored_run(backend, status=status, started_at=start)

        stored = read_run(backend, run)
        assert stored.completed_at is not None
        assert stored.duration_seconds == (stored.completed_at - start).total_seconds()

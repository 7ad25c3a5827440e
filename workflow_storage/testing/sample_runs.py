"""Runs to test with: making, storing, reading and naming them.

Called by the parts of the contract, and by tests that need a run in a store.
"""

from __future__ import annotations

from typing import Any

from workflow_storage import RunStatus, StorageBackend, WorkflowRun

STATUSES = list(RunStatus)
TERMINAL = [status for status in STATUSES if status.is_terminal]
NOT_TERMINAL = [status for status in STATUSES if not status.is_terminal]


def new_run(workflow_name: str = "contract", **fields: Any) -> WorkflowRun:
    """Return a run that is not stored yet."""
    return WorkflowRun(workflow_name=workflow_name, **fields)


def stored_run(backend: StorageBackend, **fields: Any) -> WorkflowRun:
    """Store a new run and return it."""
    run = new_run(**fields)
    backend.runs.add(run)
    return run


def read_run(backend: StorageBackend, run: WorkflowRun) -> WorkflowRun:
    """Return a run as it is stored; it must be there."""
    stored = backend.runs.get(run.id)
    assert stored is not None
    return stored


def ids(runs: list[WorkflowRun]) -> list[str]:
    """Return the ids of some runs, in their order."""
    return [run.id for run in runs]


def newest_first(runs: list[WorkflowRun]) -> list[str]:
    """Return the ids of some runs in the order of the contract."""
    return [run.id for run in sorted(runs, key=lambda run: (run.started_at, run.id), reverse=True)]

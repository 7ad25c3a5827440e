"""A run that begins where another one was: with its history up to a step."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from workflow_storage.base import StorageBackend
from workflow_storage.exceptions import RunNotFoundError, StepNotFoundError, StorageError
from workflow_storage.factory import create_storage_backend
from workflow_storage.validation import valid_step

if TYPE_CHECKING:
    from workflow_storage.config import StorageConfig
    from workflow_storage.models import WorkflowRun


def fork_run(
    run_id: str,
    step: int,
    *,
    backend: StorageBackend | StorageConfig | str | None = None,
    labels: dict[str, str] | None = None,
) -> WorkflowRun:
    """Make a new run with the history of another one up to a step; `resume_run` goes on from there.

    It is pending, has the inputs, the configuration and the labels of the other one, which is its
    parent, and its checkpoints as they are stored. The other one stays as it is.

    Args:
        run_id: the other run.
        step: the last step to have.
        backend: a `StorageBackend`, or what `create_storage_backend` takes.
        labels: in place of those of the other run.

    Returns:
        The new run.

    Raises:
        RunNotFoundError: if there is no such run.
        StepNotFoundError: (a ValueError) if it has no checkpoint of that step.
        InvalidFieldError: (a ValueError) if the labels cannot be stored.
    """
    from workflow_storage.models import WorkflowRun

    store = backend if isinstance(backend, StorageBackend) else create_storage_backend(backend)
    runs, states = store
    parent = runs.get(run_id)
    if parent is None:
        raise RunNotFoundError(run_id)
    if not _has_step(store, run_id, valid_step(step)):
        raise StepNotFoundError(run_id, step)
    fork = WorkflowRun(
        workflow_name=parent.workflow_name,
        config_snapshot=parent.config_snapshot,
        inputs=parent.inputs,
        labels=parent.labels if labels is None else labels,
        parent_id=parent.id,
        forked_from_step=step,
    )
    runs.add(fork)
    try:
        states.copy_states(run_id, fork.id, through=step)
        if not _has_step(store, fork.id, step):  # deleted since
            raise StepNotFoundError(run_id, step)
    except BaseException:
        with suppress(StorageError):
            runs.delete(fork.id)
        raise
    return fork


def _has_step(store: StorageBackend, run_id: str, step: int) -> bool:
    found = next(iter(store.states.iter_steps(run_id, after=step - 1)), None)
    return found is not None and found["step"] == step

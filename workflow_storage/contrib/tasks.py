"""A task of a queue as a run: what the integrations with queues do, whichever the queue.

They call it from the queue's signals, whose receivers must not raise: the task would fail for it, or
its worker die. So what fails here is logged, and the task goes on.
"""

from __future__ import annotations

import logging
import threading
import uuid
from contextlib import nullcontext, suppress
from functools import wraps
from typing import TYPE_CHECKING, Any, Concatenate, NamedTuple, ParamSpec, TypeVar

from django.db import connections, transaction

from workflow_storage.exceptions import (
    InvalidFieldError,
    RunAlreadyExistsError,
    RunLostError,
    RunNotFoundError,
    StatusConflictError,
)
from workflow_storage.recorder.opening import (
    AROUND,
    Beginning,
    Opened,
    Resumption,
    id_around,
    this_worker,
)
from workflow_storage.recorder.recording import Recording
from workflow_storage.serialization import payload_json
from workflow_storage.status import TERMINAL_STATUSES, RunStatus
from workflow_storage.validation import (
    MAX_LABEL_VALUE,
    MAX_RUN_ID,
    MAX_WORKFLOW_NAME,
    cut,
    is_possible_name,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from workflow_storage.base import StorageBackend
    from workflow_storage.recorder.run import RecordedRun
    from workflow_storage.recorder.steps import Steps

_P = ParamSpec("_P")
_T = TypeVar("_T")

logger = logging.getLogger(__name__)

HEARTBEAT = 30.0
"""Seconds between signs of life of a task, so that fail_stalled_runs finds one that was killed."""


class Task(NamedTuple):
    """A task, as its run tells of it."""

    id: str
    """Its id in the queue."""
    name: str
    inputs: Any = None
    labels: dict[str, str] = {}
    parent_id: str | None = None
    """The run that it is part of; None for the one that is recorded around the caller, if any."""

    @property
    def run_id(self) -> str:
        """The id of its run: its own, if that can be one, or a UUID made from it."""
        return run_id_of(self.id)

    def fields(self) -> dict[str, Any]:
        """Return the fields of its run, as they can be stored."""
        return {
            "id": self.run_id,
            "workflow_name": cut(self.name, MAX_WORKFLOW_NAME),
            "inputs": storable("inputs", self.inputs, self.id),
            "labels": {
                name: cut(value, MAX_LABEL_VALUE) for name, value in self.labels.items() if value
            },
        }


def run_id_of(task_id: str) -> str:
    """Return the id of the run of a task."""
    if is_possible_name("id", task_id, MAX_RUN_ID):
        return task_id
    return str(uuid.uuid5(uuid.NAMESPACE_OID, task_id))


def storable(field: str, value: Any, task_id: str) -> Any:
    """Return a payload, or None if it cannot be stored, which is logged."""
    try:
        payload_json(field, value)
    except InvalidFieldError as exc:
        logger.warning("The run of task %s is recorded without its %s: %s", task_id, field, exc)
        return None
    return value


def logs_errors(
    receiver: Callable[Concatenate[str, _P], _T],
) -> Callable[Concatenate[str, _P], _T | None]:
    """Let a function whose first argument is the id of a task log what it raises, and return None."""

    @wraps(receiver)
    def logged(task_id: str, /, *args: _P.args, **kwargs: _P.kwargs) -> _T | None:
        try:
            return receiver(task_id, *args, **kwargs)
        except RunLostError as exc:
            logger.warning("What became of task %s here was not stored: %s", task_id, exc)
        except Exception:
            logger.exception("What became of task %s was not stored. The task goes on.", task_id)
        return None

    return logged


def keeping_transaction(backend: StorageBackend) -> AbstractContextManager[Any]:
    """Keep a transaction of the caller's usable if what is done inside fails in the database."""
    if backend.alias is None or not connections[backend.alias].in_atomic_block:
        return nullcontext()
    return transaction.atomic(using=backend.alias)


def enqueue(task: Task, backend: StorageBackend, *, again: bool = False) -> None:
    """Store the run of a task that waits, unless it has one.

    A queue that knows nothing of transactions can begin the task before the caller's is committed;
    have this called by ``backend.on_commit()`` then, for a task that has a `parent_id`.

    Args:
        task: which task.
        backend: the store.
        again: let a run that has ended wait again; for who knows that nobody has begun the task yet.
    """
    from workflow_storage.models import WorkflowRun

    parent_id = task.parent_id or id_around(backend)
    with keeping_transaction(backend):
        try:
            backend.runs.add(WorkflowRun(parent_id=parent_id, **task.fields()))
        except RunAlreadyExistsError:
            logger.debug("Task %s has a run", task.id)
            if again:
                with suppress(StatusConflictError):
                    backend.runs.update_status(
                        task.run_id, RunStatus.PENDING, expected=TERMINAL_STATUSES
                    )


class _Attempt:
    """The next attempt of a task, whatever became of the one before; its first one, if there is none."""

    def __init__(self, task: Task) -> None:
        self._task = task

    def steps(self, backend: StorageBackend, inputs: Any) -> Steps[Opened]:
        """Begin the attempt."""
        # Most wait. To begin such a run takes a statement; to take one over, a transaction.
        waiting = Resumption(self._task.run_id, statuses=(RunStatus.PENDING,))
        again = Resumption(self._task.run_id, statuses=tuple(RunStatus))
        try:
            return (yield from waiting.steps(backend, inputs))
        except StatusConflictError:
            return (yield from again.steps(backend, inputs))
        except RunNotFoundError:
            pass
        fields = self._task.fields()
        first = Beginning(
            fields["workflow_name"],
            None,
            fields["id"],
            fields["labels"],
            AROUND if self._task.parent_id is None else self._task.parent_id,
        )
        try:
            return (yield from first.steps(backend, fields["inputs"]))
        except RunAlreadyExistsError:  # it was stored as waiting meanwhile
            return (yield from again.steps(backend, inputs))


class _Recorded(NamedTuple):
    recording: Recording
    run: RecordedRun


_recorded: dict[tuple[str, int], _Recorded] = {}
"""The tasks that are recorded in this process, by their runs and threads."""


def start(task: Task, backend: StorageBackend, heartbeat: float | None = HEARTBEAT) -> RecordedRun:
    """Begin the next attempt of a task, and let `current_run` return its run in this context.

    Whoever has the run loses it: the queue has given that worker up.

    Args:
        task: which task.
        backend: the store.
        heartbeat: seconds between signs of life; None for none.
    """
    recording = Recording(_Attempt(task), None, backend, heartbeat)
    with keeping_transaction(backend):
        run = recording.__enter__()
        run.outputs = None  # not those of an attempt before, which has completed
        _recorded[task.run_id, threading.get_ident()] = _Recorded(recording, run)
    return run


def recorded(task_id: str) -> RecordedRun | None:
    """Return the run of a task that this thread has begun and not finished."""
    found = _recorded.get((run_id_of(task_id), threading.get_ident()))
    return found and found.run


def finish(task_id: str, *, outputs: Any = None, exc: BaseException | None = None) -> bool:
    """End the attempt of a task that this thread has begun, as a recording ends.

    Args:
        task_id: which task.
        outputs: its result; None keeps what the task set itself.
        exc: what it was left with.

    Returns:
        Whether this thread had begun it.
    """
    found = _recorded.pop((run_id_of(task_id), threading.get_ident()), None)
    if found is None:
        return False
    recording, run = found
    if outputs is not None:
        run.outputs = outputs
    run.outputs = storable("outputs", run.outputs, task_id)
    try:
        with keeping_transaction(run.backend):
            recording.__exit__(None if exc is None else type(exc), exc, None)
    finally:
        # Also where the end could not be stored: nobody else is to find this run around.
        recording.leave(RunStatus.CANCELLED if run.status is RunStatus.RUNNING else run.status)
    return True


def leave(task_id: str) -> bool:
    """Leave the run of a task that this thread has begun as it is: another process tells how it ends.

    Returns:
        Whether this thread had begun it.
    """
    found = _recorded.pop((run_id_of(task_id), threading.get_ident()), None)
    if found is None:
        return False
    found.recording.leave(RunStatus.CANCELLED)
    return True


def put_back(task_id: str, error_message: str | None = None) -> bool:
    """Let the run of a task that this thread has begun wait for its next attempt.

    Args:
        task_id: which task.
        error_message: why the attempt failed; None for one that did not.

    Returns:
        Whether this thread had begun it.
    """
    found = _recorded.pop((run_id_of(task_id), threading.get_ident()), None)
    if found is None:
        return False
    run = found.run
    found.recording.leave(RunStatus.PENDING)
    totals = {"total_tokens": run.total_tokens, "total_cost_usd": run.total_cost_usd}
    wait(run.run_id, run.attempt, run.backend, error_message, **totals)
    return True


def wait(
    run_id: str,
    attempt: int,
    backend: StorageBackend,
    error_message: str | None = None,
    **fields: Any,
) -> None:
    """Let a running run wait for its next attempt, if it is in an attempt.

    Args:
        run_id: which run.
        attempt: the attempt.
        backend: the store.
        error_message: why the attempt failed; None for one that did not.
        **fields: what is stored with it.
    """
    if error_message is not None:
        fields["error_message"] = error_message
    backend.runs.update_status(run_id, RunStatus.PENDING, attempt=attempt, **fields)


def end(
    task: Task,
    status: RunStatus,
    backend: StorageBackend,
    *,
    outputs: Any = None,
    error_message: str | None = None,
) -> None:
    """End the run of a task that was not begun in this thread, or not at all.

    One that has ended stays as it is, and so does one that another worker has begun.

    Args:
        task: which task.
        status: how it ended.
        backend: the store.
        outputs: its result.
        error_message: why it failed.
    """
    from workflow_storage.models import WorkflowRun

    fields = {
        "outputs": storable("outputs", outputs, task.id),
        "error_message": error_message,
    }
    with keeping_transaction(backend):
        run = backend.runs.get(task.run_id)
        if run is None:
            backend.runs.add(
                WorkflowRun(status=status, parent_id=task.parent_id, **task.fields(), **fields)
            )
        elif run.status == RunStatus.RUNNING and run.worker not in (None, this_worker()):
            logger.warning("Task %s has ended here, and is carried out by %s", task.id, run.worker)
        elif not RunStatus(run.status).is_terminal:
            backend.runs.update_status(
                task.run_id,
                status,
                expected=(RunStatus.PENDING, RunStatus.RUNNING),
                attempt=run.attempt,
                **fields,
            )

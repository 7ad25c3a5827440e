"""A task that cannot tell itself what becomes of it. In the main process of a worker.

There Celery tells of tasks whose process was killed or took too long, and of those that were revoked
or expired. It tells of others there, too, or in the process that carries them out; these have ended
their run themselves.
"""

from __future__ import annotations

import logging
import os
import weakref
from typing import TYPE_CHECKING, Any

from billiard.exceptions import WorkerLostError
from django.db import connections

from workflow_storage.contrib import tasks
from workflow_storage.contrib.celery.options import options_of, project_backend
from workflow_storage.contrib.celery.working import is_carried_out_here
from workflow_storage.recorder import describe_error
from workflow_storage.recorder.opening import this_worker
from workflow_storage.status import RunStatus

if TYPE_CHECKING:
    from celery.app.task import Context
    from celery.app.task import Task as CeleryTask
    from celery.worker.request import Request

logger = logging.getLogger(__name__)

_received: weakref.WeakSet[Request] = weakref.WeakSet()
"""The tasks that this worker has received and not forgotten, with the process that has each."""


def task_received(sender: Any, request: Request, **kwargs: Any) -> None:
    """Note that this worker has a task."""
    _received.add(request)


def task_failure(
    sender: CeleryTask[Any, Any], task_id: str, exception: BaseException, **kwargs: Any
) -> None:
    """Fail the run of a task whose process was lost, or was killed since it took too long."""
    if not is_carried_out_here(sender, task_id):
        is_lost = isinstance(exception, WorkerLostError)
        why = describe_error(exception)
        _report(task_id, sender.name, RunStatus.FAILED, why, is_lost=is_lost)


def task_unknown(sender: Any, name: str, id: str, **kwargs: Any) -> None:  # noqa: A002
    """Fail the run of a task that this worker does not know, and throws away."""
    if id:
        _report(str(id), name, RunStatus.FAILED, f"The worker knows no task {name}.")


def task_retry(
    sender: CeleryTask[Any, Any], request: Context, reason: Any = None, **kwargs: Any
) -> None:
    """Let the run of a task wait whose process was lost or ended, and that will be begun again."""
    task_id = str(request.id)
    if is_carried_out_here(sender, task_id):
        return
    why = str(reason or "The worker was shut down, or has lost the broker.")
    # Without a reason no message is sent: only one that is not acknowledged yet will come again.
    status = RunStatus.PENDING if reason is not None or sender.acks_late else RunStatus.FAILED
    _report(task_id, sender.name, status, why)


def task_revoked(
    sender: CeleryTask[Any, Any],
    request: Context,
    terminated: bool = False,
    signum: Any = None,
    expired: bool = False,
    **kwargs: Any,
) -> None:
    """Cancel the run of a task that was revoked or has expired."""
    if expired:
        why = f"Expired at {request.expires}, before it began."
    elif terminated:
        why = f"Revoked and terminated by {getattr(signum, 'name', signum)}."
    else:
        why = "Revoked before it began."
    _report(str(request.id), sender.name, RunStatus.CANCELLED, why)


@tasks.logs_errors
def _report(task_id: str, name: str, status: RunStatus, why: str, *, is_lost: bool = False) -> None:
    """Change a run that waits, or that is carried out by a process of this worker.

    Args:
        task_id: which task.
        name: its name.
        status: what becomes of its run.
        why: why.
        is_lost: whether its process is not there any more. A task that has come again may be carried
            out by another one of the same worker.
    """
    if not options_of(name).record:
        return
    backend, run_id = project_backend(), tasks.run_id_of(task_id)
    try:
        run = backend.runs.get(run_id)
        if run is None or RunStatus(run.status).is_terminal:
            return
        if run.status == RunStatus.RUNNING and run.worker not in _workers_of(
            task_id, is_lost=is_lost
        ):
            logger.info("Task %s is carried out by %s: %s", task_id, run.worker, why)
        elif status is RunStatus.PENDING:
            if run.status == RunStatus.RUNNING:
                tasks.wait(run_id, run.attempt, backend, why)
        else:
            backend.runs.update_status(
                run_id, status, expected=run.status, attempt=run.attempt, error_message=why
            )
    finally:
        if _received:  # the main process of a worker needs none for long
            connections.close_all()


def _workers_of(task_id: str, *, is_lost: bool) -> set[str]:
    """Return the processes of this worker that have carried a task out, or those that are lost."""
    host, _, _ = this_worker().rpartition(":")
    processes = {request.worker_pid for request in list(_received) if request.id == task_id}
    return {f"{host}:{pid}" for pid in processes if pid and not (is_lost and _is_there(int(pid)))}


def _is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True

"""A task that is carried out: its run begins and ends with it. In the process that does it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from celery import states
from celery.exceptions import Ignore, Retry

from workflow_storage.contrib import tasks
from workflow_storage.contrib.celery import publishing
from workflow_storage.contrib.celery.messages import task_of_request
from workflow_storage.contrib.celery.options import options_of, project_backend, project_config
from workflow_storage.recorder import Suspended, describe_error
from workflow_storage.recorder.failures import outcome_of
from workflow_storage.status import RunStatus

if TYPE_CHECKING:
    from celery.app.task import Task as CeleryTask

_BEGUN = "_workflow_storage_begun"
"""Attribute of a task's request: whether its run was begun, or could not be."""

_ACCUMULATE = "celery.accumulate"
"""Celery's task that ends a task which was replaced by a group."""

_REPLACED = "Replaced by new task"


class TaskIgnored(BaseException):
    """The task raised Celery's Ignore; it is a cancellation, and no failure."""


class TaskExitError(Exception):
    """The task left its process, which Celery takes for a lost worker."""


class SuspendedTask(Suspended, Ignore):
    """A run is to wait, and Celery is to forget the task."""


def task_prerun(sender: Any, task_id: str, task: CeleryTask[Any, Any], **kwargs: Any) -> None:
    """Begin the next attempt of the run."""
    _begin(task_id, task)


def task_postrun(
    sender: Any,
    task_id: str,
    task: CeleryTask[Any, Any],
    retval: Any = None,
    state: str | None = None,
    **kwargs: Any,
) -> None:
    """End the attempt."""
    begun = vars(task.request).pop(_BEGUN, None)
    if begun is not None:
        end = _finish if begun else _end
        end(task_id, task, state, retval)
    publishing.fail_unsent()


def is_carried_out_here(task: CeleryTask[Any, Any], task_id: str) -> bool:
    """Whether this process carries a task out, and will end its run."""
    request = task.request
    return request.id == task_id and _BEGUN in vars(request)


@tasks.logs_errors
def _begin(task_id: str, task: CeleryTask[Any, Any]) -> None:
    options = options_of(task.name, task)
    # An eager task that is replaced goes on inside itself.
    if not options.record or tasks.recorded(task_id) is not None:
        return
    vars(task.request)[_BEGUN] = False
    backend = project_backend()
    if task.name == _ACCUMULATE and backend.runs.get(tasks.run_id_of(task_id)) is None:
        del vars(task.request)[_BEGUN]
        return
    run = tasks.start(task_of_request(task, options, backend), backend, project_config().heartbeat)
    run.suspension = SuspendedTask
    vars(task.request)[_BEGUN] = True


@tasks.logs_errors
def _finish(task_id: str, task: CeleryTask[Any, Any], state: str | None, retval: Any) -> None:
    """End the attempt, or let the run wait for the next one."""
    if state == states.SUCCESS:
        tasks.finish(task_id, outputs=None if _ignores_result(task) else retval)
    elif state == states.RETRY:
        tasks.put_back(task_id, _reason(retval))
    elif state == states.REJECTED and retval.requeue and task.acks_late:
        tasks.put_back(task_id, describe_error(retval))
    elif state == states.IGNORED and str(retval) == _REPLACED:
        tasks.put_back(task_id)
    elif state is None and _is_terminated():
        tasks.leave(task_id)  # the main process knows why
    else:
        tasks.finish(task_id, exc=_left_with(retval))


@tasks.logs_errors
def _end(task_id: str, task: CeleryTask[Any, Any], state: str | None, retval: Any) -> None:
    """End a run that could not be begun, for the store did not answer then."""
    if state in {states.RETRY, states.IGNORED, states.REJECTED} or _is_terminated():
        return
    backend = project_backend()
    exc = None if state == states.SUCCESS else _left_with(retval)
    tasks.end(
        task_of_request(task, options_of(task.name, task), backend),
        RunStatus.COMPLETED if exc is None else outcome_of(None, exc, task_id)[0].status,
        backend,
        outputs=retval if exc is None and not _ignores_result(task) else None,
        error_message=None if exc is None else describe_error(exc),
    )


def _is_terminated() -> bool:
    """Whether a signal ends this process, which its pool has told so: revoked, too late, or shut down."""
    exc = sys.exc_info()[1]
    # The exit code that billiard exits with then: the number of the signal less 256.
    return isinstance(exc, SystemExit) and isinstance(exc.code, int) and exc.code < 0


def _left_with(retval: Any) -> BaseException:
    """Return what a task was left with; what Celery does not catch is on its way now."""
    if isinstance(retval, Ignore) and not isinstance(retval, Suspended):
        return TaskIgnored(str(retval))
    if isinstance(retval, BaseException):
        return retval
    exc = sys.exc_info()[1]
    if isinstance(exc, Exception | Suspended):
        return exc
    left = TaskExitError("The task left its process." if exc is None else repr(exc))
    left.__cause__ = exc
    return left


def _reason(retry: Retry) -> str:
    """Return why a task is to be tried again."""
    exc = retry.exc
    return describe_error(exc) if isinstance(exc, BaseException) else publishing.TRIED_AGAIN


def _ignores_result(task: CeleryTask[Any, Any]) -> bool:
    """Whether nobody wants the result of the task that is carried out; its run does not keep it, either."""
    ignores = vars(task.request).get("ignore_result")
    # Of an eager task, Celery 5.6 says False unless it is told.
    is_told = ignores is not None and (ignores or not task.request.is_eager)
    return bool(ignores if is_told else task.ignore_result)

"""What becomes of a task's run when the task is enqueued, begins and ends: receivers of the signals."""

from __future__ import annotations

import inspect
import sys
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeAlias

from django.core.exceptions import ImproperlyConfigured
from django.db import transaction
from django.utils.module_loading import import_string

from workflow_storage.contrib import tasks
from workflow_storage.contrib.options import TaskOptions, TaskRecordingConfig, options_of
from workflow_storage.factory import create_storage_backend
from workflow_storage.recorder import describe_error
from workflow_storage.recorder.failures import outcome_of
from workflow_storage.recorder.opening import id_around
from workflow_storage.status import RunStatus

if TYPE_CHECKING:
    from workflow_storage.base import StorageBackend

# Of django.tasks, or of the backport.
TaskResult: TypeAlias = Any

BACKEND_LABEL = "task_backend"
"""The label that tells the name of the backend of a task."""

SETTING = "WORKFLOW_STORAGE_DJANGO_TASKS"

_LIBRARIES = ("django.tasks", "django_tasks")
_READY = "READY"
_SUCCESSFUL = "SUCCESSFUL"


class TaskFailedError(Exception):
    """A task has failed, and its queue has the text of the error only."""


class TaskLeftError(BaseException):
    """A task has left its process, as by SystemExit, and its queue has the text of that only."""


def connect_receivers() -> None:
    """Listen to the signals of the libraries that are there.

    Raises:
        ImproperlyConfigured: if there is none, or the setting cannot be used.
    """
    _config()
    found = [library for library in _LIBRARIES if find_spec(library)]
    if not found:
        raise ImproperlyConfigured(
            "workflow_storage.contrib.django_tasks needs Django 6.0, or the backport: "
            'pip install "django-workflow-storage[django-tasks]".'
        )
    for library in found:
        signals = import_module(f"{library}.signals")
        signals.task_enqueued.connect(task_enqueued, dispatch_uid=__name__)
        signals.task_started.connect(task_started, dispatch_uid=__name__)
        signals.task_finished.connect(task_finished, dispatch_uid=__name__)


def task_enqueued(sender: type, task_result: TaskResult, **kwargs: Any) -> None:
    """Store a run that waits."""
    _enqueued(str(task_result.id), task_result)


def task_started(sender: type, task_result: TaskResult, **kwargs: Any) -> None:
    """Begin the run, or its next attempt."""
    _started(str(task_result.id), task_result)


def task_finished(sender: type, task_result: TaskResult, **kwargs: Any) -> None:
    """End the run."""
    _finished(str(task_result.id), task_result)


@tasks.logs_errors
def _enqueued(task_id: str, task_result: TaskResult) -> None:
    options = _options(task_result)
    if not options.record:
        return
    backend = _backend()
    # The run around may have ended when the transaction is committed.
    task = _task(task_id, task_result, options)._replace(parent_id=id_around(backend))
    database = _database(task_result)
    if database is None:
        # One that is carried out at once has its run by then.
        backend.on_commit(
            lambda: _enqueue(task_id, task, backend) if task_result.status == _READY else None
        )
    elif _is_on_its_connection(backend, database):
        tasks.enqueue(task, backend)
    else:
        transaction.on_commit(lambda: _enqueue(task_id, task, backend), using=database, robust=True)


@tasks.logs_errors
def _enqueue(_task_id: str, task: tasks.Task, backend: StorageBackend) -> None:
    tasks.enqueue(task, backend)


@tasks.logs_errors
def _started(task_id: str, task_result: TaskResult) -> None:
    options = _options(task_result)
    if options.record:
        tasks.start(_task(task_id, task_result, options), _backend(), _config().heartbeat)


@tasks.logs_errors
def _finished(task_id: str, task_result: TaskResult) -> None:
    is_successful = task_result.status == _SUCCESSFUL
    outputs = task_result.return_value if is_successful else None
    exc = None if is_successful else _error(task_result)
    if tasks.finish(task_id, outputs=outputs, exc=exc):
        return
    # It was begun in another thread; or not at all, for a receiver of somebody else's raised first.
    options = _options(task_result)
    if options.record:
        status = RunStatus.COMPLETED if exc is None else outcome_of(None, exc, task_id)[0].status
        tasks.end(
            _task(task_id, task_result, options),
            status,
            _backend(),
            outputs=outputs,
            error_message=None if exc is None else describe_error(exc),
        )


def _config() -> TaskRecordingConfig:
    return TaskRecordingConfig.of_project(SETTING)


def _options(task_result: TaskResult) -> TaskOptions:
    return options_of(task_result.task.func) or TaskOptions(_config().record_all)


def _backend() -> StorageBackend:
    return create_storage_backend(_config().backend)


def _task(task_id: str, task_result: TaskResult, options: TaskOptions) -> tasks.Task:
    task = task_result.task
    return tasks.Task(
        task_id,
        options.workflow_name or task.module_path,
        _arguments(task_result) if options.inputs else None,
        {
            "queue": str(task.queue_name),
            "priority": str(task.priority),
            BACKEND_LABEL: str(task_result.backend),
        },
    )


def _arguments(task_result: TaskResult) -> dict[str, Any]:
    """Return the arguments of a task by parameter, or as they are if it does not take them."""
    args, kwargs = task_result.args, task_result.kwargs
    context = (None,) if task_result.task.takes_context else ()
    try:
        bound = inspect.signature(task_result.task.func).bind(*context, *args, **kwargs)
    except (TypeError, ValueError):
        return {"args": args, "kwargs": kwargs}
    arguments = dict(bound.arguments)
    if context:
        del arguments[next(iter(arguments))]
    return arguments


def _database(task_result: TaskResult) -> str | None:
    """Return the database that a task waits in, if it is in one, whose transaction it is part of."""
    row = getattr(task_result, "db_result", None)
    return None if row is None else row._state.db


def _is_on_its_connection(backend: StorageBackend, database: str) -> bool:
    """Whether the store is in a database, and so in its transactions."""
    return backend.alias == database and not getattr(backend.runs, "own_connection", False)


def _error(task_result: TaskResult) -> BaseException:
    """Return what a task has failed with: the exception itself, in whose handler the signal is sent."""
    exc = sys.exc_info()[1]
    if not task_result.errors:
        return exc or TaskFailedError("The queue does not say why.")
    told = task_result.errors[-1]
    if exc is not None and told.exception_class_path == _path(type(exc)):
        return exc
    return _as_told(told.exception_class_path, told.traceback or "")


def _as_told(path: str, traceback: str) -> BaseException:
    """Return an exception that reads as the one of which the queue has the text."""
    module, _, name = path.rpartition(".")
    last_line = f"\n{name if module == 'builtins' else path}: "
    _, found, message = traceback.rpartition(last_line)
    base: type[BaseException] = TaskFailedError
    with suppress(ImportError, TypeError):
        if not issubclass(import_string(path), Exception):
            base = TaskLeftError
    told: type[BaseException] = type(name, (base,), {"__module__": module})
    return told(f"{message.strip() if found else ''}\n\n{traceback.strip()}")


def _path(exception: type) -> str:
    return f"{exception.__module__}.{exception.__qualname__}"

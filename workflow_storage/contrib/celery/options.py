"""Which Celery tasks are recorded and how: the setting of the project, and what a task says of itself."""

from collections.abc import Callable
from typing import Any, TypeVar

from celery import Task, current_app
from celery.local import Proxy

from workflow_storage.base import StorageBackend
from workflow_storage.contrib import options
from workflow_storage.contrib.options import TaskOptions, TaskRecordingConfig
from workflow_storage.factory import create_storage_backend

_F = TypeVar("_F")

SETTING = "WORKFLOW_STORAGE_CELERY"

_NOT_RECORDED = frozenset(
    f"celery.{name}" for name in ("backend_cleanup", "chain", "chord", "chord_unlock", "group")
)
"""Tasks of Celery's own, which do nothing of the project's."""


def project_config() -> TaskRecordingConfig:
    """Return what the project has set.

    Raises:
        ImproperlyConfigured: if that is no `TaskRecordingConfig`.
    """
    return TaskRecordingConfig.of_project(SETTING)


def project_backend() -> StorageBackend:
    """Return the store that tasks are recorded in."""
    return create_storage_backend(project_config().backend)


def record_task(
    record: bool = True, *, workflow_name: str | None = None, inputs: bool = True
) -> Callable[[_F], _F]:
    """Say how a task is recorded: a decorator between ``@shared_task`` and the function.

    Args:
        record: whether each of its calls is a run. What the setting says of all tasks does not
            matter then.
        workflow_name: the name of its runs; None for that of the task.
        inputs: whether its arguments are stored with the run.

    Raises:
        TypeError: above ``@shared_task`` or ``@app.task``, where it would have Celery set up the
            app too early.
    """
    mark = options.record_task(record, workflow_name=workflow_name, inputs=inputs)

    def marked(function: _F) -> _F:
        # A proxy says that it is what it stands for, and makes it for that.
        if issubclass(type(function), Proxy | Task):
            raise TypeError(
                "@record_task stands above a task. Put it below @shared_task or @app.task, next to "
                "the function."
            )
        return mark(function)

    return marked


def options_of(name: str, task: Any = None) -> TaskOptions:
    """Return how a task is recorded.

    Args:
        name: its name.
        task: the task, if it is at hand; None for that of the current app. One that is not known here
            is recorded as all are.
    """
    if name in _NOT_RECORDED:
        return TaskOptions(record=False)
    task = current_app.tasks.get(name) if task is None else task
    told = options.options_of(None if task is None else task.run)
    return TaskOptions(project_config().record_all) if told is None else told

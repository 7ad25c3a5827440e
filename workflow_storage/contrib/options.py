"""Which tasks of a queue are recorded and how: what a project sets, and what a task says of itself."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from django.apps import AppConfig
from django.conf import settings
from django.core import checks
from django.core.exceptions import ImproperlyConfigured
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from workflow_storage.checks import check_store
from workflow_storage.config import StorageConfig
from workflow_storage.contrib.tasks import HEARTBEAT

_T = TypeVar("_T")

_ATTRIBUTE = "_workflow_storage_task"


class TaskRecordingConfig(BaseModel):
    """What the setting of an integration holds, as a dict.

    Attributes:
        record_all: whether all tasks are recorded but those that say no, or none but those that say
            yes; see `record_task`.
        heartbeat: seconds between signs of life of a task; None for none.
        backend: the store, as `create_storage_backend` takes it; None for the project's own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    record_all: bool = True
    heartbeat: float | None = Field(default=HEARTBEAT, gt=0, allow_inf_nan=False)
    backend: StorageConfig | str | None = None

    @classmethod
    def of_project(cls, setting: str) -> "TaskRecordingConfig":
        """Return what the project has set.

        Args:
            setting: the name of the setting.

        Raises:
            ImproperlyConfigured: if that is no `TaskRecordingConfig`.
        """
        try:
            return cls.model_validate(getattr(settings, setting, {}))
        except ValidationError as exc:
            raise ImproperlyConfigured(f"The setting {setting} cannot be used: {exc}") from exc


def register_check(setting: str) -> None:
    """Let ``manage.py check`` look at the store that the setting of an integration names, if it does."""
    checks.register(_check_of(setting))


@functools.cache  # so that an app that is made ready again, as in tests, registers no second one
def _check_of(setting: str) -> Callable[..., list[checks.CheckMessage]]:
    def check_backend(
        app_configs: Sequence[AppConfig] | None, **kwargs: Any
    ) -> list[checks.CheckMessage]:
        backend = TaskRecordingConfig.of_project(setting).backend
        return [] if backend is None else check_store(f"{setting}['backend']", backend)

    return check_backend


class TaskOptions(NamedTuple):
    """How a task is recorded."""

    record: bool
    workflow_name: str | None = None
    inputs: bool = True


def record_task(
    record: bool = True, *, workflow_name: str | None = None, inputs: bool = True
) -> Callable[[_T], _T]:
    """Say how a task is recorded: a decorator of its function.

    Args:
        record: whether each of its calls is a run. What the setting says of all tasks does not
            matter then.
        workflow_name: the name of its runs; None for that of the task.
        inputs: whether its arguments are stored with the run.

    Raises:
        TypeError: without parentheses.
    """
    if not isinstance(record, bool):
        raise TypeError("@record_task takes parentheses: @record_task(), or @record_task(False).")
    options = TaskOptions(record, workflow_name, inputs)

    def marked(task: _T) -> _T:
        # Django's tasks are frozen; the function in one is not.
        setattr(getattr(task, "func", task), _ATTRIBUTE, options)
        return task

    return marked


def options_of(function: Callable[..., Any] | None) -> TaskOptions | None:
    """Return how the task of a function is recorded; None if it does not say."""
    options: TaskOptions | None = getattr(function, _ATTRIBUTE, None)
    return options

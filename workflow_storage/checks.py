"""What ``manage.py check`` says about the setting WORKFLOW_STORAGE, and a store that a setting names."""

from collections.abc import Sequence
from typing import Any

from django.apps.config import AppConfig
from django.core.checks import CheckMessage, Warning
from pydantic import ValidationError

from workflow_storage.backends import door_of
from workflow_storage.config import StorageConfig, storage_config
from workflow_storage.exceptions import StorageError


def check_configuration(
    app_configs: Sequence[AppConfig] | None, **kwargs: Any
) -> list[CheckMessage]:
    """Check the setting WORKFLOW_STORAGE, and ask the door of the store what it has to say."""
    return check_store("WORKFLOW_STORAGE")


def check_store(setting: str, config: StorageConfig | str | None = None) -> list[CheckMessage]:
    """Ask the door of a store what it has to say.

    Args:
        setting: the setting that names the store.
        config: what it names, as `create_storage_backend` takes it.
    """
    try:
        found = storage_config(config)
        return door_of(found).check_store(found)
    except (StorageError, ValidationError, TypeError) as exc:
        return [
            Warning(
                f"{setting} names no storage backend: {exc}",
                hint="Set it to a name in DATABASES or to a URL, or remove it.",
                id="workflow_storage.W001",
            )
        ]

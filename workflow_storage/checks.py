"""What ``manage.py check`` says about the setting WORKFLOW_STORAGE and the store that it names."""

from collections.abc import Sequence
from typing import Any

from django.apps.config import AppConfig
from django.core.checks import CheckMessage, Warning
from pydantic import ValidationError

from workflow_storage.backends import door_of
from workflow_storage.config import storage_config
from workflow_storage.exceptions import StorageError


def check_configuration(
    app_configs: Sequence[AppConfig] | None, **kwargs: Any
) -> list[CheckMessage]:
    """Check the setting WORKFLOW_STORAGE, and ask the door of the store what it has to say."""
    try:
        config = storage_config()
        return door_of(config).check_store(config)
    except (StorageError, ValidationError, TypeError) as exc:
        return [
            Warning(
                f"WORKFLOW_STORAGE names no storage backend: {exc}",
                hint="Set it to a name in DATABASES or to a URL, or remove it.",
                id="workflow_storage.W001",
            )
        ]

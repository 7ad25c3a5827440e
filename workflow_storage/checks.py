"""What ``manage.py check`` says about the configuration."""

from collections.abc import Sequence
from typing import Any

from django.apps.config import AppConfig
from django.core.checks import CheckMessage, Warning
from pydantic import ValidationError

from workflow_storage.exceptions import UnsupportedBackendError


def check_configuration(
    app_configs: Sequence[AppConfig] | None, **kwargs: Any
) -> list[CheckMessage]:
    """Check the setting WORKFLOW_STORAGE and the database that it names, without opening it."""
    from workflow_storage.backends.orm_database import begins_immediately
    from workflow_storage.factory import SQLITE_OPTIONS, database_of_project

    try:
        alias, database = database_of_project()
    except (UnsupportedBackendError, ValidationError, TypeError) as exc:
        return [
            Warning(
                f"WORKFLOW_STORAGE names no storage backend: {exc}",
                hint="Set it to a name in DATABASES or to a URL, or remove it.",
                id="workflow_storage.W001",
            )
        ]
    if database.get("ENGINE") != "django.db.backends.sqlite3":
        return []
    if is_in_memory(str(database.get("NAME", ""))):
        return [
            Warning(
                f"Workflow runs are stored in an in-memory SQLite database ({alias}).",
                hint="They are lost when the process ends. Use a file or a server.",
                id="workflow_storage.W003",
            )
        ]
    options = database.get("OPTIONS", {})
    if begins_immediately(options) and "wal" in str(options.get("init_command", "")).lower():
        return []
    return [
        Warning(
            f"The SQLite database {alias!r} has no WAL journal or no IMMEDIATE transactions, "
            "so concurrent writers fail with 'database is locked'.",
            hint=f"Add to DATABASES[{alias!r}]: 'OPTIONS': {SQLITE_OPTIONS}",
            id="workflow_storage.W002",
        )
    ]


def is_in_memory(name: str) -> bool:
    """Whether the name of a SQLite database means memory rather than a file."""
    # Django's test runner names its own databases so, and means it.
    return name == ":memory:" or ("mode=memory" in name and not name.startswith("file:memorydb_"))

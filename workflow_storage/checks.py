"""What ``manage.py check`` says about the configuration.

A database is not opened for it; a Redis server is asked how it is set up, for at most a second.
"""

from collections.abc import Sequence
from typing import Any

from django.apps.config import AppConfig
from django.core.checks import CheckMessage, Warning
from pydantic import ValidationError

from workflow_storage.exceptions import StorageError


def check_configuration(
    app_configs: Sequence[AppConfig] | None, **kwargs: Any
) -> list[CheckMessage]:
    """Check the setting WORKFLOW_STORAGE and the store that it names."""
    from workflow_storage.backends.orm_database import begins_immediately
    from workflow_storage.factory import (
        SQLITE_OPTIONS,
        create_storage_backend,
        database_of_project,
        is_redis,
        project_backend,
    )

    try:
        alias, database = database_of_project()
        if is_redis(project_backend()):
            return _of_redis(create_storage_backend().runs)
    except (StorageError, ValidationError, TypeError) as exc:
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


def _of_redis(runs: Any) -> list[CheckMessage]:
    """Check how the servers keep what they are given; one that does not answer says nothing."""
    forgetful, evicting = [], []
    for address, persists, policy in runs.store.durability():
        if persists is False:
            forgetful.append(address)
        if policy is not None and policy.startswith("allkeys-"):
            evicting.append(f"{address} ({policy})")
    messages: list[CheckMessage] = []
    if forgetful:
        messages.append(
            Warning(
                "Workflow runs are stored in Redis, which forgets them when it restarts: "
                f"{', '.join(forgetful)} has neither an append-only file nor snapshots.",
                hint="Set 'appendonly yes' (nothing acknowledged is older than a second when it "
                "is lost), or 'save' for snapshots.",
                id="workflow_storage.W004",
            )
        )
    if evicting:
        messages.append(
            Warning(
                "Workflow runs are stored in Redis, which deletes them when its memory is full: "
                f"{', '.join(evicting)}.",
                hint="Set 'maxmemory-policy noeviction'; writes then fail with an error instead.",
                id="workflow_storage.W005",
            )
        )
    return messages


def is_in_memory(name: str) -> bool:
    """Whether the name of a SQLite database means memory rather than a file."""
    # Django's test runner names its own databases so, and means it.
    return name == ":memory:" or ("mode=memory" in name and not name.startswith("file:memorydb_"))

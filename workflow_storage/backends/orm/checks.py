"""What ``manage.py check`` says about a Django database; it is not opened for that."""

import re
from typing import Any

from django.core.checks import CheckMessage, Error, Warning

from workflow_storage.backends.orm.dialects import begins_immediately
from workflow_storage.backends.orm.registration import SQLITE, SQLITE_OPTIONS

WIDE_CHARSET = "utf8mb4"
"""The character set of MySQL and MariaDB that has a form for all text; their utf8 has not."""

_SET_NAMES = re.compile(
    r"\b(?:SET\s+NAMES|SET\s+CHARACTER\s+SET|character_set_client\s*=)\s*[\"']?(\w+)", re.IGNORECASE
)


def check_database(
    name: str, database: dict[str, Any], *, own_connection: bool = False
) -> list[CheckMessage]:
    """Check the settings of a database.

    Args:
        name: its alias, or its URL without the password.
        database: its settings.
        own_connection: whether the store does not join the transactions of its callers.
    """
    found = _check_sqlite(name, database)
    charset = narrow_charset(database)
    if charset is not None:
        found.append(
            Error(
                f"The connection to the database {name!r} of the workflow runs has the character "
                f"set {charset}, which has no form for emoji and much other text.",
                hint="Leave out its 'charset', for Django's default is utf8mb4.",
                id="workflow_storage.E001",
            )
        )
    if database.get("ATOMIC_REQUESTS") and not own_connection:
        found.append(_rolled_back(name, is_sqlite=database.get("ENGINE") == SQLITE))
    return found


def narrow_charset(database: dict[str, Any]) -> str | None:
    """Return the character set that OPTIONS give a connection to MySQL, if it is not utf8mb4."""
    if not str(database.get("ENGINE", "")).endswith("mysql"):
        return None
    options = database.get("OPTIONS", {})
    named = _SET_NAMES.findall(str(options.get("init_command", "")))
    charset = str([options.get("charset", WIDE_CHARSET), *named][-1])
    return None if charset.lower() == WIDE_CHARSET else charset


def _rolled_back(name: str, *, is_sqlite: bool) -> CheckMessage:
    if is_sqlite:
        hint = (
            "Keep the runs in another database, without ATOMIC_REQUESTS (a second SQLite file will "
            "do, or a server), or decorate the views with django.db.transaction.non_atomic_requests."
        )
    else:
        hint = (
            f"Set WORKFLOW_STORAGE = {{'backend': {name!r}, 'own_connection': True}}, or keep the "
            "runs in a database without ATOMIC_REQUESTS."
        )
    return Warning(
        f"ATOMIC_REQUESTS is on for the database {name!r} of the workflow runs, so a view that "
        "fails rolls back the record of its failure.",
        hint=hint,
        id="workflow_storage.W006",
    )


def _check_sqlite(name: str, database: dict[str, Any]) -> list[CheckMessage]:
    if database.get("ENGINE") != SQLITE:
        return []
    if is_in_memory(str(database.get("NAME", ""))):
        return [
            Warning(
                f"Workflow runs are stored in an in-memory SQLite database ({name}).",
                hint="They are lost when the process ends. Use a file or a server.",
                id="workflow_storage.W003",
            )
        ]
    options = database.get("OPTIONS", {})
    if begins_immediately(options) and "wal" in str(options.get("init_command", "")).lower():
        return []
    return [
        Warning(
            f"The SQLite database {name!r} has no WAL journal or no IMMEDIATE transactions, "
            "so concurrent writers fail with 'database is locked'.",
            hint=f"Add to DATABASES[{name!r}]: 'OPTIONS': {SQLITE_OPTIONS}",
            id="workflow_storage.W002",
        )
    ]


def is_in_memory(name: str) -> bool:
    """Whether the name of a SQLite database means memory rather than a file."""
    # Django's test runner names its own databases so, and means it.
    return name == ":memory:" or ("mode=memory" in name and not name.startswith("file:memorydb_"))

"""Errors of the database drivers, as the errors of the contract, for orm.py and the factory."""

from __future__ import annotations

import functools
import random
import time
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import django.db
from django.db import connections

from workflow_storage.exceptions import (
    StorageError,
    StorageUnavailableError,
    TablesMissingError,
)

if TYPE_CHECKING:
    from collections.abc import Callable

_P = ParamSpec("_P")
_R = TypeVar("_R")


def translates_errors(method: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let a repository's method raise errors of the contract, never a driver's.

    A transaction that the database gave up for another one (a deadlock, a serialization
    failure) is tried again, unless it is the caller's.
    """

    @functools.wraps(method)
    def translating(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        repository: Any = args[0]
        attempts = 0
        while True:
            try:
                return method(*args, **kwargs)
            except django.db.Error as exc:
                attempts += 1
                own_transaction = not connections[repository.alias].in_atomic_block
                unprepared = attempts == 1 and _sqlstate(exc) in _UNPREPARED_SQLSTATES
                to_try_again = attempts < MAX_ATTEMPTS and (unprepared or _gave_way(exc))
                if own_transaction and to_try_again:
                    time.sleep(random.uniform(0, 0.01 * attempts))
                    continue
                raise storage_error(repository.alias, exc) from exc

    return translating


MAX_ATTEMPTS = 20

# Deadlock and serialization failure: PostgreSQL by SQLSTATE, MySQL and MariaDB by number
# (ER_LOCK_DEADLOCK, ER_CHECKREAD).
_GAVE_WAY_SQLSTATES = {"40001", "40P01"}
_GAVE_WAY_ERRNOS = {1213, 1020}
# A prepared statement that is gone, or that reads a column whose type has changed; the
# cursor prepares none after it (see postgresql.py).
_UNPREPARED_SQLSTATES = {"26000", "0A000"}


def _gave_way(exc: django.db.Error) -> bool:
    """Whether the database rolled a transaction back in favour of another one."""
    number = exc.args[0] if exc.args else None
    return _sqlstate(exc) in _GAVE_WAY_SQLSTATES or number in _GAVE_WAY_ERRNOS


def _sqlstate(exc: django.db.Error) -> str | None:
    """Give PostgreSQL's code of an error: psycopg's name for it, or psycopg2's."""
    driver_error = exc.__cause__
    return getattr(driver_error, "sqlstate", None) or getattr(driver_error, "pgcode", None)


# What the databases call a table or a column that is not there: PostgreSQL by SQLSTATE
# (https://www.postgresql.org/docs/current/errcodes-appendix.html), MySQL and MariaDB by
# error number, SQLite by text only.
_MISSING_SQLSTATES = {"42P01", "42703"}
_MISSING_ERRNOS = {1054, 1146}
_MISSING_TEXTS = ("no such table", "no such column", "has no column named")
# ER_NET_PACKET_TOO_LARGE, and what the client sees when the server hangs up over it.
_PACKET_TOO_LARGE = 1153


def storage_error(alias: str, exc: django.db.Error) -> StorageError:
    """Give the error of the contract for an error of a database, and mend the connection."""
    number = exc.args[0] if exc.args else None
    text = _without_password(alias, " ".join(str(exc).split()))
    database = _named(alias)
    if (
        _sqlstate(exc) in _MISSING_SQLSTATES
        or number in _MISSING_ERRNOS
        or any(missing in text for missing in _MISSING_TEXTS)
    ):
        return TablesMissingError(alias)
    if number == _PACKET_TOO_LARGE:
        return StorageError(
            f"Database {database} refuses a statement of this size: {text}. "
            "Raise max_allowed_packet on the server, or store less in one state."
        )
    if not isinstance(exc, django.db.OperationalError | django.db.InterfaceError):
        return StorageError(f"Database {database} refused the operation: {text}")
    if _gave_way(exc):
        return StorageUnavailableError(
            f"Another transaction changed the same rows of database {database}: {text}. "
            "Roll your transaction back and run it again."
        )
    connection = connections[alias]
    if not connection.in_atomic_block:
        # Outside of requests nobody else drops a broken connection, and every later call
        # of this process would fail.
        connection.close_if_unusable_or_obsolete()
    if "locked" not in text:
        advice = "Check that the server runs and that the settings of the database are right."
    elif connection.in_atomic_block:
        advice = (
            "A transaction that began by reading cannot write once another one has; set "
            "OPTIONS['transaction_mode'] to 'IMMEDIATE', or raise OPTIONS['timeout']."
        )
    else:
        advice = (
            "Another process writes for longer than the timeout; try again, or raise "
            "OPTIONS['timeout']."
        )
    return StorageUnavailableError(f"Database {database} is unavailable: {text}. {advice}")


def _named(alias: str) -> str:
    """Give the name of a database as the user knows it."""
    if not alias.startswith("workflow_storage_"):
        return repr(alias)
    # One that was given by URL or path; its alias is ours.
    settings = connections[alias].settings_dict
    host = f" on {settings['HOST']}" if settings["HOST"] else ""
    return f"{str(settings['NAME'])!r}{host}"


def _without_password(alias: str, text: str) -> str:
    password = connections[alias].settings_dict.get("PASSWORD")
    # A word that short would be masked where it is no password, and so be given away.
    return text.replace(str(password), "***") if len(str(password or "")) > 3 else text

"""Errors of the database drivers, as the errors of the contract, and what is tried again.

Three jobs, each for itself: `translates_errors` lets a method raise errors of the contract,
`tries_again` repeats one transaction that the database gave up, and `mend` drops a connection
that has broken. A method of the contract that is one transaction is an `operation`: both.
"""

from __future__ import annotations

import functools
import random
import time
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar, cast

import django.db
from django.db import connections

from workflow_storage.backends.orm.dialects import Cause, cause_of
from workflow_storage.config import registered_aliases
from workflow_storage.exceptions import (
    StorageError,
    StorageUnavailableError,
    TablesMissingError,
)

if TYPE_CHECKING:
    from collections.abc import Callable

_P = ParamSpec("_P")
_R = TypeVar("_R")

MAX_ATTEMPTS = 20
"""How often a transaction of our own is tried."""


class _InDatabase(Protocol):
    alias: str


def operation(method: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let a method be one transaction: tried again if it is given up, its errors translated."""
    return translates_errors(tries_again(method))


def translates_errors(method: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let a method of what has an `alias` raise errors of the contract, never a driver's."""

    @functools.wraps(method)
    def translating(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return method(*args, **kwargs)
        except django.db.Error as exc:
            alias = cast("_InDatabase", args[0]).alias
            raise storage_error(alias, exc) from exc

    return translating


def tries_again(method: Callable[_P, _R]) -> Callable[_P, _R]:
    """Try a transaction again that the database gave up for another one.

    The caller's transaction is the caller's to try again, for it holds more than this.
    """

    @functools.wraps(method)
    def trying(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        attempts = 0
        while True:
            try:
                return method(*args, **kwargs)
            except django.db.Error as exc:
                attempts += 1
                connection = connections[cast("_InDatabase", args[0]).alias]
                cause = cause_of(connection, exc)
                # The cursor prepares no statement after one that was of no use.
                unprepared = cause is Cause.UNPREPARED and attempts == 1
                useful = unprepared or (cause is Cause.GAVE_WAY and attempts < MAX_ATTEMPTS)
                if connection.in_atomic_block or not useful:
                    raise
                time.sleep(random.uniform(0, 0.01 * attempts))

    return trying


def mend(alias: str) -> None:
    """Drop the connection if it has broken, or every later call of this process would fail.

    Outside of requests nobody else does. One in a transaction is the caller's to drop.
    """
    connection = connections[alias]
    if not connection.in_atomic_block:
        connection.close_if_unusable_or_obsolete()


def storage_error(alias: str, exc: django.db.Error) -> StorageError:
    """Return the error of the contract for an error of a database, and mend the connection."""
    connection = connections[alias]
    cause = cause_of(connection, exc)
    text = _without_password(alias, " ".join(str(exc).split()))
    database = _quoted_name(alias)
    if cause is Cause.MISSING:
        return TablesMissingError(alias)
    if cause is Cause.TOO_LARGE:
        return StorageError(
            f"Database {database} refuses a statement of this size: {text}. "
            "Raise max_allowed_packet on the server, or store less in one state."
        )
    if not isinstance(exc, django.db.OperationalError | django.db.InterfaceError):
        return StorageError(f"Database {database} refused the operation: {text}")
    if cause is Cause.GAVE_WAY:
        return StorageUnavailableError(
            f"Another transaction changed the same rows of database {database}: {text}. "
            "Roll your transaction back and run it again."
        )
    mend(alias)
    if cause is not Cause.LOCKED:
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


def database_name(alias: str) -> str:
    """Return the name of a database as the user knows it."""
    # That of one that was given by URL or path is ours.
    return str(_settings(alias)["NAME"]) if alias in registered_aliases else alias


def _quoted_name(alias: str) -> str:
    host = _settings(alias)["HOST"] if alias in registered_aliases else ""
    return f"{database_name(alias)!r} on {host}" if host else repr(database_name(alias))


def _settings(alias: str) -> dict[str, Any]:
    return connections[alias].settings_dict


def _without_password(alias: str, text: str) -> str:
    password = _settings(alias).get("PASSWORD")
    # A word that short would be masked where it is no password, and so be given away.
    return text.replace(str(password), "***") if len(str(password or "")) > 3 else text

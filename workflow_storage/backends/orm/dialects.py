"""What differs by database, a row each, for the other rooms of this package.

What Django's own features say about a database is asked of them; here stands the rest.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING, Any

from django.db import transaction

from workflow_storage.exceptions import StorageUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from contextlib import AbstractContextManager

    import django.db
    from django.db.backends.base.base import BaseDatabaseWrapper

MIGRATION_TIMEOUT = 60.0
"""Seconds that a process waits for another one that makes the tables."""

_MIGRATION_LOCK = 0x776F726B666C6F77  # "workflow", as PostgreSQL's 64 bit lock key


class Cause(Enum):
    """Why a database refused a statement, as far as it matters here."""

    MISSING = auto()
    """A table or a column is not there."""
    GAVE_WAY = auto()
    """It was rolled back in favour of another transaction: a deadlock, a serialization failure."""
    UNPREPARED = auto()
    """A prepared statement is gone, or reads a column whose type has changed."""
    LOCKED = auto()
    """Another one held a lock for longer than the timeout."""
    TOO_LARGE = auto()
    """The statement is larger than the server takes."""
    OTHER = auto()


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """What has to be known of a database."""

    cause: Callable[[django.db.Error], Cause]
    """Tells why a statement was refused."""
    migration_lock: Callable[[BaseDatabaseWrapper], AbstractContextManager[None]]
    """Holds back other processes that migrate the same database, while the block runs."""
    inserts_computed: bool = True
    """Whether an INSERT can read the table that it inserts into."""
    names_places: bool = False
    """Whether Django fills places in SQL in faster when they have names."""
    binds_on_server: bool = False
    """Whether a cursor can bind on the server and read in binary; see postgresql.py."""
    begins_deferred: Callable[[BaseDatabaseWrapper], bool] = lambda connection: False
    """Whether a transaction locks the database only at its first write."""


def dialect_of(connection: BaseDatabaseWrapper) -> Dialect:
    """Return what has to be known of the database of a connection."""
    return _DIALECTS.get(connection.vendor, _OTHER)


def cause_of(connection: BaseDatabaseWrapper, exc: django.db.Error) -> Cause:
    """Return why a database refused a statement."""
    return dialect_of(connection).cause(exc)


def begins_immediately(options: Mapping[str, Any]) -> bool:
    """Whether transactions on a SQLite database with these OPTIONS lock it when they begin."""
    return str(options.get("transaction_mode")).upper() in {"IMMEDIATE", "EXCLUSIVE"}


# PostgreSQL: https://www.postgresql.org/docs/current/errcodes-appendix.html
_SQLSTATES = {
    "40001": Cause.GAVE_WAY,
    "40P01": Cause.GAVE_WAY,
    "42P01": Cause.MISSING,
    "42703": Cause.MISSING,
    "26000": Cause.UNPREPARED,
    "0A000": Cause.UNPREPARED,
}
# MySQL and MariaDB: ER_LOCK_DEADLOCK, ER_CHECKREAD, ER_BAD_FIELD_ERROR, ER_NO_SUCH_TABLE,
# ER_NET_PACKET_TOO_LARGE.
_ERRNOS = {
    1213: Cause.GAVE_WAY,
    1020: Cause.GAVE_WAY,
    1054: Cause.MISSING,
    1146: Cause.MISSING,
    1153: Cause.TOO_LARGE,
}
# SQLite has codes for locks (https://www.sqlite.org/rescode.html: BUSY, LOCKED; the lowest byte
# of an extended one), but only texts for what is missing.
_SQLITE_LOCKED = {5, 6}
_SQLITE_MISSING = ("no such table", "no such column", "has no column named")


def _postgresql_cause(exc: django.db.Error) -> Cause:
    driver_error = exc.__cause__
    # psycopg's name for it, or psycopg2's
    state = getattr(driver_error, "sqlstate", None) or getattr(driver_error, "pgcode", None)
    return _SQLSTATES.get(str(state), Cause.OTHER)


def _mysql_cause(exc: django.db.Error) -> Cause:
    number = exc.args[0] if exc.args else None
    return _ERRNOS.get(number, Cause.OTHER) if isinstance(number, int) else Cause.OTHER


def _sqlite_cause(exc: django.db.Error) -> Cause:
    if getattr(exc.__cause__, "sqlite_errorcode", 0) & 0xFF in _SQLITE_LOCKED:
        return Cause.LOCKED
    text = str(exc)
    return Cause.MISSING if any(part in text for part in _SQLITE_MISSING) else Cause.OTHER


def _no_cause(exc: django.db.Error) -> Cause:
    return Cause.OTHER


@contextmanager
def _by_transaction(connection: BaseDatabaseWrapper) -> Iterator[None]:
    with transaction.atomic(using=connection.alias):
        yield


@contextmanager
def _by_advisory_lock(connection: BaseDatabaseWrapper) -> Iterator[None]:
    with transaction.atomic(using=connection.alias):
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_advisory_xact_lock(%s)", [_MIGRATION_LOCK])
        yield


@contextmanager
def _by_named_lock(connection: BaseDatabaseWrapper) -> Iterator[None]:
    # It commits at every change of the schema, so a lock outlives the transaction.
    name = "workflow_storage migrate"
    with connection.cursor() as cursor:
        cursor.execute("SELECT GET_LOCK(%s, %s)", [name, MIGRATION_TIMEOUT])
        if cursor.fetchone() != (1,):
            raise StorageUnavailableError(
                "Another process has been making the tables for longer than "
                f"{MIGRATION_TIMEOUT:.0f} seconds. Look what it does, or try again."
            )
        try:
            yield
        finally:
            cursor.execute("SELECT RELEASE_LOCK(%s)", [name])


@contextmanager
def _by_locking_the_file(connection: BaseDatabaseWrapper) -> Iterator[None]:
    # Within a transaction foreign keys cannot be switched off, which changing the schema needs;
    # the transaction itself (IMMEDIATE) is the lock.
    connection.disable_constraint_checking()
    try:
        with transaction.atomic(using=connection.alias):
            yield
    finally:
        connection.enable_constraint_checking()


_OTHER = Dialect(cause=_no_cause, migration_lock=_by_transaction)
_DIALECTS = {
    "postgresql": Dialect(
        cause=_postgresql_cause, migration_lock=_by_advisory_lock, binds_on_server=True
    ),
    "mysql": Dialect(cause=_mysql_cause, migration_lock=_by_named_lock, inserts_computed=False),
    "sqlite": Dialect(
        cause=_sqlite_cause,
        migration_lock=_by_locking_the_file,
        names_places=True,
        begins_deferred=lambda connection: (
            not begins_immediately(connection.settings_dict["OPTIONS"])
        ),
    ),
}

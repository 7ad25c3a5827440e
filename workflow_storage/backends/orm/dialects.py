"""What differs by database, a row each, for the other rooms of this package.

What Django's own features say about a database is asked of them; here stands the rest.
"""

from __future__ import annotations

from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import django.db
from django.db import transaction

from workflow_storage.backends.orm.causes import (
    Cause,
    is_mysql_lock_timeout,
    is_postgresql_lock_timeout,
    mysql_cause,
    no_cause,
    postgresql_cause,
    sqlite_cause,
)
from workflow_storage.backends.orm.sqlite import File, file_of, take_inherited_locks
from workflow_storage.exceptions import StorageUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from contextlib import AbstractContextManager

    from django.db.backends.base.base import BaseDatabaseWrapper

MIGRATION_TIMEOUT = 60.0
"""Seconds that a process waits for another one that makes the tables."""

_MIGRATION_LOCK = 0x776F726B666C6F77  # "workflow", as PostgreSQL's 64 bit lock key


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """What has to be known of a database."""

    cause: Callable[[django.db.Error], Cause]
    """Tells why a statement was refused."""
    migration_lock: Callable[[BaseDatabaseWrapper], AbstractContextManager[None]]
    """Holds back other processes that migrate the same database, while the block runs."""
    read_committed: Callable[[BaseDatabaseWrapper], AbstractContextManager[None]]
    """Begins a transaction of ours in which each statement sees what is committed by then,
    whatever the default (REPEATABLE READ, SERIALIZABLE)."""
    has_snapshot: Callable[[BaseDatabaseWrapper], bool] = lambda connection: False
    """Whether the caller's transaction sees nothing that others have committed since it began,
    not even where it locks."""
    check_references: Callable[[BaseDatabaseWrapper, str], None] = lambda connection, table: None
    """Checks now the foreign keys that refer to a table, where they are checked at COMMIT."""
    locks_see_newest: bool = False
    """Whether only what is locked is seen as it is now, where a transaction has a snapshot."""
    lock_timeout: str = "the server's lock timeout"
    """Where it is set how long a statement waits for a lock."""
    gives_ids_again: bool = False
    """Whether the id of a row that was rolled back is given to another one."""
    impatient: Callable[
        [BaseDatabaseWrapper, float, AbstractContextManager[Any]], AbstractContextManager[None]
    ]
    """Begins a given transaction, or savepoint, in which nothing waits for a lock for longer than
    some seconds, if the database can be told so."""
    is_lock_timeout: Callable[[django.db.Error], bool] = lambda exc: False
    """Tells whether somebody else held a lock for longer than that."""
    inserts_computed: bool = True
    """Whether the values of an INSERT can read the table that it inserts into."""
    updates_within: bool = False
    """Whether a statement can update one table and insert into another (WITH)."""
    tells_last_id: bool = True
    """Whether a cursor tells the id of the row that it inserted, if the statement returns nothing."""
    names_places: bool = False
    """Whether Django fills places in SQL in faster when they have names."""
    binds_on_server: bool = False
    """Whether a cursor can bind on the server and read in binary; see postgresql.py."""
    begins_deferred: Callable[[BaseDatabaseWrapper], bool] = lambda connection: False
    """Whether a transaction locks the database only at its first write."""
    has_statistics: bool = True
    """Whether it knows, as a rule, how many rows have a value."""
    joins_texts: bool = False
    """Whether it can make one text of those in many rows, however long it gets."""
    has_lateral: bool = False
    """Whether a query can stand in FROM that is carried out for each row of another one."""
    sorts_to_group: bool = False
    """Whether it sorts rows to group them, which takes longer than to read each group by an index."""
    begin_callers: Callable[[BaseDatabaseWrapper], None] = lambda connection: None
    """Begins the transaction of a caller who has switched autocommit off, where none begins."""
    has_broken: Callable[[BaseDatabaseWrapper], bool] = lambda connection: (
        not connection.is_usable()
    )
    """Whether an open connection is of no more use; it leaves a transaction as it is."""
    largest_statement: Callable[[BaseDatabaseWrapper], int | None] = lambda connection: None
    """Returns the bytes that the server takes in one statement, where it hangs up on more."""
    how_to_store_more: str = "Store less in one value: a path to a file, say."
    """What to do about a statement that is too large."""
    how_to_write: str = (
        "The server is a standby, or was made one. The next call opens a new connection; let HOST "
        "or the URL name all servers, and it finds the primary one."
    )
    """What to do about a database that takes no writes."""
    is_in_process: Callable[[BaseDatabaseWrapper], bool] = lambda connection: False
    """Whether the database is in the memory of the process, which a child has a copy of."""
    locks_by_process: bool = False
    """Whether a child inherits the belief to hold the locks of its parent's transactions."""
    file_of: Callable[[BaseDatabaseWrapper], File | None] = lambda connection: None
    """Returns the file of an open connection, which can be deleted beneath it."""
    after_fork: Callable[[BaseDatabaseWrapper], None] = lambda connection: None
    """Does what a child has to do that has inherited a connection, beside leaving it alone."""


def dialect_of(connection: BaseDatabaseWrapper) -> Dialect:
    """Return what has to be known of the database of a connection."""
    return _DIALECTS.get(connection.vendor, _OTHER)


def cause_of(connection: BaseDatabaseWrapper, exc: django.db.Error) -> Cause:
    """Return why a database refused a statement."""
    return dialect_of(connection).cause(exc)


def begins_immediately(options: Mapping[str, Any]) -> bool:
    """Whether transactions on a SQLite database with these OPTIONS lock it when they begin."""
    return str(options.get("transaction_mode")).upper() in {"IMMEDIATE", "EXCLUSIVE"}


_READ_COMMITTED = "SET TRANSACTION ISOLATION LEVEL READ COMMITTED"


@contextmanager
def _in_a_transaction(connection: BaseDatabaseWrapper) -> Iterator[None]:
    with transaction.atomic(using=connection.alias):
        yield


@contextmanager
def _set_as_its_first_statement(connection: BaseDatabaseWrapper) -> Iterator[None]:
    with transaction.atomic(using=connection.alias):
        with connection.cursor() as cursor:
            cursor.execute(_READ_COMMITTED)
        yield


@contextmanager
def _set_before_it_begins(connection: BaseDatabaseWrapper) -> Iterator[None]:
    with connection.cursor() as cursor:
        cursor.execute(_READ_COMMITTED)
    with transaction.atomic(using=connection.alias):
        yield


def _postgresql_has_snapshot(connection: BaseDatabaseWrapper) -> bool:
    with connection.cursor() as cursor:
        cursor.execute("SHOW transaction_isolation")
        return cursor.fetchone() in {("repeatable read",), ("serializable",)}


def _check_deferred_keys(connection: BaseDatabaseWrapper, table: str) -> None:
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT conname FROM pg_constraint "
            "WHERE contype = 'f' AND condeferred AND confrelid = %s::regclass",
            [connection.ops.quote_name(table)],
        )
        names = ", ".join(connection.ops.quote_name(name) for (name,) in cursor.fetchall())
        if names:
            # Those of the caller's other tables are left to the caller.
            cursor.execute(f"SET CONSTRAINTS {names} IMMEDIATE")
            cursor.execute(f"SET CONSTRAINTS {names} DEFERRED")


@contextmanager
def _as_patient_as_ever(
    connection: BaseDatabaseWrapper, seconds: float, block: AbstractContextManager[Any]
) -> Iterator[None]:
    with block:
        yield


@contextmanager
def _with_lock_timeout(
    connection: BaseDatabaseWrapper, seconds: float, block: AbstractContextManager[Any]
) -> Iterator[None]:
    # For the transaction, not for the session, which a pooler gives to others.
    set_timeout = "SELECT current_setting('lock_timeout'), set_config('lock_timeout', %s, true)"
    with block:
        with connection.cursor() as cursor:
            cursor.execute(set_timeout, [f"{seconds * 1000:.0f}ms"])
            before, _ = cursor.fetchone()
        yield
        if connection.savepoint_ids:  # the transaction goes on
            with connection.cursor() as cursor:
                cursor.execute(set_timeout, [before])


@contextmanager
def _with_lock_wait_timeout(
    connection: BaseDatabaseWrapper, seconds: float, block: AbstractContextManager[Any]
) -> Iterator[None]:
    with (
        _set_meanwhile(
            connection,
            "SELECT @@innodb_lock_wait_timeout",
            "SET innodb_lock_wait_timeout = {}",
            max(1, round(seconds)),
        ),
        block,
    ):
        yield


@contextmanager
def _with_busy_timeout(
    connection: BaseDatabaseWrapper, seconds: float, block: AbstractContextManager[Any]
) -> Iterator[None]:
    with (
        _set_meanwhile(
            connection, "PRAGMA busy_timeout", "PRAGMA busy_timeout = {}", round(seconds * 1000)
        ),
        block,
    ):
        yield


@contextmanager
def _set_meanwhile(
    connection: BaseDatabaseWrapper, read: str, write: str, value: int
) -> Iterator[None]:
    """Let a variable of the session have a value while the block runs."""
    with connection.cursor() as cursor:
        cursor.execute(read)
        (before,) = cursor.fetchone()
        cursor.execute(write.format(value))
    try:
        yield
    finally:
        # A connection that is broken by now is not used again.
        with suppress(django.db.Error), connection.cursor() as cursor:
            cursor.execute(write.format(before))


def _is_closed(connection: BaseDatabaseWrapper) -> bool:
    # In a transaction that has failed, PostgreSQL answers no question.
    return bool(connection.connection.closed)


def _max_allowed_packet(connection: BaseDatabaseWrapper) -> int | None:
    with connection.cursor() as cursor:
        cursor.execute("SELECT @@max_allowed_packet")
        [limit] = cursor.fetchone()
    return int(limit)


def _begin_unless_begun(connection: Any) -> None:
    # Or the first savepoint would be the transaction, and its release a commit.
    if not connection.connection.in_transaction:
        connection.connection.execute("BEGIN")


def _is_in_memory(connection: Any) -> bool:
    return bool(connection.is_in_memory_db())


def _file_of(connection: BaseDatabaseWrapper) -> File | None:
    return file_of(str(connection.settings_dict["NAME"]))


def _take_inherited_locks(connection: BaseDatabaseWrapper) -> None:
    take_inherited_locks(str(connection.settings_dict["NAME"]))


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


_OTHER = Dialect(
    cause=no_cause,
    migration_lock=_in_a_transaction,
    read_committed=_in_a_transaction,
    impatient=_as_patient_as_ever,
)
_DIALECTS = {
    "postgresql": Dialect(
        cause=postgresql_cause,
        migration_lock=_by_advisory_lock,
        read_committed=_set_as_its_first_statement,
        has_snapshot=_postgresql_has_snapshot,
        check_references=_check_deferred_keys,
        impatient=_with_lock_timeout,
        lock_timeout="lock_timeout",
        is_lock_timeout=is_postgresql_lock_timeout,
        binds_on_server=True,
        joins_texts=True,
        has_lateral=True,
        tells_last_id=False,
        updates_within=True,
        has_broken=_is_closed,
    ),
    "mysql": Dialect(
        cause=mysql_cause,
        migration_lock=_by_named_lock,
        read_committed=_set_before_it_begins,
        locks_see_newest=True,
        impatient=_with_lock_wait_timeout,
        lock_timeout="innodb_lock_wait_timeout",
        is_lock_timeout=is_mysql_lock_timeout,
        inserts_computed=False,
        largest_statement=_max_allowed_packet,
        how_to_write="Connect to the primary server; the next call opens a new connection.",
        how_to_store_more="Raise max_allowed_packet on the server, or store less in one state.",
    ),
    "sqlite": Dialect(
        cause=sqlite_cause,
        migration_lock=_by_locking_the_file,
        read_committed=_in_a_transaction,
        lock_timeout="OPTIONS['timeout']",
        gives_ids_again=True,
        impatient=_with_busy_timeout,
        is_lock_timeout=lambda exc: sqlite_cause(exc) is Cause.LOCKED,
        names_places=True,
        has_statistics=False,
        joins_texts=True,
        sorts_to_group=True,
        begins_deferred=lambda connection: (
            not begins_immediately(connection.settings_dict["OPTIONS"])
        ),
        how_to_write="Let this user write to the file and to its folder.",
        begin_callers=_begin_unless_begun,
        is_in_process=_is_in_memory,
        locks_by_process=True,
        file_of=_file_of,
        after_fork=_take_inherited_locks,
    ),
    # Not tested here; what they refuse is told in the codes of the database that they speak like.
    "cockroachdb": replace(_OTHER, cause=postgresql_cause),
    "yugabytedb": replace(_OTHER, cause=postgresql_cause),
    "tidb": replace(_OTHER, cause=mysql_cause, locks_see_newest=True),
}

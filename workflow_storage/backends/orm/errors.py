"""Errors of the database drivers, as the errors of the contract, and what is tried again.

Two jobs, each for itself: `translates_errors` lets a method raise errors of the contract, and
`tries_again` makes the connection ready and repeats one transaction that the database gave up. A
method of the contract that is one transaction is an `operation`: both. One that only reads is
`reading`.
"""

from __future__ import annotations

import functools
import inspect
import random
import sys
import time
import traceback
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar, cast

import django.db
from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper

from workflow_storage.backends.orm.causes import ADVICE, Cause
from workflow_storage.backends.orm.connections import (
    done,
    has_broken,
    mend,
    ready,
    was_in_callers_transaction,
)
from workflow_storage.backends.orm.dialects import cause_of, dialect_of
from workflow_storage.backends.orm.forks import begin_use
from workflow_storage.backends.orm.own_connection import own_connection
from workflow_storage.config import database_name, registered_aliases
from workflow_storage.exceptions import (
    StorageError,
    StorageUnavailableError,
    TablesMissingError,
)
from workflow_storage.reentrance import refuses_reentrance

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_P = ParamSpec("_P")
_R = TypeVar("_R")

PATIENCE = 30.0
"""Seconds for which a transaction of our own is tried."""

_FIRST_PAUSE = 0.01
_LONGEST_PAUSE = 0.1

DEFAULT_SQLITE_TIMEOUT = 5.0
"""Seconds that SQLite's driver waits for a lock unless OPTIONS say otherwise."""

_OF_THE_CONNECTION = (django.db.OperationalError, django.db.InterfaceError)
_SIZE = "_workflow_storage_bytes"
_ESCAPED = (b"\0", b"\n", b"\r", b"\x1a", b'"', b"'", b"\\")
_CONNECTING = inspect.unwrap(BaseDatabaseWrapper.ensure_connection).__code__


class _InDatabase(Protocol):
    alias: str
    own_connection: bool


class Patience:
    """How long a transaction of our own is tried again.

    Each pause is a random part of one that doubles, so that those who meet come apart. It soon
    doubles no more: of writers on three Galera nodes, those that had lost often paused for so
    long that the others were first each time, and waited 12 seconds for a save, now two.

    Args:
        since: when it was tried first, by `time.monotonic`.
    """

    def __init__(self, since: float) -> None:
        self._since = since
        self._pause = _FIRST_PAUSE

    def pause(self, patience: float | None = None) -> bool:
        """Wait before the next try; say whether there is time for one.

        Args:
            patience: seconds since the first try in which others begin; None for `PATIENCE`.
        """
        if time.monotonic() > self._since + (PATIENCE if patience is None else patience):
            return False
        time.sleep(random.uniform(0, self._pause))
        self._pause = min(self._pause * 2, _LONGEST_PAUSE)
        return True


def _alias_of(instance: _InDatabase) -> str:
    return instance.alias


def operation(method: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let a method be one transaction: tried again if it is given up, its errors translated."""
    return translates_errors(tries_again(method))


def reading(method: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let a method only read: an `operation` that is tried again on a new connection, too."""
    return _translating(_trying(method, reads=True), reads=True)


def translates_errors(method: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let a method of what has an `alias` raise errors of the contract, never a driver's.

    It uses the store's own connection, if the store is to have one, and is refused in the middle
    of another one, whose connection it would use.
    """
    return _translating(method, reads=False)


def tries_again(method: Callable[_P, _R]) -> Callable[_P, _R]:
    """Try a transaction again that the database gave up for another one.

    The caller's transaction is the caller's to try again, for it holds more than this.
    """
    return _trying(method, reads=False)


def _translating(method: Callable[_P, _R], *, reads: bool) -> Callable[_P, _R]:
    @refuses_reentrance(_alias_of)
    @functools.wraps(method)
    def translating(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        handled = sys.exception()
        try:
            return method(*args, **kwargs)
        except django.db.Error as exc:
            alias = cast("_InDatabase", args[0]).alias
            raise storage_error(alias, exc, handled=handled, reads=reads) from exc

    @functools.wraps(method)
    def on_its_connection(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        database = cast("_InDatabase", args[0])
        if not database.own_connection:
            return translating(*args, **kwargs)
        with own_connection(database.alias):
            return translating(*args, **kwargs)

    return on_its_connection


def _trying(method: Callable[_P, _R], *, reads: bool) -> Callable[_P, _R]:
    @functools.wraps(method)
    def trying(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        connection = ready(cast("_InDatabase", args[0]).alias)
        since = time.monotonic()
        patience: Patience | None = None
        while True:
            first = patience is None
            try:
                return method(*args, **kwargs)
            except django.db.Error as exc:
                patience = patience or Patience(since)
                if not _is_worth_another_try(connection, exc, patience, first=first, reads=reads):
                    raise
            finally:
                done(connection)
            begin_use(connection)

    return trying


def _is_worth_another_try(
    connection: BaseDatabaseWrapper,
    exc: django.db.Error,
    patience: Patience,
    *,
    first: bool,
    reads: bool,
) -> bool:
    """Whether to try again what failed, on a connection to be had, after a pause if it helps."""
    cause = cause_of(connection, exc)
    if cause is Cause.SHARED:
        # Only the statement failed, and SQLite itself waits for none of these.
        timeout = connection.settings_dict["OPTIONS"].get("timeout", DEFAULT_SQLITE_TIMEOUT)
        return patience.pause(float(timeout))
    if was_in_callers_transaction(connection):
        return False
    if cause is Cause.NOT_READY:
        # What stands between us and the cluster may know of a better node.
        connection.close()
    if cause in {Cause.GAVE_WAY, Cause.NOT_READY}:
        return patience.pause()
    if cause is Cause.UNPREPARED:
        # The cursor prepares no statement after one that was of no use.
        return first
    if reads and first and _broke_off(connection, exc):
        mend(connection)
        return True
    return False


def _broke_off(connection: BaseDatabaseWrapper, exc: django.db.Error) -> bool:
    """Whether the connection broke while it was used, so that something may have been sent."""
    return (
        isinstance(exc, _OF_THE_CONNECTION)
        and cause_of(connection, exc) is Cause.OTHER
        and not _is_of_connecting(exc)
        and (connection.connection is None or has_broken(connection))
    )


def _is_of_connecting(exc: django.db.Error) -> bool:
    """Whether an error was raised while a connection was opened."""
    frames = traceback.walk_tb(exc.__traceback__)
    return any(frame.f_code is _CONNECTING for frame, _ in frames)


def first_error(exc: django.db.Error, handled: BaseException | None = None) -> django.db.Error:
    """Return the error that broke a connection, if this one says only that there is no new one.

    Django connects again when an atomic block ends, and what fails then hides why the block did.
    Whether something may have been sent is told by the first.

    Args:
        exc: the error.
        handled: what the caller was handling already, which has nothing to do with it.
    """
    if not _is_of_connecting(exc):
        return exc
    earlier: BaseException | None = exc
    while earlier is not None and earlier is not handled:
        if isinstance(earlier, _OF_THE_CONNECTION) and not _is_of_connecting(earlier):
            return earlier
        earlier = earlier.__cause__ or earlier.__context__
    return exc


def note_size(exc: BaseException, values: Iterable[Any]) -> None:
    """Note on an error how many bytes the values had in the statement that failed."""
    if isinstance(exc, _OF_THE_CONNECTION):
        encoded = (v.encode(errors="replace") if isinstance(v, str) else v for v in values)
        texts = [value for value in encoded if isinstance(value, bytes)]
        # MySQL's driver escapes each of these with a backslash.
        size = sum(len(text) + sum(map(text.count, _ESCAPED)) for text in texts)
        setattr(exc, _SIZE, size)


def storage_error(
    alias: str,
    exc: django.db.Error,
    *,
    handled: BaseException | None = None,
    reads: bool = False,
) -> StorageError:
    """Return the error of the contract for an error of a database, and mend the connection.

    Args:
        alias: which database.
        exc: its error.
        handled: what the caller was handling already when it called.
        reads: whether the caller wrote nothing.
    """
    connection = connections[alias]
    exc = first_error(exc, handled)
    cause = cause_of(connection, exc)
    in_callers = was_in_callers_transaction(connection)
    broke_off = _broke_off(connection, exc)
    mend(connection, close=cause in {Cause.READ_ONLY, Cause.TOO_LARGE})
    if broke_off and not in_callers and _is_too_large(connection, exc):
        cause = Cause.TOO_LARGE
    text = _text(alias, exc)
    database = _quoted_name(alias)
    if cause is Cause.MISSING:
        given = alias in registered_aliases
        return TablesMissingError(alias, database_name(alias) if given else None)
    if cause is Cause.GAVE_WAY:
        return conflict(alias, exc)
    if cause is Cause.TOO_LARGE:
        advice = dialect_of(connection).how_to_store_more
        return StorageError(
            f"Database {database} refuses a statement of this size: {text}. {advice}"
        )
    if cause is Cause.READ_ONLY:
        advice = dialect_of(connection).how_to_write
        return StorageUnavailableError(f"Database {database} takes no writes: {text}. {advice}")
    if cause is Cause.FORBIDDEN or not isinstance(exc, _OF_THE_CONNECTION):
        advice = f". {ADVICE[cause]}" if cause in ADVICE and cause is not Cause.OTHER else ""
        return StorageError(f"Database {database} refused the operation: {text}{advice}")
    if broke_off and in_callers:
        advice = "Your transaction is lost with the connection; run it again."
    elif broke_off and not reads:
        advice = (
            "The connection broke off while this was written, and it may have been stored: read it "
            "before you write it again."
        )
    elif cause in {Cause.LOCKED, Cause.SHARED}:
        advice = _advice_on_locks(connection, in_callers and cause is Cause.LOCKED)
    else:
        advice = ADVICE.get(cause, ADVICE[Cause.OTHER])
    error = StorageUnavailableError(f"Database {database} is unavailable: {text}. {advice}")
    error.may_be_stored = broke_off and not in_callers and not reads
    return error


def _advice_on_locks(connection: BaseDatabaseWrapper, in_callers: bool) -> str:
    dialect = dialect_of(connection)
    if in_callers and dialect.begins_deferred(connection):
        return (
            "A transaction that began by reading cannot write once another one has; set "
            "OPTIONS['transaction_mode'] to 'IMMEDIATE', or raise OPTIONS['timeout']."
        )
    return (
        "Another transaction has held a lock for longer than the timeout; end it or try again, or "
        f"raise {dialect.lock_timeout}."
    )


def conflict(alias: str, exc: django.db.Error) -> StorageUnavailableError:
    """Return the error for a transaction that was given up for another one."""
    database, text = _quoted_name(alias), _text(alias, exc)
    if was_in_callers_transaction(connections[alias]):
        return StorageUnavailableError(
            f"Another transaction changed the same rows of database {database}: {text}. "
            "Roll your transaction back and run it again."
        )
    if dialect_of(connections[alias]).is_lock_timeout(exc):
        advice = _advice_on_locks(connections[alias], in_callers=False)
        return StorageUnavailableError(f"Database {database} is unavailable: {text}. {advice}")
    return StorageUnavailableError(
        f"Other transactions kept changing the same rows of database {database}, for "
        f"{PATIENCE:.0f} seconds: {text}. Try again later, when fewer write to them at a time."
    )


def read_only_error(alias: str, exc: django.db.Error) -> StorageUnavailableError:
    """Return the error for a database without our tables that cannot be given them."""
    mend(connections[alias])
    return StorageUnavailableError(
        f"Database {_quoted_name(alias)} takes no writes, as a standby, and the tables of "
        f"workflow_storage are missing or out of date there: {_text(alias, exc)}. Open the store "
        "on the primary first; a URL with several hosts finds it with "
        "?target_session_attrs=read-write."
    )


def _is_too_large(connection: BaseDatabaseWrapper, exc: django.db.Error) -> bool:
    """Whether the server hung up on a statement because of its size, and had no time to say so."""
    size = getattr(exc, _SIZE, 0)
    if not size:
        return False
    try:
        limit = dialect_of(connection).largest_statement(connection)
    except django.db.Error:
        return False
    return limit is not None and size > limit


def _quoted_name(alias: str) -> str:
    settings = _settings(alias)
    # A URL with several hosts has them in its query.
    hosts = settings["HOST"] or settings["OPTIONS"].get("host", "")
    if not hosts or alias not in registered_aliases:
        return repr(database_name(alias))
    ports = str(settings["PORT"] or settings["OPTIONS"].get("port", ""))
    if "," in hosts and ports.count(",") == hosts.count(","):
        pairs = zip(hosts.split(","), ports.split(","), strict=True)
        hosts = ", ".join(f"{host}:{port}" for host, port in pairs)
    return f"{database_name(alias)!r} on {hosts}"


def _settings(alias: str) -> dict[str, Any]:
    return connections[alias].settings_dict


def _text(alias: str, exc: django.db.Error) -> str:
    return _without_password(alias, " ".join(str(exc).split()))


def _without_password(alias: str, text: str) -> str:
    password = _settings(alias).get("PASSWORD")
    # A word that short would be masked where it is no password, and so be given away.
    return text.replace(str(password), "***") if len(str(password or "")) > 3 else text

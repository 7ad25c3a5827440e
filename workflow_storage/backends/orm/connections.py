"""Whether this thread's connection to a database can be used, for what is about to use it.

Outside of requests nobody else looks after Django's connections: one that died while it was idle
fails the next call, and one that has broken in a bad moment fails every call.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

from django.db import connections
from django.db.backends.signals import connection_created
from django.dispatch import receiver

from workflow_storage.backends.orm.dialects import dialect_of
from workflow_storage.backends.orm.forks import (
    begin_use,
    end_use,
    refuse_inherited_transaction,
    watch,
)
from workflow_storage.backends.orm.sqlite import is_there
from workflow_storage.exceptions import StorageUnavailableError

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper

IDLE_SECONDS = 5.0
"""Seconds without use after which a connection is checked before it is used: one round trip."""

MAX_DEAD_IN_POOL = 100
"""How many dead connections are taken out of a pool before an operation fails."""

_USED_AT = "_workflow_storage_used_at"
"""Attribute of Django's connection: when a store began to use it last, since it was opened."""
_OPENED_AT = "_workflow_storage_opened_at"
"""Attribute of Django's connection: when it was opened."""
_SPENT = "_workflow_storage_spent"
"""Attribute of Django's connection: that it is to be closed once the transaction has ended."""
_IN_CALLERS = "_workflow_storage_in_callers_transaction"
"""Attribute of Django's connection: whether the caller had a transaction when it was made ready."""
_FILE = "_workflow_storage_file"
"""Attribute of Django's connection: the file that it has open."""
_WATCHED = "_workflow_storage_watched"
_NEVER = float("-inf")


class _Current(threading.local):
    """What this thread's operation is carried out on: Django takes a microsecond to look it up."""

    connection: BaseDatabaseWrapper | None = None


_current = _Current()


def connection_of(alias: str) -> BaseDatabaseWrapper:
    """Return this thread's connection to a database."""
    connection = _current.connection
    if connection is not None and connection.alias == alias:
        return connection
    return connections[alias]


def ready(alias: str) -> BaseDatabaseWrapper:
    """Return this thread's connection, fit for use unless it is in the caller's transaction.

    Whoever has it says `done` afterwards.

    Raises:
        StorageError: if it was inherited in the middle of a transaction of the parent process.
        StorageUnavailableError: if its file was deleted or replaced meanwhile.
    """
    connection = connections[alias]
    begin_use(connection)
    known = connection.__dict__
    file = known.get(_FILE)
    if file is not None and connection.connection is not None and not is_there(file):
        _leave_deleted_file(connection, file[0])
    now = time.monotonic()
    known[_IN_CALLERS] = (
        not connection.autocommit  # in a transaction
        or connection.connection is None
        or now - known.get(_USED_AT, _NEVER) > IDLE_SECONDS
        or _SPENT in known
    ) and _made_ready(connection)
    known[_USED_AT] = now
    _current.connection = connection
    return connection


def done(connection: BaseDatabaseWrapper) -> None:
    """Note that an operation is over that was carried out on a connection."""
    _current.connection = None
    end_use(connection)


def was_in_callers_transaction(connection: BaseDatabaseWrapper) -> bool:
    """Whether the caller had a transaction open when the connection was made `ready`.

    A connection that has broken since may look so, or no longer look so.
    """
    began: bool | None = vars(connection).get(_IN_CALLERS)
    return in_callers_transaction(connection) if began is None else began


def in_callers_transaction(connection: BaseDatabaseWrapper) -> bool:
    """Whether the caller has a transaction open, in an atomic block or by `set_autocommit`."""
    return connection.in_atomic_block or _in_manual_transaction(connection)


def _in_manual_transaction(connection: BaseDatabaseWrapper) -> bool:
    # get_autocommit() would open it.
    return connection.connection is not None and not connection.autocommit


def has_broken(connection: BaseDatabaseWrapper) -> bool:
    """Whether a connection on which an error has occurred is of no more use."""
    return connection.connection is None or dialect_of(connection).has_broken(connection)


def mend(connection: BaseDatabaseWrapper, *, close: bool = False) -> None:
    """Drop a connection if it has broken, or every later call of this process would fail.

    One in a transaction is the caller's to drop.

    Args:
        connection: on which an error has occurred.
        close: whether to drop it in any case, as soon as it is in no transaction.
    """
    if connection.connection is None:
        return
    if not in_callers_transaction(connection):
        if close or not connection.is_usable():
            connection.close()
    elif close:
        vars(connection)[_SPENT] = True
    else:
        _end_what_has_broken(connection)


def _made_ready(connection: BaseDatabaseWrapper) -> bool:
    """Make a connection ready, and return whether it is in the caller's transaction."""
    known = vars(connection)
    if _WATCHED not in known:
        known[_WATCHED] = True
        watch(connection)
    if connection.connection is None:
        refuse_inherited_transaction(connection)
        if connection.in_atomic_block and not connection.atomic_blocks:
            _forget_transaction(connection)
        if _is_pooled(connection) and not connection.in_atomic_block:
            _take_usable(connection)
    elif in_callers_transaction(connection):
        _end_what_has_broken(connection)
    else:
        used_at = max(known.get(_USED_AT, _NEVER), known.get(_OPENED_AT, _NEVER))
        was_idle = time.monotonic() - used_at > IDLE_SECONDS
        if known.pop(_SPENT, False) or (was_idle and not connection.is_usable()):
            connection.close()
    return in_callers_transaction(connection)


def _leave_deleted_file(connection: BaseDatabaseWrapper, path: str) -> None:
    """Refuse to use a connection to a file that nobody will find again."""
    end_use(connection)
    mend(connection, close=True)
    raise StorageUnavailableError(
        f"The SQLite file {path} was deleted or replaced while it was open, and what was written to "
        "it since then is lost. Find out who did that; the next call opens what is there now."
    )


def _is_pooled(connection: BaseDatabaseWrapper) -> bool:
    """Whether what Django opens may have been idle before, in a pool that does not check it."""
    settings = connection.settings_dict
    return bool(settings["OPTIONS"].get("pool")) and not settings["CONN_HEALTH_CHECKS"]


def _take_usable(connection: BaseDatabaseWrapper) -> None:
    """Open a connection from a pool; one that is dead is given back, and the pool drops it."""
    for _ in range(MAX_DEAD_IN_POOL):
        connection.ensure_connection()
        if connection.is_usable():
            return
        connection.close()


def _end_what_has_broken(connection: BaseDatabaseWrapper) -> None:
    """Close a connection whose transaction nobody can end any more.

    Django fails to switch autocommit on again where a connection breaks between COMMIT and that.
    It takes the next atomic block for one inside a transaction, and makes a savepoint; if that
    fails, all that follows is in an atomic block that nobody has begun, until the process ends.
    """
    if connection.atomic_blocks or not connection.settings_dict["AUTOCOMMIT"]:
        return
    if connection.in_atomic_block or (connection.errors_occurred and has_broken(connection)):
        _forget_transaction(connection)
        connection.close()


def _forget_transaction(connection: BaseDatabaseWrapper) -> None:
    connection.in_atomic_block = False
    connection.savepoint_ids = []
    connection.needs_rollback = False
    connection.closed_in_transaction = False


@receiver(connection_created)
def _opened(*, connection: BaseDatabaseWrapper, **kwargs: Any) -> None:
    """Note when a connection was opened; one out of a pool may have been idle there."""
    known = vars(connection)
    known[_FILE] = dialect_of(connection).file_of(connection)
    known[_OPENED_AT] = _NEVER if _is_pooled(connection) else time.monotonic()
    known.pop(_USED_AT, None)
    known.pop(_SPENT, None)

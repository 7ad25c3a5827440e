"""What becomes of connections over a fork: the child leaves those of its parent alone.

Two processes that write to one socket get each other's answers. So a child forgets what it
has inherited, and opens connections of its own when it needs them. It never closes an inherited
one, since that would say goodbye to the server and end the parent's session: its descriptor
is pointed at /dev/null, and the object is kept for as long as the process lives.
"""

from __future__ import annotations

import itertools
import os
import stat
import sys
import threading
import time
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from django.db import connections

from workflow_storage.backends.orm.dialects import dialect_of
from workflow_storage.config import database_name
from workflow_storage.exceptions import StorageError

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper

PATIENCE = 2.0
"""Seconds that a fork waits for transactions of other threads on SQLite files to end."""

_INHERITED = "_workflow_storage_inherited"
"""Attribute of Django's connection in a child: what it held at the fork, and was not left yet."""
_AT_WORK = "_workflow_storage_at_work"
"""Attribute of Django's connection: that an operation of a store is being carried out on it."""
_REFUSED = "_workflow_storage_refused"
"""Attribute of Django's connection in a child: that it was in a transaction of the parent's."""


class _Process:
    """What this process knows of its connections."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.aliases: set[str] = set()
        """Databases that a store uses."""
        self.used: weakref.WeakSet[BaseDatabaseWrapper] = weakref.WeakSet()
        """Connections that a store has used, of all threads."""
        self.is_forking = False
        self.forked = threading.Event()
        """Set while other threads may go on."""
        self.forking: list[tuple[BaseDatabaseWrapper, Any]] = []
        """The same, with what they held, while the process is forked.

        CPython drops what belongs to other threads in the child, before the child can do
        anything about it; MySQL's driver would close it then.
        """
        self.inherited_pools: dict[str, Any] = {}
        self.locked: set[str] = set()
        """Databases that a child cannot use: it has inherited their locks with a transaction."""


_process = _Process()
_for_ever: list[Any] = []


def watch_database(alias: str) -> None:
    """Note that a store uses a database."""
    if alias not in _process.aliases:
        _process.aliases.add(alias)
        _leave_pool(alias)


def watch(connection: BaseDatabaseWrapper) -> None:
    """Note that a store uses a connection; leave it if it was inherited.

    Raises:
        StorageError: if the parent process had begun a transaction on it.
    """
    with _process.lock:
        _process.used.add(connection)
    inherited = vars(connection).pop(_INHERITED, None)
    if inherited is not None and inherited is connection.connection:
        _leave(connection, inherited)
    refuse_inherited_transaction(connection)


def refuse_inherited_transaction(connection: BaseDatabaseWrapper) -> None:
    """Raise an error if the connection was forked in the middle of a transaction.

    Raises:
        StorageError: in that case, as long as the block is not left.
    """
    began = vars(connection).get(_REFUSED)
    what = (
        f"This process was forked while its parent was in a transaction on database "
        f"{database_name(connection.alias)!r}, which only the parent can go on with."
    )
    if connection.alias in _process.locked:
        raise StorageError(
            f"{what} Its locks on the file stay for as long as this process lives. Fork outside of "
            "transactions, or start a new interpreter instead (multiprocessing's 'spawn')."
        )
    if began is None:
        return
    if connection.connection is not None or (began == "atomic" and not connection.in_atomic_block):
        del vars(connection)[_REFUSED]
        return
    raise StorageError(
        f"{what} Fork outside of transactions, or leave the transaction in the child before you "
        "use the store."
    )


def begin_use(connection: BaseDatabaseWrapper) -> None:
    """Note that a connection is at work from now on; let a fork of this process go first."""
    known = connection.__dict__
    known[_AT_WORK] = True
    if _process.is_forking and not connection.in_atomic_block:
        known[_AT_WORK] = False
        _process.forked.wait(2 * PATIENCE)
        known[_AT_WORK] = True


def end_use(connection: BaseDatabaseWrapper) -> None:
    """Note that a connection is at work no longer."""
    connection.__dict__[_AT_WORK] = False


def _is_at_work(connection: BaseDatabaseWrapper, driver_connection: Any) -> bool:
    return bool(vars(connection).get(_AT_WORK)) or _holds_locks(connection, driver_connection)


def _before_fork() -> None:
    _process.lock.acquire()
    _process.forking = [
        (connection, connection.connection)
        for connection in list(_process.used)
        if connection.connection is not None
    ]
    own = connections.all(initialized_only=True) if _process.forking else []
    others = [
        pair
        for pair in _process.forking
        if dialect_of(pair[0]).locks_by_process and pair[0] not in own
    ]
    if not others:
        return
    # A lock that another thread has at the fork is one that the child can never give back.
    _process.forked.clear()
    _process.is_forking = True
    end = time.monotonic() + PATIENCE
    while any(itertools.starmap(_is_at_work, others)) and time.monotonic() < end:
        time.sleep(0.0002)


def _after_fork_in_parent() -> None:
    _process.forking = []
    _process.is_forking = False
    _process.forked.set()
    _process.lock.release()


def _after_fork_in_child() -> None:
    _process.lock = threading.RLock()
    _process.forked = threading.Event()
    _process.is_forking = False
    forking, _process.forking = _process.forking, []
    for connection, driver_connection in forking:
        _leave(connection, driver_connection)
    _process.inherited_pools = dict(_pools())
    for alias in _process.aliases:
        _leave_pool(alias)
    # Those that no store has used yet may be none of ours for ever.
    if "settings" in vars(connections):
        for connection in connections.all(initialized_only=True):
            if connection.connection is not None:
                vars(connection)[_INHERITED] = connection.connection


def _leave(connection: BaseDatabaseWrapper, driver_connection: Any) -> None:
    """Leave to the parent what a connection holds, so that Django opens it anew."""
    dialect = dialect_of(connection)
    if dialect.is_in_process(connection):
        return
    if _holds_locks(connection, driver_connection):
        _process.locked.add(connection.alias)
    _keep_for_ever(driver_connection)
    _point_at_nothing(driver_connection)
    if connection.in_atomic_block:
        # As Django's close() does, so that the end of the block sends nothing.
        connection.closed_in_transaction = True
        connection.needs_rollback = True
        vars(connection)[_REFUSED] = "atomic"
    elif connection.settings_dict["AUTOCOMMIT"] and not connection.autocommit:
        vars(connection)[_REFUSED] = "set_autocommit"
    connection.connection = None
    dialect.after_fork(connection)


def _holds_locks(connection: BaseDatabaseWrapper, driver_connection: Any) -> bool:
    """Whether a connection holds locks that a child could not give back."""
    return dialect_of(connection).locks_by_process and driver_connection.in_transaction


def _leave_pool(alias: str) -> None:
    """Let Django make a new pool, if the one of a database was inherited: its threads are gone."""
    pools = _pools()
    inherited = _process.inherited_pools.get(alias)
    if inherited is not None and pools.get(alias) is inherited:
        _keep_for_ever(pools.pop(alias))


def _pools() -> dict[str, Any]:
    # Loaded already if there is any.
    module: Any = sys.modules.get("django.db.backends.postgresql.base")
    return getattr(getattr(module, "DatabaseWrapper", None), "_connection_pools", {})


def _point_at_nothing(driver_connection: Any) -> None:
    """Let what a driver's connection writes go to /dev/null."""
    with suppress(Exception):  # closed, or a driver that does not tell
        descriptor = driver_connection.fileno()
        if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            nothing = os.open(os.devnull, os.O_RDWR)
            os.dup2(nothing, descriptor, inheritable=False)
            os.close(nothing)


def _keep_for_ever(inherited: Any) -> None:
    """Keep an object beyond the end of the interpreter, which would close it."""
    _for_ever.append(inherited)
    with suppress(ImportError, AttributeError):
        import ctypes

        ctypes.pythonapi.Py_IncRef(ctypes.py_object(inherited))


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )

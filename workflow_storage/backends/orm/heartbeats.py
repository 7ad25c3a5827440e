"""The connection that a process sends its heartbeats over, beside all others of the database.

It is none of a pool, which can be used up by those who work, and waits for no lock for long, as
one of the caller's own transactions can hold it.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import django.db
from django.db import connections, transaction

from workflow_storage.backends.orm.dialects import dialect_of
from workflow_storage.backends.orm.errors import storage_error
from workflow_storage.backends.orm.own_connection import make_own

if TYPE_CHECKING:
    from collections.abc import Iterator

    from django.db.backends.base.base import BaseDatabaseWrapper

HEARTBEAT_TIMEOUT = 1.0
"""Seconds that a heartbeat waits for a lock on its run."""

_open: set[BaseDatabaseWrapper] = set()
"""Kept from being collected in a process that is forked, which would end the parent's session."""


@contextmanager
def connection_beside(alias: str) -> Iterator[BaseDatabaseWrapper]:
    """Let ``connections[alias]`` of this thread be a connection of no pool while the block runs."""
    pooled = connections[alias]
    settings: dict[str, Any] = {
        **pooled.settings_dict,
        "AUTOCOMMIT": True,
        # It is idle most of the time, and nobody is there to open it anew for a request.
        "CONN_MAX_AGE": None,
        "CONN_HEALTH_CHECKS": True,
    }
    settings["OPTIONS"] = {
        name: value for name, value in settings["OPTIONS"].items() if name != "pool"
    }
    connection = type(pooled)(settings, alias)
    make_own(connection)  # so that a store with an own connection takes no other
    connections[alias] = connection
    _open.add(connection)
    try:
        yield connection
    finally:
        connections[alias] = pooled
        connection.close()
        _open.discard(connection)


@contextmanager
def impatiently(connection: BaseDatabaseWrapper) -> Iterator[None]:
    """Begin a transaction on such a connection that waits for no lock for long.

    Raises:
        StorageError: for an error of the database.
    """
    # It looks whether the connection still works.
    connection.close_if_unusable_or_obsolete()
    try:
        block = transaction.atomic(using=connection.alias)
        with dialect_of(connection).impatient(connection, HEARTBEAT_TIMEOUT, block):
            yield
    except django.db.Error as exc:
        raise storage_error(connection.alias, exc) from exc

"""A connection of the store's own under the alias of the caller's, for the methods of the repositories.

What is written through it outlives a rollback of the caller's transaction. While a method runs,
``connections[alias]`` of its thread is the own connection, so that everything below, Django's
included, takes it without being told. No second alias is used: Django's tests allow only those
that they know.
"""

from __future__ import annotations

import os
import threading
import weakref
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from django.db import connections, transaction
from django.db.backends.signals import connection_created
from django.dispatch import receiver

from workflow_storage.backends.orm.connections import in_callers_transaction

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from django.db.backends.base.base import BaseDatabaseWrapper

_OWN = "_workflow_storage_own_connection"
"""Where a connection keeps the own one beside it; that keeps itself there."""

_CLOSING = ("close", "close_if_unusable_or_obsolete", "close_pool")
"""What closes a connection; whoever calls it on the caller's means the one beside it, too."""

_pools: dict[str, Any] = {}
"""Django's pools of own connections, by alias. With those of the callers in the same pool, as many
threads as it has connections would each hold one, and all wait for a second."""

_inherited: list[object] = []
"""What belongs to the parent process, and is kept, for closing it would end the parent's sessions."""

_of_this_thread = threading.local()


class _Token:
    """Something that is gone once its thread has ended."""


@contextmanager
def own_connection(alias: str) -> Iterator[None]:
    """Let ``connections[alias]`` of this thread be the store's own while the block runs.

    Inside a `TestCase`, whose transaction stands for the whole database, it stays the caller's.
    """
    callers = connections[alias]
    own = _beside(callers)
    if own is callers:
        yield
        return
    own.force_debug_cursor = callers.force_debug_cursor
    with in_place(alias, own):
        yield


@contextmanager
def in_place(alias: str, connection: BaseDatabaseWrapper) -> Iterator[None]:
    """Let ``connections[alias]`` of this thread be another connection while the block runs."""
    before = connections[alias]
    connections[alias] = connection
    try:
        yield
    finally:
        connections[alias] = before


def make_own(connection: BaseDatabaseWrapper) -> None:
    """Let a connection that only the store uses be its own."""
    vars(connection)[_OWN] = connection


def in_transaction_of_test(connection: BaseDatabaseWrapper) -> bool:
    """Whether the outermost transaction is that of a `TestCase`, or of the fixture ``db``."""
    blocks = connection.atomic_blocks
    return bool(blocks) and _is_of_test(blocks[0])


def in_transaction_beyond_test(connection: BaseDatabaseWrapper) -> bool:
    """Whether a transaction is open that somebody else than a `TestCase` has begun."""
    blocks = connection.atomic_blocks
    if not blocks or not _is_of_test(blocks[0]):
        return in_callers_transaction(connection)
    return not all(_is_of_test(block) for block in blocks)


def _is_of_test(block: transaction.Atomic) -> bool:
    return bool(getattr(block, "_from_testcase", False))


def _beside(callers: BaseDatabaseWrapper) -> BaseDatabaseWrapper:
    """Return the own connection beside the caller's, or the caller's where there is to be none."""
    if in_transaction_of_test(callers):
        return callers
    attributes = vars(callers)
    own: BaseDatabaseWrapper | None = attributes.get(_OWN)
    if own is None:
        own = attributes[_OWN] = _opened_beside(callers)
    return own


def _opened_beside(callers: BaseDatabaseWrapper) -> BaseDatabaseWrapper:
    # The same settings, not a copy: a test runner changes the name of the database in them.
    own = type(callers)(callers.settings_dict, callers.alias)
    make_own(own)
    if hasattr(own, "_connection_pools"):
        vars(own)["_connection_pools"] = _pools
    # Who looks at the queries of the alias sees those of the store.
    own.queries_log = callers.queries_log
    own.execute_wrappers = callers.execute_wrappers
    for name in _CLOSING:
        if hasattr(callers, name):
            vars(callers)[name] = _both(getattr(own, name), getattr(callers, name))
    if not hasattr(_of_this_thread, "token"):
        _of_this_thread.token = _Token()
    at_the_end = weakref.finalize(_of_this_thread.token, _close, weakref.ref(own))
    at_the_end.atexit = False  # only its own thread may close it
    return own


def _leave_pools_to_parent() -> None:
    """Let Django make new pools in a child process, where the threads of these are not."""
    _inherited.append(_pools.copy())
    _pools.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_pools_to_parent)


@receiver(connection_created)
def _commit_every_statement(*, connection: BaseDatabaseWrapper, **kwargs: object) -> None:
    """Let what is written on an own connection be committed, whatever AUTOCOMMIT is for the caller."""
    if not connection.autocommit and vars(connection).get(_OWN) is connection:
        connection.set_autocommit(True)


def _both(of_own: Callable[[], None], of_callers: Callable[[], None]) -> Callable[[], None]:
    def both() -> None:
        try:
            of_own()
        finally:
            of_callers()

    return both


def _close(own: weakref.ref[BaseDatabaseWrapper]) -> None:
    """Close the own connection of a thread that ends; Django leaves the other one to its user."""
    connection = own()
    if connection is not None:
        with suppress(Exception):
            connection.close()

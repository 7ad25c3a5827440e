"""The tables in one database, for `rows` and `upkeep`: their rows, and how a thread is locked."""

from __future__ import annotations

import os
import secrets
import threading
from collections import defaultdict
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

from django.db import connections, transaction
from django.db.models import F, Model, QuerySet

from workflow_storage.backends.orm.async_threads import borrows
from workflow_storage.backends.orm.compiled_queries import Parameter, Queries
from workflow_storage.backends.orm.connections import (
    in_callers_transaction,
    was_in_callers_transaction,
)
from workflow_storage.backends.orm.dialects import dialect_of
from workflow_storage.contrib.langgraph.models import ThreadNamespace
from workflow_storage.exceptions import SnapshotError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from django.db.backends.base.base import BaseDatabaseWrapper

    from workflow_storage.contrib.langgraph.chains import Memory
    from workflow_storage.contrib.langgraph.names import ThreadName

_M = TypeVar("_M", bound=Model)

_turns: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

if hasattr(os, "register_at_fork"):
    # A child does not have the thread that has its turn.
    os.register_at_fork(after_in_child=_turns.clear)

KEY = Parameter("thread", ThreadNamespace._meta.get_field("key"))
"""The key of a thread in a compiled query."""


class Tables:
    """The tables in one database.

    Args:
        alias: its name in DATABASES.
        own_connection: as in `StorageConfig`.
        memory: what is remembered of its threads.

    Attributes:
        alias: as above.
        own_connection: as above.
        memory: as above.
    """

    def __init__(self, alias: str, *, own_connection: bool, memory: Memory) -> None:
        self.alias = alias
        self.own_connection = own_connection
        self.memory = memory

    @property
    def connection(self) -> BaseDatabaseWrapper:
        """The connection of this thread."""
        return connections[self.alias]

    def all(self, model: type[_M]) -> QuerySet[_M]:
        """Return all rows of a table."""
        return model._base_manager.using(self.alias)

    def queries(self, model: type[_M]) -> Queries[_M]:
        """Return the queries on a table that are compiled once."""
        return Queries(model, self.alias)

    def in_turn(self) -> AbstractContextManager[Any]:
        """Let the threads of this process write one after the other, where that is how it is anyway.

        LangGraph saves a checkpoint and writes of tasks at the same time. Who waits for SQLite sleeps
        for a millisecond or more; who waits for a lock of Python's goes on at once.
        """
        connection = self.connection
        if connection.features.has_select_for_update or in_callers_transaction(connection):
            return nullcontext()
        return _turns[self.alias]

    def transaction(self) -> AbstractContextManager[Any]:
        """Begin a transaction, or a savepoint in the caller's if that is in this thread."""
        if borrows():
            return nullcontext()
        connection = self.connection
        if not connection.in_atomic_block and in_callers_transaction(connection):
            dialect_of(connection).begin_callers(connection)
        return transaction.atomic(using=self.alias)

    def read_committed(self) -> AbstractContextManager[Any]:
        """Begin a transaction of which each statement sees what is committed by then.

        In the caller's transaction it is as `transaction`, and what is seen there is the caller's to
        say.
        """
        connection = self.connection
        if in_callers_transaction(connection):
            return self.transaction()
        return dialect_of(connection).read_committed(connection)

    def refuse_snapshot(self) -> None:
        """Refuse to delete in a caller's transaction that cannot see what others commit.

        Raises:
            SnapshotError: for what is kept may not be all.
        """
        connection = self.connection
        if in_callers_transaction(connection) and dialect_of(connection).has_snapshot(connection):
            raise SnapshotError

    def as_of_now(self, rows: QuerySet[_M]) -> QuerySet[_M]:
        """Let a query see what is committed by now, if only a lock does in this transaction."""
        connection = self.connection
        # In our own transactions, what is read after a lock is as new as that.
        if was_in_callers_transaction(connection) and dialect_of(connection).locks_see_newest:
            return self.with_lock(rows)
        return rows

    def begin_writing(self) -> None:
        """Let a transaction lock the whole database now, where that is how it is locked.

        A transaction on a SQLite file that has read cannot write once another one has.
        """
        if dialect_of(self.connection).begins_deferred(self.connection):
            self.all(ThreadNamespace).filter(pk=0).update(generation=F("generation"))

    def with_lock(self, rows: QuerySet[_M]) -> QuerySet[_M]:
        """Let a query lock the threads that it reads, where the database locks rows."""
        features = self.connection.features
        if not features.has_select_for_update:
            return rows
        return rows.select_for_update(no_key=features.has_select_for_no_key_update)

    def locked(self, name: ThreadName, key: str) -> ThreadNamespace:
        """Return a thread, made if it is not there, that no other transaction changes meanwhile."""
        table, queries = self.all(ThreadNamespace), self.queries(ThreadNamespace)

        def found() -> QuerySet[ThreadNamespace]:
            return self.with_lock(table.filter(key=KEY))

        self.begin_writing()
        while not (rows := queries.objects("locked", found, keyed=True, thread=key)):
            made = ThreadNamespace(
                key=key,
                thread_key=name.thread_key,
                thread_id=name.thread_id,
                namespace=name.namespace,
                generation=new_generation(),
            )
            table.bulk_create([made], ignore_conflicts=True)
        return rows[0]


def new_generation() -> int:
    """Return what tells a thread from what it was before something was deleted from it."""
    return secrets.randbelow(1 << 31)

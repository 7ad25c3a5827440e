"""A cursor for the queries that find rows by a key on PostgreSQL, for compiled_queries.py.

Django's own cursors bind parameters on the client, and so can neither read in binary, where
bytes are half as long as in text and cost nothing to convert, nor prepare a statement.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import psycopg
from django.db.backends.postgresql.base import Cursor, ServerBindingCursor
from psycopg.errors import (
    DuplicatePreparedStatement,
    FeatureNotSupported,
    InvalidSqlStatementName,
)
from psycopg.pq import Format, TransactionStatus

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper
    from django.db.backends.utils import CursorWrapper


class KeyedCursor(psycopg.Cursor[Any]):
    """A cursor that binds parameters on the server and reads in binary.

    It prepares statements if the settings of the database say so, with
    ``OPTIONS["prepare_threshold"]``, and where they say nothing, if no pooler is in between.
    """

    def __init__(self, session: psycopg.Connection[Any]) -> None:
        super().__init__(session)
        self.format = Format.BINARY

    def execute(self, query: Any, params: Any = None, **kwargs: Any) -> KeyedCursor:
        """Execute a statement; prepare none any more if one turns out to be of no use.

        That is so after another session has changed the type of a column, after a ``DEALLOCATE``
        that psycopg did not see, and where a pooler hands a session on in which another client
        has prepared a statement of that name. psycopg would execute it again and again.
        """
        try:
            return super().execute(query, params, **kwargs)
        except (FeatureNotSupported, InvalidSqlStatementName, DuplicatePreparedStatement):
            self.connection.prepare_threshold = None
            raise


def keyed_cursor(connection: BaseDatabaseWrapper) -> CursorWrapper:
    """Return a cursor as ``connection.cursor()`` does, around a `KeyedCursor`.

    A cursor of the project's own making is left as it is, and so is one that keeps a log: it
    asks Django's cursor for the statement with its values.
    """
    cursor = connection.cursor()
    kind = type(cursor.cursor)
    if kind in (Cursor, ServerBindingCursor) and not connection.queries_logged:
        # Where Django's own cursors bind on the server, they would prepare statements, too.
        if kind is Cursor and "prepare_threshold" not in connection.settings_dict["OPTIONS"]:
            _prepare_if_direct(connection.connection)
        cursor.cursor = KeyedCursor(connection.connection)
    return cursor


_ASKED_AFTER = 10
"""Statements of ours in a session before it is asked; one of a single request is not worth it."""
_PREPARED_AFTER = 5
"""Executions of a statement before it is prepared, as psycopg has it by default."""

_executed: WeakKeyDictionary[psycopg.Connection[Any], int] = WeakKeyDictionary()


def _prepare_if_direct(session: psycopg.Connection[Any]) -> None:
    """Let a session that is used for long prepare statements, if the server's is its own.

    A pooler that shares the server's sessions out gives its clients process ids of its own making,
    for it has to tell them apart when one cancels a query (BackendKeyData in the PostgreSQL manual,
    "Message Formats").
    """
    executed = _executed.get(session, 0)
    if executed > _ASKED_AFTER:
        return
    is_idle = session.autocommit and session.info.transaction_status == TransactionStatus.IDLE
    if executed < _ASKED_AFTER or is_idle:
        _executed[session] = executed + 1
    if executed == _ASKED_AFTER and is_idle:
        try:
            found = psycopg.Cursor(session).execute("SELECT pg_backend_pid()").fetchone()
        except psycopg.Error:
            return  # which what comes next will say, if it is of any meaning
        if found == (session.info.backend_pid,):
            session.prepare_threshold = _PREPARED_AFTER

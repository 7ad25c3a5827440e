"""A cursor for the queries that find rows by a key on PostgreSQL, for compiled_queries.py.

Django's own cursors bind parameters on the client, and so can neither read in binary, where
bytes are half as long as in text and cost nothing to convert, nor prepare a statement.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psycopg
from django.db.backends.postgresql.base import Cursor, ServerBindingCursor
from psycopg.errors import (
    DuplicatePreparedStatement,
    FeatureNotSupported,
    InvalidSqlStatementName,
)
from psycopg.pq import Format

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper
    from django.db.backends.utils import CursorWrapper


class KeyedCursor(psycopg.Cursor[Any]):
    """A cursor that binds parameters on the server and reads in binary.

    It prepares statements if the settings of the database say so, with
    ``OPTIONS["prepare_threshold"]``.
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
    if type(cursor.cursor) in (Cursor, ServerBindingCursor) and not connection.queries_logged:
        cursor.cursor = KeyedCursor(connection.connection)
    return cursor

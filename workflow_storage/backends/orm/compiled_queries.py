"""Queries that Django compiles once for each connection, for the repositories.

Building and compiling a small query takes the ORM several times longer than the database
takes to answer it. Here a `QuerySet` is built once with a `Parameter` in place of each
value; its SQL, its parameters' conversions and its rows' conversions are Django's own, and
are kept. What a query is built from besides its parameters (which filters, which limit) is
its key.
"""

from __future__ import annotations

import operator
from types import MappingProxyType, SimpleNamespace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from django.core.signals import setting_changed
from django.db import connections
from django.db.models import CharField, DateTimeField, Model, QuerySet, TextField
from django.db.models.constants import OnConflict
from django.db.models.expressions import Expression
from django.db.models.sql import InsertQuery, UpdateQuery
from django.dispatch import receiver

from workflow_storage.backends.orm.connections import connection_of
from workflow_storage.backends.orm.dialects import dialect_of
from workflow_storage.backends.orm.errors import note_size
from workflow_storage.validation import plain_text

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

    from django.db.backends.base.base import BaseDatabaseWrapper
    from django.db.backends.utils import CursorWrapper

_M = TypeVar("_M", bound=Model)

_IGNORED = MappingProxyType({"on_conflict": OnConflict.IGNORE})

MAX_QUERIES = 500
"""Compiled queries that a connection keeps; beyond, it begins anew."""


class Parameter(Expression):
    """A value that is given when the query is executed, converted as its field says."""

    def __init__(self, name: str, output_field: Any, *, for_save: bool = False) -> None:
        super().__init__(output_field=output_field)
        self.name = name
        self.for_save = for_save
        target = output_field.target_field if output_field.is_relation else output_field
        # Drivers take text as it is, and the repositories have checked that it is text.
        self.as_it_is = isinstance(target, CharField | TextField)

    def as_sql(self, compiler: Any, connection: Any) -> Any:
        return "%s", (self,)

    def prepared(self, values: dict[str, Any], connection: Any) -> Any:
        """Return this parameter's value as the driver takes it."""
        value = values[self.name]
        if isinstance(value, str):
            value = plain_text(value)
        if self.as_it_is:
            return value
        if self.for_save:
            return self.output_field.get_db_prep_save(value, connection)
        return self.output_field.get_db_prep_value(value, connection)


class Statement:
    """SQL with parameters to be filled in.

    Args:
        sql: as Django writes it.
        params: what fills its places, each a `Parameter` or the value itself.
        connection: the database that it is for.
        keyed: whether it finds its rows by a key, so that one plan is the best for all values.
    """

    def __init__(
        self,
        sql: str,
        params: Sequence[Any],
        connection: BaseDatabaseWrapper,
        *,
        keyed: bool = True,
    ) -> None:
        self._cursor_of = _cursor_of(connection, keyed)
        places: list[Any] = list(range(len(params)))
        self._fixed: Any = list(params)
        if dialect_of(connection).names_places:
            # Django rewrites each place as it is executed: without a name by searching the SQL
            # for it, which takes as long as the query itself, with a name by formatting.
            places = [f"p{number}" for number in places]
            sql = sql.replace("%%", "%%%%") % tuple(f"%({name})s" for name in places)
            self._fixed = dict(zip(places, params, strict=True))
        self.sql = sql
        self._parameters = [
            (place, param)
            for place, param in zip(places, params, strict=True)
            if isinstance(param, Parameter)
        ]

    def execute(self, connection: BaseDatabaseWrapper, values: dict[str, Any]) -> CursorWrapper:
        """Execute the statement with the values of its parameters, by name."""
        cursor = self._cursor_of(connection)
        params: Any = self._fixed.copy()
        for place, parameter in self._parameters:
            params[place] = parameter.prepared(values, connection)
        try:
            cursor.execute(self.sql, params)
        except BaseException as exc:
            note_size(exc, params.values() if isinstance(params, dict) else params)
            # SQLite stays locked by a statement that failed, as long as its cursor is open.
            cursor.close()
            raise
        return cursor


class Selection(Statement):
    """A SELECT, with what turns its rows into Python values.

    Args:
        queryset: what it selects.
        connection: the database that it is for.
        keyed: whether it finds its rows by a key, so that one plan is the best for all values.
    """

    def __init__(
        self, queryset: QuerySet[Any, Any], connection: BaseDatabaseWrapper, *, keyed: bool
    ) -> None:
        compiler: Any = queryset.query.get_compiler(connection.alias)
        sql, params = compiler.as_sql()
        super().__init__(sql, params, connection, keyed=keyed)
        expressions = [selected[0] for selected in compiler.select]
        self._compiler = compiler
        self._converters = compiler.get_converters(expressions)
        if keyed and dialect_of(connection).binds_on_server:
            for place, expression in enumerate(expressions):
                if isinstance(expression.output_field, DateTimeField):
                    self._converters[place] = [_in_its_time_zone], expression

    def rows(self, connection: BaseDatabaseWrapper, values: dict[str, Any]) -> list[Any]:
        """Return the rows, as tuples or lists of Python values."""
        cursor = self.execute(connection, values)
        with connection.wrap_database_errors:
            # What Django has around the driver's cursor takes longer than to fetch a row.
            try:
                rows: Any = cursor.cursor.fetchall()
            finally:
                cursor.cursor.close()
        if self._converters:
            rows = self._compiler.apply_converters(rows, self._converters)
        return list(rows)


def _cursor_of(connection: Any, keyed: bool) -> Callable[[Any], CursorWrapper]:
    """Return what makes the cursors for a statement on a database."""
    if keyed and dialect_of(connection).binds_on_server:
        from django.db.backends.postgresql.psycopg_any import is_psycopg3

        if is_psycopg3:
            from workflow_storage.backends.orm.postgresql import keyed_cursor

            return keyed_cursor
    return operator.methodcaller("cursor")


def _in_its_time_zone(value: Any, expression: object, connection: Any) -> Any:
    """Do for a time in binary what Django has done for one in text."""
    return value and value.replace(tzinfo=connection.timezone)


class Queries(Generic[_M]):
    """The compiled queries on one model in one database.

    Args:
        model: the model.
        alias: the database's name in DATABASES.
    """

    def __init__(self, model: type[_M], alias: str) -> None:
        self.model = model
        self.alias = alias
        self._names = [field.attname for field in model._meta.concrete_fields]

    def rows(
        self,
        key: Hashable,
        build: Callable[[], QuerySet[Any, Any]],
        *,
        keyed: bool,
        **values: Any,
    ) -> list[Any]:
        """Return the rows of a query that selects values.

        Args:
            key: what tells the query from the others on this model.
            build: makes the query, with a `Parameter` for each value.
            keyed: whether it finds its rows by a key; see `Statement`.
            **values: the values of its parameters.
        """
        connection = connection_of(self.alias)
        kept = _kept_by(connection)
        key = (self.model, key)
        selection: Selection | None = kept.get(key)
        if selection is None:
            selection = kept[key] = Selection(build(), connection, keyed=keyed)
        return selection.rows(connection, values)

    def objects(
        self,
        key: Hashable,
        build: Callable[[], QuerySet[_M, _M]],
        *,
        keyed: bool,
        **values: Any,
    ) -> list[_M]:
        """Return the objects of a query that selects the whole model; see `rows`."""
        return [
            self.model.from_db(self.alias, self._names, row)
            for row in self.rows(key, build, keyed=keyed, **values)
        ]

    def update(
        self,
        key: Hashable,
        build: Callable[[], QuerySet[_M, _M]],
        changes: Callable[[], Iterable[tuple[str, Any]]],
        **values: Any,
    ) -> int:
        """Change the rows of a query.

        Args:
            key: what tells the query from the others, its columns included.
            build: makes the query that selects the rows.
            changes: makes the columns, each with the expression for it.
            **values: the values of the parameters of both.

        Returns:
            How many rows the query selected.
        """
        connection = connection_of(self.alias)
        kept = _kept_by(connection)
        key = (self.model, key)
        statement: Statement | None = kept.get(key)
        if statement is None:
            query: Any = build().query.chain(UpdateQuery)
            query.add_update_values(dict(changes()))
            query.annotations = {}
            sql, params = query.get_compiler(self.alias).as_sql()
            statement = kept[key] = Statement(sql, params, connection)
        with statement.execute(connection, values) as cursor:
            return int(cursor.rowcount)

    def insert(
        self,
        returning: Sequence[str] = (),
        computed: Callable[[], dict[str, Expression]] = dict,
        **values: Any,
    ) -> Sequence[Any]:
        """Insert a row.

        Args:
            returning: columns to give back; where the database gives back none, only the
                primary key can be one.
            computed: makes the expressions for columns that the database computes.
            **values: the other columns, and values of parameters in the expressions.

        Returns:
            What is in the columns of `returning`.
        """
        connection = connection_of(self.alias)
        kept = _kept_by(connection)
        key = (self.model, "insert", computed, *returning, *values)
        statement: Statement | None = kept.get(key)
        if statement is None:
            statement = kept[key] = self._insertion(connection, returning, computed, values)
        with statement.execute(connection, values) as cursor:
            if not returning:
                return ()
            if connection.features.can_return_columns_from_insert:
                row: Sequence[Any] = cursor.fetchone()
                return row
            meta = self.model._meta
            key_field: Any = meta.get_field(*returning)
            return (connection.ops.last_insert_id(cursor, meta.db_table, key_field.column),)

    def put(self, unique: Sequence[str], *, replace: bool, **values: Any) -> None:
        """Insert a row, unless there is one with the same unique fields.

        Args:
            unique: those fields, for which the database has a constraint.
            replace: whether to change that row then, rather than to leave it as it is.
            **values: the columns.
        """
        connection = connection_of(self.alias)
        kept = _kept_by(connection)
        key = (self.model, "put", replace, *values)
        statement: Statement | None = kept.get(key)
        if statement is None:
            conflict = self._conflict(connection, unique, values) if replace else _IGNORED
            statement = kept[key] = self._insertion(connection, (), dict, values, conflict)
        statement.execute(connection, values).close()

    def _conflict(
        self, connection: BaseDatabaseWrapper, unique: Sequence[str], names: Iterable[str]
    ) -> dict[str, Any]:
        """Return how a row is changed that is there, as Django's query for an INSERT takes it."""
        fields = [self.model._meta.get_field(name) for name in unique]
        changed = [self.model._meta.get_field(name) for name in names if name not in unique]
        named = fields if connection.features.supports_update_conflicts_with_target else []
        return {
            "on_conflict": OnConflict.UPDATE,
            "update_fields": changed,
            "unique_fields": named,
        }

    def execute(
        self,
        key: Hashable,
        build: Callable[[BaseDatabaseWrapper], tuple[str, list[Any]]],
        **values: Any,
    ) -> CursorWrapper:
        """Execute a statement that is written in SQL.

        Args:
            key: what tells it from the others on this model.
            build: makes the SQL for a database, and what fills its places: values, or a
                `Parameter` for each of those that differ.
            **values: the values of its parameters.
        """
        connection = connection_of(self.alias)
        kept = _kept_by(connection)
        key = (self.model, key)
        statement: Statement | None = kept.get(key)
        if statement is None:
            sql, params = build(connection)
            statement = kept[key] = Statement(sql, params, connection)
        return statement.execute(connection, values)

    def _insertion(
        self,
        connection: BaseDatabaseWrapper,
        returning: Sequence[str],
        computed: Callable[[], dict[str, Expression]],
        names: Iterable[str],
        conflict: Mapping[str, Any] = MappingProxyType({}),
    ) -> Statement:
        meta = self.model._meta
        columns: dict[str, Any] = computed()
        for name in names:
            field: Any = meta.get_field(name)
            columns[name] = Parameter(name, field, for_save=True)
        fields = [field for field in meta.concrete_fields if field.attname in columns]
        query: Any = InsertQuery(self.model, **conflict)
        query.insert_values(fields, [SimpleNamespace(**columns)], raw=True)
        compiler: Any = query.get_compiler(self.alias)
        compiler.returning_fields = [meta.get_field(name) for name in returning] or None
        [(sql, params)] = compiler.as_sql()
        return Statement(sql, params, connection)


def delete_rows(rows: QuerySet[Any]) -> int:
    """Delete rows without loading them, and without signals; return how many there were.

    Only where a model of the project refers to them, Django collects what goes with them.
    """
    if rows.model._meta.related_objects:
        return rows.delete()[0]
    # None for a query that Django knows to find nothing.
    return int(rows._raw_delete(rows.db) or 0)  # noqa: SLF001 - nothing else sends no signals


def _kept_by(connection: BaseDatabaseWrapper) -> dict[Hashable, Any]:
    """Return the compiled queries of a connection, which go when it does.

    They refer to it, so that nothing that outlives it may hold them.
    """
    kept: dict[Hashable, Any] | None = vars(connection).get(_KEPT)
    if kept is None or len(kept) >= MAX_QUERIES:
        kept = vars(connection)[_KEPT] = {}
    return kept


_KEPT = "_workflow_storage_queries"


@receiver(setting_changed)
def _compile_anew(*, setting: str, **kwargs: object) -> None:
    """Forget what was compiled when a test changes what it depends on."""
    if setting == "USE_TZ":
        for connection in connections.all(initialized_only=True):
            vars(connection).pop(_KEPT, None)

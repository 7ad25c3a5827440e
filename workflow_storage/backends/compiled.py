"""Queries that Django compiles once for each connection, for the repositories of orm.py.

Building and compiling a small query takes the ORM several times longer than the database
takes to answer it. Here a `QuerySet` is built once with a `Parameter` in place of each
value; its SQL, its parameters' conversions and its rows' conversions are Django's own, and
are kept. What a query is built from besides its parameters (which filters, which limit) is
its key.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from weakref import WeakKeyDictionary

from django.db import connections
from django.db.models import CharField, Model, QuerySet, TextField
from django.db.models.expressions import Expression
from django.db.models.sql import InsertQuery, UpdateQuery

from workflow_storage.validation import plain_text

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Sequence

    from django.db.backends.base.base import BaseDatabaseWrapper
    from django.db.backends.utils import CursorWrapper

_M = TypeVar("_M", bound=Model)

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
        """Give this parameter's value as the driver takes it."""
        value = values[self.name]
        if isinstance(value, str):
            value = plain_text(value)
        if self.as_it_is:
            return value
        if self.for_save:
            return self.output_field.get_db_prep_save(value, connection)
        return self.output_field.get_db_prep_value(value, connection)


@dataclass(slots=True)
class Statement:
    """SQL with parameters to be filled in."""

    sql: str
    params: Sequence[Any]

    def execute(
        self, cursor: CursorWrapper, connection: BaseDatabaseWrapper, values: dict[str, Any]
    ) -> None:
        """Execute the statement with the values of its parameters, by name."""
        cursor.execute(
            self.sql,
            [
                param.prepared(values, connection) if isinstance(param, Parameter) else param
                for param in self.params
            ],
        )


@dataclass(slots=True)
class Selection(Statement):
    """A SELECT, with what turns its rows into Python values."""

    compiler: Any
    converters: Any

    @classmethod
    def of(cls, queryset: QuerySet[Any, Any], alias: str) -> Selection:
        """Compile a query."""
        compiler: Any = queryset.query.get_compiler(alias)
        sql, params = compiler.as_sql()
        expressions = [selected[0] for selected in compiler.select]
        return cls(sql, params, compiler, compiler.get_converters(expressions))

    def rows(self, connection: BaseDatabaseWrapper, values: dict[str, Any]) -> list[Any]:
        """Give the rows, as tuples or lists of Python values."""
        with connection.cursor() as cursor:
            self.execute(cursor, connection, values)
            rows: Any = cursor.fetchall()
        if self.converters:
            rows = self.compiler.apply_converters(rows, self.converters)
        return list(rows)


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
        self._kept: WeakKeyDictionary[BaseDatabaseWrapper, dict[Hashable, Any]] = (
            WeakKeyDictionary()
        )

    def rows(
        self, key: Hashable, build: Callable[[], QuerySet[Any, Any]], **values: Any
    ) -> list[Any]:
        """Give the rows of a query that selects values.

        Args:
            key: what tells the query from the others on this model.
            build: makes the query, with a `Parameter` for each value.
            **values: the values of its parameters.
        """
        connection = connections[self.alias]
        selection: Selection = self._compiled(
            connection, key, lambda: Selection.of(build(), self.alias)
        )
        return selection.rows(connection, values)

    def objects(
        self, key: Hashable, build: Callable[[], QuerySet[_M, _M]], **values: Any
    ) -> list[_M]:
        """Give the objects of a query that selects the whole model; see `rows`."""
        return [
            self.model.from_db(self.alias, self._names, row)
            for row in self.rows(key, build, **values)
        ]

    def update(
        self,
        key: Hashable,
        build: Callable[[], QuerySet[_M, _M]],
        changes: Iterable[tuple[str, Any]],
        **values: Any,
    ) -> int:
        """Change the rows of a query.

        Args:
            key: what tells the query from the others, its columns included.
            build: makes the query that selects the rows.
            changes: the columns, each with the expression for it.
            **values: the values of the parameters of both.

        Returns:
            How many rows the query selected.
        """
        connection = connections[self.alias]

        def compiled() -> Statement:
            query: Any = build().query.chain(UpdateQuery)
            query.add_update_values(dict(changes))
            query.annotations = {}
            return Statement(*query.get_compiler(self.alias).as_sql())

        statement: Statement = self._compiled(connection, key, compiled)
        with connection.cursor() as cursor:
            statement.execute(cursor, connection, values)
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
        connection = connections[self.alias]
        meta = self.model._meta

        def compiled() -> Statement:
            query: Any = InsertQuery(self.model)
            columns = {
                field.attname: Parameter(field.attname, field, for_save=True)
                for field in meta.concrete_fields
                if field.attname in values
            } | computed()
            fields = [field for field in meta.concrete_fields if field.attname in columns]
            query.insert_values(fields, [SimpleNamespace(**columns)], raw=True)
            compiler: Any = query.get_compiler(self.alias)
            compiler.returning_fields = [meta.get_field(name) for name in returning] or None
            return Statement(*compiler.as_sql()[0])

        statement: Statement = self._compiled(
            connection, ("insert", computed, *returning, *values), compiled
        )
        with connection.cursor() as cursor:
            statement.execute(cursor, connection, values)
            if not returning:
                return ()
            if connection.features.can_return_columns_from_insert:
                row: Sequence[Any] = cursor.fetchone()
                return row
            key: Any = meta.get_field(*returning)
            return (connection.ops.last_insert_id(cursor, meta.db_table, key.column),)

    def _compiled(
        self, connection: BaseDatabaseWrapper, key: Hashable, make: Callable[[], Any]
    ) -> Any:
        kept = self._kept.get(connection)
        if kept is None or len(kept) >= MAX_QUERIES:
            kept = self._kept[connection] = {}
        compiled = kept.get(key)
        if compiled is None:
            compiled = kept[key] = make()
        return compiled

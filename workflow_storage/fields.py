"""Model fields that hold exactly what they are given, on every database, for models.py.

`ExactJSONField` keeps JSON as the text that was written, so that no database rounds a
number or refuses a character; a lookup parses it in the query. The text fields compare
byte for byte, so that ``"A"``, ``"a"`` and ``"a "`` are three values everywhere and sort
by code point.
"""

from __future__ import annotations

import json
import re
from functools import partial
from typing import TYPE_CHECKING, Any

from django.core.exceptions import FieldError
from django.db import NotSupportedError, models
from django.db.models import Value
from django.db.models.constants import LOOKUP_SEP
from django.db.models.fields.json import (
    HasKeyLookup,
    JSONExact,
    KeyTextTransform,
    KeyTransform,
    KeyTransformFactory,
    KeyTransformTextLookupMixin,
)
from django.db.models.lookups import Exact, In, Lookup
from django.db.models.sql.query import Query

from workflow_storage.exceptions import DamagedFieldError
from workflow_storage.serialization import dump_json, is_deeper, is_utf8, load_json, payload_json

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper
    from django.db.models.expressions import Expression
    from django.db.models.sql.compiler import SQLCompiler

    _FieldBase = models.Field[Any, Any]
    _JSONField = models.JSONField[Any, Any]
    _CharField = models.CharField[Any, Any]
    _TextField = models.TextField[Any, Any]
else:
    _FieldBase = object
    _JSONField = models.JSONField
    _CharField = models.CharField
    _TextField = models.TextField


class _ByteForByte(_FieldBase):
    """A text column whose values are equal only if their bytes are, and sort by them."""

    def db_parameters(self, connection: BaseDatabaseWrapper) -> Any:
        return {**super().db_parameters(connection), "collation": self._collation(connection)}

    @staticmethod
    def _collation(connection: Any) -> str | None:
        if connection.vendor == "postgresql":
            return "C"
        if connection.vendor == "mysql":
            # Their defaults ignore case and trailing spaces. Both names imply utf8mb4.
            return "utf8mb4_nopad_bin" if connection.mysql_is_mariadb else "utf8mb4_0900_bin"
        return None  # SQLite compares bytes by default.


class ExactCharField(_ByteForByte, _CharField):
    """A CharField compared byte for byte on every database."""

    def db_type(self, connection: BaseDatabaseWrapper) -> str | None:
        if connection.vendor == "postgresql":
            # The long name of varchar: for the short one Django adds a second index for
            # LIKE to a primary key, which the "C" collation makes superfluous.
            return f"character varying({self.max_length})"
        return super().db_type(connection)


class ExactTextField(_ByteForByte, _TextField):
    """A TextField compared byte for byte on every database."""


class ExactJSONField(_ByteForByte, _JSONField):
    """A JSONField that gives back what it was given.

    The column is text on every database: PostgreSQL's jsonb refuses NUL and lone
    surrogates and turns ``1e23`` into an integer, MySQL's json rounds large integers,
    MariaDB's check refuses nesting deeper than 31, and PostgreSQL's json has no equality,
    so that ``.distinct()`` would fail. Key lookups, ``contains``, ``has_key`` and the
    rest are those of `django.db.models.JSONField`, on a document parsed in the query.

    Accepts what `workflow_storage.serialization.dump_json` accepts, else raises
    `InvalidFieldError`. None is SQL NULL.
    """

    def db_type(self, connection: BaseDatabaseWrapper) -> str | None:
        return str(connection.data_types["TextField"])

    def db_check(self, connection: BaseDatabaseWrapper) -> str | None:
        return None

    def cast_db_type(self, connection: BaseDatabaseWrapper) -> str | None:
        return self.db_type(connection)

    def get_db_prep_value(
        self, value: Any, connection: BaseDatabaseWrapper, prepared: bool = False
    ) -> Any:
        if value is None:
            return None
        text = payload_json(self.name, value)
        limit = _MAX_DEPTH.get(_dialect(connection))
        return text + _TOO_DEEP if limit is not None and is_deeper(text, limit) else text

    def from_db_value(self, value: Any, expression: object, connection: BaseDatabaseWrapper) -> Any:
        if isinstance(expression, KeyTransform):
            return super().from_db_value(value, expression, connection)
        if value is None:
            return None
        try:
            return load_json(value)
        except ValueError as exc:
            raise DamagedFieldError(str(self.name), str(exc)) from exc

    def value_to_string(self, obj: models.Model) -> Any:
        """Return a value as ``dumpdata`` writes it, without escapes.

        UTF-8 has no form for a lone surrogate; a document that holds one is written as its text.
        """
        value = self.value_from_object(obj)
        is_plain = is_utf8(value) and _loaded(value) is value
        return value if is_plain else {_TEXT: dump_json(value)}

    def to_python(self, value: Any) -> Any:
        """Return a value as ``loaddata`` reads it."""
        return _loaded(value)

    def get_transform(self, lookup_name: str) -> Any:
        transform = _key_of(lookup_name, super().get_transform(lookup_name))
        return transform and (lambda lhs: transform(JSONDocument(lhs)))

    def get_lookup(self, lookup_name: str) -> Any:
        lookup = super().get_lookup(lookup_name)
        # NULL is a property of the column, not of the document in it.
        if lookup is None or lookup_name == "isnull":
            return lookup
        names_keys = issubclass(lookup, HasKeyLookup)

        def build(lhs: Expression, rhs: Any) -> Any:
            return lookup(JSONDocument(lhs), rhs if names_keys else _as_document(rhs))

        return build


_TEXT = "JSON text, for it holds a lone surrogate"


def _loaded(value: Any) -> Any:
    """Return what a value stands for in a file of ``dumpdata``; the value itself, if just that."""
    try:
        if isinstance(value, str) and _TEXT in value:  # from XML, still to be parsed
            document = load_json(value)
            loaded = _loaded(document)
            return value if loaded is document else json.dumps(loaded)
        if isinstance(value, dict) and value.keys() == {_TEXT}:
            loaded = load_json(value[_TEXT])
            # Of those that forms and scripts give, too, only what is written so is meant so.
            return value if is_utf8(loaded) and _loaded(loaded) is loaded else loaded
    except (TypeError, ValueError):
        pass
    return value


class _DocumentField(_JSONField):
    """The type of a parsed document: Django's own, written the way the column is."""

    def get_db_prep_value(
        self, value: Any, connection: BaseDatabaseWrapper, prepared: bool = False
    ) -> Any:
        text = dump_json(value)
        if connection.vendor == "postgresql":
            readable = load_json(_ESCAPE.sub(_readable, text))
            return super().get_db_prep_value(readable, connection, prepared)
        limit = _MAX_DEPTH.get(_dialect(connection))
        if limit is not None and is_deeper(text, limit):
            raise NotSupportedError(
                f"{connection.display_name} reads no JSON that is nested deeper than {limit} levels,"
                " so nothing can be compared with this value. Look up a part of it."
            )
        # SQLite and MariaDB compare documents as text.
        return text

    def get_transform(self, lookup_name: str) -> Any:
        return _key_of(lookup_name, super().get_transform(lookup_name))


def _key_of(name: str, transform: Any) -> Any:
    """Return what looks up a key in a document, in place of Django's."""
    return partial(_Key, name) if isinstance(transform, KeyTransformFactory) else transform


class _Key(KeyTransform):
    """The value of a key of a document."""

    def get_lookup(self, lookup: str) -> Any:
        found = super().get_lookup(lookup)
        if found is None or not issubclass(found, KeyTransformTextLookupMixin):
            return found

        def build(lhs: Any, rhs: Any) -> Any:
            built = found(lhs, rhs)
            built.lhs = _KeyText(lhs.key_name, *lhs.source_expressions)
            return built

        return build


class _KeyText(KeyTextTransform):
    """The same as text."""

    def as_mysql(self, compiler: SQLCompiler, connection: BaseDatabaseWrapper) -> Any:
        # Django's takes MySQL's operator for it, which is for columns only.
        sql, params = KeyTransform.as_mysql(self, compiler, connection)
        return f"JSON_UNQUOTE({sql})", params


def _as_document(rhs: Any) -> Any:
    """Return the other side of a lookup so that it compares with a parsed document."""
    if isinstance(rhs, Query):
        rhs = rhs.clone()
        rhs.select = tuple(map(_as_document, rhs.select))
        return rhs
    if isinstance(rhs, Value) and isinstance(_type_of(rhs), models.JSONField):
        return rhs if rhs.value is None else rhs.value
    return JSONDocument(rhs) if hasattr(rhs, "resolve_expression") else rhs


class JSONDocument(models.Func):
    """The text of an `ExactJSONField`, parsed by the database for a lookup; or what is parsed."""

    output_field = _DocumentField()
    arity = 1

    def as_sql(
        self, compiler: SQLCompiler, connection: BaseDatabaseWrapper, *_: Any, **__: Any
    ) -> Any:
        (source,) = self.get_source_expressions()
        column, params = compiler.compile(source)
        is_text = isinstance(_type_of(source), ExactJSONField)
        if not is_text or isinstance(source, KeyTransform):
            return column, params
        template = _DOCUMENT_SQL[_dialect(connection)]
        all_params: list[Any] = []
        for part in _PLACE.findall(template):
            all_params += params if part == "{}" else [_PATTERNS[part]]
        return _PLACE.sub(lambda part: column if part[0] == "{}" else "%s", template), all_params


def _type_of(expression: Any) -> object:
    """Return the field that says of which type an expression is; None if none does."""
    try:
        return expression.output_field
    except FieldError:
        return None


@ExactJSONField.register_lookup
class _DocumentExact(JSONExact):
    """Whether a document is a value, or another document."""

    def process_rhs(self, compiler: SQLCompiler, connection: BaseDatabaseWrapper) -> Any:
        if self.rhs_is_direct_value():
            return super().process_rhs(compiler, connection)
        # Django takes each parameter of the other side for a value.
        return Exact.process_rhs(self, compiler, connection)


@ExactJSONField.register_lookup
class _DocumentIn(In):
    """Whether a document is one of some values."""

    def get_prep_lookup(self) -> Any:
        if isinstance(self.rhs, list | tuple | set | frozenset):
            self.rhs = [_as_document(value) for value in self.rhs]
        return super().get_prep_lookup()

    def process_lhs(
        self, compiler: SQLCompiler, connection: BaseDatabaseWrapper, lhs: Any = None
    ) -> Any:
        # Django's takes the quotes off one side, on MariaDB.
        sql, params = Lookup.process_lhs(self, compiler, connection, lhs)
        return _comparable(sql, connection), params

    def process_rhs(self, compiler: SQLCompiler, connection: BaseDatabaseWrapper) -> Any:
        if isinstance(self.rhs, Query):
            self.rhs.select = tuple(_Comparable(column) for column in self.rhs.select)
        return super().process_rhs(compiler, connection)

    def resolve_expression_parameter(
        self, compiler: SQLCompiler, connection: BaseDatabaseWrapper, sql: str, param: Any
    ) -> Any:
        sql, params = super().resolve_expression_parameter(compiler, connection, sql, param)
        if connection.vendor == "mysql" and not hasattr(param, "resolve_expression"):
            sql = "JSON_EXTRACT(%s, '$')"  # as Django's JSONExact has it
        return _comparable(sql, connection), params


class _Comparable(models.Func):
    """A document that is one of several."""

    arity = 1

    def as_sql(
        self, compiler: SQLCompiler, connection: BaseDatabaseWrapper, *_: Any, **__: Any
    ) -> Any:
        sql, params = compiler.compile(self.get_source_expressions()[0])
        return _comparable(sql, connection), params


def _comparable(sql: str, connection: BaseDatabaseWrapper) -> str:
    # MariaDB compares texts with or without their quotes, depending on what else there is.
    return f"CONCAT({sql})" if _dialect(connection) == "mariadb" else sql


def KT(lookup: str) -> Expression:
    """Return the text of a key, as ``django.db.models.fields.json.KT`` does of a JSONField.

    Django's own reads the column as if it were JSON, and not text.

    Args:
        lookup: such as ``inputs__customer__name``.
    """
    name, *keys = lookup.split(LOOKUP_SEP)
    if not keys:
        raise ValueError("Lookup must contain key or index transforms.")
    text: Any = JSONDocument(name)
    for key in keys:
        text = _KeyText(key, text)
    # Django would compare the key itself as JSON.
    return models.ExpressionWrapper(text, output_field=models.TextField())


def _dialect(connection: Any) -> str:
    if connection.vendor == "mysql":
        return "mariadb" if connection.mysql_is_mariadb else "mysql"
    return str(connection.vendor) if connection.vendor in _DOCUMENT_SQL else "other"


# jsonb refuses \u0000 and lone surrogates, so these become U+FFFD before the cast. Regular
# expressions have no conditional replacement; hence in two steps, reading the text from
# left to right: first \uFFFD goes behind every token that stays (an escaped backslash, a
# pair of surrogates) and in place of every one that goes, then the former are taken back.
# dump_json writes hexadecimal digits in lower case, so \uFFFD is never the caller's.
_STAYS = r"(\\\\|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})"
_GOES = r"\\u(?:0000|[dD][89a-fA-F][0-9a-fA-F]{2})"
_POSTGRESQL = (
    r"(CASE WHEN strpos({}, '\u') = 0 THEN {} ELSE "
    rf"regexp_replace(regexp_replace({{}}, '{_STAYS}|{_GOES}', '\1\\uFFFD', 'g'), "
    rf"'{_STAYS}\\uFFFD', '\1', 'g') END)::jsonb"
)

# Patterns for MariaDB (PCRE) go as parameters: whether a backslash escapes in a literal is a
# setting there. (*SKIP)(*FAIL) passes over the tokens that stay.
_PATTERNS = {
    "{escape}": r"\ud",
    "{lone}": rf"{_STAYS}(*SKIP)(*FAIL)|\\u[dD][89a-fA-F][0-9a-fA-F]{{2}}",
    "{replacement}": r"\\ufffd",
    # MySQL (ICU) knows no (*SKIP), and does as PostgreSQL does above.
    "{lone or not}": rf"{_STAYS}|\\u[dD][89a-fA-F][0-9a-fA-F]{{2}}",
    "{marked}": r"$1\\uFFFD",
    "{not lone}": rf"{_STAYS}\\uFFFD",
    "{same}": "$1",
}
_PLACE = re.compile("|".join(map(re.escape, ["{}", *_PATTERNS])))

# The same in Python, for the other side of a lookup.
_ESCAPE = re.compile(rf"{_STAYS}|{_GOES}")


def _readable(token: re.Match[str]) -> str:
    return token[1] or r"\ufffd"


# MySQL has no function that tells so, but fails (3157): what is deeper ends in a space there.
_MAX_DEPTH = {"mysql": 100}
_TOO_DEEP = " "

# Bytes in which MySQL looks for lone surrogates. Beyond four times as many, of nothing but
# backslashes, it gave up and failed the query (3699, with regexp_time_limit as it comes).
_MYSQL_PATIENCE = 65_536

# A document nested deeper than the database parses (SQLite 1000 to 2000 levels, MySQL 100,
# MariaDB 31) must not fail the query for all the others: it matches no lookup.
_DOCUMENT_SQL = {
    "postgresql": _POSTGRESQL,
    "sqlite": "(CASE WHEN JSON_VALID({}) THEN {} END)",
    "mysql": (
        f"(CASE WHEN RIGHT({{}}, 1) = '{_TOO_DEEP}' THEN NULL "
        "WHEN INSTR({}, {escape}) = 0 THEN CASE WHEN JSON_VALID({}) THEN CAST({} AS JSON) END "
        f"WHEN LENGTH({{}}) <= {_MYSQL_PATIENCE} THEN CAST("
        "REGEXP_REPLACE(REGEXP_REPLACE({}, {lone or not}, {marked}), {not lone}, {same}) AS JSON) END)"
    ),
    # JSON_EXTRACT also spaces documents the way that it spaces what they are compared with.
    "mariadb": (
        "JSON_EXTRACT(CASE WHEN INSTR({}, {escape}) = 0 THEN {} "
        "ELSE REGEXP_REPLACE({}, {lone}, {replacement}) END, '$')"
    ),
    "other": "{}",
}

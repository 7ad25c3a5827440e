"""Model fields that hold exactly what they are given, on every database, for models.py.

`ExactJSONField` keeps JSON as the text that was written, so that no database rounds a
number or refuses a character; a lookup parses it in the query. The text fields compare
byte for byte, so that ``"A"``, ``"a"`` and ``"a "`` are three values everywhere and sort
by code point.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from django.db import models

from workflow_storage.exceptions import StorageError
from workflow_storage.serialization import dump_json, is_utf8, load_json, payload_json

if TYPE_CHECKING:
    from collections.abc import Callable

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
        return None if value is None else payload_json(self.name, value)

    def from_db_value(self, value: Any, expression: object, connection: BaseDatabaseWrapper) -> Any:
        if not isinstance(value, str):
            return value  # NULL, or the value of a key
        try:
            return load_json(value)
        except ValueError as exc:
            raise StorageError(f"{self.name} cannot be read: {exc}") from exc

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
        return _on_document(super().get_transform(lookup_name))

    def get_lookup(self, lookup_name: str) -> Any:
        lookup = super().get_lookup(lookup_name)
        # NULL is a property of the column, not of the document in it.
        return lookup if lookup_name == "isnull" else _on_document(lookup)


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
        if connection.vendor == "postgresql":
            readable = load_json(_ESCAPE.sub(_readable, dump_json(value)))
            return super().get_db_prep_value(readable, connection, prepared)
        # SQLite and MariaDB compare documents as text.
        return dump_json(value)


def _on_document(lookup: Callable[..., Any] | None) -> Any:
    if lookup is None:
        return None

    def build(lhs: Expression, *args: Any) -> Any:
        return lookup(JSONDocument(lhs), *args)

    return build


class JSONDocument(models.Func):
    """The text of an `ExactJSONField`, parsed by the database for a lookup."""

    output_field = _DocumentField()
    arity = 1

    def as_sql(
        self, compiler: SQLCompiler, connection: BaseDatabaseWrapper, *_: Any, **__: Any
    ) -> Any:
        template = _DOCUMENT_SQL[self._dialect(connection)]
        column, params = compiler.compile(self.get_source_expressions()[0])
        all_params: list[Any] = []
        for part in _PLACE.findall(template):
            all_params += params if part == "{}" else [_PATTERNS[part]]
        return _PLACE.sub(lambda part: column if part[0] == "{}" else "%s", template), all_params

    @staticmethod
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
}
_PLACE = re.compile("|".join(map(re.escape, ["{}", *_PATTERNS])))

# The same in Python, for the other side of a lookup.
_ESCAPE = re.compile(rf"{_STAYS}|{_GOES}")


def _readable(token: re.Match[str]) -> str:
    return token[1] or r"\ufffd"


# A document nested deeper than the database parses (SQLite 1000 to 2000 levels, MySQL 100,
# MariaDB 31) must not fail the query for all the others: it matches no lookup.
_DOCUMENT_SQL = {
    "postgresql": _POSTGRESQL,
    "sqlite": "(CASE WHEN JSON_VALID({}) THEN {} END)",
    "mysql": "(CASE WHEN JSON_VALID({}) THEN CAST({} AS JSON) END)",
    # JSON_EXTRACT also spaces documents the way that it spaces what they are compared with.
    "mariadb": (
        "JSON_EXTRACT(CASE WHEN INSTR({}, {escape}) = 0 THEN {} "
        "ELSE REGEXP_REPLACE({}, {lone}, {replacement}) END, '$')"
    ),
    "other": "{}",
}

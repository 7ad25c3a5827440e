"""Any JSON value, exactly, as text; for the fields, the backends and whoever checks a payload.

What comes out of `dump_json` is held unchanged by every database, and `load_json` reads it back
equal to what the json module would give.
"""

import json
import math
from collections.abc import Callable
from datetime import date, time, timedelta
from decimal import Decimal
from enum import Enum
from typing import Any, TypeVar
from uuid import UUID

import orjson
from pydantic import BaseModel
from pydantic_core import from_json, to_jsonable_python

from workflow_storage.exceptions import InvalidFieldError, InvalidPayloadError

_T = TypeVar("_T")

# datetime is a date.
_WITH_JSON_FORM = (date, time, timedelta, Decimal, UUID, Enum, BaseModel)


def _json_form(value: object) -> Any:
    if isinstance(value, Decimal) and not value.is_finite():
        raise ValueError(f"Out of range Decimal values are not JSON compliant: {value}")
    if isinstance(value, _WITH_JSON_FORM):
        return to_jsonable_python(value)
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")


_encoder, _ascii_encoder = (
    json.JSONEncoder(
        ensure_ascii=ascii_only, allow_nan=False, default=_json_form, separators=(",", ":")
    )
    for ascii_only in (False, True)
)
# What orjson would write in another form than the json module goes to the latter.
_ORJSON_OPTIONS = orjson.OPT_PASSTHROUGH_DATACLASS | orjson.OPT_PASSTHROUGH_DATETIME

_WITHOUT_NAN = frozenset({str, int, bool, type(None)})

_BY_ORJSON = b" "
"""Ends a state that orjson wrote, and so can read exactly; it is white space to JSON."""


def dump_json(value: object) -> str:
    r"""Write a value as JSON text that every database holds unchanged.

    ``load_json(dump_json(v)) == json.loads(json.dumps(v))`` for every value that
    ``json.dumps`` accepts, NaN and infinities excepted. Text outside ASCII is kept
    readable; only a document with a lone surrogate, which UTF-8 has no form for, is
    escaped as a whole. NUL is always escaped (``\u0000``), as JSON demands.

    Args:
        value: JSON values, and dates, times, timedeltas, Decimals, UUIDs, enumerations and
            pydantic models, which are written in their JSON form (ISO 8601 or plain
            strings, values, objects) and so come back as strings and dicts.

    Returns:
        JSON text, encodable as UTF-8, without NUL characters.

    Raises:
        TypeError: if a value or a key has no JSON form.
        ValueError: for NaN, an infinity, a circular reference, or nesting too deep.
    """
    text = _by_orjson(value)
    return _by_json(value) if text is None else text.decode()


def dump_state(state: object) -> bytes:
    """Write a state as JSON text in UTF-8; see `dump_json`."""
    text = _by_orjson(state)
    return _by_json(state).encode() if text is None else text + _BY_ORJSON


def load_rebuilt(text: bytes) -> Any:
    """Read a state that `apply_delta` rebuilt: its checksum says that `dump_state` wrote it.

    Raises:
        ValueError: if the state is nested too deeply for this Python.
    """
    return orjson.loads(text) if text.endswith(_BY_ORJSON) else load_json(text)


def _by_orjson(value: object) -> bytes | None:
    """Write a value some ten times as fast as the json module; None if that is not exact.

    orjson refuses what it has no exact form for: integers beyond 64 bits, lone surrogates,
    keys that are no text. But it writes NaN as null.
    """
    if isinstance(value, float):
        return None
    try:
        text = orjson.dumps(value, option=_ORJSON_OPTIONS)
    except TypeError:
        return None
    # Prose about data is full of the word, but looking closer takes longer than looking in
    # the value itself.
    if b"null" in text and _holds_nan(value):
        return None
    return text


def _holds_nan(value: object) -> bool:
    """Whether a value holds NaN or an infinity, at any depth."""
    rest: list[object] = [value]
    while rest:
        item = rest.pop()
        if item.__class__ in _WITHOUT_NAN:  # the quickest way past most of them
            continue
        if isinstance(item, float):
            if not math.isfinite(item):
                return True
        elif isinstance(item, dict):
            rest.extend(item.values())
        elif isinstance(item, list | tuple):
            rest.extend(item)
        elif isinstance(item, Enum):
            rest.append(item.value)
    return False


def _by_json(value: object) -> str:
    try:
        text = _encoder.encode(value)
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError:
                text = _ascii_encoder.encode(value)
    except RecursionError as exc:
        raise ValueError("it is nested too deeply for Python's json module") from exc
    return text


def load_json(text: str | bytes) -> Any:
    """Read what `dump_json` wrote, or any other JSON text, as ``json.loads`` does.

    Raises:
        ValueError: if the text is not JSON, or is nested too deeply for this Python.
    """
    try:
        return from_json(text, cache_strings="keys")
    except (ValueError, TypeError):
        # pydantic's parser takes about half the time. It refuses lone surrogates and nesting
        # deeper than 200, which the json module reads, and gives the same for all else that
        # the json module reads.
        return _load_by_json(text)


def _load_by_json(text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except RecursionError as exc:
        raise ValueError(
            "the stored JSON is nested too deeply for this Python; "
            "raise sys.setrecursionlimit() and read it again"
        ) from exc


def payload_json(field: str, value: object) -> str:
    """Return a payload as JSON text; see `dump_json`.

    Args:
        field: what the error calls it.
        value: the payload.

    Raises:
        InvalidPayloadError: if it, or something in it, has no JSON form.
        InvalidFieldError: for NaN, infinities, circular references, nesting too deep.
    """
    return _written(field, value, dump_json)


def state_text(state_data: object) -> bytes:
    """Return a state as JSON text in UTF-8.

    Raises:
        InvalidPayloadError: unless it is a dict of JSON values.
        InvalidFieldError: for NaN, infinities, circular references, nesting too deep.
    """
    if not isinstance(state_data, dict):
        raise InvalidPayloadError(
            f"state_data is a {type(state_data).__name__}, not a dict. "
            'Wrap it, for example as {"value": …}.'
        )
    return _written("state_data", state_data, dump_state)


def _written(field: str, value: object, write: Callable[[object], _T]) -> _T:
    try:
        return write(value)
    except TypeError as exc:
        raise InvalidPayloadError(
            f"{field} is not JSON: {exc}. Convert it to dicts, lists, strings or numbers first."
        ) from exc
    except ValueError as exc:
        raise InvalidFieldError(f"{field} is not JSON: {exc}. Replace that value first.") from exc

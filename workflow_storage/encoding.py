"""State and payload <-> JSON text, exactly; pure functions for fields and backends."""

import json
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

# datetime is a date.
_WITH_JSON_FORM = (date, time, timedelta, Decimal, UUID, BaseModel)


def _json_form(value: object) -> Any:
    if isinstance(value, Decimal) and not value.is_finite():
        raise ValueError(f"Out of range Decimal values are not JSON compliant: {value}")
    if isinstance(value, _WITH_JSON_FORM):
        return to_jsonable_python(value)
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")


_encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False, default=_json_form)
_ascii_encoder = json.JSONEncoder(ensure_ascii=True, allow_nan=False, default=_json_form)


def dump_json(value: object) -> str:
    r"""Write a value as JSON text that every database holds unchanged.

    ``load_json(dump_json(v)) == json.loads(json.dumps(v))`` for every value that
    ``json.dumps`` accepts, NaN and infinities excepted. Text outside ASCII is kept
    readable; only a document with a lone surrogate, which UTF-8 has no form for, is
    escaped as a whole. NUL is always escaped (``\u0000``), as JSON demands.

    Args:
        value: JSON values, and dates, times, timedeltas, Decimals, UUIDs and pydantic
            models, which are written in their JSON form (ISO 8601 or plain strings,
            objects) and so come back as strings and dicts.

    Returns:
        JSON text, encodable as UTF-8, without NUL characters.

    Raises:
        TypeError: if a value or a key has no JSON form.
        ValueError: for NaN, an infinity, a circular reference, or nesting too deep.
    """
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
    """Read what `dump_json` wrote.

    Raises:
        ValueError: if the text is not JSON, or is nested too deeply for this Python.
    """
    try:
        return json.loads(text)
    except RecursionError as exc:
        raise ValueError(
            "the stored JSON is nested too deeply for this Python; "
            "raise sys.setrecursionlimit() and read it again"
        ) from exc

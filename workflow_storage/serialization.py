"""Any JSON value, exactly, as text; for the fields, the backends and whoever checks a payload.

What comes out of `dump_json` is held unchanged by every database, and `load_json` reads it back
equal to what the json module would give. What has no JSON form is named by its path.
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Collection, Iterator
from datetime import date, time, timedelta
from decimal import Decimal
from enum import Enum
from typing import Any, TypeVar
from uuid import UUID

import orjson
from pydantic import BaseModel
from pydantic_core import (
    SchemaSerializer,
    from_json,
    to_jsonable_python,
)
from pydantic_core.core_schema import any_schema

from workflow_storage.ends import common_ends
from workflow_storage.exceptions import InvalidFieldError, InvalidPayloadError

_T = TypeVar("_T")

# datetime is a date.
_WITH_JSON_FORM = (date, time, timedelta, Decimal, UUID, Enum)

_to_python = SchemaSerializer(any_schema()).to_python


def _json_form(value: object) -> Any:
    """Return what stands for a value in JSON, where that is another value.

    Raises:
        TypeError, ValueError: that go on from the place of the value: "is a set. …".
    """
    if isinstance(value, Decimal) and not value.is_finite():
        raise ValueError(f"is {value}. {_ADVICE_ON_NUMBERS}")
    if isinstance(value, _WITH_JSON_FORM):
        return to_jsonable_python(value)
    if isinstance(value, BaseModel) or (
        dataclasses.is_dataclass(value) and not isinstance(value, type)
    ):
        return _form_of_model(value)
    raise TypeError(f"is a {_name_of(value)}. {_advice_on(value)}")


def _form_of_model(model: object) -> Any:
    # A value can be of a subclass of what its field is annotated with; the fields that it really
    # has are kept.
    try:
        form = to_jsonable_python(model, polymorphic_serialization=True)
    except Exception as exc:  # a serializer of the model's own can raise anything
        raise TypeError(f"is a {_name_of(model)} that pydantic cannot write: {exc}") from exc
    try:
        fields = _to_python(model, polymorphic_serialization=True)
    except TypeError:  # a set of models has no form in Python, though it has one in JSON
        fields = form
    if not _has_only_text_keys(fields):
        for keys in _colliding_keys(fields, _key_in_model):
            raise ValueError(f"holds a dict with {_as_one(*keys)}")
    if _may_hold_nan(form) and (_holds_nan(form) or _has_lost_nan(fields, form)):
        raise ValueError(f"holds NaN or an infinity. {_ADVICE_ON_NUMBERS}")
    return form


_encoder, _ascii_encoder = (
    json.JSONEncoder(
        ensure_ascii=ascii_only, allow_nan=False, default=_json_form, separators=(",", ":")
    )
    for ascii_only in (False, True)
)
# What orjson would write in another form than the json module goes to the latter.
_ORJSON_OPTIONS = orjson.OPT_PASSTHROUGH_DATACLASS | orjson.OPT_PASSTHROUGH_DATETIME

_WITHOUT_NAN = frozenset({str, int, bool, type(None)})
_SCALARS = _WITHOUT_NAN | {float}
_NEVER_NULL = _WITHOUT_NAN - {type(None)}

_BY_ORJSON = b" "
"""Ends a state that orjson wrote, and so can read exactly; it is white space to JSON."""


def dump_json(value: object) -> str:
    r"""Write a value as JSON text that every database holds unchanged.

    ``load_json(dump_json(v)) == json.loads(json.dumps(v))`` for every value that
    ``json.dumps`` accepts, NaN and infinities excepted. Text outside ASCII is kept
    readable; only a document with a lone surrogate, which UTF-8 has no form for, is
    escaped as a whole. NUL is always escaped (``\u0000``), as JSON demands.

    Args:
        value: JSON values, and dates, times, timedeltas, Decimals, UUIDs, enumerations,
            dataclasses and pydantic models, which are written in their JSON form (ISO 8601 or
            plain strings, values, objects) and so come back as strings and dicts. A model has
            the fields of the class that it really is, also where a field is annotated with a
            base class. They are called by their aliases, if they have any, so that
            ``Model.model_validate`` reads what comes back. A ``SecretStr`` comes back as
            ``**********``: what it hides is not stored.

    Returns:
        JSON text, encodable as UTF-8, without NUL characters.

    Raises:
        TypeError: if a value or a key has no JSON form.
        ValueError: for NaN, an infinity, two keys that are one in JSON (``1`` and ``"1"``), a
            circular reference, or nesting too deep.
    """
    text = _by_orjson(value)
    return _by_json(value) if text is None else text.decode()


def dump_state(state: object) -> bytes:
    """Write a state as JSON text in UTF-8; see `dump_json`."""
    return _checked_text(state, _orjson_text(state))


class StateTexts:
    """Writes the states of a run, one after another, as `dump_state` does.

    A NaN hides behind a null. Where there is none in the last state, what a large one has in common
    with its text is not looked through again.
    """

    def __init__(self) -> None:
        self._last: bytes | None = None
        self._has_null = False

    def dump(self, state: object) -> bytes:
        """Write a state as JSON text in UTF-8; see `dump_json`."""
        text = _orjson_text(state)
        if text is None or len(text) < _LARGE_STATE or self._has_null:
            return _checked_text(state, text)
        new = text
        if self._last is not None:
            start, end = common_ends(self._last, text)
            # With what is left of a null of which not all is in the middle.
            new = text[max(0, start - 4) : len(text) - end + 4]
        if _may_hold_null(new):
            self._has_null = _may_give_null(state)
            checked = _checked_text(state, text)
            self._last = None if self._has_null else checked
            return checked
        self._last = text + _BY_ORJSON
        return self._last


def _checked_text(state: object, text: bytes | None) -> bytes:
    """Return what `dump_state` does, from what orjson has written, if it has."""
    if text is None or _hides_nan(state, text):
        return _by_json(state).encode()
    return text + _BY_ORJSON


def load_rebuilt(text: bytes) -> Any:
    """Read a state that `apply_delta` rebuilt: its checksum says that `dump_state` wrote it.

    Raises:
        ValueError: if the state is nested too deeply for this Python.
    """
    return orjson.loads(text) if text.endswith(_BY_ORJSON) else load_json(text)


def _by_orjson(value: object) -> bytes | None:
    """Write a value some ten times as fast as the json module; None if that is not exact."""
    text = None if isinstance(value, float) else _orjson_text(value)
    return None if text is None or _hides_nan(value, text) else text


def _orjson_text(value: object) -> bytes | None:
    """Return what orjson writes, which is null for NaN; None if it refuses the value.

    It refuses what it has no exact form for: integers beyond 64 bits, lone surrogates, keys that
    are no text.
    """
    try:
        return orjson.dumps(value, default=_json_form, option=_ORJSON_OPTIONS)
    except TypeError:
        return None


def _hides_nan(value: object, text: bytes) -> bool:
    """Whether orjson has written null for NaN or an infinity."""
    # Where values are large, looking at them all is quicker than looking for null in the text, and
    # where they are many, it is not.
    holds_nan = _holds_nan(value, at_most=len(text) // _LARGE_VALUE)
    if holds_nan is None:
        holds_nan = _may_hold_null(text) and _holds_nan(value)
    return bool(holds_nan)


_LARGE_VALUE = 256  # bytes
_LARGE_STATE = 1 << 14
"""Bytes from which on it pays to look at what has changed alone."""
_BEFORE_A_VALUE = (b"", b":", b",", b"[")
_AFTER_A_VALUE = (b"", b",", b"]", b"}")


def _may_hold_null(text: bytes) -> bool:
    """Whether null may occur in what orjson wrote, other than in text: prose has the word, too."""
    place = text.find(b"null")
    while place >= 0:
        before, after = text[place - 1 : place], text[place + 4 : place + 5]
        if before in _BEFORE_A_VALUE and after in _AFTER_A_VALUE:
            return True
        place = text.find(b"null", place + 4)
    return False


def _may_give_null(value: object) -> bool:
    """Whether there may be null for something in a value, at any depth, and not only in text."""
    rest: list[object] = [value]
    for item in rest:
        inner: Collection[object]
        if item.__class__ is dict:
            inner = item.values()
        elif item.__class__ is list or item.__class__ is tuple:
            inner = item
        elif item.__class__ is float and math.isfinite(item):
            continue
        else:
            return True
        rest += [one for one in inner if one.__class__ not in _NEVER_NULL]
    return False


def _holds_nan(value: object, at_most: float = math.inf) -> bool | None:
    """Whether a value holds NaN or an infinity, at any depth.

    Args:
        value: any value.
        at_most: how many values are looked at.

    Returns:
        None if there are more, and none that was looked at is one.
    """
    rest: list[object] = [value]
    seen = 0
    for item in rest:
        inner: Collection[object]
        if isinstance(item, dict):
            inner = item.values()
        elif isinstance(item, list | tuple | set | frozenset):
            inner = item
        elif isinstance(item, float):
            if not math.isfinite(item):
                return True
            continue
        elif isinstance(item, Enum):
            inner = (item.value,)
        else:
            continue
        seen += len(inner)
        if seen > at_most:
            return None
        # The quickest way past most of them.
        rest += [one for one in inner if one.__class__ not in _WITHOUT_NAN]
    return False


def _has_lost_nan(fields: object, form: object) -> bool:
    """Whether pydantic has made null of NaN or an infinity, as it does unless it is told."""
    rest = [(fields, form)]
    while rest:
        value, written = rest.pop()
        if isinstance(value, dict) and isinstance(written, dict):
            rest.extend(zip(value.values(), written.values(), strict=False))
        elif isinstance(written, list) and isinstance(value, list | tuple | set | frozenset):
            rest.extend(zip(value, written, strict=False))
        elif isinstance(value, float) and written is None and not math.isfinite(value):
            return True
    return False


def _by_json(value: object) -> str:
    try:
        if not _has_only_text_keys(value) and any(_colliding_keys(value, _key_in_json)):
            raise ValueError("two of its keys are one in JSON")
        text = _encoder.encode(value)
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError:
                text = _ascii_encoder.encode(value)
    except RecursionError as exc:
        raise ValueError(
            "it is nested too deeply for Python's json module. Flatten it first."
        ) from exc
    except (TypeError, ValueError) as exc:
        kind = TypeError if isinstance(exc, TypeError) else ValueError
        raise kind(_fault(value) or str(exc)) from exc
    return text


def _has_only_text_keys(value: object) -> bool:
    """Whether all keys, at any depth, are text for sure; told much faster than by looking."""
    try:
        orjson.dumps(value, default=_nothing, option=_ORJSON_OPTIONS)
    except TypeError:
        return False
    return True


def _may_hold_nan(form: object) -> bool:
    """Whether orjson writes null for something in a value, or cannot write it."""
    try:
        return b"null" in orjson.dumps(form, option=_ORJSON_OPTIONS)
    except TypeError:
        return True


def _nothing(value: object) -> object:
    # What is a tuple in another class is written as a list by the json module, too.
    return list(value) if isinstance(value, tuple) else None


def _colliding_keys(
    value: object, text_of: Callable[[object], object]
) -> Iterator[tuple[object, object]]:
    """Yield the keys of a dict, at any depth, that are written as the same text."""
    rest: list[object] = [value]
    seen = set()
    while rest:
        item = rest.pop()
        if not isinstance(item, dict | list | tuple) or id(item) in seen:
            continue
        seen.add(id(item))
        children = item.values() if isinstance(item, dict) else item
        rest += [child for child in children if child.__class__ not in _SCALARS]
        if isinstance(item, dict) and any(key.__class__ is not str for key in item):
            written: dict[object, object] = {}
            for key in item:
                other = written.setdefault(text_of(key), key)
                if other is not key:
                    yield other, key


def _key_in_json(key: object) -> object:
    """Return what the json module writes for a key; the key itself if it refuses it."""
    if isinstance(key, str):
        return str.__str__(key)
    if key is None or isinstance(key, bool):
        return json.dumps(key)
    if isinstance(key, int):
        return int.__repr__(key)
    return float.__repr__(key) if isinstance(key, float) else key


def _key_in_model(key: object) -> object:
    """Return what pydantic writes for a key."""
    if isinstance(key, str):
        return str.__str__(key)
    return next(iter(to_jsonable_python({key: None})))


def _fault(value: object) -> str | None:
    """Return what is the first thing in a value that keeps it from being written, and where."""
    rest: list[tuple[str, object]] = [("", value)]
    seen = set()
    while rest:
        path, item = rest.pop()
        place = path.removeprefix(".") or "it"
        if isinstance(item, dict | list | tuple):
            if id(item) in seen:
                continue
            seen.add(id(item))
        if isinstance(item, dict):
            for keys in _colliding_keys(dict.fromkeys(item), _key_in_json):
                return f"{place} has {_as_one(*keys)}"
            for key in item:
                fault = _fault_of_key(key)
                if fault:
                    return f"{place} has the key {key!r}, which {fault}"
            rest += reversed([(path + _step_to(key), child) for key, child in item.items()])
        elif isinstance(item, list | tuple):
            rest += reversed([(f"{path}[{place}]", child) for place, child in enumerate(item)])
        elif isinstance(item, float) and not math.isfinite(item):
            return f"{place} is {item}. {_ADVICE_ON_NUMBERS}"
        elif not isinstance(item, str | int | float | None):
            try:
                rest.append((path, _json_form(item)))
            except (TypeError, ValueError) as exc:
                return f"{place} {exc}"
    return None


def _fault_of_key(key: object) -> str | None:
    if not isinstance(key, str | int | float | None):
        return f"is a {_name_of(key)}. Use text, such as str(key)."
    if isinstance(key, float) and not math.isfinite(key):
        return "has no JSON form. Use text, such as str(key)."
    return None


def _step_to(key: object) -> str:
    text = str(_key_in_json(key))
    return f".{text}" if _PLAIN_KEY.fullmatch(text) else f"[{text!r}]"


def _as_one(one: object, other: object) -> str:
    return f"the keys {one!r} and {other!r}, which are one in JSON. Rename one of them."


def _name_of(value: object) -> str:
    kind = type(value)
    if kind.__module__ in {"builtins", "__main__"}:
        return kind.__qualname__
    return f"{kind.__module__}.{kind.__qualname__}"


def _advice_on(value: object) -> str:
    for kind, advice in _ADVICE.items():
        if isinstance(value, kind):
            return advice
    if hasattr(value, "tolist"):  # the arrays and numbers of numpy, and what is like them
        return "Write value.tolist()."
    return "Convert it to dicts, lists, strings or numbers first."


_STRING = re.compile(rb'"[^"]*+"')
_NO_BRACKETS = bytes(set(range(256)) - set(b'[]{}"'))
_ONE_KIND_OF_BRACKETS = bytes.maketrans(b"{}", b"[]")
_PLAIN_KEY = re.compile(r"[^\W\d]\w*")
_ADVICE_ON_NUMBERS = "JSON has no such number: write None, or leave it out."
_ADVICE: dict[type | tuple[type, ...], str] = {
    (bytes, bytearray, memoryview): (
        "Write base64.b64encode(value).decode(), or store it elsewhere and write where."
    ),
    (set, frozenset): "Write sorted(value), or list(value).",
}


def is_state_text(text: bytes) -> bool:
    """Whether text can be that of a state: what every database can hold, of an object.

    It is not parsed, which would take longer than to rebuild it.
    """
    if text[:64].lstrip()[:1] != b"{" or text[-64:].rstrip()[-1:] != b"}" or b"\0" in text:
        return False
    try:
        text.isascii() or text.decode()
    except UnicodeDecodeError:
        return False
    return True


def json_size(value: object) -> int:
    """Return about how many bytes a value has as JSON text.

    Args:
        value: what `load_json` has read.
    """
    if isinstance(value, str):
        return len(value)
    text = _by_orjson(value)
    return len(json.dumps(value)) if text is None else len(text)


def is_utf8(value: object) -> bool:
    """Whether UTF-8 has a form for all text in a value: whether it holds no lone surrogate."""
    if _by_orjson(value) is not None:
        return True
    try:
        _encoder.encode(value).encode()
    except UnicodeEncodeError:
        return False
    return True


def is_deeper(text: str, levels: int) -> bool:
    """Whether lists and dicts in JSON text are nested deeper than so many levels."""
    if text.count("[") + text.count("{") <= levels:
        return False
    unescaped = text.encode().replace(b"\\\\", b"").replace(b'\\"', b"")
    brackets = unescaped.translate(_ONE_KIND_OF_BRACKETS, _NO_BRACKETS)
    brackets = _STRING.sub(b"", brackets.replace(b'""', b""))
    for _ in range(levels):
        if not brackets:
            return False
        brackets = brackets.replace(b"[]", b"")
    return bool(brackets)


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
        InvalidFieldError: for NaN, infinities, keys that are one in JSON, circular references,
            nesting too deep.
    """
    return _written(field, value, dump_json)


def state_text(state_data: object, dump: Callable[[object], bytes] = dump_state) -> bytes:
    """Return a state as JSON text in UTF-8.

    Args:
        state_data: the state.
        dump: writes it; see `StateTexts`.

    Raises:
        InvalidPayloadError: unless it is a dict of JSON values, or a model whose JSON form is one.
        InvalidFieldError: for NaN, infinities, keys that are one in JSON, circular references,
            nesting too deep.
    """
    if not isinstance(state_data, dict):
        state_data = _written("state_data", state_data, _object_of)
    return _written("state_data", state_data, dump)


def _object_of(state: object) -> dict[str, Any]:
    """Return a state that is a model as a dict."""
    if isinstance(state, BaseModel) or (
        dataclasses.is_dataclass(state) and not isinstance(state, type)
    ):
        try:
            form = _json_form(state)
        except (TypeError, ValueError) as exc:
            kind = TypeError if isinstance(exc, TypeError) else ValueError
            raise kind(f"it {exc}") from exc
        if isinstance(form, dict):
            return form
    raise TypeError(
        f'it is a {_name_of(state)}, not an object. Wrap it, for example as {{"value": …}}.'
    )


def _written(field: str, value: object, write: Callable[[object], _T]) -> _T:
    try:
        return write(value)
    except TypeError as exc:
        raise InvalidPayloadError(f"{field} is not JSON: {exc}") from exc
    except ValueError as exc:
        raise InvalidFieldError(f"{field} is not JSON: {exc}") from exc

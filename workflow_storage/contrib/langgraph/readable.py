"""Stored values as JSON for the admin; no class is imported but those that LangGraph knows as safe."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.checkpoint.serde.types import _DeltaSnapshot
from pydantic import BaseModel

from workflow_storage.contrib.langgraph.chains import Texts
from workflow_storage.contrib.langgraph.packing import Packing, Stored
from workflow_storage.serialization import is_utf8

if TYPE_CHECKING:
    from workflow_storage.contrib.langgraph.rows import Found

_TYPES = ("msgpack", "null", "bytes", "bytearray")
"""What the serializer makes; whatever a serializer of the project's own makes is not read."""

_DEEPEST = 100
"""Levels of lists and dicts that are shown."""


class Unreadable(Exception):
    """A value cannot be shown; the message says why."""


def strict() -> Packing:
    """Return what reads stored values, and refuses classes that it does not know."""
    return Packing(JsonPlusSerializer(allowed_msgpack_modules=None, allowed_json_modules=None))


def values_of(found: Found) -> dict[str, Any]:
    """Return the values of all channels of a checkpoint as JSON; why not, for one that cannot be read."""
    packing = strict()
    texts = Texts(found.blobs, packing)
    row = found.row
    document = _loaded(packing, Stored(row.type, bytes(row.data)))
    inline = document.get("channel_values") if isinstance(document, dict) else None
    values = {channel: as_json(value) for channel, value in (inline or {}).items()}
    if not isinstance(document, dict):
        values["?"] = document
    for channel, blob_id in row.blobs.items():
        kind = found.blobs[blob_id].stored.type
        try:
            _refuse(kind)
            values[channel] = as_json(packing.value(texts.typed(blob_id)))
        except Exception as exc:  # whatever the bytes are
            values[channel] = f"({exc})"
    return dict(sorted(values.items()))


def writes_of(found: Found) -> list[tuple[str, str, Any]]:
    """Return the pending writes of a checkpoint: task, channel, and the value as JSON."""
    packing = strict()
    return [
        (
            write.task_id,
            write.channel,
            _loaded(packing, Stored(write.type, bytes(write.data))),
        )
        for write in found.writes
    ]


def as_json(value: Any, depth: int = 0) -> Any:
    """Return a value as JSON that is close to it."""
    if depth > _DEEPEST:
        return "…"
    if isinstance(value, _DeltaSnapshot):
        value = value.value
    if isinstance(value, BaseModel):
        value = dict(value)
    if isinstance(value, dict):
        return {_text(key): as_json(one, depth + 1) for key, one in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [as_json(one, depth + 1) for one in value]
    if isinstance(value, bytes | bytearray):
        return f"({len(value):,} bytes)"
    is_json = value is None or type(value) in (bool, int)
    is_json = is_json or (type(value) is float and math.isfinite(value))
    return value if is_json else _text(value)


def _text(value: object) -> str:
    text = str(value)
    return text if is_utf8(text) else repr(text)


def _loaded(packing: Packing, stored: Stored) -> Any:
    try:
        _refuse(stored.type)
        return as_json(packing.load(stored))
    except Exception as exc:  # whatever the bytes are
        return f"({exc})"


def _refuse(kind: str) -> None:
    if "+" in kind:
        raise Unreadable("encrypted")
    if kind not in _TYPES:
        raise Unreadable(f"made by a serializer of the project's own: {kind}")

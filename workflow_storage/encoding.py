"""State <-> JSON text <-> bytes, whole or as a delta; pure functions for fields and backends.

A state is stored whole, as its JSON text, or as a delta: a zstd frame (RFC 8878) that was
compressed with the text of an earlier state, its base, as prefix. The base of step i is
step ``i & (i - 1)``, which clears the lowest bit that is set: the skip-deltas of
Subversion's FSFS (subversion/libsvn_fs_fs/structure). So any state is rebuilt from at most
``log2(i) + 1`` stored ones, and a state that grows at each step is near its own size in
total, rather than near the square of the number of steps.
"""

import json
import math
import sys
from collections.abc import Mapping
from datetime import date, time, timedelta
from decimal import Decimal
from enum import Enum
from typing import Any, TypeVar
from uuid import UUID

import orjson
from pydantic import BaseModel
from pydantic_core import from_json, to_jsonable_python

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_R = TypeVar("_R")

SMALL_STATE = 4096
"""Bytes up to which a state is stored whole: readable in SQL, and read at once."""

_MAGIC = b"\x28\xb5\x2f\xfd"  # RFC 8878, section 3.1.1; no JSON text begins with it
_CHECKSUM_FLAG = 1 << 2
# Most states add little to their base; then the time is that of indexing the base, and the
# lowest level that still finds it is best. Where much is new, size is worth more time.
_LEVEL, _LEVEL_FOR_MUCH = 1, 7
_MUCH = 16  # a part of the state
_MIN_HASH_LOG = 14
_INDEXED_BY_HIGH_LEVEL = 1 << 20  # bytes of a prefix, at least
_MAX_WINDOW_LOG = 27  # what a decoder takes without asking: 128 MiB

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


def base_step(step: int) -> int:
    """Give the step whose state is the base of this one: 0 for a power of two, and so on."""
    return step & (step - 1)


def chain_steps(step: int) -> list[int]:
    """Give the steps whose stored states rebuild a state.

    Returns:
        The step, its base, the base's base, down to 0: at most ``log2(step) + 2`` steps.
    """
    steps = [step]
    while step:
        step = base_step(step)
        steps.append(step)
    return steps


def is_delta(stored: bytes) -> bool:
    """Whether a stored state is a delta, rather than JSON text."""
    return stored.startswith(_MAGIC)


def encode_state(state: bytes, base: bytes | None) -> bytes:
    """Encode the JSON text of a state for storing, against the JSON text of its base.

    Args:
        state: JSON text.
        base: the JSON text of the base, or None if there is none.

    Returns:
        A delta, or the state itself where it is small or a delta would not pay.
    """
    if base is None or len(state) <= SMALL_STATE:
        return state
    parameter = zstd.CompressionParameter
    size = len(base) + len(state)
    much_is_new = (len(state) - len(base)) * _MUCH > len(state)
    options: dict[int, int] = {
        parameter.compression_level: _LEVEL_FOR_MUCH if much_is_new else _LEVEL,
        parameter.checksum_flag: 1,
        parameter.window_log: max(10, min(_MAX_WINDOW_LOG, size.bit_length())),
    }
    if not much_is_new or len(base) >= _INDEXED_BY_HIGH_LEVEL:
        # zstd indexes only the last 8 << hash_log bytes of a prefix (ZSTD_loadDictionaryContent
        # in lib/compress/zstd_compress.c), and would find nothing in what comes before.
        options[parameter.hash_log] = max(_MIN_HASH_LOG, (len(base) // 8).bit_length())
    delta = zstd.compress(state, options=options, zstd_dict=_prefix(base))
    return delta if len(delta) * 4 < len(state) * 3 else state


def decode_state(stored: Mapping[int, bytes], step: int) -> bytes:
    """Rebuild the JSON text of a state.

    Args:
        stored: what is stored for the steps of `chain_steps`, by step; steps below one
            that is stored whole may be missing.
        step: which state.

    Returns:
        JSON text.

    Raises:
        ValueError: if a step that is needed is missing, or was damaged.
    """
    chain = []
    for link in chain_steps(step):
        if link not in stored:
            raise ValueError(f"the state of step {link}, which it is based on, is missing")
        chain.append(link)
        if not is_delta(stored[link]):
            break
    else:
        raise ValueError("the state of step 0 is a delta, which has nothing to be based on")
    state = stored[chain.pop()]
    for link in reversed(chain[1:]):
        # The checksum of the last link covers what these give.
        state = apply_delta(_without_checksum(stored[link]), state)
    return apply_delta(stored[step], state) if chain else state


def apply_delta(delta: bytes, base: bytes) -> bytes:
    """Rebuild the JSON text of a state from a delta and the JSON text of its base.

    Raises:
        ValueError: if either is not what it was; zstd's checksum of the state tells.
    """
    decompressor = zstd.ZstdDecompressor(zstd_dict=_prefix(base))
    try:
        state = decompressor.decompress(delta)
    except zstd.ZstdError as exc:
        raise ValueError(f"its delta is damaged, or its base is: {exc}") from exc
    if not decompressor.eof or decompressor.unused_data:
        raise ValueError("its delta is damaged: it does not end where it should")
    return state


def _without_checksum(delta: bytes) -> bytes:
    """Give a zstd frame without its checksum, which takes a third of the time to verify.

    RFC 8878, section 3.1.1: a flag in the frame header descriptor, the byte after the magic
    number, says whether the last four bytes are one.
    """
    descriptor = delta[4:5]
    if not descriptor or not descriptor[0] & _CHECKSUM_FLAG:
        return delta
    return b"".join((_MAGIC, bytes([descriptor[0] & ~_CHECKSUM_FLAG]), delta[5:-4]))


def remember(values: dict[int, _R], step: int, value: _R) -> None:
    """Keep a value for a step, and of the earlier ones those that later steps are based on."""
    values[step] = value
    for unneeded in values.keys() - set(chain_steps(step)):
        del values[unneeded]


def _prefix(base: bytes) -> "tuple[zstd.ZstdDict, int] | None":
    # zstd takes no shorter dictionary; one that short would not help, either.
    return zstd.ZstdDict(base, is_raw=True).as_prefix if len(base) >= 8 else None

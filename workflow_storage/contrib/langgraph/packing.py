"""A value as it is stored: by LangGraph's serializer, small, and encrypted last; for `saver`.

The serializer makes typed bytes. They become a delta to earlier ones, or are compressed, and where
the serializer encrypts, that is done to the result: what is encrypted has nothing in common with
anything.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from langgraph.checkpoint.serde.encrypted import EncryptedSerializer

from workflow_storage.deltas import apply_deltas, encode_state

if TYPE_CHECKING:
    from collections.abc import Iterable

    from langgraph.checkpoint.serde.base import SerializerProtocol

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_RAW, _DELTA, _COMPRESSED = b"\0", b"\1", b"\2"  # the first byte of what is stored

_SMALL = 128
"""Bytes up to which nothing is gained by compressing."""

_LEVEL = 3

_HEAD = 5
"""Bytes at the beginning of a list in MessagePack, at most: how long it is. What is based on a
shorter list has all the rest in common with it, once these are out of the way."""


class Typed(NamedTuple):
    """A value as LangGraph's serializer gives it: never a delta, never encrypted."""

    type: str
    plain: bytes


class Stored(NamedTuple):
    """A value as it is stored."""

    type: str
    data: bytes


class Packing:
    """Packs the values of one serializer.

    Args:
        serde: LangGraph's serializer; its strict mode and its allow-list decide what is read.
    """

    def __init__(self, serde: SerializerProtocol) -> None:
        self._encrypting = serde if isinstance(serde, EncryptedSerializer) else None
        self._serde = serde.serde if isinstance(serde, EncryptedSerializer) else serde

    def typed(self, value: Any) -> Typed:
        """Return a value as bytes."""
        kind, plain = self._serde.dumps_typed(value)
        return Typed(kind, bytes(plain))

    def value(self, typed: Typed) -> Any:
        """Return the value of some bytes."""
        return self._serde.loads_typed((typed.type, typed.plain))

    def whole(self, typed: Typed) -> Stored:
        """Return a value for storing by itself."""
        packed = _RAW + typed.plain
        if len(typed.plain) > _SMALL:
            compressed = _COMPRESSED + zstd.compress(typed.plain, _LEVEL)
            packed = min(packed, compressed, key=len)
        return self._sealed(typed.type, packed)

    def delta(self, typed: Typed, base: bytes) -> Stored | None:
        """Return a value for storing as a delta to the bytes of another one; None if it does not pay."""
        turned = _turned(typed.plain)
        delta = encode_state(turned, _turned(base), small=_SMALL)
        return None if delta is turned else self._sealed(typed.type, _DELTA + delta)

    def opened(self, stored: Stored) -> Typed:
        """Return the bytes of a value that is stored whole.

        Raises:
            ValueError: if it is damaged, or is a delta.
        """
        kind, packed = self._unsealed(stored)
        mark, rest = packed[:1], packed[1:]
        if mark == _COMPRESSED:
            try:
                return Typed(kind, zstd.decompress(rest))
            except zstd.ZstdError as exc:
                raise ValueError(str(exc)) from exc
        if mark != _RAW:
            raise ValueError("it does not begin as a value that is stored whole")
        return Typed(kind, rest)

    def rebuilt(self, deltas: Iterable[Stored], base: bytes) -> bytes:
        """Return the bytes of a value that is stored as a delta.

        Args:
            deltas: it, after those that it is based on, the oldest first.
            base: the bytes that the first one is based on.

        Raises:
            ValueError: if one of them is damaged, or its base is another one.
        """
        packed = [self._unsealed(delta)[1] for delta in deltas]
        if any(one[:1] != _DELTA for one in packed):
            raise ValueError("it does not begin as a delta")
        turned = apply_deltas((one[1:] for one in packed), _turned(base))
        return turned[len(turned) - _HEAD :] + turned[: len(turned) - _HEAD]

    def load(self, stored: Stored) -> Any:
        """Return a value that is stored by itself."""
        return self.value(self.opened(stored))

    def _sealed(self, kind: str, packed: bytes) -> Stored:
        if self._encrypting is None:
            return Stored(kind, packed)
        cipher, encrypted = self._encrypting.cipher.encrypt(packed)
        return Stored(f"{kind}+{cipher}", encrypted)

    def _unsealed(self, stored: Stored) -> tuple[str, bytes]:
        kind, data = stored
        if "+" not in kind:
            return kind, bytes(data)
        if self._encrypting is None:
            raise ValueError("it is encrypted, and this saver's serializer has no key")
        kind, cipher = kind.split("+", 1)
        return kind, self._encrypting.cipher.decrypt(cipher, bytes(data))


def _turned(plain: bytes) -> bytes:
    """Return some bytes with their head at the end."""
    return plain[_HEAD:] + plain[:_HEAD]

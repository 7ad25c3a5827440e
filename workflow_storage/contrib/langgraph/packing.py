"""A value as it is stored: by LangGraph's serializer, small, and encrypted last; for `saver`.

The serializer makes typed bytes. They become a delta to earlier ones, or are compressed, and where
the serializer encrypts, that is done to the result: what is encrypted has nothing in common with
anything.
"""

from __future__ import annotations

import sys
import zlib
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

_RAW, _DELTA, _ZSTD, _DEFLATED = b"\0", b"\1", b"\2", b"\3"  # the first byte of what is stored

_SMALL = 128
"""Bytes up to which nothing is gained by compressing."""

_SHORT = 1 << 14
"""Bytes up to which zlib is faster, and smaller by its dictionary."""

_LEVEL = 3

# Part of the format: what was stored with one dictionary is read with that one only.
_WORDS = (
    b"langchain_core.messages.system\xadSystemMessagelangchain_core.messages.tool\xabToolMessage"
    b"\xactool_call_id\xa8artifact\xa6status\xa7success\xaalanggraph.types\xa4Send\xa9Interrupt"
    b"\xa5value\xadfinish_reason\xa4stop\xaatool_calls\xaamodel_name\xaatoken_usage\xa2ns\xa6resume"
    b"\xacinput_tokens\xadoutput_tokens\xactotal_tokens\xb3input_token_details\xaacache_read"
    b"\xa4name\xa4args\x80\xa2id\xa4type\xa9tool_call\xaainvalid_tool_calls\x90\xaeusage_metadata\xc0"
    b"langchain_core.messages.human\xacHumanMessage\x86\xa7content\xb1additional_kwargs\x80"
    b"\xb1response_metadata\x80\xa4type\xa5human\xa4name\xc0\xa2id\xd9\x24"
    b"\xb3model_validate_json\x91\xc7\x94\xbalangchain_core.messages.ai\xa9AIMessage\x89\xa7content"
    b"\xb1additional_kwargs\x80\xb1response_metadata\x80\xa4type\xa2ai\xa4name\xc0\xa2id\xd9\x24"
    b"\xaatool_calls\x90\xb2invalid_tool_calls\x90\xaeusage_metadata\xc0\xb3model_validate_json"
    b"\x87\xa1v\x04\xa2ts\xd9\x202026-01-01T00:00:00.000000+00:00\xa2id\xd9\x241f000000-0000-6000-8000-"
    b"\xaechannel_values\x81\xb0channel_versions\x84\xa9__start__\xd9\x330000000000000000000000000000000"
    b"1.0.\xa8messages\xd9\x3300000000000000000000000000000002.0.\xafbranch:to:agent\xafbranch:to:tools"
    b"\xadversions_seen\x83\xa9__input__\x80\xa9__start__\xa5agent\xa5tools\xb0updated_channels\x92"
)

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
    """The serializer's, with ``+`` and ``%`` in it as in a URL; and that of a cipher after a ``+``."""
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
            packed = min(packed, _compressed(typed.plain), key=len)
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
        try:
            if mark == _DEFLATED:
                return Typed(kind, _inflated(rest))
            if mark == _ZSTD:
                return Typed(kind, zstd.decompress(rest))
        except (zlib.error, zstd.ZstdError) as exc:
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
        kind = kind.replace("%", "%25").replace("+", "%2B")
        if self._encrypting is None:
            return Stored(kind, packed)
        cipher, encrypted = self._encrypting.cipher.encrypt(packed)
        return Stored(f"{kind}+{cipher}", encrypted)

    def _unsealed(self, stored: Stored) -> tuple[str, bytes]:
        kind, data = stored
        if "+" not in kind:
            return kind_of(stored), bytes(data)
        if self._encrypting is None:
            raise ValueError("it is encrypted, and this saver's serializer has no key")
        _, cipher = kind.split("+", 1)
        return kind_of(stored), self._encrypting.cipher.decrypt(cipher, bytes(data))


def kind_of(stored: Stored) -> str:
    """Return the type that the serializer gave a value, without that of its cipher."""
    return stored.type.split("+", 1)[0].replace("%2B", "+").replace("%25", "%")


def _compressed(plain: bytes) -> bytes:
    if len(plain) > _SHORT:
        return _ZSTD + zstd.compress(plain, _LEVEL)
    deflating = zlib.compressobj(zdict=_WORDS)
    return _DEFLATED + deflating.compress(plain) + deflating.flush()


def _inflated(packed: bytes) -> bytes:
    inflating = zlib.decompressobj(zdict=_WORDS)
    plain = inflating.decompress(packed)
    if not inflating.eof or inflating.unused_data:
        raise ValueError("it does not end where it should")
    return plain


def _turned(plain: bytes) -> bytes:
    """Return some bytes with their head at the end."""
    return plain[_HEAD:] + plain[:_HEAD]

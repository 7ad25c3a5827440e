"""A state as its difference to an earlier one, and the chain that a writer remembers.

Pure: no ORM, no Redis; every store stores what comes out of here, and uses `Chain` to write and
`History` to read.

A state is stored whole, as its JSON text, or as a delta to the text of an earlier state, its
base: how many bytes it has in common with the base at the beginning and at the end, and between
them a zstd frame (RFC 8878) that was compressed with the part of the base around as prefix. The base of step i is
step ``i & (i - 1)``, which clears the lowest bit that is set: the skip-deltas of
Subversion's FSFS (subversion/libsvn_fs_fs/structure). So any state is rebuilt from at most
``log2(i) + 1`` stored ones, and a state that grows at each step is near its own size in
total, rather than near the square of the number of steps.
"""

import logging
import struct
import sys
import zlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import datetime
from typing import Any, Generic, NamedTuple, TypeVar

from workflow_storage.ends import common_ends
from workflow_storage.exceptions import DamagedStateError
from workflow_storage.serialization import StateTexts, load_json, load_rebuilt

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_R = TypeVar("_R")
_Mark = TypeVar("_Mark")

logger = logging.getLogger(__name__)

SMALL_STATE = 4096
"""Bytes up to which a state is stored whole: readable in SQL, and read at once."""

_HEADER = struct.Struct("<BIII")
"""Of a delta: `_MARK`, bytes in common at the beginning and at the end, CRC-32 of the state."""

_MARK = 1  # with which no JSON text begins
_MARK_BYTE = bytes([_MARK])
_LARGEST = (1 << 32) - 1  # bytes of a state that a header has room for
# Most states add little to their base. Where they only change what was there, the time is that of
# indexing it, and the lowest level that still finds it is best; what is new is worth more time.
_LEVEL, _LEVEL_FOR_MUCH = 1, 7
_MUCH = 16  # a part of what lies between the ends
_WINDOW = 1 << 15  # bytes of the base before that
_MIN_HASH_LOG = 14
_MIN_TABLE_LOG, _MAX_TABLE_LOG = 16, 22
_INDEXED_BY_HIGH_LEVEL = 1 << 20  # bytes of a prefix, at least
_MAX_WINDOW_LOG = 27  # what a decoder takes without asking: 128 MiB


_HELD_OF_RECENT = 16 << 20
_RECENT = 64


class EncodedCheckpoint(NamedTuple):
    """A checkpoint as it is stored, on its way from one store or file to another."""

    step: int
    node_id: str
    created_at: datetime
    attempt: int | None
    duration_seconds: float | None
    tokens: int | None
    cost_usd: float | None
    stored: bytes
    """The state as it is stored: its JSON text, or a delta."""
    text: bytes
    """The JSON text that `stored` gives."""
    base: bytes | None
    """The JSON text that a delta is based on; None if the state is stored whole."""


def base_step(step: int) -> int:
    """Return the step whose state is the base of this one: 0 for a power of two, and so on."""
    return step & (step - 1)


def chain_steps(step: int) -> list[int]:
    """Return the steps whose stored states rebuild a state.

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
    return stored.startswith(_MARK_BYTE)


def encode_state(state: bytes, base: bytes | None, *, small: int = SMALL_STATE) -> bytes:
    """Encode the JSON text of a state for storing, against the JSON text of its base.

    Args:
        state: JSON text.
        base: the JSON text of the base, or None if there is none.
        small: bytes up to which it is not worth a delta.

    Returns:
        A delta, or the state itself where it is small or a delta would not pay.
    """
    return _encoded(state, base, None, small)[0]


def _encoded(
    state: bytes, base: bytes | None, checksum: int | None, small: int = SMALL_STATE
) -> tuple[bytes, int | None]:
    """Do what `encode_state` does, from the checksum of the base if it is known.

    Returns:
        What that returns, and the checksum of the state; None if it was not needed.
    """
    if base is None or len(state) <= small or max(len(base), len(state)) > _LARGEST:
        return state, None
    start, end = common_ends(base, state)
    middle = state[start : len(state) - end]
    around = base[max(0, start - _WINDOW) : len(base) - end]
    frame = _compressed(middle, around, len(base) - start - end)
    checksum = _checksum(state, base, start, checksum)
    delta = _HEADER.pack(_MARK, start, end, checksum) + frame
    return (delta if len(delta) * 4 < len(state) * 3 else state), checksum


def _checksum(state: bytes, base: bytes, start: int, of_base: int | None) -> int:
    """Return the CRC-32 of a state that begins as its base does, from that of the base.

    Each byte changes the register of a CRC in a way that can be undone from the last byte to the first
    (reversing CRC, Stigge et al., HU Berlin 2006), so it need not be taken again of what comes before.
    """
    if of_base is None or len(base) - start > _UNDONE:
        return zlib.crc32(state)
    register = of_base ^ _LARGEST
    for byte in reversed(base[start:]):
        place = _PLACE_OF[register >> 24]
        register = ((register ^ _CRC_OF_BYTE[place]) << 8 | place ^ byte) & _LARGEST
    return zlib.crc32(memoryview(state)[start:], register ^ _LARGEST)


def _crc_of_byte(byte: int) -> int:
    """Return what a byte makes of a register of zeros, which is the table of the CRC."""
    return zlib.crc32(bytes([byte]), _LARGEST) ^ _LARGEST


_UNDONE = 256  # bytes; to take the CRC of all is quicker then, as that is done in C
_CRC_OF_BYTE = [_crc_of_byte(byte) for byte in range(256)]
_PLACE_OF = {crc >> 24: byte for byte, crc in enumerate(_CRC_OF_BYTE)}


def _compressed(middle: bytes, prefix: bytes, replaced: int) -> bytes:
    """Compress what lies between the ends.

    Args:
        middle: of the state.
        prefix: what the base has in its place, and some of what comes before.
        replaced: bytes of the base in its place.
    """
    parameter = zstd.CompressionParameter
    much_is_new = (len(middle) - replaced) * _MUCH > len(middle)
    size = len(prefix) + len(middle)
    options: dict[int, int] = {
        parameter.compression_level: _LEVEL_FOR_MUCH if much_is_new else _LEVEL,
        parameter.window_log: max(10, min(_MAX_WINDOW_LOG, size.bit_length())),
    }
    if much_is_new and len(prefix) < _INDEXED_BY_HIGH_LEVEL:
        # The tables of that level take longer to clear than what is new takes to compress.
        table_log = min(_MAX_TABLE_LOG, max(_MIN_TABLE_LOG, (size // 4).bit_length()))
        options[parameter.hash_log] = options[parameter.chain_log] = table_log
    else:
        # zstd indexes only the last 8 << hash_log bytes of a prefix (ZSTD_loadDictionaryContent
        # in lib/compress/zstd_compress.c), and would find nothing in what comes before.
        options[parameter.hash_log] = max(_MIN_HASH_LOG, (len(prefix) // 8).bit_length())
    return zstd.compress(middle, options=options, zstd_dict=_dictionary(prefix))


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
    whole = stored[chain.pop()]
    if not chain:
        return whole
    return apply_deltas((stored[link] for link in reversed(chain)), whole)


def apply_delta(delta: bytes, base: bytes, *, limit: int | None = None) -> bytes:
    """Rebuild the JSON text of a state from a delta and the JSON text of its base.

    Args:
        delta: what `encode_state` gave.
        base: JSON text.
        limit: the most bytes that may come out of it.

    Raises:
        ValueError: if either is not what it was, as the checksum of the state tells; or if the
            state is larger than the limit, which is known before it is rebuilt.
    """
    return _checked(*_applied(delta, _Pieces([base]), limit))


def apply_deltas(deltas: Iterable[bytes], base: bytes) -> bytes:
    """Rebuild a text from deltas, each of which is based on what those before it give.

    Args:
        deltas: at least one.
        base: what the first one is based on.

    Raises:
        ValueError: as `apply_delta` does; the checksum of the last covers what the others give.
    """
    state, checksum = _Pieces([base]), 0
    for delta in deltas:
        state, checksum = _applied(delta, state)
    return _checked(state, checksum)


class _Pieces:
    """A text in pieces, of which a part is taken without a copy.

    Attributes:
        size: bytes of all together.
    """

    def __init__(self, pieces: Iterable[bytes | memoryview]) -> None:
        self._pieces = [memoryview(piece) for piece in pieces]
        self.size = sum(map(len, self._pieces))

    def part(self, start: int, stop: int) -> list[memoryview]:
        """Return the pieces from one byte to another."""
        found = []
        begin = 0
        for piece in self._pieces:
            end = begin + len(piece)
            if start < end and begin < stop:
                found.append(piece[max(0, start - begin) : stop - begin])
            begin = end
        return found

    def joined(self) -> bytes:
        """Return the text as one."""
        return b"".join(self._pieces)


def _checked(pieces: _Pieces, checksum: int) -> bytes:
    """Return a text that has the checksum that it should have."""
    text = pieces.joined()
    if zlib.crc32(text) != checksum:
        raise ValueError("its delta is damaged, or its base is: the checksum differs")
    return text


def _applied(delta: bytes, base: _Pieces, limit: int | None = None) -> tuple[_Pieces, int]:
    """Return what a delta and its base give, and the checksum that it should have."""
    try:
        mark, start, end, checksum = _HEADER.unpack_from(delta)
    except struct.error:
        raise ValueError("its delta is damaged: it is too short") from None
    if mark != _MARK or start + end > base.size:
        raise ValueError("its delta is damaged, or its base is: they do not fit")
    frame = delta[_HEADER.size :]
    if limit is not None:
        _refuse_large(frame, start + end, limit)
    around = base.part(max(0, start - _WINDOW), base.size - end)
    decompressor = zstd.ZstdDecompressor(zstd_dict=_dictionary(b"".join(around)))
    try:
        middle = decompressor.decompress(frame, -1 if limit is None else limit + 1)
    except zstd.ZstdError as exc:
        raise ValueError(f"its delta is damaged, or its base is: {exc}") from exc
    if not decompressor.eof or decompressor.unused_data:
        raise ValueError("its delta is damaged: it does not end where it should")
    pieces: list[bytes | memoryview] = [*base.part(0, start), middle]
    pieces += base.part(base.size - end, base.size)
    return _Pieces(pieces), checksum


def _refuse_large(frame: bytes, around: int, limit: int) -> None:
    try:
        declared = zstd.get_frame_info(frame).decompressed_size
    except zstd.ZstdError as exc:
        raise ValueError(f"its delta is damaged: {exc}") from exc
    if declared is None:
        raise ValueError("its delta does not say how large the state is")
    if declared + around > limit:
        raise ValueError(
            f"its state has {declared + around:,} bytes, and {limit:,} is the most that is read"
        )


def whole_state(run_id: str, step: int, text: str | bytes) -> dict[str, Any]:
    """Return a state that is stored whole.

    Raises:
        DamagedStateError: if the text is not that of a state.
    """
    return _loaded(run_id, step, text, load_json)


def loaded_state(run_id: str, step: int, text: bytes) -> dict[str, Any]:
    """Return a state from the JSON text that a delta was rebuilt to; see `whole_state`."""
    return _loaded(run_id, step, text, load_rebuilt)


def rebuilt_state(run_id: str, step: int, stored: Mapping[int, bytes]) -> dict[str, Any]:
    """Return a state from what is stored for `chain_steps`, by step.

    Raises:
        DamagedStateError: if what is stored cannot be rebuilt.
    """
    if step in stored and not is_delta(stored[step]):
        return whole_state(run_id, step, stored[step])
    return loaded_state(run_id, step, rebuilt_text(run_id, step, stored))


def rebuilt_text(run_id: str, step: int, stored: Mapping[int, bytes]) -> bytes:
    """Return the JSON text of a state; see `rebuilt_state`."""
    try:
        return decode_state(stored, step)
    except ValueError as exc:
        raise DamagedStateError(run_id, step, str(exc)) from exc


def _loaded(run_id: str, step: int, text: Any, load: Callable[[Any], Any]) -> dict[str, Any]:
    try:
        data = load(text)
    except ValueError as exc:
        raise DamagedStateError(run_id, step, str(exc)) from exc
    if not isinstance(data, dict):
        raise DamagedStateError(run_id, step, "it is no JSON object")
    return data


def remember(values: dict[int, _R], step: int, value: _R) -> None:
    """Keep a value for a step, and of the earlier ones those that later steps are based on."""
    values[step] = value
    for unneeded in values.keys() - set(chain_steps(step)):
        del values[unneeded]


class Link(NamedTuple, Generic[_Mark]):
    """A stored state of the chain that another one is rebuilt from."""

    step: int
    stored: bytes
    mark: _Mark
    """What tells what is stored from anything else that has the step, before or later."""


class Chain(Generic[_Mark]):
    """What a writer remembers of one run: the states that its next one is based on.

    Others can write to the run and delete from it, so a store compares marks before it stores a
    delta.

    Attributes:
        run_id: which run.
        next_step: the step of the next state, if nobody else writes; None if it is not known.
        texts: writes its states.
    """

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id
        self.next_step: int | None = None
        self.texts = StateTexts()
        self._texts: dict[int, bytes] = {}
        self._marks: dict[int, _Mark] = {}
        self._checksums: dict[int, int] = {}
        self._last: tuple[bytes, int | None] = b"", None

    @property
    def held(self) -> int:
        """Bytes of the texts that are remembered."""
        return sum(map(len, self._texts.values()))

    def mark(self, step: int) -> _Mark | None:
        """Return the mark of a state that is remembered, or None."""
        return self._marks.get(step)

    def lacks_base(self, step: int) -> bool:
        """Whether the base of a step is to be loaded before a state is stored there."""
        return step > 0 and (step != self.next_step or base_step(step) not in self._texts)

    def holds(self, step: int, text: bytes | None) -> bool:
        """Whether the text of a state is remembered, and is this one."""
        return text is not None and self._texts.get(step) == text

    def encode(self, text: bytes, step: int) -> tuple[bytes, int | None]:
        """Encode the JSON text of a state for storing it at a step.

        Returns:
            What to store, and the step that it is based on; None if it is stored whole.
        """
        base = base_step(step)
        of_base = self._texts.get(base) if step else None
        stored, checksum = _encoded(text, of_base, self._checksums.get(base))
        self._last = text, checksum
        return stored, base if is_delta(stored) else None

    def remember(self, step: int, text: bytes, mark: _Mark) -> None:
        """Keep a state that was just stored, as far as later ones are based on it."""
        remember(self._texts, step, text)
        remember(self._marks, step, mark)
        encoded, checksum = self._last
        kept = {one: known for one, known in self._checksums.items() if one in self._texts}
        kept.pop(step, None)
        if encoded is text and checksum is not None:
            kept[step] = checksum
        self._checksums = kept
        self.next_step = step + 1

    def forget(self) -> None:
        """Know nothing any more: the next state is encoded after `load`."""
        self.next_step = None
        self._texts.clear()
        self._marks.clear()
        self._checksums.clear()

    def load(self, next_step: int, links: Iterable[Link[_Mark]]) -> None:
        """Remember what is stored of the base of the next step, and all that it is based on.

        Args:
            next_step: the step of the next state.
            links: the base and its chain, read together, the oldest first. One that cannot be
                rebuilt is left out: the next state is then stored whole, and the run goes on.
        """
        self.forget()
        self.next_step = next_step
        for step, stored, mark in links:
            text = self._rebuilt(step, stored)
            if text is not None:
                self._texts[step] = text
                self._marks[step] = mark

    def _rebuilt(self, step: int, stored: bytes) -> bytes | None:
        if not is_delta(stored):
            return stored
        try:
            base = self._texts.get(base_step(step))
            if base is None:
                raise ValueError(f"the state of step {base_step(step)} is missing or damaged")
            return apply_delta(stored, base)
        except ValueError as exc:
            error = DamagedStateError(self.run_id, step, str(exc))
            logger.exception("A state cannot serve as a base", exc_info=error)
            return None


class RecentChains(Generic[_Mark]):
    """The chains of the runs that were saved to last without a writer, as far as they are small.

    For who saves one state after another to a run. Each is used by one thread at a time; another one
    that saves to the run has a chain that knows nothing. There is no lock: each step is one that
    other threads, and signal handlers, see either done or not begun.
    """

    def __init__(self) -> None:
        self._chains: dict[str, Chain[_Mark]] = {}

    def take(self, run_id: str) -> Chain[_Mark]:
        """Return the chain of a run, for one save."""
        return self._chains.pop(run_id, None) or Chain(run_id)

    def keep(self, chain: Chain[_Mark]) -> None:
        """Remember a chain after a save, and forget those that were not used for longest."""
        if not 0 < chain.held <= _HELD_OF_RECENT:
            return
        self._chains[chain.run_id] = chain
        chains = list(self._chains.values())
        held = sum(one.held for one in chains)
        for oldest in chains:
            if held <= _HELD_OF_RECENT and len(self._chains) <= _RECENT:
                break
            self._chains.pop(oldest.run_id, None)
            held -= oldest.held


class History:
    """The states of a run while they are read in order, each rebuilt from those before it."""

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id
        self._texts: dict[int, bytes] = {}

    @property
    def held(self) -> int:
        """Bytes of the texts that are remembered."""
        return sum(map(len, self._texts.values()))

    def base(self, step: int) -> bytes | None:
        """Return the JSON text of the state that a step is based on, if it is remembered."""
        return self._texts.get(base_step(step)) if step else None

    def text(self, step: int, stored: bytes) -> bytes | None:
        """Return the JSON text of a stored state; None if its whole chain has to be read."""
        if not is_delta(stored):
            return stored
        base = self.base(step)
        if base is None:
            return None
        # If the run was deleted and begun anew meanwhile, it has another base by now.
        with suppress(ValueError):
            return apply_delta(stored, base)
        return None

    def text_by_chain(self, step: int, stored: Mapping[int, bytes]) -> bytes:
        """Return the JSON text of a state from its whole chain, and remember that of its base.

        Raises:
            DamagedStateError: if what is stored cannot be rebuilt.
        """
        if step and is_delta(stored.get(step, b"")):
            base = base_step(step)
            remember(self._texts, base, rebuilt_text(self.run_id, base, stored))
            text = self.text(step, stored[step])
            if text is not None:
                return text
        return rebuilt_text(self.run_id, step, stored)

    def encoded(
        self, step: int, stored: bytes, text: bytes, columns: Iterable[Any]
    ) -> EncodedCheckpoint:
        """Return a checkpoint as it is stored, and remember its state for those that come.

        Args:
            step: its step.
            stored: its state as it is stored.
            text: the JSON text that this gives, of `text` or `text_by_chain`.
            columns: what comes between in `EncodedCheckpoint`.

        Raises:
            DamagedStateError: if a state that is stored whole is none; a delta has a checksum.
        """
        base = self.base(step) if is_delta(stored) else None
        if base is None:
            whole_state(self.run_id, step, text)
        remember(self._texts, step, text)
        return EncodedCheckpoint._make((step, *columns, stored, text, base))

    def state(self, step: int, text: bytes, *, rebuilt: bool) -> dict[str, Any]:
        """Return a state from its JSON text, and remember it for those that come.

        Raises:
            DamagedStateError: if the text is not that of a state.
        """
        remember(self._texts, step, text)
        load = loaded_state if rebuilt else whole_state
        return load(self.run_id, step, text)


def _dictionary(prefix: bytes) -> "tuple[zstd.ZstdDict, int] | None":
    # zstd takes no shorter dictionary; one that short would not help, either.
    return zstd.ZstdDict(prefix, is_raw=True).as_prefix if len(prefix) >= 8 else None

"""How the values of a channel are based on each other, and what a saver remembers of them.

Pure. A channel that grows has a value a step. Of each 16, one is based on that 16 before it, of each
256 one on that 256 before it, and so on; the others are based on the one before. So what is new is
stored once for each power of 16, and the value at position p is rebuilt from at most 15 deltas for
each of them: 30 for the first 256, 45 for the first 4,096.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

from workflow_storage.contrib.langgraph.packing import Typed, kind_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from workflow_storage.contrib.langgraph.packing import Packing, Stored

RADIX = 16

HELD = 16 << 20
"""Bytes that a saver remembers, at most."""

_EACH = 1 << 10
"""Bytes that a thread or a channel takes besides its values, about."""


def base_position(position: int) -> int:
    """Return the position of the value that the one at a position (from 1) is based on."""
    span = 1
    while position % (span * RADIX) == 0:
        span *= RADIX
    return position - span


def is_needed(earlier: int, position: int) -> bool:
    """Whether a value after a position can be based on an earlier one."""
    span = 1
    while span <= position:
        if earlier == position // span * span:
            return True
        span *= RADIX
    return earlier == 0


class Row(NamedTuple):
    """A stored value of a channel, without what it is called."""

    base_id: int | None
    position: int
    stored: Stored


class Link(NamedTuple):
    """A value that later ones can be based on."""

    blob_id: int
    plain: bytes


class Head(NamedTuple):
    """The value of a channel in a checkpoint, and those that the next one can be based on."""

    blob_id: int
    version: str
    position: int
    links: Mapping[int, Link]
    """By position; empty if they are not known."""

    @property
    def held(self) -> int:
        """Bytes that are remembered, about."""
        return _EACH + sum(len(link.plain) for link in self.links.values())

    def followed_by(self, blob_id: int, version: str, position: int, plain: bytes) -> Head:
        """Return the head after the next value."""
        links = {place: link for place, link in self.links.items() if is_needed(place, position)}
        if position == 0:
            links = {}
        links[position] = Link(blob_id, plain)
        return Head(blob_id, version, position, links)


def new_head(blob_id: int, version: str, plain: bytes) -> Head:
    """Return the head of a channel whose value is stored whole."""
    return Head(blob_id, version, 0, {0: Link(blob_id, plain)})


class Texts:
    """The bytes of stored values, each rebuilt from those that it is based on.

    Args:
        rows: by id, with all that they are based on.
        packing: opens them.

    Attributes:
        rows: those.
    """

    def __init__(self, rows: Mapping[int, Row], packing: Packing) -> None:
        self.rows = rows
        self._packing = packing
        self._plain: dict[int, bytes] = {}
        self._held = 0

    def typed(self, blob_id: int) -> Typed:
        """Return a value as LangGraph's serializer gave it.

        Raises:
            ValueError: if it is damaged, or what it is based on is not there.
        """
        return Typed(kind_of(self.rows[blob_id].stored), self.plain(blob_id))

    def plain(self, blob_id: int) -> bytes:
        """Return the bytes of a value; see `typed`."""
        deltas: list[Stored] = []
        link = blob_id
        while link not in self._plain:
            row = self.rows.get(link)
            if row is None:
                raise ValueError(f"the value {link}, which it is based on, is missing")
            if row.base_id is None:
                self._remember(link, self._packing.opened(row.stored).plain)
                break
            deltas.append(row.stored)
            link = row.base_id
        plain = self._plain[link]
        if deltas:
            plain = self._packing.rebuilt(reversed(deltas), plain)
            self._remember(blob_id, plain)
        return plain

    def head(self, blob_id: int, version: str) -> Head:
        """Return a value as that which the next one can be based on."""
        position = self.rows[blob_id].position
        needed = []
        link: int | None = blob_id
        while link is not None and link in self.rows:
            row = self.rows[link]
            if is_needed(row.position, position):
                needed.append((row.position, link))
            link = row.base_id
        # The oldest first, for the others are rebuilt from it.
        links = {place: Link(link, self.plain(link)) for place, link in reversed(needed)}
        return Head(blob_id, version, position, links)

    def _remember(self, blob_id: int, plain: bytes) -> None:
        if self._held > HELD:
            self._plain.clear()
            self._held = 0
        self._plain[blob_id] = plain
        self._held += len(plain)


class Remembered(NamedTuple):
    """What a saver knows of the newest checkpoint of a thread that it has seen."""

    thread: int
    generation: int
    checkpoint_id: str
    heads: Mapping[str, Head]
    """By channel."""


class Memory:
    """What a saver remembers of the threads that it used last, as far as that is little."""

    def __init__(self) -> None:
        self.begin_anew()
        _all.add(self)

    def begin_anew(self) -> None:
        """Know of no thread, in a child process: another thread of its parent may have been at it."""
        self._changing = threading.Lock()
        self._threads: OrderedDict[str, Remembered] = OrderedDict()
        self._held = 0

    def get(self, key: str) -> Remembered | None:
        """Return what is known of a thread."""
        return self._threads.get(key)

    def keep(self, key: str, remembered: Remembered) -> None:
        """Remember a thread, and forget those that were not used for longest."""
        size = _held(remembered.heads.values())
        with self._changing:
            self._forget(key)
            if size > HELD:
                return
            self._threads[key] = remembered
            self._held += size
            while self._held > HELD:
                self._forget(next(iter(self._threads)))

    def forget(self, key: str) -> None:
        """Know nothing of a thread any more."""
        with self._changing:
            self._forget(key)

    def _forget(self, key: str) -> None:
        known = self._threads.pop(key, None)
        if known is not None:
            self._held -= _held(known.heads.values())


def _held(heads: Iterable[Head]) -> int:
    return _EACH + sum(head.held for head in heads)


_all: weakref.WeakSet[Memory] = weakref.WeakSet()


def _begin_anew() -> None:
    for memory in list(_all):
        memory.begin_anew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)

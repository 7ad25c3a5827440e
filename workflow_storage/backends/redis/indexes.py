"""The runs in order, as the indexes of Redis hold them, a page at a time; for lists of runs."""

from __future__ import annotations

import itertools
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from workflow_storage.backends.redis import scripts
from workflow_storage.backends.redis.records import STARTED_AT, read_runs, run_from
from workflow_storage.backends.redis.repository import call, time_text
from workflow_storage.backends.redis.scripts import TIME_LENGTH, Call
from workflow_storage.exceptions import StorageError
from workflow_storage.status import RunStatus
from workflow_storage.validation import plain_text

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime

    from workflow_storage.backends.redis.connection import Operation, RedisStore
    from workflow_storage.filters import ValidFilters
    from workflow_storage.models import WorkflowRun


_COUNTED_AT_ONCE = 200


def entry_of(started_at: datetime, run_id: str) -> bytes:
    """Return what stands for a run in the indexes."""
    return f"{time_text(started_at)} {plain_text(run_id)}".encode()


def parsed_entry(entry: bytes) -> tuple[bytes, str]:
    """Return the time and the id of an entry."""
    return entry[:TIME_LENGTH], entry[TIME_LENGTH + 1 :].decode()


class _Range(NamedTuple):
    """The entries of an index, in each slot, that begin alike."""

    keys: dict[str, tuple[str, ...]]
    """The keys of the index by key prefix: several where an index is one for each status."""
    name: bytes
    """What the entries begin with, before the start."""


class NewestRuns:
    """Reads the runs that some filters mean, newest first, bit by bit.

    A run that changes its status moves from one index to another of the same slot. They are
    read together, in one script, so that it is never missed between the two. Of several labels, the
    index of the rarest is read.

    Args:
        store: where.
        filters: which runs.
        before: an entry, behind which to begin.
    """

    def __init__(
        self, store: RedisStore, filters: ValidFilters, before: bytes | None = None
    ) -> None:
        if filters.error is not None:
            raise StorageError(
                "Redis has no search over errors. Look for failed runs by their workflow, labels or "
                "time; or copy them to a database with copy_runs, and search there."
            )
        self._store = store
        self._filters = filters
        self._before = before
        self._ranges: list[_Range] = []
        # What is unread of each slot and range comes after this entry.
        self._after: dict[tuple[str, int], bytes] = {}
        self._unread: set[tuple[str, int]] = set()
        self._entries: list[bytes] = []

    def count(self) -> Operation[int]:
        """Count the runs; without reading them, where an index holds all that is asked."""
        yield from self._begin()
        if not self._is_exact():
            total = 0
            while (page := (yield from self.page(_COUNTED_AT_ONCE))) is not None:
                total += len(page)
            return total
        return sum((yield from self._counts(self._ranges)))

    def page(self, count: int) -> Operation[list[WorkflowRun] | None]:
        """Return the next runs, at most so many.

        Returns:
            Perhaps none of them, where none of so many entries was right; None after the last.
        """
        entries = yield from self.entries(count)
        if not entries:
            return None
        parsed = [parsed_entry(entry) for entry in entries]
        replies = yield read_runs(self._store, [run_id for _, run_id in parsed])
        runs = []
        for entry, (start, run_id), values in zip(entries, parsed, replies, strict=True):
            run = run_from(run_id, values)
            if run is None or values[STARTED_AT] != start:
                yield from self._clean(entry)
            elif self._filters.matches(run):
                runs.append(run)
        return runs

    def entries(self, count: int) -> Operation[list[bytes]]:
        """Return the next entries: as many, fewer before the last one, none after it.

        What they stand for is not read, so that it may not be there.
        """
        yield from self._begin()
        lists = len(self._after)
        size = count if lists == 1 else max(2 * count // lists, 10)
        while behind := self._behind(count):
            calls = [self._call(place, self._after[place], size) for place in behind]
            for place, found_in in zip(behind, (yield calls), strict=True):
                found = sorted(set(itertools.chain.from_iterable(found_in)), reverse=True)[:size]
                name = self._ranges[place[1]].name
                self._entries += [entry[len(name) :] for entry in found]
                if len(found) < size:
                    self._unread.discard(place)
                else:
                    self._after[place] = b"(" + found[-1]
            self._entries.sort(reverse=True)
        entries, self._entries = self._entries[:count], self._entries[count:]
        return entries

    def _begin(self) -> Operation[None]:
        """Choose what to read, the first time."""
        if self._ranges:
            return
        ranges = self._possible_ranges()
        if self._filters.labels and len(ranges) > 1:
            counts = yield from self._counts(ranges)
            ranges = [ranges[counts.index(min(counts))]]
        self._ranges = ranges
        for place, one in enumerate(ranges):
            for prefix in one.keys:
                self._after[prefix, place] = self._highest(one)
        self._unread = set(self._after)

    def _possible_ranges(self) -> list[_Range]:
        """Return the ranges that hold the runs: all of them together, or, of labels, each alone."""
        filters = self._filters
        if filters.labels:
            return [
                self._range("labels", f"{name}\0{value}\0")
                for name, value in filters.labels.items()
            ]
        if filters.parent_id is not None:
            return [self._range("parents", f"{filters.parent_id}\0")]
        if filters.workflow_names is not None:
            names = [f"{name}\0" for name in filters.workflow_names]
            return [self._range("workflows", name, self._statuses()) for name in names]
        return [self._range("runs", "", self._statuses())]

    def _range(self, kind: str, name: str, statuses: Iterable[RunStatus] = ()) -> _Range:
        kinds = [f"{kind}:{status.value}" for status in statuses] or [kind]
        return _Range(
            {
                prefix: tuple(f"{prefix}:{one}" for one in kinds)
                for prefix in self._store.key_prefixes
            },
            name.encode(),
        )

    def _statuses(self) -> list[RunStatus]:
        if self._filters.waiting and self._filters.statuses is None:
            return [RunStatus.PENDING]
        return list(RunStatus) if self._filters.statuses is None else self._filters.statuses

    def _is_exact(self) -> bool:
        """Whether each entry in the ranges is a run that is asked for."""
        filters = self._filters
        others = (
            len(filters.labels) > 1
            or filters.waiting is not None
            or (bool(filters.labels) and filters.parent_id is not None)
        )
        if filters.labels or filters.parent_id is not None:
            others = others or (filters.workflow_names, filters.statuses) != (None, None)
        return not others

    def _counts(self, ranges: list[_Range]) -> Operation[list[int]]:
        """Return how many entries there are in each range."""
        replies = yield [
            Call(scripts.INDEX, keys, (self._highest(one), self._lowest(one)))
            for one in ranges
            for keys in one.keys.values()
        ]
        slots = len(self._store.key_prefixes)
        return [
            sum(itertools.chain.from_iterable(replies[first : first + slots]))
            for first in range(0, len(replies), slots)
        ]

    def _call(self, place: tuple[str, int], after: bytes, size: int) -> Call:
        one = self._ranges[place[1]]
        return Call(scripts.INDEX, one.keys[place[0]], (after, self._lowest(one), size))

    def _lowest(self, one: _Range) -> bytes:
        after = self._filters.started_after
        if after is not None:
            return b"[" + one.name + time_text(after).encode()
        return b"[" + one.name if one.name else b"-"

    def _highest(self, one: _Range) -> bytes:
        until = self._filters.started_before
        highest = [] if until is None else [b"(" + one.name + time_text(until).encode()]
        if self._before is not None:
            highest.append(b"(" + one.name + self._before)
        end = b"(" + one.name[:-1] + b"\1" if one.name else b"+"
        return min(highest, default=end)

    def _clean(self, entry: bytes) -> Operation[None]:
        """Delete the entry of a run that the server has evicted, or somebody deleted by hand."""
        start, run_id = parsed_entry(entry)
        for one in self._ranges:
            cleaning = call(self._store, scripts.CLEAN, run_id, start, one.name + entry)
            keys = one.keys[self._store.key_prefix(run_id)]
            with suppress(StorageError):
                yield cleaning._replace(keys=(*cleaning.keys, *keys))

    def _behind(self, count: int) -> list[tuple[str, int]]:
        """Return the slots and ranges that may have an entry before the last of the next ones."""
        unread = [place for place in self._after if place in self._unread]
        if len(self._entries) < count:
            return unread
        last = self._entries[count - 1]
        # Without the bracket, and what the entries of the range begin with.
        return [
            place
            for place in unread
            if self._after[place][1 + len(self._ranges[place[1]].name) :] > last
        ]


class EndedRuns:
    """Reads the runs that ended before a time, in the order of their ends within an index.

    Args:
        store: where.
        filters: the workflows or none, and the terminal statuses.
        before: the time.
    """

    def __init__(self, store: RedisStore, filters: ValidFilters, before: datetime) -> None:
        self._before = time_text(before).encode()
        names: Iterable[str | None] = filters.workflow_names or [None]
        self._after: dict[tuple[str, str, str | None], bytes] = {}
        for prefix, status, name in itertools.product(
            store.key_prefixes, filters.statuses or (), names
        ):
            kind = "ended" if name is None else "ended_workflows"
            begin = b"-" if name is None else b"[" + _behind_name(name)
            self._after[f"{prefix}:{kind}:{status.value}", status.value, name] = begin

    def page(self, count: int) -> Operation[list[Ended] | None]:
        """Return the next runs of each index, at most so many; None after the last."""
        if not self._after:
            return None
        pages = yield [
            ("ZRANGEBYLEX", key, begin, b"(" + _behind_name(name) + self._before, "LIMIT", 0, count)
            for (key, _, name), begin in self._after.items()
        ]
        runs = []
        for index, entries in zip(list(self._after), pages, strict=True):
            _, status, name = index
            for entry in entries:
                ended_at, run_id = parsed_entry(entry[len(_behind_name(name)) :])
                runs.append(Ended(run_id, ended_at.decode(), status, name or ""))
            if len(entries) == count:
                self._after[index] = b"(" + entries[-1]
            else:
                del self._after[index]
        return runs


class Ended(NamedTuple):
    """A run that has ended, as an index has it and `DELETE_ENDED` takes it."""

    run_id: str
    ended_at: str
    status: str
    workflow: str


def _behind_name(name: str | None) -> bytes:
    return b"" if name is None else f"{name}\0".encode()

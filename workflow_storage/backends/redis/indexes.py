"""The runs in order, as the indexes of Redis hold them, a page at a time; for lists of runs."""

from __future__ import annotations

import itertools
from contextlib import suppress
from typing import TYPE_CHECKING

from workflow_storage.backends.redis import scripts
from workflow_storage.backends.redis.records import read_runs, run_from
from workflow_storage.backends.redis.repository import call, time_text
from workflow_storage.backends.redis.scripts import TIME_LENGTH, Call
from workflow_storage.exceptions import StorageError
from workflow_storage.status import RunStatus
from workflow_storage.validation import plain_text

if TYPE_CHECKING:
    from datetime import datetime

    from workflow_storage.backends.redis.connection import Operation, RedisStore
    from workflow_storage.models import WorkflowRun
    from workflow_storage.validation import ValidFilters


def entry_of(started_at: datetime, run_id: str) -> bytes:
    """Return what stands for a run in the indexes."""
    return f"{time_text(started_at)} {plain_text(run_id)}".encode()


def parsed_entry(entry: bytes) -> tuple[bytes, str]:
    """Return the time and the id of an entry."""
    return entry[:TIME_LENGTH], entry[TIME_LENGTH + 1 :].decode()


class NewestRuns:
    """Reads the runs that some filters mean, newest first, bit by bit.

    A run that changes its status moves from one index to another of the same slot. They are
    read together, in one script, so that it is never missed between the two.

    Args:
        store: where.
        filters: which runs.
        before: an entry, behind which to begin.
    """

    def __init__(
        self, store: RedisStore, filters: ValidFilters, before: bytes | None = None
    ) -> None:
        self._store = store
        self._filters = filters
        statuses = filters.statuses if filters.statuses is not None else list(RunStatus)
        name = filters.workflow_name
        kind = "runs" if name is None else "workflows"
        self._keys = {
            prefix: tuple(f"{prefix}:{kind}:{status.value}" for status in statuses)
            for prefix in store.key_prefixes
        }
        # What all entries begin with, before the start.
        self._name = b"" if name is None else f"{name}\0".encode()
        after, until = filters.started_after, filters.started_before
        self._lowest = b"[" + self._name if self._name else b"-"
        if after is not None:
            self._lowest = b"[" + self._name + time_text(after).encode()
        highest = [b"(" + self._name + time_text(until).encode()] if until is not None else []
        if before is not None:
            highest.append(b"(" + self._name + before)
        # What is unread of each slot comes after this entry.
        end = b"(" + self._name[:-1] + b"\1" if self._name else b"+"
        self._after = dict.fromkeys(self._keys, min(highest, default=end))
        self._unread = set(self._keys)
        self._entries: list[bytes] = []

    def count(self) -> Operation[int]:
        """Count the runs."""
        counts = yield [
            Call(scripts.INDEX, keys, (self._after[prefix], self._lowest))
            for prefix, keys in self._keys.items()
        ]
        return sum(itertools.chain.from_iterable(counts))

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
            if run is None or time_text(run.started_at).encode() != start:
                yield from self._clean(entry)
            elif self._matches(run):
                runs.append(run)
        return runs

    def _matches(self, run: WorkflowRun) -> bool:
        """Whether a run still is what its entry said."""
        statuses, name = self._filters.statuses, self._filters.workflow_name
        return (statuses is None or run.status in statuses) and (
            name is None or run.workflow_name == name
        )

    def _clean(self, entry: bytes) -> Operation[None]:
        """Delete the entry of a run that the server has evicted, or somebody deleted by hand."""
        start, run_id = parsed_entry(entry)
        cleaning = call(self._store, scripts.CLEAN, run_id, start, self._name + entry)
        keys = self._keys[self._store.key_prefix(run_id)]
        with suppress(StorageError):
            yield cleaning._replace(keys=(*cleaning.keys, *keys))

    def entries(self, count: int) -> Operation[list[bytes]]:
        """Return the next entries: as many, fewer before the last one, none after it.

        What they stand for is not read, so that it may not be there.
        """
        size = count if len(self._keys) == 1 else max(2 * count // len(self._keys), 10)
        while behind := self._behind(count):
            calls = [
                Call(scripts.INDEX, self._keys[prefix], (self._after[prefix], self._lowest, size))
                for prefix in behind
            ]
            for prefix, lists in zip(behind, (yield calls), strict=True):
                found = sorted(set(itertools.chain.from_iterable(lists)), reverse=True)[:size]
                self._entries += found
                if len(found) < size:
                    self._unread.discard(prefix)
                else:
                    self._after[prefix] = b"(" + found[-1]
            self._entries.sort(reverse=True)
        entries, self._entries = self._entries[:count], self._entries[count:]
        return [entry[len(self._name) :] for entry in entries]

    def _behind(self, count: int) -> list[str]:
        """Return the key prefixes that may have an entry before the last of the next ones."""
        unread = [prefix for prefix in self._keys if prefix in self._unread]
        if len(self._entries) < count:
            return unread
        last = b"(" + self._entries[count - 1]
        return [prefix for prefix in unread if self._after[prefix] > last]


class EndedRuns:
    """Reads the runs that ended before a time, in the order of their ends within an index.

    Args:
        store: where.
        filters: the workflow or none, and the terminal statuses.
        before: the time.
    """

    def __init__(self, store: RedisStore, filters: ValidFilters, before: datetime) -> None:
        name = filters.workflow_name
        kind = "ended" if name is None else "ended_workflows"
        self._workflow = name or ""
        self._name = b"" if name is None else f"{name}\0".encode()
        self._end = b"(" + self._name + time_text(before).encode()
        begin = b"[" + self._name if self._name else b"-"
        self._after = {
            (f"{prefix}:{kind}:{status.value}", status.value): begin
            for prefix in store.key_prefixes
            for status in filters.statuses or ()
        }

    def page(self, count: int) -> Operation[list[tuple[str, tuple[str, str, str]]] | None]:
        """Return the next runs of each index, at most so many, as `DELETE_ENDED` takes them.

        Returns:
            The ids, each with the end, the status and the workflow; None after the last.
        """
        if not self._after:
            return None
        pages = yield [
            ("ZRANGEBYLEX", key, begin, self._end, "LIMIT", 0, count)
            for (key, _), begin in self._after.items()
        ]
        runs = []
        for index, entries in zip(list(self._after), pages, strict=True):
            for entry in entries:
                ended_at, run_id = parsed_entry(entry[len(self._name) :])
                runs.append((run_id, (ended_at.decode(), index[1], self._workflow)))
            if len(entries) == count:
                self._after[index] = b"(" + entries[-1]
            else:
                del self._after[index]
        return runs

"""The runs that ended before a time, bit by bit, but for those to be spared; for who deletes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workflow_storage.backends.redis.indexes import Ended, EndedRuns, NewestRuns, entry_of
from workflow_storage.backends.redis.records import read_fields, read_runs, run_from
from workflow_storage.backends.redis.repository import time_text

if TYPE_CHECKING:
    from workflow_storage.backends.redis.connection import Operation, RedisStore
    from workflow_storage.filters import ValidFinished
    from workflow_storage.models import WorkflowRun

_AT_ONCE = 200
"""Runs that are read to find the newest of a workflow."""


class FinishedRuns:
    """Reads them: in the order of their ends within an index, or, by a label or a parent, of starts.

    Args:
        store: where.
        finished: which runs.
    """

    def __init__(self, store: RedisStore, finished: ValidFinished) -> None:
        self._store = store
        self._finished = finished
        filters = finished.filters
        by_index = not filters.labels and filters.parent_id is None
        self._ended = EndedRuns(store, filters, finished.before) if by_index else None
        self._newest = NewestRuns(store, filters)
        self._left = 0 if filters.match_none else finished.limit
        self._following: list[Ended] = []
        # Of each workflow, the entry of the last of those that are spared.
        self._last_spared: dict[bytes, bytes] = {}

    def page(self, size: int) -> Operation[list[Ended] | None]:
        """Return the next of them, about so many; None after the last."""
        if not self._left:
            return None
        page = self._following
        if not page:
            found = yield from self._page(size)
            if found is None:
                return None
            if found and self._finished.keep_last:
                found = yield from self._without_spared(found)
            page = sorted(found, key=lambda ended: ended.ended_at)
        # Not all of them may be as the index says, and then those that follow are wanted.
        self._following = page[self._left :]
        return page[: self._left]

    def took(self, count: int) -> None:
        """Know that so many more were what is wanted, for the limit."""
        self._left -= count

    def runs(self, size: int) -> Operation[list[WorkflowRun] | None]:
        """Return the next of them whole; None after the last."""
        page = yield from self.page(size)
        if page is None:
            return None
        replies = yield read_runs(self._store, [ended.run_id for ended in page])
        runs = []
        for ended, values in zip(page, replies, strict=True):
            run = run_from(ended.run_id, values)
            if (
                run is not None
                and run.completed_at is not None
                and (run.status, time_text(run.completed_at)) == (ended.status, ended.ended_at)
            ):
                runs.append(run)
        self.took(len(runs))
        return runs

    def _page(self, size: int) -> Operation[list[Ended] | None]:
        if self._ended is not None:
            return (yield from self._ended.page(size))
        page = yield from self._newest.page(size)
        if page is None:
            return None
        return [
            Ended(run.id, time_text(run.completed_at), run.status, "")
            for run in page
            if run.completed_at is not None and run.completed_at < self._finished.before
        ]

    def _without_spared(self, page: list[Ended]) -> Operation[list[Ended]]:
        run_ids = [ended.run_id for ended in page]
        replies = yield read_fields(self._store, run_ids, "workflow_name", "started_at")
        kept = []
        for ended, (name, started) in zip(page, replies, strict=True):
            if name is None or started is None:
                continue
            if name not in self._last_spared:
                self._last_spared[name] = yield from self._last_of(name.decode())
            if b"%b %b" % (started, ended.run_id.encode()) < self._last_spared[name]:
                kept.append(ended)
        return kept

    def _last_of(self, workflow_name: str) -> Operation[bytes]:
        """Return the entry of the last of the newest of a workflow; what all come after, if none."""
        newest = NewestRuns(
            self._store, self._finished.filters._replace(workflow_names=[workflow_name])
        )
        wanted = self._finished.keep_last
        while (page := (yield from newest.page(min(wanted, _AT_ONCE)))) is not None:
            wanted -= len(page)
            if not wanted:
                return entry_of(page[-1].started_at, page[-1].id)
        return b""

"""Which runs a command is about, as `base.selected` finds them; and how it reads and counts these."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple, cast

if TYPE_CHECKING:
    from collections.abc import Iterator

    from workflow_storage.base import Damage, RunFilters, StorageBackend
    from workflow_storage.models import WorkflowRun

SHORTEST_TIME = timedelta(microseconds=1)
"""What two starts differ by at least."""


class Selection(NamedTuple):
    """Some runs, newest first."""

    filters: RunFilters
    before: WorkflowRun | None = None
    """The run after which they begin; None for the newest."""
    limit: int | None = None
    """How many they are at most; None for all."""

    def runs(self, backend: StorageBackend) -> Iterator[WorkflowRun]:
        """Yield the runs, in memory bounded by bytes."""
        return backend.runs.iter_runs(before=self.before, limit=self.limit, **self.filters)

    def pages(self, backend: StorageBackend) -> Iterator[list[WorkflowRun | Damage]]:
        """Yield the same page by page; of a run that cannot be read, what is wrong."""
        return backend.readable_pages(before=self.before, limit=self.limit, **self.filters)

    def count(self, backend: StorageBackend) -> int:
        """Count the runs."""
        if self.before is None:
            count = backend.runs.count_runs(**self.filters)
        else:
            count = backend.runs.count_runs(**self.started_earlier())
            count += sum(1 for _ in self.started_then(backend))
        return count if self.limit is None else min(count, self.limit)

    def started_earlier(self) -> RunFilters:
        """Return what selects those that started earlier than the run that they begin after."""
        assert self.before is not None
        start, until = self.before.started_at, self.filters.get("started_before")
        before = start if until is None else min(start, until)
        return cast("RunFilters", {**self.filters, "started_before": before})

    def started_then(self, backend: StorageBackend) -> Iterator[WorkflowRun]:
        """Yield those that started when the run did that they begin after."""
        assert self.before is not None
        start, since = self.before.started_at, self.filters.get("started_after")
        after = start if since is None else max(start, since)
        filters = cast("RunFilters", {**self.filters, "started_after": after})
        return backend.runs.iter_runs(before=self.before, **filters)

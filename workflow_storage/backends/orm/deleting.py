"""Finished runs deleted batch by batch, in the order of their ends, for the repository of runs."""

from __future__ import annotations

import itertools
import logging
from typing import TYPE_CHECKING, Any, NamedTuple

from django.db import IntegrityError
from django.db.models import Q

from workflow_storage.backends.orm.errors import tries_again

if TYPE_CHECKING:
    from datetime import datetime

    from django.db.models import QuerySet

    from workflow_storage.backends.orm.run_rows import RunRows
    from workflow_storage.models import WorkflowRun

logger = logging.getLogger(__name__)

SHOWN = 20
"""Runs that could not be deleted that are named."""


class _Place(NamedTuple):
    """Where a run is in the order of the ends."""

    completed_at: datetime
    id: str


class Deletion:
    """Deletes runs, each batch in a transaction of its own, and goes past those that it cannot.

    Args:
        rows: the database.
        finished: which runs.
        size: how many a batch has.

    Attributes:
        alias: the database's name in DATABASES.
        deleted: how many runs have been deleted so far.
    """

    def __init__(self, rows: RunRows, finished: QuerySet[WorkflowRun], size: int) -> None:
        self.alias = rows.alias
        self.deleted = 0
        self._rows = rows
        self._finished = finished.order_by("completed_at", "id")
        self._size = size
        self._kept = 0
        self._named: list[str] = []

    def carry_out(self) -> int:
        """Delete them, and return how many were."""
        last: _Place | None = None
        try:
            while batch := self._places(last):
                self._delete(batch)
                last = batch[-1]
        except Exception as exc:
            if self.deleted:
                exc.add_note(f"Before that, {self.deleted} finished runs were deleted.")
            raise
        if self._kept:
            logger.warning(
                "%d finished runs were not deleted, for rows of other tables refer to them: %s",
                self._kept,
                "; ".join(self._named) + ("; …" if self._kept > SHOWN else ""),
            )
        return self.deleted

    @tries_again
    def _places(self, after: _Place | None) -> list[_Place]:
        runs = self._finished
        if after is not None:
            # The last part alone lets the database begin within its index.
            runs = runs.filter(
                Q(completed_at__gt=after.completed_at) | Q(id__gt=after.id),
                completed_at__gte=after.completed_at,
            )
        places: Any = runs.values_list("completed_at", "id")[: self._size]
        return list(itertools.starmap(_Place, places))

    def _delete(self, batch: list[_Place]) -> None:
        try:
            self.deleted += self._delete_at_once([place.id for place in batch])
        except IntegrityError as exc:
            half = len(batch) // 2
            if half:
                self._delete(batch[:half])
                self._delete(batch[half:])
                return
            self._kept += 1
            if self._kept <= SHOWN:
                self._named.append(f"{batch[0].id} ({exc.args[0]})")

    @tries_again
    def _delete_at_once(self, run_ids: list[str]) -> int:
        with self._rows.read_committed():
            self._rows.begin_writing()
            locked = self._rows.with_lock(self._finished.filter(pk__in=run_ids))
            still_there = list(locked.values_list("pk", flat=True))
            self._rows.delete(still_there)
        return len(still_there)

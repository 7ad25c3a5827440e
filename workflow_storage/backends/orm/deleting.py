"""Finished runs deleted batch by batch, in the order of their ends, for the repository of runs."""

from __future__ import annotations

import itertools
import logging
from typing import TYPE_CHECKING, Any, NamedTuple

from django.db import IntegrityError
from django.db.models import Q

from workflow_storage.backends.orm.conditions import conditions_of, with_values
from workflow_storage.backends.orm.errors import tries_again

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from django.db.models import QuerySet

    from workflow_storage.backends.orm.run_rows import RunRows
    from workflow_storage.filters import ValidFinished
    from workflow_storage.models import WorkflowRun

logger = logging.getLogger(__name__)

SHOWN = 20
"""Runs that could not be deleted that are named."""


class Place(NamedTuple):
    """Where a run is in the order of the ends, and in that of the starts of its workflow."""

    completed_at: datetime
    id: str
    workflow_name: str
    started_at: datetime

    @classmethod
    def of(cls, run: WorkflowRun) -> Place:
        """Return the place of a run that has ended."""
        assert run.completed_at is not None
        return cls(run.completed_at, run.id, run.workflow_name, run.started_at)


class FinishedRuns:
    """The runs that ended before a time, in the order of their ends, but for those to be spared.

    Args:
        rows: the database.
        finished: which runs.
    """

    def __init__(self, rows: RunRows, finished: ValidFinished) -> None:
        filters = finished.filters
        runs = with_values(rows.runs, conditions_of(filters))
        self._rows = rows
        self._matching = runs.none() if filters.match_none else runs
        self._but_for_labels = with_values(rows.runs, conditions_of(filters._replace(labels={})))
        self._labels = filters.labels
        self._before = finished.before
        self._keep_last = finished.keep_last
        # Of each workflow, where the last of those is that are spared; None if all of them are.
        self._last_spared: dict[str, tuple[datetime, str] | None] = {}

    def all(self) -> QuerySet[WorkflowRun]:
        """Return them all, and those to be spared."""
        return self._matching.filter(completed_at__lt=self._before)

    def after(self, place: Place | None) -> QuerySet[WorkflowRun]:
        """Return those after a place, in their order."""
        runs = self.all().order_by("completed_at", "id")
        if place is None:
            return runs
        # The last part alone lets the database begin within its index.
        return runs.filter(
            Q(completed_at__gt=place.completed_at) | Q(id__gt=place.id),
            completed_at__gte=place.completed_at,
        )

    def locked(self, run_ids: list[str]) -> list[str]:
        """Lock those of some runs that still match, and return their ids.

        The rows of their labels are read afterwards. The statement that waits for a lock would
        read those that were there before it.
        """
        rows = self._rows
        rows.begin_writing()
        ended = self._but_for_labels.filter(completed_at__lt=self._before, pk__in=run_ids)
        matching = list(rows.with_lock(ended.order_by("pk")).values_list("pk", flat=True))
        for name, value in self._labels.items():
            labels = rows.labels.filter(run_id__in=matching, name=name, value=value)
            labelled = set(rows.as_of_now(labels).values_list("run_id", flat=True))
            matching = [run_id for run_id in matching if run_id in labelled]
        return matching

    def spares(self, place: Place) -> bool:
        """Whether a run is one of the newest of its workflow."""
        if not self._keep_last:
            return False
        name = place.workflow_name
        if name not in self._last_spared:
            newest = self._matching.filter(workflow_name=name).order_by("-started_at", "-id")
            places: Any = newest.values_list("started_at", "id")
            last = list(places[self._keep_last - 1 : self._keep_last])
            self._last_spared[name] = last[0] if last else None
        spared = self._last_spared[name]
        return spared is None or (place.started_at, place.id) >= spared


class Deletion:
    """Deletes runs, each batch in a transaction of its own, and goes past those that it cannot.

    Args:
        rows: the database.
        finished: which runs.
        size: how many a batch has.
        on_batch: called with how many were deleted in each.

    Attributes:
        alias: the database's name in DATABASES.
        deleted: how many runs have been deleted so far.
    """

    def __init__(
        self,
        rows: RunRows,
        finished: ValidFinished,
        size: int,
        on_batch: Callable[[int], object] | None = None,
    ) -> None:
        self.alias = rows.alias
        self.deleted = 0
        self._rows = rows
        self._finished = FinishedRuns(rows, finished)
        self._limit = finished.limit
        self._size = size
        self._on_batch = on_batch
        self._kept = 0
        self._named: list[str] = []

    def carry_out(self) -> int:
        """Delete them, and return how many were."""
        last: Place | None = None
        try:
            while self.deleted < self._limit and (batch := self._places(last)):
                last = batch[-1]
                self._delete_some([place.id for place in batch if not self._is_spared(place)])
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

    def _delete_some(self, run_ids: list[str]) -> None:
        """Delete runs as far as the limit lets it."""
        while run_ids and self.deleted < self._limit:
            left = self._limit - self.deleted
            self._delete(run_ids[:left])
            run_ids = run_ids[left:]

    @tries_again
    def _is_spared(self, place: Place) -> bool:
        return self._finished.spares(place)

    @tries_again
    def _places(self, after: Place | None) -> list[Place]:
        places: Any = self._finished.after(after).values_list(*Place._fields)[: self._size]
        return list(itertools.starmap(Place, places))

    def _delete(self, run_ids: list[str]) -> None:
        try:
            deleted = self._delete_at_once(run_ids)
        except IntegrityError as exc:
            half = len(run_ids) // 2
            if half:
                self._delete(run_ids[:half])
                self._delete(run_ids[half:])
                return
            self._kept += 1
            if self._kept <= SHOWN:
                self._named.append(f"{run_ids[0]} ({exc.args[0]})")
            return
        self.deleted += deleted
        if self._on_batch is not None:
            self._on_batch(deleted)

    @tries_again
    def _delete_at_once(self, run_ids: list[str]) -> int:
        with self._rows.read_committed():
            still_there = self._finished.locked(run_ids)
            self._rows.delete(still_there)
        return len(still_there)

"""The runs that an action was chosen for, newest first: of a database, or of another store."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple

from django.db.models import Q
from django.utils.formats import number_format

from workflow_storage.models import ExecutionState, WorkflowRun
from workflow_storage.validation import PAYLOADS, is_possible_id

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from datetime import datetime, timedelta

    from django.db.models import QuerySet

    from workflow_storage.admin.selection import Selection
    from workflow_storage.base import StorageBackend

COUNTED = 1000
"""So far is counted how many runs there are, and how many states."""

_PAGE = 20
"""Runs with their payloads that are read at a time."""


class Position(NamedTuple):
    """Where a list of runs begins, newest first."""

    started_at: datetime
    run_id: str
    includes_run: bool
    """Whether that run is its first one, or the one before that."""

    def has(self, run: WorkflowRun) -> bool:
        """Whether a run is in the list."""
        here, there = (run.started_at, run.pk), (self.started_at, self.run_id)
        return here < there or (self.includes_run and here == there)


class ChosenRuns(ABC):
    """The runs that an action was chosen for, in one store."""

    def __init__(self, store: StorageBackend) -> None:
        self.store = store

    @abstractmethod
    def newest(self, limit: int) -> list[WorkflowRun]:
        """Return the newest ones, without payloads."""

    @abstractmethod
    def left(self, position: Position, limit: int) -> list[WorkflowRun]:
        """Return the newest ones from a position on, without payloads."""

    @abstractmethod
    def count_left(self, position: Position) -> int:
        """Count those from a position on, but no further than one more than `COUNTED`."""

    @abstractmethod
    def count_states(self, runs: list[WorkflowRun]) -> int:
        """Count the states of some runs, but no further than one more than `COUNTED`."""

    @abstractmethod
    def ids_of(self, selected: set[str]) -> tuple[set[str], set[str]]:
        """Return which of the selected ids are chosen, and which there are at all."""

    def first_and_last_step(self, run_id: str) -> list[tuple[int, str]]:
        """Return step and node of the first and the newest state of a run; nothing without any."""
        steps = [(one["step"], one["node_id"]) for one in self.store.states.iter_steps(run_id)]
        return [steps[0], steps[-1]] if steps else []


class RunsOfDatabase(ChosenRuns):
    """Those that a queryset finds."""

    def __init__(self, store: StorageBackend, runs: QuerySet[Any]) -> None:
        super().__init__(store)
        self._found = runs
        self._runs: QuerySet[WorkflowRun] = runs.order_by("-started_at", "-id").only(
            "id", "workflow_name", "status", "started_at", "completed_at", "labels"
        )

    def newest(self, limit: int) -> list[WorkflowRun]:
        return list(self._runs[:limit])

    def left(self, position: Position, limit: int) -> list[WorkflowRun]:
        return list(self._left(position)[:limit])

    def _left(self, position: Position) -> QuerySet[WorkflowRun]:
        lookup = "id__lte" if position.includes_run else "id__lt"
        # The last part alone lets the database begin within its index.
        return self._runs.filter(
            Q(started_at__lt=position.started_at) | Q(**{lookup: position.run_id}),
            started_at__lte=position.started_at,
        )

    def count_left(self, position: Position) -> int:
        return _counted(self._left(position))

    def count_states(self, runs: list[WorkflowRun]) -> int:
        states = ExecutionState.objects.using(self._runs.db)
        return _counted(states.filter(run_id__in=[run.pk for run in runs]).order_by())

    def ids_of(self, selected: set[str]) -> tuple[set[str], set[str]]:
        chosen = set(self._found.order_by().values_list("pk", flat=True))
        there = WorkflowRun.objects.using(self._runs.db).filter(pk__in=selected - chosen)
        return chosen, chosen.union(there.values_list("pk", flat=True))


class RunsOfStore(ChosenRuns):
    """Those of a store that is no database: with some ids, or all that a selection asks for."""

    def __init__(
        self,
        store: StorageBackend,
        selection: Selection,
        stalled_after: timedelta,
        run_ids: Iterable[str] | None = None,
    ) -> None:
        super().__init__(store)
        self._selection = selection
        self._stalled_after = stalled_after
        self._run_ids = run_ids

    def newest(self, limit: int) -> list[WorkflowRun]:
        return list(itertools.islice(self._each(None), limit))

    def left(self, position: Position, limit: int) -> list[WorkflowRun]:
        return list(itertools.islice(self._each(position), limit))

    def count_left(self, position: Position) -> int:
        return sum(1 for _ in itertools.islice(self._each(position), COUNTED + 1))

    def count_states(self, runs: list[WorkflowRun]) -> int:
        steps = (self.store.states.iter_steps(run.pk) for run in runs)
        return sum(1 for _ in itertools.islice(itertools.chain.from_iterable(steps), COUNTED + 1))

    def ids_of(self, selected: set[str]) -> tuple[set[str], set[str]]:
        chosen = {run.pk for run in self._each(None)}
        rest = (self.store.runs.get(run_id) for run_id in selected - chosen)
        return chosen, chosen.union(run.pk for run in rest if run is not None)

    def _each(self, position: Position | None) -> Iterator[WorkflowRun]:
        few = self.few()
        runs = self._all(position) if few is None else few
        for run in runs:
            if position is None or position.has(run):
                for name in PAYLOADS:
                    setattr(run, name, None)
                yield run

    def few(self) -> list[WorkflowRun] | None:
        """Return, newest first, those that no list of the store has to be read for; None if one has to be."""
        filters = self._selection.filters
        if filters.match_none:
            return []
        runs: Iterable[WorkflowRun | None]
        if self._run_ids is not None:
            runs = (self.store.runs.get(one) for one in self._run_ids if is_possible_id(one))
        elif self._selection.stalled:
            runs = self.store.runs.list_stalled(self._stalled_after)
        else:
            return None
        found = [run for run in runs if run is not None and filters.matches(run)]
        return sorted(found, key=lambda run: (run.started_at, run.pk), reverse=True)

    def _all(self, position: Position | None) -> Iterator[WorkflowRun]:
        filters, last = self._selection.run_filters(), None
        if position is not None:
            last = WorkflowRun(id=position.run_id, started_at=position.started_at)
            first = self.store.runs.get(position.run_id) if position.includes_run else None
            if first is not None and self._selection.filters.matches(first):
                yield first
        while page := self.store.runs.list_runs(before=last, limit=_PAGE, **filters):
            last = page[-1]
            yield from page


def _counted(rows: QuerySet[Any]) -> int:
    # In their order, or the database might read the whole table to find so many.
    return rows.values("pk")[: COUNTED + 1].count()


def counted_text(count: int) -> str:
    """Return a number as it was counted, up to `COUNTED`."""
    text = number_format(min(count, COUNTED), force_grouping=True)
    return f"{text}+" if count > COUNTED else text

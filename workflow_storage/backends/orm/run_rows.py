"""The rows of the runs, their labels and their attempts: the statements of the repository."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django.db import IntegrityError
from django.db.models import (
    Case,
    DurationField,
    ExpressionWrapper,
    F,
    FloatField,
    Func,
    OuterRef,
    ProtectedError,
    QuerySet,
    RestrictedError,
    Subquery,
    Value,
    When,
)
from django.db.models.deletion import Collector
from django.db.models.functions import Coalesce, Greatest
from django.db.models.signals import post_delete, pre_delete

from workflow_storage.backends.orm.compiled_queries import Parameter, delete_rows
from workflow_storage.backends.orm.conditions import conditions_of, with_values
from workflow_storage.backends.orm.dialects import dialect_of
from workflow_storage.backends.orm.errors import conflict
from workflow_storage.backends.orm.repository import Database
from workflow_storage.base import Attempt
from workflow_storage.models import WorkflowRun, WorkflowRunAttempt, WorkflowRunLabel
from workflow_storage.querysets import WorkflowRunQuerySet, stalled_before
from workflow_storage.status import RunStatus

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from datetime import datetime, timedelta

    from workflow_storage.attempts import StatusChange
    from workflow_storage.backends.orm.conditions import Condition
    from workflow_storage.filters import ValidFilters


RARE = 1000
"""Runs that are looked at to tell which of several labels, or other filters, is the rarest."""

COMMON = 10_000
"""Runs that are not sorted for a page of them."""


class RunRows(Database):
    """The runs in a database."""

    @property
    def labels(self) -> QuerySet[WorkflowRunLabel]:
        """The rows of all labels."""
        return WorkflowRunLabel._base_manager.using(self.alias)

    @property
    def attempts(self) -> QuerySet[WorkflowRunAttempt]:
        """The rows of all attempts that are over."""
        return WorkflowRunAttempt._base_manager.using(self.alias)

    def insert(self, fields: dict[str, Any], attempts: Iterable[Attempt] = ()) -> None:
        """Insert a run with its labels and the attempts that are over.

        Raises:
            IntegrityError: if its id is taken.
        """
        attempts = list(attempts)
        if not fields["labels"] and not attempts:
            with self.one_statement():
                self.run_queries.insert(**fields)
            return
        with self.transaction():
            self.run_queries.insert(**fields)
            self.insert_labels(fields["id"], fields["labels"], fields["started_at"])
            if attempts:
                self.insert_attempts(fields["id"], attempts)

    def change_status(
        self, run_id: str, change: StatusChange, conditions: Sequence[Condition]
    ) -> bool:
        """Carry out a change of status if a run meets some conditions, in one statement.

        Returns:
            Whether it did.
        """
        changes: dict[str, Any] = {**change.fields}
        if not change.sets_duration:
            changes["duration_seconds"] = _DURATION
        if change.status.is_terminal:
            changes["completed_at"] = _COMPLETED_AT
        if change.is_beginning:
            changes["attempt"] = F("attempt") + 1
        return self.change(run_id, changes, conditions, at=change.at)

    def change(
        self,
        run_id: str,
        changes: Mapping[str, Any],
        conditions: Sequence[Condition],
        **parameters: Any,
    ) -> bool:
        """Change columns of a run, and the rows of its labels; see `update_run`."""
        labels = changes.get("labels")
        if labels is None:
            with self.one_statement():
                return self.update_run(run_id, changes, conditions, **parameters)
        with self.transaction():
            changed = self.update_run(run_id, changes, conditions, **parameters)
            if changed:
                self.replace_labels(run_id, labels)
            return changed

    def insert_labels(self, run_id: str, labels: Mapping[str, str], started_at: datetime) -> None:
        """Insert the rows of the labels of a run."""
        self.labels.bulk_create(
            WorkflowRunLabel(run_id=run_id, name=name, value=value, started_at=started_at)
            for name, value in labels.items()
        )

    def labels_of(self, run_id: str) -> dict[str, str]:
        """Return the labels of a run, which is locked."""
        run = self.with_lock(self.run(run_id)).values_list("labels", flat=True)
        labels: dict[str, str] = next(iter(run), {})
        return labels

    def replace_labels(self, run_id: str, labels: Mapping[str, str]) -> None:
        """Let the rows of the labels of a run, which is locked, be these."""
        delete_rows(self.labels.filter(run_id=run_id))
        run = self.as_of_now(self.run(run_id))
        for started_at in run.values_list("started_at", flat=True):
            self.insert_labels(run_id, labels, started_at)

    def insert_attempts(self, run_id: str, attempts: Iterable[Attempt]) -> None:
        """Insert the rows of attempts that are over, unless they are there."""
        rows = [WorkflowRunAttempt(run_id=run_id, **attempt._asdict()) for attempt in attempts]
        # A look at which are there would see those of an old snapshot, or lock those of other runs.
        self.attempts.bulk_create(rows, ignore_conflicts=True)

    def attempts_of(self, run_id: str) -> list[Attempt]:
        """Return the attempts of a run that are over, oldest first."""
        rows = self.attempts.filter(run_id=run_id).order_by("number")
        return [Attempt(*row) for row in rows.values_list(*Attempt._fields)]

    def rarest_first(self, filters: ValidFilters) -> ValidFilters:
        """Return filters that say how a page of runs is best found.

        With labels that is by the rows of the first label, which is the rarest of several, or by
        the runs themselves, if those of the workflow or in the status are rarer still. Without, it
        is by an index, or by looking at all, newest first, if so many match that few are passed over.
        """
        if not filters.labels:
            return filters._replace(by_start=self._are_common(filters))
        if len(filters.labels) > 1:
            labels = sorted(filters.labels.items(), key=self._frequency_of)
            filters = filters._replace(labels=dict(labels))
        return filters._replace(by_label=not self._runs_are_rarer(filters))

    def _frequency_of(self, label: tuple[str, str]) -> tuple[int, float]:
        """Return what is less for a label that fewer runs have."""
        rows = self.labels.filter(name=label[0], value=label[1])
        last = _start_of_last(rows)
        return (rows[:RARE].count(), 0.0) if last is None else (RARE, last.timestamp())

    def in_order_of_start(self, filters: ValidFilters) -> ValidFilters:
        """Return filters for who reads runs by their own start, not by the rows of a label.

        Those of a label of few runs are sorted; a label of many is looked up run by run.
        """
        if not filters.reads_labels:
            return filters
        name, value = next(iter(filters.labels.items()))
        rows = self.labels.filter(name=name, value=value)
        return filters._replace(by_label=rows[:COMMON].count() < COMMON)

    def _are_common(self, filters: ValidFilters) -> bool:
        """Whether there are so many runs of several workflows or statuses that sorting them takes long."""
        several = max(len(filters.workflow_names or ()), len(filters.statuses or ())) > 1
        if not several or filters.match_none or dialect_of(self.connection).has_statistics:
            return False
        some = filters._replace(waiting=None, parent_id=None, error=None)
        return with_values(self.runs, conditions_of(some))[:COMMON].count() == COMMON

    def _runs_are_rarer(self, filters: ValidFilters) -> bool:
        """Whether there are fewer runs that meet the other filters than runs of the first label."""
        others = filters._replace(labels={}, waiting=None, error=None)
        if filters.waiting:
            others = others._replace(statuses=[RunStatus.PENDING])
        several = others.parent_id, others.workflow_names, others.statuses
        if several == (None, None, None):
            return False
        of_label = self.labelled(filters._replace(labels=dict([*filters.labels.items()][:1])))
        runs = with_values(self.runs, conditions_of(others))
        last_of_label = _start_of_last(of_label)
        if last_of_label is None:
            return False
        if others.parent_id or max(len(some or ()) for some in several[1:]) > 1:
            # There is no index to read these in order.
            return runs[:RARE].count() < RARE
        last = _start_of_last(runs)
        return last is None or last < last_of_label

    def labelled(self, filters: ValidFilters) -> QuerySet[WorkflowRunLabel]:
        """Return the rows of the one label that filters ask for, in their time."""
        ((name, value),) = filters.labels.items()
        rows = self.labels.filter(name=name, value=value)
        if filters.started_after is not None:
            rows = rows.filter(started_at__gte=filters.started_after)
        if filters.started_before is not None:
            rows = rows.filter(started_at__lt=filters.started_before)
        return rows

    def stalled(self, idle: timedelta) -> QuerySet[WorkflowRun]:
        """Return the running runs without a sign of life for longer."""
        return WorkflowRunQuerySet(WorkflowRun, using=self.alias).stalled(idle)

    def lock_stalled(self, run_ids: list[str], idle: timedelta) -> list[str]:
        """Lock some runs, and return the ids of those that are stalled once they are locked.

        One statement would wait for the lock of a save, and then decide by what was before it.
        """
        self.begin_writing()
        runs = self.with_lock(self.runs.filter(pk__in=run_ids).order_by("pk"), no_key=True)
        locked = list(runs.values_list("pk", flat=True))
        # What a query reads within is not locked with it, and so not seen as of now.
        states = self.as_of_now(self.states.filter(run_id=OuterRef("pk"))).order_by("-step")
        newest: Any = Subquery(states.values("created_at")[:1])
        stalled = self.as_of_now(self.stalled(idle).filter(pk__in=locked))
        last_signs = stalled.values_list("pk", newest)
        before = stalled_before(idle)
        return [run_id for run_id, saved in last_signs if saved is None or saved < before]

    def delete(self, run_ids: list[str]) -> None:
        """Delete runs, which are locked, with all that belongs to them.

        Signals are sent for the runs alone: what else there is of a run can be large.

        Raises:
            IntegrityError: if something refers to one of them that is not to go with it.
        """
        has_snapshot = self.has_snapshot
        try:
            for rows in (self.labels, self.attempts, self.states):
                delete_rows(rows.filter(run_id__in=run_ids))
            self._delete_runs(run_ids)
            if self.in_transaction:
                # Rows that refer to them would make the caller's COMMIT fail.
                self.check_references(WorkflowRun)
        except IntegrityError as exc:
            if has_snapshot and not isinstance(exc, ProtectedError | RestrictedError):
                raise conflict(self.alias, exc) from exc
            raise

    def _delete_runs(self, run_ids: list[str]) -> None:
        runs = self.as_of_now(self.runs.filter(pk__in=run_ids))
        if not (pre_delete.has_listeners(WorkflowRun) or post_delete.has_listeners(WorkflowRun)):
            # QuerySet.delete() would do the same, but without the lock.
            collector = Collector(using=self.alias, origin=runs)
            collector.collect(runs.only("pk"))
            collector.delete()
            return
        # Who listens may read any field, also once the row is gone; so one is loaded at a time.
        for run in runs.iterator(chunk_size=1):
            run.delete(using=self.alias)


def _start_of_last(rows: QuerySet[Any]) -> datetime | None:
    """Return how far back one has to go for so many rows; None if there are not so many."""
    starts = rows.order_by("-started_at").values_list("started_at", flat=True)
    return next(iter(starts[RARE - 1 : RARE]), None)


class _Seconds(Func):
    """A DurationField expression as seconds."""

    output_field = FloatField()
    arity = 1
    # Where durations are no type of their own, Django computes microseconds.
    template = "(%(expressions)s) / 1e6"

    def as_postgresql(self, compiler: Any, connection: Any) -> Any:
        return self.as_sql(
            compiler, connection, template="EXTRACT(EPOCH FROM %(expressions)s)::double precision"
        )


_AT = Parameter("at", WorkflowRun._meta.get_field("completed_at"))
# A clock may have gone back.
_COMPLETED_AT = Greatest(_AT, F("started_at"))
_SINCE_BEGINNING = _Seconds(
    ExpressionWrapper(
        _AT - Coalesce(F("attempt_started_at"), F("started_at")), output_field=DurationField()
    )
)
_DURATION = Case(
    When(
        status=RunStatus.RUNNING.value,
        then=Coalesce(F("duration_seconds"), Value(0.0))
        + Greatest(_SINCE_BEGINNING, Value(0.0), output_field=FloatField()),
    ),
    default=F("duration_seconds"),
    output_field=FloatField(),
)

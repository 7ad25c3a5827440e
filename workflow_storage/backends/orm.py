"""The repositories on the Django ORM: any database that Django speaks to."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar, Unpack

from django.db import IntegrityError, connections, transaction
from django.db.models import (
    DurationField,
    ExpressionWrapper,
    F,
    FloatField,
    Func,
    Model,
    OuterRef,
    Q,
    QuerySet,
    Subquery,
)
from django.db.models.expressions import Expression
from django.utils import timezone

from workflow_storage.backends.compiled import Parameter
from workflow_storage.backends.errors import MAX_ATTEMPTS, translates_errors
from workflow_storage.backends.orm_database import (
    RUN_ID,
    DjangoRepository,
    parameter,
)
from workflow_storage.base import (
    AbstractWorkflowRunRepository,
    Checkpoint,
    RunFilters,
)
from workflow_storage.exceptions import (
    RunAlreadyExistsError,
    RunChangedError,
    RunNotFoundError,
    StatusConflictError,
)
from workflow_storage.models import (
    WorkflowRun,
)
from workflow_storage.status import TERMINAL_STATUSES, RunStatus
from workflow_storage.validation import (
    RESULT_TIMES,
    equal_runs,
    plain_text,
    possible_id,
    run_fields,
    valid_count,
    valid_expected,
    valid_fields,
    valid_filters,
    valid_idle,
    valid_moment,
    valid_new_run,
    valid_status,
    valid_terminal_statuses,
    valid_updates,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from datetime import datetime, timedelta

from workflow_storage.backends.orm_states import DjangoExecutionStateRepository

__all__ = ["DjangoExecutionStateRepository", "DjangoWorkflowRunRepository"]

_M = TypeVar("_M", bound=Model)

# SQLite takes at most 32,766 parameters in a statement.
MAX_BATCH = 10_000


class DjangoWorkflowRunRepository(DjangoRepository, AbstractWorkflowRunRepository):
    """The runs in a Django database.

    The models' signals (pre_save, post_save) are not sent, as with `bulk_create`.

    Args:
        alias: the database's name in DATABASES.
    """

    @translates_errors
    def add(self, run: WorkflowRun) -> None:
        """See `AbstractWorkflowRunRepository.add`."""
        fields = valid_new_run(run_fields(run))
        self._insert(fields)
        for name, value in fields.items():
            setattr(run, name, value)
        run._state.adding = False
        run._state.db = self.alias

    def _insert(self, fields: dict[str, Any]) -> None:
        for attempt in range(MAX_ATTEMPTS):
            try:
                with self._one_statement():
                    self._run_queries.insert(**fields)
                break
            except IntegrityError as exc:
                if self._status(fields["id"]) is not None:
                    raise RunAlreadyExistsError(fields["id"]) from exc
                # Whoever had the id has been deleted since.
                if attempt == MAX_ATTEMPTS - 1:
                    raise

    @translates_errors
    def get(self, run_id: str) -> WorkflowRun | None:
        """See `AbstractWorkflowRunRepository.get`."""
        if not possible_id(run_id):
            return None
        return next(
            iter(self._run_queries.objects("get", self._the_run, keyed=True, run_id=run_id)), None
        )

    @translates_errors
    def list_runs(
        self,
        *,
        before: str | WorkflowRun | None = None,
        limit: int = 100,
        **filters: Unpack[RunFilters],
    ) -> list[WorkflowRun]:
        """See `AbstractWorkflowRunRepository.list_runs`."""
        valid_count("limit", limit)
        values = _checked(filters)
        if before is not None:
            values["before_started_at"], values["before_id"] = self._position(before)
        if limit == 0 or _matches_none(values):
            return []

        def page() -> QuerySet[WorkflowRun]:
            runs = self._matching({name: parameter(name) for name in values})
            return runs.order_by("-started_at", "-id")[:limit]

        return self._run_queries.objects(("list", limit, *values), page, keyed=False, **values)

    @translates_errors
    def count_runs(self, **filters: Unpack[RunFilters]) -> int:
        """See `AbstractWorkflowRunRepository.count_runs`."""
        values = _checked(filters)
        return 0 if _matches_none(values) else self._matching(values).count()

    @translates_errors
    def update(self, run_id: str, **fields: Any) -> None:
        """See `AbstractWorkflowRunRepository.update`."""
        changes = valid_updates(fields)
        if changes:
            self._change(run_id, changes)
        elif self._status(run_id) is None:
            raise RunNotFoundError(run_id)

    @translates_errors
    def update_status(
        self,
        run_id: str,
        status: str,
        *,
        expected: str | Iterable[str] | None = None,
        **fields: Any,
    ) -> None:
        """See `AbstractWorkflowRunRepository.update_status`."""
        new_status = valid_status(status)
        changes = {**valid_updates(fields, new_status), "status": new_status.value}
        now = timezone.now()
        if new_status.is_terminal:
            if changes.get("completed_at") is None:
                changes["completed_at"] = now
            if changes.get("duration_seconds") is None:
                changes["duration_seconds"] = _SINCE_START
        else:
            changes |= {**dict.fromkeys(RESULT_TIMES), "heartbeat_at": now}
        self._change(run_id, changes, None if expected is None else valid_expected(expected))

    @translates_errors
    def heartbeat(self, run_id: str) -> None:
        """See `AbstractWorkflowRunRepository.heartbeat`."""
        self._change(run_id, {"heartbeat_at": timezone.now()})

    @translates_errors
    def delete(self, run_id: str) -> None:
        """See `AbstractWorkflowRunRepository.delete`."""
        with transaction.atomic(using=self.alias):
            self._lock(run_id, to_delete=True)
            self._delete_runs([plain_text(run_id)])

    @translates_errors
    def delete_finished(
        self,
        *,
        before: datetime,
        workflow_name: str | None = None,
        statuses: str | Iterable[str] = TERMINAL_STATUSES,
        batch_size: int = 1000,
    ) -> int:
        """See `AbstractWorkflowRunRepository.delete_finished`."""
        values = _checked(
            {"workflow_name": workflow_name, "status": valid_terminal_statuses(statuses)}
        )
        valid_moment("before", before)
        size = min(valid_count("batch_size", batch_size, minimum=1), MAX_BATCH)
        if _matches_none(values):
            return 0
        finished = self._matching(values).filter(completed_at__lt=before)
        batch = self._locked(finished.order_by("completed_at"), to_delete=True)[:size]
        deleted = 0
        while True:
            with transaction.atomic(using=self.alias):
                self._begin_writing()
                run_ids = list(batch.values_list("pk", flat=True))
                self._delete_runs(run_ids)
            if not run_ids:
                return deleted
            deleted += len(run_ids)

    @translates_errors
    def list_stalled(self, idle: timedelta) -> list[WorkflowRun]:
        """See `AbstractWorkflowRunRepository.list_stalled`."""
        return list(self._stalled(idle).order_by("-started_at", "-id"))

    @translates_errors
    def fail_if_stalled(self, run_id: str, idle: timedelta) -> bool:
        """See `AbstractWorkflowRunRepository.fail_if_stalled`."""
        with transaction.atomic(using=self.alias), suppress(RunNotFoundError):
            self._lock(run_id)
            if self._stalled(idle).filter(pk=plain_text(run_id)).exists():
                self._fail_as_stalled(run_id, idle)
                return True
        return False

    @translates_errors
    def put(self, run: WorkflowRun, *, over: WorkflowRun | None = None) -> None:
        """See `AbstractWorkflowRunRepository.put`."""
        fields = valid_fields(run_fields(run))
        if over is None:
            self._insert(fields)
            return
        with transaction.atomic(using=self.alias):
            self._lock(run.id)
            self._refuse_if_changed(run.id, over)
            self._runs.filter(pk=fields.pop("id")).update(**fields)

    @translates_errors
    def delete_unchanged(self, run: WorkflowRun, last: Checkpoint | None) -> None:
        """See `AbstractWorkflowRunRepository.delete_unchanged`."""
        with transaction.atomic(using=self.alias):
            self._lock(run.id, to_delete=True)
            self._refuse_if_changed(run.id, run)
            states = self._with_lock(self._states.filter(run_id=run.id).order_by("-step"))
            newest = states.values_list("step", "node_id", "created_at").first()
            if newest != (last and (last["step"], last["node_id"], last["created_at"])):
                raise RunChangedError(run.id)
            self._delete_runs([run.id])

    def _refuse_if_changed(self, run_id: str, as_read: WorkflowRun) -> None:
        # A plain read can be of a snapshot from before the lock (REPEATABLE READ).
        stored = self._with_lock(self._runs.filter(pk=run_id)).first()
        if stored is None:
            raise RunNotFoundError(run_id)
        if not equal_runs(stored, as_read):
            raise RunChangedError(run_id)

    def _with_lock(self, rows: QuerySet[_M]) -> QuerySet[_M]:
        features = connections[self.alias].features
        return rows.select_for_update() if features.has_select_for_update else rows

    def in_transaction(self) -> bool:
        """See `AbstractWorkflowRunRepository.in_transaction`."""
        return connections[self.alias].in_atomic_block

    def on_commit(self, callback: Callable[[], object]) -> None:
        """See `AbstractWorkflowRunRepository.on_commit`."""
        transaction.on_commit(callback, using=self.alias, robust=True)

    def _stalled(self, idle: timedelta) -> QuerySet[WorkflowRun]:
        cutoff = timezone.now() - valid_idle(idle)
        newest_state = self._states.filter(run_id=OuterRef("pk")).order_by("-step")
        return (
            self._runs.filter(status=RunStatus.RUNNING, started_at__lt=cutoff)
            .filter(Q(heartbeat_at__isnull=True) | Q(heartbeat_at__lt=cutoff))
            .alias(newest_state_at=Subquery(newest_state.values("created_at")[:1]))
            .filter(Q(newest_state_at__isnull=True) | Q(newest_state_at__lt=cutoff))
        )

    def _matching(self, values: Mapping[str, Any]) -> QuerySet[WorkflowRun]:
        """Give the runs that match what `_checked` gave, or parameters of those names."""
        runs = self._runs.all()
        if "workflow_name" in values:
            runs = runs.filter(workflow_name=values["workflow_name"])
        statuses = [value for name, value in values.items() if name.startswith("status_")]
        if len(statuses) == 1:
            # A plain comparison lets the database read its index in order.
            runs = runs.filter(status=statuses[0])
        elif statuses:
            runs = runs.filter(status__in=statuses)
        if "started_after" in values:
            runs = runs.filter(started_at__gte=values["started_after"])
        if "started_before" in values:
            runs = runs.filter(started_at__lt=values["started_before"])
        if "before_id" in values:
            started_at = values["before_started_at"]
            # The last condition alone lets the database begin within its index.
            runs = runs.filter(
                Q(started_at__lt=started_at) | Q(id__lt=values["before_id"]),
                started_at__lte=started_at,
            )
        return runs

    def _position(self, before: str | WorkflowRun) -> tuple[datetime, str]:
        if isinstance(before, WorkflowRun):
            return before.started_at, before.id
        if possible_id(before):
            run_id = plain_text(before)
            run = self._runs.filter(pk=run_id)
            for started_at in run.values_list("started_at", flat=True):
                return started_at, run_id
        raise RunNotFoundError(before)

    def _status(self, run_id: str) -> str | None:
        """Give the status of a run, or None if there is no such run."""
        if not possible_id(run_id):
            return None
        run = self._runs.filter(pk=plain_text(run_id))
        return run.values_list("status", flat=True).first()

    def _change(
        self,
        run_id: str,
        changes: dict[str, Any],
        expected: frozenset[RunStatus] | None = None,
    ) -> None:
        """Change columns of a run, if it is in one of the expected statuses; or say why not."""
        statuses = {f"status_{status}": status.value for status in sorted(expected or ())}
        columns = {
            name: value
            if isinstance(value, Expression)
            else Parameter(name, WorkflowRun._meta.get_field(name), for_save=True)
            for name, value in changes.items()
        }
        computed = [name for name, value in changes.items() if isinstance(value, Expression)]

        def the_run() -> QuerySet[WorkflowRun]:
            return self._matching({name: parameter(name) for name in statuses}).filter(pk=RUN_ID)

        if possible_id(run_id) and (expected is None or expected):
            with self._one_statement():
                if self._run_queries.update(
                    ("update", *sorted(changes), *computed, *statuses),
                    the_run,
                    sorted(columns.items()),
                    run_id=run_id,
                    **changes,
                    **statuses,
                ):
                    return
        status = self._status(run_id)
        # Without an expectation, a run that is there now has been added since.
        if status is None or expected is None:
            raise RunNotFoundError(run_id)
        raise StatusConflictError(run_id, status, tuple(sorted(expected)))

    def _delete_runs(self, run_ids: list[str]) -> None:
        self._states.filter(run_id__in=run_ids).delete()
        self._runs.filter(pk__in=run_ids).only("pk").delete()


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


_SINCE_START = _Seconds(
    ExpressionWrapper(
        Parameter("completed_at", WorkflowRun._meta.get_field("completed_at")) - F("started_at"),
        output_field=DurationField(),
    )
)


def _checked(filters: RunFilters) -> dict[str, Any]:
    """Check filters and give their values by name, one name for each status."""
    valid = valid_filters(filters)
    if valid.match_none:
        return {"none": None}
    values = {
        "workflow_name": valid.workflow_name,
        "started_after": valid.started_after,
        "started_before": valid.started_before,
    }
    statuses = {
        f"status_{number}": status.value for number, status in enumerate(valid.statuses or ())
    }
    return {name: value for name, value in values.items() if value is not None} | statuses


def _matches_none(values: dict[str, Any]) -> bool:
    """Whether a filter is one that no run can match: an impossible name, or no status."""
    return None in values.values()

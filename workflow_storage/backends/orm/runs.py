"""The runs in a Django database."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, Unpack

from django.db import DEFAULT_DB_ALIAS, IntegrityError
from django.db.models import (
    DurationField,
    ExpressionWrapper,
    F,
    FloatField,
    Func,
    OuterRef,
    Q,
    QuerySet,
    Subquery,
)
from django.db.models.expressions import Expression
from django.utils import timezone

from workflow_storage.backends.orm.compiled_queries import Parameter
from workflow_storage.backends.orm.conditions import (
    Condition,
    before_run,
    conditions_of,
    in_status,
    values_of,
    with_parameters,
    with_values,
)
from workflow_storage.backends.orm.errors import (
    MAX_ATTEMPTS,
    operation,
    translates_errors,
    tries_again,
)
from workflow_storage.backends.orm.repository import RUN_ID, Database, DjangoRepository
from workflow_storage.base import (
    AbstractWorkflowRunRepository,
    Checkpoint,
    RunFilters,
    stalled_message,
)
from workflow_storage.exceptions import (
    RunAlreadyExistsError,
    RunChangedError,
    RunNotFoundError,
    StatusConflictError,
)
from workflow_storage.models import WorkflowRun
from workflow_storage.status import TERMINAL_STATUSES, RunStatus
from workflow_storage.validation import (
    equal_runs,
    is_possible_id,
    plain_text,
    run_fields,
    status_change,
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
    from collections.abc import Iterable
    from datetime import datetime, timedelta

# SQLite takes at most 32,766 parameters in a statement.
MAX_BATCH = 10_000


class DjangoWorkflowRunRepository(DjangoRepository, AbstractWorkflowRunRepository):
    """The runs in a Django database.

    The models' signals (pre_save, post_save) are not sent, as with `bulk_create`.

    Args:
        alias: the database's name in DATABASES.
    """

    def __init__(self, alias: str = DEFAULT_DB_ALIAS) -> None:
        super().__init__(alias)
        self._database = Database(alias)

    @operation
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
                with self._database.one_statement():
                    self._database.run_queries.insert(**fields)
                break
            except IntegrityError as exc:
                if self._status(fields["id"]) is not None:
                    raise RunAlreadyExistsError(fields["id"]) from exc
                # Whoever had the id has been deleted since.
                if attempt == MAX_ATTEMPTS - 1:
                    raise

    @operation
    def get(self, run_id: str) -> WorkflowRun | None:
        """See `AbstractWorkflowRunRepository.get`."""
        if not is_possible_id(run_id):
            return None
        return next(
            iter(
                self._database.run_queries.objects(
                    "get", self._database.the_run, keyed=True, run_id=run_id
                )
            ),
            None,
        )

    @operation
    def list_runs(
        self,
        *,
        before: str | WorkflowRun | None = None,
        limit: int = 100,
        **filters: Unpack[RunFilters],
    ) -> list[WorkflowRun]:
        """See `AbstractWorkflowRunRepository.list_runs`."""
        valid_count("limit", limit)
        valid = valid_filters(filters)
        conditions = conditions_of(valid)
        if before is not None:
            conditions.append(before_run(*self._position(before)))
        if limit == 0 or valid.match_none:
            return []

        def page() -> QuerySet[WorkflowRun]:
            runs = with_parameters(self._database.runs, conditions)
            return runs.order_by("-started_at", "-id")[:limit]

        return self._database.run_queries.objects(
            ("list", limit, *(condition.key for condition in conditions)),
            page,
            keyed=False,
            **values_of(conditions),
        )

    @operation
    def count_runs(self, **filters: Unpack[RunFilters]) -> int:
        """See `AbstractWorkflowRunRepository.count_runs`."""
        valid = valid_filters(filters)
        if valid.match_none:
            return 0
        return with_values(self._database.runs, conditions_of(valid)).count()

    @operation
    def update(self, run_id: str, **fields: Any) -> None:
        """See `AbstractWorkflowRunRepository.update`."""
        changes = valid_updates(fields)
        if changes:
            self._change(run_id, changes)
        elif self._status(run_id) is None:
            raise RunNotFoundError(run_id)

    @operation
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
        changes = status_change(new_status, fields)
        if new_status.is_terminal and changes["duration_seconds"] is None:
            changes["duration_seconds"] = _SINCE_START
        self._change(run_id, changes, None if expected is None else valid_expected(expected))

    @operation
    def heartbeat(self, run_id: str) -> None:
        """See `AbstractWorkflowRunRepository.heartbeat`."""
        self._change(run_id, {"heartbeat_at": timezone.now()})

    @operation
    def delete(self, run_id: str) -> None:
        """See `AbstractWorkflowRunRepository.delete`."""
        with self._database.transaction():
            self._database.lock_run(run_id, to_delete=True)
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
        valid = valid_filters(
            {"workflow_name": workflow_name, "status": valid_terminal_statuses(statuses)}
        )
        valid_moment("before", before)
        size = min(valid_count("batch_size", batch_size, minimum=1), MAX_BATCH)
        if valid.match_none:
            return 0
        finished = with_values(self._database.runs, conditions_of(valid))
        finished = finished.filter(completed_at__lt=before).order_by("completed_at")
        deleted = 0
        while count := self._delete_batch(finished, size):
            deleted += count
        return deleted

    @tries_again
    def _delete_batch(self, runs: QuerySet[WorkflowRun], size: int) -> int:
        with self._database.transaction():
            self._database.begin_writing()
            batch = self._database.with_lock(runs)[:size]
            run_ids = list(batch.values_list("pk", flat=True))
            self._delete_runs(run_ids)
        return len(run_ids)

    @operation
    def list_stalled(self, idle: timedelta) -> list[WorkflowRun]:
        """See `AbstractWorkflowRunRepository.list_stalled`."""
        return list(self._stalled(idle).order_by("-started_at", "-id"))

    @operation
    def fail_if_stalled(self, run_id: str, idle: timedelta) -> bool:
        """See `AbstractWorkflowRunRepository.fail_if_stalled`."""
        failing = status_change(RunStatus.FAILED, {"error_message": stalled_message(idle)})
        failing["duration_seconds"] = _SINCE_START
        with self._database.transaction(), suppress(RunNotFoundError):
            self._database.lock_run(run_id)
            if self._stalled(idle).filter(pk=plain_text(run_id)).exists():
                self._change(run_id, failing, frozenset({RunStatus.RUNNING}))
                return True
        return False

    @operation
    def put(self, run: WorkflowRun, *, over: WorkflowRun | None = None) -> None:
        """See `AbstractWorkflowRunRepository.put`."""
        fields = valid_fields(run_fields(run))
        if over is None:
            self._insert(fields)
            return
        with self._database.transaction():
            self._database.lock_run(run.id)
            self._refuse_if_changed(run.id, over)
            self._database.runs.filter(pk=fields.pop("id")).update(**fields)

    @operation
    def delete_unchanged(self, run: WorkflowRun, last: Checkpoint | None) -> None:
        """See `AbstractWorkflowRunRepository.delete_unchanged`."""
        with self._database.transaction():
            self._database.lock_run(run.id, to_delete=True)
            self._refuse_if_changed(run.id, run)
            states = self._database.with_lock(
                self._database.states.filter(run_id=run.id).order_by("-step")
            )
            newest = states.values_list("step", "node_id", "created_at").first()
            if newest != (last and (last["step"], last["node_id"], last["created_at"])):
                raise RunChangedError(run.id)
            self._delete_runs([run.id])

    def _refuse_if_changed(self, run_id: str, as_read: WorkflowRun) -> None:
        # A plain read can be of a snapshot from before the lock (REPEATABLE READ).
        stored = self._database.with_lock(self._database.runs.filter(pk=run_id)).first()
        if stored is None:
            raise RunNotFoundError(run_id)
        if not equal_runs(stored, as_read):
            raise RunChangedError(run_id)

    def _stalled(self, idle: timedelta) -> QuerySet[WorkflowRun]:
        cutoff = timezone.now() - valid_idle(idle)
        newest_state = self._database.states.filter(run_id=OuterRef("pk")).order_by("-step")
        return (
            self._database.runs.filter(status=RunStatus.RUNNING, started_at__lt=cutoff)
            .filter(Q(heartbeat_at__isnull=True) | Q(heartbeat_at__lt=cutoff))
            .alias(newest_state_at=Subquery(newest_state.values("created_at")[:1]))
            .filter(Q(newest_state_at__isnull=True) | Q(newest_state_at__lt=cutoff))
        )

    def _position(self, before: str | WorkflowRun) -> tuple[datetime, str]:
        if isinstance(before, WorkflowRun):
            return before.started_at, before.id
        for started_at in self._database.run(before).values_list("started_at", flat=True):
            return started_at, plain_text(before)
        raise RunNotFoundError(before)

    def _status(self, run_id: str) -> str | None:
        """Return the status of a run, or None if there is no such run."""
        return self._database.run(run_id).values_list("status", flat=True).first()

    def _change(
        self,
        run_id: str,
        changes: dict[str, Any],
        expected: frozenset[RunStatus] | None = None,
    ) -> None:
        """Change columns of a run, if it is in one of the expected statuses; or say why not."""
        conditions: list[Condition] = [] if expected is None else [in_status(sorted(expected))]
        columns = {
            name: value
            if isinstance(value, Expression)
            else Parameter(name, WorkflowRun._meta.get_field(name), for_save=True)
            for name, value in changes.items()
        }
        computed = [name for name, value in changes.items() if isinstance(value, Expression)]

        def the_run() -> QuerySet[WorkflowRun]:
            return with_parameters(self._database.runs, conditions).filter(pk=RUN_ID)

        if is_possible_id(run_id):
            with self._database.one_statement():
                if self._database.run_queries.update(
                    (
                        "update",
                        *sorted(changes),
                        *computed,
                        *(condition.key for condition in conditions),
                    ),
                    the_run,
                    sorted(columns.items()),
                    run_id=run_id,
                    **changes,
                    **values_of(conditions),
                ):
                    return
        status = self._status(run_id)
        # Without an expectation, a run that is there now has been added since.
        if status is None or expected is None:
            raise RunNotFoundError(run_id)
        raise StatusConflictError(run_id, status, tuple(sorted(expected)))

    def _delete_runs(self, run_ids: list[str]) -> None:
        self._database.states.filter(run_id__in=run_ids).delete()
        self._database.runs.filter(pk__in=run_ids).only("pk").delete()


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

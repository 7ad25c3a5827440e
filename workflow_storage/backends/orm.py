"""The repositories on the Django ORM: any database that Django speaks to."""

from __future__ import annotations

import itertools
import logging
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import TYPE_CHECKING, Any, TypeVar, Unpack

from django.db import DEFAULT_DB_ALIAS, IntegrityError, connections, transaction
from django.db.models import (
    BigIntegerField,
    DateTimeField,
    DurationField,
    ExpressionWrapper,
    F,
    FloatField,
    Func,
    IntegerField,
    OuterRef,
    Q,
    QuerySet,
    Subquery,
)
from django.db.models.expressions import Expression
from django.db.models.functions import Coalesce
from django.utils import timezone

from workflow_storage.backends.compiled import Parameter, Queries
from workflow_storage.backends.errors import MAX_ATTEMPTS, translates_errors
from workflow_storage.base import (
    AbstractExecutionStateRepository,
    AbstractWorkflowRunRepository,
    Checkpoint,
    RunFilters,
    StateWriter,
)
from workflow_storage.encoding import (
    SMALL_STATE,
    apply_delta,
    base_step,
    chain_steps,
    encode_state,
    is_delta,
)
from workflow_storage.exceptions import (
    DamagedStateError,
    InvalidFieldError,
    RunAlreadyExistsError,
    RunNotFoundError,
    StatusConflictError,
)
from workflow_storage.models import (
    ExecutionState,
    WorkflowRun,
    loaded_state,
    rebuilt_state,
    rebuilt_text,
    whole_state,
)
from workflow_storage.status import TERMINAL_STATUSES, RunStatus
from workflow_storage.validation import (
    MAX_NODE_ID,
    MAX_RUN_ID,
    MAX_WORKFLOW_NAME,
    RESULT_TIMES,
    RUN_FIELDS,
    is_storable_name,
    valid_count,
    valid_expected,
    valid_fields,
    valid_idle,
    valid_moment,
    valid_name,
    valid_state,
    valid_status,
    valid_statuses,
    valid_terminal_statuses,
    valid_updates,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from datetime import datetime, timedelta

logger = logging.getLogger(__name__)

Row = tuple[int | None, "datetime | None"]
"""What tells the row of a state: its id and created_at.

SQLite gives an id again after a rollback, but not at the same time.
"""

_R = TypeVar("_R")

STATES_PAGE = 16
"""Checkpoints that `iter_state_history` holds in memory at a time."""

# SQLite takes at most 32,766 parameters in a statement.
MAX_BATCH = 10_000

MAX_ATTEMPTS_IN_OWN = 1000
"""Transactions in which a state is tried, while other writers take its step."""


class _DjangoRepository:
    """What both repositories know: their database, and how to read and write it."""

    def __init__(self, alias: str = DEFAULT_DB_ALIAS) -> None:
        self.alias = alias
        self._run_queries = Queries(WorkflowRun, alias)
        self._state_queries = Queries(ExecutionState, alias)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.alias!r})"

    @property
    def _runs(self) -> QuerySet[WorkflowRun]:
        return WorkflowRun._base_manager.using(self.alias)

    @property
    def _states(self) -> QuerySet[ExecutionState]:
        return ExecutionState._base_manager.using(self.alias)

    def _the_run(self) -> QuerySet[WorkflowRun]:
        """The run whose id is the parameter run_id."""
        return self._runs.filter(pk=_RUN_ID)

    def _its_states(self) -> QuerySet[ExecutionState]:
        """The states of that run."""
        return self._states.filter(run_id=_RUN_ID)

    def _one_statement(self) -> AbstractContextManager[Any]:
        """Keep the caller's transaction usable if the one statement inside fails."""
        if connections[self.alias].in_atomic_block:
            return transaction.atomic(using=self.alias)
        return nullcontext()

    def _locked(
        self, runs: QuerySet[WorkflowRun], *, to_delete: bool = False
    ) -> QuerySet[WorkflowRun]:
        """Let the query lock the rows that it reads, where the database locks rows.

        The lock for deleting keeps others from inserting states of the run; the weaker one
        lets them.
        """
        features = connections[self.alias].features
        if not features.has_select_for_update:
            return runs
        no_key = features.has_select_for_no_key_update and not to_delete
        return runs.select_for_update(no_key=no_key)

    def _lock(self, run_id: str, *, to_delete: bool = False) -> None:
        """Make this transaction the only one to change a run until it ends; see `_locked`.

        Raises:
            RunNotFoundError: if there is no such run.
        """
        runs = self._runs.filter(pk=run_id) if _possible_id(run_id) else self._runs.none()
        if connections[self.alias].features.has_select_for_update:
            found = bool(self._locked(runs, to_delete=to_delete).values_list("pk"))
        else:
            self._begin_writing()
            found = runs.exists()
        if not found:
            raise RunNotFoundError(run_id)

    def _begin_writing(self) -> None:
        """Let a transaction on a SQLite file lock it now, if it did not when it began.

        A transaction that has read cannot write once another one has.
        """
        connection = connections[self.alias]
        options = connection.settings_dict["OPTIONS"]
        if connection.vendor == "sqlite" and not begins_immediately(options):
            self._runs.filter(pk="").update(status=F("status"))


class DjangoWorkflowRunRepository(_DjangoRepository, AbstractWorkflowRunRepository):
    """The runs in a Django database.

    The models' signals (pre_save, post_save) are not sent, as with `bulk_create`.

    Args:
        alias: the database's name in DATABASES.
    """

    @translates_errors
    def add(self, run: WorkflowRun) -> None:
        """See `AbstractWorkflowRunRepository.add`."""
        if not isinstance(run, WorkflowRun):
            raise TypeError(f"add() takes a WorkflowRun, not a {type(run).__name__}.")
        fields = valid_fields({name: getattr(run, name) for name in RUN_FIELDS})
        _complete(fields)
        for attempt in range(MAX_ATTEMPTS):
            try:
                with self._one_statement():
                    self._run_queries.insert(**fields)
                break
            except IntegrityError as exc:
                if self._status(run.id) is not None:
                    raise RunAlreadyExistsError(run.id) from exc
                # Whoever had the id has been deleted since.
                if attempt == MAX_ATTEMPTS - 1:
                    raise
        for name, value in fields.items():
            setattr(run, name, value)
        run._state.adding = False
        run._state.db = self.alias

    @translates_errors
    def get(self, run_id: str) -> WorkflowRun | None:
        """See `AbstractWorkflowRunRepository.get`."""
        if not _possible_id(run_id):
            return None
        return next(iter(self._run_queries.objects("get", self._the_run, run_id=run_id)), None)

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
            runs = self._matching({name: _parameter(name) for name in values})
            return runs.order_by("-started_at", "-id")[:limit]

        return self._run_queries.objects(("list", limit, *values), page, **values)

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
            changes |= dict.fromkeys(RESULT_TIMES)
        if new_status is RunStatus.RUNNING:
            changes["heartbeat_at"] = now
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
            self._delete_runs([run_id])

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
            if self._stalled(idle).filter(pk=run_id).exists():
                self._fail_as_stalled(run_id, idle)
                return True
        return False

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
        run = self._runs.filter(pk=before) if _possible_id(before) else self._runs.none()
        for started_at in run.values_list("started_at", flat=True):
            return started_at, before
        raise RunNotFoundError(before)

    def _status(self, run_id: str) -> str | None:
        """Give the status of a run, or None if there is no such run."""
        if not _possible_id(run_id):
            return None
        return self._runs.filter(pk=run_id).values_list("status", flat=True).first()

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
            return self._matching({name: _parameter(name) for name in statuses}).filter(pk=_RUN_ID)

        if _possible_id(run_id) and (expected is None or expected):
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


class DjangoExecutionStateRepository(_DjangoRepository, AbstractExecutionStateRepository):
    """The checkpoints in a Django database.

    Args:
        alias: the database's name in DATABASES.
    """

    def save_state(self, run_id: str, state_data: dict[str, Any], node_id: str) -> int:
        """See `AbstractExecutionStateRepository.save_state`."""
        return self.writer(run_id).save_state(state_data, node_id)

    def writer(self, run_id: str) -> DjangoStateWriter:
        """See `AbstractExecutionStateRepository.writer`."""
        return DjangoStateWriter(self, run_id)

    @translates_errors
    def get_latest_checkpoint(self, run_id: str) -> Checkpoint | None:
        """See `AbstractExecutionStateRepository.get_latest_checkpoint`."""
        if not _possible_id(run_id):
            return None

        def latest() -> QuerySet[Any, Any]:
            return self._its_states().order_by("-step").values_list(*_CHECKPOINT)[:1]

        return self._first(run_id, self._state_queries.rows("latest", latest, run_id=run_id))

    @translates_errors
    def get_state(self, run_id: str, step: int) -> Checkpoint | None:
        """See `AbstractExecutionStateRepository.get_state`."""
        if not isinstance(step, int):
            raise TypeError(f"step is a {type(step).__name__}. Pass a whole number.")
        states = self._states_of(run_id).filter(step=step)
        return self._first(run_id, states.values_list(*_CHECKPOINT)[:1])

    def _first(self, run_id: str, rows: Iterable[Any]) -> Checkpoint | None:
        for step, node_id, created_at, text, delta in rows:
            if delta is None:
                state_data = whole_state(run_id, step, text)
            else:
                state_data = rebuilt_state(run_id, step, self.chain(run_id, step))
            return Checkpoint(
                step=step, node_id=node_id, state_data=state_data, created_at=created_at
            )
        return None

    def iter_state_history(self, run_id: str) -> Iterator[Checkpoint]:
        """See `AbstractExecutionStateRepository.iter_state_history`."""
        texts: dict[int, bytes] = {}
        last_step = -1
        while page := self._history_page(run_id, last_step):
            for state in page:
                text = self._rebuilt(state, texts)
                if text is not None:
                    remember(texts, state.step, text)
                    yield Checkpoint(
                        step=state.step,
                        node_id=state.node_id,
                        state_data=(
                            whole_state(run_id, state.step, text)
                            if state.state_delta is None
                            else loaded_state(run_id, state.step, text)
                        ),
                        created_at=state.created_at,
                    )
            last_step = page[-1].step

    @translates_errors
    def delete_states(self, run_id: str, *, keep_last: int = 0) -> int:
        """See `AbstractExecutionStateRepository.delete_states`."""
        valid_count("keep_last", keep_last)
        with transaction.atomic(using=self.alias):
            self._lock(run_id)
            states = self._states_of(run_id)
            newest = states.order_by("-step").values_list("step", flat=True).first()
            if newest is None:
                return 0
            first = newest + 1 - keep_last
            if keep_last:
                self._make_whole(states, first, newest)
            return states.filter(step__lt=first).delete()[0]

    def next_step(self, run_id: str, base: int) -> tuple[int, Row]:
        """Lock a run and give its next step, in one statement.

        Args:
            run_id: which run.
            base: a step.

        Returns:
            The next step, and what tells the row of the other step, with None if there is none.

        Raises:
            RunNotFoundError: if there is no such run.
        """

        def last_step_and_base() -> QuerySet[Any, Any]:
            states = self._states.filter(run_id=OuterRef("pk"))
            newest = states.order_by("-step").values("step")[:1]
            of_base = states.filter(step=_STEP)
            return self._locked(self._the_run()).values_list(
                Subquery(newest, output_field=IntegerField()),
                Subquery(of_base.values("id")[:1], output_field=BigIntegerField()),
                Subquery(of_base.values("created_at")[:1], output_field=DateTimeField()),
            )

        for last_step, *base_row in self._run_queries.rows(
            "next step", last_step_and_base, run_id=run_id, step=base
        ):
            return (0 if last_step is None else last_step + 1), tuple(base_row)
        raise RunNotFoundError(run_id)

    def insert(self, run_id: str, step: int, node_id: str, stored: bytes) -> Row:
        """Insert a state as it is stored, and give what tells its row."""
        delta = is_delta(stored)
        now = timezone.now()
        (row_id,) = self._state_queries.insert(
            returning=["id"],
            run_id=run_id,
            step=step,
            node_id=node_id,
            created_at=now,
            state_json=None if delta else stored.decode(),
            state_delta=stored if delta else None,
        )
        return row_id, now

    def insert_next(self, run_id: str, node_id: str, stored: bytes) -> tuple[int, Row]:
        """Insert a whole state as the next one of a run, in one statement.

        Returns:
            Its step, and what tells its row.

        Raises:
            IntegrityError: if there is no such run, or another writer took the step.
        """
        now = timezone.now()
        row_id, step = self._state_queries.insert(
            returning=["id", "step"],
            computed=_computed_step,
            run_id=run_id,
            node_id=node_id,
            created_at=now,
            state_json=stored.decode(),
        )
        return step, (row_id, now)

    def chain(self, run_id: str, step: int) -> list[ExecutionState]:
        """Give the states that a state is rebuilt from, itself first, as far as they are there."""
        steps = chain_steps(step)

        def those_states() -> QuerySet[ExecutionState]:
            parameters: Any = [_parameter(f"step_{number}") for number in range(len(steps))]
            return self._its_states().filter(step__in=parameters).order_by("-step")

        values = {f"step_{number}": link for number, link in enumerate(steps)}
        return self._state_queries.objects(
            ("chain", len(steps)), those_states, run_id=run_id, **values
        )

    def inserts_at_once(self) -> bool:
        """Whether `insert_next` can be used: nothing else is to be in its transaction."""
        connection = connections[self.alias]
        return (
            not connection.in_atomic_block
            # MySQL reads no table that it inserts into, and gives back no columns.
            and connection.vendor != "mysql"
            and connection.features.can_return_columns_from_insert
        )

    def _states_of(self, run_id: str) -> QuerySet[ExecutionState]:
        return self._states.filter(run_id=run_id) if _possible_id(run_id) else self._states.none()

    def _make_whole(self, states: QuerySet[ExecutionState], first: int, newest: int) -> None:
        """Store those states whole whose bases come before the first that is kept."""
        for step in range(first, newest + 1):
            # Few of them: the lowest bit that is set grows from one to the next.
            if base_step(step) < first:
                for state in states.filter(step=step, state_delta__isnull=False):
                    state.stored = state.rebuilt_text()
                    state.save(using=self.alias, update_fields=["state_json", "state_delta"])

    @translates_errors
    def _history_page(self, run_id: str, after_step: int) -> list[ExecutionState]:
        states = self._states_of(run_id).filter(step__gt=after_step).order_by("step")
        return list(states[:STATES_PAGE])

    @translates_errors
    def _rebuilt(self, state: ExecutionState, texts: dict[int, bytes]) -> bytes | None:
        """Give the JSON text of a state, from that of its base if it is among the texts.

        Returns:
            The text; None if the state has been deleted since it was read.
        """
        if state.state_delta is None:
            return state.stored
        base = base_step(state.step)
        try:
            if base in texts:
                return apply_delta(state.stored, texts[base])
        except ValueError as exc:
            raise DamagedStateError(state.run_id, state.step, str(exc)) from exc
        chain = self.chain(state.run_id, state.step)
        if all(link.pk != state.pk for link in chain):
            return None
        return rebuilt_text(state.run_id, state.step, chain)


class DjangoStateWriter(StateWriter):
    """Appends checkpoints to one run, and remembers the states that the next is based on."""

    def __init__(self, states: DjangoExecutionStateRepository, run_id: str) -> None:
        super().__init__(states, run_id)
        self.alias = states.alias
        self._repository = states
        self._next = 0
        self._texts: dict[int, bytes] = {}
        self._rows: dict[int, Row] = {}

    @translates_errors
    def save_state(self, state_data: dict[str, Any], node_id: str) -> int:
        """See `AbstractExecutionStateRepository.save_state`."""
        text = valid_state(state_data)
        valid_name("node_id", node_id, MAX_NODE_ID)
        repository = self._repository
        if not _possible_id(self.run_id):
            raise RunNotFoundError(self.run_id)
        if len(text) <= SMALL_STATE and repository.inserts_at_once():
            with suppress(IntegrityError):
                step, row = repository.insert_next(self.run_id, node_id, text)
                return self._remember(step, row, text)
        own_transaction = not connections[self.alias].in_atomic_block
        for attempt in itertools.count():
            try:
                with transaction.atomic(using=self.alias):
                    # PostgreSQL decides a step on a snapshot from before it waited for the
                    # lock, so that the step can be taken when it is inserted. The second
                    # time, the lock comes first, in a statement of its own.
                    if attempt:
                        repository._lock(self.run_id)
                    step, row = self._append(text, node_id)
                return self._remember(step, row, text)
            except IntegrityError:
                # With one snapshot for a whole transaction (REPEATABLE READ), only a new
                # transaction sees the step that was taken.
                if attempt >= (MAX_ATTEMPTS_IN_OWN if own_transaction else 1):
                    raise
        raise AssertionError("unreachable")

    def _remember(self, step: int, row: Row, text: bytes) -> int:
        remember(self._texts, step, text)
        remember(self._rows, step, row)
        self._next = step + 1
        return step

    def _append(self, text: bytes, node_id: str) -> tuple[int, Row]:
        self._repository._begin_writing()
        step, base_row = self._repository.next_step(self.run_id, base_step(self._next))
        stored = encode_state(text, self._base(step, base_row, len(text)))
        return step, self._repository.insert(self.run_id, step, node_id, stored)

    def _base(self, step: int, base_row: Row, size: int) -> bytes | None:
        """Give the JSON text of the base of a step: remembered, if the row is still that row."""
        if step == 0 or size <= SMALL_STATE:
            return None
        base = base_step(step)
        if step != self._next or self._rows.get(base) != base_row:
            # Somebody else wrote to the run, or deleted from it, or this is the first time.
            self._reload(base)
        return self._texts.get(base)

    def _reload(self, step: int) -> None:
        """Remember a state and all that it is based on; nothing if it cannot be rebuilt."""
        self._texts.clear()
        self._rows.clear()
        for state in reversed(self._repository.chain(self.run_id, step)):
            try:
                text = self._repository._rebuilt(state, self._texts)
            except DamagedStateError:
                # The new state is then stored whole, and the run goes on.
                logger.exception("A state cannot serve as a base")
                continue
            if text is not None:
                self._texts[state.step] = text
                self._rows[state.step] = state.pk, state.created_at


def remember(values: dict[int, _R], step: int, value: _R) -> None:
    """Keep a value for a step, and of the earlier ones those that later steps are based on."""
    values[step] = value
    for unneeded in values.keys() - set(chain_steps(step)):
        del values[unneeded]


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


_CHECKPOINT = ("step", "node_id", "created_at", "state_json", "state_delta")
_RUN_ID = Parameter("run_id", WorkflowRun._meta.get_field("id"))
_STEP = Parameter("step", ExecutionState._meta.get_field("step"))
_FIELD_OF = {
    "started_after": "started_at",
    "started_before": "started_at",
    "before_started_at": "started_at",
    "before_id": "id",
}
_SINCE_START = _Seconds(
    ExpressionWrapper(
        Parameter("completed_at", WorkflowRun._meta.get_field("completed_at")) - F("started_at"),
        output_field=DurationField(),
    )
)


def _computed_step() -> dict[str, Any]:
    """Give the next step of the run, or NULL if there is no such run."""
    states = ExecutionState._base_manager.filter(run_id=OuterRef("pk")).order_by("-step")
    last_step = Subquery(states.values("step")[:1])
    run = WorkflowRun._base_manager.filter(pk=_RUN_ID)
    return {"step": Subquery(run.values_list(Coalesce(last_step + 1, 0)))}


def _parameter(name: str) -> Parameter:
    """Give the parameter for one of the values that `_checked` names, or for a step."""
    if name.startswith("step_"):
        return Parameter(name, ExecutionState._meta.get_field("step"))
    field = "status" if name.startswith("status_") else _FIELD_OF.get(name, name)
    return Parameter(name, WorkflowRun._meta.get_field(field))


def _checked(filters: RunFilters) -> dict[str, Any]:
    """Check filters and give their values by name, one name for each status."""
    values: dict[str, Any] = {}
    workflow_name = filters.get("workflow_name")
    if workflow_name is not None:
        possible = _is_possible("workflow_name", workflow_name, MAX_WORKFLOW_NAME)
        values["workflow_name"] = workflow_name if possible else None
    status = filters.get("status")
    if status is not None:
        statuses = sorted(valid_statuses(status))
        if not statuses:
            values["status_none"] = None
        values |= {f"status_{number}": value.value for number, value in enumerate(statuses)}
    for name in ("started_after", "started_before"):
        moment = filters.get(name)
        if moment is not None:
            values[name] = valid_moment(name, moment)
    unknown = filters.keys() - RunFilters.__annotations__.keys()
    if unknown:
        raise TypeError(
            f"{', '.join(sorted(unknown))}: no such filter. "
            f"Use one of: {', '.join(RunFilters.__annotations__)}."
        )
    return values


def _matches_none(values: dict[str, Any]) -> bool:
    """Whether a filter is one that no run can match: an impossible name, or no status."""
    return None in values.values()


def _complete(fields: dict[str, Any]) -> None:
    """Give the fields of a new run the times that it lacks."""
    if fields["status"] in TERMINAL_STATUSES:
        if fields["completed_at"] is None:
            fields["completed_at"] = timezone.now()
        if fields["duration_seconds"] is None:
            duration = fields["completed_at"] - fields["started_at"]
            fields["duration_seconds"] = duration.total_seconds()
    elif fields["completed_at"] is not None or fields["duration_seconds"] is not None:
        raise InvalidFieldError(
            f"completed_at and duration_seconds belong to a run that has ended, not to a "
            f"{fields['status']} one. Leave them out."
        )


def begins_immediately(options: dict[str, Any]) -> bool:
    """Whether transactions on a SQLite database with these OPTIONS lock it when they begin."""
    return str(options.get("transaction_mode")).upper() in {"IMMEDIATE", "EXCLUSIVE"}


def _is_possible(field: str, value: object, max_length: int) -> bool:
    if not isinstance(value, str):
        raise TypeError(f"{field} is a {type(value).__name__}. Pass a str, such as str(value).")
    return is_storable_name(value, max_length)


def _possible_id(run_id: object) -> bool:
    return _is_possible("run_id", run_id, MAX_RUN_ID)

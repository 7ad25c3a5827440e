"""The repositories on the Django ORM: any database that Django speaks to."""

from __future__ import annotations

import functools
import logging
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, Unpack

import django.db
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
    Value,
)
from django.utils import timezone

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
)
from workflow_storage.exceptions import (
    DamagedStateError,
    InvalidFieldError,
    RunAlreadyExistsError,
    RunNotFoundError,
    StatusConflictError,
    StorageError,
    StorageUnavailableError,
    TablesMissingError,
)
from workflow_storage.models import ExecutionState, WorkflowRun, loaded_state, rebuilt_state
from workflow_storage.status import TERMINAL_STATUSES, RunStatus
from workflow_storage.validation import (
    MAX_NODE_ID,
    MAX_RUN_ID,
    MAX_WORKFLOW_NAME,
    RESULT_TIMES,
    RUN_FIELDS,
    is_storable_name,
    valid_count,
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
    from collections.abc import Callable, Iterable, Iterator
    from datetime import datetime, timedelta

logger = logging.getLogger(__name__)

_P = ParamSpec("_P")
_R = TypeVar("_R")

STATES_PAGE = 16
"""Checkpoints that `iter_state_history` holds in memory at a time."""

# SQLite takes at most 32,766 parameters in a statement.
MAX_BATCH = 10_000


def _translates_errors(method: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let a repository's method raise errors of the contract, never a driver's."""

    @functools.wraps(method)
    def translating(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return method(*args, **kwargs)
        except django.db.Error as exc:
            repository: Any = args[0]
            raise _storage_error(repository.alias, exc) from exc

    return translating


# What the databases call a table or a column that is not there: PostgreSQL by SQLSTATE
# (https://www.postgresql.org/docs/current/errcodes-appendix.html), MySQL and MariaDB by
# error number, SQLite by text only.
_MISSING_SQLSTATES = {"42P01", "42703"}
_MISSING_ERRNOS = {1054, 1146}
_MISSING_TEXTS = ("no such table", "no such column", "has no column named")
# ER_NET_PACKET_TOO_LARGE, and what the client sees when the server hangs up over it.
_PACKET_TOO_LARGE = 1153


def _storage_error(alias: str, exc: django.db.Error) -> StorageError:
    driver_error = exc.__cause__
    number = exc.args[0] if exc.args else None
    text = _without_password(alias, " ".join(str(exc).split()))
    if (
        getattr(driver_error, "sqlstate", None) in _MISSING_SQLSTATES
        or number in _MISSING_ERRNOS
        or any(missing in text for missing in _MISSING_TEXTS)
    ):
        return TablesMissingError(alias)
    if number == _PACKET_TOO_LARGE:
        return StorageError(
            f"Database {alias!r} refuses a statement of this size: {text}. "
            "Raise max_allowed_packet on the server, or store less in one state."
        )
    if not isinstance(exc, django.db.OperationalError | django.db.InterfaceError):
        return StorageError(f"Database {alias!r} refused the operation: {text}")
    connection = connections[alias]
    if not connection.in_atomic_block:
        # Outside of requests nobody else drops a broken connection, and every later call
        # of this process would fail.
        connection.close_if_unusable_or_obsolete()
    advice = (
        "Another process writes for longer than the timeout; try again, or raise "
        "OPTIONS['timeout']."
        if "locked" in text
        else "Check that the server runs and that the settings of the database are right."
    )
    return StorageUnavailableError(f"Database {alias!r} is unavailable: {text}. {advice}")


def _without_password(alias: str, text: str) -> str:
    password = connections[alias].settings_dict.get("PASSWORD")
    return text.replace(str(password), "***") if password else text


class _DjangoRepository:
    """What both repositories know: their database, and how to write to it."""

    def __init__(self, alias: str = DEFAULT_DB_ALIAS) -> None:
        self.alias = alias

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.alias!r})"

    @property
    def _runs(self) -> QuerySet[WorkflowRun]:
        return WorkflowRun._base_manager.using(self.alias)

    @property
    def _states(self) -> QuerySet[ExecutionState]:
        return ExecutionState._base_manager.using(self.alias)

    def _run(self, run_id: str) -> QuerySet[WorkflowRun]:
        return self._runs.filter(pk=run_id) if _possible_id(run_id) else self._runs.none()

    def _states_of(self, run_id: str) -> QuerySet[ExecutionState]:
        return self._states.filter(run_id=run_id) if _possible_id(run_id) else self._states.none()

    def _one_statement(self) -> AbstractContextManager[Any]:
        """Keep the caller's transaction usable if the one statement inside fails."""
        if connections[self.alias].in_atomic_block:
            return transaction.atomic(using=self.alias)
        return nullcontext()

    def _locked(self, runs: QuerySet[WorkflowRun]) -> QuerySet[WorkflowRun]:
        """Let the query lock the rows that it reads, where the database locks rows."""
        features = connections[self.alias].features
        if not features.has_select_for_update:
            return runs
        # The weaker lock lets others insert rows that refer to the run.
        return runs.select_for_update(no_key=features.has_select_for_no_key_update)

    def _lock(self, run_id: str) -> None:
        """Make this transaction the only writer of a run until it ends.

        Raises:
            RunNotFoundError: if there is no such run.
        """
        if connections[self.alias].features.has_select_for_update:
            found = bool(self._locked(self._run(run_id)).values_list("pk"))
        else:
            # SQLite locks the whole file at the first write of a transaction.
            found = bool(self._run(run_id).update(status=F("status")))
        if not found:
            raise RunNotFoundError(run_id)


class DjangoWorkflowRunRepository(_DjangoRepository, AbstractWorkflowRunRepository):
    """The runs in a Django database.

    Args:
        alias: the database's name in DATABASES.
    """

    @_translates_errors
    def add(self, run: WorkflowRun) -> None:
        """See `AbstractWorkflowRunRepository.add`."""
        if not isinstance(run, WorkflowRun):
            raise TypeError(f"add() takes a WorkflowRun, not a {type(run).__name__}.")
        _complete(run, valid_fields({name: getattr(run, name) for name in RUN_FIELDS}))
        try:
            with self._one_statement():
                run.save(using=self.alias, force_insert=True)
        except IntegrityError as exc:
            if self._run(run.id).exists():
                raise RunAlreadyExistsError(run.id) from exc
            raise

    @_translates_errors
    def get(self, run_id: str) -> WorkflowRun | None:
        """See `AbstractWorkflowRunRepository.get`."""
        return next(iter(self._run(run_id)), None)

    @_translates_errors
    def list_runs(
        self,
        *,
        before: str | WorkflowRun | None = None,
        limit: int = 100,
        **filters: Unpack[RunFilters],
    ) -> list[WorkflowRun]:
        """See `AbstractWorkflowRunRepository.list_runs`."""
        valid_count("limit", limit)
        runs = self._matching(**filters)
        if before is not None:
            started_at, run_id = self._position(before)
            # The first condition alone lets the database begin within its index.
            runs = runs.filter(
                Q(started_at__lt=started_at) | Q(id__lt=run_id), started_at__lte=started_at
            )
        return list(runs.order_by("-started_at", "-id")[:limit])

    @_translates_errors
    def count_runs(self, **filters: Unpack[RunFilters]) -> int:
        """See `AbstractWorkflowRunRepository.count_runs`."""
        return self._matching(**filters).count()

    @_translates_errors
    def update(self, run_id: str, **fields: Any) -> None:
        """See `AbstractWorkflowRunRepository.update`."""
        changes = valid_updates(fields)
        if not changes:
            if not self._run(run_id).exists():
                raise RunNotFoundError(run_id)
            return
        self._update_one(run_id, self._run(run_id), changes)

    @_translates_errors
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
        changes = {
            **valid_updates(fields, new_status),
            "status": new_status.value,
        }
        now = timezone.now()
        if new_status.is_terminal:
            if changes.get("completed_at") is None:
                changes["completed_at"] = now
            if changes.get("duration_seconds") is None:
                changes["duration_seconds"] = _seconds_since_start(changes["completed_at"])
        else:
            changes |= dict.fromkeys(RESULT_TIMES)
        if new_status is RunStatus.RUNNING:
            changes["heartbeat_at"] = now
        run = self._run(run_id)
        if expected is None:
            self._update_one(run_id, run, changes)
        else:
            statuses = valid_statuses(expected)
            self._update_one(run_id, run.filter(status__in=sorted(statuses)), changes, statuses)

    @_translates_errors
    def heartbeat(self, run_id: str) -> None:
        """See `AbstractWorkflowRunRepository.heartbeat`."""
        self._update_one(run_id, self._run(run_id), {"heartbeat_at": timezone.now()})

    @_translates_errors
    def delete(self, run_id: str) -> None:
        """See `AbstractWorkflowRunRepository.delete`."""
        with transaction.atomic(using=self.alias):
            self._lock(run_id)
            self._delete_runs([run_id])

    @_translates_errors
    def delete_finished(
        self,
        *,
        before: datetime,
        workflow_name: str | None = None,
        statuses: str | Iterable[str] = TERMINAL_STATUSES,
        batch_size: int = 1000,
    ) -> int:
        """See `AbstractWorkflowRunRepository.delete_finished`."""
        finished = self._matching(
            workflow_name=workflow_name, status=valid_terminal_statuses(statuses)
        ).filter(completed_at__lt=valid_moment("before", before))
        batch = self._locked(finished.order_by("completed_at"))[
            : min(valid_count("batch_size", batch_size, minimum=1), MAX_BATCH)
        ]
        deleted = 0
        while True:
            with transaction.atomic(using=self.alias):
                run_ids = list(batch.values_list("pk", flat=True))
                self._delete_runs(run_ids)
            if not run_ids:
                return deleted
            deleted += len(run_ids)

    @_translates_errors
    def list_stalled(self, idle: timedelta) -> list[WorkflowRun]:
        """See `AbstractWorkflowRunRepository.list_stalled`."""
        cutoff = timezone.now() - valid_idle(idle)
        newest_state = self._states.filter(run_id=OuterRef("pk")).order_by("-step")
        stalled = (
            self._matching(status=RunStatus.RUNNING, started_before=cutoff)
            .filter(Q(heartbeat_at__isnull=True) | Q(heartbeat_at__lt=cutoff))
            .alias(newest_state_at=Subquery(newest_state.values("created_at")[:1]))
            .filter(Q(newest_state_at__isnull=True) | Q(newest_state_at__lt=cutoff))
        )
        return list(stalled.order_by("-started_at", "-id"))

    def _matching(
        self,
        *,
        workflow_name: str | None = None,
        status: str | Iterable[str] | None = None,
        started_after: datetime | None = None,
        started_before: datetime | None = None,
    ) -> QuerySet[WorkflowRun]:
        runs = self._runs.all()
        if workflow_name is not None:
            if not _is_possible("workflow_name", workflow_name, MAX_WORKFLOW_NAME):
                return runs.none()
            runs = runs.filter(workflow_name=workflow_name)
        if status is not None:
            statuses = sorted(valid_statuses(status))
            # A plain comparison lets the database read its index in order.
            runs = (
                runs.filter(status=statuses[0])
                if len(statuses) == 1
                else runs.filter(status__in=statuses)
            )
        if started_after is not None:
            runs = runs.filter(started_at__gte=valid_moment("started_after", started_after))
        if started_before is not None:
            runs = runs.filter(started_at__lt=valid_moment("started_before", started_before))
        return runs

    def _position(self, before: str | WorkflowRun) -> tuple[datetime, str]:
        if isinstance(before, WorkflowRun):
            return before.started_at, before.id
        started_at = self._run(before).values_list("started_at", flat=True).first()
        if started_at is None:
            raise RunNotFoundError(before)
        return started_at, before

    def _update_one(
        self,
        run_id: str,
        run: QuerySet[WorkflowRun],
        changes: dict[str, Any],
        expected: frozenset[RunStatus] = frozenset(),
    ) -> None:
        """Change the one run of a query, or say why it has none."""
        with self._one_statement():
            if run.update(**changes):
                return
        status = self._run(run_id).values_list("status", flat=True).first()
        if status is None:
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

    @_translates_errors
    def get_latest_checkpoint(self, run_id: str) -> Checkpoint | None:
        """See `AbstractExecutionStateRepository.get_latest_checkpoint`."""
        return _first_checkpoint(self._states_of(run_id).order_by("-step"))

    @_translates_errors
    def get_state(self, run_id: str, step: int) -> Checkpoint | None:
        """See `AbstractExecutionStateRepository.get_state`."""
        return _first_checkpoint(self._states_of(run_id).filter(step=step))

    def iter_state_history(self, run_id: str) -> Iterator[Checkpoint]:
        """See `AbstractExecutionStateRepository.iter_state_history`."""
        texts: dict[int, bytes] = {}
        last_step = -1
        while page := self._history_page(run_id, last_step):
            for state in page:
                text = self._rebuilt(state, texts)
                if text is not None:
                    remember(texts, state.step, text)
                    yield _checkpoint(state, loaded_state(state, text))
            last_step = page[-1].step

    @_translates_errors
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

    def _make_whole(self, states: QuerySet[ExecutionState], first: int, newest: int) -> None:
        """Store those states whole whose bases come before the first that is kept."""
        for step in range(first, newest + 1):
            # Few of them: the lowest bit that is set grows from one to the next.
            if base_step(step) < first:
                for state in states.filter(step=step, state_delta__isnull=False):
                    state.stored = state.rebuilt()
                    state.save(using=self.alias, update_fields=["state_json", "state_delta"])

    @_translates_errors
    def _history_page(self, run_id: str, after_step: int) -> list[ExecutionState]:
        states = self._states_of(run_id).filter(step__gt=after_step).order_by("step")
        return list(states[:STATES_PAGE])

    @_translates_errors
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
        chain = list(self._states_of(state.run_id).filter(step__in=chain_steps(state.step)))
        if all(link.pk != state.pk for link in chain):
            return None
        return rebuilt_state(state.run_id, state.step, chain)


class DjangoStateWriter(_DjangoRepository, StateWriter):
    """Appends checkpoints to one run, and remembers the states that the next is based on."""

    def __init__(self, states: DjangoExecutionStateRepository, run_id: str) -> None:
        super().__init__(states.alias)
        self.run_id = run_id
        self._repository = states
        self._next = 0
        self._texts: dict[int, bytes] = {}
        self._row_ids: dict[int, int] = {}

    @_translates_errors
    def save_state(self, state_data: dict[str, Any], node_id: str) -> int:
        """See `AbstractExecutionStateRepository.save_state`."""
        text = valid_state(state_data).encode()
        valid_name("node_id", node_id, MAX_NODE_ID)
        # PostgreSQL decides a step on a snapshot from before it waited for the lock, so
        # the step can be taken when it is inserted; a SQLite transaction that begins by
        # reading cannot write once another one has. Then the lock comes first.
        lock_first = self._begins_without_lock()
        while True:
            try:
                with transaction.atomic(using=self.alias):
                    if lock_first:
                        self._lock(self.run_id)
                    state = self._append(text, node_id)
                break
            except IntegrityError:
                if lock_first:
                    raise
                lock_first = True
        self._remember(state, text)
        return state.step

    def _begins_without_lock(self) -> bool:
        connection = connections[self.alias]
        options = connection.settings_dict["OPTIONS"]
        return connection.vendor == "sqlite" and not begins_immediately(options)

    def _append(self, text: bytes, node_id: str) -> ExecutionState:
        step, base_id = self._next_step()
        state = ExecutionState(run_id=self.run_id, step=step, node_id=node_id)
        state.stored = encode_state(text, self._base(step, base_id, len(text)))
        state.save(using=self.alias, force_insert=True)
        return state

    def _next_step(self) -> tuple[int, int | None]:
        """Lock the run and give its next step, in one statement.

        Returns:
            The step, and the row id of the state that would be its base if it is the step
            that this writer expects.

        Raises:
            RunNotFoundError: if there is no such run.
        """
        states = self._states.filter(run_id=OuterRef("pk"))
        newest = states.order_by("-step").values("step")[:1]
        base = states.filter(step=base_step(self._next)).values("id")[:1]
        rows = self._locked(self._run(self.run_id)).values_list(
            Subquery(newest, output_field=IntegerField()),
            Subquery(base, output_field=BigIntegerField()),
        )
        for last_step, base_id in rows:
            return (0 if last_step is None else last_step + 1), base_id
        raise RunNotFoundError(self.run_id)

    def _base(self, step: int, base_id: int | None, size: int) -> bytes | None:
        """Give the JSON text of the base of a step: remembered, if the row is still that row."""
        if step == 0 or size <= SMALL_STATE:
            return None
        base = base_step(step)
        if step != self._next or base_id is None or self._row_ids.get(base) != base_id:
            # Somebody else wrote to the run, or deleted from it, or this is the first time.
            self._reload(base)
        return self._texts.get(base)

    def _reload(self, step: int) -> None:
        """Remember a state and all that it is based on; nothing if it cannot be rebuilt."""
        self._texts.clear()
        self._row_ids.clear()
        chain = self._states_of(self.run_id).filter(step__in=chain_steps(step))
        for state in chain.order_by("step"):
            try:
                text = self._repository._rebuilt(state, self._texts)
            except DamagedStateError:
                # The new state is then stored whole, and the run goes on.
                logger.exception("A state cannot serve as a base")
                continue
            if text is not None:
                self._texts[state.step] = text
                self._row_ids[state.step] = state.pk

    def _remember(self, state: ExecutionState, text: bytes) -> None:
        remember(self._texts, state.step, text)
        remember(self._row_ids, state.step, state.pk)
        self._next = state.step + 1


def remember(values: dict[int, _R], step: int, value: _R) -> None:
    """Keep a value for a step, and of the earlier ones those that later steps are based on."""
    values[step] = value
    for unneeded in values.keys() - set(chain_steps(step)):
        del values[unneeded]


def _first_checkpoint(states: QuerySet[ExecutionState]) -> Checkpoint | None:
    for state in states[:1]:
        return _checkpoint(state, state.state_data)
    return None


def _checkpoint(state: ExecutionState, state_data: dict[str, Any]) -> Checkpoint:
    return Checkpoint(
        step=state.step,
        node_id=state.node_id,
        state_data=state_data,
        created_at=state.created_at,
    )


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


def _seconds_since_start(moment: datetime) -> _Seconds:
    duration = Value(moment, output_field=DateTimeField()) - F("started_at")
    return _Seconds(ExpressionWrapper(duration, output_field=DurationField()))


def _complete(run: WorkflowRun, fields: dict[str, Any]) -> None:
    """Give a new run the checked values of its fields, and the times that it lacks."""
    for name, value in fields.items():
        setattr(run, name, value)
    if run.status in TERMINAL_STATUSES:
        if run.completed_at is None:
            run.completed_at = timezone.now()
        if run.duration_seconds is None:
            run.duration_seconds = (run.completed_at - run.started_at).total_seconds()
    elif run.completed_at is not None or run.duration_seconds is not None:
        raise InvalidFieldError(
            f"completed_at and duration_seconds belong to a run that has ended, not to a "
            f"{run.status} one. Leave them out."
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

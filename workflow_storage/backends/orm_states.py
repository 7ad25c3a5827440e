"""The checkpoints on the Django ORM, whole or as a delta; part of orm.py."""

from __future__ import annotations

import itertools
import logging
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from django.db import IntegrityError, connections, transaction
from django.db.models import (
    BigIntegerField,
    DateTimeField,
    F,
    IntegerField,
    OuterRef,
    QuerySet,
    Subquery,
)
from django.db.models.functions import Coalesce
from django.utils import timezone

from workflow_storage.backends.compiled import Parameter
from workflow_storage.backends.errors import translates_errors
from workflow_storage.backends.orm_database import (
    RUN_ID,
    DjangoRepository,
    parameter,
)
from workflow_storage.base import (
    AbstractExecutionStateRepository,
    Checkpoint,
    StateWriter,
)
from workflow_storage.encoding import (
    SMALL_STATE,
    apply_delta,
    base_step,
    chain_steps,
    encode_state,
    is_delta,
    remember,
)
from workflow_storage.exceptions import (
    DamagedStateError,
    RunNotFoundError,
    StepConflictError,
)
from workflow_storage.models import (
    ExecutionState,
    loaded_state,
    rebuilt_state,
    rebuilt_text,
    stored_bytes,
    whole_state,
)
from workflow_storage.validation import (
    MAX_COUNT,
    MAX_NODE_ID,
    ValidCheckpoint,
    plain_text,
    possible_id,
    valid_checkpoint,
    valid_count,
    valid_name,
    valid_state,
    valid_step,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from datetime import datetime

logger = logging.getLogger(__name__)

Row = tuple[int | None, "datetime | None"]
"""What tells the row of a state: its id and created_at.

SQLite gives an id again after a rollback, but not at the same time.
"""


class StoredState(NamedTuple):
    """A row of the chain that a state is rebuilt from."""

    step: int
    state_json: str | None
    state_delta: bytes | None
    id: int
    node_id: str
    created_at: datetime

    @property
    def stored(self) -> bytes:
        """What is stored, as `workflow_storage.encoding` takes it: JSON text or a delta."""
        return stored_bytes(self.state_json, self.state_delta)

    @property
    def is_delta(self) -> bool:
        """Whether it is a delta; it is told without encoding a whole state."""
        return self.state_json is None and is_delta(self.stored)


StateAndRow = tuple[dict[str, Any], int, "Sequence[Any]"]
"""A state, its step, and the columns of `_CHECKPOINT` that come after those of `_STATE`."""

STATES_PAGE = 16
"""Checkpoints that `iter_state_history` holds in memory at a time."""

MAX_ATTEMPTS_IN_OWN = 1000
MAX_ATTEMPTS_IN_CALLERS = 20
"""How often a state is tried, in transactions of its own or in the caller's one, while other
writers take its step."""

_STATE = ("step", "state_json")
_CHECKPOINT = (*_STATE, "node_id", "created_at")
_STEP = Parameter("step", ExecutionState._meta.get_field("step"))


class DjangoExecutionStateRepository(DjangoRepository, AbstractExecutionStateRepository):
    """The checkpoints in a Django database.

    Args:
        alias: the database's name in DATABASES.
    """

    def save_state(self, run_id: str, state_data: dict[str, Any], node_id: str) -> int:
        """See `AbstractExecutionStateRepository.save_state`."""
        return DjangoStateWriter(self, run_id, once=True).save_state(state_data, node_id)

    def append(self, run_id: str, checkpoints: Iterable[Checkpoint]) -> int:
        """See `AbstractExecutionStateRepository.append`."""
        return self.writer(run_id).append(checkpoints)

    def writer(self, run_id: str) -> DjangoStateWriter:
        """See `AbstractExecutionStateRepository.writer`."""
        return DjangoStateWriter(self, run_id)

    @translates_errors
    def get_latest_state(self, run_id: str) -> dict[str, Any] | None:
        """See `AbstractExecutionStateRepository.get_latest_state`."""
        rows = self._newest_row(run_id, _STATE)
        if rows and rows[0][1] is not None:  # the common case, without what a delta needs
            return whole_state(run_id, *rows[0])
        found = self._state_in(run_id, rows, lambda: self._newest_row(run_id, _STATE))
        return None if found is None else found[0]

    @translates_errors
    def get_latest_checkpoint(self, run_id: str) -> Checkpoint | None:
        """See `AbstractExecutionStateRepository.get_latest_checkpoint`."""
        rows = self._newest_row(run_id, _CHECKPOINT)
        return _checkpoint(
            self._state_in(run_id, rows, lambda: self._newest_row(run_id, _CHECKPOINT))
        )

    @translates_errors
    def get_state(self, run_id: str, step: int) -> Checkpoint | None:
        """See `AbstractExecutionStateRepository.get_state`."""
        states = self._states_of(run_id).filter(step=valid_step(step)).values_list(*_CHECKPOINT)
        return _checkpoint(self._state_in(run_id, list(states), lambda: list(states.all())))

    def _newest_row(self, run_id: str, columns: tuple[str, ...]) -> list[Any]:
        if not possible_id(run_id):
            return []

        def newest() -> QuerySet[Any, Any]:
            return self._its_states().order_by("-step").values_list(*columns)[:1]

        return self._state_queries.rows(columns, newest, keyed=True, run_id=run_id)

    def _state_in(
        self, run_id: str, rows: Sequence[Any], again: Callable[[], Sequence[Any]]
    ) -> StateAndRow | None:
        """Give the state in the one row that a query finds, a row that begins with `_STATE`."""
        while rows:
            step, text, *rest = rows[0]
            if text is not None:
                return whole_state(run_id, step, text), step, rest
            chain = self.chain(run_id, step)
            # The chain is read in one statement; what it holds belongs together. If the state
            # has been deleted since the first one, the query finds another, or none.
            if chain and chain[0].step == step:
                rest = [chain[0].node_id, chain[0].created_at]
                return rebuilt_state(run_id, step, _by_step(chain)), step, rest
            rows = again()
        return None

    def iter_state_history(self, run_id: str, *, after: int = -1) -> Iterator[Checkpoint]:
        """See `AbstractExecutionStateRepository.iter_state_history`."""
        texts: dict[int, bytes] = {}
        last_step = min(max(valid_step(after), -1), MAX_COUNT)  # what the column holds
        while page := self._history_page(run_id, last_step):
            for state in page:
                text = self._rebuilt(run_id, state, texts)
                if text is not None:
                    remember(texts, state.step, text)
                    load = loaded_state if state.is_delta else whole_state
                    yield Checkpoint(
                        step=state.step,
                        node_id=state.node_id,
                        state_data=load(run_id, state.step, text),
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
            "next step", last_step_and_base, keyed=True, run_id=run_id, step=base
        ):
            return (0 if last_step is None else last_step + 1), tuple(base_row)
        raise RunNotFoundError(run_id)

    def holds(self, row: Row) -> bool:
        """Lock the row of a state, and say whether it is there.

        A transaction with one snapshot for all its statements (REPEATABLE READ) reads rows
        that others have deleted since, unless it locks them.
        """
        features = connections[self.alias].features
        if not features.has_select_for_update:
            return True
        no_key = features.has_select_for_no_key_update
        rows = self._states.filter(pk=row[0] or 0).select_for_update(no_key=no_key)
        return bool(rows.values_list("pk"))

    def insert(
        self, run_id: str, step: int, node_id: str, stored: bytes, created_at: datetime
    ) -> Row:
        """Insert a state as it is stored, and give what tells its row."""
        delta = is_delta(stored)
        (row_id,) = self._state_queries.insert(
            returning=["id"],
            run_id=run_id,
            step=step,
            node_id=node_id,
            created_at=created_at,
            state_json=None if delta else stored.decode(),
            state_delta=stored if delta else None,
        )
        return row_id, created_at

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

    def chain(self, run_id: str, step: int) -> list[StoredState]:
        """Give the states that a state is rebuilt from, itself first, as far as they are there."""
        steps = chain_steps(step)

        def those_states() -> QuerySet[Any, Any]:
            parameters: Any = [parameter(f"step_{number}") for number in range(len(steps))]
            states = self._its_states().filter(step__in=parameters)
            return states.values_list(*StoredState._fields)

        values = {f"step_{number}": link for number, link in enumerate(steps)}
        rows = self._state_queries.rows(
            ("chain", len(steps)), those_states, keyed=True, run_id=run_id, **values
        )
        return sorted(itertools.starmap(StoredState, rows), reverse=True)

    def inserts_at_once(self) -> bool:
        """Whether `insert_next` can be used: nothing else is to be in its transaction."""
        connection = connections[self.alias]
        return (
            # Neither in an atomic block nor after set_autocommit(False): where the transaction
            # goes on, PostgreSQL and SQLite look at the foreign key when it ends.
            connection.get_autocommit()
            # MySQL reads no table that it inserts into, and gives back no columns.
            and connection.vendor != "mysql"
            and connection.features.can_return_columns_from_insert
        )

    def _states_of(self, run_id: str) -> QuerySet[ExecutionState]:
        if not possible_id(run_id):
            return self._states.none()
        return self._states.filter(run_id=plain_text(run_id))

    def _make_whole(self, states: QuerySet[ExecutionState], first: int, newest: int) -> None:
        """Store those states whole whose bases come before the first that is kept."""
        for step in range(first, newest + 1):
            # Few of them: the lowest bit that is set grows from one to the next.
            if base_step(step) < first:
                for state in states.filter(step=step, state_delta__isnull=False):
                    try:
                        state.stored = state.rebuilt_text()
                    except DamagedStateError:
                        logger.exception("A damaged state is left as it is")
                        continue
                    state.save(using=self.alias, update_fields=["state_json", "state_delta"])

    @translates_errors
    def _history_page(self, run_id: str, after_step: int) -> list[StoredState]:
        if not possible_id(run_id):
            return []

        def page() -> QuerySet[Any, Any]:
            later = self._its_states().filter(step__gt=parameter("step_after")).order_by("step")
            return later.values_list(*StoredState._fields)[:STATES_PAGE]

        rows = self._state_queries.rows(
            "history", page, keyed=True, run_id=run_id, step_after=after_step
        )
        return list(itertools.starmap(StoredState, rows))

    @translates_errors
    def _rebuilt(self, run_id: str, state: StoredState, texts: dict[int, bytes]) -> bytes | None:
        """Give the JSON text of a state, from that of its base if it is among the texts.

        Returns:
            The text; None if the state has been deleted since it was read.
        """
        if not state.is_delta:
            return state.stored
        base = base_step(state.step)
        if base in texts:
            # If the run was deleted and begun anew meanwhile, it has another base by now.
            with suppress(ValueError):
                return apply_delta(state.stored, texts[base])
        chain = self.chain(run_id, state.step)
        if all(link.id != state.id for link in chain):
            return None
        return rebuilt_text(run_id, state.step, _by_step(chain))


class DjangoStateWriter(StateWriter):
    """Appends checkpoints to one run, and remembers the states that the next is based on.

    Args:
        states: the repository.
        run_id: the run.
        once: whether it saves one checkpoint only, so that nothing is remembered.
    """

    def __init__(
        self, states: DjangoExecutionStateRepository, run_id: str, *, once: bool = False
    ) -> None:
        super().__init__(states, run_id)
        self._once = once
        self.alias = states.alias
        self._repository = states
        self._next = 0
        self._texts: dict[int, bytes] = {}
        self._rows: dict[int, Row] = {}

    @translates_errors
    def save_state(self, state_data: dict[str, Any], node_id: str) -> int:
        """See `AbstractExecutionStateRepository.save_state`."""
        text = valid_state(state_data)
        node_id = valid_name("node_id", node_id, MAX_NODE_ID)
        repository = self._repository
        if not possible_id(self.run_id):
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
                if attempt >= (MAX_ATTEMPTS_IN_OWN if own_transaction else MAX_ATTEMPTS_IN_CALLERS):
                    raise
        raise AssertionError("unreachable")

    def append(self, checkpoints: Iterable[Checkpoint]) -> int:
        """See `AbstractExecutionStateRepository.append`."""
        if not possible_id(self.run_id):
            raise RunNotFoundError(self.run_id)
        # A transaction that is tried again needs all of them again.
        return self._append_all([valid_checkpoint(checkpoint) for checkpoint in checkpoints])

    @translates_errors
    def _append_all(self, checkpoints: list[ValidCheckpoint]) -> int:
        outer = connections[self.alias].in_atomic_block
        try:
            with transaction.atomic(using=self.alias):
                self._repository._lock(self.run_id)
                for checkpoint in checkpoints:
                    step, row = self._append(
                        checkpoint.text, checkpoint.node_id, checkpoint.step, checkpoint.created_at
                    )
                    self._remember(step, row, checkpoint.text)
        except BaseException:
            self._forget()
            raise
        if outer:
            # After a rollback another state can have the same row id and the same time.
            self._forget()
        return len(checkpoints)

    def _remember(self, step: int, row: Row, text: bytes) -> int:
        if not self._once:
            remember(self._texts, step, text)
            remember(self._rows, step, row)
            self._next = step + 1
        return step

    def _append(
        self, text: bytes, node_id: str, given: int | None = None, at: datetime | None = None
    ) -> tuple[int, Row]:
        """Insert a state as the next one, or as the one with the given step and time."""
        repository = self._repository
        features = connections[self.alias].features
        if len(text) > SMALL_STATE and features.has_select_for_update:
            # A statement that waits for a lock reads what was there before it waited, and
            # the base may have been deleted since. So the lock has a statement of its own.
            repository._lock(self.run_id)
        else:
            repository._begin_writing()
        expected = self._next if given is None else given
        step, base_row = repository.next_step(self.run_id, base_step(expected))
        if given is not None:
            # A run without states can begin anywhere.
            if step not in (0, given):
                raise StepConflictError(self.run_id, given, step)
            step = given
        base = self._base(step, base_row, len(text))
        if base is not None and not repository.holds(self._rows[base_step(step)]):
            self._forget()
            base = None
        stored = encode_state(text, base)
        return step, repository.insert(self.run_id, step, node_id, stored, at or timezone.now())

    def _base(self, step: int, base_row: Row, size: int) -> bytes | None:
        """Give the JSON text of the base of a step: remembered, if the row is still that row."""
        if step == 0 or size <= SMALL_STATE:
            return None
        base = base_step(step)
        if step != self._next or self._rows.get(base) != base_row:
            # Somebody else wrote to the run, or deleted from it, or this is the first time.
            self._reload(base)
        return self._texts.get(base)

    def _forget(self) -> None:
        self._texts.clear()
        self._rows.clear()

    def _reload(self, step: int) -> None:
        """Remember a state and all that it is based on; nothing if it cannot be rebuilt."""
        self._forget()
        for state in reversed(self._repository.chain(self.run_id, step)):
            try:
                text = self._repository._rebuilt(self.run_id, state, self._texts)
            except DamagedStateError:
                # The new state is then stored whole, and the run goes on.
                logger.exception("A state cannot serve as a base")
                continue
            if text is not None:
                self._texts[state.step] = text
                self._rows[state.step] = state.id, state.created_at


def _by_step(chain: Iterable[StoredState]) -> dict[int, bytes]:
    return {link.step: link.stored for link in chain}


def _checkpoint(found: StateAndRow | None) -> Checkpoint | None:
    if found is None:
        return None
    state, step, (node_id, created_at) = found
    return Checkpoint(step=step, node_id=node_id, state_data=state, created_at=created_at)


def _computed_step() -> dict[str, Any]:
    """Give the next step of a run. If there is no such run, its foreign key refuses the row."""
    states = ExecutionState._base_manager.filter(run_id=RUN_ID).order_by("-step")
    return {"step": Coalesce(Subquery(states.values_list(F("step") + 1)[:1]), 0)}

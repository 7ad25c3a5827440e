"""The rows of the states: the statements that the repository and the writer are made of."""

from __future__ import annotations

import itertools
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from django.db import IntegrityError
from django.db.models import (
    BigIntegerField,
    DateTimeField,
    IntegerField,
    OuterRef,
    QuerySet,
    Subquery,
)

from workflow_storage.attempts import refusal
from workflow_storage.backends.orm import state_statements
from workflow_storage.backends.orm.conditions import (
    Condition,
    in_attempt,
    in_status,
    values_of,
    with_parameters,
)
from workflow_storage.backends.orm.dialects import dialect_of
from workflow_storage.backends.orm.repository import Database
from workflow_storage.backends.orm.state_statements import step_parameter
from workflow_storage.deltas import chain_steps, is_delta
from workflow_storage.exceptions import RunNotFoundError, StorageError
from workflow_storage.models import stored_bytes
from workflow_storage.status import RunStatus
from workflow_storage.validation import is_possible_id

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime


Mark = tuple[int | None, "datetime | None"]
"""What tells the row of a state from another one of its step: its id and created_at.

SQLite gives an id again after a rollback, and a clock can stand still; so what can be rolled back
is not remembered there.
"""

STATES_PAGE = 16
"""Checkpoints that `iter_state_history` holds in memory at a time."""

STEPS_PAGE = 500
"""Steps that `iter_steps` reads at a time."""

STATE = ("step", "state_json")
"""The columns of a state that is stored whole."""
CHECKPOINT = (
    *STATE,
    "node_id",
    "created_at",
    "attempt",
    "duration_seconds",
    "tokens",
    "cost_usd",
)
"""The same with what else belongs to a checkpoint."""


class StoredState(NamedTuple):
    """A row of the chain that a state is rebuilt from."""

    step: int
    state_json: str | None
    state_delta: bytes | None
    id: int
    node_id: str
    created_at: datetime
    attempt: int | None
    duration_seconds: float | None
    tokens: int | None
    cost_usd: float | None

    @property
    def rest(self) -> list[Any]:
        """The columns of `CHECKPOINT` that come after those of `STATE`."""
        return [getattr(self, name) for name in CHECKPOINT[len(STATE) :]]

    @property
    def stored(self) -> bytes:
        """What is stored, as `workflow_storage.deltas` takes it: JSON text or a delta."""
        return stored_bytes(self.state_json, self.state_delta)

    @property
    def is_delta(self) -> bool:
        """Whether it is a delta; it is told without encoding a whole state."""
        return self.state_json is None and is_delta(self.stored)

    @property
    def mark(self) -> Mark:
        """What tells the row."""
        return self.id, self.created_at


class NewCheckpoint(NamedTuple):
    """A checkpoint that has been checked, on its way into a table."""

    text: bytes
    """The state as JSON text."""
    node_id: str
    created_at: datetime
    usage: dict[str, Any]
    """See `workflow_storage.base.NodeUsage`; all of it, None for what is not known."""
    attempt: int | None = None
    """The attempt that its run has to be in; of one that is copied, the one that it is of."""
    totals: dict[str, Any] = {}
    """What the totals of the run are with it, if they change."""

    @property
    def columns(self) -> dict[str, Any]:
        """The columns of its row that do not depend on how the state is stored."""
        columns: dict[str, Any] = {"node_id": self.node_id, "created_at": self.created_at}
        if self.attempt is not None:
            columns["attempt"] = self.attempt
        for name, value in self.usage.items():
            if value is not None:  # what it is without, too
                columns[name] = value
        return columns

    @property
    def is_fenced(self) -> bool:
        """Whether its run has to be in an attempt."""
        return self.attempt is not None

    @property
    def is_noted(self) -> bool:
        """Whether anything is to be noted in the run with it, or asked of the run."""
        return self.is_fenced or bool(self.totals)

    @property
    def changed(self) -> tuple[str, ...]:
        """The names of what is noted in the run."""
        return ("current_node", *self.totals) if self.is_noted else ()

    @property
    def noted(self) -> dict[str, Any]:
        """The values for that, and for the attempt that the run has to be in."""
        if not self.is_noted:
            return {}
        noted = {"current_node": self.node_id, **self.totals}
        return {**noted, "of_attempt": self.attempt} if self.is_fenced else noted

    @property
    def names(self) -> tuple[str, ...]:
        """The names of these, and of those that a whole state has besides."""
        return ("run_id", "state_json", *self.columns)


class StateRows(Database):
    """The states in a database."""

    def newest(self, run_id: str, columns: tuple[str, ...]) -> list[Any]:
        """Return the columns of the newest state of a run, in a list of one or none."""
        if not is_possible_id(run_id):
            return []

        def newest() -> QuerySet[Any, Any]:
            return self.its_states().order_by("-step").values_list(*columns)[:1]

        return self.state_queries.rows(columns, newest, keyed=True, run_id=run_id)

    def newest_step(self, run_id: str) -> int | None:
        """Return the newest step of a run that is locked, as it is now; None if there is none."""
        states = self.as_of_now(self.states_of(run_id)).order_by("-step")
        return next(iter(states.values_list("step", flat=True)[:1]), None)

    def page(self, run_id: str, after: int) -> list[StoredState]:
        """Return the next `STATES_PAGE` states after a step."""
        if not is_possible_id(run_id):
            return []

        def page() -> QuerySet[Any, Any]:
            later = self.its_states().filter(step__gt=step_parameter("after")).order_by("step")
            return later.values_list(*StoredState._fields)[:STATES_PAGE]

        rows = self.state_queries.rows("history", page, keyed=True, run_id=run_id, after=after)
        return list(itertools.starmap(StoredState, rows))

    def chain(self, run_id: str, step: int) -> list[StoredState]:
        """Return the states that a state is rebuilt from, itself first, as far as they are there.

        They are read in one statement, so that what is there belongs together.
        """
        steps = {f"step_{number}": link for number, link in enumerate(chain_steps(step))}

        def those_states() -> QuerySet[Any, Any]:
            parameters: Any = [step_parameter(name) for name in steps]
            return self.its_states().filter(step__in=parameters).values_list(*StoredState._fields)

        rows = self.state_queries.rows(
            ("chain", len(steps)), those_states, keyed=True, run_id=run_id, **steps
        )
        return sorted(itertools.starmap(StoredState, rows), reverse=True)

    def next_step(self, run_id: str, base: int, attempt: int | None = None) -> tuple[int, Mark]:
        """Lock a run and return its next step, in one statement.

        Args:
            run_id: which run.
            base: a step.
            attempt: the attempt that it has to be in, and running; None for any.

        Returns:
            The next step, and the mark of the other step; `(None, None)` if that is not there.

        Raises:
            RunNotFoundError: if there is no such run.
            RunLostError: if it is not running in that attempt.
        """
        conditions = fence(attempt)

        def last_step_and_base() -> QuerySet[Any, Any]:
            states = self.states.filter(run_id=OuterRef("pk"))
            if dialect_of(self.connection).locks_see_newest:
                states = self.with_lock(states)
            newest = states.order_by("-step").values("step")[:1]
            of_base = states.filter(step=step_parameter("base"))
            run = with_parameters(self.the_run(), conditions)
            return self.with_lock(run, no_key=True).values_list(
                Subquery(newest, output_field=IntegerField()),
                Subquery(of_base.values("id")[:1], output_field=BigIntegerField()),
                Subquery(of_base.values("created_at")[:1], output_field=DateTimeField()),
            )

        for last_step, *base_mark in self.run_queries.rows(
            ("next step", len(conditions)),
            last_step_and_base,
            keyed=True,
            run_id=run_id,
            base=base,
            **values_of(conditions),
        ):
            return (0 if last_step is None else last_step + 1), (base_mark[0], base_mark[1])
        raise self.refusal(run_id, attempt)

    def note_checkpoint(self, run_id: str, checkpoint: NewCheckpoint) -> None:
        """Lock a run and note in it what comes with a checkpoint, in one statement.

        Raises:
            RunNotFoundError: if there is no such run.
            RunLostError: if it is not running in the attempt that the checkpoint has to be of.
        """
        noted = checkpoint.changed
        with self.run_queries.execute(
            ("note", *noted, checkpoint.is_fenced),
            partial(state_statements.note, noted=noted, fenced=checkpoint.is_fenced),
            run_id=run_id,
            **checkpoint.noted,
        ) as cursor:
            if cursor.rowcount:
                return
        raise self.refusal(run_id, checkpoint.attempt)

    def refusal(self, run_id: str, attempt: int | None) -> StorageError | IntegrityError:
        """Return why there was no run, or none that was running in an attempt.

        Returns:
            The error; an IntegrityError, after which a writer tries again, if there is one by now,
            for somebody has committed it in between.
        """
        found = self.found(run_id)
        is_there = found is not None and (
            attempt is None or (found.status, found.attempt) == (RunStatus.RUNNING, attempt)
        )
        if is_there:
            return IntegrityError(f"workflow run {run_id} was committed in between")
        return refusal(run_id, found, attempt=attempt) or RunNotFoundError(run_id)

    def holds(self, mark: Mark | None) -> bool:
        """Lock the row of a state, and say whether it is there.

        A transaction with one snapshot for all its statements (REPEATABLE READ) reads rows
        that others have deleted since, unless it locks them.
        """
        if not self.connection.features.has_select_for_update:
            return True
        row_id = mark[0] if mark else None
        rows = self.with_lock(self.states.filter(pk=row_id or 0), no_key=True)
        return bool(rows.values_list("pk"))

    def insert(self, run_id: str, step: int, stored: bytes, checkpoint: NewCheckpoint) -> Mark:
        """Insert a state as it is stored, and return the mark of its row."""
        delta = is_delta(stored)
        (row_id,) = self.state_queries.insert(
            returning=["id"],
            run_id=run_id,
            step=step,
            state_json=None if delta else stored.decode(),
            state_delta=stored if delta else None,
            **checkpoint.columns,
        )
        return row_id, checkpoint.created_at

    def insert_next(self, run_id: str, checkpoint: NewCheckpoint) -> tuple[int, Mark]:
        """Insert a whole state as the next one of a run, in one statement.

        Returns:
            Its step, and the mark of its row.

        Raises:
            IntegrityError: if there is no such run, or another writer took the step.
        """
        row_id, step = self.state_queries.insert(
            returning=["id", "step"],
            computed=state_statements.next_step,
            run_id=run_id,
            state_json=checkpoint.text.decode(),
            **checkpoint.columns,
        )
        return step, (row_id, checkpoint.created_at)

    def insert_expected(self, run_id: str, step: int, checkpoint: NewCheckpoint) -> Mark | None:
        """Insert a whole state at a step if that is the next one, in one statement.

        For databases that give back nothing of what they compute.

        Returns:
            The mark of its row; None if the next step is another one.
        """
        with self.state_queries.execute(
            ("expected", *checkpoint.names),
            partial(state_statements.insert_expected, names=checkpoint.names),
            run_id=run_id,
            step=step,
            state_json=checkpoint.text.decode(),
            **checkpoint.columns,
        ) as cursor:
            return (cursor.lastrowid, checkpoint.created_at) if cursor.rowcount else None

    def insert_following(
        self,
        run_id: str,
        step: int,
        stored: bytes,
        base: Mark | None,
        checkpoint: NewCheckpoint,
    ) -> Mark | None:
        """Insert a state at a step if that is the next one and its base is there, in one statement.

        For databases that lock as a whole, and for those that can do it all in one statement, what
        `note_checkpoint` does included.

        Args:
            run_id: which run.
            step: its step, which is not 0.
            stored: the state as it is stored.
            base: the mark of the state that it is based on; None if it is whole.
            checkpoint: what belongs to it.

        Returns:
            The mark of its row; None if it was not inserted.

        Raises:
            IntegrityError: the same, where nothing is to be noted then, either.
        """
        name = "state_json" if base is None else "state_delta"
        values = {
            "run_id": run_id,
            name: stored.decode() if base is None else stored,
            **checkpoint.columns,
            "step": step,
        }
        of_base = {} if base is None else {"base_id": base[0], "base_created_at": base[1]}
        based = base is not None
        if not dialect_of(self.connection).updates_within:
            with self.state_queries.execute(
                ("following", *values),
                partial(state_statements.insert_following, names=tuple(values), based=based),
                **values,
                **of_base,
            ) as cursor:
                return (cursor.lastrowid, checkpoint.created_at) if cursor.rowcount else None
        noted = checkpoint.noted
        with self.state_queries.execute(
            ("following", *values, *noted),
            partial(
                state_statements.insert_following_and_note,
                names=tuple(name for name in values if name != "step"),
                based=based,
                noted=checkpoint.changed,
                fenced=checkpoint.is_fenced,
            ),
            **noted,
            **values,
            **of_base,
        ) as cursor:
            row = cursor.fetchone()
        return (row[0], checkpoint.created_at) if row else None

    def insert_and_note(self, run_id: str, checkpoint: NewCheckpoint) -> tuple[int, Mark]:
        """Do what `note_checkpoint` and `insert_next` do, in one statement.

        Raises:
            RunNotFoundError: if there is no such run.
            RunLostError: if it is not running in the attempt that the checkpoint has to be of.
            IntegrityError: if another writer took the step, or changed the run meanwhile.
        """
        noted = checkpoint.noted
        with self.state_queries.execute(
            ("next", *noted, *checkpoint.names),
            partial(
                state_statements.insert_and_note,
                noted=checkpoint.changed,
                fenced=checkpoint.is_fenced,
                names=checkpoint.names,
            ),
            run_id=run_id,
            state_json=checkpoint.text.decode(),
            **noted,
            **checkpoint.columns,
        ) as cursor:
            row = cursor.fetchone()
        if row is None:
            raise self.refusal(run_id, checkpoint.attempt)
        return row[1], (row[0], checkpoint.created_at)

    def copy(self, run_id: str, target_run_id: str, through: int) -> int:
        """Insert the states of a run up to a step for another run, as they are; return how many."""
        with self.state_queries.execute(
            "copy",
            state_statements.copy,
            run_id=run_id,
            target_run_id=target_run_id,
            through=through,
        ) as cursor:
            return int(cursor.rowcount)

    def can_insert_next(self) -> bool:
        """Whether `insert_next` can be used: nothing else is to be in its transaction."""
        connection = self.connection
        return (
            # Neither in an atomic block nor after set_autocommit(False): where the transaction
            # goes on, PostgreSQL and SQLite look at the foreign key when it ends.
            connection.get_autocommit()
            and dialect_of(connection).inserts_computed
            and connection.features.can_return_columns_from_insert
        )

    def can_insert_following(self, checkpoint: NewCheckpoint) -> bool:
        """Whether `insert_following` can be used without a transaction around it."""
        connection = self.connection
        if not connection.get_autocommit():
            return False
        locks_rows = connection.features.has_select_for_update
        return dialect_of(connection).updates_within or not (locks_rows or checkpoint.is_noted)


def by_step(chain: Iterable[StoredState]) -> dict[int, bytes]:
    """Return what is stored for the steps of a chain."""
    return {link.step: link.stored for link in chain}


def fence(attempt: int | None) -> list[Condition]:
    """Return the conditions that a run is running in an attempt; none for any attempt."""
    return [] if attempt is None else [in_status([RunStatus.RUNNING]), in_attempt(attempt)]

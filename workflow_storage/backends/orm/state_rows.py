"""The rows of the states: the statements that the repository and the writer are made of."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

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

from workflow_storage.backends.orm.compiled_queries import Parameter
from workflow_storage.backends.orm.dialects import dialect_of
from workflow_storage.backends.orm.repository import RUN_ID, Database
from workflow_storage.deltas import chain_steps, is_delta
from workflow_storage.exceptions import RunNotFoundError
from workflow_storage.models import ExecutionState, stored_bytes
from workflow_storage.validation import is_possible_id

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime

Mark = tuple[int | None, "datetime | None"]
"""What tells the row of a state from another one of its step: its id and created_at.

SQLite gives an id again after a rollback, but not at the same time.
"""

STATES_PAGE = 16
"""Checkpoints that `iter_state_history` holds in memory at a time."""

STATE = ("step", "state_json")
"""The columns of a state that is stored whole."""
CHECKPOINT = (*STATE, "node_id", "created_at")
"""The same with what else belongs to a checkpoint."""


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


class StateRows(Database):
    """The states in a database."""

    def newest(self, run_id: str, columns: tuple[str, ...]) -> list[Any]:
        """Return the columns of the newest state of a run, in a list of one or none."""
        if not is_possible_id(run_id):
            return []

        def newest() -> QuerySet[Any, Any]:
            return self.its_states().order_by("-step").values_list(*columns)[:1]

        return self.state_queries.rows(columns, newest, keyed=True, run_id=run_id)

    def page(self, run_id: str, after: int) -> list[StoredState]:
        """Return the next `STATES_PAGE` states after a step."""
        if not is_possible_id(run_id):
            return []

        def page() -> QuerySet[Any, Any]:
            later = self.its_states().filter(step__gt=_step("after")).order_by("step")
            return later.values_list(*StoredState._fields)[:STATES_PAGE]

        rows = self.state_queries.rows("history", page, keyed=True, run_id=run_id, after=after)
        return list(itertools.starmap(StoredState, rows))

    def chain(self, run_id: str, step: int) -> list[StoredState]:
        """Return the states that a state is rebuilt from, itself first, as far as they are there.

        They are read in one statement, so that what is there belongs together.
        """
        steps = {f"step_{number}": link for number, link in enumerate(chain_steps(step))}

        def those_states() -> QuerySet[Any, Any]:
            parameters: Any = [_step(name) for name in steps]
            return self.its_states().filter(step__in=parameters).values_list(*StoredState._fields)

        rows = self.state_queries.rows(
            ("chain", len(steps)), those_states, keyed=True, run_id=run_id, **steps
        )
        return sorted(itertools.starmap(StoredState, rows), reverse=True)

    def next_step(self, run_id: str, base: int) -> tuple[int, Mark]:
        """Lock a run and return its next step, in one statement.

        Args:
            run_id: which run.
            base: a step.

        Returns:
            The next step, and the mark of the other step; `(None, None)` if that is not there.

        Raises:
            RunNotFoundError: if there is no such run.
        """

        def last_step_and_base() -> QuerySet[Any, Any]:
            states = self.states.filter(run_id=OuterRef("pk"))
            newest = states.order_by("-step").values("step")[:1]
            of_base = states.filter(step=_step("step"))
            return self.with_lock(self.the_run(), no_key=True).values_list(
                Subquery(newest, output_field=IntegerField()),
                Subquery(of_base.values("id")[:1], output_field=BigIntegerField()),
                Subquery(of_base.values("created_at")[:1], output_field=DateTimeField()),
            )

        for last_step, *base_mark in self.run_queries.rows(
            "next step", last_step_and_base, keyed=True, run_id=run_id, step=base
        ):
            return (0 if last_step is None else last_step + 1), (base_mark[0], base_mark[1])
        raise RunNotFoundError(run_id)

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

    def insert(
        self, run_id: str, step: int, node_id: str, stored: bytes, created_at: datetime
    ) -> Mark:
        """Insert a state as it is stored, and return the mark of its row."""
        delta = is_delta(stored)
        (row_id,) = self.state_queries.insert(
            returning=["id"],
            run_id=run_id,
            step=step,
            node_id=node_id,
            created_at=created_at,
            state_json=None if delta else stored.decode(),
            state_delta=stored if delta else None,
        )
        return row_id, created_at

    def insert_next(self, run_id: str, node_id: str, stored: bytes) -> tuple[int, Mark]:
        """Insert a whole state as the next one of a run, in one statement.

        Returns:
            Its step, and the mark of its row.

        Raises:
            IntegrityError: if there is no such run, or another writer took the step.
        """
        now = timezone.now()
        row_id, step = self.state_queries.insert(
            returning=["id", "step"],
            computed=_computed_step,
            run_id=run_id,
            node_id=node_id,
            created_at=now,
            state_json=stored.decode(),
        )
        return step, (row_id, now)

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


def by_step(chain: Iterable[StoredState]) -> dict[int, bytes]:
    """Return what is stored for the steps of a chain."""
    return {link.step: link.stored for link in chain}


def _step(name: str) -> Parameter:
    return Parameter(name, ExecutionState._meta.get_field("step"))


def _computed_step() -> dict[str, Any]:
    """Return the next step of a run. If there is no such run, its foreign key refuses the row."""
    states = ExecutionState._base_manager.filter(run_id=RUN_ID).order_by("-step")
    return {"step": Coalesce(Subquery(states.values_list(F("step") + 1)[:1]), 0)}

"""The writer of the states of one run in a Django database."""

from __future__ import annotations

import itertools
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from django.db import IntegrityError
from django.utils import timezone

from workflow_storage.backends.orm.errors import operation
from workflow_storage.base import AbstractExecutionStateRepository, Checkpoint, StateWriter
from workflow_storage.deltas import SMALL_STATE, Chain, Link, base_step
from workflow_storage.exceptions import RunNotFoundError, StepConflictError
from workflow_storage.serialization import state_text
from workflow_storage.validation import (
    MAX_NODE_ID,
    ValidCheckpoint,
    is_possible_id,
    valid_checkpoint,
    valid_name,
)

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime

    from workflow_storage.backends.orm.state_rows import Mark, StateRows

MAX_ATTEMPTS_IN_OWN = 1000
MAX_ATTEMPTS_IN_CALLERS = 20
"""How often a state is tried, in transactions of its own or in the caller's one, while other
writers take its step."""


class DjangoStateWriter(StateWriter):
    """Appends checkpoints to one run, and remembers the states that the next is based on.

    Args:
        states: the repository.
        rows: the rows of its states.
        run_id: the run.
        once: whether it saves one checkpoint only, so that nothing is remembered.
    """

    def __init__(
        self,
        states: AbstractExecutionStateRepository,
        rows: StateRows,
        run_id: str,
        *,
        once: bool = False,
    ) -> None:
        super().__init__(states, run_id)
        self.alias = rows.alias
        self._rows = rows
        self._once = once
        self._chain: Chain[Mark] = Chain(run_id)

    @operation
    def save_state(self, state_data: dict[str, Any], node_id: str) -> int:
        """See `AbstractExecutionStateRepository.save_state`."""
        text = state_text(state_data)
        node_id = valid_name("node_id", node_id, MAX_NODE_ID)
        rows = self._rows
        if not is_possible_id(self.run_id):
            raise RunNotFoundError(self.run_id)
        if len(text) <= SMALL_STATE and rows.can_insert_next():
            with suppress(IntegrityError):
                step, mark = rows.insert_next(self.run_id, node_id, text)
                return self._remember(step, mark, text)
        most = MAX_ATTEMPTS_IN_CALLERS if rows.in_transaction else MAX_ATTEMPTS_IN_OWN
        for attempt in itertools.count():
            try:
                with rows.transaction():
                    # PostgreSQL decides a step on a snapshot from before it waited for the
                    # lock, so that the step can be taken when it is inserted. The second
                    # time, the lock comes first, in a statement of its own.
                    if attempt:
                        rows.lock_run(self.run_id)
                    step, mark = self._append(text, node_id)
                return self._remember(step, mark, text)
            except IntegrityError:
                # With one snapshot for a whole transaction (REPEATABLE READ), only a new
                # transaction sees the step that was taken.
                if attempt >= most:
                    raise
        raise AssertionError("unreachable")

    def append(self, checkpoints: Iterable[Checkpoint]) -> int:
        """See `AbstractExecutionStateRepository.append`."""
        if not is_possible_id(self.run_id):
            raise RunNotFoundError(self.run_id)
        # A transaction that is tried again needs all of them again.
        return self._append_all([valid_checkpoint(checkpoint) for checkpoint in checkpoints])

    @operation
    def _append_all(self, checkpoints: list[ValidCheckpoint]) -> int:
        in_callers = self._rows.in_transaction
        try:
            with self._rows.transaction():
                self._rows.lock_run(self.run_id)
                for checkpoint in checkpoints:
                    step, mark = self._append(
                        checkpoint.text, checkpoint.node_id, checkpoint.step, checkpoint.created_at
                    )
                    self._remember(step, mark, checkpoint.text)
        except BaseException:
            self._chain.forget()
            raise
        if in_callers:
            # After a rollback another state can have the same row id and the same time.
            self._chain.forget()
        return len(checkpoints)

    def _remember(self, step: int, mark: Mark, text: bytes) -> int:
        if not self._once:
            self._chain.remember(step, text, mark)
        return step

    def _append(
        self, text: bytes, node_id: str, given: int | None = None, at: datetime | None = None
    ) -> tuple[int, Mark]:
        """Insert a state as the next one, or as the one with the given step and time."""
        rows = self._rows
        if len(text) > SMALL_STATE and rows.connection.features.has_select_for_update:
            # A statement that waits for a lock reads what was there before it waited, and
            # the base may have been deleted since. So the lock has a statement of its own.
            rows.lock_run(self.run_id)
        else:
            rows.begin_writing()
        expected = (self._chain.next_step or 0) if given is None else given
        step, base_mark = rows.next_step(self.run_id, base_step(expected))
        if given is not None:
            # A run without states can begin anywhere.
            if step not in (0, given):
                raise StepConflictError(self.run_id, given, step)
            step = given
        if step and len(text) > SMALL_STATE:
            self._load_base(step, base_mark)
        stored, _ = self._chain.encode(text, step)
        return step, rows.insert(self.run_id, step, node_id, stored, at or timezone.now())

    def _load_base(self, step: int, base_mark: Mark) -> None:
        """Let the chain hold the base of a step, if it is there and can be rebuilt."""
        base = base_step(step)
        if self._chain.lacks_base(step) or self._chain.mark(base) != base_mark:
            # Somebody else wrote to the run, or deleted from it, or this is the first time.
            links = self._rows.chain(self.run_id, base)
            self._chain.load(
                step, (Link(link.step, link.stored, link.mark) for link in reversed(links))
            )
        if not self._chain.lacks_base(step) and not self._rows.holds(self._chain.mark(base)):
            self._chain.forget()

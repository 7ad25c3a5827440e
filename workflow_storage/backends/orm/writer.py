"""The writer of the states of one run in a Django database."""

from __future__ import annotations

import itertools
import threading
import time
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, Unpack

from django.db import IntegrityError, OperationalError
from django.utils import timezone

from workflow_storage.backends.orm.causes import Cause
from workflow_storage.backends.orm.connections import in_callers_transaction
from workflow_storage.backends.orm.dialects import cause_of, dialect_of
from workflow_storage.backends.orm.errors import Patience, conflict, operation
from workflow_storage.backends.orm.state_rows import NewCheckpoint
from workflow_storage.base import (
    AbstractExecutionStateRepository,
    Checkpoint,
    NodeUsage,
    StateWriter,
    Totals,
)
from workflow_storage.deltas import (
    SMALL_STATE,
    Chain,
    EncodedCheckpoint,
    Link,
    RecentChains,
    base_step,
    is_delta,
)
from workflow_storage.exceptions import RunNotFoundError, StepConflictError
from workflow_storage.serialization import state_text
from workflow_storage.validation import (
    MAX_NODE_ID,
    ValidCheckpoint,
    is_possible_id,
    refuse_no_state,
    valid_attempt,
    valid_checkpoint,
    valid_encoded,
    valid_name,
    valid_totals,
    valid_usage,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from workflow_storage.backends.orm.state_rows import Mark, StateRows

_P = ParamSpec("_P")
_T = TypeVar("_T")

TRIES_IN_CALLERS = 20
"""How often a state is tried in the caller's transaction, while other writers take its step."""


class DjangoStateWriter(StateWriter):
    """Appends checkpoints to one run, and remembers the states that the next is based on.

    Args:
        states: the repository.
        rows: the rows of its states.
        run_id: the run.
        attempt: the attempt that the run has to be in, and running; None for any.
        own_connection: see `DjangoRepository`.
        recent: where what is remembered of the run is kept between writers; None if only here.
    """

    def __init__(
        self,
        states: AbstractExecutionStateRepository,
        rows: StateRows,
        run_id: str,
        attempt: int | None = None,
        *,
        own_connection: bool = False,
        recent: RecentChains[Mark] | None = None,
    ) -> None:
        super().__init__(states, run_id, valid_attempt(attempt))
        self.alias = rows.alias
        self.own_connection = own_connection
        self._in_one_thread = threading.Lock()
        self._rows = rows
        self._recent = recent
        self._chain: Chain[Mark] = Chain(run_id)

    async def in_thread(self, call: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Return what a call returns that is carried out in a thread, after those before it."""

        def after_the_others() -> _T:
            # In the thread, for a task that is cancelled does not wait for its call to end.
            with self._in_one_thread:
                return call(*args, **kwargs)

        return await super().in_thread(after_the_others)

    @operation
    def save_state(
        self,
        state_data: Any,
        node_id: str,
        *,
        totals: Totals | None = None,
        **usage: Unpack[NodeUsage],
    ) -> int:
        """See `AbstractExecutionStateRepository.save_state`."""
        if self._recent is not None:
            self._chain = self._recent.take(self.run_id)
        checkpoint = NewCheckpoint(
            state_text(state_data, self._chain.texts.dump),
            valid_name("node_id", node_id, MAX_NODE_ID),
            timezone.now(),
            valid_usage(usage),
            self.attempt,
            valid_totals(totals),
        )
        if not is_possible_id(self.run_id):
            raise RunNotFoundError(self.run_id)
        step = self._save(checkpoint)
        if self._recent is not None:
            self._recent.keep(self._chain)
        return step

    def _save(self, checkpoint: NewCheckpoint) -> int:
        rows = self._rows
        tries = 0
        try:
            step = self._save_at_once(checkpoint)
            if step is not None:
                return step
        except IntegrityError:
            tries = 1
        except OperationalError as exc:
            # At REPEATABLE READ, others have changed the run. With the lock first it need not be again.
            if cause_of(rows.connection, exc) is not Cause.GAVE_WAY:
                raise
            tries = 1
        in_callers = in_callers_transaction(rows.connection)
        patience = Patience(time.monotonic())
        for number in itertools.count(tries):
            try:
                with rows.read_committed() if number else rows.transaction():
                    step, mark = self._insert(checkpoint)
                self._remember(step, mark, checkpoint)
                self._forget_in_callers()
                return step
            except IntegrityError as exc:
                if in_callers:
                    # With one snapshot for the whole transaction (REPEATABLE READ), only a new
                    # one sees the step that was taken.
                    if number >= TRIES_IN_CALLERS:
                        raise conflict(self.alias, exc) from exc
                elif number and not patience.pause():
                    raise conflict(self.alias, exc) from exc
        raise AssertionError("unreachable")

    def _save_at_once(self, checkpoint: NewCheckpoint) -> int | None:
        """Save a state in as few statements as the database can; None if that cannot be done."""
        rows = self._rows
        if len(checkpoint.text) <= SMALL_STATE and rows.can_insert_next():
            return self._remember(*self._insert_small(checkpoint), checkpoint)
        if rows.can_insert_following(checkpoint):
            mark = self._insert_following(checkpoint)
            if mark is not None:
                return self._remember(self._chain.next_step or 0, mark, checkpoint)
        return None

    def _insert_small(self, checkpoint: NewCheckpoint) -> tuple[int, Mark]:
        """Insert a small state in as few statements as the database can."""
        rows = self._rows
        if dialect_of(rows.connection).updates_within:
            return rows.insert_and_note(self.run_id, checkpoint)
        if not checkpoint.is_noted:
            return rows.insert_next(self.run_id, checkpoint)
        with rows.transaction():
            rows.note_checkpoint(self.run_id, checkpoint)
            return rows.insert_next(self.run_id, checkpoint)

    def _insert_following(self, checkpoint: NewCheckpoint) -> Mark | None:
        """Insert a state in one statement, if the run is as it is remembered; None if it is not."""
        step = self._chain.next_step
        if step is None or self._chain.lacks_base(step):
            return None
        stored, base = self._chain.encode(checkpoint.text, step)
        of_base = None if base is None else self._chain.mark(base)
        return self._rows.insert_following(self.run_id, step, stored, of_base, checkpoint)

    def _insert(self, checkpoint: NewCheckpoint) -> tuple[int, Mark]:
        """Insert a state as the next one, in the transaction that is open."""
        rows = self._rows
        small = len(checkpoint.text) <= SMALL_STATE
        locks_rows = rows.connection.features.has_select_for_update
        dialect = dialect_of(rows.connection)
        if checkpoint.is_noted:
            rows.note_checkpoint(self.run_id, checkpoint)  # which locks the run
            if small and dialect.tells_last_id and self._chain.next_step is not None:
                mark = rows.insert_expected(self.run_id, self._chain.next_step, checkpoint)
                if mark is not None:
                    return self._chain.next_step, mark
        elif locks_rows and not (small and dialect.locks_see_newest):
            # A statement that waits for a lock reads what was there before it waited: a step can
            # be in use by now, its base deleted. So the lock has a statement of its own.
            rows.lock_run(self.run_id)
        else:
            rows.begin_writing()
        if not locks_rows and (mark := self._insert_following(checkpoint)) is not None:
            return self._chain.next_step or 0, mark
        # A small state has no base; where this locks rows, it then locks none that others insert.
        base = 0 if small else base_step(self._chain.next_step or 0)
        step, base_mark = rows.next_step(self.run_id, base)
        stored = self._encoded(checkpoint.text, step, base_mark)
        return step, rows.insert(self.run_id, step, stored, checkpoint)

    def append(self, checkpoints: Iterable[Checkpoint]) -> int:
        """See `AbstractExecutionStateRepository.append`."""
        if not is_possible_id(self.run_id):
            raise RunNotFoundError(self.run_id)
        # A transaction that is tried again needs all of them again.
        return self._append_all([valid_checkpoint(checkpoint) for checkpoint in checkpoints])

    def append_encoded(self, checkpoints: Iterable[EncodedCheckpoint]) -> int:
        """See `AbstractExecutionStateRepository.append_encoded`."""
        if not is_possible_id(self.run_id):
            raise RunNotFoundError(self.run_id)
        return self._append_all([valid_encoded(checkpoint) for checkpoint in checkpoints])

    @operation
    def _append_all(self, checkpoints: list[ValidCheckpoint]) -> int:
        rows = self._rows
        ours: set[int] = set()
        try:
            with rows.read_committed():
                rows.change_run(self.run_id)
                for given in checkpoints:
                    checkpoint = NewCheckpoint(
                        given.text, given.node_id, given.created_at, given.usage, given.attempt
                    )
                    base = base_step(given.step)
                    if base not in ours or self._chain.lacks_base(given.step):
                        next_step, base_mark = rows.next_step(self.run_id, base)
                        # A run without states can begin anywhere.
                        if next_step not in (0, given.step):
                            raise StepConflictError(self.run_id, given.step, next_step)
                        stored = self._encoded(given.text, given.step, base_mark, given)
                    else:
                        stored = self._stored(given.text, given.step, given)
                    mark = rows.insert(self.run_id, given.step, stored, checkpoint)
                    self._remember(given.step, mark, checkpoint)
                    # The run is locked, so these stay until the transaction ends.
                    ours.add(given.step)
                    if self._chain.mark(base) is not None:
                        ours.add(base)
        except BaseException:
            self._chain.forget()
            raise
        self._forget_in_callers()
        return len(checkpoints)

    def _remember(self, step: int, mark: Mark, checkpoint: NewCheckpoint) -> int:
        self._chain.remember(step, checkpoint.text, mark)
        self.last_saved = step, checkpoint.text
        return step

    def _forget_in_callers(self) -> None:
        """Remember nothing that the caller can roll back, where a mark could come again.

        Another state can have the row id then, and the time if the clock stands still.
        """
        connection = self._rows.connection
        if dialect_of(connection).gives_ids_again and in_callers_transaction(connection):
            self._chain.forget()

    def _encoded(
        self, text: bytes, step: int, base_mark: Mark, given: ValidCheckpoint | None = None
    ) -> bytes:
        """Return a state as it is to be stored at a step."""
        if step and len(text) > SMALL_STATE:
            self._load_base(step, base_mark)
        return self._stored(text, step, given)

    def _stored(self, text: bytes, step: int, given: ValidCheckpoint | None) -> bytes:
        if given is not None and len(text) > SMALL_STATE and given.can_stay(self._chain):
            return given.stored or text
        stored = self._chain.encode(text, step)[0]
        if given is not None and not is_delta(stored):
            refuse_no_state(text, step)
        return stored

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

"""The checkpoints in a Django database, whole or as a delta."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Unpack

from django.db import DEFAULT_DB_ALIAS

from workflow_storage.backends.orm.compiled_queries import delete_rows
from workflow_storage.backends.orm.errors import operation, reading
from workflow_storage.backends.orm.repository import DjangoRepository
from workflow_storage.backends.orm.state_rows import (
    CHECKPOINT,
    STATE,
    STEPS_PAGE,
    StateRows,
    StoredState,
    by_step,
)
from workflow_storage.backends.orm.writer import DjangoStateWriter
from workflow_storage.base import (
    AbstractExecutionStateRepository,
    Checkpoint,
    NodeUsage,
    Step,
    Totals,
)
from workflow_storage.deltas import (
    EncodedCheckpoint,
    History,
    RecentChains,
    base_step,
    chain_steps,
    rebuilt_state,
    rebuilt_text,
    whole_state,
)
from workflow_storage.exceptions import (
    DamagedStateError,
    SnapshotError,
    StepConflictError,
)
from workflow_storage.validation import MAX_COUNT, is_possible_id, valid_count, valid_step

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from django.db.models import QuerySet

    from workflow_storage.backends.orm.async_threads import AsyncThreads
    from workflow_storage.backends.orm.state_rows import Mark
    from workflow_storage.models import ExecutionState

logger = logging.getLogger(__name__)

StateAndRow = tuple[dict[str, Any], int, "Sequence[Any]"]
"""A state, its step, and the columns of `CHECKPOINT` that come after those of `STATE`."""


class DjangoExecutionStateRepository(DjangoRepository, AbstractExecutionStateRepository):
    """The checkpoints in a Django database.

    Args:
        alias: the database's name in DATABASES.
        own_connection: see `DjangoRepository`.
        threads: see `DjangoRepository`.
    """

    def __init__(
        self,
        alias: str = DEFAULT_DB_ALIAS,
        *,
        own_connection: bool = False,
        threads: AsyncThreads | None = None,
    ) -> None:
        super().__init__(alias, own_connection=own_connection, threads=threads)
        self._rows = StateRows(alias)
        self._recent: RecentChains[Mark] = RecentChains()

    def save_state(
        self,
        run_id: str,
        state_data: Any,
        node_id: str,
        *,
        attempt: int | None = None,
        totals: Totals | None = None,
        **usage: Unpack[NodeUsage],
    ) -> int:
        """See `AbstractExecutionStateRepository.save_state`."""
        writer = DjangoStateWriter(
            self,
            self._rows,
            run_id,
            attempt,
            own_connection=self.own_connection,
            recent=self._recent,
        )
        return writer.save_state(state_data, node_id, totals=totals, **usage)

    def append(self, run_id: str, checkpoints: Iterable[Checkpoint]) -> int:
        """See `AbstractExecutionStateRepository.append`."""
        return self.writer(run_id).append(checkpoints)

    def append_encoded(self, run_id: str, checkpoints: Iterable[EncodedCheckpoint]) -> int:
        """See `AbstractExecutionStateRepository.append_encoded`."""
        return self.writer(run_id).append_encoded(checkpoints)

    @operation
    def copy_states(self, run_id: str, target_run_id: str, *, through: int) -> int:
        """See `AbstractExecutionStateRepository.copy_states`."""
        valid_step(through)
        rows = self._rows
        if not is_possible_id(run_id):
            return 0
        with rows.read_committed():
            rows.change_run(target_run_id)
            newest = rows.newest_step(target_run_id)
            if newest is not None:
                raise StepConflictError(target_run_id, 0, newest + 1)
            return rows.copy(run_id, target_run_id, min(through, MAX_COUNT))

    def writer(self, run_id: str, *, attempt: int | None = None) -> DjangoStateWriter:
        """See `AbstractExecutionStateRepository.writer`."""
        return DjangoStateWriter(
            self, self._rows, run_id, attempt, own_connection=self.own_connection
        )

    @reading
    def get_latest_state(self, run_id: str) -> dict[str, Any] | None:
        """See `AbstractExecutionStateRepository.get_latest_state`."""
        rows = self._rows.newest(run_id, STATE)
        if rows and rows[0][1] is not None:  # the common case, without what a delta needs
            return whole_state(run_id, *rows[0])
        found = self._state_in(run_id, rows, lambda: self._rows.newest(run_id, STATE))
        return None if found is None else found[0]

    @reading
    def get_latest_checkpoint(self, run_id: str) -> Checkpoint | None:
        """See `AbstractExecutionStateRepository.get_latest_checkpoint`."""
        rows = self._rows.newest(run_id, CHECKPOINT)
        return _checkpoint(
            self._state_in(run_id, rows, lambda: self._rows.newest(run_id, CHECKPOINT))
        )

    @reading
    def get_state(self, run_id: str, step: int) -> Checkpoint | None:
        """See `AbstractExecutionStateRepository.get_state`."""
        states = self._rows.states_of(run_id).filter(step=valid_step(step)).values_list(*CHECKPOINT)
        return _checkpoint(self._state_in(run_id, list(states), lambda: list(states.all())))

    def _state_in(
        self, run_id: str, rows: Sequence[Any], again: Callable[[], Sequence[Any]]
    ) -> StateAndRow | None:
        """Return the state in the one row that a query finds, a row that begins with `STATE`."""
        while rows:
            step, text, *rest = rows[0]
            if text is not None:
                return whole_state(run_id, step, text), step, rest
            chain = self._rows.chain(run_id, step)
            # The chain is read in one statement; what it holds belongs together. If the state
            # has been deleted since the first one, the query finds another, or none.
            if chain and chain[0].step == step:
                return rebuilt_state(run_id, step, by_step(chain)), step, chain[0].rest
            rows = again()
        return None

    def iter_state_history(self, run_id: str, *, after: int = -1) -> Iterator[Checkpoint]:
        """See `AbstractExecutionStateRepository.iter_state_history`."""
        history = History(run_id)
        last_step = min(max(valid_step(after), -1), MAX_COUNT)  # what the column holds
        while page := self._history_page(run_id, last_step):
            for row in page:
                text = self._rebuilt(history, row)
                if text is not None:
                    state = history.state(row.step, text, rebuilt=row.is_delta)
                    yield _as_checkpoint(state, row.step, row.rest)
            last_step = page[-1].step

    def iter_encoded(self, run_id: str, *, after: int = -1) -> Iterator[EncodedCheckpoint]:
        """See `AbstractExecutionStateRepository.iter_encoded`."""
        history = History(run_id)
        last_step = min(max(valid_step(after), -1), MAX_COUNT)
        while page := self._history_page(run_id, last_step):
            for row in page:
                text = self._rebuilt(history, row)
                if text is not None:
                    yield history.encoded(row.step, row.stored, text, row.rest)
            last_step = page[-1].step

    def iter_steps(self, run_id: str, *, after: int = -1) -> Iterator[Step]:
        """See `AbstractExecutionStateRepository.iter_steps`."""
        last_step = min(max(valid_step(after), -1), MAX_COUNT)
        while page := self._steps_page(run_id, last_step):
            last_step = page[-1]["step"]
            yield from page

    @reading
    def _steps_page(self, run_id: str, after: int) -> list[Step]:
        states = self._rows.states_of(run_id).filter(step__gt=after).order_by("step")
        rows: Any = states.values(*Step.__annotations__)[:STEPS_PAGE]
        return list(rows)

    @reading
    def _history_page(self, run_id: str, after: int) -> list[StoredState]:
        return self._rows.page(run_id, after)

    @reading
    def _rebuilt(self, history: History, row: StoredState) -> bytes | None:
        """Return the JSON text of a state; None if it has been deleted since it was read."""
        text = history.text(row.step, row.stored)
        if text is None:
            chain = self._rows.chain(history.run_id, row.step)
            if any(link.id == row.id for link in chain):
                text = history.text_by_chain(row.step, by_step(chain))
        return text

    @operation
    def delete_states(self, run_id: str, *, keep_last: int = 0) -> int:
        """See `AbstractExecutionStateRepository.delete_states`."""
        valid_count("keep_last", keep_last)
        rows = self._rows
        if rows.has_snapshot:
            raise SnapshotError
        with rows.read_committed():
            rows.change_run(run_id)
            states = rows.states_of(run_id)
            newest = rows.newest_step(run_id)
            if newest is None:
                return 0
            first = newest + 1 - keep_last
            if keep_last:
                self._make_whole(states, first, newest)
            return delete_rows(states.filter(step__lt=first))

    def _make_whole(self, states: QuerySet[ExecutionState], first: int, newest: int) -> None:
        """Store those states whole whose bases come before the first that is kept."""
        for step in range(first, newest + 1):
            # Few of them: the lowest bit that is set grows from one to the next.
            if base_step(step) < first:
                delta = states.filter(step=step, state_delta__isnull=False)
                for state in self._rows.as_of_now(delta):
                    try:
                        state.stored = self._text_of_now(state)
                    except (DamagedStateError, UnicodeDecodeError):
                        logger.exception("A damaged state is left as it is")
                        continue
                    state.save(using=self.alias, update_fields=["state_json", "state_delta"])

    def _text_of_now(self, state: ExecutionState) -> bytes:
        chain = self._rows.states_of(state.run_id).filter(step__in=chain_steps(state.step))
        stored = {link.step: link.stored for link in self._rows.as_of_now(chain)}
        return rebuilt_text(state.run_id, state.step, stored)


def _checkpoint(found: StateAndRow | None) -> Checkpoint | None:
    return None if found is None else _as_checkpoint(*found)


def _as_checkpoint(state: dict[str, Any], step: int, rest: Sequence[Any]) -> Checkpoint:
    node_id, created_at, attempt, duration_seconds, tokens, cost_usd = rest
    return Checkpoint(
        step=step,
        node_id=node_id,
        state_data=state,
        created_at=created_at,
        attempt=attempt,
        duration_seconds=duration_seconds,
        tokens=tokens,
        cost_usd=cost_usd,
    )

"""The states in Redis: whole or as deltas, as every store holds them; `writer` appends them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Unpack

from workflow_storage.backends.redis import scripts
from workflow_storage.backends.redis.repository import (
    RedisRepository,
    awaitable,
    blocking,
    call,
    checkpoint_of,
)
from workflow_storage.backends.redis.writer import RedisStateWriter
from workflow_storage.base import (
    AbstractExecutionStateRepository,
    Checkpoint,
    NodeUsage,
    Step,
    Totals,
    step_of,
)
from workflow_storage.deltas import (
    EncodedCheckpoint,
    History,
    base_step,
    is_delta,
    rebuilt_state,
    rebuilt_text,
)
from workflow_storage.exceptions import (
    DamagedStateError,
    RunNotFoundError,
    StepConflictError,
    StorageUnavailableError,
)
from workflow_storage.validation import is_possible_id, plain_text, valid_count, valid_step

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Iterator, Sequence

    from workflow_storage.backends.redis.connection import Operation, RedisStore

logger = logging.getLogger(__name__)

STATES_PAGE = 16
"""Checkpoints that `iter_state_history` holds in memory at a time."""

STEPS_PAGE = 500
"""Steps that `iter_steps` reads at a time."""

MAX_TRIMS = 100
"""Times that deleting states is tried, while other processes delete some, too."""

_STEPS = range(2**31)
_MISSING = "the server has evicted it, or somebody has deleted it"


class RedisExecutionStateRepository(RedisRepository, AbstractExecutionStateRepository):
    """The checkpoints in Redis.

    Args:
        store: the server or cluster.
    """

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
        writer = self.writer(run_id, attempt=attempt)
        return writer.save_state(state_data, node_id, totals=totals, **usage)

    async def asave_state(
        self,
        run_id: str,
        state_data: Any,
        node_id: str,
        *,
        attempt: int | None = None,
        totals: Totals | None = None,
        **usage: Unpack[NodeUsage],
    ) -> int:
        """Async twin of `save_state`."""
        writer = self.writer(run_id, attempt=attempt)
        return await writer.asave_state(state_data, node_id, totals=totals, **usage)

    def append(self, run_id: str, checkpoints: Iterable[Checkpoint]) -> int:
        """See `AbstractExecutionStateRepository.append`."""
        return self.writer(run_id).append(checkpoints)

    async def aappend(self, run_id: str, checkpoints: Iterable[Checkpoint]) -> int:
        """Async twin of `append`."""
        return await self.writer(run_id).aappend(checkpoints)

    def append_encoded(self, run_id: str, checkpoints: Iterable[EncodedCheckpoint]) -> int:
        """See `AbstractExecutionStateRepository.append_encoded`."""
        return self.writer(run_id).append_encoded(checkpoints)

    async def aappend_encoded(self, run_id: str, checkpoints: Iterable[EncodedCheckpoint]) -> int:
        """Async twin of `append_encoded`."""
        return await self.writer(run_id).aappend_encoded(checkpoints)

    def writer(self, run_id: str, *, attempt: int | None = None) -> RedisStateWriter:
        """See `AbstractExecutionStateRepository.writer`."""
        return RedisStateWriter(self, self.store, run_id, attempt)

    def _get_latest_checkpoint(self, run_id: str) -> Operation[Checkpoint | None]:
        return (yield from self._checkpoint(run_id, None))

    get_latest_checkpoint = blocking(_get_latest_checkpoint)
    aget_latest_checkpoint = awaitable(_get_latest_checkpoint)

    def _get_latest_state(self, run_id: str) -> Operation[dict[str, Any] | None]:
        checkpoint = yield from self._checkpoint(run_id, None)
        return None if checkpoint is None else checkpoint["state_data"]

    get_latest_state = blocking(_get_latest_state)
    aget_latest_state = awaitable(_get_latest_state)

    def _get_state(self, run_id: str, step: int) -> Operation[Checkpoint | None]:
        return (yield from self._checkpoint(run_id, valid_step(step)))

    get_state = blocking(_get_state)
    aget_state = awaitable(_get_state)

    def _checkpoint(self, run_id: str, step: int | None) -> Operation[Checkpoint | None]:
        """Return the checkpoint with a step; the newest for None."""
        if not is_possible_id(run_id) or (step is not None and step not in _STEPS):
            return None
        wanted = "" if step is None else int(step)
        reply = yield call(self.store, scripts.CHAIN, run_id, wanted)
        next_step, first = map(int, reply[:2])
        chain = reply[2:]
        if not chain:
            missing = next_step - 1 if step is None else step
            if first <= missing < next_step:
                raise DamagedStateError(run_id, missing, _MISSING)
            return None
        found, mark = chain[:2]
        return checkpoint_of(found, mark, rebuilt_state(run_id, found, _stored_by_step(chain)))

    def iter_state_history(self, run_id: str, *, after: int = -1) -> Iterator[Checkpoint]:
        """See `AbstractExecutionStateRepository.iter_state_history`."""
        reading = _Reading(self.store, run_id, after)
        while page := self.store.execute(reading.page()):
            for stored in page:
                checkpoint = self.store.execute(reading.checkpoint(*stored))
                if checkpoint is not None:
                    yield checkpoint

    async def aiter_state_history(
        self, run_id: str, *, after: int = -1
    ) -> AsyncIterator[Checkpoint]:
        """Async twin of `iter_state_history`."""
        reading = _Reading(self.store, run_id, after)
        while page := await self.store.aexecute(reading.page()):
            for stored in page:
                checkpoint = await self.store.aexecute(reading.checkpoint(*stored))
                if checkpoint is not None:
                    yield checkpoint

    def iter_encoded(self, run_id: str, *, after: int = -1) -> Iterator[EncodedCheckpoint]:
        """See `AbstractExecutionStateRepository.iter_encoded`."""
        reading = _Reading(self.store, run_id, after)
        while page := self.store.execute(reading.page()):
            for stored in page:
                encoded = self.store.execute(reading.encoded(*stored))
                if encoded is not None:
                    yield encoded

    async def aiter_encoded(
        self, run_id: str, *, after: int = -1
    ) -> AsyncIterator[EncodedCheckpoint]:
        """Async twin of `iter_encoded`."""
        reading = _Reading(self.store, run_id, after)
        while page := await self.store.aexecute(reading.page()):
            for stored in page:
                encoded = await self.store.aexecute(reading.encoded(*stored))
                if encoded is not None:
                    yield encoded

    def _copy_states(self, run_id: str, target_run_id: str, *, through: int) -> Operation[int]:
        valid_step(through)
        if not is_possible_id(target_run_id):
            raise RunNotFoundError(target_run_id)
        reading = _Reading(self.store, run_id, -1)
        count = 0
        while page := [stored for stored in (yield from reading.page()) if stored[0] <= through]:
            # The first one alone, for the next ones would fit a run that has as many states.
            for part in (page,) if count else (page[:1], page[1:]):
                replies = yield [
                    call(
                        self.store,
                        scripts.APPEND_AT,
                        target_run_id,
                        *("" if count else step, step, "", "", mark or b"", state or b""),
                    )
                    for step, mark, state in part
                ]
                for (step, *_), reply in zip(part, replies, strict=True):
                    if reply is None:
                        raise RunNotFoundError(target_run_id)
                    if reply != step:
                        raise StepConflictError(target_run_id, step, -1 - reply)
                count += len(part)
        return count

    copy_states = blocking(_copy_states)
    acopy_states = awaitable(_copy_states)

    def iter_steps(self, run_id: str, *, after: int = -1) -> Iterator[Step]:
        """See `AbstractExecutionStateRepository.iter_steps`."""
        last = max(valid_step(after), -1)
        while (page := self.store.execute(self._steps_page(run_id, last))) is not None:
            last, steps = page
            yield from steps

    async def aiter_steps(self, run_id: str, *, after: int = -1) -> AsyncIterator[Step]:
        """Async twin of `iter_steps`."""
        last = max(valid_step(after), -1)
        while (page := await self.store.aexecute(self._steps_page(run_id, last))) is not None:
            last, steps = page
            for step in steps:
                yield step

    def _steps_page(self, run_id: str, after: int) -> Operation[tuple[int, list[Step]] | None]:
        """Return the last step that was looked for, and those that are there; None after all."""
        if not is_possible_id(run_id):
            return None
        run_id = plain_text(run_id)
        prefix = self.store.key_prefix(run_id)
        (bounds,) = yield [("HMGET", f"{prefix}:run:{run_id}", "first_step", "next_step")]
        first, end = (int(bound or 0) for bound in bounds)
        numbers = range(max(first, after + 1), end)[:STEPS_PAGE]
        if not numbers:
            return None
        marks_of = [f"m{number}" for number in numbers]
        (marks,) = yield [("HMGET", f"{prefix}:states:{run_id}", *marks_of)]
        found = zip(numbers, marks, strict=True)
        return numbers[-1], [step_of(checkpoint_of(n, mark, {})) for n, mark in found if mark]

    async def aget_state_history(self, run_id: str) -> list[Checkpoint]:
        """Async twin of `get_state_history`."""
        return [checkpoint async for checkpoint in self.aiter_state_history(run_id)]

    def _delete_states(self, run_id: str, *, keep_last: int = 0) -> Operation[int]:
        valid_count("keep_last", keep_last)
        if not is_possible_id(run_id):
            raise RunNotFoundError(run_id)
        for _ in range(MAX_TRIMS):
            args: list[Any] = [""]
            if keep_last:
                bounds = yield call(self.store, scripts.CHAIN, run_id, _STEPS.stop)
                next_step, first_kept = map(int, bounds)
                first = max(next_step - keep_last, first_kept)
                args = [first]
                for step in range(first, next_step):
                    if base_step(step) < first:
                        args += yield from self._made_whole(run_id, step)
            deleted = yield call(self.store, scripts.TRIM, run_id, *args)
            if deleted is None:
                raise RunNotFoundError(run_id)
            if deleted >= 0:
                return int(deleted)
        raise StorageUnavailableError(
            f"Other processes keep deleting states of workflow run {run_id}. Try again."
        )

    delete_states = blocking(_delete_states)
    adelete_states = awaitable(_delete_states)

    def _made_whole(self, run_id: str, step: int) -> Operation[list[Any]]:
        """Return a step, its mark and its whole state, if it is stored as a delta."""
        _, _, *chain = yield call(self.store, scripts.CHAIN, run_id, step)
        if not chain or not is_delta(chain[2]):
            return []
        try:
            return [step, chain[1], rebuilt_text(run_id, step, _stored_by_step(chain))]
        except DamagedStateError:
            logger.exception("A damaged state is left as it is")
            return [step, chain[1], ""]


class _Reading:
    """Where a reading of all states of a run stands, and the states to base the next ones on."""

    def __init__(self, store: RedisStore, run_id: str, after: int) -> None:
        self._store = store
        self._run_id = run_id
        self._history = History(run_id)
        self._last_step = valid_step(after)

    def page(self) -> Operation[list[tuple[int, bytes | None, bytes | None]]]:
        """Return step, mark and stored state of the next ones."""
        if not is_possible_id(self._run_id):
            return []
        last_step = min(max(self._last_step, -1), _STEPS.stop)
        flat = yield call(self._store, scripts.PAGE, self._run_id, last_step, STATES_PAGE)
        page = list(zip(flat[::3], flat[1::3], flat[2::3], strict=True))
        if page:
            self._last_step = page[-1][0]
        return page

    def checkpoint(
        self, step: int, mark: bytes | None, stored: bytes | None
    ) -> Operation[Checkpoint | None]:
        """Return one of them decoded; None if it has been deleted since."""
        text = yield from self._rebuilt(step, mark, stored)
        if text is None or mark is None:
            return None
        state = self._history.state(step, text, rebuilt=text is not stored)
        return checkpoint_of(step, mark, state)

    def encoded(
        self, step: int, mark: bytes | None, stored: bytes | None
    ) -> Operation[EncodedCheckpoint | None]:
        """Return one of them as it is stored; None if it has been deleted since."""
        text = yield from self._rebuilt(step, mark, stored)
        if text is None or mark is None or stored is None:
            return None
        _, *columns = step_of(checkpoint_of(step, mark, {})).values()
        return self._history.encoded(step, stored, text, columns)

    def _rebuilt(
        self, step: int, mark: bytes | None, stored: bytes | None
    ) -> Operation[bytes | None]:
        if mark is None or stored is None:
            raise DamagedStateError(self._run_id, step, _MISSING)
        text = self._history.text(step, stored)
        if text is None:
            _, _, *chain = yield call(self._store, scripts.CHAIN, self._run_id, step)
            if not chain or chain[1] != mark:
                return None
            text = self._history.text_by_chain(step, _stored_by_step(chain))
        return text


def _stored_by_step(chain: Sequence[Any]) -> dict[int, bytes]:
    """Return what is stored for each step of a flat chain of step, mark and stored state."""
    return dict(zip(chain[::3], chain[2::3], strict=True))

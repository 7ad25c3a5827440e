"""The states in Redis: whole or as deltas, as the ORM backend stores them."""

from __future__ import annotations

import itertools
import logging
import random
from typing import TYPE_CHECKING, Any

from django.utils import timezone

from workflow_storage.backends.redis import scripts
from workflow_storage.backends.redis.repository import RedisRepository, parsed_mark, time_text
from workflow_storage.base import AbstractExecutionStateRepository, Checkpoint, StateWriter
from workflow_storage.deltas import (
    SMALL_STATE,
    Chain,
    History,
    Link,
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
from workflow_storage.serialization import state_text
from workflow_storage.validation import (
    MAX_NODE_ID,
    is_possible_id,
    valid_checkpoint,
    valid_count,
    valid_name,
    valid_step,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Generator, Iterable, Iterator, Sequence
    from datetime import datetime

logger = logging.getLogger(__name__)

STATES_PAGE = 16
"""Checkpoints that `iter_state_history` holds in memory at a time."""

MAX_TRIMS = 100
"""Times that deleting states is tried, while other processes delete some, too."""

MAX_BASED = 10
"""Times that a state is tried as a delta while other writers append; then it is stored whole."""

_STEPS = range(2**31)
_MISSING = "the server has evicted it, or somebody has deleted it"


class RedisExecutionStateRepository(RedisRepository, AbstractExecutionStateRepository):
    """The checkpoints in Redis.

    Args:
        store: the server or cluster.
    """

    def save_state(self, run_id: str, state_data: dict[str, Any], node_id: str) -> int:
        """See `AbstractExecutionStateRepository.save_state`."""
        return self.writer(run_id).save_state(state_data, node_id)

    async def asave_state(self, run_id: str, state_data: dict[str, Any], node_id: str) -> int:
        """Async twin of `save_state`."""
        return await self.writer(run_id).asave_state(state_data, node_id)

    def append(self, run_id: str, checkpoints: Iterable[Checkpoint]) -> int:
        """See `AbstractExecutionStateRepository.append`."""
        return self.writer(run_id).append(checkpoints)

    async def aappend(self, run_id: str, checkpoints: Iterable[Checkpoint]) -> int:
        """Async twin of `append`."""
        return await self.writer(run_id).aappend(checkpoints)

    def writer(self, run_id: str) -> RedisStateWriter:
        """See `AbstractExecutionStateRepository.writer`."""
        return RedisStateWriter(self, run_id)

    def get_latest_checkpoint(self, run_id: str) -> Checkpoint | None:
        """See `AbstractExecutionStateRepository.get_latest_checkpoint`."""
        return self.store.run(self._checkpoint(run_id, None))

    async def aget_latest_checkpoint(self, run_id: str) -> Checkpoint | None:
        """Async twin of `get_latest_checkpoint`."""
        return await self.store.arun(self._checkpoint(run_id, None))

    async def aget_latest_state(self, run_id: str) -> dict[str, Any] | None:
        """Async twin of `get_latest_state`."""
        checkpoint = await self.aget_latest_checkpoint(run_id)
        return None if checkpoint is None else checkpoint["state_data"]

    def get_state(self, run_id: str, step: int) -> Checkpoint | None:
        """See `AbstractExecutionStateRepository.get_state`."""
        return self.store.run(self._checkpoint(run_id, valid_step(step)))

    async def aget_state(self, run_id: str, step: int) -> Checkpoint | None:
        """Async twin of `get_state`."""
        return await self.store.arun(self._checkpoint(run_id, valid_step(step)))

    def _checkpoint(self, run_id: str, step: int | None) -> Generator[Any, Any, Checkpoint | None]:
        """Give the checkpoint with a step; the newest for None."""
        if not is_possible_id(run_id) or (step is not None and step not in _STEPS):
            return None
        reply = yield self._call(scripts.CHAIN, run_id, "" if step is None else int(step))
        next_step, first = map(int, reply[:2])
        chain = reply[2:]
        if not chain:
            wanted = next_step - 1 if step is None else step
            if first <= wanted < next_step:
                raise DamagedStateError(run_id, wanted, _MISSING)
            return None
        found, mark = chain[:2]
        by_step = dict(zip(chain[::3], chain[2::3], strict=True))
        return _checkpoint(found, mark, rebuilt_state(run_id, found, by_step))

    def iter_state_history(self, run_id: str, *, after: int = -1) -> Iterator[Checkpoint]:
        """See `AbstractExecutionStateRepository.iter_state_history`."""
        history = _History(self, run_id, after)
        while page := self.store.run(history.page()):
            for stored in page:
                checkpoint = self.store.run(history.checkpoint(*stored))
                if checkpoint is not None:
                    yield checkpoint

    async def aiter_state_history(
        self, run_id: str, *, after: int = -1
    ) -> AsyncIterator[Checkpoint]:
        """Async twin of `iter_state_history`."""
        history = _History(self, run_id, after)
        while page := await self.store.arun(history.page()):
            for stored in page:
                checkpoint = await self.store.arun(history.checkpoint(*stored))
                if checkpoint is not None:
                    yield checkpoint

    async def aget_state_history(self, run_id: str) -> list[Checkpoint]:
        """Async twin of `get_state_history`."""
        return [checkpoint async for checkpoint in self.aiter_state_history(run_id)]

    def delete_states(self, run_id: str, *, keep_last: int = 0) -> int:
        """See `AbstractExecutionStateRepository.delete_states`."""
        return self.store.run(self._delete_states(run_id, keep_last))

    async def adelete_states(self, run_id: str, *, keep_last: int = 0) -> int:
        """Async twin of `delete_states`."""
        return await self.store.arun(self._delete_states(run_id, keep_last))

    def _delete_states(self, run_id: str, keep_last: int) -> Generator[Any, Any, int]:
        valid_count("keep_last", keep_last)
        if not is_possible_id(run_id):
            raise RunNotFoundError(run_id)
        for _ in range(MAX_TRIMS):
            args: list[Any] = [""]
            if keep_last:
                bounds = yield self._call(scripts.CHAIN, run_id, _STEPS.stop)
                next_step, first_kept = map(int, bounds)
                first = max(next_step - keep_last, first_kept)
                args = [first]
                for step in range(first, next_step):
                    if base_step(step) < first:
                        args += yield from self._made_whole(run_id, step)
            deleted = yield self._call(scripts.TRIM, run_id, *args)
            if deleted is None:
                raise RunNotFoundError(run_id)
            if deleted >= 0:
                return int(deleted)
        raise StorageUnavailableError(
            f"Other processes keep deleting states of workflow run {run_id}. Try again."
        )

    def _made_whole(self, run_id: str, step: int) -> Generator[Any, Any, list[Any]]:
        """Give a step, its mark and its whole state, if it is stored as a delta."""
        _, _, *chain = yield self._call(scripts.CHAIN, run_id, step)
        if not chain or not is_delta(chain[2]):
            return []
        try:
            return [step, chain[1], _rebuilt(run_id, chain, step)]
        except DamagedStateError:
            logger.exception("A damaged state is left as it is")
            return [step, chain[1], ""]


class _History:
    """Where a reading of all states of a run stands, and the states to base the next ones on."""

    def __init__(self, states: RedisExecutionStateRepository, run_id: str, after: int) -> None:
        self.run_id = run_id
        self._states = states
        self._rebuilder = History(run_id)
        self._last_step = valid_step(after)

    def page(self) -> Generator[Any, Any, list[tuple[int, bytes | None, bytes | None]]]:
        """Give step, mark and stored state of the next ones."""
        if not is_possible_id(self.run_id):
            return []
        last_step = min(max(self._last_step, -1), _STEPS.stop)
        flat = yield self._states._call(scripts.PAGE, self.run_id, last_step, STATES_PAGE)
        page = list(zip(flat[::3], flat[1::3], flat[2::3], strict=True))
        if page:
            self._last_step = page[-1][0]
        return page

    def checkpoint(
        self, step: int, mark: bytes | None, stored: bytes | None
    ) -> Generator[Any, Any, Checkpoint | None]:
        """Give one of them rebuilt; None if it has been deleted since."""
        if mark is None or stored is None:
            raise DamagedStateError(self.run_id, step, _MISSING)
        text = self._rebuilder.text(step, stored)
        if text is None:
            _, _, *chain = yield self._states._call(scripts.CHAIN, self.run_id, step)
            if not chain or chain[1] != mark:
                return None
            text = _rebuilt(self.run_id, chain, step)
        state = self._rebuilder.state(step, text, rebuilt=text is not stored)
        return _checkpoint(step, mark, state)


class RedisStateWriter(StateWriter):
    """Appends checkpoints to one run, and remembers the states that the next is based on."""

    def __init__(self, states: RedisExecutionStateRepository, run_id: str) -> None:
        super().__init__(states, run_id)
        self._states = states
        self._chain: Chain[bytes] = Chain(run_id)

    def save_state(self, state_data: dict[str, Any], node_id: str) -> int:
        """See `AbstractExecutionStateRepository.save_state`."""
        return self._states.store.run(self._save(state_data, node_id))

    async def asave_state(self, state_data: dict[str, Any], node_id: str) -> int:
        """Async twin of `save_state`."""
        return await self._states.store.arun(self._save(state_data, node_id))

    def append(self, checkpoints: Iterable[Checkpoint]) -> int:
        """See `AbstractExecutionStateRepository.append`."""
        count = 0
        for checkpoint in checkpoints:
            self._states.store.run(self._append(checkpoint))
            count += 1
        if not count:
            self._states.store.run(self._refuse_unknown())
        return count

    async def aappend(self, checkpoints: Iterable[Checkpoint]) -> int:
        """Async twin of `append`."""
        count = 0
        for checkpoint in checkpoints:
            await self._states.store.arun(self._append(checkpoint))
            count += 1
        if not count:
            await self._states.store.arun(self._refuse_unknown())
        return count

    def _refuse_unknown(self) -> Generator[Any, Any, None]:
        if is_possible_id(self.run_id):
            (found,) = yield self._states._read([self.run_id])
            if found[0] is not None:
                return
        raise RunNotFoundError(self.run_id)

    def _save(self, state_data: dict[str, Any], node_id: str) -> Generator[Any, Any, int]:
        text = state_text(state_data)
        node_id = valid_name("node_id", node_id, MAX_NODE_ID)
        if not is_possible_id(self.run_id):
            raise RunNotFoundError(self.run_id)
        for attempt in itertools.count():
            if attempt < MAX_BASED:
                base, stored = yield from self._encoded(text)
            else:
                base, stored = None, text
            now = timezone.now()
            mark = _mark(now, node_id)
            # A whole state is good at any step, so another writer is no reason to try again.
            condition = (
                ("", "", "")
                if base is None
                else (self._chain.next_step, base, self._chain.mark(base))
            )
            step = yield self._states._call(
                scripts.APPEND, self.run_id, *condition, time_text(now), mark, stored
            )
            if step is None:
                self._chain.forget()
                raise RunNotFoundError(self.run_id)
            if step >= 0:
                self._chain.remember(step, text, mark)
                return int(step)
            self._chain.forget()
        raise AssertionError("unreachable")

    def _append(self, checkpoint: Checkpoint) -> Generator[Any, Any, int]:
        step, node_id, created_at, text = valid_checkpoint(checkpoint)
        if not is_possible_id(self.run_id):
            raise RunNotFoundError(self.run_id)
        mark = _mark(created_at, node_id)
        for attempt in itertools.count():
            if self._chain.next_step != step:
                yield from self._reload()
            base, stored = (
                (None, text) if attempt >= MAX_BASED else (yield from self._encoded(text))
            )
            next_step = self._chain.next_step or 0
            if next_step not in (0, step):
                raise StepConflictError(self.run_id, step, next_step)
            # A run without states can begin anywhere.
            first = step if next_step == 0 else ""
            condition = ("", "") if base is None else (base, self._chain.mark(base))
            reply = yield self._states._call(
                scripts.APPEND_AT,
                self.run_id,
                first,
                step,
                *condition,
                time_text(created_at),
                mark,
                stored,
            )
            if reply is None:
                self._chain.forget()
                raise RunNotFoundError(self.run_id)
            if reply >= 0:
                self._chain.remember(step, text, mark)
                return int(step)
            self._chain.forget()
        raise AssertionError("unreachable")

    def _encoded(self, text: bytes) -> Generator[Any, Any, tuple[int | None, bytes]]:
        """Give a state as it is stored, with the step that it is based on if it is a delta."""
        if len(text) <= SMALL_STATE:
            return None, text
        chain = self._chain
        if chain.next_step is None or chain.lacks_base(chain.next_step):
            # Somebody else wrote to the run, or deleted from it, or this is the first time.
            yield from self._reload()
        stored, base = chain.encode(text, chain.next_step or 0)
        return base, stored

    def _reload(self) -> Generator[Any, Any, None]:
        """Remember the state that the next one is based on, and all that it is based on."""
        next_step, _, *flat = yield self._states._call(scripts.CHAIN, self.run_id, "base")
        links = [
            Link(step, stored, mark)
            for step, mark, stored in zip(flat[::3], flat[1::3], flat[2::3], strict=True)
        ]
        self._chain.load(int(next_step), reversed(links))


def _mark(created_at: datetime, node_id: str) -> bytes:
    """Give what is stored beside a state: its time, a number that tells it, its node."""
    return f"{time_text(created_at)} {random.getrandbits(32):08x} {node_id}".encode()


def _checkpoint(step: int, mark: bytes, state: dict[str, Any]) -> Checkpoint:
    node_id, created_at = parsed_mark(mark)
    return Checkpoint(step=step, node_id=node_id, state_data=state, created_at=created_at)


def _rebuilt(run_id: str, chain: Sequence[Any], step: int) -> bytes:
    """Return the JSON text of a state from a chain of step, mark and stored state."""
    return rebuilt_text(run_id, step, dict(zip(chain[::3], chain[2::3], strict=True)))

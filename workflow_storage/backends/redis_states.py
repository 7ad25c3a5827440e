"""The states in Redis: whole or as deltas, as the ORM backend stores them."""

from __future__ import annotations

import itertools
import logging
import random
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from django.utils import timezone

from workflow_storage.backends import redis_scripts as scripts
from workflow_storage.backends.redis_repository import RedisRepository, parsed_mark, time_text
from workflow_storage.base import AbstractExecutionStateRepository, Checkpoint, StateWriter
from workflow_storage.encoding import (
    SMALL_STATE,
    apply_delta,
    base_step,
    decode_state,
    encode_state,
    is_delta,
    remember,
)
from workflow_storage.exceptions import (
    DamagedStateError,
    RunNotFoundError,
    StepConflictError,
    StorageUnavailableError,
)
from workflow_storage.models import loaded_state, whole_state
from workflow_storage.validation import (
    MAX_NODE_ID,
    possible_id,
    valid_checkpoint,
    valid_count,
    valid_name,
    valid_state,
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
        if not possible_id(run_id) or (step is not None and step not in _STEPS):
            return None
        reply = yield self._call(scripts.CHAIN, run_id, "" if step is None else int(step))
        next_step, first = map(int, reply[:2])
        chain = reply[2:]
        if not chain:
            wanted = next_step - 1 if step is None else step
            if first <= wanted < next_step:
                raise DamagedStateError(run_id, wanted, _MISSING)
            return None
        found, mark, stored = chain[:3]
        if not is_delta(stored):
            return _as_checkpoint(run_id, found, mark, stored, whole=True)
        text = _rebuilt(run_id, chain, found)
        return _as_checkpoint(run_id, found, mark, text, whole=False)

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
        if not possible_id(run_id):
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
        self._texts: dict[int, bytes] = {}
        self._last_step = valid_step(after)

    def page(self) -> Generator[Any, Any, list[tuple[int, bytes | None, bytes | None]]]:
        """Give step, mark and stored state of the next ones."""
        if not possible_id(self.run_id):
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
        text: bytes | None = None
        if not is_delta(stored):
            text = stored
        elif base_step(step) in self._texts:
            # If the run was deleted and begun anew meanwhile, it has another base by now.
            with suppress(ValueError):
                text = apply_delta(stored, self._texts[base_step(step)])
        if text is None:
            _, _, *chain = yield self._states._call(scripts.CHAIN, self.run_id, step)
            if not chain or chain[1] != mark:
                return None
            text = _rebuilt(self.run_id, chain, step)
        remember(self._texts, step, text)
        return _as_checkpoint(self.run_id, step, mark, text, whole=text is stored)


class RedisStateWriter(StateWriter):
    """Appends checkpoints to one run, and remembers the states that the next is based on."""

    def __init__(self, states: RedisExecutionStateRepository, run_id: str) -> None:
        super().__init__(states, run_id)
        self._states = states
        self._next: int | None = None
        self._texts: dict[int, bytes] = {}
        self._marks: dict[int, bytes] = {}

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
        if possible_id(self.run_id):
            (found,) = yield self._states._read([self.run_id])
            if found[0] is not None:
                return
        raise RunNotFoundError(self.run_id)

    def _save(self, state_data: dict[str, Any], node_id: str) -> Generator[Any, Any, int]:
        text = valid_state(state_data)
        node_id = valid_name("node_id", node_id, MAX_NODE_ID)
        if not possible_id(self.run_id):
            raise RunNotFoundError(self.run_id)
        for attempt in itertools.count():
            if attempt < MAX_BASED:
                base, stored = yield from self._encoded(text)
            else:
                base, stored = None, text
            now = timezone.now()
            mark = _mark(now, node_id)
            # A whole state is good at any step, so another writer is no reason to try again.
            condition = ("", "", "") if base is None else (self._next, base, self._marks[base])
            step = yield self._states._call(
                scripts.APPEND, self.run_id, *condition, time_text(now), mark, stored
            )
            if step is None:
                self._forget()
                raise RunNotFoundError(self.run_id)
            if step >= 0:
                return self._remember(step, mark, text)
            self._forget()
        raise AssertionError("unreachable")

    def _append(self, checkpoint: Checkpoint) -> Generator[Any, Any, int]:
        step, node_id, created_at, text = valid_checkpoint(checkpoint)
        if not possible_id(self.run_id):
            raise RunNotFoundError(self.run_id)
        mark = _mark(created_at, node_id)
        for attempt in itertools.count():
            if self._next != step:
                yield from self._reload()
            base, stored = (
                (None, text) if attempt >= MAX_BASED else (yield from self._encoded(text))
            )
            if self._next not in (0, step):
                raise StepConflictError(self.run_id, step, self._next or 0)
            # A run without states can begin anywhere.
            first = step if self._next == 0 else ""
            condition = ("", "") if base is None else (base, self._marks[base])
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
                self._forget()
                raise RunNotFoundError(self.run_id)
            if reply >= 0:
                return self._remember(step, mark, text)
            self._forget()
        raise AssertionError("unreachable")

    def _encoded(self, text: bytes) -> Generator[Any, Any, tuple[int | None, bytes]]:
        """Give a state as it is stored, with the step that it is based on if it is a delta."""
        if len(text) <= SMALL_STATE:
            return None, text
        if self._next is None or (self._next and base_step(self._next) not in self._texts):
            # Somebody else wrote to the run, or deleted from it, or this is the first time.
            yield from self._reload()
        if not self._next:
            return None, text
        base = base_step(self._next)
        stored = encode_state(text, self._texts.get(base))
        return (base if is_delta(stored) else None), stored

    def _reload(self) -> Generator[Any, Any, None]:
        """Remember the state that the next one is based on, and all that it is based on."""
        self._forget()
        next_step, _, *chain = yield self._states._call(scripts.CHAIN, self.run_id, "base")
        self._next = int(next_step)
        links = list(zip(chain[::3], chain[1::3], chain[2::3], strict=True))
        for step, mark, stored in reversed(links):
            try:
                text = stored
                if is_delta(stored):
                    text = _rebuilt(self.run_id, chain, step)
            except DamagedStateError:
                # The new state is then stored whole, and the run goes on.
                logger.exception("A state cannot serve as a base")
                continue
            self._texts[step] = text
            self._marks[step] = mark

    def _remember(self, step: int, mark: bytes, text: bytes) -> int:
        remember(self._texts, step, text)
        remember(self._marks, step, mark)
        self._next = step + 1
        return step

    def _forget(self) -> None:
        self._next = None
        self._texts.clear()
        self._marks.clear()


def _mark(created_at: datetime, node_id: str) -> bytes:
    """Give what is stored beside a state: its time, a number that tells it, its node."""
    return f"{time_text(created_at)} {random.getrandbits(32):08x} {node_id}".encode()


def _as_checkpoint(run_id: str, step: int, mark: bytes, text: bytes, *, whole: bool) -> Checkpoint:
    node_id, created_at = parsed_mark(mark)
    load = whole_state if whole else loaded_state
    return Checkpoint(
        step=step, node_id=node_id, state_data=load(run_id, step, text), created_at=created_at
    )


def _rebuilt(run_id: str, chain: Sequence[Any], step: int) -> bytes:
    """Give the JSON text of a state from a chain of step, mark and stored state."""
    try:
        return decode_state(dict(zip(chain[::3], chain[2::3], strict=True)), step)
    except ValueError as exc:
        raise DamagedStateError(run_id, step, str(exc)) from exc

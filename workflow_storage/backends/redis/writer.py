"""Appends states to one run in Redis, and remembers what the next is based on."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, Unpack

from django.utils import timezone

from workflow_storage.backends.redis import scripts
from workflow_storage.backends.redis.records import changed, read_runs, refuse
from workflow_storage.backends.redis.repository import (
    awaitable,
    blocking,
    call,
    new_mark,
)
from workflow_storage.base import Checkpoint, NodeUsage, StateWriter, Totals
from workflow_storage.deltas import (
    SMALL_STATE,
    Chain,
    EncodedCheckpoint,
    Link,
    base_step,
    is_delta,
)
from workflow_storage.exceptions import RunNotFoundError, StepConflictError
from workflow_storage.serialization import state_text
from workflow_storage.validation import (
    MAX_NODE_ID,
    ValidCheckpoint,
    is_possible_id,
    valid_attempt,
    valid_checkpoint,
    valid_encoded,
    valid_name,
    valid_totals,
    valid_usage,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from workflow_storage.backends.redis.connection import Operation, RedisStore
    from workflow_storage.base import AbstractExecutionStateRepository

MAX_BASED = 10
"""Times that a state is tried as a delta while other writers append; then it is stored whole."""


class RedisStateWriter(StateWriter):
    """Appends checkpoints to one run, and remembers the states that the next is based on.

    Attributes:
        store: the server or cluster.
        run_id: which run.
        attempt: the attempt that the run has to be in, and running; None for any.
    """

    def __init__(
        self,
        states: AbstractExecutionStateRepository,
        store: RedisStore,
        run_id: str,
        attempt: int | None = None,
    ) -> None:
        super().__init__(states, run_id, valid_attempt(attempt))
        self.store = store
        self._chain: Chain[bytes] = Chain(run_id)

    def _save_state(
        self,
        state_data: Any,
        node_id: str,
        *,
        totals: Totals | None = None,
        **usage: Unpack[NodeUsage],
    ) -> Operation[int]:
        text = state_text(state_data, self._chain.texts.dump)
        node_id = valid_name("node_id", node_id, MAX_NODE_ID)
        valid, of_run = valid_usage(usage), valid_totals(totals)
        if of_run or self.attempt is not None:
            of_run["current_node"] = node_id
        noted = changed(of_run)
        fence = "" if self.attempt is None else self.attempt
        if not is_possible_id(self.run_id):
            raise RunNotFoundError(self.run_id)
        before = self.last_saved
        for tried in itertools.count():
            if tried < MAX_BASED:
                base, stored = yield from self._encoded(text)
            else:
                base, stored = None, text
            now = timezone.now()
            mark = new_mark(now, node_id, self.attempt, valid)
            # A whole state is good at any step, so another writer is no reason to try again.
            condition = b"" if base is None else self._condition(base)
            reply = yield call(
                self.store, scripts.APPEND, self.run_id, fence, condition, mark, stored, *noted
            )
            if isinstance(reply, int) and reply >= 0:
                self._chain.remember(reply, text, mark)
                last = self.last_saved
                # The replies to tasks that save at once come in any order.
                if last is before or last is None or reply > last[0]:
                    self.last_saved = reply, text
                return reply
            self._chain.forget()
            if not isinstance(reply, int):
                refuse(self.run_id, reply, attempt=self.attempt)
        raise AssertionError("unreachable")

    save_state = blocking(_save_state)
    asave_state = awaitable(_save_state)

    def _append(self, checkpoints: Iterable[Checkpoint]) -> Operation[int]:
        return (yield from self._append_all(map(valid_checkpoint, checkpoints)))

    append = blocking(_append)
    aappend = awaitable(_append)

    def _append_encoded(self, checkpoints: Iterable[EncodedCheckpoint]) -> Operation[int]:
        return (yield from self._append_all(map(valid_encoded, checkpoints)))

    append_encoded = blocking(_append_encoded)
    aappend_encoded = awaitable(_append_encoded)

    def _append_all(self, checkpoints: Iterable[ValidCheckpoint]) -> Operation[int]:
        count = 0
        for checkpoint in checkpoints:
            yield from self._append_one(checkpoint)
            count += 1
        if not count:
            yield from self._refuse_unknown()
        return count

    def _refuse_unknown(self) -> Operation[None]:
        if is_possible_id(self.run_id):
            (found,) = yield read_runs(self.store, [self.run_id])
            if found[0] is not None:
                return
        raise RunNotFoundError(self.run_id)

    def _append_one(self, given: ValidCheckpoint) -> Operation[int]:
        step, text = given.step, given.text
        if not is_possible_id(self.run_id):
            raise RunNotFoundError(self.run_id)
        mark = new_mark(given.created_at, given.node_id, given.attempt, given.usage)
        for tried in itertools.count():
            if self._chain.next_step != step:
                yield from self._reload()
            base, stored = (
                (None, text) if tried >= MAX_BASED else (yield from self._encoded(text, given))
            )
            next_step = self._chain.next_step or 0
            if next_step not in (0, step):
                raise StepConflictError(self.run_id, step, next_step)
            # A run without states can begin anywhere.
            first = step if next_step == 0 else ""
            condition = ("", "") if base is None else (base, self._chain.mark(base))
            reply = yield call(
                self.store,
                scripts.APPEND_AT,
                self.run_id,
                first,
                step,
                *condition,
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

    def _condition(self, base: int) -> bytes:
        """Return what has to be so, for a delta to be what comes next."""
        mark = self._chain.mark(base) or b""
        return b"%d %d %b" % (self._chain.next_step or 0, base, mark)

    def _encoded(
        self, text: bytes, given: ValidCheckpoint | None = None
    ) -> Operation[tuple[int | None, bytes]]:
        """Return a state as it is stored, with the step that it is based on if it is a delta."""
        if len(text) <= SMALL_STATE:
            return None, text
        chain = self._chain
        if chain.next_step is None or chain.lacks_base(chain.next_step):
            # Somebody else wrote to the run, or deleted from it, or this is the first time.
            yield from self._reload()
        if given is not None and given.stored is not None and given.can_stay(chain):
            return base_step(given.step) if is_delta(given.stored) else None, given.stored
        stored, base = chain.encode(text, chain.next_step or 0)
        return base, stored

    def _reload(self) -> Operation[None]:
        """Remember the state that the next one is based on, and all that it is based on."""
        next_step, _, *flat = yield call(self.store, scripts.CHAIN, self.run_id, "base")
        links = [
            Link(step, stored, mark)
            for step, mark, stored in zip(flat[::3], flat[1::3], flat[2::3], strict=True)
        ]
        self._chain.load(int(next_step), reversed(links))

"""A run while it is recorded: `RecordedRun` for its author, `RunWriter` for its recording.

The recording makes both; `current_run` finds the first one from anywhere inside the block.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from asgiref.sync import sync_to_async
from pydantic import TypeAdapter

from workflow_storage.exceptions import (
    InvalidFieldError,
    RunLostError,
    RunNotFoundError,
    StatusConflictError,
    StorageError,
)
from workflow_storage.recorder.nodes import Node, Nodes
from workflow_storage.recorder.suspension import Suspended
from workflow_storage.recorder.usage import Amount, Usage, as_node_usage
from workflow_storage.serialization import dump_json, is_utf8, load_rebuilt, state_text
from workflow_storage.signals import checkpoint_saved
from workflow_storage.status import RunStatus
from workflow_storage.validation import MAX_WAITING_FOR, valid_name

if TYPE_CHECKING:
    from collections.abc import Iterator

    from django.dispatch import Signal

    from workflow_storage.base import Checkpoint, NodeUsage, StorageBackend, Totals
    from workflow_storage.models import WorkflowRun

_T = TypeVar("_T")

_current: ContextVar[RecordedRun | None] = ContextVar("workflow_storage_run", default=None)


def current_run() -> RecordedRun:
    """Return the run that is being recorded around the caller.

    Raises:
        LookupError: if there is none, or this process was forked inside the block of its parent.
    """
    run = run_around()
    if run is None:
        raise LookupError("No run is being recorded here. Call it inside record_run().")
    return run


def run_around() -> RecordedRun | None:
    """Return the run that is being recorded around the caller, or None."""
    run = _current.get()
    if run is None or run.status is not RunStatus.RUNNING or run.is_of_another_process:
        return None
    return run


@contextlib.contextmanager
def as_current(run: RecordedRun | None) -> Iterator[None]:
    """Let `current_run` return a run, or find none."""
    token = _current.set(run)
    try:
        yield
    finally:
        # A generator can be closed in another context than it was begun in.
        with contextlib.suppress(ValueError):
            _current.reset(token)


class RecordedRun:
    """A run while it is recorded.

    Attributes:
        run_id: its id.
        attempt: which attempt this is: 1 for a new run, one more each time that it is resumed.
        workflow_name: which workflow.
        inputs: what it was begun with.
        outputs: its result, any JSON value; stored when the block is left.
        status: where it stands.
        error_message: why it failed, once it has.
        waiting_for: for what it waits, once it was suspended.
        node_id: the node of the last checkpoint, or None.
        step: the step of the last checkpoint, or None.
        suspension: what `suspend` raises.
    """

    suspension: type[Suspended] = Suspended

    def __init__(
        self, run: WorkflowRun, writer: RunWriter, checkpoint: Checkpoint | None = None
    ) -> None:
        self.run_id = run.id
        self.attempt = writer.attempt
        self.workflow_name = run.workflow_name
        self.inputs = run.inputs
        self.outputs = run.outputs
        self.status = RunStatus.RUNNING
        self.error_message = run.error_message
        self.node_id: str | None = None
        self.step: int | None = None
        self.waiting_for: str | None = None
        self._state: dict[str, Any] | None = None
        self._state_text: bytes | None = None
        if checkpoint is not None:
            self._state = checkpoint["state_data"]
            self.node_id, self.step = checkpoint["node_id"], checkpoint["step"]
        # Of a new run, the nodes that have a checkpoint are those that it saves; None for one
        # that is resumed, until somebody asks.
        self._done: set[str] | None = set() if checkpoint is None else None
        self._writer = writer
        self._nodes = writer.nodes
        self._usage = writer.usage
        self._process = os.getpid()
        # Nodes that run in threads share the writer. A signal handler that saves in the middle of
        # a save is let in, and refused by the store.
        self._saving = threading.RLock()

    def __repr__(self) -> str:
        return f"<RecordedRun {self.workflow_name} {self.run_id} {self.status}>"

    @property
    def state(self) -> dict[str, Any] | None:
        """The state of the last checkpoint, as it would be read from the store; None without one.

        It is a copy of the run's own: what becomes of the saved object does not change it.
        """
        text = self._state_text
        if text is not None:
            self._state = load_rebuilt(text)
            if text is self._state_text:
                self._state_text = None
        return self._state

    def state_as(self, model: type[_T]) -> _T | None:
        """Return the state of the last checkpoint as a model; None without one.

        Args:
            model: a pydantic model, a dataclass, or what else pydantic validates into.

        Raises:
            pydantic.ValidationError: if the state is none.
        """
        state = self.state
        if state is None:
            return None
        adapter = TypeAdapter(model)
        # As JSON, in which a date is text, also to a strict model.
        return (
            adapter.validate_json(dump_json(state))
            if is_utf8(state)
            else adapter.validate_python(state)
        )

    @property
    def backend(self) -> StorageBackend:
        """The store that the run is in."""
        return self._writer.backend

    @property
    def current_node(self) -> str | None:
        """Where the run is: in the node that was entered last, or else after that of the checkpoint."""
        return self._nodes.newest or self.node_id

    @property
    def total_tokens(self) -> int | None:
        """Tokens used so far, or None if that is not known."""
        return self._usage.total_tokens

    @total_tokens.setter
    def total_tokens(self, tokens: int | None) -> None:
        self._usage.total_tokens = tokens

    @property
    def total_cost_usd(self) -> float | None:
        """USD spent so far, or None if that is not known."""
        return self._usage.total_cost_usd

    @total_cost_usd.setter
    def total_cost_usd(self, cost_usd: float | None) -> None:
        self._usage.total_cost_usd = cost_usd

    @property
    def is_of_another_process(self) -> bool:
        """Whether this process was forked inside the block, in which the parent records the run."""
        return self._process != os.getpid()

    def node(self, name: str) -> Node:
        """Return a node: ``with run.node("ocr"):``, ``async with``, or a decorator.

        It measures the time, keeps the usage that is added in it, and tells heartbeats and failures
        where the run is. `save_state` in it takes its name. Entering it writes nothing. Nodes may run
        beside each other, in threads or tasks.

        Args:
            name: 1 to 128 characters.

        Raises:
            InvalidFieldError: (a ValueError) for another name.
        """
        return Node(self._nodes, name)

    def done(self, node: str) -> bool:
        """Whether the run has a checkpoint of a node; the first time, a resumed run is asked.

        Pruning the states of a run forgets it.
        """
        if self._done is None:
            steps = self.backend.states.iter_steps(self.run_id)
            self._done = {step["node_id"] for step in steps}
        return node in self._done

    async def adone(self, node: str) -> bool:
        """Async twin of `done`."""
        if self._done is None:
            steps = self.backend.states.aiter_steps(self.run_id)
            self._done = {step["node_id"] async for step in steps}
        return node in self._done

    def save_state(self, state: Any, node_id: str | None = None) -> int:
        """Append a checkpoint, and return its step.

        With it are stored the usage since the last one, and, in a node, its time since then; of nodes
        that run beside each other, each has its own.

        Args:
            state: a dict, dataclass or pydantic model.
            node_id: the node after which the state is this; inside a node it may be left out.

        Raises:
            InvalidPayloadError: (a TypeError) unless the JSON form of `state` is an object.
            InvalidFieldError: (a ValueError) without a node's name outside of a node.
            RunLostError: if the run was taken over, ended or deleted by another process. Nothing
                that this recording writes is stored any more: stop working.
            StatusConflictError: if the block has been left.
            StorageError: in a process that was forked inside the block; in the middle of another
                call of the store, from a signal handler or a log handler.
        """
        self._refuse_unless_recorded_here()
        node_id = self._node_id(node_id)
        with self._saving:
            step = self._writer.save_state(state, node_id)
            self._saved(state, node_id, step)
        self._writer.send(checkpoint_saved, self, step=step, node_id=node_id)
        return step

    async def asave_state(self, state: Any, node_id: str | None = None) -> int:
        """Async twin of `save_state`."""
        self._refuse_unless_recorded_here()
        node_id = self._node_id(node_id)
        step = await self._writer.asave_state(state, node_id)
        self._saved(state, node_id, step)
        await self._writer.asend(checkpoint_saved, self, step=step, node_id=node_id)
        return step

    def _node_id(self, node_id: str | None) -> str:
        if node_id is not None:
            return node_id
        here = self._nodes.here
        if here is None:
            raise InvalidFieldError(
                "No node is named. Pass node_id, or save inside `with run.node(name):`."
            )
        return here.name

    def suspend(self, reason: str) -> NoReturn:
        """Leave the block, and let the run wait: ``pending``, until `resume_run` goes on with it.

        Args:
            reason: for what it waits, such as ``approval by finance``; 1 to 256 characters.

        Raises:
            Suspended: a BaseException, which the block swallows.
            InvalidFieldError: (a ValueError) for another reason.
            StatusConflictError: if the block has been left.
            StorageError: in a process that was forked inside the block.
        """
        self._refuse_unless_recorded_here()
        raise self.suspension(self.run_id, valid_name("reason", reason, MAX_WAITING_FOR))

    def add_usage(self, *, tokens: int | None = None, cost_usd: float | None = None) -> None:
        """Add to the totals; they are stored with the next checkpoint, and at the end.

        Args:
            tokens: how many more; None if that is not known.
            cost_usd: how much more, in USD; None if that is not known.

        Raises:
            InvalidFieldError: (a ValueError) unless they are a whole and a finite number;
                nothing is added then.
            StorageError: in a process that was forked inside the block.
        """
        self._refuse_in_another_process()
        amount = Amount.of(tokens, cost_usd)
        self._usage.add(amount)
        here = self._nodes.here
        (here.pending if here else self._nodes.outside).add(amount)

    def heartbeat(self) -> None:
        """Send a sign of life.

        Raises:
            RunLostError: if the run was taken over, ended or deleted by another process.
            StorageError: in a process that was forked inside the block.
        """
        self._refuse_in_another_process()
        self._writer.heartbeat(self.current_node)

    async def aheartbeat(self) -> None:
        """Async twin of `heartbeat`."""
        self._refuse_in_another_process()
        await self._writer.aheartbeat(self.current_node)

    def _saved(self, state: Any, node_id: str, step: int) -> None:
        """Note what was saved, unless another task or a signal handler has saved more since."""
        if self._done is not None:
            self._done.add(node_id)
        last_step, text = self._writer.last_saved or (step, state_text(state))
        if last_step == step:
            self.node_id, self.step, self._state_text = node_id, step, text

    def _refuse_unless_recorded_here(self) -> None:
        self._refuse_in_another_process()
        if self.status is not RunStatus.RUNNING:
            raise StatusConflictError(self.run_id, self.status.value, (RunStatus.RUNNING.value,))

    def _refuse_in_another_process(self) -> None:
        if self.is_of_another_process:
            raise StorageError(
                f"Workflow run {self.run_id} is recorded by process {self._process}, and this is "
                f"{os.getpid()}, forked inside its block. Give what is to be stored back to that "
                "process, or record a run of its own here."
            )


class RunWriter:
    """Writes to the store what happens to one run in one attempt, and nothing once that is over.

    It also sends the signals that tell of it. The `RecordedRun` saves through it; only the
    recording, which made it, ends the run.

    Attributes:
        attempt: which attempt.
        backend: the store.
        nodes: the nodes of the run.
        usage: the totals of the run.
    """

    def __init__(self, run: WorkflowRun, backend: StorageBackend, attempt: int) -> None:
        self.attempt = attempt
        self.backend = backend
        self.nodes = Nodes()
        self.usage = Usage(run.total_tokens, run.total_cost_usd)
        self._run_id = run.id
        self._runs = backend.runs
        self._states = backend.states.writer(run.id, attempt=attempt)

    @property
    def last_saved(self) -> tuple[int, bytes] | None:
        """The step and the JSON text of the state that was saved last, if the store keeps them."""
        return self._states.last_saved

    def save_state(self, state: Any, node_id: str) -> int:
        """Append a checkpoint, with the usage until then, and return its step."""
        with self._carrying() as (totals, usage):
            try:
                return self._states.save_state(state, node_id, totals=totals, **usage)
            except RunNotFoundError as exc:
                raise self.deleted() from exc

    async def asave_state(self, state: Any, node_id: str) -> int:
        """Async twin of `save_state`."""
        with self._carrying() as (totals, usage):
            try:
                return await self._states.asave_state(state, node_id, totals=totals, **usage)
            except RunNotFoundError as exc:
                raise self.deleted() from exc

    @contextlib.contextmanager
    def _carrying(self) -> Iterator[tuple[Totals | None, NodeUsage]]:
        """Yield what a checkpoint carries, and note that it has, unless it fails."""
        totals = self.usage.not_stored()
        node, now = self.nodes.here, time.monotonic()
        pending = node.pending if node else self.nodes.outside
        amount = pending.taken()
        try:
            yield totals, as_node_usage(amount, now - node.since if node else None)
        except BaseException:
            pending.add(amount)
            raise
        self.usage.note_stored(totals)
        if node is not None:
            node.since = now

    def heartbeat(self, node_id: str | None) -> None:
        """Send a sign of life."""
        try:
            self._runs.heartbeat(self._run_id, attempt=self.attempt, node=node_id)
        except RunNotFoundError as exc:
            raise self.deleted() from exc

    async def aheartbeat(self, node_id: str | None) -> None:
        """Async twin of `heartbeat`."""
        try:
            await self._runs.aheartbeat(self._run_id, attempt=self.attempt, node=node_id)
        except RunNotFoundError as exc:
            raise self.deleted() from exc

    def send(self, signal: Signal, run: RecordedRun, **kwargs: Any) -> None:
        """Send a signal once what was written is committed."""
        if signal.receivers:
            self.backend.on_commit(
                lambda: signal.send_robust(sender=RecordedRun, run=run, **kwargs)
            )

    async def asend(self, signal: Signal, run: RecordedRun, **kwargs: Any) -> None:
        """Async twin of `send`."""
        if signal.receivers:
            await sync_to_async(self.send, thread_sensitive=True)(signal, run, **kwargs)

    def deleted(self) -> RunLostError:
        """Return the error for a run that is not there any more."""
        return RunLostError(self._run_id, self.attempt)

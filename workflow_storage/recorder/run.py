"""A run while it is recorded: `RecordedRun` for its author, `RunWriter` for its recording.

The recording makes both; `current_run` finds the first one from anywhere inside the block.
"""

from __future__ import annotations

import contextlib
import threading
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from asgiref.sync import sync_to_async

from workflow_storage.exceptions import InvalidFieldError, StatusConflictError
from workflow_storage.signals import checkpoint_saved, run_finished
from workflow_storage.status import RunStatus
from workflow_storage.validation import valid_fields

if TYPE_CHECKING:
    from collections.abc import Iterator

    from django.dispatch import Signal

    from workflow_storage.base import Checkpoint, StorageBackend
    from workflow_storage.models import WorkflowRun
    from workflow_storage.recorder.failures import Outcome

_current: ContextVar[RecordedRun | None] = ContextVar("workflow_storage_run", default=None)


def current_run() -> RecordedRun:
    """Return the run that is being recorded around the caller.

    Raises:
        LookupError: if there is none.
    """
    run = _current.get()
    if run is None or run.status is not RunStatus.RUNNING:
        raise LookupError("No run is being recorded here. Call it inside record_run().")
    return run


@contextlib.contextmanager
def as_current(run: RecordedRun) -> Iterator[None]:
    """Let `current_run` return a run."""
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
        workflow_name: which workflow.
        inputs: what it was begun with.
        outputs: its result, any JSON value; stored when the block is left.
        status: where it stands.
        error_message: why it failed, once it has.
        state: the state of the last checkpoint, or None.
        node_id: the node of the last checkpoint, or None.
        step: the step of the last checkpoint, or None.
    """

    def __init__(
        self, run: WorkflowRun, writer: RunWriter, checkpoint: Checkpoint | None = None
    ) -> None:
        self.run_id = run.id
        self.workflow_name = run.workflow_name
        self.inputs = run.inputs
        self.outputs = run.outputs
        self.status = RunStatus.RUNNING
        self.error_message = run.error_message
        self.state: dict[str, Any] | None = None
        self.node_id: str | None = None
        self.step: int | None = None
        if checkpoint is not None:
            self._saved(checkpoint["state_data"], checkpoint["node_id"], checkpoint["step"])
        self._writer = writer
        self._usage = writer.usage
        # Nodes that run in threads share the writer.
        self._save_lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<RecordedRun {self.workflow_name} {self.run_id} {self.status}>"

    @property
    def total_tokens(self) -> int | None:
        """Tokens used so far, or None if no usage was added."""
        return self._usage.total_tokens

    @total_tokens.setter
    def total_tokens(self, tokens: int | None) -> None:
        self._usage.total_tokens = tokens

    @property
    def total_cost_usd(self) -> float | None:
        """USD spent so far, or None if no usage was added."""
        return self._usage.total_cost_usd

    @total_cost_usd.setter
    def total_cost_usd(self, cost_usd: float | None) -> None:
        self._usage.total_cost_usd = cost_usd

    def save_state(self, state: dict[str, Any], node_id: str) -> int:
        """Append a checkpoint, and return its step.

        Raises:
            InvalidPayloadError: (a TypeError) unless `state` is a dict of JSON values.
            RunNotFoundError: if the run has been deleted.
            StatusConflictError: if the block has been left.
        """
        self._refuse_after_the_end()
        with self._save_lock:
            step = self._writer.save_state(state, node_id)
            self._saved(state, node_id, step)
        self._writer.send(checkpoint_saved, self, step=step, node_id=node_id)
        return step

    async def asave_state(self, state: dict[str, Any], node_id: str) -> int:
        """Async twin of `save_state`."""
        self._refuse_after_the_end()
        step = await self._writer.asave_state(state, node_id)
        self._saved(state, node_id, step)
        await self._writer.asend(checkpoint_saved, self, step=step, node_id=node_id)
        return step

    def add_usage(self, *, tokens: int = 0, cost_usd: float = 0.0) -> None:
        """Add to the totals; they are stored with the next checkpoint, and at the end.

        Args:
            tokens: how many more.
            cost_usd: how much more, in USD.

        Raises:
            InvalidFieldError: (a ValueError) unless they are a whole and a finite number;
                nothing is added then.
        """
        self._usage.add(tokens, cost_usd)

    def heartbeat(self) -> None:
        """Send a sign of life."""
        self._writer.heartbeat()

    async def aheartbeat(self) -> None:
        """Async twin of `heartbeat`."""
        await self._writer.aheartbeat()

    def _saved(self, state: dict[str, Any], node_id: str, step: int) -> None:
        self.state, self.node_id, self.step = state, node_id, step

    def _refuse_after_the_end(self) -> None:
        if self.status is not RunStatus.RUNNING:
            raise StatusConflictError(self.run_id, self.status.value, (RunStatus.RUNNING.value,))


class RunWriter:
    """Writes to the store what happens to one run, and sends the signals that tell of it.

    The `RecordedRun` saves through it; only the recording, which made it, ends the run with it.

    Attributes:
        usage: the totals of the run.
    """

    def __init__(self, run: WorkflowRun, backend: StorageBackend) -> None:
        self.usage = Usage(run.total_tokens, run.total_cost_usd)
        self._run_id = run.id
        self._runs = backend.runs
        self._on_commit = backend.on_commit
        self._states = backend.states.writer(run.id)

    def save_state(self, state: dict[str, Any], node_id: str) -> int:
        """Append a checkpoint, with the usage until then, and return its step."""
        usage = self.usage.not_stored()
        if usage:
            self._runs.update(self._run_id, **usage)
            self.usage.note_stored(usage)
        return self._states.save_state(state, node_id)

    async def asave_state(self, state: dict[str, Any], node_id: str) -> int:
        """Async twin of `save_state`."""
        usage = self.usage.not_stored()
        if usage:
            await self._runs.aupdate(self._run_id, **usage)
            self.usage.note_stored(usage)
        return await self._states.asave_state(state, node_id)

    def heartbeat(self) -> None:
        """Send a sign of life."""
        self._runs.heartbeat(self._run_id)

    async def aheartbeat(self) -> None:
        """Async twin of `heartbeat`."""
        await self._runs.aheartbeat(self._run_id)

    def end(self, run: RecordedRun, outcome: Outcome) -> None:
        """Store how the run ended, and tell it.

        Raises:
            StatusConflictError: if another process has ended or resumed it meanwhile.
        """
        _refuse_if_resumed(run, self._runs.get(self._run_id))
        self._runs.update_status(
            self._run_id, outcome.status, expected=RunStatus.RUNNING, **self._last_fields(outcome)
        )
        _ended(run, outcome)
        self.send(run_finished, run)

    async def aend(self, run: RecordedRun, outcome: Outcome) -> None:
        """Async twin of `end`."""
        _refuse_if_resumed(run, await self._runs.aget(self._run_id))
        await self._runs.aupdate_status(
            self._run_id, outcome.status, expected=RunStatus.RUNNING, **self._last_fields(outcome)
        )
        _ended(run, outcome)
        await self.asend(run_finished, run)

    def send(self, signal: Signal, run: RecordedRun, **kwargs: Any) -> None:
        """Send a signal once what was written is committed."""
        if signal.receivers:
            self._on_commit(lambda: signal.send_robust(sender=RecordedRun, run=run, **kwargs))

    async def asend(self, signal: Signal, run: RecordedRun, **kwargs: Any) -> None:
        """Async twin of `send`."""
        if signal.receivers:
            await sync_to_async(self.send, thread_sensitive=True)(signal, run, **kwargs)

    def _last_fields(self, outcome: Outcome) -> dict[str, Any]:
        return {**self.usage.totals(), **outcome.fields}


class Usage:
    """The totals of a run, which nodes in several threads add to, and which of them are stored.

    Attributes:
        total_tokens: used so far, or None if no usage was added.
        total_cost_usd: spent so far in USD, or None if no usage was added.
    """

    def __init__(self, total_tokens: int | None, total_cost_usd: float | None) -> None:
        self.total_tokens = total_tokens
        self.total_cost_usd = total_cost_usd
        self._totals_lock = threading.Lock()
        self._stored = self.totals()

    def add(self, tokens: int, cost_usd: float) -> None:
        """Do what `RecordedRun.add_usage` does."""
        added = valid_fields({"total_tokens": tokens, "total_cost_usd": cost_usd})
        if None in added.values():
            raise InvalidFieldError("tokens or cost_usd is None. Leave it out, or pass a number.")
        with self._totals_lock:
            totals = valid_fields(
                {
                    "total_tokens": (self.total_tokens or 0) + added["total_tokens"],
                    "total_cost_usd": (self.total_cost_usd or 0.0) + added["total_cost_usd"],
                }
            )
            self.total_tokens = totals["total_tokens"]
            self.total_cost_usd = totals["total_cost_usd"]

    def totals(self) -> dict[str, Any]:
        """Return the totals as fields of the run; no fields if no usage was added."""
        with self._totals_lock:
            totals = {"total_tokens": self.total_tokens, "total_cost_usd": self.total_cost_usd}
        return {} if set(totals.values()) == {None} else totals

    def not_stored(self) -> dict[str, Any]:
        """Return the totals if they have changed since they were stored; no fields otherwise."""
        totals = self.totals()
        return {} if totals == self._stored else totals

    def note_stored(self, totals: dict[str, Any]) -> None:
        """Remember the totals that were stored."""
        self._stored = totals


def _refuse_if_resumed(run: RecordedRun, stored: WorkflowRun | None) -> None:
    """Leave a run alone that was failed and resumed by another process since it began here.

    Its status is running, as if nothing had been; but who fails a run leaves an error, which
    stays until the run has ended.
    """
    if stored is not None and stored.error_message != run.error_message:
        raise StatusConflictError(
            run.run_id, "failed, or resumed by another process", (RunStatus.RUNNING.value,)
        )


def _ended(run: RecordedRun, outcome: Outcome) -> None:
    run.status = outcome.status
    run.error_message = outcome.fields["error_message"]

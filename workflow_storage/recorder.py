"""What a workflow author calls: a run recorded around a block or a function, and resumed.

Works on every backend, through the two repositories only.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import logging
import threading
import traceback
from contextvars import ContextVar, Token
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from asgiref.sync import sync_to_async
from django.db import connections
from django.utils import timezone

from workflow_storage.base import StorageBackend
from workflow_storage.exceptions import (
    InvalidFieldError,
    RunNotFoundError,
    StatusConflictError,
    StorageError,
)
from workflow_storage.factory import acreate_storage_backend, create_storage_backend
from workflow_storage.serialization import payload_json
from workflow_storage.signals import checkpoint_saved, run_finished, run_started
from workflow_storage.status import RunStatus
from workflow_storage.validation import valid_fields

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from datetime import timedelta
    from types import TracebackType

    from django.dispatch import Signal

    from workflow_storage.config import StorageConfig
    from workflow_storage.models import WorkflowRun

_F = TypeVar("_F", bound="Callable[..., Any]")
_R = TypeVar("_R")

logger = logging.getLogger(__name__)

MAX_ERROR_MESSAGE = 20_000
"""Characters of an error_message that is made from an exception."""

STOP_TIMEOUT = 2.0
"""Seconds that leaving a block waits for a heartbeat that is under way."""

RESUMABLE = (RunStatus.FAILED, RunStatus.CANCELLED, RunStatus.PENDING)

_current: ContextVar[RecordedRun | None] = ContextVar("workflow_storage_run", default=None)


def record_run(
    workflow_name: str,
    *,
    inputs: Any = None,
    config: Any = None,
    run_id: str | None = None,
    backend: StorageBackend | StorageConfig | str | None = None,
    heartbeat: float | None = None,
) -> Recording:
    """Record what happens in a block, or in each call of a function, as a run.

    Use it as ``with record_run("name") as run:``, as ``async with``, or as a decorator of a
    function or coroutine function; inside that, `current_run` gives the run. Leaving the
    block completes the run. An exception fails it, with type, message and traceback in
    `error_message`, and goes on its way; KeyboardInterrupt, SystemExit, GeneratorExit and
    the cancellation of a task cancel it.

    Args:
        workflow_name: which workflow.
        inputs: any JSON value. For a decorator None means the arguments of the call, as a
            dict by parameter, and False that they are left out.
        config: any JSON value, for `config_snapshot`.
        run_id: the id of the run; None for a new one.
        backend: a `StorageBackend`, or what `create_storage_backend` takes.
        heartbeat: seconds between signs of life while nothing is saved; None for none.
    """
    return Recording(
        functools.partial(_Beginning, workflow_name, config, run_id=run_id),
        inputs,
        backend,
        heartbeat,
    )


def resume_run(
    run_id: str,
    *,
    backend: StorageBackend | StorageConfig | str | None = None,
    heartbeat: float | None = None,
    stalled_after: timedelta | None = None,
) -> Recording:
    """Go on with a failed, cancelled or pending run, in a ``with`` or ``async with`` block.

    ``run.state``, ``run.node_id`` and ``run.step`` are those of its last checkpoint. Of
    several processes that resume a run, one gets it.

    Args:
        run_id: which run.
        backend: a `StorageBackend`, or what `create_storage_backend` takes.
        heartbeat: as for `record_run`.
        stalled_after: also resume a running run that gave no sign of life for longer.

    Raises:
        RunNotFoundError: on entering, if there is no such run.
        StatusConflictError: on entering, if the run is completed, or is running.
    """
    return Recording(
        functools.partial(_Resumption, run_id, stalled_after), None, backend, heartbeat
    )


def current_run() -> RecordedRun:
    """Give the run that is being recorded around the caller.

    Raises:
        LookupError: if there is none.
    """
    run = _current.get()
    if run is None or run.status is not RunStatus.RUNNING:
        raise LookupError("No run is being recorded here. Call it inside record_run().")
    return run


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
        total_tokens: used so far, or None if no usage was added.
        total_cost_usd: spent so far in USD, or None if no usage was added.
    """

    def __init__(self, run: WorkflowRun, backend: StorageBackend) -> None:
        self.run_id = run.id
        self.workflow_name = run.workflow_name
        self.inputs = run.inputs
        self.outputs = run.outputs
        self.status = RunStatus.RUNNING
        self.error_message = run.error_message
        self.total_tokens = run.total_tokens
        self.total_cost_usd = run.total_cost_usd
        self.state: dict[str, Any] | None = None
        self.node_id: str | None = None
        self.step: int | None = None
        self._backend = backend
        self._writer = backend.states.writer(run.id)
        # Nodes that run in threads share the writer, and the totals.
        self._saving = threading.Lock()
        self._lock = threading.Lock()
        self._stored_usage = self._usage()

    def __repr__(self) -> str:
        return f"<RecordedRun {self.workflow_name} {self.run_id} {self.status}>"

    def save_state(self, state: dict[str, Any], node_id: str) -> int:
        """Append a checkpoint, and give its step.

        Raises:
            InvalidPayloadError: (a TypeError) unless `state` is a dict of JSON values.
            RunNotFoundError: if the run has been deleted.
            StatusConflictError: if the block has been left.
        """
        self._refuse_after_the_end()
        with self._saving:
            usage = self._usage_to_store()
            if usage:
                self._backend.runs.update(self.run_id, **usage)
                self._stored_usage = usage
            step = self._writer.save_state(state, node_id)
            self._saved(state, node_id, step)
        self._send(checkpoint_saved, step=step, node_id=node_id)
        return step

    async def asave_state(self, state: dict[str, Any], node_id: str) -> int:
        """Async twin of `save_state`."""
        self._refuse_after_the_end()
        usage = self._usage_to_store()
        if usage:
            await self._backend.runs.aupdate(self.run_id, **usage)
            self._stored_usage = usage
        step = await self._writer.asave_state(state, node_id)
        self._saved(state, node_id, step)
        await self._asend(checkpoint_saved, step=step, node_id=node_id)
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
        added = valid_fields({"total_tokens": tokens, "total_cost_usd": cost_usd})
        if None in added.values():
            raise InvalidFieldError("tokens or cost_usd is None. Leave it out, or pass a number.")
        with self._lock:
            totals = valid_fields(
                {
                    "total_tokens": (self.total_tokens or 0) + added["total_tokens"],
                    "total_cost_usd": (self.total_cost_usd or 0.0) + added["total_cost_usd"],
                }
            )
            self.total_tokens = totals["total_tokens"]
            self.total_cost_usd = totals["total_cost_usd"]

    def heartbeat(self) -> None:
        """Give a sign of life."""
        self._backend.runs.heartbeat(self.run_id)

    async def aheartbeat(self) -> None:
        """Async twin of `heartbeat`."""
        await self._backend.runs.aheartbeat(self.run_id)

    def _usage(self) -> dict[str, Any]:
        """Give the totals, if there are any."""
        with self._lock:
            totals = {"total_tokens": self.total_tokens, "total_cost_usd": self.total_cost_usd}
        return {} if set(totals.values()) == {None} else totals

    def _usage_to_store(self) -> dict[str, Any]:
        """Give the totals, if they have changed since they were stored."""
        totals = self._usage()
        return {} if totals == self._stored_usage else totals

    def _saved(self, state: dict[str, Any], node_id: str, step: int) -> None:
        self.state, self.node_id, self.step = state, node_id, step

    def _refuse_after_the_end(self) -> None:
        if self.status is not RunStatus.RUNNING:
            raise StatusConflictError(self.run_id, self.status.value, (RunStatus.RUNNING.value,))

    def _send(self, signal: Signal, **kwargs: Any) -> None:
        if signal.receivers:
            self._backend.on_commit(
                lambda: signal.send_robust(sender=RecordedRun, run=self, **kwargs)
            )

    async def _asend(self, signal: Signal, **kwargs: Any) -> None:
        if signal.receivers:
            await sync_to_async(self._send, thread_sensitive=True)(signal, **kwargs)


class Recording:
    """Records a run around a block or a function; see `record_run`."""

    def __init__(
        self,
        opening: functools.partial[Any],
        inputs: Any,
        backend: StorageBackend | StorageConfig | str | None,
        heartbeat: float | None,
    ) -> None:
        if heartbeat is not None and not (
            not isinstance(heartbeat, bool) and 0 < heartbeat <= threading.TIMEOUT_MAX
        ):
            raise ValueError(f"heartbeat is {heartbeat}. Pass seconds, more than 0, or None.")
        self._make_opening = opening
        self._inputs = inputs
        self._backend = backend
        self._heartbeat = heartbeat
        self._run: RecordedRun | None = None
        self._stack: contextlib.ExitStack | None = None
        self._beating: asyncio.Task[None] | None = None

    def __call__(self, function: _F) -> _F:
        """Record each call of a function as a run of its own."""
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError(
                f"{function.__qualname__} is a generator function, whose body runs after the "
                "call. Use `with record_run(...)` inside it."
            )
        if self._make_opening.keywords.get("run_id") is not None:
            raise TypeError("A decorated function makes a run a call. Leave run_id out.")
        signature = inspect.signature(function)

        def recording(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Recording:
            inputs = None if self._inputs is False else self._inputs
            if self._inputs is None:
                inputs = _arguments(signature, args, kwargs)
            return Recording(self._make_opening, inputs, self._backend, self._heartbeat)

        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def recorded_async(*args: Any, **kwargs: Any) -> Any:
                async with recording(args, kwargs) as run:
                    run.outputs = await function(*args, **kwargs)
                return run.outputs

            return recorded_async  # type: ignore[return-value]

        @functools.wraps(function)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            with recording(args, kwargs) as run:
                run.outputs = function(*args, **kwargs)
            return run.outputs

        return recorded  # type: ignore[return-value]

    def __enter__(self) -> RecordedRun:
        self._refuse_second_use()
        given = self._backend
        backend = given if isinstance(given, StorageBackend) else create_storage_backend(given)
        opening: _Opening = self._make_opening(self._inputs)
        self._run = run = opening.open(backend)
        self._stack = contextlib.ExitStack()
        self._stack.callback(_forget_current, _current.set(run))
        try:
            if self._heartbeat is not None:
                self._stack.callback(_beat_in_thread(run, self._heartbeat))
            run._send(run_started)
        except BaseException as exc:
            self.__exit__(type(exc), exc, exc.__traceback__)
            raise
        return run

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        run, stack = self._opened()
        # Stopping the heartbeats comes last: it can take a while, or be interrupted.
        with stack:
            self._finish(run, exc)

    def _finish(self, run: RecordedRun, exc: BaseException | None) -> None:
        status, fields, refused = _outcome(run, exc)
        runs = run._backend.runs
        try:
            _refuse_if_resumed(run, runs.get(run.run_id))
            runs.update_status(run.run_id, status, expected=RunStatus.RUNNING, **fields)
            _ended(run, status, fields)
            run._send(run_finished)
        except Exception as error:
            _note(exc, error, run)
        if refused is not None:
            raise refused

    async def __aenter__(self) -> RecordedRun:
        self._refuse_second_use()
        given = self._backend
        backend = (
            given if isinstance(given, StorageBackend) else await acreate_storage_backend(given)
        )
        opening: _Opening = self._make_opening(self._inputs)
        opened, cancelled = await _to_the_end(opening.aopen(backend))
        if cancelled is not None:
            if opened.exception() is None:
                await _to_the_end(self._afinish(opened.result(), cancelled))
            raise cancelled
        run = opened.result()
        self._run = run
        self._stack = contextlib.ExitStack()
        self._stack.callback(_forget_current, _current.set(run))
        try:
            if self._heartbeat is not None:
                self._beating = asyncio.create_task(_beat(run, self._heartbeat))
            await run._asend(run_started)
        except BaseException as exc:
            await self.__aexit__(type(exc), exc, exc.__traceback__)
            raise
        return run

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        run, stack = self._opened()
        stack.close()
        # A task that is cancelled while it ends still stores how it ended.
        finished, cancelled = await _to_the_end(self._afinish(run, exc))
        if self._beating is not None:
            self._beating.cancel()
            await asyncio.wait([self._beating], timeout=STOP_TIMEOUT)
        finished.result()
        if cancelled is not None:
            raise cancelled

    async def _afinish(self, run: RecordedRun, exc: BaseException | None) -> None:
        status, fields, refused = _outcome(run, exc)
        runs = run._backend.runs
        try:
            _refuse_if_resumed(run, await runs.aget(run.run_id))
            await runs.aupdate_status(run.run_id, status, expected=RunStatus.RUNNING, **fields)
            _ended(run, status, fields)
            await run._asend(run_finished)
        except Exception as error:
            _note(exc, error, run)
        if refused is not None:
            raise refused

    def _refuse_second_use(self) -> None:
        if self._run is not None:
            raise RuntimeError("This recording was used already. Call record_run() again.")

    def _opened(self) -> tuple[RecordedRun, contextlib.ExitStack]:
        assert self._run is not None
        assert self._stack is not None
        return self._run, self._stack


class _Opening(Protocol):
    """How a recording gets its run."""

    def open(self, backend: StorageBackend) -> RecordedRun: ...

    async def aopen(self, backend: StorageBackend) -> RecordedRun: ...


class _Beginning:
    def __init__(self, workflow_name: str, config: Any, inputs: Any, *, run_id: str | None) -> None:
        self.fields: dict[str, Any] = {
            "workflow_name": workflow_name,
            "config_snapshot": config,
            "inputs": inputs,
        }
        if run_id is not None:
            self.fields["id"] = run_id

    def _run(self) -> WorkflowRun:
        from workflow_storage.models import WorkflowRun

        return WorkflowRun(status=RunStatus.RUNNING, started_at=timezone.now(), **self.fields)

    def open(self, backend: StorageBackend) -> RecordedRun:
        run = self._run()
        backend.runs.add(run)
        return RecordedRun(run, backend)

    async def aopen(self, backend: StorageBackend) -> RecordedRun:
        run = self._run()
        await backend.runs.aadd(run)
        return RecordedRun(run, backend)


class _Resumption:
    def __init__(self, run_id: str, stalled_after: timedelta | None, _inputs: Any) -> None:
        self.run_id = run_id
        self.stalled_after = stalled_after

    def open(self, backend: StorageBackend) -> RecordedRun:
        runs, states = backend
        if self.stalled_after is not None:
            runs.fail_if_stalled(self.run_id, self.stalled_after)
        before = runs.get(self.run_id)
        if before is None:
            raise RunNotFoundError(self.run_id)
        runs.update_status(self.run_id, RunStatus.RUNNING, expected=RESUMABLE)
        try:
            run = runs.get(self.run_id)
            if run is None:
                raise RunNotFoundError(self.run_id)
            resumed = RecordedRun(run, backend)
            checkpoint = states.get_latest_checkpoint(self.run_id)
            if checkpoint is not None:
                resumed._saved(checkpoint["state_data"], checkpoint["node_id"], checkpoint["step"])
        except BaseException:
            # Nobody works on it, then; a damaged state, say, can be mended and resumed.
            with contextlib.suppress(StorageError):
                runs.update_status(self.run_id, before.status, expected=RunStatus.RUNNING)
            raise
        return resumed

    async def aopen(self, backend: StorageBackend) -> RecordedRun:
        return await sync_to_async(self.open, thread_sensitive=True)(backend)


async def _to_the_end(
    work: Coroutine[Any, Any, _R],
) -> tuple[asyncio.Task[_R], asyncio.CancelledError | None]:
    """Wait for some work to end, however often the task that waits is cancelled.

    Returns:
        The work, done; and the cancellation, for the caller to raise when it is ready.
    """
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as exc:
            cancelled = exc
    return task, cancelled


def _forget_current(token: Token[RecordedRun | None]) -> None:
    # A generator can be closed in another context than it was begun in.
    with contextlib.suppress(ValueError):
        _current.reset(token)


def _arguments(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Give the arguments of a call by parameter, or say which is not JSON."""
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    arguments = dict(bound.arguments)
    if arguments and next(iter(arguments)) in {"self", "cls"}:
        del arguments[next(iter(arguments))]  # a method's own object is no input
    for name, value in arguments.items():
        try:
            payload_json(f"the argument {name}", value)
        except InvalidFieldError as exc:
            exc.add_note("Or leave the arguments out with record_run(..., inputs=False).")
            raise
    return arguments


def _outcome(
    run: RecordedRun, exc: BaseException | None
) -> tuple[RunStatus, dict[str, Any], InvalidFieldError | None]:
    """Give the status and the result fields of a run whose block was left.

    Returns:
        Both, and the error for the caller if the result cannot be stored.
    """
    fields = run._usage()
    if exc is None:
        try:
            payload_json("outputs", run.outputs)
        except InvalidFieldError as error:
            return RunStatus.FAILED, {**fields, "error_message": describe_error(error)}, error
        fields |= {"outputs": run.outputs, "error_message": None}
        return RunStatus.COMPLETED, fields, None
    status = RunStatus.FAILED if isinstance(exc, Exception) else RunStatus.CANCELLED
    return status, {**fields, "error_message": describe_error(exc)}, None


def _refuse_if_resumed(run: RecordedRun, stored: WorkflowRun | None) -> None:
    """Leave a run alone that was failed and resumed by another process since it began here.

    Its status is running, as if nothing had been; but who fails a run leaves an error, which
    stays until the run has ended.
    """
    if stored is not None and stored.error_message != run.error_message:
        raise StatusConflictError(
            run.run_id, "failed, or resumed by another process", (RunStatus.RUNNING.value,)
        )


def _ended(run: RecordedRun, status: RunStatus, fields: dict[str, Any]) -> None:
    run.status = status
    run.error_message = fields["error_message"]


def _note(exc: BaseException | None, error: Exception, run: RecordedRun) -> None:
    """Let an exception that is on its way go on, with the store's error noted on it."""
    if exc is None:
        raise error
    logger.error("The end of workflow run %s could not be stored", run.run_id, exc_info=error)
    # Some exceptions take no note; then the log has it.
    with contextlib.suppress(Exception):
        exc.add_note(f"The end of workflow run {run.run_id} could not be stored: {error}")


def describe_error(exc: BaseException) -> str:
    """Give the type, message and traceback of an exception as text, without local variables.

    Returns:
        At most `MAX_ERROR_MESSAGE` characters; what is too long is cut in its middle.
    """
    try:
        described = traceback.TracebackException.from_exception(exc, compact=True)
        summary = "".join(described.format_exception_only()).strip()
        text = f"{_cut(summary, MAX_ERROR_MESSAGE // 2)}\n\n{''.join(described.format()).strip()}"
    except Exception:
        logger.warning("An exception cannot be described", exc_info=True)
        text = f"{type(exc).__name__} (its message and traceback cannot be printed)"
    return _cut(text, MAX_ERROR_MESSAGE)


def _cut(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    gap = "\n[…]\n"
    half = (limit - len(gap)) // 2
    return f"{text[:half]}{gap}{text[-half:]}"


def _beat_in_thread(run: RecordedRun, seconds: float) -> Callable[[], None]:
    """Give signs of life from a thread, with a connection of its own, until called."""
    stopped = threading.Event()

    def beat() -> None:
        try:
            while not stopped.wait(seconds):
                try:
                    run.heartbeat()
                except RunNotFoundError:
                    # Deleted; or begun in a transaction that is not committed yet.
                    logger.info("A heartbeat of workflow run %s found no run", run.run_id)
                except Exception:
                    logger.warning(
                        "A heartbeat of workflow run %s failed", run.run_id, exc_info=True
                    )
        finally:
            connections.close_all()

    thread = threading.Thread(target=beat, name=f"heartbeat of {run.run_id}", daemon=True)
    thread.start()

    def stop() -> None:
        stopped.set()
        # In the caller's transaction a heartbeat can wait for a lock until that ends.
        thread.join(STOP_TIMEOUT)

    return stop


async def _beat(run: RecordedRun, seconds: float) -> None:
    """Give signs of life until cancelled."""
    while True:
        await asyncio.sleep(seconds)
        try:
            await run.aheartbeat()
        except RunNotFoundError:
            logger.info("A heartbeat of workflow run %s found no run", run.run_id)
        except Exception:
            logger.warning("A heartbeat of workflow run %s failed", run.run_id, exc_info=True)

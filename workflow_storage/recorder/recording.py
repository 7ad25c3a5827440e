"""A run recorded around a block or a function, and one resumed: `record_run`, `resume_run`."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

from asgiref.sync import sync_to_async
from django.utils import timezone

from workflow_storage.base import StorageBackend
from workflow_storage.exceptions import InvalidFieldError, RunNotFoundError, StorageError
from workflow_storage.factory import acreate_storage_backend, create_storage_backend
from workflow_storage.recorder.failures import ending
from workflow_storage.recorder.heartbeats import beat_in_task, beat_in_thread, valid_interval
from workflow_storage.recorder.run import RecordedRun, RunWriter, as_current
from workflow_storage.serialization import payload_json
from workflow_storage.signals import run_started
from workflow_storage.status import RunStatus

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from datetime import timedelta
    from types import TracebackType

    from workflow_storage.base import Checkpoint
    from workflow_storage.config import StorageConfig
    from workflow_storage.models import WorkflowRun

_F = TypeVar("_F", bound="Callable[..., Any]")
_R = TypeVar("_R")

RESUMABLE = (RunStatus.FAILED, RunStatus.CANCELLED, RunStatus.PENDING)


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
    function or coroutine function; inside that, `current_run` returns the run. Leaving the
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
    return Recording(_Beginning(workflow_name, config, run_id), inputs, backend, heartbeat)


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
    return Recording(_Resumption(run_id, stalled_after), None, backend, heartbeat)


class Recording:
    """Records a run around a block or a function; see `record_run`."""

    def __init__(
        self,
        opening: _Opening,
        inputs: Any,
        backend: StorageBackend | StorageConfig | str | None,
        heartbeat: float | None,
    ) -> None:
        self._opening = opening
        self._inputs = inputs
        self._backend = backend
        self._heartbeat = valid_interval(heartbeat)
        self._opened: _Opened | None = None
        self._stack = contextlib.ExitStack()
        self._stop_task: Callable[[], Coroutine[Any, Any, None]] | None = None

    def __call__(self, function: _F) -> _F:
        """Record each call of a function as a run of its own."""
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError(
                f"{function.__qualname__} is a generator function, whose body runs after the "
                "call. Use `with record_run(...)` inside it."
            )
        if isinstance(self._opening, _Beginning) and self._opening.run_id is not None:
            raise TypeError("A decorated function makes a run a call. Leave run_id out.")
        signature = inspect.signature(function)

        def recording(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Recording:
            inputs = None if self._inputs is False else self._inputs
            if self._inputs is None:
                inputs = _arguments(signature, args, kwargs)
            return Recording(self._opening, inputs, self._backend, self._heartbeat)

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
        opened = self._enter(self._opening.open(backend, self._inputs))
        try:
            if self._heartbeat is not None:
                self._stack.callback(beat_in_thread(opened.run, self._heartbeat))
            opened.writer.send(run_started, opened.run)
        except BaseException as exc:
            self.__exit__(type(exc), exc, exc.__traceback__)
            raise
        return opened.run

    async def __aenter__(self) -> RecordedRun:
        self._refuse_second_use()
        given = self._backend
        backend = (
            given if isinstance(given, StorageBackend) else await acreate_storage_backend(given)
        )
        opening, cancelled = await _to_the_end(self._opening.aopen(backend, self._inputs))
        if cancelled is not None:
            if opening.exception() is None:
                await _to_the_end(_afinish(opening.result(), cancelled))
            raise cancelled
        opened = self._enter(opening.result())
        try:
            if self._heartbeat is not None:
                self._stop_task = beat_in_task(opened.run, self._heartbeat)
            await opened.writer.asend(run_started, opened.run)
        except BaseException as exc:
            await self.__aexit__(type(exc), exc, exc.__traceback__)
            raise
        return opened.run

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        assert self._opened is not None
        # Stopping the heartbeats comes last: it can take a while, or be interrupted.
        with self._stack:
            _finish(self._opened, exc)

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        assert self._opened is not None
        self._stack.close()
        # A task that is cancelled while it ends still stores how it ended.
        finished, cancelled = await _to_the_end(_afinish(self._opened, exc))
        if self._stop_task is not None:
            await self._stop_task()
        finished.result()
        if cancelled is not None:
            raise cancelled

    def _enter(self, opened: _Opened) -> _Opened:
        self._opened = opened
        self._stack.enter_context(as_current(opened.run))
        return opened

    def _refuse_second_use(self) -> None:
        if self._opened is not None:
            raise RuntimeError("This recording was used already. Call record_run() again.")


def _finish(opened: _Opened, exc: BaseException | None) -> None:
    run, writer = opened
    with ending(run.run_id, run.outputs, exc) as outcome:
        writer.end(run, outcome)


async def _afinish(opened: _Opened, exc: BaseException | None) -> None:
    run, writer = opened
    with ending(run.run_id, run.outputs, exc) as outcome:
        await writer.aend(run, outcome)


class _Opened(NamedTuple):
    """A run that was begun or resumed."""

    run: RecordedRun
    writer: RunWriter

    @classmethod
    def of(
        cls, run: WorkflowRun, backend: StorageBackend, checkpoint: Checkpoint | None = None
    ) -> _Opened:
        """Return a stored run, as it is recorded on from a checkpoint."""
        writer = RunWriter(run, backend)
        return cls(RecordedRun(run, writer, checkpoint), writer)


class _Opening(Protocol):
    """How a recording gets its run."""

    def open(self, backend: StorageBackend, inputs: Any) -> _Opened: ...

    async def aopen(self, backend: StorageBackend, inputs: Any) -> _Opened: ...


class _Beginning:
    def __init__(self, workflow_name: str, config: Any, run_id: str | None) -> None:
        self.run_id = run_id
        self._fields = {"workflow_name": workflow_name, "config_snapshot": config}
        if run_id is not None:
            self._fields["id"] = run_id

    def open(self, backend: StorageBackend, inputs: Any) -> _Opened:
        run = self._new_run(inputs)
        backend.runs.add(run)
        return _Opened.of(run, backend)

    async def aopen(self, backend: StorageBackend, inputs: Any) -> _Opened:
        run = self._new_run(inputs)
        await backend.runs.aadd(run)
        return _Opened.of(run, backend)

    def _new_run(self, inputs: Any) -> WorkflowRun:
        from workflow_storage.models import WorkflowRun

        return WorkflowRun(
            status=RunStatus.RUNNING, started_at=timezone.now(), inputs=inputs, **self._fields
        )


class _Resumption:
    def __init__(self, run_id: str, stalled_after: timedelta | None) -> None:
        self._run_id = run_id
        self._stalled_after = stalled_after

    def open(self, backend: StorageBackend, _inputs: Any) -> _Opened:
        runs, states = backend
        if self._stalled_after is not None:
            runs.fail_if_stalled(self._run_id, self._stalled_after)
        before = runs.get(self._run_id)
        if before is None:
            raise RunNotFoundError(self._run_id)
        runs.update_status(self._run_id, RunStatus.RUNNING, expected=RESUMABLE)
        try:
            run = runs.get(self._run_id)
            if run is None:
                raise RunNotFoundError(self._run_id)
            return _Opened.of(run, backend, states.get_latest_checkpoint(self._run_id))
        except BaseException:
            # Nobody works on it, then; a damaged state, say, can be mended and resumed.
            with contextlib.suppress(StorageError):
                runs.update_status(self._run_id, before.status, expected=RunStatus.RUNNING)
            raise

    async def aopen(self, backend: StorageBackend, inputs: Any) -> _Opened:
        return await sync_to_async(self.open, thread_sensitive=True)(backend, inputs)


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


def _arguments(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Return the arguments of a call by parameter, or say which is not JSON."""
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

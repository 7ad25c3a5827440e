"""A run recorded around a block or a function, and one resumed: `record_run`, `resume_run`."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
from typing import TYPE_CHECKING, Any, TypeVar

from workflow_storage.base import StorageBackend
from workflow_storage.exceptions import InvalidFieldError
from workflow_storage.factory import acreate_storage_backend, create_storage_backend
from workflow_storage.recorder.ending import finished
from workflow_storage.recorder.heartbeats import keep_alive, valid_interval
from workflow_storage.recorder.opening import AROUND, Beginning, Opened, Opening, Resumption
from workflow_storage.recorder.run import RecordedRun, as_current
from workflow_storage.recorder.steps import acarried_out, carried_out
from workflow_storage.serialization import payload_json
from workflow_storage.signals import run_started

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from datetime import timedelta
    from types import TracebackType

    from workflow_storage.config import StorageConfig
    from workflow_storage.status import RunStatus

_F = TypeVar("_F", bound="Callable[..., Any]")
_R = TypeVar("_R")


def record_run(
    workflow_name: str,
    *,
    inputs: Any = None,
    config: Any = None,
    run_id: str | None = None,
    labels: dict[str, str] | None = None,
    parent: RecordedRun | str | None = AROUND,
    backend: StorageBackend | StorageConfig | str | None = None,
    heartbeat: float | None = None,
) -> Recording:
    """Record what happens in a block, or in each call of a function, as a run.

    Use it as ``with record_run("name") as run:``, as ``async with``, or as a decorator of a
    function or coroutine function; inside that, `current_run` returns the run. Leaving the
    block completes the run. An exception fails it, with type, message and traceback in
    `error_message`, and goes on its way; KeyboardInterrupt, SystemExit, GeneratorExit and
    the cancellation of a task cancel it. `RecordedRun.suspend` leaves it waiting; a decorated
    function returns None then.

    Args:
        workflow_name: which workflow.
        inputs: any JSON value. For a decorator None means the arguments of the call, as a
            dict by parameter, and False that they are left out.
        config: any JSON value, for `config_snapshot`.
        run_id: the id of the run; None for a new one.
        labels: names and texts to find the run by, such as ``{"tenant": "acme"}``.
        parent: the run that started it, or its id; None for none. Left out, that is the run which is
            recorded around this one, if it is in the same store.
        backend: a `StorageBackend`, or what `create_storage_backend` takes.
        heartbeat: seconds between signs of life while nothing is saved; None for none.
    """
    beginning = Beginning(workflow_name, config, run_id, labels, parent)
    return Recording(beginning, inputs, backend, heartbeat)


def resume_run(
    run_id: str,
    *,
    backend: StorageBackend | StorageConfig | str | None = None,
    heartbeat: float | None = None,
    stalled_after: timedelta | None = None,
) -> Recording:
    """Go on with a failed, cancelled or pending run, in a ``with`` or ``async with`` block.

    ``run.state``, ``run.node_id`` and ``run.step`` are those of its last checkpoint. It is a new
    attempt: of several processes that resume a run, one gets it, and whoever was given up
    writes nothing any more (`RunLostError`).

    Args:
        run_id: which run.
        backend: a `StorageBackend`, or what `create_storage_backend` takes.
        heartbeat: as for `record_run`.
        stalled_after: also resume a running run that gave no sign of life for longer.

    Raises:
        RunNotFoundError: on entering, if there is no such run.
        NotResumableError: (a StatusConflictError) on entering, if the run is completed, or is
            running.
        DamagedStateError: on entering, if its last checkpoint cannot be read.
        StorageUnavailableError: on entering, if the store does not answer; or if whoever works on a
            stalled run is stopped in the middle of a transaction, which holds a lock.
    """
    return Recording(Resumption(run_id, stalled_after), None, backend, heartbeat)


class Recording:
    """Records a run around a block or a function; see `record_run`."""

    def __init__(
        self,
        opening: Opening,
        inputs: Any,
        backend: StorageBackend | StorageConfig | str | None,
        heartbeat: float | None,
    ) -> None:
        self._opening = opening
        self._inputs = inputs
        self._backend = backend
        self._heartbeat = valid_interval(heartbeat)
        self._opened: Opened | None = None
        self._stack = contextlib.ExitStack()
        self._stop_heartbeats: Callable[[], None] = lambda: None

    def __call__(self, function: _F) -> _F:
        """Record each call of a function as a run of its own."""
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError(
                f"{function.__qualname__} is a generator function, whose body runs after the "
                "call. Use `with record_run(...)` inside it."
            )
        if isinstance(self._opening, Beginning) and self._opening.run_id is not None:
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
                return None if run.waiting_for else run.outputs

            return recorded_async  # type: ignore[return-value]

        @functools.wraps(function)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            with recording(args, kwargs) as run:
                run.outputs = function(*args, **kwargs)
            return None if run.waiting_for else run.outputs

        return recorded  # type: ignore[return-value]

    def __enter__(self) -> RecordedRun:
        self._refuse_second_use()
        given = self._backend
        backend = given if isinstance(given, StorageBackend) else create_storage_backend(given)
        opened = self._enter(carried_out(self._opening.steps(backend, self._inputs)))
        try:
            self._keep_alive(opened)
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
        steps = self._opening.steps(backend, self._inputs)
        opening, cancelled = await _to_the_end(acarried_out(steps))
        if cancelled is not None:
            if opening.exception() is None:
                await _to_the_end(acarried_out(finished(*opening.result(), cancelled)))
            raise cancelled
        opened = self._enter(opening.result())
        try:
            self._keep_alive(opened)
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
    ) -> bool:
        opened = self._left()
        if opened is None:
            return False
        # The end can take a while.
        try:
            return carried_out(finished(*opened, exc))
        finally:
            self._stop_heartbeats()

    def leave(self, status: RunStatus) -> None:
        """Leave the block, and write nothing: whoever calls it tells the store what becomes of the run.

        Args:
            status: what the run is from now on.
        """
        opened = self._left()
        if opened is not None:
            opened.run.status = status
        self._stop_heartbeats()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> bool:
        opened = self._left()
        if opened is None:
            return False
        # A task that is cancelled while it ends still stores how it ended.
        ending, cancelled = await _to_the_end(acarried_out(finished(*opened, exc)))
        self._stop_heartbeats()
        swallows = ending.result()
        if cancelled is not None:
            raise cancelled
        return swallows

    def _enter(self, opened: Opened) -> Opened:
        self._opened = opened
        self._stack.enter_context(as_current(opened.run))
        return opened

    def _keep_alive(self, opened: Opened) -> None:
        if self._heartbeat is not None:
            run, writer = opened
            self._stop_heartbeats = keep_alive(run, self._heartbeat, writer.backend)

    def _left(self) -> Opened | None:
        """Return the run that the block is left of; None in a process that was forked inside it.

        Whoever leaves it there, by an exception or sys.exit(), leaves what is the parent's.
        """
        assert self._opened is not None
        self._stack.close()
        return None if self._opened.run.is_of_another_process else self._opened

    def _refuse_second_use(self) -> None:
        if self._opened is not None:
            raise RuntimeError("This recording was used already. Call record_run() again.")


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

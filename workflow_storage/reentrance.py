"""What keeps an operation of a store from beginning in the middle of another one, for the backends.

A signal handler, a log handler or a finalizer can run between any two lines of a thread, also
while a driver holds a lock or a transaction is half done. What it asks of the store then would
wait for that lock for ever, or join that transaction.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import threading
from asyncio.events import _get_running_loop
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

from workflow_storage.exceptions import ReentranceError

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

_P = ParamSpec("_P")
_R = TypeVar("_R")


class _OfThread(threading.local):
    def __init__(self) -> None:
        self.busy: set[tuple[Hashable, asyncio.Task[Any] | None]] = set()


_of_thread = _OfThread()


def refuses_reentrance(
    store_of: Callable[[Any], Hashable],
) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Let a method raise `ReentranceError` in the middle of another one of the same store.

    It tells them by thread, and by task within an event loop, where other tasks go on meanwhile.

    Args:
        store_of: returns what tells the store of an object that has the method.
    """

    def decorate(method: Callable[_P, _R]) -> Callable[_P, _R]:
        # Nothing can interrupt between `try` and its first line, and an exception that a signal
        # handler raises there still lets it be left.
        if inspect.iscoroutinefunction(method):

            @functools.wraps(method)
            async def guarded_async(*args: Any, **kwargs: Any) -> Any:
                here, busy = (store_of(args[0]), asyncio.current_task()), _of_thread.busy
                if here in busy:
                    raise ReentranceError
                try:
                    busy.add(here)
                    return await method(*args, **kwargs)
                finally:
                    busy.discard(here)

            return cast("Callable[_P, _R]", guarded_async)

        @functools.wraps(method)
        def guarded(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            # Without a loop in this thread there is no task, and asking for it raises an error.
            task = None if _get_running_loop() is None else asyncio.current_task()
            here, busy = (store_of(args[0]), task), _of_thread.busy
            if here in busy:
                raise ReentranceError
            try:
                busy.add(here)
                return method(*args, **kwargs)
            finally:
                busy.discard(here)

        return guarded

    return decorate

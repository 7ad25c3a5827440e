"""The threads in which the async methods of a database run beside each other.

Each has a connection of its own. `AsyncThreads` says where a call runs, for the repositories;
`ConnectedThreads` are the threads.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import os
import threading
import weakref
from asyncio.events import _get_running_loop, _set_running_loop
from collections import deque
from concurrent.futures import Executor, Future
from contextlib import suppress
from contextvars import ContextVar
from time import monotonic
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

from asgiref.sync import AsyncToSync, sync_to_async
from django.db import connections

from workflow_storage.backends.orm.connections import in_callers_transaction
from workflow_storage.backends.orm.own_connection import (
    in_place,
    in_transaction_of_test,
    make_own,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Mapping
    from concurrent.futures import ThreadPoolExecutor

    from django.db.backends.base.base import BaseDatabaseWrapper

_P = ParamSpec("_P")
_R = TypeVar("_R")

ASYNC_CONNECTIONS = 4
"""How many threads there are at most, unless the configuration says otherwise."""

IDLE_TIMEOUT = 10.0
"""Seconds after which a thread that has nothing to do closes its connection and ends."""

CLOSING_TIMEOUT = 10.0
"""Seconds that the end of an event loop, or of the process, waits for calls that are under way."""

_borrowing = threading.RLock()
"""Drivers want a connection to be used by one thread at a time."""

_of_thread = threading.local()


_callers: ContextVar[Mapping[str, BaseDatabaseWrapper]] = ContextVar(
    "workflow_storage_callers", default=MappingProxyType({})
)
"""By alias, the connection on which a thread of this context was in a transaction last."""


class AsyncThreads:
    """Where the async methods of a database run.

    Args:
        alias: the database's name in DATABASES.
        size: how many threads there are at most.
        own_connection: whether what is written is never to join the caller's transaction.
    """

    def __init__(
        self, alias: str, size: int = ASYNC_CONNECTIONS, *, own_connection: bool = False
    ) -> None:
        self._alias = alias
        self._own_connection = own_connection
        self._threads = ConnectedThreads(alias, size)
        self._loops: dict[asyncio.AbstractEventLoop, AsyncGenerator[None] | None] = {}
        _all_threads.add(self)

    async def run(self, call: Callable[_P, _R], /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        """Return what a call returns that is carried out in a thread.

        That is the thread of the sync code that the event loop serves, if there is one: its
        transaction is joined there. Otherwise it is one of the store's own threads; if the thread
        of the loop began a transaction before the loop, the call borrows its connection.

        A task that is cancelled does not wait any longer; what has begun goes on to its end.
        """
        loop = asyncio.get_running_loop()
        if _serves_sync_code(loop):
            begun = threading.Event()
            try:
                return await sync_to_async(_noting, thread_sensitive=True)(
                    begun, call, *args, **kwargs
                )
            except RuntimeError:
                if begun.is_set():
                    raise
                # The sync code has gone on, and this is a task that it left behind.
        connection = _outside_the_loop(loop, self._alias)
        if self._is_to_be_joined(connection):
            call = functools.partial(_on_borrowed, connection, call)
        if loop not in self._loops:
            await self._close_at_the_end_of(loop)
        # It takes what an event loop takes, whatever its annotation says.
        executor = cast("ThreadPoolExecutor", self._threads)
        in_thread = sync_to_async(call, thread_sensitive=False, executor=executor)
        return await in_thread(*args, **kwargs)

    def call(self, call: Callable[_P, _R], /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        """Return what a call returns, for sync code that may run in a thread of anybody's.

        A thread that is in a transaction carries it out itself; one to which a library took the
        context of such a thread borrows the connection of that. Otherwise a thread that has the
        database open uses it, and any other leaves the call to one of the store's own threads, so
        that the many threads of a library need no connection each.
        """
        here = _here(self._alias)
        callers = _callers.get().get(self._alias)
        if here is not None and self._is_to_be_joined(here):
            if callers is not here:
                _callers.set({**_callers.get(), self._alias: here})
            with _borrowing:
                return call(*args, **kwargs)
        if here is not None and callers is here:
            # Its transaction is over; another one, such as one of the store's own, is nobody's.
            others = {alias: one for alias, one in _callers.get().items() if alias != self._alias}
            _callers.set(others)
            callers = None
        if callers is not None and self._is_to_be_joined(callers):
            return _on_borrowed(callers, call, *args, **kwargs)
        if here is not None:
            return call(*args, **kwargs)
        return self._threads.submit(call, *args, **kwargs).result()

    def _is_to_be_joined(self, connection: BaseDatabaseWrapper) -> bool:
        """Whether what is written belongs to the transaction that is open on a connection."""
        return in_transaction_of_test(connection) or (
            in_callers_transaction(connection) and not self._own_connection
        )

    def close(self) -> None:
        """Close the connections, once the calls that are under way have ended."""
        self._threads.close()

    def begin_anew(self) -> None:
        """Begin anew in a child process, where there are neither threads nor loops."""
        _inherited.append((self._loops, self._threads.begin_anew()))
        self._loops = {}

    async def _close_at_the_end_of(self, loop: asyncio.AbstractEventLoop) -> None:
        for known in [known for known in self._loops if known.is_closed()]:
            del self._loops[known]
        self._loops[loop] = end = self._end_of(loop)
        await anext(end)

    async def _end_of(self, loop: asyncio.AbstractEventLoop) -> AsyncGenerator[None]:
        """Wait for the end of a loop: `asyncio.run` and the like close every async generator then."""
        try:
            yield
        finally:
            # It stays known: what is called after this is left to the timeout of the threads.
            self._loops[loop] = None
            if not any(end for other, end in self._loops.items() if not other.is_closed()):
                await asyncio.to_thread(self.close)


class ConnectedThreads(Executor):
    """A few threads, started when they are needed, each with a connection to one database.

    A thread closes its connection and ends when it has been idle for `IDLE_TIMEOUT`, or is told to.
    They are daemons, so that the interpreter tells them before it waits for them.

    Args:
        alias: the database's name in DATABASES.
        size: how many threads there are at most.
    """

    def __init__(self, alias: str, size: int) -> None:
        self._alias = alias
        self._size = size
        self._connections: dict[threading.Thread, BaseDatabaseWrapper] = {}
        self.begin_anew()

    def begin_anew(self) -> object:
        """Begin without threads, in a child process.

        Returns:
            What belongs to the parent process, for the caller to keep.
        """
        inherited = self._connections
        self._changed = threading.Condition()
        self._calls: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._threads: list[threading.Thread] = []
        self._connections = {}
        self._idle = 0
        self._closings = 0
        return inherited

    def submit(self, call: Callable[_P, _R], /, *args: _P.args, **kwargs: _P.kwargs) -> Future[_R]:
        """Let a thread carry out a call, after those that were submitted before."""
        future: Future[_R] = Future()
        with self._changed:
            if self._idle <= len(self._calls) and len(self._threads) < self._size:
                self._start_thread()
            self._calls.append((future, functools.partial(call, *args, **kwargs)))
            self._changed.notify()
        return future

    def close(self) -> None:
        """Let the threads close their connections and end, once they have nothing to do.

        What is submitted afterwards is carried out by new ones. It waits for at most
        `CLOSING_TIMEOUT`.
        """
        with self._changed:
            self._closings += 1
            threads = list(self._threads)
            self._changed.notify_all()
        deadline = monotonic() + CLOSING_TIMEOUT
        for thread in threads:
            thread.join(max(0.0, deadline - monotonic()))

    def _start_thread(self) -> None:
        thread = threading.Thread(
            target=self._work,
            args=[self._closings],
            name=f"workflow_storage {self._alias}",
            daemon=True,
        )
        thread.start()
        self._threads.append(thread)

    def _work(self, closings: int) -> None:
        while True:
            while (call := self._next_call(closings)) is not None:
                self._carry_out(*call)
                del call  # what it refers to is not kept while this waits
            with suppress(Exception):  # broken, and so as good as closed
                connections.close_all()
            with self._changed:
                # Not before it is closed: another thread may come in its place from now on.
                if not self._calls:
                    thread = threading.current_thread()
                    self._threads.remove(thread)
                    self._connections.pop(thread, None)
                    return

    def _carry_out(self, future: Future[Any], call: Callable[[], Any]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            connection = self._connection()
            try:
                result = call()
            finally:
                if _is_obsolete(connection):
                    connection.close()
        except BaseException as exc:
            future.set_exception(exc)
        else:
            future.set_result(result)

    def _connection(self) -> BaseDatabaseWrapper:
        """Return the connection of this thread, which nobody but the store uses."""
        thread = threading.current_thread()
        connection = self._connections.get(thread)
        if connection is None:
            connection = self._connections[thread] = connections[self._alias]
            make_own(connection)
        return connection

    def _next_call(self, closings: int) -> tuple[Future[Any], Callable[[], Any]] | None:
        """Return the next call, or None if there is none for long or the thread is told to end."""
        with self._changed:
            self._idle += 1
            self._changed.wait_for(
                lambda: self._calls or self._closings != closings, timeout=IDLE_TIMEOUT
            )
            self._idle -= 1
            return self._calls.popleft() if self._calls else None


def _here(alias: str) -> BaseDatabaseWrapper | None:
    """Return this thread's connection if it is open, and may be used: not where a loop runs."""
    if _get_running_loop() is not None:
        return None
    connection = connections[alias]
    return connection if connection.connection is not None else None


def _serves_sync_code(loop: asyncio.AbstractEventLoop) -> bool:
    """Whether `async_to_sync` waits for this in a thread of its caller."""
    return (
        getattr(AsyncToSync.executors, "current", None) is not None
        or loop in AsyncToSync.loop_thread_executors
    )


def _outside_the_loop(loop: asyncio.AbstractEventLoop, alias: str) -> BaseDatabaseWrapper:
    """Return the connection that this thread used before it ran the loop.

    In a loop Django gives a connection of its own to each task.
    """
    _set_running_loop(None)
    try:
        return connections[alias]
    finally:
        _set_running_loop(loop)


def _on_borrowed(
    connection: BaseDatabaseWrapper,
    call: Callable[_P, _R],
    /,
    *args: _P.args,
    **kwargs: _P.kwargs,
) -> _R:
    """Carry out a call on the connection of another thread, which waits for it."""
    with _borrowing:
        connection.inc_thread_sharing()
        _of_thread.borrows = True
        try:
            with in_place(connection.alias, connection):
                return call(*args, **kwargs)
        finally:
            _of_thread.borrows = False
            connection.dec_thread_sharing()


def borrows() -> bool:
    """Whether this thread uses the connection of another one, which may be in the middle of something.

    A savepoint would be in the way of that one's own, and a statement that it has not read to its
    end in the way of the savepoint.
    """
    return getattr(_of_thread, "borrows", False)


def _noting(
    begun: threading.Event, call: Callable[_P, _R], /, *args: _P.args, **kwargs: _P.kwargs
) -> _R:
    begun.set()
    return call(*args, **kwargs)


def _is_obsolete(connection: BaseDatabaseWrapper) -> bool:
    """Whether a connection is older than the project wants it.

    There are no requests here after which a CONN_MAX_AGE of 0, the default, could close it; with a
    pool, which wants that value, it goes back there after each call.
    """
    settings = connection.settings_dict
    if not settings["CONN_MAX_AGE"] and not settings["OPTIONS"].get("pool"):
        return False
    return connection.close_at is not None and monotonic() >= connection.close_at


_all_threads: weakref.WeakSet[AsyncThreads] = weakref.WeakSet()

_inherited: list[object] = []
"""What belongs to the parent process: to close a connection would end the parent's session."""


@atexit.register
def _close_all() -> None:
    for threads in list(_all_threads):
        threads.close()


def _begin_anew() -> None:
    for threads in list(_all_threads):
        threads.begin_anew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)

"""The connections to a Redis server or cluster, over which the repositories' operations go.

An operation is a generator, so that it is written once; here it is carried out, sync and async,
over redis-py's own client and pool of each server. Which server has what, `cluster` knows.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Generator
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar
from zlib import crc32

import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError
from redis.retry import Retry

from workflow_storage.backends.redis.cluster import Cluster, Request, Step, Steps
from workflow_storage.backends.redis.errors import storage_error
from workflow_storage.backends.redis.permissions import checked
from workflow_storage.backends.redis.scripts import Call
from workflow_storage.exceptions import StorageError
from workflow_storage.reentrance import refuses_reentrance

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Sequence

    from workflow_storage.backends.redis.cluster import Command
    from workflow_storage.backends.redis.url import Address, RedisURL

_T = TypeVar("_T")

Operation: TypeAlias = Generator[Request, Any, _T]
"""Yields what it has to say to the store, is sent the reply, or thrown a `StorageError`."""


def _itself(store: RedisStore) -> RedisStore:
    return store


class RedisStore:
    """One Redis server or cluster, and the connections of this process to it.

    Attributes:
        url: what its URL says.
        name: the URL as it may be shown.
        prefix: what all keys begin with, in braces.
        wait_replicas: how many replicas have to confirm a write.
        wait_timeout: seconds that they have for it.
        cluster: which server has what.
        key_prefixes: what the keys of runs begin with, each in a slot of its own.
    """

    def __init__(self, url: RedisURL) -> None:
        self.url = url
        self.name = url.name
        self.prefix = url.prefix
        self.wait_replicas = url.wait_replicas
        self.wait_timeout = url.wait_timeout
        self.cluster = Cluster(url)
        self.key_prefixes = self.cluster.key_prefixes
        self._is_permitted = False
        self._clients: dict[Address, Any] = {}
        self._changing_clients = threading.Lock()
        self._by_loop: dict[asyncio.AbstractEventLoop, _LoopClients] = {}

    def key_prefix(self, run_id: str) -> str:
        """Return what the keys of a run begin with."""
        prefixes = self.key_prefixes
        return (
            prefixes[0] if len(prefixes) == 1 else prefixes[crc32(run_id.encode()) % len(prefixes)]
        )

    @refuses_reentrance(_itself)
    def execute(self, operation: Operation[_T]) -> _T:
        """Carry out an operation.

        Raises:
            ReentranceError: in the middle of another one of this thread or task.
            StorageError: what the operation raises; or `StorageUnavailableError`.
        """
        return self._carried_out(self._steps(operation))

    @refuses_reentrance(_itself)
    async def aexecute(self, operation: Operation[_T]) -> _T:
        """Async twin of `execute`."""
        clients = await self._of_this_loop()
        steps = self._steps(operation)
        try:
            step = next(steps)
            while True:
                if step.delay:
                    await asyncio.sleep(step.delay)
                cancellations = _cancellations()
                try:
                    replies = await clients.replies(step)
                    if _cancellations() > cancellations:
                        # asyncio.wait_for(), with which redis-py writes, loses some of them
                        # on Python 3.11: https://github.com/python/cpython/issues/81839
                        raise asyncio.CancelledError
                except RedisError as exc:
                    step = steps.throw(exc)
                else:
                    step = steps.send(replies)
        except StopIteration as stop:
            result: _T = stop.value
            return result

    def client(self, address: Address) -> Any:
        """Return the redis-py client of a server, which the threads of this process share."""
        client = self._clients.get(address)
        if client is None:
            with self._changing_clients:
                client = self._clients.get(address)
                if client is None:
                    client = self._clients[address] = _client(self.url, address)
        return client

    def servers(self) -> list[Any]:
        """Return the `client` of each server that holds runs, for checks and tests.

        Raises:
            StorageUnavailableError: if a cluster does not tell which they are.
        """
        try:
            return [self.client(one) for one in self._carried_out(self.cluster.holders())]
        except RedisError as exc:
            raise storage_error(exc, self.url) from exc

    def close(self) -> None:
        """Close the connections of this process that are not those of an event loop."""
        with self._changing_clients:
            clients = list(self._clients.values())
            self._clients.clear()
        for client in clients:
            client.close()

    def _steps(self, operation: Operation[_T]) -> Steps[_T]:
        """Say step by step what an operation says to the servers."""
        if not self._is_permitted:
            try:
                yield from checked(self.cluster, self.url)
            except RedisError as exc:
                raise storage_error(exc, self.url) from exc
            self._is_permitted = True
        try:
            request = next(operation)
            while True:
                try:
                    try:
                        reply = yield from self.cluster.exchange(request)
                    except RedisError as exc:
                        raise storage_error(exc, self.url, _largest(request)) from exc
                except StorageError as exc:
                    request = operation.throw(exc)
                else:
                    request = operation.send(reply)
        except StopIteration as stop:
            result: _T = stop.value
            return result

    def _carried_out(self, steps: Steps[_T]) -> _T:
        try:
            step = next(steps)
            while True:
                if step.delay:
                    time.sleep(step.delay)
                try:
                    replies = self._replies(step)
                except RedisError as exc:
                    step = steps.throw(exc)
                else:
                    step = steps.send(replies)
        except StopIteration as stop:
            result: _T = stop.value
            return result

    def _replies(self, step: Step) -> list[Any]:
        """Send something to one server, and return its replies; errors that it says among them."""
        client = self.client(step.address)
        if len(step.commands) > 1:
            pipeline = _pipeline(client, step.commands)
            replies: list[Any] = pipeline.execute(raise_on_error=False)
            return replies
        try:
            return [client.execute_command(*step.commands[0])]
        except ResponseError as exc:
            return [exc]

    async def _of_this_loop(self) -> _LoopClients:
        loop = asyncio.get_running_loop()
        clients = self._by_loop.get(loop)
        if clients is None:
            for other in list(self._by_loop):
                if other.is_closed():
                    self._by_loop.pop(other, None)
            clients = self._by_loop[loop] = _LoopClients(
                self.url, lambda: self._by_loop.pop(loop, None)
            )
            await clients.open()
        return clients


class _LoopClients:
    """The clients of one event loop, by server; they are closed when the loop is.

    Args:
        url: what they are opened by.
        forget: is called when they are closed.
    """

    def __init__(self, url: RedisURL, forget: Callable[[], object]) -> None:
        self._url = url
        self._forget = forget
        self._clients: dict[Address, Any] = {}
        self._closing = self._closed_with_the_loop()

    async def open(self) -> None:
        """Begin to wait for the end of the loop."""
        await anext(self._closing)

    async def replies(self, step: Step) -> list[Any]:
        """Send something to one server, and return its replies; errors that it says among them."""
        client = self._clients.get(step.address)
        if client is None:
            client = self._clients[step.address] = _async_client(self._url, step.address)
        if len(step.commands) > 1:
            pipeline = _pipeline(client, step.commands)
            replies: list[Any] = await pipeline.execute(raise_on_error=False)
            return replies
        try:
            return [await client.execute_command(*step.commands[0])]
        except ResponseError as exc:
            return [exc]

    async def _closed_with_the_loop(self) -> AsyncGenerator[None, None]:
        # A loop that ends closes the asynchronous generators that wait in it, and nothing else
        # tells that it ends; see loop.shutdown_asyncgens() and asyncio.run().
        try:
            yield
        finally:
            self._forget()
            for client in self._clients.values():
                await client.aclose()


# A write that is sent again could be written twice, so redis-py is told not to try again. The
# pool is the client's own, and closed with it.


def _client(url: RedisURL, address: Address) -> Any:
    return redis.Redis.from_pool(url.pool(redis, address, Retry(NoBackoff(), 0)))


def _async_client(url: RedisURL, address: Address) -> Any:
    pool = url.pool(redis.asyncio, address, AsyncRetry(NoBackoff(), 0))
    return redis.asyncio.Redis.from_pool(pool)


def _largest(request: Request) -> int:
    """Return the length of the longest text in a request."""
    requests = [request] if isinstance(request, Call) else request
    parts = itertools.chain.from_iterable(
        one.args if isinstance(one, Call) else one for one in requests
    )
    return max((len(part) for part in parts if isinstance(part, str | bytes)), default=0)


def _pipeline(client: Any, commands: Sequence[Command]) -> Any:
    pipeline = client.pipeline(transaction=False)
    for command in commands:
        pipeline.execute_command(*command)
    return pipeline


def _cancellations() -> int:
    """Return how often the current task has been cancelled."""
    task = asyncio.current_task()
    return 0 if task is None else task.cancelling()

"""The connection to a Redis server or cluster, sync and async, for backends/redis.py.

Each server is spoken to by redis-py's own client and pool. Which server of a cluster has a
run is found out here: redis-py's clients for clusters send a write again after a connection
was lost, which can write it twice; have no way to WAIT on the connection that wrote; and the
asynchronous one closes the connections of all tasks when a slot has moved.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import re
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import parse_qsl, urlencode, urlsplit
from zlib import crc32

from workflow_storage.config import without_password
from workflow_storage.exceptions import (
    StorageError,
    StorageUnavailableError,
    UnsupportedBackendError,
)

try:
    import redis
    import redis.asyncio
except ImportError as exc:
    raise StorageError(
        "redis-py is not installed. Run: pip install 'django-workflow-storage[redis]'"
    ) from exc

from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.connection import parse_url
from redis.crc import key_slot
from redis.exceptions import (
    AskError,
    ClusterError,
    DataError,
    MovedError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)
from redis.retry import Retry

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator, Iterator, Sequence

    from workflow_storage.backends.redis.scripts import Script

_T = TypeVar("_T")

CLUSTER_BASES = 16
"""Hash slots that the runs are spread over in a cluster, evenly over all slots there are."""

_SLOTS = 16384
_Address = tuple[str, int]
_CLUSTER_SCHEMES = {"redis+cluster": "redis", "rediss+cluster": "rediss"}
_PREFIX = re.compile(r"[\w.:-]{1,100}")
_DEFAULTS: dict[str, Any] = {"socket_connect_timeout": 5.0, "socket_timeout": 20.0, "protocol": 2}
_REDIRECTIONS = 16

# What a URL can say to redis-py; the rest of what its connections take is objects, or would
# change what is stored.
_OPTIONS = {
    "client_name",
    "db",
    "health_check_interval",
    "max_connections",
    "password",
    "protocol",
    "socket_connect_timeout",
    "socket_keepalive",
    "socket_timeout",
    "ssl_ca_certs",
    "ssl_ca_data",
    "ssl_ca_path",
    "ssl_cert_reqs",
    "ssl_certfile",
    "ssl_check_hostname",
    "ssl_ciphers",
    "ssl_keyfile",
    "ssl_min_version",
    "ssl_password",
    "timeout",
    "username",
}
_SECONDS = {
    "health_check_interval": (0, 86_400),
    "socket_connect_timeout": (0.001, 86_400),
    "socket_timeout": (0.001, 86_400),
    "timeout": (0, 86_400),
}
# A command on several keys is refused while some of them are being moved to another node.
_TRY_AGAIN = 0.05  # seconds
_TRY_AGAIN_TIMES = 200
_MAX_CONNECTIONS = 50

# What a server says that cannot serve now: redis-py makes classes of some of it.
_CANNOT_SERVE = (ClusterError, OutOfMemoryError, ReadOnlyError, AskError, TryAgainError)
_UNAVAILABLE = re.compile(
    r"\b(OOM|LOADING|MISCONF|NOREPLICAS|MASTERDOWN|CLUSTERDOWN|TRYAGAIN|READONLY|BUSY)\b"
)


class Call(NamedTuple):
    """A script with its keys, all in one slot, and its arguments."""

    script: Script
    keys: tuple[str, ...]
    args: tuple[Any, ...]


class RedisStore:
    """One Redis server or cluster, and where in it the runs are.

    An operation on it is a generator that yields what it has to say to the server, a `Call` or
    a list of reads (calls and commands), and gets the reply, or the list of them. So each operation is written
    once, for `run` and for `arun`.

    Args:
        url: ``redis://``, ``rediss://`` (TLS), ``unix://``, or ``redis+cluster://`` and
            ``rediss+cluster://`` with one or several nodes, comma-separated. Parameters are
            those of redis-py, and ``prefix``, ``wait_replicas`` and ``wait_timeout`` (seconds).

    Raises:
        UnsupportedBackendError: if the URL cannot be read, or a parameter is unknown.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.name = without_password(url)
        parts = urlsplit(url)
        self.is_cluster = parts.scheme in _CLUSTER_SCHEMES
        pairs = parse_qsl(parts.query, keep_blank_values=True)
        parameters = dict(pairs)
        if len(parameters) < len(pairs):
            raise self._refused("a parameter is there twice")
        self.prefix = parameters.pop("prefix", "workflow_storage")
        if not _PREFIX.fullmatch(self.prefix):
            raise self._refused("prefix takes letters, digits and any of . : _ -")
        self.wait_replicas = int(self._number(parameters, "wait_replicas", 0))
        self.wait_timeout = self._number(parameters, "wait_timeout", 2.0)
        if parts.fragment or "@" in parts.query or "@" in parts.netloc.rpartition("@")[0]:
            raise self._refused("a user or a password holds a character that has to be quoted")
        # An unknown name is not shown, for it may be a part of a password.
        parameters.pop("decode_responses", None)
        if parameters.keys() - _OPTIONS:
            known = ", ".join(sorted({*_OPTIONS, "prefix", "wait_replicas", "wait_timeout"}))
            raise self._refused(f"a parameter is unknown; there are {known}")
        self._options, self._nodes = self._parsed(url, parameters)
        if self.wait_timeout == 0:
            raise self._refused("wait_timeout is 0, which would wait without end")
        if self.wait_replicas and self.wait_timeout >= (self._options["socket_timeout"] or 1e9):
            raise self._refused("wait_timeout has to be less than socket_timeout")
        self.bases = self._bases()
        self._lock = threading.Lock()
        self._clients: dict[_Address, Any] = {}
        self._known: list[_Address] = []
        self._owners: dict[int, _Address] = {}
        self._doubtful: _Address | None = None
        self._async: dict[asyncio.AbstractEventLoop, _AsyncClients] = {}
        self._validate()

    def base(self, run_id: str) -> str:
        """Give what the keys of a run begin with."""
        bases = self.bases
        return bases[0] if len(bases) == 1 else bases[crc32(run_id.encode()) % len(bases)]

    def run(self, operation: Generator[Any, Any, _T]) -> _T:
        """Carry out an operation.

        Raises:
            StorageError: what the operation raises; or `StorageUnavailableError`.
        """
        try:
            request = next(operation)
            while True:
                try:
                    reply = self._exchanged(request)
                except StorageError as exc:
                    request = operation.throw(exc)
                else:
                    request = operation.send(reply)
        except StopIteration as stop:
            result: _T = stop.value
            return result

    async def arun(self, operation: Generator[Any, Any, _T]) -> _T:
        """Async twin of `run`."""
        try:
            request = next(operation)
            while True:
                try:
                    reply = await self._aexchanged(request)
                except StorageError as exc:
                    request = operation.throw(exc)
                else:
                    request = operation.send(reply)
        except StopIteration as stop:
            result: _T = stop.value
            return result

    def error(self, exc: Exception) -> StorageError:
        """Give the error of the contract for an error of redis-py."""
        text = " ".join(str(exc).split()).rstrip(".") or type(exc).__name__
        password = self._options.get("password")
        if password and len(password) > 3:
            text = text.replace(password, "***")
        if isinstance(exc, MovedError | AskError) and not self.is_cluster:
            return StorageError(
                f"The Redis server {self.name} is part of a cluster: {text}. "
                "Use a URL that begins with redis+cluster://"
            )
        if self.is_cluster and "cluster support disabled" in text:
            return StorageError(
                f"The Redis server {self.name} is no cluster. Use a URL that begins with redis://"
            )
        if isinstance(exc, DataError) or (
            isinstance(exc, ResponseError)
            and not isinstance(exc, _CANNOT_SERVE)
            and not _UNAVAILABLE.search(text)
        ):
            return StorageError(f"The Redis server {self.name} refused the operation: {text}")
        if isinstance(exc, OutOfMemoryError) or "OOM" in text:
            advice = "Raise maxmemory, or delete finished runs with runs.delete_finished()."
        else:
            advice = "Check that the server runs and that the URL is right."
        return StorageUnavailableError(
            f"The Redis server {self.name} is unavailable: {text}. {advice}"
        )

    def close(self) -> None:
        """Close the connections of this process that are not those of an event loop."""
        with self._lock:
            clients = list(self._clients.values())
            self._clients.clear()
        for client in clients:
            client.close()

    def servers(self) -> list[Any]:
        """Give a redis-py client for each server that holds runs, for checks and tests.

        Raises:
            StorageUnavailableError: if a cluster does not tell which they are.
        """
        if not self.is_cluster:
            return [self._client(self._nodes[0])]
        self._carried_out(self._discovery())
        return [self._client(address) for address in sorted(set(self._owners.values()))]

    def durability(self) -> list[tuple[str, bool | None, str | None]]:
        """Ask each server whether it outlives a restart, and what it does when it is full.

        Returns:
            For each that answers within a second: its address, whether it has an append-only
            file or snapshots, its maxmemory-policy; None for what it does not tell.
        """
        found: list[tuple[str, bool | None, str | None]] = []
        quick = RedisStore(self.url)
        quick._options |= {"socket_connect_timeout": 1.0, "socket_timeout": 1.0}
        try:
            for server in quick.servers():
                options = server.connection_pool.connection_kwargs
                address = (
                    options.get("path")
                    or f"{options.get('host', 'localhost')}:{options.get('port', 6379)}"
                )
                with suppress(RedisError):
                    found.append((address, *_durability(server)))
        except (RedisError, StorageError):
            pass
        finally:
            quick.close()
        return found

    # What to say to which server.

    def _exchange(self, request: Any) -> Generator[_Step, list[Any], Any]:
        """Say what to send to which server, until there is a reply to all of a request."""
        requests = [request] if isinstance(request, Call) else request
        pending = [_Pending(one) for one in requests]
        waiting = list(pending)
        delays = itertools.repeat(_TRY_AGAIN, _TRY_AGAIN_TIMES)
        delay = 0.0
        for _ in range(_REDIRECTIONS + _TRY_AGAIN_TIMES):
            groups: dict[_Address, list[_Pending]] = {}
            for one in waiting:
                address = one.asked or (yield from self._owner(one.request))
                groups.setdefault(address, []).append(one)
            for address, group in groups.items():
                yield from self._round(address, group, delay)
                delay = 0.0
            waiting = [one for one in waiting if isinstance(one.reply, Exception)]
            if not waiting:
                replies = [one.reply for one in pending]
                return replies[0] if isinstance(request, Call) else replies
            for one in waiting:
                if isinstance(one.reply, TryAgainError):
                    delay = delay or next(delays, 0.0)
                    if not delay:
                        raise one.reply
        raise ClusterError("it is being changed, and redirects without end")

    def _round(
        self, address: _Address, group: list[_Pending], delay: float
    ) -> Generator[_Step, list[Any], None]:
        """Send some of a request to one server, and see what is to be sent again."""
        sent: list[tuple[Any, ...]] = []
        for one in group:
            sent += [("ASKING",)] * (one.asked is not None) + [one.command]
        waits = self.wait_replicas > 0 and any(one.may_write for one in group)
        got, replicas = yield from self._sent(_Step(address, sent, delay), waits=waits)
        for one in group:
            if one.asked is not None:
                next(got)
            one.asked, one.reply = None, next(got)
            if isinstance(one.reply, NoScriptError):
                one.command = _by_source(one.request)
            elif isinstance(one.reply, Exception):
                if not isinstance(one.reply, TryAgainError):
                    one.asked = self._redirected(one.request, address, one.reply)
            elif one.wrote and (isinstance(replicas, Exception) or replicas < self.wait_replicas):
                # Of a server that writes nothing, as it has become a replica, WAIT is an error.
                raise self._not_confirmed(replicas)

    def _redirected(self, request: Any, address: _Address, reply: Exception) -> _Address | None:
        """Give the server that a server says to ask this once; None if it is to be for good.

        Raises:
            RedisError: if it says something else.
        """
        if self.is_cluster and isinstance(reply, AskError):  # MovedError is one
            # An empty host is that of the server which says so.
            other = reply.host or address[0], int(reply.port)
            if not isinstance(reply, MovedError):
                return other
            with self._lock:
                self._owners = {**self._owners, _slot(request): other}
            return None
        # It may say so because another node has taken over.
        self._forget(address)
        raise reply

    def _sent(
        self, step: _Step, *, waits: bool
    ) -> Generator[_Step, list[Any], tuple[Iterator[Any], Any]]:
        """Send something to one server, and wait until its replicas have it.

        Returns:
            The replies, and how many replicas have it, or the error that says why that is
            not known.
        """
        if waits:
            wait = ("WAIT", self.wait_replicas, math.ceil(self.wait_timeout * 1000))
            step = step._replace(commands=[*step.commands, wait])
        try:
            replies = yield step
        except RedisError:
            # Another node may have taken over; the next operation asks which.
            self._forget(step.address)
            raise
        if not waits:
            return iter(replies), math.inf
        *replies, replicas = replies
        return iter(replies), replicas

    def _not_confirmed(self, replicas: Any) -> Exception:
        if isinstance(replicas, Exception):
            return replicas
        return StorageUnavailableError(
            f"The Redis server {self.name} wrote it, but {replicas} of {self.wait_replicas} "
            f"replicas confirmed that within {self.wait_timeout} seconds, so a failover can lose "
            "it. Check the replicas, and what is stored."
        )

    def _forget(self, address: _Address) -> None:
        """Forget which slots a server serves, and ask it last about others."""
        with self._lock:
            self._owners = {slot: at for slot, at in self._owners.items() if at != address}
        self._doubtful = address

    def _owner(self, request: Any) -> Generator[_Step, list[Any], _Address]:
        """Give the server that a request goes to."""
        if not self.is_cluster:
            return self._nodes[0]
        slot = _slot(request)
        owner = self._owners.get(slot)
        if owner is None:
            # Another thread may forget it again at once.
            owner = (yield from self._discovery()).get(slot)
        if owner is None:
            raise ClusterError(f"no node of the cluster serves slot {slot}")
        return owner

    def _discovery(self) -> Generator[_Step, list[Any], dict[int, _Address]]:
        """Ask the nodes which of them serve the slots of the bases, until one knows all."""
        error: Exception | None = None
        owners: dict[int, _Address] = {}
        slots = [key_slot(base.encode()) for base in self.bases]
        addresses = dict.fromkeys([*self._known, *self._nodes])
        for address in sorted(addresses, key=lambda address: address == self._doubtful):
            try:
                (reply,) = yield _Step(address, [("CLUSTER", "SLOTS")], 0.0)
            except RedisError as exc:
                error = exc
                continue
            if isinstance(reply, Exception):
                error = reply
                continue
            # https://redis.io/docs/latest/commands/cluster-slots/; an empty host is this one.
            ranges = [
                (first, last, ((host or b"").decode() or address[0], port))
                for first, last, (host, port, *_), *_ in reply
            ]
            found = {
                slot: owner
                for slot in slots
                for first, last, owner in ranges
                if first <= slot <= last
            }
            # A node that has not joined the cluster, or was taken out of it, knows none.
            if len(found) > len(owners):
                owners = found
                self._known = [owner for _, _, owner in ranges]
            if len(found) == len(slots):
                break
        if not owners and error is not None:
            raise error
        with self._lock:
            self._owners = owners
        return owners

    # Sending it, sync and async. A write that is sent again could be written twice, so
    # redis-py is told not to try again.

    def _exchanged(self, request: Any) -> Any:
        try:
            return self._carried_out(self._exchange(request))
        except RedisError as exc:
            raise self.error(exc) from exc

    def _carried_out(self, steps: Generator[_Step, list[Any], _T]) -> _T:
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

    def _replies(self, step: _Step) -> list[Any]:
        client = self._client(step.address)
        if len(step.commands) > 1:
            replies: list[Any] = _pipeline(client, step.commands).execute(raise_on_error=False)
            return replies
        try:
            return [client.execute_command(*step.commands[0])]
        except ResponseError as exc:
            return [exc]

    async def _aexchanged(self, request: Any) -> Any:
        clients = await self._aopened()
        steps = self._exchange(request)
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
            return stop.value
        except RedisError as exc:
            raise self.error(exc) from exc

    def _client(self, address: _Address) -> Any:
        client = self._clients.get(address)
        if client is None:
            with self._lock:
                client = self._clients.get(address)
                if client is None:
                    client = self._open(redis, address, Retry(NoBackoff(), 0))
                    self._clients[address] = client
        return client

    async def _aopened(self) -> _AsyncClients:
        loop = asyncio.get_running_loop()
        clients = self._async.get(loop)
        if clients is None:
            for other in list(self._async):
                if other.is_closed():
                    self._async.pop(other, None)
            clients = self._async[loop] = _AsyncClients(self, loop)
            await anext(clients.closing)
        return clients

    def _open(self, module: Any, address: _Address, retry: Any) -> Any:
        """Open a client of redis-py, or of redis.asyncio."""
        options = {"max_connections": _MAX_CONNECTIONS, **self._options}
        if self.is_cluster:
            options["host"], options["port"] = address
        if "connection_class" in options:
            # The URL's parser gives the synchronous one.
            options["connection_class"] = getattr(module, options["connection_class"].__name__)
        pool = module.BlockingConnectionPool(retry=retry, **options)
        # The pool is the client's own, and closed with it.
        return module.Redis.from_pool(pool)

    # The URL.

    def _parsed(
        self, url: str, parameters: dict[str, str]
    ) -> tuple[dict[str, Any], list[_Address]]:
        """Give the options for redis-py, and the nodes of a cluster."""
        parts = urlsplit(url)
        scheme = _CLUSTER_SCHEMES.get(parts.scheme, parts.scheme)
        credentials, at, hosts = parts.netloc.rpartition("@")
        nodes: list[_Address] = []
        for node in hosts.split(",") if scheme != "unix" else ():
            try:
                node_parts = urlsplit(f"//{node}")
                nodes.append((node_parts.hostname or "", node_parts.port or 6379))
                nodes[-1][0].encode("idna")
            except ValueError:  # UnicodeError is one
                # Not chained: the parser's message can quote a part of the password.
                raise self._refused("a host, or its port, cannot be read") from None
        if len(nodes) > 1 and not self.is_cluster:
            raise self._refused("several nodes need redis+cluster://")
        if self.is_cluster and not all(host for host, _ in nodes):
            raise self._refused("a node has no host")
        try:
            first, *_ = hosts.split(",")
            query = urlencode(parameters)
            options: dict[str, Any] = parse_url(  # type: ignore[no-untyped-call]
                f"{scheme}://{credentials}{at}{first}{parts.path}?{query}"
            )
            if scheme != "unix" and parts.path.strip("/") and "db" not in options:
                raise ValueError("behind the host there can only be the number of a database")
            if self.is_cluster and options.pop("db", 0):
                raise ValueError("a cluster has no numbered databases")
        except ValueError as exc:
            # The parser's messages quote no part of a URL but the name of a parameter.
            raise self._refused(str(exc)) from None
        for name, (least, most) in _SECONDS.items():
            if not least <= options.get(name, least) <= most:
                raise self._refused(f"{name} takes seconds from {least} to {most}")
        return {**_DEFAULTS, **options}, nodes or [("", 0)]

    def _validate(self) -> None:
        """Let redis-py refuse what it cannot use, before anything is sent."""
        try:
            pool = self._open(redis, self._nodes[0], Retry(NoBackoff(), 0)).connection_pool
            pool.connection_class(**pool.connection_kwargs)
        except (TypeError, ValueError, RedisError) as exc:
            raise self._refused(str(exc)) from None

    def _number(self, parameters: dict[str, str], name: str, default: float) -> float:
        text = parameters.pop(name, None)
        if text is None:
            return default
        if not re.fullmatch(r"\d{1,4}" if isinstance(default, int) else r"\d{1,4}(\.\d+)?", text):
            raise self._refused(f"{name} is no number: {text!r}")
        return float(text)

    def _refused(self, reason: str) -> UnsupportedBackendError:
        return UnsupportedBackendError(
            f"The Redis URL {self.name!r} cannot be used: {reason}. Write "
            "redis://user:password@host:6379/0?prefix=name, rediss:// for TLS, unix:///path, or "
            "redis+cluster://host:port,host:port; special characters in the user and the "
            "password are quoted with urllib.parse.quote(value, safe='')."
        )

    def _bases(self) -> list[str]:
        if not self.is_cluster:
            return [f"{{{self.prefix}}}"]
        bases: dict[int, str] = {}
        number = 0
        while len(bases) < CLUSTER_BASES:
            base = f"{{{self.prefix}:{number}}}"
            bases.setdefault(key_slot(base.encode()) * CLUSTER_BASES // _SLOTS, base)
            number += 1
        return [bases[place] for place in sorted(bases)]


class _AsyncClients:
    """The clients of one event loop; they are closed when the loop is."""

    def __init__(self, store: RedisStore, loop: asyncio.AbstractEventLoop) -> None:
        self._store = store
        self._loop = loop
        self._clients: dict[_Address, Any] = {}
        self.closing = self._closing()

    async def replies(self, step: _Step) -> list[Any]:
        """Send something to one server, and give its replies; errors that it says among them."""
        client = self._clients.get(step.address)
        if client is None:
            client = self._store._open(redis.asyncio, step.address, AsyncRetry(NoBackoff(), 0))
            self._clients[step.address] = client
        if len(step.commands) > 1:
            replies: list[Any] = await _pipeline(client, step.commands).execute(
                raise_on_error=False
            )
            return replies
        try:
            return [await client.execute_command(*step.commands[0])]
        except ResponseError as exc:
            return [exc]

    async def _closing(self) -> AsyncGenerator[None, None]:
        # A loop that ends closes the asynchronous generators that wait in it, and nothing else
        # tells that it ends; see loop.shutdown_asyncgens() and asyncio.run().
        try:
            yield
        finally:
            self._store._async.pop(self._loop, None)
            for client in self._clients.values():
                await client.aclose()


class _Pending:
    """A part of a request, what is sent for it, and the reply."""

    def __init__(self, request: Any) -> None:
        self.request = request
        self.command: tuple[Any, ...] = _by_sha(request) if isinstance(request, Call) else request
        self.asked: _Address | None = None
        """The server to ask this once, in place of that which the slot belongs to."""
        self.reply: Any = None

    @property
    def may_write(self) -> bool:
        return isinstance(self.request, Call) and self.request.script.wrote is not None

    @property
    def wrote(self) -> bool:
        return self.may_write and self.request.script.wrote(self.reply)


class _Step(NamedTuple):
    """What to send next, to which server, and how many seconds to wait before."""

    address: _Address
    commands: Sequence[tuple[Any, ...]]
    delay: float


def _durability(server: Any) -> tuple[bool | None, str | None]:
    memory, persistence = server.info("memory"), server.info("persistence")
    persists: bool | None = True if persistence.get("aof_enabled") else None
    if persists is None:
        # Where CONFIG is not allowed, as on some hosted servers, nobody can tell.
        with suppress(ResponseError):
            persists = bool(server.config_get("save").get("save"))
    return persists, memory.get("maxmemory_policy")


def _cancellations() -> int:
    """Give how often the current task has been cancelled."""
    task = asyncio.current_task()
    return 0 if task is None else task.cancelling()


def _pipeline(client: Any, commands: Sequence[tuple[Any, ...]]) -> Any:
    pipeline = client.pipeline(transaction=False)
    for command in commands:
        pipeline.execute_command(*command)
    return pipeline


def _slot(request: Any) -> int:
    """Give the hash slot of a call, or of a command, whose key is its first argument."""
    key = request.keys[0] if isinstance(request, Call) else request[1]
    return int(key_slot(key.encode()))


def _by_sha(call: Call) -> tuple[Any, ...]:
    return ("EVALSHA", call.script.sha, len(call.keys), *call.keys, *call.args)


def _by_source(call: Call) -> tuple[Any, ...]:
    return ("EVAL", call.script.source, len(call.keys), *call.keys, *call.args)

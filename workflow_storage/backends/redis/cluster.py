"""Which server has a run, in a cluster or behind Sentinel, and how it is asked until it answers.

For `connection`, which carries it out.

Nothing is sent from here: an exchange is a generator that yields each `Step`, what to say next to
which server, and is sent the replies, or thrown the error of the connection. So it is written
once for sync and async.

Each server is spoken to by redis-py's plain client, and the cluster is routed by this thin
layer, because the cluster clients of redis-py 8.1 (measured) send a pipeline again after a lost
connection whatever they are told about retries, which can write it twice; give a false
confirmation by WAIT after a redirection; and send ASKING on another connection of the pool than
the command after it, which blocks the moving of slots. To be looked at again with each release
of redis-py.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

from redis.crc import key_slot
from redis.exceptions import (
    AskError,
    ClusterError,
    MovedError,
    NoPermissionError,
    NoScriptError,
    ReadOnlyError,
    RedisError,
    TryAgainError,
)

from workflow_storage.backends.redis.errors import not_confirmed
from workflow_storage.backends.redis.scripts import Call

if TYPE_CHECKING:
    from collections.abc import Iterator

    from workflow_storage.backends.redis.url import Address, RedisURL

_T = TypeVar("_T")

Command: TypeAlias = tuple[Any, ...]
"""A command of Redis, with its arguments."""

Request: TypeAlias = Call | Sequence[Call | Command]
"""What is said at once: a script, or several scripts and reads."""

CLUSTER_KEY_PREFIXES = 16
"""Hash slots that the runs are spread over in a cluster, evenly over all slots there are."""

_SLOTS = 16384
_REDIRECTIONS = 16

# A command on several keys is refused while some of them are being moved to another node.
_TRY_AGAIN = 0.05  # seconds
_TRY_AGAIN_TIMES = 200


class Step(NamedTuple):
    """What to send next, to which server, and how many seconds to wait before."""

    address: Address
    commands: Sequence[Command]
    delay: float = 0.0


Steps: TypeAlias = Generator[Step, list[Any], _T]
"""What is carried out step by step, and its result."""


class Cluster:
    """The servers of a URL, and which of them has which slot; a single server has all.

    Attributes:
        key_prefixes: what the keys of runs begin with, each in a slot of its own.
        owners: the servers that are known to have the slots of these.
    """

    def __init__(self, url: RedisURL) -> None:
        self.key_prefixes = _key_prefixes(url)
        self.owners: Mapping[int, Address] = {}
        self._url = url
        self._only = None if url.is_cluster or url.master is not None else url.nodes[0]
        self._master: Address | None = None
        self._known: list[Address] = []
        self._doubtful: Address | None = None
        self._changing_owners = threading.Lock()

    def exchange(self, request: Request) -> Steps[Any]:
        """Say to which server to send what, until there is a reply to all of a request.

        Returns:
            The reply to a `Call`; the list of replies to a list.

        Raises:
            RedisError: if there is none.
            StorageUnavailableError: if too few replicas have confirmed it.
        """
        requests = [request] if isinstance(request, Call) else request
        pending = [_Pending(one) for one in requests]
        waiting = list(pending)
        delays = itertools.repeat(_TRY_AGAIN, _TRY_AGAIN_TIMES)
        delay = 0.0
        for _ in range(_REDIRECTIONS + _TRY_AGAIN_TIMES):
            groups: dict[Address, list[_Pending]] = {}
            for one in waiting:
                address = one.asked or self._only or (yield from self._owner(one.request))
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

    def holders(self) -> Steps[list[Address]]:
        """Return the servers that hold runs.

        Raises:
            RedisError: if a cluster does not tell which they are.
        """
        if self._only is not None:
            return [self._only]
        if self._url.master is not None:
            return [(yield from self._master_now())]
        return sorted(set((yield from self._discovery()).values()))

    def forget(self, address: Address) -> None:
        """Forget which slots a server has, and ask it last about others."""
        with self._changing_owners:
            self.owners = {slot: at for slot, at in self.owners.items() if at != address}
            if self._master == address:
                self._master = None
        self._doubtful = address

    def _round(self, address: Address, group: list[_Pending], delay: float) -> Steps[None]:
        """Send some of a request to one server, and see what is to be sent again."""
        sent: list[Command] = []
        for one in group:
            sent += [("ASKING",)] * (one.asked is not None) + [one.command]
        waits = self._url.wait_replicas > 0 and any(one.may_write for one in group)
        got, replicas = yield from self._sent(Step(address, sent, delay), waits=waits)
        for one in group:
            if one.asked is not None:
                next(got)
            one.asked, one.reply = None, next(got)
            if isinstance(one.reply, NoScriptError):
                one.command = one.request.by_source
            elif isinstance(one.reply, Exception):
                if not isinstance(one.reply, TryAgainError):
                    one.asked = self._redirected(one.request, address, one.reply)
            elif one.wrote:
                # On a server that has become a replica WAIT is an error, which is no matter to
                # what has written nothing.
                if isinstance(replicas, Exception):
                    raise replicas
                if replicas < self._url.wait_replicas:
                    raise not_confirmed(self._url, replicas)

    def _redirected(self, request: Any, address: Address, reply: Exception) -> Address | None:
        """Return the server that a server says to ask this once; None if it is to be for good.

        Raises:
            RedisError: if it says something else.
        """
        if self._url.is_cluster and isinstance(reply, AskError):  # MovedError is one
            # An empty host is that of the server which says so.
            other = reply.host or address[0], int(reply.port)
            if not isinstance(reply, MovedError):
                return other
            with self._changing_owners:
                self.owners = {**self.owners, _slot(request): other}
            return None
        # It may say so because another node has taken over.
        self.forget(address)
        raise reply

    def _sent(self, step: Step, *, waits: bool) -> Steps[tuple[Iterator[Any], Any]]:
        """Send something to one server, and wait until its replicas have it.

        Returns:
            The replies, and how many replicas have it, or the error that says why that is
            not known.
        """
        if waits:
            wait = ("WAIT", self._url.wait_replicas, math.ceil(self._url.wait_timeout * 1000))
            step = step._replace(commands=[*step.commands, wait])
        try:
            replies = yield step
        except RedisError:
            # Another node may have taken over; the next operation asks which.
            self.forget(step.address)
            raise
        if not waits:
            return iter(replies), math.inf
        *replies, replicas = replies
        return iter(replies), replicas

    def _owner(self, request: Call | Command) -> Steps[Address]:
        """Return the server that a request goes to."""
        if self._url.master is not None:
            return (yield from self._master_now())
        slot = _slot(request)
        owner = self.owners.get(slot)
        if owner is None:
            # Another thread may forget it again at once.
            owner = (yield from self._discovery()).get(slot)
        if owner is None:
            raise ClusterError(f"no node of the cluster serves slot {slot}")
        return owner

    def _master_now(self) -> Steps[Address]:
        """Return the master that Sentinel watches, as it is known, or else as Sentinel says."""
        master = self._master
        if master is None:
            master = self._master = yield from self._asked_sentinels()
        return master

    def _asked_sentinels(self) -> Steps[Address]:
        """Ask the sentinels in turn, until one knows the master, and that says it is.

        One that was cut off from the others may know one that is none any more
        (https://redis.io/docs/latest/develop/reference/sentinel-clients/).
        """
        name = self._url.master
        error: Exception = ClusterError(f"no sentinel knows a master called {name!r}")
        for sentinel in self._url.nodes:
            try:
                (reply,) = yield Step(sentinel, [("SENTINEL", "GET-MASTER-ADDR-BY-NAME", name)])
                if isinstance(reply, Exception):
                    raise reply
                if reply is None:
                    continue
                address = reply[0].decode(), int(reply[1])
                (role,) = yield Step(address, [("ROLE",)])
            except RedisError as exc:
                error = exc
                continue
            if isinstance(role, NoPermissionError):
                return address
            if not isinstance(role, Exception) and role[0] == b"master":
                return address
            error = ReadOnlyError(
                f"{address[0]}:{address[1]} is no master, as a sentinel says it is"
            )
        raise error

    def _discovery(self) -> Steps[Mapping[int, Address]]:
        """Ask the nodes which of them have the slots of the runs, until one knows all."""
        error: Exception | None = None
        owners: dict[int, Address] = {}
        slots = [key_slot(prefix.encode()) for prefix in self.key_prefixes]
        addresses = dict.fromkeys([*self._known, *self._url.nodes])
        for address in sorted(addresses, key=lambda address: address == self._doubtful):
            try:
                (reply,) = yield Step(address, [("CLUSTER", "SLOTS")])
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
        with self._changing_owners:
            self.owners = owners
        return owners


class _Pending:
    """A part of a request, what is sent for it, and the reply."""

    def __init__(self, request: Any) -> None:
        self.request = request
        self.command: Command = request.by_sha if isinstance(request, Call) else request
        self.asked: Address | None = None
        """The server to ask this once, in place of that which the slot belongs to."""
        self.reply: Any = None

    @property
    def may_write(self) -> bool:
        return isinstance(self.request, Call) and self.request.script.wrote is not None

    @property
    def wrote(self) -> bool:
        return self.may_write and self.request.script.wrote(self.reply)


def _slot(request: Call | Command) -> int:
    """Return the hash slot of a call, or of a command, whose key is its first argument."""
    key = request.keys[0] if isinstance(request, Call) else request[1]
    return int(key_slot(key.encode()))


def _key_prefixes(url: RedisURL) -> list[str]:
    if not url.is_cluster:
        return [f"{{{url.prefix}}}"]
    prefixes: dict[int, str] = {}
    number = 0
    while len(prefixes) < CLUSTER_KEY_PREFIXES:
        prefix = f"{{{url.prefix}:{number}}}"
        prefixes.setdefault(key_slot(prefix.encode()) * CLUSTER_KEY_PREFIXES // _SLOTS, prefix)
        number += 1
    return [prefixes[place] for place in sorted(prefixes)]

"""What a Redis URL says, and what is refused in one; for the door, which opens a store by it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.connection import parse_url
from redis.exceptions import RedisError
from redis.retry import Retry

from workflow_storage.config import without_password
from workflow_storage.exceptions import UnsupportedBackendError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from urllib.parse import SplitResult

Address = tuple[str, int]
"""Host and port of a server; that of a URL without any, as of a socket, is ``("", 0)``."""

# What redis-py calls them.
_PROTOCOLS = {"redis": "redis", "rediss": "rediss", "valkey": "redis", "valkeys": "rediss"}

_PREFIX = re.compile(r"[\w.:-]{1,100}")
_DEFAULTS: dict[str, Any] = {"socket_connect_timeout": 5.0, "socket_timeout": 20.0, "protocol": 2}
_MAX_CONNECTIONS = 50

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


_OURS = {"prefix", "wait_replicas", "wait_timeout", "sentinel_username", "sentinel_password"}


class _Refusal(ValueError):
    """Why a URL cannot be used."""


@dataclass(frozen=True)
class RedisURL:
    """What a URL says.

    Attributes:
        name: the URL as it may be shown.
        is_cluster: whether it is that of a cluster.
        nodes: the servers that it names; of a cluster there can be more, and those that Sentinel
            watches are others.
        options: what redis-py is told of each of them, the password among it.
        master: what Sentinel calls the master that the runs are on; None without Sentinel.
        sentinel_options: what redis-py is told of the sentinels.
        prefix: what all keys begin with, in braces.
        wait_replicas: how many replicas have to confirm a write.
        wait_timeout: seconds that they have for it.
    """

    name: str
    is_cluster: bool
    nodes: tuple[Address, ...]
    options: Mapping[str, Any] = field(repr=False)
    prefix: str = "workflow_storage"
    wait_replicas: int = 0
    wait_timeout: float = 2.0
    master: str | None = None
    sentinel_options: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def parse(cls, url: str) -> RedisURL:
        """Return what a URL says.

        Args:
            url: ``redis://``, ``rediss://`` (TLS), ``unix://``; ``redis+cluster://`` with one or
                several nodes, comma-separated; ``redis+sentinel://`` with sentinels, and behind
                them the name of the master. ``valkey`` and ``valkeys`` mean ``redis`` and
                ``rediss``. Parameters are those of redis-py, and ``prefix``, ``wait_replicas``,
                ``wait_timeout`` (seconds), ``sentinel_username`` and ``sentinel_password``.

        Raises:
            UnsupportedBackendError: if it cannot be read, or a parameter is unknown.
        """
        name = without_password(url)
        try:
            parsed = _parsed(url, name)
            _try_out(parsed)
        except _Refusal as exc:
            # Not chained: what the parsers say can quote a part of the password.
            raise UnsupportedBackendError(
                f"The Redis URL {name!r} cannot be used: {exc}. Write "
                "redis://user:password@host:6379/0?prefix=name, rediss:// for TLS, unix:///path, or "
                "redis+cluster://host:port,host:port, redis+sentinel://host:26379,host:26379/master; "
                "special characters in the user and the "
                "password are quoted with urllib.parse.quote(value, safe='')."
            ) from None
        return parsed

    def pool(self, module: Any, address: Address, retry: Any) -> Any:
        """Return a pool of connections to a server, of ``redis`` or of ``redis.asyncio``."""
        is_sentinel = self.master is not None and address in self.nodes
        told = self.sentinel_options if is_sentinel else self.options
        options = {"max_connections": _MAX_CONNECTIONS, **told}
        if self.is_cluster or self.master is not None:
            options["host"], options["port"] = address
        if "connection_class" in options:
            # The URL's parser gives the synchronous one.
            options["connection_class"] = getattr(module, options["connection_class"].__name__)
        return module.BlockingConnectionPool(retry=retry, **options)


def _parsed(url: str, name: str) -> RedisURL:
    try:
        parts = urlsplit(url)
    except ValueError:
        raise _Refusal("a host, or its port, cannot be read") from None
    protocol, _, servers = parts.scheme.partition("+")
    is_cluster, is_sentinel = servers == "cluster", servers == "sentinel"
    pairs = parse_qsl(parts.query, keep_blank_values=True)
    parameters = dict(pairs)
    if len(parameters) < len(pairs):
        raise _Refusal("a parameter is there twice")
    prefix = parameters.pop("prefix", RedisURL.prefix)
    if not _PREFIX.fullmatch(prefix):
        raise _Refusal("prefix takes letters, digits and any of . : _ -")
    wait_replicas = _number(parameters, "wait_replicas", RedisURL.wait_replicas)
    wait_timeout = _number(parameters, "wait_timeout", RedisURL.wait_timeout)
    if parts.fragment or "@" in parts.query or "@" in parts.netloc.rpartition("@")[0]:
        raise _Refusal("a user or a password holds a character that has to be quoted")
    # An unknown name is not shown, for it may be a part of a password.
    parameters.pop("decode_responses", None)
    of_sentinels = {
        name: parameters.pop(f"sentinel_{name}", None) for name in ("username", "password")
    }
    if any(of_sentinels.values()) and not is_sentinel:
        raise _Refusal("sentinel_username and sentinel_password need redis+sentinel://")
    if parameters.keys() - _OPTIONS:
        known = ", ".join(sorted({*_OPTIONS, *_OURS}))
        raise _Refusal(f"a parameter is unknown; there are {known}")
    nodes = _nodes(parts, can_be_several=is_cluster or is_sentinel)
    master, path = _master_of(parts.path) if is_sentinel else (None, parts.path)
    base = parts._replace(scheme=_PROTOCOLS.get(protocol, protocol), path=path)
    options = _options(base, parameters, is_cluster=is_cluster)
    if wait_timeout == 0:
        raise _Refusal("wait_timeout is 0, which would wait without end")
    if wait_replicas and wait_timeout >= (options["socket_timeout"] or 1e9):
        raise _Refusal("wait_timeout has to be less than socket_timeout")
    sentinel_options = {
        **{one: value for one, value in options.items() if one not in {"db", *of_sentinels}},
        **{one: value for one, value in of_sentinels.items() if value is not None},
    }
    return RedisURL(
        name,
        is_cluster,
        nodes,
        options,
        prefix,
        int(wait_replicas),
        wait_timeout,
        master,
        sentinel_options if is_sentinel else {},
    )


def _master_of(path: str) -> tuple[str, str]:
    """Return the name of the master in the path of a URL, and the rest, a database's number."""
    name, _, rest = path.strip("/").partition("/")
    if not name:
        raise _Refusal("behind the sentinels there has to be the name of the master")
    return unquote(name), f"/{rest}"


def _number(parameters: dict[str, str], name: str, default: float) -> float:
    text = parameters.pop(name, None)
    if text is None:
        return default
    if not re.fullmatch(r"\d{1,4}" if isinstance(default, int) else r"\d{1,4}(\.\d+)?", text):
        raise _Refusal(f"{name} is no number: {text!r}")
    return float(text)


def _nodes(parts: SplitResult, *, can_be_several: bool) -> tuple[Address, ...]:
    if parts.scheme == "unix":
        return (("", 0),)
    nodes: list[Address] = []
    for node in parts.netloc.rpartition("@")[2].split(","):
        try:
            node_parts = urlsplit(f"//{node}")
            default = 26379 if parts.scheme.endswith("+sentinel") else 6379
            nodes.append((node_parts.hostname or "", node_parts.port or default))
            nodes[-1][0].encode("idna")
        except ValueError:  # UnicodeError is one
            raise _Refusal("a host, or its port, cannot be read") from None
    if len(nodes) > 1 and not can_be_several:
        raise _Refusal("several nodes need redis+cluster:// or redis+sentinel://")
    if can_be_several and not all(host for host, _ in nodes):
        raise _Refusal("a node has no host")
    return tuple(nodes)


def _options(parts: SplitResult, parameters: dict[str, str], *, is_cluster: bool) -> dict[str, Any]:
    scheme = parts.scheme
    credentials, at, hosts = parts.netloc.rpartition("@")
    first, *_ = hosts.split(",")
    try:
        options: dict[str, Any] = parse_url(  # type: ignore[no-untyped-call]
            f"{scheme}://{credentials}{at}{first}{parts.path}?{urlencode(parameters)}"
        )
    except ValueError as exc:
        # The parser's messages quote no part of a URL but the name of a parameter.
        raise _Refusal(str(exc)) from None
    if scheme != "unix" and parts.path.strip("/") and "db" not in options:
        raise _Refusal("behind the host there can only be the number of a database")
    if is_cluster and options.pop("db", 0):
        raise _Refusal("a cluster has no numbered databases")
    for name, (least, most) in _SECONDS.items():
        if not least <= options.get(name, least) <= most:
            raise _Refusal(f"{name} takes seconds from {least} to {most}")
    return {**_DEFAULTS, **options}


def _try_out(url: RedisURL) -> None:
    """Let redis-py refuse what it cannot use, before anything is sent."""
    try:
        pool = url.pool(redis, url.nodes[0], Retry(NoBackoff(), 0))
        pool.connection_class(**pool.connection_kwargs)
    except (TypeError, ValueError, RedisError) as exc:
        raise _Refusal(str(exc)) from None

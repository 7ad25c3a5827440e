"""What ``manage.py check`` says about a Redis server or cluster, which is asked for a second."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from django.core.checks import CheckMessage, Warning
from redis.exceptions import RedisError, ResponseError

from workflow_storage.backends.redis.connection import RedisStore
from workflow_storage.exceptions import StorageError

if TYPE_CHECKING:
    from workflow_storage.backends.redis.url import RedisURL

_SECONDS = 1.0


class Durability(NamedTuple):
    """How a server keeps what it is given; None for what it does not tell."""

    address: str
    persists: bool | None
    """Whether it has an append-only file or snapshots, and so outlives a restart."""
    policy: str | None
    """Its maxmemory-policy: what it does when it is full."""


def check_durability(url: RedisURL) -> list[CheckMessage]:
    """Check how the servers keep what they are given; one that does not answer says nothing."""
    forgetful, evicting = [], []
    for address, persists, policy in durability(url):
        if persists is False:
            forgetful.append(address)
        if policy is not None and policy.startswith("allkeys-"):
            evicting.append(f"{address} ({policy})")
    messages: list[CheckMessage] = []
    if forgetful:
        messages.append(
            Warning(
                "Workflow runs are stored in Redis, which forgets them when it restarts: "
                f"{', '.join(forgetful)} has neither an append-only file nor snapshots.",
                hint="Set 'appendonly yes' (nothing acknowledged is older than a second when it "
                "is lost), or 'save' for snapshots.",
                id="workflow_storage.W004",
            )
        )
    if evicting:
        messages.append(
            Warning(
                "Workflow runs are stored in Redis, which deletes them when its memory is full: "
                f"{', '.join(evicting)}.",
                hint="Set 'maxmemory-policy noeviction'; writes then fail with an error instead.",
                id="workflow_storage.W005",
            )
        )
    return messages


def durability(url: RedisURL) -> list[Durability]:
    """Ask each server that answers within a second how it keeps what it is given."""
    options = {**url.options, "socket_connect_timeout": _SECONDS, "socket_timeout": _SECONDS}
    store = RedisStore(replace(url, options=options))
    found: list[Durability] = []
    try:
        for server in store.servers():
            with suppress(RedisError):
                found.append(_durability(server))
    except StorageError:
        pass
    finally:
        store.close()
    return found


def _durability(server: Any) -> Durability:
    options = server.connection_pool.connection_kwargs
    address = (
        options.get("path") or f"{options.get('host', 'localhost')}:{options.get('port', 6379)}"
    )
    memory, persistence = server.info("memory"), server.info("persistence")
    persists: bool | None = True if persistence.get("aof_enabled") else None
    if persists is None:
        # Where CONFIG is not allowed, as on some hosted servers, nobody can tell.
        with suppress(ResponseError):
            persists = bool(server.config_get("save").get("save"))
    return Durability(address, persists, memory.get("maxmemory_policy"))

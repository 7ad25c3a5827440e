"""What a Redis user has to be allowed, and whether it is, for `connection`.

A script that lacks a permission fails in its middle, and what it did before stays. So each store
tries out every command once, on keys of its own, before it does anything else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from redis.exceptions import NoPermissionError

from workflow_storage.backends.redis.cluster import Step
from workflow_storage.backends.redis.scripts import Call, script
from workflow_storage.exceptions import StorageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from workflow_storage.backends.redis.cluster import Cluster, Steps
    from workflow_storage.backends.redis.url import RedisURL

_TRIED: dict[str, tuple[str | int, ...]] = {
    "UNLINK": ("hash", "index"),
    "EXISTS": ("hash",),
    "HSET": ("hash", "field", 1),
    "HSETNX": ("hash", "field", 1),
    "HGET": ("hash", "field"),
    "HMGET": ("hash", "field"),
    "HINCRBY": ("hash", "field", 1),
    "HDEL": ("hash", "field"),
    "ZADD": ("index", 0, "entry"),
    "ZREM": ("index", "entry"),
    "ZLEXCOUNT": ("index", "-", "+"),
    "ZRANGEBYLEX": ("index", "-", "+", "LIMIT", 0, 1),
    "ZREVRANGEBYLEX": ("index", "+", "-", "LIMIT", 0, 1),
}
"""The commands of the scripts and of what is read without one, each as it is tried out."""

COMMANDS = ("EVAL", "EVALSHA", *_TRIED)
"""What a user has to be allowed on a single server."""

COMMANDS_OF_CLUSTERS = ("CLUSTER|SLOTS", "ASKING")
"""What it has to be allowed besides in a cluster."""


def _tried(name: str, arguments: Sequence[str | int]) -> str:
    keys = {"hash": "KEYS[1]", "index": "KEYS[2]"}
    written = (keys.get(str(one), repr(one)) for one in arguments)
    return f"try('{name}', {', '.join(written)})"


_UNLINK = _tried("UNLINK", _TRIED["UNLINK"])
_ALL = "\n".join(_tried(name, arguments) for name, arguments in _TRIED.items())
_TRY = """
-- Notes the name of a command that this user may not run. What else may go wrong, such as that this
-- is a replica, is no matter here.
local missing = {}
local function try(name, ...)
  local reply = redis.pcall(name, ...)
  local said = type(reply) == 'table' and reply.err
  if said and (string.find(said, 'permission') or string.find(said, "can't run this command")) then
    missing[#missing + 1] = name
  end
end
"""

PROBE = script(
    f"""
-- Returns the names of the commands that this user may not run; without UNLINK no others are tried.
{_UNLINK}
if #missing > 0 then return missing end
{_ALL}
{_UNLINK}
return missing
""",
    _TRY,
)


def checked(cluster: Cluster, url: RedisURL) -> Steps[None]:
    """Try out what the user of a URL has to be allowed, on each server.

    Raises:
        RedisError: if a server does not answer.
        StorageError: if something is missing.
    """
    probes = [
        Call(PROBE, (f"{prefix}:probe", f"{prefix}:probe_index"), ())
        for prefix in cluster.key_prefixes
    ]
    missing: dict[str, None] = {}
    for names in (yield from cluster.exchange(probes)):
        missing.update(dict.fromkeys(name.decode() for name in names))
    if url.wait_replicas:
        for address in (yield from cluster.holders()):
            (reply,) = yield Step(address, [("WAIT", 0, 1)])
            if isinstance(reply, NoPermissionError):
                missing["WAIT"] = None
    if missing:
        raise StorageError(_refusal(url, list(missing)))


def _refusal(url: RedisURL, missing: Sequence[str]) -> str:
    user: Any = url.options.get("username") or "default"
    grants = " ".join(f"+{name.lower()}" for name in missing)
    why = (
        "wait_replicas needs that"
        if list(missing) == ["WAIT"]
        else "without which a change would be left half-done"
    )
    return (
        f"The user {user!r} of the Redis server {url.name} may not run {', '.join(missing)}: {why}. "
        f"Allow it: ACL SETUSER {user} {grants}"
    )

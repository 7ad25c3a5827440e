"""The errors of redis-py as errors of the contract; `connection` raises no others."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from redis.exceptions import (
    AskError,
    ClusterError,
    DataError,
    MovedError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)

from workflow_storage.exceptions import StorageError, StorageUnavailableError

if TYPE_CHECKING:
    from workflow_storage.backends.redis.url import RedisURL

# What a server says that cannot serve now: redis-py makes classes of some of it.
_CANNOT_SERVE = (ClusterError, OutOfMemoryError, ReadOnlyError, AskError, TryAgainError)
_UNAVAILABLE = re.compile(
    r"\b(OOM|LOADING|MISCONF|NOREPLICAS|MASTERDOWN|CLUSTERDOWN|TRYAGAIN|READONLY|BUSY)\b"
)


def storage_error(exc: RedisError, url: RedisURL) -> StorageError:
    """Return the error of the contract for an error of redis-py."""
    text = " ".join(str(exc).split()).rstrip(".") or type(exc).__name__
    password = url.options.get("password")
    if password and len(password) > 3:
        text = text.replace(password, "***")
    if isinstance(exc, MovedError | AskError) and not url.is_cluster:
        return StorageError(
            f"The Redis server {url.name} is part of a cluster: {text}. "
            "Use a URL that begins with redis+cluster://"
        )
    if url.is_cluster and "cluster support disabled" in text:
        return StorageError(
            f"The Redis server {url.name} is no cluster. Use a URL that begins with redis://"
        )
    if isinstance(exc, DataError) or (
        isinstance(exc, ResponseError)
        and not isinstance(exc, _CANNOT_SERVE)
        and not _UNAVAILABLE.search(text)
    ):
        return StorageError(f"The Redis server {url.name} refused the operation: {text}")
    if isinstance(exc, OutOfMemoryError) or "OOM" in text:
        advice = "Raise maxmemory, or delete finished runs with runs.delete_finished()."
    else:
        advice = "Check that the server runs and that the URL is right."
    return StorageUnavailableError(f"The Redis server {url.name} is unavailable: {text}. {advice}")


def not_confirmed(url: RedisURL, replicas: int) -> StorageUnavailableError:
    """Return the error for a write that fewer replicas have confirmed than the URL asks for."""
    return StorageUnavailableError(
        f"The Redis server {url.name} wrote it, but {replicas} of {url.wait_replicas} "
        f"replicas confirmed that within {url.wait_timeout} seconds, so a failover can lose "
        "it. Check the replicas, and what is stored."
    )

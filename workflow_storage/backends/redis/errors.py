"""The errors of redis-py as errors of the contract; `connection` raises no others."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from redis.exceptions import (
    AskError,
    AuthenticationError,
    AuthenticationWrongNumberOfArgsError,
    BusyLoadingError,
    ClusterDownError,
    ClusterError,
    DataError,
    MasterDownError,
    MovedError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)

from workflow_storage.exceptions import StorageError, StorageUnavailableError

if TYPE_CHECKING:
    from workflow_storage.backends.redis.url import RedisURL

# What a server says that cannot serve now begins with a word
# (https://redis.io/docs/latest/develop/reference/protocol-spec/#simple-errors), which redis-py takes
# away where it makes a class of it.
_ADVICE = {
    "OOM": "Raise maxmemory, or delete finished runs with runs.delete_finished().",
    "LOADING": "It is reading its data from disk; try again in a moment.",
    "MISCONF": (
        "It cannot save to its disk, and takes no writes until it can: make room there, and look "
        "into its log."
    ),
    "NOREPLICAS": (
        "It takes no writes without replicas (min-replicas-to-write): check that they run and are "
        "connected."
    ),
    "READONLY": "Connect to the master, to redis+sentinel:// or to redis+cluster://.",
    "MASTERDOWN": "Check the master of this replica.",
    "CLUSTERDOWN": "Some of its slots are served by no node: check the nodes with CLUSTER NODES.",
    "BUSY": "A script has been running for too long there: end it with SCRIPT KILL.",
    "TRYAGAIN": "Slots are being moved; try again in a moment.",
    "max number of clients": (
        "It takes no more connections (maxclients): close some, or set ?max_connections= in the URL."
    ),
    "PASSWORD": "Check the user and the password in the URL.",
}
_CLASSES: dict[type[Exception], str] = {
    OutOfMemoryError: "OOM",
    BusyLoadingError: "LOADING",
    ReadOnlyError: "READONLY",
    MasterDownError: "MASTERDOWN",
    ClusterDownError: "CLUSTERDOWN",
    TryAgainError: "TRYAGAIN",
    AuthenticationWrongNumberOfArgsError: "PASSWORD",
    AuthenticationError: "PASSWORD",
}
_WORDS = re.compile(rf"\b({'|'.join(_ADVICE)})\b")
_AUTHENTICATION = re.compile(
    r"\b(NOAUTH|WRONGPASS|unauthenticated)\b|invalid password", re.IGNORECASE
)
_ALWAYS_TAKEN = 2**20
"""Bytes that every server takes in one value: proto-max-bulk-len is no less."""
_TOO_LARGE = re.compile(r"invalid bulk length|exceeds? (the )?maximum allowed size")


def storage_error(exc: RedisError, url: RedisURL, size: int = 0) -> StorageError:
    """Return the error of the contract for an error of redis-py.

    Args:
        exc: its error.
        url: which server.
        size: how many bytes the largest value had that was sent, about.
    """
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
    if isinstance(exc, NoPermissionError):
        return StorageError(
            f"The Redis server {url.name} refused the operation: {text}. What the user has to be "
            "allowed, the README of the stores lists under 'What the user may do'."
        )
    if _TOO_LARGE.search(text):
        return StorageError(
            f"The Redis server {url.name} takes no value of this size: {text}. Raise "
            "proto-max-bulk-len there, or store less in one state."
        )
    word = _word(exc, text)
    cannot_serve = word or isinstance(exc, ClusterError | AskError)
    if isinstance(exc, DataError) or (isinstance(exc, ResponseError) and not cannot_serve):
        return StorageError(f"The Redis server {url.name} refused the operation: {text}")
    advice = _ADVICE.get(word or "", "Check that the server runs and that the URL is right.")
    if word == "READONLY" and url.master is not None:
        advice = "Another server is being made the master; try again in a moment."
    if word is None and size > _ALWAYS_TAKEN:
        # It hangs up on what is too large, and its reply that says so is lost more often than not.
        advice += (
            f" If it runs, it perhaps takes no value of {size:,} bytes: raise proto-max-bulk-len "
            "there, or store less in one state."
        )
    return StorageUnavailableError(f"The Redis server {url.name} is unavailable: {text}. {advice}")


def _word(exc: RedisError, text: str) -> str | None:
    """Return the word that says why a server cannot serve now; None if it says nothing known."""
    for kind, word in _CLASSES.items():
        if isinstance(exc, kind):
            return word
    if _AUTHENTICATION.search(text):
        return "PASSWORD"
    found = _WORDS.search(text)
    return found and found[1]


def not_confirmed(url: RedisURL, replicas: int) -> StorageUnavailableError:
    """Return the error for a write that fewer replicas have confirmed than the URL asks for."""
    return StorageUnavailableError(
        f"The Redis server {url.name} wrote it, but {replicas} of {url.wait_replicas} "
        f"replicas confirmed that within {url.wait_timeout} seconds, so a failover can lose "
        "it. Check the replicas, and what is stored."
    )

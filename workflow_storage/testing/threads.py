"""Calls in several threads at once, and what became of them.

Called by `ConcurrencyContract`, and by tests of whatever several threads may use.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from django.db import connections

from workflow_storage import StorageError

if TYPE_CHECKING:
    from collections.abc import Callable


_R = TypeVar("_R")


def in_threads(count: int, work: Callable[[int], _R]) -> list[_R]:
    """Call a function in several threads at once, each with its number; return the results."""

    def worker(number: int) -> _R:
        try:
            return work(number)
        finally:
            connections.close_all()

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(worker, range(count), timeout=60))


def outcome(work: Callable[[], object]) -> str:
    """Return the name of the `StorageError` that a call raises, or ``done``."""
    try:
        work()
    except StorageError as exc:
        return type(exc).__name__
    return "done"

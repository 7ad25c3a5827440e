"""Signs of life while nothing is saved, from a thread or a task, for `recording`.

A heartbeat that fails is logged, and the next one is sent nevertheless.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from typing import TYPE_CHECKING, Any

from django.db import connections

from workflow_storage.exceptions import RunNotFoundError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

    from workflow_storage.recorder.run import RecordedRun

logger = logging.getLogger(__name__)

STOP_TIMEOUT = 2.0
"""Seconds that leaving a block waits for a heartbeat that is under way."""


def valid_interval(seconds: float | None) -> float | None:
    """Check the time between two heartbeats; None means that there are none.

    Raises:
        ValueError: if it is not a number of seconds that a thread can wait.
    """
    if seconds is not None and not (
        not isinstance(seconds, bool) and 0 < seconds <= threading.TIMEOUT_MAX
    ):
        raise ValueError(f"heartbeat is {seconds}. Pass seconds, more than 0, or None.")
    return seconds


def beat_in_thread(run: RecordedRun, seconds: float) -> Callable[[], None]:
    """Send heartbeats from a thread, with a connection of its own, until what it returns is called.

    Args:
        run: which run.
        seconds: the time between two heartbeats.
    """
    stopped = threading.Event()

    def beat() -> None:
        try:
            while not stopped.wait(seconds):
                with _failure_logged(run.run_id):
                    run.heartbeat()
        finally:
            connections.close_all()

    thread = threading.Thread(target=beat, name=f"heartbeat of {run.run_id}", daemon=True)
    thread.start()

    def stop() -> None:
        stopped.set()
        # In the caller's transaction a heartbeat can wait for a lock until that ends.
        thread.join(STOP_TIMEOUT)

    return stop


def beat_in_task(run: RecordedRun, seconds: float) -> Callable[[], Coroutine[Any, Any, None]]:
    """Send heartbeats from a task, until what it returns is called; see `beat_in_thread`."""

    async def beat() -> None:
        while True:
            await asyncio.sleep(seconds)
            with _failure_logged(run.run_id):
                await run.aheartbeat()

    task = asyncio.create_task(beat())

    async def stop() -> None:
        task.cancel()
        await asyncio.wait([task], timeout=STOP_TIMEOUT)

    return stop


@contextlib.contextmanager
def _failure_logged(run_id: str) -> Iterator[None]:
    try:
        yield
    except RunNotFoundError:
        # Deleted; or begun in a transaction that is not committed yet.
        logger.info("A heartbeat of workflow run %s found no run", run_id)
    except Exception:
        logger.warning("A heartbeat of workflow run %s failed", run_id, exc_info=True)

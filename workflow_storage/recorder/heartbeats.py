"""Signs of life while nothing is saved, for `recording`: from one thread a process and store.

It sends those of all runs of the store, on one connection of its own, and ends when no run needs
it. In async code it is a thread, too: an event loop that is busy for long is not dead.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import TYPE_CHECKING

from workflow_storage.exceptions import RunLostError, RunNotFoundError
from workflow_storage.status import RunStatus

if TYPE_CHECKING:
    from collections.abc import Callable

    from workflow_storage.base import AbstractWorkflowRunRepository, StorageBackend
    from workflow_storage.recorder.run import RecordedRun

logger = logging.getLogger(__name__)


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


def keep_alive(run: RecordedRun, seconds: float, backend: StorageBackend) -> Callable[[], None]:
    """Send heartbeats of a run until what this returns is called, which waits for nothing.

    Args:
        run: which run.
        seconds: the time between two heartbeats.
        backend: the store that it is in.
    """
    with _changing:
        heart = _hearts.get(backend.runs)
        if heart is None:
            heart = _hearts[backend.runs] = _Heart(backend)
        heart.add(run, seconds)

    def stop() -> None:
        heart.remove(run)

    return stop


class _Heart:
    """Sends the heartbeats of all runs of a store."""

    def __init__(self, backend: StorageBackend) -> None:
        self._backend = backend
        self._changed = threading.Condition()
        self._interval: dict[RecordedRun, float] = {}
        self._due: dict[RecordedRun, float] = {}
        self._is_beating = False

    def add(self, run: RecordedRun, seconds: float) -> None:
        """Send heartbeats of a run from now on."""
        with self._changed:
            self._interval[run] = seconds
            self._due[run] = time.monotonic() + seconds
            if self._is_beating:
                self._changed.notify()
                return
            self._is_beating = True
            name = f"workflow_storage heartbeats of {self._backend.name}"
            threading.Thread(target=self._beat, name=name, daemon=True).start()

    def remove(self, run: RecordedRun) -> None:
        """Send no more of a run. One that is under way is refused if the run has ended."""
        with self._changed:
            self._interval.pop(run, None)
            self._due.pop(run, None)
            self._changed.notify()

    def _beat(self) -> None:
        try:
            with self._backend.beside() as heartbeat:
                while runs := self._next_runs():
                    for run in runs:
                        self._send(run, heartbeat)
        except Exception:
            logger.exception("Heartbeats to %s have ended", self._backend.name)
            with self._changed:
                self._is_beating = False
        with _changing:
            if not self._is_beating:
                _hearts.pop(self._backend.runs, None)

    def _next_runs(self) -> list[RecordedRun]:
        """Wait until heartbeats are due, and return of which runs; none if no run is left."""
        with self._changed:
            while self._due:
                now = time.monotonic()
                first = min(self._due.values())
                if first <= now:
                    runs = [run for run, due in self._due.items() if due <= now]
                    for run in runs:
                        self._due[run] = now + self._interval[run]
                    return runs
                self._changed.wait(first - now)
            self._is_beating = False
            return []

    def _send(self, run: RecordedRun, heartbeat: Callable[..., None]) -> None:
        """Send a heartbeat. One that fails is logged, and the next one is sent nevertheless."""
        try:
            heartbeat(run.run_id, attempt=run.attempt, node=run.current_node)
        except RunLostError as exc:
            if (exc.current_attempt or 0) < run.attempt:
                logger.info("A heartbeat of workflow run %s found it not begun yet", run.run_id)
                return
            self.remove(run)
            if run.status is RunStatus.RUNNING:
                # The next checkpoint, or the end, tells the author.
                logger.info("No more heartbeats of workflow run %s: %s", run.run_id, exc)
        except RunNotFoundError:
            # Deleted; or begun in a transaction that is not committed yet, as above.
            logger.info("A heartbeat of workflow run %s found no run", run.run_id)
        except Exception:
            logger.warning("A heartbeat of workflow run %s failed", run.run_id, exc_info=True)


_hearts: dict[AbstractWorkflowRunRepository, _Heart] = {}
# A signal handler may begin a run while another one is begun.
_changing = threading.RLock()


def _begin_anew() -> None:
    """Let a child process send none of its parent's, whose thread it does not have."""
    global _changing  # noqa: PLW0603 - another thread of the parent may hold it
    _changing = threading.RLock()
    _hearts.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)

"""What is wrong with a run: its steps, its states, its attempts, its times; for `check_runs`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from workflow_storage.base import UNREADABLE
from workflow_storage.exceptions import (
    DamagedStateError,
    RunNotFoundError,
    StorageUnavailableError,
)
from workflow_storage.management.readable import wrong_values
from workflow_storage.status import TERMINAL_STATUSES, RunStatus
from workflow_storage.validation import equal_runs, invalid_fields

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from datetime import datetime

    from workflow_storage.base import StorageBackend
    from workflow_storage.models import WorkflowRun

TRIES = 3
"""How often a run is looked at that is changed meanwhile."""


def problems_of(
    backend: StorageBackend,
    run: WorkflowRun,
    damaged: list[tuple[str, Any]],
    count: Callable[[int], object],
) -> list[str]:
    """Return what is wrong with a run.

    Args:
        backend: where it is.
        run: as it was read.
        damaged: its `invalid_fields`.
        count: told how many states have been looked at.
    """
    for _ in range(TRIES):
        try:
            if damaged:
                problems = [
                    f"its {name} cannot be right: {value!r:.100}" for name, value in damaged
                ]
            else:
                problems = [*_of_times(run), *_of_attempts(backend, run)]
            if not (damaged and {"attempt", "forked_from_step"} & dict(damaged).keys()):
                problems += _of_states(backend, run, count)
        except RunNotFoundError:
            return []
        if not problems:
            return []
        now = backend.runs.get(run.id)
        if now is None:
            return []
        # NaN is not equal to itself.
        damaged_now = invalid_fields(now)
        if equal_runs(now, run) or (damaged and repr(damaged_now) == repr(damaged)):
            return problems
        run, damaged = now, damaged_now
    return []  # it is being worked on, and is looked at the next time


def _of_times(run: WorkflowRun) -> Iterator[str]:
    has_ended = run.status in TERMINAL_STATUSES
    if has_ended and run.completed_at is None:
        yield f"it is {run.status}, and has no time of its end"
    if not has_ended and run.completed_at is not None:
        yield f"it is {run.status}, and has a time of its end"
    if run.completed_at is not None and run.completed_at < run.started_at:
        yield "it ended before it started"
    if run.duration_seconds is not None and run.duration_seconds < 0:
        yield "its duration is negative"
    if run.waiting_for is not None and run.status != RunStatus.PENDING:
        yield f"it is {run.status}, and waits for something"
    if run.status == RunStatus.RUNNING and not run.attempt:
        yield "it is running, and has no attempt"
    if run.forked_from_step is not None and run.parent_id is None:
        yield "it is a fork, and has no parent"


def _of_attempts(backend: StorageBackend, run: WorkflowRun) -> Iterator[str]:
    if run.attempt < 2:
        return  # then there is nothing but the run itself
    attempts = backend.runs.list_attempts(run.id)
    numbers = [attempt.number for attempt in attempts]
    if numbers != list(range(1, run.attempt + 1)):
        yield f"it is in attempt {run.attempt}, and has the attempts {_listed(numbers)}"
    for attempt in attempts[:-1]:
        if attempt.ended_at is None:
            yield f"its attempt {attempt.number} has no end"
    for attempt in attempts:
        if _is_before(attempt.ended_at, attempt.started_at):
            yield f"its attempt {attempt.number} ended before it began"


def _is_before(one: datetime | None, other: datetime | None) -> bool:
    return one is not None and other is not None and one < other


def _of_states(
    backend: StorageBackend, run: WorkflowRun, count: Callable[[int], object]
) -> Iterator[str]:
    last: int | None = None
    after = -1
    while True:
        begun_after = after
        try:
            for checkpoint in backend.states.iter_state_history(run.id, after=after):
                after = checkpoint["step"]
                count(1)
                if last is not None and after != last + 1:
                    yield f"its steps are not contiguous: {after} comes after {last}"
                last = after
                wrong = wrong_values(checkpoint)
                if wrong:
                    yield from wrong.values()
                attempt = 0 if "attempt" in wrong else checkpoint.get("attempt") or 0
                if not _is_copied(run, after) and attempt > run.attempt:
                    yield (
                        f"its step {after} is of attempt {attempt}, and it is in attempt "
                        f"{run.attempt}"
                    )
            return
        except DamagedStateError as exc:
            yield f"its state of step {exc.step} cannot be rebuilt: {exc.reason}"
            if exc.step <= begun_after:
                return  # what follows cannot be read at all
            if last is not None and exc.step > last + 1:
                yield f"its steps are not contiguous: {exc.step} comes after {last}"
            after = last = exc.step
        except (StorageUnavailableError, RunNotFoundError):
            raise
        except UNREADABLE as exc:
            yield f"its steps cannot be read: {exc}"
            return


def _is_copied(run: WorkflowRun, step: int) -> bool:
    """Whether a step came with the fork, whose attempts were those of its parent."""
    return run.forked_from_step is not None and step <= run.forked_from_step


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers)) or "none"

"""Who owns a run: what a change of status does to its attempts and times, and why a write is refused.

The rules are written once, here; a store carries them out in one step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from django.utils import timezone

from workflow_storage.base import Attempt
from workflow_storage.exceptions import (
    RunLostError,
    RunNotFoundError,
    StatusConflictError,
    StorageError,
)
from workflow_storage.status import TERMINAL_STATUSES, RunStatus
from workflow_storage.validation import valid_attempt_fields, valid_updates

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from datetime import datetime


class FoundRun(NamedTuple):
    """What a store looks up of a run to say why it does not write to it, or what it keeps of it."""

    status: str
    attempt: int
    started_at: datetime
    attempt_started_at: datetime | None
    completed_at: datetime | None
    worker: str | None
    current_node: str | None
    error_message: str | None

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> FoundRun:
        """Return it from the fields of a run."""
        return cls(*(fields[name] for name in cls._fields))

    @property
    def newest_attempt(self) -> Attempt:
        """The attempt that the run itself tells of."""
        return Attempt(
            number=self.attempt,
            started_at=self.attempt_started_at,
            ended_at=self.completed_at,
            status=self.status,
            error_message=self.error_message,
            node=self.current_node,
            worker=self.worker,
        )

    def with_attempts(self, ended: Iterable[Attempt]) -> list[Attempt]:
        """Return all attempts, oldest first, given those that are kept beside the run."""
        attempts = sorted(ended, key=lambda attempt: attempt.number)
        if self.attempt and all(attempt.number != self.attempt for attempt in attempts):
            attempts.append(self.newest_attempt)
        return attempts

    def attempts_to_keep(self, attempts: Iterable[Attempt]) -> list[Attempt]:
        """Return those of all attempts that the run does not tell of itself, checked.

        Raises:
            InvalidFieldError: if one cannot be stored.
        """
        return [
            Attempt(**valid_attempt_fields(attempt._asdict()))
            for attempt in attempts
            if attempt != self.newest_attempt
        ]


class StatusChange(NamedTuple):
    """A change of status; the one rule for times and signs of life.

    A store carries it out in one step: it counts one more attempt with ``running``, adds to the
    duration of a run that leaves ``running`` unless `fields` has a duration, and lets
    `completed_at` be no earlier than `started_at`.
    """

    status: RunStatus
    fields: dict[str, Any]
    """All that it sets, as it is stored, but for `attempt` and a computed duration."""
    at: datetime
    """When an attempt begins or ends with it."""

    @property
    def is_beginning(self) -> bool:
        """Whether it begins an attempt."""
        return self.status is RunStatus.RUNNING

    @property
    def sets_duration(self) -> bool:
        """Whether the duration is given, rather than computed."""
        return "duration_seconds" in self.fields

    def ends_attempt(self, before: str) -> bool:
        """Whether what an attempt ended with is to be kept, for the run goes on from there."""
        if before == RunStatus.RUNNING:
            return not self.status.is_terminal
        return before in TERMINAL_STATUSES and before != self.status


def status_change(status: RunStatus, fields: Mapping[str, Any]) -> StatusChange:
    """Return all that a change of status changes.

    Args:
        status: the new status.
        fields: what is to be changed with it; see `valid_updates`.

    Raises:
        InvalidFieldError: see `valid_updates`.
    """
    changes = {**valid_updates(fields, status), "status": status.value}
    at: datetime = (
        changes.get("attempt_started_at") or changes.get("completed_at") or timezone.now()
    )
    if status.is_terminal:
        if changes.get("duration_seconds") is None:
            changes.pop("duration_seconds", None)
        return StatusChange(status, {**changes, "completed_at": at, "waiting_for": None}, at)
    changes |= {"completed_at": None, "heartbeat_at": at}
    if status is RunStatus.RUNNING:
        # The error of the attempt before is kept with it.
        changes = {"worker": None, "current_node": None, "error_message": None} | changes
        changes |= {"attempt_started_at": at, "waiting_for": None}
    else:
        changes.setdefault("waiting_for", None)
    return StatusChange(status, changes, at)


TAKEN_OVER = "Taken over: another attempt began while this one was running."
"""The error_message of an attempt that was running when the next one began."""


def ended_attempt(run: FoundRun, change: StatusChange) -> Attempt:
    """Return what is kept of the attempt that a run was in before a change of status."""
    if run.status != RunStatus.RUNNING:
        return run.newest_attempt
    ended = run.newest_attempt._replace(ended_at=change.at)
    if change.is_beginning:
        return ended._replace(status=RunStatus.FAILED.value, error_message=TAKEN_OVER)
    error = change.fields.get("error_message")
    if error is not None:  # it is to be tried again
        return ended._replace(status=RunStatus.FAILED.value, error_message=error)
    return ended._replace(status=change.status.value)


def refusal(
    run_id: str,
    found: FoundRun | None,
    *,
    expected: Iterable[RunStatus] | None = None,
    attempt: int | None = None,
    change: StatusChange | None = None,
) -> StorageError | None:
    """Return why a write to a run was refused, by what the run is now.

    Args:
        run_id: which run.
        found: the run as it is now; None if there is none.
        expected: the statuses that the write is conditional on.
        attempt: the attempt that the write is conditional on.
        change: the change of status that was refused, if it was one.

    Returns:
        The error; None if the run is what the same change made of it before. Its first try was
        then stored, though nobody was told.
    """
    # Without a condition, a run that is there now has been added since.
    if found is None or (expected is None and attempt is None):
        return RunNotFoundError(run_id)
    if change is not None and attempt is not None and _is_done(found, attempt, change):
        return None
    if attempt is not None and (found.attempt != attempt or expected is None):
        return RunLostError(
            run_id, attempt, found.status, found.attempt, found.worker, found.attempt_started_at
        )
    return StatusConflictError(run_id, found.status, tuple(sorted(expected or ())))


def _is_done(found: FoundRun, attempt: int, change: StatusChange) -> bool:
    if found.status != change.status:
        return False
    if change.is_beginning:
        return (
            found.attempt == attempt + 1
            and found.attempt_started_at == change.at
            and found.worker == change.fields["worker"]
        )
    return (
        change.status.is_terminal
        and found.attempt == attempt
        and found.completed_at == max(change.at, found.started_at)
    )

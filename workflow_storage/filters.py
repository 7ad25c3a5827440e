"""The rules for what finds runs: the filters of lists, and which runs have ended; for the stores."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from workflow_storage.base import FinishedRunFilters, RunFilters
from workflow_storage.serialization import is_utf8
from workflow_storage.status import TERMINAL_STATUSES, RunStatus
from workflow_storage.validation import (
    MAX_COUNT,
    MAX_LABEL_NAME,
    MAX_LABEL_VALUE,
    MAX_RUN_ID,
    MAX_WORKFLOW_NAME,
    is_possible_name,
    plain_text,
    valid_count,
    valid_moment,
    valid_statuses,
    valid_terminal_statuses,
)

if TYPE_CHECKING:
    from datetime import datetime

    from workflow_storage.models import WorkflowRun


class ValidFilters(NamedTuple):
    """Filters of `list_runs` that have been checked."""

    workflow_names: list[str] | None
    """In a fixed order; None for any."""
    statuses: list[RunStatus] | None
    """In a fixed order; None for any."""
    started_after: datetime | None
    started_before: datetime | None
    labels: dict[str, str]
    """All of which a run has to have."""
    parent_id: str | None
    waiting: bool | None
    """Whether a run has to be suspended, or must not; None for any."""
    error: str | None
    """What its error has to contain, in lower case; None for any."""
    match_none: bool
    """Whether no run can match: an impossible name, or no status at all."""
    by_label: bool = True
    """Whether runs with labels are found by the rows of the first one; else the runs are looked at."""
    by_start: bool = False
    """Whether runs of several workflows, or in several statuses, are found by looking at all."""

    @property
    def reads_labels(self) -> bool:
        """Whether runs are found by the rows of a label, and are in the order of these."""
        return self.by_label and bool(self.labels)

    @property
    def is_one_label(self) -> bool:
        """Whether nothing but one label is asked for, and a time of the start."""
        others = (self.workflow_names, self.statuses, self.parent_id, self.waiting, self.error)
        return len(self.labels) == 1 and all(other is None for other in others)

    def matches(self, run: WorkflowRun) -> bool:
        """Whether a run is one of those that are meant; for stores that look at runs themselves."""
        after, before = self.started_after, self.started_before
        return (
            (self.workflow_names is None or run.workflow_name in self.workflow_names)
            and (self.statuses is None or run.status in self.statuses)
            and (after is None or run.started_at >= after)
            and (before is None or run.started_at < before)
            and all(run.labels.get(name) == value for name, value in self.labels.items())
            and self.parent_id in (None, run.parent_id)
            and self.waiting in (None, is_waiting(run))
            and (self.error is None or self.error in (run.error_message or "").lower())
        )


class ValidFinished(NamedTuple):
    """What `delete_finished` takes, checked."""

    filters: ValidFilters
    before: datetime
    keep_last: int
    limit: int
    """How many at most; more than there can be, for all."""


def valid_finished(which: Mapping[str, Any]) -> ValidFinished:
    """Check what `delete_finished` takes, but for the size of its batches.

    Raises:
        InvalidStatusError: if a status is no status, or not a terminal one.
        ValueError, TypeError: for what cannot be meant.
    """
    allowed = FinishedRunFilters.__annotations__
    unknown = which.keys() - allowed.keys()
    if unknown:
        raise TypeError(
            f"{', '.join(sorted(unknown))}: no such filter. Use one of: {', '.join(allowed)}."
        )
    if "before" not in which:
        raise TypeError("before is missing. Pass the time before which the runs have ended.")
    given = {name: which.get(name) for name in ("workflow_name", "labels", "parent_id")}
    statuses, limit = which.get("statuses"), which.get("limit")
    return ValidFinished(
        valid_filters(
            {
                **given,
                "status": valid_terminal_statuses(
                    TERMINAL_STATUSES if statuses is None else statuses
                ),
            }
        ),
        valid_moment("before", which["before"]),
        valid_count("keep_last", which.get("keep_last", 0)),
        MAX_COUNT if limit is None else valid_count("limit", limit),
    )


def is_waiting(run: WorkflowRun) -> bool:
    """Whether a run was suspended, and waits for something."""
    return run.status == RunStatus.PENDING and run.waiting_for is not None


def valid_filters(filters: Mapping[str, Any]) -> ValidFilters:
    """Check the filters of `list_runs`.

    Raises:
        InvalidStatusError: if a status is no status.
        InvalidFieldError: for a time that is no time, or has no time zone where it must.
        TypeError: for an unknown filter, or a name that is no text.
    """
    unknown = filters.keys() - RunFilters.__annotations__.keys()
    if unknown:
        raise TypeError(
            f"{', '.join(sorted(unknown))}: no such filter. "
            f"Use one of: {', '.join(RunFilters.__annotations__)}."
        )
    given = filters.get("workflow_name")
    names = None if given is None else _possible_names(given)
    status = filters.get("status")
    statuses = None if status is None else sorted(valid_statuses(status))
    moments = {
        field: None if filters.get(field) is None else valid_moment(field, filters[field])
        for field in ("started_after", "started_before")
    }
    labels = filters.get("labels") or {}
    if not isinstance(labels, Mapping):
        raise TypeError(f"labels is a {type(labels).__name__}. Pass a dict of names and texts.")
    possible = all(
        is_possible_name("a name in labels", name, MAX_LABEL_NAME)
        and is_possible_name(f"labels[{name!r}]", value, MAX_LABEL_VALUE)
        for name, value in labels.items()
    )
    parent_id = filters.get("parent_id")
    possible = possible and (
        parent_id is None or is_possible_name("parent_id", parent_id, MAX_RUN_ID)
    )
    waiting = filters.get("waiting")
    if waiting not in (None, True, False):
        raise TypeError(f"waiting is {waiting!r}. Pass True, False or None.")
    error = filters.get("error")
    if not isinstance(error, str | None):
        raise TypeError(f"error is a {type(error).__name__}. Pass a text or None.")
    # Errors are stored without these.
    possible = possible and (error is None or ("\0" not in error and is_utf8(error)))
    return ValidFilters(
        names,
        statuses,
        started_after=moments["started_after"],
        started_before=moments["started_before"],
        labels={plain_text(name): plain_text(value) for name, value in labels.items()},
        parent_id=None if parent_id is None else plain_text(parent_id),
        waiting=waiting,
        error=None if error is None else error.lower(),
        match_none=not possible or [] in (names, statuses),
    )


def _possible_names(names: str | Iterable[str]) -> list[str]:
    """Return which of one or several names of workflows there can be."""
    several = [names] if isinstance(names, str) or not isinstance(names, Iterable) else names
    return sorted(
        {
            plain_text(name)
            for name in several
            if is_possible_name("workflow_name", name, MAX_WORKFLOW_NAME)
        }
    )

"""The runs in a Django database as sentences: ``WorkflowRun.objects.failed().started_within(day)``.

The conditions are those of the repositories, which take them from here.
"""

from __future__ import annotations

import time
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from django.conf import settings
from django.db.models import OuterRef, Q, QuerySet, Subquery
from django.utils import timezone

from workflow_storage.status import TERMINAL_STATUSES, RunStatus

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Self

_LONGEST_IDLE = timedelta(days=36_500)

IS_WAITING = Q(status=RunStatus.PENDING.value, waiting_for__isnull=False)
"""The condition that a run was suspended, and waits for something."""

NEWEST_LABELLED_FIRST = ("-label_rows__started_at", "-label_rows__run_id")
"""The order of the runs of a label, by its rows, whose index is in that order."""


class WorkflowRunQuerySet(QuerySet[Any]):
    """Runs."""

    def running(self) -> Self:
        """Return those that are running, also if nobody works on them any more."""
        return self.filter(status=RunStatus.RUNNING.value)

    def finished(self) -> Self:
        """Return those that have ended: completed, failed or cancelled."""
        return self.filter(status__in=sorted(status.value for status in TERMINAL_STATUSES))

    def failed(self) -> Self:
        """Return those that have failed."""
        return self.filter(status=RunStatus.FAILED.value)

    def waiting(self) -> Self:
        """Return those that were suspended, and wait for something."""
        return self.filter(IS_WAITING)

    def labelled(self, labels: Mapping[str, str] | None = None, /, **more: str) -> Self:
        """Return those that have all of some labels, newest first, by the rows of the first label.

        Args:
            labels: names and texts, for names that are no identifiers.
            **more: names and texts, as in ``labelled(user="7")``.
        """
        runs = self
        for name, value in {**(labels or {}), **more}.items():
            runs = runs.filter(label_rows__name=name, label_rows__value=value)
        return runs if runs is self else runs.order_by(*NEWEST_LABELLED_FIRST)

    def started_within(self, age: timedelta) -> Self:
        """Return those that were started at most so long ago."""
        return self.filter(started_at__gte=timezone.now() - age)

    def stalled(self, idle: timedelta) -> Self:
        """Return the running ones without a sign of life for longer than `idle`.

        Signs of life are the start of the attempt, a heartbeat and a checkpoint.
        """
        cutoff = stalled_before(idle)
        states: Any = self.model._meta.get_field("states").related_model
        newest_state = (
            states._base_manager.using(self.db).filter(run_id=OuterRef("pk")).order_by("-step")
        )
        return (
            self.running()
            .filter(
                Q(attempt_started_at__lt=cutoff)
                | Q(attempt_started_at__isnull=True, started_at__lt=cutoff)
            )
            .filter(Q(heartbeat_at__isnull=True) | Q(heartbeat_at__lt=cutoff))
            .alias(newest_state_at=Subquery(newest_state.values("created_at")[:1]))
            .filter(Q(newest_state_at__isnull=True) | Q(newest_state_at__lt=cutoff))
        )


def valid_idle(idle: object) -> timedelta:
    """Check how long a run may be silent."""
    if not isinstance(idle, timedelta):
        raise TypeError(f"idle is a {type(idle).__name__}. Pass a timedelta.")
    if idle < timedelta(0):
        raise ValueError(f"idle is negative: {idle}. Pass a timedelta of 0 or more.")
    if idle > _LONGEST_IDLE:
        raise ValueError(f"idle is {idle}. Pass a timedelta of at most {_LONGEST_IDLE.days} days.")
    return idle


def stalled_before(idle: timedelta) -> datetime:
    """Return the time before which the last sign of life of a stalled run was.

    Times without a time zone (USE_TZ off) skip an hour, or have one twice, when the clocks are
    changed. Of what the clock showed that long ago, and what it shows now less that long, it is
    the earlier one, so that no live run is failed for the hour; a dead one is found later.
    """
    idle = valid_idle(idle)
    if settings.USE_TZ:
        return timezone.now() - idle
    now = time.time()
    return min(
        datetime.fromtimestamp(now) - idle,
        datetime.fromtimestamp(max(now - idle.total_seconds(), 0)),
    )

"""Runs summed up in groups: how many, how they ended, how long they took, what they cost.

A store adds what it knows of a group bit by bit (`Summaries.add`): one run at a time, or what a database
has counted for many. Durations are counted in buckets that grow by the same factor, as in DDSketch
(Masson, Rim, Lee: "DDSketch: a fast and fully-mergeable quantile sketch with relative-error
guarantees", VLDB 2019), so that one algorithm serves every store, and memory grows with groups and
buckets, not with runs.
"""

from __future__ import annotations

import math
from collections import Counter
from datetime import datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any, NamedTuple

from django.conf import settings
from django.utils import timezone

from workflow_storage.status import TERMINAL_STATUSES, RunStatus

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from workflow_storage.models import WorkflowRun

ACCURACY = 0.01
"""How far a percentile is from the duration that it stands for, at most, relative to it."""

GAMMA = (1 + ACCURACY) / (1 - ACCURACY)
"""What the bounds of a bucket differ by."""

LEAST = 0.001
"""Seconds below which all durations are in bucket 0."""

TIMES = ("hour", "day", "week", "month")
"""The groups of time, of the start of a run in the current time zone of Django; weeks begin on Monday."""

LABEL = "label:"
"""What a group by a label begins with, before its name."""


class RunSummary(NamedTuple):
    """What the runs of a group have in common."""

    group: tuple[Any, ...]
    """One value for each of `by`: a text, or the start of a time; None for runs without a label."""
    runs: int
    by_status: dict[str, int]
    success_rate: float | None
    """Completed of completed and failed, from 0 to 1; None without any."""
    p50_seconds: float | None
    """The duration that half of the ended runs have at most, within 1 %; None without any."""
    p95_seconds: float | None
    max_seconds: float | None
    """The longest one, exactly."""
    durations: dict[int, int]
    """Bucket -> how many ended runs have a duration in it; see `bucket_of`."""
    total_tokens: int | None
    total_cost_usd: float | None


def bucket_of(seconds: float) -> int:
    """Return the bucket of a duration: 0 below a millisecond, then ``1 + floor(log_gamma(ms))``."""
    return 0 if seconds < LEAST else 1 + math.floor(math.log(seconds / LEAST) / math.log(GAMMA))


def seconds_of(bucket: int) -> float:
    """Return the duration that stands for those in a bucket: none is further from it than 1 %."""
    return 0.0 if bucket == 0 else LEAST * 2 * GAMMA**bucket / (GAMMA + 1)


def valid_groups(by: str | Iterable[str]) -> tuple[str, ...]:
    """Check what runs are grouped by.

    Raises:
        ValueError: for an unknown group, or one that is there twice.
    """
    groups = (by,) if isinstance(by, str) else tuple(by)
    for group in groups:
        is_label = isinstance(group, str) and group.startswith(LABEL) and len(group) > len(LABEL)
        if not is_label and group not in ("workflow_name", "status", *TIMES):
            raise ValueError(
                f"Runs cannot be grouped by {group!r}. Use workflow_name, status, "
                f"{', '.join(TIMES)} or label:NAME."
            )
    if len(set(groups)) < len(groups):
        raise ValueError(f"A group is there twice: {', '.join(groups)}. Leave one out.")
    return groups


def start_of(time: str, moment: datetime) -> datetime:
    """Return the start of the hour, day, week or month that a moment is in, in the current time zone."""
    local = timezone.localtime(moment) if settings.USE_TZ else moment
    if time == "hour":
        return local.replace(minute=0, second=0, microsecond=0)
    day = datetime(local.year, local.month, local.day)
    if time == "week":
        day -= timedelta(days=day.weekday())
    elif time == "month":
        day = day.replace(day=1)
    return timezone.make_aware(day) if settings.USE_TZ else day


def group_of(run: WorkflowRun, by: tuple[str, ...]) -> tuple[Any, ...]:
    """Return the group that a run is in."""
    return tuple(
        run.labels.get(group.removeprefix(LABEL))
        if group.startswith(LABEL)
        else start_of(group, run.started_at)
        if group in TIMES
        else str(getattr(run, group))
        for group in by
    )


def merged(summaries: Iterable[RunSummary], group: tuple[Any, ...] = ()) -> RunSummary:
    """Return what the runs of several groups have in common, without looking at them again.

    Args:
        summaries: of groups that have no run in common.
        group: what the one group is called that they become.
    """
    whole = _Group()
    for summary in summaries:
        whole.by_status.update(summary.by_status)
        whole.durations.update(summary.durations)
        whole.add(
            summary.max_seconds,
            summary.total_tokens,
            None if summary.total_cost_usd is None else Decimal(repr(summary.total_cost_usd)),
        )
    return whole.summary(group)


def in_order(summaries: Iterable[RunSummary]) -> list[RunSummary]:
    """Return summaries in the order of their groups; what has no label comes last."""
    return sorted(summaries, key=lambda one: [(value is None, value) for value in one.group])


class Summaries:
    """Sums runs up."""

    def __init__(self) -> None:
        self._groups: dict[tuple[Any, ...], _Group] = {}

    def add_run(self, run: WorkflowRun, by: tuple[str, ...]) -> None:
        """Add a run."""
        ended = run.status in TERMINAL_STATUSES and run.duration_seconds is not None
        cost = run.total_cost_usd
        self.add(
            group_of(run, by),
            str(run.status),
            runs=1,
            bucket=bucket_of(run.duration_seconds or 0.0) if ended else None,
            longest=run.duration_seconds if ended else None,
            tokens=run.total_tokens,
            cost_usd=None if cost is None else Decimal(repr(cost)),
        )

    def add(
        self,
        group: tuple[Any, ...],
        status: str,
        *,
        runs: int,
        bucket: int | None,
        longest: float | None,
        tokens: int | None,
        cost_usd: Decimal | None,
    ) -> None:
        """Add some runs of a group that have the same status, and durations in the same bucket.

        Args:
            group: which group.
            status: their status.
            runs: how many there are.
            bucket: of their durations; None unless they have ended, and have one.
            longest: the longest duration in seconds.
            tokens: all their tokens; None if none has any.
            cost_usd: their cost; None if none has any.
        """
        known = self._groups.get(group)
        if known is None:
            known = self._groups[group] = _Group()
        known.by_status[status] += runs
        if bucket is not None:
            known.durations[bucket] += runs
        known.add(longest, tokens, cost_usd)

    def add_durations(
        self, group: tuple[Any, ...], status: str, runs: int, durations: Mapping[int, int]
    ) -> None:
        """Add some runs of a group that have the same status.

        Args:
            group: which group.
            status: their status.
            runs: how many there are.
            durations: bucket -> how many of those that have ended have a duration in it. The longest
                duration is then the one that stands for its bucket.
        """
        known = self._groups.get(group)
        if known is None:
            known = self._groups[group] = _Group()
        known.by_status[status] += runs
        if durations:
            known.durations.update(durations)
            known.longest = max(known.longest or 0.0, seconds_of(max(durations)))

    def results(self) -> list[RunSummary]:
        """Return the summaries, `in_order`."""
        return in_order(group.summary(key) for key, group in self._groups.items())


class _Group:
    """What is known of a group so far."""

    def __init__(self) -> None:
        self.by_status: Counter[str] = Counter()
        self.durations: Counter[int] = Counter()
        self.longest: float | None = None
        self.tokens: int | None = None
        self.cost_usd: Decimal | None = None

    def add(self, longest: float | None, tokens: int | None, cost_usd: Decimal | None) -> None:
        """Add the longest duration, the tokens and the cost of some runs; None for unknown."""
        if longest is not None:
            self.longest = max(longest, self.longest or 0.0)
        if tokens is not None:
            self.tokens = (self.tokens or 0) + tokens
        if cost_usd is not None:
            self.cost_usd = (self.cost_usd or Decimal(0)) + cost_usd

    def summary(self, group: tuple[Any, ...]) -> RunSummary:
        completed = self.by_status[RunStatus.COMPLETED.value]
        decided = completed + self.by_status[RunStatus.FAILED.value]
        return RunSummary(
            group=group,
            runs=self.by_status.total(),
            by_status={status: count for status, count in self.by_status.items() if count},
            success_rate=completed / decided if decided else None,
            p50_seconds=self._percentile(0.5),
            p95_seconds=self._percentile(0.95),
            max_seconds=self.longest,
            durations=dict(sorted(self.durations.items())),
            total_tokens=self.tokens,
            total_cost_usd=None if self.cost_usd is None else float(self.cost_usd),
        )

    def _percentile(self, share: float) -> float | None:
        """Return the duration that a share of the runs has at most (the nearest rank)."""
        rank = math.ceil(share * self.durations.total())
        for bucket, count in sorted(self.durations.items()):
            rank -= count
            if rank <= 0 and count:
                return min(seconds_of(bucket), self.longest or 0.0)
        return None

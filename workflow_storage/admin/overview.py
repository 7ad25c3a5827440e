"""What is above the list of runs: the runs that a selection means, over time and by workflow."""

from __future__ import annotations

import hashlib
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from django.core.cache import cache
from django.utils import timezone
from django.utils.http import urlencode
from django.utils.translation import gettext as _

from workflow_storage.admin import selection
from workflow_storage.admin.charts import (
    RankingRow,
    amount_bars,
    duration_lines,
    ranking,
    status_bars,
    time_points,
    time_steps,
)
from workflow_storage.admin.rendering import count_text, duration_text, exact_time
from workflow_storage.backends.orm.overviews import can_look_over, over_time_and_by_workflow
from workflow_storage.filters import valid_filters
from workflow_storage.status import RunStatus

if TYPE_CHECKING:
    from django.http import QueryDict
    from django.utils.safestring import SafeString

    from workflow_storage.admin.selection import Selection
    from workflow_storage.base import RunFilters, StorageBackend
    from workflow_storage.summaries import RunSummary

AT_ONCE = timedelta(days=7, minutes=1)
"""How long a time is summed up without being asked to."""

KEPT = 3600
"""Seconds that the summaries of a longer time are kept."""

RANKED = 8
"""Workflows in a ranking."""


class Overview(NamedTuple):
    """The charts above the list."""

    title: str
    charts: list[SafeString]
    rankings: list[SafeString]
    note: str
    """What is asked for and not counted in, and as of when it is, if that has to be said."""


def window(asked: Selection) -> tuple[datetime, datetime]:
    """Return the time that is summed up: what is asked for, or the last 24 hours."""
    before = asked.filters.started_before or timezone.now()
    after = asked.filters.started_after or before - timedelta(days=1)
    return after, max(before, after + timedelta(minutes=1))


def is_short(asked: Selection) -> bool:
    """Whether the time is so short that it is summed up at once."""
    after, before = window(asked)
    return before - after <= AT_ONCE


def overview(store: StorageBackend, asked: Selection, parameters: QueryDict, url: str) -> Overview:
    """Sum up the runs of a selection.

    Args:
        store: where they are.
        asked: the selection; what only a database can tell is left out.
        parameters: the parameters of the list.
        url: of the list.
    """
    after, before = window(asked)
    filters = asked.run_filters()
    filters["started_after"], filters["started_before"] = after, before
    time, starts = time_steps(after, before)
    by_time, by_workflow, counted_at = _summaries(store, time, starts, filters, parameters)

    def url_of(start: datetime, end: datetime) -> str:
        return url + _query(
            parameters,
            {selection.SINCE: max(start, after).isoformat(), selection.UNTIL: end.isoformat()},
        )

    points = time_points(by_time, starts, url_of, time=time)
    charts = [status_bars(points), duration_lines(points)]
    if any(point.tokens for point in points):
        charts.append(amount_bars(points, "tokens"))
    if any(point.cost_usd for point in points):
        charts.append(amount_bars(points, "cost"))
    return Overview(
        _("From %(after)s until %(before)s")
        % {"after": exact_time(after)[:-7], "before": exact_time(before)[:-7]},
        charts,
        _rankings(by_workflow, parameters, url),
        " ".join(filter(None, (_note(asked, parameters), _note_on_age(after, before, counted_at)))),
    )


def _note(asked: Selection, parameters: QueryDict) -> str:
    left_out = [
        name
        for name, is_asked in (
            (_("Stalled"), asked.stalled),
            (_("Started by a run"), asked.has_parent),
            (_("end"), asked.ended_after is not None),
            (_("what it took"), (asked.slower, asked.costlier) != (None, None)),
            (_("Search"), parameters.get("q", "").strip()),
        )
        if is_asked
    ]
    if not left_out:
        return ""
    return _("Not counted in here: %(filters)s.") % {"filters": ", ".join(left_out)}


def _note_on_age(after: datetime, before: datetime, counted_at: datetime) -> str:
    """Say as of when a time is that is not counted each time."""
    if before - after <= AT_ONCE:
        return ""
    return _("As of %(time)s; more than a week is counted once an hour.") % {
        "time": exact_time(counted_at)[:-4]
    }


def _summaries(
    store: StorageBackend,
    time: str,
    starts: list[datetime],
    filters: RunFilters,
    parameters: QueryDict,
) -> tuple[list[RunSummary], list[RunSummary], datetime]:
    """Return the summaries by time and by workflow, and when they were made.

    Those of a longer time are kept for an hour.
    """

    def sums() -> tuple[list[RunSummary], list[RunSummary], datetime]:
        now = timezone.now()
        if store.alias is not None and can_look_over(store.alias, starts):
            valid = valid_filters(filters)
            by_time, by_workflow = over_time_and_by_workflow(store.alias, valid, starts)
        else:
            by_time = store.runs.summarize(by=time, **filters)
            by_workflow = store.runs.summarize(by="workflow_name", **filters)
        # Nobody reads how many runs took how long, and a cache may take no more than a megabyte.
        brief = [[one._replace(durations={}) for one in some] for some in (by_time, by_workflow)]
        return brief[0], brief[1], now

    after, before = filters["started_after"], filters["started_before"]
    if after is None or before is None or before - after <= AT_ONCE:
        return sums()
    found: Any = cache.get_or_set(_kept_as(store, time, filters, parameters), sums, KEPT)
    return found[0], found[1], found[2]


def _kept_as(store: StorageBackend, time: str, filters: RunFilters, parameters: QueryDict) -> str:
    """Return the key of what is kept: alike for all who ask the same store for the same runs."""
    # "30d" is another time at every moment, and meant to be the same one for an hour.
    asked = {
        **filters,
        "started_after": parameters.get(selection.SINCE),
        "started_before": parameters.get(selection.UNTIL),
    }
    told = repr((store.name, store.alias, timezone.get_current_timezone_name(), time, asked))
    return f"workflow_storage.overview.{hashlib.sha256(told.encode()).hexdigest()}"


def _rankings(summaries: list[RunSummary], parameters: QueryDict, url: str) -> list[SafeString]:
    failing = [one for one in summaries if one.by_status.get(RunStatus.FAILED.value)]
    failing.sort(key=lambda one: -one.by_status[RunStatus.FAILED.value])
    slowest = [one for one in summaries if one.p95_seconds is not None]
    slowest.sort(key=lambda one: -(one.p95_seconds or 0.0))

    def link(name: str, **more: str) -> str:
        return url + _query(parameters, {selection.WORKFLOW: name, **more})

    return [
        ranking(
            [
                RankingRow(
                    one.group[0],
                    link(one.group[0], **{selection.STATUS: RunStatus.FAILED.value}),
                    one.by_status[RunStatus.FAILED.value],
                    _("%(failed)s of %(runs)s")
                    % {
                        "failed": count_text(one.by_status[RunStatus.FAILED.value]),
                        "runs": count_text(one.runs),
                    },
                )
                for one in failing[:RANKED]
            ],
            title=_("Most failed runs"),
            value_heading=_("Failed"),
            tone="failed",
            empty=_("No run has failed."),
        ),
        ranking(
            [
                RankingRow(
                    one.group[0],
                    link(one.group[0], **{selection.ORDER: "duration"}),
                    one.p95_seconds or 0.0,
                    duration_text(one.p95_seconds),
                )
                for one in slowest[:RANKED]
            ],
            title=_("Slowest workflows"),
            value_heading=_("95 percent take at most"),
        ),
    ]


def _query(parameters: QueryDict, more: dict[str, str]) -> str:
    left_out = {"before", "after", "q", *more}
    kept = [(name, values) for name, values in parameters.lists() if name not in left_out]
    return f"?{urlencode([*kept, *more.items()], doseq=True)}"

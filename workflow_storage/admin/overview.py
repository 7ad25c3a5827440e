"""What is above the list of runs: the runs that a selection means, over time and by workflow."""

from __future__ import annotations

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
from workflow_storage.status import RunStatus

if TYPE_CHECKING:
    from django.http import QueryDict
    from django.utils.safestring import SafeString

    from workflow_storage.admin.selection import Selection
    from workflow_storage.base import AbstractWorkflowRunRepository
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


def window(asked: Selection) -> tuple[datetime, datetime]:
    """Return the time that is summed up: what is asked for, or the last 24 hours."""
    before = asked.filters.started_before or timezone.now()
    after = asked.filters.started_after or before - timedelta(days=1)
    return after, max(before, after + timedelta(minutes=1))


def is_short(asked: Selection) -> bool:
    """Whether the time is so short that it is summed up at once."""
    after, before = window(asked)
    return before - after <= AT_ONCE


def overview(
    runs: AbstractWorkflowRunRepository, asked: Selection, parameters: QueryDict, url: str
) -> Overview:
    """Sum up the runs of a selection in two statements.

    Args:
        runs: where they are.
        asked: the selection; what only a database can tell is left out.
        parameters: the parameters of the list.
        url: of the list.
    """
    after, before = window(asked)
    filters = {**asked.run_filters(), "started_after": after, "started_before": before}
    time, starts = time_steps(after, before)
    by_time, by_workflow = _summaries(runs, time, filters, parameters)

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
    )


def _summaries(
    runs: AbstractWorkflowRunRepository, time: str, filters: Any, parameters: QueryDict
) -> tuple[list[RunSummary], list[RunSummary]]:
    def sums() -> tuple[list[RunSummary], list[RunSummary]]:
        return runs.summarize(by=time, **filters), runs.summarize(by="workflow_name", **filters)

    if filters["started_before"] - filters["started_after"] <= AT_ONCE:
        return sums()
    asked = urlencode(sorted(parameters.lists()), doseq=True)
    key = f"workflow_storage.overview.{timezone.get_current_timezone_name()}.{hash(asked)}"
    found: Any = cache.get_or_set(key, sums, KEPT)
    return found[0], found[1]


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

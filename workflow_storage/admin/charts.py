"""Charts of runs as SVG, for the pages of the admin: pure functions from numbers to markup.

There is no script and no style in them: sizes are attributes, colours the classes of `charts.css`, which
wants `admin.css` beside it. What stretches with the page is in percent, and what does not (heights, text,
hatching) in pixels. Bars are links; below each chart is a table with the same numbers.
"""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from itertools import groupby, islice
from typing import TYPE_CHECKING, NamedTuple

from django.conf import settings
from django.template.loader import render_to_string
from django.utils import timezone
from django.utils.formats import date_format, get_format, number_format
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString
from django.utils.translation import gettext as _
from django.utils.translation import ngettext, pgettext

from workflow_storage.admin.rendering import (
    ago_text,
    cost_text,
    count_text,
    dollars_text,
    duration_text,
    tokens_text,
)
from workflow_storage.status import RunStatus
from workflow_storage.summaries import start_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from typing import Literal

    from workflow_storage.models import WorkflowRun
    from workflow_storage.summaries import RunSummary

MAX_STEPS = 50
"""Steps of time that a chart has at most, unless there are more months."""

MAX_LABELS = 8
"""Steps of time with a label below them; on narrow pages most are hidden."""

_TOP = 8  # pixels above the highest bar, half a line of text
_PLOT = 150  # pixels of the highest bar
_LABELS = 22  # pixels below the bars
_STRIP = 44  # pixels of a strip, of which the top ones are for marks
_MARKS = 9
_SLOT = 10  # pixels of a run in a strip on a wide page
_LEAST = 3  # pixels of a bar that would be too low to see
_LEAST_MARK = 7  # the same in a strip, where hatched and dotted have to be told apart
_ACROSS = 1000  # units that a line has from left to right
_SPARED = ("label", "spare", "rare", "spare")  # which labels are hidden first where it is narrow
_NO_MARKUP = SafeString()

_STATUSES = (
    RunStatus.FAILED,
    RunStatus.COMPLETED,
    RunStatus.CANCELLED,
    RunStatus.RUNNING,
    RunStatus.PENDING,
)
"""From the ground up: failures first, so that their heights can be compared."""

_LOOKS = {
    RunStatus.COMPLETED: 'fill="currentColor"',
    RunStatus.FAILED: 'fill="url(#{name}-hatched)"',
    RunStatus.RUNNING: 'fill="none" stroke="currentColor" stroke-width="2"',
    RunStatus.PENDING: 'fill="url(#{name}-dotted)" stroke="currentColor" stroke-dasharray="2 2"',
    RunStatus.CANCELLED: 'fill="currentColor" fill-opacity="0.25" stroke="currentColor"',
}
"""What tells bars apart besides their colour."""


class RunMark(NamedTuple):
    """A run in a strip."""

    url: str
    """Of its page; empty for who may not see it."""
    status: str
    seconds: float | None
    title: str
    """A sentence: "invoice-extraction failed after 12 s, 2 hours ago"."""


class TimePoint(NamedTuple):
    """What happened in a step of time."""

    start: datetime
    url: str
    """Of the list of its runs; empty for who may not see it."""
    label: str
    """The step in full, for titles and tables: "March 12, 2026"."""
    tick: str
    """The step in short, for the axis: "Mar 12"."""
    by_status: Mapping[str, int] = {}
    p50_seconds: float | None = None
    p95_seconds: float | None = None
    tokens: int | None = None
    cost_usd: float | None = None

    @property
    def runs(self) -> int:
        """Return how many runs began in it."""
        return sum(self.by_status.values())


class RankingRow(NamedTuple):
    """A workflow, or what else has a place in a ranking."""

    name: str
    url: str
    value: float
    """Not negative; how long its bar is."""
    text: str
    """The value for people: "12 of 80", "4:12 min"."""


class Column(NamedTuple):
    """A step of time as it is drawn."""

    point: TimePoint
    bars: SafeString
    """Empty where there is nothing to show, which makes no link."""
    title: str
    cells: tuple[str, ...]
    """Its row in the table, after the label."""


class Axis(NamedTuple):
    """The vertical axis: its round values, from 0 upwards, and how they are written."""

    ticks: tuple[float, ...]
    text: Callable[[float], str]

    def height(self, value: float) -> float:
        """Return how many pixels high a value is."""
        return _PLOT * value / self.ticks[-1]


# Steps of time


def time_steps(after: datetime, before: datetime) -> tuple[str, list[datetime]]:
    """Return what to group the runs of a window by, and the starts of all steps in it.

    Args:
        after: in the first step, which begins then or earlier.
        before: the end of the window, itself not in it.

    Returns:
        The finest of hour, day, week and month that makes no more than `MAX_STEPS` steps, or month; and
        the starts in the current time zone.

    Raises:
        ValueError: if the window ends before it has begun.
    """
    if _instant(before) <= _instant(after):
        raise ValueError(f"The window from {after} to {before} is empty. Let it end later.")
    for time in ("hour", "day", "week"):
        starts = list(islice(_starts(time, after, before), MAX_STEPS + 1))
        if len(starts) <= MAX_STEPS:
            return time, starts
    return "month", list(_starts("month", after, before))


def time_points(
    summaries: Iterable[RunSummary],
    starts: Sequence[datetime],
    url_of: Callable[[datetime, datetime], str],
    *,
    time: str,
) -> list[TimePoint]:
    """Return a point for each step of time, also for those in which nothing ran.

    Args:
        summaries: of runs grouped by `time` alone; what began outside of the steps is left out.
        starts: of the steps, as `time_steps` returns them.
        url_of: returns the URL of the list of runs that began from one time until before another.
        time: what the steps are: hour, day, week or month.
    """
    found = {_instant(summary.group[0]): summary for summary in summaries}
    points = []
    for start in starts:
        url = url_of(start, _next_start(time, start))
        point = TimePoint(start, url, label=_label(time, start), tick=_tick(time, start))
        summary = found.get(_instant(start))
        if summary is not None:
            point = point._replace(
                by_status=summary.by_status,
                p50_seconds=summary.p50_seconds,
                p95_seconds=summary.p95_seconds,
                tokens=summary.total_tokens,
                cost_usd=summary.total_cost_usd,
            )
        points.append(point)
    return points


def run_mark(run: WorkflowRun, url: str) -> RunMark:
    """Return the mark of a run, which says when it started.

    Args:
        run: the run.
        url: of its page; empty for who may not see it.
    """
    words = {
        "workflow": run.workflow_name,
        "status": run.get_status_display(),
        "duration": duration_text(run.duration_seconds),
        "ago": ago_text(run.started_at),
    }
    if run.duration_seconds is None:
        title = _("%(workflow)s %(status)s, %(ago)s") % words
    else:
        title = _("%(workflow)s %(status)s after %(duration)s, %(ago)s") % words
    return RunMark(url, str(run.status), run.duration_seconds, title)


def _starts(time: str, after: datetime, before: datetime) -> Iterator[datetime]:
    start = start_of(time, after)
    # Times of one zone are compared by the clock, which goes back once a year: hence the instants.
    while _instant(start) < _instant(before):
        yield start
        start = _next_start(time, start)


def _next_start(time: str, start: datetime) -> datetime:
    if time == "hour":
        moment = start.astimezone(UTC) if settings.USE_TZ else start
        following = start_of(time, moment + timedelta(hours=1))
        if _instant(following) <= _instant(start):
            # Lord Howe turns its clocks back by half an hour.
            following = start_of(time, moment + timedelta(hours=2))
        return following
    # Noon, for days have 23 to 25 hours, and some no midnight.
    day = _local(start)
    noon = datetime(day.year, day.month, day.day, 12)
    noon += timedelta(days={"day": 1, "week": 7, "month": 32}[time])
    return start_of(time, timezone.make_aware(noon) if settings.USE_TZ else noon)


def _instant(moment: datetime) -> datetime:
    """Return a time that is equal to another one only if it is the same, on any clock."""
    return moment.astimezone(UTC) if timezone.is_aware(moment) else moment


def _local(moment: datetime) -> datetime:
    return timezone.localtime(moment) if timezone.is_aware(moment) else moment


def _label(time: str, start: datetime) -> str:
    local = _local(start)
    if time == "month":
        return date_format(local, "YEAR_MONTH_FORMAT")
    if time == "week":
        return _("Week of %(date)s") % {"date": date_format(local, "DATE_FORMAT")}
    if time == "day":
        return date_format(local, "DATE_FORMAT")
    text = date_format(local, "DATETIME_FORMAT")
    if local.replace(fold=0).utcoffset() != local.replace(fold=1).utcoffset():
        # The clock shows this hour twice. (Django's own format T is empty then.)
        text += f" {local.tzname()}"
    return text


def _tick(time: str, start: datetime) -> str:
    local = _local(start)
    if time == "hour" and local.hour:
        return date_format(local, "TIME_FORMAT")
    name = "YEAR_MONTH_FORMAT" if time == "month" else "MONTH_DAY_FORMAT"
    # Languages differ in the order; the name of the month is written short in all.
    return date_format(local, get_format(name).replace("F", "M").replace("E", "M"))


# Charts


def strip(
    marks: Sequence[RunMark], *, title: str | None = None, name: str = "last-runs"
) -> SafeString:
    """Return the last runs as narrow bars: as high as the run was long, on a scale of cube roots.

    Args:
        marks: the runs, oldest first.
        title: what the chart is called.
        name: unlike that of any other chart on the page.
    """
    title = title or _("Last runs")
    name = f"workflow-storage-{name}"
    if not marks:
        return _empty(title, _("There are no runs."))
    longest = max(mark.seconds or 0.0 for mark in marks) or 1.0
    slot = 1 / len(marks)
    bars = _NO_MARKUP
    for place, mark in enumerate(marks):
        share = math.cbrt(max(mark.seconds or 0.0, 0.0) / longest)
        height = max((_STRIP - _MARKS - 1) * share, _LEAST_MARK)
        drawn = _hit(place * slot, slot, _STRIP)
        drawn += _status_bar(
            mark.status, name, ((place + 0.1) * slot, slot * 0.8), height, _STRIP - 1
        )
        if mark.status == RunStatus.FAILED:
            drawn += format_html(
                '<circle class="workflow-storage-failed" fill="currentColor"'
                ' cx="{}" cy="4" r="3"/>',
                _percent((place + 0.5) * slot),
            )
        bars += _link(mark.url, mark.title, drawn)
    statuses = [status for status in _STATUSES if any(mark.status == status for mark in marks)]
    return _figure(
        title,
        name,
        content=bars,
        height=_STRIP,
        width=str(len(marks) * _SLOT),
        legend=[(_swatch(status, name), str(status.label)) for status in statuses],
        patterns=True,
        headings=(_("Run"), _("Status"), _("Duration")),
        rows=[
            (mark.url, mark.title, (_status_text(mark.status), duration_text(mark.seconds)))
            for mark in marks
        ],
    )


def status_bars(
    points: Sequence[TimePoint], *, title: str | None = None, name: str = "status"
) -> SafeString:
    """Return how many runs began in each step of time, by status.

    Args:
        points: the steps in their order.
        title: what the chart is called.
        name: unlike that of any other chart on the page.
    """
    title = title or _("Runs by status")
    name = f"workflow-storage-{name}"
    totals = {
        status: total
        for status in _STATUSES
        if (total := sum(point.by_status.get(status.value, 0) for point in points))
    }
    if not totals:
        return _empty(title, _("No run began in this time."))
    axis = Axis(
        round_ticks(max(point.runs for point in points), least=1),
        lambda tick: count_text(int(tick)),
    )
    columns = []
    for place, point in enumerate(points):
        counts = {
            status: point.by_status[status.value]
            for status in totals
            if point.by_status.get(status.value)
        }
        bars, ground = _NO_MARKUP, float(_TOP + _PLOT)
        for status, height in zip(counts, _stacked(axis, list(counts.values())), strict=True):
            bars += _status_bar(status, name, _place(place, len(points)), height, ground)
            ground -= height
        runs = ngettext("%(count)s run", "%(count)s runs", point.runs)
        parts = [
            _("%(label)s: %(text)s")
            % {"label": point.label, "text": runs % {"count": count_text(point.runs)}},
            *(f"{count_text(count)} {status.label}" for status, count in counts.items()),
        ]
        cells = (count_text(point.runs), *(count_text(counts.get(each, 0)) for each in totals))
        columns.append(Column(point, bars, ", ".join(parts), cells))
    return _time_figure(
        title,
        name,
        axis,
        columns,
        legend=[
            (_swatch(status, name), f"{status.label} {count_text(total)}")
            for status, total in totals.items()
        ],
        patterns=True,
        headings=(_("Runs"), *(str(status.label) for status in totals)),
    )


def duration_lines(
    points: Sequence[TimePoint], *, title: str | None = None, name: str = "durations"
) -> SafeString:
    """Return the median and the 95th percentile of the durations over time, with gaps where none ended.

    Args:
        points: the steps in their order.
        title: what the chart is called.
        name: unlike that of any other chart on the page.
    """
    title = title or _("Duration")
    name = f"workflow-storage-{name}"
    lines = {
        "p50": [point.p50_seconds for point in points],
        "p95": [point.p95_seconds for point in points],
    }
    known = [seconds for line in lines.values() for seconds in line if seconds is not None]
    if not known:
        return _empty(title, _("No run that began in this time has ended."))
    axis = Axis(duration_ticks(max(known)), _duration_tick)
    columns = []
    for place, (point, p50, p95) in enumerate(zip(points, *lines.values(), strict=True)):
        dots = _NO_MARKUP
        for line, seconds in (("p95", p95), ("p50", p50)):
            if seconds is not None:
                dots += format_html(
                    '<circle class="workflow-storage-{}" cx="{}" cy="{}" r="2.5"/>',
                    line,
                    _percent((place + 0.5) / len(points)),
                    _pixels(_TOP + _PLOT - axis.height(seconds)),
                )
        text = _("%(label)s: half within %(p50)s, 95 percent within %(p95)s") % {
            "label": point.label,
            "p50": duration_text(p50),
            "p95": duration_text(p95),
        }
        if not dots:
            text = _nothing(point)
        columns.append(Column(point, dots, text, (duration_text(p50), duration_text(p95))))
    return _time_figure(
        title,
        name,
        axis,
        columns,
        behind=_lines(lines, axis),
        legend=[
            (_line_swatch("p50"), _("p50: half of the runs within")),
            (_line_swatch("p95"), _("p95: 95 percent of the runs within")),
        ],
        headings=("p50", "p95"),
    )


def amount_bars(
    points: Sequence[TimePoint],
    amount: Literal["tokens", "cost"],
    *,
    title: str | None = None,
    name: str | None = None,
) -> SafeString:
    """Return the tokens or the cost of the runs that began in each step of time.

    Args:
        points: the steps in their order.
        amount: which of the two.
        title: what the chart is called.
        name: unlike that of any other chart on the page.
    """
    is_cost = amount == "cost"
    title = title or (_("Cost in US dollars") if is_cost else _("Tokens"))
    name = f"workflow-storage-{name or amount}"
    values = [point.cost_usd if is_cost else point.tokens for point in points]
    most = max((value for value in values if value is not None), default=0)
    if not most:
        return _empty(
            title, _("No costs in this time.") if is_cost else _("No tokens in this time.")
        )
    ticks = round_ticks(most, least=0 if is_cost else 1)
    axis = Axis(ticks, lambda value: _amount_tick(value, ticks[1], is_cost=is_cost))
    columns = []
    for place, (point, value) in enumerate(zip(points, values, strict=True)):
        bar, title_text = _NO_MARKUP, _nothing(point)
        text = cost_text(value) if is_cost else tokens_text(point.tokens)
        if value is not None:
            unit = (
                "%(amount)s"
                if is_cost
                else ngettext("%(amount)s token", "%(amount)s tokens", int(value))
            )
            title_text = _("%(label)s: %(text)s") % {
                "label": point.label,
                "text": unit % {"amount": text},
            }
        if value:
            height = max(axis.height(value), _LEAST)
            bar = _bar(
                "workflow-storage-amount",
                SafeString('fill="currentColor"'),
                _place(place, len(points)),
                height,
                _TOP + _PLOT,
            )
        columns.append(Column(point, bar, title_text, (text,)))
    return _time_figure(title, name, axis, columns, headings=(title,))


def ranking(
    rows: Sequence[RankingRow],
    *,
    title: str,
    value_heading: str,
    name_heading: str | None = None,
    tone: Literal["failed", "amount"] = "amount",
    empty: str | None = None,
) -> SafeString:
    """Return a table of workflows, each with a bar: the most failing, the slowest.

    Args:
        rows: the first one first.
        title: what the ranking is of.
        value_heading: what the values are.
        name_heading: what the names are; workflows by default.
        tone: the colour of the bars.
        empty: what is said if there are no rows.
    """
    if not rows:
        return _empty(title, empty or _("There is nothing to show."))
    most = max(row.value for row in rows) or 1.0
    return _rendered(
        "ranking",
        title=title,
        headings=(name_heading or _("Workflow"), value_heading),
        tone=tone,
        rows=[(row, _percent(max(row.value, 0.0) / most)) for row in rows],
    )


# The parts of a chart


def _time_figure(
    title: str,
    name: str,
    axis: Axis,
    columns: Sequence[Column],
    *,
    headings: Sequence[str],
    legend: Sequence[tuple[SafeString, str]] = (),
    patterns: bool = False,
    behind: SafeString = _NO_MARKUP,
) -> SafeString:
    """Return a chart with time from left to right."""
    count = len(columns)
    content = format_html_join(
        "",
        '<line class="workflow-storage-chart-grid" x1="0" x2="100%" y1="{0}" y2="{0}"/>',
        ((_pixels(_TOP + _PLOT - axis.height(tick)),) for tick in axis.ticks),
    )
    content += behind
    for place, column in enumerate(columns):
        url = column.point.url if column.bars else ""
        drawn = _hit(place / count, 1 / count, _TOP + _PLOT) + column.bars
        content += _link(url, column.title, drawn)
    content += _tick_labels([column.point for column in columns])
    texts = [(axis.text(tick), _TOP + _PLOT - axis.height(tick)) for tick in axis.ticks]
    gutter = 8 + 7 * max(len(text) for text, _y in texts)
    return _figure(
        title,
        name,
        content=content,
        height=_TOP + _PLOT + _LABELS,
        gutter=str(gutter),
        axis=[(text, str(gutter - 6), _pixels(y + 4)) for text, y in texts],
        headings=(_("Time"), *headings),
        rows=[
            (column.point.url if column.bars else "", column.point.label, column.cells)
            for column in columns
        ],
        legend=legend,
        patterns=patterns,
    )


def _figure(
    title: str, name: str, *, height: int, width: str = "100%", **parts: object
) -> SafeString:
    """Return a chart with its legend and its table.

    Args:
        title: what it is called.
        name: what its ids begin with.
        height: of the drawing, in pixels.
        width: of the drawing, in pixels or percent.
        parts: content (what is drawn), headings and rows (the table), legend, patterns (whether there
            are statuses), gutter and axis (the width of the axis in pixels, its labels with their
            places).
    """
    size = {"height": str(height), "width": width}
    return _rendered("figure", title=title, name=name, **size, **parts)


def _empty(title: str, text: str) -> SafeString:
    return _rendered("empty", title=title, text=text)


def _rendered(template: str, **context: object) -> SafeString:
    return render_to_string(f"admin/workflow_storage/charts/{template}.html", context)


def _link(url: str, title: str, content: SafeString) -> SafeString:
    """Return what is drawn as a link, with its title both for the mouse and for screen readers."""
    if not url:
        return format_html("<g><title>{}</title>{}</g>", title, content)
    return format_html(
        '<a href="{}" aria-label="{}"><title>{}</title>{}</a>', url, title, title, content
    )


def _hit(x: float, width: float, height: float) -> SafeString:
    """Return what makes all the height of a bar clickable, and shows that it has the focus."""
    return format_html(
        '<rect class="workflow-storage-chart-hit" x="{}" y="0" width="{}" height="{}"/>',
        _percent(x),
        _percent(width),
        _pixels(height),
    )


def _bar(
    css_class: str, look: SafeString, span: tuple[float, float], height: float, ground: float
) -> SafeString:
    """Return a bar: `span` is its left side and its width."""
    x, width = span
    # Numbers and words of ours, hundreds of times a page: `format_html` would take much longer.
    return SafeString(
        f'<rect class="{css_class}" {look} x="{_percent(x)}" y="{_pixels(ground - height)}"'
        f' width="{_percent(width)}" height="{_pixels(height)}"/>'
    )


def _status_bar(
    status: str, name: str, span: tuple[float, float], height: float, ground: float
) -> SafeString:
    known = RunStatus(status)
    return _bar(f"workflow-storage-{known.value}", _look(known, name), span, height, ground)


@lru_cache
def _look(status: RunStatus, name: str) -> SafeString:
    return format_html(_LOOKS[status], name=name)


def _swatch(status: RunStatus, name: str) -> SafeString:
    return format_html(
        '<svg aria-hidden="true" width="14" height="14">'
        '<rect class="workflow-storage-{}" {} x="1" y="1" width="12" height="12"/></svg>',
        status.value,
        _look(status, name),
    )


def _line_swatch(line: str) -> SafeString:
    return format_html(
        '<svg aria-hidden="true" width="28" height="14">'
        '<line class="workflow-storage-{0}" x1="0" x2="28" y1="7" y2="7"/>'
        '<circle class="workflow-storage-{0}" cx="14" cy="7" r="2.5"/></svg>',
        line,
    )


def _lines(lines: Mapping[str, Sequence[float | None]], axis: Axis) -> SafeString:
    """Return lines from point to point, stretched as the page is wide, but not their strokes."""
    drawn = _NO_MARKUP
    for line, values in lines.items():
        places = [
            (place, (place + 0.5) * _ACROSS / len(values), value)
            for place, value in enumerate(values)
        ]
        for known, part in groupby(places, key=lambda place: place[2] is not None):
            if known:
                drawn += format_html(
                    '<polyline class="workflow-storage-{}" vector-effect="non-scaling-stroke"'
                    ' points="{}"/>',
                    line,
                    " ".join(
                        f"{_pixels(x)},{_pixels(_PLOT - axis.height(value or 0.0))}"
                        for _place, x, value in part
                    ),
                )
    return format_html(
        '<svg aria-hidden="true" class="workflow-storage-chart-lines" x="0" y="{}" width="100%"'
        ' height="{}" viewBox="0 0 {} {}" preserveAspectRatio="none">{}</svg>',
        str(_TOP),
        str(_PLOT),
        str(_ACROSS),
        str(_PLOT),
        drawn,
    )


def _tick_labels(points: Sequence[TimePoint]) -> SafeString:
    """Return the labels below a chart: so many that they do not overlap."""
    is_long = max(len(point.tick) for point in points) > 9
    every, first = math.ceil(len(points) / (6 if is_long else MAX_LABELS)), 0
    if len(points) > 1 and points[1].start - points[0].start < timedelta(hours=12):
        # Hours are easier to read at 0, 3, 6 than at 2, 5, 8.
        every = next((hours for hours in (1, 2, 3, 4, 6, 8, 12) if hours >= every), 24)
        first = next(
            (place for place, each in enumerate(points) if _local(each.start).hour % every == 0), 0
        )
    labels = _NO_MARKUP
    for number, place in enumerate(range(first, len(points), every)):
        x = (place + 0.5) / len(points)
        anchor = "start" if x < 0.05 else "end" if x > 0.95 else "middle"
        labels += format_html(
            '<text class="workflow-storage-chart-text{}" x="{}" y="{}" text-anchor="{}">{}</text>',
            f" workflow-storage-chart-{_SPARED[number % 4]}",
            _percent({"start": 0, "end": 1}.get(anchor, x)),
            str(_TOP + _PLOT + 16),
            anchor,
            points[place].tick,
        )
    return format_html('<g aria-hidden="true">{}</g>', labels)


def _place(place: int, count: int) -> tuple[float, float]:
    """Return the left side and the width of a bar; a few bars are not as wide as they could be."""
    width = min(0.76 / count, 0.08)
    return (place + 0.5) / count - width / 2, width


def _stacked(axis: Axis, counts: Sequence[int]) -> list[float]:
    """Return the heights of bars on each other, each of them high enough to be seen."""
    heights = [max(axis.height(count), _LEAST) for count in counts]
    if heights:
        tallest = heights.index(max(heights))
        excess = sum(heights) - axis.height(sum(counts))
        heights[tallest] = max(heights[tallest] - excess, _LEAST)
    return heights


# Numbers


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%"


def _pixels(number: float) -> str:
    return f"{number:.1f}"


def round_ticks(most: float, *, least: float) -> tuple[float, ...]:
    """Return two to four round numbers: 0, and up to one that is not below the largest value.

    Args:
        most: the largest value, above 0.
        least: the smallest step.
    """
    power = 10.0 ** (math.floor(math.log10(most)) - 1)
    return _ticks(most, [max(power * by, least) for by in (1, 2, 5, 10, 20, 50, 100)])


def duration_ticks(most: float) -> tuple[float, ...]:
    """Return round seconds, minutes or hours, as `round_ticks` does numbers."""
    if most <= 60:
        return round_ticks(most or 1.0, least=0)
    hours = most / 3600
    minutes = [60.0 * by for by in (0.5, 1, 2, 5, 10, 20, 30, 60, 120, 240)]
    return (
        _ticks(most, minutes)
        if hours <= 12
        else tuple(3600 * tick for tick in round_ticks(hours, least=1))
    )


def _ticks(most: float, steps: Iterable[float]) -> tuple[float, ...]:
    step = next(step for step in steps if most <= 3 * step)
    # 3 * 0.1 is not 0.3: a value on a tick is not above it.
    return tuple(step * place for place in range(math.ceil(round(most / step, 9)) + 1))


def _duration_tick(seconds: float) -> str:
    return duration_text(seconds) if seconds else "0"


def _amount_tick(value: float, step: float, *, is_cost: bool) -> str:
    """Return an amount in short: 200k, $0.05."""
    if not value:
        return "0"
    # Translators: short for a billion, a million and a thousand, behind a number on an axis.
    billion, million, thousand = (
        pgettext("number", "%(number)sB"),
        pgettext("number", "%(number)sM"),
        pgettext("number", "%(number)sk"),
    )
    size, text = next(
        (one for one in ((1e9, billion), (1e6, million), (1e3, thousand)) if step >= one[0]),
        (1.0, "%(number)s"),
    )
    decimals = max(-math.floor(math.log10(step / size)), 0)
    amount = text % {"number": number_format(value / size, decimals)}
    return dollars_text(amount) if is_cost else amount


def _nothing(point: TimePoint) -> str:
    return _("%(label)s: %(text)s") % {"label": point.label, "text": _("nothing to show")}


def _status_text(status: str) -> str:
    return str(RunStatus(status).label)

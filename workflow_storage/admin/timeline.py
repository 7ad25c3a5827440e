"""The timeline of one run for its page in the admin: bars on a scale beside a table of the same.

`bands` computes what is shown, and `timeline` renders it.
"""

from __future__ import annotations

import zlib
from datetime import datetime, timedelta
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, NamedTuple

from django.conf import settings
from django.template.loader import render_to_string
from django.utils import timezone
from django.utils.formats import date_format, get_format
from django.utils.timesince import timesince
from django.utils.translation import gettext as _
from django.utils.translation import ngettext

from workflow_storage.admin.bands import (
    CELLS,
    EPOCH,
    LABEL,
    LEVELS,
    SIGNS,
    Axis,
    Band,
    Bands,
    Execution,
    NodeTotals,
    folded,
    longest_of,
)
from workflow_storage.admin.rendering import (
    NOTHING,
    cost_text,
    count_text,
    duration_text,
    tokens_text,
)
from workflow_storage.status import RunStatus

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from django.utils.safestring import SafeString

    from workflow_storage.base import Attempt, Step
    from workflow_storage.models import WorkflowRun

MOST_BARS = 60
"""Steps up to which each has a bar of its own; more are folded by node."""

STEPS_PER_PAGE = 500
"""Steps on a page of all steps."""

_HEIGHT = LEVELS + 2  # so that the least one can be seen


def timeline(
    run: WorkflowRun,
    steps: Iterable[Step],
    attempts: Sequence[Attempt],
    *,
    step_url: Callable[[int], str] | None = None,
    all_steps: bool = False,
    first: int = 0,
    page_url: Callable[[int], str] | None = None,
    now: datetime | None = None,
) -> SafeString:
    """Return the timeline of a run as HTML; the page has to load ``workflow_storage/timeline.css``.

    A run of up to `MOST_BARS` steps has a bar for each; a longer one has a row for each node. A
    page shows one timeline of a run.

    Args:
        run: which run.
        steps: its steps, oldest first, as `iter_steps` yields them. They are read once; with
            `all_steps` no further than the page. For a page they may begin with the step before
            `first`, which tells when that one began.
        attempts: as `list_attempts` returns them.
        step_url: the address of the page of a step; None if steps are not to be links.
        all_steps: show a plain table of each step, `STEPS_PER_PAGE` on a page, without bars.
        first: with `all_steps`, the number of the step that the page begins with.
        page_url: the address of the page of all steps that begins with the step of that number;
            0 for the first page. Without it, there are no links between pages.
        now: until when a running run is shown; None for the time it is.
    """
    bands = Bands(run, attempts, now or timezone.now())
    pages = _Page(step_url, page_url)
    if all_steps:
        return pages.of_steps(run, bands, steps, first)
    ahead = iter(steps)
    head = list(islice(ahead, MOST_BARS + 1))
    if len(head) > MOST_BARS:
        return pages.of_nodes(run, bands, chain(head, ahead))
    return pages.of_bars(run, bands, head)


class _Mark(NamedTuple):
    """A sign and a word, for what its colour says, too."""

    name: str
    """Of its class."""
    sign: str
    word: str
    times: str = ""
    """How often, where that is more than once."""


class _Bar(NamedTuple):
    """A bar, in attributes of SVG."""

    name: str
    x: str
    width: str
    sign: str = ""
    sign_x: str = ""
    sign_side: str = ""


class _Row(NamedTuple):
    """A step, or a node that has no checkpoint, as text."""

    step: str
    url: str
    node: str
    is_after: bool
    marks: list[_Mark]
    start: str
    duration: str
    tokens: str
    cost: str
    bar: _Bar | None


class _Group(NamedTuple):
    """An attempt as text, with its rows."""

    gap: str
    label: str
    details: list[str]
    rows: list[_Row]


class _Page(NamedTuple):
    """Renders what was computed, with the addresses of the page that it is shown on."""

    step_url: Callable[[int], str] | None
    page_url: Callable[[int], str] | None

    def of_bars(self, run: WorkflowRun, bands: Bands, steps: Iterable[Step]) -> SafeString:
        """Render a bar for each step."""
        placed = [bands.place(step) for step in steps]
        in_order = bands.in_order()
        axis = Axis(in_order)
        shown = [band for band in in_order if band.steps or band.x is not None]
        return _rendered(
            "bars",
            caption=_counted(in_order, len(placed)),
            left_out=_left_out_text(len(in_order) - len(shown)),
            groups=self._groups(shown, placed, axis),
            is_estimated=_is_estimated(placed, shown),
            axis=_axis_text(run, axis),
            waiting=_waiting_text(run, in_order),
        )

    def of_nodes(self, run: WorkflowRun, bands: Bands, steps: Iterable[Step]) -> SafeString:
        """Render a row for each node."""
        nodes, others, in_order = folded(bands, steps)
        axis = Axis(in_order)
        most = max(nodes, key=lambda node: node.seconds)
        rows = [_node_row(node, axis, is_most=node is most and len(nodes) > 1) for node in nodes]
        if others:
            rest = NodeTotals(
                ngettext("%(count)s other node", "%(count)s other nodes", len(others))
                % {"count": count_text(len(others))}
            )
            for node in others:
                rest.merge(node)
            rows.append({**_node_row(rest, axis, is_most=False), "is_rest": True})
        return _rendered(
            "nodes",
            caption=_("%(steps)s, by node")
            % {"steps": _counted(in_order, sum(band.steps for band in in_order))},
            left_out=_left_out_text(len(in_order) - len(axis.bands)),
            rows=rows,
            cells=f"0 0 {CELLS} {_HEIGHT}",
            groups=self._groups(axis.bands, (), axis),
            is_estimated=any(not node.is_measured for node in chain(nodes, others)),
            axis=_axis_text(run, axis),
            waiting=_waiting_text(run, in_order),
            all_url=self.page_url(0) if self.page_url else "",
        )

    def of_steps(
        self, run: WorkflowRun, bands: Bands, steps: Iterable[Step], first: int
    ) -> SafeString:
        """Render a page of the plain table of all steps."""
        placed: list[tuple[Band, Execution]] = []
        is_first_known = first > 0
        following: int | None = None
        for step in steps:
            if len(placed) == STEPS_PER_PAGE:
                following = step["step"]
                break
            found = bands.place(step, is_first_known=is_first_known)
            is_first_known = False
            if step["step"] >= first:
                placed.append(found)
        in_order = bands.in_order()
        shown = _bands_of_page(in_order, placed, first=first, has_more=following is not None)
        if following is not None and shown:
            shown[-1].ending = None
        numbers = [execution.step for _band, execution in placed]
        return _rendered(
            "steps",
            caption=_("Steps %(first)s to %(last)s") % {"first": numbers[0], "last": numbers[-1]}
            if numbers
            else _("No steps yet."),
            groups=self._groups(shown, placed, None),
            is_estimated=_is_estimated(placed, shown),
            waiting=_waiting_text(run, in_order) if following is None else "",
            first_url=self.page_url(0) if self.page_url and first > 0 else "",
            next_url=self.page_url(following) if self.page_url and following is not None else "",
        )

    def _groups(
        self,
        bands: Sequence[Band],
        placed: Iterable[tuple[Band, Execution]],
        axis: Axis | None,
    ) -> list[_Group]:
        executions: dict[Band, list[Execution]] = {band: [] for band in bands}
        for band, execution in placed:
            executions[band].append(execution)
        longest = longest_of(chain.from_iterable(executions.values())) if axis else None
        groups = []
        before: Band | None = None
        for band in bands:
            here = executions[band]
            if band.ending is not None:
                here.append(band.ending)
            groups.append(
                _Group(
                    gap=_gap_text(band.begin - before.end) if before else "",
                    label=_band_label(band, is_alone=len(bands) == 1),
                    details=_band_details(band),
                    rows=[
                        self._row(band, execution, axis, is_longest=execution is longest)
                        for execution in here
                    ],
                )
            )
            before = band
        return groups

    def _row(
        self, band: Band, execution: Execution, axis: Axis | None, *, is_longest: bool
    ) -> _Row:
        step = execution.step
        marks = [_Mark("longest", "▲", _("longest"))] if is_longest else []
        if (mark := _mark(execution.status)) is not None:
            marks.append(mark)
        return _Row(
            step="" if step is None else str(step),
            url=self.step_url(step) if self.step_url and step is not None else "",
            node=execution.node,
            is_after=execution.is_after,
            marks=marks,
            start=_time_text(execution.begin, beside=band.begin),
            duration=_length_text(execution.length, is_measured=execution.seconds is not None),
            tokens=tokens_text(execution.tokens),
            cost=cost_text(execution.cost_usd),
            bar=_bar(axis.bar(band, execution), execution, marks) if axis else None,
        )


def _rendered(template: str, **context: Any) -> SafeString:
    return render_to_string(f"admin/workflow_storage/timeline/{template}.html", context)


def _counted(bands: Sequence[Band], steps: int) -> str:
    """Return how many steps there are, in how many attempts."""
    text = ngettext("%(count)s step", "%(count)s steps", steps) % {"count": count_text(steps)}
    attempts = sum(not band.is_outside and band.number > 0 for band in bands)
    if not attempts:
        return text
    return ngettext(
        "%(steps)s in %(count)s attempt", "%(steps)s in %(count)s attempts", attempts
    ) % {"steps": text, "count": count_text(attempts)}


def _left_out_text(bands: int) -> str:
    if not bands:
        return ""
    return ngettext(
        "%(count)s earlier attempt is left out of the chart.",
        "%(count)s earlier attempts are left out of the chart.",
        bands,
    ) % {"count": count_text(bands)}


def _bands_of_page(
    bands: Sequence[Band],
    placed: Sequence[tuple[Band, Execution]],
    *,
    first: int,
    has_more: bool,
) -> list[Band]:
    """Return the attempts that a page shows: of its steps, and those without any between them."""
    with_rows = {band for band, _execution in placed}
    if not with_rows and first > 0:
        return []
    places = [place for place, band in enumerate(bands) if band in with_rows]
    begin = places[0] if first > 0 else 0
    end = places[-1] + 1 if has_more else len(bands)
    return [band for band in bands[begin:end] if band in with_rows or not band.steps]


def _is_estimated(placed: Iterable[tuple[Band, Execution]], shown: Iterable[Band]) -> bool:
    """Whether a length is shown that was not measured."""
    executions = chain(
        (execution for _band, execution in placed),
        (band.ending for band in shown if band.ending is not None),
    )
    return any(execution.seconds is None and execution.length > 0 for execution in executions)


def _node_row(node: NodeTotals, axis: Axis, *, is_most: bool) -> dict[str, Any]:
    by_status: dict[str, int] = {}
    for _band, ending in node.endings:
        by_status[ending.status] = by_status.get(ending.status, 0) + 1
    marks = [
        mark._replace(times=count_text(count) if count > 1 else "")
        for status, count in by_status.items()
        if (mark := _mark(status))
    ]
    bars = [
        _bar(place, ending, [mark])
        for band, ending in node.endings
        if (place := axis.bar(band, ending)) and (mark := _mark(ending.status))
    ]
    if is_most and node.seconds > 0:
        marks.append(_Mark("longest", "▲", _("most time")))
    has_runs = node.runs > 0
    return {
        "node": node.node,
        "marks": marks,
        "runs": count_text(node.runs),
        "total": _length_text(node.seconds, is_measured=node.is_measured) if has_runs else NOTHING,
        "mean": _length_text(node.mean, is_measured=node.is_measured),
        "longest": _length_text(node.longest, is_measured=node.is_measured)
        if has_runs
        else NOTHING,
        "tokens": tokens_text(node.tokens),
        "cost": cost_text(node.cost_usd),
        "path": "".join(
            f"M{x} {_HEIGHT}h{width}v-{level + 2}h-{width}z" for x, width, level in node.marks(axis)
        ),
        "bars": bars,
    }


def _axis_text(run: WorkflowRun, axis: Axis) -> dict[str, Any]:
    """Return the axis in attributes of SVG, with its labels."""
    labels = []
    for band in axis.bands:
        if not band.is_outside and band.number and len(axis.bands) > 1:
            number = str(band.number)
            if band.width >= LABEL:
                labels.append((_percent(band.x), _("Attempt %(number)s") % {"number": number}))
            elif band.width >= LABEL / 4:
                labels.append((_percent(band.x), number))
    has_room = axis.gap >= LABEL / 2
    return {
        # An id of the page's own: two runs on one page have two.
        "id": f"workflow-storage-timeline-{zlib.crc32(run.pk.encode()):x}",
        "bands": [(_percent(band.x), _percent(band.width)) for band in axis.bands],
        "labels": labels,
        "ticks": [_percent(x) for x, _seconds, _has_label in axis.ticks],
        "tick_labels": [
            (_percent(x), duration_text(seconds) if seconds else "0")
            for x, seconds, has_label in axis.ticks
            if has_label
        ],
        "breaks": [
            (
                _percent(x - 0.4),
                _percent(x + 0.4),
                _percent(x),
                _span_text(seconds, depth=1) if has_room and seconds > 0 else "",
            )
            for x, seconds in axis.gaps
        ],
    }


def _mark(status: str) -> _Mark | None:
    if status not in SIGNS:
        return None
    return _Mark(status, SIGNS[status], str(RunStatus(status).label))


def _bar(
    place: tuple[float, float] | None, execution: Execution, marks: Sequence[_Mark]
) -> _Bar | None:
    if place is None:
        return None
    x, width = place
    name = marks[0].name if marks else ""
    if not name and execution.seconds is None:
        name = "estimated"
    bar = _Bar(name or "measured", _percent(x), _percent(width))
    if not marks:
        return bar
    is_left = x + width > 96.0
    return bar._replace(
        sign=marks[0].sign,
        sign_x=_percent(x if is_left else x + width),
        sign_side="left" if is_left else "right",
    )


def _percent(value: float | None) -> str:
    # Not by a template, which would write it as the language does.
    return f"{value or 0.0:.2f}%"


def _band_label(band: Band, *, is_alone: bool) -> str:
    if band.is_outside or not band.number:
        return "" if is_alone else _("Outside of an attempt")
    number = str(band.number)
    worker = band.attempt and band.attempt.worker
    if not worker:
        return _("Attempt %(number)s") % {"number": number}
    return _("Attempt %(number)s, %(worker)s") % {"number": number, "worker": worker}


def _band_details(band: Band) -> list[str]:
    """Return when an attempt began, how it ended, and how long it took."""
    details = [_time_text(band.begin, beside=None)]
    if band.attempt is not None:
        details.append(_status_text(band.attempt.status))
    if band.is_lost:
        details.append(
            _("no sign of life after %(time)s") % {"time": _time_text(band.end, beside=band.begin)}
        )
    elif band.end > band.begin:
        details.append(_length_text(band.end - band.begin, is_measured=True))
    return details


def _status_text(status: str) -> str:
    if status == RunStatus.PENDING:
        return _("suspended")
    return str(RunStatus(status).label) if status in RunStatus.values else status


def _waiting_text(run: WorkflowRun, bands: Sequence[Band]) -> str:
    """Return for what a run waits, and since when, if it is pending."""
    if run.status != RunStatus.PENDING:
        return ""
    since = _time_text(bands[-1].end, beside=None) if bands else ""
    if not run.waiting_for:
        return _("Pending since %(time)s") % {"time": since} if since else _("Not begun yet")
    if not since:
        return _("Waiting for %(what)s") % {"what": run.waiting_for}
    return _("Waiting for %(what)s since %(time)s") % {"what": run.waiting_for, "time": since}


def _gap_text(seconds: float) -> str:
    if seconds <= 0:
        # Two clocks, or a worker that went on after another one had taken over.
        return _("then")
    return _("%(time)s later") % {"time": _span_text(seconds, depth=2)}


def _span_text(seconds: float, *, depth: int) -> str:
    """Return the time between two attempts in words."""
    moment = _moment(seconds)
    if seconds < 60 or moment is None:
        return duration_text(round(seconds, 6))
    return timesince(EPOCH, moment, depth=depth)


def _length_text(seconds: float | None, *, is_measured: bool) -> str:
    if seconds is None or (not is_measured and seconds <= 0):
        return NOTHING
    # In microseconds: the difference of two times is not as exact as it looks.
    text = duration_text(max(round(seconds, 6), 0.0))
    return text if is_measured else f"≈ {text}"


def _moment(seconds: float) -> datetime | None:
    """Return the time of seconds since 1970, in the time zone that pages are shown in."""
    try:
        moment = EPOCH + timedelta(seconds=seconds)
        return timezone.localtime(moment) if settings.USE_TZ else moment
    except OverflowError:
        return None


def _time_text(seconds: float, *, beside: float | None) -> str:
    """Return a time of day, to the millisecond.

    Args:
        seconds: since 1970.
        beside: a time whose day need not be said again.
    """
    # In whole milliseconds, as 9.9999 would otherwise become 9.999 beside 10.000.
    moment = _moment(round(seconds, 3))
    if moment is None:
        return NOTHING
    milliseconds = f"{moment.microsecond // 1000:03}"
    time = f"{moment:%H:%M:%S}{get_format('DECIMAL_SEPARATOR')}{milliseconds}"
    if beside is None:
        return f"{date_format(moment, 'DATE_FORMAT')} {time}"
    other = _moment(beside)
    if other is not None and other.date() == moment.date():
        return time
    return f"{date_format(moment, 'SHORT_DATE_FORMAT')} {time}"

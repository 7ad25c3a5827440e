"""The timeline of one run for its page in the admin: bars on a scale beside a table of the same.

What is shown is computed first (`Bands`, `Axis`, `folded`), in seconds and per cent, and then
rendered by `timeline`. Steps are read once, as they come from `iter_steps`.
"""

from __future__ import annotations

import zlib
from array import array
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import accumulate, chain, groupby, islice, pairwise
from math import ceil, inf, isfinite, log10
from typing import TYPE_CHECKING, Any, NamedTuple

from django.conf import settings
from django.template.loader import render_to_string
from django.utils import timezone
from django.utils.formats import date_format, get_format
from django.utils.timesince import timesince
from django.utils.translation import gettext as _
from django.utils.translation import ngettext

from workflow_storage.admin.rendering import (
    NOTHING,
    cost_text,
    count_text,
    duration_text,
    tokens_text,
)
from workflow_storage.attempts import TAKEN_OVER
from workflow_storage.base import Attempt
from workflow_storage.status import RunStatus

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from django.utils.safestring import SafeString

    from workflow_storage.base import Step
    from workflow_storage.models import WorkflowRun

MOST_BARS = 60
"""Steps up to which each has a bar of its own; more are folded by node."""

MOST_NODES = 60
"""Nodes that a folded timeline has a row for: those that took the most time."""

MOST_ATTEMPTS = 40
"""Attempts on the axis: the newest ones."""

STEPS_PER_PAGE = 500
"""Steps on a page of all steps."""

CELLS = 400
"""Parts of the axis that a folded timeline tells apart."""

LEVELS = 4
"""How busy a node can be in one of them."""

_HEIGHT = LEVELS + 2  # so that the least one can be seen

_LEAST_BAR = 0.4  # per cent of the axis, so that a bar can be seen
_LEAST_BAND = 0.8
_GAP = 14.0
_ALL_GAPS = 30.0
_LABEL = 14.0  # per cent that the label of an attempt or a tick needs

_TICKS = (
    *(digit * 10.0**power for power in range(-4, 1) for digit in (1, 2, 5)),
    *(10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400),
)

_LOST = (TAKEN_OVER, "Stalled: no sign of life")
"""How the error of an attempt begins whose end nobody saw: it was only found to be dead."""

_SIGNS: dict[str, str] = {
    RunStatus.FAILED.value: "✕",
    RunStatus.CANCELLED.value: "■",
    RunStatus.RUNNING.value: "▸",
}
"""What an attempt can be in without a checkpoint, by its status."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Execution(NamedTuple):
    """A node at work, in seconds since 1970."""

    node: str
    begin: float
    end: float
    step: int | None = None
    """None where it ended without a checkpoint, or has not ended."""
    seconds: float | None = None
    """How long it took; None where that was not measured."""
    tokens: int | None = None
    cost_usd: float | None = None
    status: str = ""
    """Of one without a checkpoint: what became of the attempt in it."""
    is_after: bool = False
    """Of one without a checkpoint: whether it may also be whatever came after that node."""

    @property
    def length(self) -> float:
        """Seconds that it took, or that lie between it and what came before."""
        return self.end - self.begin if self.seconds is None else self.seconds


@dataclass(slots=True, eq=False)
class Band:
    """An attempt, or a time outside of attempts: what ran in it, and its place on the axis."""

    number: int
    """Of the attempt; of the attempt before for a time outside."""
    attempt: Attempt | None = None
    """None for a time outside, and for an attempt that only its steps tell of."""
    is_outside: bool = False
    begin: float = inf
    """Seconds since 1970."""
    end: float = -inf
    last: float | None = None
    """When its newest step was saved."""
    node: str | None = None
    """Of its newest step."""
    steps: int = 0
    ending: Execution | None = None
    """What it was in when it ended without a checkpoint, or what it is in now."""
    x: float | None = None
    """Where it begins, in per cent of the axis; None if it is not shown there."""
    width: float = 0.0

    @property
    def is_lost(self) -> bool:
        """Whether nobody saw it end."""
        message = (self.attempt and self.attempt.error_message) or ""
        return message.startswith(_LOST)

    def spans(self, begin: float, end: float) -> None:
        """Make it reach from a time or earlier to a time or later."""
        self.begin = min(self.begin, begin)
        self.end = max(self.end, end)


class Bands:
    """The attempts of a run, which its steps are placed in one after the other."""

    def __init__(self, run: WorkflowRun, attempts: Iterable[Attempt], now: datetime) -> None:
        self._run = run
        self._now = seconds_of(now)
        self._bands: dict[tuple[int, bool], Band] = {}
        self._reached = 0
        known = [_as_the_run_says(attempt, run) for attempt in attempts]
        for attempt in known or _attempts_of(run):
            band = Band(attempt.number, attempt)
            if attempt.started_at is not None:
                band.spans(*[seconds_of(attempt.started_at)] * 2)
            self._bands[attempt.number, False] = band
        # Without attempts, whatever there is belongs to the run.
        self._catch_all = next(iter(self._bands.values()), None) if not known else None

    def place(self, step: Step, *, is_first_known: bool = False) -> tuple[Band, Execution]:
        """Return in which attempt a step ran, and from when to when.

        Args:
            step: those before it have been placed before.
            is_first_known: there are others before it, which nobody knows here.
        """
        end = seconds_of(step["created_at"])
        band = self._band_of(step["attempt"], end)
        seconds = step["duration_seconds"]
        if seconds is not None:
            begin = end - max(seconds, 0.0)
        elif is_first_known:
            begin = end
        else:
            # A clock that went back gives no negative time.
            begin = min(end, band.begin if band.last is None else band.last)
        band.spans(begin, end)
        band.last, band.node = end, step["node_id"]
        band.steps += 1
        self._reached = max(self._reached, band.number)
        return band, Execution(
            step["node_id"],
            begin,
            end,
            step["step"],
            seconds,
            step["tokens"],
            step["cost_usd"],
        )

    def in_order(self) -> list[Band]:
        """Return the bands, oldest first, with their ends, once all steps have been placed."""
        bands = [band for _key, band in sorted(self._bands.items())]
        for band in bands:
            self._end(band)
        return [band for band in bands if isfinite(band.begin)]

    def _band_of(self, number: int | None, moment: float) -> Band:
        if number is not None:
            key = (number, False)
        elif self._catch_all is not None:
            return self._catch_all
        elif (during := self._during(moment)) is not None:
            return during
        else:
            key = (self._reached, True)
        if key not in self._bands:
            self._bands[key] = Band(key[0], is_outside=key[1])
        return self._bands[key]

    def _during(self, moment: float) -> Band | None:
        """Return the newest attempt that had begun at a time, and not ended."""
        for band in reversed(self._bands.values()):
            if band.attempt is not None and band.attempt.started_at is not None:
                ended_at = band.attempt.ended_at
                is_over = ended_at is not None and moment > seconds_of(ended_at)
                if seconds_of(band.attempt.started_at) <= moment and not is_over:
                    return band
        return None

    def _end(self, band: Band) -> None:
        attempt = band.attempt
        if attempt is None:
            return
        end = None if attempt.ended_at is None else seconds_of(attempt.ended_at)
        status = attempt.status
        if status == RunStatus.RUNNING:
            if self._run.status == RunStatus.RUNNING:
                end = self._now
            else:  # The list of attempts is older than the run.
                status = ""
        elif band.is_lost:
            # It may have been found a day later. What is known is the last sign of life.
            heartbeat = self._run.heartbeat_at if attempt.number == self._run.attempt else None
            end = None if heartbeat is None else seconds_of(heartbeat)
        begin = band.begin if band.last is None else band.last
        if not isfinite(begin):
            begin = end if end is not None else inf
        end = begin if end is None else max(begin, end)
        if not isfinite(end):
            return
        band.spans(min(band.begin, end), end)
        if status in _SIGNS:
            band.ending = Execution(
                attempt.node or NOTHING,
                begin,
                end,
                status=status,
                # Nothing is written when a node is entered, so that this may be the next one.
                is_after=attempt.node is not None and attempt.node == band.node,
            )


def _as_the_run_says(attempt: Attempt, run: WorkflowRun) -> Attempt:
    """Return an attempt; of the current one, the run knows more than a list read before it."""
    if attempt.number != run.attempt or run.status == RunStatus.PENDING:
        return attempt
    return attempt._replace(
        status=run.status,
        node=run.current_node,
        ended_at=run.completed_at,
        error_message=run.error_message,
    )


def _attempts_of(run: WorkflowRun) -> Iterator[Attempt]:
    """Yield what a run that was never begun, as others know it, tells of its only attempt."""
    if run.status != RunStatus.PENDING:
        yield Attempt(
            number=run.attempt,
            started_at=run.attempt_started_at or run.started_at,
            ended_at=run.completed_at,
            status=run.status,
            error_message=run.error_message,
            node=run.current_node,
            worker=run.worker,
        )


class Axis:
    """The scale that all attempts share, with breaks between them.

    Attributes:
        bands: the attempts on it; each knows its place.
        scale: per cent of the axis for a second.
        gap: per cent of the axis for the time between two attempts, however long.
    """

    def __init__(self, bands: Sequence[Band]) -> None:
        self.bands = bands[-MOST_ATTEMPTS:]
        count = max(len(self.bands), 1)
        self.gap = min(_GAP, _ALL_GAPS / (count - 1)) if count > 1 else 0.0
        room = 100.0 - self.gap * (count - 1) - _LEAST_BAND * count
        total = sum(band.end - band.begin for band in self.bands)
        self.scale = room / total if total > 0 and isfinite(total) else 0.0
        x = 0.0
        for band in self.bands:
            length = (band.end - band.begin) * self.scale if self.scale else room / count
            band.x, band.width = x, _LEAST_BAND + length
            x += band.width + self.gap

    def bar(self, band: Band, execution: Execution) -> tuple[float, float] | None:
        """Return where an execution begins, and its width; None if its attempt is not shown."""
        return self.span(band, execution.begin, execution.end)

    def span(
        self, band: Band, begin: float, end: float, *, least: float = _LEAST_BAR
    ) -> tuple[float, float] | None:
        """Return where a time begins, and its width; None if its attempt is not shown."""
        if band.x is None:
            return None
        x = band.x + min(max(begin - band.begin, 0.0) * self.scale, band.width - _LEAST_BAR)
        width = max((end - begin) * self.scale, least)
        return x, min(width, band.x + band.width - x)

    @property
    def gaps(self) -> list[tuple[float, float]]:
        """The middle of each gap on the axis, and its true length in seconds."""
        return [
            (after.x - self.gap / 2, after.begin - before.end)
            for before, after in pairwise(self.bands)
            if after.x is not None
        ]

    @property
    def ticks(self) -> list[tuple[float, float, bool]]:
        """Where the ticks are, how long after the start of their attempt, and if one has a label.

        That is if it has room.
        """
        if not self.scale:
            return []
        length = self._tick_length()
        found = []
        for band in self.bands:
            x = band.x or 0.0
            found += [
                (
                    x + place,
                    number * length,
                    place + (_LABEL if number else _LABEL / 4) <= band.width,
                )
                for number in range(int((band.end - band.begin) / length) + 1)
                if (place := number * length * self.scale) <= band.width
            ]
        return found

    def _tick_length(self) -> float:
        least = _LABEL / self.scale
        for length in _TICKS:
            if length >= least:
                return length
        return 86400 * 10.0 ** ceil(log10(least / 86400))


@dataclass(slots=True)
class NodeTotals:
    """All executions of a node together."""

    node: str
    runs: int = 0
    seconds: float = 0.0
    longest: float = 0.0
    is_measured: bool = True
    tokens: int | None = None
    cost_usd: float | None = None
    times: dict[Band, array[float]] = field(default_factory=dict)
    """By attempt, when each began and ended, one after the other."""
    endings: list[tuple[Band, Execution]] = field(default_factory=list)

    @property
    def mean(self) -> float | None:
        """Seconds that one execution took."""
        return self.seconds / self.runs if self.runs else None

    def add(self, band: Band, execution: Execution) -> None:
        """Count an execution that ended with a checkpoint."""
        self.runs += 1
        self.seconds += execution.length
        self.longest = max(self.longest, execution.length)
        self.is_measured &= execution.seconds is not None
        self._spend(execution.tokens, execution.cost_usd)
        if band not in self.times:
            self.times[band] = array("d")
        self.times[band].extend((execution.begin, execution.end))

    def merge(self, other: NodeTotals) -> None:
        """Add those of another node."""
        self.runs += other.runs
        self.seconds += other.seconds
        self.longest = max(self.longest, other.longest)
        self.is_measured &= other.is_measured
        self._spend(other.tokens, other.cost_usd)
        for band, times in other.times.items():
            self.times.setdefault(band, array("d")).extend(times)

    def marks(self, axis: Axis) -> list[tuple[int, int, int]]:
        """Return how busy it was along the axis, as (first cell, cells, level), of `CELLS`.

        The level is from 1, for cells in which it ran at all, to `LEVELS`, all the time.
        """
        busy = [0.0] * (CELLS + 1)
        whole = [0] * (CELLS + 1)  # Changes from cell to cell, so that long ones cost no more.
        for band, times in self.times.items():
            both = iter(times)
            for begin, end in zip(both, both, strict=True):
                place = axis.span(band, begin, end, least=0.0)
                if place is None:
                    continue
                left = min(place[0] * CELLS / 100, CELLS - 1)
                right = min(left + place[1] * CELLS / 100, CELLS)
                first, last = int(left), int(right)
                if first == last:
                    busy[first] += max(right - left, 1e-9)
                else:
                    busy[first] += first + 1 - left
                    busy[last] += right - last
                    whole[first + 1] += 1
                    whole[last] -= 1
        levels = [
            min(ceil((part + parallel) * LEVELS), LEVELS)
            for part, parallel in zip(busy[:CELLS], accumulate(whole), strict=False)
        ]
        cells = groupby(range(CELLS), key=levels.__getitem__)
        runs = [(level, list(places)) for level, places in cells if level]
        return [(places[0], len(places), level) for level, places in runs]

    def _spend(self, tokens: int | None, cost_usd: float | None) -> None:
        if tokens is not None:
            self.tokens = (self.tokens or 0) + tokens
        if cost_usd is not None:
            self.cost_usd = (self.cost_usd or 0.0) + cost_usd


def folded(
    bands: Bands, steps: Iterable[Step]
) -> tuple[list[NodeTotals], list[NodeTotals], list[Band]]:
    """Return what each node took, in the order of their first steps.

    Args:
        bands: of the run, to place the steps in.
        steps: all of them.

    Returns:
        The nodes that have a row, which are those that took the most time and those that an
        attempt ended in; the other nodes; and the bands in their order.
    """
    nodes: dict[str, NodeTotals] = {}
    for step in steps:
        band, execution = bands.place(step)
        if execution.node not in nodes:
            nodes[execution.node] = NodeTotals(execution.node)
        nodes[execution.node].add(band, execution)
    in_order = bands.in_order()
    for band in in_order[-MOST_ATTEMPTS:]:
        if band.ending is not None:
            node = nodes.setdefault(band.ending.node, NodeTotals(band.ending.node))
            node.endings.append((band, band.ending))
    by_time = sorted(nodes.values(), key=lambda node: (not node.endings, -node.seconds))
    shown = {node.node for node in by_time[:MOST_NODES]}
    return (
        [node for node in nodes.values() if node.node in shown],
        by_time[MOST_NODES:],
        in_order,
    )


def longest_of(executions: Iterable[Execution]) -> Execution | None:
    """Return the execution that took longest, of those measured if any was; None of one or none.

    Args:
        executions: those that ended with a checkpoint count.
    """
    ended = [execution for execution in executions if execution.step is not None]
    measured = [execution for execution in ended if execution.seconds is not None]
    longest = max(measured or ended, key=lambda execution: execution.length, default=None)
    return longest if len(ended) > 1 and longest is not None and longest.length > 0 else None


def seconds_of(moment: datetime) -> float:
    """Return a time as seconds since 1970; a naive one as if it were UTC, only to compare."""
    aware = moment.replace(tzinfo=UTC) if timezone.is_naive(moment) else moment
    return (aware - _EPOCH).total_seconds()


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
            if band.width >= _LABEL:
                labels.append((_percent(band.x), _("Attempt %(number)s") % {"number": number}))
            elif band.width >= _LABEL / 4:
                labels.append((_percent(band.x), number))
    has_room = axis.gap >= _LABEL / 2
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
    if status not in _SIGNS:
        return None
    return _Mark(status, _SIGNS[status], str(RunStatus(status).label))


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
    return timesince(_EPOCH, moment, depth=depth)


def _length_text(seconds: float | None, *, is_measured: bool) -> str:
    if seconds is None or (not is_measured and seconds <= 0):
        return NOTHING
    # In microseconds: the difference of two times is not as exact as it looks.
    text = duration_text(max(round(seconds, 6), 0.0))
    return text if is_measured else f"≈ {text}"


def _moment(seconds: float) -> datetime | None:
    """Return the time of seconds since 1970, in the time zone that pages are shown in."""
    try:
        moment = _EPOCH + timedelta(seconds=seconds)
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

"""Where the nodes of a run are on a scale of its time: computed, for `timeline` to render.

In seconds and per cent. Steps are read once, as they come from `iter_steps`.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import accumulate, groupby, pairwise
from math import ceil, inf, isfinite, log10
from typing import TYPE_CHECKING, NamedTuple

from django.utils import timezone

from workflow_storage.admin.rendering import NOTHING
from workflow_storage.attempts import TAKEN_OVER
from workflow_storage.base import Attempt
from workflow_storage.status import RunStatus

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from workflow_storage.base import Step
    from workflow_storage.models import WorkflowRun

MOST_NODES = 60
"""Nodes that a folded timeline has a row for: those that took the most time."""

MOST_ATTEMPTS = 40
"""Attempts on the axis: the newest ones."""

CELLS = 400
"""Parts of the axis that a folded timeline tells apart."""

LEVELS = 4
"""How busy a node can be in one of them."""

_LEAST_BAR = 0.4  # per cent of the axis, so that a bar can be seen
_LEAST_BAND = 0.8
_GAP = 14.0
_ALL_GAPS = 30.0
LABEL = 20.0  # per cent that the label of an attempt or a tick needs

_TICKS = (
    *(digit * 10.0**power for power in range(-4, 1) for digit in (1, 2, 5)),
    *(10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400),
)

_LOST = (TAKEN_OVER, "Stalled: no sign of life")
"""How the error of an attempt begins whose end nobody saw: it was only found to be dead."""

SIGNS: dict[str, str] = {
    RunStatus.FAILED.value: "✕",
    RunStatus.CANCELLED.value: "■",
    RunStatus.RUNNING.value: "▸",
}
"""What an attempt can be in without a checkpoint, by its status."""

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


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
        if status in SIGNS:
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
                    place + (LABEL if number else LABEL / 4) <= band.width,
                )
                for number in range(int((band.end - band.begin) / length) + 1)
                if (place := number * length * self.scale) <= band.width
            ]
        return found

    def _tick_length(self) -> float:
        least = LABEL / self.scale
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
    return (aware - EPOCH).total_seconds()

"""Summaries of runs beside those of the time before, as people and programs read them."""

from __future__ import annotations

from collections import defaultdict
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from django.utils import timezone

from workflow_storage.management.output import Column, Record
from workflow_storage.management.selection import Selection
from workflow_storage.management.text import as_count, as_share, as_text, as_usd
from workflow_storage.summaries import LABEL, TIMES, RunSummary, Summaries, in_order, merged

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from workflow_storage.base import RunFilters, StorageBackend
    from workflow_storage.models import WorkflowRun

COMPARED = (
    "runs",
    "success_rate",
    "p50_seconds",
    "p95_seconds",
    "total_tokens",
    "total_cost_usd",
)
"""What is told of the time before."""

_SHOWN = ("runs", "by_status", *COMPARED[1:4], "max_seconds", *COMPARED[4:])
_FORMATS = {"hour": "%Y-%m-%d %H:%M", "day": "%Y-%m-%d", "week": "%Y-%m-%d", "month": "%Y-%m"}
_TITLES = {"workflow_name": "Workflow", "week": "Week from"}


class Compared(NamedTuple):
    """A group of runs, and the same one in the time before."""

    now: RunSummary
    before: RunSummary | None
    """None if nothing is known of that time; without runs, if there were none."""


def compared_groups(
    backend: StorageBackend, by: Sequence[str], selection: Selection
) -> list[Compared]:
    """Return the groups of the runs of a selection, each with what it was before.

    Groups of a time are compared with the one before in that order. All others with the same group
    before: of the newest so many, with those of as many before them; else with those of the time
    before, as long as the one that the selection begins; without a beginning, with nothing.
    """
    if selection.limit is not None:
        groups, last = _of_each(backend, by, selection)
        before_them = None if last is None else selection._replace(before=last)
    else:
        groups, before_them = _groups(backend, by, selection), _time_before(selection)
    times = [place for place, name in enumerate(by) if name in TIMES]
    if times:
        return _by_time(groups, times)
    if before_them is None:
        return [Compared(group, None) for group in groups]
    if selection.limit is None:
        earlier = _groups(backend, by, before_them)
    else:
        earlier, _ = _of_each(backend, by, before_them)
    before = {group.group: group for group in earlier}
    now = {group.group: group for group in groups}
    return [
        Compared(now.get(key) or merged((), key), before.get(key) or merged((), key))
        for key in [*now, *(key for key in before if key not in now)]
    ]


def _time_before(selection: Selection) -> Selection | None:
    """Return what selects the runs of the time before, as long as that of a selection, if it has a beginning."""
    since = selection.filters.get("started_after")
    if since is None:
        return None
    filters = selection.filters if selection.before is None else selection.started_earlier()
    until = max(filters.get("started_before") or timezone.now(), since)
    earlier: RunFilters = {
        **filters,
        "started_after": since - (until - since),
        "started_before": since,
    }
    return Selection(earlier)


def _groups(backend: StorageBackend, by: Sequence[str], selection: Selection) -> list[RunSummary]:
    if selection.before is None:
        return backend.runs.summarize(by=by, **selection.filters)
    parts: defaultdict[tuple[Any, ...], list[RunSummary]] = defaultdict(list)
    then = Summaries()
    for run in selection.started_then(backend):
        then.add_run(run, tuple(by))
    for group in (*backend.runs.summarize(by=by, **selection.started_earlier()), *then.results()):
        parts[group.group].append(group)
    return in_order(merged(several, key) for key, several in parts.items())


def _of_each(
    backend: StorageBackend, by: Sequence[str], selection: Selection
) -> tuple[list[RunSummary], WorkflowRun | None]:
    """Return the groups of runs that are looked at one by one, and the last of them."""
    summaries, last = Summaries(), None
    for last in selection.runs(backend):
        summaries.add_run(last, tuple(by))
    return summaries.results(), last


def _by_time(groups: Iterable[RunSummary], times: Sequence[int]) -> list[Compared]:
    latest: dict[tuple[Any, ...], RunSummary] = {}
    compared = []
    for group in sorted(groups, key=lambda group: [group.group[place] for place in times]):
        others = tuple(value for place, value in enumerate(group.group) if place not in times)
        compared.append(Compared(group, latest.get(others)))
        latest[others] = group
    return compared


def in_all(groups: Sequence[Compared], *, with_before: bool) -> Compared:
    """Return all groups as one."""
    before = [group.before for group in groups if group.before is not None]
    return Compared(merged(group.now for group in groups), merged(before) if with_before else None)


def statistics_columns(by: Sequence[str], *, with_changes: bool) -> list[Column]:
    """Return the columns of a table of groups."""
    columns = [_group_column(place, name) for place, name in enumerate(by)]
    if not columns:
        columns = [Column("all", "", lambda _: "all runs")]
    columns += [
        _column("runs", "Runs", 1, lambda one: as_count(one.runs)),
        _column("success_rate", "Success", 2, lambda one: as_share(one.success_rate)),
        _column("p50_seconds", "p50 s", 5, lambda one: _seconds(one.p50_seconds)),
        _column("p95_seconds", "p95 s", 3, lambda one: _seconds(one.p95_seconds)),
        _column("max_seconds", "max s", 8, lambda one: _seconds(one.max_seconds)),
        _column("total_tokens", "Tokens", 9, lambda one: as_count(one.total_tokens)),
        _column("total_cost_usd", "USD", 6, lambda one: as_usd(one.total_cost_usd)),
    ]
    if with_changes:
        columns += [
            _change("runs", "Runs +-", 4, "runs"),
            _change("success_rate", "Success +-", 7, "success_rate"),
            _change("p95_seconds", "p95 +-", 7, "p95_seconds"),
            _change("total_cost_usd", "USD +-", 10, "total_cost_usd"),
        ]
    return columns


def statistics_record(by: Sequence[str]) -> Record:
    """Return how groups are handed to programs."""
    keys = (*by, *_SHOWN, *(f"before_{name}" for name in COMPARED))

    def values(row: Compared) -> dict[str, Any]:
        before = row.before
        return {
            **dict(zip(by, row.now.group, strict=False)),
            **{name: getattr(row.now, name) for name in _SHOWN},
            **{
                f"before_{name}": None if before is None else getattr(before, name)
                for name in COMPARED
            },
        }

    return Record(keys, values)


def _group_column(place: int, name: str) -> Column:
    def cell(row: Compared) -> str:
        if place >= len(row.now.group):
            return "all" if place == 0 else ""
        value = row.now.group[place]
        if isinstance(value, datetime):
            return value.strftime(_FORMATS[name])
        return "(none)" if value is None else as_text(value)

    title = _TITLES.get(name) or name.removeprefix(LABEL).capitalize()
    if name in TIMES or name == "status":
        return Column(name, title, cell, kind="fixed")
    return Column(name, title, cell, least=12, folds=True)


def _column(name: str, title: str, rank: int, text: Callable[[RunSummary], str]) -> Column:
    return Column(name, title, lambda row: text(row.now), kind="number", rank=rank)


def _change(name: str, title: str, rank: int, field: str) -> Column:
    def cell(row: Compared) -> str:
        if row.before is None:
            return ""
        now, before = getattr(row.now, field), getattr(row.before, field)
        if now is None or before is None:
            return ""
        if field == "success_rate":
            return f"{(now - before) * 100:+.1f} pt"
        if not before:
            return "new" if now else ""
        return f"{(now / before - 1) * 100:+,.0f}%"

    return Column(f"change_{name}", title, cell, kind="number", rank=rank)


def _seconds(value: float | None) -> str:
    if value is None:
        return ""
    # A percentile is known within 1 %.
    places = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:,.{places}f}"

"""Runs of a time summed up twice, over time and by workflow; for the charts of the admin.

For a week it takes three statements at most, of which all but one are answered by the index of the
starts alone. Each day is looked up by itself: a database that groups a month by days sorts its runs.
"""

from __future__ import annotations

from collections import Counter
from datetime import timedelta
from decimal import Decimal
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from django.db import connections
from django.db.models import Case, Count, IntegerField, Sum, Value, When

from workflow_storage.backends.orm.conditions import conditions_of, with_values
from workflow_storage.backends.orm.dialects import dialect_of
from workflow_storage.backends.orm.run_rows import RunRows
from workflow_storage.backends.orm.summarizing import BUCKET, NANO_USD, NANOS
from workflow_storage.summaries import Summaries

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from datetime import datetime

    from django.db.models import QuerySet

    from workflow_storage.filters import ValidFilters
    from workflow_storage.summaries import RunSummary

MAX_STEPS = 100
"""Steps of time that are looked up each by itself, at most."""

DAYS_AT_A_TIME = 8
"""Days, or longer steps, that one statement looks up: those that a week touches.

PostgreSQL compiles a longer statement for longer than it takes (JIT).
"""

_READ_AT_A_TIME = 2000
_DAY = timedelta(hours=23)  # as long as the shortest

_Counts = Counter[tuple[Any, str, int | None]]
"""How many runs there are with a group, a status and a bucket of their duration."""


def over_time_and_by_workflow(
    alias: str, filters: ValidFilters, starts: Sequence[datetime]
) -> tuple[list[RunSummary], list[RunSummary]]:
    """Return the summaries of the runs of each step of time, and those of each workflow.

    The longest duration is one that stands for its bucket, and there are tokens and costs over time
    alone.

    Args:
        alias: the database's name in DATABASES.
        filters: which runs, with the time from when until when they started.
        starts: of the steps of time, the first of which the time begins in; at most `MAX_STEPS`.
    """
    if filters.match_none:
        return [], []
    steps = _Steps(alias, filters, starts)
    by_time, by_workflow = steps.counts()
    over_time, over_workflows = Summaries(), Summaries()
    over_time.add_counts(by_time)
    over_workflows.add_counts(by_workflow)
    for place, tokens, nano_usd in steps.totals():
        if tokens is not None or nano_usd is not None:
            over_time.add(
                (place,),
                "",
                runs=0,
                bucket=None,
                longest=None,
                tokens=None if tokens is None else int(tokens),
                cost_usd=None if nano_usd is None else Decimal(int(nano_usd)) / NANOS,
            )
    places = over_time.results()
    return (
        [one._replace(group=(starts[one.group[0]],)) for one in places],
        over_workflows.results(),
    )


class _Steps:
    """The runs of each step of time."""

    def __init__(self, alias: str, filters: ValidFilters, starts: Sequence[datetime]) -> None:
        after, before = filters.started_after, filters.started_before
        assert after is not None
        assert before is not None
        self._runs = RunRows(alias).runs
        self._filters = filters
        self._bounds = [after, *starts[1:], before]
        self._counts_here = dialect_of(connections[alias]).counts_here

    def counts(self) -> tuple[_Counts, _Counts]:
        """Return how many runs there are in each step and of each workflow."""
        if self._counts_here:
            return self._counted_here()
        columns = ("status", "bucket")
        by_time: _Counts = Counter()
        for rows in self._statements(
            lambda runs: (
                runs.annotate(bucket=BUCKET)
                .values("place", *columns)
                .annotate(runs=Count("*"))
                .values_list("place", *columns, "runs")
            )
        ):
            for place, status, bucket, count in rows:
                by_time[place, status, bucket] = count
        by_workflow: _Counts = Counter()
        runs = with_values(self._runs, conditions_of(self._filters)).order_by()
        named = runs.annotate(bucket=BUCKET).values("workflow_name", *columns)
        for name, status, bucket, count in named.annotate(runs=Count("*")).values_list(
            "workflow_name", *columns, "runs"
        ):
            by_workflow[name, status, bucket] = count
        return by_time, by_workflow

    def _counted_here(self) -> tuple[_Counts, _Counts]:
        by_time: _Counts = Counter()
        by_workflow: _Counts = Counter()
        for rows in self._statements(
            lambda runs: runs.annotate(bucket=BUCKET).values_list(
                "place", "workflow_name", "status", "bucket"
            )
        ):
            # Not through a queryset, which looks at each value of each row.
            sql, parameters = rows.query.sql_with_params()
            with connections[rows.db].cursor() as cursor:
                cursor.execute(sql, parameters)
                while some := cursor.fetchmany(_READ_AT_A_TIME):
                    by_time.update(map(itemgetter(0, 2, 3), some))
                    by_workflow.update(map(itemgetter(1, 2, 3), some))
        return by_time, by_workflow

    def totals(self) -> Iterator[tuple[int, Any, Any]]:
        """Yield the tokens and the billionths of USD of all runs of each step."""
        for rows in self._statements(
            lambda runs: (
                runs.values("place")
                .annotate(tokens=Sum("total_tokens"), nano_usd=NANO_USD)
                .values_list("place", "tokens", "nano_usd")
            )
        ):
            yield from rows

    def _statements(
        self, read: Callable[[QuerySet[Any, Any]], QuerySet[Any, Any]]
    ) -> Iterator[QuerySet[Any, Any]]:
        """Yield the statements that read something of each step, of a few days in one."""
        days = [read(self._day(first, last)) for first, last in self._days()]
        for begin in range(0, len(days), DAYS_AT_A_TIME):
            one, *others = days[begin : begin + DAYS_AT_A_TIME]
            yield one.union(*others, all=True) if others else one

    def _days(self) -> Iterator[tuple[int, int]]:
        """Yield the places of the first and the last step of each day, or longer step."""
        first = 0
        for last, end in enumerate(self._bounds[1:]):
            if end - self._bounds[first] >= _DAY or end is self._bounds[-1]:
                yield first, last
                first = last + 1

    def _day(self, first: int, last: int) -> QuerySet[Any, Any]:
        """Return the runs of some steps, with the place of the step of each."""
        filters = self._filters._replace(
            started_after=self._bounds[first], started_before=self._bounds[last + 1]
        )
        place: Any = Value(last, IntegerField())
        if first < last:
            ends = enumerate(self._bounds[first + 1 : last + 1], first)
            cases = [When(started_at__lt=end, then=Value(number)) for number, end in ends]
            place = Case(*cases, default=place, output_field=IntegerField())
        runs = with_values(self._runs, conditions_of(filters)).order_by()
        return runs.annotate(place=place)

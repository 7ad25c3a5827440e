"""Runs summed up by the database: one statement that counts by group, status and bucket."""

from __future__ import annotations

import functools
import math
import sqlite3
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from django.conf import settings
from django.db.models import (
    BigIntegerField,
    Case,
    Count,
    F,
    FilteredRelation,
    FloatField,
    Func,
    IntegerField,
    Max,
    Min,
    Q,
    Sum,
    Value,
    When,
)
from django.db.models.functions import Cast, Floor

from workflow_storage.status import TERMINAL_STATUSES
from workflow_storage.summaries import (
    GAMMA,
    LABEL,
    LEAST,
    TIMES,
    RunSummary,
    Summaries,
    start_of,
)

if TYPE_CHECKING:
    from django.db.models import QuerySet

    from workflow_storage.filters import ValidFilters
    from workflow_storage.models import WorkflowRun

MAX_EDGES = 48
"""Times that the database tells apart by comparing; of more, it counts each quarter of an hour."""

NANOS = 10**9
_QUARTER = 900  # seconds; every offset of a time zone is a whole number of them


class _Floor(Floor):
    """A number that is not negative without its fraction, inside of a `Cast`."""

    def as_sqlite(self, compiler: Any, connection: Any, **_: Any) -> Any:
        # CAST cuts it off there, and its FLOOR is a function in Python.
        return self.as_sql(compiler, connection, template="%(expressions)s")


class _Logarithm(Func):
    """The logarithm of a number to the base that the bounds of buckets grow by."""

    arity = 1
    output_field = FloatField()
    template = f"(LN(%(expressions)s) / {math.log(GAMMA)!r})"

    def as_sqlite(self, compiler: Any, connection: Any, **_: Any) -> Any:
        if not _has_log10():
            return self.as_sql(compiler, connection)
        # Django has put a function in Python in place of LN, which takes as long as all the rest.
        template = f"(LOG10(%(expressions)s) / {math.log10(GAMMA)!r})"
        return self.as_sql(compiler, connection, template=template)


@functools.cache
def _has_log10() -> bool:
    """Whether SQLite was built with functions of mathematics."""
    connection = sqlite3.connect(":memory:")
    try:
        connection.execute("SELECT LOG10(1)")
    except sqlite3.OperationalError:
        return False
    finally:
        connection.close()
    return True


BUCKET_ABOVE_LEAST = Cast(_Floor(_Logarithm(F("duration_seconds") / LEAST)), IntegerField()) + 1
"""The bucket of a duration that is not in bucket 0; NULL without one."""

BUCKET = Case(
    When(duration_seconds__lt=LEAST, then=Value(0)),
    default=BUCKET_ABOVE_LEAST,
    output_field=IntegerField(),
)
"""The bucket of a duration, which counts if the run has ended; see `bucket_of`."""

# As whole numbers, which are summed exactly. (PostgreSQL rounds numeric only, which is slow.)
NANO_USD = Sum(Cast(_Floor(F("total_cost_usd") * float(NANOS) + 0.5), BigIntegerField()))


def summarized(
    runs: QuerySet[WorkflowRun], by: tuple[str, ...], filters: ValidFilters
) -> list[RunSummary]:
    """Return the summaries of some runs.

    Args:
        runs: the runs.
        by: the groups.
        filters: those that chose the runs; where they say from when until when the runs started,
            nobody has to look.
    """
    summaries = Summaries()
    columns, starts = [], {}
    for number, group in enumerate(by):
        name = f"group_{number}"
        columns.append(name)
        if group.startswith(LABEL):
            label = FilteredRelation(
                "label_rows", condition=Q(label_rows__name=group.removeprefix(LABEL))
            )
            runs = runs.alias(**{f"label_{number}": label})
            runs = runs.annotate(**{name: F(f"label_{number}__value")})
        elif group in TIMES:
            expression, starts[number] = _time_group(runs, group, filters)
            runs = runs.annotate(**{name: expression})
        else:
            runs = runs.annotate(**{name: F(group)})
    counted = (
        runs.annotate(bucket=BUCKET)
        .order_by()
        .values(*columns, "status", "bucket")
        .annotate(
            # Of neither a column nor a condition, or PostgreSQL would sort rather than hash.
            runs=Count("*"),
            longest=Max("duration_seconds"),
            tokens=Sum("total_tokens"),
            nano_usd=NANO_USD,
        )
        .values_list(*columns, "status", "bucket", "runs", "longest", "tokens", "nano_usd")
    )
    # There can be many: a row for each group, status and bucket.
    groups: dict[Any, tuple[Any, ...]] = {}
    for row in counted:
        *found, status, bucket, count, longest, tokens, nano_usd = row
        if status not in TERMINAL_STATUSES:  # what a running one took in attempts before
            bucket = None
        key = tuple(found)
        if key not in groups:
            groups[key] = tuple(
                starts[number](value) if number in starts else value
                for number, value in enumerate(key)
            )
        summaries.add(
            groups[key],
            status,
            runs=count,
            bucket=bucket,
            longest=None if bucket is None else longest,
            tokens=None if tokens is None else int(tokens),
            cost_usd=None if nano_usd is None else Decimal(int(nano_usd)) / NANOS,
        )
    return summaries.results()


def _time_group(runs: QuerySet[WorkflowRun], time: str, filters: ValidFilters) -> tuple[Any, Any]:
    """Return the expression that tells the times apart, and what makes the start of what it gives."""
    after, before = filters.started_after, filters.started_before
    if after is None or before is None:
        bounds = runs.aggregate(first=Min("started_at"), last=Max("started_at"))
        after, before = after or bounds["first"], before or bounds["last"]
    if after is None or before is None:
        return Value(0), lambda place: None
    edges = [start_of(time, after)]
    last = start_of(time, before)
    while edges[-1] < last and len(edges) <= MAX_EDGES:
        edges.append(_next_start(time, edges[-1]))
    if len(edges) > MAX_EDGES:
        return _Quarter("started_at"), lambda quarter: start_of(time, _moment_of(quarter))
    return _place(edges, 0, len(edges)), lambda place: edges[place]


def _place(edges: list[datetime], first: int, end: int) -> Any:
    """Return which of the steps that begin at some edges a run is in, found by halving."""
    if end - first == 1:
        return Value(first)
    middle = (first + end) // 2
    return Case(
        When(started_at__lt=edges[middle], then=_place(edges, first, middle)),
        default=_place(edges, middle, end),
        output_field=IntegerField(),
    )


def _next_start(time: str, start: datetime) -> datetime:
    if time == "hour":
        # In UTC, for an hour of the clock may be there twice, or not at all.
        later = start.astimezone(UTC) if start.tzinfo else start
        return start_of(time, later + timedelta(hours=1))
    days = {"day": 1, "week": 7, "month": 32}[time]
    noon = start.replace(hour=12)
    return start_of(time, noon + timedelta(days=days))


def _moment_of(quarter: int) -> datetime:
    moment = datetime(1970, 1, 1) + timedelta(seconds=int(quarter) * _QUARTER)
    return moment.replace(tzinfo=UTC) if settings.USE_TZ else moment


class _Quarter(Func):
    """How many quarters of an hour a time is after 1970 began, by the clock that the column has."""

    output_field = BigIntegerField()
    arity = 1

    def as_sqlite(self, compiler: Any, connection: Any, **_: Any) -> Any:
        return self.as_sql(
            compiler,
            connection,
            template=f"(CAST(strftime('%%%%s', %(expressions)s) AS INTEGER) / {_QUARTER})",
        )

    def as_postgresql(self, compiler: Any, connection: Any) -> Any:
        return self.as_sql(
            compiler,
            connection,
            template=f"FLOOR(EXTRACT(EPOCH FROM %(expressions)s::timestamp) / {_QUARTER})::bigint",
        )

    def as_mysql(self, compiler: Any, connection: Any) -> Any:
        return self.as_sql(
            compiler,
            connection,
            template=f"(TIMESTAMPDIFF(SECOND, '1970-01-01', %(expressions)s) DIV {_QUARTER})",
        )

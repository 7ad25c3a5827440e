"""Runs of a time summed up twice, over time and by workflow; for the charts of the admin.

To send a row takes a database, and to receive it takes Python, several times longer than to read it
from an index. So the runs of a step of time come in one row: a text with a character for each, which
says how the run ended, and in which bucket its duration is. Only some databases can make such a text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from decimal import Decimal
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from django.db import connections
from django.db.models import Aggregate, Case, Sum, TextField, Value, When
from django.db.models.expressions import RawSQL

from workflow_storage.backends.orm.compiled_queries import Parameter
from workflow_storage.backends.orm.conditions import (
    conditions_of,
    values_of,
    with_parameters,
    with_values,
)
from workflow_storage.backends.orm.dialects import dialect_of
from workflow_storage.backends.orm.names import all_names
from workflow_storage.backends.orm.run_rows import RunRows
from workflow_storage.backends.orm.summarizing import BUCKET_ABOVE_LEAST
from workflow_storage.status import TERMINAL_STATUSES
from workflow_storage.summaries import LEAST, Summaries, seconds_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from datetime import datetime

    from django.db.models import QuerySet

    from workflow_storage.filters import ValidFilters
    from workflow_storage.summaries import RunSummary

MAX_STEPS = 100
"""Steps of time that are looked up each by itself, at most."""

# The most frequent one first, which is found soonest.
_STATUSES = ("completed", "failed", "cancelled", "running", "pending")
_CODES = 10_000
"""Characters for each status; those of all come before the surrogates, which are none."""
_MOST = _CODES - 4
"""The bucket of all longer durations, of 10^83 seconds or more."""

_NO_DURATION = chr(1)
_BUCKET_CODE = Case(
    When(  # nearly all
        duration_seconds__gte=LEAST,
        duration_seconds__lt=seconds_of(_MOST),
        then=BUCKET_ABOVE_LEAST + 2,
    ),
    When(duration_seconds__isnull=True, then=Value(ord(_NO_DURATION))),
    When(duration_seconds__lt=LEAST, then=Value(2)),
    default=Value(_MOST + 2),
)
_STATUS_CODE = Case(
    *(
        When(status=status, then=Value(number * _CODES))
        for number, status in enumerate(_STATUSES[:-1])
    ),
    default=Value((len(_STATUSES) - 1) * _CODES),
)

_Bounds = Sequence[tuple["datetime", "datetime"]]
"""From when until when each step of time is."""


class _Characters(Aggregate):
    """One text of the characters that have some codes."""

    arity = 1
    output_field = TextField()
    template = "STRING_AGG(CHR(%(expressions)s), '')"

    def as_sqlite(self, compiler: Any, connection: Any, **_: Any) -> Any:
        return self.as_sql(compiler, connection, template="GROUP_CONCAT(CHAR(%(expressions)s), '')")


class _Step(NamedTuple):
    """The runs of a step of time."""

    place: int
    characters: str | None
    """One for each run."""
    tokens: int | None
    cost_usd: float | None


def can_look_over(alias: str, starts: Sequence[datetime]) -> bool:
    """Whether `over_time_and_by_workflow` can sum up so many steps of time in a database."""
    return len(starts) <= MAX_STEPS and dialect_of(connections[alias]).joins_texts


def over_time_and_by_workflow(
    alias: str, filters: ValidFilters, starts: Sequence[datetime]
) -> tuple[list[RunSummary], list[RunSummary]]:
    """Return the summaries of the runs of each step of time, and those of each workflow.

    The longest duration is one that stands for its bucket, and there are tokens and costs over time
    alone. A step takes memory for each of its runs: three bytes, or four.

    Args:
        alias: the database's name in DATABASES.
        filters: which runs, with the time from when until when they started.
        starts: of the steps of time, the first of which the time begins in; at most `MAX_STEPS`.
    """
    if filters.match_none:
        return [], []
    rows = RunRows(alias)
    over_time, by_workflow = Summaries(), Summaries()
    for step in _steps(rows, filters, starts):
        _add_step(over_time, step)
    for name, status, characters in _texts_by_workflow(rows, filters):
        if characters is not None:
            _add_runs(by_workflow, name, status, Counter(characters))
    return (
        [one._replace(group=(starts[one.group[0]],)) for one in over_time.results()],
        by_workflow.results(),
    )


def _steps(rows: RunRows, filters: ValidFilters, starts: Sequence[datetime]) -> Iterator[_Step]:
    """Yield the steps, in any order."""
    after, before = filters.started_after, filters.started_before
    assert after is not None
    assert before is not None
    bounds = [*pairwise([after, *starts[1:], before])]
    connection = rows.connection
    has_lateral = dialect_of(connection).has_lateral
    sql, params = (_lateral if has_lateral else _one_after_the_other)(rows, filters, bounds)
    with connection.cursor() as cursor:
        cursor.execute(sql, params)
        for row in cursor:
            yield _Step(*row)


def _lateral(rows: RunRows, filters: ValidFilters, bounds: _Bounds) -> tuple[str, list[Any]]:
    """Return the statement that looks up steps, where it can do so for each row of a table.

    A statement for each, put together, is compiled (JIT) for longer than it takes.
    """
    connection = rows.connection
    time = rows.runs.model._meta.get_field("started_at")
    after: Any = RawSQL("step.after", [])
    before: Any = RawSQL("step.before", [])
    of_step = filters._replace(started_after=after, started_before=before)
    sql, params = _compiled(_sums(with_values(rows.runs, conditions_of(of_step))))
    kind = time.db_type(connection)
    places = ", ".join([f"(%s, CAST(%s AS {kind}), CAST(%s AS {kind}))"] * len(bounds))
    values = [
        value
        for place, moments in enumerate(bounds)
        for value in (place, *(time.get_db_prep_value(one, connection) for one in moments))
    ]
    return (
        f"SELECT step.place, sums.* FROM (VALUES {places}) AS step(place, after, before), "
        f"LATERAL ({sql}) AS sums",
        [*values, *params],
    )


def _one_after_the_other(
    rows: RunRows, filters: ValidFilters, bounds: _Bounds
) -> tuple[str, list[Any]]:
    """Return the statement that looks up steps, anywhere else."""
    # Compiled once, for it is the same of each step.
    sql, places = _compiled(_sums(with_parameters(rows.runs, conditions_of(filters))))
    statements, params = [], []
    for place, (after, before) in enumerate(bounds):
        of_step = filters._replace(started_after=after, started_before=before)
        values = values_of(conditions_of(of_step))
        statements.append(f"SELECT {place}, step.* FROM ({sql}) step")
        params += [
            one.prepared(values, rows.connection) if isinstance(one, Parameter) else one
            for one in places
        ]
    return " UNION ALL ".join(statements), params


def _sums(runs: QuerySet[Any, Any]) -> QuerySet[Any, Any]:
    """Return the query of a row with what is to be known of all these runs."""
    summed: QuerySet[Any, Any] = (
        runs.order_by()
        .values(every=Value(1))
        .annotate(
            characters=_Characters(_STATUS_CODE + _BUCKET_CODE),
            tokens=Sum("total_tokens"),
            cost=Sum("total_cost_usd"),
        )
        .values_list("characters", "tokens", "cost")
    )
    return summed


def _compiled(rows: QuerySet[Any, Any]) -> tuple[str, list[Any]]:
    compiler: Any = rows.query.get_compiler(rows.db)
    sql, params = compiler.as_sql()
    return sql, [*params]


def _add_step(over_time: Summaries, step: _Step) -> None:
    by_status: dict[int, dict[str, int]] = {}
    for character, count in Counter(step.characters or "").items():
        status, code = divmod(ord(character), _CODES)
        by_status.setdefault(status, {})[chr(code)] = count
    for status, counts in by_status.items():
        _add_runs(over_time, step.place, _STATUSES[status], counts)
    if step.tokens is not None or step.cost_usd is not None:
        over_time.add(
            (step.place,),
            "",
            runs=0,
            bucket=None,
            longest=None,
            tokens=None if step.tokens is None else int(step.tokens),
            # A sum of so few is exact to a billionth.
            cost_usd=None if step.cost_usd is None else round(Decimal(step.cost_usd), 9),
        )


def _add_runs(summaries: Summaries, group: Any, status: str, counts: Mapping[str, int]) -> None:
    """Add the runs of a group with a status, counted by the characters of their durations."""
    durations = {}
    if status in TERMINAL_STATUSES:
        durations = {
            ord(character) - 2: count
            for character, count in counts.items()
            if character != _NO_DURATION
        }
    summaries.add_durations((group,), status, sum(counts.values()), durations)


def _texts_by_workflow(rows: RunRows, filters: ValidFilters) -> Iterable[tuple[str, str, str]]:
    """Return the name of each workflow and each status with the characters of its durations."""
    characters = _Characters(_BUCKET_CODE)
    if not (dialect_of(rows.connection).sorts_to_group and _is_time_alone(filters)):
        runs = with_values(rows.runs, conditions_of(filters)).order_by()
        grouped = runs.values("workflow_name", "status").annotate(characters=characters)
        return grouped.values_list("workflow_name", "status", "characters")
    # By their index, each name and status by itself.
    of_one = rows.runs.filter(
        workflow_name=RawSQL("names.name", []), status=RawSQL("statuses.status", [])
    )
    runs = with_values(of_one, conditions_of(filters)).order_by()
    sql, params = _compiled(
        runs.values(every=Value(1)).annotate(characters=characters).values_list("characters")
    )
    statuses = ", ".join(["(%s)"] * len(_STATUSES))
    with rows.connection.cursor() as cursor:
        cursor.execute(
            f"WITH RECURSIVE {all_names(rows.connection)}, statuses(status) AS (VALUES {statuses}) "
            f"SELECT names.name, statuses.status, ({sql}) FROM names, statuses",
            [*_STATUSES, *params],
        )
        found: list[tuple[str, str, str]] = cursor.fetchall()
    return found


def _is_time_alone(filters: ValidFilters) -> bool:
    others = (filters.workflow_names, filters.statuses, filters.parent_id, filters.waiting)
    return (
        not filters.labels
        and filters.error is None
        and not any(other is not None for other in others)
    )

"""The conditions on runs that the contract's filters mean, for queries compiled or not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from django.db.models import Func, Model, OuterRef, Q, Subquery, Value
from django.db.models.functions import Lower, StrIndex
from django.db.models.lookups import Exact, GreaterThan, In

from workflow_storage.backends.orm.compiled_queries import Parameter
from workflow_storage.models import WorkflowRun, WorkflowRunLabel
from workflow_storage.querysets import IS_WAITING, NEWEST_LABELLED_FIRST

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from datetime import datetime

    from django.db.models import QuerySet

    from workflow_storage.filters import ValidFilters
    from workflow_storage.status import RunStatus


class Condition(NamedTuple):
    """A condition that compares a field, or fields, with values.

    Attributes:
        name: what tells it from the others in a query.
        fields: the field that each value belongs to; of a label behind ``label_rows__``.
        values: the values.
        where: makes the condition from the values, or from parameters in their place.
    """

    name: str
    fields: tuple[str, ...]
    values: tuple[Any, ...]
    where: Callable[..., Q]

    @property
    def key(self) -> tuple[str, int]:
        """What tells a compiled query with this condition from one with another."""
        return self.name, len(self.values)

    def names(self) -> list[str]:
        """Return the names of its parameters."""
        return [f"{self.name}_{number}" for number in range(len(self.values))]

    def parameters(self) -> list[Parameter]:
        """Return a parameter for each value."""
        return [
            Parameter(name, _field(field))
            for name, field in zip(self.names(), self.fields, strict=True)
        ]


def with_values(
    runs: QuerySet[WorkflowRun], conditions: Iterable[Condition]
) -> QuerySet[WorkflowRun]:
    """Return the runs that meet all conditions."""
    for condition in conditions:
        runs = runs.filter(condition.where(*condition.values))
    return runs


def with_parameters(
    runs: QuerySet[WorkflowRun], conditions: Iterable[Condition]
) -> QuerySet[WorkflowRun]:
    """Return the same with a parameter in place of each value; see `values_of`."""
    for condition in conditions:
        runs = runs.filter(condition.where(*condition.parameters()))
    return runs


def values_of(conditions: Iterable[Condition]) -> dict[str, Any]:
    """Return the values of the parameters of conditions, by name."""
    return {
        name: value
        for condition in conditions
        for name, value in zip(condition.names(), condition.values, strict=True)
    }


def conditions_of(filters: ValidFilters, before: Position | None = None) -> list[Condition]:
    """Return the conditions that filters mean; whether they match any run at all, they say.

    Args:
        filters: which runs.
        before: the start and the id of a run, after which they come in the order newest first.
    """
    conditions = [
        Condition(name, (field,), (getattr(filters, name),), where)
        for name, (field, where) in _WHERE.items()
        if getattr(filters, name) is not None
    ]
    if filters.workflow_names is not None:
        conditions.append(
            _one_of("workflow_name", filters.workflow_names, by_start=filters.by_start)
        )
    if filters.statuses is not None:
        conditions.append(in_status(filters.statuses, by_start=filters.by_start))
    if filters.waiting is not None:
        conditions.append(
            Condition(f"waiting {filters.waiting}", (), (), _WAITING[filters.waiting])
        )
    others = [*filters.labels.items()]
    if filters.reads_labels:
        bounds = {"gte": filters.started_after, "lt": filters.started_before}
        conditions.append(_first_label(*others.pop(0), before, bounds))
    elif before is not None:
        conditions.append(_before_run(*before))
    conditions += [_other_label(number, *label) for number, label in enumerate(others)]
    return conditions


def order_of(filters: ValidFilters) -> tuple[str, str]:
    """Return the order newest first, by the index that the conditions of filters are read from."""
    if filters.reads_labels:
        return NEWEST_LABELLED_FIRST
    return "-started_at", "-id"


Position = tuple["datetime", str]
"""The start and the id of a run."""


def _has_error(text: Any) -> Q:
    # By LIKE, the case of letters would count on some databases and not on others.
    value = text if isinstance(text, Parameter) else Value(text)
    return Q(GreaterThan(StrIndex(Lower("error_message"), Lower(value)), 0))


_WHERE: dict[str, tuple[str, Callable[..., Q]]] = {
    "started_after": ("started_at", lambda time: Q(started_at__gte=time)),
    "started_before": ("started_at", lambda time: Q(started_at__lt=time)),
    "parent_id": ("parent_id", lambda parent: Q(parent_id=parent)),
    "error": ("error_message", _has_error),
}
_WAITING: dict[bool, Callable[..., Q]] = {True: lambda: IS_WAITING, False: lambda: ~IS_WAITING}


def _first_label(
    name: str, value: str, before: Position | None, bounds: dict[str, datetime | None]
) -> Condition:
    """Return the condition that a run has a label, and comes after another one, by one row of it.

    The time of the start is asked of that row, too, so that others are not looked at.
    """
    given = {f"label_rows__started_at__{how}": time for how, time in bounds.items() if time}
    fields = [*_LABEL, *("label_rows__started_at" for _ in given)]
    if before is not None:
        fields += ["label_rows__started_at", "label_rows__run_id"]

    def where(name: Any, value: Any, *more: Any) -> Q:
        times = more[: len(given)]
        condition = _has_label(name, value) & Q(**dict(zip(given, times, strict=True)))
        if before is not None:
            time, run_id = more[len(given) :]
            condition &= Q(label_rows__started_at__lt=time) | Q(label_rows__run_id__lt=run_id)
            condition &= Q(label_rows__started_at__lte=time)
        return condition

    return Condition(
        " ".join(["label", *given, *(["before"] if before else [])]),
        tuple(fields),
        (name, value, *given.values(), *(before or ())),
        where,
    )


_LABEL = ("label_rows__name", "label_rows__value")


def _has_label(name: Any, value: Any) -> Q:
    return Q(label_rows__name=name, label_rows__value=value)


def _other_label(number: int, name: str, value: str) -> Condition:
    def where(name: Any, value: Any) -> Q:
        # A value for each run, not whether there is a row: PostgreSQL would make a join of that,
        # and read all runs of both labels for a page of them.
        its_value = WorkflowRunLabel._base_manager.filter(run_id=OuterRef("pk"), name=name)
        return Q(Exact(Subquery(its_value.values("value")), value))

    return Condition(f"label {number}", _LABEL, (name, value), where)


def _field(name: str) -> Any:
    model: type[Model] = WorkflowRun
    if name.startswith("label_rows__"):
        model, name = WorkflowRunLabel, name.removeprefix("label_rows__").replace("run_id", "run")
    return model._meta.get_field(name)


def _one_of(field: str, values: Iterable[str], *, by_start: bool = False) -> Condition:
    values = tuple(values)

    def where(*values: Any) -> Q:
        # A plain comparison lets the database read its index in order.
        if len(values) == 1:
            return Q(**{field: values[0]})
        return Q(In(_NotByIndex(field), values)) if by_start else Q(**{f"{field}__in": values})

    name = f"{field} by start" if by_start else field
    return Condition(name, (field,) * len(values), values, where)


class _NotByIndex(Func):
    """A column whose index is not used; on SQLite, where nobody knows how many rows it would find."""

    template = "%(expressions)s"

    def as_sqlite(self, compiler: Any, connection: Any, **_: Any) -> Any:
        return self.as_sql(compiler, connection, template="+%(expressions)s")


def in_status(statuses: Iterable[RunStatus], *, by_start: bool = False) -> Condition:
    """Return the condition that a run is in one of these statuses."""
    return _one_of("status", (status.value for status in statuses), by_start=by_start)


def in_attempt(attempt: int) -> Condition:
    """Return the condition that a run is in an attempt."""
    return Condition("attempt", ("attempt",), (attempt,), lambda number: Q(attempt=number))


def _before_run(started_at: datetime, run_id: str) -> Condition:
    return Condition(
        "before",
        ("started_at", "id"),
        (started_at, run_id),
        # The last part alone lets the database begin within its index.
        lambda time, id_: (Q(started_at__lt=time) | Q(id__lt=id_)) & Q(started_at__lte=time),
    )

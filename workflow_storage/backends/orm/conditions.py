"""The conditions on runs that the contract's filters mean, for queries compiled or not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from django.db.models import Q

from workflow_storage.backends.orm.compiled_queries import Parameter
from workflow_storage.models import WorkflowRun

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from datetime import datetime

    from django.db.models import QuerySet

    from workflow_storage.status import RunStatus
    from workflow_storage.validation import ValidFilters


class Condition(NamedTuple):
    """A condition that compares a field, or fields, with values.

    Attributes:
        name: what tells it from the others in a query.
        fields: the field that each value belongs to.
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
            Parameter(name, WorkflowRun._meta.get_field(field))
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


def conditions_of(filters: ValidFilters) -> list[Condition]:
    """Return the conditions that filters mean; whether they match any run at all, they say."""
    conditions = [
        Condition(name, (field,), (getattr(filters, name),), where)
        for name, (field, where) in _WHERE.items()
        if getattr(filters, name) is not None
    ]
    return conditions if filters.statuses is None else [*conditions, in_status(filters.statuses)]


_WHERE: dict[str, tuple[str, Callable[..., Q]]] = {
    "workflow_name": ("workflow_name", lambda name: Q(workflow_name=name)),
    "started_after": ("started_at", lambda time: Q(started_at__gte=time)),
    "started_before": ("started_at", lambda time: Q(started_at__lt=time)),
}


def in_status(statuses: Iterable[RunStatus]) -> Condition:
    """Return the condition that a run is in one of these statuses."""
    values = tuple(status.value for status in statuses)
    # A plain comparison lets the database read its index in order.
    return Condition(
        "status",
        ("status",) * len(values),
        values,
        (lambda status: Q(status=status))
        if len(values) == 1
        else (lambda *several: Q(status__in=several)),
    )


def in_attempt(attempt: int) -> Condition:
    """Return the condition that a run is in an attempt."""
    return Condition("attempt", ("attempt",), (attempt,), lambda number: Q(attempt=number))


def before_run(started_at: datetime, run_id: str) -> Condition:
    """Return the condition that a run comes after another one, in the order newest first."""
    return Condition(
        "before",
        ("started_at", "id"),
        (started_at, run_id),
        # The last part alone lets the database begin within its index.
        lambda time, id_: (Q(started_at__lt=time) | Q(id__lt=id_)) & Q(started_at__lte=time),
    )

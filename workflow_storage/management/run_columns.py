"""The columns that runs have in tables, and their fields as programs get them."""

from __future__ import annotations

from argparse import ArgumentTypeError
from typing import TYPE_CHECKING, Any

from django.utils import timezone

from workflow_storage.management.output import Column, Record
from workflow_storage.management.text import as_count, as_seconds, as_text, as_usd, first_line
from workflow_storage.status import RunStatus
from workflow_storage.summaries import LABEL
from workflow_storage.validation import RUN_FIELDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from datetime import datetime

    from workflow_storage.management.readable import Known
    from workflow_storage.models import WorkflowRun

STATUS_COLOURS: dict[str, str] = {
    RunStatus.PENDING: "dim",
    RunStatus.RUNNING: "blue",
    RunStatus.COMPLETED: "green",
    RunStatus.FAILED: "red",
    RunStatus.CANCELLED: "yellow",
}


def elapsed_seconds(run: WorkflowRun, now: datetime | None = None) -> float | None:
    """Return how long a run has been running, all attempts together, the current one until now."""
    if run.status != RunStatus.RUNNING:
        return run.duration_seconds
    since = run.attempt_started_at or run.started_at
    if since is None:  # which cannot be read
        return run.duration_seconds
    current = ((now or timezone.now()) - since).total_seconds()
    return (run.duration_seconds or 0.0) + max(current, 0.0)


def seconds_text(run: WorkflowRun) -> str:
    """Return how long a run took; with a plus, how long it has been running so far."""
    if run.status == RunStatus.RUNNING:
        return f"{elapsed_seconds(run) or 0:.0f}+"
    return as_seconds(run.duration_seconds)


def note_of(run: WorkflowRun) -> str:
    """Return what there is to say of a run: its error, or what it waits for."""
    if run.waiting_for is not None and run.status == RunStatus.PENDING:
        return f"waits for {run.waiting_for}"
    return first_line(run.error_message)


def status_colour(run: WorkflowRun) -> str:
    """Return the colour of the status of a run; none of one that there is not."""
    return STATUS_COLOURS.get(run.status, "")


def _text(name: str) -> Column:
    return Column(name, name, lambda run: as_text(getattr(run, name)), rank=9)


_KNOWN = (
    Column("id", "ID", lambda run: as_text(run.id), kind="id", rank=1),
    Column(
        "workflow_name",
        "Workflow",
        lambda run: as_text(run.workflow_name),
        rank=0,
        # With an id and a status beside it, all that the narrowest terminal has.
        least=14,
        folds=True,
    ),
    Column(
        "status",
        "Status",
        lambda run: as_text(run.status),
        kind="fixed",
        rank=2,
        style=status_colour,
    ),
    Column("started_at", "Started", lambda run: as_text(run.started_at), kind="fixed", rank=6),
    Column("duration_seconds", "Seconds", seconds_text, kind="number", rank=5),
    Column("total_tokens", "Tokens", lambda run: as_count(run.total_tokens), kind="number", rank=8),
    Column("total_cost_usd", "USD", lambda run: as_usd(run.total_cost_usd), kind="number", rank=7),
    Column(
        "current_node",
        "Node",
        lambda run: "" if run.status == RunStatus.COMPLETED else as_text(run.current_node),
        rank=4,
    ),
    Column("error_message", "Error", note_of, rank=3, least=16),
    Column("completed_at", "Ended", lambda run: as_text(run.completed_at), kind="fixed", rank=9),
)
_BY_NAME = {
    **{name: _text(name) for name in RUN_FIELDS},
    **{column.name: column for column in _KNOWN},
}

DEFAULT = [
    "id",
    "workflow_name",
    "status",
    "started_at",
    "duration_seconds",
    "total_tokens",
    "total_cost_usd",
    "current_node",
    "error_message",
]
"""The columns of a list of runs."""

SHORT_NAMES = {
    "workflow": "workflow_name",
    "started": "started_at",
    "ended": "completed_at",
    "seconds": "duration_seconds",
    "tokens": "total_tokens",
    "usd": "total_cost_usd",
    "node": "current_node",
    "error": "error_message",
    "parent": "parent_id",
    "config": "config_snapshot",
    "heartbeat": "heartbeat_at",
}
"""What fields may be called, too, in ``--columns``."""


def run_columns(names: Iterable[str] = DEFAULT) -> list[Column]:
    """Return the columns with some names, which `column_names` gives.

    The workflow, or else the first of them, is never left out.
    """
    columns = [_BY_NAME.get(name) or _label_column(name) for name in names]
    if all(column.rank for column in columns):
        columns[0] = columns[0]._replace(rank=0)
    return columns


def column_names(value: object) -> list[str]:
    """Read names of columns with commas between them, or a list of them.

    Raises:
        ArgumentTypeError: if there is none of a name.
    """
    several = str(value).split(",") if isinstance(value, str) else list(value)  # type: ignore[call-overload]
    names = []
    for one in (str(name).strip() for name in several):
        name = SHORT_NAMES.get(one, one)
        is_label = name.startswith(LABEL) and len(name) > len(LABEL)
        if name not in _BY_NAME and not is_label:
            raise ArgumentTypeError(
                f"There is no column {one!r}. Use some of: {', '.join(RUN_FIELDS)}, label:NAME; "
                f"or for short {', '.join(SHORT_NAMES)}."
            )
        if name not in names:
            names.append(name)
    if not names:
        raise ArgumentTypeError("Name at least one column.")
    return names


def known_columns(names: Sequence[str] | None = None) -> list[Column]:
    """Return the columns of a list of runs of which some may not be readable (`Known`)."""

    def of_run(column: Column) -> Column:
        style = column.style
        return column._replace(
            cell=_note_of_known if column.name == "error_message" else _of_run(column.cell),
            style=style and _of_run(style),
        )

    return [of_run(column) for column in run_columns(names or DEFAULT)]


def _of_run(text: Callable[[WorkflowRun], str]) -> Callable[[Known], str]:
    return lambda known: text(known.run)


def _note_of_known(known: Known) -> str:
    return f"damaged: {known.problem}" if known.problem is not None else note_of(known.run)


def run_record(names: Sequence[str] = RUN_FIELDS) -> Record:
    """Return how runs are handed to programs: all their fields, or some columns."""
    return Record(names, lambda run: {name: _value(run, name) for name in names})


def known_record(names: Sequence[str] | None = None) -> Record:
    """Return the same for runs of which some may not be readable: some columns, or all and why."""
    if names:
        of_run = run_record(names).of
        return Record(names, lambda known: of_run(known.run))
    return Record(
        (*RUN_FIELDS, "problem"),
        lambda known: {**run_as_dict(known.run), "problem": known.problem},
    )


def run_as_dict(run: WorkflowRun) -> Mapping[str, Any]:
    """Return all fields of a run."""
    return run_record().of(run)


def _value(run: WorkflowRun, name: str) -> Any:
    if name.startswith(LABEL):
        return (run.labels or {}).get(name.removeprefix(LABEL))
    return getattr(run, name)


def _label_column(name: str) -> Column:
    return Column(
        name, name.removeprefix(LABEL), lambda run: as_text(_value(run, name)), rank=3, least=6
    )

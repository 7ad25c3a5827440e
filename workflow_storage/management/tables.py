"""How the commands show runs and states: as tables for people, as JSON for programs."""

from __future__ import annotations

import json
from datetime import datetime
from itertools import islice
from typing import TYPE_CHECKING, Any

from django.utils import timezone
from rich.console import Console
from rich.table import Table
from rich.text import Text

from workflow_storage.status import RunStatus
from workflow_storage.validation import RUN_FIELDS

if TYPE_CHECKING:
    from django.core.management.base import OutputWrapper
    from rich.console import RenderableType

    from workflow_storage.base import StorageBackend
    from workflow_storage.models import WorkflowRun

PIPE_WIDTH = 200
"""Columns of a table that is written to a file or another command."""

SHOWN_STATES = 50
"""States that the table of a run has."""

SHOWN_CHARACTERS = 2000
"""Characters of a field that a table shows."""

STATUS_COLOURS = {
    RunStatus.PENDING: "dim",
    RunStatus.RUNNING: "blue",
    RunStatus.COMPLETED: "green",
    RunStatus.FAILED: "red",
    RunStatus.CANCELLED: "yellow",
}


def write_tables(
    stdout: OutputWrapper, *renderables: RenderableType, no_color: bool = False
) -> None:
    """Write tables and text, in colour and as wide as the terminal if there is one."""
    is_terminal = stdout.isatty()
    console = Console(
        force_terminal=is_terminal,
        no_color=no_color or None,
        width=None if is_terminal else PIPE_WIDTH,
    )
    with console.capture() as captured:
        for renderable in renderables:
            console.print(renderable)
    encoding = getattr(stdout, "encoding", None) or "utf-8"
    text = captured.get().encode(encoding, "backslashreplace").decode(encoding)
    lines = text.splitlines()
    stdout.write("\n".join(line.rstrip() for line in lines))


def runs_table(runs: list[WorkflowRun]) -> Table:
    """Return a table with a line for each run; there must be one."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("ID", no_wrap=True, min_width=max(len(run.id) for run in runs))
    table.add_column("Workflow", overflow="fold")
    table.add_column("Status", no_wrap=True)
    table.add_column("Started", no_wrap=True)
    for column in ("Seconds", "Tokens", "USD"):
        table.add_column(column, justify="right", no_wrap=True)
    for run in runs:
        seconds = "" if run.duration_seconds is None else f"{run.duration_seconds:.3f}"
        cost = "" if run.total_cost_usd is None else f"{run.total_cost_usd:.4f}"
        table.add_row(
            Text(as_text(run.id)),
            Text(as_text(run.workflow_name)),
            Text(run.status, style=STATUS_COLOURS.get(RunStatus(run.status), "")),
            as_text(run.started_at),
            seconds,
            as_text(run.total_tokens),
            cost,
        )
    return table


def run_table(run: WorkflowRun) -> Table:
    """Return a table with a line for each field that has a value."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    payloads = {"config_snapshot", "inputs", "outputs"}
    for name in run_as_dict(run):
        value = getattr(run, name)
        if value is None:
            continue
        text = as_json(value) if name in payloads else as_text(value)
        if len(text) > SHOWN_CHARACTERS:
            text = f"{text[:SHOWN_CHARACTERS]}… ({len(text):,} characters)"
        table.add_row(name, Text(text))
    return table


def states_table(backend: StorageBackend, run: WorkflowRun) -> Table | str:
    """Return a table with a line for each of the first states, or text if there are none."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("Step", justify="right")
    table.add_column("Node", overflow="fold")
    table.add_column("Created", no_wrap=True)
    table.add_column("Keys of the state", overflow="fold")
    for checkpoint in islice(backend.states.iter_state_history(run.id), SHOWN_STATES + 1):
        if table.row_count == SHOWN_STATES:
            table.add_row("…", "", "", "the rest with --format json")
            break
        keys = as_text(", ".join(checkpoint["state_data"]))
        table.add_row(
            str(checkpoint["step"]),
            Text(as_text(checkpoint["node_id"])),
            as_text(checkpoint["created_at"]),
            Text(keys[:SHOWN_CHARACTERS]),
        )
    if not table.row_count:
        return "No states."
    return table


def run_as_dict(run: WorkflowRun) -> dict[str, Any]:
    """Return a run's fields as JSON has them, times as ISO 8601 text."""
    fields = {name: getattr(run, name) for name in RUN_FIELDS}
    return {
        name: value.isoformat() if isinstance(value, datetime) else value
        for name, value in fields.items()
    }


def as_json(value: Any) -> str:
    """Return a value as JSON for other programs, escaped so that any terminal takes it."""
    return json.dumps(value, indent=2)


def as_text(value: Any) -> str:
    """Return a field as a table shows it, times in the project's time zone."""
    if value is None:
        return ""
    if isinstance(value, datetime):
        local = timezone.localtime(value) if timezone.is_aware(value) else value
        return local.strftime("%Y-%m-%d %H:%M:%S")
    return printable(str(value))


def printable(text: str) -> str:
    """Escape what would control the terminal rather than be shown, or that it cannot show."""
    return "".join(
        character if character.isprintable() or character in "\n\t" else ascii(character)[1:-1]
        for character in text
    )

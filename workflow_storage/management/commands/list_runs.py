"""``manage.py list_runs``: the newest runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from workflow_storage.management.base import (
    StorageCommand,
    add_run_filters,
    as_json,
    as_text,
    run_as_dict,
)
from workflow_storage.status import RunStatus

if TYPE_CHECKING:
    from argparse import ArgumentParser

    from workflow_storage.base import StorageBackend
    from workflow_storage.models import WorkflowRun

STATUS_COLOURS = {
    RunStatus.PENDING: "dim",
    RunStatus.RUNNING: "blue",
    RunStatus.COMPLETED: "green",
    RunStatus.FAILED: "red",
    RunStatus.CANCELLED: "yellow",
}


class Command(StorageCommand):
    """Lists runs, newest first."""

    help = "Lists workflow runs, newest first."

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add the filters."""
        super().add_arguments(parser)
        add_run_filters(parser)
        parser.add_argument("--limit", type=int, default=20, help="How many runs. Default: 20.")
        parser.add_argument("--before", metavar="ID", help="The page after the run with this id.")

    def show(self, backend: StorageBackend, options: dict[str, Any]) -> None:
        """Write the page."""
        runs = backend.runs.list_runs(
            workflow_name=options["workflow"],
            status=options["status"],
            before=options["before"],
            limit=options["limit"],
        )
        if options["format"] == "json":
            self.stdout.write(as_json([run_as_dict(run) for run in runs]))
        elif not runs:
            self.stdout.write("No runs.")
        else:
            self.print_table(runs_table(runs), no_color=options["no_color"])


def runs_table(runs: list[WorkflowRun]) -> Table:
    """Give a table with a line for each run."""
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

"""``manage.py show_run ID``: one run and its states."""

from __future__ import annotations

import json
from itertools import islice
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from workflow_storage.exceptions import RunNotFoundError
from workflow_storage.management.base import StorageCommand, as_json, as_text, run_as_dict

if TYPE_CHECKING:
    from argparse import ArgumentParser

    from workflow_storage.base import StorageBackend
    from workflow_storage.models import WorkflowRun

SHOWN_STATES = 50
SHOWN_CHARACTERS = 2000


class Command(StorageCommand):
    """Shows a run."""

    help = "Shows a workflow run and its states; with --format json, everything there is of it."

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add the id."""
        super().add_arguments(parser)
        parser.add_argument("run_id", metavar="ID", help="The id of the run.")

    def show(self, backend: StorageBackend, options: dict[str, Any]) -> None:
        """Write the run."""
        run = backend.runs.get(options["run_id"])
        if run is None:
            raise RunNotFoundError(options["run_id"])
        if options["format"] == "json":
            self._write_json(backend, run)
        else:
            self.print_table(
                run_table(run), states_table(backend, run), no_color=options["no_color"]
            )

    def _write_json(self, backend: StorageBackend, run: WorkflowRun) -> None:
        """Write one state at a time, for all of them may not fit into memory."""
        self.stdout.write(as_json(run_as_dict(run)).removesuffix("\n}") + ',\n  "states": [')
        separator = ""
        for checkpoint in backend.states.iter_state_history(run.id):
            created_at = checkpoint["created_at"].isoformat()
            text = json.dumps({**checkpoint, "created_at": created_at})
            self.stdout.write(f"{separator}    {text}", ending="")
            separator = ",\n"
        self.stdout.write("\n  ]\n}" if separator else "  ]\n}")


def run_table(run: WorkflowRun) -> Table:
    """Give a table with a line for each field that has a value."""
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
    """Give a table with a line for each of the first states."""
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

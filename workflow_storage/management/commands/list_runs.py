"""``manage.py list_runs``: the newest runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from workflow_storage.management.arguments import add_run_filters, count
from workflow_storage.management.base import StorageCommand
from workflow_storage.management.tables import as_json, run_as_dict, runs_table, write_tables

if TYPE_CHECKING:
    from argparse import ArgumentParser

    from workflow_storage.base import StorageBackend


class Command(StorageCommand):
    """Lists runs, newest first."""

    help = "Lists workflow runs, newest first."

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add the filters."""
        super().add_arguments(parser)
        add_run_filters(parser)
        parser.add_argument("--limit", type=count, default=20, help="How many runs. Default: 20.")
        parser.add_argument("--before", metavar="ID", help="The page after the run with this id.")

    def show(self, backend: StorageBackend, options: dict[str, Any]) -> None:
        """Write the page."""
        runs = backend.runs.list_runs(
            workflow_name=options["workflow"],
            status=options["status"],
            before=options["before"],
            limit=count(options["limit"]),
        )
        if options["format"] == "json":
            self.stdout.write(as_json([run_as_dict(run) for run in runs]))
        elif not runs:
            self.stdout.write("No runs.")
        else:
            write_tables(self.stdout, runs_table(runs), no_color=options["no_color"])

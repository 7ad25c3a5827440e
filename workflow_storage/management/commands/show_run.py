"""``manage.py show_run ID``: one run and its states."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from workflow_storage.exceptions import RunNotFoundError
from workflow_storage.management.base import StorageCommand
from workflow_storage.management.tables import (
    as_json,
    run_as_dict,
    run_table,
    states_table,
    write_tables,
)

if TYPE_CHECKING:
    from argparse import ArgumentParser

    from workflow_storage.base import StorageBackend
    from workflow_storage.models import WorkflowRun


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
            write_tables(
                self.stdout,
                run_table(run),
                states_table(backend, run),
                no_color=options["no_color"],
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

"""``manage.py fail_stalled_runs --idle 15m``: runs whose process is gone, set to failed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from workflow_storage.management.arguments import duration
from workflow_storage.management.base import StorageCommand
from workflow_storage.management.tables import as_json, run_as_dict, runs_table, write_tables

if TYPE_CHECKING:
    from argparse import ArgumentParser

    from workflow_storage.base import StorageBackend


class Command(StorageCommand):
    """Sets runs without a sign of life to failed."""

    help = (
        "Sets running runs that gave no sign of life (start, heartbeat, checkpoint) for longer "
        "than --idle to failed, so that they can be resumed."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add the time and the dry run."""
        super().add_arguments(parser)
        parser.add_argument(
            "--idle",
            type=duration,
            required=True,
            metavar="TIME",
            help="How long without a sign of life: a number with s, m, h or d, such as 15m.",
        )
        parser.add_argument(
            "--dry-run", action="store_true", help="Only list the runs; change nothing."
        )

    def show(self, backend: StorageBackend, options: dict[str, Any]) -> None:
        """Fail the runs, and list them."""
        idle = duration(options["idle"])
        runs = backend.runs.list_stalled(idle)
        if not options["dry_run"]:
            failed = [run.id for run in runs if backend.runs.fail_stalled(idle, run_id=run.id)]
            runs = [run for run in map(backend.runs.get, failed) if run is not None]
        if options["format"] == "json":
            self.stdout.write(as_json([run_as_dict(run) for run in runs]))
            return
        if runs:
            write_tables(self.stdout, runs_table(runs), no_color=options["no_color"])
        done = "would be set to failed" if options["dry_run"] else "set to failed"
        self.stdout.write(f"{len(runs)} {'run' if len(runs) == 1 else 'runs'} {done}.")

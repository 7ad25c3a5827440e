"""``manage.py fail_stalled_runs --idle 15m``: runs whose process is gone, set to failed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from workflow_storage.filters import valid_filters
from workflow_storage.management.arguments import add_selection, duration, selection_of
from workflow_storage.management.base import StorageCommand, with_found_parent
from workflow_storage.management.run_columns import run_columns, run_record
from workflow_storage.management.text import counted

if TYPE_CHECKING:
    from argparse import ArgumentParser

    from workflow_storage.base import StorageBackend
    from workflow_storage.management.output import Output


class Command(StorageCommand):
    """Sets runs without a sign of life to failed."""

    help = (
        "Sets running runs that gave no sign of life (start, heartbeat, checkpoint) for longer "
        "than --idle to failed, so that they can be resumed."
    )

    _failed = 0

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add the time, the selection and the dry run."""
        super().add_arguments(parser)
        parser.add_argument(
            "--idle",
            type=duration,
            required=True,
            metavar="TIME",
            help="How long without a sign of life: a number with s, m, h or d, such as 15m.",
        )
        add_selection(parser)
        parser.add_argument(
            "--dry-run", action="store_true", help="Only list the runs; change nothing."
        )

    def show(self, backend: StorageBackend, output: Output, options: dict[str, Any]) -> None:
        """Fail the runs, and list them."""
        idle = duration(options["idle"])
        selected = valid_filters(with_found_parent(backend, selection_of(options)))
        stalled = [run for run in backend.runs.list_stalled(idle) if selected.matches(run)]
        runs = []
        for run in stalled:
            if options["dry_run"]:
                runs.append(run)
            elif backend.runs.fail_stalled(idle, run_id=run.id):
                self._failed += 1
                runs.append(backend.runs.get(run.id) or run)
        output.rows(runs, run_columns(), run_record())
        if output.is_table:
            done = "would be set to failed" if options["dry_run"] else "set to failed"
            self.say(f"{counted(len(runs), 'run')} {done}.", options)

    def interruption(self) -> str:
        """Return what was done."""
        return f"Interrupted after {counted(self._failed, 'run')} set to failed."

"""``manage.py fail_stalled_runs --idle 15m``: runs whose process is gone, set to failed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from workflow_storage.management.arguments import add_selection, duration
from workflow_storage.management.base import StorageCommand, selected
from workflow_storage.management.run_columns import run_columns, run_record
from workflow_storage.management.text import counted
from workflow_storage.paging import PageLength, emptied

if TYPE_CHECKING:
    from argparse import ArgumentParser
    from collections.abc import Iterator
    from datetime import timedelta

    from workflow_storage.base import StorageBackend
    from workflow_storage.management.output import Output
    from workflow_storage.management.selection import Selection
    from workflow_storage.models import WorkflowRun


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
        stalled = _stalled(backend, idle, selected(backend, options))
        runs = stalled if options["dry_run"] else self._set_to_failed(backend, idle, stalled)
        count = output.rows(runs, run_columns(), run_record())
        if output.is_table:
            done = "would be set to failed" if options["dry_run"] else "set to failed"
            self.say(f"{counted(count, 'run')} {done}.", options)

    def goes_on_unread(self, options: dict[str, Any]) -> bool:
        """Return True, unless nothing is changed."""
        return not options["dry_run"]

    def interruption(self) -> str:
        """Return what was done."""
        return f"Interrupted after {counted(self._failed, 'run')} set to failed."

    def _set_to_failed(
        self, backend: StorageBackend, idle: timedelta, runs: Iterator[WorkflowRun]
    ) -> Iterator[WorkflowRun]:
        for run in runs:
            if backend.runs.fail_stalled(idle, run_id=run.id):
                self._failed += 1
                yield backend.runs.get(run.id) or run


def _stalled(
    backend: StorageBackend, idle: timedelta, selection: Selection
) -> Iterator[WorkflowRun]:
    """Yield those of a selection that are stalled, in memory bounded by bytes."""
    before, length = selection.before, PageLength(selection.limit)
    while page := backend.runs.list_stalled(
        idle, before=before, limit=length.runs, **selection.filters
    ):
        before = page[-1]
        length.after(page)
        yield from emptied(page)

"""``manage.py fail_stalled_runs --idle 15m``: runs whose process is gone, set to failed."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any, cast

from workflow_storage.base import UNREADABLE, Damage
from workflow_storage.exceptions import StorageUnavailableError
from workflow_storage.management.arguments import add_dry_run, add_selection, duration
from workflow_storage.management.base import StorageCommand, selected
from workflow_storage.management.readable import NAMED, known, unreadable_error
from workflow_storage.management.run_columns import known_columns, known_record
from workflow_storage.management.text import counted
from workflow_storage.paging import PageLength, emptied
from workflow_storage.status import RunStatus

if TYPE_CHECKING:
    from argparse import ArgumentParser
    from collections.abc import Iterator
    from datetime import timedelta

    from workflow_storage.base import RunFilters, StorageBackend
    from workflow_storage.management.output import Output
    from workflow_storage.management.readable import Known
    from workflow_storage.management.selection import Selection
    from workflow_storage.models import WorkflowRun


class Command(StorageCommand):
    """Sets runs without a sign of life to failed."""

    help = (
        "Sets running runs that gave no sign of life (start, heartbeat, checkpoint) for longer "
        "than --idle to failed, so that they can be resumed."
    )

    _failed = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._unreadable: list[Known] = []

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
        add_dry_run(parser, "Only list the runs; change nothing.")

    def show(self, backend: StorageBackend, output: Output, options: dict[str, Any]) -> None:
        """Fail the runs, and list them."""
        idle, selection = duration(options["idle"]), selected(backend, options)
        # Refuses what cannot be meant, before a run is asked for by its id alone.
        backend.runs.list_stalled(idle, limit=0, **selection.filters)
        runs: Iterator[Known]
        if options["dry_run"]:
            runs = (known(backend, run) for run in _stalled(backend, idle, selection))
        else:
            runs = islice(self._set_to_failed(backend, idle, selection), selection.limit)
        count = output.rows(runs, known_columns(), known_record())
        if output.is_table:
            done = "would be set to failed" if options["dry_run"] else "set to failed"
            self.say(f"{counted(count, 'run')} {done}.", options)
        if self._unreadable:
            raise unreadable_error(self._unreadable)

    def goes_on_unread(self, options: dict[str, Any]) -> bool:
        """Return True, unless nothing is changed."""
        return not options["dry_run"]

    def interruption(self) -> str:
        """Return what was done."""
        return f"Interrupted after {counted(self._failed, 'run')} set to failed."

    def _set_to_failed(
        self, backend: StorageBackend, idle: timedelta, selection: Selection
    ) -> Iterator[Known]:
        for found in _may_be_stalled(backend, idle, selection):
            run_id = str(found.run_id) if isinstance(found, Damage) else found.id
            if backend.runs.fail_stalled(idle, run_id=run_id):
                self._failed += 1
                failed = known(backend, backend.read_run(run_id) or found)
                if failed.problem is not None and len(self._unreadable) <= NAMED:
                    self._unreadable.append(failed)
                yield failed


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


def _may_be_stalled(
    backend: StorageBackend, idle: timedelta, selection: Selection
) -> Iterator[WorkflowRun | Damage]:
    """Yield those of a selection that are stalled; once one cannot be read, all others that are running."""
    before = selection.before
    try:
        for run in _stalled(backend, idle, selection):
            before = run
            yield run
    except StorageUnavailableError:
        raise
    except UNREADABLE:
        running = cast("RunFilters", {**selection.filters, "status": RunStatus.RUNNING.value})
        for page in backend.readable_pages(before=before, **running):
            yield from emptied(page)

"""What the commands that transfer runs share: which runs, progress, and a summary."""

from __future__ import annotations

import time
from argparse import ArgumentTypeError
from collections import Counter
from datetime import datetime
from datetime import time as time_of_day
from typing import TYPE_CHECKING, Any

from django.core.management.base import BaseCommand, CommandError
from django.utils.dateparse import parse_date, parse_datetime
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from workflow_storage.management.base import add_run_filters, printable
from workflow_storage.transfer import DamagedLine, Transferred
from workflow_storage.validation import in_project_time

if TYPE_CHECKING:
    from argparse import ArgumentParser
    from collections.abc import Iterable, Iterator

    from django.core.management.base import OutputWrapper

    from workflow_storage.base import RunFilters

LINE_EVERY = 10.0
"""Seconds between lines of progress where there is no terminal."""

INTERRUPTED = 130
"""The exit code of what SIGINT ended, as shells have it."""


class TransferCommand(BaseCommand):
    """A command that brings runs from one place to another, and says how far it is."""

    # The stores need not be databases of this project.
    requires_system_checks: Any = ()

    def report(
        self,
        results: Iterable[Transferred | DamagedLine],
        total: int | None,
        done: str,
        options: dict[str, Any],
    ) -> None:
        """Go through the results, show the progress, and end with a summary.

        Args:
            results: what became of each run, as it comes.
            total: how many there will be, about; None if nobody knows.
            done: what became of a run that went well, such as ``copied``.
            options: those of the command; with ``verbosity`` 0, only failures are shown.

        Raises:
            CommandError: in the end, if a run was refused or a line was damaged; or if the
                user interrupts it.
        """
        counts: Counter[str] = Counter()
        states = deleted = failures = 0
        self._quiet = options["verbosity"] == 0
        try:
            for result in self._with_progress(results, total, counts):
                if isinstance(result, DamagedLine):
                    failures += 1
                    self._complain(f"Line {result.number}: {printable(result.reason)}")
                    continue
                counts[result.outcome] += 1
                states += result.states
                deleted += result.deleted
                if result.reason:
                    failures += 1
                    self._complain(f"{printable(result.run_id)}: {printable(result.reason)}")
        except KeyboardInterrupt:
            raise CommandError(
                f"Interrupted after {_runs(sum(counts.values()))}. {self.when_interrupted}",
                returncode=INTERRUPTED,
            ) from None
        self._say(
            f"{_runs(sum(counts.values()))}: {counts['copied']:,} {done}, "
            f"{counts['updated']:,} updated, {counts['unchanged']:,} unchanged, "
            f"{counts['refused']:,} refused; {states:,} states; {deleted:,} deleted from the source."
        )
        if failures:
            raise CommandError(f"{failures:,} of them did not go well; see above.")

    when_interrupted = "Run the same command again to go on."
    """What to do when it was interrupted."""

    _progress: Progress | None = None
    _quiet = False
    _summary: OutputWrapper | None = None

    def keep_from_stdout(self) -> None:
        """Say everything on standard error, for standard output gets the runs."""
        self._summary = self.stderr

    def _say(self, text: str) -> None:
        if not self._quiet:
            (self._summary or self.stdout).write(text, style_func=str)

    def _complain(self, text: str) -> None:
        if self._progress is None:
            self.stderr.write(text)
        else:  # above the bar, not on its line
            self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _with_progress(
        self, results: Iterable[Any], total: int | None, counts: Counter[str]
    ) -> Iterator[Any]:
        if self.stderr.isatty() and not self._quiet:
            yield from self._with_bar(results, total)
            return
        of_total = "" if total is None else f" of {total:,}"
        last = time.monotonic()
        for result in results:
            yield result
            if time.monotonic() - last >= LINE_EVERY:
                last = time.monotonic()
                self._say(f"{sum(counts.values()):,}{of_total} runs …")

    def _with_bar(self, results: Iterable[Any], total: int | None) -> Iterator[Any]:
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("runs"), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            self._progress = progress
            task = progress.add_task("", total=total)
            try:
                for result in results:
                    yield result
                    progress.advance(task)
            finally:
                self._progress = None


def _runs(count: int) -> str:
    return f"{count:,} {'run' if count == 1 else 'runs'}"


def add_filters(parser: ArgumentParser) -> None:
    """Add what selects runs."""
    add_run_filters(parser)
    parser.add_argument(
        "--started-before",
        type=moment,
        metavar="TIME",
        help="Only runs started earlier: 2026-01-31, or 2026-01-31T12:00, in the project's time "
        "zone unless it has one.",
    )


def filters_of(options: dict[str, Any]) -> RunFilters:
    """Give the filters that the arguments mean."""
    return {
        "workflow_name": options["workflow"],
        "status": options["status"],
        "started_before": options["started_before"],
    }


def moment(text: str) -> datetime:
    """Read a date or a time.

    Raises:
        ArgumentTypeError: if it is none.
    """
    try:
        date = parse_date(text)
        value = parse_datetime(text) if date is None else datetime.combine(date, time_of_day.min)
        value = None if value is None else in_project_time(value)
    except (ValueError, OverflowError):
        value = None
    if value is None:
        raise ArgumentTypeError(f"{text!r} is no time. Write 2026-01-31 or 2026-01-31T12:00.")
    return value

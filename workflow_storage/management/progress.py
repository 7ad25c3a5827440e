"""How the commands that transfer runs say how far they are, and what became of the runs."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from django.core.management.base import BaseCommand, CommandError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from workflow_storage.management.tables import printable
from workflow_storage.transfer import DamagedLine, Transferred

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from django.core.management.base import OutputWrapper

LINE_EVERY = 10.0
"""Seconds between lines of progress where there is no terminal."""

INTERRUPTED = 130
"""The exit code of what SIGINT ended, as shells have it."""


class TransferCommand(BaseCommand):
    """A command that brings runs from one place to another, and says how far it is."""

    # The stores need not be databases of this project.
    requires_system_checks: Any = ()

    when_interrupted = "Run the same command again to go on."
    """What to do when it was interrupted."""

    _progress: Progress | None = None
    _quiet = False
    _summary: OutputWrapper | None = None

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

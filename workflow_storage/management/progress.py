"""How far long work is, on the terminal of whoever waits for it; and what became of transferred runs."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from django.core.management.base import CommandError
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)

from workflow_storage.management.base import StoreCommand
from workflow_storage.management.text import counted, one_line
from workflow_storage.transfer import DamagedLine, Transferred

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from django.core.management.base import OutputWrapper

_T = TypeVar("_T")


class LongCommand(StoreCommand):
    """A command that takes its time: it shows on a terminal how far it is, and nothing elsewhere."""

    _bar: Progress | None = None

    def with_progress(
        self, items: Iterable[_T], total: int | None, options: dict[str, Any], noun: str = "runs"
    ) -> Iterator[_T]:
        """Yield some items, and show how many there were; the arguments are those of `progress`."""
        with self.progress(total, options, noun) as advance:
            for item in items:
                yield item
                advance(1)

    @contextmanager
    def progress(
        self, total: int | None, options: dict[str, Any], noun: str = "runs"
    ) -> Iterator[Callable[[int], object]]:
        """Show how far it is, and yield what tells how many more are done.

        Args:
            total: how many there will be, about; None if nobody knows.
            options: those of the command; with ``verbosity`` 0 nothing is shown.
            noun: what they are.
        """
        if not (self.stderr.isatty() and options["verbosity"]):
            yield lambda _: None
            return
        columns = (SpinnerColumn("line"), BarColumn(), MofNCompleteColumn(), TextColumn(noun))
        console = Console(stderr=True, no_color=options["no_color"] or None)
        with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
            self._bar = bar
            task = bar.add_task("", total=total)
            try:
                yield lambda more: bar.advance(task, more)
            finally:
                self._bar = None

    def complain(self, text: str) -> None:
        """Write a line about something that did not go well, above the bar if there is one."""
        if self._bar is None:
            self.stderr.write(text)
        else:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)


class TransferCommand(LongCommand):
    """A command that brings runs from one place to another, and says how far it is."""

    when_interrupted = "Run the same command again to go on."
    """What to do when it was interrupted."""

    _summary: OutputWrapper | None = None
    _done = 0

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
            CommandError: in the end, if a run was refused or a line was damaged.
        """
        counts: Counter[str] = Counter()
        states = deleted = failures = 0
        for result in self.with_progress(results, total, options):
            if isinstance(result, DamagedLine):
                failures += 1
                self.complain(f"Line {result.number}: {one_line(result.reason)}")
                continue
            counts[result.outcome] += 1
            self._done += 1
            states += result.states
            deleted += result.deleted
            if result.reason:
                failures += 1
                self.complain(f"{one_line(result.run_id)}: {one_line(result.reason)}")
        self._say(
            f"{counted(counts.total(), 'run')}: {counts['copied']:,} {done}, "
            f"{counts['updated']:,} updated, {counts['unchanged']:,} unchanged, "
            f"{counts['refused']:,} refused; {states:,} states; {deleted:,} deleted from the source.",
            options,
        )
        if failures:
            raise CommandError(f"{failures:,} of them did not go well; see above.")

    def interruption(self) -> str:
        """Return what was done, and how to go on."""
        return f"Interrupted after {counted(self._done, 'run')}. {self.when_interrupted}"

    def keep_from_stdout(self) -> None:
        """Say everything on standard error, for standard output gets the runs."""
        self._summary = self.stderr

    def _say(self, text: str, options: dict[str, Any]) -> None:
        if options["verbosity"]:
            (self._summary or self.stdout).write(text, style_func=str)

"""How far long work is, on the terminal of whoever waits for it; and what became of transferred runs."""

from __future__ import annotations

from collections import Counter, deque
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
from workflow_storage.management.output import Output, Record, add_format
from workflow_storage.management.text import counted, one_line, writable
from workflow_storage.transfer import DamagedLine, Transferred

if TYPE_CHECKING:
    from argparse import ArgumentParser
    from collections.abc import Callable, Iterable, Iterator

    from django.core.management.base import OutputWrapper

_T = TypeVar("_T")


def has_changed(result: Transferred) -> bool:
    """Whether a run was written, or deleted."""
    return result.outcome in {"copied", "updated"} or result.deleted


class Tally:
    """What became of transferred runs, counted.

    Attributes:
        failures: how many did not go well.
        changes: how many runs were written or deleted.
    """

    def __init__(self) -> None:
        self.failures = 0
        self.changes = 0
        self._outcomes: Counter[str] = Counter()
        self._states = self._deleted = 0

    def add(self, result: Transferred | DamagedLine) -> str | None:
        """Count a result, and return what there is to complain of."""
        if isinstance(result, DamagedLine):
            self.failures += 1
            return f"Line {result.number}: {one_line(result.reason)}"
        self._outcomes[result.outcome] += 1
        self._states += result.states
        self._deleted += result.deleted
        self.changes += has_changed(result)
        if not result.reason:
            return None
        self.failures += 1
        return f"{one_line(result.run_id)}: {one_line(result.reason)}"

    def summary(self, done: str) -> str:
        """Return all that in a line.

        Args:
            done: what became of a run that went well, such as ``copied``.
        """
        counts = self._outcomes
        return (
            f"{counted(counts.total(), 'run')}: {counts['copied']:,} {done}, "
            f"{counts['updated']:,} updated, {counts['unchanged']:,} unchanged, "
            f"{counts['refused']:,} refused; {self._states:,} states; "
            f"{self._deleted:,} deleted from the source."
        )


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
        # Records on the same terminal show themselves how far it is.
        is_hidden = self.stdout.isatty() and options.get("format") not in {None, "table"}
        if is_hidden or not (self.stderr.isatty() and options["verbosity"]):
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
        if not self._is_above_bar(text):
            self.stderr.write(text)

    def tell(self, output: Output, text: str) -> None:
        """Write a line for people while it goes on, above the bar if that is on the same terminal."""
        if not (output.is_terminal and self._is_above_bar(text)):
            output.line(text)

    def _is_above_bar(self, text: str) -> bool:
        """Write a line above the bar, and say whether there is one."""
        if self._bar is None:
            return False
        shown = writable(text, self._bar.console.encoding)
        self._bar.console.print(shown, markup=False, highlight=False, soft_wrap=True)
        return True


def _outcome(result: Transferred | DamagedLine) -> dict[str, Any]:
    """Return what became of a run, or of a line in which there is none, as programs get it."""
    if isinstance(result, DamagedLine):
        damaged = Transferred("", "refused", reason=result.reason)._asdict()
        return {**damaged, "run_id": None, "outcome": "damaged", "line": result.number}
    return {**result._asdict(), "reason": result.reason or None, "line": None}


OUTCOME_RECORD = Record((*Transferred._fields, "line"), _outcome)


class TransferCommand(LongCommand):
    """A command that brings runs from one place to another, and says how far it is."""

    when_interrupted = "Run the same command again to go on."
    """What to do when it was interrupted."""

    _summary: OutputWrapper | None = None
    _changes = 0

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add ``--format``."""
        add_format(parser)

    def carry_out(self, options: dict[str, Any]) -> None:
        """Open the output, and bring the runs where they go."""
        self.transfer(Output(self.stdout, options), options)

    def transfer(self, output: Output, options: dict[str, Any]) -> None:
        """Bring the runs where they go."""
        raise NotImplementedError

    def goes_on_unread(self, options: dict[str, Any]) -> bool:
        """Return True."""
        return True

    def report(
        self,
        results: Iterable[Transferred | DamagedLine],
        total: int | None,
        done: str,
        output: Output,
        options: dict[str, Any],
    ) -> None:
        """Go through the results, show the progress, and end with a summary, or write each of them.

        Args:
            results: what became of each run, as it comes.
            total: how many there will be, about; None if nobody knows.
            done: what became of a run that went well, such as ``copied``.
            output: for people gets the summary; for programs, a record of each result.
            options: those of the command; with ``verbosity`` 0, people are shown only failures.

        Raises:
            CommandError: in the end, if a run was refused or a line was damaged.
        """
        tally = Tally()
        counted_results = self.counted(results, tally, total, options)
        if output.is_table:
            deque(counted_results, maxlen=0)
            self._say(tally.summary(done), options)
        else:
            output.rows(counted_results, (), OUTCOME_RECORD)
        if tally.failures:
            raise CommandError(f"{tally.failures:,} of them did not go well; see above.")

    def counted(
        self,
        results: Iterable[Transferred | DamagedLine],
        tally: Tally,
        total: int | None,
        options: dict[str, Any],
    ) -> Iterator[Transferred | DamagedLine]:
        """Yield the results that are news, show the progress and what did not go well, and count."""
        for result in self.with_progress(results, total, options):
            before = tally.changes
            complaint = tally.add(result)
            self._changes += tally.changes - before
            if self.is_news(result, complaint):
                if complaint:
                    self.complain(complaint)
                yield result

    def is_news(self, result: Transferred | DamagedLine, complaint: str | None) -> bool:
        """Whether to write a result, and to complain of it if it did not go well."""
        return True

    def interruption(self) -> str:
        """Return how many runs were written or deleted, and how to go on."""
        return f"Interrupted after {counted(self._changes, 'run')}. {self.when_interrupted}"

    def keep_from_stdout(self) -> None:
        """Say everything on standard error, for standard output gets the runs."""
        self._summary = self.stderr

    def _say(self, text: str, options: dict[str, Any]) -> None:
        if options["verbosity"]:
            (self._summary or self.stdout).write(text, style_func=str)

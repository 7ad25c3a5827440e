"""``manage.py list_runs``: the newest runs."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from django.core.management.base import CommandError

from workflow_storage.management.arguments import add_selection, seconds
from workflow_storage.management.base import StorageCommand, selected
from workflow_storage.management.readable import NAMED, known_runs, unreadable_error
from workflow_storage.management.run_columns import column_names, known_columns, known_record
from workflow_storage.management.text import counted

if TYPE_CHECKING:
    from argparse import ArgumentParser
    from collections.abc import Iterable, Iterator

    from workflow_storage.base import StorageBackend
    from workflow_storage.management.output import Output
    from workflow_storage.management.readable import Known

DEFAULT_LIMIT = 20
"""Runs that are listed unless ``--limit`` says how many."""

CLEAR = "\x1b[H\x1b[2J\x1b[3J"
"""What clears a terminal, and what it has scrolled off."""


class Command(StorageCommand):
    """Lists runs, newest first."""

    help = (
        "Lists workflow runs, newest first: of those that failed the node and the first line of "
        "the error, of those that run the node and the seconds so far. One that cannot be read is "
        "listed with what is known of it, and the exit code is 1."
    )

    _is_found = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._unreadable: list[Known] = []

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add the selection, the columns and the watching."""
        super().add_arguments(parser)
        add_selection(parser, default_limit=DEFAULT_LIMIT)
        parser.add_argument(
            "--columns",
            type=column_names,
            metavar="NAME,NAME",
            help="Which columns, in this order: fields of a run, and label:NAME.",
        )
        parser.add_argument(
            "--watch",
            type=seconds,
            metavar="SECONDS",
            help="Show the list again after so many seconds, until Ctrl-C.",
        )
        parser.add_argument(
            "--fail-if-any",
            action="store_true",
            help="Exit with 1 if there is such a run; for monitoring.",
        )

    def show(self, backend: StorageBackend, output: Output, options: dict[str, Any]) -> None:
        """Write the page, and again while it is watched."""
        while True:
            count = self._page(backend, output, options)
            if options["fail_if_any"] and count:
                raise CommandError(f"Found {counted(count, 'run')}.")
            if options["watch"] is None:
                break
            self.stdout.flush()
            time.sleep(seconds(options["watch"]))
        if self._unreadable:
            raise unreadable_error(self._unreadable)

    def code_of_broken_pipe(self) -> int:
        """Return 1 if there was a run, and there must be none; or one that cannot be read."""
        return int(self._is_found or bool(self._unreadable))

    def _page(self, backend: StorageBackend, output: Output, options: dict[str, Any]) -> int:
        selection = selected(backend, options, default_limit=DEFAULT_LIMIT)
        self._unreadable.clear()
        runs: Iterable[Known] = self._noted(known_runs(backend, selection), options)
        if output.is_table:
            runs = list(runs)  # before the list of the last round is cleared away
        if options["watch"] is not None and output.is_terminal:
            output.raw(CLEAR)
        names = options["columns"] and column_names(options["columns"])
        return output.rows(runs, known_columns(names), known_record(names), nothing="No runs.")

    def _noted(self, runs: Iterable[Known], options: dict[str, Any]) -> Iterator[Known]:
        for run in runs:
            self._is_found = options["fail_if_any"]
            if run.problem is not None and len(self._unreadable) <= NAMED:
                self._unreadable.append(run)
            yield run

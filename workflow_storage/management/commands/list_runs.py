"""``manage.py list_runs``: the newest runs."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from django.core.management.base import CommandError

from workflow_storage.management.arguments import (
    add_limit,
    add_selection,
    limit_of,
    seconds,
    selection_of,
)
from workflow_storage.management.base import StorageCommand, found_run, with_found_parent
from workflow_storage.management.run_columns import column_names, run_columns, run_record
from workflow_storage.management.text import counted
from workflow_storage.validation import RUN_FIELDS

if TYPE_CHECKING:
    from argparse import ArgumentParser

    from workflow_storage.base import StorageBackend
    from workflow_storage.management.output import Output

DEFAULT_LIMIT = 20
"""Runs that are listed unless ``--limit`` says how many."""

CLEAR = "\x1b[H\x1b[2J\x1b[3J"
"""What clears a terminal, and what it has scrolled off."""


class Command(StorageCommand):
    """Lists runs, newest first."""

    help = (
        "Lists workflow runs, newest first: of those that failed the node and the first line of "
        "the error, of those that run the node and the seconds so far."
    )

    _is_found = False

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add the selection, the columns and the watching."""
        super().add_arguments(parser)
        add_selection(parser)
        add_limit(parser, default=DEFAULT_LIMIT)
        parser.add_argument("--before", metavar="ID", help="The page after the run with this id.")
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
                return
            self.stdout.flush()
            time.sleep(seconds(options["watch"]))

    def code_of_broken_pipe(self) -> int:
        """Return 1 if there was a run, and there must be none."""
        return int(self._is_found)

    def _page(self, backend: StorageBackend, output: Output, options: dict[str, Any]) -> int:
        before = options["before"] and found_run(backend, options["before"])
        filters = with_found_parent(backend, selection_of(options))
        limit = limit_of(options) or DEFAULT_LIMIT
        runs = backend.runs.list_runs(before=before, limit=limit, **filters)
        self._is_found = options["fail_if_any"] and bool(runs)
        if options["watch"] is not None and output.is_terminal:
            output.raw(CLEAR)
        names = options["columns"] and column_names(options["columns"])
        columns = run_columns(names) if names else run_columns()
        return output.rows(runs, columns, run_record(names or RUN_FIELDS), nothing="No runs.")

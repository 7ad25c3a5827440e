"""``manage.py copy_runs --from X --to Y``: runs into another store."""

from __future__ import annotations

import time
from datetime import timedelta
from itertools import chain
from typing import TYPE_CHECKING, Any

from django.utils import timezone

from workflow_storage.exceptions import StorageUnavailableError
from workflow_storage.factory import create_storage_backend
from workflow_storage.management.arguments import STORE, add_selection, seconds, selection_of
from workflow_storage.management.base import existing_backend, with_found_parent
from workflow_storage.management.progress import TransferCommand
from workflow_storage.management.text import as_text, one_line
from workflow_storage.transfer import copy_changed_runs, copy_runs

if TYPE_CHECKING:
    from argparse import ArgumentParser
    from datetime import datetime

    from workflow_storage.base import RunFilters, StorageBackend

ALL_AGAIN_EVERY = 3600.0
"""Seconds after which ``--watch`` looks at all runs again, for what is missed otherwise."""

OVERLAP = timedelta(minutes=5)
"""How much the clocks of two machines may differ."""

REMEMBERED = 10_000
"""Complaints that are not repeated while it is watched."""


class Command(TransferCommand):
    """Copies runs, or moves them."""

    help = (
        "Copies workflow runs with all their states from one store to another. What is there "
        "already is not copied again, so it can be interrupted, and repeated."
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._complaints: set[str] = set()

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add the stores, the selection, the moving and the watching."""
        parser.add_argument(
            "--from", dest="source", required=True, metavar=STORE, help="The store with the runs."
        )
        parser.add_argument(
            "--to", dest="target", required=True, metavar=STORE, help="The store they go to."
        )
        add_selection(parser)
        parser.add_argument(
            "--move",
            action="store_true",
            help="Delete each finished run from the first store, once it has been read back equal "
            "from the second.",
        )

        parser.add_argument(
            "--watch",
            type=seconds,
            metavar="SECONDS",
            help="Go on with what is new after so many seconds, until Ctrl-C; and every hour with "
            "all runs again.",
        )

    def carry_out(self, options: dict[str, Any]) -> None:
        """Copy the runs, once or until it is stopped."""
        source = existing_backend(options["source"])
        target = create_storage_backend(options["target"])
        if options["watch"] is not None:
            self._watch(source, target, options)
            return
        filters = with_found_parent(source, selection_of(options))
        total = source.runs.count_runs(**filters)
        copied = copy_runs(source, target, move=options["move"], **filters)
        self.report(copied, total, "copied", options)

    def goes_on_unread(self, options: dict[str, Any]) -> bool:
        """Return True."""
        return True

    def is_news(self, complaint: str) -> bool:
        """Whether to show a complaint: while it is watched, once."""
        if complaint in self._complaints:
            return False
        if len(self._complaints) < REMEMBERED:
            self._complaints.add(complaint)
        return True

    def _watch(
        self,
        source: StorageBackend,
        target: StorageBackend,
        options: dict[str, Any],
    ) -> None:
        since: datetime | None = None
        until: datetime | None = None
        all_again_at = 0.0
        pause, move = seconds(options["watch"]), options["move"]
        while True:
            now = timezone.now()
            filters = with_found_parent(source, selection_of(options))
            try:
                if since is None or time.monotonic() >= all_again_at:
                    all_again_at = time.monotonic() + ALL_AGAIN_EVERY
                    copied = copy_runs(source, target, move=move, **filters)
                else:
                    changed = copy_changed_runs(
                        source, target, since=since - OVERLAP, move=move, **filters
                    )
                    aged = _aged_since(until, filters)
                    copied = chain(
                        changed, copy_runs(source, target, move=move, **aged) if aged else ()
                    )
                tally = self.tallied(copied, None, options)
                if tally.changes or since is None:
                    self.say(f"{as_text(now)}  {tally.summary('copied')}", options)
                since, until = now, filters["started_before"]
            except StorageUnavailableError as exc:
                # It may be there again the next time, which begins where this one did.
                self.complain(one_line(f"{as_text(now)}  {exc}"))
            self.stdout.flush()
            time.sleep(pause)


def _aged_since(until: datetime | None, filters: RunFilters) -> RunFilters | None:
    """Return what selects runs that are old enough now, and were not the last time; or None."""
    before, after = filters["started_before"], filters["started_after"]
    if until is None or before is None or before <= until:
        return None
    return {**filters, "started_after": until if after is None else max(after, until)}

"""``manage.py copy_runs --from X --to Y``: runs into another store."""

from __future__ import annotations

import time
from collections import deque
from datetime import timedelta
from itertools import chain
from typing import TYPE_CHECKING, Any

from django.utils import timezone

from workflow_storage.exceptions import StorageUnavailableError
from workflow_storage.factory import create_storage_backend
from workflow_storage.management.arguments import STORE, add_selection, seconds
from workflow_storage.management.base import existing_backend, selected, usage_error
from workflow_storage.management.progress import (
    OUTCOME_RECORD,
    Tally,
    TransferCommand,
    has_changed,
)
from workflow_storage.management.text import as_text, one_line
from workflow_storage.transfer import Transferred, copy_changed_runs, copy_runs

if TYPE_CHECKING:
    from argparse import ArgumentParser
    from collections.abc import Iterator
    from datetime import datetime

    from workflow_storage.base import RunFilters, StorageBackend
    from workflow_storage.management.output import Output
    from workflow_storage.transfer import DamagedLine

FULL_EVERY = "1h"
"""How often ``--watch`` looks at all runs again, unless ``--full-every`` says so."""

OVERLAP = timedelta(minutes=5)
"""How much the clocks of two machines may differ."""

REMEMBERED = 10_000
"""Complaints that are not repeated while it is watched."""


class Command(TransferCommand):
    """Copies runs, or moves them."""

    help = (
        "Copies workflow runs with all their states from one store to another. What is there "
        "already is not copied again, so it can be interrupted, and repeated. Threads of LangGraph's "
        "graphs are not copied."
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._complaints: set[str] = set()
        self._is_watching = False

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add the stores, the selection, the moving and the watching."""
        super().add_arguments(parser)
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
            "--overwrite",
            action="store_true",
            help="Where a run differs in both and neither is newer, as after a change of labels or "
            "outputs, take that of the first store, rather than refuse it.",
        )
        parser.add_argument(
            "--watch",
            type=seconds,
            metavar="SECONDS",
            help="Go on after so many seconds with the runs that are new or had not ended, until "
            "Ctrl-C.",
        )
        parser.add_argument(
            "--full-every",
            type=seconds,
            default=FULL_EVERY,
            metavar="SECONDS",
            help="With --watch: how often to look at all runs again, which alone finds what was "
            "changed in runs that had ended, such as their labels (see --overwrite): 90, 5m, 1h. "
            "Default: %(default)s.",
        )

    def transfer(self, output: Output, options: dict[str, Any]) -> None:
        """Copy the runs, once or until it is stopped."""
        if options["watch"] is not None:
            self._watch(output, options)
            return
        source, target = _stores(options)
        selection = selected(source, options)
        copied = copy_runs(
            source,
            target,
            move=options["move"],
            overwrite=options["overwrite"],
            before=selection.before,
            limit=selection.limit,
            **selection.filters,
        )
        self.report(copied, selection.count(source), "copied", output, options)

    def is_news(self, result: Transferred | DamagedLine, complaint: str | None) -> bool:
        """Whether to write a result: while it is watched, what was done, and a complaint once."""
        if not self._is_watching:
            return True
        if complaint is None:
            return not isinstance(result, Transferred) or has_changed(result)
        if complaint in self._complaints:
            return False
        if len(self._complaints) < REMEMBERED:
            self._complaints.add(complaint)
        return True

    def _watch(self, output: Output, options: dict[str, Any]) -> None:
        if options["limit"] is not None or options["before"] is not None:
            raise usage_error("--limit and --before are for copying once, without --watch.")
        if output.format == "json":
            raise usage_error("--watch has no end, and a JSON list would have none. Use jsonl.")
        self._is_watching = True
        results = self._rounds(output, options)
        if output.is_table:
            deque(results, maxlen=0)
        else:
            output.rows(results, (), OUTCOME_RECORD)

    def _rounds(
        self, output: Output, options: dict[str, Any]
    ) -> Iterator[Transferred | DamagedLine]:
        """Yield what was done in each round, for ever."""
        source, target = _stores(options)
        since: datetime | None = None
        until: datetime | None = None
        all_again_at = 0.0
        pause = seconds(options["watch"])
        how = {"move": options["move"], "overwrite": options["overwrite"]}
        full_every = seconds(options["full_every"])
        while True:
            now = timezone.now()
            tally = Tally()
            filters = selected(source, options).filters
            try:
                if since is None or time.monotonic() >= all_again_at:
                    all_again_at = time.monotonic() + full_every
                    copied = copy_runs(source, target, **how, **filters)
                else:
                    changed = copy_changed_runs(
                        source, target, since=since - OVERLAP, **how, **filters
                    )
                    aged = _aged_since(until, filters)
                    copied = chain(
                        changed, copy_runs(source, target, **how, **aged) if aged else ()
                    )
                yield from self.counted(copied, tally, None, options)
                if output.is_table and (tally.changes or since is None):
                    self.say(f"{as_text(now)}  {tally.summary('copied')}", options)
                since, until = now, filters["started_before"]
            except StorageUnavailableError as exc:
                # It may be there again the next time, which begins where this one did.
                self.complain(one_line(f"{as_text(now)}  {exc}"))
            self.stdout.flush()
            time.sleep(pause)


def _stores(options: dict[str, Any]) -> tuple[StorageBackend, StorageBackend]:
    return existing_backend(options["source"]), create_storage_backend(options["target"])


def _aged_since(until: datetime | None, filters: RunFilters) -> RunFilters | None:
    """Return what selects runs that are old enough now, and were not the last time; or None."""
    before, after = filters["started_before"], filters["started_after"]
    if until is None or before is None or before <= until:
        return None
    return {**filters, "started_after": until if after is None else max(after, until)}

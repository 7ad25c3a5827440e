"""``manage.py prune_threads --older-than 90d``: threads of graphs that nobody uses any more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from workflow_storage.backends.orm import DjangoWorkflowRunRepository
from workflow_storage.contrib.langgraph.chains import Memory
from workflow_storage.contrib.langgraph.upkeep import ThreadUpkeep
from workflow_storage.exceptions import UnsupportedBackendError
from workflow_storage.management.arguments import add_dry_run, add_limit, limit_of, moment
from workflow_storage.management.base import StorageCommand, add_no_input
from workflow_storage.management.output import Column, Record
from workflow_storage.management.progress import LongCommand
from workflow_storage.management.text import as_count, counted

if TYPE_CHECKING:
    from argparse import ArgumentParser

    from workflow_storage.base import StorageBackend
    from workflow_storage.management.output import Output


class Pruned(NamedTuple):
    """What there was to be deleted, and what was."""

    threads: int
    checkpoints: int
    deleted: int | None = None
    """How many checkpoints were deleted; None if nothing was to be."""


RECORD = Record(Pruned._fields, lambda pruned: pruned._asdict())
COLUMNS = [
    Column("threads", "Threads", lambda one: as_count(one.threads), kind="number"),
    Column("checkpoints", "Checkpoints", lambda one: as_count(one.checkpoints), kind="number"),
]


class Command(LongCommand, StorageCommand):
    """Deletes threads that nobody uses any more, or all but the newest of their checkpoints."""

    help = (
        "Deletes threads of LangGraph's graphs without a checkpoint since a time, one after the "
        "other; never one with a workflow run that is running or waiting in the same database. Says "
        "first how many, and asks. Workflow runs stay: those are for prune_runs."
    )

    _deleted = 0

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add which threads, and what to do with them."""
        super().add_arguments(parser)
        parser.add_argument(
            "--older-than",
            type=moment,
            required=True,
            metavar="TIME",
            help="Threads whose newest checkpoint is older: 90d, 12h; or of before a date: "
            "2026-01-31.",
        )
        parser.add_argument(
            "--keep-latest",
            action="store_true",
            help="Keep the newest checkpoint of each, so that it can be gone on with.",
        )
        add_limit(parser)
        add_dry_run(parser, "Only say what would be deleted.")
        add_no_input(parser)

    def show(self, backend: StorageBackend, output: Output, options: dict[str, Any]) -> None:
        """Say what there is to delete, ask, and delete it."""
        if not isinstance(backend.runs, DjangoWorkflowRunRepository):
            raise UnsupportedBackendError(
                f"{backend.name} is no Django database, and the threads are in one. Pass its name "
                "in DATABASES to --backend."
            )
        upkeep = ThreadUpkeep(
            backend.runs.alias, own_connection=backend.runs.own_connection, memory=Memory()
        )
        before, latest = moment(options["older_than"]), options["keep_latest"]
        which: dict[str, Any] = {"keep_latest": latest, "limit": limit_of(options)}
        found = Pruned(0, 0)
        for _, count in upkeep.unused(before, **which):
            found = Pruned(found.threads + 1, found.checkpoints + count)
        what = f"{counted(found.checkpoints, 'checkpoint')} of {counted(found.threads, 'thread')}"
        if output.is_table:
            output.rows(
                [found] if found.threads else [], COLUMNS, RECORD, nothing="Nothing to delete."
            )
        if (
            options["dry_run"]
            or not found.threads
            or not self.confirmed(f"Delete {what}?", options)
        ):
            if not output.is_table:
                output.rows([found], (), RECORD)
            elif found.threads:
                was = "would be" if options["dry_run"] else "were not"
                self.say(f"{what} {was} deleted.", options)
            return
        unused = upkeep.unused(before, **which)
        for thread_id, _ in self.with_progress(unused, found.threads, options, "threads"):
            prune = upkeep.prune if latest else upkeep.delete_thread
            self._deleted += prune(thread_id, unless_since=before)
        if output.is_table:
            self.say(f"{counted(self._deleted, 'checkpoint')} deleted.", options)
        else:
            output.rows([found._replace(deleted=self._deleted)], (), RECORD)

    def goes_on_unread(self, options: dict[str, Any]) -> bool:
        """Return True, unless nothing is changed."""
        return not options["dry_run"]

    def interruption(self) -> str:
        """Return what was done, and how to go on."""
        done = counted(self._deleted, "checkpoint")
        return f"Interrupted after {done} deleted. Run the same command again to go on."

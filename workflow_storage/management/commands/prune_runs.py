"""``manage.py prune_runs --older-than 90d``: runs that ended long ago, deleted; or their states."""

from __future__ import annotations

import os
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from django.core.management.base import CommandError

from workflow_storage.exceptions import CannotMoveError, ExportFileError, RunNotFoundError
from workflow_storage.management.arguments import (
    add_dry_run,
    add_limit,
    add_narrow_selection,
    given,
    limit_of,
    moment,
    narrow_selection_of,
    whole_number,
)
from workflow_storage.management.base import (
    StorageCommand,
    add_no_input,
    usage_error,
    with_found_parent,
)
from workflow_storage.management.output import Column, Record
from workflow_storage.management.progress import LongCommand
from workflow_storage.management.text import as_count, as_text, counted, one_line
from workflow_storage.status import TERMINAL_STATUSES, RunStatus
from workflow_storage.transfer import DamagedLine, archive_runs, delete_archived, is_stream

if TYPE_CHECKING:
    from argparse import ArgumentParser
    from collections.abc import Iterable, Iterator

    from workflow_storage.base import FinishedRunFilters, StorageBackend
    from workflow_storage.management.output import Output
    from workflow_storage.models import WorkflowRun

COMPLETED = RunStatus.COMPLETED.value


class Found(NamedTuple):
    """What there is to be deleted of a workflow."""

    workflow_name: str
    runs: int
    states: int | None
    """None where the runs go with all their states."""


class Pruned(NamedTuple):
    """What there was to be deleted of a workflow, or of all; and of all, what was done."""

    workflow_name: str | None
    """None for all."""
    runs: int | None
    """How many were found; None if nobody wanted to know."""
    states: int | None
    """How many of their states; None where the runs go with all of them."""
    archived: int | None = None
    """How many runs were written to the archive; None without one."""
    deleted: int | None = None
    """How many runs were deleted, or with --states-only states."""


RECORD = Record(Pruned._fields, lambda pruned: pruned._asdict())


class Command(LongCommand, StorageCommand):
    """Deletes runs that ended long ago, or the older ones of their states."""

    help = (
        "Deletes workflow runs that ended before a time, with their states, batch by batch; never "
        "one that is running or waiting. Says first how many of each workflow, and asks. Threads of "
        "LangGraph's graphs stay; those are for prune_threads."
    )

    _deleted = 0
    _written: int | None = None
    _noun = "run"
    _archive = _archived = ""
    _went_wrong = False

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add which runs, and what to do with them."""
        super().add_arguments(parser)
        parser.add_argument(
            "--older-than",
            type=moment,
            required=True,
            metavar="TIME",
            help="Runs that ended longer ago: 90d, 12h; or before a date: 2026-01-31.",
        )
        add_narrow_selection(parser)
        parser.add_argument(
            "--keep-last",
            type=whole_number,
            default=0,
            metavar="N",
            help="Of each workflow spare the newest so many, of those selected.",
        )
        add_limit(parser)
        add_dry_run(parser, "Only say what would be deleted.")
        add_no_input(parser)
        parser.add_argument(
            "--archive",
            metavar="FILE",
            help="Export each run to this new file first (.jsonl, .jsonl.gz, .jsonl.zst), and "
            "delete it if it reads back equal and has not changed since.",
        )
        parser.add_argument(
            "--states-only",
            action="store_true",
            help="Keep the runs, and delete the older of their states; of completed runs, unless "
            "--status says otherwise.",
        )
        parser.add_argument(
            "--keep-states",
            type=whole_number,
            metavar="N",
            help="With --states-only: keep the newest so many of each run.",
        )
        parser.add_argument(
            "--force",
            action="store_true",
            help="With --states-only: also of failed and cancelled runs, which could be resumed.",
        )

    def show(self, backend: StorageBackend, output: Output, options: dict[str, Any]) -> None:
        """Say what there is to delete, ask, and delete it."""
        keep = self._states_to_keep(options)
        if options["archive"] is not None:
            _check_archive(Path(options["archive"]))
        self._noun = "run" if keep is None else "state"
        which = _which(backend, options, states_only=keep is not None)
        # Who wants to hear nothing need not wait for the counting.
        if options["dry_run"] or options["interactive"] or options["verbosity"]:
            found = self._found(backend, which, keep, options)
            pruned = [Pruned(*one) for one in found]
            if output.is_table:
                self._show_found(output, found, states_only=keep is not None)
            total: int | None = sum(one.runs for one in found)
            states = None if keep is None else sum(one.states or 0 for one in found)
            what = counted(total or 0, "run")
            if states is not None:
                what = f"{counted(states, 'state')} of {what}"
            if found and options["dry_run"] and output.is_table:
                self.say(f"{what} would be deleted.", options)
            if options["dry_run"] or not found:
                self._write_records(output, pruned)
                return
            if not self.confirmed(f"Delete {what}?", options):
                if output.is_table:
                    self.say("Nothing was deleted.", options)
                self._write_records(output, pruned)
                return
        else:
            pruned, total, states = [], None, None
        self._delete(backend, which, keep, total, options)
        if output.is_table:
            self.say(f"{self._archived}{counted(self._deleted, self._noun)} deleted.", options)
        in_all = Pruned(None, total, states, self._written, self._deleted)
        self._write_records(output, [*pruned, in_all])
        if self._went_wrong:
            raise CommandError("Some were not archived and deleted; see above.")

    def _delete(
        self,
        backend: StorageBackend,
        which: FinishedRunFilters,
        keep: int | None,
        total: int | None,
        options: dict[str, Any],
    ) -> None:
        if keep is not None:
            self._delete_states(backend, which, keep, total, options)
        elif options["archive"] is not None:
            self._archive_and_delete(backend, which, total, options)
        else:
            with self.progress(total, options) as advance:

                def count(deleted: int) -> None:
                    self._deleted += deleted
                    advance(deleted)

                backend.runs.delete_finished(on_batch=count, **which)

    def goes_on_unread(self, options: dict[str, Any]) -> bool:
        """Return True, unless nothing is changed."""
        return not options["dry_run"]

    def interruption(self) -> str:
        """Return what was done, and how to go on."""
        if self._archive and not self._deleted:
            return f"Interrupted before anything was deleted. {self._archive}"
        again = self._archive or "Run the same command again to go on."
        return f"Interrupted after {counted(self._deleted, self._noun)} deleted. {again}"

    def _states_to_keep(self, options: dict[str, Any]) -> int | None:
        """Return how many states to keep of each run; None to delete the runs.

        Raises:
            CommandError: for options that do not go together.
        """
        keep = given(whole_number, options["keep_states"])
        if not options["states_only"]:
            if keep is not None or options["force"]:
                raise usage_error("--keep-states and --force go with --states-only.")
            return None
        if keep is None:
            raise usage_error("--states-only needs --keep-states: how many of each run to keep.")
        if options["archive"] is not None:
            raise usage_error("--archive is for whole runs, and does not go with --states-only.")
        statuses = options["status"] or []
        several = [statuses] if isinstance(statuses, str) else statuses
        resumable = [status for status in several if status != COMPLETED]
        if resumable and not options["force"]:
            raise usage_error(
                f"Runs that are {' or '.join(resumable)} can be resumed, and need their states for "
                "that. Pass --force to delete them nevertheless."
            )
        return keep

    def _found(
        self,
        backend: StorageBackend,
        which: FinishedRunFilters,
        keep: int | None,
        options: dict[str, Any],
    ) -> list[Found]:
        runs: Counter[str] = Counter()
        states: Counter[str] = Counter()
        if keep is None:
            for run in self.with_progress(backend.runs.iter_finished(**which), None, options):
                runs[run.workflow_name] += 1
        else:
            older = _with_older_states(backend, which, keep)
            for run, count in self.with_progress(older, None, options):
                runs[run.workflow_name] += 1
                states[run.workflow_name] += count
        return [
            Found(name, count, None if keep is None else states[name])
            for name, count in sorted(runs.items())
        ]

    def _show_found(self, output: Output, found: Iterable[Found], *, states_only: bool) -> None:
        columns = [
            Column("workflow_name", "Workflow", lambda one: as_text(one.workflow_name), folds=True),
            Column("runs", "Runs", lambda one: as_count(one.runs), kind="number"),
        ]
        if states_only:
            columns.append(
                Column("states", "States", lambda one: as_count(one.states), kind="number")
            )
        output.rows(found, columns, RECORD, nothing="Nothing to delete.")

    def _write_records(self, output: Output, records: Iterable[Pruned]) -> None:
        """Write what there was and what was done for programs; people have been told."""
        if not output.is_table:
            output.rows(records, (), RECORD)

    def _delete_states(
        self,
        backend: StorageBackend,
        which: FinishedRunFilters,
        keep: int,
        total: int | None,
        options: dict[str, Any],
    ) -> None:
        with self.progress(total, options) as advance:
            for run, _ in _with_older_states(backend, which, keep):
                self._deleted += _delete_states_of(backend, run, keep)
                advance(1)

    def _archive_and_delete(
        self,
        backend: StorageBackend,
        which: FinishedRunFilters,
        total: int | None,
        options: dict[str, Any],
    ) -> None:
        if backend.in_transaction():
            raise CannotMoveError
        path = options["archive"]
        self._archive = f"{path} was not written."
        written, went_wrong = 0, set()
        for one in self.with_progress(archive_runs(backend, path, **which), total, options):
            if one.reason:
                went_wrong.add(one.run_id)
                self.complain(f"{one_line(one.run_id)}: {one_line(one.reason)}")
            else:
                written += 1
        self._written = written
        self._archive = f"{path} has all of them; go on with another --archive FILE."
        kept, lines_are_sound = 0, True
        for done in self.with_progress(delete_archived(backend, path), written, options):
            if isinstance(done, DamagedLine):
                lines_are_sound = False
                self.complain(f"{path}, line {done.number}: {one_line(done.reason)}")
            elif done.deleted:
                self._deleted += 1
            elif done.reason:
                kept += 1
                if done.run_id not in went_wrong:  # or else it is known already why
                    went_wrong.add(done.run_id)
                    self.complain(f"{one_line(done.run_id)}: {one_line(done.reason)}")
        self._went_wrong = bool(went_wrong) or not lines_are_sound
        self._archived = f"{counted(written, 'run')} written to {path}; {kept:,} kept.\n"


def _check_archive(path: Path) -> None:
    """Find out before anything is done whether an archive can be made.

    Raises:
        ExportFileError: if not.
    """
    if is_stream(path):
        raise ExportFileError(str(path), "it cannot be read back")
    if path.exists():
        raise ExportFileError(str(path), "it is there already")
    folder = path.resolve().parent
    if not folder.is_dir():
        raise ExportFileError(str(path), f"there is no folder {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ExportFileError(str(path), f"the folder {folder} cannot be written to")


def _which(
    backend: StorageBackend, options: dict[str, Any], *, states_only: bool
) -> FinishedRunFilters:
    selected = with_found_parent(backend, narrow_selection_of(options))
    before = moment(options["older_than"])
    statuses = selected["status"]
    if statuses is None:
        only_completed = states_only and not options["force"]
        statuses = [COMPLETED] if only_completed else sorted(TERMINAL_STATUSES)
    return {
        "before": before,
        "workflow_name": selected["workflow_name"],
        "statuses": statuses,
        "labels": selected["labels"],
        "parent_id": selected["parent_id"],
        "keep_last": whole_number(options["keep_last"]),
        "limit": limit_of(options),
    }


def _with_older_states(
    backend: StorageBackend, which: FinishedRunFilters, keep: int
) -> Iterator[tuple[WorkflowRun, int]]:
    """Yield runs that have more states than are to be kept, with how many more.

    The limit counts these alone, so that a run whose states are gone is not in the way the next time.
    """
    every = cast("FinishedRunFilters", {**which, "limit": None})
    found = (
        (run, sum(1 for _ in backend.states.iter_steps(run.id)) - keep)
        for run in backend.runs.iter_finished(**every)
    )
    return islice(((run, older) for run, older in found if older > 0), which.get("limit"))


def _delete_states_of(backend: StorageBackend, run: WorkflowRun, keep: int) -> int:
    now = backend.runs.get(run.id)
    if now is None or now.status != run.status:
        return 0  # deleted, or resumed, since it was read
    try:
        return backend.states.delete_states(run.id, keep_last=keep)
    except RunNotFoundError:
        return 0

"""``manage.py update_runs cancel|fail|label|unlabel``: runs ended or labelled by hand."""

from __future__ import annotations

from collections import deque
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from django.core.management.base import CommandError

from workflow_storage.exceptions import RunNotFoundError, StatusConflictError
from workflow_storage.management.arguments import (
    add_dry_run,
    add_selection,
    labels_of,
    selection_of,
)
from workflow_storage.management.base import (
    StorageCommand,
    add_no_input,
    found_known,
    selected,
    usage_error,
)
from workflow_storage.management.output import Record
from workflow_storage.management.progress import LongCommand
from workflow_storage.management.readable import known_runs
from workflow_storage.management.run_columns import known_columns, known_record
from workflow_storage.management.text import counted, one_line
from workflow_storage.status import RunStatus

if TYPE_CHECKING:
    from argparse import ArgumentParser
    from collections.abc import Iterator

    from workflow_storage.base import StorageBackend
    from workflow_storage.management.output import Output
    from workflow_storage.management.readable import Known

OPEN = (RunStatus.PENDING.value, RunStatus.RUNNING.value)
"""The statuses of runs that can be cancelled or failed."""

ACTIONS = {
    "cancel": "cancelled",
    "fail": "set to failed",
    "label": "labelled",
    "unlabel": "unlabelled",
}
SHOWN = 20
"""Runs that are shown before it is asked."""


class Done(NamedTuple):
    """What became of a run, or would."""

    run_id: str
    outcome: Literal["changed", "unchanged", "refused"]
    """unchanged: it is without the label that is to be removed; refused: see reason."""
    reason: str | None = None


RECORD = Record(Done._fields, lambda done: done._asdict())


class Command(LongCommand, StorageCommand):
    """Ends runs, or changes their labels."""

    help = (
        "Cancels or fails runs that are pending or running, or changes labels of any runs: of those "
        "that are named, or selected. Whoever works on a run that is ended notices at its next "
        "checkpoint. Asks first if there is more than one."
    )

    _changed = _unchanged = _refused = 0
    _action = ""

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add what to do, and with which runs."""
        super().add_arguments(parser)
        parser.add_argument("action", choices=list(ACTIONS), help="What to do.")
        parser.add_argument("run_ids", nargs="*", metavar="ID", help="Ids, or their beginnings.")
        add_selection(parser)
        parser.add_argument(
            "--message", metavar="TEXT", help="With cancel and fail: why, for the error of the run."
        )
        parser.add_argument(
            "--set",
            action="append",
            metavar="NAME=VALUE",
            help="With label: a label to set; may be given several times.",
        )
        parser.add_argument(
            "--remove",
            action="append",
            metavar="NAME",
            help="With unlabel: a label to remove; may be given several times.",
        )
        add_dry_run(parser, "Only list the runs; change nothing.")
        add_no_input(parser)

    def show(self, backend: StorageBackend, output: Output, options: dict[str, Any]) -> None:
        """Find the runs, ask, and change them."""
        action = options["action"]
        self._action = action
        change = _change_of(options)
        runs, count = _runs_of(backend, options)
        if options["dry_run"]:
            done = ((run, _would_be_done(run, change)) for run in runs)
            if output.is_table:
                changed = (run for run, one in done if self._count(one).outcome == "changed")
                output.rows(changed, known_columns(), known_record())
                self._say_changed(f"would be {ACTIONS[action]}", options)
            else:
                output.rows((self._count(one) for _, one in done), (), RECORD)
            self._fail_if_refused()
            return
        if count > 1 and options["interactive"]:
            runs = self._shown(output, runs, options)
            if not self.confirmed(f"{action.capitalize()} {counted(count, 'run')}?", options):
                if output.is_table:
                    self.say("Nothing was changed.", options)
                else:
                    output.rows((), (), RECORD)
                return
        changes = (
            self._count(self._done(backend, run, change))
            for run in self.with_progress(runs, count, options)
        )
        if output.is_table:
            deque(changes, maxlen=0)
            self._say_changed(ACTIONS[action], options)
        else:
            output.rows(changes, (), RECORD)
        self._fail_if_refused()

    def goes_on_unread(self, options: dict[str, Any]) -> bool:
        """Return True, unless nothing is changed."""
        return not options["dry_run"]

    def interruption(self) -> str:
        """Return what was done."""
        done = ACTIONS.get(self._action, "changed")
        return f"Interrupted after {counted(self._changed, 'run')} {done}."

    def _say_changed(self, done: str, options: dict[str, Any]) -> None:
        without = counted(self._unchanged, "run") + " without such a label"
        rest = f", {without}" if self._unchanged else ""
        self.say(f"{counted(self._changed, 'run')} {done}{rest}.", options)

    def _fail_if_refused(self) -> None:
        if self._refused:
            raise CommandError(f"{counted(self._refused, 'run')} could not be; see above.")

    def _shown(
        self, output: Output, runs: Iterator[Known], options: dict[str, Any]
    ) -> Iterator[Known]:
        """Show the first of some runs, and return all of them."""
        first = list(islice(runs, SHOWN))
        if output.is_table:
            output.rows(first, known_columns(), known_record())
        return chain(first, runs)

    def _done(self, backend: StorageBackend, known: Known, change: dict[str, Any]) -> Done:
        """Change a run, and return what became of it."""
        done, run = _would_be_done(known, change), known.run
        if done.outcome != "changed":
            return done
        try:
            if "status" in change:
                backend.runs.update_status(run.id, expected=OPEN, **change)
            else:
                backend.runs.update(run.id, **change)
        except StatusConflictError as exc:
            return _ended_already(exc.run_id, exc.status)
        except RunNotFoundError as exc:
            return Done(run.id, "refused", str(exc))
        return done

    def _count(self, done: Done) -> Done:
        self._changed += done.outcome == "changed"
        self._unchanged += done.outcome == "unchanged"
        if done.outcome == "refused":
            self._refused += 1
            self.complain(one_line(str(done.reason)))
        return done


def _would_be_done(known: Known, change: dict[str, Any]) -> Done:
    """Return what would become of a run, as it was read."""
    run, problem = known
    if problem is not None:
        return Done(run.id, "refused", f"Workflow run {run.id} is damaged: {problem}.")
    names = change.get("remove_labels")
    if names is not None and run.labels.keys().isdisjoint(names):
        return Done(run.id, "unchanged")
    if "status" in change and run.status not in OPEN:
        return _ended_already(run.id, run.status)
    return Done(run.id, "changed")


def _ended_already(run_id: str, status: str) -> Done:
    return Done(run_id, "refused", f"Workflow run {run_id} is {status} already.")


def _change_of(options: dict[str, Any]) -> dict[str, Any]:
    """Return what `update_status` or `update` takes.

    Raises:
        CommandError: for options that do not go with the action.
    """
    action = options["action"]
    labels, names = labels_of(options["set"]), options["remove"]
    goes_with = {
        "--message": (options["message"], {"cancel", "fail"}),
        "--set": (labels, {"label"}),
        "--remove": (names, {"unlabel"}),
    }
    for option, (value, actions) in goes_with.items():
        if value and action not in actions:
            raise usage_error(f"{option} goes with {' and '.join(sorted(actions))}, not {action}.")
    if action == "label":
        if not labels:
            raise usage_error("Say which label to set: --set NAME=VALUE.")
        return {"add_labels": labels}
    if action == "unlabel":
        if not names:
            raise usage_error("Say which label to remove: --remove NAME.")
        return {"remove_labels": [names] if isinstance(names, str) else list(names)}
    status = RunStatus.CANCELLED if action == "cancel" else RunStatus.FAILED
    done = "Cancelled" if action == "cancel" else "Set to failed"
    return {"status": status, "error_message": options["message"] or f"{done} by update_runs."}


def _runs_of(backend: StorageBackend, options: dict[str, Any]) -> tuple[Iterator[Known], int]:
    """Return the runs that are named or selected, and how many there are, about.

    Raises:
        CommandError: if runs are named and selected, or neither.
    """
    named = options["run_ids"] or []
    filters = selection_of(options)
    # An empty list selects nothing, however the caller came by it; never all runs.
    if bool(named) == any(filters.values()):
        raise usage_error(
            "Name runs by their ids, or else select them with --workflow and the like."
        )
    if named:
        if options["limit"] is not None or options["before"] is not None:
            raise usage_error("--limit and --before go with a selection, not with ids.")
        ids = [named] if isinstance(named, str) else named
        runs = {one.run.id: one for one in (found_known(backend, run_id) for run_id in ids)}
        return iter(runs.values()), len(runs)
    if options["action"] in {"cancel", "fail"} and filters["status"] is None:
        options = {**options, "status": OPEN}
    selection = selected(backend, options)
    return known_runs(backend, selection), selection.count(backend)

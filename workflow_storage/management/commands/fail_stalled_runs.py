"""``manage.py fail_stalled_runs --idle 15m``: runs whose process is gone, set to failed."""

from __future__ import annotations

import re
from argparse import ArgumentTypeError
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from workflow_storage.management.base import StorageCommand, as_json, run_as_dict
from workflow_storage.management.commands.list_runs import runs_table

if TYPE_CHECKING:
    from argparse import ArgumentParser

    from workflow_storage.base import StorageBackend

UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


class Command(StorageCommand):
    """Sets runs without a sign of life to failed."""

    help = (
        "Sets running runs that gave no sign of life (start, heartbeat, checkpoint) for longer "
        "than --idle to failed, so that they can be resumed."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add the time and the dry run."""
        super().add_arguments(parser)
        parser.add_argument(
            "--idle",
            type=duration,
            required=True,
            metavar="TIME",
            help="How long without a sign of life: a number with s, m, h or d, such as 15m.",
        )
        parser.add_argument(
            "--dry-run", action="store_true", help="Only list the runs; change nothing."
        )

    def show(self, backend: StorageBackend, options: dict[str, Any]) -> None:
        """Fail the runs, and list them."""
        idle = options["idle"]
        runs = backend.runs.list_stalled(idle)
        if not options["dry_run"]:
            failed = [run.id for run in runs if backend.runs.fail_if_stalled(run.id, idle)]
            runs = [run for run in map(backend.runs.get, failed) if run is not None]
        if options["format"] == "json":
            self.stdout.write(as_json([run_as_dict(run) for run in runs]))
            return
        if runs:
            self.print_table(runs_table(runs), no_color=options["no_color"])
        done = "would be set to failed" if options["dry_run"] else "set to failed"
        self.stdout.write(f"{len(runs)} {'run' if len(runs) == 1 else 'runs'} {done}.")


def duration(text: str) -> timedelta:
    """Read a time such as ``15m``.

    Raises:
        ArgumentTypeError: if it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text.strip())
    if match is None:
        raise ArgumentTypeError(f"{text!r} is no time. Write a number with s, m, h or d: 15m.")
    try:
        return timedelta(**{UNITS[match[2]]: float(match[1])})
    except OverflowError as exc:
        raise ArgumentTypeError(f"{text!r} is too long.") from exc

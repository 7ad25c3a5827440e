"""``manage.py record_command NAME -- command args…``: a management command as a recorded run."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from django.core.management.base import CommandError

from workflow_storage.exceptions import StorageError
from workflow_storage.factory import create_storage_backend
from workflow_storage.management.arguments import add_backend, label, labels_of
from workflow_storage.management.base import StoreCommand
from workflow_storage.management.child import Ended, run_child
from workflow_storage.recorder import record_run

if TYPE_CHECKING:
    from argparse import ArgumentParser
    from collections.abc import Sequence

    from workflow_storage.base import StorageBackend

HEARTBEAT = 30.0
"""Seconds between signs of life, so that one that was killed is found by fail_stalled_runs."""


class Command(StoreCommand):
    """Records a management command."""

    help = (
        "Runs a management command as a recorded run, for cron: with the last of its output, its "
        "exit code, its duration, and the signal that ended it. Exits as the command does."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add the name, the command and the labels."""
        parse = parser.parse_known_args

        def parse_before_dashes(args: Sequence[str] | None = None, namespace: Any = None) -> Any:
            before, first, rest = _parted(sys.argv[1:] if args is None else args)
            options, unknown = parse([*before, *first], namespace)
            options.command += rest
            return options, unknown

        # Of its own accord argparse takes any further -- for one of ours.
        parser.parse_known_args = parse_before_dashes  # type: ignore[method-assign,assignment]
        parser.add_argument("name", metavar="NAME", help="The name of the workflow.")
        parser.add_argument(
            "command",
            nargs="+",
            metavar="COMMAND",
            help="The command and its arguments, behind --.",
        )
        add_backend(parser)
        parser.add_argument(
            "--label",
            action="append",
            type=label,
            metavar="NAME=VALUE",
            help="A label of the run; may be given several times.",
        )

    def carry_out(self, options: dict[str, Any]) -> None:
        """Run the command and record it."""
        command = options["command"]
        arguments = [command] if isinstance(command, str) else [str(one) for one in command]
        backend = create_storage_backend(options["backend"])
        ended: Ended | None = None
        run_id = ""
        try:
            with record_run(
                options["name"],
                inputs={"command": arguments},
                labels=labels_of(options["label"]),
                backend=backend,
                heartbeat=HEARTBEAT,
            ) as run:
                run_id = run.run_id
                ended = run_child(
                    arguments,
                    _writer(self.stdout),
                    _writer(self.stderr),
                    python_path=options["pythonpath"],
                )
                run.outputs = _outputs(ended)
                if ended.exit_code:
                    # What the run says of it is written below, without a traceback of this file.
                    raise KeyboardInterrupt if ended.was_told else CommandError(_reason(ended))
        except (CommandError, KeyboardInterrupt):
            if ended is None:
                raise
        except StorageError as exc:
            if ended is None:
                raise
            self.stderr.write(f"How it ended was not recorded: {exc}")
        if ended is not None and ended.exit_code:
            self._note(backend, run_id, ended)
            raise CommandError(
                f"{arguments[0]}: {_reason(ended)} (recorded as {run_id}).",
                returncode=ended.exit_code,
            )

    def _note(self, backend: StorageBackend, run_id: str, ended: Ended) -> None:
        message = f"{_reason(ended)}\n\n{ended.output}"
        with suppress(StorageError):
            backend.runs.update(run_id, error_message=message, outputs=_outputs(ended))


def _parted(arguments: Sequence[str]) -> tuple[Sequence[str], Sequence[str], Sequence[str]]:
    """Return what is before the first ``--``, that and the word behind it, and what is not to be parsed."""
    if "--" not in arguments:
        return arguments, (), ()
    dashes = arguments.index("--")
    return arguments[:dashes], arguments[dashes : dashes + 2], arguments[dashes + 2 :]


def _outputs(ended: Ended) -> dict[str, Any]:
    return {
        "exit_code": ended.exit_code,
        "signal": ended.signal or ended.was_told,
        "output": ended.output,
        "output_characters": ended.output_characters,
    }


def _reason(ended: Ended) -> str:
    if ended.signal:
        return f"killed by {ended.signal}"
    told = f" after {ended.was_told}" if ended.was_told else ""
    return f"exit code {ended.exit_code}{told}"


def _writer(stream: Any) -> Any:
    def write(text: str) -> None:
        # Nobody may read it any more; the command goes on nevertheless.
        with suppress(BrokenPipeError):
            stream.write(text, ending="", style_func=str)
            stream.flush()

    return write

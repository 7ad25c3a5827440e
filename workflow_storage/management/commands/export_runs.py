"""``manage.py export_runs FILE``: runs into a file of JSON Lines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from workflow_storage.management.arguments import add_backend, add_selection
from workflow_storage.management.base import existing_backend, selected, usage_error
from workflow_storage.management.progress import TransferCommand
from workflow_storage.transfer import export_runs, is_stream

if TYPE_CHECKING:
    from argparse import ArgumentParser

    from workflow_storage.management.output import Output


class Command(TransferCommand):
    """Exports runs."""

    help = (
        "Writes workflow runs to a file of JSON Lines, each with all its states. A file that is "
        "there already is replaced once the new one is complete."
    )
    when_interrupted = "The file was not written."

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add the file, the store and the selection."""
        parser.add_argument(
            "file",
            metavar="FILE",
            help="runs.jsonl; compressed as runs.jsonl.gz or runs.jsonl.zst.",
        )
        super().add_arguments(parser)
        add_backend(parser)
        add_selection(parser)

    def transfer(self, output: Output, options: dict[str, Any]) -> None:
        """Write the file."""
        if is_stream(Path(options["file"])):
            if not output.is_table:
                raise usage_error(
                    "--format is for what is said of each run, and goes to standard output, where "
                    "the runs themselves would go. Leave it out, or name a file."
                )
            self.keep_from_stdout()
        source = existing_backend(options["backend"])
        selection = selected(source, options)
        exported = export_runs(
            source,
            options["file"],
            before=selection.before,
            limit=selection.limit,
            **selection.filters,
        )
        self.report(exported, selection.count(source), "written", output, options)

"""``manage.py export_runs FILE``: runs into a file of JSON Lines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from workflow_storage.management.arguments import add_backend, add_selection, selection_of
from workflow_storage.management.base import existing_backend, with_found_parent
from workflow_storage.management.progress import TransferCommand
from workflow_storage.transfer import export_runs, is_stream

if TYPE_CHECKING:
    from argparse import ArgumentParser


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
        add_backend(parser)
        add_selection(parser)

    def carry_out(self, options: dict[str, Any]) -> None:
        """Write the file."""
        if is_stream(Path(options["file"])):
            self.keep_from_stdout()
        source = existing_backend(options["backend"])
        filters = with_found_parent(source, selection_of(options))
        total = source.runs.count_runs(**filters)
        self.report(export_runs(source, options["file"], **filters), total, "written", options)

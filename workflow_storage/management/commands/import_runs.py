"""``manage.py import_runs FILE``: runs from a file of JSON Lines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from workflow_storage.factory import create_storage_backend
from workflow_storage.management.arguments import add_backend, count
from workflow_storage.management.base import command_errors
from workflow_storage.management.progress import TransferCommand
from workflow_storage.transfer import MAX_LINE, import_runs

if TYPE_CHECKING:
    from argparse import ArgumentParser


class Command(TransferCommand):
    """Imports runs."""

    help = (
        "Stores the workflow runs of a file that export_runs wrote. What is there already is not "
        "stored again. A damaged line is reported, and the rest goes in."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add the file and the store."""
        parser.add_argument("file", metavar="FILE", help="A file that export_runs wrote.")
        add_backend(parser)
        parser.add_argument(
            "--max-line",
            type=count,
            default=MAX_LINE // 2**20,
            metavar="MB",
            help="The longest line to read, and the largest state. Default: %(default)s.",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        """Read the file."""
        with command_errors():
            target = create_storage_backend(options["backend"])
            max_line = count(options["max_line"]) * 2**20
            imported = import_runs(options["file"], target, max_line=max_line)
            self.report(imported, None, "imported", options)

"""``manage.py copy_runs --from X --to Y``: runs into another store."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from workflow_storage.factory import create_storage_backend
from workflow_storage.management.arguments import STORE, add_selection, selection_of
from workflow_storage.management.base import existing_backend
from workflow_storage.management.progress import TransferCommand
from workflow_storage.transfer import copy_runs

if TYPE_CHECKING:
    from argparse import ArgumentParser


class Command(TransferCommand):
    """Copies runs, or moves them."""

    help = (
        "Copies workflow runs with all their states from one store to another. What is there "
        "already is not copied again, so it can be interrupted, and repeated."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add the stores, the filters and the moving."""
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

    def carry_out(self, options: dict[str, Any]) -> None:
        """Copy the runs."""
        source = existing_backend(options["source"])
        target = create_storage_backend(options["target"])
        filters = selection_of(options)
        total = source.runs.count_runs(**filters)
        copied = copy_runs(source, target, move=options["move"], **filters)
        self.report(copied, total, "copied", options)

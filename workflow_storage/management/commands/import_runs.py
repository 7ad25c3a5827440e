"""``manage.py import_runs FILE``: runs from a file of JSON Lines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django.core.management.base import CommandError

from workflow_storage.factory import create_storage_backend
from workflow_storage.management.arguments import add_backend, count
from workflow_storage.management.progress import TransferCommand
from workflow_storage.transfer import MAX_LINE, DamagedLine, import_runs

if TYPE_CHECKING:
    from argparse import ArgumentParser
    from collections.abc import Iterable, Iterator

    from workflow_storage.management.output import Output
    from workflow_storage.transfer import Transferred

ENOUGH = 100
"""Damaged lines at the beginning of a file after which it is no export."""


class Command(TransferCommand):
    """Imports runs."""

    help = (
        "Stores the workflow runs of a file that export_runs wrote. What is there already is not "
        "stored again. A damaged line is reported, and the rest goes in."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add the file and the store."""
        parser.add_argument("file", metavar="FILE", help="A file that export_runs wrote.")
        super().add_arguments(parser)
        add_backend(parser)
        parser.add_argument(
            "--max-line",
            type=count,
            default=MAX_LINE // 2**20,
            metavar="MB",
            help="The longest line to read, and the largest state. Default: %(default)s.",
        )

    def transfer(self, output: Output, options: dict[str, Any]) -> None:
        """Read the file."""
        target = create_storage_backend(options["backend"])
        max_line = count(options["max_line"]) * 2**20
        imported = import_runs(options["file"], target, max_line=max_line)
        results = _of_an_export(imported, options["file"])
        self.report(results, None, "imported", output, options)


def _of_an_export(
    results: Iterable[Transferred | DamagedLine], file: object
) -> Iterator[Transferred | DamagedLine]:
    """Yield the results of a file in which there is a run, or nothing at all.

    Raises:
        CommandError: if no line is one of a run, instead of one complaint for each of them.
    """
    held: list[DamagedLine] = []
    is_export = False
    for result in results:
        is_export = is_export or not isinstance(result, DamagedLine)
        if is_export:
            yield from held
            held.clear()
            yield result
        elif isinstance(result, DamagedLine):
            held.append(result)
            if len(held) == ENOUGH:
                break
    if held:
        raise CommandError(
            f"{file} is no export of runs: in line {held[0].number}, {held[0].reason}. "
            "Name a file that export_runs wrote."
        )

"""What a command that shows runs begins with: its store opened, and errors the user can mend."""

from __future__ import annotations

from argparse import ArgumentTypeError
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import BaseCommand, CommandError
from pydantic import ValidationError

from workflow_storage.exceptions import StorageError
from workflow_storage.factory import create_storage_backend, missing_file
from workflow_storage.management.arguments import add_backend

if TYPE_CHECKING:
    from argparse import ArgumentParser
    from collections.abc import Iterator

    from workflow_storage.base import StorageBackend


class StorageCommand(BaseCommand):
    """A command that reads runs from any backend and shows them as a table or as JSON."""

    # The backend need not be a database of this project.
    requires_system_checks: Any = ()

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add ``--backend`` and ``--format``."""
        add_backend(parser)
        parser.add_argument(
            "--format", choices=["table", "json"], default="table", help="Default: table."
        )

    def handle(self, *args: Any, **options: Any) -> None:
        """Open the backend and show what the command is for."""
        with command_errors():
            self.show(existing_backend(options["backend"]), options)

    def show(self, backend: StorageBackend, options: dict[str, Any]) -> None:
        """Show what the command is for."""
        raise NotImplementedError


@contextmanager
def command_errors() -> Iterator[None]:
    """Show what the user can mend as an error of the command, without a traceback."""
    try:
        yield
    except (
        StorageError,
        ImproperlyConfigured,
        ValidationError,
        ArgumentTypeError,
        TypeError,
        ValueError,
        OSError,
    ) as exc:
        raise CommandError(str(exc)) from exc


def existing_backend(config: str | None) -> StorageBackend:
    """Open a store to read from it; a SQLite file that is not there is not made.

    Raises:
        CommandError: if there is no such file.
    """
    path = missing_file(config)
    if path is not None:
        raise CommandError(f"There is no file {path}. Check the path.")
    return create_storage_backend(config)

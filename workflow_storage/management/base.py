"""What the commands share: which backend, which format, errors that the user can mend."""

from __future__ import annotations

import json
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any

from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import BaseCommand, CommandError
from django.utils import timezone
from pydantic import ValidationError
from rich.console import Console

from workflow_storage.exceptions import StorageError
from workflow_storage.factory import create_storage_backend, missing_file
from workflow_storage.status import RunStatus
from workflow_storage.validation import RUN_FIELDS

if TYPE_CHECKING:
    from argparse import ArgumentParser
    from collections.abc import Iterator

    from rich.console import RenderableType

    from workflow_storage.base import StorageBackend
    from workflow_storage.models import WorkflowRun

STORE = "NAME|URL|sqlite"
"""How the help shows what names a store."""

PIPE_WIDTH = 200
"""Columns of a table that is written to a file or another command."""


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

    def print_table(self, *renderables: RenderableType, no_color: bool = False) -> None:
        """Write tables and text, in colour and as wide as the terminal if there is one."""
        is_terminal = self.stdout.isatty()
        console = Console(
            force_terminal=is_terminal,
            no_color=no_color or None,
            width=None if is_terminal else PIPE_WIDTH,
        )
        with console.capture() as captured:
            for renderable in renderables:
                console.print(renderable)
        encoding = getattr(self.stdout, "encoding", None) or "utf-8"
        text = captured.get().encode(encoding, "backslashreplace").decode(encoding)
        lines = text.splitlines()
        self.stdout.write("\n".join(line.rstrip() for line in lines))


def add_backend(parser: ArgumentParser) -> None:
    """Add ``--backend``."""
    parser.add_argument(
        "--backend",
        metavar=STORE,
        help="Which store: a name in DATABASES or a URL. Default: the project's own.",
    )


def add_run_filters(parser: ArgumentParser) -> None:
    """Add ``--workflow`` and ``--status``."""
    parser.add_argument("--workflow", metavar="NAME", help="Only runs of this workflow.")
    parser.add_argument(
        "--status",
        action="append",
        choices=RunStatus.values,
        help="Only runs in this status; may be given several times.",
    )


@contextmanager
def command_errors() -> Iterator[None]:
    """Show what the user can mend as an error of the command, without a traceback."""
    try:
        yield
    except (StorageError, ImproperlyConfigured, ValidationError, ValueError, OSError) as exc:
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


def run_as_dict(run: WorkflowRun) -> dict[str, Any]:
    """Give a run's fields, times as ISO 8601 text, as the commands write them."""
    fields = {name: getattr(run, name) for name in RUN_FIELDS}
    return {
        name: value.isoformat() if isinstance(value, datetime) else value
        for name, value in fields.items()
    }


def as_json(value: Any) -> str:
    """Write a value as JSON for other programs, escaped so that any terminal takes it."""
    return json.dumps(value, indent=2)


def as_text(value: Any, empty: str = "") -> str:
    """Show a field in a table."""
    if value is None:
        return empty
    if isinstance(value, datetime):
        local = timezone.localtime(value) if timezone.is_aware(value) else value
        return local.strftime("%Y-%m-%d %H:%M:%S")
    return printable(str(value))


def printable(text: str) -> str:
    """Escape what would control the terminal rather than be shown, or that it cannot show."""
    return "".join(
        character if character.isprintable() or character in "\n\t" else ascii(character)[1:-1]
        for character in text
    )

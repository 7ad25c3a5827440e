"""What every command begins with: its store, its output, its exit codes, errors in one line."""

from __future__ import annotations

import sys
from argparse import ArgumentTypeError
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import BaseCommand, CommandError
from pydantic import ValidationError

from workflow_storage.base import Damage
from workflow_storage.exceptions import InvalidStatusError, RunNotFoundError, StorageError
from workflow_storage.factory import create_storage_backend, missing_file
from workflow_storage.management.arguments import add_backend, limit_of, selection_of
from workflow_storage.management.output import Output, add_format, leave_unread, unbreakable
from workflow_storage.management.readable import Known, known, unreadable_error
from workflow_storage.management.selection import Selection
from workflow_storage.management.text import one_line, writable

if TYPE_CHECKING:
    from argparse import ArgumentParser
    from collections.abc import Iterator

    from workflow_storage.base import RunFilters, StorageBackend
    from workflow_storage.config import StorageConfig
    from workflow_storage.models import WorkflowRun

FAILED = 1
"""The exit code of an error, and of a check that found something."""

USAGE = 2
"""The exit code of arguments that do not go together, as that of argparse."""

INTERRUPTED = 130
"""The exit code of what SIGINT ended, as shells have it."""

CANDIDATES = 10
"""Runs that are named if the beginning of an id is that of several."""


class StoreCommand(BaseCommand):
    """A command on the runs of any store.

    A subclass parses in `add_arguments`, and does what it is for in `carry_out`.
    """

    # The store need not be a database of this project.
    requires_system_checks: Any = ()

    def execute(self, *args: Any, **options: Any) -> str | None:
        """Carry the command out, and end with the exit code that fits."""
        try:
            with command_errors():
                result = super().execute(*args, **options)
                self.stdout.flush()
            return result
        except KeyboardInterrupt:
            raise CommandError(self.interruption(), returncode=INTERRUPTED) from None
        except BrokenPipeError:
            if not self._called_from_command_line:  # type: ignore[attr-defined]
                raise
            leave_unread(self.stdout)  # whoever read it has enough
            sys.exit(self.code_of_broken_pipe())

    def handle(self, *args: Any, **options: Any) -> None:
        """Do what the command is for."""
        of_process: bool = self._called_from_command_line  # type: ignore[attr-defined]
        # A complaint that nobody reads is no reason to stop.
        self.stderr = unbreakable(self.stderr, is_of_process=of_process)
        if self.goes_on_unread(options):
            self.stdout = unbreakable(self.stdout, is_of_process=of_process)
        self.carry_out(options)

    def carry_out(self, options: dict[str, Any]) -> None:
        """Do what the command is for."""
        raise NotImplementedError

    def interruption(self) -> str:
        """Return what is said after Ctrl-C: what was done, and how to go on."""
        return "Interrupted."

    def goes_on_unread(self, options: dict[str, Any]) -> bool:
        """Return whether it goes on without output if nobody reads any further.

        So does what changes something, which is not to be left half done by ``| head``.
        """
        return False

    def code_of_broken_pipe(self) -> int:
        """Return the exit code if nobody reads any further, as ``head`` does."""
        return 0

    def say(self, text: str, options: dict[str, Any]) -> None:
        """Write a line of what was done, unless ``--verbosity`` is 0."""
        if options["verbosity"]:
            encoding = getattr(self.stdout, "encoding", None)
            self.stdout.write(writable(text, encoding), style_func=str)

    def confirmed(self, question: str, options: dict[str, Any]) -> bool:
        """Ask whether to go on, unless ``--no-input`` was given.

        Raises:
            CommandError: if there is nobody to ask.
        """
        if not options["interactive"]:
            return True
        if not sys.stdin or not sys.stdin.isatty():
            raise CommandError("There is no terminal to ask on. Pass --no-input to go on.")
        self.stderr.write(f"{question} [y/N] ", ending="", style_func=str)
        self.stderr.flush()
        return sys.stdin.readline().strip().lower() in {"y", "yes"}


class StorageCommand(StoreCommand):
    """A command that reads a store, and shows what it found in the format that was asked for."""

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add ``--backend`` and ``--format``."""
        add_backend(parser)
        add_format(parser)

    def carry_out(self, options: dict[str, Any]) -> None:
        """Open the store and the output, and show what the command is for."""
        output = Output(self.stdout, options)
        self.show(existing_backend(options["backend"]), output, options)

    def show(self, backend: StorageBackend, output: Output, options: dict[str, Any]) -> None:
        """Show what the command is for."""
        raise NotImplementedError


def add_no_input(parser: ArgumentParser) -> None:
    """Add ``--no-input``."""
    parser.add_argument(
        "--no-input",
        "--noinput",
        action="store_false",
        dest="interactive",
        help="Do not ask for anything.",
    )


@contextmanager
def command_errors() -> Iterator[None]:
    """Show what the user can mend as an error of the command, in one line without a traceback."""
    try:
        yield
    except BrokenPipeError:
        raise
    except CommandError as exc:
        raise _in_one_line(exc, exc.returncode) from exc.__cause__
    except (ArgumentTypeError, InvalidStatusError) as exc:
        raise _in_one_line(exc, USAGE) from exc
    except (
        StorageError,
        ImproperlyConfigured,
        ValidationError,
        TypeError,
        ValueError,
        OSError,
    ) as exc:
        raise _in_one_line(exc, FAILED) from exc


def _in_one_line(exc: Exception, returncode: int) -> CommandError:
    lines = (line.strip() for line in str(exc).splitlines())
    return CommandError(one_line(" ".join(filter(None, lines))), returncode=returncode)


def usage_error(message: str) -> CommandError:
    """Return the error of arguments that do not go together."""
    return CommandError(message, returncode=USAGE)


def existing_backend(config: StorageConfig | str | None) -> StorageBackend:
    """Open a store to read from it; a SQLite file that is not there is not made.

    Raises:
        CommandError: if there is no such file.
    """
    path = missing_file(config)
    if path is not None:
        raise CommandError(f"There is no file {path}. Check the path.")
    return create_storage_backend(config)


def found_run(backend: StorageBackend, given: str) -> WorkflowRun:
    """Return the run with an id, or whose id alone begins so.

    Raises:
        RunNotFoundError: if there is none.
        CommandError: if there are several, which are named; or if it cannot be read.
    """
    found = _found(backend, given)
    if isinstance(found, Damage):
        raise unreadable_error([known(backend, found)])
    return found


def found_known(backend: StorageBackend, given: str) -> Known:
    """Return the same, with what is known of it if it cannot be read as a whole."""
    return known(backend, _found(backend, given))


def _found(backend: StorageBackend, given: str) -> WorkflowRun | Damage:
    run = backend.read_run(given)
    if run is not None:
        return run
    ids = backend.runs.list_ids(given, limit=CANDIDATES + 1) if given else []
    if len(ids) > 1:
        number = str(len(ids)) if len(ids) <= CANDIDATES else f"more than {CANDIDATES}"
        named = ", ".join(ids[:CANDIDATES]) + (", …" if len(ids) > CANDIDATES else "")
        raise CommandError(
            f"{given!r} is the beginning of {number} ids: {named}. Write more of the id."
        )
    run = backend.read_run(ids[0]) if ids else None
    if run is None:
        raise RunNotFoundError(given)
    return run


def with_found_parent(backend: StorageBackend, filters: RunFilters) -> RunFilters:
    """Return filters with the id of the parent, where they have the beginning of it.

    A parent need not be stored here itself.

    Raises:
        CommandError: if several runs begin so, which are named.
    """
    parent = filters.get("parent_id")
    if parent is None or backend.runs.list_runs(parent_id=parent, limit=1):
        return filters
    try:
        return {**filters, "parent_id": found_run(backend, parent).id}
    except RunNotFoundError:
        return filters


def selected(
    backend: StorageBackend, options: dict[str, Any], *, default_limit: int | None = None
) -> Selection:
    """Return the runs that the arguments of `add_selection` mean, now where they are ages.

    Raises:
        RunNotFoundError: if there is no run to begin after.
        CommandError: if the id of a run is the beginning of several.
    """
    before = options["before"]
    return Selection(
        with_found_parent(backend, selection_of(options)),
        None if before is None else _found_place(backend, before),
        limit_of(options) or default_limit,
    )


def _found_place(backend: StorageBackend, given: str) -> WorkflowRun:
    """Return a run of which at least the start can be read."""
    found = found_known(backend, given)
    if found.run.started_at is None:
        raise unreadable_error([found])
    return found.run

"""``manage.py demo [FILE]``: a real workflow on a real document, once failing and resumed."""

import secrets
import sys
import tempfile
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from django.conf import settings
from django.contrib.auth import get_user_model
from django.core.management import CommandError, call_command
from django.db import connections
from rich.text import Text

from testproject import workflows
from workflow_storage import StorageBackend, create_storage_backend
from workflow_storage.management.base import StorageCommand
from workflow_storage.management.tables import runs_table, write_tables

USER = "demo"


class Command(StorageCommand):
    help = "Digests a document in a workflow, fails on a damaged copy of it, and resumes that run."
    # The tables come with the command.
    requires_migrations_checks = False

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument(
            "file",
            nargs="?",
            type=Path,
            default=settings.BASE_DIR / "README.md",
            help="A text document. Default: the project's README.",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        document = self._document(options["file"])
        call_command("migrate", verbosity=0)
        backend = create_storage_backend()
        self.stdout.write(f"1. {document.name}, from the first node to the last")
        self._show_outputs(backend, workflows.start(backend, document))
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / document.name
            failed_id = self._fail(backend, document, copy)
            self.stdout.write("3. The copy is repaired, and the run resumed")
            copy.write_bytes(document.read_bytes())
            first = len(backend.states.get_state_history(failed_id))
            workflows.resume(backend, failed_id, copy)
        history = backend.states.get_state_history(failed_id)
        self.stdout.write(
            f"   went on after step {first - 1} and completed at step {history[-1]['step']}\n"
        )
        labels = {"document": document.name}
        (summary,) = backend.runs.summarize(by=(), labels=labels)
        self.stdout.write(
            f"4. All runs with the label document={document.name}: {summary.runs}, of which "
            f"{summary.by_status.get('completed', 0)} completed, half of them within "
            f"{summary.p50_seconds or 0:.2f} seconds"
        )
        runs = backend.runs.list_runs(workflow_name=workflows.WORKFLOW_NAME, limit=10)
        write_tables(self.stdout, Text(), runs_table(runs), Text(), no_color=options["no_color"])
        self._show_where(failed_id)

    def _document(self, path: Path) -> Path:
        try:
            content = path.read_bytes()
        except OSError as exc:
            raise CommandError(f"Cannot read {path}: {exc.strerror}. Name another file.") from exc
        try:
            text = content.decode()
        except UnicodeDecodeError as exc:
            raise CommandError(f"{path} is not UTF-8 text. Name a text document.") from exc
        if len(text.split()) < 3:
            raise CommandError(f"{path} has no text to speak of. Name a longer document.")
        return path.resolve()

    def _fail(self, backend: StorageBackend, document: Path, copy: Path) -> str:
        """Run the workflow on a copy with a byte in its middle that is no UTF-8."""
        content = bytearray(document.read_bytes())
        content[len(content) // 2] = 0xFF
        copy.write_bytes(content)
        self.stdout.write("2. A damaged copy of it, which a node in the middle cannot read")
        try:
            workflows.start(backend, copy)
        except UnicodeDecodeError as exc:
            failed = backend.runs.list_runs(
                workflow_name=workflows.WORKFLOW_NAME, status="failed", limit=1
            )[0]
            latest = backend.states.get_latest_checkpoint(failed.id)
            assert latest is not None
            self.stdout.write(
                f"   failed in {failed.current_node}, after {latest['node_id']} "
                f"(step {latest['step']}): {exc}"
            )
            return failed.id
        raise CommandError("The damaged copy was read without an error.")

    def _show_outputs(self, backend: StorageBackend, run_id: str) -> None:
        run = backend.runs.get(run_id)
        assert run is not None
        outputs = run.outputs
        self.stdout.write(
            f"   {outputs['sections']} sections, {outputs['words']:,} words, "
            f"keywords: {', '.join(outputs['keywords'])}"
        )

    def _show_where(self, run_id: str) -> None:
        database = connections["default"]
        manage = f"{_python()} manage.py"
        self.stdout.write(f"The data is in {database.vendor}: {database.settings_dict['NAME']}")
        self.stdout.write(f"Look at a run:       {manage} show_run {run_id}")
        self.stdout.write(
            f"Look at all of them: {manage} runserver, then http://127.0.0.1:8000/admin/"
        )
        users = get_user_model().objects
        if users.filter(username=USER).exists():
            self.stdout.write(
                f"Log in as {USER} with the password printed when it was made, "
                f"or set another: {manage} changepassword {USER}"
            )
        else:
            password = secrets.token_urlsafe(9)
            users.create_superuser(USER, password=password)  # type: ignore[attr-defined]
            self.stdout.write(f"Log in as {USER} with the password {password} (shown only now)")


def _python() -> str:
    """Return how to call this Python from this folder."""
    python = Path(sys.executable)
    return str(python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else python)

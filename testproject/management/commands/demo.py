"""``manage.py demo [FILE]``: a real workflow on a real document, once failing and resumed.

With ``--many N``: many plausible runs, so that the pages of the admin have something to show.
"""

from __future__ import annotations

import secrets
import sys
from collections import Counter
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from django.conf import settings
from django.contrib.auth import get_user_model
from django.core.management import CommandError, call_command
from django.db import DEFAULT_DB_ALIAS, connections, transaction
from django.utils import timezone

from testproject import many, workflows
from workflow_storage import StorageBackend, create_storage_backend
from workflow_storage.config import project_databases
from workflow_storage.exceptions import RunAlreadyExistsError
from workflow_storage.management.arguments import add_backend, count
from workflow_storage.management.base import StoreCommand
from workflow_storage.management.output import Output
from workflow_storage.management.run_columns import run_columns, run_record

if TYPE_CHECKING:
    from argparse import ArgumentParser
    from collections.abc import Iterator

USER = "demo"
BATCH = 500
"""Runs that are stored in one transaction."""
SAID_EVERY = 10_000


class Command(StoreCommand):
    help = (
        "Digests a document in a workflow, fails on a damaged copy of it, and resumes that run. "
        "With --many, stores many plausible runs instead."
    )
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
        parser.add_argument(
            "--many",
            type=count,
            metavar="N",
            help="Store so many made-up runs of the last 30 days, for the admin to show.",
        )
        parser.add_argument(
            "--seed",
            type=int,
            default=many.SEED,
            help=f"With --many: decides about all that is left to chance. Default: {many.SEED}.",
        )
        parser.add_argument(
            "--delete", action="store_true", help="Delete all runs that --many has stored."
        )
        add_backend(parser)

    def carry_out(self, options: dict[str, Any]) -> None:
        # What is passed to call_command() by name has not been read yet.
        wanted = None if options["many"] is None else count(options["many"])
        is_work = wanted is None and not options["delete"]
        document = self._document(options["file"]) if is_work else None
        backend = self._opened(options["backend"])
        if options["delete"]:
            self._delete_many(backend)
        if wanted is not None:
            self._store_many(backend, wanted, options)
        if document is not None:
            self._work(backend, document, options)

    def _opened(self, store: str | None) -> StorageBackend:
        backend = create_storage_backend(store)
        if backend.alias in project_databases():
            call_command("migrate", database=backend.alias, verbosity=0)
        return backend

    def _work(self, backend: StorageBackend, document: Path, options: dict[str, Any]) -> None:
        self.stdout.write(f"1. {document.name}, from the first node to the last")
        self._show_outputs(backend, workflows.start(backend, document))
        self.stdout.write("2. A damaged copy of it, which a node in the middle cannot read")
        resumed_id = self._fail(backend, document)
        self.stdout.write("3. The copy is repaired, and the run resumed")
        first = len(list(backend.states.iter_steps(resumed_id)))
        workflows.resume(backend, resumed_id, document)
        last = list(backend.states.iter_steps(resumed_id))[-1]["step"]
        self.stdout.write(f"   went on after step {first - 1} and completed at step {last}")
        self.stdout.write("4. Another damaged copy, which nobody repairs: its run stays failed")
        failed_id = self._fail(backend, document)
        labels = {"document": document.name}
        (summary,) = backend.runs.summarize(by=(), labels=labels)
        self.stdout.write(
            f"5. All runs with the label document={document.name}: {summary.runs}, of which "
            f"{summary.by_status.get('completed', 0)} completed, half of them within "
            f"{summary.p50_seconds or 0:.2f} seconds"
        )
        runs = backend.runs.list_runs(workflow_name=workflows.WORKFLOW_NAME, limit=10)
        output = Output(self.stdout, options)
        output.line()
        output.rows(runs, run_columns(), run_record())
        output.line()
        self._show_where(
            backend,
            {
                "Look at a run": f"show_run {resumed_id}",
                "At the failed one": f"show_run {failed_id}",
            },
            options,
        )

    def _store_many(self, backend: StorageBackend, wanted: int, options: dict[str, Any]) -> None:
        runs = many.many_runs(wanted, seed=options["seed"], now=timezone.now())
        statuses: Counter[str] = Counter()
        states = 0
        try:
            while batch := self._stored(backend, islice(runs, BATCH)):
                statuses.update(one.run.status for one in batch)
                states += sum(len(one.checkpoints) for one in batch)
                stored = statuses.total()
                if stored % SAID_EVERY == 0 and stored < wanted and options["verbosity"]:
                    self.stdout.write(f"{stored:,} of {wanted:,} runs are stored")
        except RunAlreadyExistsError as exc:
            raise CommandError(
                f"Runs of --seed {options['seed']} are there already. Delete them with "
                f"{_manage()} demo --delete, or choose another --seed."
            ) from exc
        counted = ", ".join(f"{number:,} {status}" for status, number in statuses.most_common())
        self.stdout.write(
            f"Stored {wanted:,} runs of the last {many.DAYS} days ({counted}) with {states:,} states."
        )
        self._show_where(backend, {"Delete them again": "demo --delete"}, options)

    def _stored(self, backend: StorageBackend, runs: Iterator[many.ManyRun]) -> list[many.ManyRun]:
        """Store some runs, on a database in one transaction."""
        batch = list(runs)
        with transaction.atomic(using=backend.alias) if backend.alias else nullcontext():
            for run, attempts, checkpoints in batch:
                backend.runs.put(run, attempts=attempts)
                if checkpoints:
                    backend.states.writer(run.id).append(checkpoints)
        return batch

    def _delete_many(self, backend: StorageBackend) -> None:
        deleted = backend.runs.delete_finished(before=timezone.now(), labels=many.LABEL)
        for run in backend.runs.iter_runs(labels=many.LABEL):
            backend.runs.delete(run.id)
            deleted += 1
        self.stdout.write(f"Deleted {deleted:,} runs with the label demo=many.")

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

    def _fail(self, backend: StorageBackend, document: Path) -> str:
        """Run the workflow on a copy with a byte in its middle that is no UTF-8."""
        try:
            workflows.start(backend, document, damaged_at=document.stat().st_size // 2)
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

    def _show_where(
        self, backend: StorageBackend, commands: dict[str, str], options: dict[str, Any]
    ) -> None:
        manage = _manage()
        store = "" if options["backend"] is None else f" --backend {options['backend']}"
        where = backend.name
        if backend.alias is not None:
            database = connections[backend.alias]
            where = f"{database.vendor}: {database.settings_dict['NAME']}"
        self.stdout.write(f"The data is in {where}")
        for purpose, command in commands.items():
            self.stdout.write(f"{purpose + ':':<20} {manage} {command}{store}")
        if backend.alias != DEFAULT_DB_ALIAS:
            return  # The admin of this site shows its own database.
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
            users.create_superuser(USER, password=password)
            self.stdout.write(f"Log in as {USER} with the password {password} (shown only now)")


def _manage() -> str:
    """Return how to call manage.py with this Python from this folder."""
    python = Path(sys.executable)
    path = python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else python
    return f"{path} manage.py"

"""``manage.py fork_run ID --step N``: a new run that begins where another one was."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from workflow_storage.management.arguments import label, labels_of, whole_number
from workflow_storage.management.base import StorageCommand, found_run
from workflow_storage.management.run_columns import run_columns, run_record
from workflow_storage.transfer import fork_run

if TYPE_CHECKING:
    from argparse import ArgumentParser

    from workflow_storage.base import StorageBackend
    from workflow_storage.management.output import Output


class Command(StorageCommand):
    """Forks a run."""

    help = (
        "Makes a new pending run with the history of another one up to a step, for resume_run() to "
        "go on from. The other one stays as it is, and is its parent."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add the run, the step and the labels."""
        super().add_arguments(parser)
        parser.add_argument("run_id", metavar="ID", help="The id of the run, or its beginning.")
        parser.add_argument(
            "--step",
            type=whole_number,
            required=True,
            metavar="N",
            help="The last step to have.",
        )
        parser.add_argument(
            "--label",
            action="append",
            type=label,
            metavar="NAME=VALUE",
            help="A label of the new run, in place of those of the other one; may be given several "
            "times.",
        )

    def show(self, backend: StorageBackend, output: Output, options: dict[str, Any]) -> None:
        """Make the new run, and write it."""
        run = found_run(backend, options["run_id"])
        labels = labels_of(options["label"])
        fork = fork_run(run.id, whole_number(options["step"]), backend=backend, labels=labels)
        output.rows([backend.runs.get(fork.id) or fork], run_columns(), run_record())

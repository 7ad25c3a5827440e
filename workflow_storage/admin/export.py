"""A file of some runs, for a download."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from workflow_storage.base import StorageBackend
from workflow_storage.transfer import export_runs

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from workflow_storage.base import AbstractWorkflowRunRepository, Attempt
    from workflow_storage.models import WorkflowRun
    from workflow_storage.transfer import Transferred


def exported(
    store: StorageBackend, run_ids: Iterable[str], seconds: float
) -> tuple[BinaryIO, list[Transferred]] | None:
    """Write runs of a store to a file that is gone once it is closed.

    Args:
        store: where they are.
        run_ids: of those to write; one that is not there any more is left out.
        seconds: how long it may take.

    Returns:
        The file, and what became of each run; None if it takes longer.

    Raises:
        StorageError: if the file cannot be written, or the store does not answer.
    """
    source = StorageBackend(cast("Any", _SomeRuns(store.runs, run_ids)), store.states)
    deadline = time.monotonic() + seconds
    # The file is open when its directory is deleted, and gone when it is closed. Where a system
    # does not let that happen, it is left to be cleaned up with other temporary files.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        path = Path(directory) / "runs.jsonl"
        written = []
        for one in export_runs(source, path):
            if time.monotonic() > deadline:
                return None
            written.append(one)
        return path.open("rb"), written


class _SomeRuns:
    """What `export_runs` needs of a repository, whose filters know no list of ids."""

    def __init__(self, runs: AbstractWorkflowRunRepository, run_ids: Iterable[str]) -> None:
        self._runs = runs
        self._run_ids = run_ids

    def iter_runs(self) -> Iterator[WorkflowRun]:
        for run_id in self._run_ids:
            run = self._runs.get(run_id)
            if run is not None:
                yield run

    def list_attempts(self, run_id: str) -> list[Attempt]:
        return self._runs.list_attempts(run_id)

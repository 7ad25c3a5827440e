"""A file of some runs, for a download."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Self

from workflow_storage.base import StorageBackend
from workflow_storage.transfer import export_runs

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from workflow_storage.base import Damage
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
    source = _SomeRuns(store, run_ids)
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


class _SomeRuns(StorageBackend):
    """A store of which some runs are all that there is, for filters know no list of ids."""

    def __new__(cls, store: StorageBackend, run_ids: Iterable[str]) -> Self:
        return super().__new__(cls, *store)

    def __init__(self, store: StorageBackend, run_ids: Iterable[str]) -> None:
        super().__init__(*store)
        self._run_ids = run_ids

    def readable_pages(self, **_all: object) -> Iterator[list[WorkflowRun | Damage]]:
        for run_id in self._run_ids:
            run = self.read_run(run_id)
            if run is not None:
                yield [run]

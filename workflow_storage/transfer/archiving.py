"""Runs that have ended brought into a file, and deleted once they have been read back from it.

Two functions, called one after the other: the file is complete, and on the disk, before anything is
deleted. What is deleted is what is in the file, compared run by run and state by state.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from workflow_storage.base import checkpoint_of
from workflow_storage.exceptions import (
    CannotMoveError,
    ExportFileError,
    RunNotFoundError,
    StorageError,
    StorageUnavailableError,
)
from workflow_storage.transfer.copying import Transferred, last_if_equal
from workflow_storage.transfer.files import is_stream, reading, writing
from workflow_storage.transfer.jsonlines import MAX_LINE, FileHistory, Lines, exported
from workflow_storage.transfer.lines import DamagedLine, RunLine
from workflow_storage.validation import equal_runs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from workflow_storage.base import Checkpoint, FinishedRunFilters, StorageBackend


def archive_runs(
    source: StorageBackend, path: str | Path, **which: Unpack[FinishedRunFilters]
) -> Iterator[Transferred]:
    """Write runs that have ended to a new file, as `export_runs` does; `delete_archived` comes next.

    Args:
        source: where the runs are.
        path: a file that is not there yet, for what is in it may be all that is left of some runs.
        **which: see `FinishedRunFilters`.

    Yields:
        Each run, once it is written. The file is there, and on the disk, after the last.

    Raises:
        ExportFileError: if the file is there already, or cannot be written.
        StorageUnavailableError: if the store does not answer.
    """
    path = Path(path)
    if is_stream(path):
        raise ExportFileError(str(path), "it cannot be read back")
    if path.exists():
        raise ExportFileError(str(path), "it is there already")
    with writing(path) as file:
        for run in source.runs.iter_finished(**which):
            yield exported(run, source, file)
    _sync(path)


def delete_archived(
    source: StorageBackend, path: str | Path
) -> Iterator[Transferred | DamagedLine]:
    """Delete those runs of a file that are in a store, just as they are in the file.

    Args:
        source: where the runs are.
        path: what `archive_runs` wrote.

    Yields:
        Each run: deleted, or why not. Most often it has changed since, and stays.

    Raises:
        CannotMoveError: before anything is done, if the store has a transaction open, whose rollback
            would bring back what is in the archive.
        ExportFileError: if the file cannot be read.
        StorageUnavailableError: if the store does not answer; call it again to go on.
    """
    if source.in_transaction():
        raise CannotMoveError
    with reading(Path(path)) as file:
        lines = Lines(file, MAX_LINE)
        while (line := lines.next()) is not None:
            if isinstance(line, DamagedLine):
                yield line
            elif isinstance(line, RunLine):
                history = FileHistory(line, lines, MAX_LINE)
                yield _deleted(line, history, source)
                yield from history.rest()


def _deleted(line: RunLine, history: FileHistory, source: StorageBackend) -> Transferred:
    run = line.run
    try:
        last = _newest_if_archived(line, history, source)
        source.runs.delete_unchanged(run, last)
    except StorageUnavailableError:
        raise
    except RunNotFoundError:
        return Transferred(run.id, "unchanged")
    except StorageError as exc:
        return Transferred(run.id, "refused", reason=str(exc))
    return Transferred(run.id, "copied", deleted=True)


def _newest_if_archived(
    line: RunLine, history: FileHistory, source: StorageBackend
) -> Checkpoint | None:
    """Return the newest checkpoint of a run that is in the file as it is in the store."""
    run = line.run
    stored = source.runs.get(run.id)
    if stored is None:
        raise RunNotFoundError(run.id)
    changed = StorageError("It is not as it was written to the archive any more, so it was kept.")
    if not equal_runs(stored, run) or source.runs.list_attempts(run.id) != line.attempts:
        raise changed
    here = source.states.iter_encoded(run.id)
    if line.last_step is None:
        if next(here, None) is not None:
            raise changed
        return None
    last = last_if_equal(
        run.id, here, history.after(-1 if line.first_step is None else line.first_step - 1)
    )
    if last is None:
        raise changed
    return checkpoint_of(run.id, last)


def _sync(path: Path) -> None:
    """Have a file, and its name, on the disk."""
    for one in (path, path.absolute().parent):
        descriptor = os.open(one, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

"""Runs copied or moved from one store to another, or through a file of JSON Lines.

What is in the target is never overwritten by something older, and a run is deleted from the
source only after it has been read back equal. Every transfer can be interrupted and begun
again: what is there already is not written twice.
"""

from workflow_storage.exceptions import CannotMoveError, ExportFileError, SameStoreError
from workflow_storage.transfer.archiving import archive_runs, delete_archived
from workflow_storage.transfer.copying import (
    MAX_ATTEMPTS,
    PROBE,
    STATES_AT_ONCE,
    Outcome,
    Transferred,
    copy_changed_runs,
    copy_runs,
)
from workflow_storage.transfer.files import is_stream
from workflow_storage.transfer.forking import fork_run
from workflow_storage.transfer.jsonlines import MAX_LINE, export_runs, import_runs
from workflow_storage.transfer.lines import FORMAT, DamagedLine

__all__ = [
    "FORMAT",
    "MAX_ATTEMPTS",
    "MAX_LINE",
    "PROBE",
    "STATES_AT_ONCE",
    "CannotMoveError",
    "DamagedLine",
    "ExportFileError",
    "Outcome",
    "SameStoreError",
    "Transferred",
    "archive_runs",
    "copy_changed_runs",
    "copy_runs",
    "delete_archived",
    "export_runs",
    "fork_run",
    "import_runs",
    "is_stream",
]

"""What a workflow author calls: a run recorded around a block or a function, and resumed.

Works on every backend, through the two repositories only.
"""

from workflow_storage.recorder.ending import END_PATIENCE
from workflow_storage.recorder.failures import describe_error
from workflow_storage.recorder.opening import RESUMABLE
from workflow_storage.recorder.recording import Recording, record_run, resume_run
from workflow_storage.recorder.run import RecordedRun, current_run
from workflow_storage.recorder.suspension import Suspended
from workflow_storage.validation import MAX_ERROR_MESSAGE

__all__ = [
    "END_PATIENCE",
    "MAX_ERROR_MESSAGE",
    "RESUMABLE",
    "RecordedRun",
    "Recording",
    "Suspended",
    "current_run",
    "describe_error",
    "record_run",
    "resume_run",
]

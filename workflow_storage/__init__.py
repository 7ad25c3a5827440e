"""Stores workflow runs and the state after every node, in any Django database or in Redis.

The public names load when they are first used, so that importing the package, which
Django does before its models can be loaded, costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workflow_storage.base import (
        AbstractExecutionStateRepository,
        AbstractWorkflowRunRepository,
        Attempt,
        Checkpoint,
        Damage,
        RunFilters,
        StateWriter,
        Step,
        StorageBackend,
    )
    from workflow_storage.config import GlobalConfig, StorageConfig
    from workflow_storage.deltas import EncodedCheckpoint
    from workflow_storage.exceptions import (
        CannotMoveError,
        DamagedFieldError,
        DamagedStateError,
        ExportFileError,
        InvalidFieldError,
        InvalidPayloadError,
        InvalidStatusError,
        NotInDatabaseError,
        NotResumableError,
        ReentranceError,
        RunAlreadyExistsError,
        RunChangedError,
        RunLostError,
        RunNotFoundError,
        SameStoreError,
        SnapshotError,
        StatusConflictError,
        StepConflictError,
        StepNotFoundError,
        StorageError,
        StorageUnavailableError,
        TablesMissingError,
        UnsupportedBackendError,
    )
    from workflow_storage.factory import acreate_storage_backend, create_storage_backend
    from workflow_storage.models import ExecutionState, WorkflowRun
    from workflow_storage.recorder import RecordedRun, current_run, record_run, resume_run
    from workflow_storage.status import TERMINAL_STATUSES, RunStatus
    from workflow_storage.summaries import RunSummary
    from workflow_storage.transfer import copy_runs, export_runs, fork_run, import_runs

_MODULES = {
    "base": (
        "AbstractExecutionStateRepository",
        "AbstractWorkflowRunRepository",
        "Attempt",
        "Checkpoint",
        "Damage",
        "RunFilters",
        "StateWriter",
        "Step",
        "StorageBackend",
    ),
    "config": ("GlobalConfig", "StorageConfig"),
    "deltas": ("EncodedCheckpoint",),
    "exceptions": (
        "CannotMoveError",
        "DamagedFieldError",
        "DamagedStateError",
        "ExportFileError",
        "InvalidFieldError",
        "InvalidPayloadError",
        "InvalidStatusError",
        "NotInDatabaseError",
        "NotResumableError",
        "ReentranceError",
        "RunAlreadyExistsError",
        "RunChangedError",
        "RunLostError",
        "RunNotFoundError",
        "SameStoreError",
        "SnapshotError",
        "StatusConflictError",
        "StepConflictError",
        "StepNotFoundError",
        "StorageError",
        "StorageUnavailableError",
        "TablesMissingError",
        "UnsupportedBackendError",
    ),
    "factory": ("acreate_storage_backend", "create_storage_backend"),
    "recorder": ("RecordedRun", "current_run", "record_run", "resume_run"),
    "models": ("ExecutionState", "WorkflowRun"),
    "summaries": ("RunSummary",),
    "status": ("TERMINAL_STATUSES", "RunStatus"),
    "transfer": ("copy_runs", "export_runs", "fork_run", "import_runs"),
}
MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "TERMINAL_STATUSES",
    "AbstractExecutionStateRepository",
    "AbstractWorkflowRunRepository",
    "Attempt",
    "CannotMoveError",
    "Checkpoint",
    "Damage",
    "DamagedFieldError",
    "DamagedStateError",
    "EncodedCheckpoint",
    "ExecutionState",
    "ExportFileError",
    "GlobalConfig",
    "InvalidFieldError",
    "InvalidPayloadError",
    "InvalidStatusError",
    "NotInDatabaseError",
    "NotResumableError",
    "RecordedRun",
    "ReentranceError",
    "RunAlreadyExistsError",
    "RunChangedError",
    "RunFilters",
    "RunLostError",
    "RunNotFoundError",
    "RunStatus",
    "RunSummary",
    "SameStoreError",
    "SnapshotError",
    "StateWriter",
    "StatusConflictError",
    "Step",
    "StepConflictError",
    "StepNotFoundError",
    "StorageBackend",
    "StorageConfig",
    "StorageError",
    "StorageUnavailableError",
    "TablesMissingError",
    "UnsupportedBackendError",
    "WorkflowRun",
    "acreate_storage_backend",
    "copy_runs",
    "create_storage_backend",
    "current_run",
    "export_runs",
    "fork_run",
    "import_runs",
    "record_run",
    "resume_run",
]


def __getattr__(name: str) -> Any:
    try:
        module = MODULE_OF[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    if module == "models":
        # A script or notebook without a Django project can name the models, too.
        importlib.import_module(f"{__name__}.factory").ensure_django()
    value = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

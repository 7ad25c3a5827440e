"""Errors cross process borders whole."""

import pickle
from datetime import UTC, datetime

import pytest

from workflow_storage import exceptions as errors


@pytest.mark.parametrize(
    "error",
    [
        errors.RunNotFoundError("an-id"),
        errors.RunAlreadyExistsError("an-id"),
        errors.InvalidStatusError("done", ("pending", "failed")),
        errors.StatusConflictError("an-id", "failed", ("running",)),
        errors.NotResumableError("an-id", "running", ("failed",), 2, "host:1", "today", "now"),
        errors.ReentranceError(),
        errors.RunLostError("an-id", 1, "running", 2, "host:7", datetime(2026, 1, 1, tzinfo=UTC)),
        errors.RunLostError("an-id", 1),
        errors.TablesMissingError("default"),
        errors.InvalidPayloadError("inputs is not JSON"),
        errors.StorageUnavailableError("down"),
        errors.SameStoreError(),
        errors.DamagedFieldError("inputs", "it is no JSON"),
        errors.StepNotFoundError("an-id", 7),
        errors.NotInDatabaseError("an-id", "save()", "use runs.update()"),
        errors.CannotMoveError(),
        errors.ExportFileError("runs.jsonl", "No space left on device"),
        errors.ExportFileError("folder"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_survive_pickling(error):
    copy = pickle.loads(pickle.dumps(error))

    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)


@pytest.mark.parametrize(
    "error",
    [
        errors.RunNotFoundError,
        errors.RunAlreadyExistsError,
        errors.InvalidFieldError,
        errors.InvalidStatusError,
        errors.StatusConflictError,
        errors.UnsupportedBackendError,
    ],
)
def test_errors_that_the_caller_makes_are_value_errors(error):
    assert issubclass(error, ValueError)
    assert issubclass(error, errors.StorageError)

"""How an exception becomes the status and the text of an ended run, for `recording`."""

from __future__ import annotations

import contextlib
import logging
import traceback
from typing import Any, NamedTuple

from workflow_storage.exceptions import InvalidFieldError, RunLostError
from workflow_storage.recorder.suspension import Suspended
from workflow_storage.serialization import payload_json
from workflow_storage.status import RunStatus
from workflow_storage.validation import MAX_ERROR_MESSAGE, cut

logger = logging.getLogger(__name__)


class Outcome(NamedTuple):
    """How a run ends."""

    status: RunStatus
    fields: dict[str, Any]
    """What is stored with the status: `error_message`, and `outputs` if it completed."""


def outcome_of(
    outputs: Any, exc: BaseException | None, run_id: str
) -> tuple[Outcome, InvalidFieldError | None]:
    """Return how a run ends, or that it waits.

    Args:
        outputs: its result.
        exc: what its block was left with.
        run_id: its id.

    Returns:
        Its outcome; and why the result cannot be stored, for which the run has failed then.
    """
    if isinstance(exc, Suspended) and exc.run_id == run_id:
        return Outcome(RunStatus.PENDING, {"waiting_for": exc.reason}), None
    if exc is not None:
        status = RunStatus.FAILED if isinstance(exc, Exception) else RunStatus.CANCELLED
        return Outcome(status, {"error_message": describe_error(exc)}), None
    try:
        payload_json("outputs", outputs)
    except InvalidFieldError as refused:
        return Outcome(RunStatus.FAILED, {"error_message": describe_error(refused)}), refused
    return Outcome(RunStatus.COMPLETED, {"outputs": outputs, "error_message": None}), None


def note(exc: BaseException, error: Exception, run_id: str) -> None:
    """Let an exception that is on its way go on, with the store's error noted on it."""
    if isinstance(error, RunLostError):
        logger.warning("How workflow run %s ended here was not stored: %s", run_id, error)
    else:
        logger.error("The end of workflow run %s could not be stored", run_id, exc_info=error)
    # Some exceptions take no note; then the log has it.
    with contextlib.suppress(Exception):
        exc.add_note(f"The end of workflow run {run_id} could not be stored: {error}")


def note_transaction(exc: BaseException, run_id: str, backend: str) -> None:
    """Note on an exception that the record of its failure may go with the caller's transaction.

    Args:
        exc: what the block was left with.
        run_id: its run.
        backend: the name of the store.
    """
    with contextlib.suppress(Exception):
        exc.add_note(
            f"Workflow run {run_id} was recorded inside a transaction of {backend!r}: if that is "
            "rolled back, so is the record of this failure. To keep it, open the store with "
            "own_connection=True, or, on SQLite, keep the runs in another database."
        )


def describe_error(exc: BaseException) -> str:
    """Return the type, message and traceback of an exception as text, without local variables.

    Returns:
        At most `MAX_ERROR_MESSAGE` characters; what is too long is cut in its middle.
    """
    try:
        described = traceback.TracebackException.from_exception(exc, compact=True)
        summary = "".join(described.format_exception_only()).strip()
        text = "".join(described.format()).strip()
        if text != summary:  # as it is for one that was never raised
            text = f"{cut(summary, MAX_ERROR_MESSAGE // 2)}\n\n{text}"
    except Exception:
        logger.warning("An exception cannot be described", exc_info=True)
        text = f"{type(exc).__name__} (its message and traceback cannot be printed)"
    return cut(text, MAX_ERROR_MESSAGE)

"""How an exception becomes the status and the text of an ended run, for `recording`."""

from __future__ import annotations

import contextlib
import logging
import traceback
from typing import TYPE_CHECKING, Any, NamedTuple

from workflow_storage.exceptions import InvalidFieldError
from workflow_storage.serialization import payload_json
from workflow_storage.status import RunStatus

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger(__name__)

MAX_ERROR_MESSAGE = 20_000
"""Characters of an error_message that is made from an exception."""


class Outcome(NamedTuple):
    """How a run ends."""

    status: RunStatus
    fields: dict[str, Any]
    """What is stored with the status: `error_message`, and `outputs` if it completed."""


@contextlib.contextmanager
def ending(run_id: str, outputs: Any, exc: BaseException | None) -> Iterator[Outcome]:
    """Yield how a run ends, for the caller to store, and raise what the author has to hear.

    The exception that the block was left with goes on its way by itself. An error of the store
    is noted on it, or raised if there is none.

    Args:
        run_id: which run.
        outputs: its result.
        exc: what its block was left with.

    Raises:
        InvalidFieldError: after the outcome has been stored, if `outputs` is not JSON.
    """
    refused: InvalidFieldError | None = None
    if exc is None:
        try:
            payload_json("outputs", outputs)
        except InvalidFieldError as error:
            refused = error
    try:
        yield _outcome(outputs, refused if exc is None else exc)
    except Exception as error:
        if exc is None:
            raise
        _note(exc, error, run_id)
    if refused is not None:
        raise refused


def _outcome(outputs: Any, exc: BaseException | None) -> Outcome:
    if exc is None:
        return Outcome(RunStatus.COMPLETED, {"outputs": outputs, "error_message": None})
    status = RunStatus.FAILED if isinstance(exc, Exception) else RunStatus.CANCELLED
    return Outcome(status, {"error_message": describe_error(exc)})


def _note(exc: BaseException, error: Exception, run_id: str) -> None:
    """Let an exception that is on its way go on, with the store's error noted on it."""
    logger.error("The end of workflow run %s could not be stored", run_id, exc_info=error)
    # Some exceptions take no note; then the log has it.
    with contextlib.suppress(Exception):
        exc.add_note(f"The end of workflow run {run_id} could not be stored: {error}")


def describe_error(exc: BaseException) -> str:
    """Return the type, message and traceback of an exception as text, without local variables.

    Returns:
        At most `MAX_ERROR_MESSAGE` characters; what is too long is cut in its middle.
    """
    try:
        described = traceback.TracebackException.from_exception(exc, compact=True)
        summary = "".join(described.format_exception_only()).strip()
        text = f"{_cut(summary, MAX_ERROR_MESSAGE // 2)}\n\n{''.join(described.format()).strip()}"
    except Exception:
        logger.warning("An exception cannot be described", exc_info=True)
        text = f"{type(exc).__name__} (its message and traceback cannot be printed)"
    return _cut(text, MAX_ERROR_MESSAGE)


def _cut(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    gap = "\n[…]\n"
    half = (limit - len(gap)) // 2
    return f"{text[:half]}{gap}{text[-half:]}"

"""How a recording ends its run, for `recording`: one compare-and-set, tried for some seconds."""

from __future__ import annotations

import itertools
import logging
import time
from typing import TYPE_CHECKING

from django.utils import timezone

from workflow_storage.exceptions import (
    RunLostError,
    RunNotFoundError,
    StatusConflictError,
    StorageError,
    StorageUnavailableError,
    TablesMissingError,
)
from workflow_storage.recorder.failures import (
    Outcome,
    describe_error,
    note,
    note_transaction,
    outcome_of,
)
from workflow_storage.recorder.steps import Call, Pause
from workflow_storage.recorder.suspension import Suspended
from workflow_storage.signals import run_finished
from workflow_storage.status import RunStatus

if TYPE_CHECKING:
    from workflow_storage.base import StorageBackend
    from workflow_storage.recorder.run import RecordedRun, RunWriter
    from workflow_storage.recorder.steps import Steps

logger = logging.getLogger(__name__)

END_PATIENCE = 5.0
"""Seconds for which the end of a run is tried, while the store does not answer."""

_FIRST_PAUSE = 0.1


def finished(run: RecordedRun, writer: RunWriter, exc: BaseException | None) -> Steps[bool]:
    """Store how a run ended, or that it waits, and raise what the author has to hear.

    The exception that the block was left with goes on its way by itself. An error of the store
    is noted on it, or raised if there is none.

    Args:
        run: which run.
        writer: its writer.
        exc: what its block was left with.

    Returns:
        Whether the block swallows that, for the run was suspended by it.

    Raises:
        InvalidFieldError: after it has been stored that the run failed, if its outputs are not JSON.
        RunLostError: if the run is not this recording's to end any more, unless it was deleted.
        StorageError: if the end could not be stored.
    """
    suspends = isinstance(exc, Suspended) and exc.run_id == run.run_id
    outcome, refused = outcome_of(run.outputs, exc, run.run_id)
    if exc is not None and not suspends:
        node = writer.nodes.left_by(exc)
        if node is not None:
            outcome.fields["current_node"] = node
    try:
        yield from _told(run, writer, outcome)
    except Exception as error:
        if isinstance(error, RunLostError) and error.status is None:
            # Whoever deleted it does not want to know.
            logger.info("How workflow run %s ended was not stored: it was deleted", run.run_id)
        elif exc is None or suspends:
            raise
        elif not (isinstance(error, RunLostError) and _tells_of(exc, run)):
            note(exc, error, run.run_id)
    if suspends:
        return True
    if exc is not None and (yield Call(writer.backend, "in_transaction")):
        note_transaction(exc, run.run_id, writer.backend.name)
    if refused is not None:
        raise refused
    return False


def _tells_of(exc: BaseException, run: RecordedRun) -> bool:
    return isinstance(exc, RunLostError) and exc.run_id == run.run_id


def _told(run: RecordedRun, writer: RunWriter, outcome: Outcome) -> Steps[None]:
    """Store an outcome, or that the store refuses the result, and tell it."""
    refused = None
    try:
        yield from _stored(run, writer, outcome)
    except (StatusConflictError, StorageUnavailableError):
        raise
    except StorageError as exc:
        if outcome.status is not RunStatus.COMPLETED:
            raise
        refused = exc
        outcome = Outcome(RunStatus.FAILED, {"error_message": describe_error(exc)})
        yield from _stored(run, writer, outcome)
    run.status = outcome.status
    run.error_message = outcome.fields.get("error_message")
    run.waiting_for = outcome.fields.get("waiting_for")
    if run.status.is_terminal:
        yield Call(writer, "send", (run_finished, run))
    if refused is not None:
        raise refused


def _stored(run: RecordedRun, writer: RunWriter, outcome: Outcome) -> Steps[None]:
    """Store an outcome, and try for some time if the store does not answer.

    All tries have one time, by which the store knows an earlier one that it did carry out.
    """
    change = Call(
        writer.backend.runs,
        "update_status",
        (run.run_id, outcome.status),
        {
            "attempt": run.attempt,
            **({"completed_at": timezone.now()} if outcome.status.is_terminal else {}),
            **writer.usage.totals(),
            **outcome.fields,
        },
    )
    deadline = time.monotonic() + END_PATIENCE
    pause = _FIRST_PAUSE
    for number in itertools.count():
        try:
            yield change
            return
        except RunLostError as exc:
            # Of a run that waits, no time tells that an earlier try was carried out.
            if number and (exc.status, exc.current_attempt) == (RunStatus.PENDING, run.attempt):
                return
            raise
        except RunNotFoundError as exc:
            raise writer.deleted() from exc
        except StorageUnavailableError as exc:
            late = time.monotonic() + pause > deadline
            if late or not (yield from is_worth_another_try(exc, writer.backend)):
                raise
        yield Pause(pause)
        pause *= 2


def is_worth_another_try(exc: StorageUnavailableError, backend: StorageBackend) -> Steps[bool]:
    """Whether a store that did not answer can be asked again.

    Not in a transaction, which is lost with its connection, and not where tables are missing.
    """
    if isinstance(exc, TablesMissingError):
        return False
    return not (yield Call(backend, "in_transaction"))

"""How a recording gets its run, for `recording`: a new one is begun, or one is resumed."""

from __future__ import annotations

import logging
import os
import socket
import threading
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from django.utils import timezone

from workflow_storage.exceptions import (
    NotResumableError,
    RunNotFoundError,
    StatusConflictError,
    StorageError,
    StorageUnavailableError,
)
from workflow_storage.recorder.ending import is_worth_another_try
from workflow_storage.recorder.run import RecordedRun, RunWriter, run_around
from workflow_storage.recorder.steps import Call, Pause
from workflow_storage.status import RunStatus
from workflow_storage.validation import MAX_WORKER

if TYPE_CHECKING:
    from workflow_storage.base import Checkpoint, StorageBackend
    from workflow_storage.models import WorkflowRun
    from workflow_storage.recorder.steps import Steps

logger = logging.getLogger(__name__)

RESUMABLE = (RunStatus.FAILED, RunStatus.CANCELLED, RunStatus.PENDING)
"""The statuses that a run is resumed from."""

_BEGINNING_PAUSE = 0.2
"""Seconds before an attempt is begun once more, if the store did not answer."""


class Opened(NamedTuple):
    """A run that was begun or resumed."""

    run: RecordedRun
    writer: RunWriter

    @classmethod
    def of(
        cls,
        run: WorkflowRun,
        backend: StorageBackend,
        attempt: int,
        checkpoint: Checkpoint | None = None,
    ) -> Opened:
        """Return a stored run, as it is recorded on from a checkpoint in an attempt."""
        writer = RunWriter(run, backend, attempt)
        return cls(RecordedRun(run, writer, checkpoint), writer)


class Opening(Protocol):
    """How a recording gets its run."""

    def steps(self, backend: StorageBackend, inputs: Any) -> Steps[Opened]:
        """Begin or resume a run."""


AROUND: Any = object()
"""The parent of a run is the one that is recorded around it, if there is one in the same store."""


class Beginning:
    """A new run; see `record_run`."""

    def __init__(
        self,
        workflow_name: str,
        config: Any,
        run_id: str | None,
        labels: dict[str, str] | None = None,
        parent: Any = AROUND,
    ) -> None:
        self.run_id = run_id
        self._parent = parent
        self._fields = {
            "workflow_name": workflow_name,
            "config_snapshot": config,
            "labels": {} if labels is None else labels,
        }
        if run_id is not None:
            self._fields["id"] = run_id

    def steps(self, backend: StorageBackend, inputs: Any) -> Steps[Opened]:
        """Begin a run."""
        from workflow_storage.models import WorkflowRun

        now = _time_of_beginning()
        run = WorkflowRun(
            status=RunStatus.RUNNING,
            started_at=now,
            inputs=inputs,
            attempt=1,
            attempt_started_at=now,
            worker=this_worker(),
            parent_id=self._parent_id(backend),
            **self._fields,
        )
        yield Call(backend.runs, "add", (run,))
        return Opened.of(run, backend, 1)

    def _parent_id(self, backend: StorageBackend) -> str | None:
        parent: RecordedRun | str | None = self._parent
        if self._parent is AROUND:
            return id_around(backend)
        return parent.run_id if isinstance(parent, RecordedRun) else parent


class Resumption:
    """A run that is stored; see `resume_run`.

    Args:
        run_id: which run.
        stalled_after: as for `resume_run`.
        statuses: those that it is resumed from. With ``running``, it is taken from whoever has it.
    """

    def __init__(
        self,
        run_id: str,
        stalled_after: timedelta | None = None,
        statuses: tuple[RunStatus, ...] = RESUMABLE,
    ) -> None:
        self._run_id = run_id
        self._stalled_after = stalled_after
        self._statuses = statuses

    def steps(self, backend: StorageBackend, inputs: Any) -> Steps[Opened]:
        """Begin the next attempt of the run."""
        runs, states = backend
        if self._stalled_after is not None:
            yield Call(runs, "fail_stalled", (self._stalled_after,), {"run_id": self._run_id})
        before = yield from self._read(backend)
        if before.status not in self._statuses:
            raise (yield from self._refusal(backend))
        # First of all, for one that is damaged is to be mended before anybody begins.
        yield Call(states, "get_latest_checkpoint", (self._run_id,))
        yield from self._begin(backend, before)
        attempt = before.attempt + 1
        try:
            # Others can have saved and deleted states until the attempt has begun.
            last = yield Call(states, "get_latest_checkpoint", (self._run_id,))
        except BaseException:
            if before.status != RunStatus.RUNNING:  # whoever had it has lost it for good
                yield from self._take_back(backend, before, attempt)
            raise
        return Opened.of(before, backend, attempt, last)

    def _read(self, backend: StorageBackend) -> Steps[WorkflowRun]:
        run: WorkflowRun | None = yield Call(backend.runs, "get", (self._run_id,))
        if run is None:
            raise RunNotFoundError(self._run_id)
        return run

    def _begin(self, backend: StorageBackend, before: WorkflowRun) -> Steps[None]:
        """Begin an attempt, unless the run is in another one than it was read in.

        Both tries have one time, by which the store knows that it did carry out the first one.
        """
        change = Call(
            backend.runs,
            "update_status",
            (self._run_id, RunStatus.RUNNING),
            {
                "expected": self._statuses,
                "attempt": before.attempt,
                "attempt_started_at": _time_of_beginning(),
                "worker": this_worker(),
            },
        )
        try:
            try:
                yield change
            except StorageUnavailableError as exc:
                if not (yield from is_worth_another_try(exc, backend)):
                    raise
                yield Pause(_BEGINNING_PAUSE)
                yield change
        except StatusConflictError as exc:
            raise (yield from self._refusal(backend)) from exc

    def _refusal(self, backend: StorageBackend) -> Steps[NotResumableError]:
        """Return why the run cannot be resumed, by what it is now."""
        run = yield from self._read(backend)
        last_sign = None
        if run.status == RunStatus.RUNNING:
            signs = [run.started_at, run.attempt_started_at, run.heartbeat_at]
            try:
                last = yield Call(backend.states, "get_latest_checkpoint", (self._run_id,))
            except StorageError:  # it is damaged; who resumes the run will hear of it
                last = None
            signs.append(last and last["created_at"])
            last_sign = max(sign for sign in signs if sign is not None)
        return NotResumableError(
            self._run_id,
            run.status,
            self._statuses,
            run.attempt,
            run.worker,
            run.completed_at or run.attempt_started_at,
            last_sign,
        )

    def _take_back(self, backend: StorageBackend, before: WorkflowRun, attempt: int) -> Steps[None]:
        """Let the run be as it was before the attempt, for nobody works on it."""
        fields: dict[str, Any] = {"error_message": before.error_message}
        if RunStatus(before.status).is_terminal:
            fields["completed_at"] = before.completed_at
            fields["duration_seconds"] = before.duration_seconds
            fields["current_node"] = before.current_node
        else:
            fields["waiting_for"] = before.waiting_for
        try:
            yield Call(
                backend.runs,
                "update_status",
                (self._run_id, before.status),
                {"attempt": attempt, **fields},
            )
        except StorageError:
            logger.warning("Workflow run %s is left running", self._run_id, exc_info=True)


def id_around(backend: StorageBackend) -> str | None:
    """Return the id of the run that is recorded around the caller, if there is one in this store."""
    around = run_around()
    return around.run_id if around is not None and around.backend.runs is backend.runs else None


def this_worker() -> str:
    """Return who works here: the host and the id of the process."""
    process = f":{os.getpid()}"
    # A name of a host can be any bytes.
    host = socket.gethostname().encode("ascii", "replace").decode().replace("\0", "?")
    return f"{host[: MAX_WORKER - len(process)]}{process}"


_telling_times = threading.RLock()
_last_time: datetime | None = None


def _time_of_beginning() -> datetime:
    """Return the time now, or a moment later: no two attempts of a process begin at one time.

    The store takes two beginnings of a worker at one time for two tries of one.
    """
    global _last_time  # noqa: PLW0603
    with _telling_times:
        now = timezone.now()
        last = _last_time
        if (
            last is not None
            and timezone.is_aware(now) == timezone.is_aware(last)
            # A clock that goes back by more has other times.
            and timedelta(0) <= last - now < timedelta(milliseconds=1)
        ):
            now = last + timedelta(microseconds=1)
        _last_time = now
        return now

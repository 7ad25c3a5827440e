"""The contract: what every backend promises, for callers and for authors of backends.

A backend implements the abstract methods; everything else is written once, here, on top
of them. Every method has an async twin with the same arguments and an ``a`` before its
name. Errors are those of `workflow_storage.exceptions`; any method may also raise
`StorageUnavailableError`. A write is atomic, and durable when the call returns; it joins
the caller's transaction if the backend has transactions and one is open.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict, TypeVar, Unpack

from asgiref.sync import sync_to_async
from django.utils import timezone

from workflow_storage.exceptions import RunNotFoundError, StatusConflictError
from workflow_storage.status import TERMINAL_STATUSES, RunStatus

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Iterator
    from datetime import datetime, timedelta

    from workflow_storage.models import WorkflowRun

_T = TypeVar("_T")

PAGE_SIZE = 200
"""Runs that `iter_runs` holds in memory at a time."""


class Checkpoint(TypedDict):
    """The state of a run after one of its nodes."""

    step: int
    """0, 1, 2, … within the run."""
    node_id: str
    state_data: dict[str, Any]
    created_at: datetime


class RunFilters(TypedDict, total=False):
    """Which runs; a filter that is left out, or None, matches every run."""

    workflow_name: str | None
    status: str | Iterable[str] | None
    """One status, or several."""
    started_after: datetime | None
    """Runs started at this time or later."""
    started_before: datetime | None
    """Runs started earlier than this time."""


class AbstractWorkflowRunRepository(ABC):
    """The stored runs, as a collection."""

    @abstractmethod
    def add(self, run: WorkflowRun) -> None:
        """Store a new run.

        A run that is added in a terminal status without `completed_at` is completed now.

        Raises:
            RunAlreadyExistsError: if its id is taken; the stored run is untouched.
            InvalidFieldError: (a ValueError) if a field cannot be stored as it is.
        """

    @abstractmethod
    def get(self, run_id: str) -> WorkflowRun | None:
        """Give the run with that id, or None."""

    @abstractmethod
    def list_runs(
        self,
        *,
        before: str | WorkflowRun | None = None,
        limit: int = 100,
        **filters: Unpack[RunFilters],
    ) -> list[WorkflowRun]:
        """Give one page of the matching runs, newest `started_at` first, then by id, descending.

        Args:
            before: a run, or its id; the page begins after that run in the order above.
                A run object serves even when the run itself has been deleted since.
            limit: how many runs at most.
            **filters: see `RunFilters`.

        Raises:
            RunNotFoundError: if `before` is the id of no run.
            InvalidStatusError: if a status is none.
        """

    @abstractmethod
    def count_runs(self, **filters: Unpack[RunFilters]) -> int:
        """Count the matching runs."""

    @abstractmethod
    def update(self, run_id: str, **fields: Any) -> None:
        """Change fields of a run, all or none.

        Args:
            run_id: which run.
            **fields: any of inputs, outputs, config_snapshot, error_message,
                total_tokens, total_cost_usd.

        Raises:
            RunNotFoundError: if there is no such run.
            InvalidFieldError: (a ValueError) for an unknown or fixed field, or a value
                that cannot be stored.
        """

    @abstractmethod
    def update_status(
        self,
        run_id: str,
        status: str,
        *,
        expected: str | Iterable[str] | None = None,
        **fields: Any,
    ) -> None:
        """Change the status of a run and its result fields in one atomic step.

        A terminal status sets `completed_at` (now) and `duration_seconds` (since
        `started_at`) unless they are given; any other status clears both, and sets
        `heartbeat_at`: it is a sign of life, and the run's last change is never set back.

        Args:
            run_id: which run.
            status: the new status.
            expected: change it only if the run is in this status, or one of these.
            **fields: as for `update`, and completed_at and duration_seconds (seconds).

        Raises:
            RunNotFoundError: if there is no such run.
            InvalidStatusError: if a status is none.
            StatusConflictError: if the run is in another status than `expected`.
            InvalidFieldError: as for `update`.
        """

    @abstractmethod
    def heartbeat(self, run_id: str) -> None:
        """Note that the run is alive now.

        Raises:
            RunNotFoundError: if there is no such run.
        """

    @abstractmethod
    def delete(self, run_id: str) -> None:
        """Delete a run and all its states.

        Raises:
            RunNotFoundError: if there is no such run.
        """

    @abstractmethod
    def delete_finished(
        self,
        *,
        before: datetime,
        workflow_name: str | None = None,
        statuses: str | Iterable[str] = TERMINAL_STATUSES,
        batch_size: int = 1000,
    ) -> int:
        """Delete runs that ended before a time, with their states, batch by batch.

        Each batch is a transaction of its own, so what was deleted stays deleted if the
        call is interrupted; memory does not grow with the number of runs.

        Args:
            before: runs with an earlier `completed_at`.
            workflow_name: only runs of this workflow.
            statuses: only runs in these terminal statuses.
            batch_size: runs in a batch.

        Returns:
            How many runs were deleted.

        Raises:
            InvalidStatusError: if a status is none, or not a terminal one.
        """

    @abstractmethod
    def list_stalled(self, idle: timedelta) -> list[WorkflowRun]:
        """Give the running runs without a sign of life for longer than `idle`.

        Signs of life are the start, a heartbeat and a checkpoint. Newest start first.
        """

    @abstractmethod
    def put(self, run: WorkflowRun, *, over: WorkflowRun | None = None) -> None:
        """Store a run exactly as it is, every field and time; for copying between stores.

        Args:
            run: the run.
            over: the stored run that it replaces, as it was read; its states stay. None for a
                run that is not stored yet.

        Raises:
            RunAlreadyExistsError: if `over` is None and the id is taken.
            RunNotFoundError: if there is no run to replace.
            RunChangedError: if the stored run is not as `over`.
            InvalidFieldError: (a ValueError) if a field cannot be stored as it is.
        """

    @abstractmethod
    def delete_unchanged(self, run: WorkflowRun, last: Checkpoint | None) -> None:
        """Delete a run and its states if they are as they were read; for moving to another store.

        Args:
            run: the run, as it was read.
            last: its newest checkpoint, as it was read; None if it has none.

        Raises:
            RunNotFoundError: if there is no such run.
            RunChangedError: if a field differs, or the newest checkpoint does by its step,
                node or time.
        """

    def list_by_workflow(self, workflow_name: str, limit: int = 100) -> list[WorkflowRun]:
        """Give the newest runs of a workflow, in the order of `list_runs`."""
        return self.list_runs(workflow_name=workflow_name, limit=limit)

    def iter_runs(self, **filters: Unpack[RunFilters]) -> Iterator[WorkflowRun]:
        """Give all matching runs in the order of `list_runs`, in constant memory.

        Runs may be added, changed and deleted meanwhile; each is given at most once.
        """
        last: WorkflowRun | None = None
        while page := self.list_runs(before=last, limit=PAGE_SIZE, **filters):
            last = page[-1]
            yield from page

    def fail_stalled(self, idle: timedelta) -> int:
        """Set the runs of `list_stalled` to failed, with an error_message that says so.

        A run that finishes meanwhile keeps its result, and one that gives a sign of life
        goes on.

        Returns:
            How many runs were set to failed.
        """
        return sum(self.fail_if_stalled(run.id, idle) for run in self.list_stalled(idle))

    def fail_if_stalled(self, run_id: str, idle: timedelta) -> bool:
        """Set one run to failed if `list_stalled` would give it, and say whether it did.

        A backend that can decide this in one step overrides it.
        """
        if all(run.id != run_id for run in self.list_stalled(idle)):
            return False
        with contextlib.suppress(StatusConflictError, RunNotFoundError):
            self._fail_as_stalled(run_id, idle)
            return True
        return False

    def _fail_as_stalled(self, run_id: str, idle: timedelta) -> None:
        self.update_status(
            run_id,
            RunStatus.FAILED,
            expected=RunStatus.RUNNING,
            error_message=stalled_message(idle),
        )

    def on_commit(self, callback: Callable[[], object]) -> None:
        """Call something once what was written is committed; at once without a transaction."""
        callback()

    def in_transaction(self) -> bool:
        """Whether the caller has a transaction open here, which what is written would join."""
        return False

    async def aadd(self, run: WorkflowRun) -> None:
        """Async twin of `add`."""
        await sync_to_async(self.add, thread_sensitive=True)(run)

    async def aget(self, run_id: str) -> WorkflowRun | None:
        """Async twin of `get`."""
        return await sync_to_async(self.get, thread_sensitive=True)(run_id)

    async def alist_runs(
        self,
        *,
        before: str | WorkflowRun | None = None,
        limit: int = 100,
        **filters: Unpack[RunFilters],
    ) -> list[WorkflowRun]:
        """Async twin of `list_runs`."""
        return await sync_to_async(self.list_runs, thread_sensitive=True)(
            before=before, limit=limit, **filters
        )

    async def acount_runs(self, **filters: Unpack[RunFilters]) -> int:
        """Async twin of `count_runs`."""
        return await sync_to_async(self.count_runs, thread_sensitive=True)(**filters)

    async def aupdate(self, run_id: str, **fields: Any) -> None:
        """Async twin of `update`."""
        await sync_to_async(self.update, thread_sensitive=True)(run_id, **fields)

    async def aupdate_status(
        self,
        run_id: str,
        status: str,
        *,
        expected: str | Iterable[str] | None = None,
        **fields: Any,
    ) -> None:
        """Async twin of `update_status`."""
        await sync_to_async(self.update_status, thread_sensitive=True)(
            run_id, status, expected=expected, **fields
        )

    async def aheartbeat(self, run_id: str) -> None:
        """Async twin of `heartbeat`."""
        await sync_to_async(self.heartbeat, thread_sensitive=True)(run_id)

    async def adelete(self, run_id: str) -> None:
        """Async twin of `delete`."""
        await sync_to_async(self.delete, thread_sensitive=True)(run_id)

    async def adelete_finished(
        self,
        *,
        before: datetime,
        workflow_name: str | None = None,
        statuses: str | Iterable[str] = TERMINAL_STATUSES,
        batch_size: int = 1000,
    ) -> int:
        """Async twin of `delete_finished`."""
        return await sync_to_async(self.delete_finished, thread_sensitive=True)(
            before=before, workflow_name=workflow_name, statuses=statuses, batch_size=batch_size
        )

    async def alist_stalled(self, idle: timedelta) -> list[WorkflowRun]:
        """Async twin of `list_stalled`."""
        return await sync_to_async(self.list_stalled, thread_sensitive=True)(idle)

    async def aput(self, run: WorkflowRun, *, over: WorkflowRun | None = None) -> None:
        """Async twin of `put`."""
        await sync_to_async(self.put, thread_sensitive=True)(run, over=over)

    async def adelete_unchanged(self, run: WorkflowRun, last: Checkpoint | None) -> None:
        """Async twin of `delete_unchanged`."""
        await sync_to_async(self.delete_unchanged, thread_sensitive=True)(run, last)

    async def alist_by_workflow(self, workflow_name: str, limit: int = 100) -> list[WorkflowRun]:
        """Async twin of `list_by_workflow`."""
        return await self.alist_runs(workflow_name=workflow_name, limit=limit)

    async def aiter_runs(self, **filters: Unpack[RunFilters]) -> AsyncIterator[WorkflowRun]:
        """Async twin of `iter_runs`."""
        last: WorkflowRun | None = None
        while page := await self.alist_runs(before=last, limit=PAGE_SIZE, **filters):
            last = page[-1]
            for run in page:
                yield run

    async def afail_if_stalled(self, run_id: str, idle: timedelta) -> bool:
        """Async twin of `fail_if_stalled`."""
        return await sync_to_async(self.fail_if_stalled, thread_sensitive=True)(run_id, idle)

    async def afail_stalled(self, idle: timedelta) -> int:
        """Async twin of `fail_stalled`."""
        return await sync_to_async(self.fail_stalled, thread_sensitive=True)(idle)


class AbstractExecutionStateRepository(ABC):
    """The checkpoints of the runs: the state after every node."""

    @abstractmethod
    def save_state(self, run_id: str, state_data: dict[str, Any], node_id: str) -> int:
        """Append a checkpoint to a run.

        Concurrent calls for one run all succeed, and their steps are contiguous.

        Args:
            run_id: which run.
            state_data: a dict of JSON values, or of dates, times, Decimals, UUIDs and
                pydantic models, which come back in their JSON form.
            node_id: the node after which the state is this; 1 to 128 characters.

        Returns:
            The step of the checkpoint: 0, 1, 2, … within the run.

        Raises:
            RunNotFoundError: if there is no such run.
            InvalidPayloadError: (a TypeError) unless `state_data` is a dict of JSON values.
            InvalidFieldError: (a ValueError) for NaN or an infinity in it, or a
                `node_id` that is too long.
        """

    @abstractmethod
    def get_latest_checkpoint(self, run_id: str) -> Checkpoint | None:
        """Give the newest checkpoint of a run, or None if there is none."""

    @abstractmethod
    def get_state(self, run_id: str, step: int) -> Checkpoint | None:
        """Give the checkpoint with that step, or None."""

    @abstractmethod
    def iter_state_history(self, run_id: str, *, after: int = -1) -> Iterator[Checkpoint]:
        """Give the checkpoints of a run, oldest first, in constant memory.

        Args:
            run_id: which run.
            after: begin after this step.
        """

    @abstractmethod
    def delete_states(self, run_id: str, *, keep_last: int = 0) -> int:
        """Delete the older checkpoints of a run.

        What is kept stays readable, and the history goes on from there. After all are
        deleted (`keep_last=0`), the next step is 0 again.

        Args:
            run_id: which run.
            keep_last: how many of the newest to keep.

        Returns:
            How many checkpoints were deleted.

        Raises:
            RunNotFoundError: if there is no such run.
        """

    @abstractmethod
    def append(self, run_id: str, checkpoints: Iterable[Checkpoint]) -> int:
        """Append checkpoints exactly as they are, steps and times too; for copying between stores.

        Each has the step after the one before. The first may have any step if the run has no
        states. A backend with transactions appends all or none, and holds all in memory; of
        another one, the first may be there if the call fails.

        Returns:
            How many there were.

        Raises:
            RunNotFoundError: if there is no such run.
            StepConflictError: if a step does not follow.
            InvalidFieldError: (a ValueError) as for `save_state`.
        """

    def writer(self, run_id: str) -> StateWriter:
        """Give an object that appends checkpoints to one run, for whoever writes many.

        A backend can override it with one that remembers what it wrote.
        """
        return StateWriter(self, run_id)

    def get_latest_state(self, run_id: str) -> dict[str, Any] | None:
        """Give the newest state of a run, or None if there is none."""
        checkpoint = self.get_latest_checkpoint(run_id)
        return None if checkpoint is None else checkpoint["state_data"]

    def get_state_history(self, run_id: str) -> list[Checkpoint]:
        """Give all checkpoints of a run, oldest first."""
        return list(self.iter_state_history(run_id))

    async def asave_state(self, run_id: str, state_data: dict[str, Any], node_id: str) -> int:
        """Async twin of `save_state`."""
        return await sync_to_async(self.save_state, thread_sensitive=True)(
            run_id, state_data, node_id
        )

    async def aappend(self, run_id: str, checkpoints: Iterable[Checkpoint]) -> int:
        """Async twin of `append`."""
        return await sync_to_async(self.append, thread_sensitive=True)(run_id, checkpoints)

    async def aget_latest_checkpoint(self, run_id: str) -> Checkpoint | None:
        """Async twin of `get_latest_checkpoint`."""
        return await sync_to_async(self.get_latest_checkpoint, thread_sensitive=True)(run_id)

    async def aget_state(self, run_id: str, step: int) -> Checkpoint | None:
        """Async twin of `get_state`."""
        return await sync_to_async(self.get_state, thread_sensitive=True)(run_id, step)

    async def aiter_state_history(
        self, run_id: str, *, after: int = -1
    ) -> AsyncIterator[Checkpoint]:
        """Async twin of `iter_state_history`."""
        history = self.iter_state_history(run_id, after=after)
        while checkpoint := await sync_to_async(_next_or_none, thread_sensitive=True)(history):
            yield checkpoint

    async def adelete_states(self, run_id: str, *, keep_last: int = 0) -> int:
        """Async twin of `delete_states`."""
        return await sync_to_async(self.delete_states, thread_sensitive=True)(
            run_id, keep_last=keep_last
        )

    async def aget_latest_state(self, run_id: str) -> dict[str, Any] | None:
        """Async twin of `get_latest_state`."""
        return await sync_to_async(self.get_latest_state, thread_sensitive=True)(run_id)

    async def aget_state_history(self, run_id: str) -> list[Checkpoint]:
        """Async twin of `get_state_history`."""
        return await sync_to_async(self.get_state_history, thread_sensitive=True)(run_id)


class StateWriter:
    """Appends checkpoints to one run; for one thread at a time.

    Attributes:
        run_id: which run.
    """

    def __init__(self, states: AbstractExecutionStateRepository, run_id: str) -> None:
        self.run_id = run_id
        self._store = states

    def save_state(self, state_data: dict[str, Any], node_id: str) -> int:
        """Do what `AbstractExecutionStateRepository.save_state` does, for this run."""
        return self._store.save_state(self.run_id, state_data, node_id)

    async def asave_state(self, state_data: dict[str, Any], node_id: str) -> int:
        """Async twin of `save_state`."""
        return await sync_to_async(self.save_state, thread_sensitive=True)(state_data, node_id)

    def append(self, checkpoints: Iterable[Checkpoint]) -> int:
        """Do what `AbstractExecutionStateRepository.append` does, for this run."""
        return self._store.append(self.run_id, checkpoints)

    async def aappend(self, checkpoints: Iterable[Checkpoint]) -> int:
        """Async twin of `append`."""
        return await sync_to_async(self.append, thread_sensitive=True)(checkpoints)


class StorageBackend(NamedTuple):
    """Both repositories of one store: ``runs, states = create_storage_backend()``."""

    runs: AbstractWorkflowRunRepository
    states: AbstractExecutionStateRepository


def stalled_message(idle: timedelta) -> str:
    """Give the error_message of a run that gave no sign of life for longer."""
    # The time tells this failure from one before; the recorder relies on that.
    return f"Stalled: no sign of life for more than {idle}, found at {timezone.now()}."


def _next_or_none(iterator: Iterator[_T]) -> _T | None:
    return next(iterator, None)

"""The contract: what every backend promises, for callers and for authors of backends.

A backend implements the abstract methods; everything else is written once, here, on top
of them. Every method has an async twin with the same arguments and an ``a`` before its
name, directly under it. Errors are those of `workflow_storage.exceptions`; any method may also raise
`StorageUnavailableError`. A write is atomic, and durable when the call returns; it joins
the caller's transaction if the backend has transactions and one is open.
"""

from __future__ import annotations

import functools
import itertools
from abc import ABC, abstractmethod
from contextlib import nullcontext
from typing import (
    TYPE_CHECKING,
    Any,
    Concatenate,
    NamedTuple,
    NotRequired,
    ParamSpec,
    Required,
    Self,
    TypedDict,
    TypeVar,
    Unpack,
)

from asgiref.sync import sync_to_async
from django.utils import timezone

from workflow_storage.deltas import (
    EncodedCheckpoint,
    History,
    encode_state,
    whole_state,
)
from workflow_storage.exceptions import (
    DamagedFieldError,
    RunNotFoundError,
    StorageError,
    StorageUnavailableError,
)
from workflow_storage.paging import PageLength, emptied
from workflow_storage.serialization import state_text
from workflow_storage.summaries import RunSummary, Summaries, valid_groups

if TYPE_CHECKING:
    from collections.abc import (
        AsyncIterator,
        Callable,
        Coroutine,
        Iterable,
        Iterator,
        Mapping,
        Sequence,
    )
    from contextlib import AbstractContextManager
    from datetime import datetime, timedelta

    from django.core.checks import CheckMessage

    from workflow_storage.models import WorkflowRun

_S = TypeVar("_S", bound="HasAsyncTwins")
_T = TypeVar("_T")
_P = ParamSpec("_P")

UNREADABLE = (StorageError, ArithmeticError, AttributeError, TypeError, ValueError)
"""What reading a run that is damaged raises: the drivers, and Django, say nothing of their own."""


def async_twin(
    method: Callable[Concatenate[_S, _P], _T],
) -> Callable[Concatenate[_S, _P], Coroutine[Any, Any, _T]]:
    """Make the async twin of a method, which carries it out `in_thread`.

    The method is looked up by its name, so that the twin of a subclass is that of its own method.
    """
    name = method.__name__

    async def twin(self: _S, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        call: Callable[_P, _T] = getattr(self, name)
        return await self.in_thread(call, *args, **kwargs)

    functools.update_wrapper(twin, method, updated=())  # its __dict__ may say that it is abstract
    twin.__name__ = f"a{name}"
    twin.__qualname__ = f"{method.__qualname__.removesuffix(name)}a{name}"
    twin.__doc__ = f"Async twin of `{name}`."
    return twin


class HasAsyncTwins:
    """What has methods with async twins, and says where these carry them out."""

    async def in_thread(self, call: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Return what a call returns that is carried out in Django's thread for sync code.

        A backend can override it with threads of its own, or write native twins.
        """
        return await sync_to_async(call, thread_sensitive=True)(*args, **kwargs)


class Checkpoint(TypedDict):
    """The state of a run after one of its nodes."""

    step: int
    """0, 1, 2, … within the run."""
    node_id: str
    state_data: dict[str, Any]
    created_at: datetime
    attempt: NotRequired[int | None]
    """The attempt that saved it; None where that is not known, as for those that follow.

    What is read has all of them; one that is appended may lack them.
    """
    duration_seconds: NotRequired[float | None]
    """Seconds that the node took."""
    tokens: NotRequired[int | None]
    """Tokens used since the checkpoint before."""
    cost_usd: NotRequired[float | None]
    """USD spent since the checkpoint before."""


class Step(TypedDict):
    """A checkpoint without its state."""

    step: int
    node_id: str
    created_at: datetime
    attempt: int | None
    duration_seconds: float | None
    tokens: int | None
    cost_usd: float | None


class Attempt(NamedTuple):
    """A time that somebody worked on a run."""

    number: int
    """1, 2, 3, … within the run."""
    started_at: datetime | None
    ended_at: datetime | None
    """None while it goes on."""
    status: str
    """What the run was when it ended; ``pending`` for one that was suspended."""
    error_message: str | None
    node: str | None
    """Where it was, as last heard by a checkpoint or a heartbeat."""
    worker: str | None
    """Who worked: host and process id."""


class Damage(NamedTuple):
    """Something that is not as it has to be in a store."""

    run_id: str | None
    """None if it is not of one run."""
    problem: str
    """What is wrong, in a sentence without its full stop."""
    repaired: bool = False
    """Whether it was, and is as it has to be now."""


class NodeUsage(TypedDict, total=False):
    """What a checkpoint says of its node; what is left out, or None, is not known."""

    duration_seconds: float | None
    tokens: int | None
    cost_usd: float | None


class Totals(TypedDict, total=False):
    """The totals of a run; what is left out stays as it is."""

    total_tokens: int | None
    total_cost_usd: float | None


class RunFilters(TypedDict, total=False):
    """Which runs; a filter that is left out, or None, matches every run."""

    workflow_name: str | Iterable[str] | None
    """One workflow, or several."""
    status: str | Iterable[str] | None
    """One status, or several."""
    started_after: datetime | None
    """Runs started at this time or later."""
    started_before: datetime | None
    """Runs started earlier than this time."""
    labels: Mapping[str, str] | None
    """Runs that have all of these labels."""
    parent_id: str | None
    """Runs that this run started, or that were forked from it."""
    waiting: bool | None
    """Runs that were suspended and wait for something; with False, all others."""
    error: str | None
    """Runs whose error_message has this text, upper or lower case; of letters beyond ASCII as the
    database compares them. Redis has no search over errors, and refuses it."""


class FinishedRunFilters(TypedDict, total=False):
    """Which runs that have ended; what is left out, or None, matches every one."""

    before: Required[datetime]
    """Runs that ended (`completed_at`) before this time."""
    workflow_name: str | Iterable[str] | None
    """One workflow, or several."""
    statuses: str | Iterable[str]
    """One terminal status, or several."""
    labels: Mapping[str, str] | None
    """Runs that have all of these labels."""
    parent_id: str | None
    """Runs that this run started, or that were forked from it."""
    keep_last: int
    """Of each workflow, spare so many of the newest by start, among those that match all of this,
    whenever they ended."""
    limit: int | None
    """So many at most, those that ended first."""


class AbstractWorkflowRunRepository(HasAsyncTwins, ABC):
    """The stored runs, as a collection."""

    @abstractmethod
    def add(self, run: WorkflowRun) -> None:
        """Store a new run.

        A run that is added in a terminal status without `completed_at` is completed now.

        Raises:
            RunAlreadyExistsError: if its id is taken; the stored run is untouched.
            InvalidFieldError: (a ValueError) if a field cannot be stored as it is.
        """

    aadd = async_twin(add)

    @abstractmethod
    def get(self, run_id: str) -> WorkflowRun | None:
        """Return the run with that id, or None."""

    aget = async_twin(get)

    @abstractmethod
    def list_runs(
        self,
        *,
        before: str | WorkflowRun | None = None,
        limit: int = 100,
        **filters: Unpack[RunFilters],
    ) -> list[WorkflowRun]:
        """Return one page of the matching runs, newest `started_at` first, then by id, descending.

        Args:
            before: a run, or its id; the page begins after that run in the order above.
                A run object serves even when the run itself has been deleted since.
            limit: how many runs at most.
            **filters: see `RunFilters`.

        Raises:
            RunNotFoundError: if `before` is the id of no run.
            InvalidStatusError: if a status is no status.
        """

    alist_runs = async_twin(list_runs)

    @abstractmethod
    def count_runs(self, **filters: Unpack[RunFilters]) -> int:
        """Count the matching runs."""

    acount_runs = async_twin(count_runs)

    def list_ids(self, beginning: str, *, limit: int = 10) -> list[str]:
        """Return the ids that begin with a text, for who has typed only the beginning of one.

        A backend can override it with one that reads no runs.

        Args:
            beginning: the text; with an empty one, any ids.
            limit: how many at most; where there are more, which of them is not said.

        Returns:
            The ids in their order.
        """
        matching = (run.id for run in self.iter_runs() if run.id.startswith(beginning))
        return sorted(itertools.islice(matching, limit))

    alist_ids = async_twin(list_ids)

    @abstractmethod
    def update(self, /, run_id: str, *, attempt: int | None = None, **fields: Any) -> None:
        """Change fields of a run, all or none.

        Args:
            run_id: which run.
            attempt: change them only if the run is running, in this attempt.
            **fields: any of inputs, outputs, config_snapshot, error_message (cut in its middle
                beyond 20,000 characters), total_tokens, total_cost_usd, labels (in place of those
                that there are); or add_labels (a dict) and remove_labels (names), which change some
                of them, whoever else changes others at the same time.

        Raises:
            RunNotFoundError: if there is no such run.
            RunLostError: if the run is not running in that attempt.
            InvalidFieldError: (a ValueError) for an unknown or fixed field, or a value
                that cannot be stored.
        """

    aupdate = async_twin(update)

    @abstractmethod
    def update_status(
        self,
        /,
        run_id: str,
        status: str,
        *,
        expected: str | Iterable[str] | None = None,
        attempt: int | None = None,
        **fields: Any,
    ) -> None:
        """Change the status of a run and its result fields in one atomic step.

        ``running`` begins an attempt, also if the run is running: `attempt` counts one more, and
        `attempt_started_at` is now. A terminal status sets `completed_at` (now); any other one
        clears it, and sets `heartbeat_at`: it is a sign of life, and the run's last change is
        never set back. Leaving ``running``, and only that, adds the time since
        `attempt_started_at` to `duration_seconds`, never less than 0. What an attempt ended with
        is kept for `list_attempts` when the run goes on; one that becomes ``pending`` with an
        error_message, to be tried again, has failed with that.

        Two tries with the same time, `attempt_started_at` or `completed_at`, and the same
        `attempt` are one: the second one finds what the first one did, and succeeds.

        Args:
            run_id: which run.
            status: the new status.
            expected: change it only if the run is in this status, or one of these.
            attempt: change it only if the run is in this attempt, and ``running`` unless
                `expected` says otherwise. So of several who begin with the attempt that they
                read, one succeeds, in the next attempt.
            **fields: as for `update`; with ``running`` attempt_started_at, worker and
                current_node; with ``pending`` waiting_for; with a terminal status completed_at,
                duration_seconds (seconds) and current_node.

        Raises:
            RunNotFoundError: if there is no such run.
            InvalidStatusError: if a status is no status.
            StatusConflictError: if the run is in another status than `expected`.
            RunLostError: (a StatusConflictError) with `attempt`, if the run is not in it.
            InvalidFieldError: as for `update`.
        """

    aupdate_status = async_twin(update_status)

    @abstractmethod
    def heartbeat(
        self, run_id: str, *, attempt: int | None = None, node: str | None = None
    ) -> None:
        """Note that the run is alive now.

        Args:
            run_id: which run.
            attempt: note it only if the run is running, in this attempt.
            node: the node that it is in; None if that is not known.

        Raises:
            RunNotFoundError: if there is no such run.
            RunLostError: if the run is not running in that attempt.
        """

    aheartbeat = async_twin(heartbeat)

    @abstractmethod
    def delete(self, run_id: str) -> None:
        """Delete a run and all its states.

        Raises:
            RunNotFoundError: if there is no such run.
        """

    adelete = async_twin(delete)

    @abstractmethod
    def delete_finished(
        self,
        *,
        batch_size: int = 1000,
        on_batch: Callable[[int], object] | None = None,
        **which: Unpack[FinishedRunFilters],
    ) -> int:
        """Delete runs that ended before a time, with their states, batch by batch.

        Each batch is a transaction of its own, so what was deleted stays deleted if the
        call is interrupted; memory does not grow with the number of runs. A run that cannot be
        deleted, for something else refers to it, is left, and named in the log in the end.

        Args:
            batch_size: runs in a batch.
            on_batch: called after each batch, with how many runs were deleted in it; for who shows
                how far it is.
            **which: see `FinishedRunFilters`.

        Returns:
            How many runs were deleted.

        Raises:
            InvalidStatusError: if a status is no status, or not a terminal one.
        """

    adelete_finished = async_twin(delete_finished)

    @abstractmethod
    def iter_finished(self, **which: Unpack[FinishedRunFilters]) -> Iterator[WorkflowRun]:
        """Yield the runs that `delete_finished` would delete, in memory bounded by bytes.

        In the order of their ends where the store has them in one order, as databases do.

        Args:
            **which: see `FinishedRunFilters`.
        """

    async def aiter_finished(
        self, **which: Unpack[FinishedRunFilters]
    ) -> AsyncIterator[WorkflowRun]:
        """Async twin of `iter_finished`."""
        finished = self.iter_finished(**which)
        while run := await self.in_thread(_next_or_none, finished):
            yield run

    @abstractmethod
    def list_stalled(
        self,
        idle: timedelta,
        *,
        before: str | WorkflowRun | None = None,
        limit: int | None = None,
        **filters: Unpack[RunFilters],
    ) -> list[WorkflowRun]:
        """Return the running runs without a sign of life for longer than `idle`.

        Signs of life are the start of the attempt, a heartbeat and a checkpoint. Newest start of
        the run first.

        Args:
            idle: how long.
            before: as for `list_runs`: the page after this run.
            limit: how many at most; None for all.
            **filters: see `RunFilters`.
        """

    alist_stalled = async_twin(list_stalled)

    @abstractmethod
    def fail_stalled(self, idle: timedelta, *, run_id: str | None = None) -> int:
        """Set the runs of `list_stalled` to failed, with an error_message that says so.

        Each is decided on as it is set: a run that finishes meanwhile keeps its result, and one
        that gives a sign of life goes on.

        Args:
            idle: see `list_stalled`.
            run_id: only this run.

        Returns:
            How many runs were set to failed.
        """

    afail_stalled = async_twin(fail_stalled)

    @abstractmethod
    def list_attempts(self, run_id: str) -> list[Attempt]:
        """Return all attempts of a run, oldest first, the current one last.

        Raises:
            RunNotFoundError: if there is no such run.
        """

    alist_attempts = async_twin(list_attempts)

    @abstractmethod
    def put(
        self,
        run: WorkflowRun,
        *,
        over: WorkflowRun | None = None,
        attempts: Iterable[Attempt] = (),
    ) -> None:
        """Store a run exactly as it is, every field and time; for copying between stores.

        Args:
            run: the run.
            over: the stored run that it replaces, as it was read; its states stay. None for a
                run that is not stored yet.
            attempts: those that `list_attempts` returns of it; the one that the run itself
                tells of is not kept twice.

        Raises:
            RunAlreadyExistsError: if `over` is None and the id is taken.
            RunNotFoundError: if there is no run to replace.
            RunChangedError: if the stored run is not as `over`.
            InvalidFieldError: (a ValueError) if a field cannot be stored as it is.
        """

    aput = async_twin(put)

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

    adelete_unchanged = async_twin(delete_unchanged)

    def summarize(
        self, *, by: str | Iterable[str] = ("workflow_name",), **filters: Unpack[RunFilters]
    ) -> list[RunSummary]:
        """Sum up the matching runs, group by group, in the order of the groups.

        A backend can override it with one that counts where the runs are.

        Args:
            by: what the groups are: any of workflow_name, status, hour, day, week, month (of the
                start, in the current time zone of Django) and ``label:NAME``. None of them: all runs
                are one group.
            **filters: see `RunFilters`.

        Returns:
            See `RunSummary`. No run, no group.

        Raises:
            ValueError: for an unknown group.
        """
        groups, summaries = valid_groups(by), Summaries()
        for run in self.iter_runs(**filters):
            summaries.add_run(run, groups)
        return summaries.results()

    async def asummarize(
        self, *, by: str | Iterable[str] = ("workflow_name",), **filters: Unpack[RunFilters]
    ) -> list[RunSummary]:
        """Async twin of `summarize`."""
        groups, summaries = valid_groups(by), Summaries()
        async for run in self.aiter_runs(**filters):
            summaries.add_run(run, groups)
        return summaries.results()

    def list_by_workflow(self, workflow_name: str, limit: int = 100) -> list[WorkflowRun]:
        """Return the newest runs of a workflow, in the order of `list_runs`."""
        return self.list_runs(workflow_name=workflow_name, limit=limit)

    async def alist_by_workflow(self, workflow_name: str, limit: int = 100) -> list[WorkflowRun]:
        """Async twin of `list_by_workflow`."""
        return await self.alist_runs(workflow_name=workflow_name, limit=limit)

    def iter_runs(
        self,
        *,
        before: str | WorkflowRun | None = None,
        limit: int | None = None,
        **filters: Unpack[RunFilters],
    ) -> Iterator[WorkflowRun]:
        """Yield all matching runs in the order of `list_runs`, in memory bounded by bytes.

        They are read in pages of 20, which grow while they are below 1 MB and shrink above 8.
        Runs may be added, changed and deleted meanwhile; each is given at most once.

        Args:
            before: as for `list_runs`: those after this run.
            limit: how many at most; None for all.
            **filters: see `RunFilters`.
        """
        length = PageLength(limit)
        last = before
        while page := self.list_runs(before=last, limit=length.runs, **filters):
            last = page[-1]
            length.after(page)
            yield from emptied(page)

    async def aiter_runs(
        self,
        *,
        before: str | WorkflowRun | None = None,
        limit: int | None = None,
        **filters: Unpack[RunFilters],
    ) -> AsyncIterator[WorkflowRun]:
        """Async twin of `iter_runs`."""
        length = PageLength(limit)
        last = before
        while page := await self.alist_runs(before=last, limit=length.runs, **filters):
            last = page[-1]
            length.after(page)
            for run in emptied(page):
                yield run


class AbstractExecutionStateRepository(HasAsyncTwins, ABC):
    """The checkpoints of the runs: the state after every node."""

    @abstractmethod
    def save_state(
        self,
        run_id: str,
        state_data: Any,
        node_id: str,
        *,
        attempt: int | None = None,
        totals: Totals | None = None,
        **usage: Unpack[NodeUsage],
    ) -> int:
        """Append a checkpoint to a run.

        Concurrent calls for one run all succeed, and their steps are contiguous.

        Args:
            run_id: which run.
            state_data: a dict, dataclass or pydantic model of JSON values, or of dates, times, Decimals, UUIDs,
                dataclasses and pydantic models, which come back in their JSON form; see
                `workflow_storage.serialization.dump_json`.
            node_id: the node after which the state is this; 1 to 128 characters.
            attempt: append it only if the run is running, in this attempt.
            totals: what the totals of the run are from now on, stored with the checkpoint or not
                at all. With them, or with an attempt, `current_node` of the run is this node.
            **usage: see `NodeUsage`; kept with the checkpoint, not added to the totals.

        Returns:
            The step of the checkpoint: 0, 1, 2, … within the run.

        Raises:
            RunNotFoundError: if there is no such run.
            RunLostError: if the run is not running in that attempt.
            InvalidPayloadError: (a TypeError) unless the JSON form of `state_data` is an object.
            InvalidFieldError: (a ValueError) for NaN or an infinity in it, two keys that are one
                in JSON, or a `node_id` that is too long.
        """

    asave_state = async_twin(save_state)

    @abstractmethod
    def get_latest_checkpoint(self, run_id: str) -> Checkpoint | None:
        """Return the newest checkpoint of a run, or None if there is none."""

    aget_latest_checkpoint = async_twin(get_latest_checkpoint)

    @abstractmethod
    def get_state(self, run_id: str, step: int) -> Checkpoint | None:
        """Return the checkpoint with that step, or None."""

    aget_state = async_twin(get_state)

    @abstractmethod
    def iter_state_history(self, run_id: str, *, after: int = -1) -> Iterator[Checkpoint]:
        """Yield the checkpoints of a run, oldest first, in constant memory.

        Args:
            run_id: which run.
            after: begin after this step.
        """

    async def aiter_state_history(
        self, run_id: str, *, after: int = -1
    ) -> AsyncIterator[Checkpoint]:
        """Async twin of `iter_state_history`."""
        history = self.iter_state_history(run_id, after=after)
        while checkpoint := await self.in_thread(_next_or_none, history):
            yield checkpoint

    def iter_steps(self, run_id: str, *, after: int = -1) -> Iterator[Step]:
        """Yield the checkpoints of a run without their states, oldest first, in constant memory.

        What a list or a timeline needs. A backend can override it with one that reads no states.

        Args:
            run_id: which run.
            after: begin after this step.
        """
        for checkpoint in self.iter_state_history(run_id, after=after):
            yield step_of(checkpoint)

    async def aiter_steps(self, run_id: str, *, after: int = -1) -> AsyncIterator[Step]:
        """Async twin of `iter_steps`."""
        steps = self.iter_steps(run_id, after=after)
        while step := await self.in_thread(_next_or_none, steps):
            yield step

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

    adelete_states = async_twin(delete_states)

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

    aappend = async_twin(append)

    def iter_encoded(self, run_id: str, *, after: int = -1) -> Iterator[EncodedCheckpoint]:
        """Yield the checkpoints of a run as they are stored, oldest first, in constant memory.

        Each state is rebuilt once, but not decoded. A backend can override it with one that gives
        what it has stored; here they are encoded.

        Args:
            run_id: which run.
            after: begin after this step.

        Raises:
            DamagedStateError: at a state that cannot be rebuilt.
        """
        history = History(run_id)
        for checkpoint in self.iter_state_history(run_id, after=after):
            _, *columns = step_of(checkpoint).values()
            text = state_text(checkpoint["state_data"])
            stored = encode_state(text, history.base(checkpoint["step"]))
            yield history.encoded(checkpoint["step"], stored, text, columns)

    async def aiter_encoded(
        self, run_id: str, *, after: int = -1
    ) -> AsyncIterator[EncodedCheckpoint]:
        """Async twin of `iter_encoded`."""
        history = self.iter_encoded(run_id, after=after)
        while checkpoint := await self.in_thread(_next_or_none, history):
            yield checkpoint

    def append_encoded(self, run_id: str, checkpoints: Iterable[EncodedCheckpoint]) -> int:
        """Append checkpoints as `iter_encoded` gives them; as for `append`, which see.

        A backend can override it with one that stores the bytes as they are, where the state that a
        delta is based on is the same here. Otherwise a state is encoded anew, or stored whole.
        """
        return self.append(run_id, (checkpoint_of(run_id, one) for one in checkpoints))

    aappend_encoded = async_twin(append_encoded)

    def copy_states(self, run_id: str, target_run_id: str, *, through: int) -> int:
        """Append the checkpoints of a run up to a step to another run of the store; for forks.

        A backend can override it with one that copies them as they are stored.

        Args:
            run_id: whose checkpoints.
            target_run_id: a run without states.
            through: the last step.

        Returns:
            How many there were.

        Raises:
            RunNotFoundError: if there is no other run.
            StepConflictError: if the other run has states.
        """
        history = self.iter_state_history(run_id)
        return self.append(
            target_run_id, itertools.takewhile(lambda one: one["step"] <= through, history)
        )

    acopy_states = async_twin(copy_states)

    def writer(self, run_id: str, *, attempt: int | None = None) -> StateWriter:
        """Return an object that appends checkpoints to one run, for whoever writes many.

        A backend can override it with one that remembers what it wrote.

        Args:
            run_id: which run.
            attempt: save states only while the run is running, in this attempt; what is copied with
                `append` brings its own attempts, and is not conditional.
        """
        return StateWriter(self, run_id, attempt)

    def get_latest_state(self, run_id: str) -> dict[str, Any] | None:
        """Return the newest state of a run, or None if there is none."""
        checkpoint = self.get_latest_checkpoint(run_id)
        return None if checkpoint is None else checkpoint["state_data"]

    aget_latest_state = async_twin(get_latest_state)

    def get_state_history(self, run_id: str) -> list[Checkpoint]:
        """Return all checkpoints of a run, oldest first."""
        return list(self.iter_state_history(run_id))

    aget_state_history = async_twin(get_state_history)


class StateWriter(HasAsyncTwins):
    """Appends checkpoints to one run; for one thread at a time, and for any number of tasks.

    Attributes:
        run_id: which run.
        attempt: the attempt that it writes in; None if it writes whatever the run is in.
        last_saved: the step and the JSON text of the state that it saved last, for who wants the
            state as it can be read back; None if it does not keep them.
    """

    def __init__(
        self, states: AbstractExecutionStateRepository, run_id: str, attempt: int | None = None
    ) -> None:
        self.run_id = run_id
        self.attempt = attempt
        self.last_saved: tuple[int, bytes] | None = None
        self._repository = states

    async def in_thread(self, call: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Return what a call returns that is carried out where the repository's are."""
        return await self._repository.in_thread(call, *args, **kwargs)

    def save_state(
        self,
        state_data: Any,
        node_id: str,
        *,
        totals: Totals | None = None,
        **usage: Unpack[NodeUsage],
    ) -> int:
        """Do what `AbstractExecutionStateRepository.save_state` does, for this run."""
        return self._repository.save_state(
            self.run_id, state_data, node_id, attempt=self.attempt, totals=totals, **usage
        )

    asave_state = async_twin(save_state)

    def append(self, checkpoints: Iterable[Checkpoint]) -> int:
        """Do what `AbstractExecutionStateRepository.append` does, for this run."""
        return self._repository.append(self.run_id, checkpoints)

    aappend = async_twin(append)

    def append_encoded(self, checkpoints: Iterable[EncodedCheckpoint]) -> int:
        """Do what `AbstractExecutionStateRepository.append_encoded` does, for this run."""
        return self._repository.append_encoded(self.run_id, checkpoints)

    aappend_encoded = async_twin(append_encoded)


class _Repositories(NamedTuple):
    runs: AbstractWorkflowRunRepository
    states: AbstractExecutionStateRepository


class StorageBackend(_Repositories):
    """One store, which unpacks into both repositories: ``runs, states = create_storage_backend()``.

    A backend overrides the methods where it has something to do.

    Attributes:
        runs: its runs.
        states: the checkpoints of its runs.
        name: what names it to people, such as the alias of a database or a URL without password.
        alias: the alias of the Django database that holds its tables, from which the admin and
            the models read; None for a store that is no Django database.
    """

    def __new__(
        cls,
        runs: AbstractWorkflowRunRepository,
        states: AbstractExecutionStateRepository,
        **kwargs: Any,
    ) -> Self:
        return super().__new__(cls, runs, states)

    def __init__(
        self,
        runs: AbstractWorkflowRunRepository,
        states: AbstractExecutionStateRepository,
        *,
        name: str = "",
        alias: str | None = None,
    ) -> None:
        self.name = name or type(runs).__name__
        self.alias = alias

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

    def check(self) -> list[CheckMessage]:
        """Return what ``manage.py check`` says about the store, if it is the project's own."""
        return []

    def check_indexes(self, runs: Sequence[WorkflowRun], *, repair: bool = False) -> list[Damage]:
        """Return where what the store keeps to find some runs by is not equal to the runs.

        Runs that change meanwhile are no damage.

        Args:
            runs: the runs, as they were read a moment ago.
            repair: make it equal to them.
        """
        return []

    def newest_ids(
        self, *, before: WorkflowRun | None, limit: int, **filters: Unpack[RunFilters]
    ) -> list[str]:
        """Return the ids of the runs that `list_runs` lists, also of runs that cannot be read."""
        return [run.id for run in self.runs.list_runs(before=before, limit=limit, **filters)]

    def readable_pages(
        self,
        *,
        before: str | WorkflowRun | None = None,
        limit: int | None = None,
        **filters: Unpack[RunFilters],
    ) -> Iterator[list[WorkflowRun | Damage]]:
        """Yield what `iter_runs` yields, page by page; of a run that cannot be read, what is wrong.

        For what goes through runs and is not to end at a damaged one. A page is read at once; where
        that fails, its runs are read one by one.

        Args:
            before: as for `list_runs`: those after this run.
            limit: how many at most, those that cannot be read among them; None for all.
            **filters: see `RunFilters`.
        """
        if isinstance(before, str):
            last = self.runs.get(before)
            if last is None:
                raise RunNotFoundError(before)
        else:
            last = before
        length = PageLength(limit)
        # Runs that no page can begin after, for they, or their start, cannot be read.
        behind: set[str] = set()
        while page := self._readable_page(last, length.runs, behind, filters):
            for run in page:
                if isinstance(run, Damage):
                    behind.add(str(run.run_id))
                elif run.started_at is None:
                    behind.add(run.id)
                else:
                    last = run
                    behind.clear()
            length.after(page)
            yield page

    def _readable_page(
        self, before: WorkflowRun | None, size: int, behind: set[str], filters: RunFilters
    ) -> list[WorkflowRun | Damage]:
        """Return the next runs.

        Args:
            before: the run after which to begin.
            size: how many.
            behind: the ids of runs after that, which are left out.
            filters: which runs.
        """
        if not size:
            return []
        if not behind:
            try:
                return [*self.runs.list_runs(before=before, limit=size, **filters)]
            except StorageUnavailableError:
                raise
            except UNREADABLE:
                pass
        while True:
            listed = self.newest_ids(before=before, limit=size + len(behind), **filters)
            run_ids = [run_id for run_id in listed if run_id not in behind][:size]
            page = [run for run in map(self.read_run, run_ids) if run is not None]
            if page or not run_ids:
                return page
            behind.update(run_ids)  # deleted meanwhile

    def read_run(self, run_id: str) -> WorkflowRun | Damage | None:
        """Return a run, what is wrong with it if it cannot be read, or None if there is none."""
        try:
            return self.runs.get(run_id)
        except StorageUnavailableError:
            raise
        except DamagedFieldError as exc:
            return Damage(run_id, f"it cannot be read: {exc.problem}")
        except UNREADABLE as exc:
            return Damage(run_id, f"it cannot be read: {exc}")

    def known_fields(self, run_id: str) -> dict[str, Any]:
        """Return those fields of a run that can be read, of one that cannot be read as a whole."""
        return {"id": run_id}

    def check_whole(self, *, repair: bool = False) -> Iterator[Damage]:
        """Yield what is wrong with the store, and with runs that no list would show.

        It looks at all that is stored, in constant memory.

        Args:
            repair: what can be repaired without loss.
        """
        yield from ()

    def close(self) -> None:
        """Close the connections of this process; those that are used again open again."""

    def on_commit(self, callback: Callable[[], object]) -> None:
        """Call something once what was written is committed; at once without a transaction."""
        callback()

    def in_transaction(self) -> bool:
        """Whether the caller has a transaction open here, which what is written would join.

        That of a `TestCase`, which stands for the whole database, is none of the caller's.
        """
        return False

    async def ain_transaction(self) -> bool:
        """Async twin of `in_transaction`."""
        return self.in_transaction()

    def beside(self) -> AbstractContextManager[Callable[..., None]]:
        """Let the calling thread send heartbeats beside all else that uses the store.

        A store whose connections are few gives the thread one of its own, outside of any pool, and
        waits for no lock for long.

        Returns:
            A context that yields what takes the arguments of `runs.heartbeat` and does the same.
        """
        return nullcontext(self.runs.heartbeat)


def step_of(checkpoint: Checkpoint) -> Step:
    """Return a checkpoint without its state."""
    return Step(
        step=checkpoint["step"],
        node_id=checkpoint["node_id"],
        created_at=checkpoint["created_at"],
        attempt=checkpoint.get("attempt"),
        duration_seconds=checkpoint.get("duration_seconds"),
        tokens=checkpoint.get("tokens"),
        cost_usd=checkpoint.get("cost_usd"),
    )


def checkpoint_of(run_id: str, encoded: EncodedCheckpoint) -> Checkpoint:
    """Return a checkpoint with its state decoded.

    Raises:
        DamagedStateError: if its text is not that of a state.
    """
    return Checkpoint(
        step=encoded.step,
        node_id=encoded.node_id,
        state_data=whole_state(run_id, encoded.step, encoded.text),
        created_at=encoded.created_at,
        attempt=encoded.attempt,
        duration_seconds=encoded.duration_seconds,
        tokens=encoded.tokens,
        cost_usd=encoded.cost_usd,
    )


def stalled_message(idle: timedelta) -> str:
    """Return the error_message of a run that gave no sign of life for longer."""
    return f"Stalled: no sign of life for more than {idle}, found at {timezone.now()}."


def _next_or_none(iterator: Iterator[_T]) -> _T | None:
    return next(iterator, None)

"""A store in the memory of the process: the contract in dicts under a lock.

For tests of one's own code, which need no database then, and to learn from: this is all that a store
has to do. ``memory://`` is one store, and ``memory://name`` another one for each name; both are gone
with the process, and a child process that is forked has a copy.
"""

from __future__ import annotations

import itertools
import re
import threading
from collections import Counter
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeVar, Unpack, cast

from django.utils import timezone

from workflow_storage.attempts import FoundRun, ended_attempt, refusal, status_change
from workflow_storage.base import (
    AbstractExecutionStateRepository,
    AbstractWorkflowRunRepository,
    Attempt,
    Checkpoint,
    FinishedRunFilters,
    HasAsyncTwins,
    NodeUsage,
    RunFilters,
    StorageBackend,
    Totals,
    stalled_message,
)
from workflow_storage.exceptions import (
    RunAlreadyExistsError,
    RunChangedError,
    RunNotFoundError,
    StepConflictError,
    UnsupportedBackendError,
)
from workflow_storage.filters import ValidFilters, valid_filters, valid_finished
from workflow_storage.models import WorkflowRun
from workflow_storage.querysets import stalled_before
from workflow_storage.serialization import load_json, payload_json, state_text
from workflow_storage.status import RunStatus
from workflow_storage.validation import (
    MAX_NODE_ID,
    PAYLOADS,
    RUN_FIELDS,
    equal_runs,
    is_possible_id,
    label_change,
    run_fields,
    valid_attempt,
    valid_checkpoint,
    valid_count,
    valid_expected,
    valid_fields,
    valid_name,
    valid_new_run,
    valid_status,
    valid_step,
    valid_totals,
    valid_updates,
    valid_usage,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from datetime import datetime, timedelta

    from django.core.checks import CheckMessage

    from workflow_storage.config import StorageConfig

_P = ParamSpec("_P")
_T = TypeVar("_T")

_URL = re.compile(r"memory://[\w.-]*")


class _State(NamedTuple):
    """A checkpoint as it is kept."""

    step: int
    text: bytes
    node_id: str
    created_at: datetime
    attempt: int | None
    usage: Mapping[str, Any]

    def checkpoint(self) -> Checkpoint:
        fields = self._asdict()
        state, usage = load_json(fields.pop("text")), fields.pop("usage")
        return cast("Checkpoint", {**fields, "state_data": state, **usage})


class _Run(SimpleNamespace):
    """The fields of a run, the payloads as JSON text, and what belongs to it."""

    attempts: dict[int, Attempt]
    states: list[_State]

    @property
    def signs(self) -> list[datetime | None]:
        """The signs of life."""
        saved = [state.created_at for state in self.states[-1:]]
        return [self.attempt_started_at or self.started_at, self.heartbeat_at, *saved]

    @property
    def found(self) -> FoundRun:
        """What the run is now."""
        return FoundRun.of(vars(self))

    def copied(self) -> WorkflowRun:
        """Return the run as an object of the caller's own."""
        fields = {name: getattr(self, name) for name in RUN_FIELDS}
        for name in PAYLOADS:
            fields[name] = None if fields[name] is None else load_json(fields[name])
        fields["labels"] = dict(self.labels)
        return WorkflowRun.from_db(None, RUN_FIELDS, list(fields.values()))


class _Store:
    """All runs, in the order in which they were added, and the lock that whoever uses them takes."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.runs: dict[str, _Run] = {}

    def run(self, run_id: str) -> _Run:
        """Return a run, or raise that there is none."""
        run = self.find(run_id)
        if run is None:
            raise RunNotFoundError(run_id)
        return run

    def find(self, run_id: str) -> _Run | None:
        """Return a run, or None."""
        return self.runs.get(run_id) if is_possible_id(run_id) else None

    def run_in(self, run_id: str, attempt: int | None) -> _Run:
        """Return a run; if an attempt is given, one that is running in it, or raise why it is not."""
        run = self.run(run_id)
        if attempt is not None and (run.status, run.attempt) != (RunStatus.RUNNING, attempt):
            raise refusal(run_id, run.found, attempt=attempt) or RunNotFoundError(run_id)
        return run


def _kept(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return valid fields as they are kept: nothing in them is the caller's."""
    given = {name for name in PAYLOADS & fields.keys() if fields[name] is not None}
    return {**fields, **{name: payload_json(name, fields[name]) for name in given}}


class _InMemory(HasAsyncTwins):
    """What both repositories know."""

    def __init__(self, store: _Store) -> None:
        self._store = store

    async def in_thread(self, call: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Return what a call returns; it waits for nothing, so no thread is needed."""
        return call(*args, **kwargs)


class MemoryWorkflowRunRepository(_InMemory, AbstractWorkflowRunRepository):
    """The runs in memory."""

    def add(self, run: WorkflowRun) -> None:
        """See `AbstractWorkflowRunRepository.add`."""
        fields = valid_new_run(run_fields(run))
        self._insert(fields)
        vars(run).update(fields)
        run._state.adding = False

    def _insert(self, fields: Mapping[str, Any], attempts: Iterable[Attempt] = ()) -> None:
        kept = _kept(fields)
        with self._store.lock:
            if kept["id"] in self._store.runs:
                raise RunAlreadyExistsError(kept["id"])
            by_number = {attempt.number: attempt for attempt in attempts}
            self._store.runs[kept["id"]] = _Run(attempts=by_number, states=[], **kept)

    def get(self, run_id: str) -> WorkflowRun | None:
        """See `AbstractWorkflowRunRepository.get`."""
        with self._store.lock:
            run = self._store.find(run_id)
            return None if run is None else run.copied()

    def list_runs(
        self,
        *,
        before: str | WorkflowRun | None = None,
        limit: int = 100,
        **filters: Unpack[RunFilters],
    ) -> list[WorkflowRun]:
        """See `AbstractWorkflowRunRepository.list_runs`."""
        valid_count("limit", limit)
        with self._store.lock:
            return self._newest(self._matching(filters), before, limit)

    def _newest(self, found: Iterable[Any], before: Any, limit: int | None) -> list[WorkflowRun]:
        runs = sorted(found, key=_place, reverse=True)
        if before is not None:
            last = before if isinstance(before, WorkflowRun) else self._store.run(before)
            runs = [run for run in runs if _place(run) < _place(last)]
        return [run.copied() for run in runs[:limit]]

    def list_ids(self, beginning: str, *, limit: int = 10) -> list[str]:
        """See `AbstractWorkflowRunRepository.list_ids`."""
        valid_count("limit", limit)
        with self._store.lock:
            return [one for one in sorted(self._store.runs) if one.startswith(beginning)][:limit]

    def count_runs(self, **filters: Unpack[RunFilters]) -> int:
        """See `AbstractWorkflowRunRepository.count_runs`."""
        with self._store.lock:
            return sum(1 for _ in self._matching(filters))

    def _matching(self, filters: Mapping[str, Any] | ValidFilters) -> Iterator[Any]:
        valid = filters if isinstance(filters, ValidFilters) else valid_filters(filters)
        return iter(()) if valid.match_none else filter(valid.matches, self._store.runs.values())

    def update(self, /, run_id: str, *, attempt: int | None = None, **fields: Any) -> None:
        """See `AbstractWorkflowRunRepository.update`."""
        of_labels = label_change(fields)
        changes = _kept(valid_updates(fields))
        valid_attempt(attempt)
        with self._store.lock:
            run = self._store.run_in(run_id, attempt)
            if of_labels is not None:
                changes["labels"] = of_labels.applied(run.labels)
            vars(run).update(changes)

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
        """See `AbstractWorkflowRunRepository.update_status`."""
        change = status_change(valid_status(status), fields)
        valid_attempt(attempt)
        given = None if expected is None else valid_expected(expected)
        statuses = {RunStatus.RUNNING} if given is None and attempt is not None else given
        changes = _kept(change.fields)
        with self._store.lock:
            run = self._store.run(run_id)
            found = run.found
            is_refused = statuses is not None and found.status not in statuses
            if is_refused or attempt not in (None, found.attempt):
                error = refusal(run_id, found, expected=given, attempt=attempt, change=change)
                if error is not None:
                    raise error
                return
            if found.attempt and change.ends_attempt(found.status):
                run.attempts.setdefault(found.attempt, ended_attempt(found, change))
            if found.status == RunStatus.RUNNING and not change.sets_duration:
                spent = change.at - (found.attempt_started_at or found.started_at)
                seconds = max(0.0, spent.total_seconds())
                changes["duration_seconds"] = (run.duration_seconds or 0.0) + seconds
            if change.is_beginning:
                changes["attempt"] = run.attempt + 1
            if change.status.is_terminal:
                changes["completed_at"] = max(change.at, run.started_at)
            vars(run).update(changes)

    def heartbeat(
        self, run_id: str, *, attempt: int | None = None, node: str | None = None
    ) -> None:
        """See `AbstractWorkflowRunRepository.heartbeat`."""
        valid_attempt(attempt)
        changes: dict[str, Any] = {"heartbeat_at": timezone.now()}
        if node is not None:
            changes["current_node"] = valid_name("node", node, MAX_NODE_ID)
        with self._store.lock:
            vars(self._store.run_in(run_id, attempt)).update(changes)

    def delete(self, run_id: str) -> None:
        """See `AbstractWorkflowRunRepository.delete`."""
        with self._store.lock:
            del self._store.runs[self._store.run(run_id).id]

    def delete_finished(
        self,
        *,
        batch_size: int = 1000,
        on_batch: Callable[[int], object] | None = None,
        **which: Unpack[FinishedRunFilters],
    ) -> int:
        """See `AbstractWorkflowRunRepository.delete_finished`."""
        valid_count("batch_size", batch_size, minimum=1)
        with self._store.lock:
            ended = [run.id for run in self.iter_finished(**which)]
            for run_id in ended:
                del self._store.runs[run_id]
        if on_batch is not None:
            on_batch(len(ended))
        return len(ended)

    def iter_finished(self, **which: Unpack[FinishedRunFilters]) -> Iterator[WorkflowRun]:
        """See `AbstractWorkflowRunRepository.iter_finished`."""
        valid, seen, finished = valid_finished(which), Counter[str](), []
        with self._store.lock:
            for run in sorted(self._matching(valid.filters), key=_place, reverse=True):
                seen[run.workflow_name] += 1
                if seen[run.workflow_name] > valid.keep_last and run.completed_at < valid.before:
                    finished.append(run)
        finished.sort(key=lambda run: (run.completed_at, run.id))
        yield from map(_Run.copied, finished[: valid.limit])

    def list_stalled(
        self,
        idle: timedelta,
        *,
        before: str | WorkflowRun | None = None,
        limit: int | None = None,
        **filters: Unpack[RunFilters],
    ) -> list[WorkflowRun]:
        """See `AbstractWorkflowRunRepository.list_stalled`."""
        most = None if limit is None else valid_count("limit", limit)
        with self._store.lock:
            return self._newest(self._silent(idle, filters), before, most)

    def fail_stalled(self, idle: timedelta, *, run_id: str | None = None) -> int:
        """See `AbstractWorkflowRunRepository.fail_stalled`."""
        with self._store.lock:
            stalled = [run for run in self._silent(idle, {}) if run_id in (None, run.id)]
            for run in stalled:
                self.update_status(run.id, "failed", error_message=stalled_message(idle))
        return len(stalled)

    def _silent(self, idle: timedelta, filters: Mapping[str, Any]) -> list[_Run]:
        cutoff = stalled_before(idle)
        running = (run for run in self._matching(filters) if run.status == RunStatus.RUNNING)
        return [run for run in running if all(sign < cutoff for sign in run.signs if sign)]

    def list_attempts(self, run_id: str) -> list[Attempt]:
        """See `AbstractWorkflowRunRepository.list_attempts`."""
        with self._store.lock:
            run = self._store.run(run_id)
            return run.found.with_attempts(run.attempts.values())

    def put(
        self,
        run: WorkflowRun,
        *,
        over: WorkflowRun | None = None,
        attempts: Iterable[Attempt] = (),
    ) -> None:
        """See `AbstractWorkflowRunRepository.put`."""
        fields = valid_fields(run_fields(run))
        ended = FoundRun.of(fields).attempts_to_keep(attempts)
        if over is None:
            self._insert(fields, ended)
            return
        kept = _kept(fields)
        with self._store.lock:
            stored = self._store.run(run.id)
            if not equal_runs(stored.copied(), over):
                raise RunChangedError(run.id)
            vars(stored).update(kept)
            stored.attempts = {attempt.number: attempt for attempt in ended}

    def delete_unchanged(self, run: WorkflowRun, last: Checkpoint | None) -> None:
        """See `AbstractWorkflowRunRepository.delete_unchanged`."""
        with self._store.lock:
            stored = self._store.run(run.id)
            newest = [(one.step, one.node_id, one.created_at) for one in stored.states[-1:]]
            expected = [] if last is None else [(last["step"], last["node_id"], last["created_at"])]
            if newest != expected or not equal_runs(stored.copied(), run):
                raise RunChangedError(run.id)
            del self._store.runs[run.id]


class MemoryExecutionStateRepository(_InMemory, AbstractExecutionStateRepository):
    """The checkpoints in memory."""

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
        """See `AbstractExecutionStateRepository.save_state`."""
        text = state_text(state_data)
        node_id = valid_name("node_id", node_id, MAX_NODE_ID)
        valid_attempt(attempt)
        noted, checked = valid_totals(totals), valid_usage(usage)
        if attempt is not None or noted:
            noted = {**noted, "current_node": node_id}
        with self._store.lock:
            run = self._store.run_in(run_id, attempt)
            step = run.states[-1].step + 1 if run.states else 0
            run.states.append(_State(step, text, node_id, timezone.now(), attempt, checked))
            vars(run).update(noted)
        return step

    def append(self, run_id: str, checkpoints: Iterable[Checkpoint]) -> int:
        """See `AbstractExecutionStateRepository.append`."""
        valid = map(valid_checkpoint, checkpoints)
        states = [_State(*(getattr(given, name) for name in _State._fields)) for given in valid]
        with self._store.lock:
            run = self._store.run(run_id)
            whole = [*run.states, *states]
            for before, state in itertools.pairwise(whole[max(0, len(run.states) - 1) :]):
                if state.step != before.step + 1:
                    raise StepConflictError(run_id, state.step, before.step + 1)
            run.states = whole
        return len(states)

    def get_latest_checkpoint(self, run_id: str) -> Checkpoint | None:
        """See `AbstractExecutionStateRepository.get_latest_checkpoint`."""
        states = self._states_of(run_id)
        return states[-1].checkpoint() if states else None

    def get_state(self, run_id: str, step: int) -> Checkpoint | None:
        """See `AbstractExecutionStateRepository.get_state`."""
        valid_step(step)
        states = self._states_of(run_id)
        return next((state.checkpoint() for state in states if state.step == step), None)

    def iter_state_history(self, run_id: str, *, after: int = -1) -> Iterator[Checkpoint]:
        """See `AbstractExecutionStateRepository.iter_state_history`."""
        last = valid_step(after)
        while later := [state for state in self._states_of(run_id) if state.step > last]:
            for state in itertools.islice(later, 16):
                yield state.checkpoint()
                last = state.step

    def delete_states(self, run_id: str, *, keep_last: int = 0) -> int:
        """See `AbstractExecutionStateRepository.delete_states`."""
        valid_count("keep_last", keep_last)
        with self._store.lock:
            run = self._store.run(run_id)
            deleted = max(0, len(run.states) - keep_last)
            run.states = run.states[deleted:]
        return deleted

    def _states_of(self, run_id: str) -> Sequence[_State]:
        with self._store.lock:
            run = self._store.find(run_id)
            return [] if run is None else list(run.states)


def _place(run: Any) -> tuple[datetime, str]:
    """Return where a run is in the order of lists, oldest first."""
    return run.started_at, run.id


_stores: dict[str, _Store] = {}


def open_store(config: StorageConfig) -> StorageBackend:
    """Return the store of a URL: one for each name in this process.

    Raises:
        UnsupportedBackendError: if there is more in the URL than a name.
    """
    url = config.backend
    if not _URL.fullmatch(url):
        raise UnsupportedBackendError(
            f"{url!r} names no store in memory. Write memory://, or memory://name with letters, "
            "digits and any of . _ -"
        )
    store = _stores.setdefault(url, _Store())
    runs, states = MemoryWorkflowRunRepository(store), MemoryExecutionStateRepository(store)
    return StorageBackend(runs, states, name=url)


def forget(url: str) -> None:
    """Let the runs of a store go; for tests."""
    _stores.pop(url, None)


def check_store(config: StorageConfig) -> list[CheckMessage]:
    """Warn that the runs are lost when the process ends."""
    from django.core.checks import Warning

    open_store(config)
    hint = (
        "They are lost when the process ends, and no other process sees them. Use a database, or "
        "Redis."
    )
    message = "Workflow runs are stored in the memory of each process."
    return [Warning(message, hint=hint, id="workflow_storage.W003")]


def database_settings(config: StorageConfig) -> dict[str, Any] | None:
    """Return None: no Django database."""
    return None

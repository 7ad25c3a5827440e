"""The runs in Redis and Redis Cluster.

Each method is an operation (see `connection`) that its sync and its async form carry out. All
that belongs to a run lies in one hash slot, and every change is one script.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar, Unpack

from django.utils import timezone

from workflow_storage.attempts import FoundRun, StatusChange, status_change
from workflow_storage.backends.redis import scripts
from workflow_storage.backends.redis.finished import FinishedRuns
from workflow_storage.backends.redis.indexes import NewestRuns, entry_of, parsed_entry
from workflow_storage.backends.redis.records import (
    FIELDS,
    attempts_from,
    changed,
    found_run,
    read_fields,
    read_runs,
    read_signs,
    refuse,
    run_from,
    written,
    written_attempts,
)
from workflow_storage.backends.redis.repository import (
    RedisRepository,
    awaitable,
    blocking,
    call,
    checkpoint_of,
    indexing_call,
    time_text,
)
from workflow_storage.base import (
    AbstractWorkflowRunRepository,
    Attempt,
    Checkpoint,
    FinishedRunFilters,
    RunFilters,
    stalled_message,
)
from workflow_storage.exceptions import (
    RunAlreadyExistsError,
    RunChangedError,
    RunNotFoundError,
)
from workflow_storage.filters import valid_filters, valid_finished
from workflow_storage.models import WorkflowRun
from workflow_storage.paging import PageLength, emptied
from workflow_storage.querysets import stalled_before
from workflow_storage.serialization import load_json
from workflow_storage.status import RunStatus
from workflow_storage.validation import (
    MAX_COUNT,
    MAX_NODE_ID,
    equal_runs,
    is_possible_id,
    label_change,
    run_fields,
    valid_attempt,
    valid_count,
    valid_expected,
    valid_fields,
    valid_name,
    valid_new_run,
    valid_status,
    valid_updates,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Iterator
    from datetime import datetime, timedelta

    from workflow_storage.backends.redis.connection import Operation

_T = TypeVar("_T")

PAGE = 200
"""Entries of an index that a list of runs reads at a time."""

MAX_CHANGED_AT_ONCE = 200
"""Runs that `delete_finished` and `fail_stalled` send to the server at a time."""


class RedisWorkflowRunRepository(RedisRepository, AbstractWorkflowRunRepository):
    """The runs in Redis.

    Args:
        store: the server or cluster.
    """

    def _add(self, run: WorkflowRun) -> Operation[None]:
        fields = valid_new_run(run_fields(run))
        values = (*written(fields), "version", 0)
        if not (yield indexing_call(self.store, scripts.ADD, run.id, *values)):
            raise RunAlreadyExistsError(run.id)
        for name, value in fields.items():
            setattr(run, name, value)
        run._state.adding = False

    add = blocking(_add)
    aadd = awaitable(_add)

    def _get(self, run_id: str) -> Operation[WorkflowRun | None]:
        if not is_possible_id(run_id):
            return None
        (values,) = yield read_runs(self.store, [run_id])
        return run_from(run_id, values)

    get = blocking(_get)
    aget = awaitable(_get)

    def _list_runs(
        self,
        *,
        before: str | WorkflowRun | None = None,
        limit: int = 100,
        **filters: Unpack[RunFilters],
    ) -> Operation[list[WorkflowRun]]:
        valid_count("limit", limit)
        valid = valid_filters(filters)
        position = None if before is None else (yield from self._position(before))
        if limit == 0 or valid.match_none:
            return []
        newest = NewestRuns(self.store, valid, position)
        runs: list[WorkflowRun] = []
        while len(runs) < limit:
            page = yield from newest.page(min(limit - len(runs), PAGE))
            if page is None:
                break
            runs += page
        return runs

    list_runs = blocking(_list_runs)
    alist_runs = awaitable(_list_runs)

    def _position(self, before: str | WorkflowRun) -> Operation[bytes]:
        """Return the entry of a run."""
        if isinstance(before, WorkflowRun):
            return entry_of(before.started_at, before.id)
        run = yield from self._get(before)
        if run is None:
            raise RunNotFoundError(before)
        return entry_of(run.started_at, run.id)

    def iter_runs(
        self,
        *,
        before: str | WorkflowRun | None = None,
        limit: int | None = None,
        **filters: Unpack[RunFilters],
    ) -> Iterator[WorkflowRun]:
        """See `AbstractWorkflowRunRepository.iter_runs`."""
        valid = valid_filters(filters)
        position = None if before is None else self.store.execute(self._position(before))
        newest = NewestRuns(self.store, valid, position)
        length = PageLength(None if limit is None else valid_count("limit", limit))
        while length.runs and not valid.match_none:
            page = self.store.execute(newest.page(length.runs))
            if page is None:
                return
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
        valid = valid_filters(filters)
        position = None if before is None else await self.store.aexecute(self._position(before))
        newest = NewestRuns(self.store, valid, position)
        length = PageLength(None if limit is None else valid_count("limit", limit))
        while length.runs and not valid.match_none:
            page = await self.store.aexecute(newest.page(length.runs))
            if page is None:
                return
            length.after(page)
            for run in emptied(page):
                yield run

    def _list_ids(self, beginning: str, *, limit: int = 10) -> Operation[list[str]]:
        valid_count("limit", limit)
        newest = NewestRuns(self.store, valid_filters({}))
        found: list[str] = []
        while len(found) < limit and (entries := (yield from newest.entries(PAGE))):
            run_ids = [run_id for _, run_id in map(parsed_entry, entries)]
            found += [run_id for run_id in run_ids if run_id.startswith(beginning)]
        return sorted(found[:limit])

    list_ids = blocking(_list_ids)
    alist_ids = awaitable(_list_ids)

    def _count_runs(self, **filters: Unpack[RunFilters]) -> Operation[int]:
        valid = valid_filters(filters)
        if valid.match_none:
            return 0
        return (yield from NewestRuns(self.store, valid).count())

    count_runs = blocking(_count_runs)
    acount_runs = awaitable(_count_runs)

    def _update(
        self, /, run_id: str, *, attempt: int | None = None, **fields: Any
    ) -> Operation[None]:
        of_labels = label_change(fields)
        changes = valid_updates(fields)
        valid_attempt(attempt)
        if of_labels is None:
            yield from self._change(run_id, changes, attempt)
            return
        if not is_possible_id(run_id):
            raise RunNotFoundError(run_id)
        was_changed = False
        while not was_changed:
            # With the time of the start, without which there is no run.
            ((started, text),) = yield read_fields(self.store, [run_id], "started_at", "labels")
            if started is None:
                raise RunNotFoundError(run_id)
            labels = of_labels.applied(load_json(text) if text else {})
            was_changed = yield from self._change(
                run_id, {**changes, "labels": labels}, attempt, labels=text or b""
            )

    update = blocking(_update)
    aupdate = awaitable(_update)

    def _update_status(
        self,
        /,
        run_id: str,
        status: str,
        *,
        expected: str | Iterable[str] | None = None,
        attempt: int | None = None,
        **fields: Any,
    ) -> Operation[None]:
        change = status_change(valid_status(status), fields)
        valid_attempt(attempt)
        statuses = None if expected is None else valid_expected(expected)
        if not is_possible_id(run_id):
            raise RunNotFoundError(run_id)
        wanted = statuses or (() if attempt is None else (RunStatus.RUNNING,))
        reply = yield indexing_call(
            self.store,
            scripts.CHANGE_STATUS,
            run_id,
            _alternatives(wanted),
            "" if attempt is None else attempt,
            *_changed_status(change),
        )
        if reply != 1:
            refuse(run_id, reply, expected=statuses, attempt=attempt, change=change)

    update_status = blocking(_update_status)
    aupdate_status = awaitable(_update_status)

    def _heartbeat(
        self, run_id: str, *, attempt: int | None = None, node: str | None = None
    ) -> Operation[None]:
        changes: dict[str, Any] = {"heartbeat_at": timezone.now()}
        if node is not None:
            changes["current_node"] = valid_name("node", node, MAX_NODE_ID)
        yield from self._change(run_id, changes, valid_attempt(attempt))

    heartbeat = blocking(_heartbeat)
    aheartbeat = awaitable(_heartbeat)

    def _change(
        self,
        run_id: str,
        changes: dict[str, Any],
        attempt: int | None,
        *,
        labels: bytes = b"*",
    ) -> Operation[bool]:
        """Change fields of a run, if it is running in an attempt; or say why not.

        Returns:
            Whether its labels were as they have to be, as text.
        """
        if not is_possible_id(run_id):
            raise RunNotFoundError(run_id)
        fence = "" if attempt is None else attempt
        if "labels" in changes:
            reply = yield indexing_call(
                self.store, scripts.CHANGE_LABELS, run_id, fence, labels, *changed(changes)
            )
        else:
            reply = yield call(self.store, scripts.CHANGE, run_id, fence, *changed(changes))
        if reply not in (0, 1):
            refuse(run_id, reply, attempt=attempt)
        return bool(reply)

    def _list_attempts(self, run_id: str) -> Operation[list[Attempt]]:
        if not is_possible_id(run_id):
            raise RunNotFoundError(run_id)
        reply = yield call(self.store, scripts.ATTEMPTS, run_id)
        run = found_run(run_id, reply and reply[0])
        if run is None:
            raise RunNotFoundError(run_id)
        return run.with_attempts(attempts_from(run_id, reply[1:]))

    list_attempts = blocking(_list_attempts)
    alist_attempts = awaitable(_list_attempts)

    def _delete(self, run_id: str) -> Operation[None]:
        if not is_possible_id(run_id):
            raise RunNotFoundError(run_id)
        if (yield indexing_call(self.store, scripts.DELETE, run_id, "")) != 1:
            raise RunNotFoundError(run_id)

    delete = blocking(_delete)
    adelete = awaitable(_delete)

    def _delete_finished(
        self,
        *,
        batch_size: int = 1000,
        on_batch: Callable[[int], object] | None = None,
        **which: Unpack[FinishedRunFilters],
    ) -> Operation[int]:
        valid = valid_finished(which)
        size = min(valid_count("batch_size", batch_size, minimum=1), MAX_CHANGED_AT_ONCE)
        finished = FinishedRuns(self.store, valid)
        deleted = 0
        while (runs := (yield from finished.page(size))) is not None:
            for batch in _batches(runs):
                calls = [indexing_call(self.store, scripts.DELETE_ENDED, *run) for run in batch]
                done = sum((yield calls))
                finished.took(done)
                deleted += done
                if on_batch is not None:
                    on_batch(done)
        return deleted

    delete_finished = blocking(_delete_finished)
    adelete_finished = awaitable(_delete_finished)

    def iter_finished(self, **which: Unpack[FinishedRunFilters]) -> Iterator[WorkflowRun]:
        """See `AbstractWorkflowRunRepository.iter_finished`."""
        valid = valid_finished(which)
        finished, length = FinishedRuns(self.store, valid), PageLength()
        while (page := self.store.execute(finished.runs(length.runs))) is not None:
            length.after(page)
            yield from emptied(page)

    async def aiter_finished(
        self, **which: Unpack[FinishedRunFilters]
    ) -> AsyncIterator[WorkflowRun]:
        """Async twin of `iter_finished`."""
        valid = valid_finished(which)
        finished, length = FinishedRuns(self.store, valid), PageLength()
        while (page := await self.store.aexecute(finished.runs(length.runs))) is not None:
            length.after(page)
            for run in emptied(page):
                yield run

    def _list_stalled(
        self,
        idle: timedelta,
        *,
        before: str | WorkflowRun | None = None,
        limit: int | None = None,
        **filters: Unpack[RunFilters],
    ) -> Operation[list[WorkflowRun]]:
        valid = valid_filters(filters)
        position = None if before is None else (yield from self._position(before))
        cutoff = stalled_before(idle)
        most = MAX_COUNT if limit is None else valid_count("limit", limit)
        if valid.match_none or RunStatus.RUNNING not in (valid.statuses or RunStatus):
            return []
        running = NewestRuns(self.store, valid._replace(statuses=[RunStatus.RUNNING]), position)
        stalled: list[WorkflowRun] = []
        while len(stalled) < most and (entries := (yield from running.entries(PAGE))):
            run_ids = yield from self._silent_of(entries, cutoff)
            replies = yield read_runs(self.store, run_ids)
            runs = map(run_from, run_ids, replies)
            stalled += [
                run
                for run in runs
                if run is not None and run.status == RunStatus.RUNNING and valid.matches(run)
            ]
        return stalled[:most]

    list_stalled = blocking(_list_stalled)
    alist_stalled = awaitable(_list_stalled)

    def _silent(self, idle: timedelta) -> Operation[list[str]]:
        """Return the ids of the running runs without a sign of life, newest start first.

        Not by their start in the index: a clock may have gone back before the attempt began.
        """
        cutoff = stalled_before(idle)
        running = NewestRuns(self.store, valid_filters({"status": RunStatus.RUNNING}))
        silent: list[str] = []
        while entries := (yield from running.entries(PAGE)):
            silent += yield from self._silent_of(entries, cutoff)
        return silent

    def _silent_of(self, entries: list[bytes], cutoff: datetime) -> Operation[list[str]]:
        """Return the ids of those of some entries that are running, without a sign of life since."""
        latest = time_text(cutoff).encode()
        run_ids = [run_id for _, run_id in map(parsed_entry, entries)]
        replies = (yield read_signs(self.store, run_ids)) if run_ids else ()
        silent = []
        for run_id, (status, started, attempt_started, *others) in zip(
            run_ids, replies, strict=True
        ):
            signs = (attempt_started or started, *others)
            if status == _RUNNING and all(sign is None or sign < latest for sign in signs):
                silent.append(run_id)
        return silent

    def _fail_stalled(self, idle: timedelta, *, run_id: str | None = None) -> Operation[int]:
        cutoff = time_text(stalled_before(idle))
        if run_id is None:
            run_ids = yield from self._silent(idle)
        else:
            run_ids = [run_id] if is_possible_id(run_id) else []
        change = status_change(RunStatus.FAILED, {"error_message": stalled_message(idle)})
        arguments = (cutoff, *_changed_status(change))
        failed = 0
        for batch in _batches(run_ids):
            replies = yield [
                indexing_call(self.store, scripts.FAIL_STALLED, one, *arguments) for one in batch
            ]
            failed += sum(replies)
        return failed

    fail_stalled = blocking(_fail_stalled)
    afail_stalled = awaitable(_fail_stalled)

    def _put(
        self,
        run: WorkflowRun,
        *,
        over: WorkflowRun | None = None,
        attempts: Iterable[Attempt] = (),
    ) -> Operation[None]:
        fields = valid_fields(run_fields(run))
        kept = FoundRun.of(fields).attempts_to_keep(attempts)
        values = [*written(fields), *written_attempts(kept)]
        if over is None:
            if not (yield indexing_call(self.store, scripts.ADD, run.id, *values, "version", 0)):
                raise RunAlreadyExistsError(run.id)
            return
        version = yield from self._version(run.id, over)
        names = set(values[::2])
        cleared = [name for name in (*FIELDS, "attempts") if name not in names]
        done = yield indexing_call(
            self.store, scripts.REPLACE, run.id, version, len(values), *values, *cleared
        )
        if not done:
            raise RunChangedError(run.id)

    put = blocking(_put)
    aput = awaitable(_put)

    def _delete_unchanged(self, run: WorkflowRun, last: Checkpoint | None) -> Operation[None]:
        version = yield from self._version(run.id, run)
        _, _, *newest = yield call(self.store, scripts.CHAIN, run.id, "")
        found = checkpoint_of(int(newest[0]), newest[1], {}) if newest else None
        if _identity(found) != _identity(last):
            raise RunChangedError(run.id)
        if (yield indexing_call(self.store, scripts.DELETE, run.id, version)) != 1:
            raise RunChangedError(run.id)

    delete_unchanged = blocking(_delete_unchanged)
    adelete_unchanged = awaitable(_delete_unchanged)

    def _version(self, run_id: str, as_read: WorkflowRun) -> Operation[bytes]:
        """Return the version of a stored run that is as it was read."""
        (reply,) = yield read_runs(self.store, [run_id], "version")
        *values, version = reply
        stored = run_from(run_id, values)
        if stored is None:
            raise RunNotFoundError(run_id)
        if not equal_runs(stored, as_read):
            raise RunChangedError(run_id)
        result: bytes = version
        return result


_RUNNING = RunStatus.RUNNING.value.encode()


def _batches(runs: list[_T]) -> Iterator[list[_T]]:
    for first in range(0, len(runs), MAX_CHANGED_AT_ONCE):
        yield runs[first : first + MAX_CHANGED_AT_ONCE]


def _identity(checkpoint: Checkpoint | None) -> tuple[int, str, datetime] | None:
    """Return what tells a checkpoint from another one."""
    if checkpoint is None:
        return None
    return checkpoint["step"], checkpoint["node_id"], checkpoint["created_at"]


def _changed_status(change: StatusChange) -> list[Any]:
    """Return a change of status as the scripts take it."""
    # They compute the status and the end.
    fields = {
        name: value
        for name, value in change.fields.items()
        if name not in ("status", "completed_at")
    }
    given = "given" if change.sets_duration else ""
    return [change.status.value, time_text(change.at), given, *changed(fields)]


def _alternatives(values: Iterable[str]) -> str:
    """Return values as the scripts look for one of them: ``|a|b|``, or nothing for any."""
    joined = "|".join(values)
    return f"|{joined}|" if joined else ""

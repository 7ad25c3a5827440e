"""The runs in Redis and Redis Cluster.

Each method is an operation (see `connection`) that its sync and its async form carry out. All
that belongs to a run lies in one hash slot, and every change is one script.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Unpack

from django.utils import timezone

from workflow_storage.backends.redis import scripts
from workflow_storage.backends.redis.indexes import NewestRuns, entry_of, parsed_entry
from workflow_storage.backends.redis.records import FIELDS, read_runs, run_from, written
from workflow_storage.backends.redis.repository import (
    RedisRepository,
    awaitable,
    blocking,
    call,
    indexing_call,
    parsed_mark,
    time_text,
)
from workflow_storage.base import (
    PAGE_SIZE,
    AbstractWorkflowRunRepository,
    Checkpoint,
    RunFilters,
    stalled_message,
)
from workflow_storage.exceptions import (
    RunAlreadyExistsError,
    RunChangedError,
    RunNotFoundError,
    StatusConflictError,
)
from workflow_storage.models import WorkflowRun
from workflow_storage.status import TERMINAL_STATUSES, RunStatus
from workflow_storage.validation import (
    equal_runs,
    is_possible_id,
    run_fields,
    status_change,
    valid_count,
    valid_expected,
    valid_fields,
    valid_filters,
    valid_idle,
    valid_moment,
    valid_new_run,
    valid_status,
    valid_terminal_statuses,
    valid_updates,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Iterator
    from datetime import datetime, timedelta

    from workflow_storage.backends.redis.connection import Operation

MAX_DELETED_AT_ONCE = 200
"""Runs that `delete_finished` sends to the server at a time."""


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
            page = yield from newest.page(min(limit - len(runs), PAGE_SIZE))
            if page is None:
                break
            runs += [run for run, _ in page]
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

    def iter_runs(self, **filters: Unpack[RunFilters]) -> Iterator[WorkflowRun]:
        """See `AbstractWorkflowRunRepository.iter_runs`."""
        valid = valid_filters(filters)
        newest = NewestRuns(self.store, valid)
        while not valid.match_none:
            page = self.store.execute(newest.page(PAGE_SIZE))
            if page is None:
                return
            for run, _ in page:
                yield run

    async def aiter_runs(self, **filters: Unpack[RunFilters]) -> AsyncIterator[WorkflowRun]:
        """Async twin of `iter_runs`."""
        valid = valid_filters(filters)
        newest = NewestRuns(self.store, valid)
        while not valid.match_none:
            page = await self.store.aexecute(newest.page(PAGE_SIZE))
            if page is None:
                return
            for run, _ in page:
                yield run

    def _count_runs(self, **filters: Unpack[RunFilters]) -> Operation[int]:
        valid = valid_filters(filters)
        if valid.match_none:
            return 0
        return (yield from NewestRuns(self.store, valid).count())

    count_runs = blocking(_count_runs)
    acount_runs = awaitable(_count_runs)

    def _update(self, /, run_id: str, **fields: Any) -> Operation[None]:
        yield from self._change(run_id, valid_updates(fields))

    update = blocking(_update)
    aupdate = awaitable(_update)

    def _update_status(
        self,
        /,
        run_id: str,
        status: str,
        *,
        expected: str | Iterable[str] | None = None,
        **fields: Any,
    ) -> Operation[None]:
        changes = status_change(valid_status(status), fields)
        statuses = None if expected is None else valid_expected(expected)
        yield from self._change(run_id, changes, statuses)

    update_status = blocking(_update_status)
    aupdate_status = awaitable(_update_status)

    def _heartbeat(self, run_id: str) -> Operation[None]:
        yield from self._change(run_id, {"heartbeat_at": timezone.now()})

    heartbeat = blocking(_heartbeat)
    aheartbeat = awaitable(_heartbeat)

    def _change(
        self, run_id: str, changes: dict[str, Any], expected: Iterable[RunStatus] | None = None
    ) -> Operation[None]:
        """Change fields of a run, if it is in one of the expected statuses; or say why not."""
        if not is_possible_id(run_id):
            raise RunNotFoundError(run_id)
        statuses = sorted(status.value for status in expected or ())
        calling = indexing_call if "status" in changes else call
        reply = yield calling(
            self.store, scripts.CHANGE, run_id, _alternatives(statuses), *_set_and_cleared(changes)
        )
        if reply is None:
            raise RunNotFoundError(run_id)
        status, done = reply
        if not done:
            raise StatusConflictError(run_id, status.decode(), tuple(statuses))

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
        before: datetime,
        workflow_name: str | None = None,
        statuses: str | Iterable[str] = TERMINAL_STATUSES,
        batch_size: int = 1000,
    ) -> Operation[int]:
        filters: RunFilters = {
            "workflow_name": workflow_name,
            "status": valid_terminal_statuses(statuses),
        }
        valid = valid_filters(filters)
        end = time_text(valid_moment("before", before))
        size = min(valid_count("batch_size", batch_size, minimum=1), MAX_DELETED_AT_ONCE)
        if valid.match_none:
            return 0
        wanted = _alternatives(status.value for status in valid.statuses or ())
        deleted = 0
        for prefix in self.store.key_prefixes:
            begin: bytes | None = b"-"
            while begin is not None:
                page = ("ZRANGEBYLEX", f"{prefix}:ended", begin, f"({end}", "LIMIT", 0, size)
                (entries,) = yield [page]
                calls = [
                    indexing_call(
                        self.store,
                        scripts.DELETE_ENDED,
                        run_id,
                        ended_at,
                        wanted,
                        workflow_name or "",
                    )
                    for ended_at, run_id in map(parsed_entry, entries)
                ]
                if calls:
                    deleted += sum((yield calls))
                begin = b"(" + entries[-1] if len(entries) == size else None
        return deleted

    delete_finished = blocking(_delete_finished)
    adelete_finished = awaitable(_delete_finished)

    def _list_stalled(self, idle: timedelta) -> Operation[list[WorkflowRun]]:
        cutoff = timezone.now() - valid_idle(idle)
        running = valid_filters({"status": RunStatus.RUNNING, "started_before": cutoff})
        newest = NewestRuns(self.store, running)
        since = time_text(cutoff).encode()
        stalled = []
        while (page := (yield from newest.page(PAGE_SIZE))) is not None:
            for run, state_at in page:
                alive = run.heartbeat_at is not None and run.heartbeat_at >= cutoff
                if not alive and (state_at is None or state_at < since):
                    stalled.append(run)
        return stalled

    list_stalled = blocking(_list_stalled)
    alist_stalled = awaitable(_list_stalled)

    def _fail_if_stalled(self, run_id: str, idle: timedelta) -> Operation[bool]:
        cutoff = timezone.now() - valid_idle(idle)
        if not is_possible_id(run_id):
            return False
        changes = status_change(RunStatus.FAILED, {"error_message": stalled_message(idle)})
        reply = yield indexing_call(
            self.store,
            scripts.FAIL_STALLED,
            run_id,
            time_text(cutoff),
            *_set_and_cleared(changes),
        )
        return bool(reply)

    fail_if_stalled = blocking(_fail_if_stalled)
    afail_if_stalled = awaitable(_fail_if_stalled)

    def _fail_stalled(self, idle: timedelta) -> Operation[int]:
        failed = 0
        for run in (yield from self._list_stalled(idle)):
            failed += yield from self._fail_if_stalled(run.id, idle)
        return failed

    fail_stalled = blocking(_fail_stalled)
    afail_stalled = awaitable(_fail_stalled)

    def _put(self, run: WorkflowRun, *, over: WorkflowRun | None = None) -> Operation[None]:
        fields = valid_fields(run_fields(run))
        values = written(fields, exactly=True)
        if over is None:
            if not (yield indexing_call(self.store, scripts.ADD, run.id, *values, "version", 0)):
                raise RunAlreadyExistsError(run.id)
            return
        version = yield from self._version(run.id, over)
        cleared = [name for name in FIELDS if name not in values[::2]]
        done = yield indexing_call(
            self.store, scripts.REPLACE, run.id, version, 3 + len(values), *values, *cleared
        )
        if not done:
            raise RunChangedError(run.id)

    put = blocking(_put)
    aput = awaitable(_put)

    def _delete_unchanged(self, run: WorkflowRun, last: Checkpoint | None) -> Operation[None]:
        version = yield from self._version(run.id, run)
        _, _, *newest = yield call(self.store, scripts.CHAIN, run.id, "")
        found = (int(newest[0]), *parsed_mark(newest[1])) if newest else None
        if found != (last and (last["step"], last["node_id"], last["created_at"])):
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


def _set_and_cleared(changes: dict[str, Any]) -> list[Any]:
    """Return changes as the scripts take them: the last argument to set, those, what to clear."""
    values = written(changes)
    cleared = [name for name, value in changes.items() if value is None]
    return [3 + len(values), *values, *cleared]


def _alternatives(values: Iterable[str]) -> str:
    """Return values as the scripts look for one of them: ``|a|b|``, or nothing for any."""
    joined = "|".join(values)
    return f"|{joined}|" if joined else ""

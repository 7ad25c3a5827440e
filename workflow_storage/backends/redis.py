"""The repositories on Redis and Redis Cluster.

Each method is a generator (see `RedisStore`) that its sync and its async form carry out. All
that belongs to a run lies in one hash slot, and every change is one script.
"""

from __future__ import annotations

import itertools
import logging
import random
from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Unpack

from django.conf import settings
from django.utils import timezone

from workflow_storage.backends import redis_scripts as scripts
from workflow_storage.backends.redis_client import Call, RedisStore
from workflow_storage.base import (
    PAGE_SIZE,
    AbstractExecutionStateRepository,
    AbstractWorkflowRunRepository,
    Checkpoint,
    RunFilters,
    StateWriter,
    StorageBackend,
    stalled_message,
)
from workflow_storage.encoding import (
    SMALL_STATE,
    apply_delta,
    base_step,
    decode_state,
    encode_state,
    is_delta,
    load_json,
    remember,
)
from workflow_storage.exceptions import (
    DamagedStateError,
    RunAlreadyExistsError,
    RunChangedError,
    RunNotFoundError,
    StatusConflictError,
    StepConflictError,
    StorageError,
    StorageUnavailableError,
)
from workflow_storage.models import WorkflowRun, loaded_state, whole_state
from workflow_storage.status import TERMINAL_STATUSES, RunStatus
from workflow_storage.validation import (
    MAX_NODE_ID,
    PAYLOADS,
    RESULT_TIMES,
    RUN_FIELDS,
    ValidFilters,
    equal_runs,
    payload_json,
    plain_text,
    possible_id,
    run_fields,
    valid_checkpoint,
    valid_count,
    valid_expected,
    valid_fields,
    valid_filters,
    valid_idle,
    valid_moment,
    valid_name,
    valid_new_run,
    valid_state,
    valid_status,
    valid_step,
    valid_terminal_statuses,
    valid_updates,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator, Sequence
    from datetime import timedelta

logger = logging.getLogger(__name__)

STATES_PAGE = 16
"""Checkpoints that `iter_state_history` holds in memory at a time."""

MAX_DELETED_AT_ONCE = 200
"""Runs that `delete_finished` sends to the server at a time."""

MAX_TRIMS = 100
"""Times that deleting states is tried, while other processes delete some, too."""

MAX_BASED = 10
"""Times that a state is tried as a delta while other writers append; then it is stored whole."""

_FIELDS = RUN_FIELDS[1:]
_TIMES = frozenset({"started_at", "completed_at", "heartbeat_at"})
_TIME_LENGTH = 26
_STEPS = range(2**31)
_MISSING = "the server has evicted it, or somebody has deleted it"
_NO_DURATION = b"-"
"""The duration_seconds of a run that has ended and has none, as no run of the contract."""


def open_redis(url: str) -> StorageBackend:
    """Give the repositories of a Redis server or cluster; it is connected to on first use.

    Raises:
        UnsupportedBackendError: if the URL cannot be used.
    """
    store = RedisStore(url)
    return StorageBackend(RedisWorkflowRunRepository(store), RedisExecutionStateRepository(store))


class _RedisRepository:
    """What both repositories know: the store, and the keys of a run."""

    def __init__(self, store: RedisStore) -> None:
        self.store = store

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.store.name!r})"

    def _call(self, script: scripts.Script, run_id: str, *args: Any) -> Call:
        """Give the call of a script on a run."""
        run_id = plain_text(run_id)
        base = self.store.base(run_id)
        return Call(script, (f"{base}:run:{run_id}", f"{base}:states:{run_id}"), (run_id, *args))

    def _indexing(self, script: scripts.Script, run_id: str, *args: Any) -> Call:
        """Give the call of a script on a run that changes its place in the indexes."""
        call = self._call(script, run_id, *args)
        base = self.store.base(run_id)
        return call._replace(keys=(*call.keys, *(f"{base}:{name}" for name in scripts.INDEXES)))

    def _read(self, run_ids: Iterable[str], *extra: str) -> list[tuple[Any, ...]]:
        """Give the commands that read runs, and further fields of theirs."""
        return [
            ("HMGET", f"{self.store.base(run_id)}:run:{run_id}", *_FIELDS, *extra)
            for run_id in map(plain_text, run_ids)
        ]


class RedisWorkflowRunRepository(_RedisRepository, AbstractWorkflowRunRepository):
    """The runs in Redis.

    Args:
        store: the server or cluster.
    """

    def add(self, run: WorkflowRun) -> None:
        """See `AbstractWorkflowRunRepository.add`."""
        self.store.run(self._add(run))

    async def aadd(self, run: WorkflowRun) -> None:
        """Async twin of `add`."""
        await self.store.arun(self._add(run))

    def _add(self, run: WorkflowRun) -> Generator[Any, Any, None]:
        fields = valid_new_run(run_fields(run))
        if not (yield self._indexing(scripts.ADD, run.id, *_written(fields), "version", 0)):
            raise RunAlreadyExistsError(run.id)
        for name, value in fields.items():
            setattr(run, name, value)
        run._state.adding = False

    def get(self, run_id: str) -> WorkflowRun | None:
        """See `AbstractWorkflowRunRepository.get`."""
        return self.store.run(self._get(run_id))

    async def aget(self, run_id: str) -> WorkflowRun | None:
        """Async twin of `get`."""
        return await self.store.arun(self._get(run_id))

    def _get(self, run_id: str) -> Generator[Any, Any, WorkflowRun | None]:
        if not possible_id(run_id):
            return None
        (values,) = yield self._read([run_id])
        return _run(run_id, values)

    def list_runs(
        self,
        *,
        before: str | WorkflowRun | None = None,
        limit: int = 100,
        **filters: Unpack[RunFilters],
    ) -> list[WorkflowRun]:
        """See `AbstractWorkflowRunRepository.list_runs`."""
        return self.store.run(self._list_runs(before, limit, filters))

    async def alist_runs(
        self,
        *,
        before: str | WorkflowRun | None = None,
        limit: int = 100,
        **filters: Unpack[RunFilters],
    ) -> list[WorkflowRun]:
        """Async twin of `list_runs`."""
        return await self.store.arun(self._list_runs(before, limit, filters))

    def _list_runs(
        self, before: str | WorkflowRun | None, limit: int, filters: RunFilters
    ) -> Generator[Any, Any, list[WorkflowRun]]:
        valid_count("limit", limit)
        valid = valid_filters(filters)
        position = None if before is None else (yield from self._position(before))
        if limit == 0 or valid.match_none:
            return []
        newest = _Newest(self.store, valid, position)
        runs: list[WorkflowRun] = []
        while len(runs) < limit:
            page = yield from self._page(newest, min(limit - len(runs), PAGE_SIZE))
            if page is None:
                break
            runs += page
        return runs

    def iter_runs(self, **filters: Unpack[RunFilters]) -> Iterator[WorkflowRun]:
        """See `AbstractWorkflowRunRepository.iter_runs`."""
        valid = valid_filters(filters)
        newest = _Newest(self.store, valid, None)
        while not valid.match_none:
            page = self.store.run(self._page(newest, PAGE_SIZE))
            if page is None:
                return
            yield from page

    async def aiter_runs(self, **filters: Unpack[RunFilters]) -> AsyncIterator[WorkflowRun]:
        """Async twin of `iter_runs`."""
        valid = valid_filters(filters)
        newest = _Newest(self.store, valid, None)
        while not valid.match_none:
            page = await self.store.arun(self._page(newest, PAGE_SIZE))
            if page is None:
                return
            for run in page:
                yield run

    def _page(self, newest: _Newest, count: int) -> Generator[Any, Any, list[WorkflowRun] | None]:
        """Give the runs of the next entries of the indexes, or None after the last one."""
        entries = yield from newest.entries(count)
        if not entries:
            return None
        page = yield from self._runs_of(entries, newest)
        return [run for run, _ in page]

    def _runs_of(
        self, entries: Sequence[bytes], newest: _Newest
    ) -> Generator[Any, Any, list[tuple[WorkflowRun, bytes | None]]]:
        """Give the runs of some entries, as far as they match, and when they saved a state."""
        run_ids = [entry[_TIME_LENGTH + 1 :].decode() for entry in entries]
        replies = yield self._read(run_ids, "state_at")
        filters = newest.filters
        runs = []
        for entry, run_id, (*values, state_at) in zip(entries, run_ids, replies, strict=True):
            run = _run(run_id, values)
            start = entry[:_TIME_LENGTH]
            if run is None or _time_text(run.started_at).encode() != start:
                # The server has evicted it, or somebody has deleted it by hand.
                call = self._call(scripts.CLEAN, run_id, start, newest.prefix + entry)
                keys = newest.keys[self.store.base(run_id)]
                with suppress(StorageError):
                    yield call._replace(keys=(*call.keys, *keys))
            elif (filters.statuses is None or run.status in filters.statuses) and (
                filters.workflow_name is None or run.workflow_name == filters.workflow_name
            ):
                runs.append((run, state_at))
        return runs

    def count_runs(self, **filters: Unpack[RunFilters]) -> int:
        """See `AbstractWorkflowRunRepository.count_runs`."""
        return self.store.run(self._count_runs(filters))

    async def acount_runs(self, **filters: Unpack[RunFilters]) -> int:
        """Async twin of `count_runs`."""
        return await self.store.arun(self._count_runs(filters))

    def _count_runs(self, filters: RunFilters) -> Generator[Any, Any, int]:
        valid = valid_filters(filters)
        if valid.match_none:
            return 0
        counts = yield _Newest(self.store, valid, None).counts()
        return sum(itertools.chain.from_iterable(counts))

    def update(self, run_id: str, **fields: Any) -> None:
        """See `AbstractWorkflowRunRepository.update`."""
        self.store.run(self._change(run_id, valid_updates(fields)))

    async def aupdate(self, run_id: str, **fields: Any) -> None:
        """Async twin of `update`."""
        await self.store.arun(self._change(run_id, valid_updates(fields)))

    def update_status(
        self,
        run_id: str,
        status: str,
        *,
        expected: str | Iterable[str] | None = None,
        **fields: Any,
    ) -> None:
        """See `AbstractWorkflowRunRepository.update_status`."""
        self.store.run(self._update_status(run_id, status, expected, fields))

    async def aupdate_status(
        self,
        run_id: str,
        status: str,
        *,
        expected: str | Iterable[str] | None = None,
        **fields: Any,
    ) -> None:
        """Async twin of `update_status`."""
        await self.store.arun(self._update_status(run_id, status, expected, fields))

    def _update_status(
        self,
        run_id: str,
        status: str,
        expected: str | Iterable[str] | None,
        fields: dict[str, Any],
    ) -> Generator[Any, Any, None]:
        changes = _status_change(valid_status(status), fields)
        statuses = None if expected is None else valid_expected(expected)
        yield from self._change(run_id, changes, statuses)

    def heartbeat(self, run_id: str) -> None:
        """See `AbstractWorkflowRunRepository.heartbeat`."""
        self.store.run(self._change(run_id, {"heartbeat_at": timezone.now()}))

    async def aheartbeat(self, run_id: str) -> None:
        """Async twin of `heartbeat`."""
        await self.store.arun(self._change(run_id, {"heartbeat_at": timezone.now()}))

    def _change(
        self, run_id: str, changes: dict[str, Any], expected: Iterable[RunStatus] | None = None
    ) -> Generator[Any, Any, None]:
        """Change fields of a run, if it is in one of the expected statuses; or say why not."""
        if not possible_id(run_id):
            raise RunNotFoundError(run_id)
        values = _written(changes)
        cleared = [name for name, value in changes.items() if value is None]
        statuses = sorted(status.value for status in expected or ())
        call = self._indexing if "status" in changes else self._call
        reply = yield call(
            scripts.CHANGE, run_id, _alternatives(statuses), 3 + len(values), *values, *cleared
        )
        if reply is None:
            raise RunNotFoundError(run_id)
        status, done = reply
        if not done:
            raise StatusConflictError(run_id, status.decode(), tuple(statuses))

    def delete(self, run_id: str) -> None:
        """See `AbstractWorkflowRunRepository.delete`."""
        self.store.run(self._delete(run_id))

    async def adelete(self, run_id: str) -> None:
        """Async twin of `delete`."""
        await self.store.arun(self._delete(run_id))

    def _delete(self, run_id: str) -> Generator[Any, Any, None]:
        if not possible_id(run_id) or (yield self._indexing(scripts.DELETE, run_id, "")) != 1:
            raise RunNotFoundError(run_id)

    def delete_finished(
        self,
        *,
        before: datetime,
        workflow_name: str | None = None,
        statuses: str | Iterable[str] = TERMINAL_STATUSES,
        batch_size: int = 1000,
    ) -> int:
        """See `AbstractWorkflowRunRepository.delete_finished`."""
        return self.store.run(self._delete_finished(before, workflow_name, statuses, batch_size))

    async def adelete_finished(
        self,
        *,
        before: datetime,
        workflow_name: str | None = None,
        statuses: str | Iterable[str] = TERMINAL_STATUSES,
        batch_size: int = 1000,
    ) -> int:
        """Async twin of `delete_finished`."""
        return await self.store.arun(
            self._delete_finished(before, workflow_name, statuses, batch_size)
        )

    def _delete_finished(
        self,
        before: datetime,
        workflow_name: str | None,
        statuses: str | Iterable[str],
        batch_size: int,
    ) -> Generator[Any, Any, int]:
        filters: RunFilters = {
            "workflow_name": workflow_name,
            "status": valid_terminal_statuses(statuses),
        }
        valid = valid_filters(filters)
        end = _time_text(valid_moment("before", before))
        size = min(valid_count("batch_size", batch_size, minimum=1), MAX_DELETED_AT_ONCE)
        if valid.match_none:
            return 0
        wanted = _alternatives(status.value for status in valid.statuses or ())
        deleted = 0
        for base in self.store.bases:
            begin: bytes | None = b"-"
            while begin is not None:
                page = ("ZRANGEBYLEX", f"{base}:ended", begin, f"({end}", "LIMIT", 0, size)
                (entries,) = yield [page]
                calls = [
                    self._indexing(
                        scripts.DELETE_ENDED,
                        entry[_TIME_LENGTH + 1 :].decode(),
                        entry[:_TIME_LENGTH],
                        wanted,
                        workflow_name or "",
                    )
                    for entry in entries
                ]
                if calls:
                    deleted += sum((yield calls))
                begin = b"(" + entries[-1] if len(entries) == size else None
        return deleted

    def list_stalled(self, idle: timedelta) -> list[WorkflowRun]:
        """See `AbstractWorkflowRunRepository.list_stalled`."""
        return self.store.run(self._list_stalled(idle))

    async def alist_stalled(self, idle: timedelta) -> list[WorkflowRun]:
        """Async twin of `list_stalled`."""
        return await self.store.arun(self._list_stalled(idle))

    def _list_stalled(self, idle: timedelta) -> Generator[Any, Any, list[WorkflowRun]]:
        cutoff = timezone.now() - valid_idle(idle)
        running = valid_filters({"status": RunStatus.RUNNING, "started_before": cutoff})
        newest = _Newest(self.store, running, None)
        since = _time_text(cutoff).encode()
        stalled = []
        while entries := (yield from newest.entries(PAGE_SIZE)):
            for run, state_at in (yield from self._runs_of(entries, newest)):
                alive = run.heartbeat_at is not None and run.heartbeat_at >= cutoff
                if not alive and (state_at is None or state_at < since):
                    stalled.append(run)
        return stalled

    def fail_if_stalled(self, run_id: str, idle: timedelta) -> bool:
        """See `AbstractWorkflowRunRepository.fail_if_stalled`."""
        return self.store.run(self._fail_if_stalled(run_id, idle))

    async def afail_if_stalled(self, run_id: str, idle: timedelta) -> bool:
        """Async twin of `fail_if_stalled`."""
        return await self.store.arun(self._fail_if_stalled(run_id, idle))

    async def afail_stalled(self, idle: timedelta) -> int:
        """Async twin of `fail_stalled`."""
        failed = 0
        for run in await self.alist_stalled(idle):
            failed += await self.afail_if_stalled(run.id, idle)
        return failed

    def _fail_if_stalled(self, run_id: str, idle: timedelta) -> Generator[Any, Any, bool]:
        cutoff = timezone.now() - valid_idle(idle)
        if not possible_id(run_id):
            return False
        changes = _status_change(RunStatus.FAILED, {"error_message": stalled_message(idle)})
        values = _written(changes)
        cleared = [name for name, value in changes.items() if value is None]
        reply = yield self._indexing(
            scripts.FAIL_STALLED,
            run_id,
            _time_text(cutoff),
            3 + len(values),
            *values,
            *cleared,
        )
        return bool(reply)

    def put(self, run: WorkflowRun, *, over: WorkflowRun | None = None) -> None:
        """See `AbstractWorkflowRunRepository.put`."""
        self.store.run(self._put(run, over))

    async def aput(self, run: WorkflowRun, *, over: WorkflowRun | None = None) -> None:
        """Async twin of `put`."""
        await self.store.arun(self._put(run, over))

    def _put(self, run: WorkflowRun, over: WorkflowRun | None) -> Generator[Any, Any, None]:
        fields = valid_fields(run_fields(run))
        values = _written(fields, exactly=True)
        if over is None:
            if not (yield self._indexing(scripts.ADD, run.id, *values, "version", 0)):
                raise RunAlreadyExistsError(run.id)
            return
        version = yield from self._version(run.id, over)
        cleared = [name for name in _FIELDS if name not in values[::2]]
        done = yield self._indexing(
            scripts.REPLACE, run.id, version, 3 + len(values), *values, *cleared
        )
        if not done:
            raise RunChangedError(run.id)

    def delete_unchanged(self, run: WorkflowRun, last: Checkpoint | None) -> None:
        """See `AbstractWorkflowRunRepository.delete_unchanged`."""
        self.store.run(self._delete_unchanged(run, last))

    async def adelete_unchanged(self, run: WorkflowRun, last: Checkpoint | None) -> None:
        """Async twin of `delete_unchanged`."""
        await self.store.arun(self._delete_unchanged(run, last))

    def _delete_unchanged(
        self, run: WorkflowRun, last: Checkpoint | None
    ) -> Generator[Any, Any, None]:
        version = yield from self._version(run.id, run)
        _, _, *newest = yield self._call(scripts.CHAIN, run.id, "")
        found = (int(newest[0]), *_parsed_mark(newest[1])) if newest else None
        if found != (last and (last["step"], last["node_id"], last["created_at"])):
            raise RunChangedError(run.id)
        if (yield self._indexing(scripts.DELETE, run.id, version)) != 1:
            raise RunChangedError(run.id)

    def _version(self, run_id: str, as_read: WorkflowRun) -> Generator[Any, Any, bytes]:
        """Give the version of a stored run that is as it was read."""
        (reply,) = yield self._read([run_id], "version")
        *values, version = reply
        stored = _run(run_id, values)
        if stored is None:
            raise RunNotFoundError(run_id)
        if not equal_runs(stored, as_read):
            raise RunChangedError(run_id)
        result: bytes = version
        return result

    def _position(self, before: str | WorkflowRun) -> Generator[Any, Any, bytes]:
        """Give the entry of a run."""
        if isinstance(before, WorkflowRun):
            return _entry(before.started_at, before.id)
        run = (yield from self._get(before)) if possible_id(before) else None
        if run is None:
            raise RunNotFoundError(before)
        return _entry(run.started_at, run.id)


class RedisExecutionStateRepository(_RedisRepository, AbstractExecutionStateRepository):
    """The checkpoints in Redis.

    Args:
        store: the server or cluster.
    """

    def save_state(self, run_id: str, state_data: dict[str, Any], node_id: str) -> int:
        """See `AbstractExecutionStateRepository.save_state`."""
        return self.writer(run_id).save_state(state_data, node_id)

    async def asave_state(self, run_id: str, state_data: dict[str, Any], node_id: str) -> int:
        """Async twin of `save_state`."""
        return await self.writer(run_id).asave_state(state_data, node_id)

    def append(self, run_id: str, checkpoints: Iterable[Checkpoint]) -> int:
        """See `AbstractExecutionStateRepository.append`."""
        return self.writer(run_id).append(checkpoints)

    async def aappend(self, run_id: str, checkpoints: Iterable[Checkpoint]) -> int:
        """Async twin of `append`."""
        return await self.writer(run_id).aappend(checkpoints)

    def writer(self, run_id: str) -> RedisStateWriter:
        """See `AbstractExecutionStateRepository.writer`."""
        return RedisStateWriter(self, run_id)

    def get_latest_checkpoint(self, run_id: str) -> Checkpoint | None:
        """See `AbstractExecutionStateRepository.get_latest_checkpoint`."""
        return self.store.run(self._checkpoint(run_id, None))

    async def aget_latest_checkpoint(self, run_id: str) -> Checkpoint | None:
        """Async twin of `get_latest_checkpoint`."""
        return await self.store.arun(self._checkpoint(run_id, None))

    async def aget_latest_state(self, run_id: str) -> dict[str, Any] | None:
        """Async twin of `get_latest_state`."""
        checkpoint = await self.aget_latest_checkpoint(run_id)
        return None if checkpoint is None else checkpoint["state_data"]

    def get_state(self, run_id: str, step: int) -> Checkpoint | None:
        """See `AbstractExecutionStateRepository.get_state`."""
        return self.store.run(self._checkpoint(run_id, valid_step(step)))

    async def aget_state(self, run_id: str, step: int) -> Checkpoint | None:
        """Async twin of `get_state`."""
        return await self.store.arun(self._checkpoint(run_id, valid_step(step)))

    def _checkpoint(self, run_id: str, step: int | None) -> Generator[Any, Any, Checkpoint | None]:
        """Give the checkpoint with a step; the newest for None."""
        if not possible_id(run_id) or (step is not None and step not in _STEPS):
            return None
        reply = yield self._call(scripts.CHAIN, run_id, "" if step is None else int(step))
        next_step, first = map(int, reply[:2])
        chain = reply[2:]
        if not chain:
            wanted = next_step - 1 if step is None else step
            if first <= wanted < next_step:
                raise DamagedStateError(run_id, wanted, _MISSING)
            return None
        found, mark, stored = chain[:3]
        if not is_delta(stored):
            return _as_checkpoint(run_id, found, mark, stored, whole=True)
        text = _rebuilt(run_id, chain, found)
        return _as_checkpoint(run_id, found, mark, text, whole=False)

    def iter_state_history(self, run_id: str, *, after: int = -1) -> Iterator[Checkpoint]:
        """See `AbstractExecutionStateRepository.iter_state_history`."""
        history = _History(self, run_id, after)
        while page := self.store.run(history.page()):
            for stored in page:
                checkpoint = self.store.run(history.checkpoint(*stored))
                if checkpoint is not None:
                    yield checkpoint

    async def aiter_state_history(
        self, run_id: str, *, after: int = -1
    ) -> AsyncIterator[Checkpoint]:
        """Async twin of `iter_state_history`."""
        history = _History(self, run_id, after)
        while page := await self.store.arun(history.page()):
            for stored in page:
                checkpoint = await self.store.arun(history.checkpoint(*stored))
                if checkpoint is not None:
                    yield checkpoint

    async def aget_state_history(self, run_id: str) -> list[Checkpoint]:
        """Async twin of `get_state_history`."""
        return [checkpoint async for checkpoint in self.aiter_state_history(run_id)]

    def delete_states(self, run_id: str, *, keep_last: int = 0) -> int:
        """See `AbstractExecutionStateRepository.delete_states`."""
        return self.store.run(self._delete_states(run_id, keep_last))

    async def adelete_states(self, run_id: str, *, keep_last: int = 0) -> int:
        """Async twin of `delete_states`."""
        return await self.store.arun(self._delete_states(run_id, keep_last))

    def _delete_states(self, run_id: str, keep_last: int) -> Generator[Any, Any, int]:
        valid_count("keep_last", keep_last)
        if not possible_id(run_id):
            raise RunNotFoundError(run_id)
        for _ in range(MAX_TRIMS):
            args: list[Any] = [""]
            if keep_last:
                bounds = yield self._call(scripts.CHAIN, run_id, _STEPS.stop)
                next_step, first_kept = map(int, bounds)
                first = max(next_step - keep_last, first_kept)
                args = [first]
                for step in range(first, next_step):
                    if base_step(step) < first:
                        args += yield from self._made_whole(run_id, step)
            deleted = yield self._call(scripts.TRIM, run_id, *args)
            if deleted is None:
                raise RunNotFoundError(run_id)
            if deleted >= 0:
                return int(deleted)
        raise StorageUnavailableError(
            f"Other processes keep deleting states of workflow run {run_id}. Try again."
        )

    def _made_whole(self, run_id: str, step: int) -> Generator[Any, Any, list[Any]]:
        """Give a step, its mark and its whole state, if it is stored as a delta."""
        _, _, *chain = yield self._call(scripts.CHAIN, run_id, step)
        if not chain or not is_delta(chain[2]):
            return []
        try:
            return [step, chain[1], _rebuilt(run_id, chain, step)]
        except DamagedStateError:
            logger.exception("A damaged state is left as it is")
            return [step, chain[1], ""]


class _History:
    """Where a reading of all states of a run stands, and the states to base the next ones on."""

    def __init__(self, states: RedisExecutionStateRepository, run_id: str, after: int) -> None:
        self.run_id = run_id
        self._states = states
        self._texts: dict[int, bytes] = {}
        self._last_step = after

    def page(self) -> Generator[Any, Any, list[tuple[int, bytes | None, bytes | None]]]:
        """Give step, mark and stored state of the next ones."""
        if not possible_id(self.run_id):
            return []
        last_step = min(max(self._last_step, -1), _STEPS.stop)
        flat = yield self._states._call(scripts.PAGE, self.run_id, last_step, STATES_PAGE)
        page = list(zip(flat[::3], flat[1::3], flat[2::3], strict=True))
        if page:
            self._last_step = page[-1][0]
        return page

    def checkpoint(
        self, step: int, mark: bytes | None, stored: bytes | None
    ) -> Generator[Any, Any, Checkpoint | None]:
        """Give one of them rebuilt; None if it has been deleted since."""
        if mark is None or stored is None:
            raise DamagedStateError(self.run_id, step, _MISSING)
        text: bytes | None = None
        if not is_delta(stored):
            text = stored
        elif base_step(step) in self._texts:
            # If the run was deleted and begun anew meanwhile, it has another base by now.
            with suppress(ValueError):
                text = apply_delta(stored, self._texts[base_step(step)])
        if text is None:
            _, _, *chain = yield self._states._call(scripts.CHAIN, self.run_id, step)
            if not chain or chain[1] != mark:
                return None
            text = _rebuilt(self.run_id, chain, step)
        remember(self._texts, step, text)
        return _as_checkpoint(self.run_id, step, mark, text, whole=text is stored)


class RedisStateWriter(StateWriter):
    """Appends checkpoints to one run, and remembers the states that the next is based on."""

    def __init__(self, states: RedisExecutionStateRepository, run_id: str) -> None:
        super().__init__(states, run_id)
        self._states = states
        self._next: int | None = None
        self._texts: dict[int, bytes] = {}
        self._marks: dict[int, bytes] = {}

    def save_state(self, state_data: dict[str, Any], node_id: str) -> int:
        """See `AbstractExecutionStateRepository.save_state`."""
        return self._states.store.run(self._save(state_data, node_id))

    async def asave_state(self, state_data: dict[str, Any], node_id: str) -> int:
        """Async twin of `save_state`."""
        return await self._states.store.arun(self._save(state_data, node_id))

    def append(self, checkpoints: Iterable[Checkpoint]) -> int:
        """See `AbstractExecutionStateRepository.append`."""
        count = 0
        for checkpoint in checkpoints:
            self._states.store.run(self._append(checkpoint))
            count += 1
        if not count:
            self._states.store.run(self._refuse_unknown())
        return count

    async def aappend(self, checkpoints: Iterable[Checkpoint]) -> int:
        """Async twin of `append`."""
        count = 0
        for checkpoint in checkpoints:
            await self._states.store.arun(self._append(checkpoint))
            count += 1
        if not count:
            await self._states.store.arun(self._refuse_unknown())
        return count

    def _refuse_unknown(self) -> Generator[Any, Any, None]:
        if possible_id(self.run_id):
            (found,) = yield self._states._read([self.run_id])
            if found[0] is not None:
                return
        raise RunNotFoundError(self.run_id)

    def _save(self, state_data: dict[str, Any], node_id: str) -> Generator[Any, Any, int]:
        text = valid_state(state_data)
        node_id = valid_name("node_id", node_id, MAX_NODE_ID)
        if not possible_id(self.run_id):
            raise RunNotFoundError(self.run_id)
        for attempt in itertools.count():
            if attempt < MAX_BASED:
                base, stored = yield from self._encoded(text)
            else:
                base, stored = None, text
            now = timezone.now()
            mark = _mark(now, node_id)
            # A whole state is good at any step, so another writer is no reason to try again.
            condition = ("", "", "") if base is None else (self._next, base, self._marks[base])
            step = yield self._states._call(
                scripts.APPEND, self.run_id, *condition, _time_text(now), mark, stored
            )
            if step is None:
                self._forget()
                raise RunNotFoundError(self.run_id)
            if step >= 0:
                return self._remember(step, mark, text)
            self._forget()
        raise AssertionError("unreachable")

    def _append(self, checkpoint: Checkpoint) -> Generator[Any, Any, int]:
        step, node_id, created_at, text = valid_checkpoint(checkpoint)
        if not possible_id(self.run_id):
            raise RunNotFoundError(self.run_id)
        mark = _mark(created_at, node_id)
        for attempt in itertools.count():
            if self._next != step:
                yield from self._reload()
            base, stored = (
                (None, text) if attempt >= MAX_BASED else (yield from self._encoded(text))
            )
            if self._next not in (0, step):
                raise StepConflictError(self.run_id, step, self._next or 0)
            # A run without states can begin anywhere.
            first = step if self._next == 0 else ""
            condition = ("", "") if base is None else (base, self._marks[base])
            reply = yield self._states._call(
                scripts.APPEND_AT,
                self.run_id,
                first,
                step,
                *condition,
                _time_text(created_at),
                mark,
                stored,
            )
            if reply is None:
                self._forget()
                raise RunNotFoundError(self.run_id)
            if reply >= 0:
                return self._remember(step, mark, text)
            self._forget()
        raise AssertionError("unreachable")

    def _encoded(self, text: bytes) -> Generator[Any, Any, tuple[int | None, bytes]]:
        """Give a state as it is stored, with the step that it is based on if it is a delta."""
        if len(text) <= SMALL_STATE:
            return None, text
        if self._next is None or (self._next and base_step(self._next) not in self._texts):
            # Somebody else wrote to the run, or deleted from it, or this is the first time.
            yield from self._reload()
        if not self._next:
            return None, text
        base = base_step(self._next)
        stored = encode_state(text, self._texts.get(base))
        return (base if is_delta(stored) else None), stored

    def _reload(self) -> Generator[Any, Any, None]:
        """Remember the state that the next one is based on, and all that it is based on."""
        self._forget()
        next_step, _, *chain = yield self._states._call(scripts.CHAIN, self.run_id, "base")
        self._next = int(next_step)
        links = list(zip(chain[::3], chain[1::3], chain[2::3], strict=True))
        for step, mark, stored in reversed(links):
            try:
                text = stored
                if is_delta(stored):
                    text = _rebuilt(self.run_id, chain, step)
            except DamagedStateError:
                # The new state is then stored whole, and the run goes on.
                logger.exception("A state cannot serve as a base")
                continue
            self._texts[step] = text
            self._marks[step] = mark

    def _remember(self, step: int, mark: bytes, text: bytes) -> int:
        remember(self._texts, step, text)
        remember(self._marks, step, mark)
        self._next = step + 1
        return step

    def _forget(self) -> None:
        self._next = None
        self._texts.clear()
        self._marks.clear()


class _Newest:
    """Reads the entries of the indexes that some filters mean, newest first, bit by bit.

    A run that changes its status moves from one index to another of the same slot. They are
    read together, in one script, so that it is never missed between the two.
    """

    def __init__(self, store: RedisStore, filters: ValidFilters, before: bytes | None) -> None:
        self.filters = filters
        statuses = filters.statuses if filters.statuses is not None else list(RunStatus)
        kind = "runs" if filters.workflow_name is None else "workflows"
        self.keys = {
            base: tuple(f"{base}:{kind}:{status.value}" for status in statuses)
            for base in store.bases
        }
        # What all entries begin with, before the start.
        self.prefix = (
            b"" if filters.workflow_name is None else f"{filters.workflow_name}\0".encode()
        )
        after, until = filters.started_after, filters.started_before
        self._lowest = b"[" + self.prefix if self.prefix else b"-"
        if after is not None:
            self._lowest = b"[" + self.prefix + _time_text(after).encode()
        highest = [b"(" + self.prefix + _time_text(until).encode()] if until is not None else []
        if before is not None:
            highest.append(b"(" + self.prefix + before)
        # What each base has left to give comes after this entry.
        end = b"(" + self.prefix[:-1] + b"\1" if self.prefix else b"+"
        self._after = dict.fromkeys(self.keys, min(highest, default=end))
        self._unread = set(self.keys)
        self._entries: list[bytes] = []

    def counts(self) -> list[Call]:
        """Give the calls whose replies are how many entries there are in each index."""
        return [
            Call(scripts.INDEX, self.keys[base], (self._after[base], self._lowest))
            for base in self.keys
        ]

    def entries(self, count: int) -> Generator[Any, Any, list[bytes]]:
        """Give the next entries: as many, fewer before the last one, none after it."""
        size = count if len(self.keys) == 1 else max(2 * count // len(self.keys), 10)
        while behind := self._behind(count):
            calls = [
                Call(scripts.INDEX, self.keys[base], (self._after[base], self._lowest, size))
                for base in behind
            ]
            for base, lists in zip(behind, (yield calls), strict=True):
                found = sorted(set(itertools.chain.from_iterable(lists)), reverse=True)[:size]
                self._entries += found
                if len(found) < size:
                    self._unread.discard(base)
                else:
                    self._after[base] = b"(" + found[-1]
            self._entries.sort(reverse=True)
        entries, self._entries = self._entries[:count], self._entries[count:]
        return [entry[len(self.prefix) :] for entry in entries]

    def _behind(self, count: int) -> list[str]:
        """Give the bases that may have an entry before the last of the next ones."""
        if len(self._entries) < count:
            return [base for base in self.keys if base in self._unread]
        last = b"(" + self._entries[count - 1]
        return [base for base in self.keys if base in self._unread and self._after[base] > last]


def _written(fields: dict[str, Any], *, exactly: bool = False) -> list[Any]:
    """Give fields of a run as names and values for Redis; what is None is left out.

    Args:
        fields: valid fields, by name.
        exactly: also keep that a run that has ended has no duration_seconds.
    """
    written: list[Any] = []
    for name, value in fields.items():
        if name == "id" or value is None:
            continue
        if name in PAYLOADS:
            text: Any = payload_json(name, value)
        elif name in _TIMES:
            text = _time_text(value)
        elif isinstance(value, float):
            text = repr(value)
        else:
            text = str(value)
        written += [name, text]
    if exactly and fields["completed_at"] is not None and fields["duration_seconds"] is None:
        written += ["duration_seconds", _NO_DURATION]
    return written


def _status_change(status: RunStatus, fields: dict[str, Any]) -> dict[str, Any]:
    """Give the fields that a change of status changes; the duration comes from the times."""
    changes = {**valid_updates(fields, status), "status": status.value}
    now = timezone.now()
    if status.is_terminal:
        if changes.get("completed_at") is None:
            changes["completed_at"] = now
        changes.setdefault("duration_seconds", None)
    else:
        changes |= {**dict.fromkeys(RESULT_TIMES), "heartbeat_at": now}
    return changes


def _run(run_id: str, values: Sequence[bytes | None]) -> WorkflowRun | None:
    """Give a run from its fields in Redis, or None if it has none."""
    if values[0] is None or values[_FIELDS.index("status")] is None:
        return None
    try:
        fields = [
            None if value is None else read(value)
            for read, value in zip(_READERS, values, strict=True)
        ]
    except (ValueError, UnicodeDecodeError) as exc:
        raise StorageError(
            f"The stored workflow run {run_id} cannot be read: {exc}. Restore it from a backup, "
            "or delete it."
        ) from exc
    run = WorkflowRun.from_db(None, _MODEL_FIELDS, [run_id, *fields])
    if values[_DURATION] is None and run.completed_at is not None:
        run.duration_seconds = (run.completed_at - run.started_at).total_seconds()
    return run


def _duration(value: bytes) -> float | None:
    return None if value == _NO_DURATION else float(value)


def _time(value: bytes) -> datetime:
    moment = datetime.fromisoformat(value.decode())
    return moment.replace(tzinfo=UTC) if settings.USE_TZ else moment


def _time_text(value: datetime) -> str:
    """Give a time as 26 characters that sort as times do: in UTC if it has a time zone."""
    if value.tzinfo is not None:
        value = value.astimezone(UTC).replace(tzinfo=None)
    return value.isoformat(timespec="microseconds")


_MODEL_FIELDS = ("id", *_FIELDS)
_DURATION = _FIELDS.index("duration_seconds")
_NUMBERS: dict[str, Callable[[bytes], Any]] = {
    "duration_seconds": _duration,
    "total_cost_usd": float,
    "total_tokens": int,
}
_READERS = [
    load_json if name in PAYLOADS else _time if name in _TIMES else _NUMBERS.get(name, bytes.decode)
    for name in _FIELDS
]


def _entry(started_at: datetime, run_id: str) -> bytes:
    return f"{_time_text(started_at)} {plain_text(run_id)}".encode()


def _alternatives(values: Iterable[str]) -> str:
    """Give values as the scripts look for one of them: ``|a|b|``, or nothing for any."""
    joined = "|".join(values)
    return f"|{joined}|" if joined else ""


def _mark(created_at: datetime, node_id: str) -> bytes:
    """Give what is stored beside a state: its time, a number that tells it, its node."""
    return f"{_time_text(created_at)} {random.getrandbits(32):08x} {node_id}".encode()


def _parsed_mark(mark: bytes) -> tuple[str, datetime]:
    """Give the node and the time."""
    return mark[_TIME_LENGTH + 10 :].decode(), _time(mark[:_TIME_LENGTH])


def _as_checkpoint(run_id: str, step: int, mark: bytes, text: bytes, *, whole: bool) -> Checkpoint:
    node_id, created_at = _parsed_mark(mark)
    load = whole_state if whole else loaded_state
    return Checkpoint(
        step=step, node_id=node_id, state_data=load(run_id, step, text), created_at=created_at
    )


def _rebuilt(run_id: str, chain: Sequence[Any], step: int) -> bytes:
    """Give the JSON text of a state from a chain of step, mark and stored state."""
    try:
        return decode_state(dict(zip(chain[::3], chain[2::3], strict=True)), step)
    except ValueError as exc:
        raise DamagedStateError(run_id, step, str(exc)) from exc

"""The repositories on Redis and Redis Cluster.

Each method is a generator (see `RedisStore`) that its sync and its async form carry out. All
that belongs to a run lies in one hash slot, and every change is one script.
"""

from __future__ import annotations

import itertools
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Unpack

from django.utils import timezone

from workflow_storage.backends.redis import scripts
from workflow_storage.backends.redis.connection import Call, RedisStore
from workflow_storage.backends.redis.repository import (
    FIELDS,
    TIME_LENGTH,
    RedisRepository,
    parsed_mark,
    parsed_time,
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
    StorageError,
)
from workflow_storage.models import WorkflowRun
from workflow_storage.serialization import load_json, payload_json
from workflow_storage.status import TERMINAL_STATUSES, RunStatus
from workflow_storage.validation import (
    PAYLOADS,
    ValidFilters,
    equal_runs,
    is_possible_id,
    plain_text,
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
    from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator, Sequence
    from datetime import datetime, timedelta

MAX_DELETED_AT_ONCE = 200
"""Runs that `delete_finished` sends to the server at a time."""

_TIMES = frozenset({"started_at", "completed_at", "heartbeat_at"})
_NO_DURATION = b"-"
"""The duration_seconds of a run that has ended and has none, as no run of the contract."""


class RedisWorkflowRunRepository(RedisRepository, AbstractWorkflowRunRepository):
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
        if not is_possible_id(run_id):
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
        run_ids = [entry[TIME_LENGTH + 1 :].decode() for entry in entries]
        replies = yield self._read(run_ids, "state_at")
        filters = newest.filters
        runs = []
        for entry, run_id, (*values, state_at) in zip(entries, run_ids, replies, strict=True):
            run = _run(run_id, values)
            start = entry[:TIME_LENGTH]
            if run is None or time_text(run.started_at).encode() != start:
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
        changes = status_change(valid_status(status), fields)
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
        if not is_possible_id(run_id):
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
        if not is_possible_id(run_id) or (yield self._indexing(scripts.DELETE, run_id, "")) != 1:
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
        end = time_text(valid_moment("before", before))
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
                        entry[TIME_LENGTH + 1 :].decode(),
                        entry[:TIME_LENGTH],
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
        since = time_text(cutoff).encode()
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
        if not is_possible_id(run_id):
            return False
        changes = status_change(RunStatus.FAILED, {"error_message": stalled_message(idle)})
        values = _written(changes)
        cleared = [name for name, value in changes.items() if value is None]
        reply = yield self._indexing(
            scripts.FAIL_STALLED,
            run_id,
            time_text(cutoff),
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
        cleared = [name for name in FIELDS if name not in values[::2]]
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
        found = (int(newest[0]), *parsed_mark(newest[1])) if newest else None
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
        run = (yield from self._get(before)) if is_possible_id(before) else None
        if run is None:
            raise RunNotFoundError(before)
        return _entry(run.started_at, run.id)


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
            self._lowest = b"[" + self.prefix + time_text(after).encode()
        highest = [b"(" + self.prefix + time_text(until).encode()] if until is not None else []
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
            text = time_text(value)
        elif isinstance(value, float):
            text = repr(value)
        else:
            text = str(value)
        written += [name, text]
    if exactly and fields["completed_at"] is not None and fields["duration_seconds"] is None:
        written += ["duration_seconds", _NO_DURATION]
    return written


def _run(run_id: str, values: Sequence[bytes | None]) -> WorkflowRun | None:
    """Give a run from its fields in Redis, or None if it has none."""
    if values[0] is None or values[FIELDS.index("status")] is None:
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


_MODEL_FIELDS = ("id", *FIELDS)
_DURATION = FIELDS.index("duration_seconds")
_NUMBERS: dict[str, Callable[[bytes], Any]] = {
    "duration_seconds": _duration,
    "total_cost_usd": float,
    "total_tokens": int,
}
_READERS = [
    load_json
    if name in PAYLOADS
    else parsed_time
    if name in _TIMES
    else _NUMBERS.get(name, bytes.decode)
    for name in FIELDS
]


def _entry(started_at: datetime, run_id: str) -> bytes:
    return f"{time_text(started_at)} {plain_text(run_id)}".encode()


def _alternatives(values: Iterable[str]) -> str:
    """Give values as the scripts look for one of them: ``|a|b|``, or nothing for any."""
    joined = "|".join(values)
    return f"|{joined}|" if joined else ""

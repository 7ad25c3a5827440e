"""Whether the indexes hold the runs that there are, and no others; for `check_runs`.

Each run, and each entry that looks wrong, is decided on by one script, so that what changes meanwhile
is no damage.
"""

from __future__ import annotations

import re
from itertools import compress, islice
from typing import TYPE_CHECKING, Any

from redis.exceptions import RedisError

from workflow_storage.backends.redis import scripts
from workflow_storage.backends.redis.errors import storage_error
from workflow_storage.backends.redis.indexes import NewestRuns, entry_of, parsed_entry
from workflow_storage.backends.redis.records import known_fields_from, read_runs, run_from
from workflow_storage.backends.redis.repository import call, indexing_call, time_text
from workflow_storage.backends.redis.scripts import INDEXES, TIME_LENGTH
from workflow_storage.base import Damage
from workflow_storage.exceptions import StorageError, StorageUnavailableError
from workflow_storage.validation import valid_fields

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from workflow_storage.backends.redis.connection import Operation, RedisStore
    from workflow_storage.backends.redis.scripts import Call
    from workflow_storage.filters import ValidFilters
    from workflow_storage.models import WorkflowRun

_AT_ONCE = 200
"""Runs, or entries of an index, that are looked at together."""


def missing_entries(
    store: RedisStore, run_ids: Sequence[str], *, repair: bool, only_unlisted: bool = False
) -> Operation[list[Damage]]:
    """Return which of some runs lack entries in the indexes.

    Args:
        store: where.
        run_ids: which runs.
        repair: add the entries.
        only_unlisted: leave those alone that a list of all runs shows.
    """
    damages = []
    for first in range(0, len(run_ids), _AT_ONCE):
        batch = run_ids[first : first + _AT_ONCE]
        calls, repairs = (
            [
                indexing_call(store, scripts.MISSING, run_id, repairing, int(only_unlisted))
                for run_id in batch
            ]
            for repairing in (0, 1)
        )
        replies = yield from _decided(store, calls, repairs if repair else ())
        damages += [
            Damage(run_id, f"it lacks entries in the indexes: {missing}", repair)
            for run_id, missing in zip(batch, replies, strict=True)
            if missing
        ]
    return damages


def unlisted(store: RedisStore, *, repair: bool) -> Iterator[Damage]:
    """Yield the runs that no list shows, for they lack entries in the indexes; and lone states."""
    runs = _ids(store, "run")
    while run_ids := list(islice(runs, _AT_ONCE)):
        yield from store.execute(missing_entries(store, run_ids, repair=repair, only_unlisted=True))
    of_states = _ids(store, "states")
    while run_ids := list(islice(of_states, _AT_ONCE)):
        yield from store.execute(_without_run(store, run_ids))


def stray_entries(store: RedisStore, *, repair: bool) -> Iterator[Damage]:
    """Yield the entries of the indexes that no run has."""
    for prefix in store.key_prefixes:
        for name in INDEXES:
            key, after = f"{prefix}:{name}", b"-"
            while True:
                entries, damages = store.execute(_strays(store, key, after, repair=repair))
                yield from damages
                if len(entries) < _AT_ONCE:
                    break
                after = b"(" + entries[-1]


def _strays(
    store: RedisStore, key: str, after: bytes, *, repair: bool
) -> Operation[tuple[list[bytes], list[Damage]]]:
    (entries,) = yield [("ZRANGEBYLEX", key, after, "+", "LIMIT", 0, _AT_ONCE)]
    prefix, _, name = key.partition("}:")
    run_ids = [_id_in(entry) for entry in entries]
    # Of another slot's run it can be no entry, and one script cannot look at both.
    places = [
        place for place, run_id in enumerate(run_ids) if store.key_prefix(run_id) == f"{prefix}}}"
    ]
    calls, repairs = (
        [
            indexing_call(store, scripts.STRAY, run_ids[place], key, entries[place], repairing)
            for place in places
        ]
        for repairing in (0, 1)
    )
    decided = yield from _decided(store, calls, repairs if repair else ())
    replies = dict(zip(places, decided, strict=True))
    problem = f"it has an entry in the index {name} that does not belong to it"
    return entries, [
        Damage(run_id, problem, repair and place in replies)
        for place, run_id in enumerate(run_ids)
        if replies.get(place, 1)
    ]


def _decided(
    store: RedisStore, calls: Sequence[Call], repairs: Sequence[Call]
) -> Operation[list[int]]:
    """Carry out scripts that look at a run each, and those that repair what they find.

    Where a run is too damaged to have a place in the indexes, nothing is found and nothing
    repaired: what is wrong with it is said where it is read.
    """
    try:
        found = yield from _replies(calls)
    except StorageUnavailableError:
        raise
    except StorageError:
        sound = yield from _with_place(store, calls)
        if all(sound):
            raise
        replies = yield from _replies(list(compress(calls, sound)))
        found = _spread(replies, sound)
    else:
        suspects = [reply != 0 for reply in found]
        sound = yield from _with_place(store, list(compress(calls, suspects)))
        found = _spread(compress(compress(found, suspects), sound), _spread(sound, suspects))
    yield from _replies(list(compress(repairs, found)))
    return found


def _replies(calls: Sequence[Call]) -> Operation[list[int]]:
    replies: list[int] = (yield calls) if calls else []
    return replies


def _spread(values: Iterable[int], where: Iterable[int]) -> list[int]:
    """Return the values at the places where something is true, and 0 elsewhere."""
    rest = iter(values)
    return [next(rest) if is_there else 0 for is_there in where]


def _with_place(store: RedisStore, calls: Sequence[Call]) -> Operation[list[bool]]:
    if not calls:
        return []
    run_ids = [call.args[0] for call in calls]
    stored = yield read_runs(store, run_ids)
    return [_has_place(*one) for one in zip(run_ids, stored, strict=True)]


def _has_place(run_id: str, values: Sequence[bytes | None]) -> bool:
    """Whether the fields of a run, if there is one, are such that it has a place in the indexes."""
    try:
        run = run_from(run_id, values)
        if run is not None:
            names = ("workflow_name", "status", "started_at", "labels", "parent_id")
            valid_fields({name: getattr(run, name) for name in names})
    except StorageError:
        return False
    return True


def newest_ids(
    store: RedisStore, filters: ValidFilters, before: WorkflowRun | None, limit: int
) -> Operation[list[str]]:
    """Return the ids of the runs that filters mean, newest first, and of those that cannot be read."""
    if filters.match_none:
        return []
    position = None if before is None else entry_of(before.started_at, before.id)
    newest = NewestRuns(store, filters, position)
    run_ids: list[str] = []
    while len(run_ids) < limit:
        entries = yield from newest.entries(min(limit - len(run_ids), _AT_ONCE))
        if not entries:
            break
        parsed = [parsed_entry(entry) for entry in entries]
        replies = yield read_runs(store, [run_id for _, run_id in parsed])
        run_ids += [
            run_id
            for (start, run_id), values in zip(parsed, replies, strict=True)
            if _may_be_meant(filters, run_id, start, values)
        ]
    return run_ids


def known_fields(store: RedisStore, run_id: str) -> Operation[dict[str, Any]]:
    """Return those fields of a run that can be read."""
    (values,) = yield read_runs(store, [run_id])
    return known_fields_from(run_id, values)


def _may_be_meant(
    filters: ValidFilters, run_id: str, start: bytes, values: Sequence[bytes | None]
) -> bool:
    if not _has_place(run_id, values):
        return True
    run = run_from(run_id, values)
    return run is not None and time_text(run.started_at).encode() == start and filters.matches(run)


def _id_in(entry: bytes) -> str:
    return entry.rpartition(b"\0")[2][TIME_LENGTH + 1 :].decode(errors="replace")


def _without_run(store: RedisStore, run_ids: Sequence[str]) -> Operation[list[Damage]]:
    calls = [call(store, scripts.CHAIN, run_id, "") for run_id in run_ids]
    exist = yield [("EXISTS", one.keys[0]) for one in calls]
    return [
        Damage(run_id, "there are states of it, and no run")
        for run_id, exists in zip(run_ids, exist, strict=True)
        if not exists
    ]


def _ids(store: RedisStore, kind: str) -> Iterator[str]:
    """Yield the ids that have a key of a kind, wherever it is."""
    pattern = re.sub(r"([*?\[\]^\\-])", r"\\\1", f"{{{store.prefix}") + f"*}}:{kind}:*"
    try:
        for server in store.servers():
            for key in server.scan_iter(match=pattern, count=1000):
                prefix, _, run_id = key.decode(errors="replace").partition(f"}}:{kind}:")
                if f"{prefix}}}" in store.key_prefixes:
                    yield run_id
    except RedisError as exc:
        raise storage_error(exc, store.url) from exc

"""Whether the indexes hold the runs that there are, and no others; for `check_runs`.

Each run, and each entry that looks wrong, is decided on by one script, so that what changes meanwhile
is no damage.
"""

from __future__ import annotations

import re
from itertools import islice
from typing import TYPE_CHECKING

from redis.exceptions import RedisError

from workflow_storage.backends.redis import scripts
from workflow_storage.backends.redis.errors import storage_error
from workflow_storage.backends.redis.repository import call, indexing_call
from workflow_storage.backends.redis.scripts import INDEXES, TIME_LENGTH
from workflow_storage.base import Damage

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from workflow_storage.backends.redis.connection import Operation, RedisStore

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
        replies = yield [
            indexing_call(store, scripts.MISSING, run_id, int(repair), int(only_unlisted))
            for run_id in batch
        ]
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
    calls = {
        place: indexing_call(store, scripts.STRAY, run_id, key, entries[place], int(repair))
        for place, run_id in enumerate(run_ids)
        if store.key_prefix(run_id) == f"{prefix}}}"
    }
    replies = dict(zip(calls, (yield list(calls.values())), strict=True)) if calls else {}
    problem = f"it has an entry in the index {name} that does not belong to it"
    return entries, [
        Damage(run_id, problem, repair and place in replies)
        for place, run_id in enumerate(run_ids)
        if replies.get(place, 1)
    ]


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

"""What the repositories on Redis share: the keys of a run, and how times are written."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from django.conf import settings

from workflow_storage.backends.redis import scripts
from workflow_storage.backends.redis.connection import Call, RedisStore
from workflow_storage.validation import RUN_FIELDS, plain_text

if TYPE_CHECKING:
    from collections.abc import Iterable

FIELDS = RUN_FIELDS[1:]
"""The fields in the hash of a run; the id is in its key."""

TIME_LENGTH = 26
"""Characters of what `time_text` writes."""


class RedisRepository:
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
            ("HMGET", f"{self.store.base(run_id)}:run:{run_id}", *FIELDS, *extra)
            for run_id in map(plain_text, run_ids)
        ]


def parsed_time(value: bytes) -> datetime:
    """Give the time that `time_text` has written."""
    moment = datetime.fromisoformat(value.decode())
    return moment.replace(tzinfo=UTC) if settings.USE_TZ else moment


def time_text(value: datetime) -> str:
    """Give a time as 26 characters that sort as times do: in UTC if it has a time zone."""
    if value.tzinfo is not None:
        value = value.astimezone(UTC).replace(tzinfo=None)
    return value.isoformat(timespec="microseconds")


def parsed_mark(mark: bytes) -> tuple[str, datetime]:
    """Give the node and the time of the mark that is stored beside a state."""
    return mark[TIME_LENGTH + 10 :].decode(), parsed_time(mark[:TIME_LENGTH])

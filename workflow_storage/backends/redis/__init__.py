"""Runs and states in Redis, Valkey, or a cluster of them: the door of the store."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Unpack

from workflow_storage.exceptions import StorageError

try:
    import redis  # noqa: F401 - the first of its imports says what to install
except ImportError as exc:
    raise StorageError(
        "redis-py is not installed. Run: pip install 'django-workflow-storage[redis]'"
    ) from exc

from workflow_storage.backends.redis.checking import (
    known_fields,
    missing_entries,
    newest_ids,
    stray_entries,
    unlisted,
)
from workflow_storage.backends.redis.checks import check_durability
from workflow_storage.backends.redis.connection import RedisStore
from workflow_storage.backends.redis.runs import RedisWorkflowRunRepository
from workflow_storage.backends.redis.states import RedisExecutionStateRepository
from workflow_storage.backends.redis.url import RedisURL
from workflow_storage.base import StorageBackend
from workflow_storage.filters import valid_filters

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from django.core.checks import CheckMessage

    from workflow_storage.base import Damage, RunFilters
    from workflow_storage.config import StorageConfig
    from workflow_storage.models import WorkflowRun

__all__ = [
    "RedisBackend",
    "RedisExecutionStateRepository",
    "RedisWorkflowRunRepository",
    "check_store",
    "database_settings",
    "open_redis",
    "open_store",
]


class RedisBackend(StorageBackend):
    """A Redis server or cluster.

    Attributes:
        store: the connection to it.
    """

    def __init__(
        self, runs: RedisWorkflowRunRepository, states: RedisExecutionStateRepository
    ) -> None:
        super().__init__(runs, states, name=runs.store.name)
        self.store = runs.store

    def check(self) -> list[CheckMessage]:
        return check_durability(self.store.url)

    def check_indexes(self, runs: Sequence[WorkflowRun], *, repair: bool = False) -> list[Damage]:
        return self.store.execute(
            missing_entries(self.store, [run.id for run in runs], repair=repair)
        )

    def newest_ids(
        self, *, before: WorkflowRun | None, limit: int, **filters: Unpack[RunFilters]
    ) -> list[str]:
        valid = valid_filters(filters)
        return self.store.execute(newest_ids(self.store, valid, before, limit))

    def known_fields(self, run_id: str) -> dict[str, Any]:
        return self.store.execute(known_fields(self.store, run_id))

    def check_whole(self, *, repair: bool = False) -> Iterator[Damage]:
        yield from unlisted(self.store, repair=repair)
        yield from stray_entries(self.store, repair=repair)

    def close(self) -> None:
        self.store.close()


def open_store(config: StorageConfig) -> RedisBackend:
    """Return the store of a configuration whose `backend` is a URL; see `open_redis`."""
    return open_redis(config.backend)


def open_redis(url: str) -> RedisBackend:
    """Return the store of a Redis URL; it is connected to on first use.

    Raises:
        UnsupportedBackendError: if the URL cannot be used.
    """
    store = RedisStore(RedisURL.parse(url))
    return RedisBackend(RedisWorkflowRunRepository(store), RedisExecutionStateRepository(store))


def check_store(config: StorageConfig) -> list[CheckMessage]:
    """Check how the servers keep what they are given."""
    return open_store(config).check()


def database_settings(config: StorageConfig) -> dict[str, Any] | None:
    """Return None: no Django database."""
    return None

"""Runs and states in any Django database: the door of the store."""

from __future__ import annotations

import logging
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Unpack

import django.db
from django.core.exceptions import ImproperlyConfigured
from django.db import transaction
from django.db.utils import load_backend

from workflow_storage.backends.orm.async_threads import ASYNC_CONNECTIONS, AsyncThreads
from workflow_storage.backends.orm.checking import DatabaseCheck
from workflow_storage.backends.orm.checks import check_database, narrow_charset
from workflow_storage.backends.orm.connections import in_callers_transaction
from workflow_storage.backends.orm.heartbeats import connection_beside, impatiently
from workflow_storage.backends.orm.own_connection import in_transaction_beyond_test
from workflow_storage.backends.orm.registration import registered, settings_of
from workflow_storage.backends.orm.runs import DjangoWorkflowRunRepository
from workflow_storage.backends.orm.states import DjangoExecutionStateRepository
from workflow_storage.base import StorageBackend
from workflow_storage.config import database_name, project_databases, without_password
from workflow_storage.exceptions import UnsupportedBackendError
from workflow_storage.filters import valid_filters

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from django.core.checks import CheckMessage

    from workflow_storage.base import Damage, RunFilters
    from workflow_storage.config import StorageConfig
    from workflow_storage.models import WorkflowRun

__all__ = [
    "DjangoBackend",
    "DjangoExecutionStateRepository",
    "DjangoWorkflowRunRepository",
    "check_store",
    "database_settings",
    "open_database",
    "open_store",
]


logger = logging.getLogger(__name__)


class DjangoBackend(StorageBackend):
    """A Django database."""

    def __init__(
        self,
        runs: DjangoWorkflowRunRepository,
        states: DjangoExecutionStateRepository,
        *,
        threads: AsyncThreads,
    ) -> None:
        super().__init__(runs, states, name=database_name(runs.alias), alias=runs.alias)
        self._alias = runs.alias
        self._own_connection = runs.own_connection
        self._threads = threads
        self._check = DatabaseCheck(runs.alias, own_connection=runs.own_connection, threads=threads)

    def check(self) -> list[CheckMessage]:
        return check_database(
            self.name,
            django.db.connections[self._alias].settings_dict,
            own_connection=self._own_connection,
        )

    def check_indexes(self, runs: Sequence[WorkflowRun], *, repair: bool = False) -> list[Damage]:
        return self._check.labels(runs, repair=repair)

    def newest_ids(
        self, *, before: WorkflowRun | None, limit: int, **filters: Unpack[RunFilters]
    ) -> list[str]:
        return self._check.newest_ids(valid_filters(filters), before, limit)

    def known_fields(self, run_id: str) -> dict[str, Any]:
        return self._check.known_fields(run_id)

    def check_whole(self, *, repair: bool = False) -> Iterator[Damage]:
        yield from self._check.tables()

    def close(self) -> None:
        django.db.connections[self._alias].close()
        self._threads.close()

    def on_commit(self, callback: Callable[[], object]) -> None:
        if self._own_connection:
            _call(callback)
            return
        connection = django.db.connections[self._alias]
        # After set_autocommit(False) Django knows of callbacks in an atomic block only.
        by_hand = not connection.in_atomic_block and in_callers_transaction(connection)
        with transaction.atomic(self._alias, savepoint=False) if by_hand else nullcontext():
            connection.on_commit(callback, robust=True)

    def in_transaction(self) -> bool:
        if self._own_connection:
            return False
        return in_transaction_beyond_test(django.db.connections[self._alias])

    async def ain_transaction(self) -> bool:
        # Asked where the async methods write.
        return not self._own_connection and await self._threads.run(self.in_transaction)

    @contextmanager
    def beside(self) -> Iterator[Callable[..., None]]:
        with connection_beside(self._alias) as connection:

            def heartbeat(*args: Any, **kwargs: Any) -> None:
                with impatiently(connection):
                    self.runs.heartbeat(*args, **kwargs)

            yield heartbeat


def open_database(
    alias: str, *, own_connection: bool = False, async_connections: int = ASYNC_CONNECTIONS
) -> DjangoBackend:
    """Return the store in a database of DATABASES, which ``manage.py migrate`` has migrated.

    Args:
        alias: its name there.
        own_connection: as in `StorageConfig`.
        async_connections: as in `StorageConfig`.
    """
    threads = AsyncThreads(alias, async_connections, own_connection=own_connection)
    return DjangoBackend(
        DjangoWorkflowRunRepository(alias, own_connection=own_connection, threads=threads),
        DjangoExecutionStateRepository(alias, own_connection=own_connection, threads=threads),
        threads=threads,
    )


def open_store(config: StorageConfig) -> DjangoBackend:
    """Return the store in the database that is named, or given by URL or path and migrated then.

    Raises:
        UnsupportedBackendError: if the URL, its character set, or `own_connection` there cannot
            be used.
        StorageUnavailableError: if the database cannot be migrated now.
    """
    _refuse_own_connection_on_sqlite(config)
    _refuse_narrow_charset(config)
    in_project = config.backend in project_databases()
    return open_database(
        config.backend if in_project else registered(settings_of(config)),
        own_connection=config.own_connection,
        async_connections=config.async_connections,
    )


def check_store(config: StorageConfig) -> list[CheckMessage]:
    """Check the settings of the database, without opening it.

    Raises:
        UnsupportedBackendError: if `own_connection` cannot be used there.
    """
    _refuse_own_connection_on_sqlite(config)
    return check_database(
        without_password(config.backend),
        database_settings(config),
        own_connection=config.own_connection,
    )


def database_settings(config: StorageConfig) -> dict[str, Any]:
    """Return the settings of the database."""
    databases = project_databases()
    return databases[config.backend] if config.backend in databases else settings_of(config)


def _refuse_own_connection_on_sqlite(config: StorageConfig) -> None:
    if not config.own_connection:
        return
    try:
        vendor = load_backend(database_settings(config)["ENGINE"]).DatabaseWrapper.vendor
    except ImproperlyConfigured:  # its driver is missing, which is said when it is opened
        return
    if vendor == "sqlite":
        raise UnsupportedBackendError(
            f"own_connection cannot be used with SQLite ({without_password(config.backend)!r}): it "
            "has one writer at a time, so the own connection would wait for the lock of your own "
            "transaction. Leave own_connection out, and keep the runs in another database, of "
            "which your transactions know nothing; a second SQLite file will do."
        )


def _refuse_narrow_charset(config: StorageConfig) -> None:
    charset = narrow_charset(database_settings(config))
    if charset is not None:
        raise UnsupportedBackendError(
            f"The connection to {without_password(config.backend)!r} would have the character set "
            f"{charset}, which has no form for emoji and much other text. Leave out 'charset' (and "
            "SET NAMES), for Django's default is utf8mb4."
        )


def _call(callback: Callable[[], object]) -> None:
    """Call something as Django does after a commit: who has written does not suffer for it."""
    try:
        callback()
    except Exception:
        logger.exception("A callback for what was committed failed")

"""Runs and states in any Django database: the door of the store."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django.db import connections, transaction

from workflow_storage.backends.orm.checks import check_database
from workflow_storage.backends.orm.errors import database_name
from workflow_storage.backends.orm.registration import registered, settings_of
from workflow_storage.backends.orm.runs import DjangoWorkflowRunRepository
from workflow_storage.backends.orm.states import DjangoExecutionStateRepository
from workflow_storage.base import StorageBackend
from workflow_storage.config import project_databases, without_password

if TYPE_CHECKING:
    from collections.abc import Callable

    from django.core.checks import CheckMessage

    from workflow_storage.config import StorageConfig

__all__ = [
    "DjangoBackend",
    "DjangoExecutionStateRepository",
    "DjangoWorkflowRunRepository",
    "check_store",
    "database_settings",
    "open_database",
    "open_store",
]


class DjangoBackend(StorageBackend):
    """A Django database."""

    def __init__(
        self, runs: DjangoWorkflowRunRepository, states: DjangoExecutionStateRepository
    ) -> None:
        super().__init__(runs, states, name=database_name(runs.alias), alias=runs.alias)
        self._alias = runs.alias

    def check(self) -> list[CheckMessage]:
        return check_database(self.name, connections[self._alias].settings_dict)

    def close(self) -> None:
        connections[self._alias].close()

    def on_commit(self, callback: Callable[[], object]) -> None:
        transaction.on_commit(callback, using=self._alias, robust=True)

    def in_transaction(self) -> bool:
        return connections[self._alias].in_atomic_block


def open_database(alias: str) -> DjangoBackend:
    """Return the store in a database of DATABASES, which ``manage.py migrate`` has migrated."""
    return DjangoBackend(DjangoWorkflowRunRepository(alias), DjangoExecutionStateRepository(alias))


def open_store(config: StorageConfig) -> DjangoBackend:
    """Return the store in the database that is named, or given by URL or path and migrated then.

    Raises:
        UnsupportedBackendError: if the URL cannot be used.
        StorageUnavailableError: if the database cannot be migrated now.
    """
    if config.backend in project_databases():
        return open_database(config.backend)
    return open_database(registered(settings_of(config)))


def check_store(config: StorageConfig) -> list[CheckMessage]:
    """Check the settings of the database, without opening it."""
    return check_database(without_password(config.backend), database_settings(config))


def database_settings(config: StorageConfig) -> dict[str, Any]:
    """Return the settings of the database."""
    databases = project_databases()
    return databases[config.backend] if config.backend in databases else settings_of(config)

"""A URL or a path becomes a Django database with our tables, for the door of this package."""

from __future__ import annotations

import itertools
import logging
import os
import re
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import dj_database_url
import django.db
from django.core.exceptions import ImproperlyConfigured
from django.db import DEFAULT_DB_ALIAS, connections

from workflow_storage.backends.orm.dialects import MIGRATION_TIMEOUT, Cause, cause_of, dialect_of
from workflow_storage.backends.orm.errors import storage_error
from workflow_storage.config import StorageConfig, registered_aliases, without_password
from workflow_storage.exceptions import StorageError, UnsupportedBackendError

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper

logger = logging.getLogger(__name__)

SQLITE_OPTIONS: dict[str, Any] = {
    "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;",
    "transaction_mode": "IMMEDIATE",
    "timeout": 20,
}
"""OPTIONS of a SQLite database that several threads and processes write to.

Readers do not wait for the writer (WAL), a commit outlives a crash of the process, a
transaction that reads before it writes cannot fail for that (IMMEDIATE), and a writer
waits up to `timeout` seconds for another one.
"""

SQLITE = "django.db.backends.sqlite3"
"""The ENGINE of SQLite."""

_DRIVERS = {
    "django.db.backends.postgresql": "django-workflow-storage[postgres]",
    "django.db.backends.mysql": "django-workflow-storage[mysql]",
}

_registering = threading.RLock()
_alias_numbers = itertools.count(1)


def registered(database: dict[str, Any]) -> str:
    """Return the alias of a database, which Django knows afterwards, with our tables in it.

    Args:
        database: its settings, as `settings_of` returns them.

    Raises:
        UnsupportedBackendError: if it cannot be opened with these settings.
        StorageError: if it cannot be migrated.
    """
    with _registering:
        for alias in registered_aliases:
            known: dict[str, Any] = connections.databases[alias]
            if all(known.get(name) == value for name, value in database.items()):
                return alias
        alias = f"workflow_storage_{next(_alias_numbers)}"
        # Fills in the defaults that Django expects; it asks for a default database, too.
        databases: dict[str, Any] = {DEFAULT_DB_ALIAS: {}, alias: dict(database)}
        connections.databases[alias] = connections.configure_settings(databases)[alias]
        registered_aliases.add(alias)
        try:
            _migrate(alias)
        except (TypeError, ImportError, ImproperlyConfigured) as exc:
            forget(alias)
            raise UnsupportedBackendError(
                f"A database of {database['ENGINE']} cannot be opened with these options: {exc}"
            ) from exc
        except BaseException:
            forget(alias)
            raise
        return alias


def forget(alias: str) -> None:
    """Take a database that was given by URL or path out of Django again; for tests."""
    opened = [
        connection
        for connection in connections.all(initialized_only=True)
        if connection.alias == alias
    ]
    del connections.databases[alias]
    registered_aliases.discard(alias)
    for connection in opened:
        del connections[alias]
        connection.close()


def settings_of(config: StorageConfig) -> dict[str, Any]:
    """Return the settings of the database that a configuration gives by URL or path.

    Raises:
        UnsupportedBackendError: if the URL cannot be read.
    """
    if config.backend == "sqlite":
        database = {**dj_database_url.parse("sqlite://"), "NAME": config.path}
    else:
        database = _parsed(config.backend)
    return _as_sqlite(database) if database["ENGINE"] == SQLITE else database


def _parsed(url: str) -> dict[str, Any]:
    if re.match(r"sqlite:(///$|//[^/:])", url):
        raise UnsupportedBackendError(
            f"{url!r} names no file. Write sqlite:///relative.db, sqlite:////absolute.db, or "
            "sqlite://:memory: for a database that is gone when the process ends."
        )
    try:
        database = dict(dj_database_url.parse(url))
        if not url.startswith("sqlite:") and "@" in urlsplit(url).path:
            raise ValueError("the password holds a slash")
    except ValueError:
        # Not chained: the parser's message can quote a part of the password.
        raise UnsupportedBackendError(
            f"The database URL {without_password(url)!r} cannot be read. Quote special "
            "characters in the user and the password with urllib.parse.quote(value, safe='')."
        ) from None
    return database


def _as_sqlite(database: dict[str, Any]) -> dict[str, Any]:
    name = str(database["NAME"])
    if name == ":memory:":
        # Each thread has a connection of its own, and all are to see the same tables.
        name = f"file:workflow_storage_{os.getpid()}?mode=memory&cache=shared"
    elif not name.startswith("file:"):
        name = str(Path(name).expanduser().absolute())
    options = {**SQLITE_OPTIONS, **database.get("OPTIONS", {})}
    return {**database, "NAME": name, "OPTIONS": options}


def _migrate(alias: str) -> None:
    """Bring the tables of this package up to date; of several processes, one does it."""
    connection = _opened(alias)
    deadline = time.monotonic() + MIGRATION_TIMEOUT
    while True:
        try:
            with dialect_of(connection).migration_lock(connection):
                _make_tables(connection)
            break
        except django.db.Error as exc:
            # SQLite does not wait for its timeout to switch a new file to WAL.
            if cause_of(connection, exc) is not Cause.LOCKED or time.monotonic() > deadline:
                raise storage_error(alias, exc) from exc
            connection.close()
            time.sleep(0.05)
    if "workflow_runs" not in connection.introspection.table_names():
        raise StorageError(
            "The tables of workflow_storage were not made. Either a router in DATABASE_ROUTERS "
            f"forbids them in {alias!r}: let its allow_migrate() return None for databases that "
            "it does not know. Or MIGRATION_MODULES turns the app's migrations off."
        )


def _opened(alias: str) -> BaseDatabaseWrapper:
    engine = str(connections.databases[alias]["ENGINE"])
    try:
        return connections[alias]
    except ImproperlyConfigured as exc:
        if engine not in _DRIVERS:
            raise
        raise StorageError(
            f"The driver of {engine} is not installed. Run: pip install '{_DRIVERS[engine]}'"
        ) from exc


def _make_tables(connection: BaseDatabaseWrapper) -> None:
    from django.db.migrations.executor import MigrationExecutor

    executor = MigrationExecutor(connection)
    targets = [node for node in executor.loader.graph.leaf_nodes() if node[0] == "workflow_storage"]
    if executor.migration_plan(targets):
        logger.info("Creating the tables of workflow_storage in database %s", connection.alias)
        executor.migrate(targets)

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
from urllib.parse import urlsplit, urlunsplit

import dj_database_url
import django.db
from django.core.exceptions import ImproperlyConfigured
from django.db import DEFAULT_DB_ALIAS, connections
from django.db.migrations.exceptions import MigrationSchemaMissing

from workflow_storage.backends.orm.causes import Cause
from workflow_storage.backends.orm.dialects import MIGRATION_TIMEOUT, cause_of, dialect_of
from workflow_storage.backends.orm.errors import read_only_error, storage_error
from workflow_storage.config import (
    APP_LABELS,
    StorageConfig,
    database_name,
    registered_aliases,
    without_password,
)
from workflow_storage.exceptions import StorageError, UnsupportedBackendError

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper
    from django.db.migrations.executor import MigrationExecutor

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

_WORTH_WAITING_FOR = {
    # SQLite does not wait for its timeout to switch a new file to WAL.
    Cause.LOCKED,
    # Another node of a cluster makes the tables: its lock is not seen here.
    Cause.GAVE_WAY,
    Cause.NOT_READY,
}
_BEFORE_LOOKING_AGAIN = 0.2

_registering = threading.RLock()


def _unlock_after_fork() -> None:
    """Make the lock anew in a child, whose parent may have held it in another thread."""
    global _registering  # noqa: PLW0603
    _registering = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlock_after_fork)

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
        # Fills in the defaults that Django expects; it asks for a default database, too.
        databases: dict[str, Any] = {DEFAULT_DB_ALIAS: {}, "new": dict(database)}
        settings = connections.configure_settings(databases)["new"]
        for alias in registered_aliases:
            if connections.databases[alias] == settings:
                return alias
        alias = f"workflow_storage_{next(_alias_numbers)}"
        connections.databases[alias] = settings
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
        if not url.startswith("sqlite:") and "@" in urlsplit(url).path:
            raise ValueError("the password holds a slash")
        database = _parsed_with_hosts(url)
    except ValueError:
        # Not chained: the parser's message can quote a part of the password.
        raise UnsupportedBackendError(
            f"The database URL {without_password(url)!r} cannot be read. Quote special "
            "characters in the user and the password with urllib.parse.quote(value, safe='')."
        ) from None
    return database


def _parsed_with_hosts(url: str) -> dict[str, Any]:
    """Return the settings that a URL means, which may name several hosts as libpq's do.

    They are tried in turn until one is found that takes writes, unless ``target_session_attrs``
    says otherwise.
    """
    parts = urlsplit(url)
    credentials, at, hosts = parts.netloc.rpartition("@")
    several = "," in hosts
    if several:
        url = urlunsplit(parts._replace(netloc=f"{credentials}{at}"))
    database: dict[str, Any] = {**dj_database_url.parse(url)}
    if several:
        if "postgresql" not in database["ENGINE"]:
            raise ValueError("only libpq takes several hosts")
        found = [_HOST.fullmatch(host) for host in hosts.split(",")]
        matches = [match for match in found if match]
        if len(matches) != len(found):
            raise ValueError("a host cannot be read")
        database["HOST"] = ",".join(match["host"].strip("[]") for match in matches)
        ports = [match["port"] or "" for match in matches]
        database["PORT"] = ",".join(ports) if any(ports) else ""
    options = database.get("OPTIONS", {})
    if "," in str(database.get("HOST") or options.get("host", "")):
        database["OPTIONS"] = {"target_session_attrs": "read-write", **options}
    return database


_HOST = re.compile(r"(?P<host>\[[^]]*]|[^:]*)(:(?P<port>\d*))?")


def _as_sqlite(database: dict[str, Any]) -> dict[str, Any]:
    name = str(database["NAME"])
    if name == ":memory:":
        # Each thread has a connection of its own, and all are to see the same tables.
        name = f"file:workflow_storage_{os.getpid()}?mode=memory&cache=shared"
    elif not name.startswith("file:"):
        name = _absolute(name)
    options = {**SQLITE_OPTIONS, **database.get("OPTIONS", {})}
    return {**database, "NAME": name, "OPTIONS": options}


def _absolute(name: str) -> str:
    path = Path(name).expanduser()
    try:
        return str(path.absolute())
    except FileNotFoundError as exc:
        raise UnsupportedBackendError(
            f"The path {name} is relative to the working directory, which has been deleted. Give an "
            "absolute path, or change to a directory that is there."
        ) from exc


def _migrate(alias: str) -> None:
    """Bring the tables of this package up to date; of several processes, one does it."""
    connection = _opened(alias)
    deadline = time.monotonic() + MIGRATION_TIMEOUT
    while True:
        try:
            with dialect_of(connection).migration_lock(connection):
                make_tables(connection)
            break
        except django.db.Error as exc:
            # Django raises this one while it handles the database's, and does not chain them.
            error = exc.__context__ if isinstance(exc, MigrationSchemaMissing) else exc
            assert isinstance(error, django.db.Error)
            cause = cause_of(connection, error)
            if cause is Cause.READ_ONLY:
                raise read_only_error(alias, error) from exc
            if cause not in _WORTH_WAITING_FOR or time.monotonic() > deadline:
                raise storage_error(alias, error) from exc
            connection.close()
            time.sleep(_BEFORE_LOOKING_AGAIN)
    has_tables = "workflow_runs" in connection.introspection.table_names()
    # A process that is forked later would inherit it.
    connection.close()
    close_pool = getattr(connection, "close_pool", None)
    if close_pool is not None:
        close_pool()
    if not has_tables:
        raise StorageError(
            "The tables of workflow_storage were not made. Either a router in DATABASE_ROUTERS "
            f"forbids them in {database_name(alias)!r}: let its allow_migrate() return None for "
            "databases that it does not know. Or MIGRATION_MODULES turns the app's migrations off."
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


def make_tables(connection: BaseDatabaseWrapper) -> None:
    """Migrate a database, or finish what another process has begun of it."""
    from django.db.migrations.executor import MigrationExecutor

    executor = MigrationExecutor(connection)
    targets = [node for node in executor.loader.graph.leaf_nodes() if node[0] in APP_LABELS]
    if not executor.migration_plan(targets):
        return
    logger.info(
        "Creating the tables of workflow_storage in database %s", database_name(connection.alias)
    )
    if connection.features.can_rollback_ddl:
        executor.migrate(targets)
        return
    # Of a process that was killed, or that works on another node of the cluster, some tables,
    # indexes and constraints can be there. Those that are not are made.
    _refuse_tables_of_others(connection, executor)
    with connection.execute_wrapper(_leave_what_is_there):
        executor.migrate(targets)


def _leave_what_is_there(
    execute: Any, sql: str, params: Any, many: bool, context: dict[str, Any]
) -> Any:
    try:
        return execute(sql, params, many, context)
    except django.db.Error as exc:
        if cause_of(context["connection"], exc) is not Cause.THERE_ALREADY:
            raise
        return None


def _refuse_tables_of_others(connection: BaseDatabaseWrapper, executor: MigrationExecutor) -> None:
    """Raise an error if a table has the name of one of ours, but not its columns."""
    loader = executor.loader
    if any(app == "workflow_storage" for app, _ in loader.applied_migrations):
        return
    there = set(connection.introspection.table_names())
    first = [node for node in loader.graph.root_nodes() if node[0] in APP_LABELS]
    for model in loader.project_state(first).apps.get_models():
        meta = model._meta
        if meta.app_label not in APP_LABELS or meta.db_table not in there:
            continue
        with connection.cursor() as cursor:
            # Django's introspection asks twice, and another node can make the table in between.
            cursor.execute(f"SELECT * FROM {connection.ops.quote_name(meta.db_table)} LIMIT 0")
            names = {column[0] for column in cursor.description}
        # A primary key of several columns is none itself.
        columns = {str(field.column) for field in meta.local_fields if field.column}
        missing = columns - names
        if missing:
            raise StorageError(
                f"There is a table {meta.db_table!r} already, and it is not one of "
                f"workflow_storage: it has no {', '.join(sorted(missing))}. "
                "Rename it, or give another database."
            )

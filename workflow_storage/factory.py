"""Configuration in, repositories out: what every caller of the store begins with."""

import itertools
import logging
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import dj_database_url
import django
import django.db
from asgiref.sync import sync_to_async
from django.apps import apps
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.db import DEFAULT_DB_ALIAS, connections, transaction

from workflow_storage.base import StorageBackend
from workflow_storage.config import StorageConfig, without_password
from workflow_storage.exceptions import (
    StorageError,
    StorageUnavailableError,
    UnsupportedBackendError,
)

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

_SQLITE = "django.db.backends.sqlite3"
_NO_ENGINE = "django.db.backends.dummy"
_DRIVERS = {
    "django.db.backends.postgresql": "django-workflow-storage[postgres]",
    "django.db.backends.mysql": "django-workflow-storage[mysql]",
}
_REDIS_SCHEMES = ("redis", "rediss", "redis+cluster", "rediss+cluster", "unix")
_MIGRATION_TIMEOUT = 60.0  # seconds
_MIGRATION_LOCK = 0x776F726B666C6F77  # "workflow", as PostgreSQL's 64 bit lock key

_lock = threading.RLock()
_backends: dict[tuple[str, str, str], StorageBackend] = {}
_registered_aliases: set[str] = set()
_alias_numbers = itertools.count(1)


def create_storage_backend(config: StorageConfig | str | None = None) -> StorageBackend:
    """Give the repositories of a store.

    A database that is given by URL or path gets its tables on first use; one that is named
    in DATABASES is migrated by ``manage.py migrate``. In a script without Django settings,
    a minimal Django is configured.

    Args:
        config: a `StorageConfig`; a string, which is its `backend`; or None for the setting
            WORKFLOW_STORAGE (a string, or a dict for `StorageConfig`), and without it the
            ``default`` database.

    Returns:
        Both repositories, which unpack: ``runs, states = create_storage_backend()``.

    Raises:
        UnsupportedBackendError: (a ValueError) if the configuration names no backend.
        StorageUnavailableError: if a database given by URL or path cannot be migrated now.
    """
    ensure_django()
    config = _as_config(config)
    key = (config.backend, config.path, os.getcwd())  # noqa: PTH109 - no object a call
    backend = _backends.get(key)
    if backend is None:
        with _lock:
            backend = _backends.get(key)
            if backend is None:
                backend = _backends[key] = _create(config)
    return backend


async def acreate_storage_backend(config: StorageConfig | str | None = None) -> StorageBackend:
    """Async twin of `create_storage_backend`, for a store that is first used in async code."""
    return await sync_to_async(create_storage_backend, thread_sensitive=True)(config)


def ensure_django() -> None:
    """Make Django ready where nobody else does: in a plain script or a notebook."""
    if apps.ready:
        return
    with _lock:
        if not settings.configured and not os.environ.get("DJANGO_SETTINGS_MODULE"):
            # A notebook always runs an event loop, which Django then lets pass; see
            # https://docs.djangoproject.com/en/stable/topics/async/#async-safety
            os.environ.setdefault("DJANGO_ALLOW_ASYNC_UNSAFE", "true")
            settings.configure(
                INSTALLED_APPS=["workflow_storage"],
                DATABASES={},
                DATABASE_ROUTERS=["workflow_storage.router.WorkflowStorageRouter"],
                USE_TZ=True,
                DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
                LOGGING_CONFIG=None,
            )
        if not apps.loading:
            django.setup()


def configured_alias() -> str:
    """Give the database that the admin shows: that of the project's own backend.

    Returns:
        Its alias; ``default`` if the project's own backend is no Django database.
    """
    return _alias(create_storage_backend()) or DEFAULT_DB_ALIAS


def missing_file(config: StorageConfig | str | None) -> str | None:
    """Give the path of the SQLite file that a configuration names, if it is not there.

    For whoever only reads, and should not make one.
    """
    ensure_django()
    config = _as_config(config)
    if config.backend in project_databases() or is_redis(config.backend):
        return None
    database = _database(config)
    path = str(database["NAME"])
    is_file = database["ENGINE"] == _SQLITE and not path.startswith("file:")
    return path if is_file and not Path(path).exists() else None


def project_databases() -> dict[str, dict[str, Any]]:
    """Give what the project has in DATABASES, by alias.

    Django itself adds an empty ``default`` to it, and `_registered` the databases that were
    given by URL or path.
    """
    databases: dict[str, Any] = settings.DATABASES
    return {
        alias: database
        for alias, database in databases.items()
        if alias not in _registered_aliases
        and database.get("ENGINE", _NO_ENGINE) not in {"", _NO_ENGINE}
    }


def is_redis(backend: str) -> bool:
    """Whether the `backend` of a `StorageConfig` is the URL of a Redis server or cluster."""
    return backend not in project_databases() and _scheme(backend) in _REDIS_SCHEMES


def project_backend() -> str:
    """Give the `backend` of the project's own `StorageConfig`."""
    return _as_config(None).backend


def database_of_project() -> tuple[str, dict[str, Any]]:
    """Give the name and the settings of the project's own database, without opening it.

    Returns:
        Both; without settings if it is Redis.

    Raises:
        UnsupportedBackendError: if WORKFLOW_STORAGE names none.
    """
    config = _as_config(None)
    if config.backend in project_databases():
        return config.backend, project_databases()[config.backend]
    if is_redis(config.backend):
        return without_password(config.backend), {}
    return without_password(config.backend), _database(config)


def _alias(backend: StorageBackend) -> str | None:
    return getattr(backend.runs, "alias", None)


def _as_config(config: StorageConfig | str | None) -> StorageConfig:
    if config is None:
        config = getattr(settings, "WORKFLOW_STORAGE", None)
        if isinstance(config, dict):
            config = StorageConfig(**config)
        elif config is None:
            has_default = DEFAULT_DB_ALIAS in project_databases()
            config = StorageConfig(backend=DEFAULT_DB_ALIAS if has_default else "sqlite")
    if isinstance(config, str):
        config = StorageConfig(backend=config)
    if not isinstance(config, StorageConfig):
        raise TypeError(
            f"create_storage_backend() takes a StorageConfig, a string or None, "
            f"not a {type(config).__name__}. WORKFLOW_STORAGE takes a string or a dict."
        )
    return config


def _create(config: StorageConfig) -> StorageBackend:
    if not apps.is_installed("workflow_storage"):
        raise ImproperlyConfigured(
            "workflow_storage is not installed. Add 'workflow_storage' to INSTALLED_APPS."
        )
    if is_redis(config.backend):
        from workflow_storage.backends.redis import open_redis

        return open_redis(config.backend)
    from workflow_storage.backends.orm import (
        DjangoExecutionStateRepository,
        DjangoWorkflowRunRepository,
    )

    known = config.backend in project_databases()
    alias = config.backend if known else _registered(_database(config))
    return StorageBackend(DjangoWorkflowRunRepository(alias), DjangoExecutionStateRepository(alias))


def _database(config: StorageConfig) -> dict[str, Any]:
    """Give the settings of a database that is given by URL or path."""
    if "://" in config.backend:
        database = _parsed(config.backend)
    elif config.backend == "sqlite":
        database = {**_parsed("sqlite://"), "NAME": config.path}
    else:
        raise _unsupported(config.backend)
    return _as_sqlite(database) if database["ENGINE"] == _SQLITE else database


def _unsupported(backend: str) -> UnsupportedBackendError:
    names = ", ".join(repr(alias) for alias in project_databases()) or "none"
    known = sorted({*dj_database_url.ENGINE_SCHEMES, *_REDIS_SCHEMES})
    schemes = ", ".join(f"{scheme}://" for scheme in known)
    return UnsupportedBackendError(
        f"Unsupported storage backend: {without_password(backend)!r}. Use a name in DATABASES "
        f"({names}), 'sqlite', or a URL with one of: {schemes}."
    )


def _scheme(url: str) -> str:
    scheme, separator, _ = url.partition("://")
    return scheme if separator else ""


def _parsed(url: str) -> dict[str, Any]:
    if _scheme(url) not in dj_database_url.ENGINE_SCHEMES:
        raise _unsupported(url)
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


def _registered(database: dict[str, Any]) -> str:
    """Give the alias of a database that is none of DATABASES, with its tables in place."""
    for alias in _registered_aliases:
        known: dict[str, Any] = connections.databases[alias]
        if all(known.get(name) == value for name, value in database.items()):
            return alias
    alias = f"workflow_storage_{next(_alias_numbers)}"
    # Fills in the defaults that Django expects; it asks for a default database, too.
    databases: dict[str, Any] = {DEFAULT_DB_ALIAS: {}, alias: dict(database)}
    connections.databases[alias] = connections.configure_settings(databases)[alias]
    _registered_aliases.add(alias)
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
    for key in [key for key, backend in _backends.items() if _alias(backend) == alias]:
        del _backends[key]
    _registered_aliases.discard(alias)
    for connection in opened:
        del connections[alias]
        connection.close()


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
    from django.db.migrations.executor import MigrationExecutor

    from workflow_storage.backends.errors import storage_error

    engine = str(connections.databases[alias]["ENGINE"])
    try:
        connection: Any = connections[alias]
    except ImproperlyConfigured as exc:
        if engine not in _DRIVERS:
            raise
        raise StorageError(
            f"The driver of {engine} is not installed. Run: pip install '{_DRIVERS[engine]}'"
        ) from exc
    deadline = time.monotonic() + _MIGRATION_TIMEOUT
    while True:
        try:
            with _migration_lock(connection):
                executor = MigrationExecutor(connection)
                targets = [
                    node
                    for node in executor.loader.graph.leaf_nodes()
                    if node[0] == "workflow_storage"
                ]
                if executor.migration_plan(targets):
                    logger.info("Creating the tables of workflow_storage in database %s", alias)
                    executor.migrate(targets)
            break
        except django.db.OperationalError as exc:
            # SQLite does not wait for its timeout to switch a new file to WAL.
            if "locked" not in str(exc) or time.monotonic() > deadline:
                raise storage_error(alias, exc) from exc
            connection.close()
            time.sleep(0.05)
        except django.db.Error as exc:
            raise storage_error(alias, exc) from exc
    if "workflow_runs" not in connection.introspection.table_names():
        raise StorageError(
            "The tables of workflow_storage were not made. Either a router in DATABASE_ROUTERS "
            f"forbids them in {alias!r}: let its allow_migrate() return None for databases that "
            "it does not know. Or MIGRATION_MODULES turns the app's migrations off."
        )


@contextmanager
def _migration_lock(connection: Any) -> Iterator[None]:
    """Hold back other processes that migrate the same database."""
    if connection.vendor == "mysql":
        # It commits at every change of the schema, so a lock outlives the transaction.
        name = "workflow_storage migrate"
        with connection.cursor() as cursor:
            cursor.execute("SELECT GET_LOCK(%s, %s)", [name, _MIGRATION_TIMEOUT])
            if cursor.fetchone() != (1,):
                raise StorageUnavailableError(
                    "Another process has been making the tables for longer than "
                    f"{_MIGRATION_TIMEOUT:.0f} seconds. Look what it does, or try again."
                )
            try:
                yield
            finally:
                cursor.execute("SELECT RELEASE_LOCK(%s)", [name])
        return
    if connection.vendor == "sqlite":
        # Within a transaction foreign keys cannot be switched off, which changing the
        # schema needs; the transaction itself (IMMEDIATE) is the lock.
        connection.disable_constraint_checking()
    try:
        with transaction.atomic(using=connection.alias):
            if connection.vendor == "postgresql":
                with connection.cursor() as cursor:
                    cursor.execute("SELECT pg_advisory_xact_lock(%s)", [_MIGRATION_LOCK])
            yield
    finally:
        if connection.vendor == "sqlite":
            connection.enable_constraint_checking()

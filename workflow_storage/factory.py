"""Configuration in, a store out: what every caller begins with."""

from __future__ import annotations

import os
import threading
from collections import ChainMap
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import django
from asgiref.sync import sync_to_async
from django.apps import apps
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.db import DEFAULT_DB_ALIAS

from workflow_storage.backends import door_of
from workflow_storage.config import StorageConfig, project_databases, storage_config

if TYPE_CHECKING:
    from workflow_storage.base import StorageBackend

_opening = threading.RLock()


def _unlock_after_fork() -> None:
    """Make the lock anew in a child, whose parent may have held it in another thread."""
    global _opening  # noqa: PLW0603
    _opening = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlock_after_fork)

_backends: dict[tuple[object, ...], StorageBackend] = {}


def create_storage_backend(config: StorageConfig | str | None = None) -> StorageBackend:
    """Return the repositories of a store.

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
    config = storage_config(config)
    key = (
        config.backend,
        config.path,
        config.own_connection,
        config.async_connections,
        _directory(config),
    )
    backend = _backends.get(key)
    if backend is None:
        with _opening:
            backend = _backends.get(key)
            if backend is None:
                backend = _backends[key] = _opened(config)
    return backend


def _directory(config: StorageConfig) -> str | None:
    """Return the working directory, if that is where the store of a configuration is."""
    if config.backend == "sqlite":
        is_relative = not config.path.startswith(_ABSOLUTE)
    else:
        is_relative = config.backend.startswith("sqlite:///") and config.backend[10:11] != "/"
    if not is_relative:
        return None
    try:
        return os.getcwd()  # noqa: PTH109 - no object a call
    except FileNotFoundError:
        return None  # whoever opens the store says so


_ABSOLUTE = ("/", "~", "file:", ":memory:")


async def acreate_storage_backend(config: StorageConfig | str | None = None) -> StorageBackend:
    """Async twin of `create_storage_backend`, for a store that is first used in async code."""
    return await sync_to_async(create_storage_backend, thread_sensitive=True)(config)


def ensure_django() -> None:
    """Make Django ready where nobody else does: in a plain script or a notebook."""
    if apps.ready:
        return
    with _opening:
        if not settings.configured and not os.environ.get("DJANGO_SETTINGS_MODULE"):
            _let_event_loops_pass()
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


def _let_event_loops_pass() -> None:
    """Let Django be used where an event loop runs, as in every notebook.

    That is what DJANGO_ALLOW_ASYNC_UNSAFE is for
    (https://docs.djangoproject.com/en/stable/topics/async/#async-safety), but every process that
    the script starts would inherit it: a site of somebody's, say. So only the module that asks
    for it sees it.
    """
    import django.utils.asyncio as asks

    environ = ChainMap({"DJANGO_ALLOW_ASYNC_UNSAFE": "true"}, os.environ)
    asks.os = SimpleNamespace(environ=environ)  # type: ignore[attr-defined]


def configured_alias() -> str:
    """Return the database that the admin shows: that of the project's own store.

    Returns:
        Its alias; ``default`` if the project's own store is no Django database.
    """
    config = storage_config()
    if config.backend in project_databases():
        return config.backend
    return create_storage_backend(config).alias or DEFAULT_DB_ALIAS


def missing_file(config: StorageConfig | str | None) -> str | None:
    """Return the path of the SQLite file that a configuration names, if it is not there.

    For whoever only reads, and should not make one.
    """
    ensure_django()
    config = storage_config(config)
    if config.backend in project_databases():
        return None
    database = door_of(config).database_settings(config)
    if database is None or database["ENGINE"] != "django.db.backends.sqlite3":
        return None
    path = str(database["NAME"])
    return None if path.startswith("file:") or Path(path).exists() else path


def forget(alias: str) -> None:
    """Take a database that was given by URL or path out of Django again; for tests."""
    from workflow_storage.backends.orm import registration

    for key in [key for key, backend in _backends.items() if backend.alias == alias]:
        _backends.pop(key).close()
    registration.forget(alias)


def _opened(config: StorageConfig) -> StorageBackend:
    if not apps.is_installed("workflow_storage"):
        raise ImproperlyConfigured(
            "workflow_storage is not installed. Add 'workflow_storage' to INSTALLED_APPS."
        )
    return door_of(config).open_store(config)

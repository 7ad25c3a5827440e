"""What a user can configure, as pydantic models, and what the project has configured."""

import re
from pathlib import Path
from typing import Any

from django.conf import settings
from django.db import DEFAULT_DB_ALIAS, connections
from pydantic import BaseModel, ConfigDict, Field, field_validator

APP_LABELS = frozenset({"workflow_storage", "workflow_storage_langgraph"})
"""The apps of this package that have tables, which are all in the database of the runs."""

_NO_ENGINE = "django.db.backends.dummy"
_NAME = re.compile(r"[\w.-]+")
_URL = re.compile(r"(?P<scheme>[A-Za-z][\w+.-]*)://(?P<credentials>.*@)?(?P<rest>[^?#;\s]*)", re.S)


def without_password(backend: str) -> str:
    """Return a backend's name or URL as it may be shown: without credentials and options."""
    if not backend or _NAME.fullmatch(backend):
        return backend
    url = _URL.match(backend)
    if url is None:
        return "(not shown, for it may hold a password)"
    # Everything up to the last @ goes: an unquoted password may hold any character.
    return f"{url['scheme']}://{'***@' if url['credentials'] else ''}{url['rest']}"


class StorageConfig(BaseModel):
    """Which store to use.

    Attributes:
        backend: a name in DATABASES, a URL such as ``postgresql://user:password@host/name``,
            or ``sqlite`` for the file at `path`.
        path: the SQLite file, relative to the working directory; for ``sqlite`` only.
        own_connection: whether the store uses a second connection to its database, so that what
            is recorded outlives a rollback of the caller's transaction. Not for SQLite; where
            there are no transactions, on Redis, it is so anyway.
        async_connections: in how many threads, each with a connection, the async methods of a
            database run; at least 1. Where they are native, on Redis, it means nothing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    backend: str = "sqlite"
    path: str = "./workflows.db"
    own_connection: bool = False
    async_connections: int = Field(default=4, ge=1)

    @field_validator("path", mode="before")
    @classmethod
    def _path_as_text(cls, path: Any) -> Any:
        return str(path) if isinstance(path, Path) else path

    def __repr_args__(self) -> Any:
        yield "backend", without_password(self.backend)
        yield "path", self.path
        yield "own_connection", self.own_connection
        yield "async_connections", self.async_connections


class GlobalConfig(BaseModel):
    """The part of an application's configuration that this package reads.

    Attributes:
        storage: which store to use, as a `StorageConfig`, a dict for one, or a string, which
            is its `backend`; None means the project's own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    storage: StorageConfig | None = None

    @field_validator("storage", mode="before")
    @classmethod
    def _string_as_backend(cls, storage: Any) -> Any:
        return StorageConfig(backend=storage) if isinstance(storage, str) else storage


registered_aliases: set[str] = set()
"""Databases that Django knows because they were given by URL or path, not in DATABASES."""


def project_databases() -> dict[str, dict[str, Any]]:
    """Return what the project has in DATABASES, by alias.

    Django itself adds an empty ``default`` to it, and a store that is given by URL or path adds
    its own.
    """
    databases: dict[str, Any] = settings.DATABASES
    return {
        alias: database
        for alias, database in databases.items()
        if alias not in registered_aliases
        and database.get("ENGINE", _NO_ENGINE) not in {"", _NO_ENGINE}
    }


def database_name(alias: str) -> str:
    """Return the name of a database as the user knows it; the alias of some is ours."""
    return str(connections[alias].settings_dict["NAME"]) if alias in registered_aliases else alias


def storage_config(config: StorageConfig | str | None = None) -> StorageConfig:
    """Return the configuration that is meant by what `create_storage_backend` takes.

    Args:
        config: a `StorageConfig`; a string, which is its `backend`; or None for the setting
            WORKFLOW_STORAGE, and without it the ``default`` database, or a SQLite file in a
            project that has none.

    Raises:
        TypeError: for anything else.
        pydantic.ValidationError: if WORKFLOW_STORAGE is a dict for no `StorageConfig`.
    """
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

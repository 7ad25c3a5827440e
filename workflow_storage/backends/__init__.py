"""The stores: which scheme of a URL leads to which, and how a third party adds one of its own.

A store is a package with a door, its ``__init__``, which is all that the factory, the checks and
the router know of it; see `Door`.
"""

from __future__ import annotations

import re
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import dj_database_url

from workflow_storage.base import StorageBackend
from workflow_storage.config import project_databases, without_password
from workflow_storage.exceptions import UnsupportedBackendError

if TYPE_CHECKING:
    from collections.abc import Callable

    from django.core.checks import CheckMessage

    from workflow_storage.config import StorageConfig

ENTRY_POINTS = "workflow_storage.backends"
"""The group of entry points whose names are schemes, and whose values are as for `register_backend`."""

_ORM = "workflow_storage.backends.orm"
_REDIS = "workflow_storage.backends.redis"
_MEMORY = "workflow_storage.backends.memory"
_DOORS = {"memory": _MEMORY} | dict.fromkeys(
    (
        *(
            f"{name}{servers}"
            for name in ("redis", "rediss", "valkey", "valkeys")
            for servers in ("", "+cluster", "+sentinel")
        ),
        "unix",
    ),
    _REDIS,
)
"""Scheme -> the store of this package that it leads to; every scheme of dj-database-url to the ORM."""

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*")


class Door(Protocol):
    """What the package of a store offers to those who do not know it."""

    def open_store(self, config: StorageConfig) -> StorageBackend:
        """Return the store; what its package raises is an error of the contract."""

    def check_store(self, config: StorageConfig) -> list[CheckMessage]:
        """Return what ``manage.py check`` says about the project's own store."""

    def database_settings(self, config: StorageConfig) -> dict[str, Any] | None:
        """Return the settings of its Django database, without opening it; None for any other store."""


class _ThirdParty(NamedTuple):
    """The door of a store that is known by the function which opens it."""

    scheme: str
    function: Callable[[StorageConfig], StorageBackend]

    def open_store(self, config: StorageConfig) -> StorageBackend:
        backend = self.function(config)
        if not isinstance(backend, StorageBackend):
            raise TypeError(
                f"The backend that is registered for {self.scheme}:// opened a "
                f"{type(backend).__name__}. Let it return a workflow_storage.StorageBackend."
            )
        return backend

    def check_store(self, config: StorageConfig) -> list[CheckMessage]:
        return self.open_store(config).check()

    def database_settings(self, config: StorageConfig) -> dict[str, Any] | None:
        return None


_registered: dict[str, _ThirdParty] = {}


def register_backend(scheme: str, open_store: Callable[[StorageConfig], StorageBackend]) -> None:
    """Let URLs with a scheme lead to a store of your own.

    Do it before the store is first used, such as in the ``ready()`` of an app, or declare an
    entry point in the group ``workflow_storage.backends`` instead.

    Args:
        scheme: what stands before ``://``, such as ``mongo``; that of another third party's
            backend is taken over.
        open_store: takes the `StorageConfig`, whose `backend` is the URL, and returns a
            `StorageBackend`. It is called once for each URL in a process, and connects when the
            store is first used, as ``manage.py check`` opens it, too.

    Raises:
        ValueError: if it is no scheme, or leads to a store of this package.
    """
    if not _SCHEME.fullmatch(scheme):
        raise ValueError(
            f"{scheme!r} is no scheme of a URL. Take a letter, and then letters, digits and any "
            "of + . -"
        )
    if scheme in _DOORS or scheme in dj_database_url.ENGINE_SCHEMES:
        raise ValueError(f"{scheme}:// is a store of workflow_storage already. Take another name.")
    _registered[scheme] = _ThirdParty(scheme, open_store)


def door_of(config: StorageConfig) -> Door:
    """Return the door of the store that a configuration names.

    Raises:
        UnsupportedBackendError: if it names none.
    """
    backend = config.backend
    scheme, separator, _ = backend.partition("://")
    if backend in project_databases():
        return _door(_ORM)
    if separator:
        if scheme in _DOORS:
            return _door(_DOORS[scheme])
        if scheme in dj_database_url.ENGINE_SCHEMES:
            return _door(_ORM)
        third_party = _registered.get(scheme) or _by_entry_point(scheme)
        if third_party is not None:
            return third_party
    elif backend == "sqlite":
        return _door(_ORM)
    raise _unsupported(backend)


def _door(package: str) -> Door:
    return cast("Door", import_module(package))


def _by_entry_point(scheme: str) -> _ThirdParty | None:
    for entry_point in metadata.entry_points(group=ENTRY_POINTS, name=scheme):
        try:
            return _ThirdParty(scheme, entry_point.load())
        except (ImportError, AttributeError) as exc:
            raise UnsupportedBackendError(
                f"The backend for {scheme}:// cannot be loaded: the entry point "
                f"{entry_point.value!r} leads nowhere: {exc}. Install the package anew, or take "
                "another backend."
            ) from exc
    return None


def _unsupported(backend: str) -> UnsupportedBackendError:
    names = ", ".join(repr(alias) for alias in project_databases()) or "none"
    by_entry_point = (entry_point.name for entry_point in metadata.entry_points(group=ENTRY_POINTS))
    known = {*dj_database_url.ENGINE_SCHEMES, *_DOORS, *_registered, *by_entry_point}
    schemes = ", ".join(f"{scheme}://" for scheme in sorted(known))
    return UnsupportedBackendError(
        f"Unsupported storage backend: {without_password(backend)!r}. Use a name in DATABASES "
        f"({names}), 'sqlite', or a URL with one of: {schemes}."
    )

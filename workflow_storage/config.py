"""What a user can configure, as pydantic models, for the factory."""

import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator

_NAME = re.compile(r"[\w.-]+")
_URL = re.compile(r"(?P<scheme>[A-Za-z][\w+.-]*)://(?P<credentials>.*@)?(?P<rest>[^?#;\s]*)", re.S)


def without_password(backend: str) -> str:
    """Give a backend's name or URL as it may be shown: without credentials and options."""
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
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    backend: str = "sqlite"
    path: str = "./workflows.db"

    @field_validator("path", mode="before")
    @classmethod
    def _path_as_text(cls, path: Any) -> Any:
        return str(path) if isinstance(path, Path) else path

    def __repr_args__(self) -> Any:
        yield "backend", without_password(self.backend)
        yield "path", self.path


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

"""What a user can configure, as pydantic models, for the factory."""

import re
from typing import Any

from pydantic import BaseModel, ConfigDict

# Up to the last @ before the path, so that a password with an unquoted @ is hidden whole.
_CREDENTIALS = re.compile(r"(?<=://)[^/?#\s]*@|(?<=://)\S*@")


def without_password(backend: str) -> str:
    """Give a backend's name or URL as it may be shown: without user and password, or query."""
    return _CREDENTIALS.sub("***@", backend).partition("?")[0]


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

    def __repr_args__(self) -> Any:
        yield "backend", without_password(self.backend)
        yield "path", self.path


class GlobalConfig(BaseModel):
    """The part of an application's configuration that this package reads.

    Attributes:
        storage: which store to use; None means the project's own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    storage: StorageConfig | None = None

"""What SQLite needs beside its connections: a look at the file, and the locks of a forked process."""

from __future__ import annotations

import os
from contextlib import suppress
from urllib.parse import unquote, urlsplit

# https://www.sqlite.org/fileformat2.html#the_lock_byte_page: the bytes of the file that who
# reads it has a shared lock on; and, in the -shm file of a WAL, the byte that who has it open does
# (https://www.sqlite.org/walformat.html#wal_locks has those before it).
_SHARED_FIRST, _SHARED_SIZE = 0x40000002, 510
_OPEN_BYTE = 128
_WAL = b"\x02\x02"

_kept_open: dict[str, tuple[int, int]] = {}


File = tuple[str, tuple[int, int]]
"""A path, and what tells the file that was there from another one."""


def file_of(name: str) -> File | None:
    """Return the file of an open database; None for one in memory, or that is gone already.

    Args:
        name: what DATABASES calls the NAME: a path or a URI.
    """
    if name == ":memory:" or "mode=memory" in name:
        return None
    path = _path(name)
    identity = _identity(path)
    return None if identity is None else (path, identity)


def is_there(file: File) -> bool:
    """Whether a file is where it was, and still that one."""
    path, identity = file
    return _identity(path) == identity


def _path(name: str) -> str:
    return os.path.abspath(unquote(urlsplit(name).path) if name.startswith("file:") else name)  # noqa: PTH100 - no symlink is followed


def _identity(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)  # noqa: PTH116 - it is called for each operation
    except OSError:
        return None
    return found.st_dev, found.st_ino


def take_inherited_locks(name: str) -> None:
    """Take the locks on a file that SQLite believes to have after a fork.

    SQLite counts its locks by process, and a child has inherited the counts but not the locks. A
    connection that the child opens beside an inherited one would add to the count and lock
    nothing; as soon as the parent closed the file, it would delete the WAL that the child goes on
    writing to, and all of that would be lost without an error. Closing the inherited connection
    instead is what SQLite forbids (https://www.sqlite.org/howtocorrupt.html#_carrying_an_open_database_connection_across_a_fork_).

    Args:
        name: what DATABASES calls the NAME: a path or a URI.
    """
    path = _path(name)
    with suppress(OSError):
        if path not in _kept_open:
            database = os.open(path, os.O_RDWR)
            if os.pread(database, len(_WAL), 18) != _WAL:
                # Nobody has a lock on it between two transactions.
                os.close(database)
                return
            # Never closed: that would give up every lock of this process on the file.
            _kept_open[path] = database, os.open(f"{path}-shm", os.O_RDWR)
        _lock(*_kept_open[path])


def _lock(database: int, shared_memory: int) -> None:
    import fcntl

    fcntl.lockf(database, fcntl.LOCK_SH | fcntl.LOCK_NB, _SHARED_SIZE, _SHARED_FIRST)
    fcntl.lockf(shared_memory, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, _OPEN_BYTE)

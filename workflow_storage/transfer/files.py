"""Files of runs, for `jsonlines`: opened, compressed, and replaced only once they are complete."""

from __future__ import annotations

import gzip
import os
import shutil
import sys
import zlib
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal, cast

from workflow_storage.exceptions import ExportFileError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

if TYPE_CHECKING:
    from collections.abc import Iterator

DAMAGE = (OSError, EOFError, zlib.error, zstd.ZstdError)
"""What reading on in a damaged file raises."""

MANY = 256 * 2**20
"""Bytes that any file may unpack to."""

HIGHEST_RATIO = 5000
"""How much smaller than what it unpacks to a file of runs is at most. Lines that repeat one large
state reach some hundreds; nothing but zeros, 30,000."""

_FRAME_HEADER = 18  # https://datatracker.ietf.org/doc/html/rfc8878#name-frame-header
_SKIPPED_AT_ONCE = 2**20

_COMPRESSED = frozenset({".gz", ".zst"})
_OPEN_FILES = frozenset(map(Path, ("/dev", "/dev/fd", "/proc/self/fd")))
"""Where files have names that are already open, such as ``/dev/stdout``."""


def is_stream(path: Path) -> bool:
    """Whether a path names a pipe, a device or something open, which nothing can replace."""
    return path.exists() and (not path.is_file() or path.parent in _OPEN_FILES)


def is_cut_to_nothing(path: Path) -> bool:
    """Whether a file is empty, though its name says that it is compressed."""
    return path.suffix in _COMPRESSED and path.is_file() and path.stat().st_size == 0


@contextmanager
def reading(path: Path) -> Iterator[IO[bytes]]:
    """Yield a file to read from.

    Raises:
        ExportFileError: if it cannot be opened, or is made to unpack without end.
    """
    with _errors_of(path):
        _refuse_bomb(path)
    with _errors_of(path), _opened(path, path.suffix, "rb") as file:
        yield file


def line_of(file: IO[bytes], limit: int) -> bytes | None:
    """Return the next line of a file, nothing at its end; None if it was longer than the limit."""
    line = file.readline(limit + 1)
    if len(line) <= limit or line.endswith(b"\n"):
        return line
    while not line.endswith(b"\n"):
        line = file.readline(_SKIPPED_AT_ONCE)
        if not line:
            break
    return None


def _refuse_bomb(path: Path) -> None:
    """Refuse a file that says of itself that it unpacks to what no runs unpack to."""
    if path.suffix != ".zst" or not path.is_file():
        return
    with path.open("rb") as file:
        head = file.read(_FRAME_HEADER)
    try:
        declared = zstd.get_frame_info(head).decompressed_size
    except zstd.ZstdError:
        return  # which is found when it is read
    size = path.stat().st_size
    if declared is not None and declared > max(MANY, size * HIGHEST_RATIO):
        raise ExportFileError(
            str(path), f"{size:,} bytes that unpack to {declared:,}, which are no exported runs"
        )


@contextmanager
def writing(path: Path) -> Iterator[IO[bytes]]:
    """Yield a file to write to, which appears under its name once the block is left.

    It replaces the one that was there, and keeps its mode. If the block is left with an
    exception, nothing appears. A stream is written to as it is.

    Raises:
        ExportFileError: if it cannot be written.
    """
    with _errors_of(path):
        if path.is_dir():
            raise ExportFileError(str(path))
        stream = is_stream(path)
        actual = path.resolve()
    if stream:
        with _errors_of(path), _opened(path, path.suffix, "ab") as file:
            yield file
        return
    part = actual.with_name(f"{actual.name}.{os.getpid()}.part")
    try:
        with _errors_of(path), _opened(part, path.suffix, "wb") as file:
            if actual.exists():
                shutil.copymode(actual, part)
            yield file
        with _errors_of(path):
            part.replace(actual)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


@contextmanager
def _errors_of(path: Path) -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise  # whoever reads the stream has enough
    except (OSError, zlib.error, zstd.ZstdError) as exc:
        reason = str(getattr(exc, "strerror", None) or exc)
        raise ExportFileError(str(path), reason) from exc


def _opened(path: Path, suffix: str, mode: Literal["rb", "wb", "ab"]) -> IO[bytes]:
    """Open a file, compressed as its suffix says that it is or is going to be."""
    if suffix == ".gz":
        return cast("IO[bytes]", gzip.open(path, mode))
    if suffix == ".zst":
        if mode == "rb":
            return cast("IO[bytes]", zstd.open(path, mode))
        checksum = {int(zstd.CompressionParameter.checksum_flag): 1}
        file = cast("IO[bytes]", zstd.open(path, mode, options=checksum))
        file.write(b"")  # or else a file of no runs would have no frame
        return file
    return path.open(mode)

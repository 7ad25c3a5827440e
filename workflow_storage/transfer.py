"""Runs copied or moved from one store to another, or through a file of JSON Lines.

What is in the target is never overwritten by something older, and a run is deleted from the
source only after it has been read back equal. Every transfer can be interrupted and begun
again: what is there already is not written twice.
"""

from __future__ import annotations

import gzip
import itertools
import os
import shutil
import sys
import zlib
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, Unpack, cast
from zlib import crc32

from django.utils import timezone

from workflow_storage.base import Checkpoint, RunFilters, StorageBackend
from workflow_storage.exceptions import (
    DamagedStateError,
    RunAlreadyExistsError,
    RunChangedError,
    RunNotFoundError,
    StepConflictError,
    StorageError,
    StorageUnavailableError,
)
from workflow_storage.serialization import dump_json, load_json
from workflow_storage.status import TERMINAL_STATUSES, RunStatus
from workflow_storage.validation import (
    RUN_FIELDS,
    equal_checkpoints,
    equal_runs,
    in_project_time,
    run_fields,
    valid_checkpoint,
    valid_fields,
)

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

if TYPE_CHECKING:
    from collections.abc import Iterator

    from workflow_storage.models import WorkflowRun

FORMAT = 1
"""The version of the lines that `export_runs` writes, under the key ``workflow_storage``."""

STATES_AT_ONCE = 20
"""Checkpoints that are appended in one transaction, and held in memory for that."""

PROBE = "workflow_storage: are these two stores one?"
"""The workflow of a run that is stored in the target for a moment."""

_TIMES = frozenset({"started_at", "completed_at", "heartbeat_at", "created_at"})
_LINE_KEYS = frozenset({"workflow_storage", "run", "states", "crc32"})
_COMPRESSED = frozenset({".gz", ".zst"})
_OPEN_FILES = frozenset(map(Path, ("/dev", "/dev/fd", "/proc/self/fd")))
"""Where files have names that are already open, such as ``/dev/stdout``."""
_ERRORS_OF_A_FILE = (OSError, EOFError, zlib.error, zstd.ZstdError)

MAX_ATTEMPTS = 20
"""Times that a run is tried while another process copies it to the same store."""

# What happens then; the next time, this process finds what the other one wrote.
_COPIED_BY_ANOTHER = (
    RunAlreadyExistsError,
    RunChangedError,
    RunNotFoundError,
    StepConflictError,
)

Outcome = Literal["copied", "updated", "unchanged", "refused"]


class Transferred(NamedTuple):
    """What became of one run."""

    run_id: str
    outcome: Outcome
    """copied: it was not there; updated: it had changed, or had new states; refused: see reason."""
    states: int = 0
    """How many checkpoints were written."""
    deleted: bool = False
    """Whether it was deleted from the source."""
    reason: str = ""
    """Why it was refused, or not deleted."""


class DamagedLine(NamedTuple):
    """A line of a file that could not be imported."""

    number: int
    """Counts from 1."""
    reason: str


class CannotMoveError(StorageError, ValueError):
    """Runs cannot be moved from a store to itself, or inside a transaction."""


class ExportFileError(StorageError):
    """A file cannot be read or written."""


def copy_runs(
    source: StorageBackend,
    target: StorageBackend,
    *,
    move: bool = False,
    **filters: Unpack[RunFilters],
) -> Iterator[Transferred]:
    """Copy runs with all their states from one store to another, newest first.

    Afterwards a run is the same in both: every field, step, node and time. A run that is
    there already gets what is new. It is refused if it is another run with the same id, or if
    it is not clear that the source has the newer one; the others are copied nevertheless.

    Args:
        source: where the runs are.
        target: where they go.
        move: delete each finished run from the source once it has been read back equal.
        **filters: which runs; see `RunFilters`.

    Yields:
        What became of each run, once it is done. The copying goes on with the iteration.

    Raises:
        CannotMoveError: before anything is done, if `move` has the same store twice, or one of
            them has a transaction open: a rollback would lose what was deleted elsewhere.
        StorageUnavailableError: if a store does not answer; call it again to go on.
    """
    _refuse_useless(target)
    if move:
        if source.in_transaction() or target.in_transaction():
            raise CannotMoveError(
                "Runs cannot be moved inside a transaction, whose rollback would lose them. "
                "Move them outside of transaction.atomic() and ATOMIC_REQUESTS."
            )
        _refuse_same_store(source, target)
    for run in source.runs.iter_runs(**filters):
        with suppress(RunNotFoundError):  # deleted in the source meanwhile
            yield _copied(run, source, target, move=move)


def export_runs(
    source: StorageBackend, path: str | Path, **filters: Unpack[RunFilters]
) -> Iterator[Transferred]:
    """Write runs to a file of JSON Lines: one run with all its states a line, newest first.

    A line is ``{"workflow_storage": 1, "run": {…}, "states": [{…}, …], "crc32": "…"}``, with
    the fields of `WorkflowRun` and `Checkpoint`, times in ISO 8601 with their offset, and the
    checksum of the bytes before its own key. The file appears under its name once it is
    complete, and replaces the one that was there; a pipe or ``/dev/stdout`` is written to.

    Args:
        source: where the runs are.
        path: the file; compressed with gzip or zstd if it ends in ``.gz`` or ``.zst``.
        **filters: which runs; see `RunFilters`.

    Yields:
        Each run, once it is written. A run that cannot be read is refused and left out.

    Raises:
        ExportFileError: if the file cannot be written.
        StorageUnavailableError: if the store does not answer.
    """
    path = Path(path)
    with _errors_of(path):
        if path.is_dir():
            raise ExportFileError(f"{path} is a directory. Name a file in it.")
        stream = is_stream(path)
        actual = path.resolve()
    if stream:
        with _errors_of(path), _opened(path, path, "ab") as file:
            for run in source.runs.iter_runs(**filters):
                yield _exported(run, source, file)
        return
    part = actual.with_name(f"{actual.name}.{os.getpid()}.part")
    try:
        with _errors_of(path), _opened(path, part, "wb") as file:
            if actual.exists():
                shutil.copymode(actual, part)
            for run in source.runs.iter_runs(**filters):
                yield _exported(run, source, file)
        with _errors_of(path):
            part.replace(actual)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def import_runs(path: str | Path, target: StorageBackend) -> Iterator[Transferred | DamagedLine]:
    """Store the runs of a file that `export_runs` wrote; the same holds as for `copy_runs`.

    Args:
        path: the file; gzip or zstd if it ends in ``.gz`` or ``.zst``.
        target: where the runs go.

    Yields:
        What became of each run; and each line that is damaged, after which it goes on. A file
        that ends too early, or cannot be decompressed any further, is a damaged line, too.

    Raises:
        ExportFileError: if the file cannot be opened.
        StorageUnavailableError: if the store does not answer; call it again to go on.
    """
    path = Path(path)
    _refuse_useless(target)
    with _errors_of(path), _opened(path, path, "rb") as file:
        for number in itertools.count(1):
            try:
                line = file.readline()
            except _ERRORS_OF_A_FILE as exc:
                yield DamagedLine(number, f"the file is damaged from here on: {exc}")
                return
            if not line:
                if number == 1 and path.suffix in _COMPRESSED and _is_empty(path):
                    yield DamagedLine(1, "the file is empty, which no compressed file is")
                return
            if line.isspace():
                continue
            try:
                run, states = _parsed_line(line)
            except (ValueError, TypeError, OverflowError, StorageError) as exc:
                yield DamagedLine(number, str(exc))
                continue
            done = _stored(run, _Listed(states), target)
            if done.reason:
                done = done._replace(reason=f"Line {number}: {done.reason}")
            yield done


class _History(Protocol):
    """The checkpoints of a run, wherever they come from."""

    def at(self, step: int) -> Checkpoint | None: ...

    def newest(self) -> Checkpoint | None: ...

    def after(self, step: int) -> Iterator[Checkpoint]: ...


class _InStore:
    def __init__(self, store: StorageBackend, run_id: str) -> None:
        self._states = store.states
        self._run_id = run_id

    def at(self, step: int) -> Checkpoint | None:
        return self._states.get_state(self._run_id, step)

    def newest(self) -> Checkpoint | None:
        return self._states.get_latest_checkpoint(self._run_id)

    def after(self, step: int) -> Iterator[Checkpoint]:
        return self._states.iter_state_history(self._run_id, after=step)


class _Listed:
    def __init__(self, checkpoints: list[Checkpoint]) -> None:
        self._checkpoints = checkpoints

    def at(self, step: int) -> Checkpoint | None:
        return next((one for one in self._checkpoints if one["step"] == step), None)

    def newest(self) -> Checkpoint | None:
        return self._checkpoints[-1] if self._checkpoints else None

    def after(self, step: int) -> Iterator[Checkpoint]:
        return (one for one in self._checkpoints if one["step"] > step)


def _copied(
    run: WorkflowRun, source: StorageBackend, target: StorageBackend, *, move: bool
) -> Transferred:
    # As it is now; it was read together with others, some time ago.
    run = _current(run.id, source)
    done = _stored(run, _InStore(source, run.id), target)
    if done.outcome == "refused":
        return done
    if not move or run.status not in TERMINAL_STATUSES:
        if source.runs.get(run.id) is None:
            return done._replace(reason="It was deleted in the source while it was copied.")
        return done
    try:
        last = _newest_if_equal(run, source, target)
        source.runs.delete_unchanged(run, last)
    except StorageUnavailableError:
        raise
    except RunNotFoundError:
        return done  # another process has moved it, too
    except StorageError as exc:
        return done._replace(reason=f"It was copied, but not deleted: {exc}")
    return done._replace(deleted=True)


def _current(run_id: str, store: StorageBackend) -> WorkflowRun:
    run = store.runs.get(run_id)
    if run is None:
        raise RunNotFoundError(run_id)
    return run


def _stored(run: WorkflowRun, history: _History, target: StorageBackend) -> Transferred:
    """Bring the run in the target up to date, or say why not."""
    for attempt in range(MAX_ATTEMPTS):
        try:
            return _updated(run, history, target)
        except StorageUnavailableError:
            raise
        except DamagedStateError as exc:
            reason = f"{exc} What comes before it is in the target."
            return Transferred(run.id, "refused", reason=reason)
        except StorageError as exc:
            if not isinstance(exc, _COPIED_BY_ANOTHER) or attempt == MAX_ATTEMPTS - 1:
                return Transferred(run.id, "refused", reason=str(exc))
    raise AssertionError("unreachable")


def _updated(run: WorkflowRun, history: _History, target: StorageBackend) -> Transferred:
    stored = target.runs.get(run.id)
    if stored is None:
        target.runs.put(run)
        return Transferred(run.id, "copied", _appended(run.id, history.after(-1), target))
    last = target.states.get_latest_checkpoint(run.id)
    reason = _conflict(run, history, stored, last)
    if reason:
        return Transferred(run.id, "refused", reason=reason)
    count = _appended(run.id, history.after(-1 if last is None else last["step"]), target)
    if equal_runs(stored, run):
        return Transferred(run.id, "updated" if count else "unchanged", count)
    target.runs.put(run, over=stored)
    return Transferred(run.id, "updated", count)


def _appended(run_id: str, checkpoints: Iterator[Checkpoint], target: StorageBackend) -> int:
    writer = target.states.writer(run_id)
    count = 0
    while written := writer.append(list(itertools.islice(checkpoints, STATES_AT_ONCE))):
        count += written
    return count


def _conflict(
    run: WorkflowRun, history: _History, stored: WorkflowRun, last: Checkpoint | None
) -> str | None:
    """Say why a run in the target is not just an earlier form of this one, if it is not."""
    if (stored.workflow_name, stored.started_at) != (run.workflow_name, run.started_at):
        return (
            f"The target has another run with this id, of {stored.workflow_name!r}, started at "
            f"{stored.started_at}. Delete one of them."
        )
    newest = history.newest()
    behind = newest is not None and last is not None and newest["step"] < last["step"]
    ahead = newest is not None and (last is None or newest["step"] > last["step"])
    if newest is not None and last is not None and not behind:
        same_step = history.at(last["step"])
        if same_step is not None and not equal_checkpoints(same_step, last):
            return (
                f"The target has another state at step {last['step']}. The run went on "
                "differently in both; delete it in one of them."
            )
    if behind:
        return (
            f"The target has states up to step {last['step']}, which are not here. "  # type: ignore[index]
            "It went on there, or began anew here; delete it in one of them."
        )
    if ahead and last is not None:
        following = next(history.after(last["step"]), None)
        if following is not None and following["step"] != last["step"] + 1:
            return (
                f"The target has states up to step {last['step']}, and the next one here is step "
                f"{following['step']}; those between were deleted here. Delete the run in the "
                "target, to copy those that are left."
            )
    return None if equal_runs(stored, run) else _unclear(run, stored, ahead=ahead)


def _unclear(run: WorkflowRun, stored: WorkflowRun, *, ahead: bool) -> str | None:
    """Say why it is not clear that the run is newer here than in the target, if it is not."""
    here, there = _last_change(run), _last_change(stored)
    if there > here:
        return (
            f"It was changed in the target, at {there}, after it was here, at {here}. "
            "Delete it in one of them, or copy it the other way."
        )
    if there == here and not ahead:
        return (
            "It is not the same in the target, and neither is newer: its last change of status "
            f"or heartbeat was at {here} in both. Delete it in one of them."
        )
    return None


def _last_change(run: WorkflowRun) -> datetime:
    moments = (run.started_at, run.heartbeat_at, run.completed_at)
    return max(moment for moment in moments if moment is not None)


def _newest_if_equal(
    run: WorkflowRun, source: StorageBackend, target: StorageBackend
) -> Checkpoint | None:
    """Read a run back from the target, and give its newest checkpoint in the source.

    Raises:
        StorageError: unless the run and all its states are equal in both.
    """
    unequal = StorageError(
        "It does not read back equal from the target. Move it again, in case it was changed "
        "meanwhile; if this comes again, compare the two."
    )
    read = target.runs.get(run.id)
    if read is None or not equal_runs(read, run):
        raise unequal
    here = source.states.iter_state_history(run.id)
    last = next(here, None)
    if last is None:
        return None
    # The target may also have older ones, which the source has deleted since.
    there = target.states.iter_state_history(run.id, after=last["step"] - 1)
    for ours, theirs in itertools.zip_longest(itertools.chain([last], here), there):
        if ours is None or theirs is None or not equal_checkpoints(ours, theirs):
            raise unequal
        last = ours
    return last


def _refuse_useless(target: StorageBackend) -> None:
    """Let a target that refuses everything say so once, and not for each run."""
    target.runs.list_runs(limit=1)


def _refuse_same_store(source: StorageBackend, target: StorageBackend) -> None:
    """Tell by a run that is stored for a moment whether two stores are one.

    Their names cannot tell: one database has many URLs.
    """
    from workflow_storage.models import WorkflowRun

    if type(source.runs) is not type(target.runs):
        return
    now = timezone.now()
    # Those of processes that were killed at this point.
    target.runs.delete_finished(before=now - timedelta(minutes=1), workflow_name=PROBE)
    probe = WorkflowRun(workflow_name=PROBE, status=RunStatus.CANCELLED)
    target.runs.add(probe)
    try:
        same = source.runs.get(probe.id) is not None
    finally:
        target.runs.delete(probe.id)
    if same:
        raise CannotMoveError(
            "The source and the target are the same store. Name another target, or copy "
            "without moving."
        )


def _exported(run: WorkflowRun, source: StorageBackend, file: IO[bytes]) -> Transferred:
    head = dump_json({"workflow_storage": FORMAT, "run": _as_text(run_fields(run))})
    part = f'{head.removesuffix("}")},"states":['.encode()
    checksum = crc32(part)
    file.write(part)
    count = 0
    try:
        for checkpoint in source.states.iter_state_history(run.id):
            part = b"," * (count > 0) + dump_json(_as_text({**checkpoint})).encode()
            checksum = crc32(part, checksum)
            file.write(part)
            count += 1
    except StorageUnavailableError:
        raise
    except StorageError as exc:
        # What is written cannot be taken back, but it is no JSON as it stands.
        file.write(b"\n")
        return Transferred(run.id, "refused", count, reason=f"Its line is incomplete: {exc}")
    if source.runs.get(run.id) is None:
        file.write(b"\n")
        reason = "Its line is incomplete: it was deleted while it was written."
        return Transferred(run.id, "refused", count, reason=reason)
    file.write(b"]" + _checksum_key(crc32(b"]", checksum)) + b"\n")
    return Transferred(run.id, "copied", count)


def _checksum_key(checksum: int) -> bytes:
    """Give the end of a line."""
    return b',"crc32":"%08x"}' % checksum


def _as_text(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _with_offset(value).isoformat() if isinstance(value, datetime) else value
        for name, value in fields.items()
    }


def _with_offset(value: datetime) -> datetime:
    """Let a time be the same wherever it is read, where the project has them without (USE_TZ)."""
    if timezone.is_aware(value):
        return value
    return timezone.make_aware(value, timezone.get_default_timezone())


def _parsed_line(line: bytes) -> tuple[WorkflowRun, list[Checkpoint]]:
    """Give the run and the states of a line, all checked before anything is stored.

    Raises:
        ValueError, TypeError, StorageError: if the line is not one that `export_runs` wrote.
    """
    from workflow_storage.models import WorkflowRun

    try:
        data = load_json(line)
    except ValueError as exc:
        raise ValueError(f"it is no JSON: {exc}") from exc
    if not isinstance(data, dict) or data.get("workflow_storage") != FORMAT:
        raise ValueError(f'it is no run: "workflow_storage" is not {FORMAT}')
    _check_sum(data, line)
    fields, states = data.get("run"), data.get("states")
    if not isinstance(fields, dict) or set(fields) != set(RUN_FIELDS):
        raise ValueError(f"its run does not have just the fields {', '.join(RUN_FIELDS)}")
    if not isinstance(states, list):
        raise ValueError("its states are no list")
    run = WorkflowRun(**valid_fields(_with_times(fields)))
    checkpoints: list[Checkpoint] = []
    for state in states:
        if not isinstance(state, dict) or set(state) != set(Checkpoint.__annotations__):
            raise ValueError(f"a state does not have just {', '.join(Checkpoint.__annotations__)}")
        checkpoint = cast("Checkpoint", _with_times(state))
        valid_checkpoint(checkpoint)
        if checkpoints and checkpoint["step"] != checkpoints[-1]["step"] + 1:
            raise ValueError(f"after step {checkpoints[-1]['step']} comes {checkpoint['step']}")
        checkpoints.append(checkpoint)
    return run, checkpoints


def _check_sum(data: dict[str, Any], line: bytes) -> None:
    if not data.keys() <= _LINE_KEYS:
        raise ValueError(f"it has other keys than {', '.join(sorted(_LINE_KEYS))}")
    if "crc32" not in data:
        return
    line = line.rstrip()
    end = len(_checksum_key(0))
    if line[-end:] != _checksum_key(crc32(memoryview(line)[:-end])):
        raise ValueError(
            "it is not as it was written, for its checksum differs. If it was changed on "
            'purpose, delete "crc32" from it'
        )


def _with_times(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        name: in_project_time(datetime.fromisoformat(value))
        if name in _TIMES and isinstance(value, str)
        else value
        for name, value in fields.items()
    }


@contextmanager
def _errors_of(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, zlib.error, zstd.ZstdError) as exc:
        reason = getattr(exc, "strerror", None) or exc
        raise ExportFileError(f"{path}: {reason}. Check the path and the disk.") from exc


def _is_empty(path: Path) -> bool:
    return path.is_file() and path.stat().st_size == 0


def is_stream(path: Path) -> bool:
    """Whether a path names a pipe, a device or something open, which nothing can replace."""
    return path.exists() and (not path.is_file() or path.parent in _OPEN_FILES)


def _opened(path: Path, actual: Path, mode: Literal["rb", "wb", "ab"]) -> IO[bytes]:
    """Open a file, compressed as the name says that it has or is going to have."""
    if path.suffix == ".gz":
        return cast("IO[bytes]", gzip.open(actual, mode))
    if path.suffix == ".zst":
        if mode == "rb":
            return cast("IO[bytes]", zstd.open(actual, mode))
        checksum = {int(zstd.CompressionParameter.checksum_flag): 1}
        file = cast("IO[bytes]", zstd.open(actual, mode, options=checksum))
        file.write(b"")  # or else a file of no runs would have no frame
        return file
    return actual.open(mode)

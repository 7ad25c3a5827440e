"""Runs as JSON Lines: exported to a file, and imported from it by the rules of `copying`."""

from __future__ import annotations

import itertools
from datetime import datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, Unpack, cast
from zlib import crc32

from django.utils import timezone

from workflow_storage.base import Attempt, Checkpoint
from workflow_storage.exceptions import (
    RunNotFoundError,
    StorageError,
    StorageUnavailableError,
)
from workflow_storage.serialization import dump_json, load_json
from workflow_storage.transfer.copying import (
    ListedHistory,
    Transferred,
    attempts_of,
    bring_up_to_date,
    refuse_useless,
)
from workflow_storage.transfer.files import DAMAGE, is_cut_to_nothing, line_of, reading, writing
from workflow_storage.validation import (
    RUN_FIELDS,
    in_project_time,
    run_fields,
    valid_attempt_fields,
    valid_checkpoint,
    valid_fields,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from workflow_storage.base import RunFilters, StorageBackend
    from workflow_storage.models import WorkflowRun

FORMAT = 1
"""The version of the lines that `export_runs` writes, under the key ``workflow_storage``."""

MAX_LINE = 256 * 2**20
"""Bytes of the longest line that `import_runs` reads, unless it is told otherwise."""

_BEFORE_VALUES = (b"[", b"{", b",")
_BYTES_A_VALUE = 50
"""Bytes of text for each value in a line, on the average, at least: an empty list takes two, and 56
bytes of memory, so that a line of nothing else would take 28 times its length."""

_TIMES = frozenset(
    {
        "started_at",
        "attempt_started_at",
        "heartbeat_at",
        "completed_at",
        "ended_at",
        "created_at",
    }
)
_LINE_KEYS = frozenset({"workflow_storage", "run", "attempts", "states", "crc32"})


class DamagedLine(NamedTuple):
    """A line of a file that could not be imported."""

    number: int
    """Counts from 1."""
    reason: str


def export_runs(
    source: StorageBackend, path: str | Path, **filters: Unpack[RunFilters]
) -> Iterator[Transferred]:
    """Write runs to a file of JSON Lines: one run with all that is its own a line, newest first.

    A line is ``{"workflow_storage": 1, "run": {…}, "attempts": [{…}, …], "states": [{…}, …],
    "crc32": "…"}``, with the fields of `WorkflowRun`, `Attempt` and `Checkpoint`, times in ISO
    8601 with their offset, and the checksum of the bytes before its own key. The file appears under its name once it is
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
    with writing(Path(path)) as file:
        for run in source.runs.iter_runs(**filters):
            yield _exported(run, source, file)


def import_runs(
    path: str | Path, target: StorageBackend, *, max_line: int = MAX_LINE
) -> Iterator[Transferred | DamagedLine]:
    """Store the runs of a file that `export_runs` wrote; the same holds as for `copy_runs`.

    Args:
        path: the file; gzip or zstd if it ends in ``.gz`` or ``.zst``.
        target: where the runs go.
        max_line: bytes of the longest line, a run with all its states; more is damage, so that a
            small file that unpacks to gigabytes fills no memory.

    Yields:
        What became of each run; and each line that is damaged, after which it goes on. A file
        that ends too early, or cannot be decompressed any further, is a damaged line, too.

    Raises:
        ExportFileError: if the file cannot be opened, or declares to unpack to what no runs do.
        StorageUnavailableError: if the store does not answer; call it again to go on.
    """
    path = Path(path)
    refuse_useless(target)
    with reading(path) as file:
        for number in itertools.count(1):
            try:
                line = line_of(file, max_line)
            except DAMAGE as exc:
                yield DamagedLine(number, f"the file is damaged from here on: {exc}")
                return
            if line is None:
                yield DamagedLine(
                    number,
                    f"it is longer than {max_line / 2**20:,.0f} MB. If you trust the file, and have "
                    "several times as much memory, raise max_line (--max-line).",
                )
                continue
            if not line:
                if number == 1 and is_cut_to_nothing(path):
                    yield DamagedLine(1, "the file is empty, which no compressed file is")
                return
            if line.isspace():
                continue
            if sum(map(line.count, _BEFORE_VALUES)) > max(max_line // _BYTES_A_VALUE, 1000):
                yield DamagedLine(number, "it holds more values than the states of any run")
                continue
            try:
                run, history = _parsed_line(line)
            except (ValueError, TypeError, OverflowError, StorageError) as exc:
                yield DamagedLine(number, str(exc))
                continue
            except MemoryError:
                yield DamagedLine(number, "it takes more memory than there is")
                continue
            done = bring_up_to_date(run, history, target)
            if done.reason:
                done = done._replace(reason=f"Line {number}: {done.reason}")
            yield done


def _exported(run: WorkflowRun, source: StorageBackend, file: IO[bytes]) -> Transferred:
    try:
        attempts = attempts_of(run, source.runs.list_attempts(run.id))
    except RunNotFoundError:
        return Transferred(run.id, "refused", reason="It was deleted before it was written.")
    head = dump_json(
        {
            "workflow_storage": FORMAT,
            "run": _as_text(run_fields(run)),
            "attempts": [_as_text(attempt._asdict()) for attempt in attempts],
        }
    )
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
    """Return the end of a line."""
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


def _parsed_line(line: bytes) -> tuple[WorkflowRun, ListedHistory]:
    """Return the run of a line and what belongs to it, all checked before anything is stored.

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
    fields = data.get("run")
    if not isinstance(fields, dict) or set(fields) != set(RUN_FIELDS):
        raise ValueError(f"its run does not have just the fields {', '.join(RUN_FIELDS)}")
    run = WorkflowRun(**valid_fields(_with_times(fields)))
    return run, ListedHistory(_checkpoints(data.get("states")), _attempts(data.get("attempts")))


def _attempts(attempts: object) -> list[Attempt]:
    if not isinstance(attempts, list):
        raise ValueError("its attempts are no list")
    for attempt in attempts:
        if not isinstance(attempt, dict) or set(attempt) != set(Attempt._fields):
            raise ValueError(f"an attempt does not have just {', '.join(Attempt._fields)}")
    return [Attempt(**valid_attempt_fields(_with_times(attempt))) for attempt in attempts]


def _checkpoints(states: object) -> list[Checkpoint]:
    if not isinstance(states, list):
        raise ValueError("its states are no list")
    checkpoints: list[Checkpoint] = []
    for state in states:
        if not isinstance(state, dict) or set(state) != set(Checkpoint.__annotations__):
            raise ValueError(f"a state does not have just {', '.join(Checkpoint.__annotations__)}")
        checkpoint = cast("Checkpoint", _with_times(state))
        valid_checkpoint(checkpoint)
        if checkpoints and checkpoint["step"] != checkpoints[-1]["step"] + 1:
            raise ValueError(f"after step {checkpoints[-1]['step']} comes {checkpoint['step']}")
        checkpoints.append(checkpoint)
    return checkpoints


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

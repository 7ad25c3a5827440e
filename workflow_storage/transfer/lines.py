"""The lines of a file of runs: what is written to it and what is read from it, one at a time.

A run is a line with its fields and attempts, and each of its states is a line after it, as it is
stored. Every line ends with a checksum of itself. Called by `jsonlines`.
"""

from __future__ import annotations

import base64
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple
from zlib import crc32

from django.utils import timezone

from workflow_storage.base import Attempt, NodeUsage, Step
from workflow_storage.deltas import is_delta
from workflow_storage.exceptions import StorageError
from workflow_storage.serialization import dump_json, load_json, state_text
from workflow_storage.transfer.files import DAMAGE, line_of
from workflow_storage.validation import (
    MAX_NODE_ID,
    RUN_FIELDS,
    in_project_time,
    run_fields,
    valid_attempt,
    valid_attempt_fields,
    valid_count,
    valid_fields,
    valid_moment,
    valid_name,
    valid_usage,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import IO

    from workflow_storage.deltas import EncodedCheckpoint
    from workflow_storage.models import WorkflowRun

FORMAT = 2
"""The version of the lines, under the key ``workflow_storage`` of those of runs."""

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
_RUN_KEYS = frozenset({"workflow_storage", "run", "attempts", "first_step", "last_step", "crc32"})
_STEP_KEYS = frozenset({"run_id", *Step.__annotations__})
_NEEDED = frozenset({"run_id", "step", "node_id", "created_at"})
_BEFORE_STATE = b',"state":'


class DamagedLine(NamedTuple):
    """A line of a file that could not be imported."""

    number: int
    """Counts from 1."""
    reason: str


class RunLine(NamedTuple):
    """A line with a run."""

    number: int
    run: WorkflowRun
    attempts: list[Attempt]
    first_step: int | None
    """The step of the first of the states that follow; None if there are none."""
    last_step: int | None


class StateLine(NamedTuple):
    """A line with a state of the run before it."""

    number: int
    run_id: str
    step: int
    columns: list[Any]
    """What comes between in `EncodedCheckpoint`."""
    stored: bytes
    """The state as it is stored: its JSON text, or a delta."""


def run_line(
    run: WorkflowRun, attempts: list[Attempt], first_step: int | None, last_step: int | None
) -> bytes:
    """Return the line of a run."""
    return _with_checksum(
        dump_json(
            {
                "workflow_storage": FORMAT,
                "run": _as_text(run_fields(run)),
                "attempts": [_as_text(attempt._asdict()) for attempt in attempts],
                "first_step": first_step,
                "last_step": last_step,
            }
        ).encode()[:-1]
    )


def state_line(run_id: str, state: EncodedCheckpoint) -> bytes:
    """Return the line of a state."""
    columns = {name: getattr(state, name) for name in Step.__annotations__}
    known = {name: value for name, value in _as_text(columns).items() if value is not None}
    head = dump_json({"run_id": run_id, **known}).encode()[:-1]
    if is_delta(state.stored) or b"\n" in state.stored:
        # A quarter longer, where base64 is a third. Nothing in it is escaped in JSON.
        return _with_checksum(head + b',"stored":"' + base64.b85encode(state.stored) + b'"')
    return _with_checksum(head + _BEFORE_STATE + state.stored)


def _with_checksum(line: bytes) -> bytes:
    return line + _checksum_key(crc32(line)) + b"\n"


def _checksum_key(checksum: int) -> bytes:
    """Return the end of a line."""
    return b',"crc32":"%08x"}' % checksum


def read_lines(file: IO[bytes], max_line: int) -> Iterator[RunLine | StateLine | DamagedLine]:
    """Yield the lines of a file, and of those that are damaged what is wrong with them.

    Args:
        file: the file.
        max_line: bytes of the longest line; more is damage.
    """
    number = 0
    while True:
        number += 1
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
        elif not line:
            return
        elif not line.isspace():
            yield _parsed(number, line, max_line)


def _parsed(number: int, line: bytes, max_line: int) -> RunLine | StateLine | DamagedLine:
    if sum(map(line.count, _BEFORE_VALUES)) > max(max_line // _BYTES_A_VALUE, 1000):
        return DamagedLine(number, "it holds more values than any run or state")
    try:
        data = _json(line)
        if isinstance(data, dict) and "run_id" in data:
            return _state(number, data, line)
        return _run(number, data, line)
    except (ValueError, TypeError, OverflowError, StorageError) as exc:
        return DamagedLine(number, str(exc))
    except MemoryError:
        return DamagedLine(number, "it takes more memory than there is")


def _json(line: bytes) -> Any:
    try:
        return load_json(line)
    except ValueError as exc:
        raise ValueError(f"it is no JSON: {exc}") from exc


def _run(number: int, data: Any, line: bytes) -> RunLine:
    from workflow_storage.models import WorkflowRun

    if not isinstance(data, dict) or data.get("workflow_storage") != FORMAT:
        raise ValueError(f'it is no run or state: "workflow_storage" is not {FORMAT}')
    _check_sum(data, line)
    if not data.keys() <= _RUN_KEYS:
        raise ValueError(f"it has other keys than {', '.join(sorted(_RUN_KEYS))}")
    fields = data.get("run")
    if not isinstance(fields, dict) or set(fields) != set(RUN_FIELDS):
        raise ValueError(f"its run does not have just the fields {', '.join(RUN_FIELDS)}")
    attempts = data.get("attempts")
    if not isinstance(attempts, list):
        raise ValueError("its attempts are no list")
    for attempt in attempts:
        if not isinstance(attempt, dict) or set(attempt) != set(Attempt._fields):
            raise ValueError(f"an attempt does not have just {', '.join(Attempt._fields)}")
    first, last = (
        None if data.get(name) is None else valid_count(name, data[name])
        for name in ("first_step", "last_step")
    )
    if (first is None) != (last is None) or (first or 0) > (last or 0):
        raise ValueError(f"its states cannot be from step {first} to {last}")
    return RunLine(
        number,
        WorkflowRun(**valid_fields(_with_times(fields))),
        [Attempt(**valid_attempt_fields(_with_times(attempt))) for attempt in attempts],
        first,
        last,
    )


def _state(number: int, data: dict[str, Any], line: bytes) -> StateLine:
    _check_sum(data, line)
    keys = data.keys() - {"crc32"}
    of_state = keys & {"state", "stored"}
    if len(of_state) != 1 or not keys >= _NEEDED or not keys <= _STEP_KEYS | of_state:
        raise ValueError(
            f"it does not have just {', '.join(sorted(_STEP_KEYS))}, and either state or stored"
        )
    if not isinstance(data["run_id"], str):
        raise ValueError("its run_id is no text")
    given = _with_times(data)
    usage = valid_usage({name: given.get(name) for name in NodeUsage.__annotations__})
    if "stored" in data:
        stored = base64.b85decode(data["stored"])
    else:
        stored = state_text(data["state"])
        if "crc32" in data:
            # A delta is a difference in bytes, so it has to be just these.
            stored = line[line.index(_BEFORE_STATE) + len(_BEFORE_STATE) : _end_of(line)]
    return StateLine(
        number,
        data["run_id"],
        valid_count("step", data["step"]),
        [
            valid_name("node_id", data["node_id"], MAX_NODE_ID),
            valid_moment("created_at", given["created_at"]),
            valid_attempt(data.get("attempt")),
            *usage.values(),
        ],
        stored,
    )


def _check_sum(data: dict[str, Any], line: bytes) -> None:
    if "crc32" not in data:
        return
    end = _end_of(line)
    if line[end:].rstrip() != _checksum_key(crc32(memoryview(line)[:end])):
        raise ValueError(
            "it is not as it was written, for its checksum differs. If it was changed on "
            'purpose, delete "crc32" from it'
        )


def _end_of(line: bytes) -> int:
    """Return where the checksum of a line begins."""
    return len(line.rstrip()) - len(_checksum_key(0))


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


def _with_times(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        name: in_project_time(datetime.fromisoformat(value))
        if name in _TIMES and isinstance(value, str)
        else value
        for name, value in fields.items()
    }

"""The fields of a run as a hash in Redis holds them, and back; for the runs and their lists."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from workflow_storage.backends.redis.repository import parsed_time, time_text
from workflow_storage.exceptions import StorageError
from workflow_storage.models import WorkflowRun
from workflow_storage.serialization import load_json, payload_json
from workflow_storage.validation import PAYLOADS, RUN_FIELDS, plain_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from workflow_storage.backends.redis.cluster import Command
    from workflow_storage.backends.redis.connection import RedisStore

FIELDS = RUN_FIELDS[1:]
"""The fields in the hash of a run; the id is in its key."""

_TIMES = frozenset({"started_at", "completed_at", "heartbeat_at"})
_NO_DURATION = b"-"
"""The duration_seconds of a run that has ended and has none, as no run of the contract."""


def read_runs(store: RedisStore, run_ids: Iterable[str], *extra: str) -> list[Command]:
    """Return the commands that read runs, and further fields of theirs; see `run_from`."""
    return [
        ("HMGET", f"{store.key_prefix(run_id)}:run:{run_id}", *FIELDS, *extra)
        for run_id in map(plain_text, run_ids)
    ]


def run_from(run_id: str, values: Sequence[bytes | None]) -> WorkflowRun | None:
    """Return a run from its fields in Redis, or None if it has none.

    Args:
        run_id: which run.
        values: of `FIELDS`, in that order.

    Raises:
        StorageError: if somebody has damaged one.
    """
    if values[0] is None or values[_STATUS] is None:
        return None
    try:
        fields = [
            None if value is None else read(value)
            for read, value in zip(_READERS, values, strict=True)
        ]
    except (ValueError, UnicodeDecodeError) as exc:
        raise StorageError(
            f"The stored workflow run {run_id} cannot be read: {exc}. Restore it from a backup, "
            "or delete it."
        ) from exc
    run = WorkflowRun.from_db(None, _MODEL_FIELDS, [run_id, *fields])
    if values[_DURATION] is None and run.completed_at is not None:
        run.duration_seconds = (run.completed_at - run.started_at).total_seconds()
    return run


def written(fields: dict[str, Any], *, exactly: bool = False) -> list[Any]:
    """Return fields of a run as names and values for Redis; what is None is left out.

    Args:
        fields: valid fields, by name.
        exactly: also keep that a run that has ended has no duration_seconds.
    """
    values: list[Any] = []
    for name, value in fields.items():
        if name == "id" or value is None:
            continue
        if name in PAYLOADS:
            text: Any = payload_json(name, value)
        elif name in _TIMES:
            text = time_text(value)
        elif isinstance(value, float):
            text = repr(value)
        else:
            text = str(value)
        values += [name, text]
    if exactly and fields["completed_at"] is not None and fields["duration_seconds"] is None:
        values += ["duration_seconds", _NO_DURATION]
    return values


def _duration(value: bytes) -> float | None:
    return None if value == _NO_DURATION else float(value)


_MODEL_FIELDS = ("id", *FIELDS)
_STATUS = FIELDS.index("status")
_DURATION = FIELDS.index("duration_seconds")
_NUMBERS: dict[str, Callable[[bytes], Any]] = {
    "duration_seconds": _duration,
    "total_cost_usd": float,
    "total_tokens": int,
}
_READERS = [
    load_json
    if name in PAYLOADS
    else parsed_time
    if name in _TIMES
    else _NUMBERS.get(name, bytes.decode)
    for name in FIELDS
]

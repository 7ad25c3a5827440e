"""The fields of a run and its attempts as a hash in Redis holds them, and back."""

from __future__ import annotations

import json
from contextlib import suppress
from datetime import datetime
from typing import TYPE_CHECKING, Any

from workflow_storage.attempts import FoundRun, refusal
from workflow_storage.backends.redis.repository import parsed_time, time_text
from workflow_storage.base import Attempt
from workflow_storage.exceptions import StorageError
from workflow_storage.models import WorkflowRun
from workflow_storage.serialization import load_json, payload_json
from workflow_storage.validation import PAYLOADS, RUN_FIELDS, plain_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from workflow_storage.attempts import StatusChange
    from workflow_storage.backends.redis.cluster import Command
    from workflow_storage.backends.redis.connection import RedisStore
    from workflow_storage.status import RunStatus

FIELDS = RUN_FIELDS[1:]
"""The fields in the hash of a run; the id is in its key."""

STARTED_AT = FIELDS.index("started_at")
"""Its place among them."""

# So redis-py need not encode them for each run that is read.
_ENCODED_FIELDS = tuple(name.encode() for name in FIELDS)

_JSON = PAYLOADS | {"labels"}


def read_runs(store: RedisStore, run_ids: Iterable[str], *extra: str) -> list[Command]:
    """Return the commands that read runs, and further fields of theirs; see `run_from`."""
    return read_fields(store, run_ids, *_ENCODED_FIELDS, *extra)


def read_fields(store: RedisStore, run_ids: Iterable[str], *fields: str | bytes) -> list[Command]:
    """Return the commands that read some fields of runs, as they are stored."""
    return [
        ("HMGET", f"{store.key_prefix(run_id)}:run:{run_id}", *fields)
        for run_id in map(plain_text, run_ids)
    ]


def read_signs(store: RedisStore, run_ids: Iterable[str]) -> list[Command]:
    """Return the commands that read whether runs are running, and their signs of life.

    Each gives the status, when the run and its attempt started, its heartbeat and newest state.
    """
    signs = ("status", "started_at", "attempt_started_at", "heartbeat_at", "state_at")
    return read_fields(store, run_ids, *signs)


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
        raise _unreadable(run_id, exc) from exc
    if fields[_LABELS] is None:
        fields[_LABELS] = {}
    return WorkflowRun.from_db(None, _MODEL_FIELDS, [run_id, *fields])


def known_fields_from(run_id: str, values: Sequence[bytes | None]) -> dict[str, Any]:
    """Return those fields of a run that can be read, from its fields in Redis; see `run_from`."""
    fields: dict[str, Any] = {"id": run_id}
    for name, value in zip(FIELDS, values, strict=True):
        with suppress(ValueError):
            fields[name] = None if value is None else _READER[name](value)
    return fields


def found_run(run_id: str, values: Sequence[bytes | None] | None) -> FoundRun | None:
    """Return what a script says that a run is, or None if there is none."""
    if values is None:
        return None
    try:
        fields = {
            name: None if value is None else _READER[name](value)
            for name, value in zip(FoundRun._fields, values, strict=True)
        }
    except (ValueError, UnicodeDecodeError) as exc:
        raise _unreadable(run_id, exc) from exc
    return FoundRun.of(fields)


def refuse(
    run_id: str,
    values: Sequence[bytes | None] | None,
    *,
    expected: Iterable[RunStatus] | None = None,
    attempt: int | None = None,
    change: StatusChange | None = None,
) -> None:
    """Raise why a script did not write to a run; see `workflow_storage.attempts.refusal`.

    Args:
        run_id: which run.
        values: what the script says that the run is; None if there is none.
        expected: the statuses that the write was conditional on.
        attempt: the attempt that it was conditional on.
        change: the change of status, if it was one.
    """
    found = found_run(run_id, values)
    error = refusal(run_id, found, expected=expected, attempt=attempt, change=change)
    if error is not None:
        raise error


def written(fields: Mapping[str, Any]) -> list[Any]:
    """Return fields of a run as names and values for Redis; what is cleared is left out.

    Args:
        fields: valid fields, by name.
    """
    values: list[Any] = []
    for name, value in fields.items():
        if name == "id" or _is_cleared(name, value):
            continue
        if name in _JSON:
            text: Any = payload_json(name, value)
        elif isinstance(value, datetime):
            text = time_text(value)
        elif isinstance(value, float):
            text = repr(value)
        else:
            text = str(value)
        values += [name, text]
    return values


def changed(fields: Mapping[str, Any]) -> list[Any]:
    """Return fields of a run as `change` in the scripts takes them."""
    values = written(fields)
    return [len(values), *values, *(name for name in fields if _is_cleared(name, fields[name]))]


def _is_cleared(name: str, value: Any) -> bool:
    """Whether a field with this value is not in the hash."""
    return value is None or (name == "labels" and not value)


def written_attempts(attempts: Sequence[Attempt]) -> list[Any]:
    """Return attempts that are over as names and values for Redis."""
    if not attempts:
        return []
    values: list[Any] = ["attempts", " ".join(str(attempt.number) for attempt in attempts)]
    for attempt in attempts:
        fields = attempt._asdict()
        number = fields.pop("number")
        known = {
            name: time_text(value) if isinstance(value, datetime) else value
            for name, value in fields.items()
            if value is not None
        }
        values += [f"attempt:{number}", json.dumps(known)]
    return values


def attempts_from(run_id: str, values: Sequence[bytes]) -> list[Attempt]:
    """Return attempts that are over from their numbers and texts in Redis.

    Raises:
        StorageError: if somebody has damaged one.
    """
    attempts = []
    for number, text in zip(values[::2], values[1::2], strict=True):
        try:
            fields = json.loads(text)
            for name in _TIMES_OF_ATTEMPT & fields.keys():
                fields[name] = parsed_time(fields[name].encode())
            attempts.append(Attempt(int(number), **{**_UNKNOWN, **fields}))
        except (AttributeError, TypeError, ValueError) as exc:
            raise _unreadable(run_id, exc) from exc
    return attempts


def _unreadable(run_id: str, exc: Exception) -> StorageError:
    return StorageError(
        f"The stored workflow run {run_id} cannot be read: {exc}. Restore it from a backup, "
        "or delete it."
    )


_MODEL_FIELDS = ("id", *FIELDS)
_STATUS = FIELDS.index("status")
_LABELS = FIELDS.index("labels")
_READER: dict[str, Callable[[bytes], Any]] = {
    **dict.fromkeys(FIELDS, bytes.decode),
    **dict.fromkeys(_JSON, load_json),
    **dict.fromkeys(
        ("started_at", "completed_at", "heartbeat_at", "attempt_started_at"), parsed_time
    ),
    **dict.fromkeys(("duration_seconds", "total_cost_usd"), float),
    **dict.fromkeys(("total_tokens", "attempt", "forked_from_step"), int),
}
_READERS = [_READER[name] for name in FIELDS]
_TIMES_OF_ATTEMPT = frozenset({"started_at", "ended_at"})
_UNKNOWN = dict.fromkeys(Attempt._fields[1:])

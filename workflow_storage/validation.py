"""The rules for a run's fields and a state, the same on every backend, for backends/.

Each function returns the value to store, or raises the error of the contract; none
of them touches a store.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from datetime import datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any, NamedTuple

from django.conf import settings
from django.utils import timezone

from workflow_storage.deltas import Chain, EncodedCheckpoint, base_step, is_delta
from workflow_storage.exceptions import (
    InvalidFieldError,
    InvalidStatusError,
    StorageError,
)
from workflow_storage.serialization import is_state_text, payload_json, state_text
from workflow_storage.status import TERMINAL_STATUSES, RunStatus

if TYPE_CHECKING:
    from workflow_storage.base import Checkpoint
    from workflow_storage.models import WorkflowRun

MAX_RUN_ID = 36
MAX_WORKFLOW_NAME = 256
MAX_NODE_ID = 128
MAX_WORKER = 128
MAX_WAITING_FOR = 256
MAX_LABELS = 32
MAX_LABEL_NAME = 64
MAX_LABEL_VALUE = 256
MAX_ERROR_MESSAGE = 20_000
"""Characters of an error_message; what is longer is cut in its middle."""
MAX_COUNT = 2**31 - 1
_YEARS = (1000, 9998)  # what every database holds, in every time zone
_BIGINT = range(-(2**63), 2**63)

PAYLOADS = frozenset({"config_snapshot", "inputs", "outputs"})
UPDATABLE = PAYLOADS | {"error_message", "total_tokens", "total_cost_usd", "labels"}
RESULT_TIMES = frozenset({"completed_at", "duration_seconds"})
TOTALS = frozenset({"total_tokens", "total_cost_usd"})

_LABEL_CHANGES = ("add_labels", "remove_labels")

# What a change of status changes with it, by the kind of status.
_WITH_RUNNING = frozenset({"attempt_started_at", "worker", "current_node"})
_WITH_PENDING = frozenset({"waiting_for"})
_WITH_TERMINAL = RESULT_TIMES | {"current_node"}


def is_possible_name(field: str, value: object, max_length: int) -> bool:
    """Whether a name or id can be stored at all; one that cannot is never found.

    Raises:
        TypeError: if it is no text.
    """
    if not isinstance(value, str):
        raise TypeError(f"{field} is a {type(value).__name__}. Pass a str, such as str(value).")
    return 0 < len(value) <= max_length and "\0" not in value and not _has_lone_surrogate(value)


def is_possible_id(run_id: object) -> bool:
    """Whether a run can have this id; see `is_possible_name`."""
    return is_possible_name("run_id", run_id, MAX_RUN_ID)


def valid_name(field: str, value: object, max_length: int) -> str:
    """Check a run id, workflow name or node id.

    Raises:
        InvalidFieldError: if it is empty, too long, no text, or holds a NUL character or
            a lone surrogate.
    """
    if not isinstance(value, str):
        raise InvalidFieldError(
            f"{field} is a {type(value).__name__}, not text. Pass a str, such as str(value)."
        )
    if not value:
        raise InvalidFieldError(f"{field} is empty. Give it 1 to {max_length} characters.")
    if len(value) > max_length:
        raise InvalidFieldError(
            f"{field} has {len(value)} characters, more than the {max_length} that fit: "
            f"{value[:40]!r}… Shorten it."
        )
    if not is_possible_name(field, value, max_length):
        raise InvalidFieldError(
            f"{field} holds a NUL character or a lone surrogate: {value!r}. Remove it."
        )
    return plain_text(value)


def cut(text: str, limit: int) -> str:
    """Return text of at most so many characters: its beginning and its end, if it is longer."""
    if len(text) <= limit:
        return text
    gap = "\n[…]\n"
    half = (limit - len(gap)) // 2
    return f"{text[:half]}{gap}{text[-half:]}"


def plain_text(text: str) -> str:
    """Return text as it is, where a member of an enumeration is formatted as its name."""
    return str.__str__(text)


def valid_status(status: Any) -> RunStatus:
    """Check a status, given as a `RunStatus` or its text."""
    try:
        valid: RunStatus = RunStatus(status)
        return valid
    except ValueError as exc:
        raise InvalidStatusError(status, tuple(RunStatus.values)) from exc


def valid_statuses(statuses: str | Iterable[str]) -> frozenset[RunStatus]:
    """Check one status or several."""
    if isinstance(statuses, str) or not isinstance(statuses, Iterable):
        return frozenset({valid_status(statuses)})
    return frozenset(valid_status(status) for status in statuses)


def valid_expected(expected: str | Iterable[str]) -> frozenset[RunStatus]:
    """Check the statuses of a compare-and-set."""
    statuses = valid_statuses(expected)
    if not statuses:
        raise ValueError("expected is empty. Name a status, or leave it out.")
    return statuses


def valid_terminal_statuses(statuses: str | Iterable[str]) -> frozenset[RunStatus]:
    """Check statuses that all mean that a run has ended."""
    checked = valid_statuses(statuses)
    for status in sorted(checked - TERMINAL_STATUSES):
        raise InvalidStatusError(status.value, tuple(sorted(TERMINAL_STATUSES)))
    return checked


def valid_moment(field: str, value: object) -> datetime:
    """Check that a time has a time zone if the project uses them (USE_TZ)."""
    if not isinstance(value, datetime):
        raise InvalidFieldError(f"{field} is a {type(value).__name__}, not a datetime.")
    if timezone.is_aware(value) != settings.USE_TZ:
        kind, wanted = ("naive", "an aware") if settings.USE_TZ else ("aware", "a naive")
        raise InvalidFieldError(
            f"{field} is a {kind} datetime ({value}), but USE_TZ is {settings.USE_TZ}. "
            f"Pass {wanted} one, such as django.utils.timezone.now()."
        )
    if not _YEARS[0] <= value.year <= _YEARS[1]:
        raise InvalidFieldError(
            f"{field} is in the year {value.year}. Pass a time from {_YEARS[0]} to {_YEARS[1]}."
        )
    return value


def valid_count(name: str, value: object, minimum: int = 0) -> int:
    """Check a limit, a batch size or a number of states to keep."""
    if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= MAX_COUNT:
        raise ValueError(f"{name} is {value!r}. Pass a whole number from {minimum} to {MAX_COUNT}.")
    return int(value)


def valid_step(step: object) -> int:
    """Check that a step is a whole number, not that there is one."""
    if not isinstance(step, int):
        raise TypeError(f"step is a {type(step).__name__}. Pass a whole number.")
    return int(step)


def valid_attempt(attempt: object) -> int | None:
    """Check the attempt that a write is conditional on; None for any."""
    return None if attempt is None else valid_count("attempt", attempt)


def valid_labels(field: str, value: object) -> dict[str, str]:
    """Check labels: names and texts.

    Raises:
        InvalidFieldError: unless they are a dict of at most 32 names (1 to 64 characters without
            ``=``) and texts (1 to 256 characters), without NUL.
    """
    if not isinstance(value, dict):
        raise InvalidFieldError(
            f"{field} is a {type(value).__name__}. Pass a dict of names and texts, or {{}}."
        )
    if len(value) > MAX_LABELS:
        raise InvalidFieldError(
            f"{field} has {len(value)} names, more than {MAX_LABELS}. Leave some out."
        )
    labels = {}
    for name, text in value.items():
        name = valid_name(f"a name in {field}", name, MAX_LABEL_NAME)  # noqa: PLW2901
        if "=" in name:
            raise InvalidFieldError(f"The name {name!r} in {field} holds a =. Take another name.")
        labels[name] = valid_name(f"{field}[{name!r}]", text, MAX_LABEL_VALUE)
    return labels


class LabelChange(NamedTuple):
    """Labels that are added to those of a run, and names of labels that are removed."""

    added: dict[str, str]
    removed: frozenset[str]

    def applied(self, labels: Mapping[str, str]) -> dict[str, str]:
        """Return what the labels of a run are after it.

        Raises:
            InvalidFieldError: if there are too many.
        """
        kept = {name: text for name, text in labels.items() if name not in self.removed}
        return valid_labels("labels", {**kept, **self.added})


def label_change(fields: dict[str, Any]) -> LabelChange | None:
    """Take the change of labels out of the fields of an update; None if there is none.

    Raises:
        InvalidFieldError: for what cannot be labels.
    """
    if not fields.keys() & set(_LABEL_CHANGES):
        return None
    added, removed = (fields.pop(name, None) for name in _LABEL_CHANGES)
    if "labels" in fields:
        raise InvalidFieldError(
            "labels replaces all labels; add_labels and remove_labels change some of them. "
            "Pass the one or the others."
        )
    names = [removed] if isinstance(removed, str) else removed or ()
    if not isinstance(names, Iterable):
        raise InvalidFieldError(
            f"remove_labels is a {type(removed).__name__}. Pass a list of names."
        )
    checked = {valid_name("a name in remove_labels", name, MAX_LABEL_NAME) for name in names}
    return LabelChange(
        valid_labels("add_labels", {} if added is None else added), frozenset(checked)
    )


def valid_usage(usage: Mapping[str, Any]) -> dict[str, Any]:
    """Check what a checkpoint says of its node, and fill in None for what it does not say.

    Raises:
        TypeError: for what there is not in `workflow_storage.base.NodeUsage`.
        InvalidFieldError: for a value that cannot be stored.
    """
    if not usage:
        return dict.fromkeys(_USAGE)
    unknown = usage.keys() - _USAGE.keys()
    if unknown:
        raise TypeError(
            f"{', '.join(sorted(unknown))}: a checkpoint has no such field. "
            f"Use one of: {', '.join(_USAGE)}."
        )
    return {name: valid(name, usage.get(name)) for name, valid in _USAGE.items()}


def valid_totals(totals: Mapping[str, Any] | None) -> dict[str, Any]:
    """Check the totals that are stored with a checkpoint.

    Raises:
        TypeError: for what is none of the totals.
        InvalidFieldError: for a value that cannot be stored.
    """
    if not totals:
        return {}
    if totals.keys() - TOTALS:
        raise TypeError(f"totals has other names than {', '.join(sorted(TOTALS))}. Leave them out.")
    return valid_fields(totals)


def valid_updates(fields: Mapping[str, Any], status: RunStatus | None = None) -> dict[str, Any]:
    """Check the fields of an update, and of a change of status if one is given.

    Returns:
        The fields as they are stored; payloads are left as they are, to be checked by
        `payload_json` when they are written.

    Raises:
        InvalidFieldError: for an unknown or fixed field, or a value that cannot be stored.
    """
    allowed = UPDATABLE if status is None else UPDATABLE | _changed_with(status)
    if status is not None and not status.is_terminal:
        for name in RESULT_TIMES & fields.keys():
            raise InvalidFieldError(
                f"{name} belongs to a run that has ended, not to a {status.value} one. Leave it out."
            )
    for name in fields:
        if name not in allowed:
            raise InvalidFieldError(
                f"{name} is not a field that can be changed here. "
                f"Change one of: {', '.join(sorted(allowed))}."
            )
    return valid_fields(fields)


def _changed_with(status: RunStatus) -> frozenset[str]:
    if status.is_terminal:
        return _WITH_TERMINAL
    return _WITH_RUNNING if status is RunStatus.RUNNING else _WITH_PENDING


def valid_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Check the values of some fields of a run and give them as they are stored."""
    return {name: _FIELDS[name](name, value) for name, value in fields.items()}


def valid_new_run(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Check all fields of a new run, and give one that has ended the times that it lacks.

    Raises:
        InvalidFieldError: if a field cannot be stored.
    """
    valid = valid_fields(fields)
    if valid["status"] == RunStatus.RUNNING:
        valid["attempt"] = max(valid["attempt"], 1)
        if valid["attempt_started_at"] is None:
            valid["attempt_started_at"] = valid["started_at"]
    if valid["status"] in TERMINAL_STATUSES:
        if valid["completed_at"] is None:
            valid["completed_at"] = timezone.now()
        if valid["duration_seconds"] is None:
            duration = valid["completed_at"] - valid["started_at"]
            valid["duration_seconds"] = max(0.0, duration.total_seconds())
        valid["completed_at"] = max(valid["completed_at"], valid["started_at"])
    elif valid["completed_at"] is not None or valid["duration_seconds"] is not None:
        raise InvalidFieldError(
            f"completed_at and duration_seconds belong to a run that has ended, not to a "
            f"{valid['status']} one. Leave them out."
        )
    return valid


def valid_attempt_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Check the fields of an `workflow_storage.base.Attempt` and return them as they are stored."""
    return {name: _ATTEMPT_FIELDS[name](name, value) for name, value in fields.items()}


def run_fields(run: object) -> dict[str, Any]:
    """Return the fields of a run by name, unchecked.

    Raises:
        TypeError: unless it is a `WorkflowRun`.
    """
    from workflow_storage.models import WorkflowRun

    if not isinstance(run, WorkflowRun):
        raise TypeError(f"run is a {type(run).__name__}. Pass a WorkflowRun.")
    return {name: getattr(run, name) for name in RUN_FIELDS}


def invalid_fields(run: WorkflowRun) -> list[tuple[str, Any]]:
    """Return the fields of a run, with their values, that no run can have that was stored here."""
    found = []
    for name, check in _FIELDS.items():
        value = getattr(run, name)
        if value is not None or name in _NEVER_NONE:
            try:
                check(name, value)
            except StorageError:
                found.append((name, value))
    return found


def equal_runs(one: object, other: object) -> bool:
    """Whether all fields of two runs are equal, payloads as JSON: ``1`` is not ``1.0``."""
    ours, theirs = run_fields(one), run_fields(other)
    return all(
        payload_json(name, value) == payload_json(name, theirs[name])
        if name in PAYLOADS
        else _as_compared(name, value) == _as_compared(name, theirs[name])
        for name, value in ours.items()
    )


def _as_compared(name: str, value: Any) -> Any:
    # Whoever has stored a longer one past the repositories has it cut where it is copied to.
    return _error_text(name, value) if name == "error_message" else value


def equal_checkpoints(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether two checkpoints are equal, their states as JSON; see `equal_runs`."""
    return (
        one["step"] == other["step"]
        and one["node_id"] == other["node_id"]
        and one["created_at"] == other["created_at"]
        and valid_usage(_usage_of(one)) == valid_usage(_usage_of(other))
        and one.get("attempt") == other.get("attempt")
        and state_text(one["state_data"]) == state_text(other["state_data"])
    )


def _usage_of(checkpoint: Checkpoint) -> dict[str, Any]:
    return {name: checkpoint.get(name) for name in _USAGE}


class ValidCheckpoint(NamedTuple):
    """A checkpoint that has been checked, to be stored exactly as it is."""

    step: int
    node_id: str
    created_at: datetime
    text: bytes
    """The state as JSON text in UTF-8."""
    attempt: int | None
    usage: dict[str, Any]
    """See `workflow_storage.base.NodeUsage`."""
    stored: bytes | None = None
    """The state as it was stored elsewhere, to be stored so here; None to encode it."""
    base: bytes | None = None
    """The JSON text that this is based on, if it is a delta."""

    def can_stay(self, chain: Chain[Any]) -> bool:
        """Whether it can be stored as it was elsewhere, after what a writer has in its chain."""
        if self.stored is None:
            return False
        return not is_delta(self.stored) or chain.holds(base_step(self.step), self.base)


def valid_checkpoint(checkpoint: Checkpoint) -> ValidCheckpoint:
    """Check a checkpoint that is stored exactly as it is.

    Raises:
        ValueError, InvalidFieldError: if a part of it cannot be stored.
    """
    return ValidCheckpoint(
        valid_count("step", checkpoint["step"]),
        valid_name("node_id", checkpoint["node_id"], MAX_NODE_ID),
        valid_moment("created_at", checkpoint["created_at"]),
        state_text(checkpoint["state_data"]),
        valid_attempt(checkpoint.get("attempt")),
        valid_usage(_usage_of(checkpoint)),
    )


def valid_encoded(encoded: EncodedCheckpoint) -> ValidCheckpoint:
    """Check a checkpoint that is stored as it was elsewhere, but for its state itself.

    Raises:
        ValueError, InvalidFieldError: if a part of it cannot be stored.
    """
    if not is_delta(encoded.stored):  # which has a checksum, and is no text
        refuse_no_state(encoded.text, encoded.step)
    return ValidCheckpoint(
        valid_count("step", encoded.step),
        valid_name("node_id", encoded.node_id, MAX_NODE_ID),
        valid_moment("created_at", encoded.created_at),
        encoded.text,
        valid_attempt(encoded.attempt),
        valid_usage({name: getattr(encoded, name) for name in _USAGE}),
        encoded.stored,
        encoded.base,
    )


def refuse_no_state(text: bytes, step: int) -> None:
    """Refuse what cannot be the text of a state, to be stored as it is.

    Raises:
        InvalidFieldError: in that case.
    """
    if not is_state_text(text):
        raise InvalidFieldError(f"The state of step {step} is no JSON object in UTF-8.")


def in_project_time(value: datetime) -> datetime:
    """Return a time with a time zone if the project uses them (USE_TZ), and without otherwise."""
    if settings.USE_TZ and timezone.is_naive(value):
        return timezone.make_aware(value)
    if not settings.USE_TZ and timezone.is_aware(value):
        return timezone.make_naive(value)
    return value


def _payload(_field: str, value: object) -> object:
    return value


def _error_text(field: str, value: object) -> str | None:
    """Errors quote the outside world: what cannot be stored is replaced, what is too long is cut."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise InvalidFieldError(f"{field} is a {type(value).__name__}, not text. Pass str(value).")
    text = value.replace("\0", "\N{REPLACEMENT CHARACTER}")
    if _has_lone_surrogate(text):
        # A surrogate pair that Python holds as two halves is one character.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return cut(text, MAX_ERROR_MESSAGE)


def _whole_number(field: str, value: object) -> int | None:
    if value is None:
        return None
    # A range looks through its numbers one by one for what is not just an int.
    if not isinstance(value, int) or isinstance(value, bool) or int(value) not in _BIGINT:
        raise InvalidFieldError(f"{field} is {value!r}. Pass a whole number within 64 bits.")
    return int(value)


def _count(field: str, value: object, minimum: int = 0) -> int:
    try:
        return valid_count(field, value, minimum)
    except ValueError as exc:
        raise InvalidFieldError(str(exc)) from exc


def _finite_number(field: str, value: object) -> float | None:
    if value is None:
        return None
    if not isinstance(value, int | float | Decimal) or isinstance(value, bool):
        raise InvalidFieldError(f"{field} is a {type(value).__name__}, not a number.")
    try:
        number = float(value)
    except (OverflowError, ValueError):  # 10**400; a signalling NaN
        number = math.inf
    if not math.isfinite(number):
        raise InvalidFieldError(f"{field} is {value!r}. Pass a finite number.")
    return number


def _moment_or_none(field: str, value: object) -> datetime | None:
    return None if value is None else valid_moment(field, value)


def _name_or_none(max_length: int) -> Any:
    return lambda field, value: None if value is None else valid_name(field, value, max_length)


_FIELDS: dict[str, Any] = {
    "id": lambda field, value: valid_name(field, value, MAX_RUN_ID),
    "workflow_name": lambda field, value: valid_name(field, value, MAX_WORKFLOW_NAME),
    "status": lambda _, value: valid_status(value).value,
    "config_snapshot": _payload,
    "inputs": _payload,
    "outputs": _payload,
    "error_message": _error_text,
    "started_at": valid_moment,
    "completed_at": _moment_or_none,
    "duration_seconds": _finite_number,
    "total_tokens": _whole_number,
    "total_cost_usd": _finite_number,
    "heartbeat_at": _moment_or_none,
    "current_node": _name_or_none(MAX_NODE_ID),
    "waiting_for": _name_or_none(MAX_WAITING_FOR),
    "attempt": _count,
    "attempt_started_at": _moment_or_none,
    "worker": _name_or_none(MAX_WORKER),
    "parent_id": _name_or_none(MAX_RUN_ID),
    "forked_from_step": lambda field, value: None if value is None else _count(field, value),
    "labels": valid_labels,
}
RUN_FIELDS = tuple(_FIELDS)
_NEVER_NONE = frozenset({"id", "workflow_name", "status", "started_at", "attempt", "labels"})

_ATTEMPT_FIELDS: dict[str, Any] = {
    "number": lambda field, value: _count(field, value, minimum=1),
    "started_at": _moment_or_none,
    "ended_at": _moment_or_none,
    "status": _FIELDS["status"],
    "error_message": _error_text,
    "node": _FIELDS["current_node"],
    "worker": _FIELDS["worker"],
}
_USAGE: dict[str, Any] = {
    "duration_seconds": _finite_number,
    "tokens": _whole_number,
    "cost_usd": _finite_number,
}


def _has_lone_surrogate(text: str) -> bool:
    if text.isascii():
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False

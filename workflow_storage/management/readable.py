"""Runs as far as they can be read, with what is known of the others; for what one damaged row is not to end."""

from __future__ import annotations

from datetime import datetime
from math import isfinite
from types import NoneType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from django.core.management.base import CommandError
from django.db import models

from workflow_storage.base import UNREADABLE, Checkpoint, Damage, Step
from workflow_storage.exceptions import (
    DamagedStateError,
    RunNotFoundError,
    StorageError,
    StorageUnavailableError,
)
from workflow_storage.models import WorkflowRun
from workflow_storage.validation import PAYLOADS, RUN_FIELDS, valid_fields

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from workflow_storage.base import StorageBackend
    from workflow_storage.management.selection import Selection

NAMED = 5
"""Runs, and problems of a run, that an error names, at most."""

_AnyStep = TypeVar("_AnyStep", Step, Checkpoint)

_TYPES = (
    (models.DateTimeField, datetime),
    (models.FloatField, (int, float)),
    (models.IntegerField, int),
    (models.JSONField, dict),
    (models.Field, str),
)


class Known(NamedTuple):
    """A run, with what is known of it."""

    run: WorkflowRun
    """With None for each field that cannot be read."""
    problem: str | None = None
    """Why it cannot be read as a whole; None if it can."""


def known_runs(backend: StorageBackend, selection: Selection) -> Iterator[Known]:
    """Yield the runs of a selection, also those that cannot be read as a whole."""
    for page in selection.pages(backend):
        for run in page:
            yield known(backend, run)


def known(backend: StorageBackend, found: WorkflowRun | Damage) -> Known:
    """Return a run with what is known of it."""
    if isinstance(found, Damage):
        problem = found.problem.removeprefix("it cannot be read: ")
        return Known(_known_run(backend, str(found.run_id)), problem)
    misfit = _misfit(found)
    return Known(found if misfit is None else _known_run(backend, found.id), misfit)


def known_steps(steps: Iterable[_AnyStep], problems: list[str]) -> Iterator[_AnyStep]:
    """Yield steps with None for each value that they cannot have.

    Args:
        steps: with their states or without.
        problems: gets what is wrong.
    """
    try:
        for step in steps:
            wrong = wrong_values(step)
            if not wrong:
                yield step
                continue
            for problem in wrong.values():
                note(problems, problem)
            yield cast("_AnyStep", {**step, **dict.fromkeys(wrong)})
    except (StorageUnavailableError, RunNotFoundError, DamagedStateError):
        raise
    except UNREADABLE as exc:
        note(problems, f"its steps cannot be read: {exc}")


def wrong_values(step: Step | Checkpoint) -> dict[str, str]:
    """Return which values of a step no step can have, and what is wrong with each."""
    # Asked of ten million, which are all sound.
    get = step.get
    if (
        type(get("node_id")) is str
        and type(get("created_at")) is datetime
        and type(get("attempt")) in _WHOLE
        and type(get("tokens")) in _WHOLE
        and _is_number(get("duration_seconds"))
        and _is_number(get("cost_usd"))
    ):
        return {}
    return {
        name: f"{name} of its step {step['step']} cannot be right: {value!r:.100}"
        for name, is_right in _STEP_VALUES.items()
        if not is_right(value := get(name))
    }


def note(problems: list[str], problem: str) -> None:
    """Add a problem of a run to others, unless there are more already than an error names."""
    if len(problems) <= NAMED:
        problems.append(problem)


def unreadable_error(runs: Sequence[Known]) -> CommandError:
    """Return the error of a command that has shown what is known of some runs."""
    if len(runs) == 1:
        ((run, problem),) = runs
        what = f"Workflow run {run.id} is damaged: {problem}."
    else:
        named = ", ".join(run.id for run, _ in runs[:NAMED])
        more = ", …" if len(runs) > NAMED else ""
        number = f"More than {NAMED}" if more else str(len(runs))
        what = f"{number} workflow runs are damaged: {named}{more}."
    return CommandError(f"{what} Run check_runs to see all that is.")


def _known_run(backend: StorageBackend, run_id: str) -> WorkflowRun:
    fields: dict[str, Any] = dict.fromkeys(RUN_FIELDS)
    for name, value in backend.known_fields(run_id).items():
        try:
            valid_fields({name: value})
        except StorageError:
            continue
        fields[name] = value
    return WorkflowRun(**{**fields, "id": run_id})


def _misfit(run: WorkflowRun) -> str | None:
    """Return which field of a run that was read has a value of another type, which SQLite lets be."""
    for name, (kind, is_optional) in _FIELD_TYPES.items():
        value = getattr(run, name)
        if value is None and is_optional:
            continue
        if not _is_right(value, kind):
            return f"its {name} cannot be right: {value!r:.100}"
    return None


def _is_right(value: object, kind: Any) -> bool:
    return isinstance(value, kind) and (not isinstance(value, float) or isfinite(value))


def _type_of(field: object) -> Any:
    return next(kind for of_field, kind in _TYPES if isinstance(field, of_field))


_WHOLE = frozenset({int, NoneType})
_NUMBERS = frozenset({int, float})


def _is_number(value: object) -> bool:
    return value is None or (type(value) in _NUMBERS and isfinite(cast("float", value)))


def _is_whole(value: object) -> bool:
    return type(value) in _WHOLE


_STEP_VALUES: dict[str, Callable[[object], bool]] = {
    "node_id": lambda value: isinstance(value, str),
    "created_at": lambda value: isinstance(value, datetime),
    "attempt": _is_whole,
    "duration_seconds": _is_number,
    "tokens": _is_whole,
    "cost_usd": _is_number,
}

_FIELD_TYPES = {
    name: (_type_of(field), getattr(field, "null", False))
    for name, field in ((name, WorkflowRun._meta.get_field(name)) for name in RUN_FIELDS)
    if name not in PAYLOADS
}

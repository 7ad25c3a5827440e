"""One run as people read it: its fields, its attempts, its steps, and where it failed."""

from __future__ import annotations

import json
from argparse import ArgumentTypeError
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.text import Text

from workflow_storage.base import UNREADABLE, Attempt, Step
from workflow_storage.exceptions import RunNotFoundError, StorageUnavailableError
from workflow_storage.management.arguments import whole_number
from workflow_storage.management.output import Column, Record
from workflow_storage.management.readable import known_steps, note
from workflow_storage.management.run_columns import (
    elapsed_seconds,
    note_of,
    seconds_text,
    status_colour,
)
from workflow_storage.management.text import (
    as_count,
    as_seconds,
    as_text,
    as_usd,
    counted,
    first_line,
    one_line,
    printable,
)
from workflow_storage.status import RunStatus

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from workflow_storage.base import StorageBackend
    from workflow_storage.management.output import Output
    from workflow_storage.models import WorkflowRun

SHOWN_CHARACTERS = 2000
"""Characters of a field that people are shown."""

FIRST_STEPS = 10
LAST_STEPS = 20
"""Steps that are shown of a run that has more."""

_FIELDS = {
    "id": "id",
    "workflow_name": "workflow",
    "status": "status",
    "waiting_for": "waits for",
    "started_at": "started",
    "completed_at": "ended",
    "duration_seconds": "seconds",
    "total_tokens": "tokens",
    "total_cost_usd": "USD",
    "current_node": "node",
    "attempt": "attempt",
    "attempt_started_at": "since",
    "heartbeat_at": "heartbeat",
    "worker": "worker",
    "parent_id": "parent",
    "forked_from_step": "forked from",
}
_TEXTS: dict[str, Callable[[Any], str]] = {"total_tokens": as_count, "total_cost_usd": as_usd}
_PAYLOADS = {"config_snapshot": "configuration", "inputs": "inputs", "outputs": "outputs"}


class Steps(NamedTuple):
    """Which steps of a run."""

    first: int = 0
    last: int | None = None
    """None for all that follow."""


class Gap(NamedTuple):
    """Steps that are left out."""

    steps: int


def steps_range(value: object) -> Steps:
    """Read ``all``, ``7``, ``3..9``, ``3..`` or ``..9``, a step, or a pair of steps.

    Raises:
        ArgumentTypeError: if it is none of these.
    """
    if isinstance(value, tuple):
        return Steps(*value)
    text = str(value)
    if text == "all":
        return Steps()
    first, dots, last = text.partition("..")
    try:
        if not dots:
            return Steps(whole_number(text), whole_number(text))
        begin = whole_number(first) if first else 0
        end = whole_number(last) if last else None
    except ArgumentTypeError:
        begin, end = 1, 0
    if (end is not None and end < begin) or text == "..":
        raise ArgumentTypeError(f"{value!r} are no steps. Write all, 7, 3..9, 3.. or ..9.")
    return Steps(begin, end)


def write_fields(output: Output, run: WorkflowRun) -> None:
    """Write a line for each field that has a value, and payloads and errors under their names."""
    lines = {
        title: _TEXTS.get(name, as_text)(getattr(run, name)) for name, title in _FIELDS.items()
    }
    lines["seconds"] = seconds_text(run)
    lines["labels"] = one_line(", ".join(f"{name}={value}" for name, value in run.labels.items()))
    lines = {title: text for title, text in lines.items() if text}
    width = max(map(len, lines)) + 2
    for name, text in lines.items():
        style = status_colour(run) if name == "status" else ""
        output.line(Text.assemble((f"{name:<{width}}", "bold"), (text, style)))
    for name, title in _PAYLOADS.items():
        if getattr(run, name) is not None:
            _write_long(output, title, _json(getattr(run, name)))
    if run.error_message:
        _write_long(output, "error", run.error_message, style="red")


def _write_long(output: Output, title: str, text: str, style: str = "") -> None:
    cut = text[:SHOWN_CHARACTERS]
    output.line(Text(title, style="bold"))
    for line in printable(cut).splitlines():
        output.line(Text(f"  {line}", style=style))
    if len(text) > len(cut):
        output.line(f"  ({counted(len(text), 'character')} in all; --format json has them)")


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


ATTEMPT_COLUMNS = (
    Column("number", "Attempt", lambda one: str(one.number), kind="number"),
    Column("status", "Status", lambda one: str(one.status), kind="fixed", rank=1),
    Column("started_at", "Began", lambda one: as_text(one.started_at), kind="fixed", rank=2),
    Column("ended_at", "Ended", lambda one: as_text(one.ended_at), kind="fixed", rank=5),
    Column("node", "Node", lambda one: as_text(one.node), rank=4),
    Column("worker", "Worker", lambda one: as_text(one.worker), rank=6),
    Column("error", "Error", lambda one: first_line(one.error_message), rank=3, least=16),
)
ATTEMPT_RECORD = Record(Attempt._fields, lambda attempt: attempt._asdict())


def attempts_of(backend: StorageBackend, run: WorkflowRun, problems: list[str]) -> list[Attempt]:
    """Return the attempts of a run; none if they cannot be read, which is then a problem of it."""
    try:
        return backend.runs.list_attempts(run.id)
    except (StorageUnavailableError, RunNotFoundError):
        raise
    except UNREADABLE as exc:
        note(problems, f"its attempts cannot be read: {exc}")
        return []


def write_attempts(output: Output, attempts: list[Attempt]) -> None:
    """Write what became of each attempt, if there is more than one."""
    if len(attempts) > 1:
        output.line()
        output.rows(attempts, ATTEMPT_COLUMNS, ATTEMPT_RECORD)


def _of_step(name: str, text: Any) -> Any:
    return lambda step: "" if isinstance(step, Gap) else text(step[name])


def _number_or_gap(step: Step | Gap) -> str:
    return "" if isinstance(step, Gap) else str(step["step"])


def _node_or_gap(step: Step | Gap) -> str:
    if isinstance(step, Gap):
        return f"({counted(step.steps, 'more step')})"
    return as_text(step["node_id"])


STEP_COLUMNS = (
    Column("step", "Step", _number_or_gap, kind="number"),
    Column("node_id", "Node", _node_or_gap, folds=True, least=12),
    Column("attempt", "Attempt", _of_step("attempt", as_text), kind="number", rank=5),
    Column("created_at", "Saved", _of_step("created_at", as_text), kind="fixed", rank=2),
    Column("duration_seconds", "Seconds", _of_step("duration_seconds", as_seconds), "number", 1),
    Column("tokens", "Tokens", _of_step("tokens", as_count), kind="number", rank=4),
    Column("cost_usd", "USD", _of_step("cost_usd", as_usd), kind="number", rank=3),
)
STEP_RECORD = Record(tuple(Step.__annotations__), lambda step: step)


def write_steps(
    output: Output,
    backend: StorageBackend,
    run: WorkflowRun,
    attempts: list[Attempt],
    which: Steps | None,
) -> list[str]:
    """Write the steps of a run: some, or of many the first, the last, and where attempts failed.

    Returns:
        What is wrong with them.
    """
    problems: list[str] = []
    every = backend.states.iter_steps(run.id, after=(which or Steps()).first - 1)
    steps = known_steps(every, problems)
    shown = _some_steps(steps, attempts) if which is None else list(_steps_until(which.last, steps))
    output.line()
    output.rows(shown, STEP_COLUMNS, STEP_RECORD, nothing="No steps.")
    return problems


def _steps_until(last: int | None, steps: Iterable[Step]) -> Iterator[Step]:
    for step in steps:
        if last is not None and step["step"] > last:
            return
        yield step


def _some_steps(steps: Iterable[Step], attempts: Iterable[Attempt]) -> list[Step | Gap]:
    failed = {one.number for one in attempts if one.status == RunStatus.FAILED}
    first: list[Step] = []
    last: deque[Step] = deque(maxlen=LAST_STEPS)
    where_failed: dict[int, Step] = {}
    for step in steps:
        if len(first) < FIRST_STEPS:
            first.append(step)
        else:
            last.append(step)
        if step["attempt"] in failed:
            where_failed[step["attempt"]] = step
    by_number = {step["step"]: step for step in (*first, *where_failed.values(), *last)}
    shown: list[Step | Gap] = []
    before: int | None = None
    for number in sorted(by_number):
        if before is not None and number > before + 1:
            shown.append(Gap(number - before - 1))
        shown.append(by_number[number])
        before = number
    return shown


def write_end(output: Output, run: WorkflowRun) -> None:
    """Write where a run is, or where and why it ended, below its steps."""
    text = end_of(run)
    if text:
        output.line(Text(text, style=status_colour(run)))


def end_of(run: WorkflowRun) -> str:
    """Return where a run is, or where and why it ended."""
    node = f" in {as_text(run.current_node)}" if run.current_node else ""
    note = one_line(note_of(run))
    if run.status == RunStatus.RUNNING:
        return f"running{node}, {elapsed_seconds(run) or 0:.0f} s so far"
    if run.status == RunStatus.COMPLETED:
        return ""
    if run.status == RunStatus.PENDING:
        return f"pending{node}: {note}" if note else ""
    return f"{run.status}{node}" + (f": {note}" if note else "")

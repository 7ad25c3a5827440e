"""What changed between two states, or two runs, as people and programs read it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from rich.text import Text

from workflow_storage.diff import diff, path_text, text_lines
from workflow_storage.exceptions import StepNotFoundError
from workflow_storage.management.output import Record
from workflow_storage.management.text import counted, one_line

if TYPE_CHECKING:
    from workflow_storage.base import Checkpoint, StorageBackend
    from workflow_storage.diff import Change
    from workflow_storage.management.output import Output
    from workflow_storage.models import WorkflowRun

SHOWN_CHANGES = 200
"""Changes that people are shown."""

SHOWN_CHARACTERS = 300
"""Characters of a value that people are shown."""

ALL_CHANGES = 1_000_000
"""Changes that programs get at most."""

RECORD = Record(
    ("path", "kind", "before", "after"),
    lambda change: {**change._asdict(), "path": path_text(change.path)},
)
_SIGNS = {"added": ("+", "green"), "removed": ("-", "red"), "changed": ("~", "yellow")}

_COMPARED = ("workflow_name", "status", "labels", "config_snapshot", "inputs", "outputs")


def write_changes(output: Output, before: Any, after: Any) -> int:
    """Write what changed between two JSON values, and return how many changes there were."""
    found = diff(before, after, limit=SHOWN_CHANGES if output.is_table else ALL_CHANGES)
    if not output.is_table:
        return output.rows(found.changes, (), RECORD)
    for change in found.changes:
        _write_change(output, change)
    if not found.is_complete:
        output.line(f"(the first {SHOWN_CHANGES} changes; --format json has all)")
    if not found.changes:
        output.line("No changes.")
    return len(found.changes)


def _write_change(output: Output, change: Change) -> None:
    sign, colour = _SIGNS[change.kind]
    path = one_line(path_text(change.path)) or "(all of it)"
    if _has_lines(change):
        output.line(Text(f"{sign} {path}", style=colour))
        for line in text_lines(change.before, change.after):
            _write_line(output, line.kind, line.text)
        return
    if change.kind == "changed":
        text = f"{_shown(change.before)} -> {_shown(change.after)}"
    else:
        text = _shown(change.before if change.kind == "removed" else change.after)
    output.line(Text(f"{sign} {path}: {text}", style=colour))


def _write_line(output: Output, kind: str, text: str) -> None:
    if kind == "gap":
        output.line(f"    ({counted(int(text), 'line')})")
        return
    sign, colour = _SIGNS.get(kind, (" ", ""))
    output.line(Text(f"  {sign} {_cut(one_line(text))}", style=colour))


def _has_lines(change: Change) -> bool:
    texts = [value for value in (change.before, change.after) if isinstance(value, str)]
    return len(texts) == 2 and any("\n" in text for text in texts)


def _shown(value: Any) -> str:
    return _cut(one_line(json.dumps(value, ensure_ascii=False)))


def _cut(text: str) -> str:
    if len(text) <= SHOWN_CHARACTERS:
        return text
    return f"{text[:SHOWN_CHARACTERS]} ({counted(len(text), 'character')})"


def compared(backend: StorageBackend, run: WorkflowRun) -> dict[str, Any]:
    """Return what is compared of two runs: what they were for and what became of them.

    Without what always differs: ids, times, who worked on it.
    """
    fields = {name: getattr(run, name) for name in _COMPARED}
    return {
        **fields,
        "error_message": run.error_message,
        "total_tokens": run.total_tokens,
        "total_cost_usd": run.total_cost_usd,
        # As lines, which are aligned and shortened where they are the same.
        "nodes": "\n".join(step["node_id"] for step in backend.states.iter_steps(run.id)),
        "state": backend.states.get_latest_state(run.id),
    }


def checkpoint_at(backend: StorageBackend, run: WorkflowRun, step: int | None) -> Checkpoint | None:
    """Return the checkpoint with a step, or the newest one; None if there is none at all.

    Raises:
        StepNotFoundError: if there is none with that step.
    """
    if step is None:
        return backend.states.get_latest_checkpoint(run.id)
    checkpoint = backend.states.get_state(run.id, step)
    if checkpoint is None:
        raise StepNotFoundError(run.id, step)
    return checkpoint


def state_before(backend: StorageBackend, run: WorkflowRun, step: int) -> Checkpoint | None:
    """Return the checkpoint before a step; None for the first that is there."""
    return backend.states.get_state(run.id, step - 1) if step else None

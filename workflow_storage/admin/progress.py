"""How far an action on runs has come; it travels with the page that asks to go on."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

from django.contrib import messages
from django.core import signing
from django.utils.formats import number_format
from django.utils.translation import ngettext_lazy

from workflow_storage.admin.chosen import Position
from workflow_storage.admin.run_actions import Outcome

if TYPE_CHECKING:
    from collections.abc import Iterator

    from django.http import HttpRequest

    from workflow_storage.admin.chosen import ChosenRuns
    from workflow_storage.admin.run_actions import RunAction
    from workflow_storage.models import WorkflowRun

BATCH = 100
"""Runs that are read at a time."""


@dataclass
class Progress:
    """How far an action has come; it travels with the page, signed."""

    asked_at: datetime
    """When the user was asked."""
    started_at: datetime
    run_id: str
    """The last run that it came to, and before any, the newest one when the user was asked."""
    has_begun: bool = False
    counts: dict[str, int] = field(default_factory=dict)
    """How many runs by their `Outcome`."""
    reason: str = ""
    """The first error."""

    @classmethod
    def posted(cls, request: HttpRequest, action: type[RunAction]) -> Progress | None:
        """Return that of a page for an action that was confirmed; None if none was."""
        if request.POST.get("confirmed") != "yes":
            return None
        try:
            values = signing.loads(request.POST.get("progress", ""), salt=_salt(action))
        except signing.BadSignature:
            return None  # which asks again
        for name in ("asked_at", "started_at"):
            values[name] = datetime.fromisoformat(values[name])
        return cls(**values)

    def signed(self, action: type[RunAction]) -> str:
        """Return it as `posted` reads it."""
        values = asdict(self)
        for name in ("asked_at", "started_at"):
            values[name] = values[name].isoformat()
        return signing.dumps(values, salt=_salt(action))

    @property
    def position(self) -> Position:
        """Where the runs begin that are left, of those in the order newest first."""
        return Position(self.started_at, self.run_id, includes_run=not self.has_begun)

    def each_of(self, runs: ChosenRuns) -> Iterator[WorkflowRun]:
        """Yield the runs that are left; each has to be passed by before the next one is taken."""
        while batch := runs.left(self.position, BATCH):
            yield from batch

    def count(self, outcome: Outcome, runs: int = 1) -> None:
        """Count what became of runs."""
        if runs:
            self.counts[outcome] = self.counts.get(outcome, 0) + runs

    def pass_by(self, run: WorkflowRun) -> None:
        """Note that a run is done with."""
        self.started_at, self.run_id, self.has_begun = run.started_at, run.id, True

    def level(self) -> int:
        """Return how important it is what became of the runs."""
        done, failed = (one in self.counts for one in (Outcome.DONE, Outcome.FAILED))
        if done != failed:
            return messages.SUCCESS if done else messages.ERROR
        return messages.WARNING

    def sentences(self, action: RunAction) -> list[str]:
        """Return what became of the runs."""
        done = self.counts.get(Outcome.DONE, 0)
        said = [_said(action.done, done)]
        for outcome, text in {
            Outcome.SKIPPED: action.skipped,
            Outcome.UNCHANGED: action.unchanged,
            **_MEANWHILE,
        }.items():
            if outcome in self.counts:
                said.append(_said(text, self.counts[outcome]))
        if self.reason:
            said.append(self.reason)
        return said


_MEANWHILE = {
    Outcome.WENT_ON: ngettext_lazy(
        "%(shown)s went on meanwhile, and was left as it is.",
        "%(shown)s went on meanwhile, and were left as they are.",
        "count",
    ),
    Outcome.GONE: ngettext_lazy(
        "%(shown)s had been deleted meanwhile.", "%(shown)s had been deleted meanwhile.", "count"
    ),
    Outcome.FAILED: ngettext_lazy("%(shown)s failed:", "%(shown)s failed, the first one:", "count"),
}


def _said(text: Any, count: int) -> str:
    said: str = text % {"count": count, "shown": number_format(count, force_grouping=True)}
    return said


def _salt(action: type[RunAction]) -> str:
    """Let a page confirm the action only that it was made for."""
    return f"workflow_storage.admin.actions.{action.name_of_action}"

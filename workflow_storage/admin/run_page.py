"""What the page of a run shows above its payloads: how it went, where it failed, what it took."""

from __future__ import annotations

from collections import deque
from functools import cached_property
from hashlib import blake2s
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Unpack

from django.utils.translation import gettext as _

from workflow_storage.admin import selection
from workflow_storage.admin.diffs import diff_block
from workflow_storage.admin.rendering import (
    cost_text,
    count_text,
    duration_text,
    exact_time,
    exception_line,
    first_line,
    labels_block,
    printable,
    status_badge,
    text_block,
    time_ago,
    time_taken,
    tokens_text,
)
from workflow_storage.admin.timeline import timeline
from workflow_storage.admin.trees import json_tree
from workflow_storage.base import step_of
from workflow_storage.exceptions import DamagedStateError, RunNotFoundError
from workflow_storage.status import RunStatus

if TYPE_CHECKING:
    from datetime import datetime

    from django.http import HttpRequest
    from django.utils.safestring import SafeString

    from workflow_storage.admin.masking import Mask
    from workflow_storage.base import Attempt, Checkpoint, RunFilters, Step, StorageBackend
    from workflow_storage.models import WorkflowRun

SHOWN_STEPS = 20_000
"""Steps that the timeline of a run reads, at most: in 0.2 seconds."""

RELATED = 20
"""Children and forks of a run that its page names."""

ERROR_LINES = 3
"""Lines of an error that are shown at once."""


FIRST = "first"
"""The parameter of the address that names the step with which a page of all steps begins."""


class Link(NamedTuple):
    """A link, or text where there is nothing to link to."""

    text: str
    url: str | None
    detail: SafeString | str = ""


class AttemptRow(NamedTuple):
    """An attempt, as the page shows it."""

    number: int
    status: str
    started: SafeString | str
    duration: str
    node: str
    worker: str
    error: str
    error_block: SafeString | str


class Pages(Protocol):
    """The admin of the runs, as far as the page of one needs it."""

    @property
    def store(self) -> StorageBackend: ...

    def mask(self, request: HttpRequest) -> Mask: ...

    def may_view_states(self, request: HttpRequest) -> bool: ...

    def mark_of(self, run: WorkflowRun) -> str: ...

    def url_of(self, run_id: str) -> str: ...

    def view_url(self, view: str, *args: Any) -> str: ...

    def list_url(self) -> str: ...

    def states_url(self, run: WorkflowRun) -> str: ...

    def query(self, name: str, value: str) -> str: ...

    def newer_run(self, run: WorkflowRun) -> WorkflowRun | None: ...

    def newest_step(self, run: WorkflowRun) -> Step | None: ...

    def brief_runs(
        self, limit: int, before: WorkflowRun | None = None, **filters: Unpack[RunFilters]
    ) -> list[WorkflowRun]: ...

    def run_action_forms(self, request: HttpRequest, run: WorkflowRun) -> list[Any]: ...


class RunPage:
    """The page of a run, read when its template asks for it.

    Args:
        model_admin: the admin that shows it.
        request: who looks.
        run: the run.
        known_step: the step whose state the browser already shows, if it shows one.
    """

    def __init__(
        self,
        model_admin: Pages,
        request: HttpRequest,
        run: WorkflowRun,
        known_step: int | None = None,
    ) -> None:
        self.run = run
        self.sees_states = model_admin.may_view_states(request)
        self.mask = model_admin.mask(request)
        self._admin = model_admin
        self._known_step = known_step
        self._request = request
        self._runs, self._states = model_admin.store

    @cached_property
    def badge(self) -> SafeString:
        """The status."""
        if self.run.status == RunStatus.RUNNING:
            self.run.newest_state_at = self._newest_state_at  # type: ignore[attr-defined]
        return status_badge(self.run, self._admin.mark_of(self.run))

    @cached_property
    def facts(self) -> list[tuple[str, Any]]:
        """What is to be known of the run at once, each with its name."""
        run = self.run
        facts: list[tuple[str, Any]] = [
            (_("Started"), time_ago(run.started_at)),
            (_("Duration"), time_taken(run)),
            (_("Tokens"), tokens_text(run.total_tokens)),
            (_("Cost"), cost_text(run.total_cost_usd)),
        ]
        if run.completed_at is not None:
            facts.insert(1, (_("Ended"), time_ago(run.completed_at)))
        if run.attempt > 1:
            facts.append((_("Attempts"), str(run.attempt)))
        if run.status == RunStatus.RUNNING:
            if self.sees_states and run.current_node:
                facts.append((_("Node"), run.current_node))
            facts.append((_("Worker"), run.worker or "-"))
            facts.append((_("Last sign of life"), time_ago(self._last_sign)))
        return facts

    @property
    def _last_sign(self) -> Any:
        signs = (self.run.attempt_started_at, self.run.heartbeat_at, self._newest_state_at)
        return max((sign for sign in signs if sign is not None), default=None)

    @property
    def _newest_state_at(self) -> datetime | None:
        return self.newest_step["created_at"] if self.newest_step else None

    @cached_property
    def labels(self) -> SafeString:
        """The labels, each a link to the runs that have it."""
        base = self._admin.list_url()
        return labels_block(
            self.mask.masked(self.run.labels),
            {
                name: f"{base}{self._admin.query(selection.LABEL, f'{name}={value}')}"
                for name, value in self.run.labels.items()
                if not self.mask.hides(name)
            },
        )

    @property
    def failed(self) -> bool:
        """Whether the run has failed."""
        return bool(self.run.status == RunStatus.FAILED)

    @cached_property
    def failed_node(self) -> str:
        """Where it failed, for who may see nodes."""
        return (self.run.current_node or "") if self.failed and self.sees_states else ""

    @cached_property
    def error_head(self) -> str:
        """The first lines of the error; of a traceback, the line of its exception."""
        text = (self.run.error_message or "").strip()
        head = exception_line(text) or "\n".join(text.splitlines()[:ERROR_LINES])
        return printable(head[:1000])

    @cached_property
    def error_rest(self) -> SafeString | str:
        """The whole error, if there is more of it than its first lines."""
        text = (self.run.error_message or "").strip()
        return text_block(text) if text != self.error_head else ""

    @cached_property
    def newest_step(self) -> Step | None:
        """The newest step, without its state where that can be read so."""
        if self._admin.store.alias is not None:
            return self._admin.newest_step(self.run)
        if self._known_step is not None and (newest := self._last_from(self._known_step)):
            return newest
        checkpoint, damage = self._newest
        if damage is not None:
            return self._last_from(damage.step)
        return step_of(checkpoint) if checkpoint else None

    def _last_from(self, step: int) -> Step | None:
        steps = self._states.iter_steps(self.run.id, after=step - 1)
        return next(iter(deque(steps, maxlen=1)), None)

    @property
    def version(self) -> str:
        """What another look at the run is compared by: all but what time and heartbeats change."""
        run = self.run
        shown = (
            self.badge,
            run.attempt,
            run.current_node if self.sees_states else None,
            run.waiting_for,
            run.error_message,
            run.duration_seconds,
            run.total_tokens,
            run.total_cost_usd,
            self.mask.masked(run.labels),
            self.newest_step,
        )
        return blake2s(repr(shown).encode("utf-8", "replace"), digest_size=8).hexdigest()

    @cached_property
    def attempts(self) -> list[Attempt]:
        """All attempts."""
        try:
            return self._runs.list_attempts(self.run.id)
        except RunNotFoundError:
            return []

    @cached_property
    def attempt_rows(self) -> list[AttemptRow]:
        """All attempts as the page shows them; none for a run that was begun once."""
        if len(self.attempts) < 2:
            return []
        names = dict(RunStatus.choices)
        return [
            AttemptRow(
                one.number,
                str(names.get(one.status, one.status)),
                time_ago(one.started_at),
                duration_text((one.ended_at - one.started_at).total_seconds())
                if one.ended_at is not None and one.started_at is not None
                else "-",
                (one.node or "-") if self.sees_states else "-",
                one.worker or "-",
                first_line(printable(one.error_message or "")),
                text_block(one.error_message),
            )
            for one in self.attempts
        ]

    @property
    def timeline(self) -> SafeString | str:
        """The timeline of the nodes, for who may see them."""
        return self._timeline[0]

    @property
    def timeline_note(self) -> str:
        """How many steps it shows, if that is not all of them."""
        return self._timeline[1]

    @cached_property
    def _timeline(self) -> tuple[SafeString | str, str]:
        if not self.sees_states:
            return "", ""
        steps = iter(self._states.iter_steps(self.run.id))
        shown = timeline(
            self.run,
            islice(steps, SHOWN_STEPS),
            self.attempts,
            step_url=self._state_url,
            page_url=self._steps_url,
        )
        following = next(steps, None)
        if following is None or self.newest_step is None:
            return shown, ""
        total = SHOWN_STEPS + self.newest_step["step"] - following["step"] + 1
        return shown, _("The first %(shown)s of %(total)s steps.") % {
            "shown": count_text(SHOWN_STEPS),
            "total": count_text(total),
        }

    def all_steps(self, first: int) -> SafeString:
        """Return a page of the table of all steps, from the step of a number on."""
        # The step before tells when the first one began.
        steps = self._states.iter_steps(self.run.id, after=max(first - 2, -1))
        return timeline(
            self.run,
            steps,
            self.attempts,
            step_url=self._state_url,
            all_steps=True,
            first=first,
            page_url=self._steps_url,
        )

    def _steps_url(self, first: int) -> str:
        url = self._admin.view_url("steps", self.run.pk)
        return f"{url}{self._admin.query(FIRST, str(first))}" if first else url

    def _state_url(self, step: int) -> str:
        return self._admin.view_url("state", self.run.pk, step)

    @cached_property
    def _newest(self) -> tuple[Checkpoint | None, DamagedStateError | None]:
        try:
            return self._states.get_latest_checkpoint(self.run.id), None
        except DamagedStateError as exc:
            return None, exc

    @property
    def latest(self) -> Checkpoint | None:
        """The newest checkpoint, for who may see states."""
        return self._newest[0] if self.sees_states else None

    @property
    def latest_damage(self) -> str:
        """Why the newest checkpoint cannot be read, if it cannot."""
        damage = self._newest[1] if self.sees_states else None
        return "" if damage is None else str(damage)

    @property
    def shown_step(self) -> int | None:
        """The step whose state is shown, or said to be damaged."""
        if not self.sees_states:
            return None
        checkpoint, damage = self._newest
        if damage is not None:
            return damage.step
        return checkpoint["step"] if checkpoint else None

    @cached_property
    def latest_tree(self) -> SafeString | str:
        """Its state."""
        if self.latest is None:
            return ""
        return json_tree(
            self.latest["state_data"],
            mask=self.mask,
            download_url=self._admin.view_url("state_file", self.run.pk, self.latest["step"]),
            name=_("state"),
        )

    @cached_property
    def latest_diff(self) -> SafeString | str:
        """What its node changed in the state."""
        if self.latest is None or not self.latest["step"]:
            return ""
        try:
            before = self._states.get_state(self.run.id, self.latest["step"] - 1)
        except DamagedStateError:
            return ""
        if before is None:
            return ""
        return diff_block(before["state_data"], self.latest["state_data"], mask=self.mask)

    @property
    def latest_url(self) -> str:
        """The page of the newest state."""
        return self._state_url(self.latest["step"]) if self.latest else ""

    @cached_property
    def parent(self) -> Link | None:
        """The run that started it, or that it was forked from."""
        parent_id = self.run.parent_id
        if parent_id is None:
            return None
        found = self._runs.get(parent_id)
        if found is None:
            return Link(parent_id, None, _("is not there any more"))
        return self._link(found)

    @cached_property
    def _related(self) -> list[WorkflowRun]:
        return self._admin.brief_runs(RELATED + 1, parent_id=self.run.pk)

    @property
    def children(self) -> list[Link]:
        """The runs that it started."""
        return [self._link(one) for one in self._related[:RELATED] if one.forked_from_step is None]

    @property
    def forks(self) -> list[Link]:
        """The runs that were forked from it."""
        return [
            self._link(one) for one in self._related[:RELATED] if one.forked_from_step is not None
        ]

    @property
    def more_related(self) -> str:
        """The list of all of them, if there are more."""
        if len(self._related) <= RELATED:
            return ""
        return f"{self._admin.list_url()}{self._admin.query(selection.PARENT, self.run.pk)}"

    def _link(self, run: WorkflowRun) -> Link:
        # Whether a running one has stalled is known with its newest state alone.
        is_known = run.status != RunStatus.RUNNING or hasattr(run, "newest_state_at")
        badge = status_badge(run, self._admin.mark_of(run) if is_known else "")
        return Link(run.workflow_name, self._admin.url_of(run.pk), badge)

    @cached_property
    def _older(self) -> WorkflowRun | None:
        name = self.run.workflow_name
        return next(iter(self._admin.brief_runs(1, self.run, workflow_name=name)), None)

    @property
    def older(self) -> Link | None:
        """The run of the same workflow that was started before it."""
        return None if self._older is None else self._link(self._older)

    @cached_property
    def newer(self) -> Link | None:
        """The run of the same workflow that was started after it."""
        run = self._admin.newer_run(self.run)
        return None if run is None else self._link(run)

    @property
    def compare_url(self) -> str:
        """Where it is compared with the run before it."""
        if self._older is None:
            return ""
        return self._admin.view_url("compare", self.run.pk, self._older.pk)

    @property
    def compare_with_url(self) -> str:
        """Where a form sends the id of the run that it is to be compared with."""
        return self._admin.view_url("compare_with", self.run.pk)

    @property
    def workflow_url(self) -> str:
        """The list of the runs of its workflow."""
        query = self._admin.query(selection.WORKFLOW, self.run.workflow_name)
        return f"{self._admin.list_url()}{query}"

    @property
    def states_url(self) -> str:
        """The list of its states, for who may see it."""
        return self._admin.states_url(self.run)

    @property
    def live_url(self) -> str:
        """What a script asks for while the run goes on; nothing once it has ended."""
        ended = RunStatus(self.run.status).is_terminal
        return "" if ended else self._admin.view_url("live", self.run.pk)

    @property
    def file_url(self) -> str:
        """The run as a file."""
        return self._admin.view_url("file", self.run.pk)

    @property
    def started(self) -> str:
        """When it was started, exactly."""
        return exact_time(self.run.started_at)

    @cached_property
    def forms(self) -> list[Any]:
        """What can be done with the run, by who looks."""
        return self._admin.run_action_forms(self._request, self.run)

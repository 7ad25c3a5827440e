"""What can be done to runs in the admin: asked for on a page of its own, then done run by run.

`RunActions` gives the list of runs its actions. Each is a form, a `RunAction`: what it asks, and what
it does to a run through the repositories. A request does so much in so much time; what is left is
done by the next one, from where this one stopped.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from dataclasses import asdict, dataclass, field
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, cast

from django import forms
from django.contrib import admin, messages
from django.contrib.admin.helpers import ACTION_CHECKBOX_NAME, AdminForm
from django.contrib.admin.utils import quote
from django.contrib.admin.widgets import (
    AdminIntegerFieldWidget,
    AdminTextareaWidget,
    AdminTextInputWidget,
)
from django.core import signing
from django.core.exceptions import BadRequest, PermissionDenied
from django.db.models import Q
from django.http import FileResponse, HttpResponseRedirect
from django.template.response import TemplateResponse
from django.urls import reverse
from django.utils import timezone
from django.utils.formats import number_format
from django.utils.html import escape
from django.utils.text import Truncator
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy, ngettext, ngettext_lazy

from workflow_storage.admin.masking import PERMISSION as VIEW_SECRETS
from workflow_storage.admin.rendering import status_badge
from workflow_storage.base import StorageBackend
from workflow_storage.exceptions import (
    RunNotFoundError,
    StatusConflictError,
    StepNotFoundError,
    StorageError,
    StorageUnavailableError,
)
from workflow_storage.factory import create_storage_backend
from workflow_storage.models import ExecutionState, WorkflowRun
from workflow_storage.status import RunStatus
from workflow_storage.transfer import export_runs, fork_run
from workflow_storage.validation import MAX_COUNT, MAX_LABEL_NAME, MAX_LABEL_VALUE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from django.db.models import QuerySet
    from django.http import HttpRequest, HttpResponse

    from workflow_storage.base import AbstractWorkflowRunRepository, Attempt
    from workflow_storage.transfer import Transferred

MAX_RUNS = 500
"""Runs that one request changes, or exports."""

MAX_SECONDS = 10.0
"""Seconds after which a request begins with no further run."""

BATCH = 100
"""Runs that are read at a time."""

COUNTED = 1000
"""So far is counted how many runs there are, and how many states."""

SHOWN = 20
"""Runs that are listed before anything is done to them."""

MAX_REASON = 2000
"""Characters of a reason."""

_SHOWN_ERROR = 300  # a message can be kept in a cookie

OPEN = frozenset({RunStatus.PENDING, RunStatus.RUNNING})
"""The statuses of runs that can be ended."""

_RUNS, _STATES = (
    [f"workflow_storage.{verb}_{model}" for verb in ("view", "change")]
    for model in ("workflowrun", "executionstate")
)
NEEDED: dict[str, list[list[str]]] = {
    "change": [["workflow_storage.change_workflowrun"]],
    "delete": [["workflow_storage.delete_workflowrun"]],
    # It makes a run and leaves the other one as it is.
    "fork": [["workflow_storage.add_workflowrun"]],
    # States are exported as they are stored, whatever pages mask.
    "export": [_RUNS, _STATES, [VIEW_SECRETS]],
}
"""What a user may do, and the permissions for it: of each list one."""


class Outcome(StrEnum):
    """What became of a run."""

    DONE = "done"
    SKIPPED = "skipped"
    """The action is not for runs in its status."""
    UNCHANGED = "unchanged"
    """It was already so."""
    WENT_ON = "went on"
    """It is no more what it was when the user was asked."""
    GONE = "gone"
    FAILED = "failed"


class RunAction(forms.Form):
    """What an action asks, and what it does to a run."""

    name_of_action: ClassVar[str]
    """The method of `RunActions`."""
    needs: ClassVar[str] = "change"
    """See `RunActions.may`."""
    label: ClassVar[Any]
    about: ClassVar[Any] = ""
    """What the user should know before, such as what is lost."""
    loses: ClassVar[bool] = False
    """Whether something is lost."""
    keeps_run: ClassVar[bool] = True
    """Whether the run has a page afterwards."""
    statuses: ClassVar[frozenset[RunStatus]] = frozenset(RunStatus)
    """Of which runs the action is offered on their pages."""
    done: ClassVar[Any]
    """How many runs it was done to, as all that follow a text for one and for several."""
    skipped: ClassVar[Any] = ngettext_lazy(
        "%(shown)s was skipped because of its status.",
        "%(shown)s were skipped because of their status.",
        "count",
    )
    unchanged: ClassVar[Any] = ngettext_lazy(
        "%(shown)s was so already.", "%(shown)s were so already.", "count"
    )

    def apply(self, run: WorkflowRun, store: StorageBackend, by: str) -> tuple[Outcome, str]:
        """Do it to a run.

        Args:
            run: as the list has read it, without payloads.
            store: where it is.
            by: the name of the user.

        Returns:
            What became of it, and what the admin's log says if it was done.

        Raises:
            RunNotFoundError: if it has been deleted meanwhile.
            StatusConflictError: if it is in another status meanwhile.
            StorageError: if it cannot be done.
        """
        raise NotImplementedError

    def fieldsets(self) -> AdminForm | None:
        """Return its fields as the admin shows fields; None if it has none."""
        form: Any = self  # which need not be that of a model
        return AdminForm(form, [(None, {"fields": [*self.fields]})], {}) if self.fields else None


class EndRuns(RunAction):
    """Ends runs that have not ended."""

    statuses = OPEN
    status: ClassVar[RunStatus]
    text: ClassVar[str]
    """How the error message begins, as it is stored, in whatever language the user reads."""

    reason = forms.CharField(
        label=gettext_lazy("Reason"),
        help_text=gettext_lazy("Kept with the run, after your name."),
        required=False,
        max_length=MAX_REASON,
        widget=AdminTextareaWidget({"rows": 3}),
    )

    def clean_reason(self) -> str:
        """Return its lines as they are everywhere but in forms."""
        reason: str = self.cleaned_data["reason"]
        return reason.replace("\r\n", "\n")

    def apply(self, run: WorkflowRun, store: StorageBackend, by: str) -> tuple[Outcome, str]:
        if run.status not in OPEN:
            return Outcome.SKIPPED, ""
        reason = self.cleaned_data["reason"]
        message = f"{self.text} by {by} in the admin" + (f": {reason}" if reason else ".")
        store.runs.update_status(run.id, self.status, expected=OPEN, error_message=message)
        return Outcome.DONE, f"{self.label}: {reason}" if reason else str(self.label)


class FailRuns(EndRuns):
    """Sets runs to failed."""

    name_of_action = "fail_runs"
    status = RunStatus.FAILED
    text = "Set to failed"
    label = gettext_lazy("Set to failed")
    about = gettext_lazy(
        "Only pending and running runs are set to failed. Whoever works on one is told at its next "
        "checkpoint. A failed run can be resumed."
    )
    done = ngettext_lazy(
        "%(shown)s run was set to failed.", "%(shown)s runs were set to failed.", "count"
    )


class CancelRuns(EndRuns):
    """Cancels runs."""

    name_of_action = "cancel_runs"
    status = RunStatus.CANCELLED
    text = "Cancelled"
    label = gettext_lazy("Cancel")
    about = gettext_lazy(
        "Only pending and running runs are cancelled. Whoever works on one is told at its next "
        "checkpoint. A cancelled run can be resumed."
    )
    done = ngettext_lazy("%(shown)s run was cancelled.", "%(shown)s runs were cancelled.", "count")


class DeleteRuns(RunAction):
    """Deletes runs."""

    name_of_action = "delete_runs"
    needs = "delete"
    loses = True
    keeps_run = False
    label = gettext_lazy("Delete with all states")
    about = gettext_lazy(
        "Lost are the runs with their inputs and outputs, all their states, labels and attempts. "
        "Whoever works on one loses it. This cannot be undone."
    )
    done = ngettext_lazy("%(shown)s run was deleted.", "%(shown)s runs were deleted.", "count")

    def apply(self, run: WorkflowRun, store: StorageBackend, by: str) -> tuple[Outcome, str]:
        store.runs.delete(run.id)
        return Outcome.DONE, ""


class PruneStates(RunAction):
    """Deletes the older states of runs."""

    name_of_action = "prune_states"
    loses = True
    label = gettext_lazy("Prune states")
    about = gettext_lazy(
        "Lost are all states of each run but the newest ones. A run does not go on, and cannot be "
        "forked, from a step that is lost. This cannot be undone."
    )
    done = ngettext_lazy(
        "The states of %(shown)s run were pruned.",
        "The states of %(shown)s runs were pruned.",
        "count",
    )
    skipped = ngettext_lazy(
        "%(shown)s was skipped, for it can be resumed.",
        "%(shown)s were skipped, for they can be resumed.",
        "count",
    )
    unchanged = ngettext_lazy(
        "%(shown)s has no older states.", "%(shown)s have no older states.", "count"
    )

    keep = forms.IntegerField(
        label=gettext_lazy("Newest states to keep"),
        min_value=0,
        max_value=MAX_COUNT,
        initial=1,
        widget=AdminIntegerFieldWidget,
    )
    resumable = forms.BooleanField(
        label=gettext_lazy("Also of runs that can be resumed"),
        help_text=gettext_lazy(
            "Pending, running, failed and cancelled ones. When one is resumed, it no longer knows "
            "which nodes it has done but for those of the states that are kept."
        ),
        required=False,
    )

    def apply(self, run: WorkflowRun, store: StorageBackend, by: str) -> tuple[Outcome, str]:
        if run.status != RunStatus.COMPLETED and not self.cleaned_data["resumable"]:
            return Outcome.SKIPPED, ""
        keep = self.cleaned_data["keep"]
        deleted = store.states.delete_states(run.id, keep_last=keep)
        if not deleted:
            return Outcome.UNCHANGED, ""
        log = ngettext(
            "Pruned %(deleted)s state; the newest to keep: %(keep)s.",
            "Pruned %(deleted)s states; the newest to keep: %(keep)s.",
            deleted,
        )
        return Outcome.DONE, log % {"deleted": deleted, "keep": keep}


class AddLabel(RunAction):
    """Adds a label to runs."""

    name_of_action = "add_label"
    label = gettext_lazy("Add a label")
    about = gettext_lazy("A label of the same name gets the new value.")
    done = ngettext_lazy(
        "The label was added to %(shown)s run.", "The label was added to %(shown)s runs.", "count"
    )
    unchanged = ngettext_lazy("%(shown)s has it already.", "%(shown)s have it already.", "count")

    name = forms.CharField(
        label=gettext_lazy("Name"), max_length=MAX_LABEL_NAME, widget=AdminTextInputWidget
    )
    value = forms.CharField(
        label=gettext_lazy("Value"), max_length=MAX_LABEL_VALUE, widget=AdminTextInputWidget
    )

    def clean_name(self) -> str:
        """Refuse what `name=value` could not be told from."""
        name: str = self.cleaned_data["name"]
        if "=" in name:
            raise forms.ValidationError(_("The name of a label holds no “=”."))
        return name

    def apply(self, run: WorkflowRun, store: StorageBackend, by: str) -> tuple[Outcome, str]:
        name, value = self.cleaned_data["name"], self.cleaned_data["value"]
        if run.labels.get(name) == value:
            return Outcome.UNCHANGED, ""
        store.runs.update(run.id, add_labels={name: value})
        return Outcome.DONE, _("Added the label %(label)s.") % {"label": f"{name}={value}"}


class RemoveLabel(RunAction):
    """Removes a label from runs."""

    name_of_action = "remove_label"
    label = gettext_lazy("Remove a label")
    done = ngettext_lazy(
        "The label was removed from %(shown)s run.",
        "The label was removed from %(shown)s runs.",
        "count",
    )
    unchanged = ngettext_lazy("%(shown)s does not have it.", "%(shown)s do not have it.", "count")

    name = forms.CharField(
        label=gettext_lazy("Name"),
        max_length=MAX_LABEL_NAME,
        strip=False,  # one that was given elsewhere may begin with a space
        widget=AdminTextInputWidget,
    )

    def apply(self, run: WorkflowRun, store: StorageBackend, by: str) -> tuple[Outcome, str]:
        name = self.cleaned_data["name"]
        if name not in run.labels:
            return Outcome.UNCHANGED, ""
        store.runs.update(run.id, remove_labels=[name])
        label = f"{name}={run.labels[name]}"
        return Outcome.DONE, _("Removed the label %(label)s.") % {"label": label}


class ExportRuns(RunAction):
    """Exports runs to a file, all in one; see `RunActions.export_runs`."""

    name_of_action = "export_runs"
    needs = "export"
    label = gettext_lazy("Export as JSON Lines")
    about = gettext_lazy(
        "The file has all of each run, payloads and states as they are stored: nothing in it is "
        "masked. manage.py import_runs reads it."
    )


class ForkRun(RunAction):
    """Forks one run; see `RunActions.fork_run`."""

    name_of_action = "fork_run"
    needs = "fork"
    label = gettext_lazy("Fork from a step")
    about = gettext_lazy(
        "The fork is a new, pending run with the history up to the step. Resuming it goes on from "
        "there; this run stays as it is."
    )

    step = forms.IntegerField(
        label=gettext_lazy("Last step to have"),
        min_value=0,
        max_value=MAX_COUNT,
        widget=AdminIntegerFieldWidget,
    )

    def __init__(self, *args: Any, first: Any, newest: Any, **kwargs: Any) -> None:
        """Take the step and the node of the first and the newest state."""
        super().__init__(*args, **kwargs)
        self.fields["step"].initial = newest[0]
        self.fields["step"].help_text = escape(  # which a template takes for HTML
            _("From %(first)s to %(newest)s, which is of the node %(node)s.")
            % {"first": first[0], "newest": newest[0], "node": newest[1]}
        )


RUN_ACTIONS: dict[str, type[RunAction]] = {
    action.name_of_action: action
    for action in (
        FailRuns,
        CancelRuns,
        AddLabel,
        RemoveLabel,
        ForkRun,
        ExportRuns,
        PruneStates,
        DeleteRuns,
    )
}
"""Every action by its name, in the order in which they are offered."""


class ActionForm(NamedTuple):
    """What a button for one action and one run posts, together with the CSRF token."""

    label: str
    action: str
    url: str
    hidden: list[tuple[str, str]]
    """Names and values of the hidden fields."""
    loses: bool
    """Whether something is lost, once it is confirmed."""


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

    def rest_of(self, runs: QuerySet[WorkflowRun]) -> QuerySet[WorkflowRun]:
        """Return which runs are left, of those in the order newest first."""
        lookup = "id__lt" if self.has_begun else "id__lte"
        # The last part alone lets the database begin within its index.
        return runs.filter(
            Q(started_at__lt=self.started_at) | Q(**{lookup: self.run_id}),
            started_at__lte=self.started_at,
        )

    def each_of(self, runs: QuerySet[WorkflowRun]) -> Iterator[WorkflowRun]:
        """Yield the runs that are left; each has to be counted before the next one is taken."""
        while batch := list(self.rest_of(runs)[:BATCH]):
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


_NOTHING_LEFT = gettext_lazy("Nothing is left of what was selected.")


class _ChosenRuns:
    """What `export_runs` needs of a repository, whose filters know no list of ids."""

    def __init__(self, runs: AbstractWorkflowRunRepository, run_ids: Iterable[str]) -> None:
        self._runs = runs
        self._run_ids = run_ids

    def iter_runs(self) -> Iterator[WorkflowRun]:
        for run_id in self._run_ids:
            run = self._runs.get(run_id)
            if run is not None:
                yield run

    def list_attempts(self, run_id: str) -> list[Attempt]:
        return self._runs.list_attempts(run_id)


class RunActions(admin.ModelAdmin):  # type: ignore[type-arg]
    """Gives an admin of runs its actions, also if its forms change nothing.

    They are carried out in the store of the database that `get_queryset` reads from; see `store_of`.
    """

    actions: Any = tuple(RUN_ACTIONS)
    action_template = "admin/workflow_storage/action_confirmation.html"

    def may(self, request: HttpRequest, what: str) -> bool:
        """Whether a user may do something to the runs of the list.

        Args:
            request: whose user.
            what: ``change`` (set to failed, cancel, label, prune), ``delete``, ``fork`` or
                ``export``; see `NEEDED`. A subclass can override it for all of them.
        """
        user = request.user
        return all(any(map(user.has_perm, permissions)) for permissions in NEEDED[what])

    def store_of(self, runs: QuerySet[Any]) -> StorageBackend:
        """Return the store that the runs are changed in: the project's, if they are in that.

        Runs of another one of DATABASES are changed there. A subclass that lists what has neither
        overrides it.
        """
        store = create_storage_backend()
        return store if store.alias == runs.db else create_storage_backend(runs.db)

    def has_change_runs_permission(self, request: HttpRequest) -> bool:
        """Whether the actions that change runs are offered."""
        return self.may(request, "change")

    def has_delete_runs_permission(self, request: HttpRequest) -> bool:
        """Whether the action that deletes runs is offered."""
        return self.may(request, "delete")

    def has_fork_runs_permission(self, request: HttpRequest) -> bool:
        """Whether the action that forks a run is offered."""
        return self.may(request, "fork")

    def has_export_runs_permission(self, request: HttpRequest) -> bool:
        """Whether the action that exports runs is offered."""
        return self.may(request, "export")

    @admin.action(description=FailRuns.label, permissions=["change_runs"])
    def fail_runs(self, request: HttpRequest, queryset: QuerySet[Any]) -> Any:
        """Set runs to failed."""
        return self._confirmed(request, queryset, FailRuns, self._do_to_each)

    @admin.action(description=CancelRuns.label, permissions=["change_runs"])
    def cancel_runs(self, request: HttpRequest, queryset: QuerySet[Any]) -> Any:
        """Cancel runs."""
        return self._confirmed(request, queryset, CancelRuns, self._do_to_each)

    @admin.action(description=AddLabel.label, permissions=["change_runs"])
    def add_label(self, request: HttpRequest, queryset: QuerySet[Any]) -> Any:
        """Add a label to runs."""
        return self._confirmed(request, queryset, AddLabel, self._do_to_each)

    @admin.action(description=RemoveLabel.label, permissions=["change_runs"])
    def remove_label(self, request: HttpRequest, queryset: QuerySet[Any]) -> Any:
        """Remove a label from runs."""
        return self._confirmed(request, queryset, RemoveLabel, self._do_to_each)

    @admin.action(description=PruneStates.label, permissions=["change_runs"])
    def prune_states(self, request: HttpRequest, queryset: QuerySet[Any]) -> Any:
        """Delete the older states of runs."""
        return self._confirmed(request, queryset, PruneStates, self._do_to_each)

    @admin.action(description=DeleteRuns.label, permissions=["delete_runs"])
    def delete_runs(self, request: HttpRequest, queryset: QuerySet[Any]) -> Any:
        """Delete runs."""
        return self._confirmed(request, queryset, DeleteRuns, self._do_to_each)

    @admin.action(description=ExportRuns.label, permissions=["export_runs"])
    def export_runs(self, request: HttpRequest, queryset: QuerySet[Any]) -> Any:
        """Answer with a file of the runs."""
        return self._confirmed(request, queryset, ExportRuns, self._export)

    @admin.action(description=ForkRun.label, permissions=["fork_runs"])
    def fork_run(self, request: HttpRequest, queryset: QuerySet[Any]) -> Any:
        """Fork one run, and go to the page of the fork."""
        runs = list(queryset.values_list("pk", flat=True)[:2])
        if len(runs) != 1:
            text = _("Select one run to fork.") if runs else _NOTHING_LEFT
            self.message_user(request, text, messages.WARNING)
            return None
        states = ExecutionState.objects.using(queryset.db).filter(run_id__in=runs)
        steps: Any = states.order_by("step").values_list("step", "node_id")
        first, newest = steps.first(), steps.last()
        if newest is None:
            text = _("The run has no states, so there is no step to fork it from.")
            self.message_user(request, text, messages.WARNING)
            return self._back(request)
        return self._confirmed(request, queryset, ForkRun, self._fork, first=first, newest=newest)

    def run_action_forms(self, request: HttpRequest, run: WorkflowRun) -> list[ActionForm]:
        """Return a button for each action that the user may do to a run, for its page.

        Each is to be posted, with the CSRF token, and leads to the page that asks. A field of the
        action can be posted with it, such as ``step``, and is filled in there.
        """
        url, offered = self._url("changelist"), self.get_actions(request)
        return [
            ActionForm(
                str(action.label),
                name,
                url,
                [("action", name), (ACTION_CHECKBOX_NAME, run.pk), ("from_run", "1")],
                action.loses,
            )
            for name, action in RUN_ACTIONS.items()
            if name in offered and run.status in action.statuses
        ]

    def response_action(self, request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
        if any("\0" in pk for pk in request.POST.getlist(ACTION_CHECKBOX_NAME)):
            raise BadRequest  # PostgreSQL refuses it as a parameter
        return super().response_action(request, *args, **kwargs)

    def _confirmed(
        self,
        request: HttpRequest,
        queryset: QuerySet[Any],
        action: type[RunAction],
        carry_out: Callable[..., HttpResponse | None],
        **known: Any,
    ) -> HttpResponse | None:
        """Ask, and carry out what has been confirmed."""
        if not self.may(request, action.needs):
            raise PermissionDenied
        runs = queryset.order_by("-started_at", "-id").only(
            "id", "workflow_name", "status", "started_at", "completed_at", "labels"
        )
        progress = Progress.posted(request, action)
        newest = None if progress else runs.first()
        if progress is None and newest is not None:
            progress = Progress(timezone.now(), newest.started_at, newest.pk)
            given = {
                name: request.POST[name] for name in action.base_fields if name in request.POST
            }
            return self._page(request, runs, action(initial=given, **known), progress)
        if progress is None:
            self.message_user(request, _NOTHING_LEFT, messages.WARNING)
            return None
        form = action(request.POST, **known)
        if not form.is_valid():
            return self._page(request, runs, form, progress)
        return carry_out(request, runs, form, progress)

    def _do_to_each(
        self,
        request: HttpRequest,
        runs: QuerySet[WorkflowRun],
        action: RunAction,
        progress: Progress,
    ) -> HttpResponse | None:
        """Do it to the runs that are left, as far as one request may go."""
        store = self.store_of(runs)
        if not progress.has_begun and not progress.counts:
            self._count_missing(request, runs, progress)
        deadline = time.monotonic() + MAX_SECONDS
        for run in itertools.islice(progress.each_of(runs), MAX_RUNS):
            try:
                self._do_to(request, run, action, store, progress)
            except StorageUnavailableError as exc:
                self.message_user(request, str(exc), messages.ERROR)
                return self._page(request, runs, action, progress)
            progress.pass_by(run)
            if time.monotonic() > deadline:
                break
        if progress.rest_of(runs).exists():
            return self._page(request, runs, action, progress)
        self.message_user(request, " ".join(progress.sentences(action)), progress.level())
        return self._back(request) if action.keeps_run else None

    def _do_to(
        self,
        request: HttpRequest,
        run: WorkflowRun,
        action: RunAction,
        store: StorageBackend,
        progress: Progress,
    ) -> None:
        """Do it to a run, count it, and write it into the admin's log.

        Raises:
            StorageUnavailableError: if the store does not answer.
        """
        log = ""
        try:
            outcome, log = action.apply(run, store, request.user.get_username())
        except RunNotFoundError:
            outcome = Outcome.GONE
        except StatusConflictError:
            outcome = Outcome.WENT_ON
        except StorageUnavailableError:
            raise
        except StorageError as exc:
            outcome = Outcome.FAILED
            progress.reason = progress.reason or Truncator(str(exc)).chars(_SHOWN_ERROR)
        if (
            outcome is Outcome.SKIPPED
            and run.completed_at is not None
            and run.completed_at >= progress.asked_at
        ):
            outcome = Outcome.WENT_ON
        progress.count(outcome)
        if outcome is Outcome.DONE and action.keeps_run:
            self.log_change(request, run, log)
        elif outcome is Outcome.DONE:
            self.log_deletions(request, cast("Any", [run]))

    def _count_missing(
        self, request: HttpRequest, runs: QuerySet[WorkflowRun], progress: Progress
    ) -> None:
        """Count the selected runs that the list no longer has."""
        if _is_across(request):
            return
        selected = {*request.POST.getlist(ACTION_CHECKBOX_NAME)}
        missing = selected.difference(runs.values_list("pk", flat=True))
        if missing:
            there = self.get_queryset(request).filter(pk__in=missing).count()
            progress.count(Outcome.WENT_ON, there)
            progress.count(Outcome.GONE, len(missing) - there)

    def _export(
        self,
        request: HttpRequest,
        runs: QuerySet[WorkflowRun],
        action: RunAction,
        progress: Progress,
    ) -> Any:
        """Answer with a file of the runs, unless that would take too long."""
        chosen = {run.pk: run for run in progress.rest_of(runs)[: MAX_RUNS + 1]}
        if len(chosen) > MAX_RUNS:
            return self._too_much_to_export(request)
        store = self.store_of(runs)
        source = StorageBackend(cast("Any", _ChosenRuns(store.runs, chosen)), store.states)
        # The file is open when its directory is deleted, and gone when it is closed. Where a
        # system does not let that happen, it is left to be cleaned up with other temporary files.
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
            path = Path(directory) / "runs.jsonl"
            try:
                written = _written(source, path)
            except StorageError as exc:
                self.message_user(request, str(exc), messages.ERROR)
                return self._back(request)
            if written is None:
                return self._too_much_to_export(request)
            file = path.open("rb")
        for one in written:
            self.log_change(request, chosen[one.run_id], _("Exported as JSON Lines."))
        incomplete = [one for one in written if one.outcome == "refused"]
        if incomplete:
            self._warn_of(request, incomplete)
        name = f"workflow-runs-{timezone.now():%Y%m%d-%H%M%S}.jsonl"
        return FileResponse(
            file, as_attachment=True, filename=name, content_type="application/x-ndjson"
        )

    def _warn_of(self, request: HttpRequest, incomplete: list[Transferred]) -> None:
        """Tell of runs that are not complete in a file, on the next page that is shown."""
        text = ngettext(
            "%(shown)s run in the file is not complete: %(run)s. %(reason)s",
            "%(shown)s runs in the file are not complete, the first one: %(run)s. %(reason)s",
            len(incomplete),
        )
        first = incomplete[0]
        reason = Truncator(first.reason).chars(_SHOWN_ERROR)
        shown = {"shown": _number(len(incomplete)), "run": first.run_id, "reason": reason}
        self.message_user(request, text % shown, messages.WARNING)

    def _too_much_to_export(self, request: HttpRequest) -> HttpResponse | None:
        text = ngettext(
            "At most %(shown)s run is exported here, and for %(seconds)s seconds. Select fewer "
            "runs, or export them with manage.py export_runs.",
            "At most %(shown)s runs are exported here, and for %(seconds)s seconds. Select fewer "
            "runs, or export them with manage.py export_runs.",
            MAX_RUNS,
        )
        shown = {"shown": _number(MAX_RUNS), "seconds": f"{MAX_SECONDS:g}"}
        self.message_user(request, text % shown, messages.ERROR)
        return self._back(request)

    def _fork(
        self,
        request: HttpRequest,
        runs: QuerySet[WorkflowRun],
        action: RunAction,
        progress: Progress,
    ) -> HttpResponse | None:
        """Fork the run, and go to the page of the fork."""
        parent, step = runs.filter(pk=progress.run_id).first(), action.cleaned_data["step"]
        try:
            if parent is None:
                raise RunNotFoundError(progress.run_id)
            fork = fork_run(parent.pk, step, backend=self.store_of(runs))
        except StepNotFoundError:
            action.add_error("step", _("The run has no state of this step."))
            return self._page(request, runs, action, progress)
        except StorageError as exc:
            self.message_user(request, str(exc), messages.ERROR)
            return self._back(request)
        values = {"run": parent.pk, "fork": fork.pk, "step": step}
        self.log_addition(request, fork, _("Forked from %(run)s at step %(step)s.") % values)
        self.log_change(request, parent, _("Forked at step %(step)s: %(fork)s.") % values)
        text = _("This is the fork of %(run)s from step %(step)s. Resume it to go on.") % values
        self.message_user(request, text, messages.SUCCESS)
        return HttpResponseRedirect(self._url("change", quote(fork.pk)))

    def _page(
        self,
        request: HttpRequest,
        runs: QuerySet[WorkflowRun],
        action: RunAction,
        progress: Progress,
    ) -> HttpResponse:
        """Return the page that asks, or that tells how far it is and offers to go on."""
        left = progress.rest_of(runs)
        count = _counted(left)
        shown = [] if progress.has_begun else list(left[:SHOWN])
        selected = request.POST.getlist(ACTION_CHECKBOX_NAME)
        is_across = _is_across(request)
        back = self._page_of_run(request)
        request.current_app = self.admin_site.name
        context = {
            **self.admin_site.each_context(request),
            "title": action.label,
            "subtitle": None,
            "opts": self.opts,
            "media": self.media,
            "action": action,
            "fieldsets": action.fieldsets(),
            "how_many": self._how_many(count, is_across=is_across),
            "has_begun": progress.has_begun,
            "so_far": progress.sentences(action) if progress.has_begun else [],
            "runs": [(self._url("change", quote(run.pk)), run, status_badge(run)) for run in shown],
            "more": count > len(shown),
            "states": self._states_of(shown) if action.loses and count == len(shown) else "",
            "hidden": [
                ("action", action.name_of_action),
                ("index", "0"),
                ("select_across", "1" if is_across else "0"),
                # Of all that match, one stands for them: Django wants one to be selected.
                *((ACTION_CHECKBOX_NAME, pk) for pk in selected[: 1 if is_across else None]),
                ("confirmed", "yes"),
                ("progress", progress.signed(type(action))),
                *([("from_run", "1")] if back else []),
            ],
            "back": back or request.get_full_path(),
        }
        return TemplateResponse(request, self.action_template, context)

    def _how_many(self, count: int, *, is_across: bool) -> str:
        if is_across:
            text = ngettext(
                "%(shown)s run that matches the filters",
                "%(shown)s runs that match the filters",
                count,
            )
        else:
            text = ngettext("%(shown)s selected run", "%(shown)s selected runs", count)
        return text % {"shown": _number(count)}

    def _states_of(self, runs: list[WorkflowRun]) -> str:
        """Return how many states some runs have."""
        if not runs:
            return ""
        count = _counted(
            ExecutionState.objects.using(runs[0]._state.db).filter(
                run_id__in=[run.pk for run in runs]
            )
        )
        text = ngettext("%(shown)s state in all", "%(shown)s states in all", count)
        return text % {"shown": _number(count)}

    def _back(self, request: HttpRequest) -> HttpResponse | None:
        """Return to the page of the run that the user came from; None for the list."""
        url = self._page_of_run(request)
        return HttpResponseRedirect(url) if url else None

    def _page_of_run(self, request: HttpRequest) -> str | None:
        """Return the page of the run that the user came from, if it was one."""
        selected = request.POST.getlist(ACTION_CHECKBOX_NAME)
        if "from_run" not in request.POST or len(selected) != 1:
            return None
        return self._url("change", quote(selected[0]))

    def _url(self, page: str, *args: Any) -> str:
        name = f"{self.opts.app_label}_{self.opts.model_name}_{page}"
        return reverse(f"{self.admin_site.name}:{name}", args=args)


def _written(source: StorageBackend, path: Path) -> list[Transferred] | None:
    """Write the runs of a store to a file; None if that takes too long.

    Raises:
        StorageError: if the file cannot be written, or the store does not answer.
    """
    deadline = time.monotonic() + MAX_SECONDS
    written = []
    for one in export_runs(source, path):
        if time.monotonic() > deadline:
            return None
        written.append(one)
    return written


def _is_across(request: HttpRequest) -> bool:
    """Whether all that match are meant, as Django reads it."""
    return bool(forms.BooleanField(required=False).to_python(request.POST.get("select_across")))


def _counted(rows: QuerySet[Any]) -> int:
    """Count rows, but no further than one more than `COUNTED`."""
    return rows.order_by().values("pk")[: COUNTED + 1].count()


def _number(count: int) -> str:
    """Return a number as it was counted by `_counted`."""
    text = number_format(min(count, COUNTED), force_grouping=True)
    return f"{text}+" if count > COUNTED else text


def _said(text: Any, count: int) -> str:
    said: str = text % {"count": count, "shown": number_format(count, force_grouping=True)}
    return said


def _salt(action: type[RunAction]) -> str:
    """Let a page confirm the action only that it was made for."""
    return f"workflow_storage.admin.actions.{action.name_of_action}"

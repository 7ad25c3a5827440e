"""What can be done to a run in the admin: each action asks for something, and does it to one run.

Each is a form. `RunActions` shows it on a page of its own, and does it run by run.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar

from django import forms
from django.contrib.admin.helpers import AdminForm
from django.contrib.admin.widgets import (
    AdminIntegerFieldWidget,
    AdminTextareaWidget,
    AdminTextInputWidget,
)
from django.utils.html import escape
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy, ngettext, ngettext_lazy, pgettext_lazy

from workflow_storage.admin.masking import MASKED, mask_for_all
from workflow_storage.status import RunStatus
from workflow_storage.validation import MAX_COUNT, MAX_LABEL_NAME, MAX_LABEL_VALUE

if TYPE_CHECKING:
    from workflow_storage.base import StorageBackend
    from workflow_storage.models import WorkflowRun

MAX_REASON = 2000
"""Characters of a reason."""

OPEN = frozenset({RunStatus.PENDING, RunStatus.RUNNING})
"""The statuses of runs that can be ended."""


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
    label = pgettext_lazy("a run", "Cancel")
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
        # Of a secret, that would tell what it is.
        if run.labels.get(name) == value and not mask_for_all().hides(name):
            return Outcome.UNCHANGED, ""
        store.runs.update(run.id, add_labels={name: value})
        return Outcome.DONE, _("Added the label %(label)s.") % {"label": _logged(name, value)}


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
        label = _logged(name, run.labels[name])
        return Outcome.DONE, _("Removed the label %(label)s.") % {"label": label}


def _logged(name: str, value: str) -> str:
    """Return a label as the admin's log has it, which those may read who see no secrets."""
    return f"{name}={MASKED if mask_for_all().hides(name) else value}"


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

"""Lets users act on runs in the admin: asked for on a page of its own, then done run by run.

`RunActions` gives the list of runs its actions, which are in `run_actions`. A request does so much in
so much time; what is left is done by the next one, from where this one stopped.
"""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, cast

from django import forms
from django.contrib import admin, messages
from django.contrib.admin.helpers import ACTION_CHECKBOX_NAME
from django.contrib.admin.utils import quote
from django.core.exceptions import BadRequest, PermissionDenied
from django.http import FileResponse, HttpResponseRedirect
from django.template.response import TemplateResponse
from django.urls import reverse
from django.utils import timezone
from django.utils.text import Truncator
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy, ngettext

from workflow_storage.admin.chosen import RunsOfDatabase, RunsOfStore, counted_text
from workflow_storage.admin.export import exported
from workflow_storage.admin.masking import PERMISSION as VIEW_SECRETS
from workflow_storage.admin.progress import Progress
from workflow_storage.admin.rendering import count_text, status_badge
from workflow_storage.admin.run_actions import (
    RUN_ACTIONS,
    AddLabel,
    CancelRuns,
    DeleteRuns,
    ExportRuns,
    FailRuns,
    ForkRun,
    Outcome,
    PruneStates,
    RemoveLabel,
)
from workflow_storage.admin.selection import selection_of
from workflow_storage.exceptions import (
    RunNotFoundError,
    StatusConflictError,
    StepNotFoundError,
    StorageError,
    StorageUnavailableError,
)
from workflow_storage.factory import create_storage_backend
from workflow_storage.transfer import fork_run

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import timedelta

    from django.db.models import QuerySet
    from django.http import HttpRequest, HttpResponse

    from workflow_storage.admin.chosen import ChosenRuns
    from workflow_storage.admin.masking import Mask
    from workflow_storage.admin.run_actions import RunAction
    from workflow_storage.base import StorageBackend
    from workflow_storage.models import WorkflowRun
    from workflow_storage.transfer import Transferred

MAX_RUNS = 500
"""Runs that one request changes, or exports."""

MAX_PARTS = 20
"""Files that an export offers, with so many runs each."""

MAX_SECONDS = 10.0
"""Seconds after which a request begins with no further run."""

SHOWN = 20
"""Runs that are listed before anything is done to them."""

_SHOWN_ERROR = 300  # a message can be kept in a cookie


_RUNS, _STATES = (
    [f"workflow_storage.{verb}_{model}" for verb in ("view", "change")]
    for model in ("workflowrun", "executionstate")
)
NEEDED: dict[str, list[list[str]]] = {
    "change": [["workflow_storage.change_workflowrun"]],
    "delete": [["workflow_storage.delete_workflowrun"]],
    # It makes a run and leaves the other one as it is; the page that asks names steps and nodes.
    "fork": [["workflow_storage.add_workflowrun"], _STATES],
    # States are exported as they are stored, whatever pages mask.
    "export": [_RUNS, _STATES, [VIEW_SECRETS]],
}
"""What a user may do, and the permissions for it: of each list one."""


class ActionForm(NamedTuple):
    """What a button for one action and one run posts, together with the CSRF token."""

    label: str
    action: str
    url: str
    hidden: list[tuple[str, str]]
    """Names and values of the hidden fields."""
    loses: bool
    """Whether something is lost, once it is confirmed."""


_NOT_ALL = gettext_lazy(
    "Nothing was done: a filter in the address was left out, so more runs would match than are meant."
)
_NOTHING_LEFT = gettext_lazy("Nothing is left of what was selected.")


class RunActions(admin.ModelAdmin):  # type: ignore[type-arg]
    """Gives an admin of runs its actions, also if its forms change nothing.

    They are carried out where the listed runs are: in the store of the database that `get_queryset`
    reads from (see `store_of`), or in the project's own store if that is no database.
    """

    stalled_after: ClassVar[timedelta]

    if TYPE_CHECKING:

        @property
        def store(self) -> StorageBackend: ...

        def mask(self, request: HttpRequest) -> Mask: ...

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
        runs = self.chosen_runs(request, queryset)
        chosen = runs.newest(2)
        if len(chosen) != 1:
            text = _("Select one run to fork.") if chosen else _NOTHING_LEFT
            self.message_user(request, text, messages.WARNING)
            return None
        steps = runs.first_and_last_step(chosen[0].pk)
        if not steps:
            text = _("The run has no states, so there is no step to fork it from.")
            self.message_user(request, text, messages.WARNING)
            return self._back(request)
        first, newest = steps
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

    def chosen_runs(self, request: HttpRequest, queryset: QuerySet[Any]) -> ChosenRuns:
        """Return the runs that an action was chosen for, as Django gives them to it."""
        if self.store.alias is not None:
            return RunsOfDatabase(self.store_of(queryset), queryset)
        changelist: Any = self.get_changelist_instance(request)
        ids = changelist.searched_ids
        if not _is_across(request):
            ids = request.POST.getlist(ACTION_CHECKBOX_NAME)
        return RunsOfStore(self.store, changelist.selection, self.stalled_after, ids)

    def changelist_view(self, request: HttpRequest, extra_context: Any = None) -> Any:
        if _is_across(request) and ACTION_CHECKBOX_NAME not in request.POST:
            posted: Any = request.POST.copy()
            posted[ACTION_CHECKBOX_NAME] = ""  # Django wants one to be selected, and takes all
            request.POST = posted
        return super().changelist_view(request, extra_context)

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
        if _is_across(request) and not self._understands_all(request):
            self.message_user(request, _NOT_ALL, messages.ERROR)
            return None
        runs = self.chosen_runs(request, queryset)
        progress = Progress.posted(request, action)
        newest = [] if progress else runs.newest(1)
        if progress is None and newest:
            progress = Progress(timezone.now(), newest[0].started_at, newest[0].pk)
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

    def _understands_all(self, request: HttpRequest) -> bool:
        """Whether all filters in the address tell which runs are meant."""
        asked = selection_of(request.GET, self.mask(request))
        if self.store.alias is not None:
            return not asked.problems
        changelist: Any = self.get_changelist_instance(request)
        return not asked.problems and not changelist.needs_database

    def _do_to_each(
        self,
        request: HttpRequest,
        runs: ChosenRuns,
        action: RunAction,
        progress: Progress,
    ) -> HttpResponse | None:
        """Do it to the runs that are left, as far as one request may go."""
        if not progress.has_begun and not progress.counts:
            self._count_missing(request, runs, progress)
        deadline = time.monotonic() + MAX_SECONDS
        for run in itertools.islice(progress.each_of(runs), MAX_RUNS):
            try:
                self._do_to(request, run, action, runs.store, progress)
            except StorageUnavailableError as exc:
                self.message_user(request, str(exc), messages.ERROR)
                return self._page(request, runs, action, progress)
            progress.pass_by(run)
            if time.monotonic() > deadline:
                break
        if runs.left(progress.position, 1):
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

    def _count_missing(self, request: HttpRequest, runs: ChosenRuns, progress: Progress) -> None:
        """Count the selected runs that the list no longer has."""
        if _is_across(request):
            return
        selected = {*request.POST.getlist(ACTION_CHECKBOX_NAME)}
        chosen, there = runs.ids_of(selected)
        progress.count(Outcome.WENT_ON, len(selected & there - chosen))
        progress.count(Outcome.GONE, len(selected - there))

    def _export(
        self,
        request: HttpRequest,
        runs: ChosenRuns,
        action: RunAction,
        progress: Progress,
    ) -> Any:
        """Answer with a file of the runs, or of a part of them, unless that would take too long."""
        number = request.POST.get("part", "0")
        first = min(int(number) if number.isdecimal() else 0, MAX_PARTS - 1) * MAX_RUNS
        part = runs.left(progress.position, first + MAX_RUNS)[first:]
        chosen = {run.pk: run for run in part}
        try:
            found = exported(runs.store, chosen, MAX_SECONDS)
        except StorageError as exc:
            self.message_user(request, str(exc), messages.ERROR)
            return self._back(request)
        if found is None:
            return self._too_much_to_export(request)
        file, written = found
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
        shown = {"shown": counted_text(len(incomplete)), "run": first.run_id, "reason": reason}
        self.message_user(request, text % shown, messages.WARNING)

    def _too_much_to_export(self, request: HttpRequest) -> HttpResponse | None:
        text = ngettext(
            "This takes longer than %(seconds)s second. Select fewer runs, or export them with "
            "manage.py export_runs.",
            "This takes longer than %(seconds)s seconds. Select fewer runs, or export them with "
            "manage.py export_runs.",
            int(MAX_SECONDS),
        )
        self.message_user(request, text % {"seconds": f"{MAX_SECONDS:g}"}, messages.ERROR)
        return self._back(request)

    def _fork(
        self,
        request: HttpRequest,
        runs: ChosenRuns,
        action: RunAction,
        progress: Progress,
    ) -> HttpResponse | None:
        """Fork the run, and go to the page of the fork."""
        step = action.cleaned_data["step"]
        try:
            for parent in runs.left(progress.position, 1):
                fork = fork_run(parent.pk, step, backend=runs.store)
                break
            else:
                raise RunNotFoundError(progress.run_id)
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
        runs: ChosenRuns,
        action: RunAction,
        progress: Progress,
    ) -> HttpResponse:
        """Return the page that asks, or that tells how far it is and offers to go on."""
        count = runs.count_left(progress.position)
        shown = [] if progress.has_begun else runs.left(progress.position, SHOWN)
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
            "states": self._states_of(runs, shown) if action.loses and count == len(shown) else "",
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
            "parts": self._parts(runs, action, progress, count),
            "most": count_text(MAX_PARTS * MAX_RUNS) if isinstance(action, ExportRuns) else "",
            "back": back or request.get_full_path(),
        }
        return TemplateResponse(request, self.action_template, context)

    def _parts(
        self, runs: ChosenRuns, action: RunAction, progress: Progress, count: int
    ) -> list[tuple[int, str]]:
        """Return the parts of a file that would be too large, as numbers of runs."""
        if not isinstance(action, ExportRuns) or count <= MAX_RUNS:
            return []
        count = len(runs.left(progress.position, MAX_PARTS * MAX_RUNS))
        return [
            (part, f"{count_text(first + 1)}-{count_text(min(first + MAX_RUNS, count))}")
            for part, first in enumerate(range(0, count, MAX_RUNS))
        ]

    def _how_many(self, count: int, *, is_across: bool) -> str:
        if is_across:
            text = ngettext(
                "%(shown)s run that matches the filters",
                "%(shown)s runs that match the filters",
                count,
            )
        else:
            text = ngettext("%(shown)s selected run", "%(shown)s selected runs", count)
        return text % {"shown": counted_text(count)}

    def _states_of(self, runs: ChosenRuns, shown: list[WorkflowRun]) -> str:
        """Return how many states some runs have."""
        if not shown:
            return ""
        count = runs.count_states(shown)
        text = ngettext("%(shown)s state in all", "%(shown)s states in all", count)
        return text % {"shown": counted_text(count)}

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


def _is_across(request: HttpRequest) -> bool:
    """Whether all that match are meant, as Django reads it."""
    return bool(forms.BooleanField(required=False).to_python(request.POST.get("select_across")))

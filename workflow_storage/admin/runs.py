"""The runs in the admin: the list, and the page of a run."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar, cast

from django.contrib import admin
from django.contrib.admin.utils import quote, unquote
from django.urls import reverse
from django.utils import timezone
from django.utils.html import format_html
from django.utils.http import urlencode
from django.utils.translation import gettext_lazy as _

from workflow_storage.admin import selection
from workflow_storage.admin.actions import RunActions
from workflow_storage.admin.base import ReadOnlyAdmin
from workflow_storage.admin.charts import run_mark, strip
from workflow_storage.admin.filters import (
    AmountFilter,
    EndFilter,
    LabelFilter,
    SituationFilter,
    StatusFilter,
    TimeFilter,
    WorkflowFilter,
)
from workflow_storage.admin.overview import is_short
from workflow_storage.admin.rendering import (
    NOTHING,
    cost_text,
    count_text,
    first_line,
    labels_block,
    short_id,
    status_badge,
    time_ago,
    time_taken,
    tokens_text,
)
from workflow_storage.admin.run_actions import RUN_ACTIONS
from workflow_storage.admin.run_list import (
    PAGES,
    PRESETS,
    STARTED_TODAY,
    RunChangeList,
    StoreRunChangeList,
)
from workflow_storage.admin.run_page import RunPage
from workflow_storage.admin.run_views import RunViews
from workflow_storage.admin.sections import sections_of
from workflow_storage.admin.trees import json_tree
from workflow_storage.models import ExecutionState, WorkflowRun
from workflow_storage.status import RunStatus
from workflow_storage.validation import MAX_WORKFLOW_NAME, is_possible_id

if TYPE_CHECKING:
    from django.http import HttpRequest, HttpResponse, QueryDict
    from django.utils.safestring import SafeString

SHOWN_IN_STRIP = 100
"""Runs of the page that the strip above it shows."""

_PRESET_NAMES = {
    "all": _("All"),
    "failed_today": _("Failed today"),
    "running": _("Running"),
    "stalled": _("Stalled"),
    "waiting": _("Waiting"),
}


@admin.register(WorkflowRun)
class WorkflowRunAdmin(RunViews, RunActions, ReadOnlyAdmin):
    """Shows runs, newest first."""

    actions = tuple(RUN_ACTIONS)
    change_list_template = "admin/workflow_storage/run_list.html"
    change_form_template = "admin/workflow_storage/run.html"
    ordering = ("-started_at", "-id")
    longest_term = MAX_WORKFLOW_NAME
    payloads = ("config_snapshot", "inputs", "outputs", "error_message")
    list_display: Any = (
        "run",
        "status_badge",
        "started",
        "duration",
        "steps",
        "tokens",
        "cost",
    )
    list_display_links = None
    list_filter: ClassVar[Any] = (
        StatusFilter,
        TimeFilter,
        EndFilter,
        WorkflowFilter,
        LabelFilter,
        SituationFilter,
        AmountFilter,
    )
    search_fields = ("id", "workflow_name")
    search_help_text = _(
        "The beginning of an id or of a workflow's name, a label as name=value, or text of an error"
    )
    fieldsets: ClassVar[Any] = (
        (_("Payloads"), {"fields": ("inputs_json", "outputs_json", "config_json")}),
        (
            _("All fields"),
            {
                "classes": ("collapse",),
                "fields": (
                    "id",
                    "workflow_name",
                    "status",
                    "started_at",
                    "completed_at",
                    "duration",
                    "attempt",
                    "attempt_started_at",
                    "heartbeat_at",
                    "worker",
                    "tokens",
                    "cost",
                    "parent_id",
                    "forked_at",
                    "labels_text",
                ),
            },
        ),
    )
    readonly_fields: ClassVar[Any] = (
        "duration",
        "tokens",
        "cost",
        "forked_at",
        "labels_text",
        "inputs_json",
        "outputs_json",
        "config_json",
    )
    stalled_after: ClassVar[timedelta] = timedelta(minutes=15)
    """How long a running run can be silent before it is shown as stalled."""

    def get_changelist(self, request: HttpRequest, **kwargs: Any) -> type[RunChangeList]:
        return RunChangeList if self.store.alias is not None else StoreRunChangeList

    def changelist_view(self, request: HttpRequest, extra_context: Any = None) -> Any:
        presets = self._presets(request.GET)
        return super().changelist_view(request, {"presets": presets, **(extra_context or {})})

    def _presets(self, asked: QueryDict) -> list[dict[str, Any]]:
        """Return the views above the list; each keeps the order."""
        here = {name: asked[name] for name in _OF_PRESETS if asked.get(name)}
        order = {name: str(asked[name]) for name in (selection.ORDER,) if asked.get(name)}
        titles: dict[str, Any] = {
            "failed_today": _("Runs that have failed within the last 24 hours")
        }
        views = dict(PRESETS)
        if self.store.alias is None:
            views["failed_today"] = STARTED_TODAY
            titles["failed_today"] = _(
                "Runs that were started within the last 24 hours, and have failed"
            )
        return [
            {
                "name": _PRESET_NAMES[name],
                "title": titles.get(name, ""),
                "url": f"?{urlencode({**parameters, **order})}",
                "selected": here == parameters,
            }
            for name, parameters in views.items()
        ]

    def get_changelist_instance(self, request: HttpRequest) -> Any:
        changelist = super().get_changelist_instance(request)
        oldest_first = reversed(changelist.result_list[:SHOWN_IN_STRIP])
        marks = [run_mark(run, self.url_of(run.pk)) for run in oldest_first]
        changelist.strip = strip(marks, title=str(_("These runs"))) if marks else ""
        parameters = request.GET.copy()
        for name in PAGES:
            parameters.pop(name, None)
        changelist.overview_url = f"{self.view_url('overview')}?{parameters.urlencode()}"
        changelist.overview_at_once = is_short(changelist.selection)
        return changelist

    def found_object(
        self, request: HttpRequest, object_id: str, from_field: str | None = None
    ) -> Any:
        """Return the run with an id, from the store that is shown."""
        if self.store.alias is not None:
            return super().found_object(request, object_id, from_field)
        return self.store.runs.get(object_id) if is_possible_id(object_id) else None

    def change_view(
        self,
        request: HttpRequest,
        object_id: str,
        form_url: str = "",
        extra_context: dict[str, Any] | None = None,
    ) -> HttpResponse:
        run = self.get_object(request, unquote(object_id))
        if run is None or not self.has_view_or_change_permission(request, run):
            return super().change_view(request, object_id, form_url, extra_context)
        page = RunPage(self, request, run)
        context = {
            "title": str(run.workflow_name),
            "subtitle": None,
            "page": page,
            "sections": sections_of(request, self.admin_site, run),
            **(extra_context or {}),
        }
        return super().change_view(request, object_id, form_url, context)

    @admin.display(description=_("run"))
    def run(self, run: WorkflowRun) -> SafeString:
        """Show the workflow, the id and the labels."""
        url = self.url_of(run.pk)
        mask = self.viewer_of(run).mask
        links = {name: self._labelled(name, run) for name in run.labels if not mask.hides(name)}
        labels = labels_block(mask.masked(run.labels), links)
        return format_html(
            '<a class="workflow-storage-run" href="{}">{}</a> {}{}',
            url,
            run.workflow_name,
            short_id(run.pk),
            format_html('<div class="workflow-storage-labels">{}</div>', labels) if labels else "",
        )

    def _labelled(self, name: str, run: WorkflowRun) -> str:
        return f"?{urlencode({selection.LABEL: f'{name}={run.labels[name]}'})}"

    def url_of(self, run_id: str) -> str:
        """Return the address of the page of a run."""
        name = f"{self.admin_site.name}:workflow_storage_workflowrun_change"
        return reverse(name, args=[quote(run_id)])

    def states_url(self, run: WorkflowRun) -> str:
        """Return the address of the list of a run's states; nothing where there is none."""
        if not self.links_to(ExecutionState, run) or self.store.alias is None:
            return ""
        url = reverse(f"{self.admin_site.name}:workflow_storage_executionstate_changelist")
        return f"{url}?{urlencode({'run__id__exact': run.pk})}"

    @admin.display(description=_("status"))
    def status_badge(self, run: WorkflowRun) -> SafeString:
        """Show the status in its colour, and why and where a failed run failed."""
        badge = status_badge(run, self.mark_of(run))
        detail = self._detail(run)
        if not detail:
            return badge
        return format_html('{}<div class="workflow-storage-detail">{}</div>', badge, detail)

    def mark_of(self, run: WorkflowRun) -> str:
        """Return what is to be known beside the status of a run; nothing for the rule."""
        if run.status == RunStatus.PENDING and run.waiting_for is not None:
            return str(_("waiting"))
        if run.status != RunStatus.RUNNING:
            return ""
        newest = getattr(run, "newest_state_at", None)
        signs = (run.attempt_started_at or run.started_at, run.heartbeat_at, newest)
        last = max(sign for sign in signs if sign is not None)
        return str(_("stalled")) if last < timezone.now() - self.stalled_after else ""

    def _detail(self, run: WorkflowRun) -> str | SafeString:
        if run.status == RunStatus.PENDING and run.waiting_for is not None:
            return format_html("{}", run.waiting_for)
        if run.status != RunStatus.FAILED:
            return ""
        error = getattr(run, "error_start", None)
        if error is None:
            error = run.__dict__.get("error_message")
        line = first_line(error, 120, end=getattr(run, "error_end", None))
        if run.current_node and self.viewer_of(run).sees_states:
            return format_html("<b>{}</b> {}", run.current_node, line)
        return line

    @admin.display(description=_("started"))
    def started(self, run: WorkflowRun) -> SafeString | str:
        """Show how long ago the run was started."""
        return time_ago(run.started_at)

    @admin.display(description=_("duration"))
    def duration(self, run: WorkflowRun) -> str | SafeString:
        """Show how long the run took, or takes by now, and where it is."""
        text = time_taken(run)
        is_running = run.status == RunStatus.RUNNING
        if is_running and run.current_node and self.viewer_of(run).sees_states:
            return format_html(
                '{} <div class="workflow-storage-detail">{}</div>', text, run.current_node
            )
        return text

    @admin.display(description=_("steps"))
    def steps(self, run: WorkflowRun) -> str:
        """Show how many checkpoints the run has saved."""
        newest = getattr(run, "newest_step", None)
        return NOTHING if newest is None else count_text(newest + 1)

    @admin.display(description=_("tokens"))
    def tokens(self, run: WorkflowRun) -> str:
        """Show the tokens of all its nodes together."""
        return tokens_text(run.total_tokens)

    @admin.display(description=_("cost"))
    def cost(self, run: WorkflowRun) -> str:
        """Show the cost in US dollars."""
        return cost_text(run.total_cost_usd)

    @admin.display(description=_("forked from step"))
    def forked_at(self, run: WorkflowRun) -> str:
        """Show the step without separators, as everywhere."""
        return NOTHING if run.forked_from_step is None else str(run.forked_from_step)

    @admin.display(description=_("labels"))
    def labels_text(self, run: WorkflowRun) -> str:
        """Show the labels."""
        labels = self.viewer_of(run).mask.masked(run.labels)
        return ", ".join(f"{name}={value}" for name, value in labels.items()) or NOTHING

    @admin.display(description=_("inputs"))
    def inputs_json(self, run: WorkflowRun) -> SafeString | str:
        """Show the inputs."""
        return self._payload(run, "inputs")

    @admin.display(description=_("outputs"))
    def outputs_json(self, run: WorkflowRun) -> SafeString | str:
        """Show the outputs."""
        return self._payload(run, "outputs")

    @admin.display(description=_("configuration"))
    def config_json(self, run: WorkflowRun) -> SafeString | str:
        """Show the configuration."""
        return self._payload(run, "config_snapshot")

    def _payload(self, run: WorkflowRun, name: str) -> SafeString | str:
        value, field = getattr(run, name), cast("Any", self.opts.get_field(name))
        url = self.view_url("payload", run.pk, name)
        return json_tree(
            value, mask=self.viewer_of(run).mask, download_url=url, name=str(field.verbose_name)
        )


_OF_PRESETS = (
    selection.STATUS,
    selection.SINCE,
    selection.ENDED,
    selection.STALLED,
    selection.WAITING,
)

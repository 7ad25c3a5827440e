"""The runs in the admin: the list, and the page of a run with its states."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django.contrib import admin
from django.template.loader import render_to_string
from django.utils.translation import gettext_lazy as _

from workflow_storage.admin.base import ReadOnlyAdmin
from workflow_storage.admin.rendering import (
    cost_text,
    duration_text,
    json_block,
    status_badge,
    text_block,
    tokens_text,
)
from workflow_storage.models import ExecutionState, WorkflowRun
from workflow_storage.validation import MAX_WORKFLOW_NAME

if TYPE_CHECKING:
    from django.db.models import QuerySet
    from django.utils.safestring import SafeString

SHOWN_STATES = 200
"""States that the page of a run lists; the list of states has them all."""


@admin.register(WorkflowRun)
class WorkflowRunAdmin(ReadOnlyAdmin):
    """Shows runs, newest first."""

    ordering = ("-started_at", "-id")
    longest_term = MAX_WORKFLOW_NAME
    payloads = ("config_snapshot", "inputs", "outputs", "error_message")
    list_display = (
        "id",
        "workflow_name",
        "status_badge",
        "started_at",
        "duration",
        "tokens",
        "cost",
    )
    list_display_links = ("id", "workflow_name")
    list_filter = ("status", "started_at")
    search_fields = ("id", "workflow_name")
    search_help_text = _("The whole id of a run, or the whole name of a workflow")
    fieldsets = (
        (None, {"fields": ("id", "workflow_name", "status_badge")}),
        (
            _("Result"),
            {
                "fields": (
                    "started_at",
                    "completed_at",
                    "duration",
                    "heartbeat_at",
                    "tokens",
                    "cost",
                    "error",
                )
            },
        ),
        (_("Payloads"), {"fields": ("inputs_json", "outputs_json", "config_json")}),
        (_("States"), {"fields": ("states_table",), "classes": ("wide",)}),
    )
    readonly_fields = (
        "status_badge",
        "duration",
        "tokens",
        "cost",
        "error",
        "inputs_json",
        "outputs_json",
        "config_json",
        "states_table",
    )

    def rows_found(self, queryset: QuerySet[Any], term: str) -> QuerySet[Any]:
        """Return the run with that id, or the runs of the workflow with that name."""
        by_id = queryset.filter(pk=term)
        return by_id if by_id.exists() else queryset.filter(workflow_name=term)

    @admin.display(description=_("status"))
    def status_badge(self, run: WorkflowRun) -> SafeString:
        """Show the status in its colour."""
        return status_badge(run)

    @admin.display(description=_("duration"))
    def duration(self, run: WorkflowRun) -> str:
        """Show how long the run took."""
        return duration_text(run.duration_seconds)

    @admin.display(description=_("tokens"))
    def tokens(self, run: WorkflowRun) -> str:
        """Show the tokens of all its nodes together."""
        return tokens_text(run.total_tokens)

    @admin.display(description=_("cost"))
    def cost(self, run: WorkflowRun) -> str:
        """Show the cost in US dollars."""
        return cost_text(run.total_cost_usd)

    @admin.display(description=_("error"))
    def error(self, run: WorkflowRun) -> SafeString | str:
        """Show the error with its line breaks."""
        return text_block(run.error_message)

    @admin.display(description=_("inputs"))
    def inputs_json(self, run: WorkflowRun) -> SafeString | str:
        """Show the inputs."""
        return json_block(run.inputs)

    @admin.display(description=_("outputs"))
    def outputs_json(self, run: WorkflowRun) -> SafeString | str:
        """Show the outputs."""
        return json_block(run.outputs)

    @admin.display(description=_("configuration"))
    def config_json(self, run: WorkflowRun) -> SafeString | str:
        """Show the configuration."""
        return json_block(run.config_snapshot)

    @admin.display(description=_("states"))
    def states_table(self, run: WorkflowRun) -> SafeString:
        """Show the first states in their order, and a link to all."""
        states = list(
            ExecutionState.objects.using(run._state.db)
            .filter(run_id=run.pk)
            .only("id", "step", "node_id", "created_at")
            .order_by("step")[: SHOWN_STATES + 1]
        )
        return render_to_string(
            "admin/workflow_storage/states_table.html",
            {
                "run": run,
                "states": states[:SHOWN_STATES],
                "more": len(states) > SHOWN_STATES,
                "site": self.admin_site.name,
                "links": self.links_to(ExecutionState, run),
            },
        )

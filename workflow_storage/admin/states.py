"""The execution states in the admin: the list, of a run or of all, and the page of a state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django.contrib import admin
from django.contrib.admin.utils import quote
from django.urls import reverse
from django.utils.html import format_html
from django.utils.translation import gettext_lazy as _

from workflow_storage.admin.base import ReadOnlyAdmin
from workflow_storage.admin.rendering import json_block
from workflow_storage.models import ExecutionState, WorkflowRun

if TYPE_CHECKING:
    from django.db.models import QuerySet
    from django.utils.safestring import SafeString


@admin.register(ExecutionState)
class ExecutionStateAdmin(ReadOnlyAdmin):
    """Shows states, newest first."""

    ordering = ("-id",)
    payloads = ("state_json", "state_delta")
    list_display = ("id", "run_id", "step", "node_id", "created_at")
    search_fields = ("run__id",)
    search_help_text = _("The whole id of a run")
    fields = ("run_link", "step", "node_id", "created_at", "state")
    readonly_fields = ("run_link", "state")

    def rows_found(self, queryset: QuerySet[Any], term: str) -> QuerySet[Any]:
        """Return the states of the run with that id, newest step first."""
        return queryset.filter(run_id=term)

    def lookup_allowed(self, lookup: str, value: str, request: Any = None) -> bool:
        """Let the page of a run link to its states."""
        return lookup == "run__id__exact" or super().lookup_allowed(lookup, value, request)

    @admin.display(description=_("workflow run"))
    def run_link(self, state: ExecutionState) -> SafeString | str:
        """Link to the page of the run, if there is one for this user."""
        if not self.links_to(WorkflowRun, state):
            return str(state.run_id)
        url = reverse(
            f"{self.admin_site.name}:workflow_storage_workflowrun_change",
            args=[quote(state.run_id)],
        )
        return format_html('<a href="{}">{}</a>', url, state.run_id)

    @admin.display(description=_("state"))
    def state(self, state: ExecutionState) -> SafeString | str:
        """Show the state, however it is stored."""
        return json_block(state.state_data)

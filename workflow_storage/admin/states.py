"""The execution states in the admin: the list, of a run or of all, and the page of a state."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from django.contrib import admin
from django.contrib.admin.utils import quote
from django.db.models import F, Func, IntegerField
from django.db.models.functions import Coalesce
from django.urls import NoReverseMatch, reverse
from django.utils.html import format_html
from django.utils.translation import gettext_lazy as _

from workflow_storage.admin.base import ReadOnlyAdmin
from workflow_storage.admin.rendering import (
    NOTHING,
    cost_text,
    count_text,
    duration_text,
    short_id,
    tokens_text,
)
from workflow_storage.admin.trees import json_tree
from workflow_storage.exceptions import DamagedStateError
from workflow_storage.factory import create_storage_backend
from workflow_storage.models import ExecutionState, WorkflowRun
from workflow_storage.validation import is_possible_id

if TYPE_CHECKING:
    from django.db.models import QuerySet
    from django.http import HttpRequest
    from django.utils.safestring import SafeString


OF_RUN = "run__id__exact"
"""The parameter of the address that names the run whose states are listed."""


class _Bytes(Func):
    """How many bytes a column holds, without reading them where the database can tell."""

    function = "OCTET_LENGTH"
    output_field = IntegerField()

    def as_sqlite(self, compiler: Any, connection: Any, **_: Any) -> Any:
        template = "LENGTH(CAST(%(expressions)s AS BLOB))"
        return self.as_sql(compiler, connection, template=template)


@admin.register(ExecutionState)
class ExecutionStateAdmin(ReadOnlyAdmin):
    """Shows states, newest first."""

    change_list_template = "admin/workflow_storage/state_list.html"
    ordering = ("-id",)
    payloads = ("state_json", "state_delta")
    list_display = (
        "number",
        "of_run",
        "at_step",
        "node_id",
        "created_at",
        "duration",
        "tokens_used",
        "cost",
        "size",
    )
    search_fields = ("run__id",)
    search_help_text = _("The whole id of a run")
    fields = (
        "run_link",
        "at_step",
        "node_id",
        "created_at",
        "duration",
        "tokens_used",
        "cost",
        "state",
    )
    readonly_fields = ("run_link", "at_step", "duration", "tokens_used", "cost", "state")

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        states = super().get_queryset(request)
        if create_storage_backend().alias is None:
            # They would be of other runs, if there are any.
            return states.none()
        sized: QuerySet[Any] = states.annotate(
            workflow=F("run__workflow_name"),
            stored_size=Coalesce(_Bytes("state_json"), _Bytes("state_delta")),
        )
        return sized

    def rows_found(self, queryset: QuerySet[Any], term: str) -> QuerySet[Any]:
        """Return the states of the run with that id, newest step first."""
        return queryset.filter(run_id=term)

    def get_changelist_instance(self, request: HttpRequest) -> Any:
        changelist = super().get_changelist_instance(request)
        run_id = request.GET.get(OF_RUN, "")
        changelist.jump_url = None
        changelist.note = ""
        store = create_storage_backend()
        if store.alias is None:
            changelist.note = _("States of runs in %(store)s are on the pages of their runs.") % {
                "store": store.name
            }
        if is_possible_id(run_id) and WorkflowRun in self.viewer(request).linked:
            changelist.jump_url = self._page_of_runs("states", run_id)
        return changelist

    def lookup_allowed(self, lookup: str, value: str, request: Any = None) -> bool:
        """Let the page of a run link to its states."""
        return lookup == OF_RUN or super().lookup_allowed(lookup, value, request)

    @admin.display(description=_("id"))
    def number(self, state: ExecutionState) -> str:
        """Show the id as it stands in addresses, without separators."""
        return str(state.pk)

    @admin.display(description=_("run"))
    def of_run(self, state: ExecutionState) -> SafeString | str:
        """Show the workflow and the run, as a link to its page."""
        workflow = getattr(state, "workflow", "")
        if not self.links_to(WorkflowRun, state):
            return format_html("{} {}", workflow, short_id(state.run_id))
        return format_html(
            '<a href="{}">{}</a> {}', self._page_of(state), workflow, short_id(state.run_id)
        )

    @admin.display(description=_("step"))
    def at_step(self, state: ExecutionState) -> SafeString | str:
        """Show the step, as a link to the state there, and what changed in it."""
        url = self._page_of_runs("state", state.run_id, state.step)
        if url is None or not self.links_to(WorkflowRun, state):
            return str(state.step)
        return format_html('<a href="{}">{}</a>', url, state.step)

    @admin.display(description=_("duration"))
    def duration(self, state: ExecutionState) -> str:
        """Show how long the node took."""
        return duration_text(state.duration_seconds)

    @admin.display(description=_("tokens"))
    def tokens_used(self, state: ExecutionState) -> str:
        """Show the tokens of the node."""
        return tokens_text(state.tokens)

    @admin.display(description=_("cost"))
    def cost(self, state: ExecutionState) -> str:
        """Show the cost of the node in US dollars."""
        return cost_text(state.cost_usd)

    @admin.display(description=_("bytes stored"))
    def size(self, state: ExecutionState) -> str:
        """Show how many bytes the state takes as it is stored, whole or as a difference."""
        size = getattr(state, "stored_size", None)
        return NOTHING if size is None else count_text(size)

    def _page_of_runs(self, page: str, run_id: str, *args: Any) -> str | None:
        """Return the address of a page that `WorkflowRunAdmin` adds; None where another is used."""
        with suppress(NoReverseMatch):
            name = f"{self.admin_site.name}:workflow_storage_run_{page}"
            return reverse(name, args=[quote(run_id), *args])
        return None

    def _page_of(self, state: ExecutionState) -> str:
        name = f"{self.admin_site.name}:workflow_storage_workflowrun_change"
        return reverse(name, args=[quote(state.run_id)])

    @admin.display(description=_("workflow run"))
    def run_link(self, state: ExecutionState) -> SafeString | str:
        """Link to the page of the run, if there is one for this user."""
        if not self.links_to(WorkflowRun, state):
            return str(state.run_id)
        return format_html('<a href="{}">{}</a>', self._page_of(state), state.run_id)

    @admin.display(description=_("state"))
    def state(self, state: ExecutionState) -> SafeString | str:
        """Show the state, however it is stored."""
        try:
            data = state.state_data
        except DamagedStateError as exc:
            return str(exc)
        return json_tree(data, mask=self.viewer_of(state).mask, name=str(_("state")))

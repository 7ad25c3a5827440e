"""The threads of graphs in the admin: the list, a thread with its forks, and a checkpoint."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, NamedTuple

from django.contrib import admin
from django.contrib.admin.utils import quote
from django.core.exceptions import PermissionDenied
from django.db import DatabaseError, connections
from django.db.models import OuterRef, Subquery
from django.http import Http404
from django.template.loader import render_to_string
from django.template.response import TemplateResponse
from django.urls import path, reverse
from django.utils.html import format_html
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy

from workflow_storage.admin.base import ReadOnlyAdmin
from workflow_storage.admin.diffs import diff_block
from workflow_storage.admin.rendering import (
    NOTHING,
    exact_time,
    printable,
    short_id,
    status_badge,
    time_ago,
)
from workflow_storage.admin.sections import register_section
from workflow_storage.admin.trees import json_tree
from workflow_storage.backends.orm.causes import Cause
from workflow_storage.backends.orm.dialects import cause_of
from workflow_storage.contrib.langgraph.models import GraphCheckpoint, ThreadNamespace
from workflow_storage.contrib.langgraph.names import ThreadName, digest
from workflow_storage.contrib.langgraph.trees import Node, Place, tree
from workflow_storage.factory import configured_alias, create_storage_backend
from workflow_storage.models import WorkflowRun

if TYPE_CHECKING:
    from collections.abc import Iterable

    from django.contrib.admin import AdminSite
    from django.db.models import QuerySet
    from django.http import HttpRequest, HttpResponse
    from django.utils.safestring import SafeString

    from workflow_storage.admin.masking import Mask
    from workflow_storage.contrib.langgraph.rows import Found

logger = logging.getLogger(__name__)

SHOWN = 500
"""Checkpoints that the page of a thread shows of its own namespace, the newest ones."""

SHOWN_OF_OTHERS = 50
"""Checkpoints that it shows of each other namespace."""

SHOWN_SPACES = 20
"""Other namespaces that it shows, the newest ones: there is one for each call of a subgraph."""

SHOWN_IN_RUN = 20
"""Checkpoints that the page of a run shows, the newest ones."""

_LARGEST_KEY = (1 << 63) - 1

_CHECKPOINT = "workflow_storage_langgraph_checkpoint"
_OF_NODE = ("pk", "checkpoint_id", "parent_checkpoint_id", "created_at", "run_id", "metadata")


class Line(NamedTuple):
    """A checkpoint in the tree, as the page shows it."""

    place: Place
    indents: range
    url: str
    run: SafeString | str
    saved: SafeString | str


class Space(NamedTuple):
    """A namespace of a thread, as its page shows it."""

    name: str
    lines: list[Line]
    is_cut: bool


@admin.register(ThreadNamespace)
class ThreadAdmin(ReadOnlyAdmin):
    """Shows threads, the newest first."""

    change_form_template = "admin/workflow_storage_langgraph/thread.html"
    ordering = ("-id",)
    longest_term = 2000
    list_display = ("thread", "space", "newest", "run")
    list_display_links = None
    search_fields = ("thread_id",)
    search_help_text = gettext_lazy("The whole id of a thread")
    fields = ()

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        newest = GraphCheckpoint.objects.filter(thread=OuterRef("pk")).order_by("-checkpoint_id")
        rows: QuerySet[Any] = (
            super()
            .get_queryset(request)
            .annotate(
                newest_at=Subquery(newest.values("created_at")[:1]),
                newest_run=Subquery(newest.values("run_id")[:1]),
            )
        )
        return rows

    def rows_found(self, queryset: QuerySet[Any], term: str) -> QuerySet[Any]:
        """Return the namespaces of the thread with that id."""
        return queryset.filter(thread_key=digest(term))

    @admin.display(description=gettext_lazy("thread"))
    def thread(self, row: ThreadNamespace) -> SafeString:
        """Show the id, as a link to the page of the thread."""
        return format_html('<a href="{}">{}</a>', _thread_url(self.admin_site, row), _name(row))

    @admin.display(description=gettext_lazy("namespace"))
    def space(self, row: ThreadNamespace) -> str:
        """Show which graph it is of; nothing for the root."""
        return printable(row.namespace[:100]) or NOTHING

    @admin.display(description=gettext_lazy("newest checkpoint"))
    def newest(self, row: Any) -> SafeString | str:
        """Show how long ago the newest checkpoint was saved."""
        return time_ago(row.newest_at)

    @admin.display(description=gettext_lazy("workflow run"))
    def run(self, row: Any) -> SafeString | str:
        """Show the run of the newest checkpoint."""
        if row.newest_run is None:
            return NOTHING
        if not self.links_to(WorkflowRun, row):
            return short_id(row.newest_run)
        return _run_link(self.admin_site, row.newest_run)

    def get_urls(self) -> list[Any]:
        """Return the address of the page of a checkpoint, and those that Django has."""
        view = self.admin_site.admin_view(self.checkpoint_view)
        return [path("checkpoint/<int:pk>/", view, name=_CHECKPOINT), *super().get_urls()]

    def change_view(
        self,
        request: HttpRequest,
        object_id: str,
        form_url: str = "",
        extra_context: dict[str, Any] | None = None,
    ) -> HttpResponse:
        thread = self.get_object(request, object_id)
        if thread is None or not self.has_view_or_change_permission(request, thread):
            return super().change_view(request, object_id, form_url, extra_context)
        shown, are_cut = self._shown(thread)
        spaces, runs = self._spaces(request, thread, shown)
        context = {
            "title": _name(thread),
            "subtitle": None,
            "spaces": spaces,
            "are_cut": are_cut,
            "runs": runs,
            **(extra_context or {}),
        }
        return super().change_view(request, object_id, form_url, context)

    def _shown(self, thread: ThreadNamespace) -> tuple[list[ThreadNamespace], bool]:
        """Return the namespaces that a page shows, the root first; and whether there are more."""
        rows = ThreadNamespace.objects.using(configured_alias())
        root = rows.filter(key=ThreadName(thread.thread_id, "").key).exclude(pk=thread.pk)
        always = [*root, thread]
        others = rows.filter(thread_key=thread.thread_key)
        others = others.exclude(pk__in=[row.pk for row in always]).order_by("-pk")
        newest = list(others[: SHOWN_SPACES + 1])
        shown = sorted(
            [*always, *newest[:SHOWN_SPACES]], key=lambda row: (row.namespace != "", row.pk)
        )
        return shown, len(newest) > SHOWN_SPACES

    def _spaces(
        self, request: HttpRequest, thread: ThreadNamespace, shown: Iterable[ThreadNamespace]
    ) -> tuple[list[Space], list[tuple[SafeString, SafeString]]]:
        """Return namespaces of a thread, and the runs that made their checkpoints."""
        links_runs = WorkflowRun in self.viewer(request).linked
        opens = request.user.has_perm("workflow_storage_langgraph.view_graphcheckpoint")
        spaces, run_ids = [], []
        for row in shown:
            limit = SHOWN if row.pk == thread.pk else SHOWN_OF_OTHERS
            nodes = _nodes(_checkpoints().filter(thread=row).order_by("-checkpoint_id"), limit + 1)
            lines = []
            for place in tree(nodes[:limit]):
                run_id = place.node.run_id
                run: SafeString | str = NOTHING
                if run_id is not None:
                    run_ids.append(run_id)
                    run = _run_link(self.admin_site, run_id) if links_runs else short_id(run_id)
                url = _checkpoint_url(self.admin_site, place.node.pk) if opens else ""
                saved = time_ago(place.node.created_at)
                indents = range(place.branch - place.is_fork)
                lines.append(Line(place, indents, url, run, saved))
            spaces.append(Space(printable(row.namespace), lines, len(nodes) > limit))
        return spaces, self._runs(run_ids) if links_runs else []

    def _runs(self, run_ids: Iterable[str]) -> list[tuple[SafeString, SafeString]]:
        """Return a link to each run that is still there, and its status, the newest first."""
        runs = create_storage_backend().runs
        newest = list(dict.fromkeys(reversed(list(run_ids))))[:SHOWN_IN_RUN]
        found = [run for run in map(runs.get, newest) if run is not None]
        return [
            (
                format_html(
                    '<a href="{}">{}</a> {}',
                    _run_url(self.admin_site, run.pk),
                    run.workflow_name,
                    short_id(run.pk),
                ),
                status_badge(run),
            )
            for run in found
        ]

    def checkpoint_view(self, request: HttpRequest, pk: int) -> HttpResponse:
        """Show the values of a checkpoint, and what changed in them."""
        if not self.has_view_or_change_permission(request) or not request.user.has_perm(
            "workflow_storage_langgraph.view_graphcheckpoint"
        ):
            raise PermissionDenied
        found = _found(pk) if pk <= _LARGEST_KEY else None
        if found is None:
            raise Http404(_("There is no such checkpoint."))
        row, mask = found.row, self.mask(request)
        siblings = _checkpoints().filter(thread=row.thread)
        parent_pk = (
            siblings.filter(checkpoint_id=row.parent_checkpoint_id)
            .values_list("pk", flat=True)
            .first()
            if row.parent_checkpoint_id
            else None
        )
        children = siblings.filter(parent_checkpoint_id=row.checkpoint_id)
        context = {
            **self.admin_site.each_context(request),
            "opts": ThreadNamespace._meta,
            "title": _("Checkpoint %(checkpoint)s") % {"checkpoint": row.checkpoint_id},
            "media": self.media,
            "row": row,
            "saved": exact_time(row.created_at),
            "thread": _name(row.thread),
            "thread_url": _thread_url(self.admin_site, row.thread),
            "list_url": reverse(
                f"{self.admin_site.name}:workflow_storage_langgraph_threadnamespace_changelist"
            ),
            "run": _run_link(self.admin_site, row.run_id)
            if row.run_id and WorkflowRun in self.viewer(request).linked
            else row.run_id,
            "parent_url": parent_pk and _checkpoint_url(self.admin_site, parent_pk),
            "children": [
                _checkpoint_url(self.admin_site, key)
                for key in children.order_by("checkpoint_id").values_list("pk", flat=True)[:20]
            ],
            **self._values(found, parent_pk, mask),
        }
        request.current_app = self.admin_site.name
        template = "admin/workflow_storage_langgraph/checkpoint.html"
        return TemplateResponse(request, template, context)

    def _values(self, found: Found, parent_pk: int | None, mask: Mask) -> dict[str, Any]:
        """Return what the page shows of the values."""
        from workflow_storage.contrib.langgraph.readable import as_json, values_of, writes_of

        after = values_of(found)
        parent = None if parent_pk is None else _found(parent_pk)
        before = {} if parent is None else values_of(parent)
        writes = [
            {"task": task, "channel": channel, "value": value}
            for task, channel, value in writes_of(found)
        ]
        return {
            "difference": diff_block(before, after, mask=mask),
            "values": json_tree(after, mask=mask, name=_("values")),
            "metadata": json_tree(as_json(found.row.metadata), mask=mask, name=_("metadata")),
            "writes": json_tree(writes, mask=mask, name=_("writes")) if writes else "",
        }


@register_section
def checkpoints_of_run(
    request: HttpRequest, site: AdminSite, run: WorkflowRun
) -> SafeString | None:
    """Show the newest checkpoints that were made in a run."""
    if not site.is_registered(ThreadNamespace):
        return None
    threads = site.get_model_admin(ThreadNamespace)
    if not threads.has_view_or_change_permission(request):
        return None
    found = _newest_in(run)
    if not found:
        return None
    opens = request.user.has_perm("workflow_storage_langgraph.view_graphcheckpoint")
    shown = [
        {
            "node": _node(row),
            "saved": time_ago(row.created_at),
            "url": _checkpoint_url(site, row.pk) if opens else "",
            "thread": _name(row.thread),
            "space": printable(row.thread.namespace),
            "thread_url": _thread_url(site, row.thread),
        }
        for row in found[:SHOWN_IN_RUN]
    ]
    return render_to_string(
        "admin/workflow_storage_langgraph/run_section.html",
        {"checkpoints": shown, "is_cut": len(found) > SHOWN_IN_RUN},
    )


def _newest_in(run: WorkflowRun) -> list[GraphCheckpoint]:
    """Return the newest checkpoints in a run, one more than are shown; none without the tables.

    The page of a run is to be shown though the app was installed since the last migrate.
    """
    rows = _checkpoints().filter(run_id=run.pk).order_by("-pk").select_related("thread")
    connection = connections[rows.db]
    try:
        return list(rows.defer("data", "blobs")[: SHOWN_IN_RUN + 1])
    except DatabaseError as exc:
        # In a transaction (ATOMIC_REQUESTS) the rest of the page could not be read, either.
        if connection.in_atomic_block or cause_of(connection, exc) is not Cause.MISSING:
            raise
        logger.warning("Checkpoints of graphs cannot be shown: %s. Run manage.py migrate.", exc)
        return []


def _checkpoints() -> QuerySet[GraphCheckpoint]:
    return GraphCheckpoint.objects.using(configured_alias())


def _nodes(rows: QuerySet[GraphCheckpoint], limit: int) -> list[Node]:
    return [Node._make(values) for values in rows.values_list(*_OF_NODE)[:limit]]


def _node(row: GraphCheckpoint) -> Node:
    return Node(
        row.pk,
        row.checkpoint_id,
        row.parent_checkpoint_id,
        row.created_at,
        row.run_id,
        row.metadata,
    )


def _found(pk: int) -> Found | None:
    from workflow_storage.contrib.langgraph.chains import Memory
    from workflow_storage.contrib.langgraph.rows import CheckpointRows

    rows = CheckpointRows(configured_alias(), own_connection=False, memory=Memory())
    return next(iter(rows.several([pk])), None)


def _name(row: ThreadNamespace) -> str:
    return printable(row.thread_id[:200])


def _thread_url(site: AdminSite, row: ThreadNamespace) -> str:
    name = f"{site.name}:workflow_storage_langgraph_threadnamespace_change"
    return reverse(name, args=[row.pk])


def _checkpoint_url(site: AdminSite, pk: int) -> str:
    return reverse(f"{site.name}:{_CHECKPOINT}", args=[pk])


def _run_url(site: AdminSite, run_id: str) -> str:
    name = f"{site.name}:workflow_storage_workflowrun_change"
    return reverse(name, args=[quote(run_id)])


def _run_link(site: AdminSite, run_id: str) -> SafeString:
    return format_html('<a href="{}">{}</a>', _run_url(site, run_id), short_id(run_id))

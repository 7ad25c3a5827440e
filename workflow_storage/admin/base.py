"""What both admins share: they show the rows of the project's own store, and change none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from django.contrib.admin.utils import unquote
from django.contrib.admin.views.main import ERROR_FLAG
from django.http import HttpResponseRedirect

from workflow_storage.admin.changelist import KeysetAdmin
from workflow_storage.admin.masking import SECRETS, Mask, mask_for
from workflow_storage.factory import configured_alias
from workflow_storage.models import ExecutionState, WorkflowRun
from workflow_storage.validation import MAX_RUN_ID, is_possible_name

if TYPE_CHECKING:
    from django.db.models import Model, QuerySet
    from django.http import HttpRequest

_VIEWER = "_workflow_storage_viewer"
_VIEW_STATES = ("view_executionstate", "change_executionstate")
_LOOKUPS = frozenset({"", "exact", "in", "isnull", "gte", "gt", "lte", "lt"})
"""What a filter of Django's own asks of a field."""


class Viewer(NamedTuple):
    """What the user may see who looks at a row."""

    linked: frozenset[type[Model]]
    """The models to whose pages there are links."""
    sees_states: bool
    """Whether nodes and states are shown."""
    mask: Mask
    """What hides secrets."""


_NOBODY = Viewer(frozenset(), False, Mask(SECRETS))


class ReadOnlyAdmin(KeysetAdmin):
    """Shows the rows of the project's own backend and changes none."""

    actions: Any = None
    longest_term: ClassVar[int] = MAX_RUN_ID
    """Characters of the longest thing that can be searched for."""
    secret_endings: ClassVar[tuple[str, ...]] = ()
    """What else the names of secrets end in; see the setting WORKFLOW_STORAGE_SECRETS."""

    class Media:
        """The style of statuses and payloads."""

        css = {
            "all": [
                f"workflow_storage/{name}.css"
                for name in ("admin", "actions", "charts", "diff", "timeline", "trees")
            ]
        }

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        return super().get_queryset(request).using(configured_alias())

    def lookup_allowed(self, lookup: str, value: str, request: Any = None) -> bool:
        """Admit the filters that are declared, and no lookup into a payload or along a relation."""
        declared = {
            one if isinstance(one, str) else one[0]
            for one in (self.list_filter if request is None else self.get_list_filter(request))
            if isinstance(one, str | tuple | list)
        }
        of_filters = {
            name
            for one in (self.list_filter if request is None else self.get_list_filter(request))
            if isinstance(one, type)
            for name in getattr(one, "parameters", ())
        }
        if lookup in of_filters:
            return True
        field, _, rest = lookup.partition("__")
        return field in declared and rest in _LOOKUPS

    def changelist_view(self, request: HttpRequest, extra_context: Any = None) -> Any:
        if any("\0" in value for values in request.GET.lists() for value in values[1]):
            # PostgreSQL refuses it as a parameter; Django's own answer to a bad lookup.
            return HttpResponseRedirect(f"{request.path}?{ERROR_FLAG}=1")
        return super().changelist_view(request, extra_context)

    def get_object(
        self, request: HttpRequest, object_id: str, from_field: str | None = None
    ) -> Any:
        if "\0" in unquote(object_id):
            return None
        found = self.found_object(request, object_id, from_field)
        if found is not None:
            setattr(found, _VIEWER, self.viewer(request))
        return found

    def found_object(
        self, request: HttpRequest, object_id: str, from_field: str | None = None
    ) -> Any:
        """Return what an address names, or None."""
        return super().get_object(request, object_id, from_field)

    def get_changelist_instance(self, request: HttpRequest) -> Any:
        changelist = super().get_changelist_instance(request)
        viewer = self.viewer(request)
        for row in changelist.result_list:
            setattr(row, _VIEWER, viewer)
        return changelist

    def links_to(self, model: type[Model], row: Model) -> bool:
        """Whether the page of a row can link to the pages of a model.

        Args:
            model: has to be registered on this site, and the user be allowed to view it.
            row: of a list or a page for the user.
        """
        return model in self.viewer_of(row).linked

    def viewer_of(self, row: Model) -> Viewer:
        """Return what the user may see who has asked for a row."""
        viewer: Viewer = getattr(row, _VIEWER, _NOBODY)
        return viewer

    def viewer(self, request: HttpRequest) -> Viewer:
        """Return what a user may see."""
        site = self.admin_site
        linked = frozenset(
            model
            for model in (WorkflowRun, ExecutionState)
            if site.is_registered(model)
            and site.get_model_admin(model).has_view_or_change_permission(request)
        )
        return Viewer(linked, self.may_view_states(request), self.mask(request))

    def may_view_states(self, request: HttpRequest) -> bool:
        """Whether the user may see nodes and states."""
        return any(request.user.has_perm(f"workflow_storage.{name}") for name in _VIEW_STATES)

    def mask(self, request: HttpRequest) -> Mask:
        """Return what hides secrets from the user."""
        return mask_for(request, self.secret_endings)

    def get_search_results(
        self, request: HttpRequest, queryset: QuerySet[Any], search_term: str
    ) -> tuple[QuerySet[Any], bool]:
        """Find rows by a whole id or name, through an index."""
        term = search_term.strip()
        if not term:
            return queryset, False
        if not is_possible_name("q", term, self.longest_term):
            return queryset.none(), False
        return self.rows_found(queryset, term), False

    def rows_found(self, queryset: QuerySet[Any], term: str) -> QuerySet[Any]:
        """Return the rows that a search term names."""
        return queryset.filter(pk=term)

    def has_add_permission(self, request: HttpRequest, *args: Any) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False

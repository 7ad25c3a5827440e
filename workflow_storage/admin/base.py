"""What both admins share: they show the rows of the project's own store, and change none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from django.contrib.admin.utils import unquote
from django.contrib.admin.views.main import ERROR_FLAG
from django.http import HttpResponseRedirect

from workflow_storage.admin.changelist import KeysetAdmin
from workflow_storage.factory import configured_alias
from workflow_storage.models import ExecutionState, WorkflowRun
from workflow_storage.validation import MAX_RUN_ID, is_possible_name

if TYPE_CHECKING:
    from django.db.models import Model, QuerySet
    from django.http import HttpRequest

_LINKED = "_workflow_storage_linked"


class ReadOnlyAdmin(KeysetAdmin):
    """Shows the rows of the project's own backend and changes none."""

    actions = None
    longest_term: ClassVar[int] = MAX_RUN_ID
    """Characters of the longest thing that can be searched for."""

    class Media:
        """The style of statuses and payloads."""

        css = {"all": ["workflow_storage/admin.css"]}

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        return super().get_queryset(request).using(configured_alias())

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
        found = super().get_object(request, object_id, from_field)
        if found is not None:
            setattr(found, _LINKED, self._linked(request))
        return found

    def get_changelist_instance(self, request: HttpRequest) -> Any:
        changelist = super().get_changelist_instance(request)
        linked = self._linked(request)
        for row in changelist.result_list:
            setattr(row, _LINKED, linked)
        return changelist

    def links_to(self, model: type[Model], row: Model) -> bool:
        """Whether the page of a row can link to the pages of a model.

        Args:
            model: has to be registered on this site, and the user be allowed to view it.
            row: of a list or a page for the user.
        """
        return model in getattr(row, _LINKED, ())

    def _linked(self, request: HttpRequest) -> frozenset[type[Model]]:
        site = self.admin_site
        return frozenset(
            model
            for model in (WorkflowRun, ExecutionState)
            if site.is_registered(model)
            and site.get_model_admin(model).has_view_or_change_permission(request)
        )

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

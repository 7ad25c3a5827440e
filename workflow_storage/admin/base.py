"""What both admins share: read-only, no counting, pages that begin after a row.

A table with millions of rows is neither counted nor skipped through: a page is the rows
after a given one, in the order of an index.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, ClassVar

from django.contrib import admin
from django.contrib.admin.options import IncorrectLookupParameters, ShowFacets
from django.contrib.admin.utils import unquote
from django.contrib.admin.views.main import ERROR_FLAG, ChangeList
from django.core.exceptions import ObjectDoesNotExist
from django.db.models import Q
from django.http import HttpResponseRedirect
from django.utils.html import format_html
from django.utils.translation import gettext as _

from workflow_storage.factory import configured_alias
from workflow_storage.validation import MAX_RUN_ID, is_possible_name

if TYPE_CHECKING:
    from django.db.models import Model, QuerySet
    from django.http import HttpRequest
    from django.utils.safestring import SafeString

BEFORE = "before"
"""The query parameter that names the row after which the page begins."""

SHOWN_JSON = 100_000
"""Characters of a payload that a page shows."""


class KeysetChangeList(ChangeList):
    """A list whose pages begin after a row, newest first."""

    def get_filters_params(self, params: Any = None) -> Any:
        lookups = super().get_filters_params(params)
        lookups.pop(BEFORE, None)
        # A filter or a search begins at the first page again.
        self.params.pop(BEFORE, None)
        self.filter_params.pop(BEFORE, None)
        return lookups

    model_admin: ReadOnlyAdmin

    def get_ordering(self, request: HttpRequest, queryset: QuerySet[Any]) -> list[Any]:
        return list(self.model_admin.ordering)

    def get_queryset(self, request: HttpRequest, exclude_parameters: Any = None) -> Any:
        queryset = super().get_queryset(request, exclude_parameters)
        return queryset.defer(*self.model_admin.payloads)

    def get_results(self, request: HttpRequest) -> None:
        queryset = self._after(request.GET.get(BEFORE))
        rows = list(queryset[: self.list_per_page + 1])
        self.result_list = rows[: self.list_per_page]
        self.result_count = len(self.result_list)
        self.full_result_count = self.result_count
        self.show_full_result_count = False
        self.show_admin_actions = bool(rows)
        self.can_show_all = self.multi_page = False
        self.next_page = (
            self.get_query_string({BEFORE: self.result_list[-1].pk})
            if len(rows) > self.list_per_page
            else None
        )
        self.first_page = self.get_query_string() if BEFORE in request.GET else None

    def _after(self, before: str | None) -> Any:
        if before is None:
            return self.queryset
        fields = [name.removeprefix("-") for name in self.model_admin.ordering]
        try:
            position = self.root_queryset.values_list(*fields).get(pk=before)
        except (ValueError, ObjectDoesNotExist) as exc:
            raise IncorrectLookupParameters(exc) from exc
        first, *rest = fields
        condition = Q(**{f"{first}__lt": position[0]})
        for name, value in zip(rest, position[1:], strict=True):
            condition |= Q(**{f"{name}__lt": value})
        # Together with the condition above, this lets the database begin within its index.
        return self.queryset.filter(condition, **{f"{first}__lte": position[0]})


class ReadOnlyAdmin(admin.ModelAdmin):  # type: ignore[type-arg]
    """Shows the rows of the project's own backend and changes none."""

    actions = None
    list_per_page = 100
    show_facets = ShowFacets.NEVER
    show_full_result_count = False
    sortable_by = ()
    ordering: ClassVar[tuple[str, ...]] = ()
    longest_term: ClassVar[int] = MAX_RUN_ID
    """Characters of the longest thing that can be searched for."""
    payloads: ClassVar[tuple[str, ...]] = ()
    """Fields that a list does not read, for they can be large."""

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
        return super().get_object(request, object_id, from_field)

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
        """Give the rows that a search term names."""
        return queryset.filter(pk=term)

    def get_changelist(self, request: HttpRequest, **kwargs: Any) -> type[ChangeList]:
        return KeysetChangeList

    def has_add_permission(self, request: HttpRequest, *args: Any) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False


def json_block(value: Any) -> SafeString | str:
    """Show a payload as indented JSON, cut where it is too long for a page."""
    if value is None:
        return "-"
    text = json.dumps(value, indent=2, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # A lone surrogate, which no page can hold.
        text = json.dumps(value, indent=2)
    if len(text) <= SHOWN_JSON:
        return format_html('<pre class="workflow-storage-json">{}</pre>', text)
    return format_html(
        '<pre class="workflow-storage-json">{}</pre><p class="help">{}</p>',
        text[:SHOWN_JSON],
        _("The first %(shown)s of %(total)s characters.")
        % {"shown": f"{SHOWN_JSON:,}", "total": f"{len(text):,}"},
    )


def text_block(text: str | None) -> SafeString | str:
    """Show text with its line breaks."""
    return format_html('<pre class="workflow-storage-json">{}</pre>', text) if text else "-"

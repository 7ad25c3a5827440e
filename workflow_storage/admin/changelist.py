"""Lists of millions of rows in the admin, newest first, without counting or skipping through.

A page is the rows after a given one, in the order of an index. Both admins of this package
list their rows so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from django.contrib import admin
from django.contrib.admin.options import IncorrectLookupParameters, ShowFacets
from django.contrib.admin.views.main import ChangeList
from django.core.exceptions import ObjectDoesNotExist
from django.db.models import Q

from workflow_storage.paging import LARGE_FIELDS, LARGE_PAGE, PageLength, size_of

if TYPE_CHECKING:
    from django.db.models import QuerySet
    from django.http import HttpRequest

BEFORE = "before"
"""The query parameter that names the row after which the page begins."""


class KeysetAdmin(admin.ModelAdmin):  # type: ignore[type-arg]
    """Lists its rows in a `KeysetChangeList`."""

    list_per_page = 100
    show_facets = ShowFacets.NEVER
    show_full_result_count = False
    sortable_by = ()
    ordering: ClassVar[tuple[str, ...]] = ()
    """One or two fields, descending and never null, that together are unique."""
    payloads: ClassVar[tuple[str, ...]] = ()
    """Fields that a list does not read, for they can be large.

    A list that reads one of them has shorter pages where they are large."""

    def get_changelist(self, request: HttpRequest, **kwargs: Any) -> type[ChangeList]:
        return KeysetChangeList


class KeysetChangeList(ChangeList):
    """A list whose pages begin after a row, newest first."""

    model_admin: KeysetAdmin

    def get_filters_params(self, params: Any = None) -> Any:
        lookups = super().get_filters_params(params)
        lookups.pop(BEFORE, None)
        # A filter or a search begins at the first page again.
        self.params.pop(BEFORE, None)
        self.filter_params.pop(BEFORE, None)
        return lookups

    def get_ordering(self, request: HttpRequest, queryset: QuerySet[Any]) -> list[Any]:
        return list(self.model_admin.ordering)

    def get_queryset(self, request: HttpRequest, exclude_parameters: Any = None) -> Any:
        queryset = super().get_queryset(request, exclude_parameters)
        return queryset.defer(*self.model_admin.payloads)

    def get_results(self, request: HttpRequest) -> None:
        rows, more = self._page(self._after(request.GET.get(BEFORE)))
        self.result_list = rows
        self.result_count = len(self.result_list)
        self.full_result_count = self.result_count
        self.show_full_result_count = False
        self.show_admin_actions = bool(rows)
        self.can_show_all = self.multi_page = False
        self.next_page = self.get_query_string({BEFORE: self.result_list[-1].pk}) if more else None
        self.first_page = self.get_query_string() if BEFORE in request.GET else None

    def _page(self, queryset: QuerySet[Any]) -> tuple[list[Any], bool]:
        """Return the rows of the page, and whether there are more.

        A list that reads what can be large has pages that end once they have enough of it.
        """
        fields = {field.name for field in self.lookup_opts.fields}
        reads_large = not {*LARGE_FIELDS} & fields <= {*self.model_admin.payloads}
        length = PageLength()
        rows: list[Any] = []
        size = 0
        while size <= LARGE_PAGE:
            wanted = self.list_per_page + 1 - len(rows)
            if reads_large:
                wanted = min(wanted, length.runs)
            found = list(queryset[len(rows) : len(rows) + wanted])
            rows += found
            if len(found) < wanted:
                return rows, False
            if len(rows) > self.list_per_page:
                return rows[: self.list_per_page], True
            length.after(found)
            size += sum(map(size_of, found))
        return rows, queryset[len(rows) : len(rows) + 1].exists()

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

"""Lists of millions of rows in the admin, newest first, without counting or skipping through.

A page is the rows after a given one, or before it, in the order of an index. Both admins of this
package list their rows so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from django.contrib import admin, messages
from django.contrib.admin.options import IncorrectLookupParameters, ShowFacets
from django.contrib.admin.views.main import ORDER_VAR, PAGE_VAR, ChangeList
from django.core.exceptions import ObjectDoesNotExist
from django.db.models import Q
from django.utils.translation import gettext as _

from workflow_storage.admin.rendering import count_text
from workflow_storage.paging import LARGE_FIELDS, LARGE_PAGE, PageLength, size_of

if TYPE_CHECKING:
    from django.db.models import QuerySet
    from django.http import HttpRequest

BEFORE, AFTER = "before", "after"
"""The query parameters that name the row after which the page begins, and before which it ends."""

COUNTED = 1000
"""Rows that are counted; of more, a list says that there are more."""


class KeysetAdmin(admin.ModelAdmin):  # type: ignore[type-arg]
    """Lists its rows in a `KeysetChangeList`."""

    list_per_page = 50
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
    """A list whose pages begin after a row, newest first.

    Attributes:
        next_page: the address of the page with older rows, if there are any.
        previous_page: the same with newer ones.
        first_page: the address of the newest ones, unless this is that page.
        count_text: how many rows there are, as far as they are counted.
    """

    model_admin: KeysetAdmin
    not_looked_up: ClassVar[tuple[str, ...]] = (BEFORE, AFTER, ORDER_VAR)
    """Parameters that are no filters, and that a filter does not keep."""

    def __init__(self, request: HttpRequest, *args: Any, **kwargs: Any) -> None:
        ignored = [name for name in (PAGE_VAR, ORDER_VAR) if name in request.GET]
        if ignored:
            messages.warning(
                request,
                _(
                    "This list has no page numbers and no columns to sort by, so %(given)s was left "
                    "out. Use its links to newer and older rows."
                )
                % {"given": ", ".join(f"{name}={request.GET[name]}" for name in ignored)},
            )
        super().__init__(request, *args, **kwargs)

    def get_filters_params(self, params: Any = None) -> Any:
        lookups = super().get_filters_params(params)
        for name in self.not_looked_up:
            lookups.pop(name, None)
            # A filter or a search begins at the first page again.
            self.params.pop(name, None)
            self.filter_params.pop(name, None)
        return lookups

    def get_ordering(self, request: HttpRequest, queryset: QuerySet[Any]) -> list[Any]:
        return list(self.model_admin.ordering)

    def get_queryset(self, request: HttpRequest, exclude_parameters: Any = None) -> Any:
        queryset = super().get_queryset(request, exclude_parameters)
        return queryset.defer(*self.model_admin.payloads)

    def get_results(self, request: HttpRequest) -> None:
        before, after = (request.GET.get(name) for name in (BEFORE, AFTER))
        has_newer = False
        rows: list[Any] = []
        if after is not None:
            rows, has_newer = self._page(self.newer(after))
            rows.reverse()
        has_older = has_newer
        if not has_newer:  # or the newest page would be a short one
            before = before if after is None else None
            rows, has_older = self._page(self.older(before))
        self.result_list = rows
        self.result_count = len(rows)
        self.full_result_count = self.result_count
        self.show_full_result_count = False
        self.show_admin_actions = bool(rows)
        self.can_show_all = self.multi_page = False
        is_first = before is None and not has_newer
        self.next_page = self.get_query_string({BEFORE: rows[-1].pk}) if has_older else None
        self.previous_page = None
        if rows and not is_first:
            self.previous_page = self.get_query_string({AFTER: rows[0].pk})
        self.first_page = None if is_first else self.get_query_string()
        self.count_text = self._count_text(len(rows) if is_first and not has_older else None)

    def _count_text(self, count: int | None) -> str:
        if count is None:
            # In their order, or the database might read the whole table to find so many.
            count = self.queryset[: COUNTED + 1].count()
        return f"{count_text(COUNTED)}+" if count > COUNTED else count_text(count)

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

    def older(self, before: str | None) -> QuerySet[Any]:
        """Return the rows after one, in the order of the list; all of them after None."""
        older: QuerySet[Any] = self.queryset if before is None else self._beside(before, "lt")
        return older

    def newer(self, after: str) -> QuerySet[Any]:
        """Return the rows before one, the nearest first."""
        newer: QuerySet[Any] = self._beside(after, "gt").reverse()
        return newer

    def position(self, pk: str) -> tuple[Any, ...]:
        """Return the values of the fields that the list is ordered by, of a row."""
        fields = [name.removeprefix("-") for name in self.model_admin.ordering]
        try:
            found: tuple[Any, ...] = self.root_queryset.values_list(*fields).get(pk=pk)
        except (ValueError, ObjectDoesNotExist) as exc:
            raise IncorrectLookupParameters(exc) from exc
        return found

    def _beside(self, pk: str, lookup: str) -> QuerySet[Any]:
        position = self.position(pk)
        first, *rest = (name.removeprefix("-") for name in self.model_admin.ordering)
        condition = Q(**{f"{first}__{lookup}": position[0]})
        for name, value in zip(rest, position[1:], strict=True):
            condition |= Q(**{f"{name}__{lookup}": value})
        # Together with the condition above, this lets the database begin within its index.
        edge = {f"{first}__{lookup}e": position[0]}
        beside: QuerySet[Any] = self.queryset.filter(condition, **edge)
        return beside

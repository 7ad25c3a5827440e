"""The list of runs: a page of those that a `Selection` asks for, from a database or another store."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from django.contrib import messages
from django.contrib.admin.options import IncorrectLookupParameters
from django.db.models import OuterRef, Q, QuerySet, Subquery
from django.db.models.functions import Right, Substr
from django.utils.translation import gettext as _

from workflow_storage.admin import selection
from workflow_storage.admin.changelist import AFTER, BEFORE, COUNTED, KeysetAdmin, KeysetChangeList
from workflow_storage.admin.chosen import RunsOfStore
from workflow_storage.admin.rendering import count_text
from workflow_storage.admin.selection import (
    ORDER,
    ORDERS,
    Selection,
    hidden_label,
    selection_of,
)
from workflow_storage.backends.orm.conditions import conditions_of, order_of, with_values
from workflow_storage.backends.orm.names import LAST, workflow_names
from workflow_storage.backends.orm.run_rows import RunRows
from workflow_storage.exceptions import RunNotFoundError
from workflow_storage.filters import valid_filters
from workflow_storage.models import ExecutionState
from workflow_storage.querysets import NEWEST_LABELLED_FIRST
from workflow_storage.validation import MAX_RUN_ID, MAX_WORKFLOW_NAME, is_possible_name

if TYPE_CHECKING:
    from datetime import datetime, timedelta

    from django.http import HttpRequest

    from workflow_storage.admin.masking import Mask
    from workflow_storage.base import StorageBackend
    from workflow_storage.models import WorkflowRun

LOOKED_THROUGH = 10_000
"""Runs that are ordered by something else than their start, or searched for a text, at most."""

LOOKED_AT = 20_000
"""Runs that a page looks at for what no index knows, at most."""

MOST_IDS, MOST_NAMES = 1000, 200
"""Runs, and workflows, that a search by a beginning finds at most."""

ERROR_START = 300
"""Characters of an error that the list reads."""


class ListsRuns(KeysetAdmin):
    """What the list needs of the admin of the runs."""

    stalled_after: ClassVar[timedelta]

    if TYPE_CHECKING:

        @property
        def store(self) -> StorageBackend: ...


class RunChangeList(KeysetChangeList):
    """The runs of a database that a selection asks for.

    Attributes:
        selection: what is asked for.
        searched: what the search has looked for, in words.
        notes: what is not looked at.
    """

    model_admin: ListsRuns
    not_looked_up: ClassVar[tuple[str, ...]] = (*KeysetChangeList.not_looked_up, ORDER)

    def __init__(self, request: HttpRequest, *args: Any, **kwargs: Any) -> None:
        self._request = request
        # Where it stands among the arguments is Django's business.
        given = (*args, *kwargs.values())
        model_admin: Any = next(one for one in given if isinstance(one, KeysetAdmin))
        self._mask: Mask = model_admin.mask(request)
        self.selection: Selection = selection_of(request.GET, self._mask)
        self.notes = [*self.selection.notes]
        self.searched = ""
        for problem in self.selection.problems:
            messages.error(request, problem)
        super().__init__(request, *args, **kwargs)

    def get_query_string(self, new_params: Any = None, remove: Any = None) -> str:
        # The order stays with pages; a filter keeps it, too.
        if self.selection.order and ORDER not in (new_params or {}):
            new_params = {ORDER: self.selection.order, **(new_params or {})}
        return super().get_query_string(new_params, remove)

    @property
    def alias(self) -> str:
        """The database that is shown."""
        alias: str = self.root_queryset.db
        return alias

    @property
    def workflow_names(self) -> list[str]:
        """The first names of workflows, to choose from."""
        return workflow_names(self.alias)

    def get_queryset(self, request: HttpRequest, exclude_parameters: Any = None) -> Any:
        self._search(self.query.strip())
        # All that is neither in the selection nor in the search: filters of a subclass.
        query, self.query = self.query, ""
        try:
            self._others = super().get_queryset(request, exclude_parameters)
        finally:
            self.query = query
        asked = self.selection
        if asked.stalled:
            self._others = self._others.stalled(self.model_admin.stalled_after)
        self._others = self._others.filter(asked.condition(), self._found)
        rows = RunRows(self.alias)
        valid = rows.rarest_first(asked.filters)
        if request.method == "POST":  # an action, which goes through all that match
            valid = rows.in_order_of_start(valid)
        self.selection = asked._replace(filters=valid)
        if valid.match_none:
            self._others = self._others.none()
        return self._narrowed(None)

    def _narrowed(
        self, position: tuple[Any, ...] | None, started_after: datetime | None = None
    ) -> QuerySet[Any]:
        filters = self.selection.filters
        if started_after is not None:
            filters = filters._replace(started_after=started_after)
        position = None if position is None else (position[0], position[1])
        runs = with_values(self._others, conditions_of(filters, position))
        if self.selection.order:
            return runs.order_by(ORDERS[self.selection.order], "-id")
        return runs.order_by(*order_of(filters))

    def _search(self, term: str) -> None:
        """Find out what is searched for, and how: by an index, or in errors within a time."""
        self._found = Q()
        if not term:
            return
        if self._search_by_label(term):
            return
        runs = self.root_queryset
        if is_possible_name("q", term, MAX_WORKFLOW_NAME) and self._search_by_beginning(term):
            return
        if "\0" in term:
            self._found = Q(pk__in=[])
            return
        self.searched = _("%(term)s in the errors of the newest %(count)s failed runs") % {
            "term": term,
            "count": count_text(LOOKED_THROUGH),
        }
        failed = runs.filter(status="failed").order_by("-started_at")
        filters = self.selection.filters
        if filters.started_after is not None:
            failed = failed.filter(started_at__gte=filters.started_after)
        if filters.started_before is not None:
            failed = failed.filter(started_at__lt=filters.started_before)
        last = failed.values_list("started_at", flat=True)[LOOKED_THROUGH : LOOKED_THROUGH + 1]
        self._found = Q(status="failed", error_message__icontains=term)
        for started_at in last:
            self._found &= Q(started_at__gt=started_at)

    def _search_by_label(self, term: str) -> bool:
        """Look for a label, if that is what is searched for."""
        name, equals, value = term.partition("=")
        if not (equals and name and value):
            return False
        if self._mask.hides(name.strip()):
            messages.error(self._request, hidden_label(name.strip()))
            self._refine(workflow_name=[])
            return True
        self.searched = _("runs with the label %(label)s") % {"label": term}
        self._refine(labels={**self.selection.filters.labels, name.strip(): value.strip()})
        return True

    def _search_by_beginning(self, term: str) -> bool:
        """Look for ids, and else for workflows, that begin so; and say whether there are any."""
        begun = self.root_queryset.filter(pk__gte=term, pk__lt=term + LAST).order_by("pk")
        ids = list(begun.values_list("pk", flat=True)[: MOST_IDS + 1])
        names = workflow_names(self.alias, term, limit=MOST_NAMES + 1)
        if len(ids) > MOST_IDS or (not ids and len(names) > MOST_NAMES):
            self.notes.append(_("There are more that begin so. Search for a longer beginning."))
        if ids:
            self.searched = _("runs whose id begins with %(term)s") % {"term": term}
            self._found = Q(pk__in=[term] if term in ids else ids[:MOST_IDS])
            if names:
                self.notes.append(
                    _("Workflows begin so, too: %(names)s. Choose one by the filter.")
                    % {"names": ", ".join(names[:5])}
                )
        elif names:
            self.searched = _("runs of workflows whose name begins with %(term)s") % {"term": term}
            chosen = self.selection.filters.workflow_names
            kept = [term] if term in names else names[:MOST_NAMES]
            if chosen is not None:
                kept = [one for one in kept if one in chosen]
            self._refine(workflow_name=kept)
        return bool(ids or names)

    def _refine(self, **more: Any) -> None:
        asked = {**self.selection.run_filters(), **more}
        self.selection = self.selection._replace(filters=valid_filters(asked))

    def get_results(self, request: HttpRequest) -> None:
        self._lasts: dict[tuple[Any, ...] | None, tuple[Any, str] | None] = {}
        self._last_counted = self._last_looked_at(None)
        if not self.selection.order:
            super().get_results(request)
            if self._is_looked_through and self._last_counted is not None:
                self._look_on(request.GET.get(BEFORE))
            return
        by_start = self._narrowed(None).order_by(*order_of(self.selection.filters))
        starts = by_start.values_list("started_at", flat=True)
        for started_at in starts[LOOKED_THROUGH : LOOKED_THROUGH + 1]:
            self.queryset = self.queryset.filter(started_at__gt=started_at)
            self.notes.append(
                _("Ordered are the newest %(count)s of these runs.")
                % {"count": count_text(LOOKED_THROUGH)}
            )
        super().get_results(request)
        self.next_page = None

    @property
    def _is_looked_through(self) -> bool:
        """Whether runs are asked for by what no index knows, so that most may be looked at in vain."""
        asked = self.selection
        filters = asked.filters
        is_by_index = not (filters.labels or filters.statuses or filters.workflow_names)
        return (
            (asked.costlier, asked.ended_after) != (None, None)
            or asked.has_parent
            or (asked.slower is not None and not is_by_index)
        )

    def _last_looked_at(self, position: tuple[Any, ...] | None) -> tuple[Any, str] | None:
        """Return the run that looking for others ends with, after a position; None if it finds all."""
        if position not in self._lasts:
            self._lasts[position] = self._found_last(position)
        return self._lasts[position]

    def _found_last(self, position: tuple[Any, ...] | None) -> tuple[Any, str] | None:
        filters = self.selection.filters
        more_of_label = filters.reads_labels and not filters.is_one_label
        if filters.parent_id or not (self._is_looked_through or more_of_label):
            return None
        rows: QuerySet[Any]
        order = ("-started_at", "-run_id" if filters.reads_labels else "-id")
        if filters.reads_labels:
            first = dict([*filters.labels.items()][:1])
            rows = RunRows(self.alias).labelled(filters._replace(labels=first))
        else:
            others = filters._replace(labels={}, waiting=None, error=None)
            rows = with_values(RunRows(self.alias).runs, conditions_of(others))
        if position is not None:
            rows = rows.filter(
                Q(started_at__lt=position[0]) | Q(**{f"{order[1][1:]}__lt": position[1]}),
                started_at__lte=position[0],
            )
        most = LOOKED_AT if self._is_looked_through else LOOKED_THROUGH
        starts = rows.order_by(*order).values_list("started_at", flat=True)
        for start in starts[most - 1 : most]:
            # With all that started at the same time, for then one condition tells them all.
            if rows.filter(started_at__lt=start).exists():
                alike = rows.filter(started_at=start).order_by(order[1][1:])
                return start, alike.values_list(order[1][1:], flat=True)[0]
        return None

    def _look_on(self, before: str | None) -> None:
        """Say how far has been looked, and link what comes after that."""
        last = self._last_looked_at(None if before is None else self.position(before))
        self.previous_page = None
        if last is None:
            return
        self.notes.append(
            _("Looked at are %(count)s runs. Older ones are looked at on the next page.")
            % {"count": count_text(LOOKED_AT)}
        )
        if self.next_page is None:
            self.next_page = self.get_query_string({BEFORE: last[1]})

    def _count_text(self, count: int | None) -> str:
        if self._last_counted is None or self.selection.order:
            return super()._count_text(count)
        counted = self._narrowed(None, self._last_counted[0])[: COUNTED + 1].count()
        return f"{count_text(min(counted, COUNTED))}+"

    def _page(self, queryset: QuerySet[Any]) -> tuple[list[Any], bool]:
        states = ExecutionState._base_manager.using(self.alias).filter(run_id=OuterRef("pk"))
        newest = states.order_by("-step")
        return super()._page(
            queryset.annotate(
                newest_step=Subquery(newest.values("step")[:1]),
                newest_state_at=Subquery(newest.values("created_at")[:1]),
                error_start=Substr("error_message", 1, ERROR_START),
                error_end=Right("error_message", ERROR_START),
            )
        )

    def older(self, before: str | None) -> QuerySet[Any]:
        position = None if before is None else self.position(before)
        last = self._last_looked_at(position) if self._is_looked_through else None
        if last is not None and not self.selection.order:
            return self._narrowed(position, started_after=last[0])
        return self.queryset if position is None else self._narrowed(position)

    def newer(self, after: str) -> QuerySet[Any]:
        started_at, run_id = self.position(after)
        labels = self.selection.filters.labels
        if not self.selection.filters.reads_labels:
            return super().newer(after)
        # All conditions on the rows of the label in one filter: they are of one row.
        (name, value), *others = labels.items()
        filters = self.selection.filters
        runs = with_values(
            self._others, conditions_of(filters._replace(labels=dict(others), by_label=False))
        )
        of_label = Q(label_rows__name=name, label_rows__value=value)
        newer = Q(label_rows__started_at__gt=started_at) | Q(label_rows__run_id__gt=run_id)
        newer &= Q(label_rows__started_at__gte=started_at)
        if filters.started_before is not None:
            newer &= Q(label_rows__started_at__lt=filters.started_before)
        runs = runs.filter(of_label & newer)
        return runs.order_by(*NEWEST_LABELLED_FIRST).reverse()


class StoreRunChangeList(RunChangeList):
    """The runs of a store that is no Django database, as far as its contract goes.

    Attributes:
        searched_ids: the run that was searched for by its id; None if none was.
        needs_database: whether something is asked for that only a database can tell.
    """

    searched_ids: list[str] | None
    needs_database: bool
    workflow_names: ClassVar[list[str]] = []

    def get_queryset(self, request: HttpRequest, exclude_parameters: Any = None) -> Any:
        self._search(self.query.strip())
        (self.filter_specs, self.has_filters, others, _many, self.has_active_filters) = (
            self.get_filters(request)
        )
        self.clear_all_filters_qs = self.get_query_string(remove=self.get_filters_params())
        self.needs_database = bool(others) or self.selection.needs_database
        if self.needs_database:
            self.notes.append(
                _(
                    "These runs are in %(store)s, which finds runs by status, workflow, label, "
                    "parent and start only. Copy them into a database for the rest (copy_runs)."
                )
                % {"store": self.model_admin.store.name}
            )
        return self.root_queryset.none()

    def _search(self, term: str) -> None:
        self.searched_ids = None
        if not term:
            return
        if self._search_by_label(term):
            return
        if not is_possible_name("q", term, MAX_WORKFLOW_NAME):
            self._refine(workflow_name=[])
        elif len(term) <= MAX_RUN_ID and self.model_admin.store.runs.get(term) is not None:
            self.searched = _("the run %(id)s") % {"id": term}
            self.searched_ids = [term]
        else:
            self.searched = _("runs of the workflow %(name)s") % {"name": term}
            chosen = self.selection.filters.workflow_names
            self._refine(workflow_name=[term] if chosen is None or term in chosen else [])

    def get_results(self, request: HttpRequest) -> None:
        runs, wanted = self.model_admin.store.runs, self.list_per_page + 1
        before = request.GET.get(BEFORE)
        filters = self.selection.run_filters()
        few = RunsOfStore(
            self.model_admin.store,
            self.selection,
            self.model_admin.stalled_after,
            self.searched_ids,
        ).few()
        try:
            if few is None:
                rows = runs.list_runs(before=before, limit=wanted, **filters)
            else:
                last = None if before is None else runs.get(before)
                if before is not None and last is None:
                    raise RunNotFoundError(before)
                rows = [run for run in few if last is None or _comes_after(last, run)][:wanted]
        except RunNotFoundError as exc:
            raise IncorrectLookupParameters(exc) from exc
        has_older = len(rows) == wanted
        self.result_list = rows[: self.list_per_page]
        self.result_count = self.full_result_count = len(self.result_list)
        self.show_full_result_count = self.can_show_all = self.multi_page = False
        self.show_admin_actions = bool(rows)
        self.previous_page = None
        self.next_page = (
            self.get_query_string({BEFORE: self.result_list[-1].pk}) if has_older else None
        )
        self.first_page = None if before is None else self.get_query_string()
        count = len(self.result_list)
        self.count_text = f"{count_text(count)}+" if has_older else count_text(count)


def _comes_after(last: WorkflowRun, run: WorkflowRun) -> bool:
    return (run.started_at, run.pk) < (last.started_at, last.pk)


PAGES = (BEFORE, AFTER)
"""What a page of the list is named by."""

PRESETS: tuple[tuple[str, dict[str, str]], ...] = (
    ("all", {}),
    ("failed_today", {selection.STATUS: "failed", selection.ENDED: "24h"}),
    ("running", {selection.STATUS: "running"}),
    ("stalled", {selection.STALLED: "1"}),
    ("waiting", {selection.WAITING: "1"}),
)
"""The views above the list, with their parameters."""

STARTED_TODAY = {selection.STATUS: "failed", selection.SINCE: "24h"}
"""Instead of what has failed today, where only a database could tell that."""

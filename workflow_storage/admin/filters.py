"""The filters beside the list of runs: what `selection` understands, as links and small forms.

They only show what can be chosen; the list itself carries out the selection.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, ClassVar

from django.contrib import admin
from django.urls import NoReverseMatch, reverse
from django.utils.translation import gettext_lazy as _

from workflow_storage.admin import selection
from workflow_storage.status import RunStatus

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from django.contrib.admin.views.main import ChangeList
    from django.db.models import QuerySet
    from django.http import HttpRequest


_SEVERAL = frozenset({selection.STATUS, selection.WORKFLOW, selection.LABEL})
"""What can be given several times; of the others the last one counts."""

_SITUATIONS = (_("Stalled"), _("Waiting"), _("Started by a run"))


class SelectionFilter(admin.ListFilter):
    """Takes its parameters out of those that Django would look up in the table."""

    template = "admin/workflow_storage/filter.html"
    parameters: ClassVar[tuple[str, ...]] = ()
    links: ClassVar[tuple[tuple[str, Any], ...]] = ()
    """Values of the first parameter, and how they are shown."""

    def __init__(
        self, request: HttpRequest, params: dict[str, Any], model: Any, model_admin: Any
    ) -> None:
        super().__init__(request, params, model, model_admin)
        for name in self.parameters:
            if name in params:
                values = params.pop(name)
                self.used_parameters[name] = values if isinstance(values, list) else [values]

    def has_output(self) -> bool:
        return True

    @property
    def parameter_name(self) -> str:
        """What themes of the admin tell filters apart by, as those of Django have it."""
        return self.parameters[0]

    def expected_parameters(self) -> list[str | None]:
        return [*self.parameters]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        return queryset

    @property
    def chosen(self) -> str:
        """What was chosen, for the line that shows where the filter is closed."""
        texts = dict(self.links)
        values = [value for name in self.parameters for value in self.values(name)]
        return ", ".join(str(texts.get(value, value)) for value in values)

    @property
    def hidden_by_last(self) -> list[tuple[str, str]]:
        """Parameters that are given several times, without the last, which alone Django searches by."""
        return [(name, value) for name in self.parameters for value in self.values(name)[:-1]]

    def values(self, name: str) -> list[str]:
        """Return the values of a parameter that count, as they were given, each once."""
        given: Any = self.used_parameters.get(name) or []
        if name not in _SEVERAL:
            given = given[-1:]
        return list(dict.fromkeys(str(value) for value in given if value))

    def _is_chosen(self, value: str, name: str, others: Iterable[str]) -> bool:
        chosen = self.values(name) or [""]
        return value in chosen and not any(map(self.values, others))

    def value(self, name: str) -> str:
        """Return the value of a parameter that has one, nothing without it."""
        return "".join(self.values(name)[-1:])


class LinksFilter(SelectionFilter):
    """Offers a link for each of some values of one parameter."""

    def choices(self, changelist: ChangeList) -> Iterator[Any]:
        """Yield the links."""
        (name, *others) = self.parameters
        for value, text in ((None, _("All")), *self.links):
            new = {name: value, **dict.fromkeys(others)}
            yield {
                "selected": self._is_chosen(value or "", name, others),
                "query_string": changelist.get_query_string(new),
                "display": text,
            }


class StatusFilter(LinksFilter):
    """By status."""

    title = _("status")
    parameters = (selection.STATUS,)
    links = tuple(RunStatus.choices)


class FormFilter(SelectionFilter):
    """Offers fields to fill in, and a button, beside links."""

    fields: ClassVar[tuple[tuple[str, Any, str], ...]] = ()
    """Parameter, label and HTML type of each."""

    def choices(self, changelist: ChangeList) -> Iterator[Any]:
        """Yield what the template shows: the links, and then the fields and what is to stay."""
        first = self.parameters[0]
        for value, text in (("", _("All")), *self.links):
            others = dict.fromkeys(self.parameters[1:])
            yield {
                "selected": self._is_chosen(value, first, others),
                "query_string": changelist.get_query_string({first: value or None, **others}),
                "display": text,
            }
        stay = [
            (name, value)
            for name, values in changelist.filter_params.items()
            if name not in self.parameters
            for value in (values if isinstance(values, list) else [values])
        ]
        asked = getattr(changelist, "selection", None)
        if asked is not None and asked.order:
            stay.append((selection.ORDER, asked.order))
        yield {
            "is_form": True,
            "stay": stay,
            "fields": [
                {
                    "name": name,
                    "label": label,
                    "type": kind,
                    "values": self.values(name) or [""],
                    "suggestions": self.suggestions(changelist, name),
                    "suggestions_url": self.suggestions_url(changelist, name),
                }
                for name, label, kind in self.fields
            ],
        }

    def suggestions(self, changelist: ChangeList, name: str) -> list[str]:
        """Return what a field offers while it is filled in."""
        return []

    def suggestions_url(self, changelist: ChangeList, name: str) -> str:
        """Return the address that tells what begins as a field is filled in; nothing without one."""
        return ""


class TimeFilter(FormFilter):
    """By the time of the start."""

    title = _("start")
    parameters = (selection.SINCE, selection.UNTIL)
    links = (
        ("1h", _("Last hour")),
        ("24h", _("Last 24 hours")),
        ("7d", _("Last 7 days")),
        ("30d", _("Last 30 days")),
    )
    fields = (
        (selection.SINCE, _("From (a date, or an age such as 90m)"), "text"),
        (selection.UNTIL, _("Until"), "text"),
    )


class EndFilter(LinksFilter):
    """By the time of the end."""

    title = _("end")
    parameters = (selection.ENDED,)
    links = (
        ("1h", _("Last hour")),
        ("24h", _("Last 24 hours")),
        ("7d", _("Last 7 days")),
    )


class WorkflowFilter(FormFilter):
    """By workflow."""

    title = _("workflow")
    parameters = (selection.WORKFLOW,)
    fields = ((selection.WORKFLOW, _("Whole name"), "text"),)

    def suggestions(self, changelist: ChangeList, name: str) -> list[str]:
        """Return the first names of workflows there are."""
        names: list[str] = getattr(changelist, "workflow_names", [])
        return names

    def suggestions_url(self, changelist: ChangeList, name: str) -> str:
        """Return the address that tells the names that begin so, of which there can be thousands."""
        with suppress(NoReverseMatch):
            site = changelist.model_admin.admin_site.name
            return reverse(f"{site}:workflow_storage_run_workflows")
        return ""


class LabelFilter(FormFilter):
    """By a label."""

    title = _("label")
    parameters = (selection.LABEL,)
    fields = ((selection.LABEL, _("name=value"), "text"),)


class SituationFilter(FormFilter):
    """By what a run is in: stalled, waiting, started by another one."""

    title = _("situation")
    parameters = (
        selection.STALLED,
        selection.WAITING,
        selection.HAS_PARENT,
        selection.PARENT,
    )

    def __init__(
        self, request: HttpRequest, params: dict[str, Any], model: Any, model_admin: Any
    ) -> None:
        super().__init__(request, params, model, model_admin)
        # Not all that can be written there means yes.
        asked = selection.selection_of(request.GET)
        self._situations = {
            selection.STALLED: asked.stalled,
            selection.WAITING: asked.filters.waiting is True,
            selection.HAS_PARENT: asked.has_parent,
        }

    @property
    def chosen(self) -> str:
        """What was chosen."""
        names = (selection.STALLED, selection.WAITING, selection.HAS_PARENT)
        chosen = [
            str(text)
            for name, text in zip(names, _SITUATIONS, strict=True)
            if self._situations[name]
        ]
        return ", ".join([*chosen, *self.values(selection.PARENT)])

    def choices(self, changelist: ChangeList) -> Iterator[Any]:
        """Yield the links."""
        nothing = dict.fromkeys(self.parameters)
        for name, text in (
            ("", _("All")),
            (selection.STALLED, _SITUATIONS[0]),
            (selection.WAITING, _SITUATIONS[1]),
            (selection.HAS_PARENT, _SITUATIONS[2]),
        ):
            new = {**nothing, name: "1"} if name else nothing
            yield {
                "selected": self._situations[name] if name else not self.chosen,
                "query_string": changelist.get_query_string(new),
                "display": text,
            }


class AmountFilter(FormFilter):
    """By what a run took."""

    title = _("what it took")
    parameters = (selection.SLOWER, selection.COSTLIER)
    fields = (
        (selection.SLOWER, _("Seconds, at least"), "text"),
        (selection.COSTLIER, _("USD, at least"), "text"),
    )

"""What a list of runs is asked for: read from the address, and told to whichever store is shown.

Every filter, search and order of the list is a parameter of the address, so that a list can be
bookmarked and shared. Called by the list of runs and by its filters.
"""

from __future__ import annotations

import math
import re
from datetime import datetime, time, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from django.db.models import Q
from django.utils import timezone
from django.utils.dateparse import parse_date, parse_datetime
from django.utils.translation import gettext as _
from django.utils.translation import ngettext

from workflow_storage.admin.masking import NO_MASK
from workflow_storage.filters import valid_filters
from workflow_storage.status import RunStatus
from workflow_storage.validation import in_project_time

if TYPE_CHECKING:
    from collections.abc import Mapping

    from django.http import QueryDict

    from workflow_storage.admin.masking import Mask
    from workflow_storage.base import RunFilters
    from workflow_storage.filters import ValidFilters

STATUS, WORKFLOW, LABEL, PARENT = "status__exact", "workflow", "label", "parent"
SINCE, UNTIL = "since", "until"
ENDED = "ended"
SLOWER, COSTLIER, ORDER = "slower", "cost", "sort"
STALLED, WAITING, HAS_PARENT = "stalled", "waiting", "children"
"""The parameters of the address."""

ORDERS = {"duration": "-duration_seconds", "cost": "-total_cost_usd"}
"""What a list can be ordered by besides the start, within a time."""

WINDOW = timedelta(days=7)
"""How far back is looked for what no index knows, unless a time is given."""

_LONGEST = 10**9  # seconds, some 30 years

_AGE = re.compile(r"(\d{1,6})([mhdw])")
_UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_YES = frozenset({"1", "yes", "true"})
_NO = frozenset({"", "0", "no", "false"})


class Selection(NamedTuple):
    """What a list of runs is asked for."""

    filters: ValidFilters
    """What every store can tell."""
    stalled: bool
    has_parent: bool
    slower: float | None
    """Seconds that a run took at least."""
    costlier: float | None
    """USD that a run cost at least."""
    ended_after: datetime | None
    order: str
    """One of `ORDERS`; nothing for the start."""
    problems: list[str]
    """What is wrong with a parameter, which is then left out."""
    notes: list[str]
    """What is not looked at, and how to see it."""

    @property
    def needs_database(self) -> bool:
        """Whether it asks for what only a database can tell."""
        amounts = (self.slower, self.costlier, self.ended_after)
        return self.has_parent or bool(self.order) or amounts != (None, None, None)

    def run_filters(self) -> RunFilters:
        """Return the filters of the contract."""
        filters = self.filters
        return {
            "workflow_name": filters.workflow_names,
            "status": filters.statuses,
            "started_after": filters.started_after,
            "started_before": filters.started_before,
            "labels": filters.labels,
            "parent_id": filters.parent_id,
            "waiting": filters.waiting,
        }

    def condition(self) -> Q:
        """Return what it asks for beyond the filters of the contract, but for `stalled`."""
        condition = Q()
        if self.has_parent:
            condition &= Q(parent_id__isnull=False)
        if self.slower is not None:
            begun = timezone.now() - timedelta(seconds=min(self.slower, _LONGEST))
            # In this order, for the status is in the index, so that few runs are looked up.
            still = Q(status=RunStatus.RUNNING) & Q(attempt_started_at__lte=begun)
            condition &= Q(duration_seconds__gte=self.slower) | still
        if self.costlier is not None:
            condition &= Q(total_cost_usd__gte=self.costlier)
        if self.ended_after is not None:
            condition &= Q(completed_at__gte=self.ended_after)
        if self.order:
            condition &= Q(**{f"{ORDERS[self.order].removeprefix('-')}__isnull": False})
        return condition


def selection_of(parameters: QueryDict, mask: Mask = NO_MASK) -> Selection:
    """Return what an address asks for; what cannot be understood is a problem, and left out.

    Args:
        parameters: of the address.
        mask: hides labels by which no run may be found, or trying would tell what they are.
    """
    problems: list[str] = []
    notes: list[str] = []
    given: dict[str, Any] = {}
    _add_simple(parameters, given, problems, mask)
    after = _moment(parameters, SINCE, problems)
    before = _moment(parameters, UNTIL, problems)
    slower, costlier = (_number(parameters, name, problems) for name in (SLOWER, COSTLIER))
    has_parent = _is_yes(parameters, HAS_PARENT, problems)
    order = parameters.get(ORDER, "")
    if order and order not in ORDERS:
        problems.append(
            _("sort=%(given)s: no such order. There are %(orders)s.")
            % {"given": order, "orders": ", ".join(ORDERS)}
        )
        order = ""
    ended_after = _moment(parameters, ENDED, problems)
    in_window = has_parent or bool(order) or slower is not None or costlier is not None
    if ended_after is not None and after is None:
        after = ended_after - WINDOW
        notes.append(
            ngettext(
                "Runs that started more than %(days)d day before are not looked at.",
                "Runs that started more than %(days)d days before are not looked at.",
                WINDOW.days,
            )
            % {"days": WINDOW.days}
        )
    elif in_window and after is None:
        after = (before or timezone.now()) - WINDOW
        notes.append(
            ngettext(
                "Only runs of the last %(days)d day are looked at. Choose a time to see others.",
                "Only runs of the last %(days)d days are looked at. Choose a time to see others.",
                WINDOW.days,
            )
            % {"days": WINDOW.days}
        )
    if after is not None:
        given["started_after"] = after
    if before is not None:
        given["started_before"] = before
    stalled = _is_yes(parameters, STALLED, problems)
    return Selection(
        valid_filters(given),
        stalled,
        has_parent,
        slower,
        costlier,
        ended_after,
        order,
        problems,
        notes,
    )


def _add_simple(
    parameters: QueryDict, given: dict[str, Any], problems: list[str], mask: Mask
) -> None:
    statuses = [status for status in parameters.getlist(STATUS) if status]
    unknown = [status for status in statuses if status not in RunStatus.values]
    if unknown:
        problems.append(
            _("%(given)s: no such status. There are %(statuses)s.")
            % {"given": ", ".join(unknown), "statuses": ", ".join(RunStatus.values)}
        )
        statuses = [status for status in statuses if status not in unknown]
    if statuses:
        given["status"] = statuses
    names = [name for name in parameters.getlist(WORKFLOW) if name]
    if names:
        given["workflow_name"] = names
    labels = {}
    for text in filter(None, parameters.getlist(LABEL)):
        name, equals, value = text.partition("=")
        if equals and name and value and mask.hides(name):
            problems.append(hidden_label(name))
        elif equals and name and value:
            labels[name] = value
        else:
            problems.append(_("%(given)s: no label. Write name=value.") % {"given": text})
    if labels:
        given["labels"] = labels
    if parameters.get(PARENT):
        given["parent_id"] = parameters[PARENT]
    if _is_yes(parameters, WAITING, problems):
        given["waiting"] = True


def hidden_label(name: str) -> str:
    """Say why no run is found by a label."""
    return _("The label %(name)s is hidden from you, so no run can be found by it.") % {
        "name": name
    }


def _is_yes(parameters: QueryDict, name: str, problems: list[str]) -> bool:
    given = parameters.get(name, "")
    if given not in _YES | _NO:
        problems.append(
            _("%(name)s=%(given)s: neither yes nor no. Write 1 or 0.")
            % {"name": name, "given": given}
        )
    return given in _YES


def _moment(parameters: QueryDict, name: str, problems: list[str]) -> datetime | None:
    text = parameters.get(name, "").strip()
    if not text:
        return None
    found = _AGE.fullmatch(text)
    try:
        if found:
            return timezone.now() - timedelta(**{_UNITS[found[2]]: int(found[1])})
        moment = parse_datetime(text)
        day = parse_date(text) if moment is None or len(text) <= len("2026-01-01") else None
        if day is not None:
            moment = datetime.combine(day, time.min)
            if name == UNTIL:  # that day, too
                moment += timedelta(days=1)
        if moment is not None:
            moment = in_project_time(moment)
            valid_filters({"started_after": moment})
            return moment
    except (ValueError, OverflowError):
        pass
    problems.append(
        _(
            "%(name)s=%(given)s: no time. Write a date, such as 2026-01-31, or an age, such as 90m, 12h or 7d."
        )
        % {"name": name, "given": text}
    )
    return None


def _number(parameters: Mapping[str, str], name: str, problems: list[str]) -> float | None:
    text = parameters.get(name, "").strip()
    if not text:
        return None
    try:
        number = float(text.replace(",", "."))
    except ValueError:
        number = math.nan
    if math.isfinite(number) and number >= 0:
        return number
    problems.append(
        _("%(name)s=%(given)s: no number of 0 or more.") % {"name": name, "given": text}
    )
    return None

"""The further pages of a run: its state at a step, a comparison with another run, and downloads."""

from __future__ import annotations

import json
from collections import deque
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, Unpack

from django.contrib.admin.utils import quote, unquote
from django.core.exceptions import PermissionDenied
from django.db.models import Min, OuterRef, Subquery
from django.http import Http404, HttpResponse, HttpResponseRedirect, JsonResponse
from django.template.loader import render_to_string
from django.template.response import TemplateResponse
from django.urls import path, reverse
from django.utils.http import content_disposition_header, urlencode
from django.utils.translation import gettext as _

from workflow_storage.admin import selection
from workflow_storage.admin.diffs import diff_block
from workflow_storage.admin.filters import TimeFilter
from workflow_storage.admin.overview import overview
from workflow_storage.admin.rendering import (
    cost_text,
    count_text,
    duration_text,
    exact_time,
    status_badge,
    tokens_text,
)
from workflow_storage.admin.run_page import FIRST, RunPage
from workflow_storage.admin.selection import selection_of
from workflow_storage.admin.trees import json_tree
from workflow_storage.backends.orm.conditions import conditions_of, order_of, with_values
from workflow_storage.backends.orm.names import workflow_names
from workflow_storage.base import Step
from workflow_storage.exceptions import DamagedStateError
from workflow_storage.factory import configured_alias, create_storage_backend
from workflow_storage.filters import valid_filters
from workflow_storage.models import ExecutionState, WorkflowRun
from workflow_storage.serialization import json_size
from workflow_storage.status import RunStatus
from workflow_storage.validation import (
    MAX_COUNT,
    MAX_WORKFLOW_NAME,
    PAYLOADS,
    is_possible_id,
    is_possible_name,
    run_fields,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from django.http import HttpRequest, QueryDict
    from django.utils.safestring import SafeString

    from workflow_storage.admin.masking import Mask
    from workflow_storage.base import Checkpoint, RunFilters, StorageBackend


class NodeRow(NamedTuple):
    """A node in two runs, side by side."""

    name: str
    counts: tuple[str, str]
    seconds: tuple[str, str]
    tokens: tuple[str, str]
    costs: tuple[str, str]


class RunViews:
    """Adds the pages to the admin of the runs."""

    if TYPE_CHECKING:
        admin_site: Any
        may_view_states: Callable[[HttpRequest], bool]
        mask: Callable[[HttpRequest], Mask]
        has_view_or_change_permission: Callable[..., bool]

    @property
    def store(self) -> StorageBackend:
        """The project's own store."""
        return create_storage_backend()

    def get_urls(self) -> list[Any]:
        """Return the addresses of the pages of runs, and those that Django has."""
        wrap = self.admin_site.admin_view
        views: list[tuple[str, Any, str]] = [
            ("overview/", self.overview_view, "overview"),
            ("workflows/", self.workflows_view, "workflows"),
            ("<path:object_id>/states/<int:step>/", self.state_view, "state"),
            ("<path:object_id>/states/<int:step>/file/", self.state_file_view, "state_file"),
            ("<path:object_id>/states/", self.state_of_view, "states"),
            ("<path:object_id>/steps/", self.steps_view, "steps"),
            ("<path:object_id>/payload/<slug:name>/", self.payload_view, "payload"),
            ("<path:object_id>/file/", self.file_view, "file"),
            ("<path:object_id>/compare/<path:other_id>/", self.compare_view, "compare"),
            ("<path:object_id>/compare/", self.compare_with_view, "compare_with"),
            ("<path:object_id>/live/", self.live_view, "live"),
        ]
        urls: list[Any] = super().get_urls()  # type: ignore[misc]
        return [
            *(
                path(route, wrap(view), name=f"workflow_storage_run_{n}")
                for route, view, n in views
            ),
            *urls,
        ]

    def view_url(self, view: str, *args: Any) -> str:
        """Return the address of one of the pages of runs."""
        quoted = [quote(arg) if isinstance(arg, str) else arg for arg in args]
        if view == "payload":
            quoted[1] = args[1]
        return reverse(f"{self.admin_site.name}:workflow_storage_run_{view}", args=quoted)

    def list_url(self) -> str:
        """Return the address of the list of runs."""
        return reverse(f"{self.admin_site.name}:workflow_storage_workflowrun_changelist")

    def query(self, name: str, value: str) -> str:
        """Return the end of the address of a list with one parameter."""
        return f"?{urlencode({name: value})}"

    def brief_runs(
        self, limit: int, before: WorkflowRun | None = None, **filters: Unpack[RunFilters]
    ) -> list[WorkflowRun]:
        """Return runs, newest first, from a database without what can be large."""
        if self.store.alias is None:
            return self.store.runs.list_runs(before=before, limit=limit, **filters)
        valid = valid_filters(filters)
        position = None if before is None else (before.started_at, before.pk)
        runs = with_values(
            WorkflowRun.objects.using(configured_alias()), conditions_of(valid, position)
        )
        runs = runs.annotate(newest_state_at=_newest_state_at())
        return list(runs.order_by(*order_of(valid)).defer(*PAYLOADS, "error_message")[:limit])

    def newer_run(self, run: WorkflowRun) -> WorkflowRun | None:
        """Return the run of the same workflow that was started after another; only in a database."""
        if self.store.alias is None:
            return None
        runs = WorkflowRun.objects.using(configured_alias()).filter(
            workflow_name=run.workflow_name, started_at__gte=run.started_at
        )
        later = runs.exclude(started_at=run.started_at, pk__lte=run.pk)
        later = later.order_by("started_at", "id").defer(*PAYLOADS, "error_message")
        found: WorkflowRun | None = later.annotate(newest_state_at=_newest_state_at()).first()
        return found

    def newest_step(self, run: WorkflowRun) -> Step | None:
        """Return the newest step of a run in a database, without reading its state."""
        states = ExecutionState._base_manager.using(configured_alias()).filter(run_id=run.pk)
        rows: Any = states.order_by("-step").values(*Step.__annotations__)[:1]
        return next(iter(rows), None)

    def _run(self, request: HttpRequest, object_id: str, *, states: bool = False) -> WorkflowRun:
        """Return the run of a page, if there is one and the user may see it.

        Raises:
            PermissionDenied, Http404: if not.
        """
        if not self.has_view_or_change_permission(request):
            raise PermissionDenied
        if states and not self.may_view_states(request):
            raise PermissionDenied
        run_id = unquote(object_id)
        run = self.store.runs.get(run_id) if is_possible_id(run_id) else None
        if run is None:
            raise Http404(_("There is no such run."))
        return run

    def _context(self, request: HttpRequest, run: WorkflowRun, title: str) -> dict[str, Any]:
        return {
            **self.admin_site.each_context(request),
            "opts": WorkflowRun._meta,
            "title": title,
            "run": run,
            "run_url": self.url_of(run.pk),  # type: ignore[attr-defined]
            "list_url": self.list_url(),
            "media": self.media,  # type: ignore[attr-defined]
        }

    def _response(
        self, request: HttpRequest, template: str, context: dict[str, Any]
    ) -> HttpResponse:
        request.current_app = self.admin_site.name
        return TemplateResponse(request, f"admin/workflow_storage/{template}", context)

    def overview_view(self, request: HttpRequest) -> HttpResponse:
        """Show the charts above the list; with ``fragment``, nothing around them."""
        if not self.has_view_or_change_permission(request):
            raise PermissionDenied
        parameters = request.GET.copy()
        is_fragment = bool(parameters.pop("fragment", None))
        asked = selection_of(parameters, self.mask(request))
        context = {
            "overview": overview(self.store, asked, parameters, self.list_url()),
            "list_url": f"{self.list_url()}?{parameters.urlencode()}",
        }
        if is_fragment:
            return self._response(request, "overview_charts.html", context)
        around = {
            **self.admin_site.each_context(request),
            "opts": WorkflowRun._meta,
            "title": _("Runs over time"),
            "problems": asked.problems,
            "times": _times(parameters),
            "media": self.media,  # type: ignore[attr-defined]
        }
        return self._response(request, "overview.html", {**around, **context})

    def workflows_view(self, request: HttpRequest) -> HttpResponse:
        """Send the first names of workflows that begin as is asked for; none without a database."""
        if not self.has_view_or_change_permission(request):
            raise PermissionDenied
        beginning, alias = request.GET.get("beginning", ""), self.store.alias
        is_possible = not beginning or is_possible_name("beginning", beginning, MAX_WORKFLOW_NAME)
        names = workflow_names(alias, beginning) if alias is not None and is_possible else []
        return JsonResponse({"names": names})

    def state_of_view(self, request: HttpRequest, object_id: str) -> HttpResponse:
        """Lead to the page of the step that is asked for, or of the newest one."""
        run = self._run(request, object_id, states=True)
        step = _number(request.GET.get("step", ""))
        if step is None:
            newest = self.store.states.get_latest_checkpoint(run.pk)
            step = newest["step"] if newest else 0
        return HttpResponseRedirect(self.view_url("state", run.pk, step))

    def steps_view(self, request: HttpRequest, object_id: str) -> HttpResponse:
        """Show all steps in a table, from the one that is asked for on."""
        run = self._run(request, object_id, states=True)
        page = RunPage(self, request, run)  # type: ignore[arg-type]
        table = page.all_steps(_number(request.GET.get(FIRST, "")) or 0)
        context = self._context(request, run, _("All steps of %(run)s") % {"run": run})
        return self._response(request, "run_steps.html", {**context, "table": table})

    def state_view(self, request: HttpRequest, object_id: str, step: int) -> HttpResponse:
        """Show the state at a step: after, before, and what the node changed."""
        run = self._run(request, object_id, states=True)
        mask = self.mask(request)
        after, damage = self._state(run, step)
        if after is None and not damage:
            raise Http404(_("There is no such step."))
        before, lost = self._state(run, step - 1) if step else (None, "")
        if step and before is None and not lost:
            lost = _("The step before was deleted.")
        first, last = self._first_and_last_step(run) or (step, step)
        context = {
            **self._context(
                request, run, _("Step %(step)s of %(run)s") % {"step": step, "run": run}
            ),
            "step": step,
            "checkpoint": after,
            "created": exact_time(after["created_at"]) if after else "",
            "duration": duration_text(after["duration_seconds"]) if after else "",
            "tokens": tokens_text(after["tokens"]) if after else "",
            "cost": cost_text(after["cost_usd"]) if after else "",
            "size": count_text(json_size(after["state_data"])) if after else "",
            "first": first,
            "last": last,
            # Steps have no gaps; what is deleted are the first ones.
            "previous_url": self.view_url("state", run.pk, step - 1) if first < step else "",
            "next_url": self.view_url("state", run.pk, step + 1) if step < last else "",
            "slider_url": self.view_url("states", run.pk),
            "damage": damage,
            "is_first": not step,
            "lost": lost,
            "after_tree": self._tree(run, after, mask),
            "before_tree": self._tree(run, before, mask),
            "difference": diff_block(
                before["state_data"] if before else {}, after["state_data"], mask=mask
            )
            if after and not lost
            else "",
        }
        return self._response(request, "run_state.html", context)

    def _state(self, run: WorkflowRun, step: int) -> tuple[Checkpoint | None, str]:
        """Return the checkpoint at a step if there is one, and why it cannot be read if so."""
        try:
            return self.store.states.get_state(run.pk, step) if step <= MAX_COUNT else None, ""
        except DamagedStateError as exc:
            return None, str(exc)

    def _tree(self, run: WorkflowRun, checkpoint: Checkpoint | None, mask: Mask) -> Any:
        if checkpoint is None:
            return ""
        url = self.view_url("state_file", run.pk, checkpoint["step"])
        return json_tree(checkpoint["state_data"], mask=mask, download_url=url, name=_("state"))

    def _first_and_last_step(self, run: WorkflowRun) -> tuple[int, int] | None:
        """Return the first and the last step that there are, without keeping those between."""
        if self.store.alias is None:
            steps = iter(self.store.states.iter_steps(run.pk))
            ends = [*islice(steps, 1), *deque(steps, maxlen=1)]
            return (ends[0]["step"], ends[-1]["step"]) if ends else None
        newest = self.newest_step(run)
        if newest is None:
            return None
        states = ExecutionState._base_manager.using(configured_alias()).filter(run_id=run.pk)
        first: int | None = states.aggregate(first=Min("step"))["first"]
        return newest["step"] if first is None else first, newest["step"]

    def state_file_view(self, request: HttpRequest, object_id: str, step: int) -> HttpResponse:
        """Send the state at a step as a file, without secrets for who may not see them."""
        run = self._run(request, object_id, states=True)
        checkpoint = self.store.states.get_state(run.pk, step) if step <= MAX_COUNT else None
        if checkpoint is None:
            raise Http404(_("There is no such step."))
        return self._file(request, checkpoint["state_data"], f"{run.pk}-{step}.json")

    def payload_view(self, request: HttpRequest, object_id: str, name: str) -> HttpResponse:
        """Send a payload as a file, without secrets for who may not see them."""
        run = self._run(request, object_id)
        if name not in PAYLOADS:
            raise Http404(_("There is no such payload."))
        return self._file(request, getattr(run, name), f"{run.pk}-{name}.json")

    def file_view(self, request: HttpRequest, object_id: str) -> HttpResponse:
        """Send a run without its states as a file, without secrets for who may not see them."""
        run = self._run(request, object_id)
        fields = run_fields(run)
        sees = self.may_view_states(request)
        if not sees:
            fields.pop("current_node")
        attempts = [one._asdict() for one in self.store.runs.list_attempts(run.pk)]
        for attempt in attempts:
            if not sees:
                attempt.pop("node")
        steps = list(self.store.states.iter_steps(run.pk)) if sees else []
        data = {"run": fields, "attempts": attempts, "steps": steps}
        return self._file(request, data, f"{run.pk}.json")

    def _file(self, request: HttpRequest, value: Any, name: str) -> HttpResponse:
        masked = self.mask(request).masked(value)
        text = json.dumps(masked, indent=2, default=str)
        response = HttpResponse(text, content_type="application/json")
        response["Content-Disposition"] = content_disposition_header(True, name) or "attachment"
        return response

    def compare_with_view(self, request: HttpRequest, object_id: str) -> HttpResponse:
        """Lead to the comparison with the run whose id was filled in."""
        run = self._run(request, object_id)
        other = request.GET.get("with", "").strip()
        if not is_possible_id(other) or self.store.runs.get(other) is None:
            self.message_user(  # type: ignore[attr-defined]
                request, _("There is no run with the id %(id)s.") % {"id": other}, "ERROR"
            )
            return HttpResponseRedirect(self.url_of(run.pk))  # type: ignore[attr-defined]
        return HttpResponseRedirect(self.view_url("compare", run.pk, other))

    def compare_view(self, request: HttpRequest, object_id: str, other_id: str) -> HttpResponse:
        """Show two runs side by side: fields, payloads, nodes and final states."""
        run, other = self._run(request, object_id), self._run(request, other_id)
        mask, sees = self.mask(request), self.may_view_states(request)
        final: SafeString | str = ""
        if sees:
            try:
                newest = [self.store.states.get_latest_state(one.pk) for one in (other, run)]
                final = diff_block(*newest, mask=mask)
            except DamagedStateError as exc:
                final = str(exc)
        context = {
            **self._context(request, run, _("Two runs compared")),
            "other": other,
            "other_url": self.url_of(other.pk),  # type: ignore[attr-defined]
            "swap_url": self.view_url("compare", other.pk, run.pk),
            "facts": self._facts(other, run),
            "payloads": [
                (title, diff_block(getattr(other, name), getattr(run, name), mask=mask))
                for title, name in (
                    (_("Inputs"), "inputs"),
                    (_("Configuration"), "config_snapshot"),
                    (_("Outputs"), "outputs"),
                )
            ],
            "nodes": self._nodes(other, run) if sees else [],
            "sees_states": sees,
            "final": final,
        }
        return self._response(request, "run_compare.html", context)

    def _facts(self, *runs: WorkflowRun) -> list[tuple[str, list[Any]]]:
        return [
            (_("Workflow"), [run.workflow_name for run in runs]),
            (_("Status"), [status_badge(run) for run in runs]),
            (_("Started"), [exact_time(run.started_at) for run in runs]),
            (_("Duration"), [duration_text(run.duration_seconds) for run in runs]),
            (_("Tokens"), [tokens_text(run.total_tokens) for run in runs]),
            (_("Cost"), [cost_text(run.total_cost_usd) for run in runs]),
            (_("Attempts"), [str(run.attempt) for run in runs]),
        ]

    def _nodes(self, *runs: WorkflowRun) -> list[NodeRow]:
        names: dict[str, None] = {}
        totals: list[dict[str, list[Any]]] = []
        for run in runs:
            of_run: dict[str, list[Any]] = {}
            for step in self.store.states.iter_steps(run.pk):
                names[step["node_id"]] = None
                total = of_run.setdefault(step["node_id"], [0, None, None, None])
                total[0] += 1
                for place, name in enumerate(("duration_seconds", "tokens", "cost_usd"), 1):
                    value = step[name]  # type: ignore[literal-required]
                    if value is not None:
                        total[place] = (total[place] or 0) + value
            totals.append(of_run)
        rows = []
        for name in names:
            ours, theirs = (total.get(name, [0, None, None, None]) for total in totals)
            rows.append(
                NodeRow(
                    name,
                    (count_text(ours[0]), count_text(theirs[0])),
                    (duration_text(ours[1]), duration_text(theirs[1])),
                    (tokens_text(ours[2]), tokens_text(theirs[2])),
                    (cost_text(ours[3]), cost_text(theirs[3])),
                )
            )
        return rows

    def live_view(self, request: HttpRequest, object_id: str) -> HttpResponse:
        """Send the regions of the page of a run that change while it goes on.

        Its newest state is left out if it is that of the ``step`` which the browser shows.
        """
        run = self._run(request, object_id)
        step = _number(request.GET.get("step", ""))
        page = RunPage(self, request, run, known_step=step)  # type: ignore[arg-type]
        is_known = page.newest_step is not None and page.newest_step["step"] == step
        names = ["head", "progress", *["latest"] * (page.sees_states and not is_known)]
        regions = {
            name: render_to_string(
                f"admin/workflow_storage/run_{name}.html", {"page": page, "run": run}, request
            )
            for name in names
        }
        return JsonResponse(
            {
                "ended": RunStatus(run.status).is_terminal,
                "status": run.status,
                "version": page.version,
                "step": step if is_known else page.shown_step,
                "regions": regions,
            }
        )


def _times(parameters: QueryDict) -> list[tuple[str, str, bool]]:
    """Return text and address of other times to look at, and whether it is the one that is shown."""
    shown = "" if parameters.get(selection.UNTIL) else parameters.get(selection.SINCE) or "24h"
    times = []
    for since, text in TimeFilter.links:
        asked = parameters.copy()
        asked[selection.SINCE] = since
        asked.pop(selection.UNTIL, None)
        times.append((str(text), f"?{asked.urlencode()}", since == shown))
    return times


def _newest_state_at() -> Subquery:
    """Return when a run saved its newest state, for a query of runs."""
    states = ExecutionState._base_manager.using(configured_alias()).filter(run_id=OuterRef("pk"))
    return Subquery(states.order_by("-step").values("created_at")[:1])


def _number(text: str) -> int | None:
    """Return the number of a step that a user has written; None for what can be none."""
    return int(text) if text.isdecimal() and len(text) <= len(str(MAX_COUNT)) else None

"""Queries of the pages of the admin: as many for many rows as for few, and few for an overview."""

import re

import pytest
from django.contrib.admin.helpers import ACTION_CHECKBOX_NAME
from django.core.cache import cache
from django.db import connection
from django.test.utils import CaptureQueriesContext
from django.urls import reverse

from tests.admin.conftest import RUNS, STATES, add_runs, page_of
from workflow_storage import ExecutionState, WorkflowRun
from workflow_storage.admin import ExecutionStateAdmin, WorkflowRunAdmin, sections
from workflow_storage.backends.orm import run_rows
from workflow_storage.testing import stored_run

pytestmark = pytest.mark.django_db

FEW, MANY = 4, 25
LONG = " ".join(str(number**3) for number in range(1000))
"""So long that the states are stored as deltas."""


@pytest.fixture(autouse=True)
def _empty_cache():
    cache.clear()
    yield
    cache.clear()


def page(view, *args):
    return reverse(f"admin:workflow_storage_run_{view}", args=["the-run", *args])


def listed(query=""):
    return lambda client: client.get(f"{reverse(RUNS)}?{query}")


def confirmed(action, across, query=""):
    def ask(client):
        chosen = list(WorkflowRun.objects.values_list("pk", flat=True))
        data = {"action": action, "index": "0", ACTION_CHECKBOX_NAME: chosen}
        return client.post(
            f"{reverse(RUNS)}?{query}", {**data, "select_across": "1" if across else "0"}
        )

    return ask


PAGES = {
    "list": listed(),
    "list, after a run": listed("before=run-0000"),
    "list, before a run": listed("after=run-0003"),
    "failed": listed("status__exact=failed"),
    "a workflow": listed("workflow=bulk"),
    "a label": listed("label=tenant%3Da"),
    "a time": listed("since=7d"),
    "stalled": listed("stalled=1"),
    "started by a run": listed("children=1"),
    "at least a second": listed("slower=1"),
    "by duration": listed("sort=duration"),
    "search for an id": listed("q=run-"),
    "search for a workflow": listed("q=bul"),
    "search for a label": listed("q=tenant%3Da"),
    "search for an error": listed("q=timed+out"),
    "run": lambda client: client.get(page_of(WorkflowRun(id="the-run"))),
    "live": lambda client: client.get(page("live")),
    "file": lambda client: client.get(page("file")),
    "state": lambda client: client.get(page("state", 1)),
    "compare": lambda client: client.get(page("compare", "other")),
    "states of a run": lambda client: client.get(f"{reverse(STATES)}?run__id__exact=the-run"),
    "states": lambda client: client.get(reverse(STATES)),
    "page of a state": lambda client: client.get(
        reverse(
            "admin:workflow_storage_executionstate_change",
            args=[ExecutionState.objects.get(run="the-run", step=1).pk],
        )
    ),
    "overview": lambda client: client.get(reverse("admin:workflow_storage_run_overview")),
    "overview of 7 days": lambda client: client.get(
        reverse("admin:workflow_storage_run_overview"), {"since": "7d"}
    ),
    "overview of 30 days": lambda client: client.get(
        reverse("admin:workflow_storage_run_overview"), {"since": "30d"}
    ),
    "confirmation, selected": confirmed("cancel_runs", across=False),
    "confirmation, all": confirmed("cancel_runs", across=True),
}


def store(backend, count):
    """Store so many runs, and two that are as much in all they have."""
    WorkflowRun.objects.all().delete()
    labels = {f"label-{number}": "a" for number in range(min(count, 30))}
    add_runs(
        count,
        status="failed",
        error_message="it timed out",
        duration_seconds=2.0,
        total_cost_usd=0.1,
        total_tokens=5,
        parent_id="the-run",
    )
    for number in range(count):
        stored_run(
            backend,
            id=f"labelled-{number:04}",
            workflow_name=f"workflow-{number}",
            status="running",
            labels={**labels, "tenant": "a"},
            parent_id="the-run",
            forked_from_step=1,
        )
    # Silent for long.
    WorkflowRun.objects.filter(status="running").update(attempt_started_at="2026-01-01T00:00:00Z")
    for run_id in ("the-run", "other"):
        run = stored_run(backend, id=run_id, workflow_name="bulk", parent_id="run-0001")
        for number in range(count):
            backend.runs.update_status(run.id, "running")
            text = LONG + f"{number} " * number
            backend.states.save_state(run.id, {"text": text}, f"node-{number}")
            backend.runs.update_status(run.id, "failed", error_message="it timed out")


def queries_of(client, ask):
    ask(client)  # what is looked up once in a process
    cache.clear()
    with CaptureQueriesContext(connection) as captured:
        assert ask(client).status_code == 200
    return len(captured)


def test_pages_take_as_many_queries_for_many_rows_as_for_few(admin_client, backend, monkeypatch):
    monkeypatch.setattr(sections, "_sections", [])  # those of other apps take queries of their own
    found = []
    for count in (FEW, MANY):
        # There is an older page, which takes a query to count, at any number.
        for model_admin in (WorkflowRunAdmin, ExecutionStateAdmin):
            monkeypatch.setattr(model_admin, "list_per_page", count - 2)
        store(backend, count)
        found.append({name: queries_of(admin_client, ask) for name, ask in PAGES.items()})

    few, many = found
    assert many == few
    assert many["overview of 7 days"] <= 5  # of which two find out who asks
    assert max(many.values()) <= 16


@pytest.mark.parametrize("common", [1, 100])
def test_all_runs_of_a_label_are_acted_on_however_they_are_found(
    admin_client, backend, monkeypatch, common
):
    monkeypatch.setattr(run_rows, "COMMON", common)
    for number in range(8):
        labels = {"tenant": "ab"[number % 2], "stage": "live"}
        stored_run(backend, id=f"run-{number}", status="running", labels=labels)

    asked = confirmed("cancel_runs", across=True, query="label=tenant%3Da&label=stage%3Dlive")
    text = asked(admin_client).content.decode()

    assert "4 runs that match the filters" in text
    assert re.findall(r"(run-\d)/change/", text) == ["run-6", "run-4", "run-2", "run-0"]

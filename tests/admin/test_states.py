"""The states in the admin."""

import pytest
from django.contrib import admin
from django.test import RequestFactory
from django.urls import reverse

from tests.admin.conftest import STATES
from workflow_storage import ExecutionState, WorkflowRun
from workflow_storage.admin import ExecutionStateAdmin
from workflow_storage.testing import stored_run

pytestmark = pytest.mark.django_db


def test_the_states_of_a_run_are_listed_newest_first(admin_client, backend):
    run, other = stored_run(backend), stored_run(backend)
    for number in range(3):
        for stored in (run, other):
            backend.states.save_state(stored.id, {}, f"node-{number}")

    rows = admin_client.get(reverse(STATES), {"q": run.id}).context["cl"].result_list

    assert [(state.run_id, state.step) for state in rows] == [(run.id, step) for step in (2, 1, 0)]


def test_the_list_shows_what_each_node_took_and_how_large_its_state_is(
    admin_client, backend, django_assert_num_queries
):
    run = stored_run(backend, workflow_name="invoices", inputs={"large": "x" * 1000})
    backend.states.save_state(
        run.id, {"a": "ä" * 10}, "ocr", duration_seconds=1.5, tokens=1234, cost_usd=0.02
    )
    admin_client.get(reverse(STATES))

    with django_assert_num_queries(3) as captured:  # session, user, the page
        text = admin_client.get(reverse(STATES)).content.decode()

    assert "inputs" not in captured.captured_queries[-1]["sql"]
    for shown in ("invoices", "1.5 s", "1,234", "$0.0200", ">29<"):
        assert shown in text
    assert reverse("admin:workflow_storage_run_state", args=[run.id, 0]) in text


def test_the_list_of_a_runs_states_leads_to_any_step(admin_client, backend):
    run = stored_run(backend)
    backend.states.save_state(run.id, {}, "node")
    url = reverse("admin:workflow_storage_run_states", args=[run.id])

    of_run = admin_client.get(reverse(STATES), {"run__id__exact": run.id}).content.decode()

    assert f'action="{url}"' in of_run
    assert 'name="step"' not in admin_client.get(reverse(STATES)).content.decode()


def test_runs_can_have_an_admin_of_the_projects_own(admin_user, backend):
    run = stored_run(backend)
    backend.states.save_state(run.id, {}, "node")
    site = admin.AdminSite("own")
    site.register(WorkflowRun)
    site.register(ExecutionState, ExecutionStateAdmin)
    request = RequestFactory().get("/", {"run__id__exact": run.id})
    request.user = admin_user

    response = site.get_model_admin(ExecutionState).changelist_view(request)

    changelist = response.context_data["cl"]
    assert changelist.jump_url is None
    assert site.get_model_admin(ExecutionState).at_step(changelist.result_list[0]) == "0"


def test_no_states_are_shown_of_a_database_that_the_project_does_not_use(
    admin_client, backend, settings
):
    run = stored_run(backend)
    backend.states.save_state(run.id, {}, "node")
    url = reverse(
        "admin:workflow_storage_executionstate_change", args=[ExecutionState.objects.get().pk]
    )
    note = "are on the pages of their runs"
    page = admin_client.get(reverse(STATES))
    assert len(page.context["cl"].result_list) == 1
    assert note not in page.content.decode()
    assert admin_client.get(url).status_code == 200

    settings.WORKFLOW_STORAGE = "memory://without-states"

    page = admin_client.get(reverse(STATES))
    assert len(page.context["cl"].result_list) == 0
    assert f"States of runs in memory://without-states {note}." in page.content.decode()
    assert admin_client.get(url).status_code == 302

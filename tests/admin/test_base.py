"""What both admins do: they change nothing, show the project's own store, work on any site."""

import re

import pytest
from django.contrib import admin
from django.contrib.admin import AdminSite
from django.contrib.admin.utils import quote
from django.contrib.auth.models import Permission
from django.urls import path, reverse

from tests.admin.conftest import RUNS, page_of
from workflow_storage import ExecutionState, WorkflowRun, create_storage_backend
from workflow_storage.admin import ExecutionStateAdmin, WorkflowRunAdmin
from workflow_storage.testing import stored_run

pytestmark = pytest.mark.django_db


@pytest.mark.parametrize("parameter", ["before", "status__exact", "id__exact", "q"])
def test_a_nul_in_a_parameter_is_answered_like_any_bad_lookup(admin_client, parameter):
    response = admin_client.get(reverse(RUNS), {parameter: "\0"})
    assert (response.status_code, response.url) == (302, reverse(RUNS) + "?e=1")


def test_nothing_can_be_added_changed_or_deleted(admin_client, backend):
    run = stored_run(backend)
    for name in ("add", "change", "delete"):
        args = [] if name == "add" else [quote(run.pk)]
        url = reverse(f"admin:workflow_storage_workflowrun_{name}", args=args)
        assert admin_client.post(url, {"post": "yes"}).status_code == 403
    selected = {"action": "delete_selected", "_selected_action": run.pk, "post": "yes"}
    admin_client.post(reverse(RUNS), selected)
    assert WorkflowRun.objects.count() == 1


@pytest.mark.django_db(databases=["default"])
def test_the_admin_shows_the_backend_of_the_setting(
    admin_client, backend, settings, tmp_path, django_db_blocker
):
    from workflow_storage.factory import forget

    stored_run(backend, id="in-default")
    settings.WORKFLOW_STORAGE = f"sqlite:///{tmp_path}/runs.db"
    with django_db_blocker.unblock():
        configured = create_storage_backend()
        run = stored_run(configured, id="in-file")
        configured.states.save_state(run.id, {}, "node")

        text = admin_client.get(reverse(RUNS)).content.decode()
        assert "in-file" in text
        assert "in-default" not in text
        assert ">node<" in admin_client.get(page_of(run)).content.decode()
        forget(configured.runs.alias)


class TestAnotherSite:
    @pytest.fixture(autouse=True)
    def _urls(self, settings):
        settings.ROOT_URLCONF = "tests.admin.operations"

    def test_runs_and_states_link_to_each_other_within_it(self, admin_client, backend):
        run = stored_run(backend, inputs={"file": "a.pdf"})
        backend.states.save_state(run.id, {}, "node")
        state = ExecutionState.objects.get()
        run_page = f"/operations/workflow_storage/workflowrun/{run.id}/change/"
        state_page = f"/operations/workflow_storage/executionstate/{state.pk}/change/"
        states = f"/operations/workflow_storage/executionstate/?run__id__exact={run.id}"

        text = admin_client.get(run_page).content.decode()

        assert states in text
        assert f"/operations/workflow_storage/workflowrun/{run.id}/states/0/" in text
        assert "/admin/workflow_storage/" not in text.split('<div id="content"')[1]
        assert run_page in admin_client.get(state_page).content.decode()

    def test_a_column_of_a_payload_takes_no_more_queries(
        self, admin_client, backend, django_assert_num_queries
    ):
        for number in range(5):
            stored_run(backend, inputs={"file": f"{number}.pdf"})
        url = reverse("operations:workflow_storage_workflowrun_changelist")
        admin_client.get(url)

        with django_assert_num_queries(4):  # session, user, the page, names of workflows
            text = admin_client.get(url).content.decode()

        assert "4.pdf" in text

    def test_an_action_gets_the_selected_runs(self, admin_client, backend):
        runs = [stored_run(backend, inputs={"file": "a.pdf"}) for _ in range(3)]
        url = reverse("operations:workflow_storage_workflowrun_changelist")
        selected = {"action": "name", "index": "0", "_selected_action": [runs[1].pk]}

        response = admin_client.post(url, selected, follow=True)

        assert [str(message) for message in response.context["messages"]] == [runs[1].pk]


ALONE = {WorkflowRun: AdminSite(name="runs"), ExecutionState: AdminSite(name="states")}
ALONE[WorkflowRun].register(WorkflowRun, WorkflowRunAdmin)
ALONE[ExecutionState].register(ExecutionState, ExecutionStateAdmin)


class OnlyOneModel:
    """The addresses of a project that has either model on a site of its own."""

    urlpatterns = [
        path("runs/", ALONE[WorkflowRun].urls),
        path("states/", ALONE[ExecutionState].urls),
        path("admin/", admin.site.urls),
    ]


@pytest.fixture
def run_with_states(backend):
    run = stored_run(backend)
    ExecutionState.objects.bulk_create(
        ExecutionState(run=run, step=step, node_id="node", state_json="{}") for step in range(205)
    )
    return run


def page(site, model, row):
    return reverse(f"{site}:workflow_storage_{model._meta.model_name}_change", args=[row.pk])


def linked(response):
    """The models whose pages a page links to in its content; to its own history it does so always."""
    content = response.content.decode().split('<div id="content"')[1]
    return {
        model
        for model in (WorkflowRun, ExecutionState)
        if re.search(
            rf'href="/[a-z]+/workflow_storage/{model._meta.model_name}/(?![^"]*/history/)[^"]',
            content,
        )
    }


def test_a_site_with_one_of_the_models_shows_text_in_place_of_links(
    admin_client, settings, run_with_states
):
    settings.ROOT_URLCONF = OnlyOneModel
    state = run_with_states.states.first()

    of_run = admin_client.get(page("runs", WorkflowRun, run_with_states))
    of_state = admin_client.get(page("states", ExecutionState, state))

    assert of_run.status_code == of_state.status_code == 200
    assert linked(of_run) <= {WorkflowRun}
    assert linked(of_state) == set()
    assert run_with_states.pk in of_state.content.decode()


@pytest.mark.parametrize("model", [WorkflowRun, ExecutionState])
def test_no_link_leads_to_a_page_that_the_user_may_not_view(
    client, run_with_states, django_user_model, model
):
    user = django_user_model.objects.create_user("viewer", is_staff=True)
    user.user_permissions.add(Permission.objects.get(codename=f"view_{model._meta.model_name}"))
    client.force_login(user)
    row = run_with_states if model is WorkflowRun else run_with_states.states.first()

    response = client.get(page("admin", model, row))

    assert response.status_code == 200
    assert linked(response) <= {model}


def test_pages_link_to_each_other_for_who_may_view_both(admin_client, run_with_states):
    of_run = admin_client.get(page("admin", WorkflowRun, run_with_states))
    of_state = admin_client.get(page("admin", ExecutionState, run_with_states.states.first()))

    assert ExecutionState in linked(of_run)
    assert WorkflowRun in linked(of_state)

"""What both admins do: they change nothing, show the project's own store, work on any site."""

import pytest
from django.contrib.admin.utils import quote
from django.urls import reverse

from tests.admin.conftest import RUNS, page_of
from workflow_storage import ExecutionState, WorkflowRun, create_storage_backend
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

        assert state_page in admin_client.get(run_page).content.decode()
        assert run_page in admin_client.get(state_page).content.decode()

    def test_a_column_of_a_payload_takes_no_more_queries(
        self, admin_client, backend, django_assert_num_queries
    ):
        for number in range(5):
            stored_run(backend, inputs={"file": f"{number}.pdf"})
        url = reverse("operations:workflow_storage_workflowrun_changelist")
        admin_client.get(url)

        with django_assert_num_queries(3):  # session, user, the page
            text = admin_client.get(url).content.decode()

        assert "4.pdf" in text

    def test_an_action_gets_the_selected_runs(self, admin_client, backend):
        runs = [stored_run(backend, inputs={"file": "a.pdf"}) for _ in range(3)]
        url = reverse("operations:workflow_storage_workflowrun_changelist")
        selected = {"action": "name", "index": "0", "_selected_action": [runs[1].pk]}

        response = admin_client.post(url, selected, follow=True)

        assert [str(message) for message in response.context["messages"]] == [runs[1].pk]

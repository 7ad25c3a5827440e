"""With django-unfold: its templates around our pages, which are whole all the same."""

import re
from pathlib import Path

import pytest
from django.contrib.admin.utils import quote
from django.urls import reverse

import workflow_storage
from workflow_storage import ExecutionState
from workflow_storage.testing import stored_run

pytest.importorskip("unfold")

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def _unfolded(settings):
    # Not its default configuration, which puts a site of its own in place of admin.site.
    settings.INSTALLED_APPS = ["unfold.apps.BasicAppConfig", *settings.INSTALLED_APPS]
    settings.ROOT_URLCONF = "tests.admin.unfolded"


@pytest.fixture
def run(backend):
    run = stored_run(
        backend, workflow_name="invoices", status="running", labels={"customer": "acme"}
    )
    for number in range(3):
        backend.states.save_state(run.id, {"at": number}, f"node-{number}")
    backend.runs.update_status(
        run.id, "failed", error_message="OSError: disk full", current_node="node-3"
    )
    return run


def shown(client, name, *args):
    response = client.get(reverse(f"unfolded:workflow_storage_{name}", args=args))
    assert response.status_code == 200
    text = response.content.decode()
    assert "unfold/" in text
    return text


def test_the_list_of_runs(admin_client, run):
    text = shown(admin_client, "workflowrun_changelist")

    assert "OSError: disk full" in text
    assert "Failed today" in text
    assert "workflow-storage-chart" in text
    assert "?label=customer%3Dacme" in text
    assert 'name="slower"' in text


def test_the_page_of_a_run(admin_client, run):
    text = shown(admin_client, "workflowrun_change", quote(run.pk))

    assert "Failed in node-3" in text
    assert "workflow-storage-timeline" in text
    assert "Delete with all states" in text


def test_the_state_at_a_step_and_a_comparison(admin_client, run, backend):
    other = stored_run(backend)

    assert "workflow-storage-diff" in shown(admin_client, "run_state", quote(run.pk), 1)
    assert "Two runs compared" in shown(admin_client, "run_compare", quote(run.pk), quote(other.pk))
    assert "Runs by status" in shown(admin_client, "run_overview")


def test_the_states(admin_client, run):
    state = ExecutionState.objects.last()

    assert "node-2" in shown(admin_client, "executionstate_changelist")
    assert "workflow-storage-tree" in shown(admin_client, "executionstate_change", state.pk)


def test_an_action_asks_and_is_done(admin_client, run):
    url = reverse("unfolded:workflow_storage_workflowrun_changelist")
    answer = {"action": "delete_runs", "_selected_action": [run.pk]}

    response = admin_client.post(url, answer)

    assert response.status_code == 200
    assert "1 selected run" in response.content.decode()


def test_no_colour_is_missing_where_a_theme_has_none_of_those_of_django():
    folder = Path(workflow_storage.__file__).parent / "static" / "workflow_storage"
    without = [
        f"{path.name}: {variable}"
        for path in folder.glob("*.css")
        for variable in re.findall(r"var\((--(?!workflow-storage-)[\w-]+)\)", path.read_text())
    ]
    assert not without, f"Write var(--name, something else) for {without}."

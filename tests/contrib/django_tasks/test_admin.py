"""Tasks in the admin: their runs read well there, waiting or not."""

import pytest
from django.contrib.auth.models import Permission
from django.urls import reverse

from tests.contrib.django_tasks import sample_tasks
from workflow_storage import WorkflowRun

pytestmark = pytest.mark.django_db
RUNS = "admin:workflow_storage_workflowrun_changelist"
RUN = "admin:workflow_storage_workflowrun_change"


@pytest.mark.parametrize("task", [sample_tasks.add, sample_tasks.add_later])
def test_the_page_of_a_run_shows_the_task(task, admin_client):
    result = task.enqueue(17, b=25)

    page = admin_client.get(reverse(RUN, args=[result.id])).content.decode()

    assert task.module_path in page
    for text in ("queue", "priority", "task_backend", str(task.priority), result.backend, "17"):
        assert text in page


def test_the_page_of_a_run_leads_to_the_task_in_the_queue(admin_client):
    result = sample_tasks.add_later.enqueue(1)
    url = reverse("admin:django_tasks_database_dbtaskresult_change", args=[result.id])

    page = admin_client.get(reverse(RUN, args=[result.id])).content.decode()

    assert f'<a href="{url}">Ready</a>' in page
    assert admin_client.get(url).status_code == 200


def test_it_does_not_for_who_may_not_see_it(client, django_user_model):
    result = sample_tasks.add_later.enqueue(1)
    user = django_user_model.objects.create_user("viewer", is_staff=True)
    user.user_permissions.add(Permission.objects.get(codename="view_workflowrun"))
    client.force_login(user)

    response = client.get(reverse(RUN, args=[result.id]))

    assert response.status_code == 200
    assert "dbtaskresult" not in response.content.decode()


@pytest.mark.parametrize("run_id", ["x", "0195e7a0-0000-7000-8000-000000000000"])
def test_a_task_that_the_queue_does_not_have_is_no_link(admin_client, run_id):
    run = WorkflowRun.objects.create(id=run_id, workflow_name="w", labels={"task_backend": "d"})

    page = admin_client.get(reverse(RUN, args=[run.pk])).content.decode()

    assert "Task in the queue" not in page


def test_the_runs_of_a_queue_are_found_by_its_label(admin_client):
    result = sample_tasks.add_later.enqueue(1)

    for queue, found in (("default", True), ("mail", False)):
        page = admin_client.get(reverse(RUNS), {"label": f"queue={queue}"})
        assert (result.id in page.content.decode()) is found

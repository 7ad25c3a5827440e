"""Tasks in the admin: their runs read well there, waiting or not."""

import pytest
from django.urls import reverse

from tests.contrib.django_tasks import sample_tasks

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


def test_the_runs_of_a_queue_are_found_by_its_label(admin_client):
    result = sample_tasks.add_later.enqueue(1)

    for queue, found in (("default", True), ("mail", False)):
        page = admin_client.get(reverse(RUNS), {"label": f"queue={queue}"})
        assert (result.id in page.content.decode()) is found

"""Tasks in the admin: their runs read well there."""

import pytest
from django.urls import reverse

from tests.contrib.celery import project
from workflow_storage import record_run

pytestmark = pytest.mark.django_db
RUNS = "admin:workflow_storage_workflowrun_changelist"
RUN = "admin:workflow_storage_workflowrun_change"


def test_the_page_of_a_run_shows_the_task_its_parent_and_its_attempts(admin_client):
    with record_run("nightly") as around:
        result = project.try_again.apply((2,))

    page = admin_client.get(reverse(RUN, args=[result.id])).content.decode()

    for text in (
        "tests.contrib.celery.project.try_again",
        "nightly",
        reverse(RUN, args=[around.run_id]),
        "OSError: no route 0",
        "OSError: no route 1",
        "failures",
    ):
        assert text in page
    parent = admin_client.get(reverse(RUN, args=[around.run_id])).content.decode()
    assert reverse(RUN, args=[result.id]) in parent


def test_a_task_that_waits_is_found_by_its_queue(admin_client, broker):
    result = project.add.apply_async((1,), queue="mail")

    for queue, found in (("mail", True), ("other", False)):
        page = admin_client.get(reverse(RUNS), {"label": f"queue={queue}"})
        assert (result.id in page.content.decode()) is found
    page = admin_client.get(reverse(RUN, args=[result.id])).content.decode()
    assert "mail" in page

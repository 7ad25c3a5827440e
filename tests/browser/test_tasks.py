"""The page of the run of a task, whose name is the path of a function."""

import pytest
from django.urls import reverse

from tests.browser.conftest import check
from tests.contrib.django_tasks import sample_tasks

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("width", [400, 1280])
def test_a_long_path_and_the_task_in_the_queue_fit_the_page(opened, width):
    result = sample_tasks.add_later.enqueue(3, b=4)
    page = opened(
        reverse("admin:workflow_storage_workflowrun_change", args=[result.id]), width=width
    )

    assert page.get_by_role("link", name="Ready").is_visible()
    check(page)

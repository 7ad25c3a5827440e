"""What the tests of the admin share: its store, its addresses, and many runs at once."""

from datetime import timedelta

import pytest
from django.contrib.admin.utils import quote
from django.urls import reverse
from django.utils import timezone

from workflow_storage import WorkflowRun, create_storage_backend

RUNS = "admin:workflow_storage_workflowrun_changelist"
STATES = "admin:workflow_storage_executionstate_changelist"


@pytest.fixture
def backend(db):
    return create_storage_backend("default")


def page_of(run):
    return reverse("admin:workflow_storage_workflowrun_change", args=[quote(run.pk)])


def add_runs(count, **fields):
    now = timezone.now()
    return WorkflowRun.objects.bulk_create(
        [
            WorkflowRun(
                id=f"run-{number:04}",
                workflow_name="bulk",
                started_at=now - timedelta(seconds=number),
                inputs={"number": number},
                **fields,
            )
            for number in range(count)
        ]
    )

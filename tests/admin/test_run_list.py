"""The search of the list of runs: what it finds, and that it says what it did."""

from datetime import timedelta

import pytest
from django.urls import reverse
from django.utils import timezone

from tests.admin.conftest import RUNS
from workflow_storage.admin import run_list
from workflow_storage.testing import stored_run

pytestmark = pytest.mark.django_db


def found(client, **parameters):
    response = client.get(reverse(RUNS), parameters)
    assert response.status_code == 200
    return {run.pk for run in response.context["cl"].result_list}, response.content.decode()


def test_more_ids_or_workflows_than_are_looked_at_are_told(admin_client, backend, monkeypatch):
    monkeypatch.setattr(run_list, "MOST_IDS", 3)
    monkeypatch.setattr(run_list, "MOST_NAMES", 2)
    for number in range(4):
        stored_run(backend, id=f"batch-{number}", workflow_name=f"team-{number}")

    ids, text = found(admin_client, q="batch-")
    assert len(ids) == 3
    assert "There are more that begin so." in text
    assert "There are more that begin so." in found(admin_client, q="team-")[1]
    ids, text = found(admin_client, q="batch-1")
    assert ids == {"batch-1"}
    assert "There are more" not in text


def test_the_filters_hold_for_what_is_searched(admin_client, backend):
    old = timezone.now() - timedelta(days=3)
    stored_run(backend, id="batch-old", started_at=old)
    stored_run(backend, id="batch-new")

    assert found(admin_client, q="batch-", until="1d")[0] == {"batch-old"}
    assert found(admin_client, q="batch-", since="1d")[0] == {"batch-new"}


def test_workflows_that_begin_as_an_id_does_are_told(admin_client, backend):
    stored_run(backend, id="fa-run", workflow_name="other")
    stored_run(backend, id="x", workflow_name="face_recognition")

    ids, text = found(admin_client, q="fa")

    assert ids == {"fa-run"}
    assert "Workflows begin so, too: face_recognition." in text


def test_errors_are_searched_within_the_time_whatever_came_after(
    admin_client, backend, monkeypatch
):
    monkeypatch.setattr(run_list, "LOOKED_THROUGH", 2)
    old = timezone.now() - timedelta(days=3)
    long = "timeout " * 50
    stored_run(backend, id="old", status="failed", started_at=old, error_message=long)
    for number in range(5):
        stored_run(backend, id=f"new-{number}", status="failed", error_message="other")

    assert found(admin_client, q="timeout")[0] == set()
    assert found(admin_client, q="timeout", until="1d")[0] == {"old"}
    ids, text = found(admin_client, q=long.strip(), until="1d")
    assert ids == {"old"}
    assert "in the errors of the newest" in text


def test_running_runs_are_slow_already_while_they_run(admin_client, backend):
    now = timezone.now()
    for hours in (1, 3):
        begun = now - timedelta(hours=hours)
        run = stored_run(backend, id=f"{hours}", started_at=begun)
        backend.runs.update_status(run.id, "running")
        type(run).objects.filter(pk=run.pk).update(attempt_started_at=begun)

    assert found(admin_client, slower="7200")[0] == {"3"}
    assert found(admin_client, slower="1e300")[0] == set()

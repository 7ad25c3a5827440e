"""Awkward values, shown as they are."""

import pytest
from django.urls import reverse

from tests.admin.conftest import page_of
from workflow_storage import ExecutionState
from workflow_storage.testing import stored_run

pytestmark = pytest.mark.django_db


@pytest.mark.parametrize(
    "value", [{"\0": "\ud800"}, "text", 10**40, {"long": "x" * 300_000}, [[[]]], None], ids=type
)
def test_any_payload_is_shown(admin_client, backend, value):
    run = stored_run(backend, inputs=value)
    backend.states.save_state(run.id, {"value": value}, "node")
    state = ExecutionState.objects.get()

    for url in (
        page_of(run),
        reverse("admin:workflow_storage_executionstate_change", args=[state.pk]),
    ):
        response = admin_client.get(url)
        assert response.status_code == 200
        assert len(response.content) < 700_000

"""Awkward values, shown as they are."""

import pytest
from django.urls import reverse

from tests.admin.conftest import page_of
from workflow_storage import ExecutionState
from workflow_storage.admin.rendering import cost_text, duration_text
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


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (None, "-"),
        (0, "0 s"),
        (0.000_04, "0.04 ms"),
        (0.52, "520 ms"),
        (41.6, "41.6 s"),
        (3.456, "3.46 s"),
        (59.96, "1:00 min"),
        (3723, "1:02:03"),
    ],
)
def test_a_duration_has_three_digits_below_a_minute(seconds, shown):
    assert duration_text(seconds) == shown


@pytest.mark.parametrize(
    ("usd", "shown"),
    [(None, "-"), (0, "$0.0000"), (0.000_01, "<$0.0001"), (0.1, "$0.1000"), (3723, "$3,723.0000")],
)
def test_a_cost_that_is_too_small_to_be_shown_is_not_shown_as_none(usd, shown):
    assert cost_text(usd) == shown

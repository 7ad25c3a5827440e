"""The states in the admin."""

import pytest
from django.urls import reverse

from tests.admin.conftest import STATES
from workflow_storage.testing import stored_run

pytestmark = pytest.mark.django_db


def test_the_states_of_a_run_are_listed_newest_first(admin_client, backend):
    run, other = stored_run(backend), stored_run(backend)
    for number in range(3):
        for stored in (run, other):
            backend.states.save_state(stored.id, {}, f"node-{number}")

    rows = admin_client.get(reverse(STATES), {"q": run.id}).context["cl"].result_list

    assert [(state.run_id, state.step) for state in rows] == [(run.id, step) for step in (2, 1, 0)]


def test_the_list_shows_what_each_node_took_and_how_large_its_state_is(
    admin_client, backend, django_assert_num_queries
):
    run = stored_run(backend, workflow_name="invoices", inputs={"large": "x" * 1000})
    backend.states.save_state(
        run.id, {"a": "ä" * 10}, "ocr", duration_seconds=1.5, tokens=1234, cost_usd=0.02
    )
    admin_client.get(reverse(STATES))

    with django_assert_num_queries(3) as captured:  # session, user, the page
        text = admin_client.get(reverse(STATES)).content.decode()

    assert "inputs" not in captured.captured_queries[-1]["sql"]
    for shown in ("invoices", "1.5 s", "1,234", "$0.0200", ">29<"):
        assert shown in text
    assert reverse("admin:workflow_storage_run_state", args=[run.id, 0]) in text

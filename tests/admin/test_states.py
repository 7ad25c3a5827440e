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

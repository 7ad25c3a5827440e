"""Awkward values, shown as they are."""

import pytest
from django.urls import reverse

from tests.admin.conftest import page_of
from workflow_storage import ExecutionState
from workflow_storage.admin.rendering import cost_text, duration_text, first_line
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


TRACEBACK = """Traceback (most recent call last):
  File "a.py", line 1, in <module>
    read()
OSError: disk full

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "b.py", line 2, in save
ValueError: page 7
"""


@pytest.mark.parametrize(
    ("text", "end", "shown"),
    [
        (None, None, ""),
        ("\n  first\nsecond", None, "first"),
        (TRACEBACK, None, "ValueError: page 7"),
        (TRACEBACK[:100], TRACEBACK[-40:], "ValueError: page 7"),
        (TRACEBACK[:80], None, "Traceback (most recent call last):"),
        ("See: " + TRACEBACK, None, "See: Traceback (most recent call last):"),
    ],
)
def test_the_first_line_of_a_traceback_is_its_exception(text, end, shown):
    assert first_line(text, end=end) == shown

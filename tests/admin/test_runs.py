"""The runs in the admin: what the list shows, what it finds, and the page of a run."""

import html
from datetime import timedelta

import pytest
from django.urls import reverse
from django.utils import timezone

from tests.admin.conftest import RUNS, STATES, add_runs, page_of
from workflow_storage import ExecutionState
from workflow_storage.testing import stored_run

pytestmark = pytest.mark.django_db


def test_the_list_shows_status_start_duration_tokens_and_cost(admin_client, backend):
    start = timezone.now()
    stored_run(
        backend,
        id="the-run",
        workflow_name="invoices",
        status="failed",
        started_at=start,
        completed_at=start + timedelta(seconds=75),
        total_tokens=12345,
        total_cost_usd=0.0123,
    )

    text = admin_client.get(reverse(RUNS)).content.decode()

    for shown in (
        "the-run",
        "invoices",
        "workflow-storage-failed",
        "1:15 min",
        "12,345",
        "$0.0123",
    ):
        assert shown in text
    assert "Add workflow run" not in text


@pytest.mark.parametrize(
    ("term", "expected"),
    [
        ("run-0007", ["run-0007"]),
        (" bulk ", ["run-0000"]),
        ("nothing", []),
        ("x" * 300, []),
    ],
)
def test_the_search_finds_whole_ids_and_names(admin_client, term, expected):
    add_runs(8)
    rows = admin_client.get(reverse(RUNS), {"q": term}).context["cl"].result_list
    assert [run.id for run in rows][:1] == expected


def test_the_page_of_a_run_shows_payloads_error_and_states_in_order(admin_client, backend):
    run = stored_run(
        backend,
        status="failed",
        inputs={"file": "<a & b>.pdf"},
        outputs=["x"],
        config_snapshot={"model": "m"},
        error_message="Traceback\n  <script>",
    )
    for node in ("load", "split", "digest"):
        backend.states.save_state(run.id, {"at": node}, node)

    text = admin_client.get(page_of(run)).content.decode()

    assert "&lt;a &amp; b&gt;.pdf" in text
    assert "&lt;script&gt;" in text
    assert text.index("load") < text.index("split") < text.index("digest")
    assert "_save" not in text


@pytest.mark.parametrize("count", [2, 300])
def test_the_page_of_a_run_takes_a_fixed_number_of_queries(
    admin_client, backend, django_assert_num_queries, count
):
    run = stored_run(backend)
    ExecutionState.objects.bulk_create(
        ExecutionState(run=run, step=step, node_id="node", state_json='{"a": 1}')
        for step in range(count)
    )
    admin_client.get(page_of(run))

    # session, user, the run twice, its neighbours, steps and that there are no more, the run's
    # attempt and those before, the newest state and the one before it, children, checkpoints of graphs
    with django_assert_num_queries(14):
        admin_client.get(page_of(run))


@pytest.mark.parametrize(
    "run_id", ["a/b?c#d e_5F%", "ünï", "'\"<>&", "..", "\N{GRINNING FACE}" * 36, "\x01\x7f"]
)
def test_runs_with_odd_ids_have_pages(admin_client, backend, run_id):
    run = stored_run(backend, id=run_id)
    backend.states.save_state(run.id, {}, "node")

    assert admin_client.get(page_of(run)).status_code == 200
    assert admin_client.get(reverse(RUNS)).status_code == 200
    states = admin_client.get(reverse(STATES), {"run__id__exact": run_id})
    assert len(states.context["cl"].result_list) == 1
    state = states.context["cl"].result_list[0]
    response = admin_client.get(
        reverse("admin:workflow_storage_executionstate_change", args=[state.pk])
    )
    assert page_of(run) in html.unescape(response.content.decode())


def test_an_error_from_elsewhere_is_shown_bounded(admin_client, backend):
    run = stored_run(backend)
    type(run).objects.filter(pk=run.pk).update(error_message="x" * 1_000_000)

    response = admin_client.get(page_of(run))

    assert "The first 100,000 of 1,000,000 characters." in response.content.decode()
    assert len(response.content) < 200_000

"""The admin: read-only, a fixed number of queries, awkward runs shown as they are."""

import html
from datetime import timedelta

import pytest
from django.contrib.admin.utils import quote
from django.urls import reverse
from django.utils import timezone

from workflow_storage import ExecutionState, WorkflowRun, create_storage_backend
from workflow_storage.testing import stored_run

RUNS = "admin:workflow_storage_workflowrun_changelist"
STATES = "admin:workflow_storage_executionstate_changelist"

pytestmark = pytest.mark.django_db


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


@pytest.mark.parametrize("count", [1, 350])
def test_the_list_takes_a_fixed_number_of_queries_and_counts_nothing(
    admin_client, django_assert_num_queries, count
):
    add_runs(count)
    admin_client.get(reverse(RUNS))

    with django_assert_num_queries(3) as captured:  # session, user, the page
        response = admin_client.get(reverse(RUNS))

    assert len(response.context["cl"].result_list) == min(count, 100)
    sql = " ".join(query["sql"] for query in captured.captured_queries)
    assert "COUNT(" not in sql
    assert "inputs" not in sql


def test_pages_follow_one_another_to_the_last_run(admin_client):
    runs = add_runs(250)
    seen, query = [], ""
    while query is not None:
        response = admin_client.get(reverse(RUNS) + query)
        changelist = response.context["cl"]
        seen.append([run.id for run in changelist.result_list])
        query = changelist.next_page

    assert [len(page) for page in seen] == [100, 100, 50]
    assert [run_id for page in seen for run_id in page] == [run.id for run in runs]
    assert b"First page" in response.content
    assert b"Older" not in response.content


def test_a_page_keeps_its_filters(admin_client):
    add_runs(150, status="failed")
    stored_run(create_storage_backend("default"), status="running")

    response = admin_client.get(reverse(RUNS), {"status__exact": "failed"})
    response = admin_client.get(reverse(RUNS) + response.context["cl"].next_page)

    assert len(response.context["cl"].result_list) == 50
    assert {run.status for run in response.context["cl"].result_list} == {"failed"}


def test_filters_and_searches_begin_at_the_first_page(admin_client):
    add_runs(150, status="failed")
    first = admin_client.get(reverse(RUNS))

    later = admin_client.get(reverse(RUNS) + first.context["cl"].next_page).content.decode()

    assert "status__exact=failed" in later
    assert later.count("before=") == 0


@pytest.mark.parametrize("parameter", ["before", "status__exact", "id__exact", "q"])
def test_a_nul_in_a_parameter_is_answered_like_any_bad_lookup(admin_client, parameter):
    response = admin_client.get(reverse(RUNS), {parameter: "\0"})
    assert (response.status_code, response.url) == (302, reverse(RUNS) + "?e=1")


def test_a_page_after_an_unknown_run_goes_to_the_error_page(admin_client):
    response = admin_client.get(reverse(RUNS), {"before": "gone"})
    assert response.status_code == 302
    assert "e=1" in response.url


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
    assert text.index(">load<") < text.index(">split<") < text.index(">digest<")
    assert "_save" not in text


@pytest.mark.parametrize("count", [1, 300])
def test_the_page_of_a_run_takes_a_fixed_number_of_queries(
    admin_client, backend, django_assert_num_queries, count
):
    run = stored_run(backend)
    ExecutionState.objects.bulk_create(
        ExecutionState(run=run, step=step, node_id="node", state_json='{"a": 1}')
        for step in range(count)
    )
    admin_client.get(page_of(run))

    with django_assert_num_queries(4) as captured:  # session, user, run, states
        response = admin_client.get(page_of(run))

    assert "state_json" not in captured.captured_queries[-1]["sql"]
    assert (b"All states of this run" in response.content) == (count > 200)


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
        assert len(response.content) < 250_000


def test_the_states_of_a_run_are_listed_newest_first(admin_client, backend):
    run, other = stored_run(backend), stored_run(backend)
    for number in range(3):
        for stored in (run, other):
            backend.states.save_state(stored.id, {}, f"node-{number}")

    rows = admin_client.get(reverse(STATES), {"q": run.id}).context["cl"].result_list

    assert [(state.run_id, state.step) for state in rows] == [(run.id, step) for step in (2, 1, 0)]


def test_nothing_can_be_added_changed_or_deleted(admin_client, backend):
    run = stored_run(backend)
    for name in ("add", "change", "delete"):
        args = [] if name == "add" else [quote(run.pk)]
        url = reverse(f"admin:workflow_storage_workflowrun_{name}", args=args)
        assert admin_client.post(url, {"post": "yes"}).status_code == 403
    selected = {"action": "delete_selected", "_selected_action": run.pk, "post": "yes"}
    admin_client.post(reverse(RUNS), selected)
    assert WorkflowRun.objects.count() == 1


@pytest.mark.django_db(databases=["default"])
def test_the_admin_shows_the_backend_of_the_setting(
    admin_client, backend, settings, tmp_path, django_db_blocker
):
    from workflow_storage.factory import forget

    stored_run(backend, id="in-default")
    settings.WORKFLOW_STORAGE = f"sqlite:///{tmp_path}/runs.db"
    with django_db_blocker.unblock():
        configured = create_storage_backend()
        run = stored_run(configured, id="in-file")
        configured.states.save_state(run.id, {}, "node")

        text = admin_client.get(reverse(RUNS)).content.decode()
        assert "in-file" in text
        assert "in-default" not in text
        assert ">node<" in admin_client.get(page_of(run)).content.decode()
        forget(configured.runs.alias)

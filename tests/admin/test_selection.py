"""What the list of runs finds, in words of its address; and what it says of what it cannot find."""

from datetime import timedelta

import pytest
from django.contrib.auth import get_user_model
from django.urls import reverse
from django.utils import timezone

from tests.admin.conftest import RUNS, add_runs
from workflow_storage.testing import stored_run

pytestmark = pytest.mark.django_db


@pytest.fixture
def found(admin_client):
    """Return the ids that the list finds for some parameters."""

    def ids(**parameters):
        response = admin_client.get(reverse(RUNS), parameters)
        assert response.status_code == 200, response
        ids.text = response.content.decode()
        return [run.id for run in response.context["cl"].result_list]

    return ids


@pytest.fixture
def runs(backend):
    """Store a run of every kind that a filter tells apart."""
    now = timezone.now()
    stored_run(
        backend,
        id="slow",
        workflow_name="invoices",
        status="completed",
        started_at=now - timedelta(hours=3),
        completed_at=now - timedelta(hours=1),
        total_cost_usd=0.5,
        labels={"tenant": "acme", "user": "7"},
    )
    stored_run(
        backend,
        id="failed",
        workflow_name="invoices",
        status="failed",
        started_at=now - timedelta(minutes=30),
        error_message="ValueError: no <total> on the page",
        labels={"tenant": "acme"},
        parent_id="slow",
    )
    stored_run(
        backend,
        id="waiting",
        workflow_name="approvals",
        status="running",
        started_at=now - timedelta(minutes=20),
    )
    backend.runs.update_status("waiting", "pending", waiting_for="approval by finance")
    stored_run(
        backend,
        id="stalled",
        workflow_name="imports",
        status="running",
        started_at=now - timedelta(minutes=16),
        attempt_started_at=now - timedelta(minutes=16),
    )
    stored_run(
        backend,
        id="running",
        workflow_name="imports",
        status="running",
        started_at=now - timedelta(minutes=10),
    )
    stored_run(
        backend,
        id="old",
        workflow_name="imports",
        status="completed",
        started_at=now - timedelta(days=40),
        completed_at=now - timedelta(days=39),
    )


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({}, ["running", "stalled", "waiting", "failed", "slow", "old"]),
        ({"status__exact": "failed"}, ["failed"]),
        ({"status__exact": ["failed", "running"]}, ["running", "stalled", "failed"]),
        ({"workflow": "invoices"}, ["failed", "slow"]),
        ({"label": "tenant=acme"}, ["failed", "slow"]),
        ({"label": ["tenant=acme", "user=7"]}, ["slow"]),
        ({"label": "tenant=none"}, []),
        ({"since": "1h"}, ["running", "stalled", "waiting", "failed"]),
        ({"since": "7d", "until": "2h"}, ["slow"]),
        ({"since": "2000-01-01", "until": "2000-01-02"}, []),
        ({"slower": "3600"}, ["slow"]),
        ({"slower": "3600", "since": "365d"}, ["slow", "old"]),
        ({"cost": "0,2"}, ["slow"]),
        ({"stalled": "1"}, ["stalled"]),
        ({"waiting": "1"}, ["waiting"]),
        ({"children": "1"}, ["failed"]),
        ({"parent": "slow"}, ["failed"]),
        ({"sort": "duration"}, ["slow", "failed", "waiting"]),
        ({"sort": "cost"}, ["slow"]),
        ({"q": "slow"}, ["slow"]),
        ({"q": "st"}, ["stalled"]),
        ({"q": "invoices"}, ["failed", "slow"]),
        ({"q": "im"}, ["running", "stalled", "old"]),
        ({"q": "tenant=acme"}, ["failed", "slow"]),
        ({"q": "no <total>"}, ["failed"]),
        ({"q": "NO <TOTAL>", "since": "10m"}, []),
        ({"q": "imports", "status__exact": "running"}, ["running", "stalled"]),
        ({"q": "imports", "workflow": "invoices"}, []),
        ({"q": "nothing at all"}, []),
        ({"q": "x" * 300}, []),
        ({"q": "  "}, ["running", "stalled", "waiting", "failed", "slow", "old"]),
    ],
    ids=str,
)
def test_the_list_finds_what_its_address_asks_for(runs, found, parameters, expected):
    assert found(**parameters) == expected


def test_runs_that_share_a_label_are_paged_forwards_and_backwards(admin_client, backend):
    now = timezone.now()
    for number in range(120):
        stored_run(
            backend,
            id=f"{number:03}",
            started_at=now - timedelta(minutes=number // 3),
            labels={"tenant": "acme"} if number % 8 else {},
        )
    expected = [run.id for run in backend.runs.list_runs(labels={"tenant": "acme"}, limit=200)]
    pages, query = [], "?label=tenant%3Dacme"
    while query is not None:
        changelist = admin_client.get(reverse(RUNS) + query).context["cl"]
        pages.append([run.id for run in changelist.result_list])
        query = changelist.next_page
    assert sum(pages, []) == expected  # noqa: RUF017

    back, query = [], changelist.previous_page
    while query is not None:
        changelist = admin_client.get(reverse(RUNS) + query).context["cl"]
        back.append([run.id for run in changelist.result_list])
        query = changelist.previous_page
    assert back == pages[-2::-1]


@pytest.mark.parametrize(
    "parameters",
    [
        {"status__exact": "done"},
        {"label": "acme"},
        {"since": "yesterday"},
        {"until": "0001-01-01"},
        {"slower": "much"},
        {"cost": "-1"},
        {"sort": "colour"},
    ],
    ids=str,
)
def test_what_cannot_be_understood_is_said_and_left_out(runs, found, parameters):
    assert len(found(**parameters)) >= 2
    assert "errorlist" in found.text or "messagelist" in found.text
    assert next(iter(parameters.values())) in found.text


def test_page_numbers_and_sorted_columns_are_not_silently_ignored(runs, found):
    assert len(found(p="2", o="1.-3")) == 6
    assert "no page numbers" in found.text


@pytest.mark.parametrize(
    "lookup",
    [
        "inputs__api_key__startswith",
        "inputs__api_key",
        "outputs__contains",
        "config_snapshot__token__regex",
        "error_message__icontains",
        "states__state_json__contains",
        "label_rows__value",
        "id__startswith",
        "current_node",
        "worker__startswith",
        "labels__tenant",
    ],
)
def test_nothing_but_the_declared_filters_can_be_looked_up(admin_client, runs, lookup):
    assert admin_client.get(reverse(RUNS), {lookup: "s"}).status_code == 400


def test_what_looks_further_than_an_index_is_bounded_and_says_so(runs, found):
    found(slower="1")
    assert "Only runs of the last 7 days are looked at" in found.text
    found(slower="1", since="30d")
    assert "Only runs of the last" not in found.text


def test_an_empty_result_says_what_was_searched_and_how_to_widen_it(runs, found):
    assert found(q="no such text", status__exact="failed") == []
    assert "no such text in the errors of the newest 10,000 failed runs" in found.text
    assert "Show all runs" in found.text
    assert "Search without the filters" in found.text


def test_presets_are_links_and_the_one_in_force_is_marked(runs, found):
    found(status__exact="running")
    assert '<a href="?status__exact=running" aria-current="page">Running</a>' in found.text
    for name in ("All", "Failed today", "Stalled", "Waiting"):
        assert f">{name}</a>" in found.text


def test_a_filter_keeps_the_others(runs, found):
    found(label="tenant=acme", since="24h")
    assert "label=tenant%3Dacme&amp;since=24h&amp;status__exact=failed" in found.text
    assert '<input type="hidden" name="label" value="tenant=acme">' in found.text


def test_a_filter_with_two_values_shows_and_keeps_both(runs, found):
    both = {"status__exact": ["failed", "running"], "label": ["tenant=acme", "user=7"]}
    assert found(label=both["label"]) == ["slow"]
    found(**both)
    assert "Status: <b>failed, running</b>" in found.text
    assert "Label: <b>tenant=acme, user=7</b>" in found.text
    for name, values in both.items():
        for value in values:
            assert f'<input type="hidden" name="{name}" value="{value}">' in found.text
        in_search = f'<input type="hidden" name="{name}" value="{values[0]}" form='
        assert in_search in found.text
    for label in both["label"]:
        assert f'<input type="text" name="label" value="{label}"' in found.text


def test_a_filter_that_is_answered_with_no_is_not_shown_as_chosen(runs, found):
    everything = found()
    assert found(waiting="0", stalled="0", children="no") == everything
    assert "<summary>Situation</summary>" in found.text
    assert found(waiting="yes") == ["waiting"]
    assert "Situation: <b>Waiting</b>" in found.text
    found(parent="slow")
    assert "Situation: <b>slow</b>" in found.text


def test_the_list_offers_its_orders_and_marks_the_present_one(runs, found):
    found(workflow="invoices", before="failed")
    assert 'workflow=invoices" aria-current="true">start</a>' in found.text
    assert 'workflow=invoices&amp;sort=duration">duration</a>' in found.text

    found(workflow="invoices", sort="duration")
    assert 'workflow=invoices">start</a>' in found.text
    assert 'workflow=invoices&amp;sort=duration" aria-current="true">duration</a>' in found.text
    assert 'workflow=invoices&amp;sort=cost">cost</a>' in found.text


def test_forms_keep_the_order(runs, found):
    found(sort="cost")
    in_forms = found.text.count('<input type="hidden" name="sort" value="cost">')
    assert in_forms == found.text.count('<li class="workflow-storage-filter">') > 0
    assert '<input type="hidden" name="sort" value="cost" form="changelist-search">' in found.text


def test_workflows_are_suggested_from_the_index(found, backend):
    for number in range(70):
        stored_run(backend, workflow_name=f"w{number:02}")
    found()
    assert '<option value="w00">' in found.text
    assert found.text.count('<option value="w') == 50


def test_workflows_are_suggested_by_their_beginning(admin_client, client, backend):
    for number in range(70):
        stored_run(backend, workflow_name=f"w{number:02}")
    stored_run(backend, workflow_name="z%é")
    url = reverse("admin:workflow_storage_run_workflows")

    def names(beginning):
        return admin_client.get(url, {"beginning": beginning}).json()["names"]

    assert names("") == [f"w{number:02}" for number in range(50)]
    assert names("w6") == [f"w{number}" for number in range(60, 70)]
    assert names("z%é") == ["z%é"]
    for nothing in ("none", "w\0", "w" * 1000):
        assert names(nothing) == []
    user = get_user_model().objects.create_user("nobody", is_staff=True)
    client.force_login(user)
    assert client.get(url).status_code == 403


def test_the_workflow_filter_asks_for_suggestions(found, backend):
    stored_run(backend, workflow_name="invoices")
    found()
    url = reverse("admin:workflow_storage_run_workflows")
    assert f'list="workflow-storage-workflow" data-suggest="{url}"' in found.text


def test_a_failed_run_says_where_and_why_and_a_running_one_where_it_is(
    admin_client, backend, found
):
    add_runs(1)
    run = stored_run(backend, id="f", status="running")
    backend.states.save_state(run.id, {}, "ocr", attempt=1)
    backend.runs.update_status(
        run.id, "failed", error_message="\n\nValueError: <bad>\nmore", current_node="parse"
    )
    going = stored_run(backend, id="g", status="running")
    backend.states.save_state(going.id, {}, "split", attempt=1)

    found()

    assert "<b>parse</b> ValueError: &lt;bad&gt;" in found.text
    assert ">split</div>" in found.text
    assert "more" not in found.text.split("ValueError")[1][:40]


def test_stalled_and_waiting_runs_are_marked(runs, found):
    found()
    assert found.text.count(">stalled</span>") == 1
    assert found.text.count(">waiting</span>") == 1
    assert "approval by finance" in found.text

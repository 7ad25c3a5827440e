"""The search of the list of runs: what it finds, and that it says what it did."""

import itertools
from datetime import timedelta
from urllib.parse import parse_qsl

import pytest
from django.urls import reverse
from django.utils import timezone

from tests.admin.conftest import RUNS
from workflow_storage.admin import WorkflowRunAdmin, run_list
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


def pages(client, **parameters):
    """Return what each page of a list finds, by its links to older runs."""
    query = parameters
    found_on = []
    while True:
        response = client.get(reverse(RUNS), query)
        changelist = response.context["cl"]
        found_on.append([run.pk for run in changelist.result_list])
        if changelist.next_page is None:
            return found_on
        assert len(found_on) < 20, "the pages do not end"
        query = dict(parse_qsl(changelist.next_page.removeprefix("?")))


@pytest.fixture
def some_dear(backend):
    """Store 12 runs, of which the third, the eighth and the last cost more, the newest first."""
    now = timezone.now()
    for number in range(12):
        stored_run(
            backend,
            id=f"run-{number:02}",
            status="completed",
            # Of two each that started at the same time, the one with the greater id comes first.
            started_at=now - timedelta(minutes=number // 2),
            total_cost_usd=2.0 if number in (2, 7, 11) else 0.5,
            labels={"tenant": "acme"} if number != 7 else {"tenant": "other"},
        )


@pytest.mark.parametrize("asked", [{}, {"status__exact": "completed"}])
def test_what_no_index_knows_is_looked_for_page_by_page(
    admin_client, backend, some_dear, monkeypatch, asked
):
    monkeypatch.setattr(run_list, "LOOKED_AT", 4)

    assert pages(admin_client, cost="1", **asked) == [["run-02"], ["run-07"], ["run-11"]]
    text = found(admin_client, cost="1", **asked)[1]
    assert "Looked at are 4 runs." in text
    assert "1+ in all" in text


def test_an_empty_page_leads_on_to_what_is_further_back(
    admin_client, backend, some_dear, monkeypatch
):
    monkeypatch.setattr(run_list, "LOOKED_AT", 2)

    assert pages(admin_client, cost="1", label="tenant=other") == [["run-07"]]
    assert pages(admin_client, cost="1")[:2] == [[], ["run-02"]]
    text = found(admin_client, cost="1")[1]
    assert "None of the runs that were looked at matches." in text
    assert ">Look at older ones</a>" in text
    assert ">Older</a>" in text


@pytest.mark.parametrize("looked_at", [1, 2, 3, 5])
def test_each_run_is_looked_at_once(admin_client, backend, some_dear, monkeypatch, looked_at):
    monkeypatch.setattr(run_list, "LOOKED_AT", looked_at)

    found_on = pages(admin_client, cost="0.1")

    assert [*itertools.chain(*found_on)] == [f"run-{number ^ 1:02}" for number in range(12)]
    assert len(found_on) > 1


def test_a_page_is_full_before_it_looks_on(admin_client, backend, some_dear, monkeypatch):
    monkeypatch.setattr(run_list, "LOOKED_AT", 10)
    monkeypatch.setattr(WorkflowRunAdmin, "list_per_page", 3)

    found_on = pages(admin_client, cost="0.1")

    assert [len(one) for one in found_on] == [3, 3, 3, 3]
    assert sorted(itertools.chain(*found_on)) == [f"run-{number:02}" for number in range(12)]


def test_runs_of_a_label_are_counted_so_far_as_they_are_looked_at(
    admin_client, backend, some_dear, monkeypatch
):
    monkeypatch.setattr(run_list, "LOOKED_THROUGH", 5)
    asked = {"label": "tenant=acme", "status__exact": "completed"}

    ids, text = found(admin_client, **asked)

    assert len(ids) == 11
    assert "6+ in all" in text  # with the one that started when the fifth did
    assert "11 in all" in found(admin_client, label="tenant=acme")[1]


def test_what_has_failed_today_may_have_started_before(admin_client, backend):
    now = timezone.now()
    for name, started, ended in (("long", 40, 2), ("old", 60, 30), ("young", 1, 0)):
        stored_run(
            backend,
            id=name,
            status="failed",
            started_at=now - timedelta(hours=started),
            completed_at=now - timedelta(hours=ended),
        )
    page = admin_client.get(reverse(RUNS))
    (preset,) = [one for one in page.context["presets"] if one["name"] == "Failed today"]

    response = admin_client.get(reverse(RUNS) + preset["url"])

    assert [run.pk for run in response.context["cl"].result_list] == ["young", "long"]
    assert "Runs that started more than 7 days before are not looked at." in response.text
    assert [one["name"] for one in response.context["presets"] if one["selected"]] == [
        "Failed today"
    ]


def test_the_views_above_the_list_keep_its_order(admin_client, backend):
    page = admin_client.get(reverse(RUNS), {"sort": "cost", "status__exact": "running"})

    assert [one["url"] for one in page.context["presets"]][:3] == [
        "?sort=cost",
        "?status__exact=failed&ended=24h&sort=cost",
        "?status__exact=running&sort=cost",
    ]


@pytest.mark.parametrize("moment", ["0001-01-01", "9999-12-31", "x", "999999w"])
def test_an_end_that_is_none_breaks_nothing(admin_client, backend, moment):
    stored_run(backend, id="run", status="completed")
    response = admin_client.get(reverse(RUNS), {"ended": moment})
    assert response.status_code == 200

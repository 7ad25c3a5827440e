"""The overview: what is summed up at once, and what is kept for an hour, and for whom."""

import re
import time
from datetime import UTC, datetime

import pytest
from django.core.cache import cache
from django.http import QueryDict
from django.urls import reverse

from workflow_storage.admin import overview
from workflow_storage.admin.selection import selection_of
from workflow_storage.testing import stored_run

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def _empty_cache():
    cache.clear()
    yield
    cache.clear()


def runs_shown(client, **parameters):
    """Return how many runs the overview counts."""
    url = reverse("admin:workflow_storage_run_overview")
    page = client.get(url, {"fragment": 1, **parameters}).content.decode()
    return sum(map(int, re.findall(r"completed (\d+)<", page)))


def test_seven_days_are_summed_up_each_time(admin_client, backend):
    stored_run(backend, status="completed")
    assert runs_shown(admin_client, since="7d") == 1
    stored_run(backend, status="completed")
    assert runs_shown(admin_client, since="7d") == 2


def test_more_days_are_kept(admin_client, backend, django_assert_num_queries):
    stored_run(backend, status="completed")
    assert runs_shown(admin_client, since="30d") == 1
    stored_run(backend, status="completed")

    with django_assert_num_queries(2):  # the session and the user
        assert runs_shown(admin_client, since="30d") == 1


def test_it_is_told_as_of_when_they_are(admin_client, backend, monkeypatch):
    url = reverse("admin:workflow_storage_run_overview")
    stored_run(backend, status="completed")
    pages = [
        admin_client.get(url, {"fragment": 1, "since": since}).content.decode()
        for since in ("30d", "30d", "7d")
    ]

    told = [re.findall(r"As of (.*); more than a week is counted once an hour", it) for it in pages]

    assert told[0] == told[1]
    assert len(told[0]) == 1
    assert not told[2]


def test_they_are_summed_up_again_after_their_time(admin_client, backend, monkeypatch):
    monkeypatch.setattr(overview, "KEPT", 0.05)
    stored_run(backend, status="completed")
    assert runs_shown(admin_client, since="30d") == 1
    stored_run(backend, status="completed")

    time.sleep(0.1)

    assert runs_shown(admin_client, since="30d") == 2


def test_each_filter_and_each_store_has_its_own(admin_client, backend, settings):
    for number in range(4):
        stored_run(
            backend,
            status="completed",
            workflow_name=f"workflow-{number % 2}",
            labels={"tenant": "a"} if number else {},
        )
    stored_run(backend, status="failed", workflow_name="workflow-0")

    assert runs_shown(admin_client, since="30d") == 4
    assert runs_shown(admin_client, since="30d", workflow="workflow-0") == 2
    assert runs_shown(admin_client, since="30d", label="tenant=a") == 3
    assert runs_shown(admin_client, since="30d", status__exact="failed") == 0
    assert runs_shown(admin_client, since="60d", until="30d") == 0
    settings.WORKFLOW_STORAGE = "memory://another"
    assert runs_shown(admin_client, since="30d") == 0


def test_a_time_is_a_day_of_the_time_zone(admin_client, backend, settings):
    stored_run(backend, status="completed", started_at=datetime(2026, 1, 31, 23, 30, tzinfo=UTC))
    times = {"since": "2026-01-01", "until": "2026-01-31"}
    assert runs_shown(admin_client, **times) == 1

    settings.TIME_ZONE = "Europe/Berlin"

    assert runs_shown(admin_client, **times) == 0


@pytest.mark.parametrize(
    ("parameters", "left_out"),
    [
        ({"q": "invoices", "slower": "60"}, "what it took, Search"),
        ({"cost": "1"}, "what it took"),
        ({"stalled": "1", "children": "yes"}, "Stalled, Started by a run"),
        ({"stalled": "0", "slower": "", "q": " ", "workflow": "invoices", "waiting": "1"}, None),
    ],
)
def test_it_names_the_filters_that_are_not_counted_in(admin_client, backend, parameters, left_out):
    url = reverse("admin:workflow_storage_run_overview")
    page = admin_client.get(url, {"fragment": 1, **parameters}).content.decode()
    assert re.findall(r"Not counted in here: (.*)\.<", page) == ([left_out] if left_out else [])


def test_it_links_other_times_of_the_same_runs(admin_client, backend):
    url = reverse("admin:workflow_storage_run_overview")
    page = admin_client.get(url, {"workflow": "a", "since": "7d"})
    links = {address: is_shown for _text, address, is_shown in page.context["times"]}
    assert links == {
        "?workflow=a&since=1h": False,
        "?workflow=a&since=24h": False,
        "?workflow=a&since=7d": True,
        "?workflow=a&since=30d": False,
    }
    page = admin_client.get(url, {"until": "2026-01-01"})
    assert not any(is_shown for _text, _address, is_shown in page.context["times"])
    page = admin_client.get(url, {"since": "yesterday"})
    assert "since=yesterday: no time." in page.content.decode()


def test_every_database_counts_the_same(sql_backend):
    for number in range(3):
        stored_run(
            sql_backend,
            workflow_name=f"workflow-{number % 2}",
            status="completed",
            duration_seconds=number + 0.5,
            total_tokens=10,
        )
    stored_run(sql_backend, workflow_name="workflow-0", status="failed")
    parameters = QueryDict("since=2d")

    found = overview.overview(sql_backend, selection_of(parameters), parameters, "/runs/")

    charts = " ".join(found.charts)
    assert "completed 3<" in charts
    assert "failed 1<" in charts
    assert ">30<" in charts
    failed, slowest = found.rankings
    assert "1 of 3" in failed
    assert re.findall(r">(workflow-\d)</a>", slowest) == ["workflow-0", "workflow-1"]

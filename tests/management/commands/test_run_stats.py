"""``run_stats``: groups of runs, beside those of the time before."""

import csv
import io
import json
from datetime import datetime, timedelta

import pytest
from django.core.management import CommandError, call_command
from django.utils import timezone

from tests.management.conftest import run_command
from workflow_storage.testing import stored_run


@pytest.fixture
def now():
    return timezone.now()


def store_some(store, now):
    """Three runs of a in the last week, two of which failed; one a week before; and b, before."""
    for days, name, status, seconds in (
        (1, "a", "completed", 10.0),
        (2, "a", "failed", 20.0),
        (3, "a", "failed", 40.0),
        (8, "a", "completed", 30.0),
        (9, "b", "completed", 5.0),
    ):
        stored_run(
            store,
            workflow_name=name,
            status=status,
            duration_seconds=seconds,
            total_tokens=1000,
            total_cost_usd=0.1,
            started_at=now - timedelta(days=days),
            labels={"tenant": "acme"} if status == "completed" else {},
        )


def test_runs_are_summed_up_by_workflow(every_backend, every_url, now):
    store_some(every_backend, now)

    text = run_command("run_stats", backend=every_url)

    head, a, b, in_all = (line.split() for line in text.splitlines())
    assert head[:3] == ["Workflow", "Runs", "Success"]
    assert a[:3] == ["a", "4", "50.0%"]
    assert a[-2:] == ["4,000", "0.4000"]
    assert b[:3] == ["b", "1", "100.0%"]
    assert in_all[:3] == ["all", "5", "60.0%"]


def test_a_time_is_set_beside_the_one_before(every_backend, every_url, now):
    store_some(every_backend, now)

    text = run_command("run_stats", since=timedelta(days=7), format="json", backend=every_url)

    a, b = json.loads(text)
    assert (a["workflow_name"], a["runs"], a["before_runs"]) == ("a", 3, 1)
    assert a["success_rate"] == pytest.approx(1 / 3)
    assert a["before_success_rate"] == 1.0
    assert a["by_status"] == {"completed": 1, "failed": 2}
    assert a["p50_seconds"] == pytest.approx(20.0, rel=0.01)
    assert (b["workflow_name"], b["runs"], b["before_runs"]) == ("b", 0, 1)
    table = run_command("run_stats", since="7d", backend=every_url)
    assert "+200%" in table
    assert "-66.7 pt" in table


def test_days_are_set_beside_the_day_before(every_backend, every_url, settings):
    settings.TIME_ZONE = "America/New_York"
    for day, runs in ((1, 2), (2, 3)):
        for _ in range(runs):
            moment = timezone.make_aware(datetime(2026, 3, day, 22))
            stored_run(every_backend, workflow_name="w", status="completed", started_at=moment)

    text = run_command("run_stats", by="day", backend=every_url)
    record = json.loads(run_command("run_stats", by="day", format="json", backend=every_url))

    assert [line.split()[0] for line in text.splitlines()] == [
        "Day",
        "2026-03-01",
        "2026-03-02",
        "all",
    ]
    assert "+50%" in text
    assert [(one["day"], one["before_runs"]) for one in record] == [
        ("2026-03-01T00:00:00-05:00", None),
        ("2026-03-02T00:00:00-05:00", 2),
    ]


def test_groups_can_be_labels_or_nothing_and_be_selected(every_backend, every_url, now):
    store_some(every_backend, now)

    def rows(**options):
        text = run_command("run_stats", format="csv", backend=every_url, **options)
        return list(csv.DictReader(io.StringIO(text)))

    assert [(one["label:tenant"], one["runs"]) for one in rows(by="label:tenant")] == [
        ("acme", "3"),
        ("", "2"),
    ]
    assert [one["runs"] for one in rows(by="all")] == ["5"]
    assert [one["runs"] for one in rows(by="all", status="failed", workflow="a")] == ["2"]
    assert [(one["workflow_name"], one["status"]) for one in rows(by=["workflow", "status"])] == [
        ("a", "completed"),
        ("a", "failed"),
        ("b", "completed"),
    ]


def test_the_newest_so_many_are_set_beside_as_many_before_them(every_backend, every_url, now):
    store_some(every_backend, now)
    ids = [run.id for run in every_backend.runs.list_runs()]

    def rows(**options):
        text = run_command("run_stats", format="json", backend=every_url, **options)
        return [(one["workflow_name"], one["runs"], one["before_runs"]) for one in json.loads(text)]

    assert rows(limit=2) == [("a", 2, 2)]
    assert rows(limit=4) == [("a", 4, 0), ("b", 0, 1)]
    assert rows(limit=2, before=ids[1]) == [("a", 2, 0), ("b", 0, 1)]
    assert rows(limit=10, workflow="b") == [("b", 1, 0)]
    assert rows(limit=1, workflow="none") == []
    (day,) = json.loads(
        run_command("run_stats", by="day", limit=1, format="json", backend=every_url)
    )
    assert (day["runs"], day["before_runs"]) == (1, None)


def test_runs_after_another_one_are_summed_up(every_backend, every_url, now):
    store_some(every_backend, now)
    start = now - timedelta(days=4)
    for number in range(3):
        stored_run(
            every_backend,
            id=f"same-{number}",
            workflow_name="a",
            status="completed",
            duration_seconds=5.0 + number,
            total_cost_usd=0.2,
            started_at=start,
        )

    def rows(**options):
        text = run_command(
            "run_stats", before="same-1", format="json", backend=every_url, **options
        )
        return json.loads(text)

    a, b = rows()
    assert (a["workflow_name"], a["runs"], a["before_runs"]) == ("a", 2, None)
    assert (a["total_cost_usd"], a["max_seconds"]) == (pytest.approx(0.3), 30.0)
    assert (b["workflow_name"], b["runs"]) == ("b", 1)
    # Four days and a half, beside as many before: from 8.5 days ago until 4, and from 13 on.
    a, b = rows(since=now - timedelta(days=8, hours=12))
    assert (a["runs"], a["before_runs"]) == (2, 0)
    assert (b["runs"], b["before_runs"]) == (0, 1)
    assert rows(since=now - timedelta(days=3)) == []


@pytest.mark.django_db
def test_what_runs_cannot_be_grouped_by_is_said():
    assert run_command("run_stats", backend="default") == "No runs.\n"
    with pytest.raises(CommandError, match="cannot be grouped by 'year'"):
        call_command("run_stats", by="year")

"""Runs summed up for charts: what `summarize` says of the same, on every database."""

import itertools
import random
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from django.db import connections
from django.utils import timezone

from workflow_storage import WorkflowRun
from workflow_storage.admin.charts import time_steps
from workflow_storage.backends.orm.overviews import (
    can_look_over,
    over_time_and_by_workflow,
)
from workflow_storage.filters import valid_filters
from workflow_storage.testing import stored_run

BEGINNING = datetime(2026, 3, 20, 10, 30, tzinfo=UTC)


@pytest.fixture
def filled(sql_backend):
    chance = random.Random(1)
    for number in range(120):
        status = chance.choice(["completed", "failed", "cancelled", "running", "pending"])
        ended = status in ("completed", "failed", "cancelled")
        stored_run(
            sql_backend,
            workflow_name=f"workflow-{number % 3}",
            status=status,
            started_at=BEGINNING + timedelta(hours=number * 2, minutes=number),
            duration_seconds=chance.choice([0.0, 0.0004, 1.0, chance.random() * 900])
            if ended
            else None,
            total_tokens=chance.choice([None, number]),
            total_cost_usd=chance.choice([None, 0.1, 0.2]),
            labels={"tenant": f"t{number % 2}"},
        )
    runs = WorkflowRun.objects.using(sql_backend.alias)
    runs.filter(status="running").update(duration_seconds=5)  # in an attempt before
    runs.filter(status="cancelled").update(duration_seconds=None)
    return sql_backend


FILTERS = [
    {},
    {"labels": {"tenant": "t1"}},
    {"labels": {"tenant": "t1"}, "status": ["failed", "completed"]},
    {"workflow_name": "workflow-2"},
    {"workflow_name": "x" * 300},
]


@pytest.mark.parametrize(
    "days", [7, *(pytest.param(days, marks=pytest.mark.slow) for days in (0.2, 1, 11, 50, 400))]
)
def test_they_are_those_of_summarize(filled, days):
    after = BEGINNING + timedelta(hours=1)
    before = after + timedelta(days=days)
    within = {"started_after": after, "started_before": before}
    for filters, zone in itertools.product(FILTERS, ["UTC", "Europe/Berlin", "Asia/Kathmandu"]):
        with timezone.override(ZoneInfo(zone)):
            time, starts = time_steps(after, before)
            if not can_look_over(filled.alias, starts):
                assert connections[filled.alias].vendor == "mysql"
                continue
            over_time, by_workflow = over_time_and_by_workflow(
                filled.alias, valid_filters({**filters, **within}), starts
            )

            assert over_time == alike(filled.runs.summarize(by=time, **filters, **within))
            assert by_workflow == alike(
                filled.runs.summarize(by="workflow_name", **filters, **within),
                total_tokens=None,
                total_cost_usd=None,
            )


def alike(summaries, **others):
    """Return what is equal to summaries whose durations are as exact as their buckets."""
    return [
        summary._replace(
            **{
                name: value if value is None else pytest.approx(value, rel=0.01, abs=0.001)
                for name in ("p50_seconds", "p95_seconds", "max_seconds")
                for value in [getattr(summary, name)]
            },
            **others,
        )
        for summary in summaries
    ]


def test_a_duration_beyond_all_characters_is_counted(sql_backend):
    if not can_look_over(sql_backend.alias, [BEGINNING]):
        assert connections[sql_backend.alias].vendor == "mysql"
        return
    for seconds in (1e300, 0.5):
        stored_run(sql_backend, status="completed", started_at=BEGINNING, duration_seconds=seconds)
    within = {"started_after": BEGINNING, "started_before": BEGINNING + timedelta(hours=1)}

    over_time, by_workflow = over_time_and_by_workflow(
        sql_backend.alias, valid_filters(within), [BEGINNING]
    )

    for (summary,) in (over_time, by_workflow):
        assert summary.by_status == {"completed": 2}
        assert summary.p50_seconds == pytest.approx(0.5, rel=0.01)
        assert summary.max_seconds > 1e80

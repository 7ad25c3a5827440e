"""What is promised of runs that are summed up: the same on every backend, however it counts.

Run by `RunsContract`, or alone.
"""

from __future__ import annotations

import math
import random
import uuid
from datetime import datetime, timedelta
from typing import Any

import pytest
from django.utils import timezone
from hypothesis import given
from hypothesis import strategies as st

from workflow_storage import RunStatus, StorageBackend
from workflow_storage.summaries import group_of, valid_groups
from workflow_storage.testing.sample_runs import stored_run
from workflow_storage.testing.values import against_the_store


class SummarizingContract:
    """What `summarize` promises."""

    def test_a_group_has_its_numbers(self, backend: StorageBackend) -> None:
        for status, seconds, tokens, cost in [
            ("completed", 1.0, 10, 0.1),
            ("completed", 3.0, None, 0.2),
            ("completed", 0.0, 5, None),
            ("failed", 100.0, None, None),
            ("cancelled", 2.0, None, None),
            ("running", None, 7, None),
        ]:
            stored_run(
                backend,
                workflow_name="a",
                status=status,
                duration_seconds=seconds,
                total_tokens=tokens,
                total_cost_usd=cost,
            )
        stored_run(backend, workflow_name="b")

        a, b = backend.runs.summarize()

        assert (a.group, a.runs) == (("a",), 6)
        assert a.by_status == {"completed": 3, "failed": 1, "cancelled": 1, "running": 1}
        assert a.success_rate == 0.75
        assert a.p50_seconds == pytest.approx(2.0, rel=0.01)
        assert a.p95_seconds == pytest.approx(100.0, rel=0.01)
        assert a.max_seconds == 100.0
        assert sum(a.durations.values()) == 5
        assert a.durations[0] == 1
        assert (a.total_tokens, a.total_cost_usd) == (22, 0.3)
        assert (b.group, b.runs, b.by_status) == (("b",), 1, {"pending": 1})
        assert b[3:] == (None, None, None, None, {}, None, None)

    def test_groups_are_those_that_are_asked_for(self, backend: StorageBackend) -> None:
        chance = random.Random(7)
        now = timezone.now()
        runs = [
            stored_run(
                backend,
                workflow_name=chance.choice("ab"),
                status=chance.choice([*RunStatus]),
                labels=chance.choice([{}, {"t": "1"}, {"t": "2", "u": "x"}]),
                started_at=now - timedelta(hours=chance.randrange(24 * 90)),
                total_tokens=1,
            )
            for _ in range(60)
        ]
        for by in (
            (),
            "status",
            ("workflow_name", "status"),
            ("label:t",),
            ("label:t", "label:u", "workflow_name"),
            ("hour",),
            ("day", "status"),
            ("week",),
            ("month", "label:t"),
            ("month", "week"),
        ):
            groups = valid_groups(by)
            expected: dict[tuple[Any, ...], int] = {}
            for run in runs:
                group = group_of(run, groups)
                expected[group] = expected.get(group, 0) + 1

            summaries = backend.runs.summarize(by=by)

            assert {one.group: one.runs for one in summaries} == expected
            assert [one.group for one in summaries] == sorted(
                expected, key=lambda group: [(one is None, one) for one in group]
            )
            assert sum(one.total_tokens or 0 for one in summaries) == len(runs)

    def test_filters_say_which_runs(self, backend: StorageBackend) -> None:
        for number in range(12):
            stored_run(
                backend,
                workflow_name="ab"[number % 2],
                status=("failed", "running")[number // 6],
                labels={"t": str(number % 3)},
            )

        (one,) = backend.runs.summarize(by=(), status="failed", labels={"t": "1"})
        assert (one.group, one.runs) == ((), 2)
        assert backend.runs.summarize(workflow_name="nothing") == []
        assert backend.runs.summarize(status=[]) == []
        (by_label,) = backend.runs.summarize(by="label:t", labels={"t": "2"}, workflow_name="a")
        assert (by_label.group, by_label.runs) == (("2",), 2)

    @against_the_store
    @given(
        seconds=st.lists(st.floats(0, 1e6) | st.floats(0, 0.01), min_size=1, max_size=40),
        share=st.sampled_from([(0.5, "p50_seconds"), (0.95, "p95_seconds")]),
    )
    def test_percentiles_are_within_one_percent(
        self, backend: StorageBackend, seconds: list[float], share: tuple[float, str]
    ) -> None:
        name = uuid.uuid4().hex
        for one in seconds:
            stored_run(backend, workflow_name=name, status="completed", duration_seconds=one)

        (summary,) = backend.runs.summarize(workflow_name=name)

        expected = sorted(seconds)[math.ceil(share[0] * len(seconds)) - 1]
        assert getattr(summary, share[1]) == pytest.approx(expected, rel=0.0101, abs=0.001)
        assert summary.max_seconds == max(seconds)
        assert (summary.p95_seconds or 0.0) <= summary.max_seconds
        assert sum(summary.durations.values()) == len(seconds)

    def test_costs_are_summed_to_a_billionth(self, backend: StorageBackend) -> None:
        for number in range(100):
            stored_run(backend, total_cost_usd=0.1 + number * 1e-9)
        (summary,) = backend.runs.summarize()
        assert summary.total_cost_usd == pytest.approx(10 + 4950e-9, abs=1e-9)

    def test_days_are_those_of_the_current_time_zone(
        self, backend: StorageBackend, settings: Any
    ) -> None:
        if not settings.USE_TZ:
            return
        for hour in range(0, 96, 3):
            start = datetime(2026, 3, 28, tzinfo=timezone.get_fixed_timezone(0))
            stored_run(backend, started_at=start + timedelta(hours=hour))
        for zone in ("Europe/Berlin", "America/New_York", "Asia/Kathmandu", "UTC"):
            with timezone.override(zone):
                for by in ("day", "hour", "week"):
                    summaries = backend.runs.summarize(by=by)
                    found = {one.group[0]: one.runs for one in summaries}
                    expected: dict[Any, int] = {}
                    for run in backend.runs.iter_runs():
                        (group,) = group_of(run, (by,))
                        expected[group] = expected.get(group, 0) + 1
                    assert found == expected

    @pytest.mark.parametrize("by", ["year", ("workflow_name", "x"), "label:", ("day", "day"), 5])
    def test_an_unknown_group_is_refused(self, backend: StorageBackend, by: Any) -> None:
        with pytest.raises((ValueError, TypeError)):
            backend.runs.summarize(by=by)

"""Buckets of durations, and groups of times."""

from datetime import datetime

import pytest
from django.utils import timezone
from hypothesis import given
from hypothesis import strategies as st

from workflow_storage import WorkflowRun
from workflow_storage.summaries import (
    Summaries,
    bucket_of,
    merged,
    seconds_of,
    start_of,
    valid_groups,
)


@given(seconds=st.floats(0, 1e12))
def test_what_stands_for_a_bucket_is_within_one_percent(seconds):
    assert seconds_of(bucket_of(seconds)) == pytest.approx(seconds, rel=0.01001, abs=0.001)


@given(one=st.floats(0, 1e6), other=st.floats(0, 1e6))
def test_buckets_are_in_the_order_of_the_durations(one, other):
    assert (bucket_of(one) <= bucket_of(other)) or one > other


@pytest.mark.parametrize(
    ("time", "expected"),
    [
        ("hour", datetime(2026, 3, 29, 3)),
        ("day", datetime(2026, 3, 29)),
        ("week", datetime(2026, 3, 23)),
        ("month", datetime(2026, 3, 1)),
    ],
)
def test_times_begin_in_the_current_time_zone(time, expected):
    with timezone.override("Europe/Berlin"):  # where 2 o'clock was left out on that day
        moment = timezone.make_aware(datetime(2026, 3, 29, 3, 30))
        assert start_of(time, moment) == timezone.make_aware(expected)


RUNS = st.lists(
    st.builds(
        WorkflowRun,
        workflow_name=st.sampled_from(["a", "b", "c"]),
        status=st.sampled_from(["running", "completed", "failed"]),
        duration_seconds=st.none() | st.floats(0, 1e5),
        total_tokens=st.none() | st.integers(0, 10_000),
        total_cost_usd=st.none() | st.integers(0, 1000).map(lambda cents: cents / 100),
    ),
    max_size=20,
)


@given(runs=RUNS)
def test_groups_that_are_merged_are_the_group_of_all_runs(runs):
    by_name, in_all = Summaries(), Summaries()
    for run in runs:
        by_name.add_run(run, ("workflow_name",))
        in_all.add_run(run, ())

    assert [merged(by_name.results())] == (in_all.results() or [merged(())])


def test_one_group_may_be_given_as_text():
    assert valid_groups("label:a b") == ("label:a b",)
    with pytest.raises(ValueError, match="cannot be grouped by 'year'"):
        valid_groups("year")

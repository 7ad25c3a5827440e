"""Clocks that are changed, that stand still, and that go back."""

from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
from django.db import connections, transaction
from django.utils import timezone

from workflow_storage import querysets
from workflow_storage.testing import changed_state, stored_run


@pytest.fixture
def in_berlin(any_backend, settings):
    """Store times without a time zone, as the clocks in Berlin show them."""

    def disconnect():
        # A connection keeps the time zone that it was opened with.
        if hasattr(any_backend.runs, "alias"):
            connections[any_backend.runs.alias].close()

    disconnect()
    settings.USE_TZ = False
    settings.TIME_ZONE = "Europe/Berlin"
    yield any_backend
    disconnect()


@pytest.mark.parametrize(
    ("now", "alive", "dead"),
    [
        # From 01:59 to 03:00: it is 03:01, and 01:58 was three minutes ago.
        ("2026-03-29 01:01", ["2026-03-29 01:58", "2026-03-29 03:00"], "2026-03-29 01:25"),
        # From 02:59 to 02:00: it is 02:10 for the second time, and 02:05 was five minutes ago.
        ("2026-10-25 01:10", ["2026-10-25 02:05", "2026-10-25 02:45"], "2026-10-25 01:25"),
        # After it: 02:40 was for the second time 30 minutes ago.
        ("2026-10-25 02:05", ["2026-10-25 02:55", "2026-10-25 02:40"], "2026-10-25 01:25"),
        # No change.
        ("2026-06-01 10:00", ["2026-06-01 11:40"], "2026-06-01 11:20"),
    ],
    ids=["forward", "back", "after it went back", "no change"],
)
def test_no_live_run_is_failed_for_the_hour_that_a_change_of_clocks_takes(
    in_berlin, monkeypatch, now, alive, dead
):
    backend, idle = in_berlin, timedelta(minutes=30)
    seconds = datetime.fromisoformat(now).replace(tzinfo=UTC).timestamp()
    monkeypatch.setattr(querysets, "time", SimpleNamespace(time=lambda: seconds))
    start = datetime(2026, 1, 1)

    def running(sign_of_life):
        heartbeat = datetime.fromisoformat(sign_of_life)
        return stored_run(backend, status="running", started_at=start, heartbeat_at=heartbeat)

    for sign in alive:
        running(sign)
    gone = running(dead)

    assert [run.id for run in backend.runs.list_stalled(idle)] == [gone.id]
    assert backend.runs.fail_stalled(idle) == 1
    assert backend.runs.get(gone.id).status == "failed"


@pytest.mark.parametrize("rolled_back", ["a transaction", "a savepoint"])
def test_a_rolled_back_state_is_no_base_when_the_clock_stands_still(
    sql_backend, monkeypatch, rolled_back
):
    run = stored_run(sql_backend)
    alias, now = sql_backend.states.alias, timezone.now()
    monkeypatch.setattr(timezone, "now", lambda: now)
    writer, other = sql_backend.states.writer(run.id), sql_backend.states.writer(run.id)
    for state in ({}, {}):  # the next one, of step 2, is the base of step 3
        writer.save_state(state, "node")
    seeds = iter(range(10))

    def save(by):
        state = changed_state({}, "grow", 20_000 + next(seeds))
        by.save_state(state, "node")
        return state

    def save_and_roll_back():
        with pytest.raises(ZeroDivisionError), transaction.atomic(using=alias):
            save(writer)
            _ = 1 / 0

    if rolled_back == "a savepoint":
        with transaction.atomic(using=alias):
            save_and_roll_back()
            expected = [{}, {}, save(other), save(writer)]
    else:
        save_and_roll_back()
        expected = [{}, {}, save(other), save(writer)]

    history = sql_backend.states.get_state_history(run.id)
    assert [checkpoint["state_data"] for checkpoint in history] == expected


def test_a_clock_that_goes_back_changes_no_order(sql_backend, monkeypatch):
    run = stored_run(sql_backend)
    now = timezone.now()
    for number in range(5):
        monkeypatch.setattr(timezone, "now", lambda n=number: now - timedelta(hours=n))
        sql_backend.states.save_state(run.id, {"n": number}, "node")

    history = sql_backend.states.get_state_history(run.id)
    assert [(each["step"], each["state_data"]["n"]) for each in history] == [
        (number, number) for number in range(5)
    ]
    assert sql_backend.states.get_latest_state(run.id) == {"n": 4}

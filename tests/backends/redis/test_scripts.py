"""Scripts: their keys, what they read, and that they are atomic."""

import os
import random
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta

import pytest
from django.utils import timezone
from hypothesis import example, given
from hypothesis import strategies as st
from redis.crc import key_slot

from tests.backends.redis.keys import (
    assert_attempts_are_whole,
    assert_indexes_agree,
    assert_states_are_whole,
    keys_of,
)
from workflow_storage import (
    RunLostError,
    RunStatus,
    create_storage_backend,
)
from workflow_storage.testing import against_the_store, new_run, stored_run


def test_all_keys_of_a_run_are_in_one_slot_whatever_its_id(backend):
    for run_id in ("}", "{}", "a}b{c", "{{{", "a:run:b", "\n", "é"):
        run = stored_run(backend, id=run_id, workflow_name=f"{run_id} workflow")
        backend.states.save_state(run.id, {}, "node")
        backend.runs.update_status(run.id, "completed")
    by_base = {}
    for kind in ("run", "ended", "states"):
        for key in keys_of(backend, kind):
            by_base.setdefault(key.partition("}")[0], set()).add(key_slot(key.encode()))
    assert all(len(slots) == 1 for slots in by_base.values())
    assert_indexes_agree(backend)
    backend.runs.delete("}")
    assert "}" not in {run.id for run in backend.runs.iter_runs()}
    assert backend.runs.delete_finished(before=timezone.now()) == 6
    assert keys_of(backend, "") == {}


def test_nothing_reads_without_bound(server):
    backend = create_storage_backend(server.url)
    for number in range(500):
        stored_run(backend, status=list(RunStatus)[number % 5])
    run = next(backend.runs.iter_runs())
    for _ in range(50):
        backend.states.save_state(run.id, {}, "node")
    list(backend.runs.iter_runs(status=["failed", "running"]))
    backend.runs.list_runs(limit=400)
    backend.runs.count_runs(started_before=timezone.now())
    backend.runs.list_stalled(timedelta(0))
    backend.runs.fail_stalled(timedelta(0))
    backend.runs.update_status(run.id, "running")
    backend.runs.list_attempts(run.id)
    list(backend.states.iter_state_history(run.id))
    backend.runs.delete_finished(before=timezone.now())

    used = {
        name.removeprefix("cmdstat_")
        for name in server.client(server.ports[0]).info("commandstats")
    }
    unbounded = {
        "keys",
        "scan",
        "zscan",
        "hscan",
        "hgetall",
        "hkeys",
        "hvals",
        "zrange",
        "zrevrange",
    }
    assert used.isdisjoint(unbounded)
    backend.runs.store.close()


@pytest.fixture
def said(server, monkeypatch):
    """A store, and what is said to its server since."""
    backend = create_storage_backend(server.url)
    store = backend.runs.store
    client = store.client(store.url.nodes[0])
    commands = []
    execute = client.execute_command

    def execute_and_note(*command):
        commands.append(command[0])
        return execute(*command)

    monkeypatch.setattr(client, "execute_command", execute_and_note)
    monkeypatch.setattr(client, "pipeline", None)
    yield backend, commands
    store.close()


@pytest.mark.parametrize("state", [{"n": 1}, {"text": "large " * 2000}], ids=["small", "large"])
def test_a_save_is_one_round_trip_with_all_that_it_carries(said, state):
    backend, commands = said
    run = stored_run(backend, status="running")
    writer = backend.states.writer(run.id, attempt=1)
    carried = {"duration_seconds": 1.5, "tokens": 7, "cost_usd": 0.5}
    totals = {"total_tokens": 7, "total_cost_usd": None}
    writer.save_state(state, "node")
    commands.clear()

    for _ in range(5):
        writer.save_state(state, "node", totals=totals, **carried)

    assert commands == ["EVALSHA"] * 5


@pytest.mark.parametrize(
    "write",
    [
        lambda backend, run_id: backend.states.save_state(run_id, {}, "node", attempt=1),
        lambda backend, run_id: backend.runs.update(run_id, outputs=1, attempt=1),
        lambda backend, run_id: backend.runs.update_status(run_id, "completed", attempt=1),
        lambda backend, run_id: backend.runs.heartbeat(run_id, attempt=1),
    ],
    ids=["save_state", "update", "update_status", "heartbeat"],
)
def test_what_is_said_of_a_lost_run_is_asked_in_the_same_round_trip(said, write):
    backend, commands = said
    run = stored_run(backend, status="running")
    write(backend, stored_run(backend, status="running").id)
    backend.runs.update_status(run.id, "running", worker="host-b:7")
    commands.clear()

    with pytest.raises(RunLostError, match="taken over by attempt 2 on host-b:7 since"):
        write(backend, run.id)

    assert commands == ["EVALSHA"]


_moments = st.datetimes(datetime(1000, 1, 1), datetime(9998, 1, 1), timezones=st.just(UTC))


@against_the_store
@given(start=_moments, stop=_moments)
@example(start=datetime(1900, 2, 28, tzinfo=UTC), stop=datetime(1900, 3, 1, tzinfo=UTC))
@example(start=datetime(2000, 2, 28, tzinfo=UTC), stop=datetime(2000, 3, 1, tzinfo=UTC))
@example(start=datetime(2024, 2, 29, tzinfo=UTC), stop=datetime(2028, 2, 29, tzinfo=UTC))
@example(
    start=datetime(1999, 12, 31, 23, 59, 59, 999999, UTC), stop=datetime(2001, 1, 1, tzinfo=UTC)
)
@example(start=datetime(1000, 1, 1, tzinfo=UTC), stop=datetime(9997, 12, 31, tzinfo=UTC))
def test_durations_are_right_in_every_kind_of_year(backend, start, stop):
    run = new_run(status="running", started_at=start, attempt_started_at=start, attempt=1)
    backend.runs.put(run)

    backend.runs.update_status(run.id, "completed", completed_at=stop)

    expected = max(0.0, (stop - start).total_seconds())
    # In a double, microseconds are exact for 285 years.
    assert backend.runs.get(run.id).duration_seconds == pytest.approx(expected, rel=1e-15)


WRITER = """
import itertools, random, sys
from datetime import timedelta
from django.utils import timezone
from workflow_storage import StorageError, WorkflowRun, create_storage_backend
from workflow_storage.testing import changed_state
backend = create_storage_backend(sys.argv[1])
chance = random.Random(int(sys.argv[2]))
print("begun", flush=True)
for number in itertools.count():
    run_id = f"run-{chance.randrange(30)}"
    try:
        match chance.randrange(7):
            case 0 | 1:
                backend.runs.add(WorkflowRun(id=run_id, workflow_name=f"w{number % 2}"))
            case 2:
                status = chance.choice(["running", "completed", "failed"])
                backend.runs.update_status(run_id, status, outputs={"n": number})
            case 3:
                state = changed_state({}, "grow", 2000 + number % 500)
                backend.states.save_state(run_id, state, "node")
                backend.states.save_state(run_id, {**state, "more": number}, "node")
            case 4:
                backend.states.delete_states(run_id, keep_last=chance.randrange(3))
            case 5:
                backend.runs.delete(run_id)
            case 6:
                backend.runs.delete_finished(before=timezone.now() - timedelta(seconds=1))
    except StorageError:
        pass
"""


@pytest.mark.slow
def test_writers_that_are_killed_leave_nothing_half_written(backend, url):
    chance = random.Random(1)
    for attempt in range(4):
        writers = [
            subprocess.Popen(
                [sys.executable, "-c", WRITER, url, str(10 * attempt + number)],
                stdout=subprocess.PIPE,
                text=True,
            )
            for number in range(2)
        ]
        for writer in writers:
            assert writer.stdout.readline() == "begun\n"
        time.sleep(chance.uniform(0.02, 0.3))
        for writer in writers:
            os.kill(writer.pid, signal.SIGKILL)
            writer.wait(timeout=30)
            writer.stdout.close()

        assert_indexes_agree(backend)
        assert_attempts_are_whole(backend)
        assert_states_are_whole(backend)
        listed = {run.id for run in backend.runs.iter_runs()}
        assert listed == {key.partition(":run:")[2] for key in keys_of(backend, "run:")}
    assert listed

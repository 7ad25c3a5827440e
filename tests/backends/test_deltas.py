"""States as the databases hold them: whole or as a delta, damaged, and pruned by a crash."""

import subprocess
import sys
import threading
import time
from contextlib import nullcontext, suppress

import pytest
from django.db import connections, transaction
from django.db.models.functions import Length
from django.test.utils import CaptureQueriesContext

from workflow_storage import (
    DamagedStateError,
    ExecutionState,
    StorageError,
    WorkflowRun,
    create_storage_backend,
)
from workflow_storage.deltas import RecentChains
from workflow_storage.factory import forget
from workflow_storage.testing import changed_state, in_threads, stored_run

PROSE = 3000


@pytest.fixture
def run(sql_backend):
    """A run with 100 states, each of which adds some prose to the one before."""
    run = stored_run(sql_backend)
    writer = sql_backend.states.writer(run.id)
    state = {}
    for number in range(100):
        state = changed_state(state, "grow", PROSE + number)
        writer.save_state(state, f"node-{number}")
    return run


def states_of(backend, run):
    return ExecutionState.objects.using(backend.states.alias).filter(run_id=run.id)


def queries_of(alias, call):
    queries = []

    def collect(execute, sql, params, many, context):
        queries.append(sql)
        return execute(sql, params, many, context)

    with connections[alias].execute_wrapper(collect):
        call()
    return queries


def test_states_that_grow_are_stored_as_deltas(sql_backend, run):
    states = states_of(sql_backend, run)
    first = states.get(step=0)
    assert (first.state_json is None, first.state_delta) == (False, None)
    assert states.filter(state_delta__isnull=False).count() > 95

    stored = sum(
        whole or delta
        for whole, delta in states.values_list(Length("state_json"), Length("state_delta"))
    )
    last = sql_backend.states.get_latest_state(run.id)
    assert stored < 3 * len(str(last))


def test_reading_takes_one_query_for_a_chain_and_none_for_each_state(sql_backend, run):
    alias, states = sql_backend.states.alias, sql_backend.states

    assert len(queries_of(alias, lambda: states.get_latest_state(run.id))) == 2
    assert len(queries_of(alias, lambda: states.get_latest_checkpoint(run.id))) == 2
    assert len(queries_of(alias, lambda: states.get_state(run.id, 63))) == 2
    assert len(queries_of(alias, lambda: states.get_state(run.id, 0))) == 1
    assert len(queries_of(alias, lambda: states.get_state_history(run.id))) == 100 // 16 + 2


def test_writing_reads_a_base_only_where_it_is_not_remembered(sql_backend, run):
    alias, states = sql_backend.states.alias, sql_backend.states
    state = states.get_latest_state(run.id)
    writer = states.writer(run.id)

    def reads(save):
        queries = queries_of(alias, save)
        return sum("state_delta" in sql for sql in queries if sql.startswith("SELECT"))

    assert reads(lambda: writer.save_state(state, "node")) == 1
    for _ in range(40):
        assert reads(lambda: writer.save_state(state, "node")) == 0
    assert reads(lambda: states.save_state(run.id, state, "node")) == 1
    assert reads(lambda: writer.save_state(state, "node")) == 1


def test_a_writer_bases_nothing_on_what_took_the_place_of_what_it_remembers(sql_backend, run):
    states = sql_backend.states
    state = states.get_latest_state(run.id)
    writer = states.writer(run.id)
    writer.save_state(state, "node")
    states.delete_states(run.id)
    others = states.writer(run.id)
    for number in range(101):
        others.save_state({"other": [number, "x" * 6000]}, "other")

    assert writer.save_state(state, "node") == 101

    history = states.get_state_history(run.id)
    assert [one["step"] for one in history] == list(range(102))
    assert history[-1]["state_data"] == state


def test_the_model_gives_the_state_however_it_is_stored(sql_backend, run):
    for step in (0, 1, 63, 64, 99):
        state = states_of(sql_backend, run).get(step=step)
        checkpoint = sql_backend.states.get_state(run.id, step)
        assert state.state_data == checkpoint["state_data"]


@pytest.mark.parametrize("use_tz", [True, False])
def test_a_delta_has_the_same_time_as_its_row(sql_backend, settings, use_tz):
    connections[sql_backend.states.alias].close()
    settings.USE_TZ = use_tz
    run = stored_run(sql_backend)
    state = {}
    for number in range(4):
        state = changed_state(state, "grow", PROSE + number)
        sql_backend.states.save_state(run.id, state, "node")

    rows = {row.step: row for row in states_of(sql_backend, run)}
    found = [sql_backend.states.get_state(run.id, step) for step in range(4)]

    assert rows[3].state_delta is not None
    assert [repr(each["created_at"]) for each in found] == [
        repr(rows[step].created_at) for step in range(4)
    ]
    connections[sql_backend.states.alias].close()


def damage(backend, run, step, **columns):
    assert states_of(backend, run).filter(step=step).update(**columns) == 1


def test_a_damaged_delta_is_an_error_that_names_run_and_step(sql_backend, run):
    delta = bytes(states_of(sql_backend, run).get(step=99).state_delta)
    whole = sql_backend.states.get_latest_state(run.id)
    found = []
    for position in range(1, len(delta), max(1, len(delta) // 30)):
        flipped = bytearray(delta)
        flipped[position] ^= 0x10
        damage(sql_backend, run, 99, state_delta=bytes(flipped))
        try:
            # A bit that only tells how much memory it takes changes nothing.
            assert sql_backend.states.get_latest_state(run.id) == whole
        except DamagedStateError as exc:
            found.append(str(exc))
    assert len(found) >= 29
    assert all(f"{run.id} at step 99 cannot be rebuilt" in error for error in found)

    damage(sql_backend, run, 99, state_delta=delta[:-1])
    with pytest.raises(DamagedStateError, match="at step 99"):
        sql_backend.states.get_state_history(run.id)
    with pytest.raises(DamagedStateError, match="at step 99"):
        _ = states_of(sql_backend, run).get(step=99).state_data
    assert sql_backend.states.get_state(run.id, 98) is not None


def test_a_damaged_base_is_an_error_and_never_a_wrong_state(sql_backend, run):
    whole = states_of(sql_backend, run).get(step=0).state_json
    damage(sql_backend, run, 0, state_json=whole.replace("a", "b", 1))

    for step in (1, 64, 99):
        with pytest.raises(DamagedStateError, match=f"at step {step} "):
            sql_backend.states.get_state(run.id, step)


@pytest.mark.parametrize("text", ["", "{", '"text"', "[]", "null"])
def test_a_whole_state_that_is_no_object_is_an_error(sql_backend, text):
    run = stored_run(sql_backend)
    sql_backend.states.save_state(run.id, {}, "node")
    damage(sql_backend, run, 0, state_json=text)

    with pytest.raises(DamagedStateError, match="at step 0"):
        sql_backend.states.get_latest_state(run.id)


def test_a_missing_base_is_an_error(sql_backend, run):
    states_of(sql_backend, run).filter(step=64).delete()

    with pytest.raises(DamagedStateError, match="step 64, which it is based on, is missing"):
        sql_backend.states.get_latest_state(run.id)


def another_process(backend):
    """Return a repository that remembers nothing of what was saved."""
    return type(backend.states)(backend.states.alias)


def test_a_run_with_a_damaged_state_goes_on_with_a_whole_one(sql_backend, run, caplog):
    states_of(sql_backend, run).filter(step=99).update(state_delta=b"\x01nothing")
    state = changed_state({}, "grow", 9000)

    assert another_process(sql_backend).save_state(run.id, state, "node") == 100
    assert sql_backend.states.get_latest_state(run.id) == state
    damage(sql_backend, run, 0, state_json="damaged")
    assert another_process(sql_backend).save_state(run.id, state, "node") == 101
    assert sql_backend.states.get_latest_state(run.id) == state
    assert "cannot serve as a base" in caplog.text


def test_saves_without_a_writer_read_nothing_back_and_notice_what_others_did(sql_backend, run):
    states, others = sql_backend.states, another_process(sql_backend)
    state = states.get_latest_state(run.id)
    states.save_state(run.id, state, "node")
    with CaptureQueriesContext(connections[states.alias]) as captured:
        states.save_state(run.id, {**state, "more": 1}, "node")
    assert not any("state_delta" in one["sql"] for one in captured if "SELECT" in one["sql"][:9])

    others.save_state(run.id, {**state, "theirs": 1}, "node")
    states.save_state(run.id, {**state, "ours": 2}, "node")
    others.delete_states(run.id, keep_last=1)
    states.save_state(run.id, {**state, "ours": 3}, "node")
    sql_backend.runs.delete(run.id)
    sql_backend.runs.add(WorkflowRun(id=run.id, workflow_name="anew"))
    assert states.save_state(run.id, {**state, "ours": 4}, "node") == 0
    assert states.save_state(run.id, {**state, "ours": 5}, "node") == 1
    history = others.get_state_history(run.id)
    assert [one["state_data"]["ours"] for one in history] == [4, 5]


def test_what_is_remembered_of_runs_is_bounded():
    recent = RecentChains()
    for number in range(100):
        chain = recent.take(f"run-{number}")
        chain.remember(0, b"x" * 1_000_000, None)
        recent.keep(chain)

    assert recent.take("run-99").next_step == 1
    held = [number for number in range(100) if recent.take(f"run-{number}").next_step]
    assert held == list(range(84, 99))


@pytest.mark.slow
@pytest.mark.parametrize("keep_last", [0, 1])
@pytest.mark.parametrize("warm", [False, True])
def test_a_state_is_never_based_on_one_that_is_being_deleted(sql_backend, run, keep_last, warm):
    """A writer waits while another process deletes its base, and is then based on what is left."""
    states = sql_backend.states
    writer = states.writer(run.id)
    state = states.get_latest_state(run.id)
    if warm:
        writer.save_state(state, "warm")
    deleted, saving = threading.Event(), threading.Event()

    def delete(number):
        if number == 0:
            with transaction.atomic(using=states.alias):
                states.delete_states(run.id, keep_last=keep_last)
                deleted.set()
                saving.wait(10)
                time.sleep(0.2)
        else:
            assert deleted.wait(10)
            saving.set()
            writer.save_state({**state, "new": True}, "after")

    in_threads(2, delete)

    history = states.get_state_history(run.id)
    assert len(history) == keep_last + 1
    assert history[-1]["state_data"] == {**state, "new": True}


@pytest.mark.parametrize("keep_last", [0, 1])
@pytest.mark.parametrize("vendor", ["postgres", "mysql"])
def test_a_transaction_with_one_snapshot_never_writes_what_cannot_be_read(
    request, django_db_blocker, vendor, keep_last
):
    url = request.getfixturevalue(f"{vendor}_url")
    options = {
        "postgres": "options=-c%20default_transaction_isolation=repeatable%5C%20read",
        "mysql": "isolation_level=repeatable%20read",
    }[vendor]
    with django_db_blocker.unblock():
        other = create_storage_backend(url)
        backend = create_storage_backend(f"{url}?{options}")
        run = stored_run(other)
        state = {}
        for number in range(6):
            state = changed_state(state, "grow", 5000 + number)
            other.states.save_state(run.id, state, "node")

        with suppress(StorageError), transaction.atomic(using=backend.runs.alias):
            backend.runs.count_runs()
            in_threads(1, lambda _: other.states.delete_states(run.id, keep_last=keep_last))
            backend.states.save_state(run.id, state, "in the snapshot")

        for checkpoint in other.states.get_state_history(run.id):
            assert checkpoint["state_data"] == state
        other.runs.delete(run.id)
        forget(backend.runs.alias)


def test_deleting_states_goes_past_a_damaged_one(sql_backend, run):
    states_of(sql_backend, run).filter(step=96).update(state_delta=b"\x01nothing")

    assert sql_backend.states.delete_states(run.id, keep_last=10) == 90
    assert sql_backend.states.delete_states(run.id, keep_last=2) == 8
    with pytest.raises(DamagedStateError):
        sql_backend.states.get_latest_state(run.id)


@pytest.mark.parametrize("savepoint", [False, True])
def test_a_writer_forgets_what_was_rolled_back(sql_backend, run, savepoint):
    states = sql_backend.states
    writer = states.writer(run.id)
    state = changed_state(states.get_latest_state(run.id), "grow", 5000)
    writer.save_state(state, "kept")
    outer = transaction.atomic(using=states.alias) if savepoint else nullcontext()
    with outer:
        with pytest.raises(ZeroDivisionError), transaction.atomic(using=states.alias):
            for _ in range(2):
                writer.save_state(changed_state(state, "grow", 6000), "rolled back")
            _ = 1 / 0
        for number in range(2):
            states.save_state(run.id, changed_state(state, "grow", 7000 + number), "other")

        assert writer.save_state(changed_state(state, "grow", 8000), "writer") == 103

    history = states.get_state_history(run.id)
    assert [state["node_id"] for state in history[100:]] == ["kept", *["other"] * 2, "writer"]
    assert history[-1]["state_data"] == changed_state(state, "grow", 8000)


KILLED = """
import os, signal, sys
from django.db import connections
from workflow_storage import create_storage_backend
url, run_id, statement = sys.argv[1:]
backend = create_storage_backend(url)

def kill(execute, sql, params, many, context):
    if sql.startswith(statement):
        result = execute(sql, params, many, context) if statement == "UPDATE" else None
        os.kill(os.getpid(), signal.SIGKILL)
    return execute(sql, params, many, context)

with connections[backend.states.alias].execute_wrapper(kill):
    backend.states.delete_states(run_id, keep_last=37)
"""


@pytest.mark.slow
@pytest.mark.parametrize("statement", ["UPDATE", "DELETE"])
def test_a_crash_while_states_are_deleted_loses_none(sql_backend, sql_url, run, statement):
    before = sql_backend.states.get_state_history(run.id)

    killed = subprocess.run(
        [sys.executable, "-c", KILLED, sql_url, run.id, statement], timeout=60, check=False
    )

    assert killed.returncode == -9
    assert sql_backend.states.get_state_history(run.id) == before
    assert sql_backend.states.delete_states(run.id, keep_last=37) == 63
    assert sql_backend.states.get_state_history(run.id) == before[63:]

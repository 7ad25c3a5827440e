"""Scripts: their keys, what they read, and that they are atomic."""

import os
import random
import signal
import subprocess
import sys
import time
from datetime import timedelta

from django.utils import timezone
from redis.crc import key_slot

from tests.backends.redis.keys import assert_indexes_agree, assert_states_are_whole, keys_of
from workflow_storage import (
    RunStatus,
    create_storage_backend,
)
from workflow_storage.testing import stored_run


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
        assert_states_are_whole(backend)
        listed = {run.id for run in backend.runs.iter_runs()}
        assert listed == {key.partition(":run:")[2] for key in keys_of(backend, "run:")}
    assert listed

"""Workers that are stopped, killed, forked and woken again: real processes, on every backend."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from datetime import timedelta

import pytest

from tests.recorder.conftest import only_run
from workflow_storage import NotResumableError, StorageUnavailableError, resume_run
from workflow_storage.backends.orm import repository
from workflow_storage.testing import stored_run

pytestmark = pytest.mark.slow

IDLE = timedelta(milliseconds=50)

WORKER = """
import json, os, signal, sys
from workflow_storage import RunLostError, create_storage_backend, record_run
url, run_id, how, tries = *sys.argv[1:4], int(sys.argv[4])
backend = create_storage_backend(url)
runs, states = backend
refused = {}

def tried(name, call):
    try:
        call()
    except RunLostError:
        refused[name] = refused.get(name, 0) + 1
        return False
    return True

ended = "completed"
try:
    with record_run("w", run_id=run_id, backend=backend, heartbeat=0.01) as run:
        print("begun", flush=True)
        number = 0
        while refused.get("save", 0) < tries:
            number += 1
            if how == "itself" and number == 6:
                os.kill(os.getpid(), signal.SIGSTOP)
            run.add_usage(tokens=1)
            state = {"n": number, "text": "x" * (6000 if number % 4 == 0 else 50)}
            if not tried("save", lambda: run.save_state(state, "zombie")):
                tried("heartbeat", lambda: runs.heartbeat(run_id, attempt=1, node="zombie"))
                tried("update", lambda: runs.update(run_id, attempt=1, outputs="zombie"))
                tried("end", lambda: runs.update_status(run_id, "failed", attempt=1))
        run.outputs = "zombie"
except RunLostError as exc:
    ended = str(exc)
print(json.dumps({"refused": refused, "ended": ended}), flush=True)
"""


@contextmanager
def started(script, *arguments):
    worker = subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)], stdout=subprocess.PIPE, text=True
    )
    try:
        yield worker
    finally:
        worker.kill()
        worker.communicate(timeout=30)


def said(worker):
    """Return the last line that a worker prints before it ends."""
    out, _ = worker.communicate(timeout=120)
    assert worker.returncode == 0
    return json.loads(out.splitlines()[-1])


def wait_until_stopped(worker):
    _, status = os.waitpid(worker.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)


def taken_over(backend, run_id, meanwhile=lambda: time.sleep(0.01)):
    """Resume a run as soon as it is stalled."""
    end = time.monotonic() + 60
    while True:
        recording = resume_run(run_id, backend=backend, stalled_after=IDLE)
        try:
            return recording, recording.__enter__()
        except NotResumableError:
            assert time.monotonic() < end
            meanwhile()


def check_owner(backend, run_id, length, result):
    """Check that all that there is from a length on is the owner's."""
    for name in ("save", "heartbeat", "update", "end"):
        assert result["refused"][name] >= 300
    assert "was taken over by attempt 2" in result["ended"]
    history = backend.states.get_state_history(run_id)
    assert [one["step"] for one in history] == list(range(length + 2))
    assert [one["attempt"] for one in history] == [1] * length + [2] * 2
    stored = backend.runs.get(run_id)
    assert (stored.status, stored.outputs, stored.total_tokens) == ("completed", "owner", 7)
    assert stored.current_node == "owner"
    assert [one.status for one in backend.runs.list_attempts(run_id)] == ["failed", "completed"]


def owned(backend, run_id, worker, take_over):
    """Take a run over from a worker, let that wake, complete the run, and check all of it."""
    recording, owner = take_over()
    taken = only_run(backend)
    length = len(backend.states.get_state_history(run_id))
    owner.total_tokens = 7
    owner.save_state({"owner": 1}, "owner")
    os.kill(worker.pid, signal.SIGCONT)
    result = said(worker)
    # Its heartbeats kept nothing alive, either.
    assert only_run(backend).heartbeat_at == taken.heartbeat_at
    assert only_run(backend).status == "running"
    owner.save_state({"owner": 2}, "owner")
    owner.outputs = "owner"
    recording.__exit__(None, None, None)
    check_owner(backend, run_id, length, result)


@pytest.mark.slow
def test_a_worker_that_was_stopped_and_given_up_writes_nothing_when_it_wakes(backend, any_url):
    with started(WORKER, any_url, "zombie", "itself", 400) as worker:
        assert worker.stdout.readline() == "begun\n"
        wait_until_stopped(worker)
        time.sleep(IDLE.total_seconds() * 2)

        def take_over():
            try:
                return taken_over(backend, "zombie")
            except StorageUnavailableError as exc:
                # Its heartbeat was in the middle of a transaction.
                assert "it holds a lock" in str(exc)
            os.kill(worker.pid, signal.SIGCONT)
            time.sleep(0.02)
            os.kill(worker.pid, signal.SIGSTOP)
            wait_until_stopped(worker)
            time.sleep(IDLE.total_seconds() * 2)
            return take_over()

        owned(backend, "zombie", worker, take_over)


@pytest.mark.slow
@pytest.mark.parametrize("turn", range(3))
def test_nor_does_one_that_wakes_while_it_is_taken_over(backend, any_url, turn):
    with started(WORKER, any_url, "zombie", "stopped", 300) as worker:
        assert worker.stdout.readline() == "begun\n"
        time.sleep(random.uniform(0.02, 0.1))

        def stop_and_wake():
            os.kill(worker.pid, signal.SIGSTOP)
            wait_until_stopped(worker)
            time.sleep(IDLE.total_seconds() * 2)
            # It may be stopped in the middle of a transaction, and holds a lock then.
            delay = random.uniform(0, 0.01)
            threading.Timer(delay, lambda: os.kill(worker.pid, signal.SIGCONT)).start()

        stop_and_wake()

        owned(
            backend,
            "zombie",
            worker,
            lambda: taken_over(backend, "zombie", meanwhile=stop_and_wake),
        )


RESUMING = """
import json, sys, time
from datetime import timedelta
from workflow_storage import (
    NotResumableError, RunLostError, StorageUnavailableError, create_storage_backend, resume_run
)
url, run_id, name = sys.argv[1:]
backend = create_storage_backend(url)
held = []
print("ready", flush=True)
sys.stdin.readline()
end = time.monotonic() + 3
while time.monotonic() < end:
    try:
        idle = timedelta(milliseconds=2) if name == "third" else None
        with resume_run(run_id, backend=backend, stalled_after=idle) as run:
            held.append(run.attempt)
            run.save_state({"by": name}, name)
            if name != "first":
                time.sleep(0.004)
                run.save_state({"by": name}, name)
            raise ZeroDivisionError
    except (NotResumableError, RunLostError, ZeroDivisionError):
        pass
print(json.dumps(held), flush=True)
"""


@pytest.mark.slow
def test_of_those_who_fail_resume_and_take_over_no_two_hold_one_attempt(backend, any_url):
    run = stored_run(backend, status="failed")
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", RESUMING, any_url, run.id, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("first", "second", "third")
    ]
    for worker in workers:
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:
        worker.stdin.write("\n")
        worker.stdin.flush()
    held = [said(worker) for worker in workers]

    attempts = sum(held, [])  # noqa: RUF017
    assert len(attempts) == len(set(attempts))
    assert all(held)
    newest = only_run(backend).attempt
    assert sorted(attempts) == list(range(1, newest + 1))
    kept = backend.runs.list_attempts(run.id)
    assert [attempt.number for attempt in kept] == list(range(1, newest + 1))
    assert len({attempt.worker for attempt in kept}) == 3
    # Each checkpoint is by who held the attempt.
    by_attempt = {}
    for one in backend.states.iter_state_history(run.id):
        by_attempt.setdefault(one["attempt"], set()).add(one["node_id"])
    names = ("first", "second", "third")
    for number, nodes in by_attempt.items():
        assert nodes == {names[[number in numbers for numbers in held].index(True)]}


CANCELLED = """
import sys
from workflow_storage import RunLostError, create_storage_backend, record_run
url, run_id = sys.argv[1:]
backend = create_storage_backend(url)
with record_run("w", run_id=run_id, backend=backend) as run:
    run.save_state({"n": 0}, "first")
    print("begun", flush=True)
    sys.stdin.readline()
    try:
        run.save_state({"n": 1}, "late")
    except RunLostError as exc:
        print(exc, flush=True)
        raise
"""


def test_a_worker_whose_run_was_cancelled_and_resumed_is_told(backend, any_url):
    worker = subprocess.Popen(
        [sys.executable, "-c", CANCELLED, any_url, "run"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert worker.stdout.readline() == "begun\n"
    backend.runs.update_status("run", "cancelled")
    with resume_run("run", backend=backend) as owner:
        out, err = worker.communicate("\n", timeout=60)
        owner.outputs = "owner"

    assert "was taken over by attempt 2" in out
    assert err.count("RunLostError") == 1
    assert (only_run(backend).status, only_run(backend).outputs) == ("completed", "owner")
    assert backend.states.get_latest_state("run") == {"n": 0}


FORKING = """
import os, sys, threading, time
from workflow_storage import StorageError, create_storage_backend, current_run, record_run
url, run_id, how = sys.argv[1:]
backend = create_storage_backend(url)

def refused(call):
    try:
        call()
    except (StorageError, LookupError):
        return
    os._exit(1)

def child(run):
    refused(current_run)
    refused(lambda: run.save_state({"child": 1}, "child"))
    refused(lambda: run.add_usage(tokens=1))
    refused(run.heartbeat)
    if run.state != {"n": 0} or threading.active_count() != 1:
        os._exit(2)
    time.sleep(0.1)
    if how == "exit":
        sys.exit(7)
    if how == "error":
        raise ZeroDivisionError

codes = {"exit": 7, "error": 1, "normally": 0}
with record_run("forking", run_id=run_id, backend=backend, heartbeat=0.02) as run:
    run.save_state({"n": 0}, "first")
    # The thread that sends heartbeats is there, and may hold any lock.
    time.sleep(0.1)
    pid = os.fork()
    if pid == 0:
        child(run)
    else:
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == codes[how], status
        assert current_run() is run
        assert backend.runs.get(run_id).status == "running"
        before = backend.runs.get(run_id).heartbeat_at
        time.sleep(0.2)
        assert backend.runs.get(run_id).heartbeat_at > before
        run.save_state({"n": 1}, "second")
        run.outputs = "parent"
"""


@pytest.mark.parametrize("how", ["exit", "error", "normally"])
def test_a_child_that_leaves_the_block_changes_nothing_in_the_run(backend, any_url, how):
    done = subprocess.run(
        [sys.executable, "-c", FORKING, any_url, "run", how],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    stored = only_run(backend)
    assert (stored.status, stored.outputs, stored.error_message) == ("completed", "parent", None)
    assert [one["node_id"] for one in backend.states.get_state_history("run")] == [
        "first",
        "second",
    ]


IN_TRANSACTION = """
import os, signal, sys
from django.db import transaction
from workflow_storage import create_storage_backend, record_run
url, run_id = sys.argv[1:]
backend = create_storage_backend(url)
with record_run("stuck", run_id=run_id, backend=backend) as run:
    with transaction.atomic(using=backend.alias):
        run.save_state({"n": 0}, "node")
        print("in a transaction", flush=True)
        signal.pause()
"""


def test_a_worker_that_holds_a_lock_is_named_in_the_error_until_it_is_killed(
    sql_backend, sql_url, monkeypatch
):
    monkeypatch.setattr(repository, "TAKEOVER_TIMEOUT", 1.0)
    with started(IN_TRANSACTION, sql_url, "run") as worker:
        assert worker.stdout.readline() == "in a transaction\n"
        os.kill(worker.pid, signal.SIGSTOP)
        wait_until_stopped(worker)
        time.sleep(IDLE.total_seconds() * 2)
        with (
            pytest.raises(
                StorageUnavailableError,
                match=r"workflow run run has been in the middle of a transaction .* End that process",
            ),
            resume_run("run", backend=sql_backend, stalled_after=IDLE),
        ):
            pytest.fail("the block ran")
        assert sql_backend.runs.get("run").status == "running"

    recording, run = taken_over(sql_backend, "run")
    assert (run.attempt, run.state) == (2, None)
    recording.__exit__(None, None, None)
    assert sql_backend.runs.get("run").status == "completed"

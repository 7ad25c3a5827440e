"""The indexes: they follow every change, and miss and keep no run."""

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta

import redis
from django.utils import timezone

from tests.backends.redis.keys import assert_attempts_are_whole, assert_indexes_agree
from workflow_storage import (
    RunStatus,
)
from workflow_storage.testing import new_run, stored_run


def test_indexes_follow_every_change(backend):
    chance = random.Random(3)
    runs = [stored_run(backend, workflow_name=f"w{n % 3}") for n in range(30)]
    for _ in range(200):
        run = chance.choice(runs)
        backend.runs.update_status(run.id, chance.choice(list(RunStatus)))
    for run in runs[:5]:
        stored = backend.runs.get(run.id)
        changed = new_run("another", id=run.id, started_at=timezone.now(), attempt=stored.attempt)
        attempts = backend.runs.list_attempts(run.id)
        backend.runs.put(changed, over=stored, attempts=attempts[::2])
    backend.runs.delete(runs[7].id)
    backend.runs.fail_stalled(timedelta(0))
    assert_indexes_agree(backend)
    backend.runs.delete_finished(before=timezone.now(), statuses="failed")
    assert_indexes_agree(backend)
    assert_attempts_are_whole(backend)


def test_a_run_that_was_evicted_is_skipped_and_cleaned_away(backend):
    now = timezone.now()
    runs = [
        stored_run(
            backend,
            status="running" if n % 2 else "failed",
            started_at=now - timedelta(hours=n),
        )
        for n in range(20)
    ]
    store = backend.runs.store
    for run in runs[::3]:
        for server in store.servers():
            with suppress(redis.ResponseError):
                server.delete(f"{store.key_prefix(run.id)}:run:{run.id}")
    left = [run.id for number, run in enumerate(runs) if number % 3]

    assert [run.id for run in backend.runs.list_runs(limit=13)] == left
    assert [run.id for run in backend.runs.list_by_workflow("contract")] == left
    backend.runs.list_stalled(timedelta(0))
    ended = [run for run in runs if run.id in left and run.status == "failed"]
    earlier = ended[3].completed_at + timedelta(microseconds=1)
    counts = [
        backend.runs.delete_finished(before=earlier, workflow_name="contract"),
        backend.runs.delete_finished(before=timezone.now()),
        backend.runs.delete_finished(before=timezone.now(), workflow_name="contract"),
    ]
    assert sum(counts) == len(ended)
    assert counts[2] == 0
    assert_indexes_agree(backend)
    assert backend.runs.count_runs() == len(list(backend.runs.iter_runs()))
    again = runs[0]
    backend.runs.add(again)
    assert backend.states.get_state_history(again.id) == []


def test_a_run_is_never_missed_while_its_status_changes(backend):
    runs = [stored_run(backend, workflow_name="w") for _ in range(40)]
    done = threading.Event()

    def change(number):
        chance = random.Random(number)
        while not done.is_set():
            backend.runs.update_status(chance.choice(runs).id, chance.choice(list(RunStatus)))

    with ThreadPoolExecutor(2) as pool:
        changing = [pool.submit(change, number) for number in range(2)]
        try:
            end = time.monotonic() + 2
            while time.monotonic() < end:
                assert len(backend.runs.list_by_workflow("w")) == 40
                assert len(backend.runs.list_runs(limit=40)) == 40
                assert backend.runs.count_runs() == 40
        finally:
            done.set()
        for one in changing:
            one.result()

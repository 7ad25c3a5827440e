"""The hash of a run."""

from contextlib import suppress

import pytest
import redis

from workflow_storage import (
    StorageError,
)
from workflow_storage.testing import stored_run


def damage(backend, run, field, value):
    store = backend.runs.store
    for server in store.servers():
        with suppress(redis.ResponseError):
            server.hset(f"{store.key_prefix(run.id)}:run:{run.id}", field, value)


def test_a_run_that_cannot_be_read_is_an_error_that_names_it(backend):
    run = stored_run(backend)
    damage(backend, run, "inputs", "{")

    with pytest.raises(StorageError, match=f"{run.id} cannot be read"):
        backend.runs.get(run.id)


@pytest.mark.parametrize(
    "value", ["{", "[]", "7", '{"status": "failed", "ended_at": "now"}', '{"other": 1}', "\xff"]
)
def test_an_attempt_that_cannot_be_read_is_an_error_that_names_the_run(backend, value):
    run = stored_run(backend, status="running")
    backend.runs.update_status(run.id, "running")
    damage(backend, run, "attempt:1", value.encode("latin-1"))

    with pytest.raises(StorageError, match=f"{run.id} cannot be read"):
        backend.runs.list_attempts(run.id)


def test_an_attempt_that_was_deleted_by_hand_is_an_error_that_names_the_run(backend):
    run = stored_run(backend, status="running")
    backend.runs.update_status(run.id, "running")
    damage(backend, run, "attempts", "1 7")

    with pytest.raises(StorageError, match=f"{run.id} cannot be read"):
        backend.runs.list_attempts(run.id)


def test_a_refusal_of_a_run_that_cannot_be_read_is_an_error_that_names_it(backend):
    run = stored_run(backend, status="running")
    damage(backend, run, "attempt_started_at", "now")

    with pytest.raises(StorageError, match=f"{run.id} cannot be read"):
        backend.runs.heartbeat(run.id, attempt=2)

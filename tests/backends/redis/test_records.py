"""The hash of a run."""

import pickle
from contextlib import suppress

import pytest
import redis
from asgiref.sync import async_to_sync

from workflow_storage import (
    NotInDatabaseError,
    StorageError,
    WorkflowRun,
    create_storage_backend,
)
from workflow_storage.testing import new_run, stored_run


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


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda run: run.save(), r"^save\(\) looks .* runs\.update\(\)"),
        (lambda run: run.save(using="default"), r"^save\(\) looks"),
        (lambda run: run.delete(), r"^delete\(\) looks .* runs\.delete\(\)"),
        (lambda run: run.refresh_from_db(), r"^refresh_from_db\(\) looks .* runs\.get\(\)"),
        (lambda run: async_to_sync(run.asave)(), r"^save\(\) looks"),
        (lambda run: async_to_sync(run.adelete)(), r"^delete\(\) looks"),
        (lambda run: async_to_sync(run.arefresh_from_db)(), r"^refresh_from_db\(\) looks"),
        (lambda run: list(run.states.all()), r"^run\.states looks .*get_state_history"),
        (lambda run: run.label_rows.count(), r"in run\.labels"),
        (lambda run: run.attempt_rows.count(), "list_attempts"),
    ],
)
@pytest.mark.django_db
def test_a_run_refuses_what_would_look_into_the_default_database(backend, use, message):
    added = stored_run(backend)
    for run in (
        added,
        backend.runs.get(added.id),
        *backend.runs.iter_runs(),
        pickle.loads(pickle.dumps(backend.runs.get(added.id))),
    ):
        with pytest.raises(NotInDatabaseError, match=message):
            use(run)

    assert WorkflowRun.objects.count() == 0
    assert backend.runs.get(added.id) is not None


@pytest.mark.django_db
def test_a_run_of_a_database_and_a_new_one_have_their_methods():
    new = new_run()
    new.save()
    read = create_storage_backend("default").runs.get(new.id)
    read.workflow_name = "another"
    read.save()
    new.refresh_from_db()
    assert new.workflow_name == "another"
    assert list(read.states.all()) == list(read.label_rows.all()) == []
    read.delete()
    assert WorkflowRun.objects.count() == 0

"""Steps that others take, and delete again, while a save waits for the run."""

import functools
import random
import threading
from contextlib import closing, nullcontext
from urllib.parse import quote

import pytest
from django.db import connections, transaction

from tests.conftest import empty
from tests.servers import wait_until
from workflow_storage import StorageUnavailableError, create_storage_backend
from workflow_storage.factory import forget
from workflow_storage.testing import stored_run


@pytest.fixture
def on_postgres(postgres_url, unblocked):
    yield (backend := create_storage_backend(postgres_url))
    empty(backend)


@pytest.fixture
def on_mysql(mysql_url, unblocked):
    yield (backend := create_storage_backend(mysql_url))
    empty(backend)


@pytest.fixture
def at_repeatable_read(postgres_url, unblocked):
    level = quote("-c default_transaction_isolation=repeatable\\ read")
    yield (backend := create_storage_backend(f"{postgres_url}?options={level}"))
    empty(backend)
    forget(backend.runs.alias)


def small(number):
    return {"n": number}


def large(number):
    """Return a state that none is a delta of."""
    return {"n": number, "text": random.Random(number).randbytes(3000).hex()}


EVERY_SAVE = [
    pytest.mark.parametrize("before", [0, 2]),
    pytest.mark.parametrize("keep_last", [0, 2]),
    pytest.mark.parametrize("within", [False, True], ids=["alone", "in a transaction"]),
    pytest.mark.parametrize("fenced", [False, True], ids=["any attempt", "attempt"]),
    pytest.mark.parametrize("state", [small, large]),
]


def every_save(test):
    return functools.reduce(lambda test, mark: mark(test), EVERY_SAVE, test)


@every_save
def test_a_save_that_waits_takes_the_step_after_those_that_others_saved_meanwhile(
    on_postgres, postgres, state, fenced, within, keep_last, before
):
    refuse_old_step(on_postgres, postgres, state, fenced, within, keep_last, before)


@pytest.mark.slow
@every_save
def test_it_does_so_on_mysql(on_mysql, mysql, state, fenced, within, keep_last, before):
    refuse_old_step(on_mysql, mysql, state, fenced, within, keep_last, before)


@pytest.mark.slow
@every_save
def test_with_one_snapshot_it_does_so_or_is_refused(
    at_repeatable_read, postgres, state, fenced, within, keep_last, before
):
    refuse_old_step(at_repeatable_read, postgres, state, fenced, within, keep_last, before)


def refuse_old_step(backend, server, state, fenced, within, keep_last, before):
    alias = backend.runs.alias
    run = stored_run(backend, status="running")
    attempt = run.attempt if fenced else None
    writer = backend.states.writer(run.id, attempt=attempt)
    for number in range(before):
        writer.save_state(state(number), "ours")
    steps = []

    def save():
        with transaction.atomic(using=alias) if within else nullcontext():
            steps.append(writer.save_state(state(99), "ours"))

    def save_in_thread():
        with closing(connections[alias]):
            try:
                save()
            except StorageUnavailableError as exc:
                assert within
                assert "run it again" in str(exc)  # its snapshot is too old
                save()

    waiting = threading.Thread(target=save_in_thread)
    with backend.states._rows.read_committed():  # noqa: SLF001 - a transaction that can delete
        backend.states._rows.lock_run(run.id)  # noqa: SLF001
        waiting.start()
        wait_until(server.is_waited_for)
        for number in range(6):
            backend.states.save_state(run.id, state(number), "theirs")
        assert backend.states.delete_states(run.id, keep_last=keep_last) == before + 6 - keep_last
    waiting.join(30)

    latest = backend.states.get_latest_checkpoint(run.id)
    assert (latest["step"], latest["node_id"]) == (steps[0], "ours")
    assert latest["state_data"] == state(99)
    # Where all are deleted, a run begins anew.
    assert steps == [before + 6 if keep_last else 0]
    assert len(backend.states.get_state_history(run.id)) == keep_last + 1

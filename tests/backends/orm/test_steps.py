"""Steps that others take, and delete again, while a save waits for the run."""

import functools
import random
from contextlib import nullcontext
from urllib.parse import quote

import pytest
from django.db import transaction

from tests.conftest import emptied, empty
from workflow_storage import StorageUnavailableError, create_storage_backend
from workflow_storage.backends.orm.errors import Patience
from workflow_storage.factory import forget
from workflow_storage.testing import stored_run


@pytest.fixture
def on_postgres(postgres_url, django_db_blocker):
    yield from emptied(postgres_url, django_db_blocker)


@pytest.fixture
def on_mysql(mysql_url, django_db_blocker):
    yield from emptied(mysql_url, django_db_blocker)


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
    pytest.mark.parametrize("before", [pytest.param(0, marks=pytest.mark.slow), 2]),
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


@pytest.mark.parametrize("appends", [True, False], ids=["appended", "copied"])
@pytest.mark.parametrize("fenced", [False, True], ids=["any attempt", "attempt"])
@pytest.mark.parametrize("state", [small, large])
def test_the_first_save_comes_after_what_others_begin_at_a_later_step(
    on_postgres, postgres, state, fenced, appends
):
    source, run = (stored_run(on_postgres, status="running") for _ in range(2))
    for number in range(9):
        on_postgres.states.save_state(source.id, state(number), "theirs")
    on_postgres.states.delete_states(source.id, keep_last=2)

    def meanwhile():
        if appends:
            theirs = on_postgres.states.get_state_history(source.id)
            on_postgres.states.append(run.id, theirs)
        else:
            on_postgres.states.copy_states(source.id, run.id, through=8)

    writer = on_postgres.states.writer(run.id, attempt=run.attempt if fenced else None)
    step = postgres.after_waiting(
        on_postgres, lambda: writer.save_state(state(99), "ours"), meanwhile
    )

    assert step == 9
    assert [one["step"] for one in on_postgres.states.iter_steps(run.id)] == [7, 8, 9]
    assert on_postgres.states.get_latest_state(run.id) == state(99)


@pytest.mark.parametrize("fenced", [False, True], ids=["any attempt", "attempt"])
@pytest.mark.parametrize("state", [small, large])
def test_a_save_that_waited_for_a_deletion_does_not_give_way_to_the_next_one(
    at_repeatable_read, postgres, state, fenced, monkeypatch
):
    run = stored_run(at_repeatable_read, status="running")
    writer = at_repeatable_read.states.writer(run.id, attempt=run.attempt if fenced else None)
    for number in range(3):
        writer.save_state(state(number), "ours")
    monkeypatch.setattr(Patience, "pause", lambda patience: pytest.fail("it paused"))

    step = postgres.after_waiting(
        at_repeatable_read,
        lambda: writer.save_state(state(99), "ours"),
        lambda: at_repeatable_read.states.delete_states(run.id, keep_last=1),
    )

    assert step == 3


def refuse_old_step(backend, server, state, fenced, within, keep_last, before):
    run = stored_run(backend, status="running")
    writer = backend.states.writer(run.id, attempt=run.attempt if fenced else None)
    for number in range(before):
        writer.save_state(state(number), "ours")

    def save_once():
        with transaction.atomic(using=backend.runs.alias) if within else nullcontext():
            return writer.save_state(state(99), "ours")

    def save():
        try:
            return save_once()
        except StorageUnavailableError as exc:
            assert within
            assert "run it again" in str(exc)  # its snapshot is too old
            return save_once()

    def meanwhile():
        for number in range(6):
            backend.states.save_state(run.id, state(number), "theirs")
        assert backend.states.delete_states(run.id, keep_last=keep_last) == before + 6 - keep_last

    step = server.after_waiting(backend, save, meanwhile)

    # Where all are deleted, a run begins anew.
    assert step == (before + 6 if keep_last else 0)
    latest = backend.states.get_latest_checkpoint(run.id)
    assert (latest["step"], latest["node_id"]) == (step, "ours")
    assert latest["state_data"] == state(99)
    assert len(backend.states.get_state_history(run.id)) == keep_last + 1

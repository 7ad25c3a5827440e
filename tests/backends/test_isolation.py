"""Transactions with one snapshot for all their statements: REPEATABLE READ and SERIALIZABLE."""

import time
from contextlib import contextmanager
from datetime import timedelta
from urllib.parse import quote

import pytest
from django.db import connections, transaction
from django.utils import timezone

from tests.conftest import empty
from workflow_storage import (
    RunAlreadyExistsError,
    SnapshotError,
    StatusConflictError,
    StorageUnavailableError,
    create_storage_backend,
)
from workflow_storage.factory import forget
from workflow_storage.testing import ConcurrencyContract, changed_state, in_threads, new_run
from workflow_storage.testing import stored_run as add_run

LEVELS = ["read committed", "repeatable read", "serializable"]
SECONDS = 4
LARGE = "x" * 10_000


@contextmanager
def opened(url):
    backend = create_storage_backend(url)
    empty(backend)
    try:
        yield backend
        empty(backend)
    finally:
        forget(backend.runs.alias)


def with_level(vendor, url, level):
    """Return the URL of a database where a transaction has a level unless it says otherwise."""
    if vendor == "postgres":
        setting = f"-c default_transaction_isolation={level.replace(' ', chr(92) + ' ')}"
        return f"{url}?options={quote(setting)}"
    return f"{url}?isolation_level={quote(level)}"


@pytest.fixture(params=[(vendor, level) for vendor in ("postgres", "mysql") for level in LEVELS])
def backend(request, django_db_blocker):
    """A store on each database that has such levels, at each of them in turn."""
    vendor, level = request.param
    url = request.getfixturevalue(f"{vendor}_url")
    with django_db_blocker.unblock(), opened(with_level(vendor, url, level)) as backend:
        backend.level = level
        yield backend


def is_postgresql(backend):
    return connections[backend.runs.alias].vendor == "postgresql"


def test_the_level_is_what_the_test_says(backend):
    connection = connections[backend.runs.alias]
    is_mariadb = getattr(connection, "mysql_is_mariadb", False)
    name = "tx_isolation" if is_mariadb else "transaction_isolation"
    with connection.cursor() as cursor:
        cursor.execute(
            "SHOW transaction_isolation" if is_postgresql(backend) else f"SELECT @@{name}"
        )
        (level,) = cursor.fetchone()

    assert level.replace("-", " ").lower() == backend.level


def test_concurrent_states_are_all_kept(backend):
    ConcurrencyContract().test_concurrent_states_of_one_run_from_threads_are_all_kept(backend)


@pytest.mark.slow
def test_deleting_states_beside_writers_damages_none(backend):
    run = add_run(backend)
    end = time.monotonic() + SECONDS

    def write(number):
        writer, state, saved = backend.states.writer(run.id), {}, 0
        while time.monotonic() < end:
            state = changed_state(state, "grow", 2000 + number)
            writer.save_state(state, f"writer {number}")
            saved += 1
        return saved

    def delete(_):
        deleted = 0
        while time.monotonic() < end:
            deleted += backend.states.delete_states(run.id, keep_last=3)
            time.sleep(0.01)  # or the writers would wait for locks most of the time
        return deleted

    def read(_):
        reads = 0
        while time.monotonic() < end:
            backend.states.get_latest_state(run.id)
            reads += len(backend.states.get_state_history(run.id))
            time.sleep(0.01)
        return reads

    work = [write, write, write, delete, delete, read]
    *saved, deleted, deleted_too, reads = in_threads(len(work), lambda n: work[n](n))

    steps = [checkpoint["step"] for checkpoint in backend.states.get_state_history(run.id)]
    assert all(saved)
    assert reads
    assert deleted + deleted_too == sum(saved) - len(steps) > 20
    assert steps == list(range(sum(saved) - len(steps), sum(saved)))


@pytest.mark.slow
def test_deleting_runs_beside_writers_leaves_none_half(backend):
    end = time.monotonic() + SECONDS
    alias = backend.runs.alias

    def write(number):
        while time.monotonic() < end:
            run = add_run(backend, status="failed")
            for state in ({"small": 1}, {"text": LARGE}):
                with_states(run.id, state)

    def with_states(run_id, state):
        try:
            backend.states.save_state(run_id, state, "node")
        except ValueError as exc:
            assert "not found" in str(exc)

    def delete(_):
        deleted = 0
        while time.monotonic() < end:
            deleted += backend.runs.delete_finished(
                before=timezone.now() + timedelta(days=1), batch_size=3
            )
        return deleted

    work = [write, write, write, delete, delete]
    *_, deleted, deleted_too = in_threads(len(work), lambda n: work[n](n))

    assert deleted + deleted_too > 10
    with connections[alias].cursor() as cursor:
        cursor.execute(
            "SELECT count(*) FROM execution_states WHERE run_id NOT IN "
            "(SELECT id FROM workflow_runs)"
        )
        assert cursor.fetchone()[0] == 0


@contextmanager
def callers_transaction(backend):
    """Begin a transaction that has its snapshot already."""
    with transaction.atomic(using=backend.runs.alias):
        list(backend.runs.list_runs())
        yield


def elsewhere(backend, work):
    """Do something on another connection."""
    return in_threads(1, lambda _: work(backend))[0]


def saved_states(backend, run, count):
    writer, state = backend.states.writer(run.id), {}
    for number in range(count):
        state = changed_state(state, "grow", 3000 + number)
        writer.save_state(state, "node")
    return state


@pytest.mark.parametrize(
    "backend",
    # At the level serializable, MariaDB locks what is read, so that others cannot change it.
    [("postgres", "repeatable read"), ("postgres", "serializable"), ("mysql", "repeatable read")],
    indirect=True,
)
class TestInTheCallersSnapshot:
    def test_states_are_deleted_only_where_newer_ones_are_seen(self, backend):
        run = add_run(backend)
        saved_states(backend, run, 2)

        with callers_transaction(backend):
            newest = elsewhere(backend, lambda backend: saved_states(backend, run, 7))
            if is_postgresql(backend):
                with pytest.raises(SnapshotError, match=r"outside of transaction\.atomic\(\)"):
                    backend.states.delete_states(run.id, keep_last=1)
            else:
                assert backend.states.delete_states(run.id, keep_last=1) == 8

        assert backend.states.get_latest_state(run.id) == newest

    @pytest.mark.parametrize("verb", ["delete", "delete_finished", "delete_unchanged"])
    def test_a_run_that_has_got_a_state_since_is_not_deleted_in_half(self, backend, verb):
        run = add_run(backend, status="failed")
        calls = {
            "delete": lambda: backend.runs.delete(run.id),
            "delete_finished": lambda: backend.runs.delete_finished(
                before=timezone.now() + timedelta(days=1)
            ),
            "delete_unchanged": lambda: backend.runs.delete_unchanged(run, None),
        }

        def delete():
            with callers_transaction(backend):
                elsewhere(backend, lambda backend: saved_states(backend, run, 1))
                calls[verb]()

        if is_postgresql(backend):
            with pytest.raises(StorageUnavailableError, match="Roll your transaction back and run"):
                delete()
            assert backend.states.get_latest_state(run.id) is not None
        elif verb == "delete_unchanged":
            with pytest.raises(ValueError, match="not as it was read"):
                delete()
            assert backend.states.get_latest_state(run.id) is not None
        else:
            delete()
            assert backend.runs.get(run.id) is None
            assert backend.states.get_latest_state(run.id) is None

    @pytest.mark.parametrize("state", [{"small": 1}, {"text": LARGE}], ids=["small", "large"])
    def test_a_state_is_the_next_one_or_the_error_says_to_roll_back(self, backend, state):
        run = add_run(backend)
        saved_states(backend, run, 1)

        def save():
            with callers_transaction(backend):
                elsewhere(backend, lambda backend: saved_states(backend, run, 2))
                return backend.states.save_state(run.id, state, "node")

        if is_postgresql(backend):
            with pytest.raises(StorageUnavailableError, match="Roll your transaction back and run"):
                save()
            assert len(backend.states.get_state_history(run.id)) == 3
        else:
            assert save() == 3
            assert len(backend.states.get_state_history(run.id)) == 4
            assert backend.states.get_latest_state(run.id) == state

    def test_what_changed_since_is_not_told_as_it_was(self, backend):
        run = add_run(backend)
        expected = StorageUnavailableError if is_postgresql(backend) else StatusConflictError

        with pytest.raises(expected, match=r"Roll your|is running"), callers_transaction(backend):
            elsewhere(backend, lambda backend: backend.runs.update_status(run.id, "running"))
            backend.runs.update_status(run.id, "running", expected="pending")

        exists = StorageUnavailableError if is_postgresql(backend) else RunAlreadyExistsError
        with pytest.raises(exists, match=r"Roll your|already exists"), callers_transaction(backend):
            elsewhere(backend, lambda backend: backend.runs.add(new_run(id="twice")))
            backend.runs.add(new_run(id="twice"))

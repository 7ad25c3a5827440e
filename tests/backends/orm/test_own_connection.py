"""What is recorded on a connection of the store's own: it outlives the caller's rollback."""

import asyncio
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from django.db import (
    DatabaseError,
    close_old_connections,
    connections,
    transaction,
)
from django.test.utils import CaptureQueriesContext

from tests.conftest import empty
from workflow_storage import (
    RunNotFoundError,
    StorageConfig,
    StorageError,
    UnsupportedBackendError,
    create_storage_backend,
    record_run,
)
from workflow_storage.testing import new_run, stored_run


@pytest.fixture
def own(server_url, unblocked):
    """An empty store with a connection of its own, on each database that can have one."""
    backend = create_storage_backend(StorageConfig(backend=server_url, own_connection=True))
    empty(backend)
    yield backend
    empty(backend)
    connections[backend.alias].close()


@pytest.fixture
def joining(server_url, unblocked):
    """The same store without."""
    return create_storage_backend(server_url)


class Failed(Exception):
    """What a view fails with."""


def test_what_is_recorded_outlives_the_rollback(own):
    with (
        pytest.raises(Failed) as caught,
        transaction.atomic(using=own.alias),
        record_run("view", backend=own) as run,
    ):
        run.save_state({"n": 1}, "first")
        raise Failed

    assert not hasattr(caught.value, "__notes__")
    stored = own.runs.get(run.run_id)
    assert stored.status == "failed"
    assert "Failed" in stored.error_message
    assert own.states.get_latest_state(run.run_id) == {"n": 1}


def test_without_it_the_record_is_rolled_back(joining):
    with (
        pytest.raises(Failed),
        transaction.atomic(using=joining.alias),
        record_run("view", backend=joining) as run,
    ):
        raise Failed

    assert joining.runs.get(run.run_id) is None


def test_what_the_caller_has_not_committed_is_not_seen(own, joining):
    with transaction.atomic(using=own.alias):
        run = stored_run(joining)
        assert joining.runs.get(run.id) is not None
        assert own.runs.get(run.id) is None
    assert own.runs.get(run.id) is not None


def test_every_call_leaves_the_callers_connection_in_place(own):
    callers = connections[own.alias]
    run = stored_run(own)

    with pytest.raises(RunNotFoundError):
        own.runs.heartbeat("nobody")
    for step in range(40):
        own.states.save_state(run.id, {"n": step}, "node")
    with transaction.atomic(using=own.alias):
        for checkpoint in own.states.iter_state_history(run.id):
            # Pages are read on the own connection, and this runs between them.
            assert connections[own.alias] is callers, checkpoint["step"]
            assert connections[own.alias].in_atomic_block
        for found in own.runs.iter_runs():
            assert found.id == run.id
            assert connections[own.alias] is callers
    assert connections[own.alias] is callers


def test_no_transaction_of_the_caller_is_joined_or_waited_for(own):
    called = []
    with transaction.atomic(using=own.alias):
        assert own.in_transaction() is False
        own.on_commit(lambda: called.append(1))
        assert called == [1]
        own.on_commit(lambda: 1 / 0)  # is logged, as Django does after a commit


def test_a_broken_transaction_of_the_caller_hinders_nothing(own):
    with pytest.raises(DatabaseError), transaction.atomic(using=own.alias):
        try:
            with connections[own.alias].cursor() as cursor:
                cursor.execute("SELECT * FROM nowhere")
        finally:
            run = stored_run(own)
    assert own.runs.get(run.id) is not None


def test_transactions_by_hand_are_not_joined_either(own):
    transaction.set_autocommit(False, using=own.alias)
    try:
        run = stored_run(own)
        transaction.rollback(using=own.alias)
    finally:
        transaction.set_autocommit(True, using=own.alias)
    assert own.runs.get(run.id) is not None


def test_a_database_without_autocommit_is_committed_to(own, joining):
    settings = connections[own.alias].settings_dict
    settings["AUTOCOMMIT"] = False
    connections[own.alias].close()
    try:
        run = stored_run(own)
        connections[own.alias].close()
        asyncio.run(joining.runs.aheartbeat(run.id))  # in a thread there is nobody who commits
    finally:
        connections[own.alias].close()
        settings["AUTOCOMMIT"] = True
    assert own.runs.get(run.id).heartbeat_at is not None


def test_a_thread_that_ends_leaves_no_session(own, server):
    connections[own.alias].close()
    server.wait_for_sessions(0)
    at_work = threading.Barrier(4, timeout=30)
    errors = []

    def record():
        try:
            stored_run(own)
            connections[own.alias].cursor().close()
            at_work.wait()
            at_work.wait()
            connections[own.alias].connection.close()  # Django's is for its user to close
        except BaseException as exc:
            errors.append(exc)
            raise

    threads = [threading.Thread(target=record) for _ in range(3)]
    for thread in threads:
        thread.start()
    at_work.wait()
    server.wait_for_sessions(6)  # one of its own for each, and the caller's
    at_work.wait()
    for thread in threads:
        thread.join(timeout=30)

    assert errors == []
    server.wait_for_sessions(0)


@pytest.mark.parametrize(
    "close",
    [
        lambda alias: close_old_connections(),
        lambda alias: connections.close_all(),
        lambda alias: connections[alias].close(),
    ],
    ids=["close_old_connections", "close_all", "close"],
)
def test_who_closes_the_callers_connection_closes_both(own, server, close):
    connections[own.alias].close()
    with transaction.atomic(using=own.alias):
        stored_run(own)
    server.wait_for_sessions(2)

    close(own.alias)

    server.wait_for_sessions(0)
    stored_run(own)  # and it is opened again


def test_closing_the_store_closes_both(own, server):
    with transaction.atomic(using=own.alias):
        stored_run(own)
    asyncio.run(own.runs.acount_runs())

    own.close()

    server.wait_for_sessions(0)


def test_a_pool_with_as_many_threads_as_connections(postgres_url, unblocked, monkeypatch):
    backend = create_storage_backend(
        StorageConfig(backend=f"{postgres_url}?application_name=pooled", own_connection=True)
    )
    settings = connections[backend.alias].settings_dict
    pool = {"min_size": 0, "max_size": 3, "timeout": 20}
    connections[backend.alias].close()
    monkeypatch.setitem(settings, "OPTIONS", {**settings["OPTIONS"], "pool": pool})
    all_in_transactions = threading.Barrier(3, timeout=30)
    recorded = []

    def record():
        try:
            with transaction.atomic(using=backend.alias):
                connections[backend.alias].cursor().close()
                all_in_transactions.wait()
                recorded.append(stored_run(backend).id)
        finally:
            connections.close_all()

    try:
        threads = [threading.Thread(target=record) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        assert backend.runs.count_runs() == len(recorded) == 3
    finally:
        empty(backend)
        connections[backend.alias].close()
        connections[backend.alias].close_pool()


def test_who_looks_at_the_queries_of_the_alias_sees_its_own(own):
    run = stored_run(own)
    with CaptureQueriesContext(connections[own.alias]) as queries:
        own.runs.get(run.id)
    assert len(queries) == 1
    assert "workflow_runs" in queries[0]["sql"]


def test_it_follows_the_settings_at_the_time(own, monkeypatch):
    """As a test runner changes the name of the database after the store was opened."""
    stored_run(own)
    callers = connections[own.alias]
    callers.close()
    with (
        monkeypatch.context() as patch,
        pytest.raises(StorageError, match="there_is_no_such_database"),
    ):
        patch.setitem(callers.settings_dict, "NAME", "there_is_no_such_database")
        own.runs.count_runs()


class TestByHand:
    """Transactions that begin with ``set_autocommit(False)``, without an own connection."""

    @pytest.fixture
    def by_hand(self, joining):
        empty(joining)
        transaction.set_autocommit(False, using=joining.alias)
        yield joining
        transaction.rollback(using=joining.alias)
        transaction.set_autocommit(True, using=joining.alias)
        empty(joining)

    def test_are_joined(self, by_hand):
        assert by_hand.in_transaction()
        with record_run("by hand", backend=by_hand) as run:
            run.save_state({"n": 1}, "node")
        transaction.rollback(using=by_hand.alias)
        assert by_hand.runs.get(run.run_id) is None

    def test_call_back_after_the_commit(self, by_hand):
        called = []
        by_hand.on_commit(lambda: called.append(1))
        assert called == []
        transaction.commit(using=by_hand.alias)
        transaction.set_autocommit(True, using=by_hand.alias)
        assert called == [1]

    def test_do_not_call_back_after_a_rollback(self, by_hand):
        called = []
        by_hand.on_commit(lambda: called.append(1))
        transaction.rollback(using=by_hand.alias)
        transaction.set_autocommit(True, using=by_hand.alias)
        assert called == []

    def test_outlive_an_error_of_the_store(self, by_hand):
        run = stored_run(by_hand)
        with pytest.raises(RunNotFoundError):
            by_hand.runs.heartbeat("nobody")
        with pytest.raises(ValueError, match="already exists"):
            by_hand.runs.add(new_run(id=run.id))
        assert by_hand.runs.get(run.id) is not None
        transaction.commit(using=by_hand.alias)
        assert by_hand.runs.get(run.id) is not None


class TestSQLite:
    @pytest.mark.parametrize("backend", ["sqlite", "sqlite:///x.db", "default"])
    def test_it_is_refused(self, backend, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UnsupportedBackendError, match="another database"):
            create_storage_backend(StorageConfig(backend=backend, own_connection=True))
        assert list(tmp_path.iterdir()) == []


def test_redis_has_no_transactions_to_keep_out_of(redis_url):
    backend = create_storage_backend(StorageConfig(backend=redis_url, own_connection=True))
    run = stored_run(backend)
    assert backend.runs.get(run.id) is not None
    assert backend.in_transaction() is False
    backend.runs.delete(run.id)


@pytest.mark.slow
@pytest.mark.parametrize("database", ["postgres", "mysql"])
@pytest.mark.parametrize("own_connection", [True, False])
def test_a_project_that_tests_with_django_and_pytest(
    request, database, own_connection, django_db_blocker
):
    """Its own tests pass, and the test database can be dropped: no session is left."""
    url = request.getfixturevalue(f"{database}_url")
    folder = Path(__file__).parent
    result = subprocess.run(
        [
            sys.executable,
            *("-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-p", "no:randomly"),
            *("--create-db", "-W", "error::pytest.PytestWarning"),
            *("--ds", "tests.backends.orm.project_settings"),
            str(folder / "project_tests.py"),
        ],
        cwd=folder.parents[2],
        env={
            **os.environ,
            "PROJECT_URL": url,
            "PROJECT_OWN_CONNECTION": str(int(own_connection)),
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Error when trying to teardown" not in result.stdout + result.stderr

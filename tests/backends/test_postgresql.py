"""What is special to PostgreSQL: cursors of our own, prepared statements, and poolers."""

import gc
import threading
from contextlib import contextmanager

import psycopg
import pytest
from django.db import connections, transaction
from django.test.utils import CaptureQueriesContext

from tests.conftest import empty
from tests.servers import pgbouncer
from workflow_storage import StorageError, create_storage_backend
from workflow_storage.factory import forget
from workflow_storage.testing import in_threads, stored_run


@pytest.fixture
def open_at(postgres_url, django_db_blocker):
    """Open a store at a URL, with a session of its own."""
    opened = []

    def open_at(url=postgres_url):
        opened.append(create_storage_backend(url))
        connections[opened[-1].runs.alias].close()
        return opened[-1]

    with django_db_blocker.unblock():
        yield open_at
        empty(open_at())
        for backend in opened[:-1]:
            if backend != opened[-1]:
                forget(backend.runs.alias)


@pytest.fixture
def pooled_url(postgres_url):
    with pgbouncer(postgres_url) as url:
        yield url


def session_of(backend):
    return connections[backend.runs.alias].connection


@contextmanager
def override_options(backend, **options):
    connection = connections[backend.alias]
    before = connection.settings_dict["OPTIONS"]
    connection.close()
    connection.settings_dict["OPTIONS"] = {**before, **options}
    try:
        yield
    finally:
        connection.close()
        connection.settings_dict["OPTIONS"] = before


def prepared(backend):
    """Return the statements that a session has prepared."""
    rows = session_of(backend).execute("SELECT statement FROM pg_prepared_statements").fetchall()
    return [statement for (statement,) in rows]


def use(backend, run_id, times=20):
    for number in range(times):
        backend.states.save_state(run_id, {"n": number}, "node")
        backend.runs.update(run_id, outputs={"n": number})
        assert backend.states.get_latest_state(run_id) == {"n": number}
        assert backend.runs.get(run_id).outputs == {"n": number}
        backend.runs.list_runs(status="failed")


@pytest.mark.parametrize("options", ["?server_side_binding=true", "?prepare_threshold=1000"])
def test_nothing_is_prepared_that_the_settings_do_not_ask_for(open_at, postgres_url, options):
    backend = open_at(postgres_url + options)

    use(backend, stored_run(backend).id)

    assert prepared(backend) == []


def test_nothing_is_prepared_where_the_settings_say_so(open_at, postgres_url):
    backend = open_at(postgres_url)
    with override_options(backend, prepare_threshold=None):
        use(backend, stored_run(backend).id)

        assert prepared(backend) == []


def test_nothing_is_prepared_behind_a_pooler_unless_the_settings_ask_for_it(open_at, pooled_url):
    backend = open_at(pooled_url)

    use(backend, stored_run(backend).id)

    assert prepared(backend) == []
    assert session_of(backend).prepare_threshold is None


def test_a_session_that_is_used_for_little_is_not_asked_whose_it_is(open_at, postgres_url):
    backend = open_at(postgres_url)

    use(backend, stored_run(backend).id, 1)

    assert session_of(backend).prepare_threshold is None


def test_a_session_is_not_asked_within_a_transaction_but_after_it(open_at, postgres_url):
    backend = open_at(postgres_url)
    run = stored_run(backend)

    with transaction.atomic(using=backend.alias):
        use(backend, run.id)
        assert session_of(backend).prepare_threshold is None
    use(backend, run.id, 1)

    assert session_of(backend).prepare_threshold == 5


@pytest.mark.parametrize("options", ["", "?prepare_threshold=5"])
def test_what_finds_rows_by_a_key_is_prepared_and_lists_are_planned_each_time(
    open_at, postgres_url, options
):
    backend = open_at(postgres_url + options)

    use(backend, stored_run(backend).id)

    assert {statement.split()[0] for statement in prepared(backend)} == {
        "WITH",
        "UPDATE",
        "SELECT",
    }
    assert not any('ORDER BY "workflow_runs"' in statement for statement in prepared(backend))


def test_everything_works_behind_a_pooler(open_at, pooled_url):
    backend = open_at(pooled_url)
    run_ids = [stored_run(backend).id for _ in range(6)]

    def work(number):
        use(backend, run_ids[number])
        connections[backend.runs.alias].close()

    in_threads(6, work)

    for run_id in run_ids:
        steps = [state["step"] for state in backend.states.get_state_history(run_id)]
        assert steps == list(range(20))


def test_a_log_of_queries_has_them_with_their_values(open_at, postgres_url):
    backend = open_at(f"{postgres_url}?prepare_threshold=5")
    run = stored_run(backend)
    use(backend, run.id)

    with CaptureQueriesContext(connections[backend.runs.alias]) as queries:
        use(backend, run.id, 1)

    assert len(queries) == 5
    assert all(run.id in query["sql"] for query in queries.captured_queries[:4])


def test_a_cursor_class_of_the_project_is_left_as_it_is(open_at):
    backend = open_at()
    run = stored_run(backend)
    seen = []

    class ItsOwn(psycopg.ClientCursor):
        def execute(self, query, params=None, **kwargs):
            seen.append(query)
            return super().execute(query, params, **kwargs)

    session_of(backend).cursor_factory = ItsOwn
    use(backend, run.id, 1)

    assert len(seen) == 5


def test_the_sessions_of_threads_end_with_them(open_at, postgres_url):
    backend = open_at()
    run = stored_run(backend)

    for _ in range(5):
        thread = threading.Thread(target=backend.runs.get, args=(run.id,))
        thread.start()
        thread.join()
    gc.collect()

    with psycopg.connect(postgres_url) as other:
        (sessions,) = other.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
        ).fetchone()
    assert sessions <= 3  # this test's, the other one, and perhaps one that is about to end


@pytest.fixture
def in_use(open_at, postgres_url):
    """A store whose session has prepared its statements, and the id of a run in it."""
    backend = open_at(f"{postgres_url}?prepare_threshold=5")
    run = stored_run(backend)
    use(backend, run.id)
    assert prepared(backend)
    return backend, run.id


def test_statements_that_were_deallocated_are_executed_all_the_same(in_use):
    backend, run_id = in_use
    session_of(backend).pgconn.exec_(b"DEALLOCATE ALL")  # unseen by psycopg

    use(backend, run_id)


def test_statements_that_another_client_of_a_pooler_has_prepared_are_executed_all_the_same(
    open_at, postgres_url
):
    backend = open_at(f"{postgres_url}?prepare_threshold=5")
    run = stored_run(backend)
    backend.runs.get(run.id)
    for number in range(10):  # unseen by psycopg, under the names that it will use
        session_of(backend).pgconn.exec_(f"PREPARE _pg3_{number} AS SELECT 1".encode())

    use(backend, run.id)

    assert session_of(backend).prepare_threshold is None


def test_a_column_that_has_changed_its_type_is_read_all_the_same(in_use, postgres_url):
    backend, run_id = in_use
    with psycopg.connect(postgres_url, autocommit=True) as other:
        change = "ALTER TABLE workflow_runs ALTER COLUMN workflow_name TYPE varchar({})"
        other.execute(change.format(300))
        try:
            use(backend, run_id)
        finally:
            other.execute(change.format(256))

    use(backend, run_id)


def test_a_large_state_is_saved_though_a_column_has_changed_its_type(in_use, postgres_url):
    backend, run_id = in_use
    large = {"text": "x" * 10_000}
    for _ in range(12):
        backend.states.save_state(run_id, large, "node")
    with psycopg.connect(postgres_url, autocommit=True) as other:
        change = "ALTER TABLE execution_states ALTER COLUMN step TYPE {}"
        other.execute(change.format("bigint"))
        try:
            backend.states.save_state(run_id, large, "node")
        finally:
            other.execute(change.format("integer"))

    assert backend.states.get_latest_state(run_id) == large


def test_in_a_transaction_it_fails_once_and_the_next_one_succeeds(in_use, postgres_url):
    backend, run_id = in_use
    session_of(backend).pgconn.exec_(b"DEALLOCATE ALL")

    with pytest.raises(StorageError), transaction.atomic(using=backend.runs.alias):
        backend.runs.get(run_id)

    with transaction.atomic(using=backend.runs.alias):
        use(backend, run_id)


def test_a_transaction_that_was_rolled_back_leaves_the_session_usable(in_use):
    backend, run_id = in_use
    for _ in range(3):
        with transaction.atomic(using=backend.runs.alias):
            backend.states.save_state(run_id, {"lost": True}, "node")
            transaction.set_rollback(True, using=backend.runs.alias)

        use(backend, run_id, 2)

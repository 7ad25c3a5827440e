"""What is special to the ORM backend: transactions, plain SQL, plans, and failing databases."""

import json
import re
import socket
import sqlite3
import threading
import time
from contextlib import contextmanager
from datetime import timedelta

import pytest
from django.core.management import call_command
from django.db import OperationalError, connections, transaction
from django.utils import timezone

from tests.conftest import empty
from workflow_storage import (
    ExecutionState,
    RunAlreadyExistsError,
    RunNotFoundError,
    StatusConflictError,
    StorageBackend,
    StorageError,
    StorageUnavailableError,
    TablesMissingError,
    WorkflowRun,
    create_storage_backend,
)
from workflow_storage.backends.orm import (
    DjangoExecutionStateRepository,
    DjangoWorkflowRunRepository,
    errors,
)
from workflow_storage.backends.orm.errors import storage_error
from workflow_storage.backends.orm.overviews import over_time_and_by_workflow
from workflow_storage.backends.orm.registration import SQLITE_OPTIONS
from workflow_storage.factory import forget
from workflow_storage.filters import valid_filters
from workflow_storage.models import WorkflowRunLabel
from workflow_storage.testing import ConcurrencyContract, in_threads, new_run, stored_run


@pytest.fixture
def register(django_db_blocker):
    """Add databases to Django for one test, as DATABASES would."""
    aliases = []

    def add(alias, **database):
        configured = connections.configure_settings({"default": {}, alias: database})
        connections.databases[alias] = configured[alias]
        aliases.append(alias)
        return StorageBackend(
            DjangoWorkflowRunRepository(alias), DjangoExecutionStateRepository(alias)
        )

    with django_db_blocker.unblock():
        yield add
        for alias in aliases:
            forget(alias)


def sqlite_database(path, **options):
    return {"ENGINE": "django.db.backends.sqlite3", "NAME": str(path), "OPTIONS": options}


def select(alias, sql, *params):
    with connections[alias].cursor() as cursor:
        cursor.execute(sql, params)
        return cursor.fetchall()


class TestTransactions:
    def test_writes_join_the_callers_transaction(self, sql_backend):
        run = stored_run(sql_backend)

        with pytest.raises(ZeroDivisionError), transaction.atomic(using=sql_backend.runs.alias):
            sql_backend.runs.add(new_run(id="rolled back"))
            sql_backend.runs.update_status(run.id, "failed")
            sql_backend.states.save_state(run.id, {}, "node")
            _ = 1 / 0

        assert sql_backend.runs.get("rolled back") is None
        assert sql_backend.runs.get(run.id).status == "pending"
        assert sql_backend.states.get_latest_state(run.id) is None

    def test_an_error_leaves_the_callers_transaction_usable(self, sql_backend):
        run = stored_run(sql_backend)

        with transaction.atomic(using=sql_backend.runs.alias):
            with pytest.raises(RunAlreadyExistsError):
                sql_backend.runs.add(new_run(id=run.id))
            with pytest.raises(RunNotFoundError):
                sql_backend.states.save_state("gone", {}, "node")
            with pytest.raises(StatusConflictError):
                sql_backend.runs.update_status(run.id, "failed", expected="running")
            with pytest.raises(ValueError, match="inputs is not JSON"):
                sql_backend.runs.update(run.id, inputs=float("nan"))
            sql_backend.runs.update_status(run.id, "running")

        assert sql_backend.runs.get(run.id).status == "running"


class TestPlainSQL:
    def test_what_the_repositories_write_is_plain_in_sql(self, sql_backend):
        alias = sql_backend.runs.alias
        run = stored_run(sql_backend, inputs={"a": [1, "\N{SNOWMAN}"]}, total_tokens=3)
        sql_backend.states.save_state(run.id, {"n": 1}, "node")

        ((name, status, inputs, tokens),) = select(
            alias, "SELECT workflow_name, status, inputs, total_tokens FROM workflow_runs"
        )
        assert (name, status, tokens) == ("contract", "pending", 3)
        assert inputs == '{"a":[1,"\N{SNOWMAN}"]}'
        assert select(
            alias, "SELECT run_id, step, node_id, state_json, state_delta FROM execution_states"
        ) in ([(run.id, 0, "node", '{"n":1} ', None)], ((run.id, 0, "node", '{"n":1} ', None),))

    def test_what_plain_sql_writes_is_read_by_the_repositories(self, sql_backend):
        alias = sql_backend.runs.alias
        now = timezone.now()
        value = (
            now if alias and connections[alias].vendor == "postgresql" else now.replace(tzinfo=None)
        )
        with connections[alias].cursor() as cursor:
            cursor.execute(
                "INSERT INTO workflow_runs (id, workflow_name, status, inputs, labels, attempt, started_at)"
                " VALUES ('by hand', 'sql', 'running', '{\"x\": 1e23}', '{}', 1, %s)",
                [value],
            )
            cursor.execute(
                "INSERT INTO execution_states (run_id, step, node_id, state_json, created_at) "
                "VALUES ('by hand', 0, 'node', '{\"y\": [2]}', %s)",
                [value],
            )

        run = sql_backend.runs.get("by hand")
        assert (run.inputs, run.started_at) == ({"x": 1e23}, now)
        assert sql_backend.states.get_latest_state("by hand") == {"y": [2]}
        assert run.states.get().state_data == {"y": [2]}
        assert sql_backend.states.save_state("by hand", {}, "next") == 1

    def test_the_database_itself_refuses_a_second_state_for_a_step(self, sql_backend):
        run = stored_run(sql_backend)
        state = {"run_id": run.id, "step": 0, "node_id": "node", "state_json": "{}"}
        states = ExecutionState.objects.using(sql_backend.runs.alias)
        states.create(**state)

        with pytest.raises(Exception, match=r"(?i)unique|duplicate"):
            states.create(**state)

    @pytest.mark.parametrize("state", [{}, {"state_json": "{}", "state_delta": b"x"}])
    def test_the_database_itself_refuses_a_state_that_is_not_whole_or_delta(
        self, sql_backend, state
    ):
        run = stored_run(sql_backend)
        states = ExecutionState.objects.using(sql_backend.runs.alias)

        with pytest.raises(Exception, match="execution_states_whole_or_delta"):
            states.create(run_id=run.id, step=0, node_id="node", **state)


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def filled_backend(request, django_db_blocker):
    """A store with enough runs that a plan with a full scan or a sort would be worse."""
    url = request.getfixturevalue(f"{request.param}_url")
    with django_db_blocker.unblock():
        backend = create_storage_backend(url)
        alias = backend.runs.alias
        empty(backend)
        now = timezone.now()
        statuses = ["completed"] * 13 + ["failed"] * 5 + ["running", "pending"]
        WorkflowRun.objects.using(alias).bulk_create(
            [
                WorkflowRun(
                    id=f"run-{number:06}",
                    workflow_name=f"workflow-{number % 3}",
                    status=statuses[number % 20],
                    started_at=now - timedelta(seconds=number),
                    completed_at=now if number % 20 < 18 else None,
                    parent_id=f"run-{number // 10:06}" if number % 4 else None,
                    labels={"tenant": f"t{number % 50}", "user": f"u{number % 7}"},
                )
                for number in range(20_000)
            ],
            batch_size=1000,
        )
        WorkflowRunLabel.objects.using(alias).bulk_create(
            [
                WorkflowRunLabel(run_id=run.id, name=name, value=value, started_at=run.started_at)
                for run in WorkflowRun.objects.using(alias).only("id", "labels", "started_at")
                for name, value in run.labels.items()
            ],
            batch_size=1000,
        )
        ExecutionState.objects.using(alias).bulk_create(
            [
                ExecutionState(
                    run_id=f"run-{number // 10:06}",
                    step=number % 10,
                    node_id="node",
                    state_json="{}",
                )
                for number in range(20_000)
            ],
            batch_size=1000,
        )
        with connections[alias].cursor() as cursor:
            cursor.execute("ANALYZE")
        yield backend
        empty(backend)


def plans_of(alias, call):
    """Return the plans of the queries of a call as text, once it has been made."""
    queries = []

    def collect(execute, sql, params, many, context):
        if sql.startswith(("SELECT", "INSERT", "WITH")):
            queries.append((sql, params))
        return execute(sql, params, many, context)

    with connections[alias].execute_wrapper(collect):
        call()
    assert queries
    explain = "EXPLAIN" if connections[alias].vendor == "postgresql" else "EXPLAIN QUERY PLAN"
    plans = []
    with connections[alias].cursor() as cursor:
        for sql, params in queries:
            cursor.execute(f"{explain} {sql}", params)
            plans.append("\n".join(str(row[-1]) for row in cursor.fetchall()))
    return plans


@pytest.mark.slow
class TestPlans:
    """Every read of the contract goes through an index, in the order of the index."""

    @pytest.mark.parametrize(
        "read",
        [
            lambda runs, states: runs.get("run-000100"),
            lambda runs, states: runs.list_by_workflow("workflow-1"),
            lambda runs, states: runs.list_runs(),
            lambda runs, states: runs.list_runs(before="run-010000"),
            lambda runs, states: runs.list_runs(status="failed"),
            lambda runs, states: runs.list_runs(status="failed", before="run-010000"),
            lambda runs, states: runs.list_runs(status=["completed", "failed"]),
            lambda runs, states: runs.list_runs(workflow_name="workflow-2", status="failed"),
            lambda runs, states: runs.list_runs(workflow_name="workflow-1", before="run-010000"),
            lambda runs, states: runs.list_runs(started_before=timezone.now() - timedelta(hours=1)),
            lambda runs, states: runs.list_runs(labels={"tenant": "t7"}, limit=20),
            lambda runs, states: runs.list_runs(
                labels={"tenant": "t7"}, before="run-010007", limit=20
            ),
            lambda runs, states: runs.count_runs(labels={"tenant": "t7"}),
            lambda runs, states: list(states.iter_steps("run-000100")),
            lambda runs, states: states.get_latest_state("run-000100"),
            lambda runs, states: states.get_state("run-000100", 3),
            lambda runs, states: states.get_state_history("run-000100"),
            lambda runs, states: states.save_state("run-000100", {}, "node"),
        ],
        ids=[
            "get",
            "list_by_workflow",
            "list_runs",
            "list_runs a page later",
            "list_runs by status",
            "list_runs by status, a page later",
            "list_runs by several statuses",
            "list_runs by name and status",
            "list_runs by name, a page later",
            "list_runs by time",
            "list_runs by label",
            "list_runs by label, a page later",
            "count_runs by label",
            "iter_steps",
            "get_latest_state",
            "get_state",
            "get_state_history",
            "save_state",
        ],
    )
    def test_a_read_neither_scans_a_table_nor_sorts(self, filled_backend, read):
        for plan in plans_of(filled_backend.runs.alias, lambda: read(*filled_backend)):
            assert not re.search(r"Seq Scan|\bSort\b|TEMP B-TREE", plan), plan
            assert not re.search(r"SCAN (?!subquery|.* USING (COVERING )?INDEX)", plan), plan

    def test_an_overview_reads_indexes_where_rows_would_be_sorted(self, filled_backend):
        before = timezone.now()
        after = before - timedelta(minutes=5)
        within = valid_filters({"started_after": after, "started_before": before})

        steps, names = plans_of(
            filled_backend.alias,
            lambda: over_time_and_by_workflow(filled_backend.alias, within, [after]),
        )

        assert not re.search(r"Seq Scan|\bSort\b|TEMP B-TREE|SCAN workflow_runs", steps), steps
        assert not re.search(r"Seq Scan|\bSort\b|TEMP B-TREE|SCAN workflow_runs", names), names
        assert "workflow_runs_started" in steps
        if connections[filled_backend.alias].vendor == "sqlite":
            assert "COVERING INDEX workflow_runs_name_status" in names
            assert "(workflow_name=? AND status=? AND started_at>? AND started_at<?)" in names

    @pytest.mark.parametrize(
        "read",
        [
            lambda runs, states: runs.list_runs(parent_id="run-000100"),
            lambda runs, states: runs.list_runs(labels={"tenant": "t7", "user": "u3"}, limit=20),
            lambda runs, states: runs.list_runs(
                labels={"tenant": "t7"}, started_after=timezone.now() - timedelta(hours=1), limit=20
            ),
            lambda runs, states: runs.list_runs(labels={"user": "u3"}, status="running"),
        ],
        ids=["by parent", "by several labels", "by label and time", "by label and rarer status"],
    )
    def test_a_read_of_few_scans_no_table(self, filled_backend, read):
        for plan in plans_of(filled_backend.runs.alias, lambda: read(*filled_backend)):
            scans = r"Seq Scan|SCAN (?!subquery|.* USING (COVERING )?INDEX)"
            assert not re.search(scans, plan), plan

    @pytest.mark.parametrize(
        "filters",
        [
            {"labels": {"user": "u3"}, "status": "running"},
            {"labels": {"user": "u3"}, "workflow_name": "workflow-1"},
            {"labels": {"tenant": "t7"}, "status": ["completed", "failed"]},
            {"labels": {"user": "u3", "tenant": "t7"}},
            {"labels": {"user": "u3"}, "parent_id": "run-000200"},
            {"labels": {"user": "u3"}, "waiting": False, "status": "pending"},
        ],
    )
    def test_runs_of_labels_are_the_same_whatever_index_they_are_read_by(
        self, filled_backend, filters
    ):
        now = timezone.now()
        filters["started_after"] = now - timedelta(hours=5)
        filters["started_before"] = now - timedelta(minutes=20)
        runs = filled_backend.runs
        everything = valid_filters(filters)
        wanted = [run.id for run in runs.list_runs(limit=20_000) if everything.matches(run)]
        assert wanted

        pages = [runs.list_runs(**filters, limit=30)]
        while pages[-1]:
            pages.append(runs.list_runs(**filters, before=pages[-1][-1], limit=30))

        assert [run.id for page in pages for run in page] == wanted

    def test_delete_finished_and_list_stalled_scan_no_table(self, filled_backend):
        alias = filled_backend.runs.alias
        for call in (
            lambda: filled_backend.runs.delete_finished(
                before=timezone.now() - timedelta(days=9), batch_size=10
            ),
            lambda: filled_backend.runs.list_stalled(timedelta(hours=4)),
        ):
            for plan in plans_of(alias, call):
                assert not re.search(r"Seq Scan|SCAN (?!.* USING (COVERING )?INDEX)", plan), plan

    def test_only_the_indexes_of_the_model_are_there(self, filled_backend):
        alias = filled_backend.runs.alias
        with connections[alias].cursor() as cursor:
            constraints = connections[alias].introspection.get_constraints(cursor, "workflow_runs")
        names = {name for name, constraint in constraints.items() if constraint["index"]}
        assert names - {"workflow_runs_pkey", "__primary__"} == {
            index.name for index in WorkflowRun._meta.indexes
        } | (names & {"sqlite_autoindex_workflow_runs_1"})


class TestFailingDatabases:
    def test_a_server_that_is_down_is_unavailable(self, register):
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            port = closed.getsockname()[1]
        backend = register(
            "down",
            ENGINE="django.db.backends.postgresql",
            NAME="x",
            USER="u",
            PASSWORD="secret-password",
            HOST="127.0.0.1",
            PORT=port,
        )

        for call in (
            lambda: backend.runs.get("x"),
            lambda: backend.runs.add(new_run()),
            lambda: backend.states.save_state("x", {}, "node"),
            lambda: backend.states.get_state_history("x"),
        ):
            with pytest.raises(StorageUnavailableError, match="'down' is unavailable") as caught:
                call()
            assert isinstance(caught.value.__cause__, OperationalError)
            assert "secret-password" not in str(caught.value)

    def test_after_a_lost_connection_the_next_call_connects_again(
        self, postgres_url, django_db_blocker
    ):
        with django_db_blocker.unblock():
            backend = create_storage_backend(postgres_url)
            run = stored_run(backend)
            ((pid,),) = select(backend.runs.alias, "SELECT pg_backend_pid()")
            import psycopg

            with psycopg.connect(postgres_url, autocommit=True) as other:
                other.execute("SELECT pg_terminate_backend(%s)", [pid])

            with pytest.raises(StorageUnavailableError):
                backend.runs.heartbeat(run.id)
            backend.runs.heartbeat(run.id)

    @pytest.mark.parametrize("vendor", ["sqlite", "postgres", "mysql"])
    def test_missing_tables_say_to_migrate(self, vendor, register, tmp_path, request):
        if vendor == "sqlite":
            backend = register("bare", **sqlite_database(tmp_path / "bare.db"))
        else:
            import dj_database_url

            from tests.servers import mysql_database, postgres_database

            database = {"postgres": postgres_database, "mysql": mysql_database}[vendor]()
            url = database.__enter__()
            request.addfinalizer(lambda: database.__exit__(None, None, None))
            backend = register("bare", **dj_database_url.parse(url))

        for call in (
            lambda: backend.runs.get("x"),
            lambda: backend.runs.add(new_run()),
            lambda: backend.runs.delete("x"),
            lambda: backend.states.get_latest_state("x"),
        ):
            with pytest.raises(TablesMissingError, match=r"manage\.py migrate --database bare"):
                call()

    def test_a_column_that_is_not_there_says_to_migrate(self, register, tmp_path):
        with sqlite3.connect(tmp_path / "old.db") as old:
            old.execute("CREATE TABLE workflow_runs (id text)")
        backend = register("old", **sqlite_database(tmp_path / "old.db"))

        with pytest.raises(TablesMissingError, match="out of date"):
            backend.runs.get("x")

    def test_a_locked_sqlite_file_is_unavailable_after_its_timeout(self, register, tmp_path):
        path = tmp_path / "locked.db"
        backend = register("locked", **sqlite_database(path, **{**SQLITE_OPTIONS, "timeout": 0.1}))
        call_command("migrate", "workflow_storage", database="locked", verbosity=0)
        run = stored_run(backend)
        writer = sqlite3.connect(path, isolation_level=None)
        writer.execute("BEGIN IMMEDIATE")

        with pytest.raises(StorageUnavailableError, match=r"locked.*raise OPTIONS\['timeout'\]"):
            backend.runs.heartbeat(run.id)
        assert backend.runs.get(run.id).heartbeat_at is None

        writer.execute("ROLLBACK")
        writer.close()
        backend.runs.heartbeat(run.id)

    def test_a_file_that_is_no_database_is_a_storage_error(self, register, tmp_path):
        path = tmp_path / "text.db"
        path.write_text("This is not a database. " * 100)
        backend = register("text", **sqlite_database(path))

        with pytest.raises(StorageError, match="not a database"):
            backend.runs.get("x")

    def test_a_state_larger_than_a_mysql_packet_says_what_to_raise(
        self, mysql_url, django_db_blocker
    ):
        with django_db_blocker.unblock():
            backend = create_storage_backend(mysql_url)
            run = stored_run(backend)
            limit = select(backend.runs.alias, "SELECT @@max_allowed_packet")[0][0]

            with pytest.raises(StorageError, match="max_allowed_packet"):
                backend.states.save_state(run.id, {"text": "x" * limit}, "node")

            assert backend.states.get_latest_state(run.id) is None


def test_a_state_of_no_run_is_refused_at_once_where_the_caller_commits(sql_backend):
    alias = sql_backend.states.alias
    connections[alias].ensure_connection()
    transaction.set_autocommit(False, using=alias)
    try:
        for state in ({"small": 1}, {"large": "x" * 10_000}):
            with pytest.raises(RunNotFoundError):
                sql_backend.states.save_state("nope", state, "node")
    finally:
        transaction.rollback(using=alias)
        transaction.set_autocommit(True, using=alias)


def test_states_in_transactions_and_beside_them_are_all_kept(sql_backend):
    alias = sql_backend.states.alias
    run = stored_run(sql_backend)

    def work(number):
        for turn in range(20):
            if number % 2:
                sql_backend.states.save_state(run.id, {"n": turn}, "node")
            else:
                with transaction.atomic(using=alias):
                    sql_backend.states.save_state(run.id, {"n": turn}, "node")

    in_threads(4, work)

    steps = [state["step"] for state in sql_backend.states.get_state_history(run.id)]
    assert steps == list(range(80))


class TestIsolation:
    """Databases that give a whole transaction one snapshot (REPEATABLE READ)."""

    @pytest.fixture
    def backend(self, postgres_url, django_db_blocker):
        with django_db_blocker.unblock():
            options = "options=-c%20default_transaction_isolation=repeatable%5C%20read"
            backend = create_storage_backend(f"{postgres_url}?{options}")
            empty(backend)
            yield backend
            forget(backend.runs.alias)

    def test_concurrent_states_are_all_kept(self, backend):
        assert select(backend.runs.alias, "SHOW transaction_isolation") == [("repeatable read",)]
        ConcurrencyContract().test_concurrent_states_of_one_run_from_threads_are_all_kept(backend)


class TestConflicts:
    """Transactions that the database gives up for another one, here after waiting for a lock."""

    @pytest.fixture
    def backend(self, mysql_url, django_db_blocker):
        with django_db_blocker.unblock():
            backend = create_storage_backend(
                f"{mysql_url}?init_command=SET%20SESSION%20innodb_lock_wait_timeout%3D1"
            )
            empty(backend)
            yield backend
            empty(backend)
            forget(backend.runs.alias)

    @pytest.fixture
    def locked(self, backend):
        """A run that another connection locks until the event is set."""
        run, locked, done = stored_run(backend), threading.Event(), threading.Event()

        def lock():
            with transaction.atomic(using=backend.runs.alias):
                backend.runs.update(run.id, total_tokens=1)
                locked.set()
                assert done.wait(30)
            connections.close_all()

        thread = threading.Thread(target=lock)
        thread.start()
        assert locked.wait(10)
        yield run, done
        done.set()
        thread.join()

    def test_a_transaction_of_our_own_is_tried_again(self, backend, locked):
        run, done = locked
        released = threading.Timer(1.5, done.set)
        released.start()

        assert backend.states.save_state(run.id, {"n": 1}, "node") == 0

        assert done.is_set()

    def test_when_the_time_is_over_the_error_does_not_say_to_roll_back(
        self, backend, locked, monkeypatch
    ):
        run, _ = locked
        monkeypatch.setattr(errors, "PATIENCE", 0.1)

        for write in (
            lambda: backend.states.save_state(run.id, {"n": 1}, "node"),
            lambda: backend.runs.delete(run.id),
            lambda: backend.states.delete_states(run.id),
        ):
            with pytest.raises(
                StorageUnavailableError, match="raise innodb_lock_wait_timeout"
            ) as caught:
                write()
            assert "Roll" not in str(caught.value)

    def test_in_the_callers_transaction_it_does_and_nothing_is_tried_again(self, backend, locked):
        run, _ = locked

        for callers in (
            transaction.atomic(using=backend.runs.alias),
            without_autocommit(backend.runs.alias),
        ):
            with (
                pytest.raises(StorageUnavailableError, match="Roll your transaction back and run"),
                callers,
            ):
                backend.runs.heartbeat(run.id)


@contextmanager
def without_autocommit(alias):
    connections[alias].ensure_connection()
    transaction.set_autocommit(False, using=alias)
    try:
        yield
    finally:
        transaction.rollback(using=alias)
        transaction.set_autocommit(True, using=alias)


def test_a_password_in_a_drivers_error_is_masked(register):
    register("masked", **{**sqlite_database("x"), "PASSWORD": "secret-password"})

    error = storage_error("masked", OperationalError("no entry for u:secret-password@h"))

    assert "secret-password" not in str(error)
    assert "***" in str(error)


def test_a_run_that_is_resumed_while_finished_ones_are_deleted_is_kept(sql_backend):
    run = stored_run(sql_backend, status="failed")
    sql_backend.states.save_state(run.id, {"kept": True}, "node")
    resumed = threading.Event()

    def resume_or_delete(number):
        if number == 0:
            with transaction.atomic(using=sql_backend.runs.alias):
                sql_backend.runs.update_status(run.id, "running", expected="failed")
                resumed.set()
                time.sleep(0.3)
            return None
        assert resumed.wait(10)
        return sql_backend.runs.delete_finished(before=timezone.now())

    assert in_threads(2, resume_or_delete)[1] == 0

    assert sql_backend.runs.get(run.id).status == "running"
    assert sql_backend.states.get_latest_state(run.id) == {"kept": True}


def test_reading_a_history_and_deleting_runs_take_memory_for_a_batch_only(sql_backend):
    run = stored_run(sql_backend)
    for _ in range(50):
        sql_backend.states.save_state(run.id, {}, "node")
    for _ in range(7):
        stored_run(sql_backend, status="failed")
    sizes = []

    def collect(execute, sql, params, many, context):
        sizes.append((sql, len(params or ())))
        return execute(sql, params, many, context)

    with connections[sql_backend.runs.alias].execute_wrapper(collect):
        sql_backend.states.get_state_history(run.id)
        sql_backend.runs.delete_finished(before=timezone.now(), batch_size=2)

    reads = [sql for sql, _ in sizes if "state_json" in sql]
    assert len(reads) == 50 // 16 + 2
    assert all("LIMIT 16" in sql for sql in reads)
    assert max(count for sql, count in sizes if sql.startswith("DELETE")) == 2


def open_with_djangos_defaults(path):
    """Open a SQLite file as Django does by default: no WAL, DEFERRED transactions."""
    from workflow_storage.factory import ensure_django

    ensure_django()
    alias = "djangos_defaults"
    if alias not in connections.databases:
        database = sqlite_database(path, timeout=30)
        configured = connections.configure_settings({"default": {}, alias: database})
        connections.databases[alias] = configured[alias]
    return StorageBackend(DjangoWorkflowRunRepository(alias), DjangoExecutionStateRepository(alias))


@pytest.mark.slow
class TestSQLiteWithDjangosDefaults(ConcurrencyContract):
    @pytest.fixture
    def open_backend(self, tmp_path):
        from functools import partial

        return partial(open_with_djangos_defaults, str(tmp_path / "defaults.db"))

    @pytest.fixture
    def backend(self, open_backend, django_db_blocker):
        with django_db_blocker.unblock():
            backend = open_backend()
            call_command("migrate", "workflow_storage", database=backend.runs.alias, verbosity=0)
            yield backend
            forget(backend.runs.alias)


def test_reading_a_page_of_runs_is_one_query(sql_backend):
    for _ in range(3):
        stored_run(sql_backend, inputs={"a": 1})
    queries = []

    def collect(execute, sql, params, many, context):
        queries.append(sql)
        return execute(sql, params, many, context)

    with connections[sql_backend.runs.alias].execute_wrapper(collect):
        assert len(json.dumps([run.inputs for run in sql_backend.runs.list_runs()])) > 3

    assert len(queries) == 1


def test_a_repository_names_its_database():
    assert repr(DjangoWorkflowRunRepository("reporting")) == (
        "DjangoWorkflowRunRepository('reporting')"
    )

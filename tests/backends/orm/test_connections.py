"""Connections that die, become read-only or break at a bad moment, on real servers."""

import shutil
import time
from urllib.parse import quote, urlsplit

import pytest
from django.db import OperationalError, connections, transaction
from django.utils import timezone

from tests.proxy import proxy_of, through
from tests.servers import free_ports
from workflow_storage import (
    StorageConfig,
    StorageError,
    StorageUnavailableError,
    TablesMissingError,
    UnsupportedBackendError,
    create_storage_backend,
    record_run,
)
from workflow_storage.backends.orm import connections as keeper
from workflow_storage.backends.orm.registration import settings_of
from workflow_storage.factory import forget
from workflow_storage.signals import checkpoint_saved, run_finished
from workflow_storage.testing import in_threads, new_run, stored_run

LARGE = {"text": "x" * 10_000}
"""A state that is saved in a transaction on every database."""


@pytest.fixture
def open_at(django_db_blocker):
    """Open stores at URLs that are forgotten after the test."""
    aliases = []

    def open_at(url):
        backend = create_storage_backend(url)
        aliases.append(backend.alias)
        return backend

    with django_db_blocker.unblock():
        yield open_at
        for alias in aliases:
            forget(alias)


@pytest.fixture(params=["postgres", "mysql"])
def server_url(request):
    """The URL of a database on each server in turn."""
    return request.getfixturevalue(f"{request.param}_url")


@pytest.fixture
def proxied(server_url, open_at):
    """A proxy to each server in turn, a store behind it, a run in it, and one beside it."""
    direct = create_storage_backend(server_url)
    with proxy_of(server_url) as proxy:
        backend = open_at(through(proxy, server_url))
        yield proxy, backend, stored_run(backend).id, direct


def execute(backend, sql, *params):
    with connections[backend.alias].cursor() as cursor:
        cursor.execute(sql, params)
        return cursor.fetchall() if cursor.description else None


def session(backend):
    """Return the number of the session that a store uses."""
    is_mysql = connections[backend.alias].vendor == "mysql"
    return execute(backend, f"SELECT {'connection_id' if is_mysql else 'pg_backend_pid'}()")[0][0]


def end_session(backend, direct):
    """Let the server end the session of a store."""
    number = session(backend)
    if connections[direct.alias].vendor == "mysql":
        execute(direct, f"KILL {number}")
    else:
        execute(direct, "SELECT pg_terminate_backend(%s, 5000)", number)


class TestIdle:
    TIMEOUTS = {
        "postgresql": ("options", "-c idle_session_timeout=300", 0.8),
        "mysql": ("init_command", "SET SESSION wait_timeout = 1", 2.2),
    }

    @pytest.fixture
    def idle(self, server_url, open_at, monkeypatch):
        """A store whose server ends idle sessions, a run in it, and a wait for that to happen."""
        name, value, seconds = self.TIMEOUTS[urlsplit(server_url).scheme]
        monkeypatch.setattr(keeper, "IDLE_SECONDS", 0.2)
        backend = open_at(f"{server_url}?{name}={quote(value)}")
        run = stored_run(backend)
        backend.states.save_state(run.id, {"n": 0}, "node")
        return backend, run.id, lambda: time.sleep(seconds)

    def test_a_write_after_the_server_hung_up_succeeds(self, idle):
        backend, run_id, wait = idle
        before = session(backend)
        wait()

        assert backend.states.save_state(run_id, {"n": 1}, "node") == 1

        assert session(backend) != before
        assert backend.states.get_latest_state(run_id) == {"n": 1}

    def test_a_block_whose_node_took_long_stores_its_end(self, idle):
        backend, _, wait = idle

        with record_run("long", backend=backend) as run:
            wait()
            run.outputs = "done"

        assert backend.runs.get(run.run_id).outputs == "done"

    def test_a_connection_out_of_a_pool_is_checked(self, postgres_url, open_at):
        backend = open_at(f"{postgres_url}?pool=true")
        run = stored_run(backend)
        end_session(backend, create_storage_backend(postgres_url))
        connections[backend.alias].close()  # back into the pool

        backend.runs.heartbeat(run.id)

    def test_one_that_is_in_use_is_not_checked(self, postgres_url, open_at):
        backend = open_at(f"{postgres_url}?application_name=in-use")
        run = stored_run(backend)
        sent = []

        with connections[backend.alias].execute_wrapper(
            lambda execute, sql, *rest: sent.append(sql) or execute(sql, *rest)
        ):
            connection = connections[backend.alias]
            checks = []
            connection.is_usable = lambda: checks.append(1) or True
            for _ in range(10):
                backend.runs.get(run.id)

        assert checks == []
        assert len(sent) == 10


class TestLost:
    def test_a_read_is_tried_again_on_a_new_connection(self, server_url, open_at):
        backend = open_at(f"{server_url}?connect_timeout=9")
        run = stored_run(backend)
        backend.states.save_state(run.id, {"n": 1}, "node")
        direct = create_storage_backend(server_url)

        for read in (
            lambda: backend.runs.get(run.id).id == run.id,
            lambda: backend.runs.list_runs(limit=1),
            lambda: backend.states.get_latest_state(run.id) == {"n": 1},
            lambda: backend.states.get_state(run.id, 0),
            lambda: backend.states.get_state_history(run.id),
        ):
            end_session(backend, direct)
            assert read()

    def test_a_write_is_not_tried_again_and_says_that_it_may_be_stored(self, server_url, open_at):
        backend = open_at(f"{server_url}?connect_timeout=9")
        run = stored_run(backend)
        end_session(backend, create_storage_backend(server_url))

        with pytest.raises(StorageUnavailableError, match="may have been stored") as caught:
            backend.runs.heartbeat(run.id)

        assert caught.value.may_be_stored
        backend.runs.heartbeat(run.id)

    def test_in_the_callers_transaction_nothing_is_tried_again(self, server_url, open_at):
        backend = open_at(f"{server_url}?connect_timeout=9")
        run = stored_run(backend)
        direct = create_storage_backend(server_url)

        with (
            pytest.raises(StorageUnavailableError, match="Your transaction is lost") as caught,
            transaction.atomic(using=backend.alias),
        ):
            backend.runs.update_status(run.id, "failed")
            end_session(backend, direct)
            backend.runs.get(run.id)

        assert not caught.value.may_be_stored
        assert backend.runs.get(run.id).status == "pending"

    def test_after_set_autocommit_a_lost_connection_is_replaced(self, server_url, open_at):
        backend = open_at(f"{server_url}?connect_timeout=9")
        run = stored_run(backend)
        transaction.set_autocommit(False, using=backend.alias)
        end_session(backend, create_storage_backend(server_url))

        with pytest.raises(StorageUnavailableError, match="Your transaction is lost"):
            backend.runs.heartbeat(run.id)

        backend.runs.heartbeat(run.id)

    def test_an_error_leaves_a_transaction_by_set_autocommit_as_it_is(self, server_url, open_at):
        backend = open_at(f"{server_url}?connect_timeout=9")
        run = stored_run(backend)
        transaction.set_autocommit(False, using=backend.alias)
        before = session(backend)
        backend.runs.update_status(run.id, "running")

        with pytest.raises(StorageError):
            execute_badly(backend, run.id)
        transaction.rollback(using=backend.alias)

        assert session(backend) == before
        assert backend.runs.get(run.id).status == "pending"
        transaction.rollback(using=backend.alias)
        transaction.set_autocommit(True, using=backend.alias)


def execute_badly(backend, run_id):
    """Let a call of a store fail in the database, though the connection is sound."""
    alias = backend.alias

    def refuse(execute, sql, params, many, context):
        return execute("SELECT 1 FROM no_table_of_this_name", None, many, context)

    with connections[alias].execute_wrapper(refuse):
        backend.runs.get(run_id)


class TestLostAnswers:
    @pytest.mark.parametrize("state", [LARGE, {"small": True}], ids=["large", "small"])
    def test_a_commit_without_an_answer_may_be_stored_though_no_server_answers(
        self, proxied, state
    ):
        proxy, backend, run_id, direct = proxied
        backend.states.save_state(run_id, state, "warm")
        is_one_statement = connections[backend.alias].vendor != "mysql"

        def lose(sent):
            if (b"INSERT" if is_one_statement else b"COMMIT") in sent:
                proxy.lose_answer()
                proxy.refuse()

        proxy.on_sent = lose
        with pytest.raises(StorageUnavailableError, match="may have been stored") as caught:
            backend.states.save_state(run_id, {**state, "n": 1}, "node")

        assert caught.value.may_be_stored
        assert direct.states.get_latest_state(run_id) == {**state, "n": 1}
        assert len(direct.states.get_state_history(run_id)) == 2

    def test_what_could_not_be_sent_is_not_stored(self, proxied):
        proxy, backend, run_id, direct = proxied
        backend.close()
        proxy.refuse()

        with pytest.raises(StorageUnavailableError, match="server runs") as caught:
            backend.states.save_state(run_id, LARGE, "node")

        assert not caught.value.may_be_stored
        assert direct.states.get_latest_state(run_id) is None

    def test_an_error_that_the_caller_handles_decides_nothing(self, proxied):
        proxy, backend, run_id, _ = proxied
        backend.close()
        proxy.refuse()

        try:
            raise OperationalError("of the caller's own")
        except OperationalError:
            with pytest.raises(StorageUnavailableError, match="server runs") as caught:
                backend.runs.heartbeat(run_id)

        assert not caught.value.may_be_stored


class TestBrokenAfterCommit:
    @pytest.fixture
    def cut_once(self, mysql_url, open_at):
        """A store whose next connection breaks between COMMIT and SET autocommit = 1."""
        with proxy_of(mysql_url) as proxy:
            backend = open_at(through(proxy, mysql_url))
            run_id = stored_run(backend).id
            backend.states.save_state(run_id, LARGE, "warm")

            def cut(sent):
                if b"autocommit" in sent and b"1" in sent:
                    proxy.on_sent = lambda sent: None
                    proxy.cut()

            proxy.on_sent = cut
            yield backend, run_id

    def test_of_our_own_transaction(self, cut_once):
        backend, run_id = cut_once

        with pytest.raises(StorageUnavailableError, match="may have been stored"):
            backend.states.save_state(run_id, LARGE, "node")

        assert backend.states.save_state(run_id, LARGE, "node") == 2

    def test_of_the_callers_transaction(self, cut_once):
        backend, run_id = cut_once

        with pytest.raises(OperationalError), transaction.atomic(using=backend.alias):
            backend.states.save_state(run_id, LARGE, "node")

        assert backend.states.save_state(run_id, LARGE, "node") == 2

    def test_and_after_the_callers_next_block_has_failed_too(self, cut_once):
        backend, run_id = cut_once
        for _ in range(2):
            with pytest.raises(OperationalError), transaction.atomic(using=backend.alias):
                execute(backend, "SELECT 1")
        assert connections[backend.alias].in_atomic_block  # nobody's

        assert backend.states.save_state(run_id, LARGE, "node") == 1
        assert not backend.in_transaction()


class TestTooLarge:
    @pytest.mark.parametrize("times", [1, 3])
    def test_a_run_whose_outputs_are_too_large_can_be_failed(self, mysql_url, open_at, times):
        backend = open_at(f"{mysql_url}?connect_timeout=9")
        run = stored_run(backend, status="running")
        limit = execute(backend, "SELECT @@max_allowed_packet")[0][0]

        with pytest.raises(StorageError, match="Raise max_allowed_packet") as caught:
            backend.runs.update_status(run.id, "completed", outputs="x" * limit * times)

        assert not isinstance(caught.value, StorageUnavailableError)
        backend.runs.update_status(run.id, "failed", expected="running")

    def test_a_state_of_a_gigabyte_is_refused_by_sqlite_in_the_same_words(self, tmp_path, open_at):
        backend = open_at(f"sqlite:///{tmp_path / 'small.db'}")
        run = stored_run(backend)
        connections[backend.alias].connection.setlimit(0, 100_000)  # SQLITE_LIMIT_LENGTH

        with pytest.raises(StorageError, match="refuses a statement of this size"):
            backend.runs.update(run.id, outputs="x" * 200_000)


class TestReadOnly:
    @pytest.fixture
    def mysql_user(self, mysql_url):
        """The URL for a user whom a server that is read-only refuses."""
        name = urlsplit(mysql_url).path[1:]
        user = f"u_{name[-12:]}"
        direct = create_storage_backend(mysql_url)
        execute(direct, f"CREATE USER {user}@'%%'")
        execute(direct, f"GRANT ALL ON {name}.* TO {user}@'%%'")
        yield mysql_url.replace("//root@", f"//{user}@")
        execute(direct, f"DROP USER {user}@'%%'")

    def test_on_postgresql_the_next_call_opens_a_new_connection(self, postgres_url, open_at):
        backend = open_at(f"{postgres_url}?connect_timeout=9")
        run = stored_run(backend)

        for write in (
            lambda: backend.runs.heartbeat(run.id),
            lambda: backend.states.save_state(run.id, LARGE, "node"),
            lambda: backend.runs.add(new_run()),
            lambda: backend.runs.delete(run.id),
        ):
            execute(backend, "SET default_transaction_read_only = on")
            with pytest.raises(StorageUnavailableError, match="takes no writes") as caught:
                write()
            assert not caught.value.may_be_stored
            write()

    def test_in_the_callers_transaction_the_connection_goes_with_it(self, postgres_url, open_at):
        backend = open_at(f"{postgres_url}?connect_timeout=9")
        run = stored_run(backend)
        execute(backend, "SET default_transaction_read_only = on")

        with transaction.atomic(using=backend.alias):
            with pytest.raises(StorageUnavailableError, match="takes no writes"):
                backend.runs.heartbeat(run.id)
            assert backend.runs.get(run.id) is not None

        backend.runs.heartbeat(run.id)

    def test_on_mariadb(self, mysql_url, mysql_user, open_at):
        direct = create_storage_backend(mysql_url)
        backend = open_at(mysql_user)
        run = stored_run(backend)
        before = session(backend)
        execute(direct, "SET GLOBAL read_only = 1")
        try:
            with pytest.raises(StorageUnavailableError, match="takes no writes"):
                backend.runs.heartbeat(run.id)
        finally:
            execute(direct, "SET GLOBAL read_only = 0")

        backend.runs.heartbeat(run.id)
        assert session(backend) != before


class TestSeveralHosts:
    @pytest.fixture(params=["as options", "as libpq writes them"])
    def url_of(self, request, postgres_url):
        """Make the URL of a database on several hosts, in both ways."""
        parts = urlsplit(postgres_url)
        server = parts.hostname, parts.port or 5432

        def url_of(*hosts):
            hosts = [host or server for host in hosts]
            user = parts.username
            if request.param == "as options":
                names = ",".join(name for name, _ in hosts)
                ports = ",".join(str(port) for _, port in hosts)
                return f"postgresql://{user}@{parts.path}?host={names}&port={ports}"
            netloc = ",".join(f"{name}:{port}" for name, port in hosts)
            return f"postgresql://{user}@{netloc}{parts.path}"

        return url_of

    def test_the_one_that_answers_is_used(self, url_of, open_at):
        (closed,) = free_ports(1)
        backend = open_at(url_of(("127.0.0.1", closed), None))

        run = stored_run(backend)

        assert backend.runs.get(run.id) is not None

    def test_an_error_names_them(self, url_of, open_at):
        first, second = free_ports(2)

        with pytest.raises(StorageUnavailableError, match=r"127\.0\.0\.1:\d+, localhost:\d+"):
            open_at(url_of(("127.0.0.1", first), ("localhost", second)))

    def test_one_that_takes_writes_is_looked_for_unless_the_url_says_otherwise(self, url_of):
        url = url_of(("a", 1), ("b", 2))
        more = "&" if "?" in url else "?"

        options = settings_of(StorageConfig(backend=url))["OPTIONS"]
        told = settings_of(StorageConfig(backend=f"{url}{more}target_session_attrs=any"))["OPTIONS"]

        assert options["target_session_attrs"] == "read-write"
        assert told["target_session_attrs"] == "any"

    def test_ports_and_addresses_are_read_as_libpq_does(self):
        url = "postgresql://u:p@[::1]:5433,b,c:5434/db"

        database = settings_of(StorageConfig(backend=url))

        assert database["HOST"] == "::1,b,c"
        assert database["PORT"] == "5433,,5434"
        assert (database["USER"], database["PASSWORD"], database["NAME"]) == ("u", "p", "db")

    def test_mysql_takes_one(self):
        with pytest.raises(UnsupportedBackendError, match="cannot be read"):
            settings_of(StorageConfig(backend="mysql://u@a:1,b:2/db"))


def test_threads_share_a_database_in_memory(open_at):
    backend = open_at("sqlite://:memory:")
    run = stored_run(backend)

    def use(number):
        for n in range(30):
            backend.states.save_state(run.id, {"n": n, "text": "x" * 200 * n}, f"node {number}")
            assert backend.runs.get(run.id) is not None
            backend.runs.heartbeat(run.id)

    in_threads(8, use)

    assert [checkpoint["step"] for checkpoint in backend.states.get_state_history(run.id)] == list(
        range(240)
    )


def test_signals_are_sent_once_the_caller_has_committed(sql_backend):
    sent = []

    def receive(signal, **kwargs):
        sent.append(signal)
        raise ValueError("of a receiver")

    for signal in (checkpoint_saved, run_finished):
        signal.connect(receive)
    connections[sql_backend.alias].ensure_connection()
    transaction.set_autocommit(False, using=sql_backend.alias)
    try:
        with record_run("manual", backend=sql_backend) as run:
            run.save_state({}, "node")
        sql_backend.on_commit(lambda: 1 / 0)
        assert sql_backend.in_transaction()
        assert sent == []
    finally:
        transaction.commit(using=sql_backend.alias)
        transaction.set_autocommit(True, using=sql_backend.alias)
        for signal in (checkpoint_saved, run_finished):
            signal.disconnect(receive)

    assert sent == [checkpoint_saved, run_finished]
    assert sql_backend.runs.get(run.run_id).status == "completed"


class TestDeletedFiles:
    """A SQLite file that is deleted or replaced while it is open."""

    @pytest.fixture
    def path(self, tmp_path):
        return tmp_path / "runs.db"

    @pytest.fixture
    def store(self, path, django_db_blocker):
        with django_db_blocker.unblock():
            store = create_storage_backend(f"sqlite:///{path}")
            yield store
            forget(store.alias)

    @pytest.mark.parametrize(
        "call",
        [
            lambda store, run: store.runs.get(run.id),
            lambda store, run: store.states.save_state(run.id, {}, "node"),
            lambda store, run: store.states.writer(run.id).save_state({}, "node"),
            lambda store, run: store.runs.update_status(run.id, "running"),
            lambda store, run: store.runs.delete_finished(before=timezone.now()),
        ],
        ids=["get", "save_state", "writer", "update_status", "delete_finished"],
    )
    def test_are_noticed_by_the_next_call(self, store, path, call):
        run = stored_run(store)
        for file in path.parent.glob("runs.db*"):
            file.unlink()

        with pytest.raises(StorageUnavailableError, match=r"runs\.db was deleted or replaced"):
            call(store, run)
        with pytest.raises(TablesMissingError, match=r"runs\.db") as error:
            store.runs.get(run.id)

        assert "workflow_storage_" not in str(error.value)

    def test_what_is_there_in_its_place_is_used_then(self, store, path):
        run = stored_run(store)
        connections[store.alias].close()
        shutil.copy(path, path.with_name("backup.db"))
        assert store.runs.get(run.id) is not None
        path.with_name("backup.db").replace(path)

        with pytest.raises(StorageUnavailableError, match="deleted or replaced"):
            store.runs.get(run.id)
        assert store.runs.get(run.id) is not None
        store.states.save_state(run.id, {}, "node")

    def test_in_the_callers_transaction_it_is_noticed_too(self, store, path):
        run = stored_run(store)
        with pytest.raises(StorageUnavailableError), transaction.atomic(using=store.alias):
            store.states.save_state(run.id, {}, "node")
            path.unlink()
            store.states.save_state(run.id, {}, "node")

"""Databases for the tests of one room: their sessions, and who locks what in them."""

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from urllib.parse import urlsplit

import pytest
from django.db import connections

from tests.servers import MYSQL_URL, POSTGRES_URL, wait_until
from workflow_storage.backends.orm.dialects import dialect_of


class Server:
    """Another client of the database of a store, past Django."""

    def __init__(self, url):
        parts = urlsplit(url)
        self.database = parts.path.strip("/")
        self.is_postgres = parts.scheme == "postgresql"
        self.url = url
        self._before = self._ids()

    @contextmanager
    def cursor(self, *, of_server=False):
        with self.connection(of_server=of_server) as connection:
            yield connection.cursor()

    @contextmanager
    def connection(self, *, of_server=False):
        if self.is_postgres:
            import psycopg

            connection = psycopg.connect(POSTGRES_URL if of_server else self.url, autocommit=True)
        else:
            import MySQLdb

            parts = urlsplit(MYSQL_URL)
            connection = MySQLdb.connect(
                host=parts.hostname or "127.0.0.1",
                port=parts.port or 3306,
                user=parts.username or "root",
                password=parts.password or "",
                database="mysql" if of_server else self.database,
                autocommit=True,
            )
        try:
            yield connection
        finally:
            connection.close()

    def sessions(self):
        """Return how many sessions the database has that it had not at first."""
        return len(self._ids() - self._before)

    def _ids(self):
        query = (
            "SELECT pid FROM pg_stat_activity WHERE datname = %s"
            if self.is_postgres
            else "SELECT id FROM information_schema.processlist WHERE db = %s"
        )
        return {number for (number,) in self._asked(query)}

    def _asked(self, query):
        """Return what the server answers to a question about the sessions of the database."""
        while True:
            try:
                with self.cursor(of_server=True) as cursor:
                    cursor.execute(query, [self.database])
                    return cursor.fetchall()
            except Exception as exc:
                # MySQL 9 stumbles over statements of others that hold bytes (error 3854).
                if exc.args[:1] != (3854,):
                    raise

    def wait_for_sessions(self, count):
        """Wait until there are so many, for a server takes note of an end a moment later."""
        try:
            wait_until(lambda: self.sessions() == count)
        except AssertionError as exc:
            exc.add_note(f"The sessions are {self.activity()}")
            raise

    def activity(self):
        """Return what each session of the database did last."""
        query = (
            "SELECT pid, state, backend_start, query FROM pg_stat_activity WHERE datname = %s"
            if self.is_postgres
            else "SELECT id, command, time, info FROM information_schema.processlist WHERE db = %s"
        )
        return self._asked(query)

    @contextmanager
    def most_sessions(self):
        """Yield a list that holds the most sessions that were seen while the block ran."""
        ended = threading.Event()
        most = [0]

        def watch():
            query = "SELECT count(*) FROM pg_stat_activity WHERE datname = %s"
            with self.cursor(of_server=True) as cursor:
                while not ended.wait(0.002):
                    cursor.execute(query, [self.database])
                    most[0] = max(most[0], cursor.fetchone()[0])

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            yield most
        finally:
            ended.set()
            watcher.join(timeout=30)

    @contextmanager
    def locked_run(self, run_id):
        """Lock a run, until the block is left or what it yields is called."""
        with self.connection() as connection:
            cursor = connection.cursor()
            cursor.execute("BEGIN")
            cursor.execute("SELECT id FROM workflow_runs WHERE id = %s FOR UPDATE", [run_id])
            assert cursor.fetchone() is not None
            yield lambda: cursor.execute("ROLLBACK")

    def after_waiting(self, backend, call, change):
        """Return what a call returns that waits until a change is committed, made in this thread."""

        def call_in_thread():
            with closing(connections[backend.runs.alias]):
                return call()

        connection = connections[backend.runs.alias]
        with ThreadPoolExecutor(1) as threads:
            # At any level of the store, it can delete states.
            with dialect_of(connection).read_committed(connection):
                change()
                called = threads.submit(call_in_thread)
                wait_until(lambda: self.is_waited_for() or called.done())
                assert not called.done()
            return called.result(30)

    def is_waited_for(self):
        """Whether a session waits for a lock."""
        query = (
            "SELECT count(*) FROM pg_stat_activity WHERE datname = %s AND wait_event_type = 'Lock'"
            if self.is_postgres
            else "SELECT count(*) FROM information_schema.innodb_trx JOIN"
            " information_schema.processlist ON trx_mysql_thread_id = id"
            " WHERE db = %s AND trx_state = 'LOCK WAIT'"
        )
        if not self.is_postgres:
            # Who looks again within 0.1 seconds, another process of the tests, say, is shown the same.
            time.sleep(random.uniform(0.11, 0.25))
        [[waiting]] = self._asked(query)
        return waiting > 0


@pytest.fixture
def postgres(postgres_url):
    return Server(postgres_url)


@pytest.fixture
def mysql(mysql_url):
    return Server(mysql_url)


@pytest.fixture(params=["postgres", "mysql"])
def server_url(request):
    """The URL of each database on a server in turn."""
    return request.getfixturevalue(f"{request.param}_url")


@pytest.fixture
def server(server_url):
    # Earlier tests may have used the database under another alias, and its sessions are counted.
    connections.close_all()
    return Server(server_url)


@pytest.fixture
def unblocked(django_db_blocker):
    """Let a test use databases that are none of DATABASES."""
    with django_db_blocker.unblock():
        yield

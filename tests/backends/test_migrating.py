"""Databases that are given by URL and migrated then, by processes that are killed meanwhile."""

import os
import random
import signal
import time
from urllib.parse import urlsplit

import pytest
from django.db import connections

from tests.servers import mysql_database, postgres_database
from workflow_storage import StorageError, create_storage_backend
from workflow_storage.backends.orm import registration
from workflow_storage.factory import forget
from workflow_storage.testing import new_run

KILLS_AT_RANDOM = 25


@pytest.fixture(params=["mysql", "postgres"])
def new_database(request, django_db_blocker):
    """Give what makes a new database on each server in turn."""
    databases = []

    def make():
        database = {"mysql": mysql_database, "postgres": postgres_database}[request.param]()
        url = database.__enter__()
        databases.append(database)
        return url

    with django_db_blocker.unblock():
        yield make
        for database in databases:
            database.__exit__(None, None, None)


def opening(url, before=lambda: None):
    """Open a store in a process of its own, and return its id."""
    process = os.fork()
    if not process:
        status = 1
        try:
            before()
            create_storage_backend(url)
            status = 0
        finally:
            os._exit(status)
    return process


def result_of(process):
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def schema_of(url):
    """Return the columns, keys and constraints of the tables of an opened store."""
    backend = create_storage_backend(url)
    connection = connections[backend.runs.alias]
    with connection.cursor() as cursor:
        schema = {
            table: (
                [column[:6] for column in columns_of(connection, cursor, table)],
                {
                    name: (each["columns"], each["unique"], each["foreign_key"], each["check"])
                    for name, each in connection.introspection.get_constraints(
                        cursor, table
                    ).items()
                },
            )
            for table in connection.introspection.table_names()
        }
    run = new_run()
    backend.runs.add(run)
    assert backend.states.save_state(run.id, {"n": 1}, "node") == 0
    forget(backend.runs.alias)
    return schema


def columns_of(connection, cursor, table):
    return connection.introspection.get_table_description(cursor, table)


def kill_after(statements):
    """Let this process be killed when it has executed so many statements of its migration."""

    def make_tables(connection, make=registration.make_tables):
        left = iter(range(statements))

        def count(execute, sql, params, many, context):
            result = execute(sql, params, many, context)
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        with connection.execute_wrapper(count):
            make(connection)

    registration.make_tables = make_tables


@pytest.mark.slow
def test_a_process_killed_after_any_statement_of_a_migration_leaves_one_that_is_finished(
    new_database,
):
    reference = schema_of(new_database())
    killed = 0
    for statements in range(200):
        url = new_database()
        result = result_of(opening(url, lambda number=statements: kill_after(number)))
        if result == 0:
            break
        assert result == -signal.SIGKILL
        killed += 1
        assert schema_of(url) == reference, f"after statement {statements}"

    assert killed > 10


@pytest.mark.slow
def test_a_database_whose_migration_is_killed_again_and_again_is_finished(new_database):
    url = new_database()
    started = time.monotonic()
    reference = schema_of(url)
    longest = time.monotonic() - started
    for _ in range(KILLS_AT_RANDOM):
        url = new_database()
        for _ in range(3):
            process = opening(url)
            time.sleep(random.uniform(0, longest))
            os.kill(process, signal.SIGKILL)
            result_of(process)
        assert schema_of(url) == reference


def test_rows_of_tables_that_are_not_recorded_as_migrated_are_kept(mysql_database_url):
    run = new_run()
    create_storage_backend(mysql_database_url).runs.add(run)
    alias = create_storage_backend(mysql_database_url).runs.alias
    with connections[alias].cursor() as cursor:
        cursor.execute("DELETE FROM django_migrations")
    forget(alias)

    backend = create_storage_backend(mysql_database_url)
    assert backend.runs.get(run.id) is not None
    forget(backend.runs.alias)


def test_a_table_of_something_else_is_left_alone(mysql_database_url):
    import MySQLdb

    parts = urlsplit(mysql_database_url)
    server = MySQLdb.connect(
        host=parts.hostname, port=parts.port, user=parts.username, db=parts.path.lstrip("/")
    )
    server.cursor().execute("CREATE TABLE workflow_runs (id int)")

    with pytest.raises(StorageError, match="'workflow_runs' already, and it is not one of"):
        create_storage_backend(mysql_database_url)

    cursor = server.cursor()
    cursor.execute("SHOW TABLES")
    assert ("execution_states",) not in cursor.fetchall()
    cursor.execute("DESCRIBE workflow_runs")
    assert len(cursor.fetchall()) == 1
    server.close()


@pytest.fixture
def mysql_database_url(django_db_blocker):
    """The URL of a new database on MariaDB."""
    with django_db_blocker.unblock(), mysql_database() as url:
        yield url

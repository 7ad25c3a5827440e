"""Fixtures for every test: stores on real servers, empty for each test."""

import functools
import uuid

import pytest
from django.db import connections

from tests.servers import delete_keys, mysql_database, postgres_database, redis_cluster, redis_keys
from workflow_storage import StorageBackend, create_storage_backend
from workflow_storage.backends import memory
from workflow_storage.factory import forget
from workflow_storage.models import (
    ExecutionState,
    WorkflowRun,
    WorkflowRunAttempt,
    WorkflowRunLabel,
)


def pytest_terminal_summary(terminalreporter):
    """Say by name which backends were not tested, and how to enable them."""
    reasons = {
        report.longrepr[2].removeprefix("Skipped: ")
        for report in terminalreporter.stats.get("skipped", [])
        if isinstance(report.longrepr, tuple) and "to enable it" in report.longrepr[2]
    }
    if reasons:
        terminalreporter.section("backends that were skipped")
        for reason in sorted(reasons):
            terminalreporter.write_line(reason)


@pytest.fixture(scope="session")
def sqlite_url(tmp_path_factory, django_db_blocker):
    yield from _ready(
        f"sqlite:///{tmp_path_factory.mktemp('sqlite') / 'workflows.db'}", django_db_blocker
    )


@pytest.fixture(scope="session")
def postgres_url(django_db_blocker):
    with postgres_database() as url:
        yield from _ready(url, django_db_blocker)


@pytest.fixture(scope="session")
def mysql_url(django_db_blocker):
    with mysql_database() as url:
        yield from _ready(url, django_db_blocker)


@pytest.fixture(scope="session")
def redis_url():
    with redis_keys() as url:
        yield url
        create_storage_backend(url).runs.store.close()


@pytest.fixture(scope="session")
def redis_cluster_url():
    with redis_cluster() as servers:
        yield servers.url
        create_storage_backend(servers.url).runs.store.close()


def _ready(url, django_db_blocker):
    """Let the tests reach a database that is none of DATABASES, and close it in the end."""
    with django_db_blocker.unblock():
        alias = create_storage_backend(url).runs.alias
        yield url
        forget(alias)


@pytest.fixture(params=["sqlite", "postgres", "mysql"])
def sql_url(request):
    """The URL of each SQL database in turn."""
    return request.getfixturevalue(f"{request.param}_url")


@pytest.fixture
def sql_backend(sql_url, django_db_blocker):
    """An empty store on each SQL database in turn."""
    yield from emptied(sql_url, django_db_blocker)


@pytest.fixture
def backend(open_backend, django_db_blocker):
    """An empty store, for the classes that say which with a fixture open_backend."""
    yield from emptied(open_backend.args[0], django_db_blocker)


@pytest.fixture
def memory_url():
    url = f"memory://{uuid.uuid4().hex}"
    yield url
    memory.forget(url)


SHARED = ["sqlite", "postgres", "mysql", "redis", "redis_cluster"]


@pytest.fixture(params=SHARED)
def any_url(request):
    """The URL of each backend in turn that processes share."""
    return request.getfixturevalue(f"{request.param}_url")


@pytest.fixture(params=[*SHARED, "memory"])
def every_url(request):
    """The URL of each backend in turn."""
    return request.getfixturevalue(f"{request.param}_url")


@pytest.fixture
def every_backend(every_url, django_db_blocker):
    """An empty store on each backend in turn."""
    yield from emptied(every_url, django_db_blocker)


@pytest.fixture
def any_backend(any_url, django_db_blocker):
    """An empty store on each backend in turn that processes share."""
    yield from emptied(any_url, django_db_blocker)


def emptied(url, django_db_blocker) -> StorageBackend:
    with django_db_blocker.unblock():
        backend = create_storage_backend(url)
        empty(backend)
        yield backend


def empty(backend: StorageBackend) -> None:
    """Empty a store past its repositories."""
    if backend.name.startswith("memory://"):
        return  # each test has one of its own
    store = getattr(backend.runs, "store", None)
    if store is not None:
        for server in store.servers():
            delete_keys(server, store.prefix)
        return
    alias = backend.runs.alias
    connections[alias].close_if_unusable_or_obsolete()
    with connections[alias].cursor() as cursor:  # a queryset would read what it deletes
        for model in (WorkflowRunLabel, WorkflowRunAttempt, ExecutionState, WorkflowRun):
            cursor.execute(f"DELETE FROM {model._meta.db_table}")


def opener(url: str):
    return functools.partial(create_storage_backend, url)

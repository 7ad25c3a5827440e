"""Fixtures for every test: stores on real servers, empty for each test."""

import functools

import pytest
from django.db import connections

from tests.servers import mysql_database, postgres_database
from workflow_storage import StorageBackend, create_storage_backend
from workflow_storage.factory import forget
from workflow_storage.models import ExecutionState, WorkflowRun


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


def emptied(url, django_db_blocker) -> StorageBackend:
    with django_db_blocker.unblock():
        backend = create_storage_backend(url)
        empty(backend.runs.alias)
        yield backend
        empty(backend.runs.alias)


def empty(alias: str) -> None:
    connections[alias].close_if_unusable_or_obsolete()
    ExecutionState.objects.using(alias).all().delete()
    WorkflowRun.objects.using(alias).all()._raw_delete(alias)


def opener(url: str):
    return functools.partial(create_storage_backend, url)

"""Savers on every database, and graphs with scripted nodes."""

import pytest
from django.db import connections

from tests.conftest import empty
from workflow_storage import create_storage_backend
from workflow_storage.contrib.langgraph import DjangoSaver
from workflow_storage.contrib.langgraph.models import (
    ChannelBlob,
    CheckpointWrite,
    GraphCheckpoint,
    ThreadNamespace,
)


def graph_backend(url, django_db_blocker):
    """Yield the store at a URL, with all tables empty."""
    with django_db_blocker.unblock():
        backend = create_storage_backend(url)
        empty(backend)
        with connections[backend.alias].cursor() as cursor:
            for model in (CheckpointWrite, ChannelBlob, GraphCheckpoint, ThreadNamespace):
                cursor.execute(f"DELETE FROM {model._meta.db_table}")
        yield backend


@pytest.fixture
def sqlite_store(sqlite_url, django_db_blocker):
    """A store on SQLite."""
    yield from graph_backend(sqlite_url, django_db_blocker)


@pytest.fixture
def graph_store(sql_url, django_db_blocker):
    """A store on each SQL database in turn."""
    yield from graph_backend(sql_url, django_db_blocker)


@pytest.fixture
def saver(graph_store):
    """A saver on each SQL database in turn."""
    return DjangoSaver(graph_store)

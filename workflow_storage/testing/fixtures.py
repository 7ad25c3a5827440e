"""Fixtures for the tests of a project; in its conftest.py, import those that it uses."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

import pytest
from django.test import override_settings

from workflow_storage.backends import memory
from workflow_storage.factory import create_storage_backend

if TYPE_CHECKING:
    from collections.abc import Iterator

    from workflow_storage.base import StorageBackend


@pytest.fixture
def memory_storage() -> Iterator[StorageBackend]:
    """Let the project's own store be an empty one in memory, and yield it: no database is needed."""
    url = f"memory://{uuid.uuid4().hex}"
    with override_settings(WORKFLOW_STORAGE=url):
        yield create_storage_backend()
    memory.forget(url)

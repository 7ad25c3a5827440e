"""The contract on every SQL database that we support."""

import pytest

from tests.conftest import opener
from workflow_storage.testing import StorageContract


class TestSQLite(StorageContract):
    @pytest.fixture
    def open_backend(self, sqlite_url):
        return opener(sqlite_url)


class TestPostgreSQL(StorageContract):
    @pytest.fixture
    def open_backend(self, postgres_url):
        return opener(postgres_url)


class TestMariaDB(StorageContract):
    @pytest.fixture
    def open_backend(self, mysql_url):
        return opener(mysql_url)

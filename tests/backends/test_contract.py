"""The contract on every backend that we support."""

import pytest

from tests.conftest import opener
from workflow_storage import create_storage_backend
from workflow_storage.testing import StorageContract


class TestSQLite(StorageContract):
    @pytest.fixture
    def open_backend(self, sqlite_url):
        return opener(sqlite_url)


class TestPostgreSQL(StorageContract):
    @pytest.fixture
    def open_backend(self, postgres_url):
        return opener(postgres_url)


@pytest.mark.slow
class TestPostgreSQLWithPreparedStatements(StorageContract):
    """As the README suggests for speed."""

    @pytest.fixture
    def open_backend(self, postgres_url):
        return opener(f"{postgres_url}?server_side_binding=true&prepare_threshold=5")


@pytest.mark.slow
class TestMariaDB(StorageContract):
    @pytest.fixture
    def open_backend(self, mysql_url):
        return opener(mysql_url)


class TestRedis(StorageContract):
    @pytest.fixture
    def open_backend(self, redis_url):
        return opener(redis_url)


@pytest.mark.slow
class TestRedisCluster(StorageContract):
    @pytest.fixture
    def open_backend(self, redis_cluster_url):
        return opener(redis_cluster_url)


class TestMemory(StorageContract):
    # No other process sees this store.
    test_concurrent_states_of_one_run_from_processes_are_all_kept = None
    test_no_two_processes_hold_the_same_attempt = None

    @pytest.fixture
    def backend(self, memory_url):
        return create_storage_backend(memory_url)

"""Fixtures for the tests of Redis: a server, a cluster, and a server of one's own."""

import pytest

from tests.conftest import emptied
from tests.servers import RedisServers


@pytest.fixture(params=["redis", "redis_cluster"])
def url(request):
    return request.getfixturevalue(f"{request.param}_url")


@pytest.fixture
def backend(url, django_db_blocker):
    yield from emptied(url, django_db_blocker)


@pytest.fixture
def server(tmp_path):
    """A server of our own, which can be stopped and started."""
    with RedisServers(tmp_path, 1, "--appendonly", "yes", "--appendfsync", "always") as servers:
        servers.url = f"redis://127.0.0.1:{servers.ports[0]}"
        yield servers

"""What a Redis user has to be allowed, and that nothing is half-written where it is not."""

import asyncio
import functools
import re
from pathlib import Path

import pytest

import workflow_storage.backends
from tests.servers import RedisServers
from workflow_storage import StorageError
from workflow_storage.backends.redis import open_redis, scripts
from workflow_storage.backends.redis.permissions import COMMANDS, COMMANDS_OF_CLUSTERS
from workflow_storage.testing import StorageContract, new_run, stored_run


def allow(client, *commands, keys="~{workflow_storage}*"):
    """Let a user run some commands, and no others."""
    grants = [f"+{command.lower()}" for command in commands]
    client.execute_command(
        "ACL", "SETUSER", "app", "reset", "on", ">hush-hush", keys, "-@all", *grants
    )


def url_of(server, scheme="redis", **parameters):
    query = "&".join(f"{name}={value}" for name, value in parameters.items())
    return f"{scheme}://app:hush-hush@127.0.0.1:{server.ports[0]}?{query}"


@pytest.fixture
def client(server):
    client = server.client(server.ports[0])
    yield client
    client.close()


def test_each_command_of_each_script_is_tried_out():
    sources = [
        value.source for value in vars(scripts).values() if isinstance(value, scripts.Script)
    ]
    assert len(sources) > 10
    called = {name for source in sources for name in re.findall(r"call\('(\w+)'", source)}
    assert called <= {*COMMANDS}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_a_user_who_lacks_a_command_writes_nothing_and_is_told(server, client, command, is_async):
    allow(client, *(one for one in COMMANDS if one != command))
    backend = open_redis(url_of(server))

    for _ in range(2):
        with pytest.raises(StorageError) as error:
            if is_async:
                asyncio.run(backend.runs.aadd(new_run()))
            else:
                backend.runs.add(new_run())
        assert command.lower() in str(error.value).lower()
        assert "hush" not in str(error.value)

    assert client.dbsize() == 0
    backend.close()


def test_several_that_are_missing_are_named_with_what_allows_them(server, client):
    allow(client, *(one for one in COMMANDS if one not in {"HDEL", "ZREM"}))
    backend = open_redis(url_of(server))
    with pytest.raises(StorageError, match=r"HDEL, ZREM.*ACL SETUSER app \+hdel \+zrem$"):
        backend.runs.get("x")
    client.execute_command("ACL", "SETUSER", "app", "+hdel", "+zrem")

    assert stored_run(backend) is not None
    backend.close()


def test_keys_of_another_prefix_are_refused(server, client):
    allow(client, *COMMANDS, keys="~{other}*")
    backend = open_redis(url_of(server))
    with pytest.raises(StorageError, match="refused the operation"):
        backend.runs.add(new_run())
    assert client.dbsize() == 0
    backend.close()


def test_wait_replicas_without_wait_is_refused_before_anything_is_written(server, client):
    allow(client, *COMMANDS)
    backend = open_redis(url_of(server, wait_replicas=1))
    with pytest.raises(StorageError, match=r"may not run WAIT: wait_replicas needs that.*\+wait$"):
        backend.runs.add(new_run())
    assert client.dbsize() == 0
    backend.close()


@pytest.mark.slow
def test_in_a_cluster_each_master_is_looked_at(tmp_path):
    with RedisServers(tmp_path, 3, "--cluster-enabled", "yes") as servers:
        servers.make_cluster(3)
        clients = [servers.client(port) for port in servers.ports]
        for client in clients:
            allow(client, *COMMANDS, *COMMANDS_OF_CLUSTERS, keys="~{workflow_storage:*")
        url = url_of(servers, "redis+cluster")
        backend = open_redis(url)
        assert stored_run(backend) is not None
        backend.close()

        clients[2].execute_command("ACL", "SETUSER", "app", "-zadd")
        backend = open_redis(url)
        with pytest.raises(StorageError, match="may not run ZADD"):
            backend.runs.get("x")
        backend.close()


def test_the_readme_lists_what_has_to_be_allowed():
    text = (Path(workflow_storage.backends.__file__).parent / "README.md").read_text()
    (listed,) = re.findall(r"ACL SETUSER app on >PASSWORD ~\{workflow_storage\*(.*)", text)

    assert listed.split() == ["-@all", *(f"+{command.lower()}" for command in COMMANDS)]


@pytest.fixture(scope="module")
def limited_server(tmp_path_factory):
    with RedisServers(tmp_path_factory.mktemp("limited"), 1) as servers:
        allow(servers.client(servers.ports[0]), *COMMANDS)
        yield servers


@pytest.mark.slow
class TestWithNoMorePermissionsThanListed(StorageContract):
    @pytest.fixture
    def open_backend(self, limited_server):
        return functools.partial(open_redis, url_of(limited_server))

    @pytest.fixture
    def backend(self, limited_server, open_backend):
        limited_server.client(limited_server.ports[0]).flushall()
        backend = open_backend()
        yield backend
        backend.close()

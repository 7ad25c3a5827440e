"""Servers that do not answer, or not as they should, in errors of the contract."""

import asyncio
import contextlib
import random
import socket

import pytest

from tests.backends.redis.keys import assert_indexes_agree
from tests.servers import RedisServers, wait_until
from workflow_storage import (
    StorageError,
    StorageUnavailableError,
    create_storage_backend,
)
from workflow_storage.backends.redis import (
    open_redis,
)
from workflow_storage.testing import new_run, stored_run


def test_a_server_that_is_down_is_unavailable_sync_and_async():
    for url in ("redis://127.0.0.1:1", "redis+cluster://127.0.0.1:1,127.0.0.1:2"):
        runs = create_storage_backend(url).runs
        with pytest.raises(StorageUnavailableError, match=r"[^.]\. Check that the server runs"):
            runs.get("x")
        with pytest.raises(StorageUnavailableError, match="Check that the server runs"):
            asyncio.run(runs.aget("x"))


def test_the_url_of_a_cluster_for_a_server_that_is_none_says_so(server):
    url = server.url.replace("redis://", "redis+cluster://")
    with pytest.raises(StorageError, match=r"is no cluster\. Use a URL that begins with redis:"):
        create_storage_backend(url).runs.get("x")


def test_a_node_of_a_cluster_says_which_url_to_use(redis_cluster_url):
    node = redis_cluster_url.replace("redis+cluster", "redis").partition(",")[0]
    backend = create_storage_backend(node)
    prefixes = iter(range(100))
    with pytest.raises(StorageError, match="begins with redis\\+cluster://"):
        while True:
            open_redis(f"{node}?prefix=p{next(prefixes)}").runs.get("x")
    backend.runs.store.close()


def test_a_server_that_is_full_or_read_only_is_unavailable(server):
    backend = create_storage_backend(server.url)
    run = stored_run(backend)
    client = server.client(server.ports[0])
    client.config_set("maxmemory", "1")
    for call in (
        lambda: backend.states.save_state(run.id, {}, "node"),
        lambda: backend.runs.add(new_run()),
        lambda: backend.runs.update_status(run.id, "completed"),
    ):
        with pytest.raises(StorageUnavailableError, match="Raise maxmemory"):
            call()
    assert_indexes_agree(backend)
    client.config_set("maxmemory", "0")
    client.replicaof("127.0.0.1", "1")
    with pytest.raises(StorageUnavailableError, match=r"READONLY|read only"):
        backend.runs.heartbeat(run.id)
    client.replicaof("NO", "ONE")
    backend.runs.heartbeat(run.id)
    assert backend.states.get_state_history(run.id) == []
    backend.runs.store.close()


@pytest.fixture
def start(tmp_path):
    """Start servers of our own with some options, and give each with its URL."""
    started = []

    def start(*options, count=1):
        folder = tmp_path / str(len(started))
        folder.mkdir()
        servers = RedisServers(folder, count, *options)
        started.append(servers)
        servers.__enter__()
        servers.url = f"redis://127.0.0.1:{servers.ports[0]}"
        return servers

    yield start
    for servers in started:
        servers.__exit__()


def is_old(servers):
    """Whether they are Redis 6.2."""
    return servers.client(servers.ports[0]).info("server")["redis_version"].startswith("6.")


def refused(url, match, error=StorageUnavailableError):
    """What a store says, which has to be the same for sync and async."""
    backend = create_storage_backend(url)
    for call in (
        lambda: backend.runs.add(new_run()),
        lambda: asyncio.run(backend.runs.aadd(new_run())),
    ):
        with pytest.raises(error, match=match) as caught:
            call()
    backend.close()
    return caught.value


def test_a_wrong_password_says_to_check_it(start):
    servers = start()
    servers.client(servers.ports[0]).config_set("requirepass", "hush-hush")
    url = servers.url.replace("redis://", "redis://:wrong-one@")

    for one in (servers.url, url):
        error = refused(one, "Check the user and the password in the URL")
        assert "wrong-one" not in str(error)
    assert stored_run(create_storage_backend(url.replace("wrong-one", "hush-hush")))


def test_a_server_that_cannot_save_says_so(start, tmp_path):
    servers = start()
    client = servers.client(servers.ports[0])
    (servers.folder / str(servers.ports[0]) / "dump.rdb").mkdir()
    client.config_set("save", "3600 1")
    client.set("x", 1)
    client.execute_command("BGSAVE")
    wait_until(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err")

    refused(servers.url, "MISCONF.*make room there|make room there")


def test_a_server_without_its_replicas_says_so(start):
    servers = start("--min-replicas-to-write", "1")
    if is_old(servers):
        return  # it does not look at them for scripts
    refused(servers.url, "min-replicas-to-write")


def test_a_server_that_is_loading_says_to_wait(start):
    servers = start()
    port = servers.ports[0]
    client = servers.client(port)
    if is_old(servers):
        return  # it cannot be made to load slowly
    client.mset({f"key{number}": "x" * 100 for number in range(6000)})
    client.save()
    servers.kill(port)
    delays = ("--key-load-delay", "5000", "--loading-process-events-interval-bytes", "1024")
    servers.options = (*servers.options, *delays)
    servers.start(port)

    wait_until(lambda: loads(port))
    refused(servers.url, "try again in a moment")


def loads(port):
    """Whether a server is loading; redis-py would wait until it is not."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"GET x\r\n")
        return connection.recv(100).startswith(b"-LOADING")
    return False


def test_a_value_that_is_too_large_says_what_to_raise(start):
    servers = start("--proto-max-bulk-len", "1mb")
    backend = create_storage_backend(servers.url)
    run = stored_run(backend)
    noise = random.Random(1).randbytes(2**21).hex()
    with pytest.raises(StorageError, match=r"[rR]aise proto-max-bulk-len"):
        backend.states.save_state(run.id, {"x": noise}, "node")
    assert backend.states.save_state(run.id, {}, "node") == 0
    backend.close()

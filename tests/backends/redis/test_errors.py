"""Servers that do not answer, or not as they should, in errors of the contract."""

import asyncio

import pytest

from tests.backends.redis.keys import assert_indexes_agree
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

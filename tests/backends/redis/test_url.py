"""What a URL says, what is refused in one, and that it shows no password."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest
import redis

from tests.conftest import emptied
from tests.servers import RedisServers
from workflow_storage import (
    StorageError,
    UnsupportedBackendError,
    create_storage_backend,
)
from workflow_storage.backends.redis import (
    open_redis,
)
from workflow_storage.backends.redis.connection import RedisStore
from workflow_storage.backends.redis.url import RedisURL
from workflow_storage.testing import stored_run


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("redis://host/0?prefix={x}", "prefix takes letters"),
        ("redis://host/0?prefix=", "prefix takes letters"),
        ("redis://host/0?unknown=1", "a parameter is unknown"),
        ("redis://host/0?socket_timeout=soon", "socket_timeout"),
        ("redis://host/0?wait_replicas=some", "wait_replicas is no number"),
        ("redis://host/0?wait_replicas=1.5", "wait_replicas is no number"),
        ("redis://host/0?wait_replicas=1&wait_timeout=20", "less than socket_timeout"),
        ("redis://host/0?wait_timeout=0", "wait_timeout is 0"),
        ("redis://host/0?max_connections=-1", "max_connections"),
        ("redis://host:port/0", "a host, or its port"),
        ("redis://a..b:1/0", "a host, or its port"),
        ("redis://[one:6379/0", "a host, or its port"),
        *(
            (f"redis://host/0?{name}=x", "a parameter is unknown")
            for name in ("encoding", "retry", "credential_provider", "redis_connect_func")
        ),
        ("redis://host:6379/name", "number of a database"),
        *(
            (f"redis://host/0?{name}={value}", f"{name} takes seconds from")
            for name in ("socket_timeout", "socket_connect_timeout", "timeout")
            for value in ("-1", "nan", "inf", "1e20")
        ),
        ("redis://host/0?socket_timeout=0", "socket_timeout takes seconds from"),
        ("redis://host/0?prefix=one&prefix=two", "a parameter is there twice"),
        ("redis://one:6379,two:6379/0", "several nodes need redis.cluster://"),
        ("redis+cluster://", "a node has no host"),
        ("redis+cluster://one:7000,:7001", "a node has no host"),
        ("redis+cluster://one:7000/3", "no numbered databases"),
    ],
)
def test_a_url_that_cannot_be_used_says_why(url, message):
    with pytest.raises(UnsupportedBackendError, match=message):
        create_storage_backend(url)


@pytest.mark.parametrize(
    "url",
    [
        "redis://me:hushhush@127.0.0.1:1/0",
        "rediss://:hushhush@127.0.0.1:1/0",
        "redis+cluster://me:hushhush@127.0.0.1:1,127.0.0.1:2",
        "redis://127.0.0.1:1/0?password=hushhush",
        "redis://me:hush/hush@127.0.0.1/0",
        "redis://me:hush@127.0.0.1:1/0?unknown=hush",
        "redis://:12345#hush@127.0.0.1:1/0",
        "redis://me:hush\N{ACCOUNT OF}@127.0.0.1:1/0",
        "redis://me:12?hush=x@127.0.0.1:1/0",
        "redis+cluster://me:hush@127.0.0.1:1,me:hush@127.0.0.1:2",
    ],
)
def test_a_password_is_in_no_error_and_no_repr(url):
    with pytest.raises(StorageError) as caught:
        print(repr(create_storage_backend(url)))
        create_storage_backend(url).runs.get("x")

    assert "hush" not in str(caught.value)


@pytest.mark.parametrize("scheme", ["redis", "valkey"])
def test_a_server_or_a_cluster_may_be_called_valkey(scheme, redis_url, redis_cluster_url):
    for url in (redis_url, redis_cluster_url):
        backend = create_storage_backend(url.replace("redis", scheme, 1))
        run = stored_run(backend)
        assert create_storage_backend(url).runs.get(run.id) is not None
        backend.runs.delete(run.id)
        backend.close()


def test_valkeys_is_valkey_with_tls():
    for scheme in ("valkeys", "valkeys+cluster"):
        store = RedisStore(RedisURL.parse(f"{scheme}://h:1"))
        connection = store.client(("h", 1)).connection_pool.make_connection()
        assert isinstance(connection, redis.SSLConnection)


def test_sentinels_have_a_port_of_their_own_and_the_tls_of_the_servers():
    url = RedisURL.parse(
        "rediss+sentinel://u:p@one,two:7/a%20b/3?sentinel_username=su&sentinel_password=sp"
    )
    assert url.nodes == (("one", 26379), ("two", 7))
    assert url.master == "a b"
    store = RedisStore(url)
    of_sentinel = store.client(("two", 7)).connection_pool
    of_server = store.client(("elsewhere", 6379)).connection_pool
    assert isinstance(of_sentinel.make_connection(), redis.SSLConnection)
    options = [pool.connection_kwargs for pool in (of_sentinel, of_server)]
    assert [(one["username"], one["password"], one.get("db")) for one in options] == [
        ("su", "sp", None),
        ("u", "p", 3),
    ]
    assert (options[1]["host"], options[1]["port"]) == ("elsewhere", 6379)


def test_parameters_reach_redis_py():
    store = RedisStore(
        RedisURL.parse("rediss://u:p%40@h:7000/2?prefix=a.b:c&socket_timeout=3&wait_replicas=2")
    )
    options = store.client(store.url.nodes[0]).connection_pool.connection_kwargs
    assert (store.prefix, store.wait_replicas, store.key_prefixes) == ("a.b:c", 2, ["{a.b:c}"])
    assert (options["host"], options["port"], options["db"]) == ("h", 7000, 2)
    assert (options["username"], options["password"]) == ("u", "p@")
    assert options["socket_timeout"] == 3.0
    store = RedisStore(RedisURL.parse("rediss+cluster://u:p@h:7000,h2?prefix=x"))
    assert list(store.url.nodes) == [("h", 7000), ("h2", 6379)]
    connection = store.client(("h2", 6379)).connection_pool.make_connection()
    assert isinstance(connection, redis.SSLConnection)


def test_a_unix_socket_is_a_server_too(tmp_path):
    socket = tmp_path / "redis.sock"
    with RedisServers(tmp_path, 1, "--unixsocket", str(socket)):
        backend = create_storage_backend(f"unix://{socket}?db=1")
        run = stored_run(backend)
        assert backend.runs.get(run.id).id == run.id

        async def read():
            return (await backend.runs.aget(run.id)).id

        assert asyncio.run(read()) == run.id
        backend.runs.store.close()


def test_prefixes_are_stores_of_their_own(redis_url, django_db_blocker):
    for one in emptied(redis_url, django_db_blocker):
        run = stored_run(one)
        other = open_redis(f"{redis_url}-other")
        assert other.runs.get(run.id) is None
        assert other.runs.count_runs() == 0
        other.runs.store.close()


def test_without_redis_py_the_error_says_what_to_install(tmp_path):
    (tmp_path / "redis.py").write_text("raise ImportError('no redis here')")
    script = (
        "from workflow_storage import create_storage_backend\n"
        "create_storage_backend('redis://127.0.0.1')"
    )
    environment = {name: value for name, value in os.environ.items() if "DJANGO" not in name}
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[3])])

    result = subprocess.run(
        [sys.executable, "-c", script],
        env={**environment, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )

    assert "pip install 'django-workflow-storage[redis]'" in result.stderr

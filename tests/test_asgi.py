"""Recording in a live ASGI server: every request its own run, and no connection is leaked."""

import asyncio
import os
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

from tests.servers import RedisServers, postgres_database, wait_until
from workflow_storage import create_storage_backend
from workflow_storage.factory import forget

REQUESTS = 500


async def get(port, number):
    """Send a request, and give its status."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET /{number} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
    await writer.drain()
    response = await asyncio.wait_for(reader.read(), timeout=120)
    writer.close()
    return int(response.split()[1])


async def all_at_once(port, count):
    return await asyncio.gather(*(get(port, number) for number in range(count)))


@contextmanager
def site(url):
    """Serve the site, with its runs in a store, and give its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "uvicorn", "tests.asgi_site:application", f"--port={port}"],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "STORAGE_URL": url},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        for line in server.stderr:
            if "running on" in line:
                break
        else:
            raise AssertionError("the server did not start")
        # Read on, so that the server never waits for its log to be read.
        log = subprocess.Popen(["cat"], stdin=server.stderr, stdout=subprocess.DEVNULL)
        yield port
    finally:
        server.terminate()
        server.wait(timeout=30)
        log.wait(timeout=30)


def send_requests(port):
    statuses = asyncio.run(all_at_once(port, REQUESTS))
    assert statuses.count(200) == REQUESTS * 9 // 10
    assert statuses.count(500) == REQUESTS // 10


def assert_recorded(backend):
    runs, states = backend
    assert runs.count_runs(status="completed") == (REQUESTS + 10) * 9 // 10
    assert runs.count_runs(status="failed") == (REQUESTS + 10) // 10
    for run in runs.iter_runs(status="completed"):
        assert run.outputs == run.inputs
        assert states.get_latest_state(run.id) == {"number": run.inputs, "step": 2}


@pytest.mark.slow
def test_500_requests_at_once_leak_no_connection(django_db_blocker):
    with postgres_database() as url:
        with site(url) as port:
            send_requests(port)
            with psycopg.connect(url, autocommit=True) as connection:
                count = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
                wait_until(
                    lambda: connection.execute(f"{count} AND state <> 'idle'").fetchone()[0] <= 1
                )
                assert connection.execute(count).fetchone()[0] <= 8 + 1
            assert asyncio.run(all_at_once(port, 10)).count(200) == 9

        with django_db_blocker.unblock():
            backend = create_storage_backend(url)
            assert_recorded(backend)
            forget(backend.runs.alias)


@pytest.mark.slow
def test_500_requests_at_once_share_a_few_connections_to_redis(tmp_path):
    with RedisServers(tmp_path, 1) as servers:
        url = f"redis://127.0.0.1:{servers.ports[0]}/0?prefix=asgi"
        client = servers.client(servers.ports[0])
        with site(url) as port:
            send_requests(port)
            # Those of the event loop, of the threads that send signals, and this one.
            assert client.info("clients")["connected_clients"] <= 8 + 8 + 3
            assert asyncio.run(all_at_once(port, 10)).count(200) == 9
        backend = create_storage_backend(url)
        assert_recorded(backend)
        backend.runs.store.close()

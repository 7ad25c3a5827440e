"""Connections: lost ones, those of threads, those of tasks and event loops."""

import asyncio

import pytest

from tests.servers import wait_until
from workflow_storage import (
    StorageUnavailableError,
    create_storage_backend,
)
from workflow_storage.testing import changed_state, in_threads, new_run, stored_run


def test_a_server_that_stops_is_unavailable_and_serves_again(server):
    backend = create_storage_backend(server.url)
    run = stored_run(backend)
    writer = backend.states.writer(run.id)
    state = changed_state({}, "grow", 9000)
    writer.save_state(state, "before")
    server.kill(server.ports[0])
    for call in (
        lambda: backend.runs.get(run.id),
        backend.runs.list_runs,
        lambda: writer.save_state(state, "lost"),
        lambda: list(backend.states.iter_state_history(run.id)),
    ):
        with pytest.raises(StorageUnavailableError):
            call()

    server.start(server.ports[0])
    server.client(server.ports[0])

    # The scripts are gone from the new process, too.
    assert writer.save_state(state, "after") == 1
    nodes = [one["node_id"] for one in backend.states.get_state_history(run.id)]
    assert nodes == ["before", "after"]
    backend.runs.store.close()


def test_no_cancellation_is_lost(redis_url):
    backend = create_storage_backend(redis_url)

    async def use(delay):
        run = new_run()

        async def work():
            await backend.runs.aadd(run)
            while True:
                await backend.runs.aheartbeat(run.id)

        task = asyncio.create_task(work())
        await asyncio.sleep(delay)
        task.cancel()
        done, _ = await asyncio.wait([task], timeout=5)
        assert done
        assert task.cancelled()

    for number in range(40):
        asyncio.run(use(0.0003 * number))


def test_connections_are_closed_with_their_event_loop(server):
    backend = create_storage_backend(server.url)
    client = server.client(server.ports[0])

    async def use():
        await asyncio.gather(*(backend.runs.aadd(new_run()) for _ in range(20)))
        return client.info("clients")["connected_clients"]

    before = client.info("clients")["connected_clients"]
    assert asyncio.run(use()) > before
    wait_until(lambda: client.info("clients")["connected_clients"] <= before)
    asyncio.run(use())
    wait_until(lambda: client.info("clients")["connected_clients"] <= before)


def test_many_tasks_and_threads_share_a_few_connections(server):
    backend = create_storage_backend(f"{server.url}?max_connections=3")
    client = server.client(server.ports[0])

    async def use():
        await asyncio.gather(*(backend.runs.aadd(new_run()) for _ in range(200)))

    asyncio.run(use())
    in_threads(20, lambda _: backend.runs.add(new_run()))

    assert backend.runs.count_runs() == 220
    assert client.info("clients")["connected_clients"] <= 4 + 3
    backend.runs.store.close()

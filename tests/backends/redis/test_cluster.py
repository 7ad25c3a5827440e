"""Clusters: replicas, nodes that hang and stop, failovers, slots that move."""

import asyncio
import os
import random
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis
from django.utils import timezone
from redis.crc import key_slot

from tests.backends.redis.keys import assert_indexes_agree
from tests.servers import RedisServers, redis_cluster, wait_until
from workflow_storage import (
    RunAlreadyExistsError,
    RunNotFoundError,
    RunStatus,
    StatusConflictError,
    StorageError,
    StorageUnavailableError,
    create_storage_backend,
)
from workflow_storage.backends.redis import (
    open_redis,
)
from workflow_storage.backends.redis.connection import RedisStore
from workflow_storage.backends.redis.url import RedisURL
from workflow_storage.testing import in_threads, new_run, stored_run

pytestmark = pytest.mark.slow


def test_the_slots_are_spread_evenly_over_a_cluster():
    for prefix in ("workflow_storage", "a", "staging.eu:west-1"):
        store = RedisStore(RedisURL.parse(f"redis+cluster://h:1?prefix={prefix}"))
        parts = [key_slot(one.encode()) * 16 // 16384 for one in store.key_prefixes]
        assert parts == list(range(16))


def test_waiting_for_a_replica_that_is_not_there_says_so(server):
    for call in ("sync", "async"):
        backend = open_redis(f"{server.url}?wait_replicas=1&wait_timeout=0.2")
        with pytest.raises(StorageUnavailableError, match="0 of 1 replicas confirmed"):
            if call == "sync":
                backend.runs.add(new_run())
            else:
                asyncio.run(backend.runs.aadd(new_run()))
        (run,) = backend.runs.list_runs()
        with pytest.raises(RunAlreadyExistsError):
            backend.runs.add(run)
        with pytest.raises(StatusConflictError):
            backend.runs.update_status(run.id, "failed", expected="running")
        with pytest.raises(RunNotFoundError):
            backend.runs.delete("gone")
        server.client(server.ports[0]).flushall()
        backend.runs.store.close()


def test_a_node_that_has_not_joined_the_cluster_does_no_harm(tmp_path):
    with (
        redis_cluster() as servers,
        RedisServers(tmp_path, 1, "--cluster-enabled", "yes") as others,
    ):
        nodes = servers.url.removeprefix("redis+cluster://")
        backend = create_storage_backend(f"redis+cluster://127.0.0.1:{others.ports[0]},{nodes}")
        runs = [stored_run(backend) for _ in range(8)]
        assert len(backend.runs.list_runs()) == len(runs)

        alone = create_storage_backend(f"redis+cluster://127.0.0.1:{others.ports[0]}")
        with pytest.raises(StorageUnavailableError, match="no node of the cluster serves"):
            alone.runs.get("x")

        for store in (backend, alone):
            store.runs.store.close()


def test_threads_find_their_nodes_while_another_forgets_them():
    with redis_cluster() as servers:
        backend = create_storage_backend(servers.url)
        store = backend.runs.store
        runs = [stored_run(backend) for _ in range(16)]
        done = threading.Event()

        def forget():
            while not done.is_set():
                for port in servers.ports:
                    store.cluster.forget(("127.0.0.1", port))

        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            with ThreadPoolExecutor(5) as pool:
                forgetting = pool.submit(forget)
                reading = [
                    pool.submit(lambda: [backend.runs.get(run.id) for run in runs * 5])
                    for _ in range(4)
                ]
                try:
                    assert all(all(one.result()) for one in reading)
                finally:
                    done.set()
                forgetting.result()
        finally:
            sys.setswitchinterval(interval)
            store.close()


@pytest.mark.slow
def test_a_node_that_hangs_leaves_the_others_alone():
    with redis_cluster(3, 0, "--cluster-require-full-coverage", "no") as servers:
        backend = create_storage_backend(f"{servers.url}?socket_timeout=0.3")
        runs = [stored_run(backend) for _ in range(24)]
        hung = servers.processes[servers.ports[0]]
        os.kill(hung.pid, signal.SIGSTOP)
        try:
            down = [run for run in runs if not reachable(backend, run)]
            assert 0 < len(down) < 24
            known = set(backend.runs.store.cluster.owners.values())
            assert known == {("127.0.0.1", port) for port in servers.ports[1:]}
        finally:
            os.kill(hung.pid, signal.SIGCONT)
        wait_until(lambda: all(reachable(backend, run) for run in runs))
        backend.runs.store.close()


@pytest.mark.slow
def test_a_node_that_stops_takes_its_slots_with_it_until_it_is_back():
    options = ("--appendonly", "yes", "--appendfsync", "always")
    with redis_cluster(3, 0, *options, "--cluster-require-full-coverage", "no") as servers:
        backend = create_storage_backend(servers.url)
        runs = [stored_run(backend) for _ in range(60)]

        servers.kill(servers.ports[1])

        down = {run.id for run in runs if not reachable(backend, run)}
        assert 0 < len(down) < 60
        with pytest.raises(StorageUnavailableError):
            backend.runs.list_runs()
        up = next(run for run in runs if run.id not in down)
        assert backend.states.save_state(up.id, {}, "node") == 0

        servers.start(servers.ports[1])
        wait_until(lambda: all(reachable(backend, run) for run in runs))
        assert len(backend.runs.list_runs()) == 60
        assert backend.states.save_state(next(iter(down)), {}, "node") == 0
        backend.runs.store.close()


@pytest.mark.slow
def test_a_failover_loses_nothing_that_was_acknowledged():
    # Long enough that a node on a busy machine is not taken for dead.
    with redis_cluster(3, 1, "--cluster-node-timeout", "2500") as servers:
        backend = create_storage_backend(f"{servers.url}?wait_replicas=1")
        runs = [stored_run(backend) for _ in range(24)]
        acknowledged = {run.id: {} for run in runs}
        stop = threading.Event()
        with ThreadPoolExecutor(2) as pool:
            writing = [
                pool.submit(work, backend, acknowledged, stop)
                for work in (write_in_threads, write_in_tasks)
            ]
            wait_until(lambda: sum(map(len, acknowledged.values())) > 200)

            servers.kill(servers.ports[0])
            replica = servers.client(servers.ports[3])
            wait_until(lambda: replica.role()[0] == b"master")
            # It comes back with nothing, as the new replica that the writers wait for.
            servers.start(servers.ports[0])

            before = {run_id: len(steps) for run_id, steps in acknowledged.items()}
            try:
                # Every run is written to again: its slots have a new master.
                wait_until(
                    lambda: all(
                        len(steps) > before[run_id] + 3 for run_id, steps in acknowledged.items()
                    ),
                    90,
                )
            finally:
                stop.set()
            failures = [work.result() for work in writing]

        assert all(failures)
        for run_id, steps in acknowledged.items():
            history = backend.states.get_state_history(run_id)
            stored = {state["step"]: state["state_data"] for state in history}
            assert list(stored) == list(range(len(stored)))
            for step, state in steps.items():
                assert stored[step] == state
        assert len(backend.runs.list_runs()) == 24
        backend.runs.store.close()


@pytest.mark.parametrize("endpoint", ["ip", "unknown-endpoint"])
@pytest.mark.slow
def test_all_goes_on_while_slots_are_moved_to_another_node(endpoint):
    with redis_cluster(3, 0, "--cluster-preferred-endpoint-type", endpoint) as servers:
        backend = create_storage_backend(servers.url)
        runs = [stored_run(backend) for _ in range(32)]
        stop = threading.Event()
        acknowledged = {run.id: {} for run in runs}
        with ThreadPoolExecutor(3) as pool:
            works = [
                pool.submit(work, backend, acknowledged, stop)
                for work in (write_in_threads, write_in_tasks, change_runs)
            ]
            try:
                wait_until(lambda: sum(map(len, acknowledged.values())) > 100)
                for prefix in backend.runs.store.key_prefixes:
                    move_slot(servers, key_slot(prefix.encode()))
            finally:
                stop.set()
            failures = [failure for work in works for failure in work.result()]

        assert failures == []
        for run_id, steps in acknowledged.items():
            assert len(backend.states.get_state_history(run_id)) == len(steps)
        assert_indexes_agree(backend)
        backend.runs.store.close()


def change_runs(backend, acknowledged, stop):
    """Change what the indexes hold, and list it, until told to stop; return the failures."""
    failures = []
    run_ids = list(acknowledged)
    chance = random.Random(2)
    while not stop.is_set():
        try:
            backend.runs.update_status(chance.choice(run_ids), chance.choice(list(RunStatus)))
            extra = stored_run(backend, workflow_name="extra", status="completed")
            assert (
                run_ids
                == [run.id for run in backend.runs.iter_runs(workflow_name="contract")][::-1]
            )
            if chance.random() < 0.5:
                backend.runs.delete(extra.id)
            else:
                backend.runs.delete_finished(before=timezone.now(), workflow_name="extra")
        except (StorageError, AssertionError) as exc:
            failures.append(exc)
    return failures


def reachable(backend, run):
    try:
        return backend.runs.get(run.id) is not None
    except StorageUnavailableError:
        return False


def write_in_threads(backend, acknowledged, stop):
    """Append states until told to stop, noting each that was acknowledged; return the failures."""
    failures = []
    run_ids = list(acknowledged)

    def write(number):
        writers = {run_id: backend.states.writer(run_id) for run_id in run_ids[number::3]}
        count = 0
        while not stop.is_set():
            for run_id, writer in writers.items():
                count += 1
                state = {"count": count, "by": f"thread {number}", "text": "text " * 1500}
                try:
                    acknowledged[run_id][writer.save_state(state, "node")] = state
                except StorageUnavailableError as exc:
                    failures.append(exc)
                    time.sleep(0.02)

    in_threads(3, write)
    return failures


def write_in_tasks(backend, acknowledged, stop):
    failures = []
    run_ids = list(acknowledged)

    async def write(number):
        count = 0
        while not stop.is_set():
            for run_id in run_ids[number::6]:
                count += 1
                state = {"count": count, "by": f"task {number}", "text": "text " * 1500}
                try:
                    step = await backend.states.asave_state(run_id, state, "node")
                    acknowledged[run_id][step] = state
                except StorageUnavailableError as exc:
                    failures.append(exc)
                    await asyncio.sleep(0.02)

    async def write_all():
        await asyncio.gather(*(write(number) for number in range(6)))

    asyncio.run(write_all())
    return failures


def move_slot(servers, slot):
    """Move a slot with its keys to the next node, as ``redis-cli --cluster reshard`` does."""
    clients = [redis.Redis(port=port) for port in servers.ports]
    ids = [client.execute_command("CLUSTER", "MYID").decode() for client in clients]
    for first, last, (_, port, *_), *_ in clients[0].execute_command("CLUSTER", "SLOTS"):
        if first <= slot <= last:
            owner = servers.ports.index(port)
    target = (owner + 1) % len(clients)
    clients[target].execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[owner])
    clients[owner].execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[target])
    while keys := clients[owner].execute_command("CLUSTER", "GETKEYSINSLOT", slot, 5):
        time.sleep(0.005)
        clients[owner].execute_command(
            "MIGRATE", "127.0.0.1", servers.ports[target], "", 0, 5000, "KEYS", *keys
        )
    for client in (clients[target], clients[owner], *clients):
        client.execute_command("CLUSTER", "SETSLOT", slot, "NODE", ids[target])
    for client in clients:
        client.close()

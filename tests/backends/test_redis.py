"""What is special to Redis: its URLs, its keys, killed writers, lost servers, tasks and threads."""

import asyncio
import inspect
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest
import redis
from django.utils import timezone
from redis.crc import key_slot

from tests.conftest import emptied
from tests.servers import RedisServers, redis_cluster, wait_until
from workflow_storage import (
    DamagedStateError,
    RunAlreadyExistsError,
    RunNotFoundError,
    RunStatus,
    StatusConflictError,
    StorageError,
    StorageUnavailableError,
    UnsupportedBackendError,
    create_storage_backend,
)
from workflow_storage.backends.redis import (
    RedisExecutionStateRepository,
    RedisWorkflowRunRepository,
    open_redis,
)
from workflow_storage.backends.redis.connection import RedisStore
from workflow_storage.backends.redis.url import RedisURL
from workflow_storage.base import AbstractExecutionStateRepository, AbstractWorkflowRunRepository
from workflow_storage.testing import changed_state, in_threads, new_run, stored_run


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


class TestURLs:
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
    def test_a_url_that_cannot_be_used_says_why(self, url, message):
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
            "redis://me:12?hush=x@127.0.0.1:1/0",
            "redis+cluster://me:hush@127.0.0.1:1,me:hush@127.0.0.1:2",
        ],
    )
    def test_a_password_is_in_no_error_and_no_repr(self, url):
        with pytest.raises(StorageError) as caught:
            print(repr(create_storage_backend(url)))
            create_storage_backend(url).runs.get("x")

        assert "hush" not in str(caught.value)

    def test_a_server_that_is_down_is_unavailable_sync_and_async(self):
        for url in ("redis://127.0.0.1:1", "redis+cluster://127.0.0.1:1,127.0.0.1:2"):
            runs = create_storage_backend(url).runs
            with pytest.raises(StorageUnavailableError, match=r"[^.]\. Check that the server runs"):
                runs.get("x")
            with pytest.raises(StorageUnavailableError, match="Check that the server runs"):
                asyncio.run(runs.aget("x"))

    def test_the_url_of_a_cluster_for_a_server_that_is_none_says_so(self, server):
        url = server.url.replace("redis://", "redis+cluster://")
        with pytest.raises(
            StorageError, match=r"is no cluster\. Use a URL that begins with redis:"
        ):
            create_storage_backend(url).runs.get("x")

    def test_parameters_reach_redis_py(self):
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

    def test_a_unix_socket_is_a_server_too(self, tmp_path):
        socket = tmp_path / "redis.sock"
        with RedisServers(tmp_path, 1, "--unixsocket", str(socket)):
            backend = create_storage_backend(f"unix://{socket}?db=1")
            run = stored_run(backend)
            assert backend.runs.get(run.id).id == run.id

            async def read():
                return (await backend.runs.aget(run.id)).id

            assert asyncio.run(read()) == run.id
            backend.runs.store.close()

    def test_prefixes_are_stores_of_their_own(self, redis_url, django_db_blocker):
        for one in emptied(redis_url, django_db_blocker):
            run = stored_run(one)
            other = open_redis(f"{redis_url}-other")
            assert other.runs.get(run.id) is None
            assert other.runs.count_runs() == 0
            other.runs.store.close()

    def test_without_redis_py_the_error_says_what_to_install(self, tmp_path):
        (tmp_path / "redis.py").write_text("raise ImportError('no redis here')")
        script = (
            "from workflow_storage import create_storage_backend\n"
            "create_storage_backend('redis://127.0.0.1')"
        )
        environment = {name: value for name, value in os.environ.items() if "DJANGO" not in name}
        path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])

        result = subprocess.run(
            [sys.executable, "-c", script],
            env={**environment, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )

        assert "pip install 'django-workflow-storage[redis]'" in result.stderr

    def test_a_node_of_a_cluster_says_which_url_to_use(self, redis_cluster_url):
        node = redis_cluster_url.replace("redis+cluster", "redis").partition(",")[0]
        backend = create_storage_backend(node)
        prefixes = iter(range(100))
        with pytest.raises(StorageError, match="begins with redis\\+cluster://"):
            while True:
                open_redis(f"{node}?prefix=p{next(prefixes)}").runs.get("x")
        backend.runs.store.close()


def keys_of(backend, kind):
    """Give the keys of a kind, and what each holds."""
    found = {}
    for server in backend.runs.store.servers():
        for key in server.scan_iter(match=f"{{{backend.runs.store.prefix}*", count=1000):
            name = key.decode()
            if f"}}:{kind}" in name:
                found[name] = (
                    server.zrange(key, 0, -1)
                    if server.type(key) == b"zset"
                    else server.hgetall(key)
                )
    return found


def assert_indexes_agree(backend):
    """Check that every run is in the indexes it belongs to, and in no other."""
    expected = set()
    for key, run in keys_of(backend, "run:").items():
        base, _, run_id = key.partition(":run:")
        status, name, start = (
            run[field].decode() for field in (b"status", b"workflow_name", b"started_at")
        )
        expected |= {
            (f"{base}:runs:{status}", f"{start} {run_id}"),
            (f"{base}:workflows:{status}", f"{name}\0{start} {run_id}"),
        }
        if b"completed_at" in run:
            expected.add((f"{base}:ended", f"{run[b'completed_at'].decode()} {run_id}"))
    found = {
        (key, entry.decode())
        for kind in ("runs:", "workflows:", "ended")
        for key, entries in keys_of(backend, kind).items()
        for entry in entries
    }
    assert found == expected


def assert_states_are_whole(backend):
    runs = {key.partition(":run:")[2] for key in keys_of(backend, "run:")}
    assert {key.partition(":states:")[2] for key in keys_of(backend, "states:")} <= runs
    for run_id in runs:
        steps = [state["step"] for state in backend.states.iter_state_history(run_id)]
        assert steps == list(range(steps[0], steps[0] + len(steps))) if steps else True


class TestKeys:
    def test_all_keys_of_a_run_are_in_one_slot_whatever_its_id(self, backend):
        for run_id in ("}", "{}", "a}b{c", "{{{", "a:run:b", "\n", "é"):
            run = stored_run(backend, id=run_id, workflow_name=f"{run_id} workflow")
            backend.states.save_state(run.id, {}, "node")
            backend.runs.update_status(run.id, "completed")
        by_base = {}
        for kind in ("run", "ended", "states"):
            for key in keys_of(backend, kind):
                by_base.setdefault(key.partition("}")[0], set()).add(key_slot(key.encode()))
        assert all(len(slots) == 1 for slots in by_base.values())
        assert_indexes_agree(backend)
        backend.runs.delete("}")
        assert "}" not in {run.id for run in backend.runs.iter_runs()}
        assert backend.runs.delete_finished(before=timezone.now()) == 6
        assert keys_of(backend, "") == {}

    def test_the_slots_are_spread_evenly_over_a_cluster(self):
        for prefix in ("workflow_storage", "a", "staging.eu:west-1"):
            store = RedisStore(RedisURL.parse(f"redis+cluster://h:1?prefix={prefix}"))
            parts = [key_slot(one.encode()) * 16 // 16384 for one in store.key_prefixes]
            assert parts == list(range(16))

    def test_growing_states_take_little_more_than_the_last_one(self, backend):
        run = stored_run(backend)
        writer = backend.states.writer(run.id)
        state = {}
        for number in range(100):
            state = changed_state(state, "grow", 3000 + number)
            writer.save_state(state, "node")

        (states,) = keys_of(backend, "states:").values()
        assert sum(map(len, states.values())) < 3 * len(str(state))

    def test_indexes_follow_every_change(self, backend):
        chance = random.Random(3)
        runs = [stored_run(backend, workflow_name=f"w{n % 3}") for n in range(30)]
        for _ in range(200):
            run = chance.choice(runs)
            backend.runs.update_status(run.id, chance.choice(list(RunStatus)))
        for run in runs[:5]:
            stored = backend.runs.get(run.id)
            changed = new_run("another", id=run.id, started_at=timezone.now())
            backend.runs.put(changed, over=stored)
        backend.runs.delete(runs[7].id)
        backend.runs.delete_finished(before=timezone.now(), statuses="failed")
        assert_indexes_agree(backend)

    def test_a_run_that_was_evicted_is_skipped_and_cleaned_away(self, backend):
        now = timezone.now()
        runs = [
            stored_run(
                backend,
                status="running" if n % 2 else "failed",
                started_at=now - timedelta(hours=n),
            )
            for n in range(20)
        ]
        store = backend.runs.store
        for run in runs[::3]:
            for server in store.servers():
                with suppress(redis.ResponseError):
                    server.delete(f"{store.key_prefix(run.id)}:run:{run.id}")
        left = [run.id for number, run in enumerate(runs) if number % 3]

        assert [run.id for run in backend.runs.list_runs(limit=13)] == left
        assert [run.id for run in backend.runs.list_by_workflow("contract")] == left
        backend.runs.list_stalled(timedelta(0))
        assert backend.runs.delete_finished(before=timezone.now()) == len(
            [run for run in runs if run.id in left and run.status == "failed"]
        )
        assert_indexes_agree(backend)
        assert backend.runs.count_runs() == len(list(backend.runs.iter_runs()))
        again = runs[0]
        backend.runs.add(again)
        assert backend.states.get_state_history(again.id) == []

    def test_a_run_that_cannot_be_read_is_an_error_that_names_it(self, backend):
        run = stored_run(backend)
        store = backend.runs.store
        for server in store.servers():
            with suppress(redis.ResponseError):
                server.hset(f"{store.key_prefix(run.id)}:run:{run.id}", "inputs", "{")
        with pytest.raises(StorageError, match=f"{run.id} cannot be read"):
            backend.runs.get(run.id)

    def test_damage_is_an_error_and_the_run_goes_on(self, backend, caplog):
        run = stored_run(backend)
        state = {}
        for number in range(12):
            state = changed_state(state, "grow", 3000 + number)
            backend.states.save_state(run.id, state, "node")
        store = backend.runs.store
        for server in store.servers():
            with suppress(redis.ResponseError):
                key = f"{store.key_prefix(run.id)}:states:{run.id}"
                delta = bytearray(server.hget(key, 8))
                delta[len(delta) // 2] ^= 1
                server.hset(key, 8, bytes(delta))

        assert backend.states.get_state(run.id, 7) is not None
        for step in (8, 9, 11):
            with pytest.raises(DamagedStateError, match=f"at step {step} cannot be rebuilt"):
                backend.states.get_state(run.id, step)
        with pytest.raises(DamagedStateError, match="step 8"):
            backend.states.get_state_history(run.id)
        assert backend.states.save_state(run.id, state, "node") == 12
        assert backend.states.get_latest_state(run.id) == state
        assert "cannot serve as a base" in caplog.text
        assert backend.states.delete_states(run.id, keep_last=6) == 7
        assert backend.states.delete_states(run.id, keep_last=9) == 0
        assert backend.states.delete_states(run.id, keep_last=2) == 4
        assert backend.states.get_latest_state(run.id) == state

    def test_states_that_were_deleted_by_hand_are_an_error(self, backend):
        run = stored_run(backend)
        for number in range(3):
            backend.states.save_state(run.id, {"n": number}, "node")
        store = backend.runs.store
        for server in store.servers():
            with suppress(redis.ResponseError):
                server.delete(f"{store.key_prefix(run.id)}:states:{run.id}")

        for call in (
            lambda: backend.states.get_latest_state(run.id),
            lambda: backend.states.get_state(run.id, 1),
            lambda: backend.states.get_state_history(run.id),
        ):
            with pytest.raises(DamagedStateError, match="the server has evicted it"):
                call()
        assert backend.states.save_state(run.id, {"n": 3}, "node") == 3
        assert backend.states.get_latest_state(run.id) == {"n": 3}
        assert backend.states.delete_states(run.id, keep_last=1) == 3
        assert backend.states.get_state_history(run.id)[0]["state_data"] == {"n": 3}

    def test_nothing_reads_without_bound(self, server):
        backend = create_storage_backend(server.url)
        for number in range(500):
            stored_run(backend, status=list(RunStatus)[number % 5])
        run = next(backend.runs.iter_runs())
        for _ in range(50):
            backend.states.save_state(run.id, {}, "node")
        list(backend.runs.iter_runs(status=["failed", "running"]))
        backend.runs.list_runs(limit=400)
        backend.runs.count_runs(started_before=timezone.now())
        backend.runs.list_stalled(timedelta(0))
        backend.runs.fail_stalled(timedelta(0))
        list(backend.states.iter_state_history(run.id))
        backend.runs.delete_finished(before=timezone.now())

        used = {
            name.removeprefix("cmdstat_")
            for name in server.client(server.ports[0]).info("commandstats")
        }
        unbounded = {
            "keys",
            "scan",
            "zscan",
            "hscan",
            "hgetall",
            "hkeys",
            "hvals",
            "zrange",
            "zrevrange",
        }
        assert used.isdisjoint(unbounded)
        backend.runs.store.close()


WRITER = """
import itertools, random, sys
from datetime import timedelta
from django.utils import timezone
from workflow_storage import StorageError, WorkflowRun, create_storage_backend
from workflow_storage.testing import changed_state
backend = create_storage_backend(sys.argv[1])
chance = random.Random(int(sys.argv[2]))
print("begun", flush=True)
for number in itertools.count():
    run_id = f"run-{chance.randrange(30)}"
    try:
        match chance.randrange(7):
            case 0 | 1:
                backend.runs.add(WorkflowRun(id=run_id, workflow_name=f"w{number % 2}"))
            case 2:
                status = chance.choice(["running", "completed", "failed"])
                backend.runs.update_status(run_id, status, outputs={"n": number})
            case 3:
                state = changed_state({}, "grow", 2000 + number % 500)
                backend.states.save_state(run_id, state, "node")
                backend.states.save_state(run_id, {**state, "more": number}, "node")
            case 4:
                backend.states.delete_states(run_id, keep_last=chance.randrange(3))
            case 5:
                backend.runs.delete(run_id)
            case 6:
                backend.runs.delete_finished(before=timezone.now() - timedelta(seconds=1))
    except StorageError:
        pass
"""


def test_writers_that_are_killed_leave_nothing_half_written(backend, url):
    chance = random.Random(1)
    for attempt in range(4):
        writers = [
            subprocess.Popen(
                [sys.executable, "-c", WRITER, url, str(10 * attempt + number)],
                stdout=subprocess.PIPE,
                text=True,
            )
            for number in range(2)
        ]
        for writer in writers:
            assert writer.stdout.readline() == "begun\n"
        time.sleep(chance.uniform(0.02, 0.3))
        for writer in writers:
            os.kill(writer.pid, signal.SIGKILL)
            writer.wait(timeout=30)
            writer.stdout.close()

        assert_indexes_agree(backend)
        assert_states_are_whole(backend)
        listed = {run.id for run in backend.runs.iter_runs()}
        assert listed == {key.partition(":run:")[2] for key in keys_of(backend, "run:")}
    assert listed


def test_a_run_is_never_missed_while_its_status_changes(backend):
    runs = [stored_run(backend, workflow_name="w") for _ in range(40)]
    done = threading.Event()

    def change(number):
        chance = random.Random(number)
        while not done.is_set():
            backend.runs.update_status(chance.choice(runs).id, chance.choice(list(RunStatus)))

    with ThreadPoolExecutor(2) as pool:
        changing = [pool.submit(change, number) for number in range(2)]
        try:
            end = time.monotonic() + 2
            while time.monotonic() < end:
                assert len(backend.runs.list_by_workflow("w")) == 40
                assert len(backend.runs.list_runs(limit=40)) == 40
                assert backend.runs.count_runs() == 40
        finally:
            done.set()
        for one in changing:
            one.result()


class TestServers:
    def test_a_server_that_stops_is_unavailable_and_serves_again(self, server):
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

    def test_a_server_that_is_full_or_read_only_is_unavailable(self, server):
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

    def test_waiting_for_a_replica_that_is_not_there_says_so(self, server):
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

    def test_a_node_that_has_not_joined_the_cluster_does_no_harm(self, tmp_path):
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

    def test_threads_find_their_nodes_while_another_forgets_them(self):
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

    def test_a_node_that_hangs_leaves_the_others_alone(self):
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

    def test_a_node_that_stops_takes_its_slots_with_it_until_it_is_back(self):
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

    def test_a_failover_loses_nothing_that_was_acknowledged(self):
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
                            len(steps) > before[run_id] + 3
                            for run_id, steps in acknowledged.items()
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
    def test_all_goes_on_while_slots_are_moved_to_another_node(self, endpoint):
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
    """Change what the indexes hold, and list it, until told to stop; give the failures."""
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
    """Append states until told to stop, noting each that was acknowledged; give the failures."""
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


class TestAsync:
    def test_every_async_twin_is_native(self):
        derived = {"alist_by_workflow"}
        for ours, abstract in (
            (RedisWorkflowRunRepository, AbstractWorkflowRunRepository),
            (RedisExecutionStateRepository, AbstractExecutionStateRepository),
        ):
            for name, twin in inspect.getmembers(abstract, inspect.isfunction):
                if "Async twin" in (twin.__doc__ or "") and name not in derived:
                    assert getattr(ours, name) is not twin, name

    def test_no_cancellation_is_lost(self, redis_url):
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

    def test_connections_are_closed_with_their_event_loop(self, server):
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

    def test_many_tasks_and_threads_share_a_few_connections(self, server):
        backend = create_storage_backend(f"{server.url}?max_connections=3")
        client = server.client(server.ports[0])

        async def use():
            await asyncio.gather(*(backend.runs.aadd(new_run()) for _ in range(200)))

        asyncio.run(use())
        in_threads(20, lambda _: backend.runs.add(new_run()))

        assert backend.runs.count_runs() == 220
        assert client.info("clients")["connected_clients"] <= 4 + 3
        backend.runs.store.close()

"""Redis behind real sentinels: the master is found, and found again once another one is it."""

import asyncio
import time
from urllib.parse import quote

import pytest

from tests.servers import Sentinels
from workflow_storage import StorageError, StorageUnavailableError, UnsupportedBackendError
from workflow_storage.backends.redis import check_store, open_redis
from workflow_storage.config import StorageConfig
from workflow_storage.testing import RunsContract, StatesContract, new_run, stored_run


@pytest.fixture
def sentinels(tmp_path):
    with Sentinels(tmp_path) as servers:
        yield servers


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    with Sentinels(tmp_path_factory.mktemp("sentinels")) as servers:
        yield servers


def save_until(backend, run, deadline):
    """Save a state as soon as the store takes one, and return its number and the errors before."""
    errors = []
    while True:
        try:
            return backend.states.save_state(run.id, {"after": True}, "node"), errors
        except StorageUnavailableError as exc:
            errors.append(exc)
            assert time.monotonic() < deadline
            time.sleep(0.1)


@pytest.mark.slow
def test_the_master_is_found_and_a_failover_followed(sentinels):
    backend = open_redis(f"{sentinels.url}?wait_replicas=1")
    run = stored_run(backend)
    for number in range(20):
        backend.states.save_state(run.id, {"n": number}, "node")
    assert [
        server.connection_pool.connection_kwargs["port"] for server in backend.store.servers()
    ] == [sentinels.ports[0]]

    sentinels.kill(sentinels.ports[0])
    alone = open_redis(sentinels.url)  # the replica has no replica of its own now
    step, errors = save_until(alone, run, time.monotonic() + 30)

    assert errors
    assert step == 20
    assert [state["state_data"] for state in alone.states.get_state_history(run.id)] == [
        *({"n": number} for number in range(20)),
        {"after": True},
    ]
    step, errors = save_until(alone, run, time.monotonic())
    assert (step, errors) == (21, [])
    backend.close()
    alone.close()


@pytest.mark.slow
def test_an_open_store_goes_on_with_the_new_master_sync_and_async(sentinels):
    backend = open_redis(sentinels.url)
    run = stored_run(backend)

    async def read():
        return await backend.runs.aget(run.id)

    assert asyncio.run(read()) is not None
    old = sentinels.client(sentinels.ports[0])
    sentinels.client(sentinels.watching[0]).execute_command("SENTINEL", "FAILOVER", "the-master")
    while old.execute_command("ROLE")[0] != b"slave":
        time.sleep(0.05)

    step, _ = save_until(backend, run, time.monotonic() + 30)
    assert step == 0
    deadline = time.monotonic() + 30
    while True:
        try:
            assert asyncio.run(backend.states.asave_state(run.id, {}, "node")) == 1
            break
        except StorageUnavailableError:
            assert time.monotonic() < deadline
    new = sentinels.client(sentinels.ports[1])
    assert new.execute_command("ROLE")[0] == b"master"
    assert new.dbsize() > 0
    backend.close()


@pytest.mark.slow
def test_one_sentinel_that_answers_is_enough(sentinels):
    backend = open_redis(sentinels.url)
    for port in sentinels.watching[:2]:
        sentinels.kill(port)
    assert stored_run(backend) is not None
    sentinels.kill(sentinels.watching[2])
    assert stored_run(backend) is not None  # it knows the master by now
    with pytest.raises(StorageUnavailableError, match="Check that the server runs"):
        open_redis(sentinels.url).runs.get("x")
    backend.close()


@pytest.mark.slow
def test_a_master_that_nobody_knows_is_named(watched):
    backend = open_redis(watched.url.replace("the-master", quote("an other")))
    with pytest.raises(StorageUnavailableError, match="knows a master called 'an other'"):
        backend.runs.add(new_run())
    backend.close()


@pytest.mark.slow
def test_passwords_of_sentinels_and_of_servers_differ(sentinels):
    for port in sentinels.watching:
        client = sentinels.client(port)
        client.execute_command("SENTINEL", "SET", "the-master", "auth-pass", "hush-server")
        client.execute_command("ACL", "SETUSER", "default", "resetpass", ">hush-sentinel")
    for port in sentinels.ports:
        sentinels.client(port).config_set("masterauth", "hush-server")
        sentinels.client(port).config_set("requirepass", "hush-server")
    hosts = sentinels.url.removeprefix("redis+sentinel://")

    with pytest.raises(StorageError, match="Check the user and the password") as error:
        open_redis(f"redis+sentinel://:hush-server@{hosts}").runs.get("x")
    assert "hush" not in str(error.value)
    backend = open_redis(f"redis+sentinel://:hush-server@{hosts}/0?sentinel_password=hush-sentinel")
    assert stored_run(backend) is not None
    assert "hush" not in repr(backend)
    backend.close()


@pytest.mark.slow
def test_runs_are_on_the_master_and_the_check_looks_there(watched):
    backend = open_redis(watched.url)
    run = stored_run(backend)
    assert backend.runs.get(run.id) is not None
    backend.close()

    (message,) = check_store(StorageConfig(backend=watched.url))

    assert message.id == "workflow_storage.W004"
    assert str(watched.ports[0]) in message.msg


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("redis+sentinel://host:26379", "there has to be the name of the master"),
        ("redis+sentinel://host:26379/", "there has to be the name of the master"),
        ("redis+sentinel://,/name", "a node has no host"),
        ("redis+sentinel://host/name/x", "number of a database"),
        ("redis://host/0?sentinel_password=x", r"need redis\+sentinel://"),
    ],
)
def test_a_url_that_cannot_be_used_says_why(url, message):
    with pytest.raises(UnsupportedBackendError, match=message):
        open_redis(url)


@pytest.mark.slow
class TestBehindSentinels(RunsContract, StatesContract):
    @pytest.fixture
    def backend(self, watched):
        watched.client(watched.ports[0]).flushall()
        backend = open_redis(watched.url)
        yield backend
        backend.close()

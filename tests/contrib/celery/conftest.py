"""Workers on real brokers, and the stores that their tasks are recorded in."""

import os
import uuid

import pytest
import redis

from tests.conftest import emptied
from tests.contrib.celery.workers import celery_worker
from tests.servers import REDIS_URL, rabbitmq, unavailable
from workflow_storage import create_storage_backend

PREFIX = f"workflow_storage_test_{uuid.uuid4().hex[:12]}:"
os.environ["TEST_PREFIX"] = PREFIX


@pytest.fixture(scope="session")
def broker():
    """A prefix of keys of our own on the Redis server, which the sample app uses."""
    client = redis.Redis.from_url(REDIS_URL, socket_connect_timeout=3)
    try:
        client.ping()
    except redis.RedisError as exc:
        unavailable("Redis", exc, "start a server and set TEST_REDIS_URL=redis://host:port/db")
    yield PREFIX
    for key in client.scan_iter(match=f"{PREFIX}*", count=1000):
        client.unlink(key)
    client.close()


@pytest.fixture(params=["sqlite", "postgres", "mysql", "redis"])
def store(request, settings, django_db_blocker):
    """An empty store in which this process records its tasks, on each backend in turn."""
    url = request.getfixturevalue(f"{request.param}_url")
    settings.WORKFLOW_STORAGE_CELERY = {"backend": url}
    yield from emptied(url, django_db_blocker)


@pytest.fixture
def postgres_store(postgres_url, settings, django_db_blocker):
    settings.WORKFLOW_STORAGE_CELERY = {"backend": postgres_url}
    with django_db_blocker.unblock():
        yield create_storage_backend(postgres_url)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("workers")


@pytest.fixture(scope="session")
def prefork(folder, broker, postgres_url):
    """The worker that most tests share: two processes, and runs in PostgreSQL."""
    options = ("--pool", "prefork", "--concurrency", "2")
    with celery_worker(folder, postgres_url, *options, prefix=broker) as worker:
        yield worker


@pytest.fixture(scope="session")
def rabbitmq_url():
    with rabbitmq() as url:
        yield url

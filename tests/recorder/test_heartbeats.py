"""Heartbeats from a thread and a task: sent while the block runs, ended with it."""

import asyncio
import threading
import time

import pytest
from asgiref.sync import async_to_sync
from django.db import connections, transaction

from tests.recorder.conftest import only_run
from tests.servers import postgres_database
from workflow_storage import (
    StorageUnavailableError,
    create_storage_backend,
    record_run,
    resume_run,
)
from workflow_storage.factory import forget
from workflow_storage.testing import stored_run


class TestHeartbeats:
    def test_heartbeats_are_sent_while_the_block_runs_and_end_with_it(self, backend):
        with record_run("w", backend=backend, heartbeat=0.02) as run:
            wait_for(lambda: backend.runs.get(run.run_id).heartbeat_at is not None)
            first = backend.runs.get(run.run_id).heartbeat_at
            wait_for(lambda: backend.runs.get(run.run_id).heartbeat_at > first)

        assert not [thread for thread in threading.enumerate() if run.run_id in thread.name]

    def test_heartbeats_survive_a_store_that_is_down_for_a_while(
        self, backend, monkeypatch, caplog
    ):
        beat = backend.runs.heartbeat
        failures = iter(range(3))

        def failing(run_id):
            if next(failures, None) is not None:
                raise StorageUnavailableError("down")
            beat(run_id)

        monkeypatch.setattr(backend.runs, "heartbeat", failing)
        with record_run("w", backend=backend, heartbeat=0.01) as run:
            wait_for(lambda: backend.runs.get(run.run_id).heartbeat_at is not None)

        assert caplog.text.count("A heartbeat of workflow run") == 3

    def test_the_thread_closes_its_connection(self, django_db_blocker):
        with postgres_database() as url, django_db_blocker.unblock():
            backend = create_storage_backend(url)
            with record_run("w", backend=backend, heartbeat=0.01) as run:
                wait_for(lambda: backend.runs.get(run.run_id).heartbeat_at is not None)
                wait_for(lambda: open_connections(backend) == 2)
            wait_for(lambda: open_connections(backend) == 1)
            forget(backend.alias)

    def test_async_heartbeats_end_with_the_block(self, backend):
        async def use():
            async with record_run("w", backend=backend, heartbeat=0.01) as run:
                while (await backend.runs.aget(run.run_id)).heartbeat_at is None:
                    await asyncio.sleep(0.01)
                assert len(asyncio.all_tasks()) == 2
            assert len(asyncio.all_tasks()) == 1

        async_to_sync(use)()

    def test_leaving_the_block_in_a_transaction_does_not_wait_for_a_heartbeat(self, sql_backend):
        run = stored_run(sql_backend, status="failed")

        with transaction.atomic(using=sql_backend.alias):
            with resume_run(run.id, backend=sql_backend, heartbeat=0.01):
                time.sleep(0.1)
            left = time.monotonic()

        assert only_run(sql_backend).status == "completed"
        assert time.monotonic() - left < 15
        wait_for(lambda: not [t for t in threading.enumerate() if run.id in t.name], 40)

    @pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), True])
    def test_a_heartbeat_takes_seconds(self, backend, seconds):
        with pytest.raises(ValueError, match="Pass seconds"):
            record_run("w", backend=backend, heartbeat=seconds)


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def open_connections(backend):
    with connections[backend.alias].cursor() as cursor:
        cursor.execute("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()")
        return cursor.fetchone()[0]

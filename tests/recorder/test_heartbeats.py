"""Heartbeats from one thread: sent while the block runs, ended with it, for the rightful owner."""

import asyncio
import contextlib
import threading
import time

import pytest
from asgiref.sync import async_to_sync
from django.db import connections, transaction
from django.utils import timezone

from tests.conftest import empty
from tests.recorder.conftest import only_run
from tests.servers import postgres_database
from workflow_storage import (
    RunLostError,
    StorageUnavailableError,
    create_storage_backend,
    record_run,
    resume_run,
)
from workflow_storage.backends.orm import open_database
from workflow_storage.factory import forget
from workflow_storage.testing import in_threads, stored_run


class TestHeartbeats:
    def test_heartbeats_are_sent_while_the_block_runs_and_end_with_it(self, backend):
        with record_run("w", backend=backend, heartbeat=0.02) as run:
            wait_for(lambda: backend.runs.get(run.run_id).heartbeat_at is not None)
            first = backend.runs.get(run.run_id).heartbeat_at
            wait_for(lambda: backend.runs.get(run.run_id).heartbeat_at > first)

        wait_for(lambda: not heartbeat_threads())

    def test_heartbeats_survive_a_store_that_is_down_for_a_while(
        self, backend, monkeypatch, caplog
    ):
        beat = backend.runs.heartbeat
        failures = iter(range(3))

        def failing(run_id, **kwargs):
            if next(failures, None) is not None:
                raise StorageUnavailableError("down")
            beat(run_id, **kwargs)

        monkeypatch.setattr(backend.runs, "heartbeat", failing)
        with record_run("w", backend=backend, heartbeat=0.01) as run:
            wait_for(lambda: backend.runs.get(run.run_id).heartbeat_at is not None)

        assert caplog.text.count("A heartbeat of workflow run") == 3

    def test_all_runs_of_a_process_have_one_thread(self, backend):
        with contextlib.ExitStack() as stack:
            runs = [
                stack.enter_context(record_run("w", backend=backend, heartbeat=0.02))
                for _ in range(5)
            ]
            for run in runs:
                wait_for(lambda run=run: backend.runs.get(run.run_id).heartbeat_at is not None)
            assert len(heartbeat_threads()) == 1

        wait_for(lambda: not heartbeat_threads())

    def test_a_thread_that_has_ended_is_followed_by_another_one(self, backend):
        for _ in range(3):
            with record_run("w", backend=backend, heartbeat=0.01) as run:
                wait_for(lambda run=run: backend.runs.get(run.run_id).heartbeat_at is not None)
            wait_for(lambda: not heartbeat_threads())

    def test_the_thread_closes_its_connection(self, django_db_blocker):
        with postgres_database() as url, django_db_blocker.unblock():
            backend = create_storage_backend(url)
            with record_run("w", backend=backend, heartbeat=0.01) as run:
                wait_for(lambda: backend.runs.get(run.run_id).heartbeat_at is not None)
                wait_for(lambda: open_connections(backend) == 2)
            wait_for(lambda: open_connections(backend) == 1)
            forget(backend.alias)

    def test_a_connection_that_was_cut_is_replaced(self, django_db_blocker, caplog):
        with postgres_database() as url, django_db_blocker.unblock():
            backend = create_storage_backend(url)
            with record_run("w", backend=backend, heartbeat=0.01) as run:
                for _ in range(3):
                    cut_others(backend)
                    seen = timezone.now()
                    wait_for(
                        lambda seen=seen: (backend.runs.get(run.run_id).heartbeat_at or seen) > seen
                    )
            wait_for(lambda: open_connections(backend) == 1)
            forget(backend.alias)

    def test_in_async_code_they_are_sent_though_the_loop_is_busy(self, backend):
        async def use():
            async with record_run("w", backend=backend, heartbeat=0.01) as run:
                time.sleep(0.1)
                started = (await backend.runs.aget(run.run_id)).started_at
                for _ in range(200):
                    time.sleep(0.02)
                    if (await backend.runs.aget(run.run_id)).heartbeat_at:
                        break
                assert (await backend.runs.aget(run.run_id)).heartbeat_at > started
                assert len(asyncio.all_tasks()) == 1

        async_to_sync(use)()
        wait_for(lambda: not heartbeat_threads())

    def test_one_that_finds_another_attempt_stops_and_keeps_nothing_alive(self, backend, caplog):
        caplog.set_level("INFO", logger="workflow_storage")
        with pytest.raises(RunLostError), record_run("w", backend=backend, heartbeat=0.01) as run:
            backend.runs.update_status(run.run_id, "cancelled")
            backend.runs.update_status(run.run_id, "running")
            begun = only_run(backend).heartbeat_at
            wait_for(lambda: "No more heartbeats" in caplog.text)
            wait_for(lambda: not heartbeat_threads())
            assert only_run(backend).heartbeat_at == begun

        assert caplog.text.count("No more heartbeats") == 1

    # On SQLite a heartbeat waits while another connection writes.
    @pytest.mark.parametrize("sql_url", ["postgres", "mysql"], indirect=True)
    def test_one_that_finds_no_run_decides_nothing(self, sql_backend, caplog):
        caplog.set_level("INFO", logger="workflow_storage")
        with contextlib.ExitStack() as block:
            with transaction.atomic(using=sql_backend.alias):
                run = block.enter_context(record_run("w", backend=sql_backend, heartbeat=0.01))
                # MariaDB lets it wait for the row.
                wait_for(lambda: caplog.text.count("A heartbeat of workflow run") > 1)
            wait_for(lambda: only_run(sql_backend).heartbeat_at is not None)

        assert sql_backend.runs.get(run.run_id).status == "completed"

    def test_leaving_the_block_in_a_transaction_does_not_wait_for_a_heartbeat(
        self, sql_backend, caplog
    ):
        caplog.set_level("INFO", logger="workflow_storage")
        run = stored_run(sql_backend, status="failed")
        with (
            record_run("other", backend=sql_backend, heartbeat=0.01) as other,
            transaction.atomic(using=sql_backend.alias),
        ):
            with resume_run(run.id, backend=sql_backend, heartbeat=0.01):
                wait_for(lambda: f"A heartbeat of workflow run {run.id}" in caplog.text)
                if connections[sql_backend.alias].vendor != "sqlite":
                    # The others do not suffer for the one that is locked.
                    seen = timezone.now()
                    wait_for(lambda: is_alive_after(seen, other, sql_backend))
            assert sql_backend.runs.get(run.id).status == "completed"

        wait_for(lambda: not heartbeat_threads())

    def test_a_store_with_an_own_connection_takes_one_for_them(self, django_db_blocker):
        with postgres_database() as url, django_db_blocker.unblock():
            alias = create_storage_backend(url).alias
            backend = open_database(alias, own_connection=True)
            connections[alias].close()
            with (
                record_run("w", backend=backend, heartbeat=0.01) as run,
                transaction.atomic(using=alias),
            ):
                wait_for(lambda: backend.runs.get(run.run_id).heartbeat_at is not None)
                # Those of the caller, of the store, and of the heartbeats.
                assert open_connections(backend) == 3
            wait_for(lambda: open_connections(backend) == 2)
            forget(alias)

    def test_they_arrive_though_a_pool_is_used_up(self, postgres_url, django_db_blocker):
        with django_db_blocker.unblock(), pooled(postgres_url, size=2) as backend:
            in_block, seen = threading.Barrier(2, timeout=30), threading.Barrier(2, timeout=30)

            def record(number):
                with (
                    record_run("w", backend=backend, heartbeat=0.02) as run,
                    # It keeps a connection of the pool.
                    transaction.atomic(using=backend.alias),
                ):
                    in_block.wait()
                    wait_for(lambda: backend.runs.get(run.run_id).heartbeat_at is not None)
                    seen.wait()
                return run.run_id

            run_ids = in_threads(2, record)
            assert {backend.runs.get(run_id).status for run_id in run_ids} == {"completed"}
            wait_for(lambda: not heartbeat_threads())
            empty(backend)

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


def cut_others(backend):
    with connections[backend.alias].cursor() as cursor:
        cursor.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )


def heartbeat_threads():
    return [one for one in threading.enumerate() if "workflow_storage heartbeats" in one.name]


def is_alive_after(moment, run, backend):
    return in_threads(1, lambda _: backend.runs.get(run.run_id).heartbeat_at or moment)[0] > moment


@contextlib.contextmanager
def pooled(url, size):
    """Open the store of a URL over a pool of so many connections, as a project would."""
    known = connections.databases[create_storage_backend(url).alias]
    pool = {"min_size": 1, "max_size": size, "timeout": 20}
    connections.databases["pooled"] = {**known, "OPTIONS": {**known["OPTIONS"], "pool": pool}}
    try:
        yield open_database("pooled")
    finally:
        connections["pooled"].close()
        connections["pooled"].close_pool()
        del connections["pooled"], connections.databases["pooled"]

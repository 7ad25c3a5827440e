"""Recording and resuming: what the block, the exception and the store each see."""

import asyncio
import contextlib
import io
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta

import pytest
from asgiref.sync import async_to_sync
from django.core.management import call_command
from django.db import connections, transaction
from django.utils import timezone

from tests.servers import postgres_database
from workflow_storage import (
    DamagedStateError,
    ExecutionState,
    InvalidFieldError,
    InvalidPayloadError,
    RunAlreadyExistsError,
    RunNotFoundError,
    StatusConflictError,
    StorageUnavailableError,
    create_storage_backend,
    current_run,
    record_run,
    resume_run,
)
from workflow_storage.factory import forget
from workflow_storage.recorder import MAX_ERROR_MESSAGE, describe_error
from workflow_storage.signals import checkpoint_saved, run_finished, run_started
from workflow_storage.testing import changed_state, in_threads, outcome, stored_run


@pytest.fixture
def backend(any_backend):
    return any_backend


def only_run(backend):
    (run,) = backend.runs.list_runs()
    return run


class TestRecording:
    def test_leaving_the_block_completes_the_run(self, backend):
        with record_run("w", inputs={"a": 1}, config={"m": 2}, backend=backend) as run:
            assert backend.runs.get(run.run_id).status == "running"
            assert run.save_state({"n": 1}, node_id="first") == 0
            assert run.save_state({"n": 2}, node_id="second") == 1
            assert (run.state, run.node_id, run.step) == ({"n": 2}, "second", 1)
            run.outputs = {"total": 42}

        stored = backend.runs.get(run.run_id)
        assert (stored.workflow_name, stored.inputs, stored.config_snapshot) == (
            "w",
            {"a": 1},
            {"m": 2},
        )
        assert (stored.status, stored.outputs, stored.error_message) == (
            "completed",
            {"total": 42},
            None,
        )
        assert stored.duration_seconds >= 0
        assert run.status == "completed"

    def test_an_exception_fails_the_run_and_goes_on_unchanged(self, backend):
        secret_local = "not to be stored"
        error = KeyError("the reason")

        with pytest.raises(KeyError) as caught, record_run("w", backend=backend):
            raise error

        assert caught.value is error
        assert secret_local
        stored = only_run(backend)
        assert stored.status == "failed"
        assert stored.error_message.startswith("KeyError: 'the reason'\n\nTraceback")
        assert "raise error" in stored.error_message
        assert "not to be stored" not in stored.error_message

    @pytest.mark.parametrize(
        "error", [KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError]
    )
    def test_what_ends_the_process_or_task_cancels_the_run(self, backend, error):
        with pytest.raises(error), record_run("w", backend=backend):
            raise error

        assert only_run(backend).status == "cancelled"

    def test_usage_adds_up_and_is_stored_with_checkpoints(self, backend):
        with record_run("w", backend=backend) as run:
            run.add_usage(tokens=10, cost_usd=0.5)
            run.add_usage(tokens=5)
            run.save_state({}, "node")
            assert only_run(backend).total_tokens == 15
            run.add_usage(cost_usd=0.25)

        stored = only_run(backend)
        assert (stored.total_tokens, stored.total_cost_usd) == (15, 0.75)

    def test_the_id_can_be_given_and_is_taken_once(self, backend):
        with record_run("w", run_id="task-1", backend=backend) as run:
            assert run.run_id == "task-1"
        with (
            pytest.raises(RunAlreadyExistsError),
            record_run("w", run_id="task-1", backend=backend),
        ):
            pytest.fail("the block ran")

    def test_outputs_that_are_not_json_fail_the_run(self, backend):
        with (
            pytest.raises(InvalidPayloadError, match="outputs is not JSON"),
            record_run("w", backend=backend) as run,
        ):
            run.outputs = object()

        stored = only_run(backend)
        assert stored.status == "failed"
        assert "outputs is not JSON" in stored.error_message

    def test_a_run_that_was_failed_meanwhile_is_told(self, backend):
        with (
            pytest.raises(StatusConflictError, match="is failed, or resumed"),
            record_run("w", backend=backend) as run,
        ):
            backend.runs.update_status(run.run_id, "failed", error_message="stalled")
            run.outputs = "late"

        stored = only_run(backend)
        assert (stored.status, stored.outputs) == ("failed", None)

    def test_a_run_that_another_process_has_resumed_is_left_to_it(self, backend):
        def fail_and_resume(run):
            time.sleep(0.01)
            assert backend.runs.fail_stalled(timedelta(milliseconds=5)) == 1
            return resume_run(run.run_id, backend=backend)

        with (
            pytest.raises(StatusConflictError),
            record_run("w", backend=backend) as run,
            pytest.raises(StatusConflictError),
            fail_and_resume(run) as second,
            fail_and_resume(second) as third,
        ):
            run.outputs = second.outputs = "late"
            third.outputs = "in time"

        assert (only_run(backend).status, only_run(backend).outputs) == ("completed", "in time")

    def test_a_run_does_not_end_what_another_process_still_works_on(self, backend):
        with (
            pytest.raises(StatusConflictError, match="resumed by another process"),
            record_run("w", backend=backend) as run,
        ):
            backend.runs.update_status(run.run_id, "failed", error_message="stalled")
            backend.runs.update_status(run.run_id, "running", expected="failed")
            run.outputs = "late"

        assert (only_run(backend).status, only_run(backend).outputs) == ("running", None)

    def test_if_the_store_fails_too_the_exception_still_arrives(self, backend, monkeypatch, caplog):
        def unavailable(*args, **kwargs):
            raise StorageUnavailableError("the store is down")

        with (
            pytest.raises(ZeroDivisionError) as caught,
            record_run("w", backend=backend),
        ):
            monkeypatch.setattr(backend.runs, "update_status", unavailable)
            _ = 1 / 0

        assert "the store is down" in caught.value.__notes__[0]
        assert "could not be stored" in caplog.text

    def test_a_recording_is_used_once(self, backend):
        recording = record_run("w", backend=backend)
        with recording:
            pass
        with pytest.raises(RuntimeError, match="used already"):
            recording.__enter__()

    def test_a_checkpoint_of_a_recorded_run_reads_no_state(self, sql_backend):
        statements = []

        def collect(execute, sql, params, many, context):
            statements.append(sql)
            return execute(sql, params, many, context)

        with record_run("w", backend=sql_backend) as run:
            state = changed_state({}, "grow", 9000)
            run.save_state(state, "first")
            with connections[sql_backend.runs.alias].execute_wrapper(collect):
                for _ in range(10):
                    state = changed_state(state, "grow", 1000)
                    run.save_state(state, "node")

        assert sum(sql.startswith("INSERT") for sql in statements) == 10
        selects = [sql for sql in statements if sql.startswith("SELECT")]
        assert not [sql for sql in selects if "state_json" in sql]

    def test_another_process_that_writes_too_is_noticed(self, backend):
        with record_run("w", backend=backend) as run:
            run.save_state(changed_state({}, "grow", 9000), "own")
            backend.states.save_state(run.run_id, changed_state({}, "grow", 9001), "other")
            assert run.save_state(changed_state({}, "grow", 9002), "own") == 2

        nodes = [state["node_id"] for state in backend.states.get_state_history(run.run_id)]
        assert nodes == ["own", "other", "own"]

    def test_nodes_in_threads_share_a_run(self, backend):
        with record_run("w", backend=backend) as run:
            steps = in_threads(4, lambda n: [run.save_state({"n": n}, f"n-{n}") for _ in range(5)])
            in_threads(4, lambda n: run.add_usage(tokens=1))

        assert sorted(sum(steps, [])) == list(range(20))  # noqa: RUF017
        assert only_run(backend).total_tokens == 4

    @pytest.mark.parametrize(
        "usage",
        [
            {"tokens": None},
            {"tokens": 1.5},
            {"tokens": True},
            {"tokens": 2**63},
            {"cost_usd": float("nan")},
            {"tokens": 5, "cost_usd": None},
            {"tokens": 5, "cost_usd": "1"},
        ],
        ids=str,
    )
    def test_usage_that_is_no_number_is_refused_and_nothing_added(self, backend, usage):
        with record_run("w", backend=backend) as run:
            run.add_usage(tokens=1, cost_usd=0.5)
            with pytest.raises(InvalidFieldError):
                run.add_usage(**usage)

        stored = only_run(backend)
        assert (stored.total_tokens, stored.total_cost_usd) == (1, 0.5)

    def test_usage_survives_a_rollback_and_a_result_that_cannot_be_stored(self, sql_backend):
        with pytest.raises(InvalidPayloadError), record_run("w", backend=sql_backend) as run:
            with pytest.raises(OSError), transaction.atomic(using=sql_backend.runs.alias):
                run.add_usage(tokens=7)
                run.save_state({"rolled": "back"}, "one")
                raise OSError
            run.save_state({"kept": True}, "two")
            assert (run.step, run.state, run.node_id) == (0, {"kept": True}, "two")
            run.outputs = object()

        assert (only_run(sql_backend).status, only_run(sql_backend).total_tokens) == ("failed", 7)

    def test_nothing_is_saved_after_the_end(self, backend):
        with record_run("w", backend=backend) as run:
            pass
        with pytest.raises(StatusConflictError, match="is completed, expected running"):
            run.save_state({}, "node")
        assert backend.states.get_latest_state(run.run_id) is None

    def test_an_exception_that_takes_no_note_and_cannot_be_printed_still_arrives(
        self, backend, monkeypatch
    ):
        class Awkward(Exception):
            __notes__ = "no list"

            def __getattr__(self, name):
                raise RuntimeError(name)

        def unavailable(*args, **kwargs):
            raise StorageUnavailableError("down")

        with pytest.raises(Awkward), record_run("w", backend=backend):
            raise Awkward
        assert only_run(backend).status == "failed"
        with pytest.raises(Awkward), record_run("w", backend=backend):
            monkeypatch.setattr(backend.runs, "update_status", unavailable)
            raise Awkward

    def test_a_receiver_that_ends_the_process_cancels_the_run(self, backend):
        def leave(sender, **kwargs):
            raise SystemExit

        run_started.connect(leave)
        try:
            with pytest.raises(SystemExit), record_run("w", backend=backend):
                pytest.fail("the block ran")
        finally:
            run_started.disconnect(leave)

        assert only_run(backend).status == "cancelled"
        with pytest.raises(LookupError):
            current_run()


class TestDecorator:
    def test_arguments_become_inputs_and_the_result_outputs(self, backend):
        @record_run("w", backend=backend)
        def double(number, *, times=2):
            assert current_run().workflow_name == "w"
            current_run().save_state({"number": number}, "node")
            return {"result": number * times}

        assert double(21) == {"result": 42}
        assert double(1, times=3) == {"result": 3}

        new, old = backend.runs.list_runs()
        assert old.inputs == {"number": 21, "times": 2}
        assert (new.inputs, new.outputs) == ({"number": 1, "times": 3}, {"result": 3})
        assert double.__name__ == "double"
        with pytest.raises(LookupError, match="No run is being recorded"):
            current_run()

    def test_arguments_that_are_not_json_are_an_error_before_the_call(self, backend):
        @record_run("w", backend=backend)
        def function(connection):
            pytest.fail("the function ran")

        with pytest.raises(InvalidFieldError, match="the argument connection is not JSON") as error:
            function(object())

        assert "inputs=False" in error.value.__notes__[0]
        assert backend.runs.count_runs() == 0

    def test_arguments_can_be_left_out(self, backend):
        @record_run("w", inputs=False, backend=backend)
        def function(connection):
            return 1

        assert function(object()) == 1
        assert only_run(backend).inputs is None

    def test_coroutine_functions_are_recorded_too(self, backend):
        @record_run("w", backend=backend)
        async def double(number):
            await current_run().asave_state({"number": number}, "node")
            return number * 2

        assert async_to_sync(double)(4) == 8

        run = only_run(backend)
        assert (run.status, run.inputs, run.outputs) == ("completed", {"number": 4}, 8)
        assert backend.states.get_latest_state(run.id) == {"number": 4}

    def test_methods_leave_their_object_out(self, backend):
        class Pipeline:
            @record_run("method", backend=backend)
            def method(self, number):
                return number

            @classmethod
            @record_run("classmethod", backend=backend)
            def of(cls, number):
                return number

        assert Pipeline().method(1) == Pipeline.of(number=1) == 1
        assert [run.inputs for run in backend.runs.list_runs()] == [{"number": 1}] * 2

    def test_a_decorated_function_has_no_fixed_run_id(self, backend):
        with pytest.raises(TypeError, match="Leave run_id out"):
            record_run("w", run_id="one", backend=backend)(len)

    def test_generator_functions_are_refused(self, backend):
        def generate():
            yield 1

        with pytest.raises(TypeError, match="generator function"):
            record_run("w", backend=backend)(generate)


class TestResuming:
    def failed_run(self, backend):
        with pytest.raises(ValueError, match="broke"), record_run("w", backend=backend) as run:
            run.add_usage(tokens=10, cost_usd=1.0)
            run.save_state({"done": 1}, "first")
            raise ValueError("broke")
        return run.run_id

    def test_a_failed_run_goes_on_from_its_last_checkpoint(self, backend):
        run_id = self.failed_run(backend)

        with resume_run(run_id, backend=backend) as run:
            assert (run.state, run.node_id, run.step) == ({"done": 1}, "first", 0)
            assert only_run(backend).status == "running"
            run.add_usage(tokens=5)
            assert run.save_state({"done": 2}, "second") == 1
            run.outputs = "result"

        stored = backend.runs.get(run_id)
        assert (stored.status, stored.outputs, stored.error_message) == (
            "completed",
            "result",
            None,
        )
        assert (stored.total_tokens, stored.total_cost_usd) == (15, 1.0)

    @pytest.mark.parametrize("status", ["failed", "cancelled", "pending"])
    def test_a_run_without_checkpoints_begins_at_its_beginning(self, backend, status):
        run = stored_run(backend, status=status, inputs={"a": 1})
        with resume_run(run.id, backend=backend) as resumed:
            assert (resumed.state, resumed.step, resumed.inputs) == (None, None, {"a": 1})
        assert only_run(backend).status == "completed"

    @pytest.mark.parametrize("status", ["running", "completed"])
    def test_a_running_or_completed_run_is_not_resumed(self, backend, status):
        run = stored_run(backend, status=status)
        with (
            pytest.raises(StatusConflictError, match=f"is {status}"),
            resume_run(run.id, backend=backend),
        ):
            pytest.fail("the block ran")

    def test_a_run_whose_last_state_is_damaged_stays_as_it_was(self, sql_backend):
        run_id = self.failed_run(sql_backend)
        states = ExecutionState.objects.using(sql_backend.runs.alias).filter(run_id=run_id)
        states.update(state_json="damaged")

        with pytest.raises(DamagedStateError), resume_run(run_id, backend=sql_backend):
            pytest.fail("the block ran")

        assert only_run(sql_backend).status == "failed"
        assert only_run(sql_backend).error_message.startswith("ValueError: broke")

    def test_an_unknown_run_is_not_resumed(self, backend):
        with pytest.raises(RunNotFoundError), resume_run("gone", backend=backend):
            pytest.fail("the block ran")

    def test_a_stalled_run_is_resumed_if_asked_for(self, backend):
        old = timezone.now() - timedelta(hours=1)
        run = stored_run(backend, status="running", started_at=old)
        for idle in (None, timedelta(hours=2)):
            with (
                pytest.raises(StatusConflictError),
                resume_run(run.id, backend=backend, stalled_after=idle),
            ):
                pytest.fail("the block ran")

        with resume_run(run.id, backend=backend, stalled_after=timedelta(minutes=30)):
            pass
        assert only_run(backend).status == "completed"

    def test_of_several_that_resume_a_run_one_gets_it(self, backend):
        run_id = self.failed_run(backend)
        both_tried = threading.Barrier(4, timeout=30)

        def resume(number):
            try:
                with resume_run(run_id, backend=backend):
                    both_tried.wait()
                    return "done"
            except StatusConflictError:
                both_tried.wait()
                return "conflict"

        assert sorted(in_threads(4, resume)) == ["conflict"] * 3 + ["done"]


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
            forget(backend.runs.alias)

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

        with transaction.atomic(using=sql_backend.runs.alias):
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
    with connections[backend.runs.alias].cursor() as cursor:
        cursor.execute("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()")
        return cursor.fetchone()[0]


class TestSignals:
    @pytest.fixture
    def received(self):
        received = []

        def note(name):
            def receiver(sender, run, **kwargs):
                received.append((name, run.run_id, run.status.value, kwargs.get("node_id")))

            return receiver

        receivers = {
            run_started: note("started"),
            checkpoint_saved: note("checkpoint"),
            run_finished: note("finished"),
        }
        for sent, receiver in receivers.items():
            sent.connect(receiver)
        yield received
        for sent, receiver in receivers.items():
            sent.disconnect(receiver)

    def test_signals_tell_of_start_checkpoints_and_end(self, backend, received):
        with record_run("w", run_id="a", backend=backend) as run:
            run.save_state({}, "node")
        with pytest.raises(OSError), record_run("w", run_id="b", backend=backend):
            raise OSError

        assert received == [
            ("started", "a", "running", None),
            ("checkpoint", "a", "running", "node"),
            ("finished", "a", "completed", None),
            ("started", "b", "running", None),
            ("finished", "b", "failed", None),
        ]

    def test_signals_wait_for_the_commit(self, sql_backend, received):
        with pytest.raises(OSError), transaction.atomic(using=sql_backend.runs.alias):
            with record_run("w", backend=sql_backend):
                pass
            assert received == []
            raise OSError
        assert received == []

        with transaction.atomic(using=sql_backend.runs.alias):
            with record_run("w", backend=sql_backend):
                pass
            assert received == []
        assert [name for name, *_ in received] == ["started", "finished"]

    def test_an_error_of_a_receiver_is_logged_and_stops_nobody(self, backend, received, caplog):
        def broken(sender, **kwargs):
            raise RuntimeError("the receiver broke")

        run_started.connect(broken)
        try:
            with record_run("w", backend=backend):
                pass
        finally:
            run_started.disconnect(broken)

        assert only_run(backend).status == "completed"
        assert [name for name, *_ in received] == ["started", "finished"]
        assert "the receiver broke" in caplog.text

    def test_signals_are_sent_from_async_code(self, backend, received):
        async def use():
            async with record_run("w", run_id="a", backend=backend) as run:
                await run.asave_state({}, "node")

        async_to_sync(use)()

        assert [name for name, *_ in received] == ["started", "checkpoint", "finished"]


class TestAsync:
    def test_async_with_does_what_with_does(self, backend):
        async def use():
            async with record_run("w", inputs=1, backend=backend) as run:
                run.add_usage(tokens=3)
                assert await run.asave_state({"n": 1}, "node") == 0
                await run.aheartbeat()
                run.outputs = 2
            with pytest.raises(ValueError, match="broke"):
                async with record_run("failing", backend=backend) as failing:
                    raise ValueError("broke")
            async with resume_run(failing.run_id, backend=backend):
                pass
            return run, failing

        run, failing = async_to_sync(use)()

        stored = backend.runs.get(run.run_id)
        assert (stored.status, stored.outputs, stored.total_tokens) == ("completed", 2, 3)
        stored = backend.runs.get(failing.run_id)
        assert (stored.status, stored.error_message) == ("completed", None)

    def test_a_cancelled_task_cancels_its_run(self, backend):
        async def use():
            inside = asyncio.Event()

            async def work():
                async with record_run("w", run_id="task", backend=backend):
                    inside.set()
                    await asyncio.sleep(60)

            task = asyncio.create_task(work())
            await inside.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        async_to_sync(use)()

        assert only_run(backend).status == "cancelled"

    @pytest.mark.parametrize("delay", [0, 0.0005, 0.001, 0.002, 0.003, 0.004, 0.006, 0.01])
    @pytest.mark.parametrize("heartbeat", [None, 0.001])
    def test_a_task_that_is_cancelled_at_any_time_leaves_no_running_run(
        self, backend, delay, heartbeat
    ):
        async def work():
            async with record_run("w", backend=backend, heartbeat=heartbeat) as run:
                await run.asave_state({}, "node")

        async def use():
            task = asyncio.create_task(work())
            await asyncio.sleep(delay)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

        async_to_sync(use)()

        assert backend.runs.count_runs(status="running") == 0

    def test_many_runs_at_once_do_not_mix(self, backend):
        async def one(number):
            async with record_run("w", inputs=number, backend=backend) as run:
                for step in range(3):
                    await run.asave_state({"number": number, "step": step}, "node")
                    assert current_run() is run
                run.outputs = number
            return run.run_id

        async def use():
            return await asyncio.gather(*(one(number) for number in range(15)))

        for number, run_id in enumerate(async_to_sync(use)()):
            run = backend.runs.get(run_id)
            assert (run.status, run.inputs, run.outputs) == ("completed", number, number)
            assert backend.states.get_latest_state(run_id) == {"number": number, "step": 2}


KILLED_WORKER = """
import sys, time
from workflow_storage import create_storage_backend, record_run
url, run_id = sys.argv[1:]
with record_run("killed", run_id=run_id, backend=url) as run:
    run.save_state({"pages": ["one"]}, "first")
    run.save_state({"pages": ["one", "two"]}, "second")
    print("in the middle of a node", flush=True)
    time.sleep(60)
"""

RESUMING_WORKER = """
import sys
from workflow_storage import resume_run
url, run_id = sys.argv[1:]
with resume_run(run_id, backend=url) as run:
    assert (run.node_id, run.step) == ("second", 1)
    run.save_state({"pages": [*run.state["pages"], "three"]}, "third")
    run.outputs = len(run.state["pages"])
"""


def test_a_run_whose_worker_was_killed_is_found_failed_resumed_and_completed(backend, any_url):
    arguments = [any_url, "killed-run"]
    worker = subprocess.Popen(
        [sys.executable, "-c", KILLED_WORKER, *arguments], stdout=subprocess.PIPE, text=True
    )
    assert worker.stdout.readline() == "in the middle of a node\n"
    os.kill(worker.pid, signal.SIGKILL)
    worker.communicate(timeout=30)
    assert only_run(backend).status == "running"
    time.sleep(0.06)

    out = io.StringIO()
    call_command("fail_stalled_runs", "--idle=0.05s", backend=any_url, stdout=out)

    assert "1 run set to failed." in out.getvalue()
    assert "no sign of life" in only_run(backend).error_message
    subprocess.run([sys.executable, "-c", RESUMING_WORKER, *arguments], check=True, timeout=60)
    stored = only_run(backend)
    assert (stored.status, stored.outputs, stored.error_message) == ("completed", 3, None)
    history = backend.states.get_state_history("killed-run")
    assert [state["node_id"] for state in history] == ["first", "second", "third"]


class TestFailStalledRuns:
    def test_a_dry_run_changes_nothing(self, backend, any_url):
        old = timezone.now() - timedelta(hours=1)
        run = stored_run(backend, status="running", started_at=old)
        out = io.StringIO()

        call_command("fail_stalled_runs", "--dry-run", "--idle=15m", backend=any_url, stdout=out)

        assert run.id in out.getvalue()
        assert "1 run would be set to failed." in out.getvalue()
        assert only_run(backend).status == "running"

    def test_living_runs_are_left_alone(self, backend, any_url):
        stored_run(backend, status="running")
        out = io.StringIO()
        call_command("fail_stalled_runs", "--idle=1d", backend=any_url, stdout=out)
        assert out.getvalue() == "0 runs set to failed.\n"

    @pytest.mark.parametrize("idle", ["15", "m", "-1m", "1w", "1e3s", "9" * 30 + "d"])
    def test_a_time_that_is_none_is_a_command_error(self, idle):
        with pytest.raises(Exception, match=r"is no time|is too long|expected one argument"):
            call_command("fail_stalled_runs", f"--idle={idle}")


class TestErrorText:
    def test_it_is_bounded(self):
        text = describe_error(ValueError("x" * 10**6))
        assert len(text) <= MAX_ERROR_MESSAGE
        assert text.startswith("ValueError: xxx")

    def test_deep_recursion_is_described(self):
        def recurse():
            recurse()

        with pytest.raises(RecursionError) as caught:
            recurse()
        text = describe_error(caught.value)
        assert text.startswith("RecursionError")
        assert len(text) <= MAX_ERROR_MESSAGE

    def test_an_exception_that_cannot_be_printed_is_described(self):
        class Unprintable(Exception):
            def __str__(self):
                raise RuntimeError

        assert "Unprintable" in describe_error(Unprintable())

    def test_outcome_names_are_those_of_the_contract(self, backend):
        assert outcome(lambda: backend.runs.heartbeat("gone")) == "RunNotFoundError"

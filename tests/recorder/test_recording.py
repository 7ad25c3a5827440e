"""Recording and resuming: what the block, the caller and the store each see."""

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
from django.utils import timezone

from tests.recorder.conftest import only_run
from workflow_storage import (
    DamagedStateError,
    ExecutionState,
    InvalidFieldError,
    InvalidPayloadError,
    RunAlreadyExistsError,
    RunLostError,
    RunNotFoundError,
    StatusConflictError,
    current_run,
    record_run,
    resume_run,
)
from workflow_storage.signals import run_started
from workflow_storage.testing import in_threads, stored_run


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
            pytest.raises(RunLostError, match="is failed: attempt 1 is over"),
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
            pytest.raises(RunLostError, match="was taken over by attempt 2"),
            record_run("w", backend=backend) as run,
        ):
            backend.runs.update_status(run.run_id, "failed", error_message="stalled")
            backend.runs.update_status(run.run_id, "running", expected="failed")
            run.outputs = "late"

        assert (only_run(backend).status, only_run(backend).outputs) == ("running", None)

    def test_a_recording_is_used_once(self, backend):
        recording = record_run("w", backend=backend)
        with recording:
            pass
        with pytest.raises(RuntimeError, match="used already"):
            recording.__enter__()

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
        states = ExecutionState.objects.using(sql_backend.alias).filter(run_id=run_id)
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

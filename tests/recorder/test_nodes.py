"""Nodes: their time and usage, where a run is and fails, and what of it is done."""

import asyncio
import dataclasses
import threading
import time
from datetime import date

import pytest
from pydantic import BaseModel

from tests.recorder.conftest import only_run
from workflow_storage import (
    InvalidFieldError,
    InvalidPayloadError,
    create_storage_backend,
    current_run,
    record_run,
    resume_run,
)
from workflow_storage.testing import in_threads


@pytest.fixture
def backend(every_backend):
    return every_backend


def steps_of(backend, run):
    return list(backend.states.iter_steps(run.run_id))


def test_a_checkpoint_in_a_node_has_its_name_time_and_usage(backend):
    with record_run("w", backend=backend) as run:
        run.add_usage(tokens=1)
        begin = time.perf_counter()
        with run.node("ocr"):
            run.add_usage(tokens=10, cost_usd=0.1)
            time.sleep(0.05)
            run.save_state({"pages": 3})
            run.add_usage(tokens=20, cost_usd=0.2)
            run.save_state({"pages": 4})
            taken = time.perf_counter() - begin
        run.save_state({"pages": 5}, "after")

    first, second, after = steps_of(backend, run)
    assert [step["node_id"] for step in (first, second, after)] == ["ocr", "ocr", "after"]
    assert [step["tokens"] for step in (first, second, after)] == [10, 20, 1]
    assert [step["cost_usd"] for step in (first, second, after)] == [0.1, 0.2, None]
    assert 0.05 <= first["duration_seconds"] < 5
    assert first["duration_seconds"] + second["duration_seconds"] <= taken
    assert after["duration_seconds"] is None
    assert {step["attempt"] for step in (first, second, after)} == {1}
    stored = only_run(backend)
    assert (stored.total_tokens, stored.total_cost_usd) == (31, 0.3)  # 0.1 + 0.2, in decimal


def test_tokens_alone_leave_the_cost_unknown(backend):
    with record_run("w", backend=backend) as run:
        run.add_usage(tokens=10)
        run.save_state({}, "node")
        assert run.total_cost_usd is None
    stored = only_run(backend)
    assert (stored.total_tokens, stored.total_cost_usd) == (10, None)
    (step,) = steps_of(backend, run)
    assert (step["tokens"], step["cost_usd"]) == (10, None)


def test_usage_that_no_checkpoint_of_its_node_carries_goes_to_the_next_one_around(backend):
    with record_run("w", backend=backend) as run:
        with run.node("outer"):
            with run.node("inner"):
                run.add_usage(tokens=3)
            run.save_state({})
        with run.node("alone"):
            run.add_usage(tokens=5)
        run.save_state({}, "end")

    assert [step["tokens"] for step in steps_of(backend, run)] == [3, 5]


def test_nodes_in_threads_keep_their_own_time_and_usage(backend):
    with record_run("w", backend=backend) as run:
        both = threading.Barrier(2)

        def work(number):
            with run.node(f"node-{number}"):
                both.wait()
                run.add_usage(tokens=10 + number)
                time.sleep(0.1 * number)
                both.wait()
                run.save_state({"n": number})

        in_threads(2, work)

    steps = {step["node_id"]: step for step in steps_of(backend, run)}
    assert {name: step["tokens"] for name, step in steps.items()} == {"node-0": 10, "node-1": 11}
    assert all(step["duration_seconds"] >= 0.1 for step in steps.values())
    assert only_run(backend).total_tokens == 21


def test_nodes_in_tasks_keep_their_own_time_and_usage(backend):
    async def work(run, number):
        async with run.node(f"node-{number}"):
            await asyncio.sleep(0.01)
            run.add_usage(tokens=10 + number)
            await asyncio.sleep(0.01)
            await run.asave_state({"n": number})

    async def main():
        async with record_run("w", backend=backend) as run:
            await asyncio.gather(*(work(run, number) for number in range(5)))
            assert await run.adone("node-4")
            assert not await run.adone("node-5")
            return run

    run = asyncio.run(main())
    steps = {step["node_id"]: step["tokens"] for step in steps_of(backend, run)}
    assert steps == {f"node-{number}": 10 + number for number in range(5)}


def test_a_node_can_decorate_functions(backend):
    with record_run("w", backend=backend) as run:

        @run.node("sync")
        def double(number):
            run.add_usage(tokens=number)
            run.save_state({"number": number})
            return 2 * number

        @run.node("async")
        async def triple(number):
            await asyncio.sleep(0)
            run.add_usage(tokens=number)
            return 3 * number

        assert (double(2), double(3), asyncio.run(triple(1))) == (4, 6, 3)
        with pytest.raises(TypeError, match="generator function"):

            @run.node("generator")
            def numbers():
                yield 1

    assert [(step["node_id"], step["tokens"]) for step in steps_of(backend, run)] == [
        ("sync", 2),
        ("sync", 3),
    ]


def test_entering_a_node_writes_nothing(sql_backend):
    from django.db import connections

    statements = []

    def collect(execute, sql, params, many, context):
        statements.append(sql)
        return execute(sql, params, many, context)

    with (
        record_run("w", backend=sql_backend) as run,
        connections[sql_backend.alias].execute_wrapper(collect),
    ):
        with run.node("ocr"):
            run.add_usage(tokens=1)
        assert statements == []


def test_a_failure_tells_the_innermost_node_that_it_left(backend):
    def work(run):
        with run.node("outer"):
            run.save_state({})
            with run.node("inner"):
                raise ValueError("broken")

    for wrap in (False, True):
        with pytest.raises((ValueError, OSError)), record_run("w", backend=backend) as run:
            try:
                work(run)
            except ValueError as exc:
                if wrap:
                    raise OSError("wrapped") from exc
                raise
        assert backend.runs.get(run.run_id).current_node == "inner"


def test_a_failure_outside_of_nodes_leaves_the_node_as_it_was_heard_of(backend):
    with pytest.raises(OSError, match="broken"), record_run("w", backend=backend) as run:
        with pytest.raises(ValueError, match="caught"), run.node("tried"):
            raise ValueError("caught")
        run.save_state({}, "saved")
        raise OSError("broken")

    assert only_run(backend).current_node == "saved"


def test_attempts_show_what_failed_where_and_on_which_worker(backend):
    with (
        pytest.raises(ValueError, match="first"),
        record_run("w", backend=backend) as run,
        run.node("ocr"),
    ):
        raise ValueError("first")
    time.sleep(1.1)
    with resume_run(run.run_id, backend=backend):
        pass

    failed, completed = backend.runs.list_attempts(run.run_id)
    assert (failed.status, failed.node) == ("failed", "ocr")
    assert failed.error_message.startswith("ValueError: first")
    assert failed.worker and failed.ended_at >= failed.started_at
    assert completed.status == "completed"
    assert only_run(backend).duration_seconds < 1


def test_a_heartbeat_tells_where_the_run_is(backend):
    with record_run("w", backend=backend) as run:
        run.save_state({}, "first")
        with run.node("second"):
            assert run.current_node == "second"
            run.heartbeat()
            assert backend.runs.get(run.run_id).current_node == "second"
            with run.node("third"):
                asyncio.run(run.aheartbeat())
            assert backend.runs.get(run.run_id).current_node == "third"
        assert run.current_node == "first"


def test_what_is_done_is_known_after_a_resume(backend):
    with pytest.raises(OSError), record_run("w", backend=backend) as run:
        assert not run.done("load")
        with run.node("load"):
            run.save_state({"loaded": True})
        assert run.done("load")
        with run.node("ocr"):
            raise OSError

    with resume_run(run.run_id, backend=backend) as run:
        assert run.done("load")
        assert not run.done("ocr")
        run.save_state({}, "ocr")
        assert run.done("ocr")


@pytest.mark.parametrize("name", ["", "x" * 129, "nul\0", None])
def test_a_node_that_cannot_be_named_is_refused(backend, name):
    with record_run("w", backend=backend) as run, pytest.raises(InvalidFieldError, match="node"):
        run.node(name)


def test_a_checkpoint_outside_of_nodes_has_to_be_named(backend):
    with record_run("w", backend=backend) as run:
        with pytest.raises(InvalidFieldError, match="No node is named"):
            run.save_state({})
        with run.node("one"):
            run.save_state({}, "another")
    assert [step["node_id"] for step in steps_of(backend, run)] == ["another"]


def test_a_node_of_another_run_is_none_of_this_one(backend):
    with record_run("outer", backend=backend) as outer, outer.node("of outer"):
        with record_run("inner", backend=backend) as inner:
            inner.add_usage(tokens=1)
            outer.add_usage(tokens=2)
            with pytest.raises(InvalidFieldError, match="No node is named"):
                inner.save_state({})
            inner.save_state({}, "of inner")
        outer.save_state({})
    assert [step["tokens"] for step in steps_of(backend, inner)] == [1]
    assert [step["tokens"] for step in steps_of(backend, outer)] == [2]


def test_a_save_that_fails_keeps_the_usage_for_the_next_one(backend):
    with record_run("w", backend=backend) as run, run.node("ocr"):
        run.add_usage(tokens=7)
        with pytest.raises(InvalidPayloadError):
            run.save_state({"x": object()})
        run.save_state({"x": 1})
    assert [step["tokens"] for step in steps_of(backend, run)] == [7]


class Message(BaseModel):
    role: str
    at: date | None = None


class Chat(BaseModel):
    messages: list[Message] = []
    turns: int = 0


@dataclasses.dataclass
class Count:
    number: int


def test_states_may_be_models_and_come_back_as_models(backend):
    chat = Chat(messages=[Message(role="user", at=date(2026, 1, 31))], turns=1)
    with record_run("w", backend=backend) as run:
        assert run.state_as(Chat) is None
        run.save_state(chat, "chat")
        assert run.state == chat.model_dump(mode="json")
        assert run.state_as(Chat) == chat
        run.save_state(Count(3), "count")
        assert run.state_as(Count) == Count(3)
    assert backend.states.get_latest_state(run.run_id) == {"number": 3}
    backend.states.save_state(run.run_id, chat, "bare")
    assert backend.states.get_latest_state(run.run_id) == chat.model_dump(mode="json")
    with resume_or_new(backend, run) as run:
        assert run.state_as(dict) == chat.model_dump(mode="json")


def resume_or_new(backend, run):
    backend.runs.update_status(run.run_id, "failed")
    return resume_run(run.run_id, backend=backend)


def test_a_nested_recording_has_the_run_around_it_as_parent(backend, sqlite_url, redis_url):
    with record_run("outer", backend=backend, labels={"tenant": "acme"}) as outer:
        with record_run("inner", backend=backend) as inner:
            pass
        with record_run("alone", backend=backend, parent=None) as alone:
            pass
        with record_run("other", backend=backend, parent=inner) as other:
            pass
        with record_run("by id", backend=backend, parent="elsewhere") as by_id:
            pass
        elsewhere = create_storage_backend(redis_url if backend.alias is not None else sqlite_url)
        with record_run("elsewhere", backend=elsewhere) as far:
            pass

    parents = {
        run.run_id: store.runs.get(run.run_id).parent_id
        for run, store in [
            (outer, backend),
            (inner, backend),
            (alone, backend),
            (other, backend),
            (by_id, backend),
            (far, elsewhere),
        ]
    }
    assert list(parents.values()) == [
        None,
        outer.run_id,
        None,
        inner.run_id,
        "elsewhere",
        None,
    ]
    elsewhere.runs.delete(far.run_id)
    assert backend.runs.get(outer.run_id).labels == {"tenant": "acme"}
    with pytest.raises(LookupError):
        current_run()

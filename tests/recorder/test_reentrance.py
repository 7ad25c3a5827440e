"""A save in the middle of a save: refused, and neither hangs nor harms the one that it interrupts.

What could hang runs in a process of its own, which is given up after a while.
"""

import asyncio
import json
import logging
import signal
import subprocess
import sys
import threading
import time

import pytest
from asgiref.sync import async_to_sync
from pydantic import BaseModel, model_serializer

from workflow_storage import ReentranceError, StorageError, record_run
from workflow_storage.reentrance import refuses_reentrance
from workflow_storage.testing import in_threads

INTERRUPTED = """
import json, random, signal, sys
from workflow_storage import ReentranceError, create_storage_backend, record_run
backend = create_storage_backend(sys.argv[1])
saved, refused = [], 0

def save(signum, frame):
    global refused
    try:
        how = run.save_state if len(saved) % 2 else bare
        saved.append(how({"from": "handler", "text": "y" * 5000}, "handler"))
    except ReentranceError:
        refused += 1

def bare(state, node):
    return backend.states.save_state(run.run_id, state, node)

with record_run("interrupted", backend=backend) as run:
    signal.signal(signal.SIGALRM, save)
    signal.setitimer(signal.ITIMER_REAL, 0.0007, 0.0007)
    texts, own = [], []
    while len(own) < 60 or not refused:
        texts.append(random.randbytes(10_000).hex())
        state = {"texts": texts[-20:]}
        own.append((bare if len(own) % 3 == 0 else run.save_state)(state, "own"))
    signal.setitimer(signal.ITIMER_REAL, 0)
    last = {"texts": texts[-20:]}
history = backend.states.get_state_history(run.run_id)
assert [one["step"] for one in history] == list(range(len(own) + len(saved)))
assert [one["step"] for one in history if one["node_id"] == "own"] == own
assert [one["step"] for one in history if one["node_id"] == "handler"] == sorted(saved)
assert next(one for one in reversed(history) if one["node_id"] == "own")["state_data"] == last
print(json.dumps({"refused": refused, "status": backend.runs.get(run.run_id).status}))
"""


def test_a_save_from_a_signal_handler_neither_hangs_nor_breaks_the_history(any_url):
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, any_url],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["refused"] > 0
    assert result["status"] == "completed"


class Telling(BaseModel):
    """Logs while it is written as JSON, which is in the middle of a save."""

    text: str

    @model_serializer
    def written(self):
        logging.getLogger("tests.telling").warning("writing %s", self.text)
        return {"text": self.text}


class Saving(logging.Handler):
    """Saves what is logged."""

    def __init__(self, *saves):
        super().__init__()
        self.saves, self.errors = saves, []

    def emit(self, record):
        for save in self.saves:
            try:
                save({"log": record.getMessage()}, "log")
            except Exception as exc:
                self.errors.append(exc)


@pytest.fixture
def logger():
    logger = logging.getLogger("tests.telling")
    yield logger
    logger.handlers.clear()


class TestLogHandlers:
    def test_a_save_from_one_is_refused_and_the_other_is_stored(self, backend, logger):
        with record_run("w", backend=backend) as run:
            handler = Saving(
                run.save_state,
                lambda state, node: backend.states.save_state(run.run_id, state, node),
                lambda state, node: backend.states.writer(run.run_id).save_state(state, node),
                lambda state, node: backend.runs.heartbeat(run.run_id),
            )
            logger.addHandler(handler)
            run.save_state({"model": Telling(text="x" * 5000)}, "node")
            backend.states.save_state(run.run_id, {"model": Telling(text="y")}, "node")
            logger.removeHandler(handler)
            assert run.save_state({"after": True}, "node") == 2

        assert {type(error) for error in handler.errors} == {ReentranceError}
        assert len(handler.errors) >= 8
        assert "in the middle of another call" in str(handler.errors[0])
        assert isinstance(handler.errors[0], StorageError)
        history = backend.states.get_state_history(run.run_id)
        assert [one["node_id"] for one in history] == ["node"] * 3
        assert history[1]["state_data"] == {"model": {"text": "y"}}

    def test_in_async_code_it_is_refused_too(self, backend, logger):
        async def use():
            async with record_run("w", backend=backend) as run:
                handler = Saving(run.save_state)
                logger.addHandler(handler)
                await run.asave_state({"model": Telling(text="x")}, "node")
                logger.removeHandler(handler)
            return run.run_id, handler.errors

        run_id, errors = async_to_sync(use)()

        assert {type(error) for error in errors} == {ReentranceError}
        assert len(backend.states.get_state_history(run_id)) == 1

    def test_another_thread_waits_and_another_task_goes_on_beside_it(self, backend):
        with record_run("w", backend=backend) as run:
            state = {"text": "x" * 20_000}
            steps = in_threads(6, lambda n: [run.save_state(state, "thread") for _ in range(5)])

        async def use():
            async with record_run("w", backend=backend) as run:
                return await asyncio.gather(
                    *(run.asave_state({"text": "x" * 20_000}, "task") for _ in range(20))
                )

        assert sorted(sum(steps, [])) == list(range(30))  # noqa: RUF017
        assert sorted(async_to_sync(use)()) == list(range(20))

    def test_another_store_is_written_to(self, backend, memory_url, logger, django_db_blocker):
        from workflow_storage import create_storage_backend

        with django_db_blocker.unblock():
            other = create_storage_backend(memory_url)
            with (
                record_run("log", backend=other) as log,
                record_run("w", backend=backend) as run,
            ):
                handler = Saving(log.save_state)
                logger.addHandler(handler)
                run.save_state({"model": Telling(text="x")}, "node")
                logger.removeHandler(handler)

            assert handler.errors == []
            assert other.states.get_latest_state(log.run_id) == {"log": "writing x"}
            other.runs.delete(log.run_id)


@pytest.fixture
def memory_url(tmp_path):
    return f"sqlite:///{tmp_path / 'log.db'}"


class Store:
    def __init__(self):
        self.inside = 0

    @refuses_reentrance(id)
    def call(self, within=lambda: None):
        self.inside += 1
        return within()

    @refuses_reentrance(id)
    async def acall(self, within=None):
        self.inside += 1
        if within is not None:
            await within()


class TestGuard:
    def test_it_opens_again_after_an_error(self):
        store = Store()
        with pytest.raises(ZeroDivisionError):
            store.call(lambda: 1 / 0)
        with pytest.raises(ReentranceError):
            store.call(store.call)
        store.call()
        assert store.inside == 3

    def test_it_tells_stores_threads_and_tasks(self):
        store, other = Store(), Store()
        store.call(other.call)
        store.call(lambda: in_threads(1, lambda _: store.call()))

        async def use():
            with pytest.raises(ReentranceError):
                await store.acall(store.acall)
            with pytest.raises(ReentranceError):
                await store.acall(lambda: asyncio.sleep(0, store.call()))
            await store.acall(lambda: asyncio.create_task(store.acall()))

        asyncio.run(use())
        assert (store.inside, other.inside) == (7, 1)

    def test_an_exception_from_a_signal_handler_never_leaves_it_closed(self):
        store = Store()

        class Interrupted(BaseException):
            pass

        def interrupt(signum, frame):
            raise Interrupted

        assert threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGALRM, interrupt)
        end, interruptions = time.monotonic() + 1, 0
        try:
            while time.monotonic() < end:
                try:
                    signal.setitimer(signal.ITIMER_REAL, 0.0005)
                    while True:
                        store.call()
                except Interrupted:
                    interruptions += 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        assert interruptions > 100
        store.call()

"""The async methods on a database: beside each other, in few threads, and nothing left behind."""

import asyncio
import contextvars
import os
import subprocess
import sys
import textwrap
import threading

import pytest
from asgiref.sync import ThreadSensitiveContext, async_to_sync, sync_to_async
from django.db import connections, transaction

from tests.conftest import empty
from tests.servers import wait_until
from workflow_storage import RunNotFoundError, StorageConfig, create_storage_backend, record_run
from workflow_storage.backends.orm import async_threads
from workflow_storage.testing import in_threads, new_run, stored_run


@pytest.fixture
def open_with(server_url, unblocked):
    """Open an empty store with other values in its configuration."""
    opened = []

    def open_store(**config):
        backend = create_storage_backend(StorageConfig(backend=server_url, **config))
        empty(backend)
        connections[backend.alias].close()
        opened.append(backend)
        return backend

    yield open_store
    for backend in opened:
        empty(backend)
        backend.close()


@pytest.fixture
def backend(open_with):
    return open_with()


def run_of(backend, **fields):
    """Store a run, and leave no connection in this thread."""
    run = stored_run(backend, **fields)
    connections[backend.alias].close()
    return run


async def until(condition):
    await asyncio.to_thread(wait_until, condition)


class Failed(Exception):
    pass


class TestBesideEachOther:
    def test_a_call_that_waits_does_not_delay_the_others(self, backend, server):
        locked, other = run_of(backend), run_of(backend)

        async def use(release):
            waiting = asyncio.create_task(backend.states.asave_state(locked.id, {}, "node"))
            await until(server.is_waited_for)
            await backend.states.asave_state(other.id, {"n": 1}, "node")
            assert await backend.states.aget_latest_state(other.id) == {"n": 1}
            assert not waiting.done()
            release()
            assert await waiting == 0

        with server.locked_run(locked.id) as release:
            asyncio.run(asyncio.wait_for(use(release), timeout=60))

    # How many there are at a time is asked of PostgreSQL.
    @pytest.mark.parametrize("server_url", ["postgres"], indirect=True)
    def test_200_saves_at_once_take_no_more_sessions_than_configured(
        self, open_with, server, request
    ):
        backend = open_with(async_connections=3)
        runs = [run_of(backend).id for _ in range(10)]
        server.wait_for_sessions(0)

        async def use():
            saves = (
                backend.states.asave_state(runs[number % 10], {"n": number}, "node")
                for number in range(200)
            )
            return await asyncio.gather(*saves)

        with server.most_sessions() as most:
            steps = asyncio.run(use())

        assert sorted(steps) == sorted([*range(20)] * 10)
        assert most == [3]
        server.wait_for_sessions(0)

    def test_so_do_several_loops_in_several_threads(self, open_with, server):
        backend = open_with(async_connections=2)
        run = run_of(backend)
        server.wait_for_sessions(0)

        def loop(number):
            async def use():
                saves = (backend.states.asave_state(run.id, {}, "node") for _ in range(20))
                return await asyncio.gather(*saves)

            return asyncio.run(use())

        steps = [step for saved in in_threads(5, loop) for step in saved]

        assert sorted(steps) == list(range(100))
        server.wait_for_sessions(0)

    def test_requests_of_an_asgi_server_share_them(self, open_with, server):
        backend = open_with(async_connections=2)
        server.wait_for_sessions(0)
        seen = []

        async def request(number):
            async with ThreadSensitiveContext(), record_run("request", backend=backend) as run:
                await run.asave_state({"n": number}, "node")
                seen.append(await sync_to_async(server.sessions)())

        async def serve():
            await asyncio.gather(*(request(number) for number in range(20)))

        asyncio.run(serve())
        assert backend.runs.count_runs(status="completed") == 20
        assert max(seen) <= 2


class TestOneWriter:
    def test_saves_of_several_tasks_on_one_writer_keep_its_chain(self, backend):
        run = run_of(backend)
        states = [{"n": number, "text": f"{number} " * 4000} for number in range(60)]

        async def use():
            writer = backend.states.writer(run.id)
            return await asyncio.gather(*(writer.asave_state(state, "node") for state in states))

        steps = asyncio.run(use())

        assert sorted(steps) == list(range(60))
        history = backend.states.get_state_history(run.id)
        by_step = dict(zip(steps, states, strict=True))
        assert [checkpoint["state_data"] for checkpoint in history] == [
            by_step[step] for step in range(60)
        ]

    def test_a_save_after_one_that_was_cancelled_keeps_it_too(self, backend, server):
        run = run_of(backend)
        big = [{"n": number, "text": f"{number} " * 4000} for number in range(4)]

        async def use(release):
            writer = backend.states.writer(run.id)
            saving = asyncio.create_task(writer.asave_state(big[0], "node"))
            await until(server.is_waited_for)
            saving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await saving
            others = [asyncio.create_task(writer.asave_state(state, "node")) for state in big[1:]]
            await asyncio.sleep(0.05)
            release()
            return await asyncio.gather(*others)

        with server.locked_run(run.id) as release:
            assert sorted(asyncio.run(use(release))) == [1, 2, 3]

        states = backend.states.get_state_history(run.id)
        assert states[0]["state_data"] == big[0]
        assert sorted(state["state_data"]["n"] for state in states) == [0, 1, 2, 3]

    def test_they_take_one_session_at_a_time(self, backend, server):
        run = run_of(backend)

        async def use(release):
            writer = backend.states.writer(run.id)
            saves = [asyncio.create_task(writer.asave_state({}, "node")) for _ in range(4)]
            await until(server.is_waited_for)
            await asyncio.sleep(0.2)
            sessions = await asyncio.to_thread(server.sessions)
            release()
            await asyncio.gather(*saves)
            return sessions

        with server.locked_run(run.id) as release:
            assert asyncio.run(use(release)) == 2  # that which holds the lock is the other one


class TestCancellation:
    def test_a_save_in_the_middle_ends_by_itself(self, backend, server):
        run = run_of(backend)

        async def use(release):
            saving = asyncio.create_task(backend.states.asave_state(run.id, {"n": 0}, "node"))
            await until(server.is_waited_for)
            saving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await saving
            assert await backend.states.aget_latest_state(run.id) is None
            release()
            assert await backend.states.asave_state(run.id, {"n": 1}, "node") in {0, 1}

        with server.locked_run(run.id) as release:
            asyncio.run(use(release))
        history = backend.states.get_state_history(run.id)
        assert sorted(state["state_data"]["n"] for state in history) == [0, 1]

    def test_one_that_has_not_begun_never_does(self, open_with, server):
        backend = open_with(async_connections=1)
        run, other = run_of(backend), run_of(backend)

        async def use(release):
            first = asyncio.create_task(backend.states.asave_state(run.id, {}, "node"))
            await until(server.is_waited_for)
            second = asyncio.create_task(backend.states.asave_state(other.id, {}, "node"))
            await asyncio.sleep(0)
            second.cancel()
            await asyncio.sleep(0.01)  # or the thread could begin it before it is cancelled
            release()
            await first
            with pytest.raises(asyncio.CancelledError):
                await second

        with server.locked_run(run.id) as release:
            asyncio.run(use(release))
        assert backend.states.get_latest_state(other.id) is None

    def test_the_end_of_the_loop_waits_for_it(self, backend, server):
        run = run_of(backend)
        server.wait_for_sessions(0)

        async def use(release):
            saving = asyncio.create_task(backend.states.asave_state(run.id, {"n": 0}, "node"))
            await until(server.is_waited_for)
            asyncio.get_running_loop().run_in_executor(None, release_soon, release)
            saving.cancel()

        def release_soon(release):
            threading.Event().wait(0.3)
            release()

        with server.locked_run(run.id) as release:
            asyncio.run(use(release))
            server.wait_for_sessions(1)  # the one that held the lock
        assert backend.states.get_latest_state(run.id) == {"n": 0}


@pytest.mark.slow
class TestNothingLeftBehind:
    def test_asyncio_run_twice(self, backend, server):
        run = run_of(backend)
        for _ in range(2):
            asyncio.run(backend.runs.aheartbeat(run.id))
            server.wait_for_sessions(0)
        assert not [thread for thread in threading.enumerate() if backend.alias in thread.name]

    def test_a_loop_that_ends_leaves_those_of_another_one(self, backend, server):
        run = run_of(backend)

        async def use():
            await backend.runs.aheartbeat(run.id)
            await until(lambda: server.sessions() == 1)
            await asyncio.to_thread(asyncio.run, backend.runs.aheartbeat(run.id))
            assert await asyncio.to_thread(server.sessions) == 1

        asyncio.run(use())
        server.wait_for_sessions(0)

    def test_a_generator_that_uses_it_after_the_end(self, backend, server, recwarn):
        run = run_of(backend)

        async def numbers():
            try:
                yield 1
                yield 2
            finally:
                await asyncio.sleep(0.2)  # the store has been told by now
                await backend.runs.aheartbeat(run.id)

        async def use():
            await backend.runs.aget(run.id)
            async for _ in numbers_kept:
                break

        numbers_kept = numbers()
        asyncio.run(use())
        assert backend.runs.get(run.id).heartbeat_at is not None
        assert [str(warning.message) for warning in recwarn] == []

    def test_idle_ones_are_closed(self, backend, server, monkeypatch):
        monkeypatch.setattr(async_threads, "IDLE_TIMEOUT", 0.1)
        run = run_of(backend)

        async def use():
            saves = (backend.states.asave_state(run.id, {}, "node") for _ in range(20))
            await asyncio.gather(*saves)
            await until(lambda: server.sessions() == 0)
            await asyncio.gather(*(backend.runs.aheartbeat(run.id) for _ in range(20)))

        asyncio.run(use())

    def test_a_loop_that_is_dropped_without_a_word(self, backend, server, monkeypatch):
        monkeypatch.setattr(async_threads, "IDLE_TIMEOUT", 0.1)
        run = run_of(backend)
        for _ in range(3):
            loop = asyncio.new_event_loop()
            loop.run_until_complete(backend.runs.aheartbeat(run.id))
            loop.close()
        server.wait_for_sessions(0)

    @pytest.mark.parametrize("server_url", ["postgres"], indirect=True)  # which Django pools
    def test_those_of_a_pool_go_back_after_each_call(self, backend, server, monkeypatch):
        settings = connections[backend.alias].settings_dict
        pool = {"min_size": 0, "max_size": 1, "timeout": 20}

        async def use():
            for _ in range(3):
                await asyncio.gather(*(backend.runs.acount_runs() for _ in range(10)))
                # The one connection is there for the rest of the project.
                await sync_to_async(self.use_in_thread)(backend)

        with monkeypatch.context() as patch:
            patch.setitem(settings, "OPTIONS", {**settings["OPTIONS"], "pool": pool})
            try:
                asyncio.run(use())
            finally:
                connections[backend.alias].close_pool()

    @staticmethod
    def use_in_thread(backend):
        try:
            assert backend.runs.count_runs() == 0
        finally:
            connections[backend.alias].close()

    def test_closing_the_store(self, backend, server):
        run = run_of(backend)

        async def use():
            await backend.runs.aheartbeat(run.id)
            await sync_to_async(backend.close)()
            await until(lambda: server.sessions() == 0)
            await backend.runs.aheartbeat(run.id)

        asyncio.run(use())

    def test_the_end_of_the_process_finishes_what_has_begun(self, backend, server, server_url):
        run = run_of(backend)
        script = f"""
            import asyncio, sys
            from workflow_storage import create_storage_backend
            states = create_storage_backend({server_url!r}).states

            async def use():
                print("saving", flush=True)
                saving = asyncio.create_task(states.asave_state({run.id!r}, {{"n": 1}}, "node"))
                await asyncio.sleep(0)
                sys.stdin.readline()
                saving.cancel()

            loop = asyncio.new_event_loop()
            loop.run_until_complete(use())
        """
        with (
            server.locked_run(run.id) as release,
            subprocess.Popen(
                [sys.executable, "-c", textwrap.dedent(script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            ) as process,
        ):
            assert process.stdout.readline() == "saving\n"
            wait_until(server.is_waited_for)
            process.stdin.write("\n")
            process.stdin.flush()
            release()
            assert process.wait(timeout=60) == 0
        assert backend.states.get_latest_state(run.id) == {"n": 1}


class TestWhoseTransaction:
    def test_that_of_sync_code_which_waits_is_joined(self, backend):
        with pytest.raises(Failed), transaction.atomic(using=backend.alias):
            run = new_run()
            async_to_sync(backend.runs.aadd)(run)
            assert backend.runs.get(run.id) is not None
            raise Failed
        assert backend.runs.get(run.id) is None

    def test_so_is_one_around_the_loop(self, backend):
        async def use():
            await asyncio.gather(*(backend.runs.aadd(new_run()) for _ in range(20)))
            assert await backend.runs.acount_runs() == 20

        with pytest.raises(Failed), transaction.atomic(using=backend.alias):
            asyncio.run(use())
            assert backend.runs.count_runs() == 20
            raise Failed
        assert backend.runs.count_runs() == 0

    def test_with_an_own_connection_neither_is(self, open_with):
        backend = open_with(own_connection=True)
        with pytest.raises(Failed), transaction.atomic(using=backend.alias):
            async_to_sync(backend.runs.aadd)(new_run())
            asyncio.run(backend.runs.aadd(new_run()))
            raise Failed
        assert backend.runs.count_runs() == 2

    def test_a_thread_of_the_store_needs_no_second_connection(self, open_with, server):
        backend = open_with(own_connection=True, async_connections=1)
        server.wait_for_sessions(0)

        async def use():
            await backend.runs.aadd(new_run())
            return await asyncio.to_thread(server.sessions)

        assert asyncio.run(use()) == 1

    def test_a_task_that_sync_code_left_behind_goes_on(self, backend):
        """As one that a view begins behind a sync middleware."""
        run = run_of(backend)
        tasks = []

        async def view():
            answered = asyncio.Event()

            async def later():
                await answered.wait()
                await backend.runs.aheartbeat(run.id)

            tasks.append((asyncio.create_task(later()), answered))

        async def serve():
            await sync_to_async(async_to_sync(view))()
            task, answered = tasks.pop()
            answered.set()
            await task

        asyncio.run(serve())
        assert backend.runs.get(run.id).heartbeat_at is not None


def test_errors_are_those_of_the_contract(backend):
    with pytest.raises(RunNotFoundError):
        asyncio.run(backend.runs.aheartbeat("nobody"))


def test_the_context_of_the_task_is_there(backend):
    tenant = contextvars.ContextVar("tenant")
    seen = []

    def collect(execute, *args):
        seen.append(tenant.get())
        return execute(*args)

    def watch(call):
        with connections[backend.alias].execute_wrapper(collect):
            return call()

    async def use(name):
        tenant.set(name)
        await backend.runs.in_thread(watch, backend.runs.count_runs)

    async def both():
        await asyncio.gather(use("acme"), use("globex"))

    asyncio.run(both())
    assert set(seen) == {"acme", "globex"}


def test_an_exception_leaves_the_thread_alone(backend):
    async def use():
        with pytest.raises(ZeroDivisionError):
            await backend.runs.in_thread(lambda: 1 / 0)
        return await backend.runs.acount_runs()

    assert asyncio.run(use()) == 0


def test_a_child_process_begins_with_threads_and_connections_of_its_own(backend, server):
    run = run_of(backend)

    async def use():
        await asyncio.gather(*(backend.runs.aheartbeat(run.id) for _ in range(20)))

    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(use())
        child = os.fork()
        if child == 0:
            status = 1
            try:
                asyncio.run(asyncio.wait_for(use(), timeout=20))
                status = 0
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        loop.run_until_complete(use())  # its sessions were left alone
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
    server.wait_for_sessions(0)


def test_a_thread_with_the_context_of_another_joins_no_transaction_after_the_one_it_is_of(
    sql_backend,
):
    alias, runs = sql_backend.alias, sql_backend.runs

    def connection_in_a_thread():
        context, found = contextvars.copy_context(), []
        thread = threading.Thread(
            target=lambda: found.append(
                context.run(runs.from_any_thread, lambda: connections[alias].connection)
            )
        )
        thread.start()
        thread.join()
        return found[0]

    runs.list_runs()
    with transaction.atomic(using=alias):
        here = runs.from_any_thread(lambda: connections[alias].connection)
        assert connection_in_a_thread() is here

    assert runs.from_any_thread(lambda: connections[alias].connection) is here
    with transaction.atomic(using=alias):
        assert connection_in_a_thread() is not here

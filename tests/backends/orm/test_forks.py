"""Processes that are forked while their parent has a store open: gunicorn --preload, pools."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.conftest import empty
from workflow_storage import create_storage_backend

pytestmark = pytest.mark.slow

HEAD = """
import multiprocessing, os, sys, threading
from workflow_storage import StorageError, create_storage_backend
from django.db import connections, transaction

fork = multiprocessing.get_context("fork")
url, alias = sys.argv[1], None

def add(backend, name):
    from workflow_storage import WorkflowRun
    backend.runs.add(WorkflowRun(id=name, workflow_name="forks", status="running"))

def use(backend, name, count=300):
    runs, states = backend
    add(backend, name)
    for n in range(count):
        assert states.save_state(name, {"who": name, "n": n}, "node") == n
        assert states.get_latest_state(name) == {"who": name, "n": n}
        run = runs.get(name)
        assert run.id == name, run.id

def session(backend):
    sql = {"postgresql": "SELECT pg_backend_pid()", "mysql": "SELECT connection_id()"}
    connection = connections[backend.alias]
    if connection.vendor not in sql or connection.settings_dict["OPTIONS"].get("pool"):
        return None
    with connection.cursor() as cursor:
        cursor.execute(sql[connection.vendor])
        return cursor.fetchone()[0]

def in_child(work):
    # Ends as a process of gunicorn does: the interpreter finalizes what it has.
    pid = os.fork()
    if not pid:
        work()
        sys.exit(0)
    return pid

def wait_for(pids):
    for pid in pids:
        assert os.waitpid(pid, 0)[1] == 0
"""


@pytest.fixture(params=["sqlite", "postgres", "postgres with a pool", "mysql"])
def url(request, django_db_blocker):
    """The URL of an empty database of each kind in turn."""
    name = request.param.split()[0]
    url = request.getfixturevalue(f"{name}_url")
    with django_db_blocker.unblock():
        empty(create_storage_backend(url))
    return f"{url}?pool=true" if "pool" in request.param else url


@pytest.fixture
def sqlite_file(tmp_path):
    """The URL of a SQLite file that is not there yet."""
    return f"sqlite:///{tmp_path / 'workflows.db'}"


def run_script(script, url, *args):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    environment.pop("DJANGO_SETTINGS_MODULE", None)
    process = subprocess.run(
        [sys.executable, "-c", HEAD + textwrap.dedent(script), url, *args],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert "Traceback" not in process.stderr, process.stderr
    return process.stdout


def test_parent_and_children_work_at_once_and_each_gets_its_own_answers(url):
    script = """
        backend = create_storage_backend(url)
        use(backend, "before", 3)
        before = session(backend)
        pids = [in_child(lambda: use(backend, f"worker {n}")) for n in range(2)]
        children = [fork.Process(target=use, args=(backend, f"child {n}")) for n in range(2)]
        for child in children:
            child.start()
        use(backend, "parent")
        for child in children:
            child.join()
            assert child.exitcode == 0
        wait_for(pids)
        assert session(backend) == before
        assert backend.runs.count_runs() == 6
        for n in range(2):
            states = list(backend.states.get_state_history(f"worker {n}"))
            assert [state["step"] for state in states] == list(range(300))
        print("done")
    """
    assert run_script(script, url) == "done\n"


def test_opening_a_store_leaves_no_connection_that_a_fork_inherits(url):
    script = """
        backend = create_storage_backend(url)
        connection = connections[backend.alias]
        assert connection.connection is None
        assert not getattr(connection, "_connection_pools", None)
        pids = [in_child(lambda: use(backend, f"worker {n}")) for n in range(3)]
        wait_for(pids)
        print(backend.runs.count_runs())
    """
    assert run_script(script, url) == "3\n"


def test_sessions_of_other_threads_of_the_parent_survive_its_children(url):
    script = """
        backend = create_storage_backend(url)
        use(backend, "before", 3)
        stop, failures, used = threading.Event(), [], threading.Barrier(3)

        def work(name):
            try:
                use(backend, name, 1)
                sessions = session(backend)
                used.wait()
                while not stop.wait(0.01):
                    pass
                assert session(backend) == sessions
                backend.runs.heartbeat(name)
            except BaseException as exc:
                failures.append(exc)

        threads = [threading.Thread(target=work, args=(f"thread {n}",)) for n in range(2)]
        for thread in threads:
            thread.start()
        used.wait()
        wait_for([in_child(lambda: use(backend, f"worker {n}", 30)) for n in range(3)])
        stop.set()
        for thread in threads:
            thread.join()
        assert not failures, failures
        print(backend.runs.count_runs())
    """
    assert run_script(script, url) == "6\n"


def test_in_the_middle_of_the_parents_transaction_a_child_is_refused_and_changes_nothing(url):
    script = """
        backend = create_storage_backend(url)

        def work():
            for call in (
                lambda: backend.runs.get("parent"),
                lambda: add(backend, "child"),
                lambda: backend.states.save_state("parent", {}, "node"),
            ):
                try:
                    call()
                except StorageError as exc:
                    assert "forked while its parent was in a transaction" in str(exc), exc
                else:
                    raise AssertionError("not refused")

        is_child = False
        with transaction.atomic(using=backend.alias):
            add(backend, "parent")
            pid = os.fork()
            if not pid:
                is_child = True
                work()
            else:
                wait_for([pid])
        if is_child:
            sys.exit(0)  # after it has left the block
        assert backend.runs.get("parent") is not None
        assert backend.runs.get("child") is None

        with transaction.atomic(using=backend.alias):
            backend.runs.update("parent", outputs=1)
            pid = os.fork()
            if not pid:
                sys.exit(0)  # out of the block
            wait_for([pid])
        assert backend.runs.get("parent").outputs == 1
        print("done")
    """
    assert run_script(script, url) == "done\n"


@pytest.mark.parametrize("url", ["postgres", "postgres with a pool", "mysql"], indirect=True)
def test_after_the_block_is_left_a_child_can_work_on_a_server(url):
    script = """
        backend = create_storage_backend(url)
        children = []
        with transaction.atomic(using=backend.alias):
            add(backend, "parent")
            pid = os.fork()
        if not pid:
            use(backend, "child", 20)
            sys.exit(0)
        wait_for([pid])
        assert backend.runs.count_runs() == 2
        transaction.set_autocommit(False, using=backend.alias)
        backend.runs.update("parent", outputs=1)

        def work():
            try:
                backend.runs.get("parent")
            except StorageError as exc:
                assert "forked while" in str(exc)
            else:
                raise AssertionError("not refused")
            transaction.set_autocommit(True, using=backend.alias)
            backend.runs.get("parent")

        wait_for([in_child(work)])
        transaction.commit(using=backend.alias)
        assert backend.runs.get("parent").outputs == 1
        print("done")
    """
    assert run_script(script, url) == "done\n"


def test_after_a_transaction_on_a_sqlite_file_a_child_says_at_once_that_it_cannot_work(sqlite_file):
    script = """
        backend = create_storage_backend(url)
        with transaction.atomic(using=backend.alias):
            add(backend, "parent")
            pid = os.fork()
        if not pid:
            def work():
                try:
                    backend.runs.heartbeat("parent")
                except StorageError as exc:
                    print(exc)
                connections.close_all()
            work()
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
            sys.exit(0)
        wait_for([pid])
        backend.runs.delete("parent")
    """
    out = run_script(script, sqlite_file)
    assert out.count("start a new interpreter instead") == 2


def test_a_thread_that_writes_to_a_sqlite_file_all_the_time_stops_no_child(sqlite_file):
    script = """
        backend = create_storage_backend(url)
        add(backend, "busy")
        stop = threading.Event()

        def write():
            while not stop.is_set():
                backend.states.save_state("busy", {"text": "x" * 10_000}, "node")
                stop.wait(0.0005)

        thread = threading.Thread(target=write, daemon=True)
        thread.start()
        for n in range(8):
            wait_for([in_child(lambda: use(backend, f"child {n}", 2))])
        stop.set()
        thread.join()
        print(backend.runs.count_runs())
    """
    assert run_script(script, sqlite_file) == "9\n"


def test_what_only_the_project_has_used_is_left_to_the_parent_too(url):
    script = """
        import dj_database_url, django
        from django.conf import settings
        from django.core.management import call_command
        settings.configure(
            INSTALLED_APPS=["workflow_storage"], DATABASES={"default": dj_database_url.parse(url)},
            USE_TZ=True,
        )
        django.setup()
        from workflow_storage.models import WorkflowRun
        call_command("migrate", "workflow_storage", verbosity=0)
        assert WorkflowRun.objects.count() == 0

        class Default:
            alias = "default"

        before = session(Default)
        pids = [in_child(lambda: use(create_storage_backend(), f"worker {n}")) for n in range(2)]
        for n in range(300):
            assert WorkflowRun.objects.filter(id="nobody").count() == 0
        wait_for(pids)
        assert session(Default) == before
        print(WorkflowRun.objects.count())
    """
    assert run_script(script, url) == "2\n"


def test_what_a_child_writes_to_a_sqlite_file_outlives_its_parents_connection(sqlite_file):
    script = """
        backend = create_storage_backend(url)
        use(backend, "parent", 3)
        closed, opened = os.pipe(), os.pipe()

        def work():
            use(backend, "child", 1)
            os.write(opened[1], b"x")
            os.read(closed[0], 1)
            for n in range(1, 100):
                backend.states.save_state("child", {"n": n}, "node")
            # Somebody who has not inherited anything.
            count = "SELECT COUNT(*) FROM execution_states WHERE run_id = 'child'"
            script = f"import sqlite3, sys; print(*sqlite3.connect(sys.argv[1]).execute({count!r}))"
            import subprocess
            subprocess.run([sys.executable, "-c", script, sys.argv[2]], check=True)

        pid = in_child(work)
        os.read(opened[0], 1)
        connections.close_all()
        os.write(closed[1], b"x")
        wait_for([pid])
    """
    assert run_script(script, sqlite_file, sqlite_file.removeprefix("sqlite:///")) == "(100,)\n"


def test_a_database_in_memory_is_copied():
    script = """
        backend = create_storage_backend(url)
        use(backend, "parent", 3)

        def work():
            assert backend.states.get_latest_state("parent")["n"] == 2
            use(backend, "child", 3)

        wait_for([in_child(work)])
        print(backend.runs.count_runs())
    """
    assert run_script(script, "sqlite://:memory:") == "1\n"


def test_a_child_of_a_child_works_as_well(url):
    script = """
        backend = create_storage_backend(url)
        use(backend, "parent", 20)

        def child():
            use(backend, "child", 20)
            wait_for([in_child(lambda: use(backend, "grandchild", 20))])
            use(backend, "child again", 20)

        wait_for([in_child(child)])
        use(backend, "parent again", 20)
        print(backend.runs.count_runs())
    """
    assert run_script(script, url) == "5\n"


def test_a_lock_that_another_thread_holds_at_the_fork_does_not_stop_the_child(url):
    script = """
        backend = create_storage_backend(url)
        from workflow_storage import factory
        from workflow_storage.backends.orm import registration
        held, stop = threading.Event(), threading.Event()

        def hold():
            with factory._opening, registration._registering:
                held.set()
                stop.wait()

        thread = threading.Thread(target=hold)
        thread.start()
        held.wait()
        wait_for([in_child(lambda: create_storage_backend("sqlite://:memory:"))])
        stop.set()
        thread.join()
        print("done")
    """
    assert run_script(script, url) == "done\n"

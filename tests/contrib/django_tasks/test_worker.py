"""Tasks in a real worker: a process of ``manage.py db_worker``, that is killed or stopped, too."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.servers import mysql_database, postgres_database
from workflow_storage import create_storage_backend
from workflow_storage.base import StorageBackend
from workflow_storage.factory import forget

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[3]
PATIENCE = 30
HEARTBEAT = 0.2
WORKER = ("--batch", "--no-startup-delay", "--interval", "0.05")


class Site:
    """A site in processes of its own, whose store is also open here."""

    def __init__(self, database: str, folder: Path, *, store: str = "default") -> None:
        self.database = database
        self.folder = folder
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "DJANGO_SETTINGS_MODULE": "tests.contrib.django_tasks.worker_settings",
            "SITE_DATABASE": database,
            "SITE_STORE": store,
            "SITE_TASKS": json.dumps({"heartbeat": HEARTBEAT}),
        }
        self.workers: list[subprocess.Popen[str]] = []

    def manage(self, *arguments: str) -> str:
        return self._output("-m", "django", *arguments)

    def python(self, code: str) -> str:
        return self._output("-c", f"import django; django.setup(); {code}")

    def enqueue(self, *calls: str) -> list[str]:
        """Enqueue tasks, such as ``add.enqueue(1)``, and return their ids."""
        return self.python(
            "from tests.contrib.django_tasks.sample_tasks import *;"
            f"print(*[result.id for result in [{', '.join(calls)}]])"
        ).split()

    def worker(self) -> subprocess.Popen[str]:
        """Begin a worker that ends when nothing waits any more."""
        worker = subprocess.Popen(
            [sys.executable, "-m", "django", "db_worker", *WORKER],
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.workers.append(worker)
        return worker

    def work(self) -> str:
        """Have all that waits carried out, and return what the worker logs."""
        worker = self.worker()
        output, _ = worker.communicate(timeout=PATIENCE)
        assert worker.returncode == 0, output
        return output

    def put_back(self, task_id: str) -> None:
        """Set a task back to READY, as an operator does."""
        self.python(
            "from django_tasks_db.models import DBTaskResult;"
            f"DBTaskResult.objects.filter(pk={task_id!r}).update(status='READY')"
        )

    def results(self, field: str) -> list[str]:
        """Return a field of what the queue stores, for each task."""
        return self.python(
            "from django_tasks_db.models import DBTaskResult;"
            f"print(*DBTaskResult.objects.values_list({field!r}, flat=True))"
        ).split()

    def wait_for(self, name: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not (self.folder / name).exists():
            assert time.monotonic() < deadline, f"no {name}"
            time.sleep(0.02)

    def let_go(self) -> None:
        (self.folder / "go").touch()

    def close(self) -> None:
        for worker in self.workers:
            if worker.poll() is None:
                worker.kill()
            worker.wait()
            worker.stdout.close()

    def _output(self, *command: str) -> str:
        result = subprocess.run(
            [sys.executable, *command],
            env=self.environment,
            check=False,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A migrated SQLite file, to be copied."""
    path = tmp_path_factory.mktemp("site") / "site.db"
    Site(f"sqlite:///{path}", path.parent).manage("migrate", "--verbosity", "0")
    return path


@pytest.fixture
def sqlite_file(template, tmp_path):
    path = tmp_path / "site.db"
    path.write_bytes(template.read_bytes())
    return f"sqlite:///{path}"


@pytest.fixture
def site(sqlite_file, tmp_path, django_db_blocker):
    """A site on SQLite, and its store."""
    yield from _site(sqlite_file, tmp_path, django_db_blocker)


@pytest.fixture(params=["sqlite", "postgres", "mysql"])
def sql_site(request, tmp_path, django_db_blocker):
    """A site on each SQL database in turn."""
    if request.param == "sqlite":
        yield from _site(request.getfixturevalue("sqlite_file"), tmp_path, django_db_blocker)
        return
    database = {"postgres": postgres_database, "mysql": mysql_database}[request.param]
    with database() as url:
        Site(url, tmp_path).manage("migrate", "--verbosity", "0")
        yield from _site(url, tmp_path, django_db_blocker)


def _site(url, folder, django_db_blocker):
    site = Site(url, folder)
    with django_db_blocker.unblock():
        site.backend = create_storage_backend(url)
        yield site
        site.close()
        forget(site.backend.alias)


def attempts(backend: StorageBackend, run_id: str) -> list[tuple[int, str]]:
    return [(one.number, one.status) for one in backend.runs.list_attempts(run_id)]


def test_each_task_is_a_run_whose_duration_is_without_the_wait(site):
    calls = ["add.enqueue(2, b=3)", "fail.enqueue('no pages')", "checkpointed.enqueue(['p'])"]
    added, failed, checkpointed = site.enqueue(*calls, "quiet.enqueue()")[:3]
    runs, states = site.backend
    assert [run.status for run in runs.list_runs()] == ["pending"] * 3
    time.sleep(1)

    output = site.work()

    run = runs.get(added)
    assert (run.status, run.outputs, run.inputs) == ("completed", 5, {"a": 2, "b": 3})
    assert run.duration_seconds < 1 <= (run.completed_at - run.started_at).total_seconds()
    assert runs.get(failed).error_message.startswith("ValueError: no pages\n\nTraceback")
    assert (runs.get(checkpointed).total_tokens, states.get_latest_state(checkpointed)) == (
        10,
        {"p": True},
    )
    assert runs.count_runs() == 3
    assert "was not stored" not in output


def test_a_task_of_a_killed_worker_goes_on_in_its_run_as_the_next_attempt(sql_site):
    site = sql_site
    (task_id,) = site.enqueue(f"two_steps.enqueue({str(site.folder)!r})")
    worker = site.worker()
    site.wait_for("first")
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    time.sleep(5 * HEARTBEAT)
    runs, states = site.backend
    assert runs.get(task_id).status == "running"

    assert "1 run " in site.manage("fail_stalled_runs", "--idle", f"{3 * HEARTBEAT}s")
    assert runs.get(task_id).status == "failed"
    site.put_back(task_id)
    site.let_go()
    site.work()

    assert attempts(site.backend, task_id) == [(1, "failed"), (2, "completed")]
    assert states.get_latest_state(task_id) == {"by": 1, "then": 2}
    assert runs.get(task_id).outputs == 2


def test_a_worker_that_was_given_up_and_wakes_changes_nothing(site):
    (task_id,) = site.enqueue(f"two_steps.enqueue({str(site.folder)!r})")
    stopped = site.worker()
    site.wait_for("first")
    stopped.send_signal(signal.SIGSTOP)
    site.put_back(task_id)  # without fail_stalled_runs: the run is still running
    site.let_go()
    site.work()
    before = site.backend.runs.get(task_id)

    stopped.send_signal(signal.SIGCONT)
    stopped.communicate(timeout=PATIENCE)

    after = site.backend.runs.get(task_id)
    assert (after.status, after.outputs, after.completed_at) == (
        "completed",
        2,
        before.completed_at,
    )
    assert attempts(site.backend, task_id) == [(1, "failed"), (2, "completed")]
    assert site.backend.states.get_latest_state(task_id) == {"by": 1, "then": 2}
    assert site.results("exception_class_path") == ["workflow_storage.exceptions.RunLostError"]


def test_a_task_that_runs_for_long_gives_signs_of_life(site):
    (task_id,) = site.enqueue(f"wait.enqueue({str(site.folder)!r})")
    worker = site.worker()
    site.wait_for("begun")
    first = site.backend.runs.get(task_id).heartbeat_at
    time.sleep(5 * HEARTBEAT)

    assert site.backend.runs.get(task_id).heartbeat_at > first
    assert "0 runs" in site.manage("fail_stalled_runs", "--idle", f"{4 * HEARTBEAT}s")
    site.let_go()
    worker.communicate(timeout=PATIENCE)
    assert site.backend.runs.get(task_id).status == "completed"


def test_a_worker_that_is_told_to_end_twice_cancels_the_run(site):
    (task_id,) = site.enqueue(f"wait.enqueue({str(site.folder)!r})")
    worker = site.worker()
    site.wait_for("begun")
    worker.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    worker.send_signal(signal.SIGTERM)
    worker.communicate(timeout=PATIENCE)

    assert site.backend.runs.get(task_id).status == "cancelled"


def test_a_store_that_is_not_there_neither_fails_a_task_nor_ends_the_worker(site):
    site.environment["SITE_STORE"] = "redis://127.0.0.1:1/0"
    ids = site.enqueue("add.enqueue(2, b=3)", "add.enqueue(4)")
    output = site.work()

    assert site.results("status") == ["SUCCESSFUL"] * 2
    assert all(f"What became of task {task_id} was not stored" in output for task_id in ids)

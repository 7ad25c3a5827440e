"""Real clusters, with writers in real processes: nothing acknowledged is lost, all is in order."""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from django.db import transaction

from tests.clusters import galera_nodes, postgres_pair
from tests.servers import wait_until
from workflow_storage import StorageError, StorageUnavailableError, create_storage_backend
from workflow_storage.backends.orm import errors
from workflow_storage.factory import forget
from workflow_storage.testing import in_threads, new_run

pytestmark = pytest.mark.slow

SECONDS = 8
"""How long writers write."""

# Saves and compares until the end, and prints a line for each that was acknowledged.
WRITER = """
import json, sys, time
from workflow_storage import StatusConflictError, StorageUnavailableError, create_storage_backend

url, number, seconds, own_run, shared_run, contested = json.loads(sys.argv[1])
backend = create_storage_backend(url)
end, turn = time.time() + seconds, 0
contested = contested[number:] + contested[:number]
print(json.dumps(["ready"]), flush=True)

def tell(*what):
    print(json.dumps(what), flush=True)

while time.time() < end:
    turn += 1
    run_id = shared_run if turn % 2 else own_run
    state = {"writer": number, "turn": turn, "text": "x" * (5000 if turn % 4 == 0 else 100)}
    try:
        tell("saved", run_id, backend.states.save_state(run_id, state, "node"), number, turn)
        if contested and turn % 3 == 0:
            run_id = contested.pop()
            try:
                backend.runs.update_status(run_id, "running", expected="pending")
                tell("won", run_id)
            except StatusConflictError:
                pass
    except StorageUnavailableError as exc:
        tell("failed", str(exc))
        time.sleep(0.05)
"""


class Writers:
    """Processes that write to a store, each through a URL, and what they were told."""

    def __init__(self, urls, seconds=SECONDS, contested=60):
        self.shared = new_run(id="shared")
        self.own = [new_run(id=f"own {number}") for number in range(len(urls))]
        self.contested = [new_run(id=f"contested {number}") for number in range(contested)]
        self.urls = urls
        self.seconds = seconds
        self.outputs = [tempfile.TemporaryFile("w+") for _ in urls]  # noqa: SIM115
        self.lines = []

    def start(self, backend):
        for run in (self.shared, *self.own, *self.contested):
            backend.runs.add(run)
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        environment.pop("DJANGO_SETTINGS_MODULE", None)
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", WRITER, json.dumps(self.arguments(number, url))],
                env=environment,
                stdout=output,
                cwd=tempfile.gettempdir(),
            )
            for number, (url, output) in enumerate(zip(self.urls, self.outputs, strict=True))
        ]
        wait_until(lambda: all(os.fstat(output.fileno()).st_size for output in self.outputs))

    def arguments(self, number, url):
        own, contested = self.own[number].id, [run.id for run in self.contested]
        return [url, number, self.seconds, own, self.shared.id, contested]

    def finish(self):
        """Wait until they have ended, and remember what each was told, in its order."""
        for process in self.processes:
            assert process.wait(timeout=self.seconds + 60) == 0
        for output in self.outputs:
            with output:
                output.seek(0)
                self.lines.append([json.loads(line) for line in output])

    def told(self, what):
        return [line[1:] for lines in self.lines for line in lines if line[0] == what]

    def check(self, backend):
        """Check that all that was acknowledged is there, once, in order, and of one winner."""
        saved = self.told("saved")
        histories = {
            run.id: backend.states.get_state_history(run.id) for run in (self.shared, *self.own)
        }
        for history in histories.values():
            assert [checkpoint["step"] for checkpoint in history] == list(range(len(history)))
            written = Counter(
                (state["state_data"]["writer"], state["state_data"]["turn"]) for state in history
            )
            assert set(written.values()) <= {1}, "a state was stored twice"
        for run_id, step, number, turn in saved:
            state = histories[run_id][step]["state_data"]
            assert (state["writer"], state["turn"]) == (number, turn)
        for number in range(len(self.urls)):
            turns = [
                state["state_data"]["turn"]
                for state in histories["shared"]
                if state["state_data"]["writer"] == number
            ]
            assert turns == sorted(turns)
        winners = Counter(run_id for (run_id,) in self.told("won"))
        assert set(winners.values()) <= {1}, "a run was begun by two"
        for run_id in winners:
            assert backend.runs.get(run_id).status == "running"
        return len(saved), len(winners)


@pytest.fixture
def pair(django_db_blocker):
    with django_db_blocker.unblock(), postgres_pair() as pair:
        yield pair


@pytest.fixture(scope="module")
def nodes(django_db_blocker):
    with django_db_blocker.unblock(), galera_nodes() as nodes:
        yield nodes


@pytest.fixture
def galera(nodes, django_db_blocker):
    """Three nodes, each as a store that is empty."""
    with django_db_blocker.unblock():
        nodes.execute(nodes.ports[0], "DROP DATABASE workflows")
        nodes.execute(nodes.ports[0], "CREATE DATABASE workflows CHARACTER SET utf8mb4")
        backends = []

        def open_all():
            backends.extend(create_storage_backend(url) for url in nodes.urls)
            return backends

        yield SimpleNamespace(nodes=nodes, open_all=open_all)
        for backend in backends:
            forget(backend.runs.alias)


class TestPostgreSQLWithAStandby:
    def test_when_the_primary_is_killed_nothing_acknowledged_is_lost(self, pair):
        backend = create_storage_backend(pair.url)
        writers = Writers([pair.url] * 4)
        writers.start(backend)
        time.sleep(SECONDS / 3)
        pair.kill(pair.primary)
        pair.promote()
        writers.finish()
        forget(backend.runs.alias)

        promoted = create_storage_backend(pair.url)
        saved, won = writers.check(promoted)
        forget(promoted.runs.alias)
        assert saved > 50
        assert won
        assert writers.told("failed")
        for lines in writers.lines:
            kinds = [line[0] for line in lines]
            assert "saved" in kinds[kinds.index("failed") :], "a writer did not go on"

    def test_a_standby_without_the_tables_says_so(self, pair):
        at_standby = pair.url_of(pair.standby)
        with pytest.raises(
            StorageUnavailableError, match=r"takes no writes, as a standby.*on the primary first"
        ):
            create_storage_backend(at_standby)

        primary = create_storage_backend(pair.url)
        run = new_run()
        primary.runs.add(run)
        primary.states.save_state(run.id, {"n": 1}, "node")
        standby = create_storage_backend(at_standby)
        deadline = time.monotonic() + 30
        while standby.states.get_latest_state(run.id) != {"n": 1}:
            assert time.monotonic() < deadline
        with pytest.raises(StorageError):
            standby.runs.heartbeat(run.id)
        forget(standby.runs.alias)
        forget(primary.runs.alias)

    def test_an_error_names_the_hosts_of_the_url(self, pair):
        backend = create_storage_backend(pair.url)
        pair.kill(pair.primary)

        with pytest.raises(
            StorageUnavailableError,
            match=rf"on 127\.0\.0\.1:{pair.primary}, 127\.0\.0\.1:{pair.standby} is unavailable",
        ):
            backend.runs.get("x")
        forget(backend.runs.alias)


class TestGalera:
    def test_all_of_fifteen_opens_at_once_from_three_nodes_succeed(self, galera):
        program = (
            "import sys, time; from workflow_storage import create_storage_backend\n"
            "sys.stdin.readline(); backend = create_storage_backend(sys.argv[1])\n"
            "print(backend.runs.count_runs())"
        )
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        environment.pop("DJANGO_SETTINGS_MODULE", None)
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", program, url],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=tempfile.gettempdir(),
            )
            for url in galera.nodes.urls * 5
        ]
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
        ended = [(*process.communicate(timeout=90), process.returncode) for process in processes]

        errors_told = [error[-3000:] for _, error, code in ended if code]
        assert not errors_told, errors_told[0]
        assert [out for out, _, _ in ended] == ["0\n"] * 15

    def test_saves_on_one_run_from_three_nodes_are_all_kept_and_none_starves(self, galera):
        backends = galera.open_all()
        writers = Writers(galera.nodes.urls * 2)
        writers.start(backends[0])
        writers.finish()
        backends[0].states.save_state("shared", {"writer": -1, "turn": 0}, "last")

        saved, won = writers.check(backends[0])
        assert writers.told("failed") == []
        assert saved > 50
        assert won
        each = [sum(line[0] == "saved" for line in lines) for lines in writers.lines]
        assert all(each), each

    def test_with_sync_wait_each_node_shows_what_was_written_on_another(self, galera):
        one, *_ = galera.open_all()
        url = f"{galera.nodes.urls[1]}?init_command=SET%20SESSION%20wsrep_sync_wait%3D1"
        other = create_storage_backend(url)
        for number in range(200):
            run = new_run(id=f"run {number}")
            one.runs.add(run)
            one.states.save_state(run.id, {"n": number}, "node")
            assert other.states.get_latest_state(run.id) == {"n": number}
        forget(other.runs.alias)

    def test_a_node_that_is_not_ready_is_tried_again_for_a_time(self, galera, monkeypatch):
        backend, *_ = galera.open_all()
        run = new_run()
        backend.runs.add(run)
        nodes = galera.nodes
        nodes.execute(nodes.ports[0], "SET GLOBAL wsrep_reject_queries = 'ALL'")
        ready = threading.Timer(
            1, nodes.execute, (nodes.ports[0], "SET GLOBAL wsrep_reject_queries = 'NONE'")
        )
        ready.start()

        assert backend.states.save_state(run.id, {"n": 1}, "node") == 0
        ready.join()

        nodes.execute(nodes.ports[0], "SET GLOBAL wsrep_reject_queries = 'ALL'")
        monkeypatch.setattr(errors, "PATIENCE", 0.3)
        try:
            with pytest.raises(StorageUnavailableError, match="Let the node join its cluster"):
                backend.states.save_state(run.id, {"n": 2}, "node")
        finally:
            nodes.execute(nodes.ports[0], "SET GLOBAL wsrep_reject_queries = 'NONE'")
        assert backend.states.save_state(run.id, {"n": 3}, "node") == 1

    def test_a_conflict_in_the_callers_transaction_says_to_roll_it_back(self, galera):
        one, other, _ = galera.open_all()
        run = new_run()
        one.runs.add(run)
        other.runs.update(run.id, total_tokens=1)

        def change():
            with transaction.atomic(using=one.runs.alias):
                one.runs.update(run.id, total_tokens=2)
                # Elsewhere, for one thread waits for no other node.
                in_threads(1, lambda _: other.runs.update(run.id, total_tokens=3))
                deadline = time.monotonic() + 30
                while time.monotonic() < deadline:
                    one.runs.get(run.id)

        with pytest.raises(
            StorageUnavailableError, match="Roll your transaction back and run it again"
        ):
            change()
        assert one.runs.get(run.id).total_tokens == 3

    def test_when_a_node_is_killed_nothing_acknowledged_is_lost(self, galera):
        backends = galera.open_all()
        urls = galera.nodes.urls
        writers = Writers(urls)
        writers.start(backends[0])
        time.sleep(SECONDS / 3)
        galera.nodes.kill(galera.nodes.ports[2])
        writers.finish()

        saved, won = writers.check(backends[0])
        assert saved > 50
        assert won
        for lines in writers.lines[:2]:
            assert sum(line[0] == "saved" for line in lines[-10:]) > 5, lines[-10:]

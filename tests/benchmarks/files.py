"""One long run exported to a file and imported from it: time, memory, and the size of the file."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from django.db import connections
from django.db.models import Sum
from django.db.models.functions import Coalesce, Length

from tests.benchmarks import samples
from tests.benchmarks.measure import Report, console
from workflow_storage import ExecutionState, StorageBackend, create_storage_backend
from workflow_storage.factory import forget
from workflow_storage.testing import stored_run

MEMORY = 100
"""MB that an import may take beyond what it takes for an empty file."""

_WORK = r"""
import json, re, sys, time
from workflow_storage import create_storage_backend
from workflow_storage import transfer
store = create_storage_backend(sys.argv[2])
start = time.perf_counter()
results = list(getattr(transfer, sys.argv[1])(*((store, sys.argv[3]) if sys.argv[1] == "export_runs" else (sys.argv[3], store))))
taken = time.perf_counter() - start
assert all(result.outcome == "copied" for result in results), results
most = re.search(r"VmHWM:\s*(\d+)", open("/proc/self/status").read())[1]  # kB
print(json.dumps([taken, int(most) / 1024]))
"""


def run(*, quick: bool) -> None:
    steps = 300 if quick else 1200
    with samples.folder() as folder:
        _compare("SQLite", f"sqlite:///{folder}/source.db", f"sqlite:///{folder}/target.db", steps)
    with samples.postgres_url() as source, samples.postgres_url() as target:
        if source and target:
            _compare("PostgreSQL", source, target, steps)


def _compare(name: str, source_url: str, target_url: str, steps: int) -> None:
    source = create_storage_backend(source_url)
    create_storage_backend(target_url)
    with console.status(f"{name}: saving {steps:,} states"):
        _fill(source, steps)
    with samples.folder() as folder:
        path, empty = folder / "runs.jsonl", folder / "empty.jsonl"
        empty.touch()
        written = [_measured("export_runs", source_url, path) for _ in range(3)]
        read = []
        for _ in range(3):
            target = create_storage_backend(target_url)
            for run in target.runs.list_runs():
                target.runs.delete(run.id)
            read.append(_measured("import_runs", target_url, path))
        nothing = _measured("import_runs", target_url, empty)
        stored = ExecutionState.objects.using(source.alias).aggregate(
            size=Sum(Coalesce(Length("state_json"), 0) + Coalesce(Length("state_delta"), 0))
        )["size"]
        size = path.stat().st_size
        in_database = _size_of_states(source)
    report = Report(f"Files: {name}, one run of {steps:,} states, best of three", "ms")
    report.add("import", min(read)[0] * 1e3, "its export", min(written)[0] * 1e3, 2)
    report.print()
    report = Report(f"Files: {name}, size and memory", "kB")
    report.add("the file", size / 1e3, "states in the database", in_database / 1e3, 1.3)
    report.add("the file", size / 1e3, "payloads of the states", stored / 1e3)
    memory = min(most for _, most in read) - nothing[1]
    report.add(
        "memory of the import beyond an empty one", memory * 1024, "100 MB", MEMORY * 1024, 1
    )
    report.print()
    for alias in (source.alias, create_storage_backend(target_url).alias):
        forget(alias)


def _size_of_states(source: StorageBackend) -> int:
    """Return the bytes of the table of states with its indexes."""
    with connections[source.alias].cursor() as cursor:
        if cursor.db.vendor == "postgresql":
            cursor.execute("SELECT pg_total_relation_size('execution_states')")
        else:
            cursor.execute(
                "SELECT SUM(pgsize) FROM dbstat WHERE name IN "
                "(SELECT name FROM sqlite_master WHERE tbl_name = 'execution_states')"
            )
        return int(cursor.fetchone()[0])


def _measured(what: str, url: str, path: Path) -> tuple[float, float]:
    """Return the seconds that a transfer takes in a process of its own, and its memory in MB."""
    done = subprocess.run(
        [sys.executable, "-c", _WORK, what, url, str(path)],
        check=True,
        capture_output=True,
        text=True,
    )
    seconds, memory = json.loads(done.stdout)
    return seconds, memory


def _fill(backend: StorageBackend, steps: int) -> None:
    run = stored_run(backend, status="running")
    writer = backend.states.writer(run.id, attempt=1)
    text, chance = samples.prose(), random.Random(1)
    messages: list[Any] = []
    for step in range(steps):
        size, position = chance.randrange(500, 3500), chance.randrange(len(text) - 4000)
        messages.append(
            {"role": ("assistant", "user")[step % 2], "content": text[position:][:size]}
        )
        state = {"system": text[:6000], "messages": messages}
        writer.save_state(state, "agent", duration_seconds=0.5, tokens=700, cost_usd=0.001)

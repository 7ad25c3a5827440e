"""The cost of each operation, and the memory of the large ones, as the tables grow."""

import random
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from django.db import connections

from tests.benchmarks import samples
from tests.benchmarks.measure import Report, console, medians
from workflow_storage import StorageBackend, WorkflowRun, create_storage_backend
from workflow_storage.factory import forget

SMALL = 10_000
STATES_OF_A_RUN = 10
START = datetime(2026, 1, 1, tzinfo=UTC)


def run(*, quick: bool) -> None:
    large = 100_000 if quick else 1_000_000
    with samples.folder() as folder:
        small = f"sqlite:///{folder}/small.db"
        _compare("SQLite", small, f"sqlite:///{folder}/large.db", large, quick)
    with samples.postgres_url() as small_url, samples.postgres_url() as large_url:
        if small_url and large_url:
            _compare("PostgreSQL", small_url, large_url, large, quick)


def _compare(name: str, small_url: str, large_url: str, size: int, quick: bool) -> None:
    stores = {SMALL: create_storage_backend(small_url), size: create_storage_backend(large_url)}
    for count, backend in stores.items():
        with console.status(f"{name}: making {count:,} runs"):
            fill(backend, count)
    console.print(f"{name}: {size:,} runs with {size * STATES_OF_A_RUN:,} states made")
    chance = random.Random(1)
    calls: dict[str, dict[str, Any]] = {}
    for count, backend in stores.items():
        for operation, call in _operations(backend, count, chance).items():
            calls.setdefault(operation, {})[str(count)] = call
    report = Report(f"Scale: {name}, {size:,} runs beside {SMALL:,}, median")
    for operation, both in calls.items():
        each = 2 if "list" in operation else 10
        taken = medians(both, 15 if quick else 60, each)
        report.add(operation, taken[str(size)], f"at {SMALL:,} runs", taken[str(SMALL)], 1.5)
    report.print()
    memory = Report(f"Scale: {name}, growth of the process's memory", unit="MB")
    before = memory_now()
    seen = sum(1 for _ in stores[size].runs.iter_runs())
    assert seen >= size
    memory.add(f"iter_runs over {seen:,}", max(peak_memory() - before, 1), "at most", 100, 1)
    before = memory_now()
    # Nine of ten runs have ended, so this is half of all.
    half = START + timedelta(seconds=size * 5 // 9)
    deleted = stores[size].runs.delete_finished(before=half)
    memory.add(f"delete_finished of {deleted:,}", max(peak_memory() - before, 1), "at most", 200, 1)
    memory.print()
    for backend in stores.values():
        forget(backend.runs.alias)


def _operations(backend: StorageBackend, count: int, chance: random.Random) -> dict[str, Any]:
    runs, states = backend

    def any_id() -> str:
        return f"{chance.randrange(count):036}"

    state = samples.small_state(0)
    middle = f"{count // 2:036}"
    return {
        "get": lambda: runs.get(any_id()),
        "add": lambda: runs.add(WorkflowRun(workflow_name="workflow-1", status="running")),
        "save_state": lambda: states.save_state(any_id(), state, "node"),
        "get_latest_state": lambda: states.get_latest_state(any_id()),
        "list_by_workflow": lambda: runs.list_by_workflow("workflow-1"),
        "list_runs, first page": runs.list_runs,
        "list_runs, a page in the middle": lambda: runs.list_runs(before=middle),
        "list_runs by status, in the middle": lambda: runs.list_runs(
            status="failed", before=middle
        ),
    }


def fill(backend: StorageBackend, count: int, states: int = STATES_OF_A_RUN) -> None:
    """Make runs of 50 workflows, one a second, nine of ten of which have ended, with their states."""
    connection = connections[backend.runs.alias]
    if connection.vendor == "postgresql":
        numbers = "SELECT i FROM generate_series(0, %s) AS numbers(i)"
        identity, moment = "lpad(i::text, 36, '0')", "%s::timestamptz + i * interval '1 second'"
        start: Any = START
    else:
        numbers = (
            "WITH RECURSIVE numbers(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM numbers "
            "WHERE i < %s) SELECT i FROM numbers"
        )
        identity = "printf('%%036d', i)"
        moment = "strftime('%%Y-%%m-%%d %%H:%%M:%%S', %s, '+' || i || ' seconds')"
        start = START.strftime("%Y-%m-%d %H:%M:%S")
    status = (
        "CASE i %% 20 WHEN 0 THEN 'failed' WHEN 1 THEN 'running' "
        "WHEN 2 THEN 'pending' ELSE 'completed' END"
    )
    with connection.cursor() as cursor:
        cursor.execute(
            "INSERT INTO workflow_runs (id, workflow_name, status, inputs, labels, attempt, started_at, "
            "completed_at) "
            f"SELECT {identity}, 'workflow-' || (i %% 50), {status}, '{{\"number\":1}}', '{{}}', 1, {moment}, "
            f"CASE WHEN i %% 20 IN (1, 2) THEN NULL ELSE {moment} END FROM ({numbers}) AS n",
            [start, start, count - 1],
        )
        for step in range(states):
            cursor.execute(
                "INSERT INTO execution_states (run_id, step, node_id, created_at, state_json) "
                f'SELECT {identity}, {step}, \'node\', {moment}, \'{{"step":{step},"text":"x"}}\' '
                f"FROM ({numbers}) AS n",
                [start, count - 1],
            )
        cursor.execute("ANALYZE")


def memory_now() -> float:
    """Return the memory that the process has now, in MB, and measure its peak from here."""
    Path("/proc/self/clear_refs").write_text("5")  # see proc(5)
    return _status("VmRSS")


def peak_memory() -> float:
    """Return the most memory that the process has had since, in MB."""
    return _status("VmHWM")


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024

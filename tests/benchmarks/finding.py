"""Runs found by label, and summed up: at a million runs, beside fewer, and beside plain SQL."""

from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

from django.db import connections

from tests.benchmarks import samples
from tests.benchmarks.measure import Report, console, medians
from workflow_storage import StorageBackend, create_storage_backend
from workflow_storage.factory import forget

SMALL = 10_000
START = datetime(2026, 1, 1, tzinfo=UTC)
_BUCKETS = "1 + FLOOR(LN(duration_seconds / 0.001) / 0.020001333413346678)"


def run(*, quick: bool) -> None:
    large = 100_000 if quick else 1_000_000
    with samples.folder() as folder:
        _compare("SQLite", f"sqlite:///{folder}/small.db", f"sqlite:///{folder}/large.db", large)
    with samples.postgres_url() as small_url, samples.postgres_url() as large_url:
        if small_url and large_url:
            _compare("PostgreSQL", small_url, large_url, large)


def _compare(name: str, small_url: str, large_url: str, size: int) -> None:
    stores = {SMALL: create_storage_backend(small_url), size: create_storage_backend(large_url)}
    for count, backend in stores.items():
        with console.status(f"{name}: making {count:,} runs"):
            _fill(backend, count)
    labels = Report(f"Finding: {name}, {size:,} runs beside {SMALL:,}, median")
    tenant, both = {"tenant": "t3"}, {"tenant": "t3", "user": "u23"}
    calls: dict[str, Any] = {
        "a page of a label": lambda runs: runs.list_runs(labels=tenant, limit=50),
        "a page of two labels": lambda runs: runs.list_runs(labels=both, limit=50),
        "a page of a parent": lambda runs: runs.list_runs(parent_id=f"{7:036}", limit=50),
    }
    for what, call in calls.items():
        taken = medians(
            {str(count): partial(call, backend.runs) for count, backend in stores.items()}, 40, 2
        )
        target = None if "two" in what else 1.5
        labels.add(what, taken[str(size)], f"at {SMALL:,} runs", taken[str(SMALL)], target)
    labels.print()
    report = Report(f"Summaries: {name}, 7 days of {size:,} runs, beside the driver, median")
    backend = stores[size]
    end = START + timedelta(seconds=size)
    week = {"started_after": end - timedelta(days=7), "started_before": end}
    for by, group in {
        "workflow_name": "workflow_name",
        "day": _day(backend),
        "status": "status",
    }.items():
        taken = medians(
            {
                "ours": lambda by=by: backend.runs.summarize(by=by, **week),
                "theirs": lambda group=group: _plain(backend, group, week),
            },
            5,
        )
        report.add(f"by {by}", taken["ours"], "the same in SQL", taken["theirs"], 1.3)
    report.print()
    for store in stores.values():
        forget(store.alias)


def _day(backend: StorageBackend) -> str:
    is_sqlite = connections[backend.alias].vendor == "sqlite"
    return "substr(started_at, 1, 10)" if is_sqlite else "date_trunc('day', started_at)"


def _plain(backend: StorageBackend, group: str, week: dict[str, datetime]) -> None:
    connection = connections[backend.alias]
    connection.ensure_connection()
    cursor = connection.connection.cursor()
    place = "?" if connection.vendor == "sqlite" else "%s"
    times: list[Any] = list(week.values())
    if connection.vendor == "sqlite":
        times = [time.strftime("%Y-%m-%d %H:%M:%S") for time in times]
    ended = "status IN ('completed', 'failed', 'cancelled') AND duration_seconds IS NOT NULL"
    cursor.execute(
        f"SELECT {group}, status, CASE WHEN {ended} AND duration_seconds < 0.001 THEN 0 WHEN {ended} "
        f"THEN {_BUCKETS} END AS bucket, count(*), max(duration_seconds), sum(total_tokens), "
        "sum(CAST(round(total_cost_usd * 1e9) AS bigint)) FROM workflow_runs "
        f"WHERE started_at >= {place} AND started_at < {place} GROUP BY 1, 2, 3",
        times,
    )
    cursor.fetchall()
    cursor.close()


def _fill(backend: StorageBackend, count: int) -> None:
    connection = connections[backend.alias]
    if connection.vendor == "postgresql":
        numbers = "SELECT i FROM generate_series(0, %s) AS numbers(i)"
        identity, moment = "lpad(i::text, 36, '0')", "%s::timestamptz + i * interval '1 second'"
        parent = "lpad((i / 10)::text, 36, '0')"
        start: Any = START
    else:
        numbers = (
            "WITH RECURSIVE numbers(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM numbers "
            "WHERE i < %s) SELECT i FROM numbers"
        )
        identity, parent = "printf('%%036d', i)", "printf('%%036d', i / 10)"
        moment = "strftime('%%Y-%%m-%%d %%H:%%M:%%S', %s, '+' || i || ' seconds')"
        start = START.strftime("%Y-%m-%d %H:%M:%S")
    status = (
        "CASE i %% 20 WHEN 0 THEN 'failed' WHEN 1 THEN 'running' "
        "WHEN 2 THEN 'pending' ELSE 'completed' END"
    )
    with connection.cursor() as cursor:
        cursor.execute(
            "INSERT INTO workflow_runs (id, workflow_name, status, labels, attempt, started_at, "
            "parent_id, duration_seconds, total_tokens, total_cost_usd) "
            f"SELECT {identity}, 'workflow-' || (i %% 50), {status}, '{{}}', 1, {moment}, {parent}, "
            "CASE WHEN i %% 20 IN (1, 2) THEN NULL ELSE 0.01 * (1 + (i %% 100000) * 37 %% 100000) END, "
            f"i %% 1000, 0.0001 * (i %% 100) FROM ({numbers}) AS n",
            [start, count - 1],
        )
        for name, value in (("tenant", "'t' || (i %% 20)"), ("user", "'u' || (i %% 100)")):
            cursor.execute(
                "INSERT INTO workflow_run_labels (run_id, name, value, started_at) "
                f"SELECT {identity}, '{name}', {value}, {moment} FROM ({numbers}) AS n",
                [start, count - 1],
            )
        cursor.execute("ANALYZE")

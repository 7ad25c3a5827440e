"""Redis beside plain redis-py that sends the same commands, and beside the ORM on PostgreSQL."""

import json
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import redis

from tests.benchmarks import samples
from tests.benchmarks.hot_path import new_run
from tests.benchmarks.measure import Report, console, medians
from tests.servers import RedisServers
from workflow_storage import StorageBackend, create_storage_backend
from workflow_storage.factory import forget
from workflow_storage.validation import PAYLOADS, RUN_FIELDS

if TYPE_CHECKING:
    from workflow_storage.base import NodeUsage, Totals

TARGET = 2
FIELDS = RUN_FIELDS[1:]
TIMES = {"started_at", "completed_at", "heartbeat_at", "attempt_started_at"}
JSON = PAYLOADS | {"labels"}
MEMORY_RUNS, MEMORY_STATES = 10_000, 10


class Driver:
    """The same commands with the same values on redis-py, to and from plain dicts."""

    def __init__(self, client: Any, base: str) -> None:
        from workflow_storage.backends.redis import scripts as redis_scripts

        self.client, self.base, self.scripts = client, base, redis_scripts

    def call(self, script: Any, run_id: str, *args: Any, indexes: tuple[str, ...] = ()) -> Any:
        keys = (f"{self.base}:run:{run_id}", f"{self.base}:states:{run_id}")
        others = (f"{self.base}:{name}" for name in indexes)
        return self.client.evalsha(script.sha, 2 + len(indexes), *keys, *others, run_id, *args)

    def time(self, value: datetime) -> str:
        return value.replace(tzinfo=None).isoformat(timespec="microseconds")

    def add(self, run: Any) -> None:
        values: list[Any] = []
        for name in FIELDS:
            value = getattr(run, name)
            if value is not None and value != {}:
                text = (
                    json.dumps(value)
                    if name in JSON
                    else self.time(value)
                    if name in TIMES
                    else value
                )
                values += [name, text]
        values += ["version", 0]
        self.call(self.scripts.ADD, run.id, *values, indexes=self.scripts.INDEXES)

    def parsed(self, values: Any) -> dict[str, Any]:
        run: dict[str, Any] = {}
        for name, value in zip(FIELDS, values, strict=True):
            if value is None:
                run[name] = None
            elif name in JSON:
                run[name] = json.loads(value)
            elif name in TIMES:
                run[name] = datetime.fromisoformat(value.decode()).replace(tzinfo=UTC)
            else:
                run[name] = value.decode()
        return run

    def get(self, run_id: str) -> Any:
        return self.parsed(self.client.hmget(f"{self.base}:run:{run_id}", FIELDS))

    def update_status(self, run_id: str, payload: Any) -> None:
        values = ("outputs", json.dumps(payload))
        at = self.time(datetime.now(UTC))
        arguments = ("", "", "completed", at, "", len(values), *values, "waiting_for")
        self.call(self.scripts.CHANGE_STATUS, run_id, *arguments, indexes=self.scripts.INDEXES)

    def list(self, name: str) -> Any:
        statuses = ("pending", "running", "completed", "failed", "cancelled")
        keys = [f"{self.base}:workflows:{status}" for status in statuses]
        bounds = (f"({name}\1", f"[{name}\0")
        lists = self.client.evalsha(self.scripts.INDEX.sha, len(keys), *keys, *bounds, 100)
        entries = sorted((entry for found in lists for entry in found), reverse=True)[:100]
        pipeline = self.client.pipeline(transaction=False)
        for entry in entries:
            run_id = entry[len(name) + 28 :].decode()
            pipeline.hmget(f"{self.base}:run:{run_id}", FIELDS)
        return [self.parsed(values) for values in pipeline.execute()]

    def save_state(self, run_id: str, state: Any) -> Any:
        now = self.time(datetime.now(UTC))
        text = json.dumps(state)
        mark = f"{now} 00000000     node"
        return self.call(self.scripts.APPEND, run_id, "", "", mark, text, 0)

    def checkpoint(self, run_id: str, state: Any) -> Any:
        now = self.time(datetime.now(UTC))
        text = json.dumps(state)
        mark = f"{now} 00000000 1 1.5 7 0.25 node"
        noted = ("total_tokens", 7, "total_cost_usd", 0.25, "current_node", "node")
        return self.call(self.scripts.APPEND, run_id, 1, "", mark, text, len(noted), *noted)

    def latest(self, run_id: str) -> Any:
        _, _, step, mark, text = self.call(self.scripts.CHAIN, run_id, "")
        created_at = datetime.fromisoformat(mark[:26].decode()).replace(tzinfo=UTC)
        return step, mark.split(b" ", 6)[6].decode(), created_at, json.loads(text)


def run(*, quick: bool) -> None:
    import pytest

    try:
        _run(quick=quick)
    except pytest.skip.Exception as exc:
        print(f"skipped: {exc}")


def _run(*, quick: bool) -> None:
    rounds = 15 if quick else 60
    with (
        tempfile.TemporaryDirectory() as folder,
        RedisServers(Path(folder), 1) as servers,
        samples.postgres_url() as postgres,
    ):
        backend = create_storage_backend(f"redis://127.0.0.1:{servers.ports[0]}")
        client = redis.Redis(port=servers.ports[0], protocol=2)
        _memory(backend, client, MEMORY_RUNS // 10 if quick else MEMORY_RUNS)
        client.flushall()
        beside = create_storage_backend(postgres) if postgres else None
        _compare(backend, Driver(client, backend.runs.store.key_prefixes[0]), beside, rounds)
        if beside:
            forget(beside.runs.alias)
        backend.runs.store.close()


def _memory(backend: StorageBackend, client: Any, count: int) -> None:
    before = client.info("memory")["used_memory"]
    payload = 0
    for number in range(count):
        one = new_run({"number": number})
        backend.runs.add(one)
        writer = backend.states.writer(one.id)
        for step in range(MEMORY_STATES):
            state = samples.small_state(step)
            payload += len(json.dumps(state, separators=(",", ":")))
            writer.save_state(state, "node")
    used = client.info("memory")["used_memory"] - before
    console.print(
        f"Redis: {count:,} runs with {MEMORY_STATES} states of 2.6 kB take {used / 1e6:.0f} MB of "
        f"memory, {used / payload:.2f} times their JSON text ({payload / 1e6:.0f} MB)\n"
    )


def _operations(backend: StorageBackend, payload: Any) -> dict[str, Any]:
    runs, states = backend
    for number in range(300):
        runs.add(new_run(payload, f"workflow-{number % 2}"))
    run = new_run(payload)
    runs.add(run)
    for number in range(20):
        states.save_state(run.id, samples.small_state(number), "node")
    owned = new_run(payload)
    runs.add(owned)
    writer = states.writer(owned.id, attempt=1)
    usage: NodeUsage = {"duration_seconds": 1.5, "tokens": 7, "cost_usd": 0.25}
    totals: Totals = {"total_tokens": 7, "total_cost_usd": 0.25}
    return {
        "add": lambda: runs.add(new_run(payload)),
        "get": lambda: runs.get(run.id),
        "update_status": lambda: runs.update_status(run.id, "completed", outputs=payload),
        "list": lambda: runs.list_by_workflow("workflow-1"),
        "save_state": lambda: states.save_state(run.id, payload, "node"),
        "checkpoint": lambda: writer.save_state(payload, "node", totals=totals, **usage),
        "latest": lambda: states.get_latest_state(run.id),
    }


def _compare(
    backend: StorageBackend, driver: Driver, beside: StorageBackend | None, rounds: int
) -> None:
    payload = samples.small_state(0)
    ours = _operations(backend, payload)
    theirs = _operations(beside, payload) if beside else {}
    one = new_run(payload)
    backend.runs.add(one)
    for number in range(20):
        backend.states.save_state(one.id, samples.small_state(number), "node")
    owned = new_run(payload)
    backend.runs.add(owned)
    plain = {
        "add": lambda: driver.add(new_run(payload)),
        "get": lambda: driver.get(one.id),
        "update_status": lambda: driver.update_status(one.id, payload),
        "list": lambda: driver.list("workflow-1"),
        "save_state": lambda: driver.save_state(one.id, payload),
        "checkpoint": lambda: driver.checkpoint(owned.id, payload),
        "latest": lambda: driver.latest(one.id),
    }
    report = Report(f"Redis, payloads and states of 2.6 kB, median of {rounds} rounds")
    for operation, call in ours.items():
        calls = {"ours": call, "redis-py": plain[operation]}
        if theirs:
            calls["ours on PostgreSQL"] = theirs[operation]
        if operation == "add":
            calls["new"] = lambda: new_run(payload)
        taken = medians(calls, rounds, 3 if operation == "list" else 20)
        spent = taken.pop("new", 0)
        own = taken.pop("ours") - spent
        for name, seconds in taken.items():
            report.add(
                operation, own, name, seconds - spent, TARGET if name == "redis-py" else None
            )
    report.print()

"""The operations of every run beside the plain driver, SQLAlchemy and LangGraph's savers."""

import functools
import itertools
import json
import sqlite3
from datetime import UTC, datetime
from typing import Any

from tests.benchmarks import samples
from tests.benchmarks.history import langgraph
from tests.benchmarks.measure import Report, medians
from workflow_storage import WorkflowRun, create_storage_backend
from workflow_storage.factory import forget
from workflow_storage.validation import RUN_FIELDS

NAMES = RUN_FIELDS
COLUMNS = ", ".join(NAMES)
JSON_NAMES = ("config_snapshot", "inputs", "outputs", "labels")
PAYLOADS = [NAMES.index(name) for name in JSON_NAMES]
TIMES = [place for place, name in enumerate(NAMES) if name.endswith("_at")]
STATE_COLUMNS = (
    "id, run_id, step, node_id, created_at, attempt, duration_seconds, tokens, cost_usd, "
    "state_json, state_delta"
)
TARGETS = {
    "add": 3,
    "get": 4,
    "update_status": 3,
    "list": 3,
    "save_state": 2,
    "recorded save": 2,
    "latest": 3,
}
TOTALS = {"total_tokens": 812, "total_cost_usd": 0.0031}
USAGE = {"duration_seconds": 1.5, "tokens": 812, "cost_usd": 0.0031}


class Driver:
    """The same work on the driver: the same statements, JSON and Python values."""

    def __init__(self, connection: Any, mark: str, begin: str, lock: str) -> None:
        self.connection, self.begin = connection, begin
        self.insert_run = (
            f"INSERT INTO workflow_runs ({COLUMNS}) VALUES ({', '.join([mark] * len(NAMES))})"
        )
        self.select_run = f"SELECT {COLUMNS} FROM workflow_runs WHERE id = {mark}"
        self.select_runs = (
            f"SELECT {COLUMNS} FROM workflow_runs WHERE workflow_name = {mark} "
            "ORDER BY started_at DESC, id DESC LIMIT 100"
        )
        self.update = (
            f"UPDATE workflow_runs SET status = {mark}, outputs = {mark}, completed_at = {mark}, "
            f"duration_seconds = {self.duration(mark)} WHERE id = {mark}"
        )
        self.next_step = (
            "SELECT (SELECT step FROM execution_states s WHERE s.run_id = r.id ORDER BY step DESC "
            f"LIMIT 1), (SELECT id FROM execution_states s WHERE s.run_id = r.id AND step = {mark}) "
            f"FROM workflow_runs r WHERE r.id = {mark} {lock}"
        )
        self.insert_state = (
            "INSERT INTO execution_states (run_id, step, node_id, created_at, state_json, state_delta)"
            f" VALUES ({', '.join([mark] * 6)}) RETURNING id"
        )
        self.note = (
            f"UPDATE workflow_runs SET current_node = {mark}, total_cost_usd = {mark}, "
            f"total_tokens = {mark} WHERE id = {mark} AND status = {mark} AND attempt = {mark}"
        )
        self.insert_used = (
            "INSERT INTO execution_states (run_id, step, node_id, created_at, attempt, "
            "duration_seconds, tokens, cost_usd, state_json, state_delta) "
            f"VALUES ({', '.join([mark] * 10)}) RETURNING id"
        )
        self.latest_state = (
            f"SELECT {STATE_COLUMNS} FROM execution_states WHERE run_id = {mark} "
            "ORDER BY step DESC LIMIT 1"
        )

    def duration(self, mark: str) -> str:
        return f"django_timestamp_diff({mark}, started_at) / 1e6"

    def time(self, value: datetime | None) -> Any:
        return value and str(value.replace(tzinfo=None))

    def parsed(self, value: Any) -> datetime | None:
        return value and datetime.fromisoformat(value).replace(tzinfo=UTC)

    def add(self, run: WorkflowRun) -> None:
        values = [getattr(run, name) for name in NAMES]
        for place in PAYLOADS:
            values[place] = None if values[place] is None else json.dumps(values[place])
        for place in TIMES:
            values[place] = self.time(values[place])
        self.connection.execute(self.insert_run, values)

    def run(self, row: Any) -> list[Any]:
        values = list(row)
        for place in PAYLOADS:
            values[place] = None if values[place] is None else json.loads(values[place])
        for place in TIMES:
            values[place] = self.parsed(values[place])
        return values

    def get(self, run_id: str) -> Any:
        return self.run(self.connection.execute(self.select_run, (run_id,)).fetchone())

    def list(self, name: str) -> Any:
        return [
            self.run(row) for row in self.connection.execute(self.select_runs, (name,)).fetchall()
        ]

    def update_status(self, run_id: str, status: str, outputs: Any) -> None:
        now = self.time(datetime.now(UTC))
        self.connection.execute(self.update, (status, json.dumps(outputs), now, now, run_id))

    def save_state(self, run_id: str, state: Any) -> int:
        text = json.dumps(state)
        self.connection.execute(self.begin)
        row = self.connection.execute(self.next_step, (-1, run_id)).fetchone()
        step = 0 if row[0] is None else row[0] + 1
        now = self.time(datetime.now(UTC))
        self.connection.execute(
            self.insert_state, (run_id, step, "node", now, text, None)
        ).fetchone()
        self.connection.execute("COMMIT")
        return step

    def recorded_save(self, run_id: str, state: Any) -> int:
        text = json.dumps(state)
        self.connection.execute(self.begin)
        noted = ("node", TOTALS["total_cost_usd"], TOTALS["total_tokens"], run_id, "running", 1)
        assert self.connection.execute(self.note, noted).rowcount == 1
        row = self.connection.execute(self.next_step, (-1, run_id)).fetchone()
        step = 0 if row[0] is None else row[0] + 1
        now = self.time(datetime.now(UTC))
        values = (run_id, step, "node", now, 1, *USAGE.values(), text, None)
        self.connection.execute(self.insert_used, values).fetchone()
        self.connection.execute("COMMIT")
        return step

    def latest(self, run_id: str) -> Any:
        row = self.connection.execute(self.latest_state, (run_id,)).fetchone()
        return row[2], row[3], self.parsed(row[4]), json.loads(row[9])


class PostgresDriver(Driver):
    def duration(self, mark: str) -> str:
        return f"EXTRACT(EPOCH FROM ({mark} - started_at))::double precision"

    def time(self, value: datetime | None) -> Any:
        return value

    def parsed(self, value: Any) -> Any:
        return value


def run(*, quick: bool) -> None:
    rounds = 15 if quick else 60
    with samples.folder() as folder, samples.postgres_url() as url:
        path = folder / "hot.db"
        ours = f"sqlite:///{path}"
        create_storage_backend(ours)
        connection = sqlite3.connect(path, isolation_level=None)
        connection.execute("PRAGMA synchronous=NORMAL")
        from django.db.backends.sqlite3._functions import _sqlite_timestamp_diff

        connection.create_function("django_timestamp_diff", 2, _sqlite_timestamp_diff)
        driver = Driver(connection, "?", "BEGIN IMMEDIATE", "")
        alchemy = f"sqlite:///{path}"
        _compare(
            "SQLite",
            ours,
            driver,
            "sqlite3",
            TARGETS,
            rounds,
            alchemy,
            {
                "langgraph": langgraph(ours, folder),
                "langgraph, synchronous=NORMAL": langgraph(ours, folder, "synchronous=NORMAL"),
            },
        )
        if url:
            import psycopg
            from psycopg import ClientCursor

            alchemy = url.replace("postgresql://", "postgresql+psycopg://")
            targets = dict.fromkeys(TARGETS, 1.5)
            for name, options, own_url, peer_name in (
                ("PostgreSQL", {}, url, "langgraph"),
                # As it is behind a pooler.
                (
                    "PostgreSQL, not prepared",
                    {"cursor_factory": ClientCursor},
                    f"{url}?prepare_threshold=1000000000",
                    "langgraph, prepared",
                ),
            ):
                runs = create_storage_backend(own_url).runs
                connection = psycopg.connect(url, autocommit=True, **options)
                driver = PostgresDriver(connection, "%s", "BEGIN", "FOR NO KEY UPDATE")
                peers = {peer_name: langgraph(url, None)}
                _compare(name, own_url, driver, "psycopg", targets, rounds, alchemy, peers)
                forget(runs.alias)
                connection.close()


def _compare(
    name: str,
    url: str,
    driver: Driver,
    driver_name: str,
    targets: dict[str, float],
    rounds: int,
    alchemy_url: str,
    peers: dict[str, Any],
) -> None:
    runs, states = create_storage_backend(url)
    payload = samples.small_state(0)
    assert 2500 < len(json.dumps(payload)) < 2700
    for number in range(300):
        runs.add(new_run(payload, f"workflow-{number % 2}"))
    run = new_run(payload)
    runs.add(run)
    ours_run, theirs_run, alchemy_run = (new_run(payload) for _ in range(3))
    for one in (ours_run, theirs_run, alchemy_run):
        runs.add(one)
        for number in range(20):
            states.save_state(one.id, samples.small_state(number), "node")
    recorded = [new_run(payload) for _ in range(2)]
    for one in recorded:
        runs.add(one)
    writer = states.writer(recorded[0].id, attempt=1)
    alchemy = _sqlalchemy(alchemy_url, payload)
    operations: dict[str, dict[str, Any]] = {
        "add": {
            "ours": lambda: runs.add(new_run(payload)),
            "driver": lambda: driver.add(new_run(payload)),
            "new": lambda: new_run(payload),
        },
        "get": {"ours": lambda: runs.get(run.id), "driver": lambda: driver.get(run.id)},
        "update_status": {
            "ours": lambda: runs.update_status(run.id, "completed", outputs=payload),
            "driver": lambda: driver.update_status(run.id, "completed", payload),
        },
        "list": {
            "ours": lambda: runs.list_by_workflow("workflow-1"),
            "driver": lambda: driver.list("workflow-1"),
        },
        "save_state": {
            "ours": lambda: states.save_state(ours_run.id, payload, "node"),
            "driver": lambda: driver.save_state(theirs_run.id, payload),
        },
        # With the fence, the usage of the node, and the totals and the node of the run.
        "recorded save": {
            "ours": lambda: writer.save_state(payload, "node", totals=TOTALS, **USAGE),
            "driver": lambda: driver.recorded_save(recorded[1].id, payload),
        },
        "latest": {
            "ours": lambda: states.get_latest_state(ours_run.id),
            "driver": lambda: driver.latest(theirs_run.id),
        },
    }
    if alchemy:
        operations["add"]["sqlalchemy"] = lambda: alchemy.add(new_run(payload))
        operations["get"]["sqlalchemy"] = lambda: alchemy.get(run.id)
        operations["update_status"]["sqlalchemy"] = lambda: alchemy.update_status(run.id, payload)
        operations["list"]["sqlalchemy"] = lambda: alchemy.list("workflow-1")
        operations["save_state"]["sqlalchemy"] = lambda: alchemy.save_state(alchemy_run.id, payload)
        operations["latest"]["sqlalchemy"] = lambda: alchemy.latest(alchemy_run.id)
    for peer_name, peer in peers.items():
        if peer:
            operations["save_state"][peer_name] = functools.partial(peer.put, payload)
            operations["recorded save"][peer_name] = functools.partial(peer.put, payload)
            operations["latest"][peer_name] = peer.latest
    report = Report(f"Hot path: {name}, payloads and states of 2.6 kB, median of {rounds} rounds")
    for operation, calls in operations.items():
        each = 3 if operation == "list" else 20
        ours, new = calls.pop("ours"), calls.pop("new", None)
        # Making the run object is the caller's work, not the store's.
        spent = medians({"new": new}, rounds, each)["new"] if new else 0
        for beside, theirs in calls.items():
            # In rounds of their own: what one leaves in the processor's caches is not to be
            # at the cost of another.
            taken = medians({"ours": ours, "theirs": theirs}, rounds, each)
            # A peer that is set up otherwise than we are is no target.
            target = targets[operation] if beside == "driver" else None if "," in beside else 1
            label = driver_name if beside == "driver" else beside
            report.add(operation, taken["ours"] - spent, label, taken["theirs"] - spent, target)
    report.print()


_numbers = itertools.count()


def new_run(payload: Any, name: str = "hot") -> WorkflowRun:
    return WorkflowRun(
        id=f"{next(_numbers):036}",
        workflow_name=name,
        status="running",
        inputs=payload,
        started_at=datetime.now(UTC),
        attempt=1,
    )


def _sqlalchemy(url: str, payload: Any) -> Any:
    """Return the same operations on the same tables with SQLAlchemy's ORM."""
    try:
        from tests.benchmarks.alchemy import Alchemy
    except ImportError as exc:
        print(f"without SQLAlchemy ({exc}); to compare with it: pip install --group bench")
        return None
    return Alchemy(url)

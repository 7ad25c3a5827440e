"""A message agent of LangGraph on `DjangoSaver`: its bytes and the time of a step, beside its savers."""

import itertools
import os
import sqlite3
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Annotated, Any, TypedDict

import django
from django.db import connections

from tests.benchmarks import samples
from tests.benchmarks.measure import Report
from workflow_storage import WorkflowRun, create_storage_backend
from workflow_storage.factory import forget

OUR_TABLES = ("threads", "checkpoints", "blobs", "writes")
THEIR_TABLES = ("checkpoints", "checkpoint_blobs", "checkpoint_writes")


def run(*, quick: bool) -> None:
    """Measure in a process of its own, for the app is to be installed."""
    if not all(map(find_spec, ("langgraph", "aiosqlite", "psycopg"))):
        print("skipped, for LangGraph's savers are not installed: pip install --group bench")
        return
    environment = {**os.environ, "DJANGO_SETTINGS_MODULE": "testproject.settings"}
    command = [sys.executable, "-m", __name__, *(["--quick"] if quick else [])]
    subprocess.run(command, env=environment, check=True)


def main() -> None:
    django.setup()
    quick = "--quick" in sys.argv
    for steps in (100,) if quick else (200, 400):
        with samples.folder() as folder, samples.postgres_url() as url:
            _compare(
                f"LangGraph: SQLite, {steps} steps",
                steps,
                _sqlite_savers(folder),
                f"sqlite:///{folder}/record.db",
            )
            if url:
                own = f"{url}?application_name=recorder"
                _compare(f"LangGraph: PostgreSQL, {steps} steps", steps, _postgres_savers(url), own)


class Saver:
    """A saver, what it is called, and the bytes of its database."""

    def __init__(self, name: str, saver: Any, stored: Callable[[], int]) -> None:
        self.name = name
        self.saver = saver
        self.stored = stored


def _compare(title: str, steps: int, savers: Iterator[list[Saver]], record_url: str) -> None:
    with savers as opened:
        ours, *theirs = opened
        last = 0
        times = {}
        loads = {}
        for saver in opened:
            delta = saver.name.endswith("DeltaChannel")
            agent = Agent(steps, saver.saver, delta=delta)
            times[saver.name] = agent.run()
            loads[saver.name] = min(_timed(agent.state) for _ in range(5))
            if saver is ours:
                last = agent.bytes_of_state()
        sizes = Report(f"{title}: stored bytes beside the last state's", unit="kB")
        for saver in opened:
            target = 2.5 if saver is ours else None
            sizes.add(saver.name, saver.stored() / 1e3, "last state", last / 1e3, target)
        recorded, seconds = _recorded(steps, record_url)
        deltas = theirs[-1]
        sizes.add("the same messages, recorded", recorded / 1e3, "last state", last / 1e3)
        sizes.add("the same", recorded / 1e3, deltas.name, deltas.stored() / 1e3, 0.4)
        sizes.print()
        report = Report(f"{title}: time of a step with durability sync, and of get_state")
        for saver in theirs:
            target = 1.0 if saver.name.startswith("langgraph") else None
            report.add("step", times[ours.name], saver.name, times[saver.name], target)
        for saver in theirs:
            report.add("get_state", loads[ours.name], saver.name, loads[saver.name])
        report.add("save_state of the recorder", seconds, deltas.name, times[deltas.name], 1.0)
        report.print()


def _recorded(steps: int, url: str) -> tuple[int, float]:
    """Record a run that has the same messages; return its bytes and the seconds of a save."""
    backend = create_storage_backend(url)
    before = _stored_states(url)
    run = WorkflowRun(workflow_name="agent", status="running", attempt=1)
    backend.runs.add(run)
    writer = backend.states.writer(run.id, attempt=1)
    taken = []
    for messages in itertools.accumulate([message] for message in messages_of(steps)):
        state = {
            "messages": [
                {"type": one.type, "id": one.id, "content": one.content} for one in messages
            ]
        }
        usage = {"duration_seconds": 1.5, "tokens": len(messages[-1].content) // 4}
        start = time.perf_counter()
        writer.save_state(state, "agent", totals={"total_tokens": len(taken)}, **usage)
        taken.append(time.perf_counter() - start)
    assert backend.states.get_latest_state(run.id) == state
    stored = _stored_states(url) - before
    forget(str(backend.alias))
    return stored, statistics.median(taken[steps // 2 :])


def _stored_states(url: str) -> int:
    """Return the bytes of a store: of its file, or of its table of states."""
    if url.startswith("sqlite"):
        return _size_of_file(Path(url.removeprefix("sqlite:///")))
    import psycopg

    with psycopg.connect(url) as connection:
        found = connection.execute("SELECT pg_total_relation_size('execution_states')").fetchone()
    assert found is not None
    return int(found[0])


def _size_of_file(path: Path) -> int:
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return path.stat().st_size


def messages_of(steps: int) -> list[Any]:
    """Return messages of two sides in turn, of 0.5 to 3.5 kB of prose that occurs once."""
    from langchain_core.messages import AIMessage, HumanMessage

    chance = Random(1)
    text, position = samples.prose(), 30_000
    messages = []
    for number in range(steps):
        size = chance.randrange(500, 3500)
        kind = AIMessage if number % 2 else HumanMessage
        content = text[position : position + size]
        messages.append(kind(content=content, id=f"{chance.getrandbits(128):032x}"))
        position += size
    return messages


class Agent:
    """Two nodes that add a message of `messages_of` in turn."""

    def __init__(self, steps: int, saver: Any, *, delta: bool) -> None:
        from langgraph.graph import END, START, StateGraph
        from langgraph.graph.message import add_messages

        self._messages = messages_of(steps)
        reducer: Any = add_messages
        if delta:
            from langgraph.channels.delta import DeltaChannel
            from langgraph.graph.message import _messages_delta_reducer

            reducer = DeltaChannel(_messages_delta_reducer)

        class State(TypedDict):
            messages: Annotated[list, reducer]

        self._began: list[float] = []
        graph = StateGraph(State)
        graph.add_node("agent", self._say)
        graph.add_node("tools", self._say)
        graph.add_edge(START, "agent")
        graph.add_conditional_edges(
            "agent", lambda state: END if len(self._began) >= steps - 1 else "tools"
        )
        graph.add_conditional_edges(
            "tools", lambda state: END if len(self._began) >= steps - 1 else "agent"
        )
        self._graph = graph.compile(checkpointer=saver)
        self._config: Any = {"configurable": {"thread_id": "1"}, "recursion_limit": 10_000}

    def _say(self, state: Any) -> dict[str, Any]:
        self._began.append(time.perf_counter())
        return {"messages": [self._messages[len(self._began)]]}

    def run(self) -> float:
        """Run to the end; return the median seconds of a step in the second half."""
        first = {"messages": [self._messages[0]]}
        self._graph.invoke(first, self._config, durability="sync")
        half = self._began[len(self._began) // 2 :]
        return statistics.median(b - a for a, b in itertools.pairwise(half))

    def state(self) -> Any:
        """Load the last state."""
        state = self._graph.get_state(self._config)
        assert len(state.values["messages"]) == len(self._messages)
        return state

    def bytes_of_state(self) -> int:
        """Return the bytes of the last state, as LangGraph's serializer writes it."""
        from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer

        return len(JsonPlusSerializer().dumps_typed(self.state().values)[1])


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@contextmanager
def _ours(url: str) -> Iterator[Any]:
    from workflow_storage.contrib.langgraph import DjangoSaver

    backend = create_storage_backend(url)
    connections[backend.alias].ensure_connection()
    try:
        yield DjangoSaver(backend)
    finally:
        forget(str(backend.alias))


@contextmanager
def _sqlite_savers(folder: Path) -> Iterator[list[Saver]]:
    from langgraph.checkpoint.sqlite import SqliteSaver

    with _ours(f"sqlite:///{folder}/ours.db") as saver:
        empty = _size_of_file(folder / "ours.db")  # with the tables of the runs, and of Django
        savers = [Saver("DjangoSaver", saver, lambda: _size_of_file(folder / "ours.db") - empty)]
        for name, pragma in (
            ("langgraph-checkpoint-sqlite", "FULL"),
            ("the same, synchronous=NORMAL", "NORMAL"),
            ("the same, DeltaChannel", "NORMAL"),
        ):
            path = folder / f"theirs {len(savers)}.db"
            connection = sqlite3.connect(path, check_same_thread=False)
            connection.execute(f"PRAGMA synchronous={pragma}")
            theirs = SqliteSaver(connection)
            theirs.setup()
            savers.append(Saver(name, theirs, lambda path=path: _size_of_file(path)))
        yield savers


@contextmanager
def _postgres_savers(url: str) -> Iterator[list[Saver]]:
    import psycopg
    from langgraph.checkpoint.postgres import PostgresSaver
    from psycopg.rows import dict_row

    with (
        psycopg.connect(url, autocommit=True, row_factory=dict_row) as connection,
        _ours(url) as saver,
    ):
        savers = [
            Saver(
                "DjangoSaver",
                saver,
                lambda: _size(connection, [f"workflow_graph_{name}" for name in OUR_TABLES]),
            )
        ]
        for number, name in enumerate(("langgraph-checkpoint-postgres", "the same, DeltaChannel")):
            schema = f"theirs_{number}"
            connection.execute(f"CREATE SCHEMA {schema}")
            own = psycopg.connect(
                url,
                autocommit=True,
                prepare_threshold=0,
                row_factory=dict_row,
                options=f"-c search_path={schema}",
            )
            theirs = PostgresSaver(own)
            theirs.setup()
            tables = [f"{schema}.{table}" for table in THEIR_TABLES]
            savers.append(Saver(name, theirs, lambda tables=tables: _size(connection, tables)))
        yield savers


def _size(connection: Any, tables: list[str]) -> int:
    sizes = " + ".join(f"pg_total_relation_size('{table}')" for table in tables)
    return int(connection.execute(f"SELECT {sizes} AS size").fetchone()["size"])


if __name__ == "__main__":
    main()

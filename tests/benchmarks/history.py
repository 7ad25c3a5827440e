"""A growing agent run: the bytes it takes and the time of each save, beside LangGraph's savers."""

import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from django.db import connections

from tests.benchmarks import samples
from tests.benchmarks.measure import Report, medians
from workflow_storage import StorageBackend, WorkflowRun, create_storage_backend
from workflow_storage.factory import forget

ROUNDS = 3


def run(*, quick: bool) -> None:
    for nodes in (100,) if quick else (200, 400):
        states = list(samples.agent_run(nodes))
        with samples.folder() as folder, samples.postgres_url() as url:
            _compare(
                f"History: SQLite, {nodes} nodes", states, f"sqlite:///{folder}/ours.db", folder
            )
            if url:
                _compare(f"History: PostgreSQL, {nodes} nodes", states, url, None)


def _compare(title: str, states: list[dict[str, Any]], url: str, folder: Path | None) -> None:
    last = len(json.dumps(states[-1]).encode())
    sizes = Report(f"{title}: stored bytes beside the last state's", unit="kB")
    times = Report(f"{title}: time of a save, median over the run's second half")
    ours = create_storage_backend(url)
    put = langgraph(url, folder)
    relaxed = langgraph(url, folder, "synchronous=NORMAL") if folder else None
    taken: dict[str, list[float]] = {"writer": [], "bare": [], "peer": [], "relaxed": []}
    # One whole run after the other, as each has the machine for itself where it is used.
    for number in range(ROUNDS):
        run, bare = WorkflowRun(workflow_name="history"), WorkflowRun(workflow_name="bare")
        ours.runs.add(run)
        writer = ours.states.writer(run.id)
        taken["writer"] += _second_half(partial(writer.save_state, node_id="node"), states)
        if not number:
            stored = _stored_bytes(ours, folder)
        for name, saver in (("peer", put), ("relaxed", relaxed)):
            if saver:
                saver.begin()
                taken[name] += _second_half(saver.put, states)
        if put and not number:
            theirs = put.stored()
        ours.runs.add(bare)
        save = partial(ours.states.save_state, bare.id, node_id="node")
        taken["bare"] += _second_half(save, states)
    few = len(states) <= 200
    target = 1.45 if few else 1.6
    sizes.add("deltas", stored / 1e3, "last state", last / 1e3, target)
    whole = sum(len(json.dumps(state).encode()) for state in states)
    sizes.add("every state whole", whole / 1e3, "last state", last / 1e3)
    middle = {name: statistics.median(times) for name, times in taken.items() if times}
    if put:
        sizes.add(put.name, theirs / 1e3, "last state", last / 1e3)
        goal = None if folder else (0.3 if few else 0.2)
        times.add("writer.save_state", middle["writer"], put.name, middle["peer"], goal)
        times.add("states.save_state", middle["bare"], put.name, middle["peer"])
    if relaxed:
        label = f"{relaxed.name}, synchronous=NORMAL"
        times.add(
            "writer.save_state", middle["writer"], label, middle["relaxed"], 0.9 if few else 0.8
        )
        times.add(
            "states.save_state", middle["bare"], label, middle["relaxed"], 1.4 if few else 1.2
        )
    dump = medians({"dump": lambda: json.dumps(states[-1])}, 20)["dump"]
    times.add("writer.save_state", middle["writer"], "json.dumps of the last state", dump)
    text = json.dumps(states[-1])
    _settle(ours, folder)
    latest = medians(
        {"ours": lambda: ours.states.get_latest_state(run.id), "parse": lambda: json.loads(text)},
        40,
    )
    assert ours.states.get_latest_state(run.id) == states[-1]
    times.add(
        "get_latest_state",
        latest["ours"],
        "json.loads of the last state",
        latest["parse"],
        1.2 if folder else 1.5,
    )
    if put:
        whole = medians(
            {
                "ours": lambda: sum(1 for _ in ours.states.iter_state_history(run.id)),
                "list": put.listed,
            },
            2,
        )
        times.add("iter_state_history, all", whole["ours"], "its list, all", whole["list"], 0.5)
    sizes.print()
    times.print()
    forget(ours.runs.alias)


def _settle(backend: StorageBackend, folder: Path | None) -> None:
    """Let PostgreSQL finish what the writes of all of them have left it to do."""
    if folder is None:
        with connections[backend.runs.alias].cursor() as cursor:
            cursor.execute("VACUUM (ANALYZE)")
            cursor.execute("CHECKPOINT")


def _second_half(save: Callable[[Any], object], states: list[dict[str, Any]]) -> list[float]:
    """Save all states; return the seconds that those of the second half took, each."""
    taken = []
    for state in states:
        start = time.perf_counter()
        save(state)
        taken.append(time.perf_counter() - start)
    return taken[len(states) // 2 :]


def _stored_bytes(backend: StorageBackend, folder: Path | None) -> int:
    with connections[backend.runs.alias].cursor() as cursor:
        if folder is None:
            cursor.execute("SELECT pg_total_relation_size('execution_states')")
            return int(cursor.fetchone()[0])
        cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return (folder / "ours.db").stat().st_size


class Peer(NamedTuple):
    """LangGraph's saver, as what is measured of it."""

    name: str
    begin: Callable[[], None]
    """Begins another thread."""
    put: Callable[[dict[str, Any]], None]
    stored: Callable[[], int]
    """Returns the bytes of all threads."""
    latest: Callable[[], object]
    """Reads the newest checkpoint of the thread."""
    listed: Callable[[], int]
    """Reads all checkpoints of the thread; returns how many."""


def langgraph(url: str, folder: Path | None, pragma: str | None = None) -> Peer | None:
    """Return LangGraph's saver on the same server or disk, as it is installed.

    Args:
        url: the PostgreSQL database.
        folder: for SQLite, where its file goes.
        pragma: for SQLite, a setting that it does not make itself.

    Returns:
        None if it is not installed.
    """
    try:
        from langgraph.checkpoint.base import empty_checkpoint

        if folder is None:
            import psycopg
            from langgraph.checkpoint.postgres import PostgresSaver
            from psycopg.rows import dict_row

            connection = psycopg.connect(url, autocommit=True, row_factory=dict_row)
            saver: Any = PostgresSaver(connection)
        else:
            import sqlite3

            from langgraph.checkpoint.sqlite import SqliteSaver

            path = folder / f"langgraph{pragma or ''}.db"
            connection = sqlite3.connect(path, check_same_thread=False)
            if pragma:
                connection.execute(f"PRAGMA {pragma}")
            saver = SqliteSaver(connection)
    except ImportError as exc:
        print(f"without LangGraph ({exc}); to compare with it: pip install --group bench")
        return None
    saver.setup()
    thread: dict[str, Any]
    config: dict[str, Any]
    threads = itertools.count()

    def begin() -> None:
        nonlocal thread, config, versions
        thread = {"configurable": {"thread_id": f"{next(threads)}", "checkpoint_ns": ""}}
        config, versions = thread, itertools.count()

    versions: Iterator[int] = itertools.count()
    begin()

    def put(state: dict[str, Any]) -> None:
        nonlocal config
        version = next(versions)
        changed = {"messages": version} if version else dict.fromkeys(state, version)
        checkpoint = {
            **empty_checkpoint(),
            "channel_values": state,
            "channel_versions": {**dict.fromkeys(state, 0), **changed},
        }
        config = saver.put(config, checkpoint, {"source": "loop", "step": version}, changed)

    def stored() -> int:
        if folder is None:
            tables = ("checkpoints", "checkpoint_blobs", "checkpoint_writes")
            sizes = " + ".join(f"pg_total_relation_size('{table}')" for table in tables)
            return int(connection.execute(f"SELECT {sizes} AS size").fetchone()["size"])
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return path.stat().st_size

    def latest() -> object:
        return saver.get_tuple(thread)

    def listed() -> int:
        return sum(1 for _ in saver.list(thread))

    name = f"langgraph {'postgres' if folder is None else 'sqlite'} put"
    return Peer(name, begin, put, stored, latest, listed)

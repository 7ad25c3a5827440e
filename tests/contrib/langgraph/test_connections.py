"""How many connections graphs take, and whose transaction they join."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from django.db import connections, transaction
from django.test import TestCase

from tests.contrib.langgraph.graphs import counting, thread
from tests.servers import wait_until
from workflow_storage import WorkflowRun, record_run
from workflow_storage.backends.orm.async_threads import ASYNC_CONNECTIONS
from workflow_storage.contrib.langgraph import DjangoSaver, with_recording
from workflow_storage.contrib.langgraph.models import GraphCheckpoint

INVOKES = 40


class Peak:
    """The most sessions that a database had, counted by the server while a block runs."""

    def __init__(self, alias):
        self.most = 0
        self._alias = alias
        self._began = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self):
        self._thread.start()
        assert self._began.wait(30)
        return self

    def __exit__(self, *exc_info):
        self._stop.set()
        self._thread.join()

    def _watch(self):
        connection = connections[self._alias]
        try:
            # A server takes a moment to end the sessions of connections that were closed.
            wait_until(lambda: self._others(connection) == 0)
            self._began.set()
            while not self._stop.wait(0.01):
                self.most = max(self.most, self._others(connection))
        finally:
            connection.close()

    def _others(self, connection):
        sessions = "pg_stat_activity WHERE datname"
        if connection.vendor == "mysql":
            # MySQL's other table of them fails while a statement with binary values runs.
            schema = "information" if connection.mysql_is_mariadb else "performance"
            sessions = f"{schema}_schema.processlist WHERE db"
        with connection.cursor() as cursor:
            cursor.execute(
                f"SELECT count(*) FROM {sessions} = %s", [connection.settings_dict["NAME"]]
            )
            return cursor.fetchone()[0] - 1


@pytest.fixture(params=["postgres", "mysql"])
def store(request, django_db_blocker):
    from tests.contrib.langgraph.conftest import graph_backend

    url = request.getfixturevalue(f"{request.param}_url")
    yield from graph_backend(url, django_db_blocker)


@pytest.mark.parametrize("record", [False, True], ids=["bare", "recorded"])
def test_many_invokes_of_async_code_take_few_connections(store, record):
    graph = counting(DjangoSaver(store))
    if record:
        graph = with_recording(graph, workflow_name="many", backend=store)
    connections[store.alias].close()

    async def invoke_all():
        await asyncio.gather(
            *(graph.ainvoke({"numbers": []}, thread(str(n))) for n in range(INVOKES))
        )

    with Peak(store.alias) as peak:
        asyncio.run(invoke_all())

    assert 1 <= peak.most <= ASYNC_CONNECTIONS
    assert GraphCheckpoint.objects.using(store.alias).count() == INVOKES * 5


def test_many_invokes_in_threads_take_few_connections(store):
    graph = counting(DjangoSaver(store))
    connections[store.alias].close()

    with Peak(store.alias) as peak, ThreadPoolExecutor(INVOKES) as pool:
        list(pool.map(lambda n: graph.invoke({"numbers": []}, thread(str(n))), range(INVOKES)))

    assert 1 <= peak.most <= ASYNC_CONNECTIONS
    assert GraphCheckpoint.objects.using(store.alias).count() == INVOKES * 5


def test_threads_that_have_the_database_open_use_their_own_connection(store):
    graph = counting(DjangoSaver(store))

    def invoke(number):
        connections[store.alias].ensure_connection()
        try:
            graph.invoke({"numbers": []}, thread(str(number)))
        finally:
            connections[store.alias].close()

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(invoke, range(6)))

    assert GraphCheckpoint.objects.using(store.alias).count() == 30


@pytest.mark.parametrize("durability", ["sync", "async", "exit"])
def test_what_a_graph_writes_in_a_transaction_is_rolled_back_with_it(graph_store, durability):
    saver = DjangoSaver(graph_store)
    graph = counting(saver, 6)

    with pytest.raises(RuntimeError), transaction.atomic(graph_store.alias):
        graph.invoke({"numbers": []}, thread(), durability=durability)
        assert graph.get_state(thread()).values == {"numbers": list(range(6))}
        assert graph.invoke({"numbers": [7]}, thread(), durability=durability)
        raise RuntimeError

    assert saver.get_tuple(thread()) is None
    graph.invoke({"numbers": []}, thread())
    assert graph.get_state(thread()).values == {"numbers": list(range(6))}


class TestInTestCase(TestCase):
    """Each test finds nothing of the other one."""

    def check(self, durability):
        graph = counting(DjangoSaver(), 4)
        assert GraphCheckpoint.objects.count() == 0

        with record_run("outer") as run:
            graph.invoke({"numbers": []}, thread(), durability=durability)

        assert set(GraphCheckpoint.objects.values_list("run_id", flat=True)) == {run.run_id}
        assert graph.get_state(thread()).values == {"numbers": [0, 1, 2, 3]}

    def test_sync(self):
        self.check("sync")

    def test_async(self):
        self.check("async")

    async def test_in_an_event_loop(self):
        graph = counting(DjangoSaver(), 4)
        assert await GraphCheckpoint.objects.acount() == 0

        await graph.ainvoke({"numbers": []}, thread())

        assert await GraphCheckpoint.objects.acount() == 6


@pytest.mark.parametrize("durability", ["sync", "async", "exit"])
def test_a_graph_is_recorded_in_a_transaction(graph_store, durability):
    graph = counting(DjangoSaver(graph_store), 12)
    graph = with_recording(graph, workflow_name="recorded", backend=graph_store)

    with transaction.atomic(graph_store.alias):
        graph.invoke({"numbers": []}, thread(), durability=durability)
        [run] = graph_store.runs.list_runs()
        assert run.status == "completed"
        assert sum(1 for _ in graph_store.states.iter_steps(run.id)) == 12
        transaction.set_rollback(True, graph_store.alias)

    assert graph_store.runs.list_runs() == []
    assert not GraphCheckpoint.objects.using(graph_store.alias).exists()


def test_nodes_in_a_transaction_use_the_database_before_the_saver_does(graph_store):
    rows = WorkflowRun.objects.using(graph_store.alias)

    def node(state):
        for number in range(5):
            with transaction.atomic(graph_store.alias), transaction.atomic(graph_store.alias):
                rows.create(id=f"{len(state['numbers'])}-{number}", workflow_name="by a node")
            with pytest.raises(ZeroDivisionError), transaction.atomic(graph_store.alias):
                rows.create(id=f"{len(state['numbers'])}-{number} not", workflow_name="undone")
                raise ZeroDivisionError

    graph = counting(DjangoSaver(graph_store), 12, node=node)
    graph = with_recording(graph, workflow_name="recorded", backend=graph_store)

    with transaction.atomic(graph_store.alias):
        graph.invoke({"numbers": []}, thread(), durability="exit")
        assert rows.filter(workflow_name="by a node").count() == 60
        assert rows.filter(workflow_name="undone").count() == 0
        assert rows.get(workflow_name="recorded").status == "completed"
        assert graph.get_state(thread()).values == {"numbers": list(range(12))}
        transaction.set_rollback(True, graph_store.alias)

    assert rows.count() == 0

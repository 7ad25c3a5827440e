"""Graphs whose runs are recorded."""

import asyncio
import time
from contextlib import aclosing, suppress

import pytest
from langchain_core.messages import AIMessage
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph
from langgraph.prebuilt import create_react_agent
from langgraph.types import Command, interrupt

from tests.contrib.langgraph.graphs import Numbers, asking, counting, scripted, thread
from workflow_storage import (
    NotResumableError,
    RunLostError,
    create_storage_backend,
    current_run,
    record_run,
)
from workflow_storage.contrib.langgraph import DjangoSaver, with_recording
from workflow_storage.contrib.langgraph.models import GraphCheckpoint


@pytest.fixture
def store(sqlite_store):
    return sqlite_store


@pytest.fixture(params=["sync", "async"])
def invoke(request):
    """Invoke a graph, in an event loop or without one."""
    if request.param == "sync":
        return lambda graph, *args, **kwargs: graph.invoke(*args, **kwargs)
    return lambda graph, *args, **kwargs: asyncio.run(graph.ainvoke(*args, **kwargs))


def run_ids(store, thread_id="1"):
    rows = GraphCheckpoint.objects.using(store.alias).filter(thread__thread_id=thread_id)
    return list(rows.order_by("checkpoint_id").values_list("run_id", flat=True))


def only_run(store):
    [run] = store.runs.list_runs()
    return run


def test_a_graph_in_a_recording_links_its_checkpoints_to_the_run(graph_store, invoke):
    store = graph_store
    graph = counting(DjangoSaver(store))

    with record_run("outer", backend=store) as run:
        invoke(graph, {"numbers": []}, thread())
    invoke(graph, {"numbers": []}, thread("2"))

    assert set(run_ids(store)) == {run.run_id}
    assert set(run_ids(store, "2")) == {None}


def test_each_input_to_its_end_is_a_run(store, invoke):
    graph = with_recording(
        counting(DjangoSaver(store)), workflow_name="count", labels={"user": "ada"}, backend=store
    )

    result = invoke(graph, {"numbers": []}, thread())

    assert result == {"numbers": [0, 1, 2]}
    run = only_run(store)
    assert (run.workflow_name, run.status) == ("count", "completed")
    assert (run.inputs, run.outputs) == ({"numbers": []}, {"numbers": [0, 1, 2]})
    assert run.labels == {"user": "ada", "thread": "1"}
    steps = list(store.states.iter_steps(run.id))
    assert [step["node_id"] for step in steps] == ["count"] * 3
    assert all(step["duration_seconds"] is not None for step in steps)
    assert store.states.get_latest_state(run.id) == {"thread": "1", "step": 3}
    assert set(run_ids(store)) == {run.id}


def test_the_answer_to_an_interrupt_goes_on_with_the_same_run(graph_store, invoke):
    store = graph_store
    graph = with_recording(asking(DjangoSaver(store)), workflow_name="ask", backend=store)

    invoke(graph, {"numbers": []}, thread())
    waiting = only_run(store)
    invoke(graph, Command(resume=2), thread())

    assert (waiting.status, waiting.waiting_for) == ("pending", "approve?")
    run = only_run(store)
    assert (run.status, run.attempt, run.outputs) == ("completed", 2, {"numbers": [1, 2, 3]})
    nodes = [step["node_id"] for step in store.states.iter_steps(run.id)]
    assert nodes == ["draft", "review", "send"]
    assert set(run_ids(store)) == {run.id}


def test_an_answer_at_a_checkpoint_goes_on_with_the_run_that_made_it(store, invoke):
    graph = with_recording(asking(DjangoSaver(store)), workflow_name="ask", backend=store)
    invoke(graph, {"numbers": []}, thread())
    first = only_run(store)
    snapshot = graph.get_state(thread())
    invoke(graph, {"numbers": []}, thread())

    invoke(graph, Command(resume=2), snapshot.config)

    assert store.runs.get(first.id).status == "completed"
    assert [run.status for run in store.runs.list_runs()] == ["pending", "completed"]


def test_a_second_answer_is_refused_while_the_first_is_under_way(store, invoke):
    refused = []

    def node(state):
        if "yes" in state["numbers"]:
            with pytest.raises(NotResumableError):
                graph.invoke(Command(resume="no"), thread())
            refused.append("no")

    def ask(state):
        return {"numbers": [interrupt("approve?")]}

    builder = StateGraph(Numbers)
    builder.add_node("ask", ask)
    builder.add_node("send", node)
    builder.add_edge(START, "ask")
    builder.add_edge("ask", "send")
    saver = DjangoSaver(store)
    graph = with_recording(builder.compile(checkpointer=saver), workflow_name="ask", backend=store)
    invoke(graph, {"numbers": []}, thread())

    values = invoke(graph, Command(resume="yes"), thread())

    assert (values, refused) == ({"numbers": ["yes"]}, ["no"])
    assert (only_run(store).status, only_run(store).attempt) == ("completed", 2)


def test_an_answer_goes_on_with_a_run_that_failed_in_another_node(store, invoke):
    fails = [True]

    def ask(state):
        return {"numbers": [interrupt("approve?")]}

    def send(state):
        if fails.pop():
            time.sleep(0.1)
            raise RuntimeError("no answer")
        return {"numbers": ["sent"]}

    builder = StateGraph(Numbers)
    for function in (ask, send):
        builder.add_node(function)
        builder.add_edge(START, function.__name__)
    saver = DjangoSaver(store)
    graph = with_recording(builder.compile(checkpointer=saver), workflow_name="ask", backend=store)
    with pytest.raises(RuntimeError):
        invoke(graph, {"numbers": []}, thread())
    fails.append(False)

    values = invoke(graph, Command(resume="yes"), thread())

    assert values == {"numbers": ["yes", "sent"]}
    assert (only_run(store).status, only_run(store).attempt) == ("completed", 2)


def test_an_answer_that_nobody_waits_for_begins_a_run(store, invoke):
    graph = with_recording(counting(DjangoSaver(store)), workflow_name="count", backend=store)
    invoke(graph, {"numbers": []}, thread())

    invoke(graph, Command(resume="yes"), thread())

    assert [run.attempt for run in store.runs.list_runs()] == [1, 1]


def test_a_static_interrupt_waits_too_and_none_goes_on(store, invoke):
    graph = with_recording(asking(DjangoSaver(store)), workflow_name="ask", backend=store)

    invoke(graph, {"numbers": []}, thread(), interrupt_before=["send", "review"])
    waiting = only_run(store)
    invoke(graph, None, thread())

    assert (waiting.status, waiting.waiting_for) == ("pending", "interrupt_before")
    assert only_run(store).waiting_for == "approve?"
    assert only_run(store).attempt == 2


def test_an_error_fails_the_run_in_its_node_and_none_tries_again(store, invoke):
    fails = [True]

    def node(state):
        if len(state["numbers"]) == 1 and fails.pop():
            raise RuntimeError("no tokens left")

    graph = with_recording(
        counting(DjangoSaver(store), node=node), workflow_name="fail", backend=store
    )

    with pytest.raises(RuntimeError, match="no tokens left"):
        invoke(graph, {"numbers": []}, thread())
    failed = only_run(store)
    fails.append(False)
    assert invoke(graph, None, thread()) == {"numbers": [0, 1, 2]}

    assert (failed.status, failed.current_node) == ("failed", "count")
    assert "RuntimeError: no tokens left" in failed.error_message
    assert (only_run(store).status, only_run(store).attempt) == ("completed", 2)


@pytest.mark.filterwarnings("ignore:create_react_agent has been moved")
def test_the_tokens_of_models_go_to_the_run_and_its_nodes(store, invoke):
    @tool
    def add(a: int, b: int) -> int:
        """Add two numbers."""
        return a + b

    call = {"name": "add", "args": {"a": 1, "b": 2}, "id": "call-1"}
    model = scripted(AIMessage(content="", tool_calls=[call]), "It is 3.")
    agent = create_react_agent(model, [add], checkpointer=DjangoSaver(store))
    graph = with_recording(agent, workflow_name="react", backend=store)

    result = invoke(graph, {"messages": [("user", "1 + 2?")]}, thread())

    assert [message.content for message in result["messages"]] == ["1 + 2?", "", "3", "It is 3."]
    run = only_run(store)
    assert (run.status, run.total_tokens) == ("completed", 30)
    steps = [(step["node_id"], step["tokens"]) for step in store.states.iter_steps(run.id)]
    assert steps == [("agent", 15), ("tools", None), ("agent", 15)]
    assert run.outputs["messages"][-1]["content"] == "It is 3."


def test_nodes_find_the_run_around_them(store, invoke):
    found = []
    graph = with_recording(
        counting(DjangoSaver(store), node=lambda state: found.append(current_run().run_id)),
        workflow_name="find",
        backend=store,
    )

    invoke(graph, {"numbers": []}, thread())

    assert found == [only_run(store).id] * 3


def test_a_run_that_is_cancelled_stops_its_graph_after_the_node(store, invoke):
    def node(state):
        store.runs.update_status(current_run().run_id, "cancelled")

    graph = with_recording(
        counting(DjangoSaver(store), node=node), workflow_name="cancel", backend=store
    )

    with pytest.raises(RunLostError):
        invoke(graph, {"numbers": []}, thread())

    assert only_run(store).status == "cancelled"


def test_two_streams_beside_each_other_have_runs_of_their_own(store):
    graph = with_recording(counting(DjangoSaver(store)), workflow_name="beside", backend=store)
    one = graph.stream({"numbers": []}, thread("one"))
    two = graph.stream({"numbers": []}, thread("two"))

    for first, second in zip(one, two, strict=True):
        assert first.keys() == second.keys()
        with pytest.raises(LookupError):
            current_run()

    assert [run.status for run in store.runs.list_runs()] == ["completed", "completed"]
    assert len(set(run_ids(store, "one")) | set(run_ids(store, "two"))) == 2


def test_two_async_streams_beside_each_other_have_runs_of_their_own(store):
    found = []

    def node(state):
        found.append((state["numbers"][0], current_run().run_id))

    saver = DjangoSaver(store)
    graph = with_recording(counting(saver, 4, node=node), workflow_name="beside", backend=store)

    async def beside():
        one = graph.astream({"numbers": ["one"]}, thread("one"))
        two = graph.astream({"numbers": ["two"]}, thread("two"))
        for stream in (one, two, one, two):
            # Which is a task of its own up to Python 3.11.
            await asyncio.wait_for(anext(stream), 60)
            with pytest.raises(LookupError):
                current_run()
        async for _ in one:
            pass
        async for _ in two:
            with pytest.raises(LookupError):
                current_run()

    asyncio.run(beside())

    for name in ("one", "two"):
        [run] = store.runs.list_runs(labels={"thread": name})
        assert run.status == "completed"
        assert set(run_ids(store, name)) == {run.id}
        assert {run_id for thread_of, run_id in found if thread_of == name} == {run.id}


def test_an_async_stream_that_is_left_cancels_its_run(store):
    graph = with_recording(counting(DjangoSaver(store)), workflow_name="left", backend=store)

    async def leave():
        async with aclosing(graph.astream({"numbers": []}, thread())) as stream:
            await anext(stream)

    asyncio.run(leave())

    assert only_run(store).status == "cancelled"


def test_a_stream_that_is_left_cancels_its_run(store):
    graph = with_recording(counting(DjangoSaver(store)), workflow_name="left", backend=store)
    stream = graph.stream({"numbers": []}, thread())

    next(stream)
    with suppress(GeneratorExit):
        stream.close()

    assert only_run(store).status == "cancelled"


def test_it_records_with_any_checkpointer_or_none_and_in_any_store(every_backend, invoke):
    for saver in (InMemorySaver(), None):
        graph = with_recording(
            counting(saver), workflow_name="any", backend=every_backend, labels={"saver": "other"}
        )
        assert invoke(graph, {"numbers": []}, thread()) == {"numbers": [0, 1, 2]}

    runs = every_backend.runs.list_runs(labels={"saver": "other"})
    assert [run.status for run in runs] == ["completed", "completed"]
    assert every_backend.states.get_latest_state(runs[0].id) == {"thread": "1", "step": 3}


def test_what_has_no_json_form_is_left_out(store, caplog):
    graph = with_recording(counting(None), workflow_name="odd", backend=store)

    graph.invoke({"numbers": [object()]})

    assert only_run(store).status == "completed"
    assert only_run(store).inputs is None
    assert "The inputs of a graph were not recorded" in caplog.text


def test_a_copy_with_another_config_is_recorded_too(store):
    graph = with_recording(counting(DjangoSaver(store)), workflow_name="copy", backend=store)

    graph.with_config(tags=["blue"]).invoke({"numbers": []}, thread())

    assert only_run(store).workflow_name == "copy"


def test_without_a_backend_the_runs_are_in_the_store_of_the_project(db):
    graph = with_recording(counting(DjangoSaver()), workflow_name="here")

    graph.invoke({"numbers": []}, thread())

    assert [run.workflow_name for run in create_storage_backend().runs.list_runs()] == ["here"]

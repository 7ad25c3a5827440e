"""Whole graphs on `DjangoSaver`: forks, subgraphs, durability, other processes, and being killed."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import uuid
from pathlib import Path
from typing import TypedDict

import pytest
from langchain_core.messages import AIMessage, HumanMessage
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph
from langgraph.types import Command, interrupt

from tests.contrib.langgraph.graphs import (
    DeltaNumbers,
    Messages,
    Numbers,
    asking,
    counting,
    thread,
)
from tests.servers import wait_until
from workflow_storage.contrib.langgraph import DjangoSaver
from workflow_storage.contrib.langgraph.models import ChannelBlob, ThreadNamespace

ROOT = Path(__file__).parents[3]


def chatting(saver):
    """A graph that answers with what it was told, at length."""

    def answer(state):
        text = f"{state['messages'][-1].content} {uuid.uuid4()} " * 20
        return {"messages": [AIMessage(content=text)]}

    graph = StateGraph(Messages)
    graph.add_node("answer", answer)
    graph.add_edge(START, "answer")
    graph.add_edge("answer", END)
    return graph.compile(checkpointer=saver)


def say(graph, text, config):
    return graph.invoke({"messages": [HumanMessage(content=text)]}, config)["messages"]


def test_three_forks_of_a_thread_go_on_by_themselves(saver):
    graph = chatting(saver)
    for number in range(20):
        said = say(graph, f"word {number}", thread())
    fork = graph.get_state(thread()).config
    ends = []
    for name in ("one", "two", "three"):
        graph.update_state(fork, {"messages": [HumanMessage(content=name)]})
        for number in range(3):
            after = say(graph, f"{name} {number}", thread())
        ends.append((graph.get_state(thread()).config, after))

    fresh = chatting(DjangoSaver(saver.backend))
    for (config, after), name in zip(ends, ("one", "two", "three"), strict=True):
        found = fresh.get_state(config).values["messages"]
        assert found == after
        assert found[:40] == said
        assert [message.content for message in found[40:] if isinstance(message, HumanMessage)] == [
            name,
            *(f"{name} {number}" for number in range(3)),
        ]
    lengths = {len(one.values.get("messages", [])) for one in fresh.get_state_history(thread())}
    assert lengths == {*range(48)}


@pytest.mark.parametrize("durability", ["exit", "async", "sync"])
@pytest.mark.parametrize("state", [Numbers, DeltaNumbers])
def test_every_durability_stores_what_langgraphs_own_saver_does(saver, durability, state):
    snapshots = []
    for one in (saver, InMemorySaver()):
        graph = counting(one, 6, state=state)
        graph.invoke({"numbers": []}, thread(), durability=durability)
        graph.invoke({"numbers": [9]}, thread(), durability=durability)
        snapshots.append(
            [
                (snapshot.values, snapshot.next, snapshot.metadata)
                for snapshot in graph.get_state_history(thread())
            ]
        )

    assert snapshots[0] == snapshots[1]


def test_delta_channels_of_forks_are_rebuilt_along_their_own_path(saver):
    graph = counting(saver, 6, state=DeltaNumbers)
    graph.invoke({"numbers": []}, thread())
    history = list(graph.get_state_history(thread()))
    middle = next(one for one in history if one.values == {"numbers": [0, 1, 2]})

    fork = graph.update_state(middle.config, {"numbers": ["fork"]})

    assert graph.get_state(fork).values == {"numbers": [0, 1, 2, "fork"]}
    assert graph.get_state(history[0].config).values == {"numbers": [0, 1, 2, 3, 4, 5]}


class Outer(TypedDict):
    answer: str


def nested(saver):
    """A graph with a subgraph that asks."""

    def ask(state):
        return {"answer": interrupt("which?")}

    inner = StateGraph(Outer)
    inner.add_node("ask", ask)
    inner.add_edge(START, "ask")
    outer = StateGraph(Outer)
    outer.add_node("inner", inner.compile())
    outer.add_node("last", lambda state: {"answer": state["answer"] + "!"})
    outer.add_edge(START, "inner")
    outer.add_edge("inner", "last")
    return outer.compile(checkpointer=saver)


def test_a_subgraph_is_interrupted_and_gone_on_with(saver):
    graph = nested(saver)
    result = graph.invoke({"answer": ""}, thread())
    assert [one.value for one in result["__interrupt__"]] == ["which?"]
    [task] = graph.get_state(thread(), subgraphs=True).tasks
    assert task.state.next == ("ask",)

    result = nested(DjangoSaver(saver.backend)).invoke(Command(resume="this"), thread())

    assert result == {"answer": "this!"}
    spaces = ThreadNamespace.objects.using(saver.backend.alias)
    assert spaces.count() == 2
    saver.prune(["1"])
    assert [space.namespace for space in spaces.all()] == [""]
    assert graph.get_state(thread()).values == {"answer": "this!"}


def test_an_interrupt_is_answered_after_pruning(saver):
    graph = asking(saver)
    graph.invoke({"numbers": []}, thread())

    saver.prune(["1"])

    assert graph.invoke(Command(resume=2), thread()) == {"numbers": [1, 2, 3]}


def in_another_process(url, code, *, wait=True):
    """Run code that finds a saver, on the store at a URL, in a process of its own."""
    head = f"""
        import os, sys
        os.environ["DJANGO_SETTINGS_MODULE"] = "tests.settings"
        import django
        django.setup()
        from tests.contrib.langgraph.graphs import *
        from workflow_storage import create_storage_backend
        from workflow_storage.contrib.langgraph import DjangoSaver, with_recording
        store = create_storage_backend({url!r})
        saver = DjangoSaver(store)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(head) + textwrap.dedent(code)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    if not wait:
        return process
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return out


@pytest.mark.slow
def test_another_process_goes_on_with_what_this_one_began(saver, sql_url):
    graph = counting(saver, 5)
    graph.invoke({"numbers": []}, thread())

    out = in_another_process(
        sql_url,
        """
        graph = counting(saver, 10)
        print(graph.invoke({"numbers": ["other"]}, thread())["numbers"])
        """,
    )
    result = counting(saver, 12).invoke({"numbers": ["again"]}, thread())

    other = [*range(5), "other", *range(6, 10)]
    assert out.strip() == str(other)
    assert result == {"numbers": [*other, "again", 11]}


@pytest.mark.slow
@pytest.mark.parametrize("durability", ["sync", "async"])
def test_a_graph_goes_on_after_its_process_was_killed(saver, sql_url, tmp_path, durability):
    marks = tmp_path / "marks"
    code = f"""
        import time
        def node(state):
            with open({str(marks)!r}, "a") as file:
                file.write(f"{{len(state['numbers'])}} ")
            if len(state["numbers"]) == 3:
                time.sleep(0.5)  # what was saved in the background is there by now
                with open({str(marks)!r}, "a") as file:
                    file.write("waits ")
                time.sleep(100)
        graph = with_recording(counting(saver, 5, node=node), workflow_name="kill", backend=store)
        graph.invoke({{"numbers": []}}, thread(), durability={durability!r})
    """
    process = in_another_process(sql_url, code, wait=False)
    wait_until(lambda: marks.exists() and "waits" in marks.read_text(), 60)

    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=30)
    out = in_another_process(
        sql_url,
        """
        from datetime import timedelta
        graph = with_recording(
            counting(saver, 5), workflow_name="kill", backend=store, stalled_after=timedelta(0)
        )
        before = graph.get_state(thread()).values
        import json
        print(json.dumps([before, graph.invoke(None, thread())]))
        """,
    )

    assert json.loads(out) == [{"numbers": [0, 1, 2]}, {"numbers": [0, 1, 2, 3, 4]}]
    assert marks.read_text() == "0 1 2 3 waits "
    [run] = saver.backend.runs.list_runs()
    assert (run.status, run.attempt) == ("completed", 2)
    attempts = saver.backend.runs.list_attempts(run.id)
    assert [attempt.status for attempt in attempts] == ["failed", "completed"]


@pytest.mark.slow
def test_pruning_and_copying_beside_writers_lose_nothing(saver):
    """Three threads go on with a conversation, while two prune and copy it all the time."""
    names = ["a", "b", "c"]
    stop, errors = threading.Event(), []

    def guarded(work):
        def working():
            try:
                while not stop.is_set():
                    work()
            except Exception as exc:
                errors.append(exc)
                stop.set()

        return threading.Thread(target=working)

    said = {name: [] for name in names}

    def talk(name):
        graph = chatting(DjangoSaver(saver.backend))

        def work():
            text = f"{name} {len(said[name])}"
            messages = say(graph, text, thread(name))
            said[name].append(text)
            spoken = [one.content for one in messages if isinstance(one, HumanMessage)]
            assert spoken == said[name]

        return guarded(work)

    pruning, copying = DjangoSaver(saver.backend), DjangoSaver(saver.backend)

    def copy():
        target = uuid.uuid4().hex
        copying.copy_thread("a", target)
        copied = chatting(copying).get_state(thread(target)).values.get("messages", [])
        spoken = [one.content for one in copied if isinstance(one, HumanMessage)]
        assert spoken == [f"a {number}" for number in range(len(spoken))]
        copying.delete_thread(target)

    workers = [*map(talk, names), guarded(lambda: pruning.prune(names)), guarded(copy)]
    for worker in workers:
        worker.start()
    stop.wait(6)
    stop.set()
    for worker in workers:
        worker.join()

    assert errors == []
    assert all(len(texts) > 3 for texts in said.values())
    fresh = chatting(DjangoSaver(saver.backend))
    for name in names:
        assert len(fresh.get_state(thread(name)).values["messages"]) >= 2 * len(said[name])
    saver.prune(names)
    blobs = ChannelBlob.objects.using(saver.backend.alias)
    based = set(blobs.exclude(base_id=None).values_list("base_id", flat=True))
    assert based <= set(blobs.values_list("pk", flat=True))

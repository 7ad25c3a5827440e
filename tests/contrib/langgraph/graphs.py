"""Graphs with scripted nodes, for the tests."""

import operator
from typing import Annotated, TypedDict

from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage
from langgraph.channels.delta import DeltaChannel
from langgraph.graph import END, START, StateGraph
from langgraph.graph.message import add_messages
from langgraph.types import interrupt


class Messages(TypedDict):
    messages: Annotated[list, add_messages]


class Numbers(TypedDict):
    numbers: Annotated[list, operator.add]


def _extended(state, writes):
    return [*(state or []), *(item for write in writes for item in write)]


class DeltaNumbers(TypedDict):
    numbers: Annotated[list, DeltaChannel(_extended, snapshot_frequency=4)]


def counting(saver, steps=3, *, node=None, state=Numbers):
    """A graph that adds one number a step."""

    def count(current):
        if node is not None:
            node(current)
        return {"numbers": [len(current["numbers"])]}

    graph = StateGraph(state)
    graph.add_node("count", count)
    graph.add_edge(START, "count")
    graph.add_conditional_edges(
        "count", lambda current: "count" if len(current["numbers"]) < steps else END
    )
    return graph.compile(checkpointer=saver)


def asking(saver):
    """A graph that asks in its second node, and goes on with the answer."""

    def draft(state):
        return {"numbers": [1]}

    def review(state):
        return {"numbers": [interrupt("approve?")]}

    def send(state):
        return {"numbers": [3]}

    graph = StateGraph(Numbers)
    for node in (draft, review, send):
        graph.add_node(node)
    graph.add_edge(START, "draft")
    graph.add_edge("draft", "review")
    graph.add_edge("review", "send")
    graph.add_edge("send", END)
    return graph.compile(checkpointer=saver)


class ScriptedModel(GenericFakeChatModel):
    """A model that says what it was told to, and takes any tools."""

    def bind_tools(self, tools, **kwargs):
        return self


def scripted(*answers):
    """A model that gives these answers, each with its usage."""
    usage = {"input_tokens": 10, "output_tokens": 5, "total_tokens": 15}
    messages = [
        answer if isinstance(answer, AIMessage) else AIMessage(content=answer) for answer in answers
    ]
    return ScriptedModel(
        messages=iter(message.model_copy(update={"usage_metadata": usage}) for message in messages)
    )


def thread(thread_id="1", **configurable):
    return {"configurable": {"thread_id": thread_id, **configurable}, "recursion_limit": 1000}

"""What a graph tells while it runs, as nodes and usage of a workflow run; for `recording`."""

from __future__ import annotations

import contextlib
import threading
from contextvars import copy_context
from typing import TYPE_CHECKING, Any

from langchain_core.messages import AIMessage
from langgraph.callbacks import GraphCallbackHandler
from langgraph.errors import GraphBubbleUp

from workflow_storage.backends.orm import DjangoWorkflowRunRepository
from workflow_storage.validation import MAX_NODE_ID, MAX_WAITING_FOR, cut

if TYPE_CHECKING:
    from collections.abc import Iterator
    from uuid import UUID

    from langchain_core.outputs import LLMResult
    from langgraph.callbacks import GraphInterruptEvent

    from workflow_storage.recorder.nodes import Node
    from workflow_storage.recorder.run import RecordedRun


class RunCallbacks(GraphCallbackHandler):
    """Notes the nodes of a graph, and the tokens of its models, in a run.

    After each node a checkpoint of the run is saved, with its time and usage. Its state says only where
    the graph is, for its own state is in the checkpoints of the graph.

    Args:
        run: the run that is recorded around the graph.
        thread_id: the thread of the graph, or None.

    Attributes:
        outputs: what the graph has returned.
        waiting_for: for what it waits, once it was interrupted.
    """

    run_inline = True  # in the task of the node, for a node is known to its task
    raise_error = True  # a run that was cancelled or taken over stops its graph

    def __init__(self, run: RecordedRun, thread_id: str | None) -> None:
        self.outputs: Any = None
        self.waiting_for: str | None = None
        self._run = run
        self._thread_id = thread_id
        self._root: UUID | None = None
        self._nodes: dict[UUID, tuple[Node, dict[str, Any]]] = {}
        self._changing = threading.Lock()
        self._counted: set[str] = set()

    def on_chain_start(
        self,
        serialized: dict[str, Any] | None,
        inputs: Any,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        metadata: dict[str, Any] | None = None,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Note that the graph begins, or one of its nodes."""
        if self._root is None:
            self._root = run_id
        elif (
            parent_run_id == self._root and name and (metadata or {}).get("langgraph_node") == name
        ):
            node = self._run.node(_plain(name, MAX_NODE_ID))
            node.__enter__()
            self._nodes[run_id] = node, self._place(metadata or {})

    def on_chain_end(self, outputs: Any, *, run_id: UUID, **kwargs: Any) -> Any:
        """Note that a node ends, and save a checkpoint of the run; or that the graph ends."""
        if run_id == self._root:
            self.outputs = outputs
        if run_id in self._nodes:
            self._count(outputs)
            with self._left(run_id) as place:
                _in_its_thread(self._run, place)

    def on_chain_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        """Note that a node has failed, or was interrupted."""
        if run_id in self._nodes:
            node, _ = self._nodes.pop(run_id)
            failed = None if isinstance(error, GraphBubbleUp) else error
            node.__exit__(None if failed is None else type(failed), failed, None)

    def on_llm_end(self, response: LLMResult, **kwargs: Any) -> None:
        """Add the tokens that a model has used."""
        for generations in response.generations:
            for generation in generations:
                self._count([getattr(generation, "message", None)])

    def on_interrupt(self, event: GraphInterruptEvent) -> None:
        """Note for what the graph waits."""
        texts = [_question(interrupt.value) for interrupt in event.interrupts]
        self.waiting_for = _plain("; ".join(texts) or event.status, MAX_WAITING_FOR)

    @contextlib.contextmanager
    def _left(self, run_id: UUID) -> Iterator[dict[str, Any]]:
        """Leave a node after something was done in it; yield where the graph is."""
        node, place = self._nodes.pop(run_id)
        with contextlib.ExitStack() as stack:
            stack.push(node.__exit__)
            yield place

    def _place(self, metadata: dict[str, Any]) -> dict[str, Any]:
        place = {"thread": self._thread_id, "step": metadata.get("langgraph_step")}
        return {name: value for name, value in place.items() if value is not None}

    def _count(self, outputs: Any) -> None:
        """Add the tokens of the messages of models in what a node returns, each once."""
        for message in _messages(outputs):
            usage = message.usage_metadata
            if usage is None:
                continue
            with self._changing:
                # Of one without an id, the model has told already, or nobody will.
                is_new = message.id is None or message.id not in self._counted
                if message.id is not None:
                    self._counted.add(message.id)
            if is_new:
                self._run.add_usage(tokens=usage["total_tokens"])


class AsyncRunCallbacks(RunCallbacks):
    """The same for a graph that runs in an event loop."""

    async def on_chain_end(self, outputs: Any, *, run_id: UUID, **kwargs: Any) -> None:
        """See `RunCallbacks.on_chain_end`."""
        if run_id == self._root:
            self.outputs = outputs
        if run_id in self._nodes:
            self._count(outputs)
            with self._left(run_id) as place:
                await self._run.asave_state(place)


def _in_its_thread(run: RecordedRun, place: dict[str, Any]) -> None:
    """Save a checkpoint of a run; LangGraph's threads are many, and are to need no connections."""
    runs = run.backend.runs
    if isinstance(runs, DjangoWorkflowRunRepository):
        # The node is known to the context.
        runs.from_any_thread(copy_context().run, run.save_state, place)
    else:
        run.save_state(place)


def _messages(outputs: Any) -> list[AIMessage]:
    """Return the messages of models in what a node returns: in a list, or in a dict of lists."""
    values = outputs.values() if isinstance(outputs, dict) else [outputs]
    lists = [value if isinstance(value, list | tuple) else [value] for value in values]
    return [item for items in lists for item in items if isinstance(item, AIMessage)]


def _question(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)


def _plain(text: str, limit: int) -> str:
    """Return text that a name may be made of."""
    without = text.replace("\0", "\ufffd").encode(errors="replace").decode()
    return cut(without, limit) or "?"

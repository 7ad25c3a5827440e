"""`with_recording`: each run of a graph as a workflow run."""

from __future__ import annotations

import copy
import logging
from contextlib import aclosing
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from langchain_core.runnables.config import merge_configs
from langgraph.pregel import Pregel
from langgraph.types import Command

from workflow_storage.base import StorageBackend
from workflow_storage.contrib.langgraph.callbacks import AsyncRunCallbacks, RunCallbacks
from workflow_storage.contrib.langgraph.names import digest
from workflow_storage.contrib.langgraph.saver import DjangoSaver
from workflow_storage.exceptions import InvalidFieldError
from workflow_storage.factory import acreate_storage_backend, create_storage_backend
from workflow_storage.recorder import record_run, resume_run
from workflow_storage.recorder.opening import RESUMABLE
from workflow_storage.recorder.run import as_current, run_around
from workflow_storage.serialization import is_utf8, payload_json
from workflow_storage.status import RunStatus
from workflow_storage.validation import MAX_LABEL_VALUE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Generator, Iterator
    from datetime import timedelta

    from langchain_core.runnables import RunnableConfig

    from workflow_storage.config import StorageConfig
    from workflow_storage.models import WorkflowRun
    from workflow_storage.recorder.recording import Recording

_G = TypeVar("_G", bound="Pregel[Any, Any, Any, Any]")

logger = logging.getLogger(__name__)

_END = object()

THREAD_LABEL = "thread"
"""The label of a run that says in which thread its graph ran."""


def with_recording(
    graph: _G,
    *,
    workflow_name: str | None = None,
    labels: dict[str, str] | None = None,
    backend: StorageBackend | StorageConfig | str | None = None,
    heartbeat: float | None = None,
    stalled_after: timedelta | None = None,
) -> _G:
    """Return a graph that records each of its runs, from its input to its end, as a workflow run.

    It is used as before: `invoke`, `stream`, `ainvoke`, `astream`, `get_state` and the rest. An
    interrupt leaves the run waiting, and the answer (``Command(resume=…)``) goes on with the same run,
    as its next attempt. An error fails it; to go on after that (with None as the input) is the
    next attempt, too. Each node is a step of the run, with its time and its tokens.

    Args:
        graph: a compiled graph.
        workflow_name: the name of the workflow; None for that of the graph.
        labels: names and texts to find the runs by; ``thread`` is added.
        backend: the store of the runs: a `StorageBackend`, or what `create_storage_backend` takes.
        heartbeat: as for `record_run`.
        stalled_after: let None as the input, or an answer, also go on with a run of the thread that
            gave no sign of life for longer: one whose process was killed.
    """
    name = workflow_name or graph.get_name()
    settings = _Settings(name, labels or {}, backend, heartbeat, stalled_after)
    recorded = copy.copy(graph)
    kind: Any = type(graph)
    recorded.__class__ = type(
        f"Recorded{kind.__name__}", (_Recorded, kind), {"recording": settings}
    )
    return recorded


class _Settings(NamedTuple):
    workflow_name: str
    labels: dict[str, str]
    backend: StorageBackend | StorageConfig | str | None
    heartbeat: float | None
    stalled_after: timedelta | None

    def begin(self, graph_input: Any, thread_id: str | None, store: StorageBackend) -> Recording:
        """Return the recording of a new run."""
        return record_run(
            self.workflow_name,
            inputs=_payload("inputs", graph_input),
            labels={**self.labels, **_label(thread_id)},
            backend=store,
            heartbeat=self.heartbeat,
        )

    def go_on(self, run: WorkflowRun, store: StorageBackend) -> Recording:
        """Return the recording of the next attempt of a run."""
        return resume_run(
            run.id, backend=store, heartbeat=self.heartbeat, stalled_after=self.stalled_after
        )

    def filters(self, graph_input: Any, thread_id: str | None) -> dict[str, Any] | None:
        """Return how to find the run that an input goes on with; None if it begins one."""
        if thread_id is None or not (_is_answer(graph_input) or graph_input is None):
            return None
        return {"workflow_name": self.workflow_name, "labels": _label(thread_id), "limit": 1}

    def is_to_go_on(self, run: WorkflowRun, graph_input: Any) -> bool:
        """Whether a run that was found is to be gone on with.

        To go on with one that is running is refused, unless it has stalled: somebody else has given
        the answer.
        """
        if run.status == RunStatus.RUNNING:
            return self.stalled_after is not None or _is_answer(graph_input)
        return run.status in RESUMABLE


class _Recorded(Pregel[Any, Any, Any, Any]):
    """What a graph becomes by `with_recording`."""

    recording: _Settings

    def stream(self, input: Any, config: Any = None, **kwargs: Any) -> Iterator[Any]:  # noqa: A002
        if _is_within_another(merge_configs(self.config, config)):
            yield from super().stream(input, config, **kwargs)
            return
        # The consumer's context has nothing to do with the run, and may have another graph's.
        context = copy_context()
        steps = self._steps(input, config, kwargs)
        try:
            while True:
                try:
                    step = context.run(next, steps)
                except StopIteration:
                    return
                yield step
        finally:
            context.run(steps.close)

    def _steps(
        self, graph_input: Any, config: Any, kwargs: dict[str, Any]
    ) -> Generator[Any, None, None]:
        given = self.recording.backend
        store = given if isinstance(given, StorageBackend) else create_storage_backend(given)
        merged = merge_configs(self.config, config)
        thread_id = _thread_id(merged)
        run = self._made_by(merged, graph_input, store)
        filters = self.recording.filters(graph_input, thread_id)
        if run is None and filters is not None:
            run = next(iter(store.runs.list_runs(**filters)), None)
        with self._recording(graph_input, thread_id, run, store) as recorded:
            callbacks = RunCallbacks(recorded, thread_id)
            yield from super().stream(graph_input, _with(config, callbacks), **kwargs)
            recorded.outputs = _payload("outputs", callbacks.outputs)
            if callbacks.waiting_for is not None:
                recorded.suspend(callbacks.waiting_for)

    async def astream(self, input: Any, config: Any = None, **kwargs: Any) -> AsyncIterator[Any]:  # noqa: A002
        if _is_within_another(merge_configs(self.config, config)):
            async for step in super().astream(input, config, **kwargs):
                yield step
            return
        given = self.recording.backend
        store = given if isinstance(given, StorageBackend) else await acreate_storage_backend(given)
        merged = merge_configs(self.config, config)
        thread_id = _thread_id(merged)
        run = await self._amade_by(merged, input, store)
        filters = self.recording.filters(input, thread_id)
        if run is None and filters is not None:
            run = next(iter(await store.runs.alist_runs(**filters)), None)
        around = run_around()
        async with self._recording(input, thread_id, run, store) as recorded:
            callbacks = AsyncRunCallbacks(recorded, thread_id)
            async with aclosing(
                super().astream(input, _with(config, callbacks), **kwargs)  # type: ignore[type-var]
            ) as steps:
                # This runs in the context of the consumer, which may be another one each time.
                while True:
                    with as_current(recorded):
                        step = await anext(steps, _END)
                    if step is _END:
                        break
                    with as_current(around):
                        yield step
            recorded.outputs = _payload("outputs", callbacks.outputs)
            if callbacks.waiting_for is not None:
                recorded.suspend(callbacks.waiting_for)

    def _recording(
        self,
        graph_input: Any,
        thread_id: str | None,
        run: WorkflowRun | None,
        store: StorageBackend,
    ) -> Recording:
        if run is not None and self.recording.is_to_go_on(run, graph_input):
            return self.recording.go_on(run, store)
        return self.recording.begin(graph_input, thread_id, store)

    def _made_by(
        self, config: RunnableConfig, given: Any, store: StorageBackend
    ) -> WorkflowRun | None:
        """Return the run that made the checkpoint which a configuration names, if it goes on there."""
        saver = self._saver_of(config, given)
        run_id = None if saver is None else saver.run_of(config)
        return None if run_id is None else store.runs.get(run_id)

    async def _amade_by(
        self, config: RunnableConfig, given: Any, store: StorageBackend
    ) -> WorkflowRun | None:
        saver = self._saver_of(config, given)
        run_id = None if saver is None else await saver.arun_of(config)
        return None if run_id is None else await store.runs.aget(run_id)

    def _saver_of(self, config: RunnableConfig, given: Any) -> DjangoSaver | None:
        names_one = bool((config.get("configurable") or {}).get("checkpoint_id"))
        goes_on = given is None or isinstance(given, Command)
        saver = self.checkpointer
        return saver if names_one and goes_on and isinstance(saver, DjangoSaver) else None


def _is_answer(graph_input: Any) -> bool:
    return isinstance(graph_input, Command) and graph_input.resume is not None


def _is_within_another(config: RunnableConfig) -> bool:
    """Whether a graph runs as a node of another one, which is what is recorded then."""
    return "__pregel_task_id" in (config.get("configurable") or {})


def _with(config: RunnableConfig | None, callbacks: RunCallbacks) -> RunnableConfig:
    return merge_configs(config, {"callbacks": [callbacks]})


def _thread_id(config: RunnableConfig) -> str | None:
    thread_id = (config.get("configurable") or {}).get("thread_id")
    return None if thread_id is None else str(thread_id)


def _label(thread_id: str | None) -> dict[str, str]:
    """Return the label of a thread; one that no label can be has a digest for it."""
    if not thread_id:
        return {}
    if len(thread_id) > MAX_LABEL_VALUE or "\0" in thread_id or not is_utf8(thread_id):
        return {THREAD_LABEL: digest(thread_id)}
    return {THREAD_LABEL: thread_id}


def _payload(field: str, value: Any) -> Any:
    """Return a value for the run, or None if it has no JSON form, which is no fault of the graph."""
    try:
        payload_json(field, value)
    except InvalidFieldError as exc:
        logger.warning("The %s of a graph were not recorded: %s", field, exc)
        return None
    return value

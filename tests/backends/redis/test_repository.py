"""The methods that are made of operations."""

import inspect

from workflow_storage.backends.redis import (
    RedisExecutionStateRepository,
    RedisWorkflowRunRepository,
)
from workflow_storage.backends.redis.writer import RedisStateWriter
from workflow_storage.base import AbstractExecutionStateRepository, AbstractWorkflowRunRepository


def test_every_async_twin_is_native():
    derived = {"alist_by_workflow", "asummarize"}  # of native twins
    for ours, abstract in (
        (RedisWorkflowRunRepository, AbstractWorkflowRunRepository),
        (RedisExecutionStateRepository, AbstractExecutionStateRepository),
    ):
        for name, twin in inspect.getmembers(abstract, inspect.isfunction):
            if "Async twin" in (twin.__doc__ or "") and name not in derived:
                assert getattr(ours, name) is not twin, name


def test_a_method_looks_as_if_it_was_written_by_hand():
    for name in ("list_runs", "alist_runs", "update_status", "aupdate_status"):
        ours, theirs = (
            getattr(cls, name)
            for cls in (RedisWorkflowRunRepository, AbstractWorkflowRunRepository)
        )
        assert inspect.signature(ours) == inspect.signature(theirs)
        assert ours.__qualname__ == f"RedisWorkflowRunRepository.{name}"
        assert not hasattr(ours, "__wrapped__")
    assert RedisWorkflowRunRepository.get.__doc__ == "See `AbstractWorkflowRunRepository.get`."
    assert RedisWorkflowRunRepository.aget.__doc__ == "Async twin of `get`."
    assert RedisStateWriter.append.__doc__ == "See `StateWriter.append`."

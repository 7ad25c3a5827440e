"""What is promised of checkpoints that are copied as they are stored.

Run by `StorageContract`, or alone against a repository of states that is being written.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from workflow_storage import (
    EncodedCheckpoint,
    RunNotFoundError,
    StepConflictError,
    StorageBackend,
    StorageError,
    WorkflowRun,
)
from workflow_storage.base import checkpoint_of
from workflow_storage.deltas import base_step, is_delta
from workflow_storage.testing.sample_runs import stored_run
from workflow_storage.testing.values import changed_state


def _grown(backend: StorageBackend, states: int = 20) -> WorkflowRun:
    """Store a run whose states are stored whole and as deltas, with all that a checkpoint says."""
    run = stored_run(backend, status="running")
    writer = backend.states.writer(run.id, attempt=1)
    state: dict[str, Any] = {"\0": "\ud800", "big": 10**40}
    for step in range(states):
        state = changed_state(state, "grow", 900 + step)
        writer.save_state(
            state, f"node {step} ✓", duration_seconds=step / 8, tokens=step, cost_usd=0.1 * step
        )
    return run


class EncodedContract:
    """What `iter_encoded` and `append_encoded` promise."""

    def test_encoded_checkpoints_are_those_of_the_history(self, backend: StorageBackend) -> None:
        run = _grown(backend)

        encoded = list(backend.states.iter_encoded(run.id))

        history = backend.states.get_state_history(run.id)
        assert [checkpoint_of(run.id, one) for one in encoded] == history
        texts = {one.step: one.text for one in encoded}
        assert any(is_delta(one.stored) for one in encoded)
        for one in encoded:
            assert is_delta(one.stored) or one.stored == one.text
            assert one.base == (texts[base_step(one.step)] if is_delta(one.stored) else None)

    @pytest.mark.parametrize("after", [-1, 0, 6, 18, 19, 2**40])
    def test_encoded_checkpoints_begin_after_a_step(
        self, backend: StorageBackend, after: int
    ) -> None:
        run = _grown(backend)

        later = list(backend.states.iter_encoded(run.id, after=after))

        history = list(backend.states.iter_state_history(run.id, after=after))
        assert [checkpoint_of(run.id, one) for one in later] == history
        assert all(one.base is not None for one in later if is_delta(one.stored))

    def test_no_run_and_no_state_give_no_encoded_checkpoint(self, backend: StorageBackend) -> None:
        for run_id in ("gone", "impossible\0", stored_run(backend).id):
            assert not list(backend.states.iter_encoded(run_id))

    @pytest.mark.parametrize("kept", [20, 7])
    def test_what_is_encoded_comes_back_equal_from_where_it_was_appended(
        self, backend: StorageBackend, kept: int
    ) -> None:
        run, copy = _grown(backend), stored_run(backend)
        backend.states.delete_states(run.id, keep_last=kept)
        encoded = list(backend.states.iter_encoded(run.id))

        assert backend.states.append_encoded(copy.id, encoded[:3]) == 3
        writer = backend.states.writer(copy.id)
        assert writer.append_encoded(iter(encoded[3:5])) == 2
        assert writer.append_encoded(encoded[5:]) == kept - 5
        assert backend.states.append_encoded(copy.id, []) == 0

        history = backend.states.get_state_history(run.id)
        assert backend.states.get_state_history(copy.id) == history
        assert backend.states.get_latest_checkpoint(copy.id) == history[-1]
        assert writer.save_state({"new": True}, "node") == 20
        assert list(backend.states.iter_encoded(copy.id))[:-1] == encoded

    def test_a_delta_on_another_base_comes_back_equal(self, backend: StorageBackend) -> None:
        run, copy = _grown(backend), stored_run(backend)
        history = backend.states.get_state_history(run.id)
        # The same value, but not the same bytes, in which a delta is a difference.
        other = {**dict(reversed(history[16]["state_data"].items()))}
        encoded = list(backend.states.iter_encoded(run.id))
        backend.states.append_encoded(copy.id, encoded[:16])
        backend.states.append(copy.id, [{**history[16], "state_data": other}])

        backend.states.append_encoded(copy.id, encoded[17:])

        assert backend.states.get_state_history(copy.id) == history

    def test_appending_encoded_checkpoints_refuses_what_appending_does(
        self, backend: StorageBackend
    ) -> None:
        run, other = _grown(backend, 3), stored_run(backend)
        encoded = list(backend.states.iter_encoded(run.id))

        for unknown in ("gone", "impossible\0"):
            for nothing_or_something in ([], encoded):
                with pytest.raises(RunNotFoundError):
                    backend.states.append_encoded(unknown, nothing_or_something)
        with pytest.raises(StepConflictError, match=f"run {run.id} is 3, not 1"):
            backend.states.append_encoded(run.id, encoded[1:2])
        for bad in (
            encoded[0]._replace(node_id=""),
            encoded[0]._replace(step=-1),
            encoded[0]._replace(tokens=2**63),
        ):
            with pytest.raises(ValueError):
                backend.states.append_encoded(other.id, [bad])
        assert not backend.states.get_state_history(other.id)

    def test_what_is_no_state_is_not_appended(self, backend: StorageBackend) -> None:
        run, other = _grown(backend, 1), stored_run(backend)
        (good,) = backend.states.iter_encoded(run.id)

        for text in (b"[]", b"", b'{"a": "\xff"}', b'{"a": "\0"}'):
            with pytest.raises(StorageError):
                backend.states.append_encoded(other.id, [good._replace(stored=text, text=text)])

        assert not backend.states.get_state_history(other.id)

    def test_async_twins_copy_the_same(self, backend: StorageBackend) -> None:
        run, copy = _grown(backend), stored_run(backend)

        async def copied() -> list[EncodedCheckpoint]:
            encoded = [one async for one in backend.states.aiter_encoded(run.id)]
            assert await backend.states.aappend_encoded(copy.id, encoded[:4]) == 4
            assert await backend.states.writer(copy.id).aappend_encoded(encoded[4:]) == 16
            return encoded

        assert asyncio.run(copied()) == list(backend.states.iter_encoded(run.id))
        assert list(backend.states.iter_encoded(copy.id)) == list(
            backend.states.iter_encoded(run.id)
        )

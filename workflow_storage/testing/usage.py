"""What a checkpoint carries besides its state: the time and usage of its node, and the totals.

Run by `StorageContract`, or alone against a repository of states that is being written.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
from django.utils import timezone
from hypothesis import given
from hypothesis import strategies as st

from workflow_storage import Checkpoint, StorageBackend
from workflow_storage.testing.sample_runs import read_run, stored_run
from workflow_storage.testing.values import against_the_store

if TYPE_CHECKING:
    from collections.abc import Callable

    from workflow_storage import WorkflowRun

SMALL: dict[str, Any] = {"n": 1}
LARGE: dict[str, Any] = {"text": "large " * 2000}
STATES = pytest.mark.parametrize("state", [SMALL, LARGE], ids=["small", "large"])
WAYS = pytest.mark.parametrize("way", ["bare", "writer"])
NOTHING = {"attempt": None, "duration_seconds": None, "tokens": None, "cost_usd": None}
USAGE: dict[str, Any] = {"duration_seconds": 1.25, "tokens": 812, "cost_usd": 0.0031}

_floats = st.none() | st.floats(allow_nan=False, allow_infinity=False)
_usage = st.fixed_dictionaries(
    {},
    optional={
        "duration_seconds": _floats,
        "tokens": st.none() | st.integers(-(2**63), 2**63 - 1),
        "cost_usd": _floats,
    },
)


def saving(
    backend: StorageBackend, run: WorkflowRun, way: str, attempt: int | None = None
) -> Callable[..., int]:
    """Return what saves states of a run: the repository, or a writer."""
    if way == "writer":
        return backend.states.writer(run.id, attempt=attempt).save_state

    def save(*args: Any, **kwargs: Any) -> int:
        return backend.states.save_state(run.id, *args, attempt=attempt, **kwargs)

    return save


def carried(checkpoint: Checkpoint | None) -> dict[str, Any]:
    """Return what a checkpoint carries besides its state."""
    assert checkpoint is not None
    return {name: checkpoint[name] for name in NOTHING}  # type: ignore[literal-required]


class UsageContract:
    """What `save_state` promises of usage and totals, and what reading does."""

    @WAYS
    @STATES
    def test_a_checkpoint_carries_its_attempt_and_usage(
        self, backend: StorageBackend, state: dict[str, Any], way: str
    ) -> None:
        run = stored_run(backend, status="running")
        save = saving(backend, run, way, attempt=1)

        for _ in range(3):
            save(state, "node", **USAGE)

        expected = {**USAGE, "attempt": 1}
        history = backend.states.get_state_history(run.id)
        assert [carried(checkpoint) for checkpoint in history] == [expected] * 3
        assert carried(backend.states.get_latest_checkpoint(run.id)) == expected
        assert carried(backend.states.get_state(run.id, 1)) == expected
        assert [checkpoint["state_data"] for checkpoint in history] == [state] * 3

    @WAYS
    def test_what_is_not_given_is_not_known(self, backend: StorageBackend, way: str) -> None:
        run = stored_run(backend)
        save = saving(backend, run, way)
        save(SMALL, "node")
        save(SMALL, "node", tokens=0, cost_usd=None)

        first, second = backend.states.get_state_history(run.id)

        assert carried(first) == NOTHING
        assert carried(second) == {**NOTHING, "tokens": 0}

    @against_the_store
    @given(usages=st.lists(_usage, min_size=1, max_size=4))
    def test_any_usage_comes_back_equal(
        self, backend: StorageBackend, usages: list[dict[str, Any]]
    ) -> None:
        run = stored_run(backend)
        for usage in usages:
            backend.states.save_state(run.id, SMALL, "a node  with 3 4.0 spaces ", **usage)

        history = backend.states.get_state_history(run.id)
        assert [carried(checkpoint) for checkpoint in history] == [
            {**NOTHING, **usage} for usage in usages
        ]
        assert {checkpoint["node_id"] for checkpoint in history} == {"a node  with 3 4.0 spaces "}

    def test_usage_is_not_added_to_the_totals(self, backend: StorageBackend) -> None:
        run = stored_run(backend, total_tokens=5, total_cost_usd=0.5)

        backend.states.save_state(run.id, SMALL, "node", **USAGE)

        stored = read_run(backend, run)
        assert (stored.total_tokens, stored.total_cost_usd) == (5, 0.5)

    @WAYS
    @STATES
    def test_totals_are_stored_with_the_checkpoint(
        self, backend: StorageBackend, state: dict[str, Any], way: str
    ) -> None:
        run, other = stored_run(backend), stored_run(backend)
        save = saving(backend, run, way)
        save(state, "first", totals={"total_tokens": 1, "total_cost_usd": 0.1})

        save(state, "second", totals={"total_tokens": 2**63 - 1, "total_cost_usd": 0.1 + 0.2})

        stored = read_run(backend, run)
        assert (stored.total_tokens, stored.total_cost_usd) == (2**63 - 1, 0.1 + 0.2)
        assert stored.current_node == "second"
        untouched = read_run(backend, other)
        assert (untouched.total_tokens, untouched.current_node) == (None, None)

    @STATES
    def test_totals_that_are_left_out_stay_and_those_that_are_none_go(
        self, backend: StorageBackend, state: dict[str, Any]
    ) -> None:
        run = stored_run(backend, total_tokens=5, total_cost_usd=0.5)

        backend.states.save_state(run.id, state, "node", totals={"total_tokens": 6})
        stored = read_run(backend, run)
        assert (stored.total_tokens, stored.total_cost_usd) == (6, 0.5)

        backend.states.save_state(run.id, state, "node", totals={"total_tokens": None})
        stored = read_run(backend, run)
        assert (stored.total_tokens, stored.total_cost_usd) == (None, 0.5)

    @STATES
    def test_a_checkpoint_says_where_the_run_is_with_an_attempt_or_totals(
        self, backend: StorageBackend, state: dict[str, Any]
    ) -> None:
        run = stored_run(backend, status="running")
        nodes = []
        for node, carrying in (
            ("bare", {}),
            ("fenced", {"attempt": 1}),
            ("bare again", {}),
            ("counted", {"totals": {"total_tokens": 1}}),
            ("nothing counted", {"totals": {}}),
        ):
            backend.states.save_state(run.id, state, node, **carrying)
            nodes.append(read_run(backend, run).current_node)

        assert nodes == [None, "fenced", "fenced", "counted", "counted"]

    @WAYS
    @STATES
    @pytest.mark.parametrize(
        ("bad", "error"),
        [
            ({"duration_seconds": math.nan}, ValueError),
            ({"cost_usd": math.inf}, ValueError),
            ({"cost_usd": "1.0"}, ValueError),
            ({"tokens": 1.5}, ValueError),
            ({"tokens": 2**63}, ValueError),
            ({"tokens": True}, ValueError),
            ({"price": 1}, TypeError),
            ({"totals": {"total_tokens": "many"}}, ValueError),
            ({"totals": {"total_cost_usd": math.nan}}, ValueError),
            ({"totals": {"outputs": 1}}, TypeError),
            ({"totals": {"total_tokens": 9, "status": "failed"}}, TypeError),
        ],
        ids=repr,
    )
    def test_usage_and_totals_that_cannot_be_stored_store_nothing(
        self,
        backend: StorageBackend,
        state: dict[str, Any],
        way: str,
        bad: dict[str, Any],
        error: type[Exception],
    ) -> None:
        run = stored_run(backend, total_tokens=5)

        with pytest.raises(error):
            saving(backend, run, way)(state, "node", **{"totals": {"total_tokens": 6}, **bad})

        assert backend.states.get_state_history(run.id) == []
        stored = read_run(backend, run)
        assert (stored.total_tokens, stored.current_node) == (5, None)

    @STATES
    def test_totals_are_not_stored_without_the_checkpoint(
        self, backend: StorageBackend, state: dict[str, Any]
    ) -> None:
        run = stored_run(backend, total_tokens=5)

        with pytest.raises(TypeError):
            backend.states.save_state(
                run.id, {**state, "bad": {1}}, "node", totals={"total_tokens": 6}
            )
        with pytest.raises(ValueError, match="node_id"):
            backend.states.save_state(run.id, state, "", totals={"total_tokens": 6})

        stored = read_run(backend, run)
        assert (stored.total_tokens, stored.current_node) == (5, None)

    def test_append_copies_what_a_checkpoint_carries(self, backend: StorageBackend) -> None:
        run = stored_run(backend, attempt=9)
        at = timezone.now()
        checkpoints = [
            Checkpoint(
                step=step,
                node_id="node",
                state_data=state,
                created_at=at,
                attempt=attempt,
                duration_seconds=0.1 * step,
                tokens=tokens,
                cost_usd=cost,
            )
            for step, (state, attempt, tokens, cost) in enumerate(
                [(SMALL, 1, 0, None), (LARGE, None, 2**63 - 1, 5e-324), (LARGE, 7, None, 0.3)]
            )
        ]

        assert backend.states.append(run.id, checkpoints[:2]) == 2
        assert backend.states.writer(run.id, attempt=1).append(checkpoints[2:]) == 1

        assert backend.states.get_state_history(run.id) == checkpoints
        stored = read_run(backend, run)
        assert (stored.current_node, stored.total_tokens) == (None, None)

    @pytest.mark.parametrize(
        "bad",
        [{"attempt": -1}, {"attempt": "1"}, {"tokens": 1.5}, {"cost_usd": math.nan}],
        ids=repr,
    )
    def test_append_refuses_what_cannot_be_stored(
        self, backend: StorageBackend, bad: dict[str, Any]
    ) -> None:
        run = stored_run(backend)
        at = timezone.now()
        checkpoint: Any = dict(step=0, node_id="node", state_data={}, created_at=at, **bad)

        with pytest.raises(ValueError, match=next(iter(bad))):
            backend.states.append(run.id, [checkpoint])

        assert backend.states.get_state_history(run.id) == []

    def test_what_a_checkpoint_carries_outlives_pruning(self, backend: StorageBackend) -> None:
        run = stored_run(backend, status="running")
        writer = backend.states.writer(run.id, attempt=1)
        for number in range(8):
            writer.save_state({**LARGE, "n": number}, "node", **{**USAGE, "tokens": number})

        backend.states.delete_states(run.id, keep_last=3)

        history = backend.states.get_state_history(run.id)
        assert [carried(checkpoint) for checkpoint in history] == [
            {**USAGE, "attempt": 1, "tokens": number} for number in (5, 6, 7)
        ]

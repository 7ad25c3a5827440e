"""What the repository of states promises: every checkpoint, exactly, in the order of steps.

Run by `StorageContract`, or alone against a repository of states that is being written.
"""

from __future__ import annotations

import functools
import json
import math
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from django.utils import timezone
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from workflow_storage import (
    Checkpoint,
    InvalidFieldError,
    RunNotFoundError,
    StepConflictError,
    StorageBackend,
    StorageError,
)
from workflow_storage.testing.sample_runs import stored_run
from workflow_storage.testing.values import (
    AWKWARD_VALUES,
    NOT_JSON,
    StateChange,
    against_the_store,
    changed_state,
    in_json,
    json_objects,
    nested,
    state_changes,
)


class Score(BaseModel):
    """A model."""

    value: float


class NamedScore(Score):
    """A model that has a field more."""

    name: str


class Step(BaseModel):
    """A model whose field is annotated with a base class of what is in it."""

    score: Score


class StatesContract:
    """What `AbstractExecutionStateRepository` promises."""

    def test_save_state_numbers_the_steps_of_each_run_from_zero(
        self, backend: StorageBackend
    ) -> None:
        run, other = stored_run(backend), stored_run(backend)

        steps = [backend.states.save_state(run.id, {"n": n}, f"node-{n}") for n in range(3)]

        assert steps == [0, 1, 2]
        assert backend.states.save_state(other.id, {}, "node") == 0

    def test_a_checkpoint_has_step_node_state_and_time(self, backend: StorageBackend) -> None:
        run = stored_run(backend)
        before = timezone.now()
        backend.states.save_state(run.id, {"a": 1}, "first")
        backend.states.save_state(run.id, {"b": 2}, "second")

        checkpoint = backend.states.get_latest_checkpoint(run.id)

        assert checkpoint is not None
        assert before <= checkpoint.pop("created_at") <= timezone.now()  # type: ignore[misc]
        assert checkpoint == {
            "step": 1,
            "node_id": "second",
            "state_data": {"b": 2},
            "attempt": None,
            "duration_seconds": None,
            "tokens": None,
            "cost_usd": None,
        }
        assert backend.states.get_latest_state(run.id) == {"b": 2}

    def test_steps_are_the_history_without_the_states(self, backend: StorageBackend) -> None:
        run = stored_run(backend)
        for number in range(40):
            backend.states.save_state(
                run.id, {"n": number}, f"node-{number}", tokens=number, cost_usd=0.5
            )

        history = backend.states.get_state_history(run.id)
        expected = [
            {name: value for name, value in checkpoint.items() if name != "state_data"}
            for checkpoint in history
        ]
        assert list(backend.states.iter_steps(run.id)) == expected
        assert list(backend.states.iter_steps(run.id, after=36)) == expected[37:]
        assert list(backend.states.iter_steps(run.id, after=39)) == []
        assert list(backend.states.iter_steps("unknown")) == []
        backend.states.delete_states(run.id, keep_last=3)
        assert list(backend.states.iter_steps(run.id)) == expected[37:]

    def test_a_state_may_be_a_model_whose_json_form_is_an_object(
        self, backend: StorageBackend
    ) -> None:
        run = stored_run(backend)
        backend.states.save_state(run.id, Step(score=NamedScore(value=0.5, name="x")), "node")
        assert backend.states.get_latest_state(run.id) == {"score": {"value": 0.5, "name": "x"}}

    def test_any_step_of_the_past_can_be_read(self, backend: StorageBackend) -> None:
        run = stored_run(backend)
        for number in range(40):
            backend.states.save_state(run.id, {"n": number}, f"node-{number}")

        history = backend.states.get_state_history(run.id)

        assert [checkpoint["step"] for checkpoint in history] == list(range(40))
        assert [checkpoint["state_data"]["n"] for checkpoint in history] == list(range(40))
        assert list(backend.states.iter_state_history(run.id)) == history
        for after in (-2, 0, 17, 38, 39, 2**40):
            found = list(backend.states.iter_state_history(run.id, after=after))
            assert found == history[max(after + 1, 0) :]
        assert [backend.states.get_state(run.id, step) for step in range(40)] == history
        for step in (40, -1, 2**40, 10**5000):
            assert backend.states.get_state(run.id, step) is None
        assert backend.states.get_state(run.id, True) == history[1]
        for no_step in ("0", "", None):
            with pytest.raises(TypeError, match="step is a"):
                backend.states.get_state(run.id, no_step)  # type: ignore[arg-type]
            with pytest.raises(TypeError, match="step is a"):
                list(backend.states.iter_state_history(run.id, after=no_step))  # type: ignore[arg-type]

    def test_a_run_without_states_has_an_empty_history(self, backend: StorageBackend) -> None:
        run = stored_run(backend)
        for run_id in (run.id, "unknown"):
            assert backend.states.get_latest_state(run_id) is None
            assert backend.states.get_latest_checkpoint(run_id) is None
            assert backend.states.get_state(run_id, 0) is None
            assert backend.states.get_state_history(run_id) == []

    def test_save_state_of_an_unknown_run_raises(self, backend: StorageBackend) -> None:
        with pytest.raises(RunNotFoundError, match="Workflow run not found: gone"):
            backend.states.save_state("gone", {}, "node")

    @pytest.mark.parametrize(
        ("state", "error"),
        [
            (None, TypeError),
            ([], TypeError),
            ("text", TypeError),
            ({"x": NOT_JSON}, TypeError),
            ({"x": {1}}, TypeError),
            ({"x": b""}, TypeError),
            ({(1, 2): 1}, TypeError),
            ({"x": math.nan}, ValueError),
            ({"x": [math.inf]}, ValueError),
            ({1: 0, "1": 0}, ValueError),
            ({"x": [{None: 0, "null": 0}]}, ValueError),
            ({"x": Score(value=math.nan)}, ValueError),
        ],
        ids=repr,
    )
    def test_save_state_refuses_what_is_not_a_json_object(
        self, backend: StorageBackend, state: Any, error: type[Exception]
    ) -> None:
        run = stored_run(backend)

        with pytest.raises(error, match="state_data is") as caught:
            backend.states.save_state(run.id, state, "node")

        assert isinstance(caught.value, StorageError)
        assert backend.states.get_state_history(run.id) == []

    def test_save_state_names_the_path_of_what_is_not_json(self, backend: StorageBackend) -> None:
        run = stored_run(backend)
        with pytest.raises(InvalidFieldError, match=r"messages\[1\]\.tools is a set"):
            backend.states.save_state(run.id, {"messages": ["x", {"tools": {1}}]}, "node")

    def test_a_model_keeps_the_fields_of_its_own_class(self, backend: StorageBackend) -> None:
        run = stored_run(backend)
        step = Step(score=NamedScore(value=0.5, name="x"))

        backend.states.save_state(run.id, {"step": step, "steps": [step]}, "node")

        expected = {"score": {"value": 0.5, "name": "x"}}
        stored = backend.states.get_latest_state(run.id)
        assert stored == {"step": expected, "steps": [expected]}

    def test_save_state_refuses_what_cannot_be_read_back(self, backend: StorageBackend) -> None:
        run = stored_run(backend)
        endless: dict[str, Any] = {}
        endless["self"] = endless
        for state in (endless, nested(200_000)):
            with pytest.raises(InvalidFieldError, match="state_data is not JSON"):
                backend.states.save_state(run.id, state, "node")

    @pytest.mark.parametrize("node_id", ["", "x" * 129, "nul\0", "\ud800", None])
    def test_save_state_refuses_an_impossible_node_id(
        self, backend: StorageBackend, node_id: Any
    ) -> None:
        run = stored_run(backend)
        with pytest.raises(InvalidFieldError, match="node_id"):
            backend.states.save_state(run.id, {}, node_id)
        assert backend.states.get_latest_state(run.id) is None

    @pytest.mark.parametrize("value", AWKWARD_VALUES, ids=ascii)
    def test_awkward_states_come_back_equal(self, backend: StorageBackend, value: Any) -> None:
        run = stored_run(backend)
        backend.states.save_state(run.id, {"value": value}, "node")

        assert json.dumps(backend.states.get_latest_state(run.id)) == in_json({"value": value})

    @against_the_store
    @given(states=st.lists(json_objects, min_size=1, max_size=6))
    def test_any_states_come_back_equal(
        self, backend: StorageBackend, states: list[dict[str, Any]]
    ) -> None:
        run = stored_run(backend)
        for state in states:
            backend.states.save_state(run.id, state, "node")

        stored = [
            checkpoint["state_data"] for checkpoint in backend.states.get_state_history(run.id)
        ]
        assert json.dumps(stored) == in_json(states)
        assert json.dumps(backend.states.get_latest_state(run.id)) == in_json(states[-1])

    @settings(against_the_store, max_examples=8)
    @given(changes=st.lists(state_changes, min_size=1, max_size=20))
    def test_large_states_that_change_in_any_way_come_back_equal(
        self, backend: StorageBackend, changes: list[StateChange]
    ) -> None:
        run = stored_run(backend)
        writer = backend.states.writer(run.id)
        states: list[dict[str, Any]] = []
        for change, size, remembers in changes:
            states.append(changed_state(states[-1] if states else {}, change, size))
            save = (
                writer.save_state
                if remembers
                else functools.partial(backend.states.save_state, run.id)
            )
            assert save(states[-1], "node") == len(states) - 1

        history = backend.states.get_state_history(run.id)
        assert [checkpoint["state_data"] for checkpoint in history] == states
        for checkpoint in history:
            step = checkpoint["step"]
            assert backend.states.get_state(run.id, step) == checkpoint
            assert next(backend.states.iter_state_history(run.id, after=step - 1)) == checkpoint
        assert backend.states.get_latest_state(run.id) == states[-1]

    def test_deeply_nested_states_come_back_equal(self, backend: StorageBackend) -> None:
        run = stored_run(backend)
        backend.states.save_state(run.id, nested(500), "node")

        assert backend.states.get_latest_state(run.id) == nested(500)

    def test_large_states_come_back_equal(self, backend: StorageBackend) -> None:
        run = stored_run(backend)
        states = [{"text": "x" * 5_000_000}, {"text": "ä" * 2_000_000}, {"text": "\0" * 500_000}]
        for state in states:
            backend.states.save_state(run.id, state, "node")

        for step, state in enumerate(states):
            checkpoint = backend.states.get_state(run.id, step)
            assert checkpoint is not None
            assert checkpoint["state_data"] == state

    def test_changing_a_dict_after_saving_it_changes_nothing_stored(
        self, backend: StorageBackend
    ) -> None:
        run = stored_run(backend)
        state: dict[str, Any] = {"messages": ["first"]}
        backend.states.save_state(run.id, state, "node")
        state["messages"].append("second")

        assert backend.states.get_latest_state(run.id) == {"messages": ["first"]}

    @pytest.mark.parametrize("keep_last", [0, 1, 5, 9, 10, 11])
    def test_delete_states_keeps_the_newest_readable(
        self, backend: StorageBackend, keep_last: int
    ) -> None:
        run, other = stored_run(backend), stored_run(backend)
        for number in range(10):
            for stored in (run, other):
                backend.states.save_state(stored.id, {"n": number, "text": "x" * 99}, "node")

        deleted = backend.states.delete_states(run.id, keep_last=keep_last)

        kept = min(keep_last, 10)
        assert deleted == 10 - kept
        history = backend.states.get_state_history(run.id)
        assert [checkpoint["step"] for checkpoint in history] == list(range(10 - kept, 10))
        assert [checkpoint["state_data"]["n"] for checkpoint in history] == list(
            range(10 - kept, 10)
        )
        assert backend.states.save_state(run.id, {"n": 10}, "node") == (10 if kept else 0)
        assert backend.states.get_latest_state(run.id) == {"n": 10}
        assert len(backend.states.get_state_history(other.id)) == 10

    @pytest.mark.parametrize("keep_last", [1, 2, 7, 16, 19])
    def test_delete_states_keeps_large_states_readable_and_the_history_growing(
        self, backend: StorageBackend, keep_last: int
    ) -> None:
        run = stored_run(backend)
        writer = backend.states.writer(run.id)
        state: dict[str, Any] = {}
        states = []
        for number in range(60):
            state = changed_state(state, "grow", 1000 + number)
            states.append(state)
            save = (
                writer.save_state
                if number % 3
                else functools.partial(backend.states.save_state, run.id)
            )
            assert save(state, "node") == number
            if number % 20 == 19:
                backend.states.delete_states(run.id, keep_last=keep_last)
                history = backend.states.get_state_history(run.id)
                assert [kept["step"] for kept in history] == list(
                    range(number + 1 - keep_last, number + 1)
                )
                assert [kept["state_data"] for kept in history] == states[-keep_last:]

        first = 60 - keep_last
        for step in range(60):
            checkpoint = backend.states.get_state(run.id, step)
            assert (checkpoint is not None) == (step >= first)
            if checkpoint is not None:
                assert checkpoint["state_data"] == states[step]

    def test_a_writer_notices_that_the_run_was_written_to_and_begun_anew(
        self, backend: StorageBackend
    ) -> None:
        run = stored_run(backend)
        writer = backend.states.writer(run.id)
        for number in range(5):
            writer.save_state(changed_state({}, "grow", 6000 + number), "writer")
        backend.states.delete_states(run.id)
        for number in range(5):
            backend.states.save_state(run.id, changed_state({}, "grow", 7000 + number), "other")

        assert writer.save_state(changed_state({}, "grow", 8000), "writer") == 5
        assert backend.states.save_state(run.id, changed_state({}, "grow", 8001), "other") == 6
        assert writer.save_state(changed_state({}, "grow", 8002), "writer") == 7

        sizes = [7000, 7001, 7002, 7003, 7004, 8000, 8001, 8002]
        assert [
            checkpoint["state_data"] for checkpoint in backend.states.get_state_history(run.id)
        ] == [changed_state({}, "grow", size) for size in sizes]

    def test_a_writer_of_an_unknown_or_deleted_run_raises(self, backend: StorageBackend) -> None:
        with pytest.raises(RunNotFoundError):
            backend.states.writer("gone").save_state({}, "node")
        run = stored_run(backend)
        writer = backend.states.writer(run.id)
        writer.save_state({}, "node")
        backend.runs.delete(run.id)
        with pytest.raises(RunNotFoundError):
            writer.save_state({}, "node")

    @pytest.mark.parametrize("first", [0, 6])
    def test_append_stores_checkpoints_exactly(self, backend: StorageBackend, first: int) -> None:
        run = stored_run(backend)
        at = datetime(2020, 2, 29, 1, 2, 3, 456789, tzinfo=UTC)
        state: dict[str, Any] = {}
        checkpoints = []
        for step in range(first, first + 20):
            state = changed_state(state, "grow", 900 + step)
            checkpoints.append(
                Checkpoint(
                    step=step,
                    node_id=f"node-{step}",
                    state_data=state,
                    created_at=at + timedelta(seconds=step),
                )
            )

        assert backend.states.append(run.id, iter(checkpoints[:9])) == 9
        writer = backend.states.writer(run.id)
        assert writer.append(checkpoints[9:15]) == 6
        assert writer.append(checkpoints[15:]) == 5
        assert backend.states.append(run.id, []) == 0

        unknown = {"attempt": None, "duration_seconds": None, "tokens": None, "cost_usd": None}
        stored = [{**checkpoint, **unknown} for checkpoint in checkpoints]
        assert backend.states.get_state_history(run.id) == stored
        assert backend.states.get_latest_checkpoint(run.id) == stored[-1]
        assert writer.save_state({"new": True}, "node") == first + 20

    def test_append_refuses_a_step_that_does_not_follow(self, backend: StorageBackend) -> None:
        run = stored_run(backend)
        backend.states.save_state(run.id, {}, "node")
        at = timezone.now()

        def checkpoint(step: Any, state: Any = None, node_id: str = "node") -> Checkpoint:
            return Checkpoint(step=step, node_id=node_id, state_data=state or {}, created_at=at)

        for step in (0, 2):
            with pytest.raises(StepConflictError, match=f"run {run.id} is 1, not {step}"):
                backend.states.append(run.id, [checkpoint(step)])
        for bad, error in (
            (checkpoint(1, {"x": math.nan}), ValueError),
            (checkpoint(1, ["no dict"]), TypeError),
            (checkpoint(1, node_id=""), ValueError),
            (checkpoint(-1), ValueError),
        ):
            with pytest.raises(error):
                backend.states.append(run.id, [bad])
        for unknown in ("gone", "impossible\0"):
            for nothing_or_something in ([], [checkpoint(0)]):
                with pytest.raises(RunNotFoundError):
                    backend.states.append(unknown, nothing_or_something)
        assert [kept["step"] for kept in backend.states.get_state_history(run.id)] == [0]

    def test_append_goes_on_after_what_others_have_written(self, backend: StorageBackend) -> None:
        run = stored_run(backend)
        writer = backend.states.writer(run.id)
        at = timezone.now()
        states = [changed_state({}, "grow", 5000 + number) for number in range(6)]
        for step in range(6):
            if step % 2:
                backend.states.save_state(run.id, states[step], "other")
            else:
                writer.append(
                    [Checkpoint(step=step, node_id="own", state_data=states[step], created_at=at)]
                )

        history = backend.states.get_state_history(run.id)
        assert [checkpoint["state_data"] for checkpoint in history] == states

    def test_delete_states_of_an_unknown_run_raises(self, backend: StorageBackend) -> None:
        with pytest.raises(RunNotFoundError):
            backend.states.delete_states("gone")
        with pytest.raises(ValueError, match="keep_last is -1"):
            backend.states.delete_states(stored_run(backend).id, keep_last=-1)

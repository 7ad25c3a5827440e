"""Runs that begin where another one was."""

import pytest

from workflow_storage import (
    InvalidFieldError,
    RunNotFoundError,
    StepConflictError,
    StepNotFoundError,
    fork_run,
    record_run,
    resume_run,
)
from workflow_storage.testing import stored_run
from workflow_storage.validation import equal_checkpoints


@pytest.fixture
def backend(every_backend):
    return every_backend


@pytest.fixture
def parent(backend):
    """A run with small states and large ones, of which most are stored as deltas."""
    with record_run(
        "w", backend=backend, inputs={"a": 1}, config={"m": 2}, labels={"tenant": "acme"}
    ) as run:
        text = ""
        for number in range(20):
            with run.node(f"node-{number}"):
                run.add_usage(tokens=number)
                text += f"{number} " * 500
                run.save_state({"text": text if number % 5 else "", "number": number})
    return run.run_id


@pytest.mark.parametrize("step", [0, 7, 19])
def test_a_fork_has_the_history_up_to_a_step_and_goes_on_from_there(backend, parent, step):
    before = backend.states.get_state_history(parent)

    fork = fork_run(parent, step, backend=backend)

    stored = backend.runs.get(fork.id)
    assert (stored.status, stored.parent_id, stored.forked_from_step) == ("pending", parent, step)
    assert (stored.inputs, stored.config_snapshot, stored.labels) == (
        {"a": 1},
        {"m": 2},
        {"tenant": "acme"},
    )
    assert stored.total_tokens is None
    history = backend.states.get_state_history(fork.id)
    assert len(history) == step + 1
    assert all(map(equal_checkpoints, history, before))
    with resume_run(fork.id, backend=backend) as run:
        assert run.state["number"] == step
        assert run.done("node-0")
        assert run.save_state({"text": "x" * 9000, "forked": True}, "another") == step + 1
    assert backend.states.get_latest_state(fork.id)["forked"]
    after = backend.states.get_state_history(parent)
    assert all(map(equal_checkpoints, after, before))
    assert len(after) == len(before)
    backend.runs.delete(parent)
    assert backend.states.get_state(fork.id, step)["state_data"]["number"] == step


def test_a_fork_of_a_pruned_run_begins_with_what_is_left(backend, parent):
    backend.states.delete_states(parent, keep_last=5)
    fork = fork_run(parent, 17, backend=backend, labels={"try": "2"})

    assert [step["step"] for step in backend.states.iter_steps(fork.id)] == [15, 16, 17]
    assert backend.states.get_state(fork.id, 17)["state_data"]["number"] == 17
    assert backend.runs.get(fork.id).labels == {"try": "2"}
    with pytest.raises(StepNotFoundError, match="no checkpoint of step 14"):
        fork_run(parent, 14, backend=backend)


def test_what_cannot_be_forked_leaves_no_run_behind(backend, parent):
    with pytest.raises(RunNotFoundError):
        fork_run("nobody", 0, backend=backend)
    for step in (20, -1):
        with pytest.raises(StepNotFoundError):
            fork_run(parent, step, backend=backend)
    with pytest.raises(StepNotFoundError):
        fork_run(stored_run(backend).id, 0, backend=backend)
    with pytest.raises(InvalidFieldError, match="labels"):
        fork_run(parent, 0, backend=backend, labels={"x": 1})
    with pytest.raises(TypeError):
        fork_run(parent, "0", backend=backend)
    assert backend.runs.count_runs(parent_id=parent) == 0


@pytest.mark.parametrize("keep_last", [0, 2])
def test_a_step_that_is_deleted_meanwhile_cannot_be_forked(backend, parent, keep_last, monkeypatch):
    add = backend.runs.add

    def add_and_delete(run):
        add(run)
        backend.states.delete_states(parent, keep_last=keep_last)

    monkeypatch.setattr(backend.runs, "add", add_and_delete)
    with pytest.raises(StepNotFoundError):
        fork_run(parent, 3, backend=backend)
    assert backend.runs.count_runs(parent_id=parent) == 0


def test_states_are_copied_to_a_run_without_states_only(backend, parent):
    other = stored_run(backend)
    backend.states.save_state(other.id, {}, "node")
    with pytest.raises(StepConflictError):
        backend.states.copy_states(parent, other.id, through=3)
    with pytest.raises(RunNotFoundError):
        backend.states.copy_states(parent, "nobody", through=3)
    assert len(backend.states.get_state_history(other.id)) == 1


def test_a_fork_decodes_no_state(sql_backend, monkeypatch):
    with record_run("w", backend=sql_backend) as run:
        for number in range(5):
            run.save_state({"text": "x" * 9000, "number": number}, "node")
    for name in ("rebuilt_text", "rebuilt_state", "whole_state"):
        monkeypatch.setattr(f"workflow_storage.backends.orm.states.{name}", None)

    fork = fork_run(run.run_id, 3, backend=sql_backend)

    assert len(list(sql_backend.states.iter_steps(fork.id))) == 4

"""What a call finds that has waited for the lock of a run, which others have changed meanwhile."""

import functools
from datetime import timedelta

import pytest
from django.utils import timezone

from tests.conftest import emptied
from workflow_storage.testing import read_run, stored_run

NOW = timezone.now()
LARGE = {"text": "x" * 5000}
LABELS = {"a": "1", "keep": "no"}


@pytest.fixture
def backend(server, server_url, django_db_blocker):
    yield from emptied(server_url, django_db_blocker)


@pytest.fixture
def waiting(backend, server):
    """Let a call wait until a change is committed, and return its result."""
    return functools.partial(server.after_waiting, backend)


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize(
    ("added", "is_deleted"), [({"keep": "yes"}, False), ({"other": "text"}, True)]
)
def test_delete_finished_goes_by_the_labels_that_a_run_has_once_it_is_locked(
    backend, waiting, added, is_deleted, place
):
    runs = [
        stored_run(backend, id=f"run-{number}", status="completed", started_at=NOW, labels=LABELS)
        for number in range(2)
    ]

    deleted = waiting(
        lambda: backend.runs.delete_finished(before=NOW + timedelta(days=1), labels=LABELS),
        lambda: backend.runs.update(runs[place].id, add_labels=added),
    )

    left = [] if is_deleted else [runs[place].id]
    assert [run.id for run in backend.runs.list_runs()] == left
    assert deleted == 2 - len(left)


USES = {
    "save_state": (
        lambda runs, states, run_id: states.save_state(run_id, LARGE, "node"),
        lambda runs, states, run_id: states.get_latest_state(run_id) == LARGE,
    ),
    "append": (
        lambda runs, states, run_id: states.append(run_id, []),
        lambda runs, states, run_id: True,
    ),
    "delete_states": (
        lambda runs, states, run_id: states.delete_states(run_id),
        lambda runs, states, run_id: states.get_latest_state(run_id) is None,
    ),
    "add_labels": (
        lambda runs, states, run_id: runs.update(run_id, add_labels={"b": "2"}),
        lambda runs, states, run_id: runs.get(run_id).labels == {"a": "1", "b": "2"},
    ),
    "takeover": (
        lambda runs, states, run_id: runs.update_status(run_id, "running"),
        lambda runs, states, run_id: len(runs.list_attempts(run_id)) == 2,
    ),
    "delete": (
        lambda runs, states, run_id: runs.delete(run_id),
        lambda runs, states, run_id: runs.get(run_id) is None,
    ),
}


@pytest.mark.parametrize("name", USES)
def test_a_run_that_was_deleted_and_added_anew_in_one_transaction_is_found(backend, waiting, name):
    use, is_used = USES[name]
    fields = {"status": "running", "attempt": 1, "labels": {"a": "1"}}
    run = stored_run(backend, **fields)

    def add_anew():
        backend.runs.delete(run.id)
        stored_run(backend, id=run.id, **fields)

    waiting(lambda: use(backend.runs, backend.states, run.id), add_anew)

    assert is_used(backend.runs, backend.states, run.id)


def test_a_run_that_is_stalled_no_more_once_it_is_locked_is_not_failed(backend, waiting):
    hour = timedelta(hours=1)
    run = stored_run(backend, status="running", started_at=NOW - 2 * hour)

    failed = waiting(
        lambda: backend.runs.fail_stalled(hour),
        lambda: backend.states.save_state(run.id, {}, "node"),
    )

    assert failed == 0
    assert read_run(backend, run).status == "running"

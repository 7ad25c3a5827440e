"""Pairs of empty stores, what fills the one, and how both are compared."""

import itertools
from datetime import UTC, datetime, timedelta

import pytest
from django.utils import timezone

from tests.conftest import emptied
from workflow_storage.testing import changed_state, new_run, stored_run
from workflow_storage.validation import equal_checkpoints, equal_runs

KINDS = ["sqlite", "postgres", "mysql", "redis"]
QUICK = [("sqlite", "postgres"), ("postgres", "redis"), ("redis", "mysql"), ("mysql", "sqlite")]
"""Each kind once as source and once as target."""


@pytest.fixture(
    params=[
        pytest.param(pair, marks=[] if pair in QUICK else pytest.mark.slow, id="-to-".join(pair))
        for pair in [*itertools.permutations(KINDS, 2), ("redis", "redis_cluster")]
    ],
)
def stores(request, django_db_blocker):
    """An empty source and an empty target, in every direction."""
    source, target = (request.getfixturevalue(f"{kind}_url") for kind in request.param)
    with both(source, target, django_db_blocker) as pair:
        yield pair


@pytest.fixture
def two(sqlite_url, redis_url, django_db_blocker):
    """An empty source and an empty target, where the direction makes no difference."""
    with both(sqlite_url, redis_url, django_db_blocker) as pair:
        yield pair


class both:
    def __init__(self, source, target, blocker):
        self.fixtures = [emptied(source, blocker), emptied(target, blocker)]

    def __enter__(self):
        return [next(fixture) for fixture in self.fixtures]

    def __exit__(self, *exc_info):
        for fixture in reversed(self.fixtures):
            next(fixture, None)


def filled(store, states=9):
    """Store runs with everything that is awkward about runs, the fifth with 4 * states states."""
    start = datetime(2024, 2, 29, 23, 59, 59, 123456, tzinfo=UTC)
    for number, status in enumerate(["pending", "running", "completed", "failed", "cancelled"]):
        run = stored_run(
            store,
            id=f"{status} \N{GRINNING FACE}",
            workflow_name=f"work'flow-{number % 2}",
            status=status,
            started_at=start + timedelta(days=number),
            inputs={"\0": ["\ud800", 1e23, 10**40, {"": None}]},
            config_snapshot=[1, 1.0, True],
            outputs=None if number else "text",
            error_message="it\nbroke" if status == "failed" else None,
            total_tokens=number,
            total_cost_usd=0.1 * number,
        )
        writer = store.states.writer(run.id)
        state = {"\0lone": "\udfff"}
        for step in range(states * number):
            state = changed_state(state, "grow", 400 * number + step)
            writer.save_state(state, f"node {step} ✓")
    for number in range(3):
        store.runs.update_status("failed \N{GRINNING FACE}", "running", worker=f"host:{number}")
        store.runs.update_status(
            "failed \N{GRINNING FACE}", "failed", error_message=f"it broke again\0{number}"
        )
    again = "pending \N{GRINNING FACE}"
    store.runs.update_status(again, "running", attempt_started_at=timezone.now())
    store.states.save_state(
        again, {"a": 1}, "node", attempt=1, totals={"total_tokens": 7}, tokens=3, cost_usd=0.25
    )
    store.runs.update_status(again, "pending", waiting_for="an approval")
    store.runs.update(again, labels={"tenant": "acme", "case": "\N{GRINNING FACE}"})
    store.states.delete_states("failed \N{GRINNING FACE}", keep_last=5)
    store.runs.heartbeat("running \N{GRINNING FACE}")
    exact = new_run(id="no end", status="completed", started_at=start)
    store.runs.put(exact)
    for number in range(3):
        stored_run(store, id=f"same start {number}", started_at=start)


def assert_equal(source, target):
    ours, theirs = (list(store.runs.iter_runs()) for store in (source, target))
    assert [run.id for run in ours] == [run.id for run in theirs]
    assert ours
    for run, other in zip(ours, theirs, strict=True):
        assert_same(source, target, run, other)


def assert_same(source, target, run, other):
    assert equal_runs(run, other)
    attempts = [store.runs.list_attempts(run.id) for store in (source, target)]
    assert attempts[0] == attempts[1]
    history = [store.states.get_state_history(run.id) for store in (source, target)]
    assert len(history[0]) == len(history[1])
    assert all(map(equal_checkpoints, *history))


def outcomes(results):
    return {result.run_id: result.outcome for result in results}

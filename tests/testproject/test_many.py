"""The many runs of the demo: what they have to be so that they can be taken for real ones."""

from collections import Counter
from datetime import UTC, datetime, timedelta

import pytest
from django.core.management import call_command
from django.utils import timezone

from testproject.many import LABEL, WITH_STATES, many_runs
from tests.conftest import emptied
from workflow_storage.base import step_of
from workflow_storage.status import RunStatus
from workflow_storage.validation import run_fields

pytestmark = pytest.mark.slow

NOW = datetime(2026, 5, 20, 14, 30, tzinfo=UTC)
MONTH = timedelta(days=30)


@pytest.fixture(scope="module")
def runs():
    return list(many_runs(2000, now=NOW))


@pytest.fixture(params=["sqlite", "memory"])
def small_url(request):
    return request.getfixturevalue(f"{request.param}_url")


@pytest.fixture
def small_backend(small_url, django_db_blocker):
    yield from emptied(small_url, django_db_blocker)


def refuse_implausible(run, attempts, checkpoints, now):
    """Assert what is true of every run, attempt and checkpoint that was recorded."""
    assert now - MONTH - timedelta(hours=1) <= run.started_at <= now
    assert (run.completed_at is not None) == RunStatus(run.status).is_terminal
    end = run.completed_at or now
    assert run.started_at <= end <= now
    assert run.heartbeat_at is None or run.started_at <= run.heartbeat_at <= end
    if run.status == "failed":
        assert run.error_message
        assert run.current_node
    refuse_implausible_attempts(run, attempts, end)
    refuse_implausible_checkpoints(run, attempts, checkpoints)


def refuse_implausible_attempts(run, attempts, end):
    assert [attempt.number for attempt in attempts] == list(range(1, run.attempt + 1))
    times = [time for one in attempts for time in (one.started_at, one.ended_at or end)]
    assert times == sorted(times)
    assert all(run.started_at <= time <= end for time in times)
    if attempts:
        newest = attempts[-1]
        assert (newest.status, newest.node, newest.worker, newest.error_message) == (
            *(run.status, run.current_node, run.worker, run.error_message),
        )
        assert newest.started_at == run.attempt_started_at
    spent = [one.ended_at - one.started_at for one in attempts if one.ended_at]
    assert (run.duration_seconds is None) == (not spent)
    assert run.duration_seconds is None or run.duration_seconds == pytest.approx(
        sum(spent, timedelta()).total_seconds(), abs=0.001
    )


def refuse_implausible_checkpoints(run, attempts, checkpoints):
    first = checkpoints[0]["step"] if checkpoints else 0
    assert [one["step"] for one in checkpoints] == list(range(first, first + len(checkpoints)))
    times = [one["created_at"] for one in checkpoints]
    assert times == sorted(times)
    inherited = -1 if run.forked_from_step is None else run.forked_from_step
    own = [one for one in checkpoints if one["step"] > inherited]
    for one in own:
        attempt = attempts[one["attempt"] - 1]
        began = one["created_at"] - timedelta(seconds=one["duration_seconds"])
        assert attempt.started_at <= began + timedelta(milliseconds=1)
        assert attempt.ended_at is None or one["created_at"] <= attempt.ended_at
    if first == 0 and own and not run.forked_from_step:
        assert run.total_tokens == (sum(one["tokens"] or 0 for one in own) or None)
        costs = sum(one["cost_usd"] or 0.0 for one in own)
        assert (run.total_cost_usd or 0.0) == pytest.approx(costs, abs=1e-6)


@pytest.mark.parametrize("seed", [2024, 1, 2])
@pytest.mark.parametrize("count", [1, 2, 30, 2000])
def test_every_run_could_have_been_recorded(seed, count):
    runs = list(many_runs(count, seed=seed, now=NOW))

    assert len(runs) == len({one.run.id for one in runs}) == count
    for run, attempts, checkpoints in runs:
        refuse_implausible(run, attempts, checkpoints, NOW)


def test_every_status_is_there_and_most_runs_are_completed(runs):
    statuses = Counter(one.run.status for one in runs)

    assert set(statuses) == set(RunStatus.values)
    assert statuses["completed"] > 1600
    assert all(number > 4 for number in statuses.values())


def test_every_kind_of_run_is_there(runs):
    stored = [one.run for one in runs]
    hour_ago = NOW - timedelta(hours=1)
    running = [run for run in stored if run.status == "running"]

    assert sum(run.heartbeat_at > NOW - timedelta(minutes=1) for run in running) > 2
    assert sum(run.heartbeat_at < hour_ago for run in running) > 1
    assert {run.waiting_for for run in stored} == {None, "approval by finance"}
    assert {run.attempt for run in stored} == {0, 1, 2, 3}
    assert sum(run.forked_from_step is not None for run in stored) > 1
    assert max(len(one.checkpoints) for one in runs) > 300
    assert len({run.workflow_name for run in stored}) >= 6
    assert all(LABEL.items() <= run.labels.items() for run in stored)
    assert {"tenant", "environment", "user", "document"} <= {
        name for run in stored for name in run.labels
    }
    assert any("api_key" in (run.config_snapshot or {}) for run in stored)
    assert any("authorization" in run.inputs.get("headers", {}) for run in stored)


def test_the_newest_runs_have_all_their_checkpoints(runs):
    for run, _, checkpoints in runs[-WITH_STATES:]:
        assert (run.status != "completed") or checkpoints[0]["step"] == 0


def test_children_run_while_their_parent_does(runs):
    by_id = {one.run.id: one.run for one in runs}
    children = [one.run for one in runs if one.run.parent_id and one.run.forked_from_step is None]

    assert len(children) > 10
    for child in children:
        parent = by_id[child.parent_id]
        assert parent.started_at <= child.started_at
        assert child.completed_at <= parent.completed_at


def test_a_fork_begins_with_the_history_of_its_parent(runs):
    by_id = {one.run.id: one for one in runs}

    for run, _, checkpoints in runs:
        if run.forked_from_step is not None:
            parent = by_id[run.parent_id]
            count = run.forked_from_step + 1
            assert checkpoints[:count] == parent.checkpoints[:count]
            assert parent.run.started_at < run.started_at
            assert len(checkpoints) > count


def test_one_workflow_fails_more_often_in_the_last_days(runs):
    def failed(since, until):
        statuses = Counter(
            one.run.status
            for one in runs
            if one.run.workflow_name == "invoice-extraction"
            and since <= NOW - one.run.started_at < until
        )
        return statuses["failed"] / statuses.total()

    assert failed(timedelta(0), timedelta(days=3)) > 3 * failed(timedelta(days=3), MONTH)


def test_more_runs_begin_on_weekdays_and_by_day(runs):
    started = [one.run.started_at for one in runs]

    weekend = sum(time.weekday() >= 5 for time in started)
    night = sum(time.hour < 7 for time in started)
    assert weekend / 2 < (len(started) - weekend) / 5 / 2
    assert night / 7 < (len(started) - night) / 17 / 2


def test_the_same_seed_gives_the_same_runs():
    one, same = (list(many_runs(100, seed=5, now=NOW)) for _ in range(2))
    other = list(many_runs(100, seed=6, now=NOW))

    assert [described(run) for run in one] == [described(run) for run in same]
    assert not {run.run.id for run in one} & {run.run.id for run in other}


def test_the_same_seed_gives_the_same_ids_at_another_time():
    now, later = (
        [one.run.id for one in many_runs(100, now=moment)]
        for moment in (NOW, NOW + timedelta(days=1.4))
    )

    assert now == later


def test_what_is_stored_is_read_back_and_plausible(small_backend, small_url):
    call_command("demo", "--many=120", "--seed=3", f"--backend={small_url}", verbosity=0)

    now = timezone.now()
    stored = list(small_backend.runs.iter_runs(labels=LABEL))
    assert len(stored) == 120
    # Which of them are cancelled depends on the time.
    assert {run.status for run in stored} >= set(RunStatus.values) - {"cancelled"}
    for run in stored:
        attempts = small_backend.runs.list_attempts(run.id)
        refuse_implausible(run, attempts, small_backend.states.get_state_history(run.id), now)
    assert len(small_backend.runs.list_stalled(timedelta(hours=1))) > 1


def test_runs_are_stored_as_they_were_made_and_deleted_on_every_store(every_backend, every_url):
    made = {one.run.id: one for one in many_runs(40, now=timezone.now())}

    call_command("demo", "--many=40", f"--backend={every_url}")

    stored = list(every_backend.runs.iter_runs())
    assert {run.id: run.inputs for run in stored} == {
        run_id: one.run.inputs for run_id, one in made.items()
    }
    for run in stored:
        steps = [step["node_id"] for step in every_backend.states.iter_steps(run.id)]
        assert steps == [one["node_id"] for one in made[run.id].checkpoints]
        assert len(every_backend.runs.list_attempts(run.id)) == len(made[run.id].attempts)

    call_command("demo", "--delete", f"--backend={every_url}")
    assert every_backend.runs.count_runs() == 0


def described(one):
    return (
        run_fields(one.run),
        one.attempts,
        [(step_of(c), c["state_data"]) for c in one.checkpoints],
    )

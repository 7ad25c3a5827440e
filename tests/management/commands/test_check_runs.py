"""``check_runs``: what is sound is found sound, what is not is named, and repaired where it can be."""

import json
import random
from datetime import timedelta

import pytest
from django.core.management import CommandError, call_command
from django.db import connections
from django.utils import timezone

from tests.management.conftest import run_command
from workflow_storage import fork_run, record_run, resume_run
from workflow_storage.testing import stored_run


def sound_runs(backend):
    """Runs of all kinds: with attempts, forks, labels, states that are deltas, pruned ones."""
    chance = random.Random(7)
    for number in range(6):
        run = stored_run(
            backend,
            workflow_name=f"w{number % 3}",
            labels={"tenant": "acme", "n": str(number)} if number % 2 else {},
        )
        for status in chance.sample(["running", "failed", "running", "pending", "completed"], 3):
            backend.runs.update_status(run.id, status)
            backend.states.save_state(run.id, {"text": "x" * 5000, "n": chance.random()}, "node")
        backend.runs.update(run.id, add_labels={"more": "é\0"[:1]})
    try:
        with record_run("w", backend=backend) as failed:
            failed.save_state({"a": 1}, node_id="first")
            raise ValueError
    except ValueError:
        pass
    with resume_run(failed.run_id, backend=backend) as resumed:
        for number in range(20):
            resumed.save_state({"list": list(range(number * 300))}, node_id="next")
    fork_run(failed.run_id, 3, backend=backend)
    backend.states.delete_states(failed.run_id, keep_last=5)
    return failed.run_id


def problems(url, *arguments, capture):
    """Return what is wrong by run, and whether the command failed."""
    try:
        call_command("check_runs", *arguments, format="jsonl", backend=url, stdout=capture)
        failed = False
    except CommandError:
        failed = True
    records = [json.loads(line) for line in capture.getvalue().splitlines()]
    return [(one["run_id"], one["problem"], one["repaired"]) for one in records], failed


def test_what_is_sound_has_no_problems(every_backend, every_url):
    sound_runs(every_backend)
    text = run_command("check_runs", backend=every_url)
    assert text == "8 runs with 27 states checked: 0 problems.\n"


@pytest.fixture
def out():
    import io

    return io.StringIO()


def test_a_state_that_is_damaged_is_named_and_the_others_are_looked_at(sql_backend, sql_url, out):
    run = stored_run(sql_backend)
    other = stored_run(sql_backend)
    for stored in (run, other):
        for number in range(10):
            sql_backend.states.save_state(
                stored.id, {"text": "x" * 6000, "list": list(range(number))}, "node"
            )
    with connections[sql_backend.alias].cursor() as cursor:
        cursor.execute(
            "UPDATE execution_states SET state_json = '{no json', state_delta = NULL "
            "WHERE run_id = %s AND step = 8",
            [run.id],
        )
        cursor.execute("DELETE FROM execution_states WHERE run_id = %s AND step = 5", [other.id])

    damages, failed = problems(sql_url, capture=out)

    assert failed
    of_run = [problem for run_id, problem, _ in damages if run_id == run.id]
    of_other = [problem for run_id, problem, _ in damages if run_id == other.id]
    assert any("its state of step 8 cannot be rebuilt" in problem for problem in of_run)
    assert not any("contiguous" in problem for problem in of_run)
    assert any("6 comes after 4" in problem for problem in of_other)


def test_times_and_attempts_that_make_no_sense_are_named(sql_backend, sql_url, out):
    run = stored_run(sql_backend, status="completed")
    resumed = stored_run(sql_backend)
    for status in ("running", "failed", "running", "failed", "running"):
        sql_backend.runs.update_status(resumed.id, status)
    with connections[sql_backend.alias].cursor() as cursor:
        cursor.execute(
            "UPDATE workflow_runs SET completed_at = %s, duration_seconds = -1 WHERE id = %s",
            [timezone.now() - timedelta(days=9), run.id],
        )
        cursor.execute(
            "DELETE FROM workflow_run_attempts WHERE run_id = %s AND number = 1", [resumed.id]
        )

    damages, failed = problems(sql_url, capture=out)

    assert failed
    assert sorted(damages) == sorted(
        [
            (run.id, "it ended before it started", False),
            (run.id, "its duration is negative", False),
            (resumed.id, "it is in attempt 3, and has the attempts 2, 3", False),
        ]
    )


def test_labels_are_made_equal_to_their_index(sql_backend, sql_url, out):
    runs = [stored_run(sql_backend, labels={"tenant": "acme"}) for _ in range(3)]
    with connections[sql_backend.alias].cursor() as cursor:
        cursor.execute("DELETE FROM workflow_run_labels WHERE run_id = %s", [runs[0].id])
        cursor.execute(
            "UPDATE workflow_run_labels SET value = 'other' WHERE run_id = %s", [runs[1].id]
        )

    damages, failed = problems(sql_url, capture=out)
    assert failed
    assert {run_id for run_id, _, _ in damages} == {runs[0].id, runs[1].id}
    repaired = run_command("check_runs", "--repair", backend=sql_url)
    assert "2 problems, 2 of them repaired." in repaired
    assert sql_backend.runs.count_runs(labels={"tenant": "acme"}) == 3
    assert "0 problems" in run_command("check_runs", backend=sql_url)


def test_runs_that_cannot_be_read_are_named_and_the_others_are_looked_at(sql_backend, sql_url, out):
    for number in range(50):
        stored_run(sql_backend, id=f"run-{number:02}", status="completed", workflow_name="w")
    unreadable = [f"run-{number:02}" for number in (0, 7, 25, 26, 49)]
    with connections[sql_backend.alias].cursor() as cursor:
        for run_id in unreadable:
            cursor.execute("UPDATE workflow_runs SET inputs = 'not json' WHERE id = %s", [run_id])
        cursor.execute("UPDATE workflow_runs SET duration_seconds = -1 WHERE id = 'run-01'")

    damages, failed = problems(sql_url, "--workflow=w", capture=out)

    assert failed
    assert [run_id for run_id, _, _ in damages] == [
        *reversed(unreadable[1:]),
        "run-01",
        unreadable[0],
    ]
    assert all("it cannot be read: inputs" in one for _, one, _ in [*damages[:4], damages[5]])
    with pytest.raises(CommandError, match="6 problems found"):
        call_command("check_runs", backend=sql_url, stdout=out)
    assert "50 runs with 0 states checked: 6 problems." in out.getvalue()


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("started_at", "garbage", "its started_at cannot be right: None"),
        ("labels", "[1]", "its labels cannot be right: [1]"),
        ("labels", '{"tenant": 1}', "its labels cannot be right: {'tenant': 1}"),
        ("duration_seconds", "x", "its duration_seconds cannot be right: 'x'"),
        ("total_cost_usd", "abc", "its total_cost_usd cannot be right: 'abc'"),
        ("status", "bogus", "its status cannot be right: 'bogus'"),
    ],
)
def test_fields_that_cannot_be_right_are_named(source, sqlite_url, out, field, value, problem):
    runs = [stored_run(source, labels={"tenant": "acme"}, status="completed") for _ in range(3)]
    source.states.save_state(runs[1].id, {"a": 1}, "node")
    with connections[source.alias].cursor() as cursor:
        cursor.execute(f"UPDATE workflow_runs SET {field} = %s WHERE id = %s", [value, runs[1].id])
        cursor.execute("UPDATE workflow_runs SET duration_seconds = -1 WHERE id = %s", [runs[0].id])

    damages, failed = problems(sqlite_url, "--repair", capture=out)

    assert failed
    assert {run_id for run_id, _, _ in damages} == {runs[0].id, runs[1].id}
    (of_run,) = [one for run_id, one, _ in damages if run_id == runs[1].id]
    assert of_run.startswith(problem)


@pytest.mark.parametrize("sql_url", ["postgres"], indirect=True)  # which alone has NaN
def test_a_number_that_is_none_is_named_once(sql_backend, sql_url, out):
    run = stored_run(sql_backend)
    with connections[sql_backend.alias].cursor() as cursor:
        cursor.execute("UPDATE workflow_runs SET total_cost_usd = 'NaN'")
    damages, _ = problems(sql_url, capture=out)
    assert damages == [(run.id, "its total_cost_usd cannot be right: nan", False)]


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("attempt", "x", "cannot be read: invalid literal"),
        ("labels", "[1]", "its labels cannot be right: [1]"),
        ("labels", "{", "cannot be read"),
        ("status", "bogus", "its status cannot be right: 'bogus'"),
        ("started_at", "garbage", "cannot be read"),
    ],
)
def test_fields_in_redis_that_cannot_be_right_are_named(
    redis_backend, redis_url_of, out, field, value, problem
):
    runs = [
        stored_run(redis_backend, workflow_name="w", labels={"tenant": "acme"}) for _ in range(40)
    ]
    damaged = runs[30].id
    for number in (29, 31):
        redis_backend.runs.update_status(runs[number].id, "failed")
    store = redis_backend.runs.store
    set_field = ("HSET", f"{store.key_prefix(damaged)}:run:{damaged}", field, value)

    def damage():
        return (yield [set_field])

    store.execute(damage())

    for arguments in ((), ("--repair",)):
        out.truncate(out.seek(0))
        ((run_id, of_run, repaired),), failed = problems(redis_url_of, *arguments, capture=out)
        assert failed
        assert (run_id, repaired) == (damaged, False)
        assert problem in of_run
    selected = ("--label=tenant=acme", "--workflow=w", "--status=pending")
    out.truncate(out.seek(0))
    damages, failed = problems(redis_url_of, *selected, capture=out)
    assert damages == ([(damaged, of_run, False)] if failed else [])
    assert failed or field == "status"


def test_tables_that_lack_an_index_are_named(source, sqlite_url, out):
    with connections[source.alias].cursor() as cursor:
        cursor.execute("DROP INDEX workflow_runs_parent")
        try:
            damages, failed = problems(sqlite_url, capture=out)
        finally:
            cursor.execute("CREATE INDEX workflow_runs_parent ON workflow_runs (parent_id)")
    assert (damages, failed) == (
        [(None, "the table workflow_runs has no workflow_runs_parent", False)],
        True,
    )


def test_indexes_of_redis_are_completed_and_cleaned(redis_backend, redis_url_of, out):
    kept = stored_run(redis_backend, labels={"tenant": "acme"}, parent_id="p", status="failed")
    lost = stored_run(redis_backend, labels={"tenant": "acme"}, workflow_name="w")
    store = redis_backend.runs.store
    prefix = store.key_prefix(lost.id)
    ghost = f"2026-01-01T00:00:00.000000 {lost.id}"
    for server in store.servers():
        for key in server.scan_iter(match=f"{prefix}:*"):
            if server.type(key) == b"zset":
                entries = [one for one in server.zrange(key, 0, -1) if lost.id.encode() in one]
                if entries:
                    server.zrem(key, *entries)
                    server.zadd(key, {ghost: 0})
    unlabelled = store.key_prefix(kept.id)
    for server in store.servers():
        for key in server.scan_iter(match=f"{unlabelled}:labels"):
            entries = [one for one in server.zrange(key, 0, -1) if kept.id.encode() in one]
            server.zrem(key, *entries)

    damages, failed = problems(redis_url_of, capture=out)

    assert failed
    assert {run_id for run_id, _, _ in damages} == {lost.id, kept.id}
    assert [problem for run_id, problem, _ in damages if run_id == kept.id] == [
        "it lacks entries in the indexes: 1"
    ]
    assert any("it lacks entries in the indexes: 3" in problem for _, problem, _ in damages)
    assert any("does not belong to it" in problem for _, problem, _ in damages)
    assert "of them repaired" in run_command("check_runs", "--repair", backend=redis_url_of)
    assert {run.id for run in redis_backend.runs.iter_runs()} == {kept.id, lost.id}
    assert [run.id for run in redis_backend.runs.iter_runs(workflow_name="w")] == [lost.id]
    assert "0 problems" in run_command("check_runs", backend=redis_url_of)


@pytest.fixture(params=["redis", "redis_cluster"])
def redis_url_of(request):
    return request.getfixturevalue(f"{request.param}_url")


@pytest.fixture
def redis_backend(redis_url_of, django_db_blocker):
    from tests.conftest import emptied

    yield from emptied(redis_url_of, django_db_blocker)


def test_a_check_goes_on_where_another_one_stopped(every_backend, every_url):
    for number in range(10):
        stored_run(every_backend, id=f"run-{number}", labels={"n": str(number)})

    assert run_command("check_runs", limit=4, backend=every_url).startswith("4 runs with")
    rest = run_command("check_runs", before="run-6", backend=every_url)
    assert rest.startswith("6 runs with 0 states checked")
    assert run_command("check_runs", label="n=3", backend=every_url).startswith("1 run with")


def test_an_interrupted_check_says_where_to_go_on(source, sqlite_url, monkeypatch):
    for number in range(5):
        stored_run(source, id=f"run-{number}")
    iter_state_history = type(source.states).iter_state_history

    def interrupted(self, run_id, **kwargs):
        if run_id == "run-2":
            raise KeyboardInterrupt
        return iter_state_history(self, run_id, **kwargs)

    monkeypatch.setattr(type(source.states), "iter_state_history", interrupted)
    with pytest.raises(CommandError, match=r"2 runs with .* Go on with --before run-3\.") as caught:
        call_command("check_runs", backend=sqlite_url)
    assert caught.value.returncode == 130

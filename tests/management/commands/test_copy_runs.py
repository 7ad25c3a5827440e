"""``copy_runs``: runs into another store, or moved there."""

import json
from datetime import timedelta

import pytest
from django.core.management import CommandError, call_command
from django.db import connections
from django.utils import timezone

from tests.management.conftest import run_command, run_transfer
from workflow_storage.testing import stored_run


def test_copy_runs_says_what_it_did(source, target, sqlite_url, redis_url):
    for number in range(3):
        run = stored_run(source, status="failed" if number else "running")
        source.states.save_state(run.id, {}, "node")
    arguments = ("copy_runs", "--from", sqlite_url, "--to", redis_url)

    out, err, error = run_transfer(*arguments)
    assert (err, error) == ("", None)
    assert out == (
        "3 runs: 3 copied, 0 updated, 0 unchanged, 0 refused; 3 states; 0 deleted from the source.\n"
    )
    out, _, _ = run_transfer(*arguments, "--move")
    assert "0 copied, 0 updated, 3 unchanged, 0 refused; 0 states; 2 deleted from" in out
    assert (source.runs.count_runs(), target.runs.count_runs()) == (1, 3)


def test_copy_runs_takes_filters(source, target, sqlite_url, redis_url):
    now = timezone.now()
    for number, (name, status) in enumerate([("a", "failed"), ("a", "completed"), ("b", "failed")]):
        for days in (0, 10):
            stored_run(
                source,
                id=f"{number}-{days}",
                workflow_name=name,
                status=status,
                started_at=now - timedelta(days=days),
            )
    before = (now - timedelta(days=5)).date().isoformat()

    run_transfer(
        "copy_runs",
        "--from",
        sqlite_url,
        "--to",
        redis_url,
        "--workflow=a",
        "--status=failed",
        "--status=cancelled",
        f"--until={before}",
    )

    assert [run.id for run in target.runs.iter_runs()] == ["0-10"]


def test_so_many_runs_are_copied_of_those_after_another_one(any_backend, any_url, tmp_path):
    now = timezone.now()
    for number in range(60):
        start = now - timedelta(seconds=number // 2)
        stored_run(any_backend, id=f"{number:02}", status="failed", started_at=start)
    listed = [run.id for run in any_backend.runs.list_runs()]
    url = f"sqlite:///{tmp_path}/target.db"
    arguments = ("copy_runs", "--from", any_url, "--to", url, "--before", listed[2])

    out, _, error = run_transfer(*arguments, "--limit=45", "--move")

    assert (out.partition(",")[0], error) == ("45 runs: 45 copied", None)
    text = run_command("list_runs", backend=url, limit=100, format="jsonl")
    assert [json.loads(line)["id"] for line in text.splitlines()] == listed[3:48]
    assert [run.id for run in any_backend.runs.iter_runs()] == [*listed[:3], *listed[48:]]


def test_programs_get_a_record_of_each_run(source, target, sqlite_url, redis_url):
    run = stored_run(source, id="b", status="failed", started_at=timezone.now())
    source.states.save_state(run.id, {}, "node")
    stored_run(source, id="a", workflow_name="one")
    stored_run(target, id="a", workflow_name="two")
    arguments = ("copy_runs", "--from", sqlite_url, "--to", redis_url)

    out, err, error = run_transfer(*arguments, "--move", "--format=jsonl")

    refused, moved = sorted(map(json.loads, out.splitlines()), key=lambda one: one["run_id"])
    assert list(moved) == ["run_id", "outcome", "states", "deleted", "reason", "line"]
    assert list(moved.values()) == ["b", "copied", 1, True, None, None]
    assert (refused["run_id"], refused["outcome"]) == ("a", "refused")
    assert refused["reason"] in err
    assert error == "1 of them did not go well; see above."
    out, _, _ = run_transfer(*arguments, "--format=csv")
    assert out.splitlines()[0] == "run_id,outcome,states,deleted,reason,line"
    assert run_transfer(*arguments, "--format=json", "--workflow=none")[0] == "[]\n"


def test_a_run_that_cannot_be_read_is_refused_and_the_others_are_copied(
    sql_backend, sql_url, target, redis_url, tmp_path
):
    for number in range(30):
        stored_run(sql_backend, id=f"{number:02}", status="failed")
    with connections[sql_backend.alias].cursor() as cursor:
        cursor.execute("UPDATE workflow_runs SET inputs = '{no json' WHERE id = '17'")

    for command in (
        ("copy_runs", "--from", sql_url, "--to", redis_url),
        ("export_runs", str(tmp_path / "runs.jsonl"), "--backend", sql_url),
    ):
        out, err, error = run_transfer(*command)
        assert out.startswith("30 runs: 29 ")
        assert err.startswith("17: it cannot be read: inputs")
        assert error == "1 of them did not go well; see above."
    assert target.runs.count_runs() == 29
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 29


def test_a_store_is_not_moved_to_itself(source, sqlite_url):
    stored_run(source, status="completed")
    _, _, error = run_transfer("copy_runs", "--from", sqlite_url, "--to", sqlite_url, "--move")
    assert "are the same store" in error
    assert source.runs.count_runs() == 1


def test_a_target_that_refuses_everything_says_so_once(source, sqlite_url, redis_url):
    for _ in range(3):
        stored_run(source)
    url = redis_url.replace("/0?", "/9999?")
    _, err, error = run_transfer("copy_runs", "--from", sqlite_url, "--to", url)
    assert err == ""
    assert "DB index is out of range" in error


def test_a_database_that_cannot_be_opened_is_named_by_its_path(source, sqlite_url, tmp_path):
    _, _, error = run_transfer(
        "copy_runs", "--from", sqlite_url, "--to", f"sqlite:///{tmp_path}/gone/x.db"
    )
    assert f"'{tmp_path}/gone/x.db' is unavailable" in error


def test_a_target_is_kept_up_to_date(source, target, sqlite_url, redis_url, monkeypatch):
    from workflow_storage.management.commands import copy_runs

    stored_run(source, id="one", status="running")
    rounds = []

    def between_rounds(_pause):
        rounds.append({run.id: str(run.status) for run in target.runs.iter_runs()})
        if len(rounds) == 1:
            source.runs.update_status("one", "completed")
            stored_run(source, id="two")
        elif len(rounds) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(copy_runs.time, "sleep", between_rounds)
    out, err, error = run_transfer(
        "copy_runs", "--from", sqlite_url, "--to", redis_url, "--watch=1"
    )

    assert rounds[0] == {"one": "running"}
    assert rounds[1] == rounds[2] == {"one": "completed", "two": "pending"}
    assert (len(out.splitlines()), err) == (2, "")
    assert error.startswith("Interrupted after")


def test_labels_of_runs_that_had_ended_come_with_a_full_pass(
    source, target, sqlite_url, redis_url, monkeypatch
):
    from workflow_storage.management.commands import copy_runs

    stored_run(source, id="old", status="failed", started_at=timezone.now() - timedelta(days=2))
    clock, rounds = [1000.0], []

    def between_rounds(pause):
        rounds.append(target.runs.get("old").labels)
        clock[0] += pause
        if len(rounds) == 1:
            source.runs.update("old", add_labels={"ticket": "4711"})
        elif len(rounds) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(copy_runs.time, "sleep", between_rounds)
    monkeypatch.setattr(copy_runs.time, "monotonic", lambda: clock[0])
    run_transfer(
        *("copy_runs", "--from", sqlite_url, "--to", redis_url),
        *("--watch=60", "--full-every=3m", "--overwrite"),
    )

    assert rounds == [{}, {}, {}, {"ticket": "4711"}, {"ticket": "4711"}]


def test_programs_that_watch_get_what_was_done_and_complaints_once(
    source, target, sqlite_url, redis_url, monkeypatch
):
    from workflow_storage.management.commands import copy_runs

    stored_run(source, id="same", workflow_name="one")
    stored_run(target, id="same", workflow_name="two")
    stored_run(source, id="open", status="running")
    stored_run(source, id="ended", status="failed")
    rounds = []

    def between_rounds(_pause):
        rounds.append(1)
        if len(rounds) == 2:
            source.runs.update_status("open", "completed")
        elif len(rounds) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(copy_runs.time, "sleep", between_rounds)
    arguments = ("copy_runs", "--from", sqlite_url, "--to", redis_url, "--watch=1")
    out, err, error = run_transfer(*arguments, "--format=jsonl")

    records = [json.loads(line) for line in out.splitlines()]
    done = [(one["run_id"], one["outcome"]) for one in records]
    assert sorted(done[:3]) == [("ended", "copied"), ("open", "copied"), ("same", "refused")]
    assert done[3:] == [("open", "updated")]
    assert len(err.splitlines()) == 1
    assert error.startswith("Interrupted after 3 runs.")
    for options in (["--format=json"], ["--limit=1"], ["--before=open"]):
        with pytest.raises(CommandError) as caught:
            call_command(*arguments, *options)
        assert caught.value.returncode == 2


def test_what_ages_while_it_is_watched_is_moved(source, target, sqlite_url, redis_url, monkeypatch):
    from workflow_storage.management.commands import copy_runs

    stored_run(source, id="old", status="completed", started_at=timezone.now() - timedelta(days=8))
    young = timezone.now() - timedelta(days=7) + timedelta(seconds=5)
    stored_run(source, id="young", status="completed", started_at=young)
    pause, rounds = copy_runs.time.sleep, []

    def between_rounds(_pause):
        rounds.append({run.id for run in target.runs.iter_runs()})
        if len(rounds) == 2:
            raise KeyboardInterrupt
        pause((young + timedelta(days=7) - timezone.now()).total_seconds() + 0.1)

    monkeypatch.setattr(copy_runs.time, "sleep", between_rounds)
    run_transfer(
        *("copy_runs", "--from", sqlite_url, "--to", redis_url),
        *("--until=7d", "--move", "--watch=1"),
    )

    assert rounds == [{"old"}, {"old", "young"}]
    assert source.runs.count_runs() == 0

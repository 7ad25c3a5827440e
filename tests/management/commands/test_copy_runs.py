"""``copy_runs``: runs into another store, or moved there."""

from datetime import timedelta

from django.utils import timezone

from tests.management.conftest import run_transfer
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

"""The commands that transfer runs: arguments, summaries, progress, and how they fail."""

import io
import json
import os
import pty
import subprocess
import sys
from argparse import ArgumentTypeError
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from django.core.management import CommandError, call_command
from django.utils import timezone

from tests.conftest import emptied
from workflow_storage.management.arguments import moment
from workflow_storage.testing import stored_run

ROOT = Path(__file__).parents[2]


@pytest.fixture
def source(sqlite_url, django_db_blocker):
    yield from emptied(sqlite_url, django_db_blocker)


@pytest.fixture
def target(redis_url, django_db_blocker):
    yield from emptied(redis_url, django_db_blocker)


def run_command(*args):
    out, err = io.StringIO(), io.StringIO()
    try:
        call_command(*args, stdout=out, stderr=err)
    except CommandError as exc:
        return out.getvalue(), err.getvalue(), str(exc)
    return out.getvalue(), err.getvalue(), None


def test_copy_runs_says_what_it_did(source, target, sqlite_url, redis_url):
    for number in range(3):
        run = stored_run(source, status="failed" if number else "running")
        source.states.save_state(run.id, {}, "node")
    arguments = ("copy_runs", "--from", sqlite_url, "--to", redis_url)

    out, err, error = run_command(*arguments)
    assert (err, error) == ("", None)
    assert out == (
        "3 runs: 3 copied, 0 updated, 0 unchanged, 0 refused; 3 states; 0 deleted from the source.\n"
    )
    out, _, _ = run_command(*arguments, "--move")
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

    run_command(
        "copy_runs",
        "--from",
        sqlite_url,
        "--to",
        redis_url,
        "--workflow=a",
        "--status=failed",
        "--status=cancelled",
        f"--started-before={before}",
    )

    assert [run.id for run in target.runs.iter_runs()] == ["0-10"]


def test_what_is_refused_is_named_and_the_command_fails(source, target, sqlite_url, redis_url):
    stored_run(source, id="same", workflow_name="one")
    stored_run(target, id="same", workflow_name="two \x1b[31m")
    stored_run(source, id="other")

    out, err, error = run_command("copy_runs", "--from", sqlite_url, "--to", redis_url)

    assert "1 copied, 0 updated, 0 unchanged, 1 refused" in out
    assert "same: The target has another run with this id" in err
    assert "\x1b" not in err
    assert error == "1 of them did not go well; see above."


def test_export_and_import_go_through_a_file(source, target, sqlite_url, redis_url, tmp_path):
    run = stored_run(source, inputs={"a": 1})
    source.states.save_state(run.id, {"b": 2}, "node")
    path = tmp_path / "runs.jsonl.gz"

    out, _, error = run_command("export_runs", str(path), "--backend", sqlite_url)
    assert (out.partition(";")[0], error) == (
        "1 run: 1 written, 0 updated, 0 unchanged, 0 refused",
        None,
    )
    out, _, error = run_command("import_runs", str(path), "--backend", redis_url)
    assert (out.partition(",")[0], error) == ("1 run: 1 imported", None)

    assert target.runs.get(run.id).inputs == {"a": 1}
    assert target.states.get_latest_state(run.id) == {"b": 2}


def test_a_store_is_not_moved_to_itself(source, sqlite_url):
    stored_run(source, status="completed")
    _, _, error = run_command("copy_runs", "--from", sqlite_url, "--to", sqlite_url, "--move")
    assert "are the same store" in error
    assert source.runs.count_runs() == 1


def test_damaged_lines_are_named_and_the_command_fails(target, redis_url, tmp_path):
    (tmp_path / "runs.jsonl").write_text("\n{}\nno JSON\n")

    _, err, error = run_command("import_runs", f"{tmp_path}/runs.jsonl", "--backend", redis_url)

    assert "Line 2: it is no run" in err
    assert "Line 3: it is no JSON" in err
    assert error == "2 of them did not go well; see above."


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("copy_runs", "--from", "sqlite:///gone.db", "--to", "sqlite"), "There is no file"),
        (("copy_runs", "--from", "mongodb://x", "--to", "sqlite"), "Unsupported storage backend"),
        (("copy_runs", "--from", "default"), "--to"),
        (("copy_runs", "--from", "default", "--to", "redis://127.0.0.1:1"), "is unavailable"),
        (
            ("copy_runs", "--from", "default", "--to", "default", "--move"),
            "inside a transaction",
        ),
        (("export_runs", "/gone/runs.jsonl"), "No such file or directory"),
        (("import_runs", "gone.jsonl"), "No such file or directory"),
        (("export_runs", "x", "--started-before", "soon"), "is no time"),
        (("export_runs", "x", "--started-before", "2026-02-31"), "is no time"),
    ],
)
def test_what_the_user_can_mend_is_a_command_error(arguments, message, db, tmp_path, monkeypatch):
    from workflow_storage import create_storage_backend

    monkeypatch.chdir(tmp_path)
    stored_run(create_storage_backend())
    with pytest.raises(CommandError, match=message):
        call_command(*arguments)
    assert list(tmp_path.iterdir()) == []


def test_times_are_read_in_the_projects_time_zone(settings):
    settings.TIME_ZONE = "America/New_York"
    assert moment("2026-01-31") == datetime(2026, 1, 31, 5, tzinfo=UTC)
    assert moment("2026-01-31T12:00+00:00") == datetime(2026, 1, 31, 12, tzinfo=UTC)
    settings.USE_TZ = False
    assert moment("2026-01-31T12:00") == datetime(2026, 1, 31, 12)
    with pytest.raises(ArgumentTypeError, match="is no time"):
        moment("0001-01-01T00:00+14:00")


def test_a_terminal_sees_a_bar_and_a_pipe_plain_lines(source, tmp_path, sqlite_url):
    for _ in range(30):
        stored_run(source)
    command = [sys.executable, "manage.py", "export_runs", str(tmp_path / "x"), "--backend"]
    terminal, terminals_end = pty.openpty()

    process = subprocess.Popen(
        [*command, sqlite_url], cwd=ROOT, stdout=subprocess.PIPE, stderr=terminals_end
    )
    out, _ = process.communicate(timeout=60)
    os.close(terminals_end)
    shown = os.read(terminal, 100_000).decode()
    os.close(terminal)
    piped = subprocess.run([*command, sqlite_url], cwd=ROOT, capture_output=True, check=True)

    assert b"30 runs: 30 written" in out
    assert "30/30" in shown
    assert b"30 runs: 30 written" in piped.stdout
    assert (piped.stderr, b"\x1b" in piped.stdout) == (b"", False)


def test_runs_can_be_exported_to_standard_output(source, tmp_path, sqlite_url):
    run = stored_run(source)
    command = [sys.executable, "manage.py", "export_runs", "/dev/stdout", "--backend", sqlite_url]

    piped = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    with (tmp_path / "all").open("wb") as file:
        file.write(b"what was there\n")
        file.flush()
        subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.DEVNULL, check=True)

    assert json.loads(piped.stdout)["run"]["id"] == run.id
    assert piped.stderr.startswith(b"1 run: 1 written")
    first, line = (tmp_path / "all").read_bytes().splitlines()
    assert (first, line) == (b"what was there", piped.stdout.strip())


def test_a_target_that_refuses_everything_says_so_once(source, sqlite_url, redis_url):
    for _ in range(3):
        stored_run(source)
    url = redis_url.replace("/0?", "/9999?")
    _, err, error = run_command("copy_runs", "--from", sqlite_url, "--to", url)
    assert err == ""
    assert "DB index is out of range" in error


def test_a_database_that_cannot_be_opened_is_named_by_its_path(source, sqlite_url, tmp_path):
    _, _, error = run_command(
        "copy_runs", "--from", sqlite_url, "--to", f"sqlite:///{tmp_path}/gone/x.db"
    )
    assert f"'{tmp_path}/gone/x.db' is unavailable" in error


def test_what_is_interrupted_says_how_to_go_on(source, sqlite_url, redis_url, target, monkeypatch):
    for _ in range(3):
        stored_run(source)
    put, seen = type(target.runs).put, []

    def interrupted(*args, **kwargs):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(args)
        return put(*args, **kwargs)

    monkeypatch.setattr(type(target.runs), "put", interrupted)
    with pytest.raises(CommandError, match=r"Interrupted after 2 runs\. Run the same") as caught:
        call_command("copy_runs", source=sqlite_url, target=redis_url)
    assert caught.value.returncode == 130
    assert target.runs.count_runs() == 2


def test_without_verbosity_only_failures_are_shown(source, target, sqlite_url, redis_url):
    stored_run(source, id="same", workflow_name="one")
    arguments = ("copy_runs", "--from", sqlite_url, "--to", redis_url, "--verbosity=0")
    assert run_command(*arguments) == ("", "", None)
    source.runs.delete("same")
    stored_run(source, id="same", workflow_name="two")
    out, err, _ = run_command(*arguments)
    assert out == ""
    assert "another run with this id" in err

"""What is said while runs are transferred, and in the end."""

import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest
from django.core.management import CommandError, call_command

from tests.management.conftest import run_transfer
from tests.management.terminals import Terminal
from workflow_storage.testing import stored_run

ROOT = Path(__file__).parents[2]


def test_what_is_refused_is_named_and_the_command_fails(source, target, sqlite_url, redis_url):
    stored_run(source, id="same", workflow_name="one")
    stored_run(target, id="same", workflow_name="two \x1b[31m")
    stored_run(source, id="other")

    out, err, error = run_transfer("copy_runs", "--from", sqlite_url, "--to", redis_url)

    assert "1 copied, 0 updated, 0 unchanged, 1 refused" in out
    assert "same: The target has another run with this id" in err
    assert "\x1b" not in err
    assert error == "1 of them did not go well; see above."


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


def test_a_watch_says_how_many_runs_it_wrote(source, target, sqlite_url, redis_url):
    stored_run(source, status="running")
    arguments = ("--from", sqlite_url, "--to", redis_url, "--watch=0.1")
    terminal = Terminal("copy_runs", *arguments, columns=200)
    terminal.wait_for("1 copied")
    time.sleep(0.5)  # in which it looks at the run again
    terminal.press_ctrl_c()

    assert terminal.end() == 130
    assert "Interrupted after 1 run." in " ".join(terminal.lines)


def test_without_verbosity_only_failures_are_shown(source, target, sqlite_url, redis_url):
    stored_run(source, id="same", workflow_name="one")
    arguments = ("copy_runs", "--from", sqlite_url, "--to", redis_url, "--verbosity=0")
    assert run_transfer(*arguments) == ("", "", None)
    source.runs.delete("same")
    stored_run(source, id="same", workflow_name="two")
    out, err, _ = run_transfer(*arguments)
    assert out == ""
    assert "another run with this id" in err

"""``record_command``: a management command as a run, whose exit code is passed on."""

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from django.core.management import CommandError, call_command

from workflow_storage.testing import stored_run

ROOT = Path(__file__).parents[3]
RECORD = (sys.executable, "manage.py", "record_command", "nightly", "--backend")


def record(url, *arguments, **options):
    out, err = io.StringIO(), io.StringIO()
    try:
        call_command(
            "record_command", "nightly", *arguments, backend=url, stdout=out, stderr=err, **options
        )
    except CommandError as exc:
        return exc.returncode, out.getvalue(), err.getvalue(), str(exc)
    return 0, out.getvalue(), err.getvalue(), ""


def test_a_command_that_succeeds_is_a_completed_run(source, sqlite_url):
    stored_run(source, workflow_name="ünlisted")

    code, out, _, _ = record(
        sqlite_url,
        "--label",
        "host=a",
        "--",
        "list_runs",
        "--backend",
        sqlite_url,
        "--workflow=ünlisted",
    )

    (run,) = source.runs.list_runs(workflow_name="nightly")
    assert code == 0
    assert "ünlisted" in out
    assert (run.status, run.labels) == ("completed", {"host": "a"})
    assert run.inputs == {"command": ["list_runs", "--backend", sqlite_url, "--workflow=ünlisted"]}
    assert run.outputs == {
        "exit_code": 0,
        "signal": None,
        "output": out,
        "output_characters": len(out),
    }
    assert run.duration_seconds > 0


@pytest.mark.slow
def test_a_command_that_fails_is_a_failed_run_with_its_output(source, sqlite_url):
    code, out, err, error = record(sqlite_url, "--", "show_run", "gone", "--backend", sqlite_url)

    (run,) = source.runs.list_runs(workflow_name="nightly")
    assert (code, out) == (1, "")
    assert "Workflow run not found: gone" in err
    assert error == f"show_run: exit code 1 (recorded as {run.id})."
    assert run.status == "failed"
    assert run.outputs["exit_code"] == 1
    assert run.error_message.startswith("exit code 1\n\nCommandError: Workflow run not found: gone")
    assert "Traceback" not in run.error_message


def test_everything_behind_the_first_dashes_is_the_commands_own(source, sqlite_url):
    shown = stored_run(source)
    command = ["show_run", "--backend", sqlite_url, "--", shown.id]

    code, _, err, _ = record(sqlite_url, "--", *command)

    (run,) = source.runs.iter_runs(workflow_name="nightly")
    assert (code, err) == (0, "")
    assert run.inputs == {"command": command}


@pytest.mark.slow
def test_a_command_that_records_another_one_is_recorded(source, sqlite_url):
    inner = ["record_command", "--backend", sqlite_url, "inner", "--", "check", "--tag", "models"]
    outer = ["record_command", "--backend", sqlite_url, "nightly", "--", *inner]

    done = subprocess.run([sys.executable, "manage.py", *outer], cwd=ROOT, check=False)

    assert done.returncode == 0
    commands = {run.workflow_name: run.inputs["command"] for run in source.runs.iter_runs()}
    assert commands == {"nightly": inner, "inner": ["check", "--tag", "models"]}
    nothing = subprocess.run([*RECORD, sqlite_url, "--"], cwd=ROOT, check=False)
    assert nothing.returncode == 2


def test_a_store_that_does_not_answer_is_said_and_nothing_is_run(tmp_path):
    code, out, _, error = record(f"sqlite:///{tmp_path}/gone/x.db", "list_runs")
    assert (code, out) == (1, "")
    assert "is unavailable" in error


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "status"),
    [(signal.SIGTERM, 143, "cancelled"), (signal.SIGINT, 130, "cancelled")],
    ids=str,
)
def test_a_signal_reaches_the_command_and_is_recorded(source, sqlite_url, number, code, status):
    arguments = ["list_runs", "--backend", sqlite_url, "--watch=0.2"]
    process = subprocess.Popen(
        [*RECORD, sqlite_url, "--", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline().startswith("ID")
    time.sleep(0.3)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)

    (run,) = source.runs.list_runs(workflow_name="nightly")
    assert process.returncode == code
    assert "Traceback" not in err
    assert run.status == status
    assert run.outputs["signal"] == number.name
    assert run.outputs["exit_code"] == code


@pytest.mark.slow
def test_only_the_last_of_a_long_output_is_kept(source, sqlite_url):
    for _ in range(200):
        stored_run(source, workflow_name="w" * 200)

    code, out, _, _ = record(
        sqlite_url, "--", "list_runs", "--backend", sqlite_url, "--limit=200", "--format=json"
    )

    (run,) = source.runs.list_runs(workflow_name="nightly")
    assert code == 0
    assert run.outputs["output_characters"] == len(out) > 100_000
    assert run.outputs["output"] == out[-10_000:]


@pytest.mark.slow
def test_the_command_goes_on_if_nobody_reads_it(source, sqlite_url):
    for _ in range(200):
        stored_run(source, workflow_name="w" * 200)
    read, write = os.pipe()
    os.close(read)
    process = subprocess.run(
        [*RECORD, sqlite_url, "--", "list_runs", "--backend", sqlite_url, "--format=json"],
        cwd=ROOT,
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(write)
    (run,) = source.runs.list_runs(workflow_name="nightly")
    assert (process.returncode, process.stderr) == (0, "")
    assert (run.status, run.outputs["exit_code"]) == ("completed", 0)


@pytest.mark.slow
def test_it_works_in_a_process_that_was_begun_by_the_module_of_django(sqlite_url):
    command = ["record_command", "x", "--backend", sqlite_url, "--", "check", "--tag", "models"]
    done = subprocess.run(
        [sys.executable, "-m", "django", *command],
        env={**os.environ, "DJANGO_SETTINGS_MODULE": "testproject.settings"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "no issues" in done.stdout

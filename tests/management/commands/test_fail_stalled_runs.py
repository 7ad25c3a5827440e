"""``fail_stalled_runs``: what it sets to failed, and what it leaves alone."""

import io
import json
from datetime import timedelta

import pytest
from django.core.management import CommandError, call_command
from django.db import connections
from django.utils import timezone

from tests.management.conftest import run_transfer
from tests.recorder.conftest import only_run
from workflow_storage.testing import stored_run


@pytest.fixture
def backend(any_backend):
    return any_backend


class TestFailStalledRuns:
    def test_a_dry_run_changes_nothing(self, backend, any_url):
        old = timezone.now() - timedelta(hours=1)
        run = stored_run(backend, status="running", started_at=old)
        out = io.StringIO()

        call_command("fail_stalled_runs", "--dry-run", "--idle=15m", backend=any_url, stdout=out)

        assert run.id in out.getvalue()
        assert "1 run would be set to failed." in out.getvalue()
        assert only_run(backend).status == "running"

    def test_living_runs_are_left_alone(self, backend, any_url):
        stored_run(backend, status="running")
        out = io.StringIO()
        call_command("fail_stalled_runs", "--idle=1d", backend=any_url, stdout=out)
        assert out.getvalue() == "0 runs set to failed.\n"

    def test_without_verbosity_it_says_nothing_unless_it_fails_a_run(self, backend, any_url):
        out = io.StringIO()
        arguments = {"idle": "15m", "verbosity": 0, "backend": any_url, "stdout": out}
        call_command("fail_stalled_runs", **arguments)
        assert out.getvalue() == ""
        old = timezone.now() - timedelta(hours=1)
        run = stored_run(backend, status="running", started_at=old)

        call_command("fail_stalled_runs", **arguments)

        assert run.id in out.getvalue()
        assert "set to failed." not in out.getvalue()

    def test_of_many_those_are_failed_that_are_selected(self, backend, any_url):
        old = timezone.now() - timedelta(hours=1)
        for number in range(50):
            stored_run(
                backend,
                id=f"{number:02}",
                status="running",
                workflow_name="odd" if number % 2 else "even",
                started_at=old - timedelta(minutes=number),
            )

        def failed(*arguments):
            out = io.StringIO()
            call_command(
                *("fail_stalled_runs", "--idle=15m", "--format=jsonl", *arguments),
                backend=any_url,
                stdout=out,
            )
            records = [json.loads(line) for line in out.getvalue().splitlines()]
            return [record["id"] for record in records]

        some = [f"{number:02}" for number in range(12, 36)]
        assert failed("--before=11", "--limit=24", "--dry-run") == some
        assert failed("--before=11", "--limit=24", "--workflow=odd", "--dry-run")[-1] == "49"
        assert failed("--before=11", "--limit=24") == some
        assert backend.runs.count_runs(status="failed") == 24
        assert len(failed()) == 26

    @pytest.mark.parametrize("idle", ["15", "m", "-1m", "1w", "1e3s", "9" * 30 + "d"])
    def test_a_time_that_is_none_is_a_command_error(self, idle):
        with pytest.raises(Exception, match=r"is no time|is too long|expected one argument"):
            call_command("fail_stalled_runs", f"--idle={idle}")

    @pytest.mark.parametrize(
        "idle", [timedelta(minutes=15), timedelta(days=1, seconds=5), "15m", "0:15:00"], ids=str
    )
    def test_call_command_takes_python_values(self, backend, any_url, idle):
        old = timezone.now() - timedelta(days=2)
        run = stored_run(backend, status="running", started_at=old)

        call_command("fail_stalled_runs", idle=idle, backend=any_url, stdout=io.StringIO())

        assert backend.runs.get(run.id).status == "failed"

    @pytest.mark.parametrize("idle", ["soon", 15, timedelta(seconds=-1)], ids=str)
    def test_call_command_refuses_what_is_no_time(self, backend, any_url, idle):
        with pytest.raises(CommandError, match=r"is no time|is negative"):
            call_command("fail_stalled_runs", idle=idle, backend=any_url)


def test_a_run_that_cannot_be_read_is_failed_with_the_others_and_named(sql_backend, sql_url):
    old = timezone.now() - timedelta(hours=1)
    for number in range(30):
        stored_run(sql_backend, id=f"{number:02}", status="running", started_at=old)
    stored_run(sql_backend, id="alive", status="running")
    stored_run(sql_backend, id="other", status="pending", started_at=old)
    with connections[sql_backend.alias].cursor() as cursor:
        cursor.execute("UPDATE workflow_runs SET inputs = '{no json' WHERE id = '07'")
    arguments = ("fail_stalled_runs", "--idle=15m", "--backend", sql_url)

    out, _, error = run_transfer(*arguments, "--dry-run")
    assert (out, "inputs cannot be read" in error) == ("", True)
    assert run_transfer(*arguments, "--limit=2", "--format=csv")[0].count("\n") == 3
    out, err, error = run_transfer(*arguments)

    assert out.endswith("28 runs set to failed.\n")
    assert "damaged: inputs cannot be read" in out
    assert error.startswith("Workflow run 07 is damaged: inputs cannot be read")
    assert err == ""
    with connections[sql_backend.alias].cursor() as cursor:
        cursor.execute("SELECT status, COUNT(*) FROM workflow_runs GROUP BY status")
        assert dict(cursor.fetchall()) == {"failed": 30, "running": 1, "pending": 1}


def test_nothing_is_failed_for_a_selection_that_cannot_be_meant(any_backend, any_url):
    old = timezone.now() - timedelta(hours=1)
    stored_run(any_backend, id="old", status="running", started_at=old)
    for options in ({"status": "done"}, {"idle": timedelta(seconds=-1)}, {"workflow": 5}):
        with pytest.raises(CommandError):
            call_command("fail_stalled_runs", **{"idle": "15m", "backend": any_url, **options})
    assert any_backend.runs.get("old").status == "running"

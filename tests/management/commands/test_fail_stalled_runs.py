"""``fail_stalled_runs``: what it sets to failed, and what it leaves alone."""

import io
import json
from datetime import timedelta

import pytest
from django.core.management import CommandError, call_command
from django.utils import timezone

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

"""``list_runs``: a line for each run, filters and pages."""

import json

from tests.management.conftest import run_command
from workflow_storage.testing import stored_run


def test_list_runs_prints_a_line_for_each_run(every_backend, every_url):
    runs = [
        stored_run(
            every_backend,
            workflow_name="invoices [red]not markup[/]",
            status="completed",
            duration_seconds=1.5,
            total_tokens=12,
            total_cost_usd=0.25,
        ),
        stored_run(every_backend, id="x" * 36, workflow_name="\x1b[31mred"),
    ]

    text = run_command("list_runs", backend=every_url)

    assert len(text.splitlines()) == 3
    for shown in (*(run.id for run in runs), "not markup[/]", "completed", "1.500", "0.2500"):
        assert shown in text
    assert "\x1b" not in text


def test_list_runs_filters_and_pages(every_backend, every_url):
    for number in range(5):
        stored_run(every_backend, id=str(number), workflow_name="a" if number % 2 else "b")
    stored_run(every_backend, id="failed", status="failed")

    def listed(*args):
        text = run_command("list_runs", *args, backend=every_url, format="json")
        return [run["id"] for run in json.loads(text)]

    assert listed() == ["failed", "4", "3", "2", "1", "0"]
    assert listed("--workflow", "a") == ["3", "1"]
    assert listed("--status", "failed", "--status", "running") == ["failed"]
    assert listed("--limit", "2") == ["failed", "4"]
    assert listed("--limit", "2", "--before", "4") == ["3", "2"]


def test_list_runs_without_runs_says_so(every_backend, every_url):
    assert run_command("list_runs", backend=every_url) == "No runs.\n"
    assert run_command("list_runs", backend=every_url, format="json") == "[]\n"

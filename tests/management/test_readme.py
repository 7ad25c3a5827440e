"""The README of the commands shows what they print.

``UPDATE_README=1 pytest -m slow tests/management/test_readme.py -n 0`` writes it anew.
"""

import io
import os
import re
import shlex
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from django.core.management import CommandError, call_command
from django.utils import timezone

from workflow_storage import WorkflowRun, create_storage_backend
from workflow_storage.config import registered_aliases
from workflow_storage.factory import forget
from workflow_storage.testing import stored_run

README = Path(__file__).parents[2] / "workflow_storage" / "management" / "README.md"
BLOCK = re.compile(r"<!-- output -->\n```console\n(.*?)```", re.DOTALL)
NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)
KNOWN = "019c13aa"


def store_runs(backend):
    """Runs of two days: some went well, one failed, one runs, one waits."""

    def put(number, hours, **fields):
        start = NOON - timedelta(hours=hours)
        seconds = fields.get("duration_seconds")
        ended = None if seconds is None else start + timedelta(seconds=seconds)
        run = WorkflowRun(
            id=f"{KNOWN}-{number:04}-7000-8000-000000000000",
            started_at=start,
            attempt=1,
            attempt_started_at=fields.pop("attempt_started_at", start),
            completed_at=ended,
            worker="web-1:4711",
            **fields,
        )
        backend.runs.put(run)
        return run.id, start

    def save(run_id, start, *steps):
        created = [
            {
                "step": step,
                "node_id": node,
                "state_data": state,
                "created_at": start + timedelta(seconds=4 * step + 4),
                "attempt": 1,
                "duration_seconds": 3.9,
                "tokens": 1200 * step or None,
                "cost_usd": 0.0031 * step or None,
            }
            for step, (node, state) in enumerate(steps)
        ]
        backend.states.append(run_id, created)

    read = {"pages": 3, "text": "Invoice 7\nTotal 42.00"}
    save(
        *put(
            1,
            26,
            workflow_name="invoice-extraction",
            status="completed",
            inputs={"file": "a.pdf"},
            outputs={"total": 42},
            duration_seconds=12.5,
            total_tokens=1200,
            total_cost_usd=0.0031,
            labels={"tenant": "acme"},
        ),
        ("ocr", read),
        ("extract", {**read, "total": 42}),
    )
    save(
        *put(
            2,
            2,
            workflow_name="invoice-extraction",
            status="failed",
            inputs={"file": "b.pdf"},
            error_message="ValueError: no total in the document",
            current_node="validate",
            duration_seconds=11.2,
            total_tokens=1200,
            total_cost_usd=0.0031,
            labels={"tenant": "globex"},
        ),
        ("ocr", {"pages": 1, "text": "Reminder"}),
        ("extract", {"pages": 1, "text": "Reminder", "total": None}),
    )
    put(3, 30, workflow_name="support-agent", status="completed", duration_seconds=40.0)
    put(4, 3, workflow_name="support-agent", status="completed", duration_seconds=31.5)
    put(
        5,
        1,
        workflow_name="support-agent",
        status="running",
        current_node="think",
        attempt_started_at=timezone.now() - timedelta(seconds=93),
        heartbeat_at=None,
    )
    put(6, 0, workflow_name="support-agent", status="pending", waiting_for="approval by finance")


def printed(line):
    """Return what a command prints, without what is different each time."""
    out, err = io.StringIO(), io.StringIO()
    call_command(*shlex.split(line)[2:], stdout=out, stderr=err)
    text = re.sub(
        rf"\b(?!{KNOWN})[0-9a-f]{{8}}(-[0-9a-f]{{4}}){{3}}-[0-9a-f]{{12}}\b",
        "019c13b2-9f3e-7c51-8d0a-4f1c9a7be2d3",
        out.getvalue(),
    )
    text = re.sub(r"\b9[3-9]\+", "93+", text)
    text = re.sub(
        r"(?m)(?<=^since      ).*|20\d\d-(?!01-[23])\d\d-\d\d \d\d:\d\d:\d\d",
        "2026-01-31 12:05:00",
        text,
    )
    return err.getvalue() + text


@pytest.fixture
def project(tmp_path, monkeypatch, settings, django_db_blocker):
    """A project whose runs are in ./workflows.db."""
    settings.TIME_ZONE = "UTC"
    settings.WORKFLOW_STORAGE = "sqlite"
    monkeypatch.chdir(tmp_path)
    before = set(registered_aliases)
    with django_db_blocker.unblock():
        yield create_storage_backend()
        for alias in set(registered_aliases) - before:
            forget(alias)


@pytest.mark.slow
def test_the_readme_shows_what_the_commands_print(project):
    text = README.read_text()

    def rendered(block):
        for run in project.runs.iter_runs():
            project.runs.delete(run.id)
        store_runs(project)
        commands = [line for line in block[1].splitlines() if line.startswith("$ ")]
        shown = "".join(f"{line}\n{printed(line[2:])}" for line in commands)
        return f"<!-- output -->\n```console\n{shown}```"

    expected = BLOCK.sub(rendered, text)
    if os.environ.get("UPDATE_README"):
        README.write_text(expected)
    assert text == expected


def test_every_command_is_in_the_readme():
    text = README.read_text()
    for path in (README.parent / "commands").glob("[!_]*.py"):
        assert f"`{path.stem}" in text
        assert f"$ python manage.py {path.stem}" in text


def test_the_alerts_of_the_readme_find_a_run_that_began_hours_ago(project):
    alerts = re.findall(r"manage\.py (list_runs .*--fail-if-any)", README.read_text())
    assert len(alerts) == 2
    run = stored_run(project, started_at=timezone.now() - timedelta(hours=5))
    project.runs.update_status(run.id, "running")
    for alert in alerts:
        call_command(*shlex.split(alert), stdout=io.StringIO())

    project.runs.update_status(run.id, "failed")

    for alert in alerts:
        with pytest.raises(CommandError, match=r"Found 1 run\."):
            call_command(*shlex.split(alert), stdout=io.StringIO())

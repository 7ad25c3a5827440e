"""The commands: what they print, on which backend, and how they fail."""

import io
import json

import pytest
from django.core.management import CommandError, call_command

from workflow_storage.testing import new_run, stored_run


def run_command(*args, **options):
    out = io.StringIO()
    call_command(*args, stdout=out, **options)
    return out.getvalue()


def test_list_runs_prints_a_line_for_each_run(any_backend, any_url):
    runs = [
        stored_run(
            any_backend,
            workflow_name="invoices [red]not markup[/]",
            status="completed",
            duration_seconds=1.5,
            total_tokens=12,
            total_cost_usd=0.25,
        ),
        stored_run(any_backend, id="x" * 36, workflow_name="\x1b[31mred"),
    ]

    text = run_command("list_runs", backend=any_url)

    assert len(text.splitlines()) == 3
    for shown in (*(run.id for run in runs), "not markup[/]", "completed", "1.500", "0.2500"):
        assert shown in text
    assert "\x1b" not in text


def test_list_runs_filters_and_pages(any_backend, any_url):
    for number in range(5):
        stored_run(any_backend, id=str(number), workflow_name="a" if number % 2 else "b")
    stored_run(any_backend, id="failed", status="failed")

    def listed(*args):
        text = run_command("list_runs", *args, backend=any_url, format="json")
        return [run["id"] for run in json.loads(text)]

    assert listed() == ["failed", "4", "3", "2", "1", "0"]
    assert listed("--workflow", "a") == ["3", "1"]
    assert listed("--status", "failed", "--status", "running") == ["failed"]
    assert listed("--limit", "2") == ["failed", "4"]
    assert listed("--limit", "2", "--before", "4") == ["3", "2"]


def test_list_runs_without_runs_says_so(any_backend, any_url):
    assert run_command("list_runs", backend=any_url) == "No runs.\n"
    assert run_command("list_runs", backend=any_url, format="json") == "[]\n"


def test_show_run_prints_the_run_and_its_states(any_backend, any_url):
    run = stored_run(
        any_backend,
        status="failed",
        inputs={"file": "a.pdf", "\0": "\ud800"},
        error_message="it\nbroke",
    )
    any_backend.states.save_state(run.id, {"pages": 3, "\udfff": 1}, "ocr")

    text = run_command("show_run", run.id, backend=any_url)

    for shown in (run.id, '"file": "a.pdf"', "broke", "ocr", "pages"):
        assert shown in text
    text.encode()


def test_show_run_as_json_is_everything(any_backend, any_url):
    run = stored_run(any_backend, inputs={"x": [1e23, "\0"]})
    assert (
        json.loads(run_command("show_run", run.id, backend=any_url, format="json"))["states"] == []
    )
    for number in range(20):
        any_backend.states.save_state(run.id, {"n": number, "lone": "\ud800"}, f"node-{number}")

    shown = json.loads(run_command("show_run", run.id, backend=any_url, format="json"))

    assert shown["inputs"] == {"x": [1e23, "\0"]}
    assert shown["started_at"] == run.started_at.isoformat()
    assert [state["step"] for state in shown["states"]] == list(range(20))
    assert shown["states"][3]["state_data"] == {"n": 3, "lone": "\ud800"}


def test_show_run_with_many_states_names_the_rest(any_backend, any_url):
    run = stored_run(any_backend)
    for _ in range(51):
        any_backend.states.save_state(run.id, {}, "node")

    assert "the rest with --format json" in run_command("show_run", run.id, backend=any_url)
    any_backend.states.delete_states(run.id, keep_last=50)
    assert "the rest" not in run_command("show_run", run.id, backend=any_url)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("show_run", "gone"), "Workflow run not found: gone"),
        (("list_runs", "--before", "gone"), "Workflow run not found: gone"),
        (("list_runs", "--limit", "-1"), "limit is -1"),
        (("list_runs", "--backend", "mongodb://x"), "Unsupported storage backend"),
        (("list_runs", "--status", "done"), "invalid choice"),
    ],
)
def test_what_the_user_can_mend_is_a_command_error(args, message, db):
    with pytest.raises(CommandError, match=message):
        call_command(*args)


def test_a_command_that_reads_makes_no_file(tmp_path):
    for command in (["list_runs"], ["show_run", "x"]):
        with pytest.raises(CommandError, match="There is no file"):
            call_command(*command, backend=f"sqlite:///{tmp_path}/typo.db")
    assert list(tmp_path.iterdir()) == []


def test_without_a_backend_the_commands_read_the_projects_own(db):
    from workflow_storage import create_storage_backend

    create_storage_backend().runs.add(new_run(id="own"))
    assert "own" in run_command("list_runs")

"""``list_runs``: a line for each run, filters and pages."""

import csv
import io
import json
from datetime import timedelta

import pytest
from django.core.management import CommandError, call_command
from django.db import connections
from django.utils import timezone

from tests.management.conftest import run_command, run_transfer
from workflow_storage.testing import stored_run
from workflow_storage.validation import RUN_FIELDS

LONG_AGO = timezone.now() - timedelta(days=1)


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


def test_each_run_says_where_it_is_and_why(every_backend, every_url):
    ago = timezone.now() - timedelta(seconds=90)
    stored_run(
        every_backend,
        id="failed",
        status="failed",
        current_node="extract",
        error_message="\n  ValueError: no total\nTraceback: …",
    )
    running = stored_run(every_backend, id="running", current_node="ocr", started_at=ago)
    every_backend.runs.update_status(
        running.id, "running", current_node="ocr", attempt_started_at=ago
    )
    waiting = stored_run(every_backend, id="waiting", status="running")
    every_backend.runs.update_status(waiting.id, "pending", waiting_for="approval by finance")

    lines = {
        line.split()[0]: line for line in run_command("list_runs", backend=every_url).splitlines()
    }

    assert lines["failed"].endswith("extract  ValueError: no total")
    assert lines["running"].split()[-2:] in (["90+", "ocr"], ["91+", "ocr"])
    assert lines["waiting"].endswith("waits for approval by finance")


def test_list_runs_selects_and_pages(every_backend, every_url):
    now = timezone.now()
    for number in range(5):
        stored_run(
            every_backend,
            id=str(number),
            workflow_name="a" if number % 2 else "b",
            labels={"tenant": "acme", "user": str(number)},
            started_at=now - timedelta(hours=10 - number),
        )
    stored_run(every_backend, id="failed", status="failed", parent_id="4")

    def listed(*args):
        text = run_command("list_runs", *args, backend=every_url, format="json")
        return [run["id"] for run in json.loads(text)]

    assert listed() == ["failed", "4", "3", "2", "1", "0"]
    assert listed("--workflow", "a") == ["3", "1"]
    assert listed("--workflow", "a", "--workflow", "b") == ["4", "3", "2", "1", "0"]
    assert listed("--status", "failed", "--status", "running") == ["failed"]
    assert listed("--limit", "2") == ["failed", "4"]
    assert listed("--limit", "2", "--before", "4") == ["3", "2"]
    assert listed("--limit", "1", "--before", "fai") == ["4"]
    assert listed("--label", "tenant=acme", "--label", "user=3") == ["3"]
    assert listed("--since", "450m", "--until", "1h") == ["4", "3"]
    assert listed("--parent", "4") == ["failed"]
    assert listed("--waiting") == []


def test_the_beginning_of_a_parent_is_as_good_as_its_id(any_backend, any_url):
    for name in ("parent-1", "parent-2"):
        stored_run(any_backend, id=name)
    stored_run(any_backend, id="child", parent_id="parent-1", status="running", started_at=LONG_AGO)
    stored_run(any_backend, id="orphan", parent_id="parent")

    def listed(parent):
        text = run_command("list_runs", parent=parent, backend=any_url, format="json")
        return [run["id"] for run in json.loads(text)]

    assert listed("parent-1") == ["child"]
    assert listed("parent-2") == listed("no-such-run") == []
    assert listed("parent") == ["orphan"]
    any_backend.runs.delete("orphan")
    with pytest.raises(CommandError, match="the beginning of 2 ids: parent-1, parent-2"):
        listed("parent")
    any_backend.runs.delete("parent-2")
    assert listed("par") == ["child"]
    assert run_command("check_runs", parent="par", backend=any_url).startswith("1 run with")
    stalled = run_command("fail_stalled_runs", idle="1h", parent="par", backend=any_url)
    assert stalled.endswith("1 run set to failed.\n")


def test_so_it_is_in_the_commands_that_sum_up_change_copy_and_delete(
    any_backend, any_url, tmp_path
):
    stored_run(any_backend, id="parent-1")
    stored_run(any_backend, id="child", parent_id="parent-1", started_at=LONG_AGO)
    file = tmp_path / "runs.jsonl"

    (row,) = json.loads(run_command("run_stats", parent="par", backend=any_url, format="json"))
    assert row["runs"] == 1
    run_command("export_runs", str(file), parent="par", backend=any_url)
    assert [json.loads(line)["run"]["id"] for line in file.read_text().splitlines()] == ["child"]
    target = f"sqlite:///{tmp_path}/target.db"
    run_command("copy_runs", source=any_url, target=target, parent="par")
    assert run_command("list_runs", backend=target, format="csv").count("\n") == 2
    run_command("update_runs", "cancel", parent="par", backend=any_url, interactive=False)
    assert any_backend.runs.get("child").status == "cancelled"
    assert any_backend.runs.get("parent-1").status == "pending"
    options = {"older_than": "0m", "parent": "par", "interactive": False}
    run_command("prune_runs", backend=any_url, **options)
    assert any_backend.runs.get("child") is None
    assert any_backend.runs.get("parent-1") is not None


def test_runs_are_found_by_their_error_in_databases_only(any_backend, any_url):
    stored_run(any_backend, id="a", status="failed", error_message="TimeoutError: gone")
    stored_run(any_backend, id="b", status="failed", error_message="ValueError")

    if any_backend.alias is None:
        with pytest.raises(CommandError, match="Redis has no search over errors"):
            call_command("list_runs", error="timeout", backend=any_url)
    else:
        text = run_command("list_runs", error="timeout", format="jsonl", backend=any_url)
        assert json.loads(text)["id"] == "a"


def test_list_runs_without_runs_says_so(every_backend, every_url):
    assert run_command("list_runs", backend=every_url) == "No runs.\n"
    assert run_command("list_runs", backend=every_url, format="json") == "[]\n"
    assert run_command("list_runs", backend=every_url, format="jsonl") == ""


def test_programs_get_every_field_or_the_columns_that_they_name(source, sqlite_url):
    run = stored_run(source, labels={"tenant": "acme"}, inputs={"file": "a.pdf"})

    (record,) = json.loads(run_command("list_runs", backend=sqlite_url, format="json"))
    assert tuple(record) == (*RUN_FIELDS, "problem")
    assert record["problem"] is None
    assert record["inputs"] == {"file": "a.pdf"}
    assert record["started_at"] == run.started_at.isoformat()
    columns = "label:tenant,workflow,id"
    text = run_command("list_runs", backend=sqlite_url, format="csv", columns=columns)
    assert list(csv.reader(io.StringIO(text))) == [
        ["label:tenant", "workflow_name", "id"],
        ["acme", run.workflow_name, run.id],
    ]
    text = run_command("list_runs", backend=sqlite_url, columns=columns)
    assert [line.split() for line in text.splitlines()] == [
        ["tenant", "Workflow", "ID"],
        ["acme", run.workflow_name, run.id],
    ]


def test_a_status_that_there_is_not_is_listed_as_it_is(sql_backend, sql_url):
    runs = [stored_run(sql_backend, status="failed") for _ in range(3)]
    with connections[sql_backend.alias].cursor() as cursor:
        cursor.execute("UPDATE workflow_runs SET status = 'bogus' WHERE id = %s", [runs[1].id])

    text = run_command("list_runs", backend=sql_url, force_color=True)

    assert len(text.splitlines()) == 4
    assert "bogus" in text
    assert text.count("\x1b[31mfailed") == 2
    assert "bogus" in run_command("show_run", runs[1].id, backend=sql_url, force_color=True)


UNREADABLE = ("run-07", "run-25", "run-26", "run-49")


@pytest.fixture
def damaged(sql_backend):
    """Fifty runs, of which four cannot be read, and of one of these no label."""
    now = timezone.now()
    for number in range(50):
        stored_run(
            sql_backend,
            id=f"run-{number:02}",
            workflow_name="w",
            status="failed",
            labels={"tenant": "acme"},
            started_at=now + timedelta(seconds=number // 3),
        )
    with connections[sql_backend.alias].cursor() as cursor:
        for run_id in UNREADABLE:
            cursor.execute("UPDATE workflow_runs SET inputs = '{no json' WHERE id = %s", [run_id])
        cursor.execute("UPDATE workflow_runs SET labels = '[' WHERE id = 'run-49'")
    return sql_backend


def test_a_run_that_cannot_be_read_is_listed_with_what_is_known(damaged, sql_url):
    out, err, error = run_transfer("list_runs", "--limit=50", "--backend", sql_url)

    lines = {line.split()[0]: line.split() for line in out.splitlines()[1:]}
    assert list(lines) == [f"run-{number:02}" for number in range(49, -1, -1)]
    for run_id in UNREADABLE:
        assert lines[run_id][1:3] == ["w", "failed"]
        assert "damaged: inputs cannot be read" in " ".join(lines[run_id]) or run_id == "run-49"
    assert err == ""
    assert error == (
        "4 workflow runs are damaged: run-49, run-26, run-25, run-07. "
        "Run check_runs to see all that is."
    )


def test_of_many_runs_that_cannot_be_read_some_are_named(damaged, sql_url):
    with connections[damaged.alias].cursor() as cursor:
        cursor.execute("UPDATE workflow_runs SET inputs = '{no json'")

    out, _, error = run_transfer("list_runs", "--limit=40", "--backend", sql_url)

    assert len(out.splitlines()) == 41
    assert error == (
        "More than 5 workflow runs are damaged: run-49, run-48, run-47, run-46, run-45, …. "
        "Run check_runs to see all that is."
    )


def test_programs_get_what_is_known_of_a_run_that_cannot_be_read(damaged, sql_url):
    def listed(*arguments):
        out, _, error = run_transfer("list_runs", *arguments, "--backend", sql_url)
        return out, error

    text, error = listed("--before=run-27", "--limit=3", "--format=json")
    records = json.loads(text)
    assert [record["id"] for record in records] == ["run-26", "run-25", "run-24"]
    assert all(tuple(record) == (*RUN_FIELDS, "problem") for record in records)
    for record, sound in zip(records, (False, False, True), strict=True):
        assert (record["problem"] is None) == sound
        assert (record["status"], record["labels"]) == ("failed", {"tenant": "acme"})
    assert error.startswith("2 workflow runs are damaged: run-26, run-25.")

    text, error = listed("--before=run-08", "--limit=1", "--format=jsonl", "--columns=id,inputs")
    assert json.loads(text) == {"id": "run-07", "inputs": None}
    assert error.startswith("Workflow run run-07 is damaged: inputs cannot be read: ")
    assert error.endswith(" Run check_runs to see all that is.")
    text, error = listed("--limit=2", "--format=csv", "--columns=id,status,label:tenant")
    assert text.splitlines() == ["id,status,label:tenant", "run-49,failed,", "run-48,failed,acme"]
    assert error is not None
    text, error = listed("--before=run-49", "--limit=20", "--format=jsonl")
    assert (text.count("\n"), error) == (20, None)


@pytest.mark.parametrize(
    ("field", "value"),
    [("duration_seconds", "x"), ("total_cost_usd", "abc"), ("started_at", "garbage")],
)
def test_a_field_that_cannot_be_right_is_left_out(source, sqlite_url, field, value):
    for run_id in ("a", "b", "c"):
        stored_run(source, id=run_id, status="failed", duration_seconds=1.5, total_cost_usd=0.5)
    with connections[source.alias].cursor() as cursor:
        cursor.execute(f"UPDATE workflow_runs SET {field} = %s WHERE id = 'b'", [value])

    for shown in ("table", "json", "csv"):
        out, _, error = run_transfer("list_runs", f"--format={shown}", "--backend", sqlite_url)
        assert error.startswith(f"Workflow run b is damaged: its {field} cannot be right")
        assert out.count("contract") == 3
        assert value not in out.replace(f"right: {value!r}", "")


@pytest.mark.parametrize("field", ["labels", "started_at", "attempt", "inputs"])
def test_a_run_in_redis_that_cannot_be_read_is_listed_with_what_is_known(target, redis_url, field):
    for number in range(30):
        stored_run(target, id=f"run-{number:02}", workflow_name="w", status="failed")
    store = target.runs.store
    damage = ("HSET", f"{store.key_prefix('run-15')}:run:run-15", field, "{no")
    store.execute(iter_of(damage))

    out, _, error = run_transfer("list_runs", "--limit=50", "--backend", redis_url)

    lines = {line.split()[0]: line.split() for line in out.splitlines()[1:]}
    assert list(lines) == [f"run-{number:02}" for number in range(29, -1, -1)]
    assert lines["run-15"][1:3] == ["w", "failed"]
    assert error.startswith("Workflow run run-15 is damaged: ")


def iter_of(command):
    return (yield [command])


def test_monitoring_fails_if_there_is_any(source, sqlite_url):
    arguments = ("list_runs", "--status=failed", "--fail-if-any", "--backend", sqlite_url)
    assert run_command(*arguments) == "No runs.\n"
    stored_run(source, status="failed")
    with pytest.raises(CommandError, match=r"Found 1 run\.") as caught:
        run_command(*arguments)
    assert caught.value.returncode == 1

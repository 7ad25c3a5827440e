"""``prune_runs``: what it deletes, what it spares, and that it says so first."""

import json
from datetime import timedelta

import pytest
from django.core.management import CommandError, call_command
from django.db import connections
from django.utils import timezone

from tests.management.conftest import run_command, run_transfer
from workflow_storage.testing import stored_run


@pytest.fixture
def ended(every_backend):
    """Five old runs of two workflows, a recent one, one that runs and one that waits."""
    now = timezone.now()

    def store(run_id, days, **fields):
        moment = now - timedelta(days=days)
        times = {"completed_at": moment} if fields["status"] in {"completed", "failed"} else {}
        stored_run(every_backend, id=run_id, started_at=moment, **times, **fields)
        for number in range(3):
            every_backend.states.save_state(run_id, {"n": number}, "node")

    for number in range(4):
        store(f"a{number}", 100 + number, workflow_name="a", status="completed")
    store("b0", 100, workflow_name="b", status="failed", labels={"tenant": "acme"})
    store("recent", 1, workflow_name="a", status="completed")
    store("running", 100, workflow_name="a", status="running")
    store("waiting", 100, workflow_name="a", status="running")
    every_backend.runs.update_status("waiting", "pending", waiting_for="approval")
    return every_backend


def left(backend):
    return {run.id for run in backend.runs.iter_runs()}


ALL = {"a0", "a1", "a2", "a3", "b0", "recent", "running", "waiting"}


def prune(url, *arguments, **options):
    return run_command(
        "prune_runs", "--older-than=90d", *arguments, backend=url, interactive=False, **options
    )


def test_a_dry_run_says_what_would_be_deleted_and_deletes_nothing(ended, every_url):
    text = prune(every_url, "--dry-run")

    assert [line.split() for line in text.splitlines()[:3]] == [
        ["Workflow", "Runs"],
        ["a", "4"],
        ["b", "1"],
    ]
    assert text.splitlines()[-1] == "5 runs would be deleted."
    assert left(ended) == ALL
    assert json.loads(prune(every_url, "--dry-run", "--workflow=b", format="json")) == [
        {"workflow_name": "b", "runs": 1, "states": None, "archived": None, "deleted": None}
    ]


def test_only_what_ended_before_is_deleted(ended, every_url):
    text = prune(every_url)

    assert text.endswith("5 runs deleted.\n")
    assert left(ended) == {"recent", "running", "waiting"}
    assert prune(every_url) == "Nothing to delete.\n"


def test_the_selection_narrows_what_is_deleted(ended, every_url):
    def found(*arguments):
        text = prune(every_url, "--dry-run", *arguments, format="json")
        return {one["workflow_name"]: one["runs"] for one in json.loads(text)}

    assert found() == {"a": 4, "b": 1}
    assert found("--workflow=b") == {"b": 1}
    assert found("--status=completed") == {"a": 4}
    assert found("--label=tenant=acme") == {"b": 1}
    assert found("--keep-last=3") == {"a": 2}
    assert found("--limit=2") == {"a": 2}
    assert found("--parent=x") == {}
    prune(every_url, "--keep-last=3", "--status=completed", "--workflow=a")
    assert left(ended) == ALL - {"a2", "a3"}
    assert prune(every_url, "--label=tenant=acme", "--verbosity=0") == ""
    assert left(ended) == ALL - {"a2", "a3", "b0"}


def test_states_alone_can_be_deleted(ended, every_url):
    text = prune(every_url, "--states-only", "--keep-states=2", "--dry-run")
    assert text.splitlines()[-1] == "4 states of 4 runs would be deleted."

    text = prune(every_url, "--states-only", "--keep-states=2", "--limit=3")
    assert text.endswith("3 states deleted.\n")
    text = prune(every_url, "--states-only", "--keep-states=2", "--limit=3")
    assert text.endswith("1 state deleted.\n")

    assert left(ended) == ALL
    counts = {run: len(ended.states.get_state_history(run)) for run in ALL}
    assert counts == {run: 2 if run in {"a0", "a1", "a2", "a3"} else 3 for run in ALL}


def test_runs_that_can_be_resumed_keep_their_states_unless_forced(ended, every_url):
    arguments = ["--states-only", "--keep-states=1"]
    with pytest.raises(CommandError, match="failed can be resumed") as caught:
        prune(every_url, *arguments, "--status=failed")
    assert caught.value.returncode == 2

    prune(every_url, *arguments, "--status=failed", "--force")
    assert len(ended.states.get_state_history("b0")) == 1
    assert len(ended.states.get_state_history("a0")) == 3


def test_what_is_archived_is_deleted(ended, every_url, tmp_path):
    path = tmp_path / "old.jsonl.gz"

    text = prune(every_url, f"--archive={path}")

    assert f"5 runs written to {path}; 0 kept.\n5 runs deleted.\n" in text
    assert left(ended) == {"recent", "running", "waiting"}
    run_command("import_runs", str(path), backend=every_url)
    assert left(ended) == ALL
    with pytest.raises(CommandError, match="it is there already"):
        prune(every_url, f"--archive={path}")
    assert left(ended) == ALL


def test_a_run_that_cannot_be_archived_is_named_once_and_the_command_fails(
    sql_backend, sql_url, tmp_path
):
    for run_id in ("damaged", "sound"):
        stored_run(sql_backend, id=run_id, status="running")
        for number in range(3):
            sql_backend.states.save_state(run_id, {"n": number}, "node")
        sql_backend.runs.update_status(run_id, "failed")
    with connections[sql_backend.alias].cursor() as cursor:
        cursor.execute(
            "UPDATE execution_states SET state_json = '{no json', state_delta = NULL "
            "WHERE run_id = 'damaged' AND step = 1"
        )
    path = tmp_path / "old.jsonl"

    out, err, error = run_transfer(
        *("prune_runs", "--older-than=0s", "--no-input", "--archive", str(path)),
        *("--backend", sql_url),
    )

    assert error == "Some were not archived and deleted; see above."
    assert out.endswith(f"1 run written to {path}; 1 kept.\n1 run deleted.\n")
    assert err.count("damaged: It is not complete") == len(err.splitlines()) == 1
    assert left(sql_backend) == {"damaged"}


def test_an_archive_that_cannot_be_made_is_said_first(source, sqlite_url, tmp_path):
    stored_run(source, status="failed")
    there = tmp_path / "there.jsonl"
    there.touch()
    for path, reason in (
        (there, "it is there already"),
        (tmp_path / "gone" / "old.jsonl", "there is no folder"),
        (tmp_path, "it cannot be read back"),
        ("", "it cannot be read back"),
    ):
        for arguments in ([], ["--dry-run"]):
            out, _, error = run_transfer(
                *("prune_runs", "--older-than=0s", "--no-input", *arguments),
                *(f"--archive={path}", "--backend", sqlite_url),
            )
            assert (out, reason in error) == ("", True)
    assert source.runs.count_runs() == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--states-only"], "needs --keep-states"),
        (["--keep-states=1"], "go with --states-only"),
        (["--force"], "go with --states-only"),
        (["--states-only", "--keep-states=1", "--archive=x"], "does not go with"),
        (["--status=running"], "running"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_said(source, sqlite_url, arguments, message):
    with pytest.raises(CommandError, match=message):
        prune(sqlite_url, *arguments)


def test_nothing_is_deleted_unasked(source, sqlite_url):
    stored_run(source, status="failed")
    with pytest.raises(CommandError, match=r"no terminal to ask on\. Pass --no-input"):
        call_command("prune_runs", older_than=timedelta(0), backend=sqlite_url)
    assert source.runs.count_runs() == 1


def test_what_programs_read_is_nothing_but_records(source, sqlite_url, tmp_path, keyboard):
    stored_run(source, workflow_name="w", status="failed")
    found = {"workflow_name": "w", "runs": 1, "states": None, "archived": None, "deleted": None}
    done = {**found, "workflow_name": None, "archived": 1, "deleted": 1}
    arguments = ["prune_runs", "--older-than=0s", "--format=json", "--backend", sqlite_url]

    keyboard("n\n")
    assert json.loads(run_command(*arguments)) == [found]
    assert source.runs.count_runs() == 1
    arguments += ["--no-input", f"--archive={tmp_path / 'old.jsonl'}"]
    assert json.loads(run_command(*arguments)) == [found, done]
    assert source.runs.count_runs() == 0
    assert json.loads(run_command(*arguments, "--archive=x")) == []


def test_programs_are_told_how_many_states_were_deleted(source, sqlite_url):
    run = stored_run(source, workflow_name="w", status="completed")
    for number in range(3):
        source.states.save_state(run.id, {"n": number}, "node")
    arguments = ["--states-only", "--keep-states=1", "--format=csv", "--older-than=0s"]

    text = run_command("prune_runs", *arguments, "--no-input", backend=sqlite_url)

    assert text.splitlines() == [
        "workflow_name,runs,states,archived,deleted",
        "w,1,2,,",
        ",1,2,,2",
    ]
    stored_run(source, status="failed")
    arguments = ["--older-than=0s", "--format=jsonl", "--no-input", "--verbosity=0"]
    text = run_command("prune_runs", *arguments, backend=sqlite_url)
    assert json.loads(text) == {
        "workflow_name": None,
        "runs": None,
        "states": None,
        "archived": None,
        "deleted": 2,
    }

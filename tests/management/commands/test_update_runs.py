"""``update_runs``: runs cancelled, failed and labelled by hand."""

import io
import json
from datetime import timedelta

import pytest
from django.core.management import CommandError, call_command
from django.db import connections
from django.utils import timezone

from tests.management.conftest import run_command, run_transfer
from workflow_storage import RunLostError, record_run
from workflow_storage.testing import stored_run


def update(url, *arguments, **options):
    return run_command("update_runs", *arguments, backend=url, interactive=False, **options)


@pytest.fixture
def stored(every_backend):
    for run_id, name, status in (
        ("running", "a", "running"),
        ("pending", "a", "pending"),
        ("completed", "a", "completed"),
        ("other", "b", "running"),
    ):
        stored_run(
            every_backend, id=run_id, workflow_name=name, status=status, labels={"tenant": "acme"}
        )
    return every_backend


def statuses(backend):
    return {run.id: str(run.status) for run in backend.runs.iter_runs()}


def test_a_run_is_cancelled_by_its_id(stored, every_url):
    assert update(every_url, "cancel", "run") == "1 run cancelled.\n"
    run = stored.runs.get("running")
    assert (run.status, run.error_message) == ("cancelled", "Cancelled by update_runs.")
    assert update(every_url, "fail", "pending", "--message", "no longer needed").startswith("1 run")
    assert stored.runs.get("pending").error_message == "no longer needed"


def test_selected_runs_are_those_that_have_not_ended(stored, every_url):
    assert update(every_url, "cancel", "--workflow=a", "--dry-run").endswith(
        "2 runs would be cancelled.\n"
    )
    assert update(every_url, "cancel", "--workflow=a") == "2 runs cancelled.\n"
    assert statuses(stored) == {
        "running": "cancelled",
        "pending": "cancelled",
        "completed": "completed",
        "other": "running",
    }


def test_a_run_that_has_ended_is_named_and_left(stored, every_url):
    out, err = io.StringIO(), io.StringIO()
    with pytest.raises(CommandError, match="1 run could not be"):
        call_command(
            "update_runs",
            "cancel",
            "completed",
            "other",
            backend=every_url,
            interactive=False,
            stdout=out,
            stderr=err,
        )
    assert err.getvalue() == "Workflow run completed is completed already.\n"
    assert out.getvalue() == "1 run cancelled.\n"
    assert statuses(stored)["other"] == "cancelled"


def test_a_dry_run_names_what_would_be_refused(stored, every_url):
    out, err, error = run_transfer(
        *("update_runs", "fail", "completed", "other", "--dry-run", "--backend", every_url)
    )
    assert out.endswith("1 run would be set to failed.\n")
    assert err == "Workflow run completed is completed already.\n"
    assert error == "1 run could not be; see above."
    assert statuses(stored)["other"] == "running"


def test_a_run_without_the_label_is_not_unlabelled(stored, every_url):
    stored.runs.update("other", add_labels={"extra": "yes"})
    before = {run.id: run.labels for run in stored.runs.iter_runs()}

    text = update(every_url, "unlabel", "other", "pending", remove="extra", dry_run=True)
    assert text.endswith("1 run would be unlabelled, 1 run without such a label.\n")
    assert {run.id: run.labels for run in stored.runs.iter_runs()} == before
    text = update(every_url, "unlabel", "other", "pending", remove="extra", format="json")
    assert json.loads(text) == [
        {"run_id": "other", "outcome": "changed", "reason": None},
        {"run_id": "pending", "outcome": "unchanged", "reason": None},
    ]
    text = update(every_url, "unlabel", "pending", remove=["nosuch"])
    assert text == "0 runs unlabelled, 1 run without such a label.\n"


def test_labels_are_set_and_removed(stored, every_url):
    update(every_url, "label", "--workflow=a", "--set=checked=yes", "--set=by=me", "--limit=2")
    labelled = list(stored.runs.iter_runs(labels={"checked": "yes", "by": "me"}))
    assert len(labelled) == 2
    assert {run.labels["tenant"] for run in labelled} == {"acme"}
    update(every_url, "unlabel", "other", remove="tenant")
    assert stored.runs.get("other").labels == {}
    assert stored.runs.count_runs(labels={"tenant": "acme"}) == 3


def test_whoever_works_on_a_cancelled_run_is_told(every_backend, every_url):
    with (
        pytest.raises(RunLostError, match="is cancelled"),
        record_run("w", backend=every_backend) as run,
    ):
        update(every_url, "cancel", run.run_id)
        run.save_state({}, node_id="next")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cancel"], "Name runs by their ids, or else select"),
        (["cancel", "x", "--workflow=a"], "Name runs by their ids, or else select"),
        (["label", "x"], "--set NAME=VALUE"),
        (["unlabel", "x"], "--remove NAME"),
        (["cancel", "x", "--limit=1"], "go with a selection, not with ids"),
        (["cancel", "x", "--before=y"], "go with a selection, not with ids"),
        (["cancel", "--limit=1"], "Name runs by their ids, or else select"),
        (["label", "x", "--set=a=1", "--message=m"], "--message goes with cancel and fail"),
        (["cancel", "gone"], "Workflow run not found: gone"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_said(source, sqlite_url, arguments, message):
    with pytest.raises(CommandError, match=message):
        update(sqlite_url, *arguments)


@pytest.mark.parametrize(
    "selection",
    [{"label": {}}, {"label": []}, {"workflow": []}, {"status": []}, {"workflow": [], "label": {}}],
    ids=str,
)
def test_an_empty_selection_is_refused_and_nothing_is_changed(source, sqlite_url, selection):
    stored_run(source, id="open", status="running")
    with pytest.raises(CommandError, match="or else select them") as caught:
        update(sqlite_url, "cancel", **selection)
    assert caught.value.returncode == 2
    assert statuses(source) == {"open": "running"}


def test_more_than_one_run_is_not_changed_unasked(source, sqlite_url):
    for _ in range(2):
        stored_run(source, workflow_name="a")
    with pytest.raises(CommandError, match="no terminal to ask on"):
        call_command(
            "update_runs", "cancel", workflow="a", backend=sqlite_url, stdout=io.StringIO()
        )
    assert set(statuses(source).values()) == {"pending"}
    run_command("update_runs", "cancel", "--workflow=a", "--limit=1", backend=sqlite_url)
    assert sorted(statuses(source).values()) == ["cancelled", "pending"]


def test_programs_get_a_record_of_each_run_of_what_became_of_it_or_would(stored, every_url):
    arguments = ("update_runs", "fail", "completed", "other", "--backend", every_url)
    ended = "Workflow run completed is completed already."

    for options in (["--dry-run"], ["--no-input"]):
        out, err, error = run_transfer(*arguments, *options, "--format=jsonl")
        assert [json.loads(line) for line in out.splitlines()] == [
            {"run_id": "completed", "outcome": "refused", "reason": ended},
            {"run_id": "other", "outcome": "changed", "reason": None},
        ]
        assert err == f"{ended}\n"
        assert error == "1 run could not be; see above."
        is_changed = options == ["--no-input"]
        assert statuses(stored)["other"] == ("failed" if is_changed else "running")


def test_a_selection_begins_after_a_run_and_has_so_many(every_backend, every_url):
    now = timezone.now()
    for number in range(8):
        stored_run(every_backend, id=str(number), started_at=now - timedelta(hours=number // 3))

    text = update(every_url, "cancel", "--workflow=contract", "--before=1", "--limit=3")

    assert text == "3 runs cancelled.\n"
    cancelled = {run_id for run_id, status in statuses(every_backend).items() if "can" in status}
    assert cancelled == {"0", "5", "4"}
    text = update(every_url, "cancel", "--workflow=contract", "--before=4", dry_run=True)
    assert text.endswith("3 runs would be cancelled.\n")


def test_a_run_that_cannot_be_read_is_refused_and_the_others_are_changed(sql_backend, sql_url):
    for run_id in ("a", "b", "c"):
        stored_run(sql_backend, id=run_id, workflow_name="w")
    with connections[sql_backend.alias].cursor() as cursor:
        cursor.execute("UPDATE workflow_runs SET labels = '[' WHERE id = 'b'")

    out, err, error = run_transfer(
        *("update_runs", "label", "--workflow=w", "--set=x=y", "--no-input"),
        *("--backend", sql_url),
    )

    assert out == "2 runs labelled.\n"
    assert err.startswith("Workflow run b is damaged: labels cannot be read: ")
    assert error == "1 run could not be; see above."
    assert sql_backend.runs.count_runs(labels={"x": "y"}) == 2


def test_what_programs_read_is_a_list_though_nothing_was_changed(source, sqlite_url, keyboard):
    for _ in range(2):
        stored_run(source, workflow_name="a")

    keyboard("n\n")
    text = run_command("update_runs", "cancel", workflow="a", backend=sqlite_url, format="json")

    assert json.loads(text) == []
    assert set(statuses(source).values()) == {"pending"}

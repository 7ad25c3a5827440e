"""How the values of arguments are read."""

from argparse import ArgumentParser, ArgumentTypeError
from datetime import UTC, date, datetime, timedelta

import pytest
from django.core.management import CommandError, call_command
from django.utils import timezone

from tests.management.conftest import run_command
from workflow_storage import RunStatus, StorageConfig, create_storage_backend, export_runs
from workflow_storage.management.arguments import (
    add_selection,
    count,
    duration,
    moment,
    selection_of,
)
from workflow_storage.testing import stored_run


def test_times_are_read_in_the_projects_time_zone(settings):
    settings.TIME_ZONE = "America/New_York"
    assert moment("2026-01-31") == datetime(2026, 1, 31, 5, tzinfo=UTC)
    assert moment("2026-01-31T12:00+00:00") == datetime(2026, 1, 31, 12, tzinfo=UTC)
    settings.USE_TZ = False
    assert moment("2026-01-31T12:00") == datetime(2026, 1, 31, 12)
    with pytest.raises(ArgumentTypeError, match="is no time"):
        moment("0001-01-01T00:00+14:00")


@pytest.mark.parametrize("given", ["90m", "1.5h", timedelta(minutes=90)])
def test_a_time_can_be_an_age(given):
    before = timezone.now()
    read = moment(given)
    assert before <= read + timedelta(minutes=90) <= timezone.now()


def test_an_age_of_a_selection_is_counted_back_from_when_it_is_used():
    parser = ArgumentParser()
    add_selection(parser)
    options = vars(parser.parse_args(["--since=90m", "--until=2026-01-31"]))

    first = selection_of(options)
    second = selection_of(options)

    assert first["started_after"] < second["started_after"]
    assert first["started_before"] == second["started_before"] == moment("2026-01-31")
    with pytest.raises(SystemExit):
        parser.parse_args(["--since=99999999d"])


def test_times_are_taken_as_values_too(settings):
    aware = datetime(2026, 1, 31, 12, tzinfo=UTC)
    assert moment(aware) == moment("2026-01-31T12:00+00:00") == moment(str(aware)) == aware
    assert moment(date(2026, 1, 31)) == moment("2026-01-31")
    assert moment(datetime(2026, 1, 31)) == moment("2026-01-31")
    settings.USE_TZ = False
    assert moment(datetime(2026, 1, 31, 12)) == datetime(2026, 1, 31, 12)


@pytest.mark.parametrize("given", [timedelta(minutes=90), "90m", "1.5h", " 5400s ", "1:30:00"])
def test_durations_are_taken_as_text_or_value(given):
    assert duration(given) == timedelta(minutes=90)


@pytest.mark.parametrize("given", ["", "15", "m", "-1m", "1:30:xx", 15, None])
def test_what_is_no_duration_is_refused(given):
    with pytest.raises(ArgumentTypeError, match="is no time"):
        duration(given)


@pytest.mark.parametrize("given", [0, -1, "x", "1.5", None, True])
def test_what_is_no_count_is_refused(given):
    with pytest.raises(ArgumentTypeError, match="is no whole number"):
        count(given)
    assert count("7") == count(7) == 7


NOW = datetime(2100, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("list_runs", {"status": "failed", "limit": 1, "workflow": "w"}),
        ("list_runs", {"status": ["failed", "running"], "limit": "1"}),
        ("list_runs", {"status": RunStatus.FAILED, "before": None}),
        ("list_runs", {"format": "json"}),
        ("list_runs", {"workflow": ["w", "x"], "label": {"tenant": "acme"}, "waiting": False}),
        ("list_runs", {"label": ["tenant=acme", ("user", "7")], "since": timedelta(days=7)}),
        ("list_runs", {"columns": ["id", "label:tenant"], "error": "x"}),
        ("show_run", {"steps": (0, 3)}),
        ("show_run", {"steps": 0}),
        ("show_run", {"compare": "the-run"}),
        ("show_run", {}),
        ("show_run", {"format": "json"}),
        ("export_runs", {"until": NOW}),
        ("export_runs", {"until": NOW.date()}),
        ("export_runs", {"until": str(NOW), "status": RunStatus.FAILED}),
        ("export_runs", {"backend": StorageConfig(backend="default")}),
        ("import_runs", {"max_line": 1}),
        ("import_runs", {"max_line": "1"}),
        ("fail_stalled_runs", {"idle": timedelta(hours=1), "dry_run": True}),
    ],
    ids=str,
)
@pytest.mark.django_db
def test_every_command_takes_python_values(command, options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = create_storage_backend("default")
    run = stored_run(store, id="the-run", status="failed", workflow_name="w")
    file = tmp_path / "runs.jsonl"
    list(export_runs(store, file))
    arguments = {"show_run": [run.id], "export_runs": [file], "import_runs": [file]}

    assert run_command(command, *arguments.get(command, ()), **options)


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("list_runs", {"limit": 0}, "is no whole number"),
        ("list_runs", {"format": "xml"}, "is no format"),
        ("list_runs", {"columns": ["idd"]}, "There is no column 'idd'"),
        ("list_runs", {"label": "tenant"}, "is no label"),
        ("list_runs", {"label": ["a=1", "a=2"]}, "with two values"),
        ("list_runs", {"status": "done"}, "Invalid run status"),
        ("list_runs", {"workflow": 5}, "workflow_name is a int"),
        ("list_runs", {"backend": 5}, "a StorageConfig, a string or None"),
        ("export_runs", {"until": "soon"}, "is no time"),
        ("export_runs", {"until": 5}, "is no time"),
    ],
    ids=str,
)
@pytest.mark.django_db
def test_python_values_that_are_none_are_command_errors(command, options, message, tmp_path):
    arguments = [tmp_path / "runs.jsonl"] if command == "export_runs" else []
    with pytest.raises(CommandError, match=message):
        call_command(command, *arguments, **options)


def test_copy_runs_takes_python_values(source, target, sqlite_url, redis_url):
    run = stored_run(source, status="failed")
    ended = {"until": NOW, "status": [RunStatus.FAILED], "move": True}

    run_command("copy_runs", source=StorageConfig(backend=sqlite_url), target=redis_url, **ended)

    assert target.runs.get(run.id).status == "failed"
    assert source.runs.count_runs() == 0

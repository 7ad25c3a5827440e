"""What every command does: it opens the right store, and says what the user can mend."""

import pytest
from django.core.management import CommandError, call_command

from tests.management.conftest import run_command
from workflow_storage.testing import new_run, stored_run


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("show_run", "gone"), "Workflow run not found: gone"),
        (("list_runs", "--before", "gone"), "Workflow run not found: gone"),
        (("list_runs", "--limit", "-1"), "is no whole number"),
        (("list_runs", "--backend", "mongodb://x"), "Unsupported storage backend"),
        (("list_runs", "--status", "done"), "invalid choice"),
    ],
)
def test_what_the_user_can_mend_is_a_command_error(args, message, db):
    with pytest.raises(CommandError, match=message):
        call_command(*args)


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (["show_run", "the-run", "--state", "x"], {}),
        (["show_run", "the-run", "--diff", "9..3"], {}),
        (["update_runs", "label", "the-run", "--set", "x="], {}),
        (["list_runs", "--label", "a=1", "--label", "a=2"], {}),
        (["prune_runs", "--older-than", "1d", "--status", "running", "--no-input"], {}),
        (["list_runs"], {"limit": 0}),
        (["list_runs"], {"status": "done"}),
        (["list_runs"], {"format": "xml"}),
    ],
    ids=str,
)
def test_wrong_arguments_are_usage_errors(arguments, options, db):
    from workflow_storage import create_storage_backend

    create_storage_backend().runs.add(new_run(id="the-run"))
    with pytest.raises(CommandError) as caught:
        call_command(*arguments, **options)
    assert caught.value.returncode == 2


def test_a_command_that_reads_makes_no_file(tmp_path):
    for command in (["list_runs"], ["show_run", "x"]):
        with pytest.raises(CommandError, match="There is no file"):
            call_command(*command, backend=f"sqlite:///{tmp_path}/typo.db")
    assert list(tmp_path.iterdir()) == []


def test_without_a_backend_the_commands_read_the_projects_own(db):
    from workflow_storage import create_storage_backend

    create_storage_backend().runs.add(new_run(id="own"))
    assert "own" in run_command("list_runs")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("copy_runs", "--from", "sqlite:///gone.db", "--to", "sqlite"), "There is no file"),
        (("copy_runs", "--from", "mongodb://x", "--to", "sqlite"), "Unsupported storage backend"),
        (("copy_runs", "--from", "default"), "--to"),
        (("copy_runs", "--from", "default", "--to", "redis://127.0.0.1:1"), "is unavailable"),
        (
            ("copy_runs", "--from", "default", "--to", "default", "--move"),
            "are the same store",  # for the transaction here is the test's
        ),
        (("export_runs", "/gone/runs.jsonl"), "No such file or directory"),
        (("import_runs", "gone.jsonl"), "No such file or directory"),
        (("export_runs", "x", "--since", "soon"), "is no time"),
        (("export_runs", "x", "--since", "2026-02-31"), "is no time"),
    ],
)
def test_what_the_user_of_a_transfer_can_mend_is_a_command_error(
    arguments, message, db, tmp_path, monkeypatch
):
    from workflow_storage import create_storage_backend

    monkeypatch.chdir(tmp_path)
    stored_run(create_storage_backend())
    with pytest.raises(CommandError, match=message):
        call_command(*arguments)
    assert list(tmp_path.iterdir()) == []

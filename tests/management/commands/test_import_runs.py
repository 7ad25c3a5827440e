"""``import_runs``: runs from a file, and what is said of a damaged one."""

import json

from tests.management.conftest import run_transfer
from workflow_storage import export_runs
from workflow_storage.testing import stored_run


def test_damaged_lines_are_named_and_the_command_fails(source, target, redis_url, tmp_path):
    stored_run(source)
    path = tmp_path / "runs.jsonl"
    list(export_runs(source, path))
    path.write_text("\n{}\n" + path.read_text() + "no JSON\n")

    out, err, error = run_transfer("import_runs", str(path), "--backend", redis_url)

    assert "Line 2: it is no run" in err
    assert "Line 4: it is no JSON" in err
    assert error == "2 of them did not go well; see above."
    assert "1 imported" in out


def test_programs_get_a_record_of_each_run_and_of_each_damaged_line(
    source, target, redis_url, tmp_path
):
    run = stored_run(source)
    path = tmp_path / "runs.jsonl"
    list(export_runs(source, path))
    path.write_text("{}\n" + path.read_text())

    out, _, error = run_transfer("import_runs", str(path), "--backend", redis_url, "--format=json")

    damaged, imported = json.loads(out)
    assert list(imported.values()) == [run.id, "copied", 0, False, None, None]
    assert list(damaged) == ["run_id", "outcome", "states", "deleted", "reason", "line"]
    assert (damaged["run_id"], damaged["outcome"], damaged["line"]) == (None, "damaged", 1)
    assert damaged["reason"].startswith("it is no run")
    assert error == "1 of them did not go well; see above."


def test_a_file_that_is_no_export_is_said_once(target, redis_url, tmp_path):
    path = tmp_path / "access.log"
    path.write_text("GET /\n" * 5000)

    out, err, error = run_transfer("import_runs", str(path), "--backend", redis_url)

    assert (out, err) == ("", "")
    assert error.startswith(f"{path} is no export of runs: in line 1, it is no JSON")


def test_an_export_without_runs_is_one(source, target, redis_url, tmp_path):
    path = tmp_path / "runs.jsonl.gz"
    list(export_runs(source, path))

    out, _, error = run_transfer("import_runs", str(path), "--backend", redis_url)

    assert out.startswith("0 runs: 0 imported")
    assert error is None

"""``export_runs``: runs into a file, or to standard output."""

import json
import subprocess
import sys
from pathlib import Path

from tests.management.conftest import run_transfer
from workflow_storage.testing import stored_run

ROOT = Path(__file__).parents[3]


def test_export_and_import_go_through_a_file(source, target, sqlite_url, redis_url, tmp_path):
    run = stored_run(source, inputs={"a": 1})
    source.states.save_state(run.id, {"b": 2}, "node")
    path = tmp_path / "runs.jsonl.gz"

    out, _, error = run_transfer("export_runs", str(path), "--backend", sqlite_url)
    assert (out.partition(";")[0], error) == (
        "1 run: 1 written, 0 updated, 0 unchanged, 0 refused",
        None,
    )
    out, _, error = run_transfer("import_runs", str(path), "--backend", redis_url)
    assert (out.partition(",")[0], error) == ("1 run: 1 imported", None)

    assert target.runs.get(run.id).inputs == {"a": 1}
    assert target.states.get_latest_state(run.id) == {"b": 2}


def test_so_many_runs_are_exported_of_those_after_another_one(any_backend, any_url, tmp_path):
    for number in range(40):
        stored_run(any_backend, id=f"{number:02}")
    path = tmp_path / "runs.jsonl"

    out, _, error = run_transfer(
        *("export_runs", str(path), "--before=35", "--limit=30", "--format=jsonl"),
        *("--backend", any_url),
    )

    exported = [json.loads(line)["run"]["id"] for line in path.read_text().splitlines()]
    assert exported == [f"{number:02}" for number in range(34, 4, -1)]
    records = [json.loads(line) for line in out.splitlines()]
    assert [record["run_id"] for record in records] == exported
    assert {record["outcome"] for record in records} == {"copied"}
    assert error is None


def test_records_have_no_place_on_a_standard_output_that_gets_the_runs(source, sqlite_url):
    stored_run(source)
    command = [sys.executable, "manage.py", "export_runs", "/dev/stdout", "--format=jsonl"]

    done = subprocess.run(
        [*command, "--backend", sqlite_url], cwd=ROOT, capture_output=True, check=False
    )

    assert (done.returncode, done.stdout) == (2, b"")
    assert b"--format is for what is said of each run" in done.stderr


def test_runs_can_be_exported_to_standard_output(source, tmp_path, sqlite_url):
    run = stored_run(source)
    command = [sys.executable, "manage.py", "export_runs", "/dev/stdout", "--backend", sqlite_url]

    piped = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    with (tmp_path / "all").open("wb") as file:
        file.write(b"what was there\n")
        file.flush()
        subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.DEVNULL, check=True)

    assert json.loads(piped.stdout)["run"]["id"] == run.id
    assert piped.stderr.startswith(b"1 run: 1 written")
    first, line = (tmp_path / "all").read_bytes().splitlines()
    assert (first, line) == (b"what was there", piped.stdout.strip())

"""The demo, as a user runs it: in a process of its own, on an empty database."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from django.core.management import CommandError, call_command

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent


def manage(*args, url, **kwargs):
    env = {**os.environ, "DATABASE_URL": url, "DJANGO_SETTINGS_MODULE": "testproject.settings"}
    return subprocess.run(  # noqa: PLW1510 - the tests look at the code themselves
        [sys.executable, "manage.py", *map(str, args)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        **kwargs,
    )


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path}/workflows.db"


def test_the_demo_completes_fails_and_resumes_and_works_twice(url):
    first = manage("demo", url=url)
    second = manage("demo", url=url)

    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert re.search(
        r"failed in statistics-\d+, after statistics-\d+ \(step \d+\): 'utf-8'", first.stdout
    )
    assert re.search(r"went on after step \d+ and completed at step \d+", first.stdout)
    assert "5. All runs with the label document=README.md: 3, of which 2 completed" in first.stdout
    assert re.search(r"with the password \S+ \(shown only now\)", first.stdout)
    assert "shown only now" not in second.stdout
    assert second.stdout.count("completed  ") == 4
    run_id = re.search(r"show_run (\S+)", first.stdout)[1]
    shown = manage("show_run", run_id, url=url)
    assert "document-digest" in shown.stdout


def test_the_demo_leaves_a_failed_run_that_says_where_why_and_what_it_cost(url):
    demo = manage("demo", url=url)

    run_id = re.search(r"At the failed one: .* show_run (\S+)", demo.stdout)[1]
    run = json.loads(manage("show_run", run_id, "--format=json", url=url).stdout)
    assert run["status"] == "failed"
    assert run["current_node"].startswith("statistics-")
    summary = run["error_message"].partition("\n\n")[0]
    assert summary.startswith("UnicodeDecodeError: 'utf-8' codec can't decode byte 0xff")
    assert summary.endswith(f"Read by {run['current_node']}, from {ROOT / 'README.md'}")
    assert Path(run["inputs"]["document"]).is_file()
    assert run["total_tokens"] == sum(state["tokens"] or 0 for state in run["states"]) > 0
    assert run["total_cost_usd"] > 0


@pytest.mark.slow
def test_the_demo_stores_many_runs_once_and_deletes_them_again_and_nothing_else(url):
    many = manage("demo", "--many", 60, url=url)
    again = manage("demo", "--many", 60, url=url)
    manage("demo", url=url)
    deleted = manage("demo", "--delete", url=url)

    assert many.returncode == 0, many.stderr
    assert "Stored 60 runs of the last 30 days" in many.stdout
    assert re.search(r"Delete them again: .* manage.py demo --delete\n", many.stdout)
    assert again.returncode == 1
    assert "Runs of --seed 2024 are there already. Delete them with" in again.stderr
    assert "Deleted 60 runs" in deleted.stdout
    left = json.loads(manage("list_runs", "--format=json", url=url).stdout)
    assert {run["workflow_name"] for run in left} == {"document-digest"}


@pytest.mark.parametrize("count", ["0", "-1", "x", "1.5"])
def test_the_demo_refuses_a_number_of_runs_that_is_none(count):
    with pytest.raises(CommandError, match="is no whole number of 1 or more"):
        call_command("demo", f"--many={count}", "--backend=memory://refused")
    with pytest.raises(CommandError, match="is no whole number of 1 or more"):
        call_command("demo", many=count, backend="memory://refused")


def test_the_demo_takes_any_text_document(url, tmp_path):
    document = tmp_path / "ein Brief ä.txt"
    document.write_text("No headings here. Just a few words, äöü.\n" * 3)

    result = manage("demo", document, url=url)

    assert result.returncode == 0, result.stderr
    assert "1 sections" in result.stdout


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), (b"\xff\xfe\x00", "is not UTF-8 text"), (b"", "no text to speak of")],
)
def test_the_demo_says_what_is_wrong_with_a_document(url, tmp_path, content, message):
    document = tmp_path / "document"
    if content is not None:
        document.write_bytes(content)

    result = manage("demo", document, url=url)

    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr

"""The demo, as a user runs it: in a process of its own, on an empty database."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
    assert "4. All runs with the label document=README.md: 2, of which 2 completed" in first.stdout
    assert re.search(r"with the password \S+ \(shown only now\)", first.stdout)
    assert "shown only now" not in second.stdout
    assert second.stdout.count("completed  ") == 4
    run_id = re.search(r"show_run (\S+)", first.stdout)[1]
    shown = manage("show_run", run_id, url=url)
    assert "document-digest" in shown.stdout


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

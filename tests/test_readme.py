"""The code of every README runs, and prints what it says."""

import io
import os
import re
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
TESTED = re.compile(r"<!-- tested -->\n```python\n(.*?)```", re.DOTALL)


def examples():
    """Yield each tested block, named after its README: ``recorder/README.md-2``."""
    for path in [ROOT / "README.md", *sorted((ROOT / "workflow_storage").rglob("README.md"))]:
        name = path.relative_to(ROOT).as_posix().removeprefix("workflow_storage/")
        for number, code in enumerate(TESTED.findall(path.read_text()), start=1):
            yield pytest.param(code, id=f"{name}-{number}")


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("code", list(examples()))
def test_an_example_prints_what_it_says(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = io.StringIO()
    with redirect_stdout(out):
        exec(compile(code, "README.md", "exec"), {"__name__": "readme"})

    assert out.getvalue().splitlines() == re.findall(r"print\(.*\) +# (.*)", code)


def test_the_first_example_also_runs_in_a_plain_script(tmp_path):
    environment = {name: value for name, value in os.environ.items() if "DJANGO" not in name}

    result = subprocess.run(
        [sys.executable, "-c", TESTED.findall(README)[0]],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )

    assert result.stdout.split() == ["42", "812", "1"]
    assert (tmp_path / "workflows.db").exists()


def test_the_commands_make_their_own_environment():
    commands = re.findall(r"^python3 -m venv .*$", README, re.M)
    assert len(commands) == 2
    assert commands[0].endswith("manage.py demo")
    assert commands[1].endswith("pytest")

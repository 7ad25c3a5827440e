"""The README's code runs, and says what it prints."""

import io
import re
from contextlib import redirect_stdout
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
EXAMPLES = re.findall(r"<!-- tested -->\n```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("code", EXAMPLES)
def test_an_example_prints_what_it_says(code):
    out = io.StringIO()
    with redirect_stdout(out):
        exec(compile(code, "README.md", "exec"), {"__name__": "readme"})

    assert out.getvalue().splitlines() == re.findall(r"print\(.*\) +# (.*)", code)


def test_the_commands_make_their_own_environment():
    commands = re.findall(r"^python3 -m venv .*$", README, re.M)
    assert len(commands) == 2
    assert commands[0].endswith("manage.py demo")
    assert commands[1].endswith("pytest")

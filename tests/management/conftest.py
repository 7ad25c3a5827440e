"""What the tests of the commands share: calling one, and two stores to transfer runs between."""

import io
import os
import pty
import sys

import pytest
from django.core.management import CommandError, call_command

from tests.conftest import emptied


@pytest.fixture
def source(sqlite_url, django_db_blocker):
    yield from emptied(sqlite_url, django_db_blocker)


@pytest.fixture
def target(redis_url, django_db_blocker):
    yield from emptied(redis_url, django_db_blocker)


@pytest.fixture
def keyboard(monkeypatch):
    """A terminal as standard input, and what types on it."""
    end, other_end = pty.openpty()
    with os.fdopen(other_end) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        yield lambda text: os.write(end, text.encode())
    os.close(end)


def run_command(*args, **options):
    """Return what a command prints."""
    out = io.StringIO()
    call_command(*args, stdout=out, **options)
    return out.getvalue()


def run_transfer(*args):
    """Return what a command prints, what it complains of, and the error that it ends with."""
    out, err = io.StringIO(), io.StringIO()
    try:
        call_command(*args, stdout=out, stderr=err)
    except CommandError as exc:
        return out.getvalue(), err.getvalue(), str(exc)
    return out.getvalue(), err.getvalue(), None

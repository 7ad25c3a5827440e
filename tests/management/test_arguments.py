"""How the values of arguments are read."""

from argparse import ArgumentTypeError
from datetime import UTC, datetime

import pytest

from workflow_storage.management.arguments import moment


def test_times_are_read_in_the_projects_time_zone(settings):
    settings.TIME_ZONE = "America/New_York"
    assert moment("2026-01-31") == datetime(2026, 1, 31, 5, tzinfo=UTC)
    assert moment("2026-01-31T12:00+00:00") == datetime(2026, 1, 31, 12, tzinfo=UTC)
    settings.USE_TZ = False
    assert moment("2026-01-31T12:00") == datetime(2026, 1, 31, 12)
    with pytest.raises(ArgumentTypeError, match="is no time"):
        moment("0001-01-01T00:00+14:00")

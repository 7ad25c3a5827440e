"""The arguments that commands have in common, and how their values are read.

Every command takes its store, its selection of runs and its times from here, so that they
are called the same everywhere. What reads a value takes text, from a terminal, and the value
itself, from ``call_command()``, which passes on what it is given.
"""

from __future__ import annotations

import re
from argparse import ArgumentTypeError
from datetime import date as date_type
from datetime import datetime, timedelta
from datetime import time as time_of_day
from typing import TYPE_CHECKING, Any

from django.utils.dateparse import parse_date, parse_datetime, parse_duration

from workflow_storage.status import RunStatus
from workflow_storage.validation import in_project_time

if TYPE_CHECKING:
    from argparse import ArgumentParser

    from workflow_storage.base import RunFilters

STORE = "NAME|URL|sqlite"
"""How the help shows what names a store."""

UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
"""The units of a duration, as `timedelta` calls them."""


def add_backend(parser: ArgumentParser) -> None:
    """Add ``--backend``."""
    parser.add_argument(
        "--backend",
        metavar=STORE,
        help="Which store: a name in DATABASES or a URL. Default: the project's own.",
    )


def add_run_filters(parser: ArgumentParser) -> None:
    """Add ``--workflow`` and ``--status``."""
    parser.add_argument("--workflow", metavar="NAME", help="Only runs of this workflow.")
    parser.add_argument(
        "--status",
        action="append",
        choices=RunStatus.values,
        help="Only runs in this status; may be given several times.",
    )


def add_filters(parser: ArgumentParser) -> None:
    """Add ``--workflow``, ``--status`` and ``--started-before``; `filters_of` reads them."""
    add_run_filters(parser)
    parser.add_argument(
        "--started-before",
        type=moment,
        metavar="TIME",
        help="Only runs started earlier: 2026-01-31, or 2026-01-31T12:00, in the project's time "
        "zone unless it has one.",
    )


def filters_of(options: dict[str, Any]) -> RunFilters:
    """Return the filters that the arguments of `add_filters` mean."""
    return {
        "workflow_name": options["workflow"],
        "status": options["status"],
        "started_before": None
        if options["started_before"] is None
        else moment(options["started_before"]),
    }


def moment(value: object) -> datetime:
    """Read a date or a time, in the project's time zone unless it has one.

    Raises:
        ArgumentTypeError: if it is neither.
    """
    try:
        if isinstance(value, datetime):
            return in_project_time(value)
        date = value if isinstance(value, date_type) else parse_date(str(value))
        time = None if date is None else datetime.combine(date, time_of_day.min)
        time = time or parse_datetime(str(value))
        if time is not None:
            return in_project_time(time)
    except (ValueError, OverflowError):
        pass
    raise ArgumentTypeError(f"{value!r} is no time. Write 2026-01-31 or 2026-01-31T12:00.")


def duration(value: object) -> timedelta:
    """Read how long something takes, such as ``15m``.

    Raises:
        ArgumentTypeError: if it is no such text, or longer than a `timedelta` can be.
    """
    if isinstance(value, timedelta):
        return value
    text = str(value).strip()
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    try:
        # As a timedelta is written: call_command() makes text of an argument that is required.
        given = timedelta(**{UNITS[match[2]]: float(match[1])}) if match else _as_written(text)
    except OverflowError as exc:
        raise ArgumentTypeError(f"{value!r} is too long.") from exc
    if given is None:
        raise ArgumentTypeError(f"{value!r} is no time. Write a number with s, m, h or d: 15m.")
    return given


def _as_written(text: str) -> timedelta | None:
    return parse_duration(text) if ":" in text else None


def count(value: object) -> int:
    """Read how many, 1 or more.

    Raises:
        ArgumentTypeError: if it is no whole number, or less.
    """
    text = str(value)
    if not re.fullmatch(r"\d{1,9}", text) or int(text) < 1:
        raise ArgumentTypeError(f"{value!r} is no whole number of 1 or more.")
    return int(text)

"""The arguments that commands have in common, and how their values are read.

Every command takes its store, its selection of runs and its times from here, so that they
are called the same everywhere.
"""

from __future__ import annotations

import re
from argparse import ArgumentTypeError
from datetime import datetime, timedelta
from datetime import time as time_of_day
from typing import TYPE_CHECKING, Any

from django.utils.dateparse import parse_date, parse_datetime

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
        "started_before": options["started_before"],
    }


def moment(text: str) -> datetime:
    """Read a date or a time, in the project's time zone unless it has one.

    Raises:
        ArgumentTypeError: if it is neither.
    """
    try:
        date = parse_date(text)
        value = parse_datetime(text) if date is None else datetime.combine(date, time_of_day.min)
        value = None if value is None else in_project_time(value)
    except (ValueError, OverflowError):
        value = None
    if value is None:
        raise ArgumentTypeError(f"{text!r} is no time. Write 2026-01-31 or 2026-01-31T12:00.")
    return value


def duration(text: str) -> timedelta:
    """Read how long something takes, such as ``15m``.

    Raises:
        ArgumentTypeError: if it is no such text, or longer than a `timedelta` can be.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text.strip())
    if match is None:
        raise ArgumentTypeError(f"{text!r} is no time. Write a number with s, m, h or d: 15m.")
    try:
        return timedelta(**{UNITS[match[2]]: float(match[1])})
    except OverflowError as exc:
        raise ArgumentTypeError(f"{text!r} is too long.") from exc

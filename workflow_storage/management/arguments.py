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
from typing import TYPE_CHECKING, Any, TypeVar

from django.utils import timezone
from django.utils.dateparse import parse_date, parse_datetime, parse_duration

from workflow_storage.status import RunStatus
from workflow_storage.validation import in_project_time

if TYPE_CHECKING:
    from argparse import ArgumentParser
    from collections.abc import Callable

    from workflow_storage.base import RunFilters

STORE = "NAME|URL|sqlite"
"""How the help shows what names a store."""

UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
"""The units of a duration, as `timedelta` calls them."""

AGE = re.compile(r"(\d+(?:\.\d+)?)([smhd])")
"""A duration as text."""

TIMEDELTA = re.compile(r"(\d+ days?, )?\d+:\d\d:\d\d(\.\d+)?")
"""A `timedelta` as text, which call_command() makes of an argument that is required."""

SHORTEST_PAUSE = 0.1
"""Seconds between two looks at a store, at least."""

_T = TypeVar("_T")


def add_backend(parser: ArgumentParser) -> None:
    """Add ``--backend``."""
    parser.add_argument(
        "--backend",
        metavar=STORE,
        help="Which store: a name in DATABASES or a URL. Default: the project's own.",
    )


def add_selection(parser: ArgumentParser, *, default_limit: int | None = None) -> None:
    """Add what selects runs; `selection_of` reads it, and `selection.selected`."""
    add_narrow_selection(parser)
    for name, what in (("since", "at this time or later"), ("until", "before this time")):
        parser.add_argument(
            f"--{name}",
            type=moment_or_age,
            metavar="TIME",
            help=f"Only runs started {what}: 2026-01-31, 2026-01-31T12:00 (in the project's time "
            "zone unless it has one), or how long ago: 90m, 7d.",
        )
    parser.add_argument(
        "--waiting", action="store_true", help="Only runs that were suspended, and wait."
    )
    parser.add_argument(
        "--error",
        metavar="TEXT",
        help="Only runs whose error has this text, in upper or lower case. SQL databases only: "
        "Redis has no search over errors.",
    )
    parser.add_argument(
        "--before",
        metavar="ID",
        help="Only runs that come after the run with this id, newest first: the next page, or where "
        "something was interrupted.",
    )
    add_limit(parser, default=default_limit)


def add_narrow_selection(parser: ArgumentParser) -> None:
    """Add what selects runs and is not of their start; `narrow_selection_of` reads it."""
    parser.add_argument(
        "--workflow",
        action="append",
        metavar="NAME",
        help="Only runs of this workflow; may be given several times, for any of them.",
    )
    parser.add_argument(
        "--status",
        action="append",
        choices=RunStatus.values,
        help="Only runs in this status; may be given several times, for any of them.",
    )
    parser.add_argument(
        "--label",
        action="append",
        type=label,
        metavar="NAME=VALUE",
        help="Only runs with this label; may be given several times, for all of them.",
    )
    parser.add_argument(
        "--parent", metavar="ID", help="Only runs that this run started, or forks of it."
    )


def add_dry_run(parser: ArgumentParser, what: str) -> None:
    """Add ``--dry-run``, with what is done then."""
    parser.add_argument("--dry-run", action="store_true", help=what)


def add_limit(parser: ArgumentParser, default: int | None = None) -> None:
    """Add ``--limit``."""
    parser.add_argument(
        "--limit",
        type=count,
        default=default,
        metavar="N",
        help="So many of these runs at most. Default: "
        + ("all." if default is None else "%(default)s."),
    )


def selection_of(options: dict[str, Any]) -> RunFilters:
    """Return the filters that the arguments of `add_selection` mean, now where they are ages."""
    return {
        **narrow_selection_of(options),
        "started_after": given(moment, options["since"]),
        "started_before": given(moment, options["until"]),
        "waiting": options["waiting"] or None,
        "error": options["error"],
    }


def narrow_selection_of(options: dict[str, Any]) -> RunFilters:
    """Return the filters that the arguments of `add_narrow_selection` mean."""
    return {
        "workflow_name": options["workflow"],
        "status": options["status"],
        "labels": labels_of(options["label"]),
        "parent_id": options["parent"],
    }


def limit_of(options: dict[str, Any]) -> int | None:
    """Return what ``--limit`` means."""
    return given(count, options["limit"])


def given(read: Callable[[Any], _T], value: object) -> _T | None:
    """Read a value that may not be given."""
    return None if value is None else read(value)


def label(value: object) -> tuple[str, str]:
    """Read a label, such as ``tenant=acme``.

    Raises:
        ArgumentTypeError: if it is no such text.
    """
    if isinstance(value, tuple):
        name, text = value
        return name, text
    name, equals, text = str(value).partition("=")
    if not (name and equals and text):
        raise ArgumentTypeError(f"{value!r} is no label. Write NAME=VALUE.")
    return name, text


def labels_of(values: object) -> dict[str, str] | None:
    """Return labels as a dict, from a dict, or from what `label` reads one of.

    Raises:
        ArgumentTypeError: if one is no label, or has two values.
    """
    if values is None or isinstance(values, dict):
        return values
    several = [values] if isinstance(values, str) else list(values)  # type: ignore[call-overload]
    labels: dict[str, str] = {}
    for name, text in map(label, several):
        if labels.setdefault(name, text) != text:
            raise ArgumentTypeError(
                f"The label {name!r} is there with two values, and a run has one. Leave one out."
            )
    return labels


def moment(value: object) -> datetime:
    """Read a date or a time, in the project's time zone unless it has one; or how long ago it is.

    Raises:
        ArgumentTypeError: if it is none of these.
    """
    try:
        if isinstance(value, datetime):
            return in_project_time(value)
        if is_age(value):
            return timezone.now() - duration(value)
        date = value if isinstance(value, date_type) else parse_date(str(value))
        time = None if date is None else datetime.combine(date, time_of_day.min)
        time = time or parse_datetime(str(value))
        if time is not None:
            return in_project_time(time)
    except (ValueError, OverflowError):
        pass
    raise ArgumentTypeError(
        f"{value!r} is no time. Write 2026-01-31 or 2026-01-31T12:00, or how long ago: 90m, 7d."
    )


def moment_or_age(value: object) -> datetime | timedelta:
    """Read what `moment` reads, but leave an age to be counted back from whenever it is used.

    Raises:
        ArgumentTypeError: if it is neither.
    """
    time = moment(value)
    return duration(value) if is_age(value) else time


def is_age(value: object) -> bool:
    """Whether a value says how long ago something is, and not when."""
    text = str(value).strip()
    return bool(AGE.fullmatch(text) or TIMEDELTA.fullmatch(text))


def duration(value: object) -> timedelta:
    """Read how long something takes, such as ``15m``.

    Raises:
        ArgumentTypeError: if it is no such text, or longer than a `timedelta` can be.
    """
    if isinstance(value, timedelta):
        return value
    text = str(value).strip()
    match = AGE.fullmatch(text)
    try:
        time = timedelta(**{UNITS[match[2]]: float(match[1])}) if match else _as_written(text)
    except OverflowError as exc:
        raise ArgumentTypeError(f"{value!r} is too long.") from exc
    if time is None:
        raise ArgumentTypeError(f"{value!r} is no time. Write a number with s, m, h or d: 15m.")
    return time


def _as_written(text: str) -> timedelta | None:
    return parse_duration(text) if TIMEDELTA.fullmatch(text) else None


def count(value: object) -> int:
    """Read how many, 1 or more.

    Raises:
        ArgumentTypeError: if it is no whole number, or less.
    """
    return _whole_number(value, least=1)


def whole_number(value: object) -> int:
    """Read a whole number of 0 or more.

    Raises:
        ArgumentTypeError: if it is none.
    """
    return _whole_number(value, least=0)


def _whole_number(value: object, least: int) -> int:
    text = str(value)
    if not re.fullmatch(r"\d{1,9}", text) or int(text) < least:
        raise ArgumentTypeError(f"{value!r} is no whole number of {least} or more.")
    return int(text)


def seconds(value: object) -> float:
    """Read a pause in seconds: a number, or a duration such as ``5m``.

    Raises:
        ArgumentTypeError: if it is neither, or less than a tenth of a second.
    """
    text = str(value).strip()
    is_number = re.fullmatch(r"\d{1,9}(\.\d+)?", text)
    pause = float(text) if is_number else duration(value).total_seconds()
    if pause < SHORTEST_PAUSE:
        raise ArgumentTypeError(f"{value!r} is too short. Write a number of seconds, such as 2.")
    return pause

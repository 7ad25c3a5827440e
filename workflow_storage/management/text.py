"""How a value is written for people, one after another in a line; for tables and messages."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

from django.utils import timezone


def as_text(value: Any) -> str:
    """Return a value as it is shown: times in the project's time zone, JSON for what has parts."""
    if value is None:
        return ""
    if isinstance(value, datetime):
        local = timezone.localtime(value) if timezone.is_aware(value) else value
        return local.strftime("%Y-%m-%d %H:%M:%S")
    if isinstance(value, dict | list | bool):
        return one_line(json.dumps(value, ensure_ascii=False))
    return one_line(str(value))


def as_seconds(value: float | None) -> str:
    """Return a duration in seconds, to the millisecond."""
    return "" if value is None else f"{value:.3f}"


def as_usd(value: float | None) -> str:
    """Return a cost in USD, to the hundredth of a cent, or as small as it is."""
    if value is None:
        return ""
    return f"{value:.4f}" if value >= 0.0001 or value == 0 else f"{value:.2g}"


def as_count(value: int | None) -> str:
    """Return a number of something, with commas."""
    return "" if value is None else f"{value:,}"


def as_share(value: float | None) -> str:
    """Return a share from 0 to 1 in percent; 100% is all of them."""
    if value is None:
        return ""
    # What is nearly all is not all: 99.96 % would be shown as 100.0%.
    percent = min(value * 100, 99.9) if value < 1 else 100.0
    return f"{percent:.1f}%"


def counted(number: int, noun: str, several: str | None = None) -> str:
    """Return how many there are of something: ``1 run``, ``2,000 runs``."""
    return f"{number:,} {noun if number == 1 else several or noun + 's'}"


def first_line(text: str | None) -> str:
    """Return the first line of a text that says something."""
    return next((line.strip() for line in (text or "").splitlines() if line.strip()), "")


def one_line(text: str) -> str:
    """Escape what would begin a new line, or control the terminal rather than be shown."""
    return "".join(
        character if character.isprintable() else _escaped(character) for character in text
    )


def printable(text: str) -> str:
    """Do the same, but leave line feeds and tabs."""
    return "".join(
        character if character.isprintable() or character in "\n\t" else _escaped(character)
        for character in text
    )


def writable(text: str, encoding: str | None) -> str:
    """Escape what an encoding has no form for."""
    encoding = encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _escaped(character: str) -> str:
    return ascii(character)[1:-1]

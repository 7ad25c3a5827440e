"""How values are shown on the pages of the admin, whichever page it is."""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING, Any

from django.utils import formats, timezone
from django.utils.html import format_html, format_html_join
from django.utils.safestring import mark_safe
from django.utils.timesince import timesince
from django.utils.translation import gettext as _
from django.utils.translation import npgettext_lazy

from workflow_storage.status import RunStatus

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    from django.utils.safestring import SafeString

    from workflow_storage.models import WorkflowRun

NOTHING = "-"
"""What is shown for a value that is not there."""

SHOWN_CHARACTERS = 100_000
"""Characters of an error that a page shows."""

LEAST_COST = 0.0001
"""The smallest cost that is shown, in US dollars."""

TRACEBACK = "Traceback (most recent call last):"
"""How Python begins to say where an exception was raised; its last line says which."""

SHORT_ID = 14
"""Characters of an id that is shown whole."""

# Django's own words for `timesince`, which some languages inflect here.
_AGO: dict[str, Any] = {
    "year": npgettext_lazy("ago", "%(num)d year", "%(num)d years", "num"),
    "month": npgettext_lazy("ago", "%(num)d month", "%(num)d months", "num"),
    "week": npgettext_lazy("ago", "%(num)d week", "%(num)d weeks", "num"),
    "day": npgettext_lazy("ago", "%(num)d day", "%(num)d days", "num"),
    "hour": npgettext_lazy("ago", "%(num)d hour", "%(num)d hours", "num"),
    "minute": npgettext_lazy("ago", "%(num)d minute", "%(num)d minutes", "num"),
}


def status_badge(run: WorkflowRun, mark: str = "") -> SafeString:
    """Return the status of a run in its colour, with what else is to be known of it.

    Args:
        run: the run.
        mark: such as ``stalled``; nothing for none.
    """
    badge = format_html(
        '<span class="workflow-storage-status workflow-storage-{}">{}</span>',
        run.status,
        run.get_status_display(),
    )
    if not mark:
        return badge
    return format_html('{} <span class="workflow-storage-mark">{}</span>', badge, mark)


def duration_text(seconds: float | None) -> str:
    """Return a duration: as seconds below a minute, then as minutes, then as hours."""
    if seconds is None:
        return NOTHING
    if seconds < 0.9995:
        return f"{_localized(seconds * 1000, 3)} ms" if seconds else "0 s"
    if seconds < 59.95:
        return f"{_localized(seconds, 3)} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02} min"


def time_taken(run: WorkflowRun) -> str:
    """Return how long a run took, or takes by now, all attempts together."""
    if run.status != RunStatus.RUNNING:
        return duration_text(run.duration_seconds)
    since = run.attempt_started_at or run.started_at
    elapsed = max(0.0, (timezone.now() - since).total_seconds())
    return duration_text(elapsed + (run.duration_seconds or 0.0))


def _localized(value: float, digits: int) -> str:
    """Return a number with so many digits that count, in the way of the current language."""
    # Rounded here, for Django cuts; in decimal, for in binary 41.6 is not 41.6.
    text = f"{Decimal(f'{value:.{digits}g}'):f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return formats.number_format(text, decimal_pos=len(text.partition(".")[2]))


def tokens_text(tokens: int | None) -> str:
    """Return a number of tokens with separators."""
    return NOTHING if tokens is None else count_text(tokens)


def count_text(count: int) -> str:
    """Return a whole number with separators, in the way of the current language."""
    return formats.number_format(count, use_l10n=True, force_grouping=True)


def cost_text(usd: float | None) -> str:
    """Return a cost in US dollars; one that is too small to be shown is not shown as none."""
    if usd is None:
        return NOTHING
    is_less = 0 < usd < LEAST_COST / 2
    shown = LEAST_COST if is_less else usd
    text = dollars_text(formats.number_format(f"{shown:.4f}", 4, force_grouping=True))
    return f"<{text}" if is_less else text


def dollars_text(amount: str) -> str:
    """Return an amount, written as the current language does, with the sign of the US dollar."""
    return _("$%(amount)s") % {"amount": amount}


def short_id(run_id: str) -> SafeString:
    """Return an id shortened, whole on hover and for copying."""
    shown = run_id if len(run_id) <= SHORT_ID else f"{run_id[:8]}…{run_id[-4:]}"
    return format_html(
        '<code class="workflow-storage-id" title="{}" data-copy="{}">{}</code>',
        run_id,
        run_id,
        shown,
    )


def time_ago(moment: datetime | None) -> SafeString | str:
    """Return how long ago a time was, and when on hover."""
    if moment is None:
        return NOTHING
    return format_html(
        '<time datetime="{}" title="{}">{}</time>',
        moment.isoformat(),
        exact_time(moment),
        ago_text(moment),
    )


def ago_text(moment: datetime) -> str:
    """Return how long ago a time was, in words."""
    now = timezone.now()
    if (now - moment).total_seconds() < 60:
        return _("just now")
    return _("%(time)s ago") % {"time": timesince(moment, now, time_strings=_AGO, depth=1)}


def exact_time(moment: datetime) -> str:
    """Return a time with its seconds, in the current time zone."""
    local = timezone.localtime(moment) if timezone.is_aware(moment) else moment
    date, point = formats.date_format(local, "DATE_FORMAT"), formats.get_format("DECIMAL_SEPARATOR")
    return f"{date}, {local:%H:%M:%S}{point}{local.microsecond // 1000:03}"


def labels_block(labels: Mapping[str, str], urls: Mapping[str, str]) -> SafeString:
    """Return labels, each a link to the runs that have it.

    Args:
        labels: names and texts, masked.
        urls: by name; a label without one is no link.
    """
    shown = []
    for name, value in labels.items():
        link = format_html('<a href="{}"', urls[name]) if name in urls else mark_safe("<span")
        end = mark_safe("</a>" if name in urls else "</span>")
        text = value if len(value) <= 24 else f"{value[:23]}…"
        shown.append((link, name, value, name, text, end))
    return format_html_join(
        " ", '{} class="workflow-storage-label" title="{}={}"><b>{}</b> {}{}', shown
    )


def first_line(text: str | None, limit: int = 160, *, end: str | None = None) -> str:
    """Return the first line of a text that says something, cut where it is long.

    Of a traceback that is the line of its exception.

    Args:
        text: the text, or how it begins.
        limit: characters that are shown.
        end: how the text ends, if `text` is not all of it.
    """
    lines = (line.strip() for line in (text or "").splitlines())
    line = exception_line(text, end) or next(filter(None, lines), "")
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


def exception_line(text: str | None, end: str | None = None) -> str:
    """Return the last line of a traceback that is not indented; nothing for another text.

    Args:
        text: the text, or how it begins.
        end: how the text ends, if `text` is not all of it.
    """
    if not (text or "").lstrip().startswith(TRACEBACK):
        return ""
    lines = reversed((end or text or "").splitlines())
    line = next((line.rstrip() for line in lines if line.strip() and not line[0].isspace()), "")
    return "" if line.startswith(TRACEBACK) else line


def text_block(text: str | None) -> SafeString | str:
    """Return text with its line breaks, cut where it is too long for a page."""
    if not text:
        return NOTHING
    shown = printable(text[:SHOWN_CHARACTERS])
    block = format_html(
        '<pre class="workflow-storage-json" dir="auto" tabindex="0" aria-label="{}">{}</pre>',
        _("Text"),
        shown,
    )
    if len(text) <= SHOWN_CHARACTERS:
        return block
    return format_html(
        '{}<p class="help">{}</p>',
        block,
        _("The first %(shown)s of %(total)s characters.")
        % {"shown": count_text(SHOWN_CHARACTERS), "total": count_text(len(text))},
    )


def printable(text: str) -> str:
    """Return text without what no page can hold: lone surrogates and NUL."""
    return text.encode("utf-8", "replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")

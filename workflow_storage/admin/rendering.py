"""How values are shown on the pages of the admin, whichever page it is."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from django.utils.html import format_html
from django.utils.translation import gettext as _

if TYPE_CHECKING:
    from django.utils.safestring import SafeString

    from workflow_storage.models import WorkflowRun

NOTHING = "-"
"""What is shown for a value that is not there."""

SHOWN_CHARACTERS = 100_000
"""Characters of a payload or an error that a page shows."""


def status_badge(run: WorkflowRun) -> SafeString:
    """Return the status of a run in its colour."""
    return format_html(
        '<span class="workflow-storage-status workflow-storage-{}">{}</span>',
        run.status,
        run.get_status_display(),
    )


def duration_text(seconds: float | None) -> str:
    """Return a duration: as seconds below a minute, then as minutes, then as hours."""
    if seconds is None:
        return NOTHING
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02} min"


def tokens_text(tokens: int | None) -> str:
    """Return a number of tokens with separators."""
    return NOTHING if tokens is None else f"{tokens:,}"


def cost_text(usd: float | None) -> str:
    """Return a cost in US dollars; small ones are the rule."""
    return NOTHING if usd is None else f"${usd:,.4f}"


def json_block(value: Any) -> SafeString | str:
    """Return a payload as indented JSON, cut where it is too long for a page."""
    if value is None:
        return NOTHING
    text = json.dumps(value, indent=2, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # A lone surrogate, which no page can hold.
        text = json.dumps(value, indent=2)
    return text_block(text)


def text_block(text: str | None) -> SafeString | str:
    """Return text with its line breaks, cut where it is too long for a page."""
    if not text:
        return NOTHING
    if len(text) <= SHOWN_CHARACTERS:
        return format_html('<pre class="workflow-storage-json">{}</pre>', text)
    return format_html(
        '<pre class="workflow-storage-json">{}</pre><p class="help">{}</p>',
        text[:SHOWN_CHARACTERS],
        _("The first %(shown)s of %(total)s characters.")
        % {"shown": f"{SHOWN_CHARACTERS:,}", "total": f"{len(text):,}"},
    )

"""What changed between two payloads or states, as a table for the pages of the admin."""

from __future__ import annotations

import json
from bisect import bisect_left
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any, NamedTuple

from django.template.loader import render_to_string
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy, ngettext

from workflow_storage.admin.rendering import count_text
from workflow_storage.diff import Change, TextLine, diff, path_text, text_difference

if TYPE_CHECKING:
    from collections.abc import Iterator

    from django.utils.functional import _StrPromise
    from django.utils.safestring import SafeString

    from workflow_storage.admin.masking import Mask

SHOWN_CHANGES = 200
"""Changes that a page shows."""

_OPEN_TEXTS = 3
_SHORT_TEXT = 200  # characters up to which a text without line breaks is shown as JSON
_VALUE_LENGTH = 300
_PATH_LENGTH = 200
_LINE_LENGTH = 500
_LINES = 200
_TEXTS_LENGTH = 100_000  # characters of all lines, after which long texts are cut like values
_BEFORE_DIFFERENCE = 60  # characters that are kept of what two long texts begin with

_KINDS: dict[str, tuple[str, str | _StrPromise]] = {
    "added": ("+", gettext_lazy("added")),
    "removed": ("\N{MINUS SIGN}", gettext_lazy("removed")),
    "changed": ("~", gettext_lazy("changed")),
}
_CONTROL_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"} | {
    0x7F: 0x2421
}


class _Line(NamedTuple):
    kind: str
    text: str

    @property
    def sign(self) -> str:
        return _KINDS[self.kind][0] if self.kind in _KINDS else ""


class _Row(NamedTuple):
    kind: str
    path: str
    before: str = ""
    after: str = ""
    lines: list[_Line] | None = None
    """The difference of two texts, instead of both."""
    summary: str = ""
    """Says how many lines were added and removed."""
    is_open: bool = False
    is_hidden: bool = False

    @property
    def sign(self) -> str:
        return _KINDS[self.kind][0]

    @property
    def word(self) -> str | _StrPromise:
        return _KINDS[self.kind][1]


def diff_block(before: Any, after: Any, *, mask: Mask) -> SafeString:
    """Return a table of what changed between two JSON values.

    A secret that changed has a row that says so, without its values. Needs the style
    ``workflow_storage/diff.css`` beside ``workflow_storage/admin.css``.

    Args:
        before: the earlier value, not masked; the same goes for `after`.
        after: the later value.
        mask: hides secrets. It is applied to the changes, for masked values are all the same.
    """
    changes, is_complete = diff(before, after)
    rows = list(islice(_rows(changes, mask), SHOWN_CHANGES + 1))
    return render_to_string(
        "admin/workflow_storage/diff.html",
        {"rows": rows[:SHOWN_CHANGES], "more": len(rows) > SHOWN_CHANGES or not is_complete},
    )


def _rows(changes: list[Change], mask: Mask) -> Iterator[_Row]:
    secrets = set()
    texts = shown = 0
    for change in changes:
        secret = _secret_in(change.path, mask)
        if secret is not None:
            if secret not in secrets:
                secrets.add(secret)
                yield _row_of_secret(secret, change)
        elif shown < _TEXTS_LENGTH and _is_long_text(change):
            texts += 1
            row = _row_of_texts(change, is_open=texts <= _OPEN_TEXTS)
            shown += sum(len(line.text) for line in row.lines or ())
            yield row
        else:
            yield _row_of_values(change, mask)


def _secret_in(path: tuple[str | int, ...], mask: Mask) -> tuple[str | int, ...] | None:
    """Return the beginning of a path up to the first key that is hidden, if there is one.

    What stands below a secret is secret itself, its keys too.
    """
    if not mask.hides_path(path):
        return None
    ends = range(len(path) + 1)
    return path[: bisect_left(ends, True, key=lambda end: mask.hides_path(path[:end]))]


def _row_of_secret(secret: tuple[str | int, ...], change: Change) -> _Row:
    kind = change.kind if secret == change.path else "changed"
    return _Row(
        kind,
        _path(secret),
        before="" if kind == "added" else _("hidden"),
        after="" if kind == "removed" else _("hidden"),
        is_hidden=True,
    )


def _row_of_values(change: Change, mask: Mask) -> _Row:
    before = "" if change.kind == "added" else _json(change.before, mask)
    after = "" if change.kind == "removed" else _json(change.after, mask)
    before, after = _from_difference(before, after, _VALUE_LENGTH)
    return _Row(
        change.kind,
        _path(change.path),
        before=_shown(before, _VALUE_LENGTH),
        after=_shown(after, _VALUE_LENGTH),
    )


def _json(value: Any, mask: Mask) -> str:
    try:
        return json.dumps(mask.masked(value), ensure_ascii=False)
    except RecursionError:
        return _("nested too deeply to be shown")


def _path(path: tuple[str | int, ...]) -> str:
    text = path_text(path)
    if len(text) > _PATH_LENGTH:  # its end says most
        half = _PATH_LENGTH // 2
        text = f"{text[:half]}…{text[-half:]}"
    return _shown(text, _PATH_LENGTH + 1)


def _is_long_text(change: Change) -> bool:
    texts = (change.before, change.after)
    return all(isinstance(text, str) for text in texts) and any(
        len(text) > _SHORT_TEXT or "\n" in text for text in texts
    )


def _row_of_texts(change: Change, *, is_open: bool) -> _Row:
    # A text itself is no secret, for its key is none.
    found = text_difference(change.before, change.after, limit=_LINES)
    lines = [_line(line) for line in _excerpts(found.lines)]
    if found.more:
        text = ngettext("%(count)s more line", "%(count)s more lines", found.more)
        lines.append(_Line("gap", f"… {text % {'count': count_text(found.more)}}"))
    return _Row(
        change.kind,
        _path(change.path),
        lines=lines,
        summary=_("Lines: %(added)s added, %(removed)s removed")
        % {"added": count_text(found.added), "removed": count_text(found.removed)},
        is_open=is_open,
    )


def _line(line: TextLine) -> _Line:
    text = _shown(line.text, _LINE_LENGTH)
    if line.kind == "gap":
        count = int(line.text)
        text = ngettext("%(count)s line the same", "%(count)s lines the same", count)
        text = f"… {text % {'count': count_text(count)}}"
    return _Line(line.kind, text)


def _excerpts(lines: list[TextLine]) -> list[TextLine]:
    """Return lines of which the long ones begin where they differ from what they replace."""
    excerpts = list(lines)
    removed = range(0)
    end = 0
    for kind, run in groupby(lines, key=lambda line: line.kind):
        start, end = end, end + len(list(run))
        if kind == "added":
            for old, new in zip(removed, range(start, end), strict=False):
                before, after = _from_difference(lines[old].text, lines[new].text, _LINE_LENGTH)
                excerpts[old] = TextLine("removed", before)
                excerpts[new] = TextLine("added", after)
        removed = range(start, end) if kind == "removed" else range(0)
    return excerpts


def _from_difference(before: str, after: str, length: int) -> tuple[str, str]:
    """Return two texts without most of what both begin with, if one is longer than shown."""
    if max(len(before), len(after)) <= length:
        return before, after
    ends = range(1, min(len(before), len(after)) + 1)
    alike = bisect_left(ends, True, key=lambda end: before[:end] != after[:end])
    start = alike - _BEFORE_DIFFERENCE
    return (before, after) if start <= 1 else (f"…{before[start:]}", f"…{after[start:]}")


def _shown(text: str, length: int) -> str:
    """Return text of a length at most, with a visible form for all that a page cannot hold."""
    if len(text) > length:
        text = f"{text[:length]}…"
    return text.translate(_CONTROL_PICTURES).encode(errors="backslashreplace").decode()

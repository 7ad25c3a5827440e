"""A JSON value as a tree that folds, for the pages of the admin; works without JavaScript.

What is shown of a value that is too large for a page is chosen level by level, so that its first
levels are there, whatever is in them. Long texts share what room the rows leave.
"""

from __future__ import annotations

import json
import re
from collections import deque
from typing import TYPE_CHECKING, Any

from django.utils.formats import number_format
from django.utils.html import escape, format_html
from django.utils.safestring import SafeString, mark_safe
from django.utils.translation import gettext as _
from django.utils.translation import ngettext

from workflow_storage.admin.masking import MASKED
from workflow_storage.admin.rendering import NOTHING
from workflow_storage.diff import path_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from workflow_storage.admin.masking import Mask

MAX_ROWS = 5_000
"""Values that a tree shows, each in a row of its own."""

MAX_MEMBERS = 1_000
"""Values that are shown of one list or dict, so that there are rows left for what is in them."""

MAX_CHARACTERS = 2_000_000
"""Characters of keys, paths and values that a tree has, in HTML, so ``<`` counts as four."""

MAX_DEPTH = 60
"""Levels of lists and dicts that fold; what is deeper is shown as JSON text."""

LONG_TEXT = 200
"""Characters of the longest string that is shown in one line."""

PREVIEW = 80
"""Characters that are shown of a list or dict while it is folded."""

_HIDDEN = object()
"""Stands for the value of a secret."""

_encode = json.JSONEncoder(ensure_ascii=False).encode
_LINE_BREAK = re.compile(r"[\r\n]")
# Lone surrogates, and control characters that are not white space: no page can hold them.
_UNSHOWABLE = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff]")


def json_tree(
    value: Any, *, mask: Mask, download_url: str | None = None, name: str = ""
) -> SafeString:
    """Return a JSON value as HTML that folds, its top level open.

    Args:
        value: what `load_json` has read, nested as deep as it may be.
        mask: knows the keys of secrets; what is under them is not shown.
        download_url: where the value is as a file, linked below the tree, and above it if the
            page cannot hold all of it. What is there has to be masked, too.
        name: what the value is called, shown and read out as its label.

    Returns:
        HTML that needs ``workflow_storage/trees.css``. The element of each row says in
        ``data-path`` where in the value it is: ``messages[3].content``, ``headers["X-Trace"]``,
        nothing for the value itself.
    """
    if value is None:
        return mark_safe(NOTHING)
    tree = _Tree(value, mask, name)
    rows = tree.html()
    return format_html(
        '{}<div class="workflow-storage-tree" dir="ltr" role="group" tabindex="0" aria-label="{}">{}</div>{}',
        _note_on_size(value, mask, tree.rows, download_url) if tree.is_cut else "",
        _showable(name) or _("JSON"),
        rows,
        _file_link(download_url) if download_url and not tree.is_cut else "",
    )


class _Row:
    """A value that is shown, and what is shown in it."""

    __slots__ = ("children", "depth", "html", "label", "left_out", "path", "value")

    def __init__(self, label: str, path: str, value: Any, depth: int) -> None:
        self.label = label
        self.path = path
        self.value = value
        self.depth = depth
        self.html = ""
        self.children: list[_Row] = []
        self.left_out = 0


class _Tree:
    """Chooses what of a value a page can hold, and writes it."""

    def __init__(self, value: Any, mask: Mask, name: str) -> None:
        self.rows = 0
        self.is_cut = False
        self._mask = mask
        self._room = MAX_CHARACTERS
        self._long: list[_Row] = []
        # The same keys and numbers come again and again.
        self._steps: dict[str, tuple[str, str]] = {}
        self._sizes: dict[tuple[bool, int], str] = {}
        self._notes: dict[int, str] = {}
        label = _showable(name[:LONG_TEXT])
        self._top = _Row(escape(label), "", value, 0)
        self._add(self._top)
        self._choose()

    def html(self) -> SafeString:
        """Return the rows."""
        for row in self._long:
            row.html = self._long_text(row)
        return mark_safe(
            f'<div class="workflow-storage-tree-row" data-path="">{self._written(self._top)}</div>'
        )

    def _choose(self) -> None:
        rest = deque([self._top])
        while rest:
            row = rest.popleft()
            if not _folds(row):
                continue
            for key, value in _members(row.value, self._mask):
                label, step = (str(key), f"[{key}]") if isinstance(key, int) else self._step(key)
                path = row.path + step if row.path else step.removeprefix(".")
                child = _Row(label, path, value, row.depth + 1)
                if len(row.children) == MAX_MEMBERS or not self._add(child):
                    self.is_cut = True
                    break
                row.children.append(child)
            row.left_out = len(row.value) - len(row.children)
            rest.extend(row.children)

    def _add(self, row: _Row) -> bool:
        """Take the room that a row needs; False if there is not enough."""
        if self.rows == MAX_ROWS:
            return False
        row.html = self._short_text(row)
        room = self._room - len(row.label) - len(row.path) - len(row.html)
        if room < 0:
            return False
        self._room = room
        self.rows += 1
        if not row.html:
            self._long.append(row)
        return True

    def _short_text(self, row: _Row) -> str:
        """Return what stands in the line of a row; nothing if it is a long text."""
        value = row.value
        if _folds(row):
            return self._summary(value)
        return "" if _is_long(value) else _scalar(value)

    def _step(self, key: str) -> tuple[str, str]:
        """Return a key as its row shows it, and as a step of a path, both as HTML."""
        names = self._steps.get(key)
        if names is None:
            text = escape(path_text([key]))
            odd = text.startswith("[")
            names = self._steps[key] = (text[1:-1], text) if odd else (text, f".{text}")
        return names

    def _summary(self, value: Any) -> str:
        """Return how much is in a list or dict, and how it begins, as HTML."""
        text = _one_line(value, self._mask, PREVIEW)
        if len(text) > PREVIEW:
            text = f"{text[:PREVIEW]}…"
        return (
            f'<span class="workflow-storage-tree-size">{self._size(value)}</span> '
            f'<span class="workflow-storage-tree-preview">{escape(_showable(text))}</span>'
        )

    def _size(self, value: Any) -> str:
        is_dict, count = isinstance(value, dict), len(value)
        size = self._sizes.get((is_dict, count))
        if size is None:
            if is_dict:
                text, ends = ngettext("%(count)s key", "%(count)s keys", count), "{}"
            else:
                text, ends = ngettext("%(count)s item", "%(count)s items", count), "[]"
            size = f"{ends[0]}{escape(text % {'count': _number(count)})}{ends[1]}"
            self._sizes[is_dict, count] = size
        return size

    def _long_text(self, row: _Row) -> str:
        """Return a block with as much of a long text as there is room for."""
        if isinstance(row.value, str):
            kind, text, total = "text", row.value, len(row.value)
        else:
            kind, text, total = "deep", _one_line(row.value, self._mask, self._room), None
        html, shown = self._fitting(text)
        # A line break that is the first in a <pre> is not shown.
        block = f'<pre class="workflow-storage-tree-{kind}">\n{html}</pre>'
        if shown == len(text):
            return block
        self.is_cut = True
        return f"{block}{_note(_note_on_cut(shown, total))}"

    def _fitting(self, text: str) -> tuple[str, int]:
        """Return as much of a text as there is room for, as HTML, and its length as text."""
        shown = min(len(text), self._room)
        while len(html := escape(_showable(text[:shown]))) > self._room:
            # Markup takes more room than text; where in the text it is, nobody knows.
            shown = min(shown * self._room // len(html), shown * 9 // 10)
        self._room -= len(html)
        return html, shown

    def _written(self, row: _Row) -> str:
        label = f'<span class="workflow-storage-tree-key">{row.label}</span>: ' if row.label else ""
        if not _folds(row):
            return label + row.html
        rows = "".join(
            f'<li class="workflow-storage-tree-row" data-path="{child.path}">'
            f"{self._written(child)}</li>"
            for child in row.children
        )
        if row.left_out:
            rows += self._left_out(row.left_out)
        is_open = "" if row.depth else " open"
        return (
            f"<details{is_open}><summary>{label}{row.html}</summary>"
            f'<ul class="workflow-storage-tree-rows">{rows}</ul></details>'
        )

    def _left_out(self, count: int) -> str:
        note = self._notes.get(count)
        if note is None:
            text = ngettext("%(count)s more", "%(count)s more", count)
            note = f"<li>{_note(text % {'count': _number(count)})}</li>"
            self._notes[count] = note
        return note


def _folds(row: _Row) -> bool:
    value = row.value
    return row.depth < MAX_DEPTH and isinstance(value, dict | list | tuple) and bool(value)


def _is_long(value: Any) -> bool:
    """Whether a value that does not fold has a block of its own."""
    if isinstance(value, str):
        return len(value) > LONG_TEXT or _LINE_BREAK.search(value) is not None
    return isinstance(value, dict | list | tuple) and bool(value)


def _members(value: Any, mask: Mask) -> Iterator[tuple[str | int, Any]]:
    """Yield what is in a list or dict, by index or key; secrets as `_HIDDEN`."""
    if not isinstance(value, dict):
        return enumerate(value)
    return ((key, _HIDDEN if mask.hides(key) else item) for key, item in value.items())


def _scalar(value: Any) -> str:
    """Return what fits in a line, as HTML."""
    if value is _HIDDEN:
        title = escape(_("hidden"))
        return f'<span class="workflow-storage-tree-masked" title="{title}">{MASKED}</span>'
    text = escape(_showable(_encode(value)))
    return f'<span class="workflow-storage-tree-{_kind(value)}">{text}</span>'


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return "string"
    if isinstance(value, bool):
        return "boolean"
    if value is None:
        return "null"
    return "empty" if isinstance(value, dict | list | tuple) else "number"


def _one_line(value: Any, mask: Mask, limit: int) -> str:
    """Return a value as JSON text in one line, cut where it has one character more than a limit.

    The json module would go down by recursion, and always to the end.
    """
    pieces = [""]
    length = 0
    for piece in _pieces(value, mask, limit):
        pieces.append(piece)
        length += len(piece)
        if length > limit:
            break
    return "".join(pieces)[: limit + 1]


def _pieces(value: Any, mask: Mask, limit: int) -> Iterator[str]:
    """Yield JSON text of a value; of a text in it not much more than so many characters."""
    rest: list[tuple[Iterator[tuple[str | int, Any]], str]] = [(iter([(0, value)]), "")]
    before = ""
    while rest:
        members, end = rest[-1]
        for key, item in members:
            yield before
            before = ", "
            if isinstance(key, str):
                yield f"{_encode(key[:limit])}: "
            if isinstance(item, dict | list | tuple) and item:
                yield "{" if isinstance(item, dict) else "["
                rest.append((_members(item, mask), "}" if isinstance(item, dict) else "]"))
                before = ""
                break
            if item is _HIDDEN:
                yield MASKED
            else:
                yield _encode(item[:limit] if isinstance(item, str) else item)
        else:
            yield end
            before = ", "
            rest.pop()


def _file_link(url: str) -> SafeString:
    link = '<p class="workflow-storage-tree-file"><a href="{}">{}</a></p>'
    return format_html(link, url, _("Download"))


def _note_on_size(value: Any, mask: Mask, shown: int, download_url: str | None) -> SafeString:
    """Say how much there is in all, and link it."""
    values, characters = _extent(value, mask)
    text = _("Values shown: %(shown)s of %(values)s. Characters of text in all: %(characters)s.")
    numbers = {"shown": shown, "values": values, "characters": characters}
    note = escape(text % {name: _number(number) for name, number in numbers.items()})
    if download_url is not None:
        link = format_html('<a href="{}">{}</a>', download_url, _("Download all of it"))
        note = mark_safe(f"{note} {link}")
    return _note(note)


def _extent(value: Any, mask: Mask) -> tuple[int, int]:
    """Return how many values there are, and how many characters their texts and keys have."""
    values = characters = 0
    rest = [value]
    while rest:
        item = rest.pop()
        values += 1
        if isinstance(item, str):
            characters += len(item)
        elif isinstance(item, dict):
            characters += sum(map(len, item))
            rest += [child for _key, child in _members(item, mask)]
        elif isinstance(item, list | tuple):
            rest += item
    return values, characters


def _note_on_cut(shown: int, total: int | None) -> str:
    if total is None:
        return _("The first %(shown)s characters.") % {"shown": _number(shown)}
    return _("The first %(shown)s of %(total)s characters.") % {
        "shown": _number(shown),
        "total": _number(total),
    }


def _note(text: str) -> SafeString:
    return format_html('<p class="workflow-storage-tree-note">{}</p>', text)


def _number(number: int) -> str:
    return number_format(number, force_grouping=True)


def _showable(text: str) -> str:
    """Return text with what no page can hold escaped as in JSON."""
    return _UNSHOWABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)

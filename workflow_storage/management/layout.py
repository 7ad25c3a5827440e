"""Which columns of a table fit into a width, and how wide each is; pure.

On a narrow terminal the last-important columns are left out, rather than all of them squeezed until
none can be read. A number is shown whole or not at all.
"""

from __future__ import annotations

from itertools import pairwise, takewhile
from typing import TYPE_CHECKING, Literal, NamedTuple

from rich.cells import cell_len, set_cell_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

GAP = 2
"""Cells between two columns."""

UNFOLDED = 34
"""Cells of a text that stands in one line, where it can be folded: at 80 columns, a name of as many has
an id, a status and an error beside it."""

STAYS = 2
"""The greatest rank of a column that is not left out for a text to stand in one line."""

SHORTEST_ID = 13
"""Characters of an id that is shortened, at least: of a UUIDv7, all of its time in milliseconds."""

_BETWEEN_WORDS = frozenset(" -_./:,;|")

Kind = Literal["text", "number", "fixed", "id"]


class ColumnCells(NamedTuple):
    """A column, as text."""

    title: str
    cells: list[str]
    kind: Kind
    """text can be cut, a number and what is fixed cannot, an id to what tells it from the others."""
    rank: int
    """How important it is: 0 is never left out, and the greatest is first."""
    least: int
    """Cells that text is cut to, at least."""
    folds: bool = False
    """Whether it goes on in the next line rather than be cut."""

    @property
    def natural(self) -> int:
        """The cells that it takes whole."""
        return max(map(cell_len, [self.title, *self.cells]))

    @property
    def shortest(self) -> int:
        """The cells that it has to have."""
        if self.kind in {"number", "fixed"}:
            return self.natural
        if self.kind == "id":
            return min(self.natural, max(unique_length(self.cells), SHORTEST_ID))
        return min(self.natural, max(self.least, cell_len(self.title)))

    @property
    def unfolded(self) -> int:
        """The cells that it has to have to stand in one line, if it is not too long for that."""
        if not self.folds:
            return self.shortest
        return max(self.shortest, min(self.natural, UNFOLDED))


def fitted(columns: Sequence[ColumnCells], width: int) -> dict[int, int]:
    """Return the columns that fit, by their place, each with its width.

    Args:
        columns: at least one of them with rank 0.
        width: that of the terminal.
    """
    by_rank = sorted(range(len(columns)), key=lambda place: (columns[place].rank, place))
    # A name is read in one line, so what is less important gives way to it.
    while _taken(columns[place].unfolded for place in by_rank) > width:
        if columns[by_rank[-1]].rank <= STAYS:
            break
        by_rank.pop()
    while _taken(columns[place].shortest for place in by_rank) > width and len(by_rank) > 1:
        if columns[by_rank[-1]].rank == 0:
            break
        by_rank.pop()
    widths = {place: columns[place].shortest for place in by_rank}
    spare = width - _taken(widths.values())
    if spare < 0:
        # Even those of rank 0 do not fit: the one that can be folded best gives way.
        widest = max(by_rank, key=lambda place: widths[place])
        widths[widest] = max(1, widths[widest] + spare)
        return dict(sorted(widths.items()))
    # An id tells a run as well when it is short, so the texts come first.
    for place in sorted(by_rank, key=lambda place: columns[place].kind == "id"):
        wanted = columns[place].natural - widths[place]
        if columns[place].kind == "id" and wanted > spare:
            continue
        widths[place] += min(wanted, spare)
        spare -= min(wanted, spare)
    return dict(sorted(widths.items()))


def _taken(widths: Iterable[int]) -> int:
    each = list(widths)
    return sum(each) + GAP * max(len(each) - 1, 0)


def unique_length(ids: Sequence[str]) -> int:
    """Return to how many characters some ids can be cut, and still be told apart."""
    common = (_common(*pair) + 1 for pair in pairwise(sorted(set(ids))))
    return max(common, default=0)


def _common(one: str, other: str) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def cut_to(text: str, width: int, ellipsis: str) -> str:
    """Return a text that takes no more than so many cells, with an ellipsis where it was cut."""
    if cell_len(text) <= width:
        return text
    if width <= cell_len(ellipsis):
        return set_cell_size(text, width)
    return set_cell_size(text, width - cell_len(ellipsis)).rstrip() + ellipsis


def folded(text: str, width: int) -> list[str]:
    """Return the lines of a text that each take no more than so many cells, between words if possible."""
    lines = []
    while len(text) > 1 and cell_len(text) > width:
        end = _end_of_line(text, width)
        lines.append(text[:end])
        text = text[end:]
    return [*lines, text]


def _end_of_line(text: str, width: int) -> int:
    """Return how many characters of a text its first line has, which is too short for all."""
    end, taken = 0, 0
    while taken + (size := cell_len(text[end])) <= width or end == 0:
        taken += size
        end += 1
        if end == len(text):
            return end
    # Not so far back that most of the line is empty.
    for place in range(end, end // 3, -1):
        if _ends_word(text, place):
            return place
    return end


def _ends_word(text: str, place: int) -> bool:
    before, behind = text[place - 1], text[place]
    return before in _BETWEEN_WORDS or (before.islower() and behind.isupper())

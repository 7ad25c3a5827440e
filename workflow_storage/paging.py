"""How many runs to read at a time, so that a page of them is bounded by bytes; for who reads pages."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from workflow_storage.serialization import json_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_T = TypeVar("_T")

FIRST_PAGE = 20
"""Runs of the first page."""

LONGEST_PAGE = 80
"""Runs of the longest page: how large the next ones are, nobody knows before they are read."""

SMALL_PAGE = 2**20
"""Bytes below which the next page is twice as long."""

LARGE_PAGE = 8 * 2**20
"""Bytes above which the next page is half as long."""

LARGE_FIELDS = ("config_snapshot", "inputs", "outputs", "error_message")
"""The fields of a run that can be large."""

_REST = 1000
"""Bytes of a run without these, about."""


class PageLength:
    """The length of the next page of runs, by the bytes that the pages before had.

    Args:
        limit: how many runs to read in all; None for as many as there are.
    """

    def __init__(self, limit: int | None = None) -> None:
        self._left = limit
        self._by_size = FIRST_PAGE

    @property
    def runs(self) -> int:
        """How many runs to read next; 0 if there were as many as are to be read."""
        return self._by_size if self._left is None else min(self._by_size, self._left)

    def after(self, page: Iterable[object]) -> None:
        """Take into account how many runs a page had, and how large it was."""
        sizes = [*map(size_of, page)]
        if self._left is not None:
            self._left = max(0, self._left - len(sizes))
        size = sum(sizes)
        if size < SMALL_PAGE:
            self._by_size = min(2 * self._by_size, LONGEST_PAGE)
        elif size > LARGE_PAGE:
            self._by_size = max(1, self._by_size // 2)


def emptied(page: list[_T]) -> Iterator[_T]:
    """Yield what is in a page, and keep none of it."""
    page.reverse()
    while page:
        yield page.pop()


def size_of(run: object) -> int:
    """Return about how many bytes the fields of a run have that have been read.

    Args:
        run: a run, of which a field that was deferred is left out, and not read now; or what there
            is in the place of one that cannot be read.
    """
    fields: dict[str, object] = getattr(run, "__dict__", {})
    large = (fields.get(name) for name in LARGE_FIELDS)
    return _REST + sum(json_size(value) for value in large if value is not None)

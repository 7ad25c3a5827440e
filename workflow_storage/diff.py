"""What changed between two JSON values, or two texts; for the admin and the commands.

Pure, in time that is bounded by the size of the values, and at any depth of nesting.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections import Counter
from difflib import SequenceMatcher
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Iterator, Sequence

_CONTAINERS = (dict, list)
_WITH_OWN_IDENTITY = frozenset({str, int})

_MAX_COMPARED = 40_000
"""Pairs of items up to which difflib, whose worst case is cubic, aligns a block."""
_MAX_COMPARED_IN_ALL = 1_000_000

_MAX_LINES = 300_000
"""Lines of two texts together, without what both begin and end with, of which more are not aligned."""


class Change(NamedTuple):
    """One difference between two JSON values."""

    path: tuple[str | int, ...]
    """Keys and list indexes; an index of a removed item is that in ``before``, else in ``after``.

    The indexes on the way to it are those in ``after``."""
    kind: Literal["added", "removed", "changed"]
    before: Any
    """The value that was there; None where there was none."""
    after: Any
    """The value that is there now; None where there is none."""


class Diff(NamedTuple):
    """The differences between two JSON values."""

    changes: list[Change]
    """In the order of the values; keys that are new come after those that were there."""
    is_complete: bool
    """False where there are more than the limit."""


class TextLine(NamedTuple):
    """One line of the difference between two texts."""

    kind: Literal["same", "added", "removed", "gap"]
    text: str
    """The line without its line feed; of a gap, how many lines it leaves out, as digits."""


class TextDifference(NamedTuple):
    """The difference between two texts."""

    lines: list[TextLine]
    more: int
    """Lines that it has beyond these."""
    added: int
    removed: int


class _Block(NamedTuple):
    """Items that differ: ``before[start:end]`` became ``after[new_start:new_end]``."""

    start: int
    end: int
    new_start: int
    new_end: int


def diff(before: Any, after: Any, *, limit: int = 1000) -> Diff:
    """Return what changed between two JSON values.

    Values are the same where their JSON text is, whatever the order of their keys: ``1``,
    ``1.0`` and ``true`` all differ, and so do ``0.0`` and ``-0.0``. The items of lists are
    aligned: one that is inserted at the head is one that was added. An item that moved was
    removed and added.

    Args:
        before: what ``json.loads`` can give; the same goes for `after`.
        after: the later value.
        limit: changes to return at most.
    """
    changes = list(islice(_changes(before, after), limit + 1))
    return Diff(changes[:limit], len(changes) <= limit)


def path_text(path: Iterable[str | int]) -> str:
    """Return a path as text: ``messages[3].content``, ``["odd key"][0]``.

    The path of the whole value is the empty text. A lone surrogate is written as its escape,
    so that the text always has a form in UTF-8.
    """
    return "".join(map(_step_text, path)).removeprefix(".")


def _step_text(step: str | int) -> str:
    if isinstance(step, str) and step.isidentifier():
        return f".{step}"
    return f"[{json.dumps(step, ensure_ascii=False)}]".encode(errors="backslashreplace").decode()


def text_lines(before: str, after: str, *, context: int = 3) -> list[TextLine]:
    """Return the lines of two texts as one list; an empty one where they are equal.

    Args:
        before: the earlier text.
        after: the later text.
        context: lines around each change to keep. What is between them becomes one gap.
    """
    return text_difference(before, after, context=context).lines


def text_difference(
    before: str, after: str, *, context: int = 3, limit: int | None = None
) -> TextDifference:
    """Return the first lines of the difference between two texts, and how many there are.

    Args:
        before: the earlier text.
        after: the later text.
        context: lines around each change to keep. What is between them becomes one gap.
        limit: lines to return at most; None for all.
    """
    old, new = before.split("\n"), after.split("\n")
    lines: list[TextLine] = []
    added = removed = total = done = 0

    def add(
        kind: Literal["same", "added", "removed"], some: list[str], start: int, end: int
    ) -> None:
        nonlocal total
        total += end - start
        last = end if limit is None else min(end, start + limit - len(lines))
        lines.extend(TextLine(kind, line) for line in some[start:last])

    def add_unchanged(start: int, end: int, first: int, last: int) -> None:
        """Add so many of the first and the last lines, and a gap for more than one between them."""
        nonlocal total
        left_out = end - start - first - last
        if left_out <= 1:
            add("same", old, start, end)
            return
        add("same", old, start, start + first)
        total += 1
        if limit is None or len(lines) < limit:
            lines.append(TextLine("gap", str(left_out)))
        add("same", old, end - last, end)

    for block in _Aligner(_MAX_LINES).blocks(old, new):
        add_unchanged(done, block.start, context if total else 0, context)
        size, new_size = block.end - block.start, block.new_end - block.new_start
        add("removed", old, block.start, block.end)
        add("added", new, block.new_start, block.new_end)
        removed, added, done = removed + size, added + new_size, block.end
    if not total:
        return TextDifference([], 0, 0, 0)
    add_unchanged(done, len(old), context, 0)
    return TextDifference(lines, total - len(lines), added, removed)


def _changes(before: Any, after: Any) -> Iterator[Change]:
    """Yield all changes, depth first; by a stack, for nesting has no bound."""
    comparison = _Comparison(before, after)
    if comparison.identity(before) == comparison.identity(after):
        return
    steps: list[str | int] = []
    walks = [iter([Change((), "changed", before, after)])]
    while walks:
        change = next(walks[-1], None)
        if change is None:
            walks.pop()
            del steps[-1:]
        elif change.kind == "changed" and _are_alike(change.before, change.after):
            steps += change.path
            walks.append(comparison.differences(change.before, change.after))
        else:
            yield change._replace(path=(*steps, *change.path))


def _are_alike(before: Any, after: Any) -> bool:
    return isinstance(before, _CONTAINERS) and before.__class__ is after.__class__


class _Comparison:
    """Tells whether parts of two values are the same, without comparing them twice."""

    def __init__(self, *values: Any) -> None:
        self._aligner = _Aligner()
        # By the address of a dict or list, which the caller's values keep alive.
        self._identities: dict[int, object] = {}
        containers = [value for value in values if isinstance(value, _CONTAINERS)]
        for container in containers:  # it grows, so that parents come before their children
            children = container.values() if isinstance(container, dict) else container
            containers += [child for child in children if isinstance(child, _CONTAINERS)]
        known: dict[Hashable, object] = {}
        for container in reversed(containers):
            self._identities[id(container)] = known.setdefault(self._form(container), object())

    def _form(self, container: Any) -> Hashable:
        """Return what is equal for dicts, or lists, whose children are the same."""
        if isinstance(container, dict):
            return frozenset((key, self.identity(child)) for key, child in container.items())
        return tuple([self.identity(item) for item in container])

    def identity(self, value: Any) -> Hashable:
        """Return what is equal for values that are the same in JSON."""
        kind = value.__class__
        if kind in _WITH_OWN_IDENTITY:
            return value  # type: ignore[no-any-return]
        if isinstance(value, _CONTAINERS):
            return self._identities[id(value)]
        return kind, repr(value)

    def differences(self, before: Any, after: Any) -> Iterator[Change]:
        """Yield the children of two dicts, or two lists, that are not the same."""
        if isinstance(before, dict):
            return self._of_dicts(before, after)
        return self._of_lists(before, after)

    def _of_dicts(self, before: dict[str, Any], after: dict[str, Any]) -> Iterator[Change]:
        for key, old in before.items():
            if key not in after:
                yield Change((key,), "removed", old, None)
            elif self.identity(old) != self.identity(after[key]):
                yield Change((key,), "changed", old, after[key])
        for key, new in after.items():
            if key not in before:
                yield Change((key,), "added", None, new)

    def _of_lists(self, before: list[Any], after: list[Any]) -> Iterator[Change]:
        for block in self._aligner.blocks(
            [self.identity(item) for item in before], [self.identity(item) for item in after]
        ):
            paired = min(block.end - block.start, block.new_end - block.new_start)
            for old, new in zip(
                range(block.start, block.start + paired),
                range(block.new_start, block.new_start + paired),
                strict=True,
            ):
                # What a block pairs by place can be the same, where it is too large to align.
                if self.identity(before[old]) != self.identity(after[new]):
                    yield Change((new,), "changed", before[old], after[new])
            for old in range(block.start + paired, block.end):
                yield Change((old,), "removed", before[old], None)
            for new in range(block.new_start + paired, block.new_end):
                yield Change((new,), "added", None, after[new])


class _Aligner:
    """Finds the blocks in which two sequences differ, with bounded effort for all it aligns.

    By patience: the items that are in both once, in their longest common order, divide the
    sequences (Bram Cohen's diff, as git has it). difflib looks closer at what is between them
    while that is small; what is too large for that stays one block.
    """

    def __init__(self, most: float = math.inf) -> None:
        """Align no sequences that have more items than `most` beside what they begin and end with."""
        self._effort = _MAX_COMPARED_IN_ALL
        self._most = most

    def blocks(self, before: Sequence[Hashable], after: Sequence[Hashable]) -> Iterator[_Block]:
        """Yield the blocks that differ, in their order."""
        whole = _trimmed(before, after, _Block(0, len(before), 0, len(after)))
        if whole.end - whole.start + whole.new_end - whole.new_start > self._most:
            yield whole
            return
        start, new_start = whole.start, whole.new_start
        for anchor, new_anchor in [*_anchors(before, after, whole), (whole.end, whole.new_end)]:
            block = _trimmed(before, after, _Block(start, anchor, new_start, new_anchor))
            yield from self._refined(before, after, block)
            start, new_start = anchor + 1, new_anchor + 1

    def _refined(
        self, before: Sequence[Hashable], after: Sequence[Hashable], block: _Block
    ) -> Iterator[_Block]:
        size, new_size = block.end - block.start, block.new_end - block.new_start
        if not (size or new_size):
            return
        compared = size * new_size
        if compared <= 1 or compared > min(_MAX_COMPARED, self._effort):
            yield block
            return
        self._effort -= compared
        matcher = SequenceMatcher(
            None,
            before[block.start : block.end],
            after[block.new_start : block.new_end],
            autojunk=False,
        )
        for kind, start, end, new_start, new_end in matcher.get_opcodes():
            if kind != "equal":
                yield _Block(
                    block.start + start,
                    block.start + end,
                    block.new_start + new_start,
                    block.new_start + new_end,
                )


def _trimmed(before: Sequence[Hashable], after: Sequence[Hashable], block: _Block) -> _Block:
    """Return a block without what its sides have in common at the beginning and the end."""
    start, end, new_start, new_end = block
    while start < end and new_start < new_end and before[start] == after[new_start]:
        start, new_start = start + 1, new_start + 1
    while start < end and new_start < new_end and before[end - 1] == after[new_end - 1]:
        end, new_end = end - 1, new_end - 1
    return _Block(start, end, new_start, new_end)


def _anchors(
    before: Sequence[Hashable], after: Sequence[Hashable], block: _Block
) -> list[tuple[int, int]]:
    """Return where the items that are once on both sides of a block are, as many as go in order."""
    counts = Counter(before[block.start : block.end])
    new_counts = Counter(after[block.new_start : block.new_end])
    places = {
        after[new]: new
        for new in range(block.new_start, block.new_end)
        if counts[after[new]] == 1 == new_counts[after[new]]
    }
    common = [
        (old, places[before[old]]) for old in range(block.start, block.end) if before[old] in places
    ]
    return _longest_in_order(common)


def _longest_in_order(pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the longest part of pairs that rises in both (patience sorting)."""
    tops: list[int] = []
    of_top: list[int] = []
    earlier: list[int | None] = []
    for index, (_, new) in enumerate(pairs):
        pile = bisect_left(tops, new)
        earlier.append(of_top[pile - 1] if pile else None)
        tops[pile : pile + 1] = [new]
        of_top[pile : pile + 1] = [index]
    chosen = []
    at = of_top[-1] if of_top else None
    while at is not None:
        chosen.append(pairs[at])
        at = earlier[at]
    return chosen[::-1]

"""The checkpoints of a thread as a tree: each below its parent, and a branch for each fork; pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime
    from typing import Any


class Node(NamedTuple):
    """A checkpoint, without its values."""

    pk: int
    checkpoint_id: str
    parent: str | None
    created_at: datetime
    run_id: str | None
    metadata: Any

    @property
    def step(self) -> str:
        """The step that LangGraph's metadata says."""
        return self._said("step")

    @property
    def source(self) -> str:
        """Where LangGraph's metadata says that it comes from."""
        return self._said("source")

    def _said(self, name: str) -> str:
        value = self.metadata.get(name) if isinstance(self.metadata, dict) else None
        return "" if value is None else str(value)


class Place(NamedTuple):
    """A checkpoint in the tree."""

    node: Node
    branch: int
    """How many forks are above it."""
    is_fork: bool
    """Whether it begins a branch."""
    has_lost_parent: bool
    """Whether its parent is not among them."""


def tree(nodes: Iterable[Node]) -> list[Place]:
    """Return checkpoints in the order of a tree: the oldest first, and each branch as a whole.

    Of several children the oldest goes on with the branch of its parent; the others begin one.
    """
    by_id = {node.checkpoint_id: node for node in nodes}
    children: dict[str | None, list[Node]] = {}
    for node in sorted(by_id.values(), key=lambda node: node.checkpoint_id):
        parent = node.parent if node.parent in by_id else None
        children.setdefault(parent, []).append(node)
    places: list[Place] = []
    waiting = [(node, 0, False) for node in reversed(children.get(None, []))]
    while waiting:
        node, branch, is_fork = waiting.pop()
        lost = node.parent is not None and node.parent not in by_id
        places.append(Place(node, branch, is_fork, lost))
        first, *others = [*children.get(node.checkpoint_id, []), None]
        if first is not None:
            forks = [one for one in others if one is not None]
            # What is put down last comes next: the forks, and then the rest of this branch.
            waiting.append((first, branch, False))
            waiting += [(fork, branch + 1, True) for fork in reversed(forks)]
    return places

"""The nodes of a run while it is recorded: how long each takes, what it uses, where a run fails.

A node is known to the thread or task that has entered it, so that nodes which run beside each
other keep their own time and usage. Nothing is written here; a checkpoint carries it.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import time
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar

from workflow_storage.recorder.usage import Pending
from workflow_storage.validation import MAX_NODE_ID, valid_name

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextvars import Token
    from types import TracebackType

_F = TypeVar("_F", bound="Callable[..., Any]")

_entered: ContextVar[EnteredNode | None] = ContextVar("workflow_storage_node", default=None)


class EnteredNode:
    """A node between its beginning and its end.

    Attributes:
        name: its name.
        nodes: those of its run.
        around: the node that was around the caller when it began, of any run.
        pending: what was used in it since its last checkpoint.
        since: when it began, or its last checkpoint was saved, by `time.monotonic`.
    """

    def __init__(self, name: str, nodes: Nodes, around: EnteredNode | None) -> None:
        self.name = name
        self.pending = Pending()
        self.since = time.monotonic()
        self.nodes = nodes
        self.around = around

    def innermost_of(self, nodes: Nodes) -> EnteredNode | None:
        """Return the innermost node of a run that is around the caller: this one, or one around."""
        node: EnteredNode | None = self
        while node is not None and node.nodes is not nodes:
            node = node.around
        return node


class Nodes:
    """The nodes of one run.

    Attributes:
        outside: what was used outside of any node since the last checkpoint outside of any.
    """

    def __init__(self) -> None:
        self.outside = Pending()
        self._active: list[EnteredNode] = []
        self._changing = threading.RLock()
        self._left_by: tuple[BaseException, str] | None = None

    @property
    def here(self) -> EnteredNode | None:
        """The innermost node that the caller is in; None outside of any."""
        node = _entered.get()
        return None if node is None else node.innermost_of(self)

    @property
    def newest(self) -> str | None:
        """The name of the node that was entered last, of those that are not left yet."""
        with self._changing:
            return self._active[-1].name if self._active else None

    def enter(self, name: str) -> EnteredNode:
        """Note that a node begins."""
        node = EnteredNode(name, self, _entered.get())
        with self._changing:
            self._active.append(node)
        return node

    def leave(self, node: EnteredNode, exc: BaseException | None) -> None:
        """Note that a node ends, by an exception or without."""
        around = node.around and node.around.innermost_of(self)
        # What no checkpoint has carried goes to the next one around.
        (around.pending if around else self.outside).add(node.pending.taken())
        with self._changing:
            self._active.remove(node)
            if exc is not None and (self._left_by is None or self._left_by[0] is not exc):
                self._left_by = exc, node.name

    def left_by(self, exc: BaseException) -> str | None:
        """Return the node that an exception, or what caused it, has left; None if it was in none."""
        if self._left_by is None:
            return None
        first, name = self._left_by
        seen: BaseException | None = exc
        for _ in range(100):
            if seen is None or seen is first:
                break
            seen = seen.__cause__ or seen.__context__
        return name if seen is first else None


class Node:
    """A node, to be entered with ``with`` or ``async with``, or to decorate what it consists of."""

    def __init__(self, nodes: Nodes, name: str) -> None:
        self._nodes = nodes
        self._name = valid_name("node", name, MAX_NODE_ID)
        self._entries: list[tuple[EnteredNode, Token[EnteredNode | None]]] = []

    def __call__(self, function: _F) -> _F:
        """Let each call of a function be the node."""
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError(
                f"{function.__qualname__} is a generator function, whose body runs after the "
                "call. Use `with run.node(...)` inside it."
            )
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def in_node_async(*args: Any, **kwargs: Any) -> Any:
                with Node(self._nodes, self._name):
                    return await function(*args, **kwargs)

            return in_node_async  # type: ignore[return-value]

        @functools.wraps(function)
        def in_node(*args: Any, **kwargs: Any) -> Any:
            with Node(self._nodes, self._name):
                return function(*args, **kwargs)

        return in_node  # type: ignore[return-value]

    def __enter__(self) -> Node:
        node = self._nodes.enter(self._name)
        self._entries.append((node, _entered.set(node)))
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        node, token = self._entries.pop()
        # A generator can be closed in another context than it was begun in.
        with contextlib.suppress(ValueError):
            _entered.reset(token)
        self._nodes.leave(node, exc)

    async def __aenter__(self) -> Node:
        return self.__enter__()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.__exit__(exc_type, exc, tb)

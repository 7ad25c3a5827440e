"""What both repositories on Redis share: a method out of an operation, keys, times as text."""

from __future__ import annotations

import inspect
import random
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Protocol, TypeVar

from django.conf import settings

from workflow_storage.backends.redis.scripts import INDEXES, Call, Script
from workflow_storage.base import Checkpoint
from workflow_storage.validation import plain_text

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping

    from workflow_storage.backends.redis.connection import Operation, RedisStore

    class _HasStore(Protocol):
        @property
        def store(self) -> RedisStore: ...


_S = TypeVar("_S", bound="_HasStore")
_T = TypeVar("_T")
_P = ParamSpec("_P")


class RedisRepository:
    """What both repositories know.

    Attributes:
        store: the server or cluster.
    """

    def __init__(self, store: RedisStore) -> None:
        self.store = store

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.store.name!r})"


def blocking(
    operation: Callable[Concatenate[_S, _P], Operation[_T]],
) -> Callable[Concatenate[_S, _P], _T]:
    """Make the method of the contract that carries out an operation.

    So a class says ``get = blocking(_get)``, and ``aget = awaitable(_get)`` under it.

    Args:
        operation: named as the method, after a ``_``, in a class that has a `store`; with the
            arguments of the method.
    """

    def method(self: _S, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        return self.store.execute(operation(self, *args, **kwargs))

    _pose(method, operation, prefix="")
    return method


def awaitable(
    operation: Callable[Concatenate[_S, _P], Operation[_T]],
) -> Callable[Concatenate[_S, _P], Coroutine[Any, Any, _T]]:
    """Make the async twin of what `blocking` makes."""

    async def method(self: _S, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        return await self.store.aexecute(operation(self, *args, **kwargs))

    _pose(method, operation, prefix="a")
    return method


def _pose(method: Any, operation: Callable[..., Any], prefix: str) -> None:
    """Let a method look as if it was written by hand, to `help` and to `inspect.signature`.

    `functools.wraps` would say that it is its operation.
    """
    owner, _, private_name = operation.__qualname__.rpartition(".")
    name = private_name.removeprefix("_")
    contract = owner.replace("Redis", "Abstract" if owner.endswith("Repository") else "")
    method.__module__ = operation.__module__
    method.__name__, method.__qualname__ = f"{prefix}{name}", f"{owner}.{prefix}{name}"
    method.__doc__ = f"Async twin of `{name}`." if prefix else f"See `{contract}.{name}`."
    # Annotations are text where they are not evaluated: "Operation[int]" is to be "int".
    result = operation.__annotations__["return"].removeprefix("Operation[").removesuffix("]")
    method.__annotations__ = {**operation.__annotations__, "return": result}
    method.__signature__ = inspect.signature(operation).replace(return_annotation=result)


def call(store: RedisStore, script: Script, run_id: str, *args: Any) -> Call:
    """Return the call of a script on a run."""
    run_id = plain_text(run_id)
    prefix = store.key_prefix(run_id)
    return Call(script, (f"{prefix}:run:{run_id}", f"{prefix}:states:{run_id}"), (run_id, *args))


def indexing_call(store: RedisStore, script: Script, run_id: str, *args: Any) -> Call:
    """Return the call of a script on a run that changes its place in the indexes."""
    plain = call(store, script, run_id, *args)
    prefix = store.key_prefix(plain.args[0])
    return plain._replace(keys=(*plain.keys, *(f"{prefix}:{name}" for name in INDEXES)))


def time_text(value: datetime) -> str:
    """Return a time as `TIME_LENGTH` characters that sort as times do: in UTC if it has a time zone."""
    if value.tzinfo is not None:
        value = value.astimezone(UTC).replace(tzinfo=None)
    return value.isoformat(timespec="microseconds")


def parsed_time(value: bytes) -> datetime:
    """Return the time that `time_text` has written."""
    moment = datetime.fromisoformat(value.decode())
    return moment.replace(tzinfo=UTC) if settings.USE_TZ else moment


def new_mark(
    created_at: datetime, node_id: str, attempt: int | None, usage: Mapping[str, Any]
) -> bytes:
    """Return what is stored beside a state: all that its checkpoint says, and what tells it.

    The random number tells it from another state that had its step before.
    """
    known = " ".join(["" if value is None else repr(value) for value in (attempt, *usage.values())])
    return f"{time_text(created_at)} {random.getrandbits(32):08x} {known} {node_id}".encode()


def checkpoint_of(step: int, mark: bytes, state: dict[str, Any]) -> Checkpoint:
    """Return a checkpoint from its mark."""
    created_at, _, attempt, duration, tokens, cost, node_id = mark.split(b" ", 6)
    return Checkpoint(
        step=step,
        node_id=node_id.decode(),
        state_data=state,
        created_at=parsed_time(created_at),
        attempt=int(attempt) if attempt else None,
        duration_seconds=float(duration) if duration else None,
        tokens=int(tokens) if tokens else None,
        cost_usd=float(cost) if cost else None,
    )

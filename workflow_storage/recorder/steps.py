"""What a recording says to the store, step by step, so that it is written once for sync and async.

The steps are a generator: it yields calls and pauses, and is sent what a call returns, or thrown
what it raises. `carried_out` and `acarried_out` carry them out.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Generator
from typing import Any, NamedTuple, TypeAlias, TypeVar

_T = TypeVar("_T")


class Call(NamedTuple):
    """A call of a method that has an async twin, whose name has an ``a`` before it."""

    of: Any
    name: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}


class Pause(NamedTuple):
    """Some seconds to wait."""

    seconds: float


Steps: TypeAlias = Generator[Call | Pause, Any, _T]
"""Yields what is to be done next, and returns what comes of it all."""


def carried_out(steps: Steps[_T]) -> _T:
    """Carry out some steps, and return what comes of them."""
    try:
        step = next(steps)
        while True:
            try:
                result = _done(step)
            except BaseException as exc:
                step = steps.throw(exc)
            else:
                step = steps.send(result)
    except StopIteration as stop:
        value: _T = stop.value
        return value


async def acarried_out(steps: Steps[_T]) -> _T:
    """Async twin of `carried_out`."""
    try:
        step = next(steps)
        while True:
            try:
                result = await _adone(step)
            except BaseException as exc:
                step = steps.throw(exc)
            else:
                step = steps.send(result)
    except StopIteration as stop:
        value: _T = stop.value
        return value


def _done(step: Call | Pause) -> Any:
    if isinstance(step, Pause):
        time.sleep(step.seconds)
        return None
    return getattr(step.of, step.name)(*step.args, **step.kwargs)


async def _adone(step: Call | Pause) -> Any:
    if isinstance(step, Pause):
        await asyncio.sleep(step.seconds)
        return None
    return await getattr(step.of, f"a{step.name}")(*step.args, **step.kwargs)

"""What tells an async twin from its method.

Called by `AsyncContract`.
"""

from __future__ import annotations

import inspect
import re
import sys
from typing import TYPE_CHECKING, Any

from asgiref.sync import iscoroutinefunction

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_WITHOUT_TWIN = {"writer", "in_thread"}  # one waits for nothing, one is what twins are made of


def flaws_of_twins(owner: str, instance: object, contract: type) -> Iterator[str]:
    """Yield what is wrong with the async twins of an object, as lines that name the twin.

    Compared is what `inspect.signature` says of the methods of the object itself, so it does
    not matter who wrote a twin, or which helper made it. An annotation that is left out on
    one side is not compared.

    Args:
        owner: what the object is called in the lines.
        instance: a repository or a writer.
        contract: the class whose public methods must have twins; others may.
    """
    promised = _methods(contract)
    for name in sorted(promised | _methods(type(instance))):
        twin = getattr(instance, f"a{name}", None)
        if callable(twin):
            for flaw in _flaws_of_twin(getattr(instance, name), twin):
                yield f"{owner}.a{name} {flaw}"
        elif name in promised - _WITHOUT_TWIN:
            yield f"{owner}.a{name} is missing, the async twin of {owner}.{name}"


def _methods(cls: type) -> set[str]:
    """Return the names of the public methods of a class that are not the twin of another."""
    names = {name for name in dir(cls) if name[0] != "_" and callable(getattr(cls, name))}
    return {name for name in names if not (name[0] == "a" and name[1:] in names)}


def _flaws_of_twin(method: Callable[..., Any], twin: Callable[..., Any]) -> Iterator[str]:
    """Yield what tells an async twin from its method, other than that it is async."""
    signature, of_twin = _signature(method), _signature(twin)
    if not _take_the_same(signature, of_twin):
        yield f"takes {_parameters(of_twin)}, and its method takes {_parameters(signature)}"
    result = _written(signature.return_annotation)
    awaited = re.sub(r"^Iterator\[", "AsyncIterator[", result)
    if not _same_where_given(awaited, _written(of_twin.return_annotation)):
        yield (
            f"returns {_written(of_twin.return_annotation)}, and not {awaited}: "
            f"its method returns {result}"
        )
    if awaited != result or inspect.isgeneratorfunction(method):
        if not inspect.isasyncgenfunction(twin):
            yield "is no async generator function, and its method returns an iterator"
    elif not iscoroutinefunction(twin):
        yield "is no coroutine function"


def _signature(function: Callable[..., Any]) -> inspect.Signature:
    if sys.version_info >= (3, 14):
        # Where annotations are evaluated late, names that only a type checker imports are
        # unknown here.
        from annotationlib import Format

        return inspect.signature(function, annotation_format=Format.STRING)
    return inspect.signature(function)


def _take_the_same(signature: inspect.Signature, of_twin: inspect.Signature) -> bool:
    own, twins = signature.parameters, of_twin.parameters
    return len(own) == len(twins) and all(
        (one.name, one.kind, one.default) == (other.name, other.kind, other.default)
        and _same_where_given(_written(one.annotation), _written(other.annotation))
        for one, other in zip(own.values(), twins.values(), strict=True)
    )


def _same_where_given(annotation: str, of_twin: str) -> bool:
    """Return whether two annotations agree; one that is left out agrees with any."""
    return not annotation or not of_twin or annotation == of_twin


def _written(annotation: Any) -> str:
    """Return an annotation as its source has it, without modules, or "" for none."""
    if annotation is inspect.Signature.empty:
        return ""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return re.sub(r"(\w+\.)+", "", text)


def _parameters(signature: inspect.Signature) -> str:
    return str(signature.replace(return_annotation=inspect.Signature.empty))

"""LangGraph's checkpoints in Django tables, and the runs of its graphs.

Add ``workflow_storage.contrib.langgraph`` to INSTALLED_APPS. The names load when they are first
used, for Django imports the package before models can be loaded.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workflow_storage.contrib.langgraph.recording import with_recording
    from workflow_storage.contrib.langgraph.saver import DjangoSaver

_MODULES = {"DjangoSaver": "saver", "with_recording": "recording"}

__all__ = ["DjangoSaver", "with_recording"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)

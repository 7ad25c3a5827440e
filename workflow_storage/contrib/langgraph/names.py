"""What a thread of LangGraph is called, as a configuration says it and as the tables know it."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, NamedTuple

from workflow_storage.contrib.langgraph.models import MAX_ID
from workflow_storage.exceptions import InvalidFieldError
from workflow_storage.serialization import is_utf8
from workflow_storage.validation import valid_name

if TYPE_CHECKING:
    from langchain_core.runnables import RunnableConfig


class ThreadName(NamedTuple):
    """A thread, and the namespace of a graph in it."""

    thread_id: str
    namespace: str

    @property
    def key(self) -> str:
        """What is unique, and short enough for an index."""
        return digest(f"{self.thread_id}\0{self.namespace}")

    @property
    def thread_key(self) -> str:
        """What all namespaces of the thread have in common."""
        return digest(self.thread_id)


def digest(text: str) -> str:
    """Return 64 characters that stand for a text of any length."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def thread_name(config: RunnableConfig) -> ThreadName:
    """Return the thread of a configuration, and the namespace; that of the root if it names none.

    Raises:
        InvalidFieldError: if there is no thread, or its name holds what no database has a form for.
    """
    namespace = (config.get("configurable") or {}).get("checkpoint_ns") or ""
    return ThreadName(thread_id_of(config), _valid_text("checkpoint_ns", namespace))


def thread_id_of(config: RunnableConfig) -> str:
    """Return the thread of a configuration; see `thread_name`."""
    configurable = config.get("configurable") or {}
    if "thread_id" not in configurable:
        raise InvalidFieldError(
            'The config has no thread_id. Pass {"configurable": {"thread_id": "…"}}.'
        )
    return valid_thread_id(configurable["thread_id"])


def valid_thread_id(thread_id: Any) -> str:
    """Return the id of a thread as text; a number or a UUID is taken for its text.

    Raises:
        InvalidFieldError: if it is None, or holds what no database has a form for.
    """
    if thread_id is None:
        raise InvalidFieldError("thread_id is None. Pass a text, a number or a UUID.")
    return _valid_text("thread_id", str(thread_id))


def valid_checkpoint_id(config: RunnableConfig) -> str | None:
    """Return which checkpoint a configuration names, or None."""
    checkpoint_id = (config.get("configurable") or {}).get("checkpoint_id")
    return valid_name("checkpoint_id", checkpoint_id, MAX_ID) if checkpoint_id else None


def graph_run_key(run_id: object) -> str | None:
    """Return what a run of LangGraph's metadata is found by; None if there is none."""
    if run_id is None:
        return None
    text = str(run_id)
    is_short = 0 < len(text) <= 64 and is_utf8(text) and "\0" not in text
    return text if is_short else digest(text)


def _valid_text(field: str, text: str) -> str:
    if "\0" in text or not is_utf8(text):
        raise InvalidFieldError(
            f"{field} holds a NUL character or a lone surrogate: {text[:80]!r}. Remove it."
        )
    return text

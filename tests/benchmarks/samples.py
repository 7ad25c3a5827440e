"""Real prose and the stores that the benchmarks work on."""

import importlib.metadata
import pydoc_data.topics
import random
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.servers import postgres_database


def prose() -> str:
    """Return the descriptions of the installed packages, and Python's own help texts."""
    texts = [
        distribution.metadata.get_payload() or ""
        for distribution in importlib.metadata.distributions()
    ]
    return "\n".join(sorted(map(str, texts))) + "\n".join(pydoc_data.topics.topics.values())


def agent_run(nodes: int, seed: int = 1) -> Iterator[dict[str, Any]]:
    """Return the state of an agent after each node.

    A system prompt and a list of tools that stay, and one message more at each node, of 0.5
    to 3.5 kB of prose that occurs once.
    """
    text = prose()
    chance = random.Random(seed)
    position = 30_000
    messages: list[dict[str, Any]] = []
    for node in range(nodes):
        size = chance.randrange(500, 3500)
        assert position + size < len(text), "not enough prose is installed"
        messages.append(
            {
                "role": ("assistant", "user")[node % 2],
                "id": node,
                "content": text[position : position + size],
            }
        )
        position += size
        yield {
            "system": text[:6000],
            "tools": [
                {"name": f"tool-{number}", "description": text[start : start + 300]}
                for number, start in enumerate(range(6000, 9600, 300))
            ],
            "messages": list(messages),
        }


def small_state(number: int) -> dict[str, Any]:
    """Return a state of 2.6 kB as JSON text."""
    return {
        "step": number,
        "question": "x" * 400,
        "documents": [{"id": i, "score": i / 7, "title": "t" * 60} for i in range(12)],
        "answer": "y" * 830,
    }


@contextmanager
def folder() -> Iterator[Path]:
    """Make a folder for database files."""
    path = Path(tempfile.mkdtemp(prefix="workflow-storage-benchmark-"))
    try:
        yield path
    finally:
        shutil.rmtree(path)


@contextmanager
def postgres_url() -> Iterator[str | None]:
    """Make a PostgreSQL database; None where there is no server."""
    import pytest

    database = postgres_database()
    try:
        url = database.__enter__()
    except (pytest.skip.Exception, ImportError) as exc:
        print(f"skipped: {exc}")
        yield None
        return
    try:
        yield url
    finally:
        database.__exit__(None, None, None)

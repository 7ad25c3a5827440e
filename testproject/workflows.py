"""A sample workflow: a text document, node by node, to a digest of it.

Each node takes the state of the run and changes it; after each, the state is stored. Nothing here asks
a language model; the tokens and USD that a run notes are what one at this price would take to read
the same text.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from workflow_storage import RecordedRun, StorageBackend, record_run, resume_run

WORKFLOW_NAME = "document-digest"

BYTES_PER_TOKEN = 4
USD_PER_MILLION_TOKENS = 0.15

State = dict[str, Any]
Node = Callable[[State, bytes], None]

_HEADING = re.compile(rb"^#{1,6} +(.+?)\s*$", re.MULTILINE)
_WORD = re.compile(r"[^\W\d_]{2,}")
_SENTENCE = re.compile(r"[A-Z][^.!?|`#]{20,200}[.!?](?=\s|$)")
_COMMON = frozenset(
    [
        "and",
        "are",
        "for",
        "from",
        "has",
        "have",
        "its",
        "not",
        "one",
        "that",
        "the",
        "their",
        "then",
        "there",
        "this",
        "was",
        "which",
        "with",
        "you",
    ]
)


def load(state: State, document: bytes) -> None:
    """Note what the document is."""
    state["bytes"] = len(document)
    state["sha256"] = hashlib.sha256(document).hexdigest()


def split(state: State, document: bytes) -> None:
    """Find the sections: from a Markdown heading to the next one, as byte offsets."""
    headings = [(match.start(), match[1]) for match in _HEADING.finditer(document)]
    if not headings or headings[0][0] > 0:
        headings.insert(0, (0, b"(beginning)"))
    ends = [start for start, _ in headings[1:]] + [len(document)]
    state["sections"] = [
        {"title": title.decode(errors="replace"), "start": start, "end": end}
        for (start, title), end in zip(headings, ends, strict=True)
    ]


def statistics(number: int) -> Node:
    """Make the node that counts what is in one section."""

    def count(state: State, document: bytes) -> None:
        section = state["sections"][number]
        words = _WORD.findall(_text(section, document))
        section["words"] = len(words)
        section["longest_word"] = max(words, key=len, default="")

    return count


def keywords(state: State, document: bytes) -> None:
    """Find the words that stand out."""
    words = Counter(
        word.lower()
        for section in state["sections"]
        for word in _WORD.findall(_text(section, document))
    )
    state["keywords"] = [
        word for word, _ in words.most_common() if len(word) > 2 and word not in _COMMON
    ][:8]


def digest(state: State, document: bytes) -> None:
    """Take the first sentence of each of the longest sections."""
    longest = sorted(state["sections"], key=lambda section: -section["words"])[:3]
    sentences = [_SENTENCE.search(_text(section, document)) for section in longest]
    state["digest"] = [" ".join(match[0].split()) for match in sentences if match]


def nodes(state: State) -> Iterator[tuple[str, Node]]:
    """Return the nodes in their order; how many there are depends on the document."""
    yield "load", load
    yield "split", split
    for number in range(len(state["sections"])):
        yield f"statistics-{number + 1}", statistics(number)
    yield "keywords", keywords
    yield "digest", digest


def start(backend: StorageBackend, document: Path, *, damaged_at: int | None = None) -> str:
    """Digest a document in a new run, and give the run's id.

    Args:
        backend: where the run is stored.
        document: the document.
        damaged_at: the place of a byte that is read as one that is no UTF-8, as if the document
            had been damaged on its way here.
    """
    content = document.read_bytes()
    inputs: State = {"document": str(document)}
    if damaged_at is not None:
        inputs["damaged_at"] = damaged_at
        content = content[:damaged_at] + b"\xff" + content[damaged_at + 1 :]
    with record_run(
        WORKFLOW_NAME,
        inputs=inputs,
        config={"usd_per_million_tokens": USD_PER_MILLION_TOKENS},
        labels={"document": document.name},
        backend=backend,
    ) as run:
        _go_on(run, document, content)
    return run.run_id


def resume(backend: StorageBackend, run_id: str, document: Path) -> None:
    """Go on with a failed run from its last checkpoint, with the document as it is."""
    with resume_run(run_id, backend=backend) as run:
        _go_on(run, document, document.read_bytes())


def _go_on(run: RecordedRun, document: Path, content: bytes) -> None:
    state = run.state or {}
    for name, node in nodes(state):
        if not run.done(name):
            with run.node(name):
                try:
                    node(state, content)
                except UnicodeDecodeError as exc:
                    exc.add_note(f"Read by {name}, from {document}")
                    raise
                tokens = _bytes_read(name, state) // BYTES_PER_TOKEN
                if tokens:
                    run.add_usage(
                        tokens=tokens,
                        cost_usd=round(tokens * USD_PER_MILLION_TOKENS / 1_000_000, 8),
                    )
                run.save_state(state)
    run.outputs = {
        "sections": len(state["sections"]),
        "words": sum(section["words"] for section in state["sections"]),
        "keywords": state["keywords"],
        "digest": state["digest"],
    }


def _bytes_read(node: str, state: State) -> int:
    """Return how many bytes of text a node has read."""
    sections = state["sections"] if node not in {"load", "split"} else []
    if node.startswith("statistics-"):
        sections = [sections[int(node.removeprefix("statistics-")) - 1]]
    return sum(section["end"] - section["start"] for section in sections)


def _text(section: State, document: bytes) -> str:
    return document[section["start"] : section["end"]].decode()

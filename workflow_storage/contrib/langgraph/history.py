"""What LangGraph rebuilds the value of a `DeltaChannel` from: writes along the path of a checkpoint.

`BaseCheckpointSaver` finds it with one checkpoint after the other; this takes a few queries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from workflow_storage.backends.orm.errors import reading
from workflow_storage.contrib.langgraph.chains import Texts
from workflow_storage.contrib.langgraph.models import CheckpointWrite, GraphCheckpoint
from workflow_storage.contrib.langgraph.packing import Stored
from workflow_storage.contrib.langgraph.rows import AT_ONCE, CheckpointRows

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from workflow_storage.contrib.langgraph.names import ThreadName
    from workflow_storage.contrib.langgraph.packing import Packing

_PAGE = 100
"""Checkpoints that are read at once."""

_COLUMNS = ("thread_id", "checkpoint_id", "parent_checkpoint_id", "blobs", "type", "data")


class _Ancestor(NamedTuple):
    thread: int
    checkpoint_id: str
    parent: str | None
    blobs: dict[str, int]
    type: str
    data: bytes


class Path:
    """What one channel has got on the way to a checkpoint.

    Attributes:
        writes: task, channel and value, the oldest first.
        seed: the value before them.
        is_seeded: whether there is one.
    """

    def __init__(self) -> None:
        self.writes: list[tuple[str, str, Any]] = []
        self.seed: Any = None
        self.is_seeded = False


class HistoryRows(CheckpointRows):
    """Reads the histories of channels."""

    @reading
    def paths(
        self,
        name: ThreadName,
        checkpoint_id: str | None,
        channels: Sequence[str],
        packing: Packing,
    ) -> dict[str, Path]:
        """Return the history of each channel before a checkpoint, or before the newest.

        It begins with the nearest ancestor that has a value of the channel itself.
        """
        paths = {channel: Path() for channel in channels}
        through: dict[str, list[str]] = {channel: [] for channel in channels}
        seeds: dict[str, int] = {}
        thread = 0
        for ancestor in self._ancestors(name, checkpoint_id):
            thread = ancestor.thread
            open_channels = [channel for channel in paths if not paths[channel].is_seeded]
            if not open_channels:
                break
            document = packing.load(Stored(ancestor.type, bytes(ancestor.data)))
            inline = document["channel_values"]
            for channel in open_channels:
                through[channel].append(ancestor.checkpoint_id)
                path = paths[channel]
                if channel in ancestor.blobs:
                    seeds[channel] = ancestor.blobs[channel]
                    path.is_seeded = True
                elif channel in inline:
                    path.seed, path.is_seeded = inline[channel], True
        texts = Texts(self.chains(seeds.values()), packing)
        for channel, blob_id in seeds.items():
            paths[channel].seed = packing.value(texts.typed(blob_id))
        written = self._written(thread, through)
        for channel, ids in through.items():
            for one in reversed(ids):
                paths[channel].writes += [
                    (
                        write.task_id,
                        channel,
                        packing.load(Stored(write.type, bytes(write.data))),
                    )
                    for write in written.get((one, channel), ())
                ]
        return paths

    def _ancestors(self, name: ThreadName, checkpoint_id: str | None) -> Iterator[_Ancestor]:
        """Yield the checkpoints from the parent of one to the first of its thread."""
        rows = self.all(GraphCheckpoint).filter(thread__key=name.key).order_by("-checkpoint_id")
        target = rows if checkpoint_id is None else rows.filter(checkpoint_id=checkpoint_id)
        wanted = target.values_list("parent_checkpoint_id", flat=True).first()
        while wanted is not None:
            # A parent is older than its children but for clocks that differ, so most of a page are
            # ancestors; the first is the one that is wanted, if it is there.
            page = [
                _Ancestor._make(values)
                for values in rows.filter(checkpoint_id__lte=wanted).values_list(*_COLUMNS)[:_PAGE]
            ]
            if not page or page[0].checkpoint_id != wanted:
                return
            for ancestor in page:
                if ancestor.checkpoint_id == wanted:
                    yield ancestor
                    wanted = ancestor.parent

    def _written(
        self, thread: int, through: dict[str, list[str]]
    ) -> dict[tuple[str, str], list[CheckpointWrite]]:
        ids = sorted({one for several in through.values() for one in several})
        found: dict[tuple[str, str], list[CheckpointWrite]] = {}
        for start in range(0, len(ids), AT_ONCE):
            some = ids[start : start + AT_ONCE]
            for write in self.all(CheckpointWrite).filter(
                thread_id=thread, checkpoint_id__in=some, channel__in=list(through)
            ):
                found.setdefault((write.checkpoint_id, write.channel), []).append(write)
        for writes in found.values():
            writes.sort(key=lambda write: (write.task_path, write.task_id, write.idx))
        return found

"""The rows of checkpoints in one Django database, for `saver`: what is one transaction each."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from django.db.models import Q
from django.utils import timezone

from workflow_storage.backends.orm.compiled_queries import Parameter
from workflow_storage.backends.orm.connections import in_callers_transaction
from workflow_storage.backends.orm.errors import operation, reading
from workflow_storage.contrib.langgraph.chains import (
    Head,
    Remembered,
    Row,
    Texts,
    base_position,
    new_head,
)
from workflow_storage.contrib.langgraph.models import (
    ChannelBlob,
    CheckpointWrite,
    GraphCheckpoint,
)
from workflow_storage.contrib.langgraph.names import ThreadName
from workflow_storage.contrib.langgraph.packing import Stored
from workflow_storage.contrib.langgraph.tables import KEY, Tables
from workflow_storage.exceptions import StorageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from django.db.models import QuerySet

    from workflow_storage.contrib.langgraph.models import ThreadNamespace
    from workflow_storage.contrib.langgraph.packing import Packing, Typed

_THREAD = Parameter("row", CheckpointWrite._meta.get_field("thread"))
_CHECKPOINT = Parameter("checkpoint", CheckpointWrite._meta.get_field("checkpoint_id"))

_UNIQUE_CHECKPOINT = ("thread_id", "checkpoint_id")
_UNIQUE_WRITE = ("thread_id", "checkpoint_id", "task_id", "idx")

AT_ONCE = 500
"""Ids in one query, at most."""


class NewValue(NamedTuple):
    """The value of a channel that may have to be stored."""

    version: str
    is_new: bool
    """Whether it differs from the parent's."""
    typed: Callable[[], Typed]


class NewCheckpoint(NamedTuple):
    """A checkpoint on its way into the database."""

    checkpoint_id: str
    parent_id: str | None
    run_id: str | None
    graph_run_key: str | None
    metadata: dict[str, Any]
    document: Stored
    values: Mapping[str, NewValue]
    """By channel."""
    kept: Mapping[str, str]
    """The versions of channels that were not given, which may be the parent's."""


class NewWrite(NamedTuple):
    """A write on its way into the database."""

    idx: int
    channel: str
    stored: Stored


class Found(NamedTuple):
    """A checkpoint as it is stored, with all that its values are rebuilt from."""

    name: ThreadName
    row: GraphCheckpoint
    blobs: Mapping[int, Row]
    writes: Sequence[CheckpointWrite]


class CheckpointRows(Tables):
    """Stores and reads checkpoints."""

    @operation
    def put(self, name: ThreadName, new: NewCheckpoint, packing: Packing) -> None:
        """Store a checkpoint, or what replaces one, with the values that its parent does not have."""
        key = name.key
        in_callers = in_callers_transaction(self.connection)
        with self.in_turn(), self.transaction():
            thread = self.locked(name, key)
            heads = self._heads(thread, key, new, packing)
            blobs: dict[str, int] = {}
            following: dict[str, Head] = {}
            for channel, value in new.values.items():
                head = heads.get(channel)
                if head is None or value.is_new or head.version != value.version:
                    head = self._insert_value(thread, channel, value, head, packing)
                following[channel] = head
                blobs[channel] = head.blob_id
            for channel, version in new.kept.items():
                head = heads.get(channel)
                if head is not None and head.version == version:
                    following[channel] = head
                    blobs[channel] = head.blob_id
            self._insert_checkpoint(thread, new, blobs)
        if in_callers:
            self.memory.forget(key)  # it can be rolled back
        else:
            remembered = Remembered(thread.pk, thread.generation, new.checkpoint_id, following)
            self.memory.keep(key, remembered)

    @operation
    def put_writes(
        self,
        name: ThreadName,
        checkpoint_id: str,
        task_id: str,
        task_path: str,
        writes: Iterable[NewWrite],
    ) -> None:
        """Store writes of a task: what is there stays, but for those below 0, which are replaced."""
        by_idx = {write.idx: write for write in writes}
        with self.in_turn(), self.transaction():
            thread = self.locked(name, name.key)
            for write in by_idx.values():
                self.queries(CheckpointWrite).put(
                    _UNIQUE_WRITE,
                    replace=write.idx < 0,
                    thread_id=thread.pk,
                    checkpoint_id=checkpoint_id,
                    task_id=task_id,
                    idx=write.idx,
                    task_path=task_path,
                    channel=write.channel,
                    type=write.stored.type,
                    data=write.stored.data,
                )

    def _heads(
        self, thread: ThreadNamespace, key: str, new: NewCheckpoint, packing: Packing
    ) -> Mapping[str, Head]:
        """Return the values of the parent, those that change with what they are based on."""
        if new.parent_id is None:
            return {}
        known = self.memory.get(key)
        if known is not None and known[:3] == (thread.pk, thread.generation, new.parent_id):
            return known.heads
        parent = self.all(GraphCheckpoint).filter(thread=thread, checkpoint_id=new.parent_id)
        blobs = self.as_of_now(parent).values_list("blobs", flat=True).first()
        if not blobs:
            return {}
        # What a parent that is there by now is based on is there, too, if a snapshot shows it.
        changed = {channel for channel, value in new.values.items() if value.is_new}
        rows = self.chains([blobs[channel] for channel in blobs if channel in changed])
        texts = Texts(rows, packing)
        of_parent = self.as_of_now(self.all(ChannelBlob).filter(pk__in=list(blobs.values())))
        versions = dict(of_parent.values_list("pk", "version"))
        heads = {}
        for channel, blob_id in blobs.items():
            if blob_id not in versions:
                continue
            heads[channel] = Head(blob_id, versions[blob_id], 0, {})
            if channel in changed:
                # What is damaged serves as no base, and the graph goes on.
                with suppress(Exception):
                    heads[channel] = texts.head(blob_id, versions[blob_id])
        return heads

    def _insert_value(
        self,
        thread: ThreadNamespace,
        channel: str,
        value: NewValue,
        head: Head | None,
        packing: Packing,
    ) -> Head:
        typed = value.typed()
        stored, base_id, position = None, None, 0
        if head is not None and head.links:
            position = head.position + 1
            base = head.links.get(base_position(position))
            if base is not None:
                stored, base_id = packing.delta(typed, base.plain), base.blob_id
        if stored is None:
            stored, base_id, position = packing.whole(typed), None, 0
        [key] = self.queries(ChannelBlob).insert(
            ("id",),
            thread_id=thread.pk,
            channel=channel,
            version=value.version,
            base_id=base_id,
            position=position,
            type=stored.type,
            data=stored.data,
        )
        if head is None or position == 0:
            return new_head(key, value.version, typed.plain)
        return head.followed_by(key, value.version, position, typed.plain)

    def _insert_checkpoint(
        self, thread: ThreadNamespace, new: NewCheckpoint, blobs: dict[str, int]
    ) -> None:
        self.queries(GraphCheckpoint).put(
            _UNIQUE_CHECKPOINT,
            replace=True,
            thread_id=thread.pk,
            checkpoint_id=new.checkpoint_id,
            parent_checkpoint_id=new.parent_id,
            created_at=timezone.now(),
            run_id=new.run_id,
            graph_run_key=new.graph_run_key,
            metadata=new.metadata,
            blobs=blobs,
            type=new.document.type,
            data=new.document.data,
        )

    @reading
    def get(self, name: ThreadName, checkpoint_id: str | None) -> Found | None:
        """Return a checkpoint, or the newest one; None if there is none."""

        def newest() -> QuerySet[GraphCheckpoint]:
            found = self.all(GraphCheckpoint).filter(thread__key=KEY)
            if checkpoint_id is not None:
                found = found.filter(checkpoint_id=_CHECKPOINT)
            return found.order_by("-checkpoint_id")[:1]

        def written() -> QuerySet[CheckpointWrite]:
            return self.all(CheckpointWrite).filter(thread_id=_THREAD, checkpoint_id=_CHECKPOINT)

        values = {"thread": name.key}
        if checkpoint_id is not None:
            values["checkpoint"] = checkpoint_id
        checkpoints, of_tasks = self.queries(GraphCheckpoint), self.queries(CheckpointWrite)
        while rows := checkpoints.objects(("get", *values), newest, keyed=True, **values):
            [row] = rows
            blobs = self.chains(row.blobs.values())
            if self._is_whole(row, blobs):
                of_row = {"row": row.thread_id, "checkpoint": row.checkpoint_id}
                writes = of_tasks.objects("of", written, keyed=True, **of_row)
                return Found(name, row, blobs, sorted(writes, key=_order))
        return None

    @reading
    def run_id(self, name: ThreadName, checkpoint_id: str | None) -> str | None:
        """Return the workflow run in which a checkpoint was made, or the newest one."""
        found = self.all(GraphCheckpoint).filter(thread__key=name.key)
        if checkpoint_id is not None:
            found = found.filter(checkpoint_id=checkpoint_id)
        return found.order_by("-checkpoint_id").values_list("run_id", flat=True).first()

    @reading
    def page(
        self, filters: Q, after: tuple[str, int] | None, limit: int
    ) -> list[tuple[int, str, dict[str, Any]]]:
        """Return a page of checkpoints: their keys, ids and metadata, the newest first."""
        found = self.all(GraphCheckpoint).filter(filters)
        if after is not None:
            checkpoint_id, pk = after
            found = found.filter(
                Q(checkpoint_id__lt=checkpoint_id) | Q(checkpoint_id=checkpoint_id, pk__lt=pk)
            )
        rows = found.order_by("-checkpoint_id", "-pk").values_list(
            "pk", "checkpoint_id", "metadata"
        )
        return list(rows[:limit])

    @reading
    def several(self, keys: Sequence[int]) -> list[Found]:
        """Return the checkpoints with some keys that are still there, in this order."""
        rows = self.all(GraphCheckpoint).select_related("thread").in_bulk(list(keys))
        blobs, writes = self._belongings(list(rows.values()))
        by_checkpoint: dict[tuple[int, str], list[CheckpointWrite]] = {}
        for write in writes:
            by_checkpoint.setdefault((write.thread_id, write.checkpoint_id), []).append(write)
        return [
            Found(
                ThreadName(row.thread.thread_id, row.thread.namespace),
                row,
                blobs,
                by_checkpoint.get((row.thread_id, row.checkpoint_id), []),
            )
            for row in (rows[key] for key in keys if key in rows)
            if self._is_whole(row, blobs)
        ]

    def _is_whole(self, row: GraphCheckpoint, blobs: Mapping[int, Row]) -> bool:
        """Whether all values of a checkpoint were found; if not, it may have been deleted since.

        Raises:
            StorageError: if it is still there.
        """
        missing = set(row.blobs.values()) - set(blobs)
        if not missing:
            return True
        if self.all(GraphCheckpoint).filter(pk=row.pk, blobs=row.blobs).exists():
            raise StorageError(
                f"Checkpoint {row.checkpoint_id} is damaged: of its values {sorted(missing)} are "
                "missing in the database. Go on from an earlier one."
            )
        return False

    def _belongings(
        self, rows: Sequence[GraphCheckpoint]
    ) -> tuple[dict[int, Row], list[CheckpointWrite]]:
        blobs = self.chains([blob for row in rows for blob in row.blobs.values()])
        of_rows = Q()
        by_thread: dict[int, list[str]] = {}
        for row in rows:
            by_thread.setdefault(row.thread_id, []).append(row.checkpoint_id)
        for thread_id, checkpoint_ids in by_thread.items():
            of_rows |= Q(thread_id=thread_id, checkpoint_id__in=checkpoint_ids)
        writes = list(self.all(CheckpointWrite).filter(of_rows)) if rows else []
        writes.sort(key=_order)
        return blobs, writes

    def chains(self, blob_ids: Iterable[int]) -> dict[int, Row]:
        """Return stored values with all that they are based on."""
        found: dict[int, Row] = {}
        needed = sorted(set(blob_ids))
        while needed:
            some, needed = needed[:AT_ONCE], needed[AT_ONCE:]
            with self.connection.cursor() as cursor:
                cursor.execute(_CHAINS % ", ".join(["%s"] * len(some)), some)
                for blob_id, base_id, position, kind, data in cursor.fetchall():
                    found[blob_id] = Row(base_id, position, Stored(kind, bytes(data)))
        return found


def _order(write: CheckpointWrite) -> tuple[str, str, int]:
    """Return what LangGraph applies the writes of a step in the order of."""
    return write.task_path, write.task_id, write.idx


_CHAINS = f"""
WITH RECURSIVE chain (id, base_id) AS (
    SELECT id, base_id FROM {ChannelBlob._meta.db_table} WHERE id IN (%s)
    UNION
    SELECT below.id, below.base_id FROM chain
    JOIN {ChannelBlob._meta.db_table} below ON below.id = chain.base_id
)
SELECT found.id, found.base_id, found.position, found.type, found.data
FROM chain JOIN {ChannelBlob._meta.db_table} found ON found.id = chain.id
"""

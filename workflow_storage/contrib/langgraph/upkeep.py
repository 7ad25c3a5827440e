"""Deleting, pruning and copying threads, for `saver` and the command: one transaction a thread.

Nothing that is kept is written anew: a value that others are based on stays until they go, too. So
none of this needs the serializer, or a key.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from django.db.models import Count, Exists, Model, OuterRef, QuerySet, Subquery
from django.db.models.functions import Coalesce

from workflow_storage.backends.orm.errors import operation, reading
from workflow_storage.contrib.langgraph.models import (
    ChannelBlob,
    CheckpointWrite,
    GraphCheckpoint,
    ThreadNamespace,
)
from workflow_storage.contrib.langgraph.names import ThreadName, digest
from workflow_storage.contrib.langgraph.tables import Tables, new_generation
from workflow_storage.exceptions import InvalidFieldError
from workflow_storage.models import WorkflowRun
from workflow_storage.status import RunStatus

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from datetime import datetime

_M = TypeVar("_M", bound=Model)
_D = TypeVar("_D", GraphCheckpoint, CheckpointWrite)

_AT_ONCE = 500
"""Ids in one statement, at most."""

_COPIED_AT_ONCE = 20
"""Rows that are copied at once, at most."""

_STATEMENT = 1 << 20
"""Bytes after which a statement ends that stores several rows: MySQL refuses one that is too large."""

_MISSING = 0
"""The id of no value."""

OPEN = (RunStatus.PENDING, RunStatus.RUNNING)
"""The statuses of runs whose threads are not deleted as unused."""

_DELETED = ""
"""The `graph_run_key` of a checkpoint of a run that was deleted, which others still need."""

_COUNTERS = "counters_since_delta_snapshot"
"""Where LangGraph's metadata has the channels whose value is not in the checkpoint itself."""


class ThreadUpkeep(Tables):
    """Deletes, prunes and copies threads."""

    @operation
    def delete_thread(self, thread_id: str, unless_since: datetime | None = None) -> int:
        """Delete all of a thread.

        Args:
            thread_id: which thread.
            unless_since: leave it as it is, if it has a checkpoint of that time or later.

        Returns:
            How many checkpoints were deleted.

        Raises:
            SnapshotError: in a caller's transaction that cannot see what others commit.
        """
        self.refuse_snapshot()
        with self.read_committed():
            threads = self._namespaces(thread_id)
            if self._is_used(threads, unless_since):
                return 0
            return self._delete_namespaces(threads)

    @operation
    def prune(self, thread_id: str, unless_since: datetime | None = None) -> int:
        """Delete all but the newest checkpoint of each namespace of a thread, and what that needs.

        What a subgraph stored during a call goes with the checkpoint of the root graph that called
        it.

        Args:
            thread_id: which thread.
            unless_since: leave it as it is, if it has a checkpoint of that time or later.

        Returns:
            How many checkpoints were deleted.
        """
        deleted = 0
        self.refuse_snapshot()
        with self.read_committed():
            threads = self._namespaces(thread_id)
            if self._is_used(threads, unless_since):
                return 0
            root = next((thread for thread in threads if not thread.namespace), None)
            of_root = self._checkpoints(root) if root is not None else None
            before = set() if of_root is None else set(_ids(of_root))
            kept_of_root = set() if of_root is None else set(self._kept(of_root))
            over = [
                thread
                for thread in threads
                if (caller := self._caller(thread)) in before and caller not in kept_of_root
            ]
            deleted += self._delete_namespaces(over)
            for thread in threads:
                if thread not in over:
                    deleted += self._prune(thread)
        return deleted

    @operation
    def delete_for_runs(self, thread: int, keys: Sequence[str]) -> None:
        """Delete the checkpoints of a namespace that some of LangGraph's runs have made.

        Those that a `DeltaChannel` of others is rebuilt from stay as long as these do, until
        something else of the namespace is deleted.

        Args:
            thread: the key of its row.
            keys: of the runs; see `names.graph_run_key`.
        """
        self.refuse_snapshot()
        with self.read_committed():
            self.begin_writing()
            for locked in self.with_lock(self.all(ThreadNamespace).filter(pk=thread)):
                checkpoints = self._checkpoints(locked)
                asked = set(_ids(checkpoints.filter(graph_run_key=_DELETED)))
                for some in _parts(keys):
                    asked.update(_ids(checkpoints.filter(graph_run_key__in=some)))
                needed = self._needed(checkpoints, set(_ids(checkpoints)) - asked)
                going = asked - needed
                for some in _parts(asked & needed):
                    checkpoints.filter(checkpoint_id__in=some).update(graph_run_key=_DELETED)
                for some in _parts(going):
                    _delete(self._writes(locked).filter(checkpoint_id__in=some))
                    _delete(checkpoints.filter(checkpoint_id__in=some))
                    checkpoints.filter(parent_checkpoint_id__in=some).update(
                        parent_checkpoint_id=None
                    )
                if checkpoints.exists():
                    self._collect(locked)
                else:
                    self._delete_namespaces([locked])

    def unused(
        self, before: datetime, *, keep_latest: bool, limit: int | None = None
    ) -> Iterator[tuple[str, int]]:
        """Yield the threads without a checkpoint since a time, but for those of an open run.

        Args:
            before: that time.
            keep_latest: whether a thread with one checkpoint has nothing to delete, and one of an
                open run has.
            limit: how many at most.

        Yields:
            The id of a thread, and how many checkpoints there are to delete, about.
        """
        last = 0
        while limit is None or limit > 0:
            some = _AT_ONCE if limit is None else min(limit, _AT_ONCE)
            page = self._unused(before, last, keep_latest=keep_latest, limit=some)
            if not page:
                return
            for last, thread_id, count in page:  # noqa: B007 - of the last one
                yield thread_id, count
            limit = None if limit is None else limit - len(page)

    @reading
    def _unused(
        self, before: datetime, after: int, *, keep_latest: bool, limit: int
    ) -> list[tuple[int, str, int]]:
        of_thread = self.all(GraphCheckpoint).filter(thread__thread_key=OuterRef("thread_key"))
        others = self.all(ThreadNamespace).filter(thread_key=OuterRef("thread_key"))
        found = self.all(ThreadNamespace).filter(
            ~Exists(others.filter(pk__lt=OuterRef("pk"))),
            ~Exists(of_thread.filter(created_at__gte=before)),
            pk__gt=after,
        )
        one = of_thread.order_by().values("thread__thread_key")
        if keep_latest:
            spaces = others.order_by().values("thread_key").annotate(n=Count("pk")).values("n")
            count = Coalesce(Subquery(one.annotate(n=Count("pk")).values("n")), 0)
            found = found.annotate(count=count - Subquery(spaces)).filter(count__gt=0)
        else:
            is_open = self.all(WorkflowRun).filter(status__in=OPEN).values("pk")
            count = Coalesce(Subquery(one.annotate(n=Count("pk")).values("n")), 0)
            found = found.annotate(count=count).filter(
                ~Exists(of_thread.filter(run_id__in=is_open))
            )
        return list(found.order_by("pk").values_list("pk", "thread_id", "count")[:limit])

    @reading
    def threads_of_runs(self, keys: Sequence[str]) -> list[int]:
        """Return the keys of the namespaces that have checkpoints of some of LangGraph's runs."""
        threads: set[int] = set()
        for some in _parts(keys):
            found = self.all(GraphCheckpoint).filter(graph_run_key__in=some)
            threads.update(found.values_list("thread_id", flat=True).distinct())
        return sorted(threads)

    @operation
    def copy_thread(self, source_id: str, target_id: str) -> None:
        """Copy all of a thread to a new one.

        Raises:
            InvalidFieldError: if the new one is there already.
        """
        with self.read_committed():
            sources = self._namespaces(source_id)
            if not sources:
                return
            # Only with these locks it is settled whether the target is there: who begins it has them.
            root = ThreadName(target_id, "")
            self.locked(root, root.key)
            names = [ThreadName(target_id, source.namespace) for source in sources]
            targets = [self.locked(name, name.key) for name in names]
            there = self.all(GraphCheckpoint).filter(thread__thread_key=digest(target_id))
            if self.as_of_now(there).exists():
                raise InvalidFieldError(
                    f"There is a thread {target_id!r} already. Copy to another id, or delete it."
                )
            for source, target in zip(sources, targets, strict=True):
                self._copy(source, target)

    def _namespaces(self, thread_id: str) -> list[ThreadNamespace]:
        """Return the namespaces of a thread, which no other transaction changes meanwhile."""
        self.begin_writing()
        found = self.all(ThreadNamespace).filter(thread_key=digest(thread_id))
        locked: list[ThreadNamespace] | None = None
        # Whoever was waited for may have made others, which a statement that has begun does not see.
        while locked != (threads := list(self.with_lock(found.order_by("pk")))):
            locked = threads
        return threads

    def _is_used(self, threads: Sequence[ThreadNamespace], since: datetime | None) -> bool:
        """Whether a thread that is locked has a checkpoint of a time or later."""
        if since is None:
            return False
        since_then = self.all(GraphCheckpoint).filter(thread__in=threads, created_at__gte=since)
        return self.as_of_now(since_then).exists()

    def _checkpoints(self, thread: ThreadNamespace) -> QuerySet[GraphCheckpoint]:
        return self.as_of_now(self.all(GraphCheckpoint).filter(thread=thread))

    def _blobs(self, thread: ThreadNamespace) -> QuerySet[ChannelBlob]:
        return self.as_of_now(self.all(ChannelBlob).filter(thread=thread))

    def _writes(self, thread: ThreadNamespace) -> QuerySet[CheckpointWrite]:
        return self.as_of_now(self.all(CheckpointWrite).filter(thread=thread))

    def _delete_namespaces(self, threads: Sequence[ThreadNamespace]) -> int:
        deleted = 0
        for thread in threads:
            _delete(self._writes(thread))
            deleted += _delete(self._checkpoints(thread))
            _delete(self._blobs(thread))
            _delete(self.all(ThreadNamespace).filter(pk=thread.pk))
            self.memory.forget(thread.key)
        return deleted

    def _caller(self, thread: ThreadNamespace) -> str | None:
        """Return the checkpoint of the root graph that a subgraph was called from, if it was called.

        The state of a subgraph with a checkpointer of its own (``checkpointer=True``) outlives its
        calls; its namespace has no id of a task.
        """
        if ":" not in thread.namespace:
            return None
        newest = self._checkpoints(thread).order_by("-checkpoint_id")
        metadata = newest.values_list("metadata", flat=True).first()
        parents = metadata.get("parents") if isinstance(metadata, dict) else None
        return parents.get("") if isinstance(parents, dict) else None

    def _prune(self, thread: ThreadNamespace) -> int:
        checkpoints = self._checkpoints(thread)
        kept = self._kept(checkpoints)
        if not kept:
            return 0
        going = sorted(set(_ids(checkpoints)) - set(kept))
        for some in _parts(going):
            _delete(checkpoints.filter(checkpoint_id__in=some))
        # With those that came too late, of checkpoints that were deleted before.
        written = self._writes(thread).filter(checkpoint_id__lt=kept[0])
        late = set(written.values_list("checkpoint_id", flat=True).distinct()) - set(kept)
        for some in _parts(sorted(late)):
            _delete(written.filter(checkpoint_id__in=some))
        for some in _parts(going):
            checkpoints.filter(parent_checkpoint_id__in=some).update(parent_checkpoint_id=None)
        self._collect(thread)
        return len(going)

    def _kept(self, checkpoints: QuerySet[GraphCheckpoint]) -> list[str]:
        """Return the newest checkpoint, and those that its `DeltaChannel`s are rebuilt from."""
        newest = checkpoints.order_by("-checkpoint_id").first()
        if newest is None:
            return []
        return [newest.checkpoint_id, *self._needed(checkpoints, [newest.checkpoint_id])]

    def _needed(self, checkpoints: QuerySet[GraphCheckpoint], kept: Iterable[str]) -> set[str]:
        """Return the ancestors that the `DeltaChannel`s of some checkpoints are rebuilt from."""
        open_channels: dict[str, set[str]] = {}
        for some in _parts(kept):
            rows = checkpoints.filter(checkpoint_id__in=some)
            for checkpoint_id, blobs, metadata in rows.values_list(
                "checkpoint_id", "blobs", "metadata"
            ):
                counters = metadata.get(_COUNTERS) if isinstance(metadata, dict) else None
                # A value that is stored ends the way back.
                if wanted := set(counters or ()) - set(blobs):
                    open_channels[checkpoint_id] = wanted
        if not open_channels:
            return set()
        parents: dict[str, tuple[str | None, dict[str, int]]] = {
            checkpoint_id: (parent, blobs)
            for checkpoint_id, parent, blobs in checkpoints.values_list(
                "checkpoint_id", "parent_checkpoint_id", "blobs"
            )
        }
        needed: set[str] = set()
        followed: set[tuple[str, str]] = set()
        for checkpoint_id, channels in open_channels.items():
            for channel in channels:
                link = parents[checkpoint_id][0]
                while link is not None and link in parents and (link, channel) not in followed:
                    followed.add((link, channel))
                    needed.add(link)
                    parent, blobs = parents[link]
                    link = None if channel in blobs else parent
        return needed

    def _collect(self, thread: ThreadNamespace) -> None:
        """Delete the values that no checkpoint has, and no value that one has is based on."""
        bases = dict(self._blobs(thread).values_list("pk", "base_id"))
        needed: set[int] = set()
        for blobs in self._checkpoints(thread).values_list("blobs", flat=True).iterator():
            for blob_id in blobs.values():
                link: int | None = blob_id
                while link is not None and link not in needed:
                    needed.add(link)
                    link = bases.get(link)
        for some in _parts(sorted(bases.keys() - needed)):
            _delete(self.all(ChannelBlob).filter(pk__in=some))
        self.all(ThreadNamespace).filter(pk=thread.pk).update(generation=new_generation())
        self.memory.forget(thread.key)

    def _copy(self, source: ThreadNamespace, target: ThreadNamespace) -> None:
        copies: dict[int, int] = {}
        # A value is younger than what it is based on. What is missing is missing in the copy, too.
        for blobs in _pages(self._blobs(source)):
            for blob in blobs:
                base_id = None if blob.base_id is None else copies.get(blob.base_id, _MISSING)
                old, blob.pk, blob.base_id, blob.thread = blob.pk, None, base_id, target
                blob.save(using=self.alias, force_insert=True)
                copies[old] = blob.pk
        for checkpoints in _pages(self._checkpoints(source)):
            for checkpoint in checkpoints:
                checkpoint.pk, checkpoint.thread = None, target
                checkpoint.run_id = None  # the run has made the other one
                checkpoint.blobs = {
                    name: copies.get(blob, _MISSING) for name, blob in checkpoint.blobs.items()
                }
            for some in _statements(checkpoints):
                self.all(GraphCheckpoint).bulk_create(some)
        for writes in _pages(self._writes(source)):
            for write in writes:
                write.pk, write.thread = None, target
            for some_writes in _statements(writes):
                self.all(CheckpointWrite).bulk_create(some_writes)


def _pages(rows: QuerySet[_M]) -> Iterator[list[_M]]:
    """Yield all rows in the order of their keys, some at a time."""
    last = 0
    while page := list(rows.filter(pk__gt=last).order_by("pk")[:_COPIED_AT_ONCE]):
        last = page[-1].pk
        yield page


def _statements(rows: Iterable[_D]) -> Iterator[list[_D]]:
    """Yield rows with data, as many at a time as one statement is to store."""
    some: list[_D] = []
    size = 0
    for row in rows:
        if some and size + len(row.data) > _STATEMENT:
            yield some
            some, size = [], 0
        some.append(row)
        size += len(row.data)
    if some:
        yield some


def _ids(checkpoints: QuerySet[GraphCheckpoint]) -> list[str]:
    return list(checkpoints.values_list("checkpoint_id", flat=True))


def _parts(ids: Iterable[Any]) -> Iterator[list[Any]]:
    whole = list(ids)
    for start in range(0, len(whole), _AT_ONCE):
        yield whole[start : start + _AT_ONCE]


def _delete(rows: QuerySet[Any]) -> int:
    """Delete rows; nothing refers to them, so Django reads none."""
    return rows.delete()[0]

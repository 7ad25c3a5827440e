"""`DjangoSaver`: LangGraph's checkpointer on Django tables."""

from __future__ import annotations

import functools
import random
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from django.apps import apps
from django.core.exceptions import ImproperlyConfigured
from django.db import DEFAULT_DB_ALIAS
from django.db.models import Q
from langgraph.checkpoint.base import (
    EXCLUDED_METADATA_KEYS,
    WRITES_IDX_MAP,
    BaseCheckpointSaver,
    CheckpointTuple,
)

from workflow_storage.backends.orm import DjangoWorkflowRunRepository
from workflow_storage.base import StorageBackend
from workflow_storage.contrib.langgraph.chains import Memory, Texts
from workflow_storage.contrib.langgraph.history import HistoryRows
from workflow_storage.contrib.langgraph.models import MAX_ID
from workflow_storage.contrib.langgraph.names import (
    ThreadName,
    digest,
    graph_run_key,
    thread_id_of,
    thread_name,
    valid_checkpoint_id,
    valid_thread_id,
)
from workflow_storage.contrib.langgraph.packing import Packing, Stored
from workflow_storage.contrib.langgraph.rows import (
    CheckpointRows,
    NewCheckpoint,
    NewValue,
    NewWrite,
)
from workflow_storage.contrib.langgraph.upkeep import ThreadUpkeep
from workflow_storage.exceptions import InvalidFieldError, StorageError
from workflow_storage.factory import acreate_storage_backend, create_storage_backend
from workflow_storage.recorder.run import run_around
from workflow_storage.validation import valid_name

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence

    from langchain_core.runnables import RunnableConfig
    from langgraph.checkpoint.base import (
        ChannelVersions,
        Checkpoint,
        CheckpointMetadata,
        DeltaChannelHistory,
    )
    from langgraph.checkpoint.serde.base import SerializerProtocol

    from workflow_storage.config import StorageConfig
    from workflow_storage.contrib.langgraph.history import Path
    from workflow_storage.contrib.langgraph.rows import Found
    from workflow_storage.contrib.langgraph.tables import Tables

_P = ParamSpec("_P")
_R = TypeVar("_R")
_T = TypeVar("_T", bound="Tables")

_APP = "workflow_storage.contrib.langgraph"

_PAGE = 200
"""Checkpoints whose metadata is read at once."""

_VALUES_AT_ONCE = 20
"""Checkpoints whose values are read at once."""

_INLINE = 256
"""Characters of a text that is stored with the checkpoint itself."""


class DjangoSaver(BaseCheckpointSaver[str]):
    """Stores the checkpoints of graphs in the tables of this app, for sync and async code alike.

    Use it as ``graph.compile(checkpointer=DjangoSaver())``. One object serves all graphs, threads
    and event loops of a process.

    Args:
        backend: whose database to use: a `StorageBackend`, or what `create_storage_backend` takes.
            None for that of the project's own store, or for ``default`` if that is no Django
            database.
        serde: LangGraph's serializer; None for its own with msgpack.

    Attributes:
        backend: as above.

    Raises:
        ImproperlyConfigured: if the app is not installed.
    """

    def __init__(
        self,
        backend: StorageBackend | StorageConfig | str | None = None,
        *,
        serde: SerializerProtocol | None = None,
    ) -> None:
        super().__init__(serde=serde)
        if not apps.is_installed(_APP):
            raise ImproperlyConfigured(
                f"{_APP} is not installed. Add {_APP!r} to INSTALLED_APPS, and run "
                "`manage.py migrate`."
            )
        self.backend = backend
        self._memory = Memory()
        self._is_open = False

    # Sync

    def get_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        """Return the checkpoint that a configuration names, or the newest of its thread."""
        rows, name = self._rows(), thread_name(config)
        found = self._run(rows.get, name, valid_checkpoint_id(config))
        return None if found is None else self._tuple(found)

    def list(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,  # noqa: A002 - LangGraph's name
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> Iterator[CheckpointTuple]:
        """List checkpoints, the newest first; see `BaseCheckpointSaver.list`."""
        rows, listing = self._rows(), _Listing(config, filter, before, limit)
        while listing.goes_on:
            listing.take(self._run(rows.page, listing.filters, listing.after, _PAGE))
            for keys in listing.chosen():
                yield from self._tuples(self._run(rows.several, keys))

    def put(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        """Store a checkpoint whose parent is the one that the configuration names."""
        new = self._new(config, checkpoint, metadata, new_versions)
        self._run(self._rows().put, thread_name(config), new, self._packing)
        return _configuration(config, checkpoint)

    def put_writes(
        self,
        config: RunnableConfig,
        writes: Sequence[tuple[str, Any]],
        task_id: str,
        task_path: str = "",
    ) -> None:
        """Store what a task has written after the checkpoint that the configuration names."""
        self._run(self._rows().put_writes, *self._new_writes(config, writes, task_id, task_path))

    def delete_thread(self, thread_id: str) -> None:
        """Delete all of a thread."""
        self._run(self._upkeep().delete_thread, valid_thread_id(thread_id))

    def delete_for_runs(self, run_ids: Sequence[str]) -> None:
        """Delete the checkpoints that some of LangGraph's runs (`metadata["run_id"]`) have made."""
        upkeep, keys = self._upkeep(), _run_keys(run_ids)
        for thread in self._run(upkeep.threads_of_runs, keys):
            self._run(upkeep.delete_for_runs, thread, keys)

    def copy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        """Copy all of a thread to a new one."""
        ids = valid_thread_id(source_thread_id), valid_thread_id(target_thread_id)
        self._run(self._upkeep().copy_thread, *ids)

    def prune(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest") -> None:
        """Delete all of some threads, or all but the newest checkpoint of each namespace.

        Args:
            thread_ids: which threads.
            strategy: ``keep_latest`` or ``delete``. What is kept stays readable: the values that it
                is based on stay, and the checkpoints that a `DeltaChannel` is rebuilt from.
        """
        prune = self._pruning(strategy)
        for thread_id in thread_ids:
            self._run(prune, valid_thread_id(thread_id))

    def get_delta_channel_history(
        self, *, config: RunnableConfig, channels: Sequence[str]
    ) -> Mapping[str, DeltaChannelHistory]:
        """Return what the values of some `DeltaChannel`s are rebuilt from."""
        rows, which = self._in_store(HistoryRows), self._path(config)
        return _histories(self._run(rows.paths, *which, channels, self._packing))

    def run_of(self, config: RunnableConfig) -> str | None:
        """Return the id of the workflow run in which the checkpoint of a configuration was made."""
        name = thread_name(config)
        return self._run(self._rows().run_id, name, valid_checkpoint_id(config))

    # Async

    async def aget_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        """Async twin of `get_tuple`."""
        await self._open()
        rows, name = self._rows(), thread_name(config)
        found = await self._arun(rows.get, name, valid_checkpoint_id(config))
        return None if found is None else self._tuple(found)

    async def alist(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,  # noqa: A002 - LangGraph's name
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> AsyncIterator[CheckpointTuple]:
        """Async twin of `list`."""
        await self._open()
        rows, listing = self._rows(), _Listing(config, filter, before, limit)
        while listing.goes_on:
            listing.take(await self._arun(rows.page, listing.filters, listing.after, _PAGE))
            for keys in listing.chosen():
                for found in self._tuples(await self._arun(rows.several, keys)):
                    yield found

    async def aput(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        """Async twin of `put`."""
        await self._open()
        new = self._new(config, checkpoint, metadata, new_versions)
        await self._arun(self._rows().put, thread_name(config), new, self._packing)
        return _configuration(config, checkpoint)

    async def aput_writes(
        self,
        config: RunnableConfig,
        writes: Sequence[tuple[str, Any]],
        task_id: str,
        task_path: str = "",
    ) -> None:
        """Async twin of `put_writes`."""
        await self._open()
        await self._arun(
            self._rows().put_writes, *self._new_writes(config, writes, task_id, task_path)
        )

    async def adelete_thread(self, thread_id: str) -> None:
        """Async twin of `delete_thread`."""
        await self._open()
        await self._arun(self._upkeep().delete_thread, valid_thread_id(thread_id))

    async def adelete_for_runs(self, run_ids: Sequence[str]) -> None:
        """Async twin of `delete_for_runs`."""
        await self._open()
        upkeep, keys = self._upkeep(), _run_keys(run_ids)
        for thread in await self._arun(upkeep.threads_of_runs, keys):
            await self._arun(upkeep.delete_for_runs, thread, keys)

    async def acopy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        """Async twin of `copy_thread`."""
        await self._open()
        ids = valid_thread_id(source_thread_id), valid_thread_id(target_thread_id)
        await self._arun(self._upkeep().copy_thread, *ids)

    async def aprune(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest") -> None:
        """Async twin of `prune`."""
        await self._open()
        prune = self._pruning(strategy)
        for thread_id in thread_ids:
            await self._arun(prune, valid_thread_id(thread_id))

    async def aget_delta_channel_history(
        self, *, config: RunnableConfig, channels: Sequence[str]
    ) -> Mapping[str, DeltaChannelHistory]:
        """Async twin of `get_delta_channel_history`."""
        await self._open()
        rows, which = self._in_store(HistoryRows), self._path(config)
        return _histories(await self._arun(rows.paths, *which, channels, self._packing))

    async def arun_of(self, config: RunnableConfig) -> str | None:
        """Async twin of `run_of`."""
        await self._open()
        name = thread_name(config)
        return await self._arun(self._rows().run_id, name, valid_checkpoint_id(config))

    def get_next_version(self, current: str | None, channel: None) -> str:
        """Return the version after another one.

        Two branches of a thread never give the same: a number alone would be the same in both.
        """
        number = 0 if current is None else int(str(current).split(".", 1)[0])
        return f"{number + 1:032}.{random.random():016}"

    # Where it is stored

    async def _open(self) -> None:
        """Open the store if nobody has: where an event loop runs, `_runs` could not."""
        if not self._is_open and not isinstance(self.backend, StorageBackend):
            await acreate_storage_backend(self.backend)
        self._is_open = True

    def _runs(self) -> DjangoWorkflowRunRepository:
        """Return the repository of runs in the same database, which has its threads."""
        given = self.backend
        store = given if isinstance(given, StorageBackend) else create_storage_backend(given)
        if given is None and not isinstance(store.runs, DjangoWorkflowRunRepository):
            store = create_storage_backend(DEFAULT_DB_ALIAS)
        if not isinstance(store.runs, DjangoWorkflowRunRepository):
            raise StorageError(
                f"{store.name} is no Django database, and checkpoints are Django tables. Pass the "
                "name of one in DATABASES to DjangoSaver()."
            )
        return store.runs

    def _rows(self) -> CheckpointRows:
        return self._in_store(CheckpointRows)

    def _upkeep(self) -> ThreadUpkeep:
        return self._in_store(ThreadUpkeep)

    def _in_store(self, tables: type[_T]) -> _T:
        runs = self._runs()
        return tables(runs.alias, own_connection=runs.own_connection, memory=self._memory)

    def _pruning(self, strategy: str) -> Callable[[str], object]:
        if strategy not in {"keep_latest", "delete"}:
            raise ValueError(f"strategy is {strategy!r}. Pass 'keep_latest' or 'delete'.")
        upkeep = self._upkeep()
        return upkeep.prune if strategy == "keep_latest" else upkeep.delete_thread

    def _run(self, call: Callable[_P, _R], /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        return self._runs().from_any_thread(call, *args, **kwargs)

    async def _arun(self, call: Callable[_P, _R], /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        return await self._runs().in_thread(call, *args, **kwargs)

    def _path(self, config: RunnableConfig) -> tuple[ThreadName, str | None]:
        return thread_name(config), valid_checkpoint_id(config)

    # What is stored

    @property
    def _packing(self) -> Packing:
        return Packing(self.serde)

    def _new(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> NewCheckpoint:
        packing = self._packing
        versions = checkpoint["channel_versions"]
        inline, values = {}, {}
        for channel, value in checkpoint["channel_values"].items():
            if _is_inline(value):
                inline[channel] = value
            else:
                values[channel] = NewValue(
                    str(versions.get(channel, "")),
                    channel in new_versions,
                    functools.cache(functools.partial(packing.typed, value)),
                )
        for value in values.values():
            if value.is_new:
                value.typed()  # here rather than in the transaction
        around = run_around()
        stored_metadata = _metadata(config, metadata)
        return NewCheckpoint(
            checkpoint_id=valid_name("checkpoint_id", checkpoint["id"], MAX_ID),
            parent_id=valid_checkpoint_id(config),
            run_id=None if around is None else around.run_id,
            graph_run_key=graph_run_key(stored_metadata.get("run_id")),
            metadata=stored_metadata,
            document=packing.whole(packing.typed({**checkpoint, "channel_values": inline})),
            values=values,
            kept={
                channel: str(version)
                for channel, version in versions.items()
                if channel not in checkpoint["channel_values"] and channel not in new_versions
            },
        )

    def _new_writes(
        self,
        config: RunnableConfig,
        writes: Sequence[tuple[str, Any]],
        task_id: str,
        task_path: str,
    ) -> tuple[ThreadName, str, str, str, list[NewWrite]]:  # type: ignore[valid-type]
        packing = self._packing
        checkpoint_id = valid_checkpoint_id(config)
        if checkpoint_id is None:
            raise InvalidFieldError("The config names no checkpoint_id that the writes belong to.")
        return (
            thread_name(config),
            checkpoint_id,
            valid_name("task_id", task_id, MAX_ID),
            task_path,
            [
                NewWrite(
                    WRITES_IDX_MAP.get(channel, idx), channel, packing.whole(packing.typed(value))
                )
                for idx, (channel, value) in enumerate(writes)
            ],
        )

    def _tuple(self, found: Found) -> CheckpointTuple:
        [checkpoint] = self._tuples([found])
        return checkpoint

    def _tuples(self, found: Sequence[Found]) -> Iterator[CheckpointTuple]:
        packing = self._packing
        texts: Texts | None = None
        for one in found:
            row = one.row
            if texts is None or texts.rows is not one.blobs:
                texts = Texts(one.blobs, packing)
            try:
                checkpoint = packing.load(Stored(row.type, bytes(row.data)))
                values = checkpoint["channel_values"]
                for channel, blob_id in row.blobs.items():
                    values[channel] = packing.value(texts.typed(blob_id))
                writes = [
                    (
                        write.task_id,
                        write.channel,
                        packing.load(Stored(write.type, bytes(write.data))),
                    )
                    for write in one.writes
                ]
            except Exception as exc:  # whatever the bytes are
                reason = exc if isinstance(exc, ValueError) else repr(exc)
                raise StorageError(
                    f"Checkpoint {row.checkpoint_id} of thread {one.name.thread_id!r} cannot be "
                    f"read: {reason}. Go on from an earlier one."
                ) from exc
            parent = row.parent_checkpoint_id
            yield CheckpointTuple(
                _config(one.name, row.checkpoint_id),
                checkpoint,
                row.metadata,
                None if parent is None else _config(one.name, parent),
                writes,
            )


class _Listing:
    """Which checkpoints `list` has found so far, and which are next."""

    def __init__(
        self,
        config: RunnableConfig | None,
        metadata: dict[str, Any] | None,
        before: RunnableConfig | None,
        limit: int | None,
    ) -> None:
        self.filters = _filters(config, before)
        self.after: tuple[str, int] | None = None
        self._metadata = metadata or {}
        self._left = limit
        self._found: list[int] = []
        self._is_last = False

    @property
    def goes_on(self) -> bool:
        """Whether there is another page to be read."""
        return not self._is_last and (self._left is None or self._left > 0)

    def take(self, page: list[tuple[int, str, dict[str, Any]]]) -> None:
        """Choose those of a page that match."""
        self._is_last = len(page) < _PAGE
        if page:
            self.after = page[-1][1], page[-1][0]
        wanted = self._metadata.items()
        self._found = [
            key
            for key, _, metadata in page
            if all(name in metadata and metadata[name] == value for name, value in wanted)
        ]
        if self._left is not None:
            self._found = self._found[: self._left]
            self._left -= len(self._found)

    def chosen(self) -> Iterator[list[int]]:
        """Yield the keys of those that match, a few at a time."""
        for start in range(0, len(self._found), _VALUES_AT_ONCE):
            yield self._found[start : start + _VALUES_AT_ONCE]


def _filters(config: RunnableConfig | None, before: RunnableConfig | None) -> Q:
    filters = Q()
    if config is not None:
        if (config.get("configurable") or {}).get("checkpoint_ns") is None:
            filters &= Q(thread__thread_key=digest(thread_id_of(config)))
        else:
            filters &= Q(thread__key=thread_name(config).key)
        if checkpoint_id := valid_checkpoint_id(config):
            filters &= Q(checkpoint_id=checkpoint_id)
    if before is not None and (earlier := valid_checkpoint_id(before)):
        filters &= Q(checkpoint_id__lt=earlier)
    return filters


def _histories(paths: Mapping[str, Path]) -> dict[str, DeltaChannelHistory]:
    histories: dict[str, DeltaChannelHistory] = {}
    for channel, path in paths.items():
        histories[channel] = {"writes": path.writes}
        if path.is_seeded:
            histories[channel]["seed"] = path.seed
    return histories


def _run_keys(run_ids: Sequence[str]) -> list[str]:
    keys = (graph_run_key(run_id) for run_id in run_ids)
    return [key for key in keys if key is not None]


def _metadata(config: RunnableConfig, metadata: CheckpointMetadata) -> dict[str, Any]:
    """Return what is stored of the metadata: LangGraph's, and what the caller added to the config.

    As `get_checkpoint_metadata` does it, but texts stay as they are.
    """
    stored: dict[str, Any] = {key: value for key, value in metadata.items() if key != "writes"}
    for added in (config.get("metadata"), config.get("configurable")):
        for key, value in (added or {}).items():
            if key in stored or key in EXCLUDED_METADATA_KEYS or key.startswith("__"):
                continue
            if isinstance(value, str | int | float):
                stored[key] = value
    return stored


def _is_inline(value: object) -> bool:
    """Whether a value is stored with the checkpoint itself."""
    if type(value) is str:
        return len(value) <= _INLINE
    return value is None or type(value) in (bool, int, float)


def _configuration(config: RunnableConfig, checkpoint: Checkpoint) -> RunnableConfig:
    """Return the configuration that names a checkpoint which was just stored."""
    configurable = config["configurable"]
    return {
        "configurable": {
            "thread_id": configurable["thread_id"],
            "checkpoint_ns": configurable.get("checkpoint_ns") or "",
            "checkpoint_id": checkpoint["id"],
        }
    }


def _config(name: ThreadName, checkpoint_id: str) -> RunnableConfig:
    return {
        "configurable": {
            "thread_id": name.thread_id,
            "checkpoint_ns": name.namespace,
            "checkpoint_id": checkpoint_id,
        }
    }

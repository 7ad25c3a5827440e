"""What the conformance suite does not ask of `DjangoSaver`, on every database."""

import asyncio
import os
import random
import subprocess
import sys
import uuid
from dataclasses import dataclass

import pytest
from django.core.exceptions import ImproperlyConfigured
from langgraph.checkpoint.base import empty_checkpoint
from langgraph.checkpoint.serde.encrypted import EncryptedSerializer
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer

from tests.contrib.langgraph.graphs import DeltaNumbers, counting, thread
from workflow_storage import InvalidFieldError, StorageError, create_storage_backend
from workflow_storage.contrib.langgraph import DjangoSaver
from workflow_storage.contrib.langgraph.models import (
    ChannelBlob,
    CheckpointWrite,
    GraphCheckpoint,
    ThreadNamespace,
)
from workflow_storage.factory import forget
from workflow_storage.router import WorkflowStorageRouter


def put(saver, values, config=None, metadata=None):
    """Store a checkpoint with a new version of each channel; return its config."""
    version = saver.get_next_version(None, None)
    versions = dict.fromkeys(values, version)
    checkpoint = {**empty_checkpoint(), "channel_values": values, "channel_versions": versions}
    given = config or {"configurable": {"thread_id": "1", "checkpoint_ns": ""}}
    return saver.put(given, checkpoint, metadata or {"source": "loop", "step": 0}, versions)


def values_of(saver, config):
    return saver.get_tuple(config).checkpoint["channel_values"]


@pytest.mark.parametrize("value", [1, True, None, 0.1, "x" * 10_000, b"\x01" * 500, [1], "\0"])
def test_a_value_comes_back_as_it_was(saver, value):
    config = put(saver, {"channel": value})

    assert values_of(saver, config) == {"channel": value}


def test_a_growing_list_comes_back_at_every_step(saver):
    config, configs, items = None, [], []
    for number in range(40):
        items = [*items, {"number": number, "text": f"{uuid.uuid4()} " * 5}]
        config = put(saver, {"items": items}, config)
        configs.append(config)

    assert [len(values_of(saver, config)["items"]) for config in configs] == list(range(1, 41))
    assert values_of(DjangoSaver(saver.backend), config) == {"items": items}
    assert [
        len(found.checkpoint["channel_values"]["items"])
        for found in saver.list(config | {"configurable": {"thread_id": "1"}})
    ] == list(range(40, 0, -1))


def test_another_saver_goes_on_with_deltas(saver):
    items = [str(uuid.uuid4()) for _ in range(200)]
    config = put(saver, {"items": items})

    config = put(DjangoSaver(saver.backend), {"items": [*items, "new"]}, config)

    assert values_of(saver, config) == {"items": [*items, "new"]}
    blob = ChannelBlob.objects.using(saver.backend.alias).order_by("pk").last()
    assert blob.base_id is not None
    assert len(blob.data) < 200


def test_two_branches_from_one_checkpoint_have_their_own_values(saver):
    first = put(saver, {"items": ["a" * 300]})

    one = put(saver, {"items": ["a" * 300, "one"]}, first)
    two = put(saver, {"items": ["a" * 300, "two"]}, first)

    assert values_of(saver, one)["items"][1:] == ["one"]
    assert values_of(saver, two)["items"][1:] == ["two"]


@pytest.mark.parametrize("thread_id", ["x" * 5000, "ünï", "a ", 7, uuid.UUID(int=1)])
def test_a_thread_has_any_name(saver, thread_id):
    config = {"configurable": {"thread_id": thread_id, "checkpoint_ns": "n" * 3000}}

    put(saver, {"channel": 1}, config)

    [found] = saver.list(config)
    assert found.config["configurable"]["thread_id"] == str(thread_id)
    assert saver.get_tuple({"configurable": {"thread_id": f"{thread_id}b"}}) is None


@pytest.mark.parametrize("thread_id", ["a\0b", "\ud800"])
def test_a_name_that_no_database_has_a_form_for_is_refused(saver, thread_id):
    with pytest.raises(InvalidFieldError, match="thread_id holds a NUL character or a lone surr"):
        put(saver, {}, {"configurable": {"thread_id": thread_id, "checkpoint_ns": ""}})
    with pytest.raises(InvalidFieldError, match="thread_id holds"):
        saver.get_tuple({"configurable": {"thread_id": thread_id}})


def test_a_config_without_a_thread_is_refused(saver):
    for config in ({}, {"configurable": {}}):
        with pytest.raises(InvalidFieldError, match="has no thread_id"):
            saver.get_tuple(config)
        with pytest.raises(InvalidFieldError, match="has no thread_id"):
            list(saver.list(config))
    with pytest.raises(InvalidFieldError, match="thread_id is None"):
        saver.get_tuple(thread(None))


def test_metadata_is_exact(saver):
    some_id = uuid.uuid4()
    metadata = {
        "source": "loop",
        "step": 1,
        "nested": {"nul": "a\0b", "lone": "\ud800", "big": 10**30, "exact": 1e23, "id": some_id},
        "nul": "a\0b",
    }

    config = put(saver, {}, metadata=metadata)

    stored = saver.get_tuple(config).metadata
    assert stored == {**metadata, "nested": {**metadata["nested"], "id": str(some_id)}}
    assert [found.config for found in saver.list(None, filter={"nul": "a\0b"})] == [config]


def test_metadata_of_the_config_is_stored_but_for_langgraphs_own(saver):
    config = {
        "configurable": {"thread_id": "1", "checkpoint_ns": "", "user": "ada", "__secret": 1},
        "metadata": {"tag": "blue", "langgraph_step": 3, "object": object()},
    }

    put(saver, {}, config)

    assert saver.get_tuple(thread()).metadata == {
        "source": "loop",
        "step": 0,
        "user": "ada",
        "tag": "blue",
    }


def test_what_is_encrypted_has_nothing_readable_and_is_a_delta_inside(saver):
    encrypted = EncryptedSerializer.from_pycryptodome_aes(key=b"sixteen byte key")
    saver = DjangoSaver(saver.backend, serde=encrypted)
    items = ["a secret " * 100, *(str(uuid.uuid4()) for _ in range(100))]
    config = put(saver, {"items": items, "word": "a secret"})
    config = put(saver, {"items": [*items, "more"], "word": "a secret"}, config)
    saver.put_writes(config, [("items", ["a secret"])], "task")

    alias = saver.backend.alias
    rows = [
        *GraphCheckpoint.objects.using(alias).all(),
        *ChannelBlob.objects.using(alias).all(),
        *CheckpointWrite.objects.using(alias).all(),
    ]
    assert len(rows) == 5
    assert all(row.type == "msgpack+aes" for row in rows)
    assert not any(b"secret" in bytes(row.data) for row in rows)
    assert len(ChannelBlob.objects.using(alias).order_by("pk").last().data) < 300
    fresh = DjangoSaver(saver.backend, serde=encrypted)
    found = fresh.get_tuple(config)
    assert found.checkpoint["channel_values"] == {"items": [*items, "more"], "word": "a secret"}
    assert found.pending_writes == [("task", "items", ["a secret"])]
    with pytest.raises(StorageError, match="is encrypted, and this saver's serializer has no key"):
        DjangoSaver(saver.backend).get_tuple(config)


@dataclass
class Mine:
    name: str


def test_the_strict_serializer_imports_no_class_that_it_does_not_know(saver):
    config = put(saver, {"mine": [Mine("x")]})

    strict = DjangoSaver(saver.backend, serde=JsonPlusSerializer(allowed_msgpack_modules=None))
    allowing = strict.with_allowlist([(Mine.__module__, "Mine")])

    assert values_of(strict, config) == {"mine": [{"name": "x"}]}
    assert values_of(allowing, config) == {"mine": [Mine("x")]}


def test_a_damaged_value_is_told_from_one_that_is_not_there(saver):
    items = [str(uuid.uuid4()) for _ in range(200)]
    config = put(saver, {"items": items})
    config = put(saver, {"items": [*items, "new"]}, config)
    alias = saver.backend.alias
    first = ChannelBlob.objects.using(alias).order_by("pk").first()
    ChannelBlob.objects.using(alias).filter(pk=first.pk).update(data=b"\x00" + b"x" * 7000)

    with pytest.raises(StorageError, match="cannot be read: its delta is damaged"):
        DjangoSaver(saver.backend).get_tuple(config)


@pytest.mark.parametrize("data", [b"", b"\0\x80", b"\0\x01", b"\0\xa1x", b"\2", b"\3", b"\1"])
def test_a_damaged_checkpoint_says_which_it_is(saver, data):
    config = put(saver, {"items": ["x" * 300]})
    GraphCheckpoint.objects.using(saver.backend.alias).update(data=data)

    with pytest.raises(StorageError, match=r"Checkpoint \S+ of thread '1' cannot be read: "):
        saver.get_tuple(config)


def test_writes_come_in_the_order_in_which_the_tasks_are_applied(saver):
    config = put(saver, {})
    saver.put_writes(config, [("a", 1), ("b", 2)], "task-2", "~1")
    saver.put_writes(config, [("a", 3)], "task-1", "~2")
    saver.put_writes(config, [("a", 4)], "task-3")

    writes = saver.get_tuple(config).pending_writes

    assert writes == [
        ("task-3", "a", 4),
        ("task-2", "a", 1),
        ("task-2", "b", 2),
        ("task-1", "a", 3),
    ]


def test_a_special_write_replaces_and_a_plain_one_stays(saver):
    config = put(saver, {})
    for value in (1, 2):
        saver.put_writes(config, [("plain", value), ("__error__", value)], "task")

    assert saver.get_tuple(config).pending_writes == [
        ("task", "__error__", 2),
        ("task", "plain", 1),
    ]


def test_versions_after_a_fork_differ(saver):
    before = saver.get_next_version(None, None)

    versions = {saver.get_next_version(before, None) for _ in range(50)}

    assert len(versions) == 50
    assert all(version > before for version in versions)
    assert saver.get_next_version(7, None).startswith("0" * 31 + "8.")


def test_a_list_is_limited_and_filtered_over_pages(saver, monkeypatch):
    monkeypatch.setattr("workflow_storage.contrib.langgraph.saver._PAGE", 3)
    monkeypatch.setattr("workflow_storage.contrib.langgraph.saver._VALUES_AT_ONCE", 2)
    config, configs = None, []
    for number in range(10):
        metadata = {"source": "loop", "step": number, "even": number % 2 == 0}
        config = put(saver, {"number": number}, config, metadata)
        configs.append(config)

    def steps(**options):
        return [found.metadata["step"] for found in saver.list(thread(), **options)]

    async def async_steps(**options):
        return [found.metadata["step"] async for found in saver.alist(thread(), **options)]

    assert steps() == list(range(9, -1, -1))
    assert steps(filter={"even": True}) == [8, 6, 4, 2, 0]
    assert steps(filter={"even": True}, limit=3) == [8, 6, 4]
    assert steps(before=configs[5], limit=2) == [4, 3]
    assert steps(limit=0) == []
    assert asyncio.run(async_steps(filter={"even": False}, limit=4)) == [9, 7, 5, 3]


class WithLength:
    """A serializer whose types say what no serializer of LangGraph's does."""

    def dumps_typed(self, value):
        kind, data = JsonPlusSerializer().dumps_typed(value)
        return f"{kind}+100%2B+{len(data)}", data

    def loads_typed(self, typed):
        kind, length = typed[0].split("+100%2B+")
        assert len(typed[1]) == int(length)
        return JsonPlusSerializer().loads_typed((kind, typed[1]))


@pytest.mark.parametrize("is_encrypted", [False, True])
def test_the_types_of_a_serializer_are_any_text(sqlite_store, is_encrypted):
    serde = WithLength()
    if is_encrypted:
        serde = EncryptedSerializer.from_pycryptodome_aes(serde, key=b"sixteen byte key")
    items = [str(uuid.uuid4()) for _ in range(50)]
    saver = DjangoSaver(sqlite_store, serde=serde)
    config = put(saver, {"items": items})
    config = put(saver, {"items": [*items, "new"]}, config)
    saver.put_writes(config, [("items", [1])], "task")

    found = DjangoSaver(sqlite_store, serde=serde).get_tuple(config)

    assert found.checkpoint["channel_values"] == {"items": [*items, "new"]}
    assert found.pending_writes == [("task", "items", [1])]


def test_the_app_has_to_be_installed(settings):
    settings.INSTALLED_APPS = [name for name in settings.INSTALLED_APPS if "langgraph" not in name]

    with pytest.raises(ImproperlyConfigured, match=r"Add 'workflow_storage\.contrib\.langgraph'"):
        DjangoSaver()


def test_the_tables_are_of_their_own_app_where_it_is_not_installed():
    script = (
        "from workflow_storage.factory import ensure_django; ensure_django();"
        "from workflow_storage.contrib.langgraph.models import GraphCheckpoint;"
        "print(GraphCheckpoint._meta.app_label)"
    )
    environment = {
        key: value for key, value in os.environ.items() if key != "DJANGO_SETTINGS_MODULE"
    }

    found = subprocess.check_output([sys.executable, "-c", script], env=environment, text=True)

    assert found.strip() == "workflow_storage_langgraph"


def test_another_store_than_a_database_is_refused(memory_url):
    with pytest.raises(StorageError, match="is no Django database, and checkpoints are Django"):
        DjangoSaver(memory_url).get_tuple(thread())


def test_pruning_keeps_what_the_newest_is_based_on(saver):
    items, config = [], None
    for _ in range(37):
        items = [*items, str(uuid.uuid4())]
        config = put(saver, {"items": items}, config)
        saver.put_writes(config, [("items", items[-1:])], "task")
    alias = saver.backend.alias

    saver.prune(["1"])

    assert [found.config for found in saver.list(thread())] == [config]
    found = DjangoSaver(saver.backend).get_tuple(config)
    assert found.checkpoint["channel_values"] == {"items": items}
    assert found.parent_config is None
    assert CheckpointWrite.objects.using(alias).count() == 1
    assert ChannelBlob.objects.using(alias).count() < 25
    config = put(saver, {"items": [*items, "more"]}, config)
    assert values_of(saver, config) == {"items": [*items, "more"]}


def test_pruning_keeps_what_a_delta_channel_is_rebuilt_from(saver):
    graph = counting(saver, 6, state=DeltaNumbers)
    graph.invoke({"numbers": []}, thread())
    before = len(list(saver.list(thread())))

    saver.prune(["1"])

    assert graph.get_state(thread()).values == {"numbers": list(range(6))}
    assert 1 < len(list(saver.list(thread()))) < before


def test_deleting_for_runs_keeps_what_others_are_based_on(saver):
    items = [str(uuid.uuid4()) for _ in range(100)]
    first = put(saver, {"items": items}, metadata={"run_id": "one"})
    second = put(saver, {"items": [*items, "x"]}, first, metadata={"run_id": "two" * 30})
    third = put(saver, {"items": [*items, "x", "y"]}, second, metadata={"run_id": "three"})

    saver.delete_for_runs(["one", "two" * 30])

    assert [found.config for found in saver.list(thread())] == [third]
    assert values_of(DjangoSaver(saver.backend), third) == {"items": [*items, "x", "y"]}
    saver.delete_for_runs(["three"])
    alias = saver.backend.alias
    for model in (ThreadNamespace, GraphCheckpoint, ChannelBlob, CheckpointWrite):
        assert not model.objects.using(alias).exists()


def test_deleting_for_runs_keeps_what_a_delta_channel_of_others_is_rebuilt_from(saver):
    graph = counting(saver, 2, state=DeltaNumbers)
    for run_id in ("one", "two"):
        graph.invoke({"numbers": [run_id]}, {**thread(), "metadata": {"run_id": run_id}})
    values = graph.get_state(thread()).values

    saver.delete_for_runs(["one"])

    assert graph.get_state(thread()).values == values
    saver.delete_for_runs(["two"])
    assert list(saver.list(thread())) == []


@pytest.mark.slow
def test_any_number_of_runs_is_deleted(sqlite_store):
    saver = DjangoSaver(sqlite_store)
    config = put(saver, {"number": 1}, metadata={"run_id": "260000"})

    saver.delete_for_runs([str(number) for number in range(260_001)])

    assert saver.get_tuple(config) is None


def test_a_copy_goes_on_by_itself(saver):
    graph = counting(saver)
    graph.invoke({"numbers": []}, thread())

    saver.copy_thread("1", "2")
    graph.update_state(thread("2"), {"numbers": [9]})
    saver.delete_thread("1")

    assert graph.get_state(thread("2")).values == {"numbers": [0, 1, 2, 9]}
    assert graph.get_state(thread("1")).values == {}
    with pytest.raises(InvalidFieldError, match="There is a thread '2' already"):
        counting(saver).invoke({"numbers": []}, thread("3"))
        saver.copy_thread("3", "2")


def test_what_is_missing_is_missing_in_a_copy(saver):
    items = [str(uuid.uuid4()) for _ in range(100)]
    first = put(saver, {"items": items, "other": ["x" * 300]})
    put(saver, {"items": [*items, "new"], "other": ["y"]}, first)
    blobs = ChannelBlob.objects.using(saver.backend.alias)
    blobs.filter(
        pk__in=[blobs.filter(channel=name).earliest("pk").pk for name in ("items", "other")]
    ).delete()

    saver.copy_thread("1", "2")

    for name in ("1", "2"):
        with pytest.raises(StorageError, match="which it is based on, is missing"):
            saver.get_tuple(thread(name))
    saver.delete_thread("1")
    with pytest.raises(StorageError, match="is damaged: of its values"):
        list(saver.list(thread("2")))


@pytest.mark.slow
def test_large_writes_are_copied(saver):
    config = put(saver, {})
    values = [random.Random(number).randbytes(6 << 20) for number in range(3)]
    for number, value in enumerate(values):
        saver.put_writes(config, [("channel", value)], f"task-{number}")

    saver.copy_thread("1", "2")

    assert [value for _, _, value in saver.get_tuple(thread("2")).pending_writes] == values


def test_a_strategy_that_there_is_not_is_refused(saver):
    with pytest.raises(ValueError, match="Pass 'keep_latest' or 'delete'"):
        saver.prune(["1"], strategy="everything")


def test_without_a_backend_it_is_the_database_of_the_project(db):
    config = put(DjangoSaver(), {"channel": 1})

    assert values_of(DjangoSaver("default"), config) == {"channel": 1}
    assert GraphCheckpoint.objects.count() == 1
    assert create_storage_backend("default").alias == "default"


def test_a_database_given_by_url_gets_its_tables_on_first_use_by_async_code(
    tmp_path, django_db_blocker
):
    url = f"sqlite:///{tmp_path}/graphs.db"
    graph = counting(DjangoSaver(url))

    with django_db_blocker.unblock():
        values = asyncio.run(graph.ainvoke({"numbers": []}, thread()))
        forget(create_storage_backend(url).alias)

    assert values == {"numbers": [0, 1, 2]}


def test_the_router_keeps_the_tables_beside_the_runs(settings):
    settings.WORKFLOW_STORAGE = "default"
    router = WorkflowStorageRouter()

    assert router.allow_migrate("default", "workflow_storage_langgraph") is True
    assert router.db_for_read(GraphCheckpoint) == "default"

"""What others do with a thread while it is deleted, pruned or copied, and what a snapshot hides."""

import random
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta

import pytest
from django.db import transaction
from django.utils import timezone
from langgraph.checkpoint.base import empty_checkpoint

from tests.backends.orm.conftest import Server
from tests.backends.test_isolation import with_level
from tests.contrib.langgraph.conftest import graph_backend
from tests.contrib.langgraph.graphs import thread
from tests.contrib.langgraph.test_saver import put, values_of
from tests.servers import wait_until
from workflow_storage import (
    InvalidFieldError,
    SnapshotError,
    StorageUnavailableError,
    create_storage_backend,
)
from workflow_storage.contrib.langgraph import DjangoSaver
from workflow_storage.contrib.langgraph.chains import Memory
from workflow_storage.contrib.langgraph.models import GraphCheckpoint, ThreadNamespace
from workflow_storage.contrib.langgraph.upkeep import ThreadUpkeep
from workflow_storage.factory import forget

ONE, OTHER = (random.Random(number).randbytes(300) for number in range(2))
"""Values of which none is worth being stored as a difference to the other."""

LARGE = random.Random(2).randbytes(3000).hex()
"""A value that one with a little more is stored as a difference to."""

SINCE = timedelta(days=30)


@contextmanager
def opened(url, vendor, level, django_db_blocker):
    """Open a database whose transactions have a level, with all tables empty; yield a saver."""
    # So that the tables are empty.
    next(empty_backend := graph_backend(url, django_db_blocker))
    with django_db_blocker.unblock():
        backend = create_storage_backend(with_level(vendor, url, level))
        yield DjangoSaver(backend)
        forget(backend.alias)
    empty_backend.close()


@pytest.fixture(params=["postgres", "mysql"])
def vendor(request):
    """Each database where a transaction can wait for another one that goes on."""
    return request.param


@pytest.fixture
def server(vendor, request):
    return Server(request.getfixturevalue(f"{vendor}_url"))


@pytest.fixture(params=["read committed", "repeatable read"])
def saver(request, vendor, server, django_db_blocker):
    """A saver on a database at each level."""
    with opened(server.url, vendor, request.param, django_db_blocker) as saver:
        yield saver


@pytest.fixture
def snapshots(vendor, server, django_db_blocker):
    """A saver on a database whose transactions see nothing that others commit meanwhile."""
    with opened(server.url, vendor, "repeatable read", django_db_blocker) as saver:
        yield saver


@contextmanager
def held_up(server, saver, first, call, *args):
    """Let a call wait for the transaction of another one, which goes on with the block."""
    with ThreadPoolExecutor(1) as pool, transaction.atomic(using=saver.backend.alias):
        first()
        result = pool.submit(call, *args)
        wait_until(server.is_waited_for)
        yield result


@contextmanager
def old_snapshot(saver):
    """Begin a transaction that may see nothing of what others do from now on."""
    with ThreadPoolExecutor(1) as pool, transaction.atomic(using=saver.backend.alias):
        ThreadNamespace.objects.using(saver.backend.alias).count()
        yield lambda call, *args, **kwargs: pool.submit(call, *args, **kwargs).result(60)


def upkeep_of(saver):
    return ThreadUpkeep(saver.backend.alias, own_connection=False, memory=Memory())


def stored(saver, thread_id):
    """Return the namespaces, ids and writes of all checkpoints of a thread."""
    return [
        (
            found.config["configurable"]["checkpoint_ns"],
            found.config["configurable"]["checkpoint_id"],
            found.pending_writes,
        )
        for found in saver.list(thread(thread_id))
    ]


def make_old(saver):
    """Let all checkpoints be of before `SINCE`."""
    rows = GraphCheckpoint.objects.using(saver.backend.alias)
    rows.update(created_at=timezone.now() - 3 * SINCE)


def root(thread_id):
    return thread(thread_id, checkpoint_ns="")


@pytest.mark.parametrize("namespaces", [("", ""), ("sub:1", "sub:2")])
def test_of_two_copies_to_one_thread_the_second_is_refused(server, saver, namespaces):
    for name, namespace in zip(("one", "two"), namespaces, strict=True):
        put(saver, {"items": [ONE]}, thread(name, checkpoint_ns=namespace))

    with held_up(
        server,
        saver,
        lambda: saver.copy_thread("one", "target"),
        lambda: DjangoSaver(saver.backend).copy_thread("two", "target"),
    ) as copied:
        pass

    with pytest.raises(InvalidFieldError, match="There is a thread 'target' already"):
        copied.result(60)
    assert stored(saver, "target") == [(ns, one, []) for ns, one, _ in stored(saver, "one")]


def test_a_copy_to_a_thread_that_is_begun_meanwhile_is_refused(server, saver):
    put(saver, {"items": [ONE]}, root("source"))
    put(saver, {"items": [ONE]}, thread("source", checkpoint_ns="sub:1"))
    begun = []

    with held_up(
        server,
        saver,
        lambda: begun.append(put(saver, {"items": [OTHER]}, root("target"))),
        DjangoSaver(saver.backend).copy_thread,
        "source",
        "target",
    ) as copied:
        pass

    with pytest.raises(InvalidFieldError, match="There is a thread 'target' already"):
        copied.result(60)
    assert [found.config for found in saver.list(thread("target"))] == begun


def test_a_copy_in_a_transaction_with_a_snapshot_is_to_a_new_thread(snapshots):
    put(snapshots, {"items": [ONE]}, root("source"))

    with pytest.raises((InvalidFieldError, StorageUnavailableError)), old_snapshot(snapshots) as do:
        begun = do(put, snapshots, {"items": [OTHER]}, root("target"))
        snapshots.copy_thread("source", "target")

    assert [found.config for found in snapshots.list(thread("target"))] == [begun]


def test_a_copy_in_a_transaction_with_a_snapshot_is_of_one_moment(snapshots):
    first = put(snapshots, {"items": [ONE]}, root("source"))
    before = stored(snapshots, "source")

    with suppress(StorageUnavailableError):
        with old_snapshot(snapshots) as do:
            second = do(put, snapshots, {"items": [OTHER]}, first)
            do(snapshots.put_writes, second, [("items", 1)], "task")
            snapshots.copy_thread("source", "target")

        assert stored(snapshots, "target") in (before, stored(snapshots, "source"))


def test_deleting_a_thread_deletes_the_subgraphs_that_it_began_meanwhile(server, saver):
    config = put(saver, {"items": [ONE]}, root("1"))

    with held_up(
        server,
        saver,
        lambda: saver.put_writes(config, [("items", 1)], "task"),
        DjangoSaver(saver.backend).delete_thread,
        "1",
    ) as deleted:
        for number in range(3):
            put(saver, {"items": [OTHER]}, thread("1", checkpoint_ns=f"sub:{number}"))

    deleted.result(60)
    assert stored(saver, "1") == []
    assert not ThreadNamespace.objects.using(saver.backend.alias).exists()


def test_deleting_a_thread_deletes_what_it_is_made_anew_as_meanwhile(
    vendor, server, django_db_blocker
):
    with opened(server.url, vendor, "read committed", django_db_blocker) as saver:
        put(saver, {"items": [ONE]}, root("1"))

        with held_up(
            server,
            saver,
            lambda: saver.delete_thread("1"),
            DjangoSaver(saver.backend).delete_thread,
            "1",
        ) as deleted:
            put(saver, {"items": [OTHER]}, root("1"))

        deleted.result(60)
        assert stored(saver, "1") == []


@pytest.mark.parametrize("method", ["delete_thread", "prune"])
def test_a_thread_of_which_a_subgraph_is_used_meanwhile_stays(server, saver, method):
    config = put(saver, {"items": [ONE]}, root("1"))
    put(saver, {"items": [OTHER]}, config)
    make_old(saver)
    since = timezone.now() - SINCE

    with held_up(
        server,
        saver,
        lambda: saver.put_writes(config, [("items", 1)], "task"),
        lambda: getattr(upkeep_of(saver), method)("1", unless_since=since),
    ) as deleted:
        put(saver, {"items": [OTHER]}, thread("1", checkpoint_ns="sub:1"))

    assert deleted.result(60) == 0
    assert sorted(namespace for namespace, *_ in stored(saver, "1")) == ["", "", "sub:1"]


def test_a_thread_that_is_used_outside_of_a_snapshot_stays(snapshots):
    first = put(snapshots, {"items": [ONE]}, root("1"))
    make_old(snapshots)
    since = timezone.now() - SINCE

    with suppress(SnapshotError, StorageUnavailableError), old_snapshot(snapshots) as do:
        second = do(put, snapshots, {"items": [OTHER]}, first)
        upkeep_of(snapshots).delete_thread("1", unless_since=since)

    assert [found.config for found in snapshots.list(thread())] == [second, first]


def test_deleting_a_thread_in_a_transaction_with_a_snapshot_is_all_of_it_or_refused(snapshots):
    first = put(snapshots, {"items": [ONE]}, root("1"))

    try:
        with old_snapshot(snapshots) as do:
            second = do(put, snapshots, {"items": [OTHER]}, first)
            snapshots.delete_thread("1")
    except (SnapshotError, StorageUnavailableError):
        left = [second, first]
    else:
        left = []

    assert [found.config for found in snapshots.list(thread())] == left


def test_what_follows_a_checkpoint_that_was_pruned_since_is_readable_or_refused(snapshots):
    first = put(snapshots, {"items": [LARGE]}, root("1"))

    def go_on_and_prune():
        put(DjangoSaver(snapshots.backend), {"items": [OTHER]}, first)
        DjangoSaver(snapshots.backend).prune(["1"])

    with suppress(StorageUnavailableError):
        with old_snapshot(snapshots) as do:
            do(go_on_and_prune)
            config = put(DjangoSaver(snapshots.backend), {"items": [LARGE, "more"]}, first)

        assert values_of(DjangoSaver(snapshots.backend), config) == {"items": [LARGE, "more"]}


@pytest.fixture
def hidden_parents(mysql_url, django_db_blocker):
    """A saver on a database that finds, where it locks, what its snapshot does not show."""
    with opened(mysql_url, "mysql", "repeatable read", django_db_blocker) as saver:
        yield saver


def test_what_follows_a_checkpoint_outside_of_a_snapshot_has_its_values(hidden_parents):
    saver = hidden_parents
    put(saver, {"items": [ONE]}, root("1"))

    with suppress(StorageUnavailableError):
        with old_snapshot(saver) as do:
            parent = do(put, saver, {"items": [LARGE], "kept": [OTHER]}, root("1"))
            versions = do(saver.get_tuple, parent).checkpoint["channel_versions"]
            new = {"items": saver.get_next_version(versions["items"], None)}
            values = {"items": [LARGE, "more"]}
            checkpoint = {
                **empty_checkpoint(),
                "channel_values": values,
                "channel_versions": {**versions, **new},
            }
            config = DjangoSaver(saver.backend).put(parent, checkpoint, {}, new)

        assert values_of(DjangoSaver(saver.backend), config) == {**values, "kept": [OTHER]}


def forked(saver, first):
    """Go on from the first of two checkpoints with the value that only that one has."""
    checkpoint = dict(saver.get_tuple(first).checkpoint, id=empty_checkpoint()["id"])
    return saver.put(first, checkpoint, {}, {})


def test_pruning_sees_what_was_saved_while_it_waited(server, saver):
    first = put(saver, {"items": [ONE]})
    put(saver, {"items": [OTHER]}, first)
    configs = []

    with held_up(
        server,
        saver,
        lambda: configs.append(forked(saver, first)),
        DjangoSaver(saver.backend).prune,
        ["1"],
    ) as pruned:
        pass

    pruned.result(60)
    assert values_of(DjangoSaver(saver.backend), configs[0]) == {"items": [ONE]}


def test_pruning_in_a_transaction_with_a_snapshot_loses_nothing(snapshots):
    first = put(snapshots, {"items": [ONE]})
    put(snapshots, {"items": [OTHER]}, first)

    with old_snapshot(snapshots) as do:
        config = do(forked, DjangoSaver(snapshots.backend), first)
        with suppress(SnapshotError):
            snapshots.prune(["1"])

    assert values_of(DjangoSaver(snapshots.backend), config) == {"items": [ONE]}

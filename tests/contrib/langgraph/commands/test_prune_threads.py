"""``prune_threads``: what it deletes, what it spares, and that it says so first."""

import json
from datetime import timedelta

import pytest
from django.core.management import CommandError, load_command_class
from django.utils import timezone

from tests.contrib.langgraph.graphs import asking, counting, thread
from tests.management.conftest import keyboard, run_command  # noqa: F401 - a fixture
from workflow_storage.contrib.langgraph import DjangoSaver, with_recording
from workflow_storage.contrib.langgraph.models import GraphCheckpoint, ThreadNamespace


@pytest.fixture
def threads(graph_store):
    """Two old threads of five checkpoints, a recent one, and an old one that waits for an answer."""
    saver = DjangoSaver(graph_store)
    for name in ("old-1", "old-2", "recent"):
        counting(saver).invoke({"numbers": []}, thread(name))
    asked = with_recording(asking(saver), workflow_name="ask", backend=graph_store)
    asked.invoke({"numbers": []}, thread("waiting"))
    old = GraphCheckpoint.objects.using(graph_store.alias).exclude(thread__thread_id="recent")
    old.update(created_at=timezone.now() - timedelta(days=100))
    return graph_store


def prune(url, *arguments, **options):
    return run_command(
        "prune_threads", "--older-than=90d", *arguments, backend=url, interactive=False, **options
    )


def left(store):
    rows = GraphCheckpoint.objects.using(store.alias)
    return {
        name: rows.filter(thread__thread_id=name).count()
        for name in ThreadNamespace.objects.using(store.alias).values_list("thread_id", flat=True)
    }


ALL = {"old-1": 5, "old-2": 5, "recent": 5, "waiting": 3}


def test_a_dry_run_says_what_would_be_deleted(threads, sql_url):
    text = prune(sql_url, "--dry-run")

    assert [line.split() for line in text.splitlines()[:2]] == [
        ["Threads", "Checkpoints"],
        ["2", "10"],
    ]
    assert text.splitlines()[-1] == "10 checkpoints of 2 threads would be deleted."
    assert left(threads) == ALL


def test_it_deletes_threads_that_are_not_used_but_for_those_that_wait(threads, sql_url):
    assert prune(sql_url).splitlines()[-1] == "10 checkpoints deleted."

    assert left(threads) == {"recent": 5, "waiting": 3}
    assert prune(sql_url).splitlines() == ["Nothing to delete."]


def test_it_keeps_the_newest_checkpoint_if_it_is_to(threads, sql_url):
    records = json.loads(prune(sql_url, "--keep-latest", format="json"))

    assert records == [{"threads": 3, "checkpoints": 10, "deleted": 10}]
    assert left(threads) == {"old-1": 1, "old-2": 1, "recent": 5, "waiting": 1}
    graph = counting(DjangoSaver(threads))
    assert graph.get_state(thread("old-1")).values == {"numbers": [0, 1, 2]}
    assert prune(sql_url, "--keep-latest").splitlines() == ["Nothing to delete."]


def test_a_limit_is_of_threads(threads, sql_url):
    prune(sql_url, "--limit=1")

    assert left(threads) == {"old-2": 5, "recent": 5, "waiting": 3}


def test_it_asks(threads, sql_url, keyboard):  # noqa: F811
    keyboard("n\n")

    text = run_command("prune_threads", "--older-than=90d", backend=sql_url)

    assert text.splitlines()[-1] == "10 checkpoints of 2 threads were not deleted."
    assert left(threads) == ALL


def test_a_store_that_is_no_database_is_refused(memory_url):
    with pytest.raises(CommandError, match="is no Django database"):
        prune(memory_url)


def test_a_thread_that_is_used_again_meanwhile_stays(threads, sql_url, monkeypatch):
    from workflow_storage.contrib.langgraph.upkeep import ThreadUpkeep

    found = ThreadUpkeep.unused

    def then_used(self, *args, **kwargs):
        yield from list(found(self, *args, **kwargs))
        counting(DjangoSaver(threads)).invoke({"numbers": [1]}, thread("old-1"))

    monkeypatch.setattr(ThreadUpkeep, "unused", then_used)

    assert prune(sql_url).splitlines()[-1] == "5 checkpoints deleted."
    assert set(left(threads)) == {"old-1", "recent", "waiting"}


def test_its_options_are_those_of_the_other_commands():
    def options(app, name):
        parser = load_command_class(app, name).create_parser("manage.py", name)
        return {
            option: (action.type, action.metavar)
            for action in parser._actions  # noqa: SLF001 - argparse has no other way to ask
            for option in action.option_strings
        }

    ours = options("workflow_storage.contrib.langgraph", "prune_threads")
    theirs = options("workflow_storage", "prune_runs")

    shared = ours.keys() & theirs.keys()
    assert {"--older-than", "--limit", "--dry-run", "--no-input", "--backend"} <= shared
    assert {option: ours[option] for option in shared} == {
        option: theirs[option] for option in shared
    }

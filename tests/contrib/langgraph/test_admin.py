"""The threads of graphs in the admin, and the section on the page of a run."""

import itertools
import re
from dataclasses import dataclass

import pytest
from django.contrib.auth.models import Permission
from django.db import connection
from django.urls import reverse
from langgraph.checkpoint.serde.encrypted import EncryptedSerializer

from tests.admin.conftest import page_of
from tests.contrib.langgraph.graphs import asking, counting, thread
from tests.contrib.langgraph.test_saver import put
from workflow_storage import create_storage_backend
from workflow_storage.contrib.langgraph import DjangoSaver, with_recording
from workflow_storage.contrib.langgraph.models import GraphCheckpoint, ThreadNamespace
from workflow_storage.contrib.langgraph.trees import Node, tree
from workflow_storage.testing import stored_run

pytestmark = pytest.mark.django_db

LIST = "admin:workflow_storage_langgraph_threadnamespace_changelist"
THREAD = "admin:workflow_storage_langgraph_threadnamespace_change"
CHECKPOINT = "admin:workflow_storage_langgraph_checkpoint"


@pytest.fixture
def run(db):
    graph = with_recording(counting(DjangoSaver()), workflow_name="count")
    graph.invoke({"numbers": []}, thread("the-thread"))
    [run] = create_storage_backend().runs.list_runs()
    return run


@pytest.fixture
def pages(run):
    newest = GraphCheckpoint.objects.order_by("-checkpoint_id").first()
    return {
        "list": reverse(LIST),
        "thread": reverse(THREAD, args=[ThreadNamespace.objects.get().pk]),
        "checkpoint": reverse(CHECKPOINT, args=[newest.pk]),
    }


@pytest.fixture
def user_with(django_user_model, client):
    def log_in(*names):
        user = django_user_model.objects.create_user("somebody", is_staff=True)
        user.user_permissions.set(Permission.objects.filter(codename__in=names))
        client.force_login(user)
        return client

    return log_in


def text_of(response):
    assert response.status_code == 200
    html = response.content.decode()
    assert "style=" not in html
    assert not re.search(r"<script(?![^>]* src=)|\son\w+=", html)
    return html


def test_the_list_finds_threads_by_their_id(admin_client, pages, run):
    counting(DjangoSaver()).invoke({"numbers": []}, thread("another"))

    html = text_of(admin_client.get(pages["list"]))
    found = text_of(admin_client.get(pages["list"], {"q": "the-thread"}))

    assert "the-thread" in html
    assert "another" in html
    assert page_of(run) in html
    assert ">the-thread</a>" in found
    assert ">another</a>" not in found
    assert text_of(admin_client.get(pages["list"], {"q": "the-thr"})).count("the-thread") == 0


def test_the_page_of_a_thread_shows_its_checkpoints_forks_and_runs(admin_client, pages, run):
    graph = counting(DjangoSaver())
    middle = list(graph.get_state_history(thread("the-thread")))[2]
    graph.update_state(middle.config, {"numbers": [99]})

    html = text_of(admin_client.get(pages["thread"]))

    ids = list(GraphCheckpoint.objects.values_list("checkpoint_id", flat=True))
    assert len(ids) == 6
    assert all(html.count(f">{checkpoint_id}</a>") == 1 for checkpoint_id in ids)
    assert html.count('<span class="workflow-storage-mark">fork</span>') == 1
    assert html.count(page_of(run)) == 6
    assert "workflow-storage-completed" in html


def test_the_page_of_a_checkpoint_shows_values_and_what_changed(admin_client, pages):
    html = text_of(admin_client.get(pages["checkpoint"]))

    assert 'data-path="numbers[2]"' in html
    changes = html.partition("<h2>Difference</h2>")[2].partition("</section>")[0]
    assert "numbers[2]" in changes
    assert "numbers[1]" not in changes
    assert "added" in changes
    assert 'rel="prev"' in html
    assert 'rel="next"' not in html


def test_the_page_of_a_run_lists_its_checkpoints(admin_client, pages, run):
    html = text_of(admin_client.get(page_of(run)))

    assert "Checkpoints of graphs" in html
    assert pages["checkpoint"] in html
    assert pages["thread"] in html
    other = stored_run(create_storage_backend(), id="other")
    assert "Checkpoints of graphs" not in text_of(admin_client.get(page_of(other)))


def test_a_long_run_shows_the_newest_of_its_checkpoints(admin_client):
    graph = with_recording(counting(DjangoSaver(), 30), workflow_name="long")
    graph.invoke({"numbers": []}, thread())
    [run] = create_storage_backend().runs.list_runs()

    html = text_of(admin_client.get(page_of(run)))

    assert html.count("/checkpoint/") == 20
    assert "Only the newest are shown." in html


def test_the_question_of_an_interrupt_is_shown(admin_client, db):
    asking(DjangoSaver()).invoke({"numbers": []}, thread())
    newest = GraphCheckpoint.objects.order_by("-checkpoint_id").first()

    html = text_of(admin_client.get(reverse(CHECKPOINT, args=[newest.pk])))

    assert "What its tasks have written" in html
    assert "approve?" in html


@dataclass
class Mine:
    name: str
    api_key: str = "s3cr3t"


def test_no_class_of_the_project_is_made_of_a_value_and_secrets_are_masked(
    user_with, db, monkeypatch
):
    config = put(DjangoSaver(), {"mine": [Mine("somebody")]})
    monkeypatch.setattr(Mine, "__init__", None)  # which would fail
    pk = GraphCheckpoint.objects.get(checkpoint_id=config["configurable"]["checkpoint_id"]).pk
    client = user_with("view_threadnamespace", "view_graphcheckpoint")

    html = text_of(client.get(reverse(CHECKPOINT, args=[pk])))

    assert "somebody" in html
    assert "api_key" in html
    assert "s3cr3t" not in html


def test_what_is_encrypted_says_so(admin_client, db):
    serde = EncryptedSerializer.from_pycryptodome_aes(key=b"sixteen byte key")
    put(DjangoSaver(serde=serde), {"items": ["secret"] * 100})

    html = text_of(admin_client.get(reverse(CHECKPOINT, args=[GraphCheckpoint.objects.get().pk])))

    assert "(encrypted)" in html
    assert "secret" not in html


def test_a_damaged_value_says_so(admin_client, pages):
    GraphCheckpoint.objects.update(data=b"\x00\xc1")

    assert "numbers" in text_of(admin_client.get(pages["checkpoint"]))


def test_nobody_sees_anything_without_logging_in(client, pages):
    for url in pages.values():
        response = client.get(url)
        assert response.status_code == 302
        assert "/login/" in response.url


def test_each_page_needs_its_permission(user_with, pages, run):
    permissions = {
        "list": {"view_threadnamespace"},
        "thread": {"view_threadnamespace"},
        "checkpoint": {"view_threadnamespace", "view_graphcheckpoint"},
    }
    names = {"view_threadnamespace", "view_graphcheckpoint", "view_workflowrun"}
    client = user_with()
    user = create_user(client)
    for count in range(len(names) + 1):
        for given in itertools.combinations(sorted(names), count):
            user.user_permissions.set(Permission.objects.filter(codename__in=given))
            for page, needed in permissions.items():
                response = client.get(pages[page])
                assert response.status_code == (200 if needed <= {*given} else 403), (page, given)
                if response.status_code == 200:
                    html = text_of(response)
                    assert (page_of(run) in html) == ("view_workflowrun" in given)
                    if page == "thread":
                        assert ("/checkpoint/" in html) == ("view_graphcheckpoint" in given)
            if "view_workflowrun" in given:
                section = "Checkpoints of graphs" in text_of(client.get(page_of(run)))
                assert section == ("view_threadnamespace" in given)


def create_user(client):
    from django.contrib.auth import get_user

    return get_user(client)


@pytest.mark.django_db(transaction=True)
def test_a_run_is_shown_where_the_tables_of_graphs_are_not_made_yet(
    admin_client, pages, run, caplog
):
    table = GraphCheckpoint._meta.db_table
    with connection.cursor() as cursor:
        cursor.execute(f"ALTER TABLE {table} RENAME TO {table}_hidden")
        try:
            html = text_of(admin_client.get(page_of(run)))
        finally:
            cursor.execute(f"ALTER TABLE {table}_hidden RENAME TO {table}")

    assert run.id in html
    assert "Checkpoints of graphs" not in html
    assert "Run manage.py migrate." in caplog.text
    assert "Checkpoints of graphs" in text_of(admin_client.get(page_of(run)))


def test_nothing_is_added_changed_or_deleted(admin_client, pages):
    assert admin_client.get(f"{pages['list']}add/").status_code == 403
    assert admin_client.post(pages["thread"], {}).status_code == 403
    assert admin_client.get(pages["thread"].replace("change", "delete")).status_code == 403
    assert admin_client.get(reverse(CHECKPOINT, args=[10**9])).status_code == 404
    assert admin_client.get(reverse(CHECKPOINT, args=[10**30])).status_code == 404


def test_the_pages_take_few_queries(admin_client, pages, django_assert_max_num_queries):
    graph = counting(DjangoSaver(), 50)
    graph.invoke({"numbers": [1]}, thread("the-thread"))
    for url in pages.values():
        with django_assert_max_num_queries(14):
            admin_client.get(url)


def test_a_thread_with_many_subgraphs_shows_the_newest_beside_the_root_and_its_own(
    admin_client, pages, django_assert_max_num_queries
):
    saver = DjangoSaver()
    for number in range(30):
        put(saver, {}, thread("the-thread", checkpoint_ns=f"sub:{number:02}"))
    first = ThreadNamespace.objects.get(namespace="sub:00")

    with django_assert_max_num_queries(40):
        html = text_of(admin_client.get(pages["thread"]))
    of_first = text_of(admin_client.get(reverse(THREAD, args=[first.pk])))

    headings = re.findall(r"<h2>Checkpoints(?: of the subgraph (\S+))?</h2>", html)
    assert headings == ["", *(f"sub:{number}" for number in range(10, 30))]
    assert html.count("Only the newest are shown.") == 1
    headings = re.findall(r"<h2>Checkpoints(?: of the subgraph (\S+))?</h2>", of_first)
    assert headings == ["", "sub:00", *(f"sub:{number}" for number in range(10, 30))]


def test_a_tree_goes_on_with_the_oldest_child_after_its_forks():
    def node(name, parent):
        return Node(0, name, parent, None, None, {"step": 1})

    nodes = [
        node("1", "lost"),
        node("2", "1"),
        node("3", "2"),
        node("4", "1"),
        node("5", "4"),
        node("6", "4"),
        node("7", None),
    ]

    places = [
        (place.node.checkpoint_id, place.branch, place.is_fork, place.has_lost_parent)
        for place in tree(reversed(nodes))
    ]

    assert places == [
        ("1", 0, False, True),
        ("4", 1, True, False),
        ("6", 2, True, False),
        ("5", 1, False, False),
        ("2", 0, False, False),
        ("3", 0, False, False),
        ("7", 0, False, False),
    ]

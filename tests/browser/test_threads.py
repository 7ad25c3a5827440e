"""The pages of LangGraph's threads in a browser: light and dark, wide and narrow, in German, too."""

import pytest
from django.urls import reverse
from langgraph.types import Command

from tests.admin.conftest import page_of
from tests.browser.conftest import check
from tests.browser.samples import MARKUP
from tests.contrib.langgraph.graphs import asking, counting, thread
from tests.contrib.langgraph.test_graphs import nested
from workflow_storage import create_storage_backend
from workflow_storage.contrib.langgraph import DjangoSaver, with_recording
from workflow_storage.contrib.langgraph.models import GraphCheckpoint, ThreadNamespace

pytestmark = pytest.mark.slow


def of_thread(name):
    space = ThreadNamespace.objects.get(thread_id=name, namespace="")
    return reverse("admin:workflow_storage_langgraph_threadnamespace_change", args=[space.pk])


def of_checkpoint(name):
    newest = GraphCheckpoint.objects.filter(thread__thread_id=name).order_by("checkpoint_id").last()
    return reverse("admin:workflow_storage_langgraph_checkpoint", args=[newest.pk])


PAGES = {
    "threads": lambda: reverse("admin:workflow_storage_langgraph_threadnamespace_changelist"),
    "thread with forks": lambda: of_thread("forked"),
    "thread with a subgraph": lambda: of_thread("nested"),
    "thread of markup": lambda: of_thread(MARKUP),
    "checkpoint": lambda: of_checkpoint("forked"),
    "checkpoint with a question": lambda: of_checkpoint("asked"),
    "checkpoint of markup": lambda: of_checkpoint(MARKUP),
    "run of a graph": lambda: page_of(create_storage_backend().runs.list_runs()[0]),
}


@pytest.fixture
def threads(live):
    """Threads of every kind."""
    saver = DjangoSaver()
    graph = with_recording(counting(saver, 5), workflow_name="count")
    graph.invoke({"numbers": []}, thread("forked"))
    for snapshot in list(graph.get_state_history(thread("forked")))[1:4]:
        graph.update_state(snapshot.config, {"numbers": [99]})
    asking(saver).invoke({"numbers": []}, thread("asked"))
    nested(saver).invoke({"answer": ""}, thread("nested"))
    nested(saver).invoke(Command(resume=MARKUP), thread("nested"))
    counting(saver, 2).invoke({"numbers": [MARKUP]}, thread(MARKUP))


@pytest.mark.parametrize(
    ("width", "scheme", "language"),
    [(1280, "light", "en"), (400, "dark", "de"), (1920, "dark", "en")],
)
@pytest.mark.parametrize("name", PAGES)
def test_pages_of_threads_are_sound(opened, threads, name, width, scheme, language):
    page = opened(PAGES[name](), width=width, scheme=scheme, language=language)

    check(page)

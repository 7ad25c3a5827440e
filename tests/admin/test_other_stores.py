"""The admin of a project whose store is no Django database: the same pages, through the repositories."""

from datetime import timedelta

import pytest
from django.contrib.admin.utils import quote
from django.urls import reverse
from django.utils import timezone

from tests.admin.conftest import RUNS, page_of
from workflow_storage import create_storage_backend
from workflow_storage.testing import stored_run

pytestmark = pytest.mark.django_db


@pytest.fixture(params=["redis", "memory"])
def store(request, settings):
    """An empty store of the project, with three runs."""
    url = request.getfixturevalue(f"{request.param}_url")
    settings.WORKFLOW_STORAGE = url
    store = create_storage_backend()
    for run in list(store.runs.iter_runs()):
        store.runs.delete(run.id)
    now = timezone.now()
    for number, status in enumerate(["failed", "running", "completed"]):
        stored_run(
            store,
            id=f"r/{number}",
            workflow_name=f"w{number % 2}",
            status="running",
            started_at=now - timedelta(minutes=number),
            inputs={"file": f"{number}.pdf"},
            labels={"tenant": f"t{number % 2}"},
        )
        store.states.save_state(f"r/{number}", {"n": 0}, "load", attempt=1)
        store.states.save_state(f"r/{number}", {"n": 1}, "parse", attempt=1)
        if status != "running":
            store.runs.update_status(f"r/{number}", status, error_message="it broke")
    yield store
    for run in list(store.runs.iter_runs()):
        store.runs.delete(run.id)


def found(client, **parameters):
    response = client.get(reverse(RUNS), parameters)
    assert response.status_code == 200
    return [run.id for run in response.context["cl"].result_list], response.content.decode()


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({}, ["r/0", "r/1", "r/2"]),
        ({"status__exact": "failed"}, ["r/0"]),
        ({"workflow": "w0"}, ["r/0", "r/2"]),
        ({"label": "tenant=t1"}, ["r/1"]),
        ({"since": "1h", "until": "1m"}, ["r/1", "r/2"]),
        ({"q": "r/2"}, ["r/2"]),
        ({"q": "w1"}, ["r/1"]),
        ({"q": "tenant=t0"}, ["r/0", "r/2"]),
        ({"q": "nothing"}, []),
        ({"waiting": "1"}, []),
        ({"stalled": "1"}, []),
    ],
    ids=str,
)
def test_the_list_finds_what_the_contract_can_tell(admin_client, store, parameters, expected):
    assert found(admin_client, **parameters)[0] == expected


def test_what_only_a_database_can_tell_is_said(admin_client, store):
    ids, text = found(admin_client, slower="1")
    assert len(ids) == 3
    assert "which finds runs by status, workflow, label, parent and start only" in text


def test_older_runs_are_on_further_pages(admin_client, store, monkeypatch):
    for number in range(60):
        stored_run(store, id=f"more-{number:02}")
    ids, text = found(admin_client)
    assert len(ids) == 50
    assert "50+ in all" in text
    older, text = found(admin_client, before=ids[-1])
    assert len(older) == 13
    assert not set(ids) & set(older)


def test_a_run_has_its_pages(admin_client, store):
    run = store.runs.get("r/0")
    text = admin_client.get(page_of(run)).content.decode()
    for shown in ("0.pdf", "it broke", "parse", "Failed"):
        assert shown in text
    name = "admin:workflow_storage_run_{}"
    pk = quote(run.pk)
    for view, args in (
        ("state", [pk, 1]),
        ("compare", [pk, quote("r/1")]),
        ("file", [pk]),
        ("live", [pk]),
        ("payload", [pk, "inputs"]),
        ("state_file", [pk, 0]),
    ):
        assert admin_client.get(reverse(name.format(view), args=args)).status_code == 200, view
    assert admin_client.get(reverse(name.format("overview"))).status_code == 200
    run.pk = "gone"
    assert admin_client.get(page_of(run)).status_code == 302

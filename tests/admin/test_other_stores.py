"""The admin of a project whose store is no Django database: the same pages, through the repositories."""

from datetime import timedelta

import pytest
from django.contrib.admin.models import LogEntry
from django.contrib.admin.utils import quote
from django.urls import reverse
from django.utils import timezone

from tests.admin.conftest import RUNS, page_of
from workflow_storage import create_storage_backend
from workflow_storage.admin import WorkflowRunAdmin, actions
from workflow_storage.testing import stored_run
from workflow_storage.transfer import import_runs

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


def test_no_order_and_no_suggestions_are_offered(admin_client, store):
    text = found(admin_client)[1]
    assert 'name="workflow"' in text
    assert "sort=duration" not in text
    assert "data-suggest" not in text
    names = admin_client.get(reverse("admin:workflow_storage_run_workflows")).json()
    assert names == {"names": []}


def test_older_runs_are_on_further_pages(admin_client, store, monkeypatch):
    for number in range(60):
        stored_run(store, id=f"more-{number:02}")
    ids, text = found(admin_client)
    assert len(ids) == 50
    assert "50+ in all" in text
    older, text = found(admin_client, before=ids[-1])
    assert len(older) == 13
    assert not set(ids) & set(older)


def test_searches_and_stalled_runs_keep_the_other_filters_and_have_pages(
    admin_client, store, monkeypatch
):
    monkeypatch.setattr(WorkflowRunAdmin, "stalled_after", timedelta(0))
    assert found(admin_client, q="r/0", status__exact="completed")[0] == []
    assert found(admin_client, q="w1", workflow="w0")[0] == []
    assert found(admin_client, stalled="1", workflow="w0")[0] == []
    for number in range(60):
        stored_run(store, id=f"more-{number:02}", status="running")
    newest, _text = found(admin_client, stalled="1")
    older, _text = found(admin_client, stalled="1", before=newest[-1])
    assert len(newest) == 50
    assert len({*newest, *older}) == 61
    assert found(admin_client, stalled="1", before=older[-1])[0] == []


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


RUN_LIST = "/admin/workflow_storage/workflowrun/"


def act(client, action, *run_ids, query="", answers=None, **fields):
    """Choose an action for some runs, or for all that match, and confirm as often as it asks."""
    posted = {"action": action, "index": "0", "_selected_action": run_ids, **fields}
    page = client.post(RUN_LIST + query, posted)
    asked = 0
    while page.status_code == 200 and "hidden" in (page.context or {}):
        posted = {}
        for name, value in page.context["hidden"]:
            posted.setdefault(name, []).append(value)
        page = client.post(RUN_LIST + query, {**posted, **(answers or {})}, follow=True)
        asked += 1
    assert asked
    return page, " ".join(str(message) for message in (page.context or {}).get("messages", ()))


class TestActions:
    @pytest.mark.parametrize(
        ("action", "answers", "told", "expected"),
        [
            ("cancel_runs", {}, "1 run was cancelled.", {"status": "cancelled"}),
            ("fail_runs", {"reason": "why"}, "set to failed.", {"status": "failed"}),
            (
                "add_label",
                {"name": "by", "value": "me"},
                "added to 1 run.",
                {"labels": {"tenant": "t1", "by": "me"}},
            ),
            ("remove_label", {"name": "tenant"}, "removed from 1 run.", {"labels": {}}),
        ],
    )
    def test_a_selected_run_is_changed(self, admin_client, store, action, answers, told, expected):
        others = [store.runs.get(run_id).status for run_id in ("r/0", "r/2")]
        _page, message = act(admin_client, action, "r/1", answers=answers)
        assert told in message
        run = store.runs.get("r/1")
        assert {name: getattr(run, name) for name in expected} == expected
        assert [store.runs.get(run_id).status for run_id in ("r/0", "r/2")] == others
        assert LogEntry.objects.filter(object_id="r/1").count() == 1

    def test_states_are_pruned_and_runs_deleted(self, admin_client, store):
        _page, message = act(admin_client, "prune_states", "r/2", answers={"keep": "1"})
        assert "of 1 run were pruned" in message
        assert [step["step"] for step in store.states.iter_steps("r/2")] == [1]
        _page, message = act(admin_client, "delete_runs", "r/0", "r/2")
        assert "2 runs were deleted." in message
        assert [run.id for run in store.runs.list_runs()] == ["r/1"]

    def test_a_run_is_forked(self, admin_client, store):
        page, message = act(admin_client, "fork_run", "r/0", answers={"step": "0"})
        assert "the fork of r/0 from step 0" in message
        (fork,) = store.runs.list_runs(parent_id="r/0")
        assert fork.id in page.redirect_chain[-1][0]
        assert store.states.get_latest_state(fork.id) == {"n": 0}

    def test_runs_are_exported_with_their_states(self, admin_client, store, tmp_path, backend):
        page, _message = act(admin_client, "export_runs", "r/1", "r/0")
        file = tmp_path / "runs.jsonl"
        file.write_bytes(b"".join(page.streaming_content))
        assert len(list(import_runs(file, backend))) == 2
        assert backend.states.get_latest_state("r/1") == {"n": 1}
        assert backend.runs.get("r/0").inputs == {"file": "0.pdf"}

    @pytest.mark.parametrize(
        ("query", "changed"),
        [
            ("", {"r/0", "r/1", "r/2"}),
            ("?label=tenant%3Dt0", {"r/0", "r/2"}),
            ("?q=w1", {"r/1"}),
            ("?q=r/2", {"r/2"}),
            ("?status__exact=failed", {"r/0"}),
            ("?stalled=1", {"r/1"}),
        ],
    )
    @pytest.mark.parametrize("limit", [1, 500])
    def test_all_that_match_are_changed_in_as_many_requests_as_it_takes(
        self, admin_client, store, monkeypatch, query, changed, limit
    ):
        monkeypatch.setattr(actions, "MAX_RUNS", limit)
        monkeypatch.setattr(WorkflowRunAdmin, "stalled_after", timedelta(0))
        answers = {"name": "by", "value": "all"}
        _page, message = act(
            admin_client, "add_label", query=query, answers=answers, select_across="1"
        )
        assert f"added to {len(changed)} run" in message
        assert {run.id for run in store.runs.iter_runs(labels={"by": "all"})} == changed

    @pytest.mark.parametrize("query", ["slower=60", "children=1", "cost=5", "since=foo"])
    def test_nothing_is_done_to_all_where_a_filter_cannot_be_answered(
        self, admin_client, store, query
    ):
        fields = {"action": "delete_runs", "index": "0", "select_across": "1"}
        page = admin_client.post(f"{RUN_LIST}?{query}", fields, follow=True)
        assert "Nothing was done" in " ".join(map(str, page.context["messages"]))
        assert store.runs.count_runs() == 3

    def test_what_came_since_the_user_was_asked_is_left_alone(self, admin_client, store):
        fields = {"action": "delete_runs", "index": "0", "select_across": "1"}
        page = admin_client.post(RUN_LIST, fields)
        assert "3 runs that match the filters" in page.content.decode()
        stored_run(store, id="new")
        store.runs.delete("r/1")
        posted = {}
        for name, value in page.context["hidden"]:
            posted.setdefault(name, []).append(value)
        admin_client.post(RUN_LIST, posted)
        assert [run.id for run in store.runs.list_runs()] == ["new"]

    def test_runs_that_are_gone_are_told(self, admin_client, store):
        page = admin_client.post(
            RUN_LIST, {"action": "cancel_runs", "index": "0", "_selected_action": ["r/1", "r/2"]}
        )
        store.runs.delete("r/2")
        posted = {}
        for name, value in page.context["hidden"]:
            posted.setdefault(name, []).append(value)
        page = admin_client.post(RUN_LIST, posted, follow=True)
        told = " ".join(str(message) for message in page.context["messages"])
        assert told == "1 run was cancelled. 1 had been deleted meanwhile."

    def test_the_list_offers_all_that_match_where_there_are_more_pages(self, admin_client, store):
        assert 'name="select_across" value="1"' not in found(admin_client)[1]
        for number in range(60):
            stored_run(store, id=f"more-{number:02}")
        text = found(admin_client)[1]
        assert 'name="select_across" value="1"' in text
        assert "All 50+ that match" in text

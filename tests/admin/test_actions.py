"""The actions on runs: who may do what, what is asked, what is done, and how it goes on."""

import json
import re
from collections import defaultdict
from datetime import timedelta

import pytest
from django.contrib import admin
from django.contrib.admin.models import ADDITION, CHANGE, DELETION, LogEntry
from django.contrib.admin.utils import quote
from django.contrib.auth.models import Permission, User
from django.contrib.contenttypes.models import ContentType
from django.core.exceptions import PermissionDenied
from django.test import RequestFactory
from django.utils import timezone, translation

from tests.admin.acting import ActingAdmin, site
from tests.admin.conftest import add_runs
from workflow_storage import WorkflowRun, create_storage_backend, record_run, resume_run
from workflow_storage.admin import actions, chosen
from workflow_storage.admin.progress import Progress
from workflow_storage.admin.run_actions import RUN_ACTIONS
from workflow_storage.exceptions import RunLostError, StorageUnavailableError
from workflow_storage.factory import forget
from workflow_storage.testing import read_run, stored_run
from workflow_storage.transfer import import_runs

pytestmark = pytest.mark.django_db

RUNS = "/acting/workflow_storage/workflowrun/"

# What each action needs besides viewing runs, and what its page is answered with.
NEEDS = {
    "fail_runs": {"change_workflowrun"},
    "cancel_runs": {"change_workflowrun"},
    "add_label": {"change_workflowrun"},
    "remove_label": {"change_workflowrun"},
    "prune_states": {"change_workflowrun"},
    "delete_runs": {"delete_workflowrun"},
    "fork_run": {"add_workflowrun", "view_executionstate"},
    "export_runs": {"view_executionstate", "view_secrets"},
}
ANSWERS = defaultdict(
    dict,
    add_label={"name": "tenant", "value": "new"},
    remove_label={"name": "tenant"},
    prune_states={"keep": "1", "resumable": "on"},
    fork_run={"step": "0"},
)
USERS = {
    "no permission": set(),
    "view": {"view_workflowrun"},
    "view all": {"view_workflowrun", "view_executionstate"},
    "view secrets": {"view_workflowrun", "view_executionstate", "view_secrets"},
    "change": {"change_workflowrun"},
    "delete": {"view_workflowrun", "delete_workflowrun"},
    "delete only": {"delete_workflowrun"},
    "add": {"view_workflowrun", "add_workflowrun"},
    "add and view all": {"view_workflowrun", "view_executionstate", "add_workflowrun"},
}


@pytest.fixture(autouse=True)
def _urls(settings):
    settings.ROOT_URLCONF = "tests.admin.acting"


@pytest.fixture
def run(backend):
    run = stored_run(backend, status="running", labels={"tenant": "acme"})
    for node in ("load", "split", "digest"):
        backend.states.save_state(run.id, {"at": node}, node)
    return run


def ask(client, action, *runs, query="", **fields):
    """Choose an action for some runs."""
    ids = [getattr(run, "pk", run) for run in runs]
    return client.post(RUNS + query, {"action": action, "_selected_action": ids, **fields})


def ask_of_all(client, action, query="", **fields):
    """Choose an action for all runs that match."""
    first = WorkflowRun.objects.first()
    return ask(client, action, first, query=query, select_across="1", index="0", **fields)


def confirm(client, page, query="", **answers):
    """Post the form of a page, as a browser does, and follow to the next one."""
    posted = defaultdict(list)
    for name, value in page.context["hidden"]:
        posted[name].append(value)
    if page.context["has_begun"]:
        form = page.context["action"]
        answers = {name: form[name].value() or "" for name in form.fields}
    return client.post(RUNS + query, {**posted, **answers}, follow=True)


def do(client, action, *runs, query="", **answers):
    """Choose an action for some runs, and confirm it."""
    return confirm(client, ask(client, action, *runs, query=query), query=query, **answers)


def told(response):
    return " ".join(str(message) for message in response.context["messages"])


def snapshot(backend):
    """Everything that the actions could change."""
    return {
        run.pk: (
            run.status,
            run.labels,
            run.error_message,
            [step["step"] for step in backend.states.iter_steps(run.pk)],
        )
        for run in WorkflowRun.objects.all()
    }


def user_with(client, django_user_model, codenames):
    permission = ContentType.objects.get_for_model(WorkflowRun)
    Permission.objects.get_or_create(
        codename="view_secrets", content_type=permission, defaults={"name": "secrets"}
    )
    user = django_user_model.objects.create_user("alice", is_staff=True)
    user.user_permissions.set(Permission.objects.filter(codename__in=codenames))
    client.force_login(user)
    return user


class TestPermissions:
    @pytest.mark.parametrize("action", NEEDS)
    def test_an_anonymous_user_is_sent_to_the_login(self, client, backend, run, action):
        before = snapshot(backend)

        response = ask(client, action, run, confirmed="yes", **ANSWERS[action])

        assert (response.status_code, "/login/" in response.url) == (302, True)
        assert snapshot(backend) == before

    @pytest.mark.parametrize("action", NEEDS)
    @pytest.mark.parametrize("who", USERS)
    def test_an_action_is_offered_and_done_for_whoever_may_do_it_and_for_nobody_else(
        self, client, django_user_model, backend, run, who, action
    ):
        user_with(client, django_user_model, USERS[who])
        may_view = bool(USERS[who] & {"view_workflowrun", "change_workflowrun"})
        before = snapshot(backend)

        page = client.get(RUNS)
        asked = ask(client, action, run, **ANSWERS[action])

        if not may_view:
            assert page.status_code == asked.status_code == 403
        elif NEEDS[action] <= USERS[who]:
            assert f'value="{action}"' in page.content.decode()
            assert snapshot(backend) == before
            assert confirm(client, asked, **ANSWERS[action]).status_code == 200
            assert action == "export_runs" or snapshot(backend) != before
        else:
            assert f'value="{action}"' not in page.content.decode()
            assert b"progress" not in asked.content
        progress = Progress(timezone.now(), run.started_at, run.pk)
        signed = progress.signed(RUN_ACTIONS[action])
        ask(client, action, run, confirmed="yes", progress=signed, **ANSWERS[action])
        if not NEEDS[action] <= USERS[who] or not may_view:
            assert snapshot(backend) == before
            assert LogEntry.objects.count() == 0

    @pytest.mark.parametrize("action", NEEDS)
    def test_a_superuser_may_do_all(self, admin_client, backend, run, action):
        before = snapshot(backend)

        response = do(admin_client, action, run, **ANSWERS[action])

        assert response.status_code == 200
        assert action == "export_runs" or snapshot(backend) != before

    @pytest.mark.parametrize("action", NEEDS)
    def test_an_action_that_is_called_in_another_way_is_refused(self, run, action):
        request = RequestFactory().post(RUNS, {"action": action, "confirmed": "yes"})
        request.user = User.objects.create_user("bob", is_staff=True)

        with pytest.raises(PermissionDenied):
            getattr(site.get_model_admin(WorkflowRun), action)(request, WorkflowRun.objects.all())

    def test_a_subclass_can_say_who_may_do_what(self, monkeypatch, admin_client, run):
        monkeypatch.setattr(ActingAdmin, "may", lambda self, request, what: what == "delete")

        text = admin_client.get(RUNS).content.decode()

        assert 'value="delete_runs"' in text
        assert 'value="fail_runs"' not in text


class TestAsking:
    @pytest.mark.parametrize("action", NEEDS)
    def test_nothing_is_done_before_it_is_confirmed(self, admin_client, backend, run, action):
        before = snapshot(backend)

        page = ask(admin_client, action, run, **ANSWERS[action])

        assert page.status_code == 200
        assert run.pk in page.content.decode()
        assert snapshot(backend) == before
        assert LogEntry.objects.count() == 0

    @pytest.mark.parametrize("progress", ["", "forged", "a:b:c"])
    def test_a_confirmation_of_no_page_is_asked_for_again(
        self, admin_client, backend, run, progress
    ):
        page = ask(admin_client, "delete_runs", run, confirmed="yes", progress=progress)

        assert page.context["hidden"]
        assert read_run(backend, run)

    def test_the_confirmation_of_one_action_confirms_no_other(self, admin_client, backend, run):
        hidden = dict(ask(admin_client, "add_label", run).context["hidden"])

        admin_client.post(RUNS, {**hidden, "action": "delete_runs"})

        assert read_run(backend, run)

    def test_the_page_tells_how_many_and_which(self, admin_client):
        add_runs(30, status="running")

        text = ask(admin_client, "cancel_runs", *WorkflowRun.objects.all()).content.decode()

        assert "30 selected runs" in text
        assert len(re.findall(r'<a href="/acting/[^"]*/run-\d+/change/', text)) == 20
        assert "there are more" in text

    @pytest.mark.parametrize(("count", "shown"), [(3, "3 runs"), (12, "10+ runs")])
    def test_all_that_match_are_counted_up_to_a_bound(
        self, admin_client, monkeypatch, django_assert_max_num_queries, count, shown
    ):
        monkeypatch.setattr(chosen, "COUNTED", 10)
        add_runs(count, status="running")

        with django_assert_max_num_queries(8) as captured:
            page = ask_of_all(admin_client, "cancel_runs")

        assert f"{shown} that match the filters" in page.content.decode()
        counting = [one["sql"] for one in captured.captured_queries if "COUNT(" in one["sql"]]
        assert all("LIMIT 11" in sql for sql in counting)

    @pytest.mark.parametrize("action", ["delete_runs", "prune_states"])
    def test_the_page_tells_what_is_lost(self, admin_client, run, action):
        text = ask(admin_client, action, run).content.decode()

        assert "3 states in all" in text
        assert "cannot be undone" in text

    def test_what_is_missing_is_asked_for_again(self, admin_client, backend, run):
        page = do(admin_client, "add_label", run, name="a=b", value="x")

        assert "holds no" in page.content.decode()
        assert read_run(backend, run).labels == {"tenant": "acme"}
        done = confirm(admin_client, page, name="ab", value="x")
        assert "added to 1 run" in told(done)

    def test_the_page_has_neither_inline_script_nor_inline_style(self, admin_client, run):
        text = ask(admin_client, "delete_runs", run).content.decode()

        assert not re.search(r"<script(?![^>]*\bsrc=)|\son\w+=|\sstyle=|<style", text)

    def test_the_page_leads_back_to_the_list_with_its_filters(self, admin_client, run):
        page = ask(admin_client, "fail_runs", run, query="?status__exact=running")

        assert f'href="{RUNS}?status__exact=running"' in page.content.decode()
        done = confirm(admin_client, page, query="?status__exact=running")
        assert done.redirect_chain[-1][0] == f"{RUNS}?status__exact=running"

    def test_a_nul_in_an_id_is_a_bad_request(self, admin_client):
        assert ask(admin_client, "fail_runs", "a\0b").status_code == 400

    def test_a_run_that_is_gone_is_told_of(self, admin_client, backend, run):
        backend.runs.delete(run.pk)

        for action in NEEDS:
            response = ask(admin_client, action, run)
            assert response.status_code == 302

    def test_it_is_asked_in_the_language_of_the_user(self, admin_client, run, settings):
        settings.MIDDLEWARE = [*settings.MIDDLEWARE, "django.middleware.locale.LocaleMiddleware"]

        with translation.override(None):
            response = admin_client.post(
                RUNS,
                {"action": "delete_runs", "_selected_action": run.pk},
                headers={"accept-language": "de"},
            )

        assert 'lang="de"' in response.content.decode()


class TestEnding:
    @pytest.mark.parametrize(
        ("action", "status", "text"),
        [
            ("fail_runs", "failed", "Set to failed by admin in the admin: node <b>hangs</b>"),
            ("cancel_runs", "cancelled", "Cancelled by admin in the admin: node <b>hangs</b>"),
        ],
    )
    def test_runs_that_have_not_ended_are_ended_and_say_by_whom(
        self, admin_client, backend, action, status, text
    ):
        runs = [stored_run(backend, status=status) for status in ("pending", "running")]
        ended = stored_run(backend, status="completed", outputs={"total": 1})

        response = do(admin_client, action, *runs, ended, reason="node <b>hangs</b>")

        for run in runs:
            stored = read_run(backend, run)
            assert (stored.status, stored.error_message) == (status, text)
            assert stored.completed_at is not None
        assert read_run(backend, ended).outputs == {"total": 1}
        assert re.search("^2 runs were .* 1 was skipped because of its status.$", told(response))
        assert "<b>hangs" not in response.content.decode()

    def test_the_reason_is_optional(self, admin_client, backend, run):
        do(admin_client, "fail_runs", run)

        assert read_run(backend, run).error_message == "Set to failed by admin in the admin."

    def test_a_run_that_ended_since_it_was_asked_keeps_its_result(self, admin_client, backend, run):
        page = ask(admin_client, "fail_runs", run)
        backend.runs.update_status(run.pk, "completed", outputs={"total": 42})

        response = confirm(admin_client, page)

        assert read_run(backend, run).status == "completed"
        assert read_run(backend, run).outputs == {"total": 42}
        assert "1 went on meanwhile" in told(response)
        assert LogEntry.objects.count() == 0

    def test_a_run_that_ended_and_left_the_filter_went_on(self, admin_client, backend, run):
        query = "?status__exact=running"
        page = ask(admin_client, "fail_runs", run, query=query)
        backend.runs.update_status(run.pk, "completed")

        assert "1 went on meanwhile" in told(confirm(admin_client, page, query=query))

    def test_a_run_that_ends_at_that_moment_keeps_its_result(
        self, admin_client, backend, run, monkeypatch
    ):
        page = ask(admin_client, "cancel_runs", run)
        change = type(backend.runs).update_status

        def ended_first(runs, run_id, status, **fields):
            change(runs, run_id, "completed", outputs=[1])
            return change(runs, run_id, status, **fields)

        monkeypatch.setattr(type(backend.runs), "update_status", ended_first)

        response = confirm(admin_client, page)

        assert (read_run(backend, run).status, read_run(backend, run).outputs) == ("completed", [1])
        assert "1 went on meanwhile" in told(response)

    def test_a_run_that_was_deleted_meanwhile_is_counted(self, admin_client, backend, run):
        other = stored_run(backend, status="running")
        page = ask(admin_client, "fail_runs", run, other)
        backend.runs.delete(other.pk)

        response = confirm(admin_client, page)

        assert "1 run was set to failed. 1 had been deleted meanwhile." in told(response)

    def test_its_worker_hears_of_it(self, admin_client, backend):
        with pytest.raises(RunLostError), record_run("w", backend=backend) as run:
            do(admin_client, "cancel_runs", run.run_id)
            run.save_state({}, "node")


class TestDeletingAndPruning:
    def test_runs_are_deleted_with_their_states_and_logged(self, admin_client, backend, run):
        response = do(admin_client, "delete_runs", run)

        assert snapshot(backend) == {}
        assert told(response) == "1 run was deleted."
        entry = LogEntry.objects.get()
        assert (entry.action_flag, entry.object_id) == (DELETION, run.pk)

    def test_the_newest_states_are_kept(self, admin_client, backend, run):
        backend.runs.update_status(run.pk, "completed")

        response = do(admin_client, "prune_states", run, keep="2")

        steps = [step["step"] for step in backend.states.iter_steps(run.pk)]
        assert steps == [1, 2]
        assert told(response) == "The states of 1 run were pruned."
        assert "Pruned 1 state; the newest to keep: 2" in LogEntry.objects.get().change_message
        assert "1 has no older states" in told(do(admin_client, "prune_states", run, keep="2"))

    @pytest.mark.parametrize("status", ["pending", "running", "failed", "cancelled"])
    def test_runs_that_can_be_resumed_are_pruned_only_if_that_is_said(
        self, admin_client, backend, run, status
    ):
        backend.runs.update_status(run.pk, status)

        refused = do(admin_client, "prune_states", run, keep="1")

        assert "1 was skipped, for it can be resumed" in told(refused)
        assert len(list(backend.states.iter_steps(run.pk))) == 3
        do(admin_client, "prune_states", run, keep="1", resumable="on")
        assert len(list(backend.states.iter_steps(run.pk))) == 1

    @pytest.mark.parametrize("keep", ["", "-1", "x", "99999999999"])
    def test_no_number_prunes_nothing(self, admin_client, backend, run, keep):
        page = do(admin_client, "prune_states", run, keep=keep, resumable="on")

        assert page.context["action"].errors
        assert len(list(backend.states.iter_steps(run.pk))) == 3


class TestLabels:
    def test_runs_are_found_by_a_label_that_was_added(self, admin_client, backend, run):
        response = do(admin_client, "add_label", run, name="réviewed", value="<i>yes</i>")

        found = backend.runs.list_runs(labels={"réviewed": "<i>yes</i>", "tenant": "acme"})
        assert [one.pk for one in found] == [run.pk]
        assert "<i>yes" not in response.content.decode()
        again = do(admin_client, "add_label", run, name="réviewed", value="<i>yes</i>")
        assert "1 has it already" in told(again)

    def test_runs_are_not_found_by_a_label_that_was_removed(self, admin_client, backend, run):
        do(admin_client, "remove_label", run, name="tenant")

        assert backend.runs.list_runs(labels={"tenant": "acme"}) == []
        assert read_run(backend, run).labels == {}
        assert "1 does not have it" in told(do(admin_client, "remove_label", run, name="tenant"))

    def test_one_label_too_many_fails_with_its_reason(self, admin_client, backend, run):
        full = stored_run(backend, labels={f"label {n}": "x" for n in range(32)})

        response = do(admin_client, "add_label", run, full, name="one more", value="x")

        assert "added to 1 run. 1 failed: labels has 33 names" in told(response)
        assert "one more" not in read_run(backend, full).labels


class TestExporting:
    def test_the_file_can_be_imported_again(self, admin_client, backend, run, tmp_path, memory_url):
        other = stored_run(backend, workflow_name="not selected")
        page = ask(admin_client, "export_runs", run)

        response = confirm(admin_client, page)

        path = tmp_path / "runs.jsonl"
        path.write_bytes(b"".join(response.streaming_content))
        assert "attachment" in response["Content-Disposition"]
        target = create_storage_backend(memory_url)
        assert [one.run_id for one in import_runs(path, target)] == [run.pk]
        assert target.runs.get(run.pk).labels == {"tenant": "acme"}
        assert target.runs.get(other.pk) is None
        assert target.states.get_state_history(run.pk) == backend.states.get_state_history(run.pk)
        assert LogEntry.objects.get().change_message == "Exported as JSON Lines."

    def test_nothing_is_left_in_the_directory_of_temporary_files(
        self, admin_client, run, monkeypatch, tmp_path
    ):
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

        response = do(admin_client, "export_runs", run)

        assert b"".join(response.streaming_content)
        assert list(tmp_path.iterdir()) == []

    def test_all_that_match_are_exported(self, admin_client, backend, run):
        stored_run(backend, status="failed")
        query = "?status__exact=failed"

        response = confirm(
            admin_client, ask_of_all(admin_client, "export_runs", query=query), query=query
        )

        lines = b"".join(response.streaming_content).splitlines()
        assert len(lines) == 1
        assert b'"failed"' in lines[0]

    def test_many_are_exported_in_parts(self, admin_client, monkeypatch):
        monkeypatch.setattr(actions, "MAX_RUNS", 2)
        add_runs(5)

        page = ask_of_all(admin_client, "export_runs")
        files = [
            b"".join(confirm(admin_client, page, part=str(part)).streaming_content)
            for part, _runs in page.context["parts"]
        ]

        assert [label for _part, label in page.context["parts"]] == ["1-2", "3-4", "5-5"]
        monkeypatch.setattr(actions, "MAX_PARTS", 5000)
        text = ask_of_all(admin_client, "export_runs").content.decode()
        assert "of 10,000 runs at most" in text
        assert [len(file.splitlines()) for file in files] == [2, 2, 1]
        ids = [json.loads(line)["run"]["id"] for file in files for line in file.splitlines()]
        assert len({*ids}) == 5

    def test_what_takes_too_long_is_refused(self, admin_client, monkeypatch):
        monkeypatch.setattr(actions, "MAX_SECONDS", -1.0)
        add_runs(3)

        response = confirm(admin_client, ask_of_all(admin_client, "export_runs"))

        assert "manage.py export_runs" in told(response)
        assert LogEntry.objects.count() == 0

    def test_a_run_that_is_not_complete_is_told_of(self, admin_client, run):
        run.states.filter(step=1).update(state_json="{", state_delta=None)

        assert b"".join(do(admin_client, "export_runs", run).streaming_content)

        assert "1 run in the file is not complete" in told(admin_client.get(RUNS))


class TestForking:
    def test_a_fork_can_be_resumed(self, admin_client, backend, run):
        response = do(admin_client, "fork_run", run, step="1")

        fork = WorkflowRun.objects.get(parent_id=run.pk)
        assert response.redirect_chain[-1][0] == f"{RUNS}{quote(fork.pk)}/change/"
        assert response.status_code == 200
        with resume_run(fork.pk, backend=backend) as resumed:
            assert (resumed.state, resumed.node_id) == ({"at": "split"}, "split")
        flags = {entry.object_id: entry.action_flag for entry in LogEntry.objects.all()}
        assert flags == {fork.pk: ADDITION, run.pk: CHANGE}

    def test_the_newest_step_is_filled_in_unless_one_is_given(self, admin_client, run):
        assert ask(admin_client, "fork_run", run).context["action"]["step"].value() == 2
        page = ask(admin_client, "fork_run", run, step="1")
        assert page.context["action"]["step"].value() == "1"

    def test_a_step_that_there_is_not_is_asked_for_again(self, admin_client, run):
        page = do(admin_client, "fork_run", run, step="7")

        assert "no state of this step" in page.content.decode()
        assert WorkflowRun.objects.count() == 1

    def test_only_one_run_can_be_forked(self, admin_client, backend, run):
        other = stored_run(backend)

        for response in (
            ask(admin_client, "fork_run", run, other),
            ask_of_all(admin_client, "fork_run"),
        ):
            assert response.status_code == 302
        assert "Select one run" in told(admin_client.get(RUNS))

    def test_a_run_without_states_cannot_be_forked(self, admin_client, backend):
        assert ask(admin_client, "fork_run", stored_run(backend)).status_code == 302
        assert "no states" in told(admin_client.get(RUNS))

    def test_a_run_that_was_deleted_meanwhile_is_not_forked(self, admin_client, backend, run):
        page = ask(admin_client, "fork_run", run)
        backend.runs.delete(run.pk)

        assert "Nothing is left" in told(confirm(admin_client, page, step="1"))
        assert WorkflowRun.objects.count() == 0


class TestGoingOn:
    def test_all_that_match_are_done_in_as_many_requests_as_it_takes(
        self, admin_client, backend, monkeypatch
    ):
        monkeypatch.setattr(actions, "MAX_RUNS", 500)
        monkeypatch.setattr("workflow_storage.admin.progress.BATCH", 70)
        add_runs(1200, status="running")
        other = stored_run(backend, id="other", status="completed")
        query = "?status__exact=running"

        page = ask_of_all(admin_client, "fail_runs", query=query)
        assert "1,000+ runs that match" in page.content.decode()
        left = []
        page = confirm(admin_client, page, query=query, reason="<all> of them")
        while page.context.get("has_begun"):
            left.append(WorkflowRun.objects.filter(status="running").count())
            assert f"Left: {left[-1]} runs" in page.content.decode()
            assert len(left) < 5
            page = confirm(admin_client, page, query=query)

        assert left == [700, 200]
        assert told(page) == "1,200 runs were set to failed."
        text = "Set to failed by admin in the admin: <all> of them"
        assert WorkflowRun.objects.filter(status="failed", error_message=text).count() == 1200
        assert read_run(backend, other).status == "completed"
        assert LogEntry.objects.count() == 1200

    def test_it_goes_on_where_it_stopped_if_the_runs_stay_in_the_filter(
        self, admin_client, monkeypatch
    ):
        monkeypatch.setattr(actions, "MAX_RUNS", 4)
        same = timezone.now()
        runs = add_runs(10)
        WorkflowRun.objects.update(started_at=same)

        page = confirm(
            admin_client, ask_of_all(admin_client, "add_label"), name="n", value=" & <v>"
        )
        requests = 1
        while page.context.get("has_begun"):
            page = confirm(admin_client, page)
            requests += 1
            assert requests < 5

        assert requests == 3
        assert told(page) == "The label was added to 10 runs."
        ids = LogEntry.objects.values_list("object_id", flat=True)
        assert sorted(ids) == sorted(run.pk for run in runs)

    def test_a_request_stops_when_its_time_is_over(self, admin_client, monkeypatch):
        monkeypatch.setattr(actions, "MAX_SECONDS", -1.0)
        add_runs(3, status="running")

        page = confirm(admin_client, ask_of_all(admin_client, "cancel_runs"))

        assert "1 run was cancelled." in page.content.decode()
        assert "Left: 2 runs" in page.content.decode()

    def test_selected_runs_go_on_too_and_answers_stay(self, admin_client, backend, monkeypatch):
        monkeypatch.setattr(actions, "MAX_RUNS", 2)
        runs = [stored_run(backend, status="completed") for _ in range(3)]
        for run in runs:
            for _ in range(3):
                backend.states.save_state(run.pk, {}, "node")
        open_run = stored_run(backend, started_at=timezone.now() - timedelta(days=1))
        backend.states.save_state(open_run.pk, {}, "node")

        page = do(admin_client, "prune_states", *runs, open_run, keep="2")
        assert "Left: 2 selected runs" in page.content.decode()
        page = confirm(admin_client, page)

        assert told(page) == (
            "The states of 3 runs were pruned. 1 was skipped, for it can be resumed."
        )
        assert {len(list(backend.states.iter_steps(run.pk))) for run in runs} == {2}

    def test_a_run_that_began_after_it_was_asked_is_left(self, admin_client, backend):
        add_runs(2, status="running")
        page = ask_of_all(admin_client, "cancel_runs")
        new = stored_run(backend, status="running", started_at=timezone.now() + timedelta(hours=1))

        response = confirm(admin_client, page)

        assert told(response) == "2 runs were cancelled."
        assert read_run(backend, new).status == "running"

    def test_a_store_that_does_not_answer_is_asked_again(self, admin_client, backend, monkeypatch):
        add_runs(3, status="running")
        change = type(backend.runs).update_status
        calls = []

        def sometimes(runs, run_id, status, **fields):
            calls.append(run_id)
            if len(calls) == 2:
                raise StorageUnavailableError("It is <down>.")
            return change(runs, run_id, status, **fields)

        monkeypatch.setattr(type(backend.runs), "update_status", sometimes)

        page = confirm(admin_client, ask_of_all(admin_client, "cancel_runs"))
        assert "It is &lt;down&gt;." in page.content.decode()
        response = confirm(admin_client, page)

        assert told(response) == "3 runs were cancelled."


class TestOddRuns:
    @pytest.mark.parametrize(
        "run_id",
        [
            "a/b?c#d e_5F%",
            "'\"<>&",
            *(
                pytest.param(run_id, marks=pytest.mark.slow)
                for run_id in ("..", "\N{GRINNING FACE}" * 3, "_5F", "a_2Fb", "ünï")
            ),
        ],
    )
    @pytest.mark.parametrize("action", NEEDS)
    def test_runs_with_odd_ids_and_names(self, admin_client, backend, run_id, action):
        name = "<script>alert(1)</script>"
        run = stored_run(backend, id=run_id, workflow_name=name, labels={"tenant": "<b>"})
        for _ in range(2):
            backend.states.save_state(run.pk, {}, "<node>")
        before = snapshot(backend)

        page = ask(admin_client, action, run, from_run="1")
        assert name not in page.content.decode()
        assert "<node>" not in page.content.decode()
        assert admin_client.get(page.context["runs"][0][0]).status_code == 200
        response = confirm(admin_client, page, **ANSWERS[action])

        assert response.status_code == 200
        assert action == "export_runs" or snapshot(backend) != before
        if not response.streaming:
            assert name not in response.content.decode()
        assert LogEntry.objects.filter(object_id=run_id).count() == 1

    @pytest.mark.parametrize("is_the_projects", [True, False])
    def test_another_database_is_acted_on(
        self,
        admin_client,
        backend,
        monkeypatch,
        settings,
        tmp_path,
        django_db_blocker,
        is_the_projects,
    ):
        url = f"sqlite:///{tmp_path}/archive.db"
        with django_db_blocker.unblock():
            archive = create_storage_backend(url)
            for store in (backend, archive):
                stored_run(store, id="same", status="running")
            monkeypatch.setattr(ActingAdmin, "alias", archive.alias)
            if is_the_projects:
                settings.WORKFLOW_STORAGE = url
            else:
                monkeypatch.setattr(ActingAdmin, "store_of", lambda self, runs: archive)

            response = do(admin_client, "cancel_runs", "same")

            assert told(response) == "1 run was cancelled."
            assert archive.runs.get("same").status == "cancelled"
            assert backend.runs.get("same").status == "running"
            forget(archive.alias)


class TestAllThatMatch:
    @pytest.mark.parametrize(
        "query",
        ["status__exact=x", "since=foo", "slower=abc", "stalled=maybe", "label=a", "sort=x"],
    )
    def test_nothing_is_done_where_a_filter_was_left_out(self, admin_client, backend, run, query):
        before = snapshot(backend)

        response = ask_of_all(admin_client, "delete_runs", query=f"?{query}")

        page = admin_client.get(response.url)
        assert "Nothing was done: a filter in the address was left out" in told(page)
        assert snapshot(backend) == before


class TestFromThePageOfARun:
    def forms(self, run, user, **attributes):
        request = RequestFactory().get("/")
        request.user = user
        return site.get_model_admin(WorkflowRun).run_action_forms(request, run)

    @pytest.mark.parametrize(
        ("status", "offered"), [("running", True), ("pending", True), ("completed", False)]
    )
    def test_what_fits_the_run_and_the_user_is_offered(self, admin_user, backend, status, offered):
        run = stored_run(backend, status=status)

        names = {form.action for form in self.forms(run, admin_user)}

        assert ({"fail_runs", "cancel_runs"} <= names) == offered
        assert "delete_runs" in names

    def test_nothing_is_offered_to_who_may_only_view(self, client, django_user_model, run):
        user = user_with(client, django_user_model, {"view_workflowrun"})

        assert self.forms(run, user) == []

    def test_it_asks_and_returns_to_the_page_of_the_run(self, admin_client, admin_user, run):
        form = next(one for one in self.forms(run, admin_user) if one.action == "fail_runs")
        here = f"{RUNS}{quote(run.pk)}/change/"

        page = admin_client.post(form.url, dict(form.hidden))
        assert f'href="{here}"' in page.content.decode()
        response = confirm(admin_client, page, reason="x")

        assert response.redirect_chain[-1][0] == here
        assert "1 run was set to failed." in told(response)

    def test_after_deleting_it_returns_to_the_list(self, admin_client, admin_user, run):
        form = next(one for one in self.forms(run, admin_user) if one.action == "delete_runs")

        response = confirm(admin_client, admin_client.post(form.url, dict(form.hidden)))

        assert response.redirect_chain[-1][0] == RUNS

    def test_the_checks_of_django_find_nothing_wrong(self):
        assert site.get_model_admin(WorkflowRun).check() == []
        assert admin.site is not site

"""Who may see what: every address, every filter and every search, with and without permissions."""

import itertools
import json

import pytest
from django.contrib.admin.utils import quote
from django.contrib.auth.models import Permission
from django.urls import reverse

from tests.admin.conftest import RUNS, page_of
from workflow_storage import ExecutionState, create_storage_backend
from workflow_storage.testing import stored_run

pytestmark = pytest.mark.django_db

NODE, STATE, SECRET = "secret-node-name", "value-in-a-state", "s3cr3t-value"


@pytest.fixture
def run(backend):
    run = stored_run(
        backend,
        id="the-run",
        status="running",
        inputs={"api_key": SECRET, "file": "a.pdf"},
        config_snapshot={"headers": {"Authorization": SECRET}},
        outputs=[{"password": SECRET}],
    )
    backend.states.save_state(run.id, {"text": STATE, "token": SECRET}, NODE, attempt=1)
    backend.states.save_state(run.id, {"text": STATE + "!", "token": SECRET + "2"}, NODE, attempt=1)
    backend.runs.update_status(run.id, "failed", error_message="broken", current_node=NODE)
    backend.runs.update_status(run.id, "running")
    backend.runs.update_status(run.id, "failed", error_message="broken", current_node=NODE)
    stored_run(backend, id="other", workflow_name=run.workflow_name, inputs={"api_key": "x"})
    return run


@pytest.fixture
def user_with(django_user_model, client):
    def log_in(*names, superuser=False):
        user = django_user_model.objects.create_user(
            f"user-{len(names)}", is_staff=True, is_superuser=superuser
        )
        user.user_permissions.set(Permission.objects.filter(codename__in=names))
        client.force_login(user)
        return client

    return log_in


def pages(run):
    name, pk = "admin:workflow_storage_run_{}", quote(run.pk)
    state = ExecutionState.objects.first()
    return {
        "list": reverse(RUNS),
        "run": page_of(run),
        "history": reverse("admin:workflow_storage_workflowrun_history", args=[pk]),
        "overview": reverse(name.format("overview")),
        "file": reverse(name.format("file"), args=[pk]),
        "payload": reverse(name.format("payload"), args=[pk, "inputs"]),
        "live": reverse(name.format("live"), args=[pk]),
        "compare": reverse(name.format("compare"), args=[pk, "other"]),
        "states": reverse(name.format("states"), args=[pk]),
        "steps": reverse(name.format("steps"), args=[pk]),
        "state": reverse(name.format("state"), args=[pk, 1]),
        "state file": reverse(name.format("state_file"), args=[pk, 1]),
        "state list": reverse("admin:workflow_storage_executionstate_changelist"),
        "state page": reverse("admin:workflow_storage_executionstate_change", args=[state.pk]),
    }


OF_STATES = {"states", "steps", "state", "state file", "state list", "state page"}


def test_nobody_sees_anything_without_logging_in(client, run):
    for url in pages(run).values():
        response = client.get(url)
        assert response.status_code == 302
        assert "/login/" in response.url


def test_staff_without_a_permission_sees_nothing(user_with, run):
    client = user_with()
    for name, url in pages(run).items():
        assert client.get(url).status_code == 403, name


def test_who_may_view_runs_only_sees_no_node_and_no_state(user_with, run):
    client = user_with("view_workflowrun")
    for name, url in pages(run).items():
        response = client.get(url)
        if name in OF_STATES:
            assert response.status_code == 403, name
        else:
            assert response.status_code == 200, name
            text = response.content.decode()
            for hidden in (NODE, STATE, SECRET):
                assert hidden not in text, (name, hidden)


def test_who_may_view_states_only_sees_those_alone(user_with, run):
    client = user_with("view_executionstate")
    for name, url in pages(run).items():
        expected = 200 if name in {"state list", "state page"} else 403
        assert client.get(url).status_code == expected, name


def test_secrets_are_masked_everywhere_for_who_may_view_both(user_with, run):
    client = user_with("view_workflowrun", "view_executionstate", "change_workflowrun")
    for name, url in pages(run).items():
        response = client.get(url, follow=True)
        assert response.status_code == 200, name
        assert SECRET not in response.content.decode(), name
    text = client.get(pages(run)["state"]).content.decode()
    assert STATE in text
    assert "token" in text
    masked = json.loads(client.get(pages(run)["payload"]).content)
    assert masked == {"api_key": "••••••", "file": "a.pdf"}


def test_who_may_see_secrets_sees_them(user_with, run):
    client = user_with("view_workflowrun", "view_executionstate", "view_secrets")
    for name in ("run", "state", "state file", "payload", "state page"):
        assert SECRET in client.get(pages(run)[name]).content.decode(), name


def test_a_superuser_sees_all(user_with, run):
    client = user_with(superuser=True)
    for name, url in pages(run).items():
        assert client.get(url, follow=True).status_code == 200, name


def test_no_lookup_and_no_search_tells_a_masked_value_from_another(user_with, run, backend):
    client = user_with("view_workflowrun", "view_executionstate")
    fields = ("inputs", "outputs", "config_snapshot", "states__state_json", "label_rows__value")
    keys = ("", "__api_key", "__0__password", "__headers__Authorization")
    lookups = (
        "",
        "__startswith",
        "__contains",
        "__icontains",
        "__regex",
        "__gt",
        "__in",
        "__isnull",
    )
    probes = [f"{''.join(parts)}" for parts in itertools.product(fields, keys, lookups)]
    for url in (pages(run)["list"], pages(run)["state list"]):
        for probe in (*probes, "q", "workflow", "label", "parent", "status__exact", "sort"):
            right, wrong = (
                client.get(url, {probe: value})
                for value in (
                    SECRET[:4],
                    "s3cx",
                )
            )
            assert right.status_code == wrong.status_code, probe
            if right.status_code == 200:
                ours, theirs = (
                    [row.pk for row in one.context["cl"].result_list] for one in (right, wrong)
                )
                assert ours == theirs, probe
            else:
                assert right.status_code in (302, 400), probe


@pytest.mark.parametrize("store", ["default", "memory://labels"])
def test_a_label_that_is_a_secret_is_hidden_and_finds_nothing(
    user_with, admin_client, settings, store
):
    settings.WORKFLOW_STORAGE = store
    run = stored_run(
        create_storage_backend(store), labels={"api_key": SECRET, "tenant": "acme"}, status="failed"
    )
    client = user_with("view_workflowrun", "view_executionstate", "change_workflowrun")
    name = "admin:workflow_storage_run_{}"
    for url in (
        reverse(RUNS),
        page_of(run),
        reverse(name.format("live"), args=[run.pk]),
        reverse(name.format("file"), args=[run.pk]),
    ):
        text = client.get(url).content.decode()
        assert "api_key" in text, url
        assert "acme" in text, url
        assert SECRET not in text, url
        assert SECRET in admin_client.get(url).content.decode(), url

    for parameters, found in (({"label": "api_key={}"}, 1), ({"q": "api_key={}"}, 0)):
        for value in (SECRET, "other"):
            asked = {key: text.format(value) for key, text in parameters.items()}
            page = client.get(reverse(RUNS), asked)
            assert len(page.context["cl"].result_list) == found
            assert "The label api_key is hidden from you" in page.content.decode()
    asked = {"label": f"api_key={SECRET}"}
    assert len(admin_client.get(reverse(RUNS), asked).context["cl"].result_list) == 1


def test_markup_stays_text_wherever_it_comes_from(user_with, backend):
    evil = "<script>alert(1)</script>"
    client = user_with(superuser=True)
    run = stored_run(
        backend,
        id=evil[:30],
        workflow_name=evil,
        status="running",
        inputs={evil: [evil]},
        labels={"<b>": evil},
    )
    backend.states.save_state(run.id, {evil: evil}, evil, attempt=1)
    backend.states.save_state(run.id, {evil: evil + "\n" * 3 + evil}, evil, attempt=1)
    backend.runs.update_status(run.id, "failed", error_message=evil * 9, current_node=evil)
    stored_run(backend, id="other", workflow_name=evil)
    for name, url in pages(run).items():
        if "file" in name or name == "payload":
            continue
        text = client.get(url, follow=True).content.decode()
        if name == "live":
            text = "".join(json.loads(text)["regions"].values())
        assert "<script>alert" not in text, name
        assert "<b>=" not in text, name

"""The further pages of a run: failure first, states at any step, comparison, downloads, refresh."""

import json
from datetime import timedelta

import pytest
from django.contrib.admin.utils import quote
from django.urls import reverse
from django.utils import timezone

from tests.admin.conftest import RUNS, page_of
from workflow_storage import ExecutionState, create_storage_backend, fork_run
from workflow_storage.testing import changed_state, stored_run

pytestmark = pytest.mark.django_db


def url_of(view, run, *args):
    quoted = [quote(arg) if isinstance(arg, str) else arg for arg in args]
    return reverse(f"admin:workflow_storage_run_{view}", args=[quote(run.pk), *quoted])


def text_of(client, url, **parameters):
    response = client.get(url, parameters)
    assert response.status_code == 200, response
    return response.content.decode()


@pytest.fixture
def failed(backend):
    """A run that failed twice, in two nodes."""
    run = stored_run(backend, id="fail/ed", workflow_name="invoices", status="running")
    backend.states.save_state(run.id, {"pages": 1, "api_key": "k1"}, "fetch", attempt=1)
    backend.runs.update_status(
        run.id, "failed", error_message="OSError: first\nline 2\nline 3\nline 4", current_node="ocr"
    )
    backend.runs.update_status(run.id, "running", worker="host:2")
    backend.states.save_state(
        run.id, {"pages": 2, "api_key": "k2", "new": True}, "ocr", attempt=2, tokens=7
    )
    backend.runs.update_status(
        run.id, "failed", error_message="ValueError: <b>bad</b>\n  Traceback", current_node="parse"
    )
    return run


def test_a_failed_run_says_first_where_and_why(admin_client, failed):
    text = text_of(admin_client, page_of(failed))

    assert text.index("Failed in parse") < text.index("Timeline")
    assert "ValueError: &lt;b&gt;bad&lt;/b&gt;" in text
    assert "<b>bad" not in text


def test_a_traceback_says_first_which_exception_it_was(admin_client, backend):
    frames = "".join(f'  File "{number}.py", line 1, in call\n    call()\n' for number in range(30))
    error = f"Traceback (most recent call last):\n{frames}ValueError: page 7\n"
    run = stored_run(backend, status="failed", error_message=error)

    box = text_of(admin_client, page_of(run)).split('aria-label="Error">')[1]
    row = text_of(admin_client, reverse(RUNS)).split("workflow-storage-detail")[1]

    assert box.startswith("ValueError: page 7<")
    assert "29.py" in box.split("The whole error")[1]
    assert row.split("<")[0].endswith("ValueError: page 7")


def test_attempts_show_their_errors_and_workers_also_after_the_run_completed(
    admin_client, backend, failed
):
    backend.runs.update_status(failed.id, "running")
    backend.runs.update_status(failed.id, "completed")

    text = text_of(admin_client, page_of(failed))

    for shown in ("OSError: first", "ValueError: &lt;b&gt;bad", "host:2", "Attempts"):
        assert shown in text
    assert "Failed in" not in text


def test_a_waiting_run_says_for_what(admin_client, backend):
    run = stored_run(backend, status="running")
    backend.runs.update_status(run.id, "pending", waiting_for="approval <by> finance")

    assert "approval &lt;by&gt; finance" in text_of(admin_client, page_of(run))


def test_parents_children_and_forks_are_linked(admin_client, backend, failed):
    child = stored_run(backend, workflow_name="child", parent_id=failed.id)
    fork = fork_run(failed.id, 0, backend=backend)

    text = text_of(admin_client, page_of(failed))

    assert page_of(child) in text
    assert page_of(fork) in text
    assert page_of(failed) in text_of(admin_client, page_of(child))
    assert "Forked at step 0 from" in text_of(admin_client, page_of(fork))
    backend.runs.delete(failed.id)
    assert "is not there any more" in text_of(admin_client, page_of(child))


def test_related_runs_say_that_they_wait_or_have_stalled(admin_client, backend, failed):
    hour_ago = timezone.now() - timedelta(hours=1)
    waiting, stalled, busy = (
        stored_run(
            backend,
            parent_id=failed.id,
            status="running",
            started_at=hour_ago,
            attempt_started_at=hour_ago,
        )
        for _ in range(3)
    )
    backend.runs.update_status(waiting.id, "pending", waiting_for="approval")
    backend.states.save_state(busy.id, {}, "node")

    text = text_of(admin_client, page_of(failed)).split("Related runs")[1]

    marks = [text.split(page_of(run))[1].split("</li>")[0] for run in (waiting, stalled, busy)]
    assert "waiting" in marks[0]
    assert "stalled" in marks[1]
    assert "workflow-storage-mark" not in marks[2]


def test_the_runs_before_and_after_of_the_workflow_are_linked(admin_client, backend):
    runs = [stored_run(backend, workflow_name="w") for _ in range(3)]
    stored_run(backend, workflow_name="other")

    text = text_of(admin_client, page_of(runs[1]))

    assert f'href="{page_of(runs[0])}" rel="next"' in text
    assert f'href="{page_of(runs[2])}" rel="prev"' in text
    assert url_of("compare", runs[1], runs[0].pk) in text


def test_a_state_is_shown_after_before_and_as_a_difference(admin_client, failed):
    text = text_of(admin_client, url_of("state", failed, 1))

    after = text.split('id="after"')[1]
    before = text.split('id="before"')[1].split('id="after"')[0]
    assert ">2<" in after
    assert ">1<" in before
    difference = text.split('id="difference"')[1].split('id="before"')[0]
    assert "pages" in difference
    assert "new" in difference
    assert url_of("state", failed, 0) in text


def test_the_first_and_the_last_state_have_one_neighbour(admin_client, failed):
    first = text_of(admin_client, url_of("state", failed, 0))
    last = text_of(admin_client, url_of("state", failed, 1))

    assert 'rel="prev"' not in first
    assert 'rel="next"' in first
    assert 'rel="next"' not in last
    assert "The first state" in first


def test_the_slider_leads_to_a_step_and_nonsense_to_the_newest(admin_client, failed):
    for given, step in (("0", 0), ("1", 1), ("", 1), ("-1", 1), ("x", 1), ("9" * 40, 1)):
        response = admin_client.get(url_of("states", failed), {"step": given})
        assert response.url == url_of("state", failed, step)
    assert admin_client.get(url_of("state", failed, 2)).status_code == 404
    assert admin_client.get(url_of("state", failed, 2**40)).status_code == 404


def test_a_long_run_is_folded_by_node_and_its_steps_are_on_pages(admin_client, backend):
    run = stored_run(backend, status="running")
    writer = backend.states.writer(run.id)
    for step in range(501):
        writer.save_state({}, f"node-{step % 3}")

    assert f'href="{url_of("steps", run)}"' in text_of(admin_client, page_of(run))
    first = text_of(admin_client, url_of("steps", run))
    assert url_of("state", run, 499) in first
    assert url_of("state", run, 500) not in first
    assert f'href="{url_of("steps", run)}?first=500" rel="next"' in first
    second = text_of(admin_client, url_of("steps", run), first=500)
    assert url_of("state", run, 500) in second
    assert url_of("state", run, 499) not in second
    for nonsense in ("x", "-1", "9" * 40):
        text = text_of(admin_client, url_of("steps", run), first=nonsense)
        assert url_of("state", run, 0) in text


def add_steps(run, first, count, created_at):
    ExecutionState.objects.bulk_create(
        (
            ExecutionState(
                run=run,
                step=step,
                node_id=f"node-{step % 7}",
                state_json="{}",
                created_at=created_at + timedelta(milliseconds=step),
            )
            for step in range(first, first + count)
        ),
        batch_size=1000,
    )


def test_all_steps_of_a_long_run_are_in_its_timeline_and_in_a_comparison(admin_client, backend):
    hour_ago = timezone.now() - timedelta(hours=1)
    run = stored_run(backend, status="running", started_at=hour_ago, attempt_started_at=hour_ago)
    add_steps(run, 100, 6000, hour_ago)
    backend.states.save_state(run.id, {}, "the newest", attempt=1)

    page = text_of(admin_client, page_of(run))
    compared = text_of(admin_client, url_of("compare", run, run.pk))

    assert "6,001 steps in 1 attempt" in page
    assert "of 6,001 steps" not in page
    assert "the newest" in page.split("Timeline")[1]
    assert "stalled" not in page
    assert ">the newest<" in compared
    assert compared.split(">node-0<")[1].split("<td>")[1].startswith("857<")


def test_a_timeline_that_shows_the_first_steps_alone_says_so(admin_client, backend):
    hour_ago = timezone.now() - timedelta(hours=1)
    run = stored_run(backend, status="running", started_at=hour_ago, attempt_started_at=hour_ago)
    add_steps(run, 100, 20_001, hour_ago)
    backend.states.save_state(run.id, {}, "the newest", attempt=1)

    text = text_of(admin_client, page_of(run))

    assert "The first 20,000 of 20,002 steps." in text
    assert "stalled" not in text


def test_pruned_states_and_large_ones_are_shown(admin_client, backend):
    run = stored_run(backend)
    writer = backend.states.writer(run.id)
    for step in range(12):
        writer.save_state(changed_state({}, "grow", 9000 + step), f"node {step}")
    backend.states.delete_states(run.id, keep_last=3)

    oldest = text_of(admin_client, url_of("state", run, 9))
    assert "The first state" not in oldest
    assert oldest.count("The step before was deleted.") == 2
    assert "workflow-storage-diff" not in oldest.split('id="difference"')[1]
    newest = text_of(admin_client, url_of("state", run, 11))
    assert "The step before was deleted." not in newest
    assert "workflow-storage-diff" in newest.split('id="difference"')[1]
    assert admin_client.get(url_of("state", run, 8)).status_code == 404


def test_a_damaged_state_is_said_to_be_so(admin_client, backend, failed):
    failed.states.filter(step=1).update(state_json="damaged")

    assert "cannot be rebuilt" in text_of(admin_client, url_of("state", failed, 1))
    assert admin_client.get(page_of(failed)).status_code == 200


def test_a_damaged_state_before_is_said_to_be_so_beside_the_one_after(admin_client, backend):
    run = stored_run(backend)
    for node in ("first", "second"):
        backend.states.save_state(run.id, {node: "x" * 9000}, node)
    run.states.filter(step=0).update(state_json="damaged")
    run.states.filter(step=1).update(state_json='{"kept": 1}', state_delta=None)

    text = text_of(admin_client, url_of("state", run, 1))

    difference, rest = text.split('id="difference"')[1].split('id="before"')
    before, after = rest.split('id="after"')
    assert "cannot be rebuilt" in difference
    assert "workflow-storage-diff" not in difference
    assert "cannot be rebuilt" in before
    assert "kept" in after


def test_the_page_of_a_run_says_that_its_newest_state_is_damaged(admin_client, backend, failed):
    newest = failed.states.order_by("step").last()
    failed.states.filter(pk=newest.pk).update(state_json="damaged", state_delta=None)

    text = admin_client.get(page_of(failed)).content.decode()

    assert f"step {newest.step}" in text
    assert "Restore it from a backup" in text


def test_two_runs_are_compared_side_by_side(admin_client, backend, failed):
    other = stored_run(
        backend, workflow_name="invoices", inputs={"file": "b.pdf"}, status="running"
    )
    backend.states.save_state(other.id, {"pages": 3}, "fetch", tokens=5)

    text = text_of(admin_client, url_of("compare", failed, other.pk))

    for shown in ("Final states", "pages", "fetch", "ocr", "file", "b.pdf"):
        assert shown in text
    assert url_of("compare", other, failed.pk) in text
    assert admin_client.get(url_of("compare", failed, "gone")).status_code == 404
    response = admin_client.get(url_of("compare_with", failed), {"with": other.pk})
    assert response.url == url_of("compare", failed, other.pk)
    response = admin_client.get(url_of("compare_with", failed), {"with": "gone"})
    assert response.url == page_of(failed)


def test_files_hold_what_is_stored(admin_client, backend, failed):
    backend.runs.update(failed.id, inputs={"a": ["\0", "ä", None]})

    payload = admin_client.get(url_of("payload", failed, "inputs"))
    assert json.loads(payload.content) == {"a": ["\0", "ä", None]}
    assert "attachment" in payload["Content-Disposition"]
    state = admin_client.get(url_of("state_file", failed, 1))
    assert json.loads(state.content)["pages"] == 2
    run = json.loads(admin_client.get(url_of("file", failed)).content)
    assert run["run"]["workflow_name"] == "invoices"
    assert [step["node_id"] for step in run["steps"]] == ["fetch", "ocr"]
    assert len(run["attempts"]) == 2
    assert admin_client.get(url_of("payload", failed, "labels")).status_code == 404
    assert admin_client.get(url_of("state_file", failed, 7)).status_code == 404


def test_a_running_run_tells_what_changed_until_it_has_ended(admin_client, backend):
    run = stored_run(backend, status="running", attempt_started_at=timezone.now())
    assert f'data-live="{url_of("live", run)}"' in text_of(admin_client, page_of(run))

    first = admin_client.get(url_of("live", run)).json()
    backend.states.save_state(run.id, {}, "node-1", attempt=1)
    second = admin_client.get(url_of("live", run)).json()
    backend.runs.update_status(run.id, "completed")
    last = admin_client.get(url_of("live", run)).json()

    assert [data["ended"] for data in (first, second, last)] == [False, False, True]
    assert "node-1" not in first["regions"]["progress"]
    assert "node-1" in second["regions"]["progress"]
    assert "completed" in last["regions"]["head"]
    assert len({data["version"] for data in (first, second, last)}) == 3
    assert "data-live" not in text_of(admin_client, page_of(run))


@pytest.mark.parametrize("url", ["default", "redis"])
def test_a_state_that_the_browser_shows_is_not_sent_again(
    admin_client, request, settings, backend, url
):
    if url == "redis":
        settings.WORKFLOW_STORAGE = request.getfixturevalue("redis_url")
        backend = create_storage_backend()
    run = stored_run(backend, id=f"shown in {url}", status="running")
    backend.states.save_state(run.id, {"the state": "x" * 9000}, "node", attempt=1)
    live = url_of("live", run)
    try:
        assert 'data-step="0"' in text_of(admin_client, page_of(run))
        first = admin_client.get(live).json()
        again = admin_client.get(live, {"step": first["step"]}).json()
        backend.runs.heartbeat(run.id)
        idle = admin_client.get(live, {"step": again["step"]}).json()
        backend.states.save_state(run.id, {"a newer one": 1}, "node", attempt=1)
        newer = admin_client.get(live, {"step": idle["step"]}).json()
        beyond = admin_client.get(live, {"step": 7}).json()
    finally:
        backend.runs.delete(run.id)

    assert "the state" in first["regions"]["latest"]
    assert [data["step"] for data in (first, again, idle, newer, beyond)] == [0, 0, 0, 1, 1]
    assert set(again["regions"]) == {"head", "progress"}
    assert "the state" not in json.dumps(again)
    assert first["version"] == again["version"] == idle["version"] != newer["version"]
    assert "a newer one" in newer["regions"]["latest"]
    assert "latest" in beyond["regions"]


def test_the_overview_shows_what_the_list_is_narrowed_to(admin_client, backend):
    for number in range(8):
        stored_run(
            backend,
            workflow_name=("a", "b")[number % 2],
            status=("completed", "failed")[number % 2],
            total_tokens=5,
        )
    url = reverse("admin:workflow_storage_run_overview")

    page = text_of(admin_client, url, since="24h")
    fragment = text_of(admin_client, url, since="24h", workflow="b", fragment="1")

    assert "<html" in page
    assert "<html" not in fragment
    assert "4 of 4" in fragment
    assert ">a<" not in fragment
    assert admin_client.get(url, {"since": "400d"}).status_code == 200


@pytest.mark.parametrize(
    "view", ["states", "steps", "payload", "file", "live", "state", "state_file"]
)
def test_pages_of_a_run_that_is_not_there_are_not_found(admin_client, failed, view):
    failed.pk = "gone"
    args = {"payload": ["inputs"], "state": [0], "state_file": [0]}.get(view, [])
    assert admin_client.get(url_of(view, failed, *args)).status_code == 404
    failed.pk = "nul\0"
    assert admin_client.get(url_of(view, failed, *args)).status_code == 404

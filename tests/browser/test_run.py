"""The page of a run in a browser: followed while it runs, compared, copied from, downloaded."""

import json
import re

import pytest
from django.contrib.auth.models import Permission

from tests.admin.conftest import page_of
from tests.browser.conftest import PROBLEMS, check, follow
from tests.browser.samples import SECRET, view
from workflow_storage import create_storage_backend

pytestmark = pytest.mark.slow

LIVE = re.compile(r"/live/\?step=\d*$")
CLIPBOARD = ["clipboard-read", "clipboard-write"]


@pytest.fixture
def backend(live):
    return create_storage_backend("default")


@pytest.fixture
def followed(opened, stored):
    """Open a page whose clock stands still until it is told to go on; count what it asks for."""

    def open_page(run):
        page = opened(page_of(run))
        page.clock.install()
        page.reload()
        page.asked = []
        page.on("request", lambda one: page.asked.append(one.url) if "/live/" in one.url else None)
        return page

    return open_page


def go_on(page, times=1):
    """Let the time pass in which a page asks once how its run is."""
    for _ in range(times):
        with page.expect_response(LIVE):
            page.clock.run_for(2000)


def test_a_running_run_is_followed_until_it_ends(followed, stored, backend):
    page = followed(stored.running)
    assert page.get_by_text("State after step 1, node-1").is_visible()

    backend.states.save_state(stored.running.id, {"found": "more"}, "node-of-later")
    go_on(page)
    page.get_by_text("State after step 2, node-of-later").wait_for()
    backend.runs.update_status(stored.running.id, "failed", error_message="OSError: disk full")
    go_on(page)

    page.locator(".workflow-storage-head").get_by_text("OSError: disk full").wait_for()
    assert page.locator(".workflow-storage-title .workflow-storage-failed").is_visible()
    page.get_by_text("The run has ended.").wait_for()
    page.clock.run_for(600_000)
    assert len(page.asked) == 2
    check(page)


def test_a_run_that_is_deleted_while_it_is_followed_is_said_to_be_gone(followed, stored, backend):
    page = followed(stored.running)

    backend.runs.delete(stored.running.id)
    go_on(page)

    page.get_by_role("status").get_by_text("The run is not there any more.").wait_for()
    page.clock.run_for(600_000)
    assert len(page.asked) == 1
    assert all("404" in problem for problem in PROBLEMS[page])


def test_who_is_logged_out_while_following_a_run_is_asked_to_log_in_again(followed, stored):
    page = followed(stored.running)

    page.context.clear_cookies()
    go_on(page)
    follow(page.get_by_role("status").get_by_role("link", name="Log in again"))

    assert "/login/" in page.url


def test_what_is_unfolded_and_copied_from_stays_so_while_a_run_goes_on(followed, stored, backend):
    page = followed(stored.running)
    items = page.locator("[data-path=items] > details")
    items.locator("> summary .workflow-storage-tree-preview").click()
    page.locator("h1").click()

    backend.states.save_state(stored.running.id, {"items": [1], "new": True}, "node-of-later")
    go_on(page)

    page.locator("[data-path=new]").wait_for()
    assert items.get_attribute("open") is not None
    assert page.locator(".workflow-storage-title .workflow-storage-copy").count() == 1
    check(page)


def test_what_is_in_use_is_not_taken_away(followed, stored, backend):
    page = followed(stored.running)
    page.locator(".workflow-storage-tree").first.focus()

    backend.states.save_state(stored.running.id, {"found": "more"}, "node-of-later")
    go_on(page)
    assert page.get_by_text("State after step 1, node-1").is_visible()
    page.evaluate("document.activeElement.blur()")
    go_on(page)

    page.get_by_text("State after step 2, node-of-later").wait_for()
    check(page)


def test_nothing_is_asked_for_in_a_tab_that_nobody_sees(followed, stored, backend):
    page = followed(stored.running)
    go_on(page)

    # A headless browser shows all of its tabs at once.
    page.evaluate(
        "Object.defineProperty(document, 'hidden', {get: () => true, configurable: true})"
    )
    page.clock.run_for(60_000)
    assert len(page.asked) == 1
    page.evaluate("delete document.hidden")
    with page.expect_response(LIVE):
        page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")

    assert len(page.asked) == 2
    check(page)


@pytest.mark.parametrize("name", ["waiting", "running"])
def test_a_run_without_news_is_asked_for_less_and_less(followed, stored, name):
    page = followed(getattr(stored, name))

    for _ in range(60):
        page.clock.run_for(2000)
        page.wait_for_timeout(20)

    assert 3 < len(page.asked) < 20
    check(page)


def test_a_run_that_has_ended_is_not_asked_for(followed, stored):
    page = followed(stored.failed)

    page.clock.run_for(60_000)

    assert page.asked == []
    check(page)


def test_the_failure_comes_first_and_unfolds(opened, stored):
    page = opened(page_of(stored.failed))
    failure = page.get_by_role("region", name="Failure")
    assert failure.get_by_role("heading", name="Failed in node-3").is_visible()
    assert not failure.get_by_text("line 299,").is_visible()

    failure.get_by_text("The whole error").click()

    assert failure.get_by_text("line 299,").is_visible()
    check(page)


def test_a_run_that_completed_later_shows_what_failed_before(opened, stored):
    page = opened(page_of(stored.recovered))

    attempts = page.get_by_role("region", name="Attempts").locator("tbody tr")
    assert attempts.count() == 2
    assert "OSError: the disk is full" in attempts.first.inner_text()
    check(page)


def test_parent_child_and_fork_lead_to_each_other(opened, stored):
    page = opened(page_of(stored.failed))

    related = page.locator("section", has_text="Related runs")
    addresses = related.get_by_role("link").evaluate_all("all => all.map(one => one.pathname)")
    assert addresses == [page_of(stored.child), page_of(stored.fork)]
    follow(related.get_by_role("link").last)
    assert page.get_by_text("Forked at step 2 from").is_visible()
    follow(page.locator("section", has_text="Related runs").get_by_role("link").first)

    assert page.url.endswith(page_of(stored.failed))
    check(page)


def test_each_step_of_a_long_run_is_on_a_page_of_its_own(opened, stored):
    page = opened(page_of(stored.long))
    assert page.get_by_text("150 steps in 1 attempt, by node").is_visible()

    follow(page.get_by_role("link", name="Each step"))
    follow(page.get_by_role("link", name="149", exact=True))

    assert page.url.endswith(view("state", stored.long.pk, 149))
    check(page)


def test_the_id_of_a_run_is_copied(opened, stored):
    page = opened(page_of(stored.failed), permissions=CLIPBOARD)

    page.get_by_role("button", name=f"Copy {stored.failed.pk}").click()

    page.get_by_role("status").filter(has_text="Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == stored.failed.pk
    check(page)


def test_the_path_of_a_value_is_copied(opened, stored):
    page = opened(page_of(stored.failed), permissions=CLIPBOARD)
    page.locator("[data-path=items] > details > summary .workflow-storage-tree-preview").click()
    page.locator(
        "[data-path='items[2]'] > details > summary .workflow-storage-tree-preview"
    ).click()

    row = page.locator("[data-path='items[2].n']")
    row.hover()
    row.get_by_role("button", name="Copy items[2].n").click()

    page.get_by_role("status").filter(has_text="Copied: items[2].n").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == "items[2].n"
    check(page)


def test_the_path_of_a_value_is_copied_with_keys(opened, stored):
    page = opened(page_of(stored.failed), permissions=CLIPBOARD)
    tree = (
        page.locator(".workflow-storage-tree").filter(has=page.locator("[data-path=items]")).first
    )
    page.keyboard.press("Tab")
    tree.locator("summary").first.focus()

    page.keyboard.press("Tab")
    rows = tree.locator("> div > details > ul > li")
    assert rows.nth(0).get_by_role("button").first.evaluate("it => it === document.activeElement")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")

    path = rows.nth(1).get_attribute("data-path")
    page.get_by_role("status").filter(has_text=f"Copied: {path}").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == path
    check(page)


def test_the_key_of_a_row_folds_it(opened, stored):
    page = opened(page_of(stored.failed))
    items = page.locator("[data-path=items] > details").first

    items.locator("> summary .workflow-storage-tree-key").click()

    assert items.get_attribute("open") is not None
    check(page)


@pytest.mark.parametrize("javascript", [True, False], ids=["with", "without"])
def test_a_run_is_compared_with_another_by_its_id(opened, stored, javascript):
    page = opened(page_of(stored.recovered), java_script_enabled=javascript)

    page.get_by_text("Compare with another").click()
    page.get_by_label("Id of the other run").fill(stored.failed.pk)
    follow(page.get_by_role("button", name="Compare", exact=True))

    assert page.url.endswith(view("compare", stored.recovered.pk, stored.failed.pk))
    outputs = page.locator("section", has=page.get_by_role("heading", name="Outputs"))
    assert '{"total": 42}' in outputs.inner_text()
    nodes = page.get_by_role("region", name="Nodes").locator("tbody tr")
    assert nodes.first.locator("td").all_inner_texts()[:2] == ["2", "2"]
    check(page)


@pytest.mark.parametrize("width", [1280, 400])
def test_an_id_that_is_none_is_told(opened, stored, width):
    page = opened(page_of(stored.recovered), width=width)

    page.get_by_text("Compare with another").click()
    page.get_by_label("Id of the other run").fill("nothing")
    check(page)
    follow(page.get_by_role("button", name="Compare", exact=True))

    assert page.get_by_text("There is no run with the id nothing.").is_visible()
    check(page)


def test_a_run_is_compared_with_the_one_before(opened, stored):
    page = opened(page_of(stored.recovered))

    follow(page.get_by_role("link", name="Compare with the one before"))
    follow(page.get_by_role("link", name="The other way round"))

    assert page.url.endswith(view("compare", stored.running.pk, stored.recovered.pk))
    check(page)


def downloaded(page, click):
    with page.expect_download() as download:
        click()
    return download.value.suggested_filename, download.value.path().read_text()


def test_a_run_its_state_and_a_payload_are_downloaded(opened, stored):
    page = opened(page_of(stored.failed))
    run_id = stored.failed.pk

    name, text = downloaded(
        page,
        page.get_by_role("navigation", name="Runs of this workflow")
        .get_by_role("link", name="Download")
        .click,
    )
    assert name == f"{run_id}.json"
    assert json.loads(text)["run"]["id"] == run_id
    assert len(json.loads(text)["attempts"]) == 2

    state = page.locator("section", has=page.get_by_role("heading", name="State after step 5"))
    name, text = downloaded(page, state.get_by_role("link", name="Download").click)
    assert name == f"{run_id}-5.json"
    assert json.loads(text)["at"] == 2

    payload = page.locator(".field-config_json")
    name, text = downloaded(page, payload.get_by_role("link", name="Download").click)
    assert name == f"{run_id}-config_snapshot.json"
    assert json.loads(text) == {"model": "small", "api_key": SECRET}
    check(page)


def test_the_export_has_the_run_with_its_states(opened, stored):
    page = opened(page_of(stored.failed))

    follow(page.get_by_role("button", name="Export as JSON Lines"))
    name, text = downloaded(page, page.get_by_role("button", name="Export as JSON Lines").click)

    assert name.endswith(".jsonl")
    lines = [json.loads(line) for line in text.splitlines()]
    assert stored.failed.pk in text
    assert len(lines) >= 7
    check(page)


@pytest.mark.parametrize("sees_secrets", [False, True], ids=["masked", "shown"])
def test_secrets_are_shown_to_those_alone_who_may_see_them(
    opened, stored, django_user_model, sees_secrets
):
    viewer = django_user_model.objects.create_user("viewer", is_staff=True)
    names = ["view_workflowrun", "view_executionstate", *["view_secrets"] * sees_secrets]
    viewer.user_permissions.set(Permission.objects.filter(codename__in=names))
    page = opened(page_of(stored.failed), user=viewer)
    assert (SECRET in page.content()) == sees_secrets
    check(page)
    _name, text = downloaded(
        page, page.locator(".field-config_json").get_by_role("link", name="Download").click
    )
    assert json.loads(text)["api_key"] == (SECRET if sees_secrets else "••••••")

    page.goto(page.url.replace(page_of(stored.failed), view("state", stored.failed.pk, 4)))
    changed = page.locator("#difference tr", has_text="session_token")
    assert "changed" in changed.inner_text()
    assert (SECRET in page.content()) == sees_secrets
    check(page)
    _name, text = downloaded(
        page, page.locator("#after").get_by_role("link", name="Download").click
    )
    assert (SECRET in text) == sees_secrets

    compared = view("compare", stored.failed.pk, stored.recovered.pk)
    page.goto(page.url.replace(view("state", stored.failed.pk, 4), compared))
    assert page.get_by_text("session_token").count() or page.get_by_text("api_key").count()
    assert (SECRET in page.content()) == sees_secrets
    check(page)

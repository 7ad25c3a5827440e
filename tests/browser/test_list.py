"""The list of runs in a browser: narrowing it, what is above it, and acting on its runs."""

import pytest
from django.contrib.auth.models import Permission
from django.urls import reverse
from django.utils import timezone

from tests.admin.conftest import RUNS, add_runs, page_of
from tests.browser.conftest import check, follow, sideways
from tests.browser.samples import view
from workflow_storage import WorkflowRun

pytestmark = pytest.mark.slow


def statuses(page):
    """Return the statuses of the runs that the list has."""
    return set(page.locator("#result_list .workflow-storage-status").all_inner_texts())


def workflows(page):
    return set(page.locator("#result_list .workflow-storage-run").all_inner_texts())


def choose(page, filter_name):
    """Open a filter, and return it."""
    one = page.locator("details.workflow-storage-choice").filter(
        has=page.locator("summary", has_text=filter_name)
    )
    one.locator("summary").click()
    return one


@pytest.mark.parametrize(
    ("preset", "shown", "count"),
    [
        ("Failed today", {"failed"}, 3),
        ("Running", {"running"}, 3),
        ("Stalled", {"running"}, 1),
        ("Waiting", {"pending"}, 1),
    ],
)
def test_a_preset_narrows_the_list(opened, stored, preset, shown, count):
    page = opened(reverse(RUNS))

    follow(page.get_by_role("navigation", name="Views").get_by_role("link", name=preset))

    assert statuses(page) == shown
    assert page.locator("#result_list tbody tr").count() == count
    assert page.locator("[aria-current=page]", has_text=preset).is_visible()
    check(page)


@pytest.mark.parametrize("javascript", [True, False], ids=["with", "without"])
def test_filters_narrow_the_list_one_after_the_other(opened, stored, javascript):
    page = opened(reverse(RUNS), java_script_enabled=javascript)

    follow(choose(page, "Status").get_by_role("link", name="completed"))
    assert statuses(page) == {"completed"}
    assert workflows(page) == {"invoices", "crawl"}

    label = choose(page, "Label")
    label.get_by_label("name=value").fill("customer=acme")
    follow(label.get_by_role("button", name="Filter"))

    assert "status__exact=completed" in page.url
    assert page.locator("#result_list tbody tr").count() == 1
    assert page.locator("summary.selected").all_inner_texts() == [
        "Status: completed",
        "Label: customer=acme",
    ]
    follow(page.get_by_role("link", name="Clear all filters"))
    assert page.locator("#result_list tbody tr").count() > 10
    check(page)


@pytest.mark.parametrize("language", ["en", "de"])
@pytest.mark.parametrize("width", [1280, 1024, 400])
def test_an_open_filter_fits_into_the_page(opened, stored, width, language):
    chosen = "?since=7d&workflow=invoices&label=customer%3Dacme&slower=0&status__exact=completed"
    for query in ("", chosen):
        page = opened(reverse(RUNS) + query, width=width, language=language)
        choices = page.locator("details.workflow-storage-choice")
        for place in range(choices.count()):
            choices.nth(place).locator("summary").press("Enter")
            page.wait_for_timeout(50)
            box = choices.nth(place).locator("ul").bounding_box()
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= width
            assert not sideways(page)
        check(page)
        page.keyboard.press("Escape")
        assert page.locator("details.workflow-storage-choice[open]").count() == 0


def test_the_filter_of_workflows_suggests_their_names(opened, stored):
    page = opened(reverse(RUNS))

    workflow = choose(page, "Workflow")
    names = workflow.locator("datalist option").evaluate_all("all => all.map(one => one.value)")
    assert {"approvals", "crawl", "invoices"} <= set(names)
    workflow.get_by_label("Whole name").fill("approvals")
    with page.expect_navigation():
        workflow.get_by_label("Whole name").press("Enter")

    assert workflows(page) == {"approvals"}
    check(page)


def test_names_are_suggested_by_what_is_written_so_far(opened, stored):
    WorkflowRun.objects.bulk_create(
        WorkflowRun(id=f"run-{n}", workflow_name=f"many-{n:03}", started_at=timezone.now())
        for n in range(120)
    )
    page = opened(reverse(RUNS))
    workflow = choose(page, "Workflow")
    options = workflow.locator("datalist option")
    assert workflow.locator("datalist option[value=many-119]").count() == 0

    with page.expect_response("**/workflows/?beginning=many-11"):
        workflow.get_by_label("Whole name").press_sequentially("many-11")
    workflow.locator("datalist option[value=many-119]").wait_for(state="attached")

    assert options.evaluate_all("all => all.map(one => one.value)") == [
        f"many-11{n}" for n in range(10)
    ]
    check(page)


def test_the_list_is_ordered_by_what_is_chosen_and_the_search_keeps_the_order(opened, stored):
    page = opened(reverse(RUNS) + "?since=7d&status__exact=failed&status__exact=completed")

    follow(page.locator(".workflow-storage-order").get_by_role("link", name="duration"))
    assert page.locator(".workflow-storage-order [aria-current]").inner_text() == "duration"
    check(page)
    page.locator("#searchbar").fill("invoices")
    with page.expect_navigation():
        page.locator("#searchbar").press("Enter")

    for kept in ("sort=duration", "since=7d", "status__exact=failed", "status__exact=completed"):
        assert kept in page.url
    assert workflows(page) == {"invoices"}
    check(page)


@pytest.mark.parametrize(
    ("search", "found"),
    [
        ("number=3", {"invoices"}),
        ("approv", {"approvals"}),
        ("line 299", {"a-workflow-with-quite-a-long-name"}),
    ],
)
def test_the_search_finds_runs_and_says_what_it_looked_for(opened, stored, search, found):
    page = opened(reverse(RUNS))

    page.locator("#searchbar").fill(search)
    with page.expect_navigation():
        page.locator("#searchbar").press("Enter")

    assert workflows(page) == found
    assert search in page.locator(".workflow-storage-searched").inner_text()
    check(page)


def test_what_finds_nothing_says_so_and_how_to_widen_it(opened, stored):
    page = opened(reverse(RUNS) + "?status__exact=failed&q=nothing-like-this")

    assert "No run matches." in page.locator(".workflow-storage-empty").inner_text()
    follow(page.get_by_role("link", name="Show all runs"))

    assert page.locator("#result_list tbody tr").count() > 10
    check(page)


def test_a_bar_of_the_strip_leads_to_its_run(opened, stored):
    page = opened(reverse(RUNS))
    bars = page.locator(".workflow-storage-above > figure svg a")
    assert bars.count() == WorkflowRun.objects.count()

    # The oldest one, for the bars go on in time.
    bars.first.focus()
    with page.expect_navigation():
        page.keyboard.press("Enter")

    page.wait_for_url(f"**{page_of(stored.stalled)}")
    check(page)


def test_the_charts_load_on_demand_and_are_there_the_next_time(opened, stored):
    page = opened(reverse(RUNS))
    assert page.get_by_text("Runs by status").count() == 0

    page.get_by_text("Charts and rankings").click()
    page.get_by_text("Runs by status", exact=True).wait_for()
    assert page.get_by_role("link", name="a-workflow-with-quite-a-long-name").count()
    page.reload()

    page.get_by_text("Runs by status", exact=True).wait_for()
    check(page)


def test_the_charts_of_a_long_time_are_asked_for_each_time(opened, stored):
    page = opened(reverse(RUNS) + "?since=30d")
    page.get_by_text("Charts and rankings").click()
    page.get_by_text("Runs by status", exact=True).wait_for()

    page.reload()

    assert page.get_by_text("Charts and rankings").is_visible()
    assert page.get_by_text("Runs by status").count() == 0
    check(page)


def test_a_bar_of_a_chart_leads_to_the_runs_of_its_time(opened, stored):
    page = opened(view("overview"))

    figure = page.locator("figure", has_text="Runs by status")
    figure.locator("svg a").last.focus()
    with page.expect_navigation():
        page.keyboard.press("Enter")

    page.wait_for_url(f"**{reverse(RUNS)}?*since=*until=*")
    assert page.locator("#result_list tbody tr").count() > 10
    check(page)


def test_without_javascript_the_charts_are_on_a_page_of_their_own(opened, stored):
    page = opened(reverse(RUNS) + "?status__exact=failed", java_script_enabled=False)

    page.get_by_text("Charts and rankings").click()
    follow(page.get_by_role("link", name="On a page of their own"))

    assert page.get_by_text("failed 3").is_visible()
    check(page)


def test_the_selected_runs_get_a_label(opened, stored):
    page = opened(reverse(RUNS) + "?status__exact=failed")
    page.get_by_role("checkbox", name="Select this object").nth(0).check()
    page.get_by_role("checkbox", name="Select this object").nth(1).check()

    page.locator("select[name=action]").select_option(label="Add a label")
    follow(page.locator(".actions button"))
    assert page.get_by_text("2 selected runs").is_visible()
    assert page.locator(".workflow-storage-selected tbody tr").count() == 2
    check(page)
    page.get_by_label("Name").fill("ticket")
    page.get_by_label("Value").fill("OPS-12")
    follow(page.get_by_role("button", name="Add a label"))

    assert page.get_by_text("The label was added to 2 runs.").is_visible()
    assert "status__exact=failed" in page.url
    assert page.get_by_role("link", name="ticket OPS-12").count() == 2
    assert WorkflowRun.objects.filter(labels__ticket="OPS-12").count() == 2
    check(page)


@pytest.mark.parametrize("javascript", [True, False], ids=["with", "without"])
def test_all_that_match_are_deleted_and_no_others(opened, stored, javascript):
    add_runs(60)
    page = opened(reverse(RUNS) + "?workflow=bulk", java_script_enabled=javascript)

    page.locator("select[name=action]").select_option(label="Delete with all states")
    page.get_by_label("All 60 that match").check()
    follow(page.locator(".actions button"))
    assert page.get_by_text("60 runs that match the filters").is_visible()
    assert page.get_by_text("The newest ones; there are more.").is_visible()
    follow(page.get_by_role("button", name="Delete with all states"))

    assert page.get_by_text("60 runs were deleted.").is_visible()
    assert not WorkflowRun.objects.filter(workflow_name="bulk").exists()
    assert WorkflowRun.objects.count() > 10
    check(page)


def test_who_thinks_better_of_it_is_back_where_they_came_from(opened, stored):
    page = opened(page_of(stored.failed))

    follow(page.get_by_role("button", name="Delete with all states"))
    follow(page.get_by_role("link", name="No, take me back"))

    page.wait_for_url(f"**{page_of(stored.failed)}")
    assert WorkflowRun.objects.filter(pk=stored.failed.pk).exists()
    check(page)


def test_the_pages_of_the_list_go_on_and_back(opened, stored):
    add_runs(60)
    page = opened(reverse(RUNS) + "?workflow=bulk")
    first = page.locator("#result_list code").first.get_attribute("title")

    follow(page.get_by_role("link", name="Older"))
    assert page.locator("#result_list tbody tr").count() == 10
    check(page)
    follow(page.get_by_role("link", name="Newer"))

    assert page.locator("#result_list code").first.get_attribute("title") == first
    check(page)


def test_who_may_only_view_is_offered_no_action(opened, stored, django_user_model):
    viewer = django_user_model.objects.create_user("viewer", is_staff=True)
    viewer.user_permissions.set(Permission.objects.filter(codename="view_workflowrun"))

    page = opened(reverse(RUNS), user=viewer)

    assert page.locator("#result_list tbody tr").count() > 10
    assert page.locator("select[name=action]").count() == 0
    check(page)

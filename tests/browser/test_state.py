"""The state at a step in a browser: from step to step, what changed, and its tree."""

import pytest
from django.urls import reverse

from tests.admin.conftest import STATES
from tests.browser.conftest import check, follow
from tests.browser.samples import view

pytestmark = pytest.mark.slow


@pytest.fixture(params=[True, False], ids=["with JavaScript", "without"])
def javascript(request):
    return request.param


def at(stored, step):
    return view("state", stored.failed.pk, step)


def test_the_links_lead_to_the_next_step_and_back(opened, stored, javascript):
    page = opened(at(stored, 2), java_script_enabled=javascript)

    follow(page.get_by_role("link", name="Next step"))
    assert page.url.endswith(at(stored, 3))
    follow(page.get_by_role("link", name="Previous step"))

    assert page.url.endswith(at(stored, 2))
    check(page)


def test_the_first_and_the_last_step_lead_no_further(opened, stored):
    page = opened(at(stored, 0))
    assert page.get_by_role("link", name="Previous step").count() == 0

    page.goto(page.url.replace(at(stored, 0), at(stored, 5)))

    assert page.get_by_role("link", name="Next step").count() == 0
    check(page)


def test_the_arrow_keys_lead_to_the_next_step_and_back(opened, stored):
    page = opened(at(stored, 2))

    with page.expect_navigation(url=f"**{at(stored, 3)}"):
        page.keyboard.press("ArrowRight")
    with page.expect_navigation(url=f"**{at(stored, 2)}"):
        page.keyboard.press("ArrowLeft")

    check(page)


def test_the_arrow_keys_move_what_has_the_focus(opened, stored):
    page = opened(at(stored, 2))
    page.locator(".workflow-storage-tree").first.focus()

    page.keyboard.press("ArrowRight")
    page.wait_for_timeout(300)

    assert page.url.endswith(at(stored, 2))
    check(page)


def test_the_slider_leads_to_its_step_with_keys(opened, stored):
    page = opened(at(stored, 2))
    page.get_by_role("slider", name="Step").focus()

    with page.expect_navigation(url=f"**{at(stored, 5)}"):
        page.keyboard.press("End")

    assert page.get_by_role("slider", name="Step").input_value() == "5"
    check(page)


def test_without_javascript_the_slider_leads_to_its_step_with_a_button(opened, stored):
    page = opened(at(stored, 2), java_script_enabled=False)
    page.get_by_role("slider", name="Step").focus()
    page.keyboard.press("Home")

    follow(page.get_by_role("button", name="Show"))

    assert page.url.endswith(at(stored, 0))
    check(page)


def test_the_difference_names_what_changed_and_how(opened, stored):
    page = opened(at(stored, 4))
    difference = page.locator("#difference")

    at_row = difference.get_by_role("row").filter(has=page.get_by_text("at", exact=True))
    assert "changed" in at_row.inner_text()
    assert at_row.locator("code").all_inner_texts() == ["at", "0", "1"]
    letter = difference.get_by_role("row").filter(has_text="letter")
    if letter.locator("details").get_attribute("open") is None:
        letter.locator("summary").click()
    assert "this is letter 0." in letter.locator("del").first.inner_text()
    assert "this is letter 1." in letter.locator("ins").first.inner_text()
    check(page)


def test_a_tree_unfolds_level_by_level(opened, stored, javascript):
    page = opened(at(stored, 4), java_script_enabled=javascript)
    after = page.locator("#after")
    assert after.locator("[data-path=items]").is_visible()
    assert not after.locator("[data-path='items[2]']").is_visible()

    after.locator("[data-path=items] > details > summary .workflow-storage-tree-preview").click()
    assert after.locator("[data-path='items[2]']").is_visible()
    assert not after.locator("[data-path='items[2].n']").is_visible()
    preview = after.locator("[data-path='items[2]'] .workflow-storage-tree-preview")
    preview.click()

    assert after.locator("[data-path='items[2].n']").is_visible()
    assert not preview.is_visible()
    check(page)


def test_a_tree_unfolds_with_keys(opened, stored):
    page = opened(at(stored, 4))
    items = page.locator("#after [data-path=items] > details")

    items.locator("> summary").focus()
    page.keyboard.press("Enter")

    assert items.get_attribute("open") is not None
    check(page)


@pytest.mark.parametrize("width", [1280, 400])
def test_the_list_of_the_states_of_a_run_leads_to_any_step(opened, stored, width):
    page = opened(f"{reverse(STATES)}?run__id__exact={stored.failed.pk}", width=width)
    assert page.locator("#result_list tbody tr").count() == 6

    page.get_by_label("Step", exact=True).fill("4")
    check(page)
    follow(page.get_by_role("button", name="Show"))

    assert page.url.endswith(at(stored, 4))
    check(page)

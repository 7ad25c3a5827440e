"""Every page of the admin in a browser: light and dark, wide and narrow, for everybody.

A page that is new gets a line in PAGES.
"""

import django
import pytest
from django.contrib.auth.models import Permission
from django.urls import reverse

from tests.admin.conftest import RUNS, STATES, page_of
from tests.browser.conftest import check, served
from tests.browser.samples import page_of_state, view
from workflow_storage.admin.run_actions import RUN_ACTIONS
from workflow_storage.admin.run_list import PRESETS

pytestmark = pytest.mark.slow

PAGES = {
    "index": lambda stored: reverse("admin:index"),
    "app": lambda stored: reverse("admin:app_list", args=["workflow_storage"]),
    "runs": lambda stored: reverse(RUNS),
    "runs, filtered to nothing": lambda stored: reverse(RUNS) + "?status__exact=failed&q=nothing",
    "runs, failed today": lambda stored: runs("status__exact=failed&ended=24h"),
    "runs, running": lambda stored: runs("status__exact=running"),
    "runs, stalled": lambda stored: runs("stalled=1"),
    "runs, waiting": lambda stored: runs("waiting=1"),
    "runs, with every filter": lambda stored: runs(
        "since=7d&workflow=invoices&label=customer%3Dacme&slower=0&cost=0&status__exact=completed"
    ),
    "runs, with a filter that is none": lambda stored: runs("since=tomorrow&slower=-1&p=2"),
    "runs, found by a text": lambda stored: runs("q=line+299"),
    "runs, by duration": lambda stored: runs("sort=duration"),
    "failed run": lambda stored: page_of(stored.failed),
    "running run": lambda stored: page_of(stored.running),
    "stalled run": lambda stored: page_of(stored.stalled),
    "waiting run": lambda stored: page_of(stored.waiting),
    "pending run": lambda stored: page_of(stored.by_status["pending"]),
    "cancelled run": lambda stored: page_of(stored.by_status["cancelled"]),
    "completed run": lambda stored: page_of(stored.by_status["completed"]),
    "run that completed later": lambda stored: page_of(stored.recovered),
    "run of many steps": lambda stored: page_of(stored.long),
    "all steps of a run": lambda stored: view("steps", stored.long.pk),
    "run of markup": lambda stored: page_of(stored.markup),
    "history of a run": lambda stored: page_of(stored.failed).replace("change", "history"),
    "first step": lambda stored: view("state", stored.failed.pk, stored.steps[0]),
    "step": lambda stored: view("state", stored.failed.pk, stored.steps[1]),
    "last step": lambda stored: view("state", stored.failed.pk, stored.steps[-1]),
    "first step of markup": lambda stored: view("state", stored.markup.pk, 0),
    "step of markup": lambda stored: view("state", stored.markup.pk, 1),
    "comparison": lambda stored: view("compare", stored.recovered.pk, stored.failed.pk),
    "comparison with markup": lambda stored: view("compare", stored.failed.pk, stored.markup.pk),
    "overview": lambda stored: view("overview"),
    "overview of a month": lambda stored: view("overview") + "?since=30d",
    "states": lambda stored: reverse(STATES),
    "states of a run": lambda stored: reverse(STATES) + f"?run__id__exact={stored.failed.pk}",
    "state": lambda stored: page_of_state(stored.state),
    "state of markup": lambda stored: page_of_state(stored.markup_state),
}
"""Addresses for what is stored."""

BOTH_WAYS = {"runs", "failed run", "step", "comparison", "overview"}
"""Pages that are looked at narrow in light and wide in dark, too."""

ALIKE = {
    "runs, failed today",
    "runs, running",
    "runs, stalled",
    "runs, waiting",
    "runs, by duration",
    "pending run",
    "cancelled run",
    "completed run",
    "overview of a month",
    "first step of markup",
    "state of markup",
}
"""Pages that are made as another one is, which are looked at wide in light and in English only."""

DIFFERENT = [name for name in PAGES if name not in ALIKE]


def runs(query):
    return f"{reverse(RUNS)}?{query}"


@pytest.mark.parametrize(
    ("name", "width", "scheme"),
    [
        *((name, 1280, "light") for name in PAGES),
        *((name, 400, "dark") for name in DIFFERENT),
        *((name, 1280, "dark") for name in sorted(BOTH_WAYS)),
        *((name, 400, "light") for name in sorted(BOTH_WAYS)),
    ],
)
def test_a_page_loads_without_errors_fits_and_can_be_used_by_all(
    opened, stored, name, width, scheme
):
    check(opened(PAGES[name](stored), width=width, scheme=scheme))


@pytest.mark.parametrize(
    ("name", "width"),
    [*((name, 1280) for name in DIFFERENT), *((name, 400) for name in sorted(BOTH_WAYS))],
)
def test_a_page_in_german(opened, stored, name, width):
    page = opened(PAGES[name](stored), width=width, language="de")

    assert page.locator("html").get_attribute("lang") == "de"
    check(page)


@pytest.mark.parametrize("name", sorted(BOTH_WAYS))
def test_a_page_from_right_to_left(opened, stored, name):
    page = opened(PAGES[name](stored), width=1280, language="ar")

    assert page.locator("html").get_attribute("dir") == "rtl"
    # Time and code go from left to right all the same.
    for place in page.locator("svg text, .workflow-storage-tree, pre").all():
        assert place.evaluate("place => getComputedStyle(place).direction") == "ltr"
    check(page)


def test_each_preset_is_one_of_the_pages(stored):
    addresses = {address(stored) for address in PAGES.values()}

    for _name, parameters in PRESETS:
        query = "&".join(f"{name}={value}" for name, value in parameters.items())
        assert (runs(query) if query else reverse(RUNS)) in addresses


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (400, "dark")])
@pytest.mark.parametrize("action", RUN_ACTIONS)
def test_what_an_action_asks(opened, stored, action, width, scheme):
    run = stored.running if action in {"fail_runs", "cancel_runs"} else stored.failed
    page = opened(page_of(run), width=width, scheme=scheme)

    page.get_by_role("button", name=str(RUN_ACTIONS[action].label), exact=True).click()

    assert page.get_by_role("heading", level=1).inner_text() == str(RUN_ACTIONS[action].label)
    check(page)


@pytest.mark.parametrize("name", ["runs", "failed run", "comparison", "overview"])
def test_a_page_for_who_may_view_runs_only(opened, stored, django_user_model, name):
    viewer = django_user_model.objects.create_user("viewer", is_staff=True)
    viewer.user_permissions.set(Permission.objects.filter(codename="view_workflowrun"))

    page = opened(PAGES[name](stored), user=viewer)

    assert "node-3" not in page.content()
    check(page)


if django.VERSION >= (6, 0):

    @pytest.fixture(scope="module")
    def site_with_djangos_policy(browser, site, django_db_blocker):
        # The site of the other tests comes first, and goes last: both share a connection.
        with (
            django_db_blocker.unblock(),
            served("django.middleware.csp.ContentSecurityPolicyMiddleware") as url,
        ):
            yield url

    @pytest.mark.parametrize("name", DIFFERENT)
    def test_a_page_under_djangos_own_policy_with_nonces(
        opened, stored, settings, site_with_djangos_policy, name
    ):
        from django.utils.csp import CSP

        settings.SECURE_CSP = {
            "default-src": [CSP.SELF],
            "script-src": [CSP.SELF, CSP.NONCE],
            "style-src": [CSP.SELF, CSP.NONCE],
        }

        page = opened(PAGES[name](stored), site=site_with_djangos_policy)

        sent = "fetch(location).then(answer => answer.headers.get('content-security-policy'))"
        assert page.evaluate(sent).startswith("default-src 'self'; script-src 'self'")
        check(page)


@pytest.mark.parametrize(
    ("breakage", "said"),
    [
        ("document.body.append(document.createElement('input'))", "label"),
        ("document.body.append(document.createElement('img'))", "image-alt"),
        ("document.body.style.width = '5000px'", "scrolls sideways"),
        ("console.error('broken')", "logged: broken"),
        ("setTimeout(() => { throw new Error('broken') })", "an error of a script: broken"),
        ("fetch('/nowhere')", "answered with 404"),
        ("document.body.setAttribute('onclick', 'alert(1)')", "refused by the policy: script-src"),
        ("document.body.innerHTML += '<b style=\"color: red\">'", "refused by the policy: style"),
        ("fetch('https://example.org').catch(() => 0)", "refused by the policy: connect-src"),
        ("alert('hello')", "a dialog: hello"),
    ],
)
def test_the_check_says_what_is_wrong(opened, breakage, said):
    page = opened(reverse("admin:index"))
    check(page)

    page.evaluate(breakage)
    page.wait_for_timeout(200)

    with pytest.raises(AssertionError, match=said):
        check(page)

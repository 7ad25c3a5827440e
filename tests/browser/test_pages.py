"""Every page of the admin in a browser: light and dark, wide and narrow, for everybody.

A page that is new gets a line in PAGES.
"""

from dataclasses import dataclass

import django
import pytest
from django.contrib.admin.utils import quote
from django.urls import reverse

from tests.admin.conftest import RUNS, STATES, page_of
from tests.browser.conftest import check, served
from workflow_storage import ExecutionState, RunStatus, WorkflowRun, create_storage_backend
from workflow_storage.testing import stored_run

pytestmark = pytest.mark.slow

MARKUP = "\"><img src=x onerror=alert(1)>'&lt;{{<script>alert(1)</script>"
LONG_ERROR = "Traceback (most recent call last):\n" + "".join(
    f'  File "/srv/app/nodes/{"very_" * 20}long.py", line {line}, in node\n' for line in range(300)
)


@dataclass
class Stored:
    """What is in the store while a page is looked at."""

    failed: WorkflowRun
    """With a long error, attempts, labels and states."""
    running: WorkflowRun
    markup: WorkflowRun
    """With markup in everything that is text."""
    state: ExecutionState
    """Of the failed run, in the middle."""
    markup_state: ExecutionState


def page_of_state(state):
    return reverse("admin:workflow_storage_executionstate_change", args=[quote(str(state.pk))])


PAGES = {
    "index": lambda stored: reverse("admin:index"),
    "app": lambda stored: reverse("admin:app_list", args=["workflow_storage"]),
    "runs": lambda stored: reverse(RUNS),
    "runs, filtered to nothing": lambda stored: reverse(RUNS) + "?status__exact=failed&q=nothing",
    "failed run": lambda stored: page_of(stored.failed),
    "running run": lambda stored: page_of(stored.running),
    "run of markup": lambda stored: page_of(stored.markup),
    "states": lambda stored: reverse(STATES),
    "state": lambda stored: page_of_state(stored.state),
    "state of markup": lambda stored: page_of_state(stored.markup_state),
}
"""Addresses for what is stored."""


@pytest.fixture
def stored(live):
    backend = create_storage_backend("default")
    for number, status in enumerate(RunStatus):
        run = stored_run(
            backend,
            workflow_name="invoices",
            status=status,
            inputs={"file": f"{number}.pdf", "pages": list(range(5))},
            labels={"customer": "acme", "number": str(number)},
            total_tokens=1234 * number,
            total_cost_usd=0.01 * number,
        )
        add_states(backend, run, number)
    failed = stored_run(
        backend, workflow_name="a-workflow-with-quite-a-long-name", labels={"customer": "acme"}
    )
    for error in ("The first try failed.", LONG_ERROR):
        backend.runs.update_status(failed.id, "running", worker="worker-1")
        add_states(backend, failed, 3)
        backend.runs.update_status(failed.id, "failed", error_message=error)
    running = stored_run(backend, workflow_name="invoices")
    backend.runs.update_status(running.id, "running", worker="worker-2")
    add_states(backend, running, 2)
    markup = stored_run(
        backend,
        id=MARKUP[:36],
        workflow_name=MARKUP,
        inputs={MARKUP: MARKUP},
        outputs=[MARKUP],
        config_snapshot=MARKUP,
        labels={"markup": MARKUP},
    )
    backend.runs.update_status(markup.id, "running", worker=MARKUP)
    backend.states.save_state(markup.id, {MARKUP: [MARKUP]}, MARKUP)
    backend.runs.update_status(markup.id, "failed", error_message=MARKUP)
    return Stored(
        failed=backend.runs.get(failed.id),
        running=backend.runs.get(running.id),
        markup=backend.runs.get(markup.id),
        state=ExecutionState.objects.get(run_id=failed.id, step=2),
        markup_state=ExecutionState.objects.get(run_id=markup.id),
    )


def add_states(backend, run, count):
    for number in range(count):
        state = {"at": number, "text": "a few words " * 20, "items": [{"n": n} for n in range(10)]}
        backend.states.save_state(
            run.id, state, f"node-{number}", duration_seconds=0.5, tokens=100, cost_usd=0.001
        )


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("name", PAGES)
def test_a_page_loads_without_errors_fits_and_can_be_used_by_all(
    opened, stored, name, width, scheme
):
    check(opened(PAGES[name](stored), width=width, scheme=scheme))


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("name", PAGES)
def test_a_page_in_german(opened, stored, name, width):
    page = opened(PAGES[name](stored), width=width, language="de")

    assert page.locator("html").get_attribute("lang") == "de"
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

    @pytest.mark.parametrize("name", PAGES)
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

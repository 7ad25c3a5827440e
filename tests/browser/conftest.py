"""The admin in a real browser: a site with a strict policy, its pages opened, and what is checked.

A page is watched from before it loads: what it logs as an error, breaks, is refused by the policy
or asks for in vain. `check` says all of that, and what axe-core finds.
"""

import json
import os
import re
from contextlib import ExitStack, contextmanager
from pathlib import Path
from weakref import WeakKeyDictionary, WeakSet

import pytest
from django.conf import settings as django_settings
from django.test import Client, override_settings
from pytest_django.live_server_helper import LiveServer

from testproject.management.commands.screenshots import chromium
from tests.browser.samples import store_runs
from tests.servers import unavailable
from workflow_storage import create_storage_backend

SCREENSHOTS = os.environ.get("TEST_SCREENSHOTS")
"""A folder for a picture of each page that is checked."""

AXE = (Path(__file__).parent / "axe" / "axe.min.js").read_text()
STANDARDS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]

NOT_OURS = [
    # Django's breadcrumbs tell their links from the page's name by their colour alone.
    ("link-in-text-block", ".breadcrumbs a"),
]
"""Rules of axe-core, and selectors of what breaks them in Django's own templates."""

PROBLEMS: WeakKeyDictionary = WeakKeyDictionary()
"""For each page what went wrong on it so far."""

WITHOUT_SCRIPTS: WeakSet = WeakSet()
"""Pages that run no script: axe-core neither."""


@pytest.fixture(scope="package")
def browser():
    """A headless Chromium, the same for all tests."""
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        try:
            started = stack.enter_context(chromium())
        except ImportError as exc:
            unavailable("Admin in a browser", exc, "pip install playwright")
        except FileNotFoundError as exc:
            unavailable(
                "Admin in a browser", exc, "install chromium, or set TEST_CHROMIUM to its path"
            )
        # Playwright's event loop is the one of this thread, for as long as it runs.
        patch.setenv("DJANGO_ALLOW_ASYNC_UNSAFE", "1")
        yield started


@contextmanager
def served(*middleware: str):
    """Serve the site, with more middleware, in threads that share the tests' database."""
    # It is read once, when the server starts.
    with override_settings(MIDDLEWARE=[*middleware, *django_settings.MIDDLEWARE]):
        server = LiveServer("localhost")
    yield server.url
    server.stop()


@pytest.fixture(scope="package")
def site(browser, django_db_setup, django_db_blocker):
    with django_db_blocker.unblock(), served("tests.browser.csp.strict_csp") as url:
        yield url


@pytest.fixture
def live(site, transactional_db):
    """The address of the site, whose database is the one of the test."""
    return site


@pytest.fixture
def opened(live, browser, admin_user, settings):
    """Open pages, each in a window of its own, and watch them; see `open_page`."""
    with ExitStack() as windows:

        def open_page(
            path, width=1280, scheme="light", language="en", user=admin_user, site=live, **options
        ):
            """Open a page of the admin.

            Args:
                path: with its query.
                width: of the window in pixels.
                scheme: light or dark.
                language: of the site.
                user: who is logged in; None for nobody.
                site: the address of another server.
                **options: of Playwright's new_context, as java_script_enabled=False.

            Returns:
                Playwright's page.
            """
            settings.LANGUAGE_CODE = language
            context = browser.new_context(
                viewport={"width": width, "height": 900},
                color_scheme=scheme,
                locale=language,
                reduced_motion="reduce",
                **options,
            )
            windows.callback(context.close)
            context.set_default_timeout(10_000)
            if user is not None:
                context.add_cookies([{**session_cookie(user), "url": site}])
            page = context.new_page()
            watch(page)
            if not options.get("java_script_enabled", True):
                WITHOUT_SCRIPTS.add(page)
            page.goto(site + path)
            return page

        yield open_page


@pytest.fixture
def stored(live):
    """Runs of every kind; see `samples.Stored`."""
    return store_runs(create_storage_backend("default"))


def follow(what):
    """Click something that leads to another page, and wait for that."""
    with what.page.expect_navigation():
        what.click()


def session_cookie(user):
    client = Client()
    client.force_login(user)
    name = django_settings.SESSION_COOKIE_NAME
    return {"name": name, "value": client.cookies[name].value}


def watch(page):
    """Note from now on what goes wrong on a page."""
    problems = PROBLEMS[page] = []

    def refused(source, violation):
        problems.append(f"refused by the policy: {violation}")

    def logged(message):
        # Chromium asks for that one by itself.
        if message.type == "error" and not message.location["url"].endswith("/favicon.ico"):
            problems.append(f"logged: {message.text} ({message.location['url']})")

    def answered(response):
        if response.status >= 400:
            problems.append(f"answered with {response.status}: {response.url}")

    def unanswered(request):
        # A page that turns out to be a file leaves the one before it where it is.
        if not (request.is_navigation_request() and request.failure == "net::ERR_ABORTED"):
            problems.append(f"no answer: {request.url} ({request.failure})")

    def asked(dialog):
        problems.append(f"a dialog: {dialog.message}")
        dialog.dismiss()

    page.expose_binding("refusedByPolicy", refused)
    page.add_init_script(
        "addEventListener('securitypolicyviolation', event => refusedByPolicy("
        "`${event.violatedDirective} ${event.blockedURI} ${event.sourceFile}:${event.lineNumber}"
        " ${event.sample}`), true)"
    )
    page.on("console", logged)
    page.on("pageerror", lambda error: problems.append(f"an error of a script: {error}"))
    page.on("response", answered)
    page.on("requestfailed", unanswered)
    page.on("dialog", asked)


def check(page):
    """Assert that nothing went wrong on a page, fits into its width, and can be used by all."""
    if SCREENSHOTS:
        take_picture(page)
    problems = [*PROBLEMS[page], *sideways(page)]
    if page not in WITHOUT_SCRIPTS:
        problems += inaccessible(page)
        # What the policy refuses of axe-core's own is no problem of the page.
        del PROBLEMS[page][:]
    assert not problems, "\n".join([f"{len(problems)} problems of {page.url}", *problems])


def take_picture(page):
    """Keep a picture of a whole page, named after the test."""
    test = os.environ["PYTEST_CURRENT_TEST"].split("::")[-1].removesuffix(" (call)")
    name = re.sub(r"[^\w-]+", "-", test).strip("-")
    page.screenshot(path=Path(SCREENSHOTS) / f"{name}.png", full_page=True)


def sideways(page):
    """Say what makes a page wider than its window, unless it scrolls within something."""
    wide = page.evaluate(
        """() => {
            const root = document.documentElement;
            const bounded = element => {
                for (let e = element.parentElement; e && e !== document.body; e = e.parentElement)
                    if (getComputedStyle(e).overflowX !== 'visible') return true;
                return false;
            };
            return root.scrollWidth <= root.clientWidth ? null : [
                `${root.scrollWidth} px in ${root.clientWidth}`,
                ...[...document.body.querySelectorAll('*')].filter(element =>
                    element.getBoundingClientRect().right > root.clientWidth && !bounded(element)
                ).slice(-3).map(element => element.cloneNode(false).outerHTML)
            ];
        }"""
    )
    return [f"scrolls sideways: {'; '.join(wide)}"] if wide else []


def inaccessible(page):
    """Say which rules of the standards a page breaks, and where."""
    # Evaluated, for the policy refuses a <script>.
    page.evaluate(AXE)
    found = page.evaluate(
        """async ([standards, notOurs]) => {
            const {violations} = await axe.run(document, {
                runOnly: standards, resultTypes: ['violations'], elementRef: true
            });
            return violations.flatMap(rule => rule.nodes
                .filter(node => !notOurs.some(([id, selector]) =>
                    id === rule.id && node.element.matches(selector)))
                .map(node => [rule.id, rule.help, node.target.join(' '), node.html,
                    [...node.any, ...node.all, ...node.none].map(check => check.message)]));
        }""",
        [STANDARDS, NOT_OURS],
    )
    return [
        f"{rule} ({what}) at {where}\n    {html}\n    {json.dumps(why, ensure_ascii=False)}"
        for rule, what, where, html, why in found
    ]

"""``manage.py screenshots FOLDER``: pictures of the demo's admin pages, light and dark.

Its Chromium is that of tests/browser, too.
"""

from __future__ import annotations

import logging
import os
import shutil
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from django.conf import settings
from django.contrib.admin.utils import quote
from django.contrib.auth import get_user_model
from django.contrib.staticfiles.handlers import StaticFilesHandler
from django.core.management import CommandError, call_command
from django.test import Client
from django.test.testcases import LiveServerThread
from django.urls import reverse

from testproject.management.commands.demo import USER
from workflow_storage import WorkflowRun
from workflow_storage.management.base import StorageCommand

if TYPE_CHECKING:
    from argparse import ArgumentParser
    from collections.abc import Callable, Iterator

    from playwright.sync_api import Browser, Page

CHROMIUM = os.environ.get("TEST_CHROMIUM", "/usr/bin/chromium")
"""The executable; the browsers that Playwright would download are not used."""

MANY = 2000
"""Runs that the demo makes up, so that lists and charts have something to show."""


class Shown(NamedTuple):
    """What the pictures are of."""

    failed: WorkflowRun
    """A run that was begun more than once."""
    before: WorkflowRun
    """A run of the same workflow that completed."""
    step: int
    """The newest one of the failed run."""


PAGES: dict[str, Callable[[Shown], str]] = {
    "runs": lambda shown: reverse("admin:workflow_storage_workflowrun_changelist"),
    "failed-run": lambda shown: reverse(
        "admin:workflow_storage_workflowrun_change", args=[quote(shown.failed.pk)]
    ),
    "state": lambda shown: _view("state", quote(shown.failed.pk), shown.step),
    "comparison": lambda shown: _view("compare", quote(shown.failed.pk), quote(shown.before.pk)),
    "charts": lambda shown: f"{_view('overview')}?since=7d",
}
"""File names, and the addresses of the pages."""

Scheme = Literal["light", "dark"]
SCHEMES: tuple[Scheme, ...] = ("light", "dark")
WIDTH, HEIGHT = 1280, 800
MAX_BYTES = 150_000


class Command(StorageCommand):
    help = (
        "Takes pictures of the demo's admin pages, light and dark, in a headless Chromium. "
        f"Runs the demo if it has not run yet, and demo --many {MANY}."
    )
    # The tables come with the demo.
    requires_migrations_checks = False

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("folder", type=Path, help="Where to put the pictures; made if needed.")
        parser.add_argument(
            "--chromium",
            default=CHROMIUM,
            metavar="PATH",
            help="The browser. Default: TEST_CHROMIUM, or /usr/bin/chromium.",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        folder: Path = options["folder"]
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise CommandError(f"Cannot make {folder}: {exc.strerror}. Name another.") from exc
        try:
            with chromium(options["chromium"]) as browser:
                browser.close()  # Whether there is one, before the demo is run.
        except ImportError as exc:
            raise CommandError("Playwright is missing. Install it: pip install playwright") from exc
        except OSError as exc:
            raise CommandError(
                f"There is no Chromium at {options['chromium']}. Install Debian's chromium, or "
                "name another executable with --chromium."
            ) from exc

        call_command("migrate", verbosity=0)
        users = get_user_model().objects
        shown = _shown()
        if shown is None or not users.filter(username=USER).exists():
            call_command("demo", stdout=self.stdout)
            call_command("demo", many=MANY, stdout=self.stdout)
            shown = _shown()
        assert shown is not None, "the demo leaves a failed run"
        addresses = {name: address(shown) for name, address in PAGES.items()}
        client = Client()
        client.force_login(users.get(username=USER))
        session = client.cookies[settings.SESSION_COOKIE_NAME].value
        # Chromium asks for a /favicon.ico, too; what else is missing is said below.
        logging.getLogger("django.request").setLevel(logging.ERROR)
        try:
            # No query while Playwright runs: its event loop is the one of this thread, and
            # Django refuses them.
            with served() as site, chromium(options["chromium"]) as browser:
                for scheme in SCHEMES:
                    page = _logged_in(browser, site, session, scheme)
                    for name, address in addresses.items():
                        response = page.goto(site + address)
                        if response is None or not response.ok:
                            raise CommandError(f"The page {address} is not there.")
                        file = folder / f"{name}-{scheme}.png"
                        file.write_bytes(picture(page))
                        self.stdout.write(str(file))
        finally:
            client.logout()


@contextmanager
def chromium(executable: str = CHROMIUM) -> Iterator[Browser]:
    """Start a headless Chromium that asks nobody but the pages' site for anything.

    Raises:
        ImportError: if Playwright is not installed.
        FileNotFoundError: if there is no such executable.
    """
    from playwright.sync_api import sync_playwright

    if shutil.which(executable) is None:
        raise FileNotFoundError(f"there is no {executable}")
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(
            executable_path=shutil.which(executable),
            args=[
                "--no-sandbox",  # It refuses to run as root with one.
                "--disable-gpu",
                "--disable-quic",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
            ],
        )


@contextmanager
def served() -> Iterator[str]:
    """Serve this site with its static files in threads, and give its address."""
    server = LiveServerThread("localhost", StaticFilesHandler)
    server.daemon = True
    server.start()
    server.is_ready.wait()
    try:
        if server.error:
            raise server.error
        yield f"http://{server.host}:{server.port}"
    finally:
        server.terminate()


def _logged_in(browser: Browser, site: str, session: str, scheme: Scheme) -> Page:
    context = browser.new_context(color_scheme=scheme, device_scale_factor=2)
    context.add_cookies(
        [{"name": settings.SESSION_COOKIE_NAME, "value": session, "url": site}],
    )
    return context.new_page()


def picture(page: Page) -> bytes:
    """Return a PNG of what a page shows first, in fewer colours or lower where it is large."""
    height = HEIGHT
    while True:
        page.set_viewport_size({"width": WIDTH, "height": height})
        png = _in_fewer_colours(page.screenshot())
        if len(png) < MAX_BYTES:
            return png
        height = height * 3 // 4


def _in_fewer_colours(png: bytes) -> bytes:
    try:
        from PIL import Image
    except ImportError:
        return png
    smaller = BytesIO()
    Image.open(BytesIO(png)).convert("RGB").quantize(256).save(smaller, "PNG", optimize=True)
    return min(png, smaller.getvalue(), key=len)


def _view(name: str, *args: Any) -> str:
    return reverse(f"admin:workflow_storage_run_{name}", args=args)


def _shown() -> Shown | None:
    """Return what the pictures are of; None if the demo has not run yet."""
    runs = WorkflowRun.objects.filter(labels__demo="many").order_by("-started_at")
    for failed in runs.filter(status="failed", attempt__gt=1, states__isnull=False)[:20]:
        earlier = runs.filter(workflow_name=failed.workflow_name, status="completed")
        before = earlier.filter(states__isnull=False, started_at__lt=failed.started_at).first()
        newest = failed.states.order_by("step").last()
        if before is not None and newest is not None:
            return Shown(failed, before, newest.step)
    return None

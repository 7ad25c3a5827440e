"""The admin under other settings: languages, separators of numbers, time zones and none.

People read numbers as their language writes them. What a browser reads stays as it is: addresses,
attributes, JSON.
"""

import json
import re
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from typing import NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

import pytest
from django.urls import reverse
from django.utils import timezone

from tests.admin.conftest import RUNS, STATES, page_of
from workflow_storage import ExecutionState
from workflow_storage.models import WorkflowRunAttempt
from workflow_storage.testing import stored_run

pytestmark = pytest.mark.django_db

STEPS = 1234
START = datetime(2026, 3, 1, 20, 0, 0, 250_000, tzinfo=UTC)
WINDOW = {"since": "2026-02-28", "until": "2026-03-03"}
"""So long that the steps of the overview are days."""
HOURS = {"since": "2026-02-28T12:00", "until": "2026-03-02T12:00"}
"""So short that they are hours."""


class Site(NamedTuple):
    """How a project is set up, and what its pages are to show."""

    settings: dict
    point: str
    comma: str
    started: str
    """When a run was that started at 20:00 UTC, or at 20:00 where there are no time zones."""
    cost: str = "${}"
    direction: str = "ltr"


SITES = {
    "plain": Site({}, ".", ",", "March 1, 2026, 20:00:00.250"),
    "separators": Site({"USE_THOUSAND_SEPARATOR": True}, ".", ",", "March 1, 2026, 20:00:00.250"),
    "german": Site({"LANGUAGE_CODE": "de"}, ",", ".", "1. März 2026, 20:00:00,250", "{} $"),
    "german-separators": Site(
        {"LANGUAGE_CODE": "de", "USE_THOUSAND_SEPARATOR": True},
        ",",
        ".",
        "1. März 2026, 20:00:00,250",
        "{} $",
    ),
    "arabic": Site(
        {"LANGUAGE_CODE": "ar", "USE_THOUSAND_SEPARATOR": True},
        ",",
        "",
        "1 مارس، 2026, 20:00:00,250",
        direction="rtl",
    ),
    "kolkata": Site({"TIME_ZONE": "Asia/Kolkata"}, ".", ",", "March 2, 2026, 01:30:00.250"),
    "naive": Site({"USE_TZ": False}, ".", ",", "March 1, 2026, 20:00:00.250"),
    "naive-kolkata": Site(
        {"USE_TZ": False, "TIME_ZONE": "Asia/Kolkata"}, ".", ",", "March 1, 2026, 20:00:00.250"
    ),
}


class Page(HTMLParser):
    """A page as a browser reads it."""

    def __init__(self, response):
        super().__init__()
        assert response.status_code == 200
        self.elements = []
        self.text = ""
        self.feed(response.content.decode())
        self.text = re.sub(r"\s+", " ", self.text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.text += " "

    def handle_data(self, data):
        self.text += data

    def values(self, *names):
        return [attrs[name] for _tag, attrs in self.elements for name in names if name in attrs]

    def check(self):
        """Fail for a number that only people could read."""
        for name in ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "r", "rx", "width", "height"):
            for value in self.values(name):
                assert re.fullmatch(r"-?\d+(\.\d+)?(%|rem)?", value), (name, value)
        for value in self.values("min", "max", "colspan", "tabindex"):
            assert re.fullmatch(r"-?\d+", value), value
        for value in self.values("d", "viewbox"):
            assert not re.search(r"\d,\d", value), value
        for value in self.values("points"):
            assert re.fullmatch(r"(\d+\.\d,-?\d+\.\d ?)+", value), value
        for value in self.values("href", "action", "data-load", "data-live"):
            address = urlsplit(unquote(value))
            if "/workflow_storage/" in address.path:
                assert not re.search(r"\d[.,\s]\d", address.path), value
            for name, given in parse_qsl(address.query):
                assert name in ("since", "until") or not re.search(r"\d[.,\s]\d", given), value


QUICK = {"german-separators", "naive"}


@pytest.fixture(
    params=[pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in SITES]
)
def site(request, settings):
    """Each way in turn that a project can be set up."""
    site = SITES[request.param]
    for name, value in site.settings.items():
        setattr(settings, name, value)
    return site


@pytest.fixture
def start(site, settings):
    return START if settings.USE_TZ else START.replace(tzinfo=None)


@pytest.fixture
def long_run(start, backend):
    """A run that failed in its second attempt, after more than a thousand steps."""
    run = stored_run(
        backend,
        id="1234567",
        workflow_name="numbers",
        status="failed",
        started_at=start,
        attempt=2,
        attempt_started_at=start + timedelta(seconds=700),
        completed_at=start + timedelta(seconds=1300),
        duration_seconds=1.5,
        total_tokens=12345,
        total_cost_usd=1234.5678,
        error_message="broken",
        current_node="node-0",
    )
    WorkflowRunAttempt.objects.create(
        run=run,
        number=1,
        started_at=start,
        ended_at=start + timedelta(seconds=2.5),
        status="failed",
    )
    ExecutionState.objects.bulk_create(
        ExecutionState(
            run=run,
            step=step,
            node_id=f"node-{min(step, 2)}",
            created_at=start + timedelta(seconds=step + 0.5),
            attempt=1 if step < 600 else 2,
            duration_seconds=0.25,
            tokens=1500,
            cost_usd=0.5,
            state_json=json.dumps({"step": step, "share": step / 1000}),
        )
        for step in range(STEPS)
    )
    return run


@pytest.fixture
def short_run(long_run, backend, start):
    """A run of three steps before it, which waits for a fork of itself."""
    run = stored_run(
        backend,
        id="7654321",
        workflow_name="numbers",
        status="running",
        started_at=start - timedelta(days=1, seconds=1),
        attempt_started_at=start - timedelta(days=1),
        parent_id=long_run.pk,
        forked_from_step=1200,
        labels={"invoice": "1234567"},
    )
    for number in range(3):
        backend.states.save_state(
            run.id, {"n": number}, f"node-{number}", duration_seconds=0.1 + number, tokens=2
        )
    return run


@pytest.fixture
def get(admin_client, short_run):
    """Return the page at an address, once it was checked."""

    def get(address, **query):
        page = Page(admin_client.get(address, query))
        page.check()
        return page

    return get


def view(name, *args):
    return reverse(f"admin:workflow_storage_run_{name}", args=args)


def test_the_list_has_its_numbers(site, get, long_run):
    page = get(reverse(RUNS), workflow="numbers")

    for shown in (
        f"12{site.comma}345",
        f"1{site.comma}234",  # steps
        f"1{site.point}5 s",
        site.cost.format(f"1{site.comma}234{site.point}5678"),
    ):
        assert shown in page.text
    assert page.values("dir")[0] == site.direction
    assert {"1234567", "7654321"} <= {*page.values("data-copy")}
    assert page_of(long_run) in page.values("href")
    assert site.started in page.values("title")
    assert "?label=invoice%3D1234567" in page.values("href")


def test_the_list_of_a_time_takes_its_days_as_the_site_has_them(site, admin_client, short_run):
    def found(since, until):
        response = admin_client.get(reverse(RUNS), {"since": since, "until": until})
        return [run.pk for run in response.context["cl"].result_list]

    day = "2026-03-02" if "March 2" in site.started else "2026-03-01"

    assert found(day, day) == ["1234567"]


def test_the_page_of_a_long_run_has_its_numbers(site, get, long_run):
    page = get(page_of(long_run))

    for shown in (
        f"1{site.comma}234",
        f"12{site.comma}345",
        f"2{site.point}5 s",  # the first attempt
        f"20:00:00{site.point}250" if "20:00" in site.started else f"01:30:00{site.point}250",
        "1233, node-2",  # the step of the newest state is its name, not a number of them
    ):
        assert shown in page.text
    assert view("state", "1234567", STEPS - 1) in page.values("href")
    assert site.started in page.values("title")
    # What a JSON value is written as does not depend on a language.
    assert "1.233" in page.text


def test_the_page_of_a_short_run_has_its_numbers(site, get, short_run):
    page = get(page_of(short_run))

    for shown in (f"1{site.point}1 s", "100 ms"):
        assert shown in page.text
    # Where it was forked, beside its parent and among all fields.
    assert len(re.findall(r"\b1200\b", page.text)) == 2
    assert view("live", "7654321") in page.values("data-live")


def test_the_page_of_all_steps_has_its_numbers(site, get):
    page = get(view("steps", "1234567"), first="1000")

    assert view("state", "1234567", 1233) in page.values("href")
    assert "1000" in page.text
    assert f"1{site.comma}500" in page.text  # tokens


def test_the_page_of_a_state_has_its_numbers(site, get):
    page = get(view("state", "1234567", 1200))

    assert view("state", "1234567", 1199) in page.values("href")
    (slider,) = [attrs for tag, attrs in page.elements if attrs.get("type") == "range"]
    assert (slider["min"], slider["value"], slider["max"]) == ("0", "1200", "1233")
    assert "1200 / 1233" in page.text
    assert f"1{site.comma}500" in page.text  # tokens
    assert "250 ms" in page.text
    assert "1.199" in page.text  # in the state before


def test_the_overview_has_its_numbers(site, get):
    page = get(view("overview"), workflow="numbers", **WINDOW)

    for shown in (
        f"1{site.point}5 s",
        f"12{site.comma}345",
        site.cost.format(f"1{site.comma}234{site.point}5678"),
    ):
        assert shown in page.text
    assert page.values("points")


@pytest.mark.parametrize("window", [WINDOW, HOURS], ids=["days", "hours"])
def test_the_links_of_the_overview_lead_to_the_runs_of_their_time(site, admin_client, get, window):
    page = get(view("overview"), workflow="numbers", **window)
    addresses = {
        attrs["href"]
        for tag, attrs in page.elements
        if tag == "a"
        and attrs["href"].startswith(f"{reverse(RUNS)}?")
        and "since=" in attrs["href"]
    }
    kept = window["since"]
    steps = [one for one in addresses if dict(parse_qsl(urlsplit(one).query))["since"] != kept]

    found = [admin_client.get(address).context for address in steps]

    assert {run.pk for one in found for run in one["cl"].result_list} == {"1234567", "7654321"}
    for one in found:
        assert len(one["cl"].result_list) == 1
        assert not [*one["messages"]]


def test_the_comparison_has_its_numbers(site, get):
    page = get(view("compare", "1234567", "7654321"))

    for shown in (
        f"1{site.comma}232",  # times that node-2 ran
        f"12{site.comma}345",
        f"1{site.point}5 s",
        "1.233",  # in the final state
    ):
        assert shown in page.text
    assert page_of_id("7654321") in page.values("href")


def page_of_id(run_id):
    return reverse("admin:workflow_storage_workflowrun_change", args=[run_id])


def test_the_list_of_states_has_its_numbers(site, get):
    page = get(reverse(STATES), run__id__exact="1234567")
    newest = ExecutionState.objects.filter(run_id="1234567").latest("step")

    for shown in (f"1{site.comma}500", "250 ms", site.cost.format(f"0{site.point}5000")):
        assert shown in page.text
    assert view("state", "1234567", 1233) in page.values("href")
    address = reverse("admin:workflow_storage_executionstate_change", args=[newest.pk])
    assert address in [value.partition("?")[0] for value in page.values("href")]
    assert re.search(rf"\b{newest.pk}\b", page.text)
    of_state = get(address)
    assert "1.233" in of_state.text
    assert view("state", "1234567", 1233) in of_state.values("href")


def test_what_a_script_and_a_download_get_is_json_as_ever(site, admin_client, get):
    live = admin_client.get(view("live", "7654321")).json()
    state = admin_client.get(view("state_file", "1234567", 1200)).json()
    run = admin_client.get(view("file", "1234567")).json()

    assert live["status"] == "running"
    assert state == {"step": 1200, "share": 1.2}
    assert run["run"]["total_tokens"] == 12345
    assert run["run"]["total_cost_usd"] == 1234.5678
    assert run["steps"][1200]["step"] == 1200


def test_the_next_page_begins_after_the_last_row(site, admin_client, start, backend):
    for number in range(60):
        stored_run(backend, id=str(1_000_000 + number), started_at=start - timedelta(hours=number))

    first = admin_client.get(reverse(RUNS)).context["cl"]
    second = admin_client.get(reverse(RUNS) + first.next_page).context["cl"]

    shown = [run.pk for run in [*first.result_list, *second.result_list]]
    assert shown == [str(1_000_000 + number) for number in range(60)]


def test_an_action_comes_to_the_runs_of_the_list(site, admin_client, backend):
    now = timezone.now()
    for number in range(3):
        stored_run(backend, id=str(1_000_000 + number), started_at=now - timedelta(minutes=number))
    chosen = {"action": "add_label", "_selected_action": ["1000000", "1000002"]}

    asked = admin_client.post(reverse(RUNS), chosen)
    confirmed = {**chosen, **dict(asked.context["hidden"]), "name": "n", "value": "1234"}
    admin_client.post(reverse(RUNS), {**confirmed, "_selected_action": chosen["_selected_action"]})

    labelled = [run.pk for run in backend.runs.iter_runs(labels={"n": "1234"})]
    assert labelled == ["1000000", "1000002"]

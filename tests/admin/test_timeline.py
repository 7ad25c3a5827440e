"""The timeline of a run: what is computed, and what the page shows of it."""

import re
from datetime import UTC, datetime, timedelta
from xml.etree import ElementTree as ET

import pytest
from django.utils import translation

from workflow_storage import WorkflowRun
from workflow_storage.admin.bands import (
    CELLS,
    LEVELS,
    MOST_ATTEMPTS,
    MOST_NODES,
    Axis,
    Bands,
    folded,
)
from workflow_storage.admin.timeline import MOST_BARS, STEPS_PER_PAGE, timeline
from workflow_storage.attempts import TAKEN_OVER
from workflow_storage.base import Attempt, Step, stalled_message

START = datetime(2026, 3, 3, 12, 0, 0, 250_000, tzinfo=UTC)
DAY = 86_400


def at(seconds, start=START):
    return start + timedelta(seconds=seconds)


def step(number, node, seconds, took=None, *, attempt=1, tokens=None, cost=None, start=START):
    return Step(
        step=number,
        node_id=node,
        created_at=at(seconds, start),
        attempt=attempt,
        duration_seconds=took,
        tokens=tokens,
        cost_usd=cost,
    )


def attempt_of(number=1, begin=0.0, end=None, status="completed", *, node=None, error=None):
    return Attempt(
        number=number,
        started_at=at(begin),
        ended_at=None if end is None else at(end),
        status=status,
        error_message=error,
        node=node,
        worker=f"host:{number}",
    )


def run_of(*attempts, status=None, **fields):
    newest = attempts[-1] if attempts else None
    return WorkflowRun(
        id="the-run",
        workflow_name="invoices",
        status=status or newest.status,
        started_at=START,
        **{
            "attempt": newest.number if newest else 0,
            "attempt_started_at": newest and newest.started_at,
            "completed_at": newest and newest.ended_at,
            "current_node": newest and newest.node,
            "error_message": newest and newest.error_message,
        }
        | fields,
    )


def bands_of(steps, *attempts, run=None, now=None):
    """Return the bands in their order, and where each step was placed."""
    bands = Bands(run or run_of(*attempts), attempts, now or at(100))
    placed = [bands.place(each) for each in steps]
    return bands.in_order(), placed


def html_of(steps, *attempts, run=None, **options):
    html = timeline(run or run_of(*attempts), iter(steps), attempts, **options)
    ET.fromstring(html)  # well-formed
    return html


def rows_of(html):
    """Return the texts of the rows that have cells for a step or a node."""
    return [
        [" ".join("".join(cell.itertext()).split()) for cell in row]
        for row in ET.fromstring(html).iterfind(".//tbody/tr")
        if len(row) > 2
    ]


def text_of(html):
    return " ".join("".join(ET.fromstring(html).itertext()).split())


def numbers_of(html):
    """Return all coordinates and lengths of the SVG in a page, with their units."""
    return re.findall(r' (?:x|y|x1|x2|y1|y2|width|height)="([^"]*)"', html)


LOOP = [
    step(number, ["llm", "search"][number % 2], number + 1.0, 0.5, tokens=10, cost=0.125)
    for number in range(5_000)
]


def test_a_run_without_steps_says_so():
    run = run_of(status="pending")

    html = html_of([], run=run)

    assert "No steps yet." in html
    assert "Not begun yet" in html
    assert "<table" not in html


def test_one_step_has_a_bar_over_the_whole_axis_and_is_not_the_longest_of_itself():
    attempts = [attempt_of(end=2)]

    bands, [(band, execution)] = bands_of([step(0, "ocr", 2, 2.0)], *attempts)
    html = html_of([step(0, "ocr", 2, 2.0, tokens=812, cost=0.0031)], *attempts)

    x, width = Axis(bands).bar(band, execution)
    assert x == 0
    assert 99 < x + width <= 100
    assert rows_of(html) == [["0", "ocr", "12:00:00.250", "2 s", "812", "$0.0031", ""]]
    assert "longest" not in html


def test_a_measured_step_begins_its_duration_before_its_end():
    _bands, [(_band, execution)] = bands_of([step(0, "ocr", 5, 2.0)], attempt_of(end=6))

    assert execution.end - execution.begin == pytest.approx(2)
    assert execution.end == pytest.approx(at(5).timestamp())


def test_steps_of_unknown_duration_begin_at_the_step_before_or_at_the_start_of_the_attempt():
    steps = [step(0, "a", 1), step(1, "b", 3), step(2, "c", DAY + 2, attempt=2)]
    attempts = [attempt_of(1, 0, 3, "failed"), attempt_of(2, DAY, DAY + 2)]

    _bands, placed = bands_of(steps, *attempts)
    html = html_of(steps, *attempts)

    assert [execution.length for _band, execution in placed] == pytest.approx([1, 2, 2])
    assert "≈ 1 s" in html
    assert "was not measured" in html


def test_a_clock_that_went_back_gives_no_negative_width():
    steps = [step(0, "a", 10), step(1, "b", 4), step(2, "c", 5, 8.0), step(3, "d", 6, -1.0)]
    attempts = [attempt_of(end=3)]

    bands, placed = bands_of(steps, *attempts)

    axis = Axis(bands)
    for band, execution in placed:
        x, width = axis.bar(band, execution)
        assert execution.begin <= execution.end
        assert x >= 0
        assert width > 0
        assert x + width <= 100.001
    assert not [number for number in numbers_of(html_of(steps, *attempts)) if number[0] == "-"]


def test_attempts_whose_clocks_disagree_follow_each_other_without_a_length():
    steps = [step(0, "a", 10, 1.0), step(1, "b", 6, 1.0, attempt=2)]
    attempts = [attempt_of(1, 0, 10, "cancelled"), attempt_of(2, 5, 7)]

    html = html_of(steps, *attempts)

    assert "later" not in html
    assert "Attempt 2, host:2" in html


def test_two_attempts_a_day_apart_share_a_scale_with_a_gap_between_them():
    steps = [step(0, "a", 10, 10.0), step(1, "b", DAY + 20, 20.0, attempt=2)]
    attempts = [attempt_of(1, 0, 10, "failed", node="b"), attempt_of(2, DAY, DAY + 20)]

    bands, placed = bands_of(steps, *attempts)
    html = html_of(steps, *attempts)

    axis = Axis(bands)
    (first_x, first), (second_x, second) = (axis.bar(*each) for each in placed)
    assert second_x - (first_x + first) == pytest.approx(axis.gap, abs=1)
    assert axis.gap > 5
    assert second == pytest.approx(2 * first, rel=0.01)
    assert first > 20
    [(_middle, seconds)] = axis.gaps
    assert seconds == pytest.approx(DAY - 10)
    assert "23\xa0hours, 59\xa0minutes later" in html
    assert "Attempt 1, host:1" in html
    assert "Attempt 2, host:2" in html


def test_an_attempt_that_was_found_dead_a_day_later_ends_with_its_last_sign_of_life():
    attempts = [
        attempt_of(1, 0, DAY, "failed", node="ocr", error=TAKEN_OVER),
        attempt_of(2, DAY, DAY + 5),
    ]
    steps = [step(0, "ocr", 4, 4.0), step(1, "llm", DAY + 5, 5.0, attempt=2)]

    bands, _placed = bands_of(steps, *attempts)

    assert bands[0].end == pytest.approx(at(4).timestamp())
    html = html_of(steps, *attempts)
    assert "no sign of life after 12:00:04.250" in html
    assert rows_of(html)[1][:4] == ["", "after ocr ✕ failed", "12:00:04.250", "-"]


def test_a_stalled_attempt_counts_as_found_dead():
    error = stalled_message(timedelta(minutes=5))
    attempts = [attempt_of(1, 0, DAY, "failed", node="ocr", error=error)]
    run = run_of(*attempts, heartbeat_at=at(7))

    bands, _placed = bands_of([step(0, "ocr", 4, 4.0)], *attempts, run=run)

    assert bands[0].end == pytest.approx(at(7).timestamp())


def test_parallel_nodes_overlap_in_rows_of_their_own():
    steps = [step(0, "a", 4, 3.0), step(1, "b", 5, 4.0)]

    bands, placed = bands_of(steps, attempt_of(end=5))

    axis = Axis(bands)
    (first_x, first_width), (second_x, _width) = (axis.bar(*each) for each in placed)
    assert second_x < first_x + first_width
    assert len(rows_of(html_of(steps, attempt_of(end=5)))) == 2


def test_the_longest_node_is_marked_with_a_word():
    steps = [step(0, "a", 1, 1.0), step(1, "b", 4, 3.0), step(2, "c", 90)]

    rows = rows_of(html_of(steps, attempt_of(end=90)))

    # What was not measured is not compared with what was.
    assert [row[1] for row in rows] == ["a", "b ▲ longest", "c"]


def test_a_list_of_attempts_that_is_older_than_the_run_gives_no_open_bar():
    attempts = [attempt_of(1, 0, None, "running", node="ocr")]
    steps = [step(0, "ocr", 4, 4.0)]

    failed = run_of(*attempts, status="failed", current_node="llm", completed_at=at(6))
    waiting = run_of(*attempts, status="pending", waiting_for="approval")

    assert [row[1] for row in rows_of(html_of(steps, *attempts, run=failed))] == [
        "ocr",
        "llm ✕ failed",
    ]
    assert len(rows_of(html_of(steps, *attempts, run=waiting))) == 1


def test_a_failed_run_shows_the_node_that_it_failed_in():
    attempts = [attempt_of(1, 0, 3, "failed", node="llm")]

    rows = rows_of(html_of([step(0, "ocr", 1, 1.0)], *attempts))

    assert rows[1][:4] == ["", "llm ✕ failed", "12:00:01.250", "≈ 2 s"]


def test_a_past_attempt_shows_the_node_that_it_failed_in():
    attempts = [attempt_of(1, 0, 3, "failed", node="llm"), attempt_of(2, 60, 70)]
    steps = [step(0, "ocr", 1, 1.0), step(1, "llm", 70, 9.0, attempt=2)]

    rows = rows_of(html_of(steps, *attempts))

    assert [row[1] for row in rows] == ["ocr", "llm ✕ failed", "llm ▲ longest"]


def test_a_run_that_failed_without_an_attempt_shows_the_node():
    run = run_of(status="failed", current_node="llm", completed_at=at(5))

    rows = rows_of(html_of([step(0, "ocr", 1, 1.0, attempt=None)], run=run))

    assert [row[1] for row in rows] == ["ocr", "llm ✕ failed"]


def test_a_running_run_has_an_open_bar_from_the_last_checkpoint_to_now():
    attempts = [attempt_of(1, 0, None, "running", node="llm")]

    html = html_of([step(0, "ocr", 1, 1.0)], *attempts, now=at(11))

    assert rows_of(html)[1][:4] == ["", "llm ▸ running", "12:00:01.250", "≈ 10 s"]
    assert "workflow-storage-timeline-bar workflow-storage-timeline-is-running" in html


def test_a_run_that_was_not_heard_of_since_a_checkpoint_is_after_that_node():
    attempts = [attempt_of(1, 0, None, "running", node="ocr")]

    rows = rows_of(html_of([step(0, "ocr", 1, 1.0)], *attempts, now=at(11)))

    assert rows[1][1] == "after ocr ▸ running"


def test_a_running_run_without_steps_shows_where_it_is():
    attempts = [attempt_of(1, 0, None, "running", node="ocr")]

    rows = rows_of(html_of([], *attempts, now=at(11)))

    assert [row[1] for row in rows] == ["ocr ▸ running"]


def test_a_waiting_run_says_for_what_and_since_when():
    attempts = [attempt_of(1, 0, 3, "pending", node="ask")]
    run = run_of(*attempts, waiting_for="approval by <finance>", completed_at=None)

    html = html_of([step(0, "ask", 2, 2.0)], *attempts, run=run)

    assert "Waiting for approval by <finance> since March 3, 2026 12:00:03.250" in text_of(html)
    assert "suspended" in html
    assert len(rows_of(html)) == 1


def test_a_cancelled_run_says_where_it_was():
    attempts = [attempt_of(1, 0, 3, "cancelled", node="llm")]

    rows = rows_of(html_of([step(0, "ocr", 1, 1.0)], *attempts))

    assert rows[1][1] == "llm ■ cancelled"


def test_steps_without_an_attempt_belong_to_the_one_in_whose_time_they_fall():
    attempts = [attempt_of(1, 0, 10, "failed"), attempt_of(2, 100, 110)]
    steps = [
        step(number, "a", seconds, 1.0, attempt=None) for number, seconds in enumerate([5, 50, 105])
    ]

    _bands, placed = bands_of(steps, *attempts)

    assert [(band.number, band.is_outside) for band, _execution in placed] == [
        (1, False),
        (1, True),
        (2, False),
    ]
    assert "Outside of an attempt" in html_of(steps, *attempts)


def test_steps_of_a_run_that_was_never_begun_need_no_attempt():
    html = html_of([step(0, "a", 5, 1.0, attempt=None)], run=run_of(status="pending"))

    assert "ttempt" not in text_of(html)
    assert len(rows_of(html)) == 1


def test_5000_steps_are_folded_by_node_into_a_small_page():
    attempts = [attempt_of(end=5_000)]
    html_of(LOOP, *attempts)
    html = timeline(run_of(*attempts), iter(LOOP), attempts)

    rows = rows_of(html)
    assert rows[0][:-1] == [
        "llm ▲ most time",
        "2,500",
        "20:50 min",
        "500 ms",
        "500 ms",
        "25,000",
        "$312.5000",
    ]
    assert [row[0] for row in rows[1:]] == ["search"]
    assert len(html) < 50_000


def test_5000_nodes_have_a_bounded_number_of_rows_and_lose_nothing():
    steps = [
        step(number, f"node-{number}", number + 1, 0.5 if number < 4_999 else 0.9, tokens=1)
        for number in range(5_000)
    ]
    attempts = [attempt_of(1, 0, 5_010, "failed", node="validate")]

    html = html_of(steps, *attempts)

    rows = rows_of(html)
    assert len(rows) == MOST_NODES + 1
    assert len(html) < 200_000
    assert ["node-4999 ▲ most time", "1"] in [row[:2] for row in rows]
    assert "validate ✕ failed" in [row[0] for row in rows]
    assert rows[-1][0] == "4,941 other nodes"
    assert sum(int(row[1].replace(",", "")) for row in rows) == 5_000


def test_marks_say_how_busy_a_node_was_along_the_axis():
    attempts = [attempt_of(end=400)]
    bands = Bands(run_of(*attempts), attempts, at(400))
    steps = [step(0, "a", 100, 100.0), step(1, "b", 400, 0.0)]

    [first, second], others, in_order = folded(bands, steps)

    axis = Axis(in_order)
    assert others == []
    (cell, cells, level), *_rest = first.marks(axis)
    assert (cell, level) == (0, LEVELS)
    assert cells == pytest.approx(CELLS / 4, abs=2)
    [(cell, cells, level)] = second.marks(axis)
    assert (cells, level) == (1, 1)
    assert cell == pytest.approx(CELLS, abs=4)


def test_steps_are_read_once_and_no_further_than_the_page():
    def endless():
        number = 0
        while True:
            yield step(number, "a", number, 0.5)
            number += 1

    html = html_of(endless(), attempt_of(end=9), all_steps=True)

    assert len(rows_of(html)) == STEPS_PER_PAGE


def test_pages_of_all_steps_lead_through_every_step_once():
    attempts = [attempt_of(1, 0, 1_000, "failed", node="llm"), attempt_of(2, 1_100, 5_000)]
    steps = [step(n, "a", n + 200 * (n > 900), 0.5, attempt=1 + (n > 900)) for n in range(1_100)]
    found = []
    first = 0
    while first is not None:
        html = html_of(
            steps[max(first - 1, 0) :],
            *attempts,
            all_steps=True,
            first=first,
            page_url=lambda number: f"?steps=all&first={number}",
            step_url=lambda number: f"/steps/{number}/",
        )
        found += [row[:2] for row in rows_of(html)]
        following = re.search(r'href="\?steps=all&amp;first=(\d+)" rel="next"', html)
        first = int(following[1]) if following else None
        assert "<svg" not in html

    assert [row[0] for row in found if row[0]] == [str(number) for number in range(1_100)]
    assert [row[1] for row in found if not row[0]] == ["llm ✕ failed"]


def test_a_page_that_begins_in_the_middle_does_not_guess_when_its_first_step_began():
    steps = [step(7, "a", 70), step(8, "b", 80)]

    rows = rows_of(html_of(steps, attempt_of(end=90), all_steps=True, first=7))
    known = rows_of(html_of(steps, attempt_of(end=90), all_steps=True, first=8))

    assert [row[3] for row in rows] == ["-", "≈ 10 s"]
    assert [row[3] for row in known] == ["≈ 10 s"]


def test_a_page_after_the_last_step_says_so():
    html = html_of(
        [], attempt_of(end=9), all_steps=True, first=500, page_url=lambda number: f"?first={number}"
    )

    assert "There are no steps from here on." in html
    assert 'href="?first=0"' in html


def test_up_to_the_limit_each_step_has_a_bar():
    for count, is_folded in ((MOST_BARS, False), (MOST_BARS + 1, True)):
        html = html_of(LOOP[:count], attempt_of(end=count), page_url=lambda number: f"?{number}")
        assert (len(rows_of(html)) == 2) is is_folded
        assert ("Each step" in html) is is_folded


def test_many_attempts_leave_a_bounded_page_that_says_what_it_leaves_out():
    attempts = [
        attempt_of(number, number * 60, number * 60 + 5, "failed", node="ocr")
        for number in range(1, 501)
    ]

    html = html_of([step(0, "a", 62, 1.0)], *attempts)

    assert len(rows_of(html)) == MOST_ATTEMPTS + 2
    assert "459 earlier attempts are left out of the chart." in html


def test_markup_in_names_and_addresses_stays_text():
    node = "<script>alert('&')</script>"
    attempts = [attempt_of(1, 0, 9, "failed", node='"><b onload="x">')]
    attempts[0] = attempts[0]._replace(worker="<i>host</i>")

    for steps, options in (
        ([step(0, node, 1, 1.0)], {}),
        ([step(0, node, 1, 1.0)], {"all_steps": True}),
        ([step(n, node, n, 1.0) for n in range(100)], {}),
    ):
        html = html_of(steps, *attempts, step_url=lambda n: f'/"><b>{n}', **options)
        assert node in text_of(html)
        for markup in ("<script", "<i>", "<b>", "<b "):
            assert markup not in html


@pytest.mark.parametrize("options", [{}, {"all_steps": True}])
@pytest.mark.parametrize("count", [5, 100])
def test_there_are_no_styles_scripts_or_handlers(options, count):
    attempts = [attempt_of(1, 0, 9, "failed", node="a"), attempt_of(2, 90, None, "running")]

    html = html_of(LOOP[:count], *attempts, page_url=lambda n: f"?{n}", **options)

    for element in ET.fromstring(html).iter():
        assert element.tag not in {"style", "script"}
        assert not [name for name in element.attrib if name == "style" or name.startswith("on")]
        for name in element.get("class", "").split():
            assert name.startswith("workflow-storage-") or name == "paginator"


def test_step_numbers_are_links_only_with_an_address():
    steps = [step(1_234, "a", 1, 1.0)]

    linked = html_of(steps, attempt_of(end=2), step_url=lambda number: f"/steps/{number}/")

    assert '<a href="/steps/1234/">1234</a>' in linked
    assert "<a" not in html_of(steps, attempt_of(end=2))


def test_what_the_chart_shows_is_hidden_from_screen_readers_for_the_table_says_it():
    root = ET.fromstring(html_of(LOOP[:3], attempt_of(end=3)))

    charts = [cell for row in root.iter("tr") for cell in row if cell.find("svg") is not None]

    assert charts
    assert {chart.get("aria-hidden") for chart in charts} == {"true"}
    assert all(header.get("scope") for header in root.iter("th"))


def test_in_german_numbers_are_written_so_and_coordinates_are_not(settings):
    settings.USE_THOUSAND_SEPARATOR = True
    attempts = [attempt_of(1, 0, 3.5, "failed", node="c"), attempt_of(2, 5_000, 5_010)]
    steps = [step(n, "ocr", n + 1, 0.875) for n in range(2)]
    steps.append(step(1_234, "llm", 5_001.5, 1.25, attempt=2))

    with translation.override("de"):
        html = html_of(steps, *attempts, step_url=lambda n: f"/{n}/")
        long = html_of(LOOP, attempt_of(end=5_000))

    assert "12:00:00,375" in html
    assert "1,25 s" in html
    assert ">1234</a>" in html
    assert ">2.500<" in long
    for page in (html, long):
        assert not [number for number in numbers_of(page) if "," in number]
        assert all(re.fullmatch(r"-?\d+(\.\d+)?%?", number) for number in numbers_of(page))
        paths = re.findall(r' d="([^"]*)"', page)
        assert all(re.fullmatch(r"[\d Mhvz-]*", path) for path in paths)
        assert not re.search(r'viewBox="[^"]*[.,]', page)


def test_without_time_zones_times_are_shown_as_they_are_stored(settings):
    settings.USE_TZ = False
    settings.TIME_ZONE = "America/New_York"
    start = datetime(2026, 3, 3, 12, 0, 0, 250_000)
    attempts = [
        Attempt(
            number=1,
            started_at=start,
            ended_at=None,
            status="running",
            error_message=None,
            node="llm",
            worker=None,
        )
    ]
    run = run_of(*attempts)

    html = html_of(
        [step(0, "ocr", 2, 1.0, start=start)], *attempts, run=run, now=start + timedelta(seconds=5)
    )

    rows = rows_of(html)
    assert rows[0][2] == "12:00:01.250"
    assert rows[1][2:4] == ["12:00:02.250", "≈ 3 s"]


def test_times_are_shown_in_the_current_time_zone_and_with_the_day_where_it_is_another(settings):
    settings.TIME_ZONE = "Asia/Tokyo"
    steps = [step(0, "a", 1, 1.0), step(1, "b", 4 * 3600, 1.0)]

    rows = rows_of(html_of(steps, attempt_of(end=4 * 3600)))

    assert rows[0][2] == "21:00:00.250"
    assert rows[1][2] == "03/04/2026 00:59:59.250"


@pytest.mark.parametrize("seconds", [1e300, 1e12])
def test_a_duration_beyond_the_calendar_is_shown_all_the_same(seconds):
    steps = [step(0, "a", 1, seconds), step(1, "b", 2, seconds)]

    assert len(rows_of(html_of(steps, attempt_of(end=3)))) == 2

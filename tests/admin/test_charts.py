"""Charts: what people see, whatever the language, the clock, the numbers and the names."""

import re
from datetime import UTC, datetime, timedelta
from xml.etree import ElementTree
from zoneinfo import ZoneInfo

import pytest
from django.test import override_settings
from django.utils import timezone, translation
from hypothesis import given
from hypothesis import strategies as st

from workflow_storage import WorkflowRun
from workflow_storage.admin.charts import (
    MAX_LABELS,
    RankingRow,
    RunMark,
    TimePoint,
    amount_bars,
    duration_lines,
    duration_ticks,
    ranking,
    round_ticks,
    run_mark,
    status_bars,
    strip,
    time_points,
    time_steps,
)
from workflow_storage.admin.rendering import cost_text, duration_text
from workflow_storage.status import RunStatus
from workflow_storage.summaries import RunSummary

START = datetime(2026, 3, 2, tzinfo=UTC)
EVIL = "<script>alert('x')</script>\"&"
STATUSES = {"completed": 1234, "failed": 3, "cancelled": 2, "running": 1, "pending": 5}


def point(day=0, **values):
    start = START + timedelta(days=day)
    return TimePoint(start, f"/runs/?day={day}&x=1", f"March {2 + day}", f"Mar {2 + day}", **values)


FULL = [
    point(0, by_status=STATUSES, p50_seconds=1.5, p95_seconds=90, tokens=1_234_567, cost_usd=0.125),
    point(1),
    point(2, by_status={"failed": 1}, p50_seconds=0.1, p95_seconds=4000, tokens=8, cost_usd=12.5),
]
MARKS = [
    RunMark(f"/runs/{status}/?a=1&b=2", status.value, seconds, f"{EVIL} {status}")
    for status, seconds in zip(RunStatus, (None, 0.0, 12.5, 3600.0, 4.0), strict=True)
]


def all_charts():
    return {
        "strip": strip(MARKS),
        "status": status_bars(FULL, title=EVIL),
        "durations": duration_lines(FULL, title=EVIL),
        "tokens": amount_bars(FULL, "tokens", title=EVIL),
        "cost": amount_bars(FULL, "cost", title=EVIL),
        "ranking": ranking(
            [RankingRow(EVIL, "/w/?a=1&b=2", 3, "1,234"), RankingRow("b", "", 0, EVIL)],
            title=EVIL,
            value_heading=EVIL,
            tone="failed",
        ),
        "empty": strip([], title=EVIL),
    }


CHARTS = ("strip", "status", "durations", "tokens", "cost", "ranking", "empty")


def parsed(chart):
    return ElementTree.fromstring(f"<div>{chart}</div>")


def text_of(element):
    return " ".join("".join(element.itertext()).split())


def svg_links(chart):
    return [link for svg in parsed(chart).iter("svg") for link in svg.iter("a")]


def table_of(chart):
    return [[text_of(cell) for cell in row] for row in parsed(chart).find(".//table").iter("tr")]


@pytest.mark.parametrize("name", CHARTS)
def test_chart_is_well_formed(name):
    assert parsed(all_charts()[name]).find("*") is not None


@pytest.mark.parametrize("name", CHARTS)
def test_chart_has_no_style_and_no_script(name):
    for element in parsed(all_charts()[name]).iter():
        assert element.tag not in {"style", "script"}
        assert not [key for key in element.attrib if key == "style" or key.startswith("on")]


@pytest.mark.parametrize("name", CHARTS)
def test_markup_in_a_name_stays_text(name):
    chart = all_charts()[name]

    assert "<script" not in chart
    assert EVIL in "".join(parsed(chart).itertext())


@pytest.mark.parametrize("language", ["en", "de", "fr", "ar"])
@pytest.mark.parametrize("name", CHARTS)
def test_coordinates_have_a_dot_in_every_language(name, language):
    numbers = {"x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "r", "width", "height"}
    with translation.override(language), override_settings(USE_THOUSAND_SEPARATOR=True):
        chart = all_charts()[name]

    for element in parsed(chart).iter():
        for key in numbers & element.attrib.keys():
            assert re.fullmatch(r"-?[0-9]+(\.[0-9]+)?%?", element.attrib[key]), element.attrib
        for key in {"points", "viewBox"} & element.attrib.keys():
            assert re.fullmatch(r"[0-9., ]+", element.attrib[key])


def test_numbers_for_people_are_in_their_language():
    with translation.override("de"), override_settings(USE_THOUSAND_SEPARATOR=True):
        chart = status_bars(FULL)

    assert table_of(chart)[1] == ["March 2", "1.245", "3", "1.234", "2", "1", "5"]
    assert "1.245" in svg_links(chart)[0].get("aria-label")


@pytest.mark.parametrize(
    "chart",
    [
        lambda: strip([]),
        lambda: status_bars([]),
        lambda: status_bars([point(0), point(1, by_status={"failed": 0})]),
        lambda: duration_lines([point(0, by_status=STATUSES)]),
        lambda: amount_bars([point(0, by_status=STATUSES)], "tokens"),
        lambda: amount_bars([point(0, cost_usd=0.0)], "cost"),
        lambda: ranking([], title="Slowest", value_heading="p95"),
    ],
)
def test_chart_without_data_says_so(chart):
    drawn = parsed(chart())

    assert drawn.find(".//svg") is None
    assert text_of(drawn.find(".//p")).endswith(".")


@pytest.mark.parametrize("name", ["strip", "status", "durations", "tokens", "cost"])
def test_bars_are_links_with_a_name(name):
    links = svg_links(all_charts()[name])

    assert [link.get("href") for link in links] == (
        [mark.url for mark in MARKS] if name == "strip" else [FULL[0].url, FULL[2].url]
    )
    for link in links:
        assert link.get("aria-label").strip()
        assert link.get("aria-label") == link.find("title").text
        assert [child.tag for child in link if child.get("class") != "workflow-storage-chart-hit"]


@pytest.mark.parametrize("name", ["strip", "status", "durations", "tokens", "cost"])
def test_what_may_not_be_seen_is_no_link(name):
    chart = {
        "strip": lambda: strip([mark._replace(url="") for mark in MARKS]),
        "status": lambda: status_bars([each._replace(url="") for each in FULL]),
        "durations": lambda: duration_lines([each._replace(url="") for each in FULL]),
        "tokens": lambda: amount_bars([each._replace(url="") for each in FULL], "tokens"),
        "cost": lambda: amount_bars([each._replace(url="") for each in FULL], "cost"),
    }[name]()

    assert svg_links(chart) == []
    assert [link.get("href") for link in parsed(chart).iter("a")] == [
        f"#workflow-storage-{'last-runs' if name == 'strip' else name}-table"
    ]


def test_table_has_the_numbers_of_the_status_bars():
    heading, *rows = table_of(status_bars(FULL))

    assert heading[1:] == ["Runs", "failed", "completed", "cancelled", "running", "pending"]
    assert rows == [
        ["March 2", "1,245", "3", "1,234", "2", "1", "5"],
        ["March 3", "0", "0", "0", "0", "0", "0"],
        ["March 4", "1", "1", "0", "0", "0", "0"],
    ]


def test_table_has_the_numbers_of_the_lines_and_amounts():
    assert table_of(duration_lines(FULL))[1:] == [
        ["March 2", duration_text(1.5), duration_text(90)],
        ["March 3", "-", "-"],
        ["March 4", duration_text(0.1), duration_text(4000)],
    ]
    assert [row[1] for row in table_of(amount_bars(FULL, "tokens"))[1:]] == ["1,234,567", "-", "8"]
    assert [row[1] for row in table_of(amount_bars(FULL, "cost"))[1:]] == [
        cost_text(0.125),
        "-",
        cost_text(12.5),
    ]


def test_table_of_the_strip_has_its_runs():
    rows = table_of(strip(MARKS))[1:]

    assert [row[1:] for row in rows] == [
        ["pending", "-"],
        ["running", duration_text(0.0)],
        ["completed", duration_text(12.5)],
        ["failed", duration_text(3600.0)],
        ["cancelled", duration_text(4.0)],
    ]


def look_of(shapes):
    keys = ("fill", "fill-opacity", "stroke", "stroke-width", "stroke-dasharray")
    return tuple((shape.tag, *map(shape.get, keys)) for shape in shapes)


def test_statuses_are_told_apart_without_colour():
    in_strip = {look_of(link.findall("./*")[2:]) for link in svg_links(strip(MARKS))}
    (bars,) = [link.findall("rect")[1:] for link in svg_links(status_bars(FULL[:1]))]

    assert len(in_strip) == len({look_of([bar]) for bar in bars}) == len(RunStatus)


def test_longer_runs_have_higher_bars_and_all_can_be_seen():
    marks = [RunMark("/", "completed", seconds, "run") for seconds in (None, 1.0, 60.0, 3600.0)]

    heights = [float(link.findall("rect")[1].get("height")) for link in svg_links(strip(marks))]

    assert heights == sorted(heights)
    assert 5 <= heights[0] <= heights[1] < heights[2] < heights[3] <= 40


def test_one_failure_among_thousands_can_be_seen():
    chart = status_bars([point(0, by_status={"completed": 9999, "failed": 1})])

    _hit, failed, completed = svg_links(chart)[0].findall("rect")
    assert failed.get("class") == "workflow-storage-failed"
    assert float(failed.get("height")) >= 3
    assert float(completed.get("y")) + float(completed.get("height")) == float(failed.get("y"))
    # Together they are as high as 10,000 runs, the top of the axis.
    assert float(completed.get("height")) + float(failed.get("height")) == 150


def test_lines_have_gaps_where_no_run_ended():
    points = [
        point(day, p50_seconds=seconds, p95_seconds=seconds)
        for day, seconds in enumerate([1.0, 2.0, None, 3.0, 4.0, None])
    ]

    lines = list(parsed(duration_lines(points)).iter("polyline"))

    assert [len(line.get("points").split()) for line in lines] == [2, 2, 2, 2]
    assert len(svg_links(duration_lines(points))) == 4


def test_two_charts_of_a_page_share_no_id():
    page = status_bars(FULL) + status_bars(FULL, name="other") + strip(MARKS)

    ids = [element.get("id") for element in parsed(page).iter() if element.get("id")]

    assert len(ids) == len(set(ids)) == 9
    assert set(re.findall(r"url\(#([^)]*)\)", page)) < set(ids)


@pytest.mark.parametrize("count", [1, 2, 8, 9, 31, 50, 200])
def test_labels_of_the_axis_are_at_most_eight(count):
    points = [point(day, by_status={"completed": 1}) for day in range(count)]

    labels = [
        text.text
        for text in parsed(status_bars(points)).iter("text")
        if text.text.startswith("Mar")
    ]

    assert 1 <= len(labels) <= MAX_LABELS
    assert labels[0] == "Mar 2"


@given(st.floats(1e-6, 1e12))
def test_axis_has_two_to_four_round_values(most):
    for values in (
        round_ticks(most, least=0),
        round_ticks(most, least=1),
        duration_ticks(most),
    ):
        assert 2 <= len(values) <= 4
        assert values[0] == 0
        assert values[-1] >= most * (1 - 1e-9)


def test_axis_is_short_to_read():
    def axis_of(chart):
        return [text.text for text in parsed(chart).iter("text") if text.get("x")[-1] != "%"]

    assert axis_of(status_bars([point(0, by_status={"failed": 7})])) == ["0", "5", "10"]
    assert axis_of(status_bars([point(0, by_status={"failed": 1})])) == ["0", "1"]
    assert axis_of(amount_bars([point(0, tokens=2_500_000)], "tokens")) == [
        "0",
        "1M",
        "2M",
        "3M",
    ]
    assert axis_of(amount_bars([point(0, cost_usd=0.011)], "cost")) == [
        "0",
        "$0.005",
        "$0.010",
        "$0.015",
    ]
    assert axis_of(duration_lines([point(0, p50_seconds=100)])) == ["0", "1:00 min", "2:00 min"]


def test_ranking_has_a_bar_for_each_row():
    chart = ranking(
        [RankingRow("a", "/a", 8, "8 of 9"), RankingRow("b", "/b", 2, "2 of 3")],
        title="Most failing",
        value_heading="Failed",
    )

    assert table_of(chart)[1:] == [["a", "8 of 9"], ["b", "2 of 3"]]
    assert [link.get("href") for link in parsed(chart).iter("a")] == ["/a", "/b"]
    bars = [svg.findall("rect")[1].get("width") for svg in parsed(chart).iter("svg")]
    assert bars == ["100.00%", "25.00%"]


def test_mark_of_a_run_is_a_sentence():
    run = WorkflowRun(
        workflow_name="invoice-extraction",
        status="failed",
        duration_seconds=12.0,
        started_at=timezone.now() - timedelta(hours=2, minutes=10),
    )

    mark = run_mark(run, "/run")

    assert mark[:3] == ("/run", "failed", 12.0)
    assert mark.title.replace("\xa0", " ") == "invoice-extraction failed after 12 s, 2 hours ago"
    run.duration_seconds, run.status = None, "running"
    assert run_mark(run, "").title.replace("\xa0", " ") == "invoice-extraction running, 2 hours ago"


@pytest.mark.parametrize(
    ("window", "time", "count"),
    [
        (timedelta(minutes=1), "hour", 1),
        (timedelta(hours=24), "hour", 24),
        (timedelta(days=7), "day", 7),
        (timedelta(days=50), "day", 50),
        (timedelta(days=90), "week", 13),
        (timedelta(days=365), "month", 12),
    ],
)
def test_steps_are_as_fine_as_fifty_allow(window, time, count):
    after = datetime(2026, 3, 2, tzinfo=UTC)  # a Monday
    if time == "month":
        after = datetime(2026, 1, 1, tzinfo=UTC)

    found, starts = time_steps(after, after + window)

    assert (found, len(starts), starts[0]) == (time, count, after)


def test_steps_of_an_empty_window_are_refused():
    with pytest.raises(ValueError, match="is empty"):
        time_steps(START, START)


@pytest.mark.parametrize(
    ("zone", "after", "hours"),
    [
        ("Europe/Berlin", datetime(2026, 3, 29), 23),
        ("Europe/Berlin", datetime(2026, 10, 25), 25),
        ("Australia/Lord_Howe", datetime(2026, 4, 5), 24),
        ("Asia/Kolkata", datetime(2026, 4, 5), 24),
    ],
)
def test_steps_of_a_day_are_the_hours_that_it_has(zone, after, hours):
    with timezone.override(ZoneInfo(zone)):
        midnight = timezone.make_aware(after)

        time, starts = time_steps(midnight, timezone.make_aware(after + timedelta(days=1)))

        points = time_points([], starts, lambda start, end: f"/{start}/{end}", time=time)

    assert time == "hour"
    assert len({start.timestamp() for start in starts}) == len(starts) == hours
    assert len({each.label for each in points}) == hours
    assert all(start.minute == 0 for start in starts)


@pytest.mark.parametrize("zone", ["Europe/Berlin", "America/Sao_Paulo", "Asia/Beirut"])
@pytest.mark.parametrize("month", [2, 3, 10, 11])
def test_days_begin_at_midnight_where_the_clock_is_changed(zone, month):
    with timezone.override(ZoneInfo(zone)):
        after = timezone.make_aware(datetime(2018, month, 1))

        time, starts = time_steps(after, after + timedelta(days=40))

        ends = []
        time_points([], starts, lambda start, end: ends.append(end) or "", time=time)

    assert time == "day"
    assert {start.hour for start in starts} == {0}
    days = [start.date() for start in starts]
    assert days == [days[0] + timedelta(days=place) for place in range(len(days))]
    assert ends[:-1] == starts[1:]


def test_window_within_the_hour_that_is_there_twice_is_not_empty():
    with timezone.override(ZoneInfo("Europe/Berlin")):
        first = timezone.make_aware(datetime(2026, 10, 25, 2, 40))

        _time, starts = time_steps(first, first.replace(minute=0, fold=1))

    assert starts == [first.replace(minute=0)]


@override_settings(USE_TZ=False)
def test_steps_work_without_time_zones():
    time, starts = time_steps(datetime(2026, 1, 31, 12, 30), datetime(2027, 12, 31))

    assert time == "month"
    assert (starts[0], starts[-1], len(starts)) == (
        datetime(2026, 1, 1),
        datetime(2027, 12, 1),
        24,
    )


def summary(start, **values):
    fields = {
        "group": (start,),
        "runs": 3,
        "by_status": {"completed": 2, "failed": 1},
        "success_rate": 2 / 3,
        "p50_seconds": 1.0,
        "p95_seconds": 2.0,
        "max_seconds": 2.0,
        "durations": {},
        "total_tokens": 10,
        "total_cost_usd": 0.5,
    }
    return RunSummary(**fields | values)


def test_steps_in_which_nothing_ran_are_points_too():
    time, starts = time_steps(START, START + timedelta(days=4))
    outside = summary(START - timedelta(days=1))

    points = time_points(
        [outside, summary(starts[2])],
        starts,
        lambda start, end: f"/?from={start:%m-%d}&until={end:%m-%d}",
        time=time,
    )

    assert [each.runs for each in points] == [0, 0, 3, 0]
    assert [each.tick for each in points] == ["Mar 2", "Mar 3", "Mar 4", "Mar 5"]
    assert points[2] == TimePoint(
        starts[2],
        "/?from=03-04&until=03-05",
        "March 4, 2026",
        "Mar 4",
        {"completed": 2, "failed": 1},
        1.0,
        2.0,
        10,
        0.5,
    )


def test_hour_that_is_there_twice_is_two_points():
    with timezone.override(ZoneInfo("Europe/Berlin")):
        time, starts = time_steps(
            datetime(2026, 10, 24, 23, tzinfo=UTC), datetime(2026, 10, 25, 3, tzinfo=UTC)
        )

        points = time_points(
            [summary(starts[1], by_status={"failed": 1}), summary(starts[2])],
            starts,
            lambda start, end: "",
            time=time,
        )

    assert [each.runs for each in points] == [0, 1, 3, 0]
    assert [each.label for each in points[1:3]] == [
        "Oct. 25, 2026, 2 a.m. CEST",
        "Oct. 25, 2026, 2 a.m. CET",
    ]


def test_dates_are_in_the_language_of_the_page():
    with translation.override("de"):
        (day,) = time_points([], [START], lambda start, end: "", time="day")
        (month,) = time_points([], [START], lambda start, end: "", time="month")

    assert (day.label, month.label) == ("2. März 2026", "März 2026")
    assert day.tick.startswith("2. Mär")

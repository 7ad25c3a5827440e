"""What changed, as a table."""

import html
import re

import pytest
from hypothesis import given, settings

from workflow_storage.admin.diffs import SHOWN_CHANGES, diff_block
from workflow_storage.admin.masking import NO_MASK, SECRETS, Mask
from workflow_storage.testing.values import json_values

MASK = Mask(SECRETS)
MARKUP = "<script>alert('x')</script> {{ rows }} {% load i18n %} \"&amp;"


def rows(page):
    """Return the cells of each row as text."""
    body = page.partition("<tbody")[2]
    return [
        [
            " ".join(html.unescape(re.sub(r"<[^>]+>", " ", cell)).split())
            for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.DOTALL)
        ]
        for row in re.findall(r"<tr[^>]*>(.*?)</tr>", body, re.DOTALL)
    ]


def test_each_change_is_a_row_with_a_sign_a_word_a_path_and_both_values():
    page = diff_block(
        {"a": [{"b": 1}], "gone": None, "odd key": "x"},
        {"a": [{"b": True}], "odd key": "y", "new": {"c": []}},
        mask=NO_MASK,
    )

    assert rows(page) == [
        ["~ changed", "a[0].b", "1", "true"],
        ["− removed", "gone", "null", ""],  # noqa: RUF001
        ["~ changed", '["odd key"]', '"x"', '"y"'],
        ["+ added", "new", "", '{"c": []}'],
    ]


def test_a_change_of_the_whole_value_says_so():
    assert rows(diff_block(None, [1], mask=NO_MASK)) == [
        ["~ changed", "(the whole value)", "null", "[1]"]
    ]


def test_equal_values_say_that_nothing_changed():
    page = diff_block({"a": 1, "b": 2}, {"b": 2, "a": 1}, mask=NO_MASK)

    assert "Nothing changed." in page
    assert "<table" not in page


def test_more_changes_than_a_page_shows_are_said_to_be_there():
    some = {str(number): number for number in range(SHOWN_CHANGES)}
    more = {**some, "one more": 1}

    assert len(rows(diff_block({}, more, mask=NO_MASK))) == SHOWN_CHANGES
    assert "there are more" in diff_block({}, more, mask=NO_MASK)
    assert "there are more" not in diff_block({}, some, mask=NO_MASK)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {MARKUP: MARKUP}),
        ({MARKUP: MARKUP}, {MARKUP: {MARKUP: 1}}),
        ({"a": MARKUP}, {"a": f"{MARKUP}\n{MARKUP}"}),
        ({"a": "x\n"}, {"a": MARKUP * 10}),
        ({}, {"p": {"token": MARKUP, MARKUP: 1}}),
    ],
)
def test_markup_in_keys_and_values_stays_text(before, after):
    page = diff_block(before, after, mask=MASK)

    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "{{ rows }}" in page


def test_a_page_has_no_inline_style_script_or_handler():
    page = diff_block({"a": "x\ny", "b": 1}, {"a": "x\nz", "c": 2}, mask=MASK)

    assert not re.search(r"<(style|script)|\s(style|on\w+)=", page)


def test_many_changes_below_one_secret_are_one_row():
    before, after = ({"cookie": dict.fromkeys(map(str, range(500)), end), "z": end} for end in "xy")

    page = diff_block(before, after, mask=MASK)

    assert [row[1] for row in rows(page)] == ["cookie", "z"]
    assert "there are more" not in page


def test_changes_that_were_not_looked_at_are_said_to_be_there():
    before, after = ({"cookie": dict.fromkeys(map(str, range(5000)), end)} for end in "xy")

    assert "there are more" in diff_block(before, after, mask=MASK)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (
            {"token": "sesame-1"},
            {"token": "sesame-2"},
            ["~ changed", "token", "hidden", "hidden"],
        ),
        ({}, {"token": "sesame-1"}, ["+ added", "token", "", "hidden"]),
        ({"token": "sesame-1"}, {}, ["− removed", "token", "hidden", ""]),  # noqa: RUF001
        (
            {"a": [{"api_key": {"sesame-1": {"sesame-2": [1]}, "x": 1}}]},
            {"a": [{"api_key": {"sesame-1": {"sesame-2": [2]}, "x": 2}}]},
            ["~ changed", "a[0].api_key", "hidden", "hidden"],
        ),
        (
            {"token": ["sesame-1"]},
            {"token": ["sesame-1", "sesame-2\n" * 50]},
            ["~ changed", "token", "hidden", "hidden"],
        ),
        (
            {"token": "sesame-1\n" * 50},
            {"token": "sesame-2\n" * 50},
            ["~ changed", "token", "hidden", "hidden"],
        ),
        ({}, {"a": {"token": "sesame-1"}}, ["+ added", "a", "", '{"token": "••••••"}']),
        (
            {"a": [{"token": "sesame-1"}]},
            {"a": {"token": "sesame-2"}},
            ["~ changed", "a", '[{"token": "••••••"}]', '{"token": "••••••"}'],
        ),
    ],
)
def test_a_secret_is_said_to_have_changed_and_never_shown(before, after, expected):
    page = diff_block(before, after, mask=MASK)

    assert rows(page) == [expected]
    assert "sesame" not in page


@settings(deadline=None)
@given(json_values, json_values)
def test_nothing_below_a_secret_is_ever_shown(before, after):
    before, after = (
        {"token": [value, {"sesame": value, "x": "sesame"}]} for value in (before, after)
    )

    for page in (
        diff_block(before, after, mask=MASK),
        diff_block([before], {"a": after}, mask=MASK),
        diff_block({}, after, mask=MASK),
    ):
        assert "sesame" not in page


def test_a_long_text_is_shown_as_the_lines_that_changed():
    lines = [f"line {number}" for number in range(30)]
    after = [*lines[:10], "another", *lines[11:]]

    page = diff_block({"a": "\n".join(lines)}, {"a": "\n".join(after)}, mask=NO_MASK)

    ((kind, path, text),) = rows(page)
    assert (kind, path) == ("~ changed", "a")
    assert "Lines: 1 added, 1 removed" in text
    assert "… 7 lines the same line 7 line 8 line 9 − line 10 + another line 11" in text  # noqa: RUF001
    assert "line 6" not in page


def test_the_first_long_texts_are_open():
    before, after = ({str(number): f"{number}\n{end}" for number in range(9)} for end in "xy")

    page = diff_block(before, after, mask=NO_MASK)

    assert page.count("<details>") == 6
    assert page.count("<details open>") == 3


def test_a_text_that_grew_shows_what_was_added_to_its_long_line():
    before = "x" * 100_000

    page = diff_block({"a": before}, {"a": before + " and the end"}, mask=NO_MASK)

    assert "and the end" in page
    assert len(page) < 5000


def test_texts_beyond_what_a_page_holds_are_cut_to_where_they_differ():
    before, after = (
        {
            **{str(number): f"\n{end * 600}" * 200 for number in range(2)},
            "last": "b" * 1000 + f" the end is {end}",
        }
        for end in "xy"
    )

    row = rows(diff_block(before, after, mask=NO_MASK))[-1]

    assert row[1] == "last"
    assert [cell[-14:] for cell in row[2:]] == [' the end is x"', ' the end is y"']


def test_long_values_are_cut():
    page = diff_block({}, {"a": "x" * 1000, "k" * 1000: 1}, mask=NO_MASK)

    assert max(map(len, re.findall("x+", page))) < 301
    assert max(map(len, re.findall("k+", page))) < 201


def test_a_page_is_bounded_however_much_changed():
    before, after = (
        [{"text": "\n".join(f"{end} {number} " + "&" * 600 for number in range(300))}] * 500
        for end in "xy"
    )

    assert len(diff_block(before, after, mask=NO_MASK)) < 2_000_000


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"\ud800": "\udfff", "b": {"\ud800": ["\udfff"]}}),
        ({"a": "x\n\ud800"}, {"a": "\udfff\ny" * 200}),
        ({"a": "x" * 250 + "\ud83d"}, {"a": "x" * 250 + "\ud83d\ude00"}),
        ({"token": "\ud800"}, {"token": "\udfff"}),
        ({"\ud800": {"token": "\ud800"}}, {"\ud800": {"token": "\udfff"}}),
    ],
)
def test_lone_surrogates_do_not_break_the_page(before, after):
    diff_block(before, after, mask=MASK).encode()


def test_control_characters_are_made_visible():
    page = diff_block({"a": "a\r\n\0"}, {"a": "a\n\x1b\x7f"}, mask=NO_MASK)

    assert not re.search(r"[\0\r\x1b\x7f]", page)
    for picture in "␍␀␛␡":
        assert picture in page


@settings(deadline=None)
@given(json_values, json_values)
def test_any_two_values_have_a_table(before, after):
    diff_block(before, after, mask=MASK).encode()


def test_values_that_are_nested_deeply_have_a_table():
    before, after = 1, 2
    for _ in range(5000):
        before, after = {"a": before}, {"a": after}

    page = diff_block(before, after, mask=MASK)

    assert rows(page)[0][2:] == ["1", "2"]
    assert len(page) < 5000


def test_a_value_that_python_cannot_write_is_said_to_be_nested_too_deeply():
    deep = 1
    for _ in range(100_000):
        deep = [deep]

    assert rows(diff_block({}, {"a": deep}, mask=MASK)) == [
        ["+ added", "a", "", "nested too deeply to be shown"]
    ]

"""JSON values as trees that fold: what is shown, what is not, and that it is HTML."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from django.contrib.staticfiles import finders
from django.utils import translation
from django.utils.safestring import SafeString
from hypothesis import given

from workflow_storage.admin import trees
from workflow_storage.admin.masking import MASKED, NO_MASK, Mask
from workflow_storage.admin.rendering import NOTHING
from workflow_storage.admin.trees import json_tree
from workflow_storage.testing.values import AWKWARD_VALUES, json_values, nested

SECRETS = Mask(["token", "api key"])
ATTRIBUTES = {
    "class",
    "data-path",
    "dir",
    "open",
    "role",
    "tabindex",
    "aria-label",
    "title",
    "href",
}


class Page(HTMLParser):
    """The elements of a tree: (tag, attributes, text of its own and of all that is in it)."""

    def __init__(self, html):
        super().__init__()
        self.elements = []
        self._open = []
        self.feed(html)
        self.close()
        assert not self._open, "an element is not closed"

    def handle_starttag(self, tag, attrs):
        element = (tag, dict(attrs), [])
        self.elements.append(element)
        self._open.append(element)

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        for _tag, _attributes, text in self._open:
            text.append(data)

    def having(self, **attributes):
        return [
            (tag, found, "".join(text))
            for tag, found, text in self.elements
            if all(found.get(name) == value for name, value in attributes.items())
        ]

    def texts(self, kind):
        return [
            text for _tag, _found, text in self.having(**{"class": f"workflow-storage-tree-{kind}"})
        ]

    def row(self, path):
        ((_tag, _attributes, text),) = self.having(**{"data-path": path})
        return text

    def paths(self):
        return [found["data-path"] for _tag, found, _text in self.elements if "data-path" in found]


def tree(value, **options):
    html = json_tree(value, **{"mask": NO_MASK, **options})
    assert isinstance(html, SafeString)
    html.encode()
    return Page(html)


def deep_down(value):
    """Return a value so deep in lists that it does not fold."""
    for _ in range(trees.MAX_DEPTH + 5):
        value = [value]
    return value


def test_a_dict_is_shown_with_its_keys_and_values():
    page = tree({"name": "Ada", "age": 36, "ok": True, "nothing": None, "list": [], "dict": {}})

    assert page.row("name") == 'name: "Ada"'
    assert page.row("age") == "age: 36"
    assert page.row("ok") == "ok: true"
    assert page.row("nothing") == "nothing: null"
    assert page.row("list") == "list: []"
    assert page.row("dict") == "dict: {}"


def test_scalars_have_a_class_by_their_type():
    page = tree({"a": "text", "b": 1.5, "c": False, "d": None, "e": []})

    assert page.texts("string") == ['"text"']
    assert page.texts("number") == ["1.5"]
    assert page.texts("boolean") == ["false"]
    assert page.texts("null") == ["null"]
    assert page.texts("empty") == ["[]"]


def test_a_row_says_its_path():
    page = tree({"messages": [{"content": "x"}], "odd key": {'a"b': 1}, "": 2})

    assert page.paths() == [
        "",
        "messages",
        "messages[0]",
        "messages[0].content",
        '["odd key"]',
        '["odd key"]["a\\"b"]',
        '[""]',
    ]


def test_the_top_level_is_open_and_what_is_deeper_is_folded():
    page = tree({"a": {"b": [1]}})

    folds = [found for tag, found, _text in page.elements if tag == "details"]

    assert ["open" in found for found in folds] == [True, False, False]


def test_what_is_folded_says_how_much_it_holds_and_how_it_begins():
    page = tree(
        {"messages": [{"role": "user"}] * 12, "one": [1], "three": {"a": 1, "b": 2, "c": 3}}
    )

    summaries = [text for tag, _found, text in page.having() if tag == "summary"]

    assert summaries[0].startswith("{3 keys}")
    assert summaries[1].startswith('messages: [12 items] [{"role": "user"}, {"role":')
    assert summaries[1].endswith("…")
    assert "one: [1 item] [1]" in summaries
    assert 'three: {3 keys} {"a": 1, "b": 2, "c": 3}' in summaries


def test_a_name_is_shown_and_read_out():
    page = tree({"a": 1}, name="inputs <1>")

    assert page.row("").startswith("inputs <1>: {1 key}")
    assert page.having(**{"aria-label": "inputs <1>"})


def test_what_scrolls_can_be_focused_and_has_a_label():
    ((_tag, found, _text),) = tree([1]).having(**{"class": "workflow-storage-tree"})

    assert found["tabindex"] == "0"
    assert found["aria-label"] == "JSON"
    assert found["role"] == "group"


@pytest.mark.parametrize("text", ["two\nlines", "\n\nfirst", "old\r\nline", "x" * 201])
def test_a_long_text_is_a_block_that_keeps_its_line_breaks(text):
    (block,) = tree({"text": text}).texts("text")

    # The first line break in a <pre> is not shown.
    assert block == f"\n{text}"


def test_a_text_of_200_characters_stays_in_its_line():
    page = tree({"text": "x" * 200})

    assert page.texts("string") == [f'"{"x" * 200}"']
    assert not page.texts("text")


def test_none_is_nothing():
    assert json_tree(None, mask=NO_MASK) == NOTHING


def test_a_bare_value_is_shown():
    assert tree("text").row("") == '"text"'
    assert tree(0).row("") == "0"
    assert tree([]).row("") == "[]"


MARKUP = "</pre><script>alert('&amp;')</script>"


@pytest.mark.parametrize(
    "value",
    [
        MARKUP,
        {MARKUP: MARKUP},
        [MARKUP * 20],
        {MARKUP: {MARKUP: [f"{MARKUP}\n"]}},
        {'" onclick="alert(1)': 1},
    ],
)
def test_markup_stays_text(value):
    page = tree([value, *range(2_000)], name=MARKUP, download_url=f"/{MARKUP}")

    assert {tag for tag, _found, _text in page.elements} <= {
        *("div", "details", "summary", "ul", "li", "span", "pre", "p", "a")
    }
    assert {name for _tag, found, _text in page.elements for name in found} <= ATTRIBUTES
    assert "<script>" not in json_tree(value, mask=NO_MASK)


def test_markup_is_shown_as_it_is():
    page = tree({"<b>": "<i>&lt;</i>", "long": "<p>\n</p>"})

    assert page.row('["<b>"]') == '"<b>": "<i>&lt;</i>"'
    assert page.texts("text") == ["\n<p>\n</p>"]


@pytest.mark.parametrize("value", AWKWARD_VALUES, ids=repr)
def test_an_awkward_value_is_shown(value):
    page = tree({"value": value, "list": [value, f"{value}\n"]})

    assert {name for _tag, found, _text in page.elements for name in found} <= ATTRIBUTES


@given(json_values)
def test_any_value_is_shown(value):
    html = json_tree(value, mask=SECRETS)

    Page(html)
    assert not re.search("[\0-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff]", html)


@pytest.mark.parametrize("text", ["\0", "\x1b", "\ud800", "a\udfff", "\ude00\ud83d"], ids=ascii)
def test_what_no_page_can_hold_is_escaped_as_in_json(text):
    escaped = json.dumps(text)[1:-1]

    page = tree({"short": text, "long": f"{text}\n", text: 1}, name=text)

    assert page.row("short") == f'short: "{escaped}"'
    assert page.texts("text") == [f"\n{escaped}\n"]
    assert page.row(f'["{escaped}"]') == f'"{escaped}": 1'
    assert page.having(**{"aria-label": escaped})


def test_text_outside_ascii_is_shown_as_it_is():
    page = tree({"中文": "日本語 \N{GRINNING FACE}"})

    assert page.row("中文") == '中文: "日本語 \N{GRINNING FACE}"'


def test_a_secret_is_not_shown_at_any_depth():
    value = {
        "token": "s3cret",
        "list": [[{"apiKey": {"deep": "s3cret"}}]],
        "total_tokens": 12,
    }

    html = json_tree(value, mask=SECRETS)
    page = Page(html)

    assert "s3cret" not in html
    assert page.row("token") == f"token: {MASKED}"
    assert page.row("list[0][0].apiKey") == f"apiKey: {MASKED}"
    assert page.row("total_tokens") == "total_tokens: 12"
    assert {found["title"] for _tag, found, _text in page.elements if "title" in found} == {
        "hidden"
    }


def test_a_secret_is_not_shown_where_it_is_too_deep_to_fold():
    html = json_tree(deep_down({"token": "s3cret", "shown": 1}), mask=SECRETS)

    assert "s3cret" not in html
    assert f'"token": {MASKED}, "shown": 1' in Page(html).texts("deep")[0]


def test_the_size_of_a_secret_is_not_told():
    value = {"token": ["x" * 777] * 77, "rows": list(range(trees.MAX_MEMBERS + 1))}

    page = tree(value, mask=SECRETS)

    (note, _left_out) = page.texts("note")
    assert note == (
        f"Values shown: 1,003 of {trees.MAX_MEMBERS + 4:,}. Characters of text in all: 9."
    )


def test_what_is_too_deep_to_fold_is_json_text():
    value = nested(trees.MAX_DEPTH + 2)

    page = tree(value)

    assert page.texts("deep") == ['\n{"a": {"a": {}}}']
    assert len(page.paths()) == trees.MAX_DEPTH + 1
    assert not page.texts("note")


def test_any_depth_is_shown():
    lists = []
    for _ in range(5_000):
        lists = [lists]

    assert '{"a": {"a": ' in tree(nested(5_000)).texts("deep")[0]
    assert "[[[[" in tree(lists).texts("deep")[0]


def test_no_more_than_the_largest_number_of_rows_is_shown():
    value = {"rows": [{"a": 1, "b": [1, 2], "c": "text"} for _ in range(2_000)]}

    page = tree(value, download_url="/all?a=1&b=2")

    assert len(page.paths()) == trees.MAX_ROWS
    assert page.texts("note")[0] == (
        "Values shown: 5,000 of 12,002. Characters of text in all: 14,004. Download all of it"
    )
    assert page.having(href="/all?a=1&b=2")


def test_no_link_is_shown_without_an_address():
    page = tree(list(range(trees.MAX_MEMBERS + 1)))

    assert page.texts("note")
    assert not [tag for tag, _found, _text in page.elements if tag == "a"]


def test_a_list_with_more_than_its_share_says_how_many_are_left_out():
    page = tree({"long": list(range(trees.MAX_MEMBERS + 1_234)), "after": {"still": "here"}})

    assert page.texts("note")[1:] == ["1,234 more"]
    assert page.row("after.still") == 'still: "here"'


def test_what_fits_has_no_note():
    page = tree({"rows": list(range(trees.MAX_MEMBERS))}, download_url="/all")

    assert not page.texts("note")


def test_the_first_levels_are_shown_whatever_is_in_them():
    value = {f"list-{number}": [[number] * 10] * 900 for number in range(20)}
    value["result"] = "done"

    page = tree(value)

    assert page.row("result") == 'result: "done"'
    assert page.row('["list-19"]')


def test_a_text_that_is_too_long_is_cut_and_says_so():
    page = tree({"text": "x" * (trees.MAX_CHARACTERS + 1), "result": "done"}, download_url="/all")

    (block,) = page.texts("text")
    assert trees.MAX_CHARACTERS - 1_000 < len(block) <= trees.MAX_CHARACTERS
    assert page.texts("note") == [
        "Values shown: 3 of 3. Characters of text in all: 2,000,015. Download all of it",
        f"The first {len(block) - 1:,} of 2,000,001 characters.",
    ]
    assert page.row("result") == 'result: "done"'


@pytest.mark.parametrize(
    "value",
    [
        ["'" * 1_500_000] * 2,
        {"&" * 1_500_000: 1, "result": 2},
        ["\0" * 500_000, "\ud800" * 500_000],
        {"k" * 10_000: {"k" * 10_000: {str(number): number for number in range(900)}}},
        [["x" * 199] * 900 for _ in range(20)],
        [{"k" * 3_000: 1} for _ in range(900)],
        deep_down([["'" * 1_000] * 1_500]),
    ],
    ids=["quotes", "key", "control", "paths", "lines", "keys", "deep"],
)
def test_no_more_than_the_largest_number_of_characters_is_shown(value):
    html = json_tree(value, mask=SECRETS)

    page = Page(html)
    markup = 400 * len(page.paths())
    assert len(html) < trees.MAX_CHARACTERS + markup + 2_000
    assert page.texts("note")


def test_numbers_are_written_as_in_the_language_of_the_user():
    with translation.override("de"):
        page = tree(list(range(trees.MAX_MEMBERS + 1_234)))

    assert "2.235" in page.texts("note")[0]
    assert "1.234" in page.texts("note")[1]
    assert "2.234" in page.texts("size")[0]


def test_a_value_is_read_only():
    value = {"rows": [{"token": "x"}] * 3}

    json_tree(value, mask=SECRETS)

    assert value == {"rows": [{"token": "x"}] * 3}


def test_the_style_is_there_for_every_class():
    style = Path(finders.find("workflow_storage/trees.css")).read_text()

    page = tree(
        {
            "t": "x\n",
            "s": "",
            "n": 1,
            "b": True,
            "e": [],
            "x": None,
            "token": 1,
            "deep": nested(70),
        },
        mask=SECRETS,
    )

    classes = {found["class"] for _tag, found, _text in page.elements if "class" in found}
    assert all(f".{name}" in style for name in classes - {"workflow-storage-tree-row"})

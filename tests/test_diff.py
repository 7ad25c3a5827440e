"""What changed between two values, exactly."""

import copy
import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workflow_storage.diff import (
    Change,
    TextLine,
    diff,
    path_text,
    text_difference,
    text_lines,
)
from workflow_storage.testing.values import any_text, in_json, json_values

nested_dicts = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.sampled_from([0.0, -0.0, 1.0, "1", "", []]),
    lambda children: st.dictionaries(st.sampled_from("abcd"), children, max_size=4),
    max_leaves=12,
)
few_items = st.lists(st.sampled_from([0, 1, 1.0, True, None, "a", "b", "c"]), max_size=30)
similar_values = st.recursive(
    st.sampled_from([0, 1, 1.0, -0.0, True, None, "a"]),
    lambda children: (
        st.lists(children, max_size=4) | st.dictionaries(st.sampled_from("ab"), children)
    ),
    max_leaves=20,
)


def canonical(value):
    return json.dumps(value, sort_keys=True)


def applied(changes, value):
    """Return a value of dicts with changes made to it."""
    top = {"": copy.deepcopy(value)}
    for change in changes:
        *way, last = ("", *change.path)
        place = top
        for key in way:
            place = place[key]
        if change.kind == "removed":
            assert in_json(place.pop(last)) == in_json(change.before)
        else:
            assert (last in place) == (change.kind == "changed")
            place[last] = change.after
    return top[""]


def at(path, value):
    for step in path:
        value = value[step]
    return value


@settings(deadline=None)
@given(json_values)
def test_a_value_does_not_differ_from_its_copy(value):
    assert diff(value, value) == ([], True)
    assert diff(value, copy.deepcopy(value)) == ([], True)


@settings(deadline=None)
@given(nested_dicts, nested_dicts)
def test_the_changes_of_dicts_make_one_of_the_other(before, after):
    changes, is_complete = diff(before, after)

    assert is_complete
    assert canonical(applied(changes, before)) == canonical(after)


@settings(deadline=None)
@given(similar_values, similar_values)
def test_there_are_no_changes_only_where_the_json_is_the_same(before, after):
    assert (diff(before, after).changes == []) == (canonical(before) == canonical(after))


@settings(deadline=None)
@given(similar_values, similar_values)
def test_the_paths_of_changes_lead_to_their_values(before, after):
    for change in diff(before, after).changes:
        if change.kind != "removed":
            assert in_json(at(change.path, after)) == in_json(change.after)
        if change.kind == "changed":
            assert in_json(change.before) != in_json(change.after)


@settings(deadline=None)
@given(few_items, few_items)
def test_the_changes_of_lists_are_in_place_and_leave_the_same_items_in_order(before, after):
    changes = diff(before, after).changes

    kept = list(before)
    for change in changes:
        if change.kind == "removed":
            assert in_json(before[change.path[0]]) == in_json(change.before)
    for index in sorted((c.path[0] for c in changes if c.kind == "removed"), reverse=True):
        del kept[index]
    for change in changes:
        if change.kind == "added":
            kept.insert(change.path[0], change.after)
        elif change.kind == "changed":
            # Its index is that in `after`, where all that was added before it is there already.
            assert in_json(kept[change.path[0]]) == in_json(change.before)
            kept[change.path[0]] = change.after
    assert in_json(kept) == in_json(after)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (1, 1.0),
        (1, True),
        (0, False),
        (1.0, True),
        (0.0, -0.0),
        (None, False),
        ("1", 1),
        ("", None),
        ([], {}),
        ([], ""),
        (10**40, 1e40),
    ],
)
def test_values_of_other_types_differ(before, after):
    for path, wrap in [
        ((), lambda value: value),
        (("a",), lambda value: {"a": value}),
        ((0,), lambda value: [value]),
        ((1,), lambda value: ["x", value, "y"]),
    ]:
        changes = diff(wrap(before), wrap(after)).changes

        assert in_json(changes) == in_json([Change(path, "changed", before, after)])


def test_the_order_of_keys_does_not_matter():
    assert diff({"a": [{"b": 1, "c": 2}]}, {"a": [{"c": 2, "b": 1}]}).changes == []


MESSAGES = [{"role": "user", "content": f"message {number}"} for number in range(2000)]


@pytest.mark.parametrize("place", [0, 1, 1000, 2000])
def test_an_inserted_item_is_one_added_item(place):
    item = {"role": "system"}
    longer = [*MESSAGES[:place], item, *MESSAGES[place:]]

    assert diff(MESSAGES, longer).changes == [Change((place,), "added", None, item)]
    assert diff(longer, MESSAGES).changes == [Change((place,), "removed", item, None)]


def test_a_trimmed_head_and_a_new_tail_are_removed_and_added_items():
    changes = diff({"m": MESSAGES}, {"m": [*MESSAGES[3:], "new"]}).changes

    assert changes == [
        *(Change(("m", place), "removed", MESSAGES[place], None) for place in range(3)),
        Change(("m", 1997), "added", None, "new"),
    ]


def test_a_change_within_an_item_is_found_beside_inserted_and_removed_ones():
    changed = {**MESSAGES[1000], "content": "other"}
    after = ["head", *MESSAGES[:1000], changed, *MESSAGES[1001:1500], *MESSAGES[1501:]]

    assert diff(MESSAGES, after).changes == [
        Change((0,), "added", None, "head"),
        Change((1001, "content"), "changed", "message 1000", "other"),
        Change((1500,), "removed", MESSAGES[1500], None),
    ]


def test_an_item_inserted_among_items_that_are_all_alike_is_one_added_item():
    before = ["a", "b"] * 80

    changes = diff(before, [*before[:33], "b", *before[33:90], *before[91:]]).changes

    assert [change.kind for change in changes] == ["added", "removed"]


def test_items_that_all_changed_are_compared_place_by_place():
    after = [{**message, "seen": True} for message in MESSAGES]

    changes = diff(MESSAGES, after, limit=5000).changes

    assert changes == [Change((place, "seen"), "added", None, True) for place in range(2000)]


def test_items_that_are_too_many_to_align_are_changed_only_where_they_differ():
    before = [number * number % 7 for number in range(1, 700)]
    after = [*map(str, before[:1]), *before[1:-1][::2], *before[1:-1][1::2], "end"]

    changes = diff(before, after).changes

    assert changes == [
        Change((place,), "changed", old, new)
        for place, (old, new) in enumerate(zip(before, after, strict=True))
        if old != new
    ]
    assert len(changes) < len(before)


def test_more_changes_than_the_limit_are_left_out():
    before, after = dict.fromkeys(map(str, range(10)), 1), dict.fromkeys(map(str, range(10)), 2)

    assert diff(before, after, limit=10) == (diff(before, after).changes, True)
    assert diff(before, after, limit=9) == (diff(before, after).changes[:9], False)
    assert diff(before, after, limit=0) == ([], False)


@pytest.mark.parametrize(
    ("wrap", "step"),
    [(lambda value: {"a": value}, "a"), (lambda value: [value], 0)],
    ids=["dicts", "lists"],
)
def test_nesting_has_no_bound(wrap, step):
    before, same, after = 1, 1, 2
    for _ in range(5000):
        before, same, after = wrap(before), wrap(same), wrap(after)

    assert diff(before, same).changes == []
    assert diff(before, after).changes == [Change((step,) * 5000, "changed", 1, 2)]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ((), ""),
        (("messages", 3, "content"), "messages[3].content"),
        ((0, 1, "a"), "[0][1].a"),
        (("größe", "_x1"), "größe._x1"),
        (("odd key", "1", ""), '["odd key"]["1"][""]'),
        (("a.b", 'say "x"\n'), '["a.b"]["say \\"x\\"\\n"]'),
        (("\ud800",), '["\\ud800"]'),
    ],
)
def test_a_path_reads_like_code(path, expected):
    assert path_text(path) == expected


@settings(deadline=None)
@given(st.lists(any_text | st.integers(min_value=0)))
def test_the_text_of_a_path_always_has_a_form_in_utf8(path):
    path_text(path).encode()


@settings(deadline=None)
@given(st.lists(st.sampled_from("abc")), st.lists(st.sampled_from("abc")), st.integers(0, 3))
def test_the_lines_of_a_difference_hold_both_texts(before, after, context):
    before, after = "\n".join(before), "\n".join(after)
    old, new = before.split("\n"), after.split("\n")

    rebuilt, rebuilt_new = [], []
    for line in text_lines(before, after, context=context):
        if line.kind == "gap":
            start = len(rebuilt)
            left_out = old[start : start + int(line.text)]
            assert len(left_out) > 1
            rebuilt += left_out
            rebuilt_new += left_out
        if line.kind in {"same", "removed"}:
            rebuilt.append(line.text)
        if line.kind in {"same", "added"}:
            rebuilt_new.append(line.text)

    assert (rebuilt, rebuilt_new) == ((old, new) if before != after else ([], []))


def test_lines_around_a_change_are_kept_and_the_others_become_a_gap():
    lines = [str(number) for number in range(20)]
    after = [*lines[:10], "new", *lines[11:]]

    assert text_lines("\n".join(lines), "\n".join(after), context=1) == [
        TextLine("gap", "9"),
        TextLine("same", "9"),
        TextLine("removed", "10"),
        TextLine("added", "new"),
        TextLine("same", "11"),
        TextLine("gap", "8"),
    ]


def test_a_changed_line_among_many_is_found():
    before = [f"line {number}" for number in range(50_000)]
    after = ["first", *before[:100], "other", *before[101:40_000], *before[40_001:]]

    kinds = [line.kind for line in text_lines("\n".join(before), "\n".join(after))]

    assert [kind for kind in kinds if kind not in {"same", "gap"}] == [
        "added",
        "removed",
        "added",
        "removed",
    ]


@given(
    before=st.lists(st.sampled_from("abcd"), max_size=30),
    after=st.lists(st.sampled_from("abcd"), max_size=30),
    limit=st.integers(0, 40),
)
def test_the_first_lines_of_a_difference_are_those_of_all(before, after, limit):
    before, after = "\n".join(before), "\n".join(after)
    lines = text_lines(before, after)

    found = text_difference(before, after, limit=limit)

    assert found.lines == lines[:limit]
    assert len(found.lines) + found.more == len(lines)
    kinds = Counter(line.kind for line in lines)
    assert (found.added, found.removed) == (kinds["added"], kinds["removed"])


def test_texts_of_very_many_lines_are_one_block_between_what_they_share():
    before = "\n".join(["head", *"ab" * 100_000, "foot"])
    after = "\n".join(["head", *"ba" * 100_000, "foot"])

    found = text_difference(before, after, limit=3)

    assert [line.kind for line in found.lines] == ["same", "removed", "removed"]
    assert (found.added, found.removed) == (200_000, 200_000)

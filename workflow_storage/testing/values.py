"""What the tests store: values that are awkward to store, and strategies that draw any.

Called by the parts of the contract, and by tests of whatever encodes or parses a value.
"""

from __future__ import annotations

import json
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

# The fixtures stay the same from example to example, on purpose: every example adds to
# the same store.
against_the_store = settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.differing_executors,
        HealthCheck.too_slow,
    ],
)

any_text = st.text(st.characters(exclude_categories=()), max_size=20)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**40), 10**40)
    | st.floats(allow_nan=False, allow_infinity=False)
    | any_text,
    lambda children: (
        st.lists(children, max_size=4) | st.dictionaries(any_text, children, max_size=4)
    ),
    max_leaves=12,
)
json_objects = st.dictionaries(any_text, json_values, max_size=5)
storable_text = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=36
)


class NotJSON:
    """Something that JSON has no form for, with a name that is the same in every process."""

    def __repr__(self) -> str:
        return "NotJSON"


NOT_JSON = NotJSON()

AWKWARD_VALUES = [
    "a bare string",
    "",
    0,
    False,
    [],
    {},
    1e23,
    -0.0,
    5e-324,
    1.7976931348623157e308,
    10**40,
    -(2**63) - 1,
    {"": {"": ""}},
    {"\0": "\0", "a\0b": ["\0\0"]},
    {"\ud800": "\udfff", "pair": "\ud83d\ude00", "reversed": "\ude00\ud83d"},
    {"text that looks escaped": ["\\u0000", "\\\\u0000", "\\ud800", "\\", "\\\0"]},
    {"emoji": "\N{GRINNING FACE}", "中文": "日本語", "line": "\u2028\x7f"},
    {"1": "one", "1.0": "two", "true": True, "null": None},
    ["'; DROP TABLE workflow_runs; --", "%s", "%(x)s", "{}", '"'],
]

# No two slices of it are alike.
_PROSE = "".join(chr(0x20 + number * number * number % 0x24F) for number in range(40_000))

StateChange = tuple[str, int, bool]
state_changes = st.tuples(
    st.sampled_from(["grow", "grow", "grow", "edit", "shrink", "replace", "clear"]),
    st.integers(0, 20_000),
    st.booleans(),
)


def changed_state(state: dict[str, Any], change: str, size: int) -> dict[str, Any]:
    """Return the next state of a run: one that grew, or changed otherwise.

    Args:
        state: the state before.
        change: one of grow, edit, shrink, replace and clear.
        size: how many characters a growing or replaced state gets.
    """
    prose = _PROSE[size : 2 * size]
    messages = list(state.get("messages", []))
    if change == "grow":
        return {**state, "messages": [*messages, prose]}
    if change == "edit" and messages:
        messages[len(messages) // 2] = prose[:100]
        return {**state, "messages": messages}
    if change == "shrink":
        return {**state, "messages": messages[: len(messages) // 2]}
    return {"other": prose} if change == "replace" else {}


def nested(depth: int) -> dict[str, Any]:
    """Return a dict that holds a dict that holds a dict, and so on."""
    value: dict[str, Any] = {}
    for _ in range(depth):
        value = {"a": value}
    return value


def in_json(value: object) -> str:
    """Return a value as JSON text: equal only for values equal type for type, in order."""
    return json.dumps(json.loads(json.dumps(value)))

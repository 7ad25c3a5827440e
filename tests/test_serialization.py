"""JSON text in and out, exactly."""

import collections
import dataclasses
import decimal
import enum
import json
import re
from typing import Annotated, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    RootModel,
    SecretStr,
    computed_field,
    field_serializer,
)

from workflow_storage.serialization import (
    StateTexts,
    dump_json,
    dump_state,
    is_deeper,
    load_json,
    load_rebuilt,
)
from workflow_storage.testing import json_values, nested


@given(json_values)
def test_any_value_comes_back_as_from_the_json_module(value):
    assert json.dumps(load_json(dump_json(value))) == json.dumps(json.loads(json.dumps(value)))


@given(json_values)
def test_any_state_comes_back_as_from_the_json_module(value):
    text = dump_state({"state": value})
    expected = json.dumps(json.loads(json.dumps({"state": value})))

    assert json.dumps(load_rebuilt(text)) == expected
    assert json.dumps(load_json(text)) == expected


PROSE = " a null, or :null, and [null] " * 1000


@given(st.lists(st.lists(st.one_of(json_values, st.sampled_from([PROSE, "null"])), max_size=5)))
def test_states_one_after_another_are_written_as_each_by_itself(sequence):
    texts, parts = StateTexts(), [PROSE]
    for added in sequence:
        parts = [*parts[: len(added)], *added, *parts[len(added) :]]
        state = {"parts": parts, "cost": 0.5}
        assert texts.dump(state) == dump_state(state)


@given(st.integers(0, 9), st.integers(1, 9), st.sampled_from([[], [None], [0.5, ("x",)]]))
def test_nan_in_one_of_several_states_is_refused_wherever_it_is(place, first_with, others):
    texts, messages = StateTexts(), [PROSE] * 10
    messages[0] = others
    for number in range(first_with):
        messages.append(f"{number} null")
        texts.dump({"messages": messages})
    before = list(messages)
    messages[place] = float("nan")

    for _ in range(2):
        with pytest.raises(ValueError, match="is nan"):
            texts.dump({"messages": messages})
        assert texts.dump({"messages": before}) == dump_state({"messages": before})


def test_a_null_that_takes_the_place_of_another_value_is_not_taken_for_nan_nor_nan_for_it():
    texts = StateTexts()
    for value, is_refused in [
        (["null"], False),
        ([1], False),
        ([float("nan")], True),
        ([None], False),
        ([float("nan")], True),
        ([0.5], False),
        ([float("inf")], True),
    ]:
        state = {"text": PROSE, "value": value, "more": PROSE}
        if is_refused:
            with pytest.raises(ValueError, match=r"is nan|is inf"):
                texts.dump(state)
        else:
            assert texts.dump(state) == dump_state(state)


def read_by(load, text):
    """Return what a reader makes of a text: the value with the types in it, or that it refuses."""
    try:
        return repr(load(text))
    except ValueError:
        return "refused"


@given(json_values, st.data())
def test_any_text_is_read_as_the_json_module_reads_it(value, data):
    text = json.dumps(value, ensure_ascii=data.draw(st.booleans()))
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, len(text)))
        put = data.draw(st.sampled_from([*'{}[],:"\\/019.eE+-NaIul \n\t\0\x1f\x7fé', "\\ud800"]))
        text = text[:at] + put + text[at + data.draw(st.integers(0, 2)) :]

    assert read_by(load_json, text) == read_by(json.loads, text)


@given(st.one_of(st.integers(), st.integers(2**62, 2**70), st.floats(), st.decimals()).map(str))
def test_any_number_is_read_as_the_json_module_reads_it(number):
    assert read_by(load_json, number) == read_by(json.loads, number)


class Colour(enum.Enum):
    RED = "r"


class Level(enum.IntEnum):
    HIGH = 3


class Word(str):
    pass


Pair = collections.namedtuple("Pair", "a b")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"n": None, "x": 10**40}, {"n": None, "x": 10**40}),
        ({"n": None, "t": (1, None)}, {"n": None, "t": [1, None]}),
        ({"n": "null"}, {"n": "null"}),
        ([Colour.RED, None], ["r", None]),
        ([Level.HIGH, Word("w"), Pair(1, 2)], [3, "w", [1, 2]]),
        (collections.OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
        (
            {2: "a", None: "b", True: "c", 1.5: "d"},
            {"2": "a", "null": "b", "true": "c", "1.5": "d"},
        ),
        ([2**63, 2**64 - 1, 2**64, -(2**63) - 1], [2**63, 2**64 - 1, 2**64, -(2**63) - 1]),
    ],
    ids=str,
)
def test_what_the_fast_writer_does_not_take_is_written_by_the_json_module(value, expected):
    assert load_json(dump_json(value)) == expected
    assert load_rebuilt(dump_state({"v": value})) == {"v": expected}


@dataclasses.dataclass
class Point:
    x: int


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), Point, b"x", {1}, object()], ids=type
)
def test_what_json_has_no_form_for_is_refused_beside_nulls_too(value):
    for document in (value, [None, value], {"null": None, "value": {"x": value}}):
        with pytest.raises((TypeError, ValueError)):
            dump_json(document)
        with pytest.raises((TypeError, ValueError)):
            dump_state({"v": document})


@given(json_values)
def test_the_text_is_utf8_without_nul(value):
    assert b"\0" not in dump_json(value).encode()


def test_text_outside_ascii_stays_readable():
    assert dump_json({"ключ": "\N{GRINNING FACE}"}) == '{"ключ":"\N{GRINNING FACE}"}'


class Reading(BaseModel):
    value: float


class Tool(BaseModel):
    name: str


class Search(Tool):
    engine: str
    weight: Annotated[float, PlainSerializer(lambda value: f"{value:.1f}")] = 1


class Agent(BaseModel):
    model_config = ConfigDict(arbitrary_types_allowed=True)

    tool: Tool
    tools: list[Tool] = []
    by_name: dict[str, Tool] = {}
    memory: Any = None


class Tools(RootModel[list[Tool]]):
    pass


@dataclasses.dataclass
class Plan:
    tool: Tool
    limit: decimal.Decimal = decimal.Decimal("1.10")


SEARCH = Search(name="s", engine="e")
SEARCHED = {"name": "s", "engine": "e", "weight": "1.0"}


@pytest.mark.parametrize("beside", [1, 10**40], ids=["by orjson", "by json"])
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (
            Agent(tool=SEARCH, tools=[SEARCH], by_name={"s": SEARCH}),
            {"tool": SEARCHED, "tools": [SEARCHED], "by_name": {"s": SEARCHED}, "memory": None},
        ),
        (Tools([SEARCH]), [SEARCHED]),
        (Plan(SEARCH), {"tool": SEARCHED, "limit": "1.10"}),
        (
            Agent(tool=SEARCH, memory={"nested": [Plan(SEARCH)]}),
            {
                "tool": SEARCHED,
                "tools": [],
                "by_name": {},
                "memory": {"nested": [{"tool": SEARCHED, "limit": "1.10"}]},
            },
        ),
    ],
    ids=["model", "root model", "dataclass", "model in a dict of a model"],
)
def test_models_and_dataclasses_keep_the_fields_of_the_classes_that_they_really_are(
    value, expected, beside
):
    assert load_json(dump_json({"value": [value, beside]})) == {"value": [expected, beside]}


class Login(BaseModel):
    user_name: str = Field(alias="userName")
    password: SecretStr


def test_aliases_and_secrets_come_back_as_the_docstring_says():
    read = load_json(dump_json(Login(userName="me", password="hush")))

    assert read == {"userName": "me", "password": "**********"}
    assert Login.model_validate(read).user_name == "me"


NAN, NUMBERS = float("nan"), "JSON has no such number: write None, or leave it out."
PAIRS = [(1, "1"), (None, "null"), (True, "true"), (False, "false"), (1.5, "1.5"), (1e23, "1e+23")]


@pytest.mark.parametrize("beside", [1, 10**40, "\ud800"], ids=ascii)
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_keys_that_are_one_in_json_are_refused_at_any_depth(pair, beside):
    for keys in (pair, pair[::-1]):
        colliding = dict.fromkeys(keys, 0)
        with pytest.raises(ValueError, match=re.escape(f"a[1].b has the keys {keys[0]!r} and ")):
            dump_json({"x": beside, "a": [0, {"b": colliding}]})
    assert load_json(dump_json([{pair[0]: 0}, {pair[1]: 0}])) == [{pair[1]: 0}] * 2


def test_keys_that_are_one_in_json_are_found_in_a_named_tuple():
    with pytest.raises(ValueError, match=re.escape("p[1] has the keys 1 and '1'")):
        dump_json({"p": Pair(1, {1: "one", "1": "other"})})


class Frozen(BaseModel, frozen=True):
    value: float


class Sets(BaseModel):
    tools: set[Frozen]

    @field_serializer("tools", when_used="json")
    def _tools(self, tools):
        return sorted(tool.value for tool in tools) or None


def test_models_in_sets_and_serializers_that_write_null_are_fine():
    class Plain(BaseModel):
        tools: set[Frozen]

    assert load_json(dump_json(Plain(tools={Frozen(value=1)}))) == {"tools": [{"value": 1}]}
    assert load_json(dump_json(Sets(tools=set()))) == {"tools": None}


def test_a_serializer_that_fails_is_named():
    class Broken(BaseModel):
        @computed_field
        def broken(self) -> int:
            raise KeyError("gone")

    with pytest.raises(TypeError, match=r"it is a .*Broken that pydantic cannot write: .*gone"):
        dump_json(Broken())


@pytest.mark.parametrize("pair", [(1, "1"), (None, "None"), (True, "true")], ids=str)
def test_keys_that_are_one_in_the_json_of_a_model_are_refused(pair):
    agent = Agent(tool=SEARCH, memory=[{"x": dict.fromkeys(pair, 0)}])
    with pytest.raises(ValueError, match=r"agents\[0\] holds a dict with the keys"):
        dump_json({"agents": [agent]})


@pytest.mark.parametrize("value", [NAN, float("inf"), [float("-inf")], {"x": (NAN,)}, {NAN}])
def test_nan_in_a_model_is_refused_like_any_other(value):
    with pytest.raises(ValueError, match="agent holds NaN or an infinity"):
        dump_json({"agent": Agent(tool=SEARCH, memory=value)})
    with pytest.raises(ValueError, match="reading"):
        dump_json({"reading": Reading(value=NAN)})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({1, 2}, "it is a set. Write sorted(value), or list(value)."),
        (
            {"messages": [0, {"tools": b"x"}]},
            "messages[1].tools is a bytes. Write base64.b64encode(value).decode(), or store it "
            "elsewhere and write where.",
        ),
        ({"n": np.arange(2)}, "n is a numpy.ndarray. Write value.tolist()."),
        ({"n": [np.int64(1)]}, "n[0] is a numpy.int64. Write value.tolist()."),
        (
            {"a b": {"c": object()}},
            "['a b'].c is a object. Convert it to dicts, lists, strings or numbers first.",
        ),
        ({"x": [NAN]}, f"x[0] is nan. {NUMBERS}"),
        ({"x": {1: decimal.Decimal("-Infinity")}}, f"x['1'] is -Infinity. {NUMBERS}"),
        (
            {"x": {("a", 1): 2}},
            "x has the key ('a', 1), which is a tuple. Use text, such as str(key).",
        ),
        ({"x": {NAN: 2}}, "x has the key nan, which has no JSON form. Use text, such as str(key)."),
        (
            {"agent": Agent(tool=SEARCH, memory=object())},
            "agent is a tests.test_serialization.Agent that pydantic cannot write: Unable to "
            "serialize unknown type: <class 'object'>",
        ),
    ],
    ids=lambda value: None if isinstance(value, str) else type(value).__name__,
)
def test_what_has_no_json_form_is_named_by_path_and_type_with_advice(value, message):
    for dump in (dump_json, dump_state):
        with pytest.raises((TypeError, ValueError)) as error:
            dump(value)
        assert str(error.value) == message


def test_a_value_that_holds_itself_is_refused():
    value = {}
    value["itself"] = [value]
    with pytest.raises(ValueError, match="Circular"):
        dump_json(value)


def test_too_deep_a_value_is_a_value_error():
    with pytest.raises(ValueError, match="nested too deeply"):
        dump_json(nested(500_000))
    with pytest.raises(ValueError, match="nested too deeply"):
        load_json("[" * 500_000 + "]" * 500_000)


@given(json_values, st.integers(1, 4))
def test_the_depth_of_a_text_is_that_of_its_lists_and_dicts(value, levels):
    def depth(value):
        if isinstance(value, dict):
            return 1 + max(map(depth, value.values()), default=0)
        return 1 + max(map(depth, value), default=0) if isinstance(value, list) else 0

    assert is_deeper(dump_json(value), levels) == (depth(value) > levels)

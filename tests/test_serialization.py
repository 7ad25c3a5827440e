"""JSON text in and out, exactly."""

import collections
import dataclasses
import enum
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from workflow_storage.serialization import dump_json, dump_state, load_json, load_rebuilt
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
    "value", [float("nan"), float("inf"), Point(1), b"x", {1}, object()], ids=type
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


def test_nan_in_a_model_is_refused_like_any_other():
    with pytest.raises(ValueError, match="Out of range float"):
        dump_json({"reading": Reading(value=float("nan"))})


def test_too_deep_a_value_is_a_value_error():
    with pytest.raises(ValueError, match="nested too deeply"):
        dump_json(nested(500_000))
    with pytest.raises(ValueError, match="nested too deeply"):
        load_json("[" * 500_000 + "]" * 500_000)

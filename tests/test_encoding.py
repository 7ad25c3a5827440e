"""JSON text in and out, exactly."""

import collections
import dataclasses
import enum
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from workflow_storage.encoding import (
    apply_delta,
    base_step,
    chain_steps,
    decode_state,
    dump_json,
    dump_state,
    encode_state,
    is_delta,
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


def read_by(load, text):
    """Give what a reader makes of a text: the value with the types in it, or that it refuses."""
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


states = st.one_of(
    st.binary(max_size=1),
    st.binary(max_size=20_000),
    st.tuples(st.binary(min_size=1, max_size=40), st.integers(1, 2000)).map(
        lambda repeated: repeated[0] * repeated[1]
    ),
).filter(lambda state: not is_delta(state))


@given(st.lists(states, min_size=1, max_size=40))
def test_any_sequence_of_states_rebuilds_exactly_at_every_step(sequence):
    check_sequence(sequence)


@given(st.lists(st.binary(min_size=100, max_size=3000), min_size=1, max_size=40))
def test_growing_and_shrinking_states_rebuild_exactly_at_every_step(parts):
    growing = [b"{" * 5000 + b"".join(parts[: end + 1]) for end in range(len(parts))]
    stored = check_sequence(growing + growing[::-1])

    assert sum(is_delta(state) for state in stored.values()) > len(stored) // 2 - 2


def check_sequence(sequence):
    stored = {}
    for step, state in enumerate(sequence):
        base = sequence[base_step(step)] if step else None
        stored[step] = encode_state(state, base)
        assert len(stored[step]) <= len(state)
    for step, state in enumerate(sequence):
        needed = {link: stored[link] for link in chain_steps(step)}
        assert decode_state(needed, step) == state
    return stored


@pytest.mark.parametrize("size", [700_000, 3_000_000, 20_000_000])
def test_large_states_rebuild_exactly_from_small_deltas(size):
    text = random.Random(1).randbytes(size // 2).hex().encode()
    sequence = [text, text + b"appended", text[: size // 3] + b"in between" + text[size // 3 :]]

    stored = check_sequence([*sequence, b"", sequence[1]])

    assert max(len(stored[1]), len(stored[2])) < size / 1000


@given(st.integers(0, 10**6))
def test_a_chain_is_short_and_ends_at_zero(step):
    chain = chain_steps(step)

    assert chain[-1] == 0
    assert len(chain) == step.bit_count() + 1
    assert chain == sorted(set(chain), reverse=True)


BASE = json.dumps({"messages": [f"message {number}" for number in range(1000)]}).encode()
DELTA = encode_state(BASE[:-2] + b', "one more"]}', BASE)


@given(st.integers(0, len(DELTA) * 8 - 1))
def test_a_flipped_bit_never_gives_a_wrong_state(bit):
    damaged = bytearray(DELTA)
    damaged[bit // 8] ^= 1 << (bit % 8)
    assert is_delta(DELTA)

    try:
        state = apply_delta(bytes(damaged), BASE)
    except ValueError:
        return
    assert state == apply_delta(DELTA, BASE)  # a bit that the format reserves


GROWING = [
    json.dumps({"messages": [f"message {n}" for n in range(900 + 50 * step)]}).encode()
    for step in range(8)
]
CHAIN = {
    step: encode_state(GROWING[step], GROWING[base_step(step)] if step else None)
    for step in chain_steps(7)
}


@given(st.sampled_from(sorted(CHAIN)), st.integers(min_value=0), st.integers(0, 7))
def test_a_flipped_bit_in_a_chain_never_gives_a_wrong_state(step, position, bit):
    damaged = bytearray(CHAIN[step])
    # Without the magic number it would be taken for text, and refused when it is read as JSON.
    damaged[4 + position % (len(damaged) - 4)] ^= 1 << bit
    assert is_delta(CHAIN[7])
    assert decode_state(CHAIN, 7) == GROWING[7]

    try:
        state = decode_state({**CHAIN, step: bytes(damaged)}, 7)
    except ValueError:
        return
    # A bit that the format reserves, or one of a checksum that another one stands in for.
    assert state == GROWING[7]


def test_a_delta_that_is_cut_extended_or_on_another_base_is_refused():
    for damaged in (DELTA[:-1], DELTA[:10], b"", DELTA + b"x", DELTA + DELTA):
        with pytest.raises(ValueError, match="damaged"):
            apply_delta(damaged, BASE)
    with pytest.raises(ValueError, match="damaged"):
        apply_delta(DELTA, BASE.replace(b"message 5", b"massage 5"))


def test_a_chain_with_a_missing_link_is_refused():
    with pytest.raises(ValueError, match="step 4, which it is based on, is missing"):
        decode_state({6: DELTA, 0: BASE}, 6)
    with pytest.raises(ValueError, match="nothing to be based on"):
        decode_state({0: DELTA}, 0)


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

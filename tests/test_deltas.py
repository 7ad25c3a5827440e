"""States as differences to earlier ones, exactly."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workflow_storage.deltas import (
    Chain,
    Link,
    apply_delta,
    base_step,
    chain_steps,
    decode_state,
    encode_state,
    is_delta,
)

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


edits = st.tuples(st.integers(0, 400), st.integers(0, 400), st.binary(max_size=600))
"""How far from its end a text is cut, how much is taken away there, and what comes in."""


@given(st.lists(edits, max_size=40), st.sets(st.integers(0, 39)))
def test_a_chain_encodes_what_rebuilds_exactly_also_after_it_was_loaded(changes, loaded):
    chain, text = Chain("1"), b"{" * 20_000
    stored, texts = {}, {}
    for step, (from_end, taken, new) in enumerate(changes):
        cut = max(1, len(text) - from_end)
        text = text[:cut] + new + text[cut + taken :]
        if step in loaded:
            links = [link for link in reversed(chain_steps(base_step(step))) if link in stored]
            chain.load(step, [Link(link, stored[link], link) for link in links])
        stored[step] = chain.encode(text, step)[0]
        chain.remember(step, text, step)
        texts[step] = text
        assert decode_state({link: stored[link] for link in chain_steps(step)}, step) == text


def test_a_chain_that_begins_anew_has_no_checksum_of_what_was_there_before():
    chain = Chain("1")
    for step in range(4):
        text = b"{" * (10_000 + step)
        chain.encode(text, step)
        chain.remember(step, text, step)
    for step in (0, 1, 2):
        chain.remember(step, b"[" * (10_000 + step), step)

    text = b"[" * 10_003

    assert apply_delta(chain.encode(text, 3)[0], b"[" * 10_002) == text


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
    # Without its mark it would be taken for text, and refused when it is read as JSON.
    damaged[1 + position % (len(damaged) - 1)] ^= 1 << bit
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

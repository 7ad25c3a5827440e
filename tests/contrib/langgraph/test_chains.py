"""How values are packed, and what they are based on; pure."""

import itertools
import os
import signal
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langgraph.checkpoint.serde.encrypted import EncryptedSerializer
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer

from workflow_storage.contrib.langgraph.chains import (
    HELD,
    Head,
    Link,
    Memory,
    Remembered,
    Row,
    Texts,
    base_position,
    is_needed,
    new_head,
)
from workflow_storage.contrib.langgraph.packing import Packing, Stored, Typed

PLAIN = JsonPlusSerializer()
ENCRYPTED = EncryptedSerializer.from_pycryptodome_aes(key=b"sixteen byte key")


def test_what_the_next_value_is_based_on_is_remembered_and_near():
    remembered, depths = {0}, {0: 0}
    for position in range(1, 5000):
        base = base_position(position)
        assert base in remembered
        depths[position] = depths[base] + 1
        remembered = {one for one in {*remembered, position} if is_needed(one, position)}
        assert len(remembered) <= 5

    assert max(depths[position] for position in range(257)) == 30
    assert max(depths[position] for position in range(4097)) == 45


def stored_all(packing, values):
    """Store values one after the other as a saver does; return the rows, and the last head."""
    rows, head = {}, None
    for key, value in enumerate(values, start=1):
        typed = packing.typed(value)
        stored, base_id, position = None, None, 0
        if head is not None:
            position = head.position + 1
            base = head.links[base_position(position)]
            stored, base_id = packing.delta(typed, base.plain), base.blob_id
        if stored is None:
            stored, base_id, position = packing.whole(typed), None, 0
        rows[key] = Row(base_id, position, stored)
        if position:
            head = head.followed_by(key, str(key), position, typed.plain)
        else:
            head = new_head(key, str(key), typed.plain)
    return rows, head


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@pytest.mark.parametrize("serde", [PLAIN, ENCRYPTED], ids=["plain", "encrypted"])
@given(values=st.lists(VALUES, min_size=1, max_size=5), times=st.integers(1, 40))
@settings(max_examples=30, deadline=None)
def test_values_come_back_whatever_they_are_based_on(serde, values, times):
    packing = Packing(serde)
    # Some that grow, some that shrink, and some that have nothing in common.
    several = [[value] * (number % 7 * times) for number, value in enumerate(values * 8)]

    rows, head = stored_all(packing, several)

    texts = Texts(rows, packing)
    order = [*[*rows][::3], *reversed(rows)]
    for key in order:
        assert packing.value(texts.typed(key)) == several[key - 1]
    assert Texts(rows, packing).head(head.blob_id, head.version) == head


@given(data=st.binary(max_size=400))
@settings(max_examples=200, deadline=None)
def test_bytes_that_are_no_stored_value_are_refused(data):
    packing = Packing(PLAIN)
    for read in (
        lambda: packing.opened(Stored("bytes", data)),
        lambda: packing.rebuilt([Stored("bytes", data)], b"x" * 300),
    ):
        try:
            read()
        except ValueError:
            continue
        assert data[:1] in (b"\0", b"\2", b"\3")


def test_a_growing_list_takes_what_is_new():
    packing = Packing(PLAIN)
    items = [f"{number:x}" * 50 for number in range(1000, 1100)]

    rows, _ = stored_all(packing, [items[:count] for count in range(1, 101)])

    whole = len(packing.typed(items).plain)
    assert sum(len(row.stored.data) for row in rows.values()) < whole


def test_a_value_that_was_cut_off_is_refused():
    packing = Packing(PLAIN)
    for size in (1000, 100_000):
        kind, data = packing.whole(packing.typed(b"ab" * size))

        for damaged in (data[:-1], data + b"x"):
            with pytest.raises(ValueError):  # zstd says why in its own words
                packing.opened(Stored(kind, damaged))


def test_a_value_whose_base_is_missing_is_told():
    packing = Packing(PLAIN)
    rows, head = stored_all(packing, [list(range(1000, 1000 + count)) for count in range(200, 220)])
    del rows[1]

    with pytest.raises(ValueError, match="the value 1, which it is based on, is missing"):
        Texts(rows, packing).typed(head.blob_id)


def test_memory_forgets_what_was_not_used_for_longest():
    memory = Memory()

    def remembered(size):
        head = Head(1, "1", 0, {0: Link(1, b"x" * size)})
        return Remembered(1, 1, "id", {"channel": head})

    third = HELD // 3 - 10_000
    for name in "abcd":
        memory.keep(name, remembered(third))
    memory.keep("large", remembered(HELD + 1))

    assert [name for name in ("a", "b", "c", "d", "large") if memory.get(name)] == ["b", "c", "d"]
    memory.forget("c")
    memory.keep("e", remembered(third))
    assert [name for name in "bcde" if memory.get(name)] == ["b", "d", "e"]


def test_memory_forgets_threads_without_values_too():
    memory = Memory()

    for number in range(HELD // 1000):
        memory.keep(str(number), Remembered(1, 1, "id", {}))

    assert memory.get("0") is None
    assert memory.get("10000") is not None


def test_a_child_process_can_remember_what_its_parent_was_about_to():
    memory = Memory()
    memory.keep("1", Remembered(1, 1, "id", {}))

    with memory._changing:  # noqa: SLF001 - as another thread holds it
        child = os.fork()
        if child == 0:
            memory.keep("2", Remembered(1, 1, "id", {}))
            os._exit(0 if memory.get("2") and not memory.get("1") else 1)
        deadline = time.monotonic() + 30
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
            time.sleep(0.01)
        if ended == (0, 0):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)

    assert ended == (child, 0)


def test_short_values_are_compressed_with_words_that_they_have_in_common():
    from langchain_core.messages import AIMessage

    packing = Packing(PLAIN)
    typed = packing.typed([AIMessage(content="Yes.", id="0" * 36)])

    assert len(packing.whole(typed).data) < len(typed.plain) / 4
    assert packing.opened(packing.whole(typed)) == typed
    for kind, size in itertools.product(["bytes", "msgpack"], [0, 128, 129, 20_000]):
        one = Typed(kind, b"\x01" * size)
        assert packing.opened(packing.whole(one)) == one

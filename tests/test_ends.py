"""What two texts have in common at their ends, beside looking at one byte after the other."""

from hypothesis import given
from hypothesis import strategies as st

from workflow_storage.ends import common_ends

parts = st.lists(
    st.one_of(st.binary(max_size=4), st.sampled_from([b"a" * 70_000, b"ab" * 40_000])), max_size=6
).map(b"".join)


@given(parts, parts, parts, parts)
def test_the_ends_are_those_that_byte_after_byte_gives(start, middle, other, end):
    base, text = start + middle + end, start + other + end

    common = length_in_common(base, text)
    of_the_rest = length_in_common(base[common:][::-1], text[common:][::-1])

    assert common_ends(base, text) == (common, of_the_rest)


def length_in_common(one, other):
    pairs = zip(one, other, strict=False)
    return next(
        (place for place, pair in enumerate(pairs) if pair[0] != pair[1]), min(len(one), len(other))
    )


def test_texts_of_which_one_is_empty_or_the_other_have_no_end_twice():
    assert common_ends(b"", b"abc") == (0, 0)
    assert common_ends(b"abc", b"abc") == (3, 0)
    assert common_ends(b"aa", b"aaa") == (2, 0)

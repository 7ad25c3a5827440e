"""How much two texts have in common at their beginnings and at their ends.

A state that grows has nearly all in common with the one before it.
"""

_BLOCK = 1 << 16  # bytes that are compared at a time


def common_ends(base: bytes, text: bytes) -> tuple[int, int]:
    """Return how many bytes both begin with alike, and how many of the rest they end with alike."""
    start = _common_start(base, text)
    return start, _common_end(base, text, min(len(base), len(text)) - start)


def _common_start(base: bytes, text: bytes) -> int:
    size = min(len(base), len(text))
    # `startswith` compares by memcmp, and copies nothing of a memoryview; that itself would be
    # compared value by value, as in a loop.
    view = memoryview(base)
    low = 0
    while low < size and text.startswith(view[low : min(low + _BLOCK, size)], low):
        low = min(low + _BLOCK, size)
    high = min(low + _BLOCK, size)
    while low < high:
        middle = (low + high + 1) // 2
        if text.startswith(view[low:middle], low):
            low = middle
        else:
            high = middle - 1
    return low


def _common_end(base: bytes, text: bytes, size: int) -> int:
    """Return how many bytes, of so many at most, both end with alike."""
    view = memoryview(base)
    longer = len(text) - len(base)

    def is_same(low: int, high: int) -> bool:
        first = len(base) - high
        return text.startswith(view[first : len(base) - low], first + longer)

    low = 0
    while low < size and is_same(low, min(low + _BLOCK, size)):
        low = min(low + _BLOCK, size)
    high = min(low + _BLOCK, size)
    while low < high:
        middle = (low + high + 1) // 2
        if is_same(low, middle):
            low = middle
        else:
            high = middle - 1
    return low

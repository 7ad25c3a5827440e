"""How the benchmarks measure and print: interleaved rounds, medians, ratios."""

import gc
import statistics
import time
from collections.abc import Callable

from rich.console import Console
from rich.table import Table

console = Console(width=110)


def medians(calls: dict[str, Callable[[], object]], rounds: int, each: int = 1) -> dict[str, float]:
    """Return the median seconds of a call, by name.

    Every round calls each of them, one after the other, so that whatever else the machine
    does meets them all alike.
    """
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, call in calls.items():
                start = time.perf_counter()
                for _ in range(each):
                    call()
                taken[name].append((time.perf_counter() - start) / each)
    finally:
        gc.enable()
    return {name: statistics.median(times) for name, times in taken.items()}


class Report:
    """A table of our figure, another's, the ratio, and the target for it."""

    def __init__(self, title: str, unit: str = "µs") -> None:
        self.table = Table(title=title, title_justify="left", box=None, header_style="bold")
        self.unit = unit
        for column in ("what", "ours", "beside", "theirs", "ratio", "target", ""):
            self.table.add_column(
                column, justify="left" if column in ("what", "beside") else "right"
            )

    def add(
        self, what: str, ours: float, beside: str, theirs: float, target: float | None = None
    ) -> None:
        ratio = ours / theirs
        self.table.add_row(
            what,
            self._shown(ours),
            beside,
            self._shown(theirs),
            f"{ratio:.2f}",
            "" if target is None else f"≤ {target:g}",
            "" if target is None else ("[green]ok[/]" if ratio <= target else "[red]missed[/]"),
        )

    def _shown(self, figure: float) -> str:
        return f"{figure * 1e6:,.0f} µs" if self.unit == "µs" else f"{figure:,.0f} {self.unit}"

    def print(self) -> None:
        console.print(self.table)
        console.print()

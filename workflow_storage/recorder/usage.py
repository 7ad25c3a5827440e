"""The totals of a run while it is recorded, for `run` and `writer`."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from workflow_storage.exceptions import InvalidFieldError
from workflow_storage.validation import valid_fields

if TYPE_CHECKING:
    from workflow_storage.base import Totals


class Usage:
    """The totals of a run, which nodes in several threads add to, and which of them are stored.

    Attributes:
        total_tokens: used so far, or None if no usage was added.
        total_cost_usd: spent so far in USD, or None if no usage was added.
    """

    def __init__(self, total_tokens: int | None, total_cost_usd: float | None) -> None:
        self.total_tokens = total_tokens
        self.total_cost_usd = total_cost_usd
        # A signal handler may add some while some are added.
        self._totals_lock = threading.RLock()
        self._stored = self.totals()

    def add(self, tokens: int, cost_usd: float) -> None:
        """Do what `RecordedRun.add_usage` does."""
        added = valid_fields({"total_tokens": tokens, "total_cost_usd": cost_usd})
        if None in added.values():
            raise InvalidFieldError("tokens or cost_usd is None. Leave it out, or pass a number.")
        with self._totals_lock:
            totals = valid_fields(
                {
                    "total_tokens": (self.total_tokens or 0) + added["total_tokens"],
                    "total_cost_usd": (self.total_cost_usd or 0.0) + added["total_cost_usd"],
                }
            )
            self.total_tokens = totals["total_tokens"]
            self.total_cost_usd = totals["total_cost_usd"]

    def totals(self) -> Totals:
        """Return the totals as fields of the run; no fields if no usage was added."""
        with self._totals_lock:
            tokens, cost_usd = self.total_tokens, self.total_cost_usd
        if tokens is None and cost_usd is None:
            return {}
        return {"total_tokens": tokens, "total_cost_usd": cost_usd}

    def not_stored(self) -> Totals | None:
        """Return the totals if they have changed since they were stored; None otherwise."""
        totals = self.totals()
        return None if totals == self._stored else totals

    def note_stored(self, totals: Totals | None) -> None:
        """Remember the totals that were stored, if some were."""
        if totals is not None:
            self._stored = totals

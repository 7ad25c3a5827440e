"""What a run has used while it is recorded, in all and since a checkpoint, for `run` and `nodes`.

Costs are summed in decimal, so that 0.1 and 0.2 make 0.3.
"""

from __future__ import annotations

import threading
from decimal import Decimal
from typing import TYPE_CHECKING, NamedTuple

from workflow_storage.validation import valid_fields

if TYPE_CHECKING:
    from workflow_storage.base import NodeUsage, Totals


class Amount(NamedTuple):
    """Tokens, and USD; None for what is not known."""

    tokens: int | None = None
    cost_usd: Decimal | None = None

    @classmethod
    def of(cls, tokens: int | None, cost_usd: float | Decimal | None) -> Amount:
        """Return an amount that has been checked.

        Raises:
            InvalidFieldError: unless they are a whole and a finite number, or None.
        """
        fields = valid_fields({"total_tokens": tokens, "total_cost_usd": cost_usd})
        cost = fields["total_cost_usd"]
        return cls(fields["total_tokens"], None if cost is None else Decimal(repr(cost)))

    def plus(self, other: Amount) -> Amount:
        """Return the sum; what is known of one of them alone is that."""
        return Amount(
            other.tokens if self.tokens is None else self.tokens + (other.tokens or 0),
            other.cost_usd if self.cost_usd is None else self.cost_usd + (other.cost_usd or 0),
        )

    @property
    def cost(self) -> float | None:
        """The cost as it is stored."""
        return None if self.cost_usd is None else float(self.cost_usd)


class Pending:
    """What was used since a checkpoint: of a node, or outside of any."""

    def __init__(self) -> None:
        # A signal handler may add some while some are added.
        self._lock = threading.RLock()
        self._amount = Amount()

    def add(self, amount: Amount) -> None:
        """Add what was used."""
        with self._lock:
            self._amount = self._amount.plus(amount)

    def taken(self) -> Amount:
        """Return what there is, and begin anew; whoever cannot store it puts it back with `add`."""
        with self._lock:
            amount, self._amount = self._amount, Amount()
            return amount


def as_node_usage(amount: Amount, seconds: float | None) -> NodeUsage:
    """Return what a checkpoint says of its node."""
    usage: NodeUsage = {}
    if seconds is not None:
        usage["duration_seconds"] = seconds
    if amount.tokens is not None:
        usage["tokens"] = amount.tokens
    if amount.cost_usd is not None:
        usage["cost_usd"] = float(amount.cost_usd)
    return usage


class Usage:
    """The totals of a run, which nodes in several threads add to, and which of them are stored."""

    def __init__(self, total_tokens: int | None, total_cost_usd: float | None) -> None:
        # A signal handler may add some while some are added.
        self._lock = threading.RLock()
        self._total = Amount.of(total_tokens, total_cost_usd)
        self._stored = self.totals()

    @property
    def total_tokens(self) -> int | None:
        """Tokens used so far, or None if that is not known."""
        return self._total.tokens

    @total_tokens.setter
    def total_tokens(self, tokens: int | None) -> None:
        with self._lock:
            self._total = self._total._replace(tokens=Amount.of(tokens, None).tokens)

    @property
    def total_cost_usd(self) -> float | None:
        """USD spent so far, or None if that is not known."""
        return self._total.cost

    @total_cost_usd.setter
    def total_cost_usd(self, cost_usd: float | None) -> None:
        with self._lock:
            self._total = self._total._replace(cost_usd=Amount.of(None, cost_usd).cost_usd)

    def add(self, amount: Amount) -> None:
        """Add to the totals.

        Raises:
            InvalidFieldError: if they become too large to be stored; nothing is added then.
        """
        with self._lock:
            total = self._total.plus(amount)
            Amount.of(total.tokens, total.cost)
            self._total = total

    def totals(self) -> Totals:
        """Return the totals as fields of the run; no fields if no usage was added."""
        total = self._total
        if total == (None, None):
            return {}
        return {"total_tokens": total.tokens, "total_cost_usd": total.cost}

    def not_stored(self) -> Totals | None:
        """Return the totals if they have changed since they were stored; None otherwise."""
        totals = self.totals()
        return None if totals == self._stored else totals

    def note_stored(self, totals: Totals | None) -> None:
        """Remember the totals that were stored, if some were."""
        if totals is not None:
            self._stored = totals

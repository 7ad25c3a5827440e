"""What is promised of the values in a run: each comes back as it went in.

Run by `RunsContract`, or alone.
"""

from __future__ import annotations

import json
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any
from uuid import UUID

import pytest
from django.utils import timezone
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from workflow_storage.testing.sample_runs import read_run, stored_run
from workflow_storage.testing.values import (
    AWKWARD_VALUES,
    against_the_store,
    any_text,
    in_json,
    json_values,
)

if TYPE_CHECKING:
    from workflow_storage import StorageBackend
from workflow_storage.validation import MAX_ERROR_MESSAGE


class ExactnessContract:
    """What is promised of times, payloads, messages and costs."""

    def test_times_are_exact_to_the_microsecond_in_any_time_zone(
        self, backend: StorageBackend
    ) -> None:
        start = datetime.fromisoformat("2026-03-29T02:30:00.123457+05:30")
        run = stored_run(backend, started_at=start)

        stored = read_run(backend, run).started_at
        assert stored == start
        assert timezone.is_aware(stored)

    @pytest.mark.parametrize("value", AWKWARD_VALUES, ids=ascii)
    def test_awkward_payloads_come_back_equal(self, backend: StorageBackend, value: Any) -> None:
        run = stored_run(backend, inputs=value, config_snapshot=value)
        backend.runs.update(run.id, outputs=value)

        stored = read_run(backend, run)
        for field in ("inputs", "config_snapshot", "outputs"):
            assert json.dumps(getattr(stored, field)) == in_json(value)

    @against_the_store
    @given(value=json_values)
    def test_any_json_value_comes_back_equal(self, backend: StorageBackend, value: Any) -> None:
        run = stored_run(backend, inputs=value)

        assert json.dumps(read_run(backend, run).inputs) == in_json(value)

    def test_dates_decimals_uuids_and_models_come_back_in_json_form(
        self, backend: StorageBackend
    ) -> None:
        class Invoice(BaseModel):
            number: int
            due: date

        run = stored_run(
            backend,
            inputs={
                "date": date(2026, 2, 1),
                "datetime": datetime(2026, 2, 1, 3, 4, 5, 678901, tzinfo=UTC),
                "timedelta": timedelta(hours=1),
                "decimal": Decimal("10.50"),
                "uuid": UUID(int=7),
                "model": Invoice(number=1, due=date(2026, 2, 1)),
            },
        )

        assert read_run(backend, run).inputs == {
            "date": "2026-02-01",
            "datetime": "2026-02-01T03:04:05.678901Z",
            "timedelta": "PT1H",
            "decimal": "10.50",
            "uuid": "00000000-0000-0000-0000-000000000007",
            "model": {"number": 1, "due": "2026-02-01"},
        }

    def test_what_cannot_be_stored_in_an_error_message_is_replaced(
        self, backend: StorageBackend
    ) -> None:
        run = stored_run(backend, error_message="a\0b \ud800 \ud83d\ude00")
        assert read_run(backend, run).error_message == "a\ufffdb \ufffd \N{GRINNING FACE}"

        backend.runs.update(run.id, error_message="\0")
        assert read_run(backend, run).error_message == "\ufffd"

        backend.runs.update_status(run.id, "failed", error_message="\udfff")
        assert read_run(backend, run).error_message == "\ufffd"

    def test_an_error_message_is_bounded(self, backend: StorageBackend) -> None:
        beginning, end = "what went wrong", "where"
        message = f"{beginning}{'x' * 1_000_000}{end}"
        run = stored_run(backend, error_message=message)
        stored = [read_run(backend, run).error_message]
        backend.runs.update(run.id, error_message=message)
        stored.append(read_run(backend, run).error_message)
        backend.runs.update_status(run.id, "failed", error_message=message)
        stored.append(read_run(backend, run).error_message)
        backend.runs.update_status(run.id, "running")
        stored.append(backend.runs.list_attempts(run.id)[0].error_message)

        for text in filter(None, stored):
            assert len(text) <= MAX_ERROR_MESSAGE
            assert text.startswith(beginning)
            assert text.endswith(end)

    @against_the_store
    @given(message=any_text)
    def test_any_error_message_can_be_stored(self, backend: StorageBackend, message: str) -> None:
        run = stored_run(backend)

        backend.runs.update_status(run.id, "failed", error_message=message)

        stored = read_run(backend, run).error_message
        assert stored is not None
        assert "\0" not in stored
        if message.isprintable():
            assert stored == message

    @against_the_store
    @given(cost=st.floats(allow_nan=False, allow_infinity=False))
    def test_any_finite_cost_comes_back_equal(self, backend: StorageBackend, cost: float) -> None:
        run = stored_run(backend, total_cost_usd=cost)

        assert read_run(backend, run).total_cost_usd == cost

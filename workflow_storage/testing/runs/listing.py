"""What is promised of lists of runs: who is in them, in one order, page by page.

Run by `RunsContract`, or alone.
"""

from __future__ import annotations

import tracemalloc
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from django.utils import timezone
from hypothesis import given
from hypothesis import strategies as st

from workflow_storage import (
    InvalidStatusError,
    RunNotFoundError,
    RunStatus,
    StorageBackend,
    WorkflowRun,
)
from workflow_storage.paging import FIRST_PAGE
from workflow_storage.testing.sample_runs import STATUSES, TERMINAL, ids, newest_first, stored_run
from workflow_storage.testing.values import against_the_store


class ListingContract:
    """What `list_runs`, `list_by_workflow`, `iter_runs` and `count_runs` promise."""

    def test_list_by_workflow_gives_its_newest_runs_first(self, backend: StorageBackend) -> None:
        now = timezone.now()
        runs = [stored_run(backend, started_at=now - timedelta(hours=age)) for age in (2, 0, 1)]
        stored_run(backend, workflow_name="another")

        assert ids(backend.runs.list_by_workflow("contract")) == newest_first(runs)
        assert ids(backend.runs.list_by_workflow("contract", limit=2)) == newest_first(runs)[:2]
        assert backend.runs.list_by_workflow("unknown") == []
        assert backend.runs.list_by_workflow("impossible\0") == []

    def test_runs_that_start_at_the_same_time_are_listed_by_id_descending(
        self, backend: StorageBackend
    ) -> None:
        now = timezone.now()
        names = ["b", "B", "a", "_", "ä", "Z", "z", "aa"]
        for name in names:
            stored_run(backend, id=name, started_at=now)

        assert ids(backend.runs.list_runs()) == sorted(names, reverse=True)

    def test_list_runs_filters_by_status_name_and_start(self, backend: StorageBackend) -> None:
        now = timezone.now()
        runs = [
            stored_run(backend, workflow_name=name, status=status, started_at=now - age)
            for name in ("a", "b")
            for status in STATUSES
            for age in (timedelta(0), timedelta(hours=1), timedelta(hours=2))
        ]
        list_runs, count_runs = backend.runs.list_runs, backend.runs.count_runs

        def check(expected: list[WorkflowRun], **filters: Any) -> None:
            assert ids(list_runs(**filters)) == newest_first(expected)
            assert count_runs(**filters) == len(expected)
            assert ids(list(backend.runs.iter_runs(**filters))) == newest_first(expected)

        check(runs)
        check([run for run in runs if run.workflow_name == "a"], workflow_name="a")
        check([run for run in runs if run.status == "failed"], status="failed")
        check([run for run in runs if run.status == "failed"], status=RunStatus.FAILED)
        check([run for run in runs if run.status in TERMINAL], status=TERMINAL)
        check([], status=[])
        hour_ago = now - timedelta(hours=1)
        check([run for run in runs if run.started_at >= hour_ago], started_after=hour_ago)
        check([run for run in runs if run.started_at < hour_ago], started_before=hour_ago)
        check(
            [
                run
                for run in runs
                if run.workflow_name == "b"
                and run.status in {"failed", "running"}
                and run.started_at == hour_ago
            ],
            workflow_name="b",
            status={"failed", "running"},
            started_after=hour_ago,
            started_before=now,
        )

    def test_filters_that_make_no_sense_raise(self, backend: StorageBackend) -> None:
        with pytest.raises(InvalidStatusError, match="Invalid run status: 'done'"):
            backend.runs.list_runs(status="done")
        with pytest.raises(InvalidStatusError):
            backend.runs.count_runs(status=["failed", "done"])
        with pytest.raises(ValueError, match="started_after is a naive datetime"):
            backend.runs.list_runs(started_after=datetime(2026, 1, 1))
        for limit in (-1, 10**30, 1.5, True):
            with pytest.raises(ValueError, match="limit"):
                backend.runs.list_runs(limit=limit)  # type: ignore[arg-type]
        with pytest.raises(InvalidStatusError):
            backend.runs.list_runs(status=5)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="no such filter"):
            backend.runs.list_runs(name="x")  # type: ignore[call-arg]
        assert backend.runs.list_runs(limit=0) == []

    @against_the_store
    @given(
        ages=st.lists(st.integers(0, 3), max_size=12),
        page_size=st.integers(1, 5),
        status=st.sampled_from([None, "failed", ["failed", "pending"]]),
    )
    def test_pages_after_a_run_give_every_run_once_in_order(
        self, backend: StorageBackend, ages: list[int], page_size: int, status: Any
    ) -> None:
        start = datetime(2026, 1, 1, tzinfo=UTC)
        workflow_name = WorkflowRun().id
        runs = [
            stored_run(
                backend,
                workflow_name=workflow_name,
                started_at=start - timedelta(seconds=age),
                status=("failed", "pending", "running")[number % 3],
            )
            for number, age in enumerate(ages)
        ]
        wanted = [
            run for run in runs if status is None or run.status == status or run.status in status
        ]

        paged: list[str] = []
        before: str | None = None
        while page := backend.runs.list_runs(
            workflow_name=workflow_name, status=status, before=before, limit=page_size
        ):
            assert len(page) <= page_size
            paged += ids(page)
            before = paged[-1]

        assert paged == newest_first(wanted)

    def test_a_page_after_an_unknown_run_raises(self, backend: StorageBackend) -> None:
        with pytest.raises(RunNotFoundError, match="Workflow run not found: gone"):
            backend.runs.list_runs(before="gone")

    def test_a_page_after_a_deleted_run_is_found_by_the_run_itself(
        self, backend: StorageBackend
    ) -> None:
        now = timezone.now()
        old, new = (stored_run(backend, started_at=now - timedelta(hours=h)) for h in (1, 0))
        backend.runs.delete(new.id)

        assert ids(backend.runs.list_runs(before=new)) == [old.id]

    def test_iter_runs_goes_on_while_its_runs_are_deleted(self, backend: StorageBackend) -> None:
        for _ in range(4 * FIRST_PAGE + 5):
            stored_run(backend)

        seen = set()
        for run in backend.runs.iter_runs(workflow_name="contract"):
            seen.add(run.id)
            backend.runs.delete(run.id)

        assert len(seen) == 4 * FIRST_PAGE + 5
        assert backend.runs.count_runs() == 0

    def test_iter_runs_begins_and_ends_where_it_is_told(self, backend: StorageBackend) -> None:
        now = timezone.now()
        for number in range(2 * FIRST_PAGE + 5):
            stored_run(
                backend,
                id=f"{number:03}",
                labels={"kind": "odd" if number % 2 else "even"},
                started_at=now - timedelta(seconds=number // 4),
            )
        listed = ids(backend.runs.list_runs())
        odd = ids(backend.runs.list_runs(labels={"kind": "odd"}))

        def iterated(**arguments: Any) -> list[str]:
            return ids(list(backend.runs.iter_runs(**arguments)))

        assert iterated(limit=FIRST_PAGE + 3) == listed[: FIRST_PAGE + 3]
        assert iterated(limit=0) == []
        assert iterated(limit=1000, before=listed[6]) == listed[7:]
        last = backend.runs.get(listed[6])
        assert iterated(limit=FIRST_PAGE + 1, before=last) == listed[7 : FIRST_PAGE + 8]
        assert iterated(before=odd[2], labels={"kind": "odd"}, limit=4) == odd[3:7]
        with pytest.raises(RunNotFoundError):
            iterated(before="gone")
        with pytest.raises(ValueError, match="limit is -1"):
            iterated(limit=-1)

    def test_readable_pages_have_the_runs_of_iter_runs(self, backend: StorageBackend) -> None:
        now = timezone.now()
        for number in range(2 * FIRST_PAGE + 5):
            stored_run(
                backend,
                id=f"{number:03}",
                workflow_name="odd" if number % 2 else "even",
                started_at=now - timedelta(seconds=number // 4),
            )

        def paged(**arguments: Any) -> list[str]:
            pages = backend.readable_pages(**arguments)
            found = [run for page in pages for run in page]
            assert all(isinstance(run, WorkflowRun) for run in found)
            return [run.id for run in found if isinstance(run, WorkflowRun)]

        assert paged() == ids(list(backend.runs.iter_runs()))
        for some in ({"before": "020"}, {"limit": FIRST_PAGE + 3}, {"workflow_name": "odd"}):
            assert paged(**some) == ids(list(backend.runs.iter_runs(**some)))
        assert paged(limit=0) == []
        with pytest.raises(RunNotFoundError):
            paged(before="gone")

    def test_what_is_known_of_a_run_is_read_alone(self, backend: StorageBackend) -> None:
        run = stored_run(backend, labels={"tenant": "acme"})

        assert backend.read_run(run.id) == run
        assert backend.read_run("gone") is None
        known = backend.known_fields(run.id)
        assert known["id"] == run.id
        assert known.get("labels", {"tenant": "acme"}) == {"tenant": "acme"}

    def test_iter_runs_bounds_its_memory_by_bytes(self, backend: StorageBackend) -> None:
        outputs = {"text": "x" * 1_000_000}
        for _ in range(60):
            stored_run(backend, outputs=outputs)

        tracemalloc.start()
        try:
            count = sum(1 for _ in backend.runs.iter_runs())
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()

        assert count == 60
        assert peak < 50_000_000  # the first page is 20 MB, and as much as text

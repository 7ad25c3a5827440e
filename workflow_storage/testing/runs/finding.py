"""What is promised of finding runs: by label, parent and workflow, and those that wait.

Run by `RunsContract`, or alone.
"""

from __future__ import annotations

import itertools
import random
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from django.utils import timezone

from workflow_storage import RunFilters, RunStatus, StorageBackend, StorageError, WorkflowRun
from workflow_storage.filters import valid_filters
from workflow_storage.testing.sample_runs import ids, newest_first, read_run, stored_run

if TYPE_CHECKING:
    from collections.abc import Collection

AWKWARD_LABELS = {
    "tenant": "acme",
    "Tenant": "ACME",
    "tenant ": " acme ",
    "a:b.c/d": "a=b\nand \"quotes\" \\\\ '%s'",
    "\N{GRINNING FACE}": "日",
}


class FindingContract:
    """What the filters of `list_runs`, `iter_runs`, `count_runs` and `delete_finished` promise."""

    def test_runs_are_found_by_each_of_their_labels(self, backend: StorageBackend) -> None:
        run = stored_run(backend, labels=AWKWARD_LABELS)
        stored_run(backend, labels={"tenant": "other", "acme": "tenant"})
        stored_run(backend)

        for name, value in AWKWARD_LABELS.items():
            assert ids(backend.runs.list_runs(labels={name: value})) == [run.id]
            assert backend.runs.list_runs(labels={name: f"{value}x"}) == []
            assert backend.runs.list_runs(labels={name: value[:-1]}) == []
        assert ids(backend.runs.list_runs(labels=AWKWARD_LABELS)) == [run.id]
        assert backend.runs.list_runs(labels={**AWKWARD_LABELS, "more": "x"}) == []
        assert backend.runs.count_runs(labels={}) == 3

    def test_runs_are_found_by_the_labels_that_they_have_now(self, backend: StorageBackend) -> None:
        run = stored_run(backend, labels={"tenant": "acme", "user": "1"})

        backend.runs.update(run.id, labels={"user": "2"})
        assert backend.runs.count_runs(labels={"tenant": "acme"}) == 0
        assert backend.runs.count_runs(labels={"user": "1"}) == 0
        assert ids(backend.runs.list_runs(labels={"user": "2"})) == [run.id]
        backend.runs.update_status(run.id, "running", labels={"user": "3"})
        assert ids(backend.runs.list_runs(labels={"user": "3"})) == [run.id]
        backend.runs.update_status(run.id, "failed")
        assert ids(backend.runs.list_runs(labels={"user": "3"}, status="failed")) == [run.id]
        stored = read_run(backend, run)
        changed = read_run(backend, run)
        changed.labels = {"user": "4"}
        changed.started_at += timedelta(hours=1)
        backend.runs.put(changed, over=stored)
        assert backend.runs.count_runs(labels={"user": "3"}) == 0
        assert ids(backend.runs.list_runs(labels={"user": "4"})) == [run.id]
        backend.runs.delete(run.id)
        assert backend.runs.count_runs(labels={"user": "4"}) == 0

    def test_ids_are_found_by_their_beginning(self, backend: StorageBackend) -> None:
        stored = ["a", "ab-1", "ab-2", "ab_", "aB-1", "b", "\N{GRINNING FACE}x", "a%"]
        for run_id in stored:
            stored_run(backend, id=run_id)

        assert backend.runs.list_ids("ab") == ["ab-1", "ab-2", "ab_"]
        assert backend.runs.list_ids("ab-1") == ["ab-1"]
        assert backend.runs.list_ids("a%") == ["a%"]
        assert backend.runs.list_ids("\N{GRINNING FACE}") == ["\N{GRINNING FACE}x"]
        assert len(backend.runs.list_ids("a", limit=2)) == 2
        assert backend.runs.list_ids("c") == []
        assert backend.runs.list_ids("\0") == []
        assert sorted(backend.runs.list_ids("")) == sorted(stored)

    def test_runs_are_found_by_their_error_or_it_is_said_that_they_cannot_be(
        self, backend: StorageBackend
    ) -> None:
        run = stored_run(backend, status="failed", error_message="ValueError: 100% of A_B\nat x")
        stored_run(backend, status="failed", error_message="ValueError: 1000 of AxB")
        stored_run(backend, status="completed")

        try:
            found = backend.runs.list_runs(error="100% of a_b")
        except StorageError as exc:
            assert "no search over errors" in str(exc)
            with pytest.raises(StorageError, match="no search over errors"):
                backend.runs.count_runs(error="x")
            return
        assert ids(found) == [run.id]
        assert backend.runs.count_runs(error="valueERROR") == 2
        assert ids(list(backend.runs.iter_runs(error="A_B\nAT", status="failed"))) == [run.id]
        assert backend.runs.list_runs(error="100% of a_b", before=run) == []
        assert backend.runs.count_runs(error="nothing") == 0
        assert backend.runs.count_runs(error="\0") == 0
        assert backend.runs.summarize(error="a_b", by=())[0].runs == 1

    def test_pages_of_a_label_give_every_run_once_in_order(self, backend: StorageBackend) -> None:
        now = timezone.now()
        runs = [
            stored_run(
                backend,
                labels={"tenant": "acme" if number % 3 else "other", "user": str(number % 2)},
                started_at=now - timedelta(seconds=number // 4),
            )
            for number in range(60)
        ]

        for labels in ({"tenant": "acme"}, {"tenant": "acme", "user": "1"}):
            expected = newest_first([run for run in runs if labels.items() <= run.labels.items()])
            seen: list[str] = []
            last: WorkflowRun | str | None = None
            while page := backend.runs.list_runs(labels=labels, before=last, limit=7):
                seen += ids(page)
                last = page[-1] if len(seen) % 2 else page[-1].id
            assert seen == expected
            assert ids(list(backend.runs.iter_runs(labels=labels))) == expected
            assert backend.runs.count_runs(labels=labels) == len(expected)

    def test_runs_are_found_by_their_parent(self, backend: StorageBackend) -> None:
        parent = stored_run(backend)
        children = [stored_run(backend, parent_id=parent.id) for _ in range(3)]
        stored_run(backend, parent_id=children[0].id)

        found = backend.runs.list_runs(parent_id=parent.id)
        assert ids(found) == newest_first(children)
        assert backend.runs.count_runs(parent_id=parent.id) == 3
        assert backend.runs.list_runs(parent_id="nobody") == []
        assert backend.runs.list_runs(parent_id="x" * 37) == []
        backend.runs.delete(children[1].id)
        assert backend.runs.count_runs(parent_id=parent.id) == 2

    def test_runs_of_several_workflows_are_in_one_order(self, backend: StorageBackend) -> None:
        runs = [stored_run(backend, workflow_name="abcd"[number % 4]) for number in range(40)]

        several: list[Collection[str]] = [["a", "c"], ("b",), {"d", "a", "nothing"}]
        for names in several:
            expected = newest_first([run for run in runs if run.workflow_name in names])
            assert ids(backend.runs.list_runs(workflow_name=names)) == expected
            assert ids(list(backend.runs.iter_runs(workflow_name=names))) == expected
            assert backend.runs.count_runs(workflow_name=names) == len(expected)
        assert backend.runs.list_runs(workflow_name=[]) == []
        assert backend.runs.list_runs(workflow_name=["x" * 300]) == []

    def test_runs_that_wait_are_found(self, backend: StorageBackend) -> None:
        new = stored_run(backend)
        waiting = stored_run(backend, status="running")
        backend.runs.update_status(waiting.id, "pending", waiting_for="approval by finance")
        running = stored_run(backend, status="running")

        assert ids(backend.runs.list_runs(waiting=True)) == [waiting.id]
        assert {*ids(backend.runs.list_runs(waiting=False))} == {new.id, running.id}
        assert backend.runs.count_runs(waiting=True) == 1
        assert {*ids(backend.runs.list_runs(status="pending"))} == {new.id, waiting.id}
        assert backend.runs.list_runs(waiting=True, status="running") == []
        backend.runs.update_status(waiting.id, "running")
        assert backend.runs.list_runs(waiting=True) == []

    def test_filters_can_be_combined(self, backend: StorageBackend) -> None:
        chance = random.Random(1)
        now = timezone.now()
        statuses = [*RunStatus]
        runs = []
        for number in range(80):
            status = chance.choice(statuses)
            runs.append(
                stored_run(
                    backend,
                    workflow_name=chance.choice("ab"),
                    status=status,
                    waiting_for="x" if status == "pending" and number % 2 else None,
                    labels={"t": chance.choice("12"), "u": chance.choice("12")},
                    parent_id=chance.choice([None, "p", "q"]),
                    started_at=now - timedelta(seconds=number // 3),
                )
            )
        choices: dict[str, list[Any]] = {
            "workflow_name": [None, "a", ["a", "b"]],
            "status": [None, "pending", ["failed", "running"]],
            "labels": [None, {"t": "1"}, {"t": "1", "u": "2"}],
            "parent_id": [None, "p"],
            "waiting": [None, True, False],
            "started_after": [None, now - timedelta(seconds=20)],
            "started_before": [None, now - timedelta(seconds=5)],
        }
        combinations = list(itertools.product(*choices.values()))

        for values in chance.sample(combinations, 60):
            filters: RunFilters = dict(zip(choices, values, strict=True))  # type: ignore[assignment]
            valid = valid_filters(filters)
            expected = newest_first([run for run in runs if valid.matches(run)])
            assert ids(backend.runs.list_runs(limit=1000, **filters)) == expected
            assert ids(list(backend.runs.iter_runs(**filters))) == expected
            assert backend.runs.count_runs(**filters) == len(expected)

    @pytest.mark.parametrize(
        "filters", [{"labels": {"t": "1"}}, {"labels": {"t": "1", "u": "1"}}, {"parent_id": "p"}]
    )
    def test_delete_finished_deletes_only_what_matches(
        self, backend: StorageBackend, filters: dict[str, Any]
    ) -> None:
        runs = [
            stored_run(
                backend,
                status=("failed", "running", "completed")[number % 3],
                labels={"t": str(number % 2), "u": str(number // 2 % 2)},
                parent_id=("p", None)[number % 2],
            )
            for number in range(48)
        ]
        valid = valid_filters({**filters, "status": ["failed", "completed"]})
        matching = [run for run in runs if valid.matches(run)]
        later = timezone.now() + timedelta(hours=1)

        assert backend.runs.delete_finished(before=later - timedelta(days=1), **filters) == 0
        deleted = backend.runs.delete_finished(before=later, batch_size=5, **filters)

        assert deleted == len(matching)
        left = {*ids(list(backend.runs.iter_runs()))}
        assert left == {*ids(runs)} - {*ids(matching)}

    @pytest.mark.parametrize(
        "filters",
        [
            {"labels": ["t"]},
            {"labels": "t=1"},
            {"labels": {"t": 1}},
            {"labels": {1: "t"}},
            {"parent_id": 1},
            {"waiting": "yes"},
            {"workflow_name": 1},
            {"workflow_name": ["a", 1]},
        ],
        ids=repr,
    )
    def test_filters_of_another_type_are_refused(
        self, backend: StorageBackend, filters: dict[str, Any]
    ) -> None:
        for call in (backend.runs.list_runs, backend.runs.count_runs):
            with pytest.raises(TypeError):
                call(**filters)
        with pytest.raises(TypeError):
            list(backend.runs.iter_runs(**filters))

    @pytest.mark.parametrize("labels", [{"": "x"}, {"x": ""}, {"x" * 65: "y"}, {"x": "\0"}])
    def test_labels_that_no_run_can_have_find_none(
        self, backend: StorageBackend, labels: dict[str, str]
    ) -> None:
        stored_run(backend, labels={"x": "y"})
        assert backend.runs.list_runs(labels=labels) == []
        assert backend.runs.count_runs(labels=labels) == 0

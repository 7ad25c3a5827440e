"""What is promised of labels and of where a run comes from: they are stored exactly, or refused.

Run by `RunsContract`, or alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workflow_storage import InvalidFieldError, RunLostError, RunNotFoundError
from workflow_storage.testing.sample_runs import new_run, read_run, stored_run
from workflow_storage.testing.threads import in_threads
from workflow_storage.testing.values import against_the_store

if TYPE_CHECKING:
    from workflow_storage import StorageBackend

AWKWARD_LABELS = {
    "tenant": "acme",
    "Tenant": "ACME",
    "tenant ": " acme ",
    "ténant": "a=b",
    "a:b.c/d": "line\nand \"quotes\" \\ '%s'",
    "\N{GRINNING FACE}" * 64: "日" * 256,
}
_text = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
_labels = st.dictionaries(
    st.text(
        st.characters(exclude_categories=["Cs"], exclude_characters="\0="), min_size=1, max_size=64
    ),
    st.text(_text, min_size=1, max_size=256),
    max_size=5,
)


class LabelsContract:
    """What is promised of labels, parent_id and forked_from_step."""

    def test_a_run_has_no_labels_unless_they_are_given(self, backend: StorageBackend) -> None:
        stored = read_run(backend, stored_run(backend))

        assert stored.labels == {}
        assert (stored.parent_id, stored.forked_from_step) == (None, None)

    def test_labels_come_back_equal(self, backend: StorageBackend) -> None:
        run = stored_run(backend, labels=AWKWARD_LABELS)

        assert read_run(backend, run).labels == AWKWARD_LABELS

    @against_the_store
    @given(labels=_labels, later=_labels)
    def test_any_labels_come_back_equal(
        self, backend: StorageBackend, labels: dict[str, str], later: dict[str, str]
    ) -> None:
        run = stored_run(backend, labels=labels)
        assert read_run(backend, run).labels == labels

        backend.runs.update(run.id, labels=later)
        assert read_run(backend, run).labels == later

    def test_labels_are_replaced_by_those_that_are_given(self, backend: StorageBackend) -> None:
        run = stored_run(backend, labels={"tenant": "acme", "user": "1"})
        other = stored_run(backend, labels={"tenant": "other"})

        backend.runs.update(run.id, outputs=1)
        assert read_run(backend, run).labels == {"tenant": "acme", "user": "1"}
        backend.runs.update(run.id, labels={"user": "2", "document": "a.pdf"})
        assert read_run(backend, run).labels == {"user": "2", "document": "a.pdf"}
        backend.runs.update_status(run.id, "running", labels={"user": "3"})
        assert read_run(backend, run).labels == {"user": "3"}
        backend.runs.update(run.id, labels={})
        assert read_run(backend, run).labels == {}
        assert read_run(backend, other).labels == {"tenant": "other"}

    @pytest.mark.parametrize(
        ("labels", "message"),
        [
            ({"user": 42}, "labels\\['user'\\] is a int, not text. Pass a str, such as str"),
            ({42: "user"}, "a name in labels is a int, not text"),
            ({"user": None}, "labels\\['user'\\] is a NoneType"),
            ({"a=b": "c"}, "'a=b' in labels holds a ="),
            ({"": "x"}, "a name in labels is empty"),
            ({"x": ""}, "labels\\['x'\\] is empty"),
            ({"n" * 65: "x"}, "a name in labels has 65 characters"),
            ({"x": "t" * 257}, "labels\\['x'\\] has 257 characters"),
            ({"nul\0": "x"}, "a name in labels holds a NUL"),
            ({"x": "nul\0"}, "labels\\['x'\\] holds a NUL"),
            ({"x": "\ud800"}, "labels\\['x'\\] holds a NUL character or a lone surrogate"),
            ({str(number): "x" for number in range(33)}, "labels has 33 names, more than 32"),
            (["user"], "labels is a list. Pass a dict"),
            ("user=1", "labels is a str. Pass a dict"),
            (None, "labels is a NoneType. Pass a dict"),
        ],
        ids=repr,
    )
    def test_labels_that_cannot_be_stored_are_refused(
        self, backend: StorageBackend, labels: Any, message: str
    ) -> None:
        run = stored_run(backend, labels={"kept": "yes"})

        with pytest.raises(InvalidFieldError, match=message):
            backend.runs.add(new_run(labels=labels))
        with pytest.raises(InvalidFieldError, match=message):
            backend.runs.update(run.id, outputs="new", labels=labels)

        assert backend.runs.count_runs() == 1
        stored = read_run(backend, run)
        assert (stored.labels, stored.outputs) == ({"kept": "yes"}, None)

    def test_labels_are_added_and_removed_beside_the_others(self, backend: StorageBackend) -> None:
        run = stored_run(backend, labels={"tenant": "acme", "user": "1", "old": "yes"})
        other = stored_run(backend, labels={"old": "yes"})

        backend.runs.update(
            run.id, add_labels={"user": "2", "new": "x"}, remove_labels=["old", "none"], outputs=7
        )

        stored = read_run(backend, run)
        assert stored.labels == {"tenant": "acme", "user": "2", "new": "x"}
        assert stored.outputs == 7
        assert [found.id for found in backend.runs.list_runs(labels={"old": "yes"})] == [other.id]
        assert [found.id for found in backend.runs.list_runs(labels={"user": "2"})] == [run.id]
        assert not backend.runs.list_runs(labels={"user": "1"})
        backend.runs.update(run.id, remove_labels="new")
        backend.runs.update(run.id, add_labels={}, remove_labels=())
        assert read_run(backend, run).labels == {"tenant": "acme", "user": "2"}
        backend.runs.update(run.id, remove_labels={"tenant", "user"})
        assert read_run(backend, run).labels == {}
        backend.runs.update(run.id, add_labels={"a": "b"})
        assert read_run(backend, run).labels == {"a": "b"}

    def test_labels_that_cannot_be_added_or_removed_change_nothing(
        self, backend: StorageBackend
    ) -> None:
        labels = {str(number): "x" for number in range(31)}
        run = stored_run(backend, status="running", labels=labels)

        changes: list[dict[str, Any]] = [
            {"add_labels": {"a": "b", "c": "d"}},
            {"add_labels": {"a": 1}},
            {"add_labels": ["a"]},
            {"remove_labels": 7},
            {"remove_labels": [7]},
            {"labels": {}, "add_labels": {"a": "b"}},
        ]
        for change in changes:
            with pytest.raises(InvalidFieldError, match="label"):
                backend.runs.update(run.id, outputs="new", **change)
        with pytest.raises(RunLostError):
            backend.runs.update(run.id, attempt=2, add_labels={"a": "b"})
        for unknown in ("gone", "impossible\0"):
            with pytest.raises(RunNotFoundError):
                backend.runs.update(unknown, add_labels={"a": "b"})
        assert (read_run(backend, run).labels, read_run(backend, run).outputs) == (labels, None)
        backend.runs.update(run.id, attempt=1, add_labels={"a": "b"})
        assert read_run(backend, run).labels == {**labels, "a": "b"}

    def test_labels_that_several_add_at_once_are_all_there(self, backend: StorageBackend) -> None:
        run = stored_run(backend)

        in_threads(
            6,
            lambda thread: [
                backend.runs.update(run.id, add_labels={f"{thread}-{number}": "x"})
                for number in range(5)
            ],
        )

        assert len(read_run(backend, run).labels) == 30
        assert len(backend.runs.list_runs(labels={"3-3": "x"})) == 1

    def test_a_run_can_have_32_labels(self, backend: StorageBackend) -> None:
        labels = {str(number): "x" for number in range(32)}

        assert read_run(backend, stored_run(backend, labels=labels)).labels == labels

    def test_parent_and_fork_step_come_back_equal(self, backend: StorageBackend) -> None:
        for parent_id, step in (("no run, perhaps \N{GRINNING FACE}", 0), ("x" * 36, 2**31 - 1)):
            run = stored_run(backend, parent_id=parent_id, forked_from_step=step)

            stored = read_run(backend, run)
            assert (stored.parent_id, stored.forked_from_step) == (parent_id, step)

    @pytest.mark.parametrize(
        "fields",
        [
            {"parent_id": ""},
            {"parent_id": "x" * 37},
            {"parent_id": "nul\0"},
            {"parent_id": 42},
            {"forked_from_step": -1},
            {"forked_from_step": 2**31},
            {"forked_from_step": 1.0},
            {"forked_from_step": True},
        ],
        ids=repr,
    )
    def test_an_impossible_parent_or_fork_step_is_refused(
        self, backend: StorageBackend, fields: dict[str, Any]
    ) -> None:
        with pytest.raises(ValueError, match=next(iter(fields))):
            backend.runs.add(new_run(**fields))
        run = stored_run(backend)
        with pytest.raises(InvalidFieldError, match="is not a field that can be changed"):
            backend.runs.update(run.id, **fields)

        assert backend.runs.count_runs() == 1

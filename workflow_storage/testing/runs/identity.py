"""What is promised of ids and names: any text that fits is one, and no two become one.

Run by `RunsContract`, or alone.
"""

from __future__ import annotations

import time
from enum import Enum, IntEnum
from uuid import UUID

import pytest
from hypothesis import given

from workflow_storage import RunNotFoundError, StorageBackend
from workflow_storage.testing.sample_runs import ids, new_run, read_run, stored_run
from workflow_storage.testing.values import against_the_store, storable_text


class IdentityContract:
    """What is promised of the ids and names of runs."""

    @pytest.mark.parametrize("run_id", ["", "x" * 37, "nul\0", "\ud800"])
    def test_an_impossible_id_is_never_found(self, backend: StorageBackend, run_id: str) -> None:
        assert backend.runs.get(run_id) is None
        assert backend.states.get_latest_state(run_id) is None
        assert backend.states.get_state_history(run_id) == []
        with pytest.raises(RunNotFoundError):
            backend.runs.heartbeat(run_id)
        with pytest.raises(RunNotFoundError):
            backend.states.save_state(run_id, {}, "node")

    def test_members_of_enumerations_are_their_values(self, backend: StorageBackend) -> None:
        class Name(str, Enum):  # noqa: UP042 - formatted as its name, unlike a StrEnum
            ID = "id"
            WORKFLOW = "ocr"
            NODE = "node"

        class Number(IntEnum):
            TOKENS = 7
            NEGATIVE = -1

        stored_run(backend, id=Name.ID, workflow_name=Name.WORKFLOW, total_tokens=Number.TOKENS)
        assert backend.states.save_state(Name.ID, {}, Name.NODE) == 0
        backend.runs.update(Name.ID, total_tokens=Number.TOKENS)

        for run_id in (Name.ID, "id"):
            run = backend.runs.get(run_id)
            assert run is not None
            assert (run.workflow_name, run.total_tokens) == ("ocr", 7)
            checkpoint = backend.states.get_latest_checkpoint(run_id)
            assert checkpoint is not None
            assert (type(checkpoint["node_id"]), checkpoint["node_id"]) == (str, "node")
            assert backend.states.get_state(run_id, Number.NEGATIVE) is None
        for name in (Name.WORKFLOW, "ocr"):
            assert ids(backend.runs.list_by_workflow(name)) == ["id"]
            assert ids(backend.runs.list_runs(workflow_name=name, limit=Number.TOKENS)) == ["id"]
            assert backend.runs.count_runs(workflow_name=name) == 1
        assert backend.runs.list_runs(before=Name.ID) == []
        backend.runs.update_status(Name.ID, "running", expected="pending")
        backend.runs.heartbeat(Name.ID)
        assert backend.states.delete_states(Name.ID, keep_last=0) == 1
        backend.runs.delete(Name.ID)
        assert backend.runs.get("id") is None

    def test_an_id_that_is_no_text_is_a_type_error(self, backend: StorageBackend) -> None:
        with pytest.raises(TypeError, match="run_id is a UUID"):
            backend.runs.get(UUID(int=1))  # type: ignore[arg-type]

    def test_ids_default_to_uuid7_text_in_order_of_creation(self, backend: StorageBackend) -> None:
        first = stored_run(backend)
        time.sleep(0.002)
        second = stored_run(backend)

        assert UUID(first.id).version == 7
        assert len(first.id) == 36
        assert first.id < second.id

    @against_the_store
    @given(run_id=storable_text, workflow_name=storable_text)
    def test_any_text_is_an_id_and_a_name(
        self, backend: StorageBackend, run_id: str, workflow_name: str
    ) -> None:
        if backend.runs.get(run_id) is None:
            backend.runs.add(new_run(workflow_name, id=run_id))

        stored = backend.runs.get(run_id)
        assert stored is not None
        assert stored.id == run_id
        assert run_id in ids(backend.runs.list_by_workflow(stored.workflow_name))

    def test_names_and_ids_may_be_as_long_as_the_limit(self, backend: StorageBackend) -> None:
        longest = "\N{GRINNING FACE}"
        run = stored_run(backend, id=longest * 36, workflow_name=longest * 256)

        backend.states.save_state(run.id, {}, longest * 128)

        assert read_run(backend, run).workflow_name == longest * 256

    def test_names_and_ids_differ_by_case_and_trailing_spaces(
        self, backend: StorageBackend
    ) -> None:
        names = ["Name", "name", "name ", "n\u00e4me", "name\u0301"]
        for name in names:
            stored_run(backend, id=name, workflow_name=name)

        for name in names:
            assert ids(backend.runs.list_by_workflow(name)) == [name]

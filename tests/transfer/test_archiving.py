"""Archiving: what is deleted is in the file, just as it was."""

from datetime import timedelta

import pytest
from django.utils import timezone

from tests.conftest import emptied
from workflow_storage import ExportFileError, import_runs
from workflow_storage.testing import stored_run
from workflow_storage.transfer import archive_runs, delete_archived


@pytest.fixture
def source(sqlite_url, django_db_blocker):
    yield from emptied(sqlite_url, django_db_blocker)


@pytest.fixture
def before():
    return timezone.now() + timedelta(minutes=1)


def ended(store, **fields):
    run = stored_run(store, status="failed", **fields)
    for number in range(5):
        store.states.save_state(run.id, {"text": "x" * 3000, "n": number}, f"n{number}")
    return store.runs.get(run.id)


def test_what_is_archived_is_deleted_and_can_be_had_back(every_backend, before, tmp_path):
    path = tmp_path / "runs.jsonl.zst"
    runs = [ended(every_backend, labels={"n": str(number)}) for number in range(3)]
    bare = stored_run(every_backend, status="completed")
    running = stored_run(every_backend, status="running")
    histories = {run.id: every_backend.states.get_state_history(run.id) for run in runs}

    written = list(archive_runs(every_backend, path, before=before))
    assert every_backend.runs.count_runs() == 5
    deleted = list(delete_archived(every_backend, path))

    assert len(written) == 4
    assert all(one.deleted for one in deleted)
    assert [run.id for run in every_backend.runs.iter_runs()] == [running.id]
    assert {one.outcome for one in import_runs(path, every_backend)} == {"copied"}
    assert every_backend.runs.get(bare.id) is not None
    for run in runs:
        assert every_backend.states.get_state_history(run.id) == histories[run.id]
        assert every_backend.runs.get(run.id).labels == run.labels


def test_what_has_changed_since_is_kept(every_backend, before, tmp_path):
    path = tmp_path / "runs.jsonl"
    relabelled, resumed, grown, shrunk, gone, same = (ended(every_backend) for _ in range(6))
    list(archive_runs(every_backend, path, before=before))

    every_backend.runs.update(relabelled.id, add_labels={"kept": "yes"})
    every_backend.runs.update_status(resumed.id, "running")
    every_backend.states.save_state(grown.id, {}, "more")
    every_backend.states.delete_states(shrunk.id, keep_last=2)
    every_backend.runs.delete(gone.id)
    results = {one.run_id: one for one in delete_archived(every_backend, path)}

    assert [run_id for run_id, one in results.items() if one.deleted] == [same.id]
    assert not results[gone.id].reason
    for run in (relabelled, resumed, grown, shrunk):
        assert every_backend.runs.get(run.id) is not None
        assert results[run.id].reason


def test_a_file_that_was_damaged_deletes_nothing_of_what_it_has_lost(source, before, tmp_path):
    path = tmp_path / "runs.jsonl"
    first, second = ended(source), ended(source)
    list(archive_runs(source, path, before=before))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:3], lines[3][:-20] + b"\n", *lines[4:]]))

    results = list(delete_archived(source, path))

    assert source.runs.get(first.id) is not None
    assert source.runs.get(second.id) is None
    assert any(getattr(one, "number", None) == 4 for one in results)


def test_an_archive_replaces_nothing(source, before, tmp_path):
    path = tmp_path / "runs.jsonl"
    ended(source)
    path.write_text("what is left of other runs")

    with pytest.raises(ExportFileError, match="it is there already"):
        list(archive_runs(source, path, before=before))
    assert path.read_text() == "what is left of other runs"

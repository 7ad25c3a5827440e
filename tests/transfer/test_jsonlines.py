"""Lines of runs: what they hold, damaged ones, times, and the memory that they take."""

import gzip
import json
import sys
import tracemalloc
from datetime import datetime

import pytest
from django.utils import timezone

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

from tests.transfer.conftest import outcomes
from workflow_storage import Attempt, WorkflowRun
from workflow_storage.testing import new_run, stored_run
from workflow_storage.transfer import (
    DamagedLine,
    ExportFileError,
    copy_runs,
    export_runs,
    import_runs,
)


class TestLines:
    def test_a_line_is_a_run_with_its_states(self, two, tmp_path):
        source, _ = two
        run = stored_run(source, inputs={"a": 1})
        source.states.save_state(run.id, {"b": "ä"}, "node")

        list(export_runs(source, tmp_path / "runs.jsonl"))

        (line,) = (tmp_path / "runs.jsonl").read_text("utf-8").splitlines()
        data = json.loads(line)
        assert data["workflow_storage"] == 1
        assert data["run"]["inputs"] == {"a": 1}
        assert data["run"]["started_at"] == run.started_at.isoformat()
        assert data["states"][0]["state_data"] == {"b": "ä"}

    def test_a_line_has_the_attempts_of_the_run(self, two, tmp_path):
        source, target = two
        run = stored_run(source, status="running")
        source.runs.update_status(run.id, "failed", error_message="first")
        source.runs.update_status(run.id, "running", worker="host:2")
        path = tmp_path / "runs.jsonl"

        list(export_runs(source, path))
        (done,) = import_runs(path, target)

        assert done.outcome == "copied"
        data = json.loads(path.read_text())
        assert [attempt["error_message"] for attempt in data["attempts"]] == ["first", None]
        assert data["attempts"][1]["worker"] == "host:2"
        assert target.runs.list_attempts(run.id) == source.runs.list_attempts(run.id)

    def damaged_file(self, two, path):
        source, _ = two
        for number in range(6):
            run = stored_run(source, id=f"run-{number}")
            source.states.save_state(run.id, {}, "node")
            source.states.save_state(run.id, {}, "node")
        list(export_runs(source, path))
        return path.read_text().splitlines()

    def test_a_damaged_line_is_reported_and_the_rest_goes_in(self, two, tmp_path):
        path = tmp_path / "runs.jsonl"
        lines = self.damaged_file(two, path)
        good = json.loads(lines[0])
        del good["crc32"]
        an_attempt = dict.fromkeys(Attempt._fields) | {"number": 1, "status": "failed"}
        damaged = [
            lines[1][:-5],
            "not JSON",
            "[]",
            '{"workflow_storage": 2}',
            json.dumps({**good, "run": {**good["run"], "status": "done"}}),
            json.dumps({**good, "run": {**good["run"], "started_at": "yesterday"}}),
            json.dumps({**good, "run": {**good["run"], "unknown": 1}}),
            json.dumps({**good, "states": [good["states"][1], good["states"][0]]}),
            json.dumps({**good, "states": [{**good["states"][0], "state_data": []}]}),
            json.dumps({**good, "states": [{"step": 0}]}),
            json.dumps({**good, "states": None}),
            json.dumps({**good, "attempts": None}),
            json.dumps({**good, "attempts": [{"number": 1}]}),
            json.dumps({**good, "attempts": [{**an_attempt, "number": 0}]}),
            json.dumps({**good, "attempts": [{**an_attempt, "ended_at": "yesterday"}]}),
            "\xff".encode("latin1").decode("utf-8", "surrogateescape"),
        ]
        text = "\n".join(["", *damaged, *lines[2:], ""])
        path.write_bytes(text.encode("utf-8", "surrogateescape"))

        results = list(import_runs(path, two[1]))

        bad = [result for result in results if isinstance(result, DamagedLine)]
        assert [line.number for line in bad] == list(range(2, 2 + len(damaged)))
        assert all(line.reason for line in bad)
        assert [run.id for run in two[1].runs.iter_runs()] == [f"run-{n}" for n in (3, 2, 1, 0)]

    def test_a_line_that_was_changed_on_purpose_goes_in_without_its_checksum(self, two, tmp_path):
        source, target = two
        stored_run(source, id="run", inputs="old")
        path = tmp_path / "runs.jsonl"
        list(export_runs(source, path))
        line = path.read_text().replace("old", "new")
        path.write_text(line)
        (damaged,) = import_runs(path, target)
        assert (
            'its checksum differs. If it was changed on purpose, delete "crc32"' in damaged.reason
        )

        data = json.loads(line)
        del data["crc32"]
        path.write_text(json.dumps(data))
        assert outcomes(import_runs(path, target)) == {"run": "copied"}
        assert target.runs.get("run").inputs == "new"

    def test_what_is_refused_is_refused_with_the_number_of_its_line(self, two, tmp_path):
        stored_run(two[0], id="run")
        path = tmp_path / "runs.jsonl"
        list(export_runs(two[0], path))
        data = json.loads(path.read_text())
        del data["crc32"]
        data["run"]["inputs"] = float("nan")
        path.write_text(f"\n{json.dumps(data)}\n")
        (result,) = import_runs(path, two[1])
        assert (result.outcome, result.reason[:7]) == ("refused", "Line 2:")

    def test_a_project_without_time_zones_takes_a_file_of_one_with_them(
        self, two, tmp_path, settings
    ):
        run = stored_run(two[0])
        list(export_runs(two[0], tmp_path / "runs"))
        settings.USE_TZ = False
        (result,) = import_runs(tmp_path / "runs", two[1])
        assert result.outcome == "copied"
        assert two[1].runs.get(run.id).started_at == timezone.make_naive(run.started_at)

    def test_a_project_without_time_zones_writes_their_offset(self, two, tmp_path, settings):
        settings.USE_TZ = False
        settings.TIME_ZONE = "Europe/Berlin"
        run = stored_run(two[0], started_at=datetime(2026, 7, 1, 12))
        path = tmp_path / "runs"
        list(export_runs(two[0], path))
        assert json.loads(path.read_text())["run"]["started_at"] == "2026-07-01T12:00:00+02:00"

        settings.TIME_ZONE = "America/New_York"
        list(import_runs(path, two[1]))
        assert two[1].runs.get(run.id).started_at == datetime(2026, 7, 1, 6)

    def test_a_time_that_the_project_cannot_have_is_a_damaged_line(self, two, tmp_path, settings):
        path = tmp_path / "runs"
        stored_run(two[0])
        list(export_runs(two[0], path))
        data = json.loads(path.read_text())
        del data["crc32"]
        data["run"]["started_at"] = "0001-01-01T00:00:00+14:00"
        path.write_text(json.dumps(data))
        settings.USE_TZ = False
        (damaged,) = import_runs(path, two[1])
        assert isinstance(damaged, DamagedLine)

    def test_a_run_whose_state_is_damaged_leaves_a_damaged_line(self, two, tmp_path):
        from workflow_storage import ExecutionState

        source, target = two
        path = tmp_path / "runs.jsonl"
        self.damaged_file(two, path)
        ExecutionState.objects.using(source.alias).filter(run_id="run-3", step=1).update(
            state_json="damaged"
        )

        results = {result.run_id: result for result in export_runs(source, path)}

        assert results["run-3"].outcome == "refused"
        imported = list(import_runs(path, target))
        assert [type(result).__name__ for result in imported].count("DamagedLine") == 1
        assert target.runs.count_runs() == 5


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_runs(two, tmp_path, monkeypatch):
    source, target = two
    monkeypatch.setattr("workflow_storage.paging.SMALL_PAGE", 0)

    def peak(work):
        tracemalloc.start()
        try:
            for _ in work:
                pass
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    payload = "x" * 40_000
    peaks = []
    for count in (30, 120):
        now = timezone.now()
        WorkflowRun.objects.using(source.alias).bulk_create(
            [new_run(inputs=payload, started_at=now) for _ in range(count)]
        )
        path = tmp_path / "runs.jsonl.gz"
        peaks.append(
            (
                peak(copy_runs(source, target)),
                peak(export_runs(source, path)),
                peak(import_runs(path, target)),
            )
        )
    for small, large in zip(*peaks, strict=True):
        assert large < small * 1.5
    assert gzip.decompress(path.read_bytes())


class TestBombs:
    """Small files that unpack to what would fill the memory."""

    @pytest.fixture
    def good_lines(self, two, tmp_path):
        source, _ = two
        stored_run(source, id="first")
        stored_run(source, id="second")
        list(export_runs(source, tmp_path / "good.jsonl"))
        return (tmp_path / "good.jsonl").read_bytes().splitlines(keepends=True)

    @pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
    def test_a_line_that_is_too_long_is_reported_and_the_rest_goes_in(
        self, two, tmp_path, good_lines, suffix
    ):
        _, target = two
        path = tmp_path / f"runs.jsonl{suffix}"
        bomb = b'{"workflow_storage": 1, "run": "' + b" " * 20_000_000 + b'"}\n'
        open_file = {"": open, ".gz": gzip.open, ".zst": zstd.open}[suffix]
        with open_file(path, "wb") as file:
            for part in (good_lines[0], bomb, good_lines[1], b" " * 20_000_000):
                file.write(part)

        tracemalloc.start()
        try:
            results = list(import_runs(path, target, max_line=1_000_000))
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()

        damaged = [result for result in results if isinstance(result, DamagedLine)]
        assert [line.number for line in damaged] == [2, 4]
        assert all("is longer than 1 MB" in line.reason for line in damaged)
        assert target.runs.count_runs() == 2
        assert peak < 10_000_000

    def test_a_line_of_the_greatest_length_goes_in(self, two, tmp_path, good_lines):
        _, target = two
        (line, _) = good_lines
        path = tmp_path / "runs.jsonl"
        path.write_bytes(line)

        (refused,) = import_runs(path, target, max_line=len(line) - 2)
        assert isinstance(refused, DamagedLine)
        (done,) = import_runs(path, target, max_line=len(line))
        assert done.outcome == "copied"

    def test_a_file_that_declares_to_unpack_to_gigabytes_is_refused_at_once(self, two, tmp_path):
        _, target = two
        path = tmp_path / "runs.jsonl.zst"
        path.write_bytes(zstd.compress(bytes(2 * 2**30)))
        assert path.stat().st_size < 300_000

        with pytest.raises(
            ExportFileError, match=r"unpack to 2,147,483,648, which are no exported"
        ):
            list(import_runs(path, target))

    def test_a_line_of_many_small_values_fills_no_memory(self, two, tmp_path, good_lines):
        _, target = two
        path = tmp_path / "runs.jsonl.gz"
        with gzip.open(path, "wb") as file:
            file.write(b'{"workflow_storage": 1, "states": [{}' + b",{}" * 5_000_000 + b"]}\n")
            file.write(good_lines[1])

        tracemalloc.start()
        try:
            damaged, done = import_runs(path, target)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()

        assert damaged == DamagedLine(1, "it holds more values than the states of any run")
        assert done.outcome == "copied"
        assert peak < 40_000_000

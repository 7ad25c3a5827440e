"""Lines of runs: what they hold, damaged ones, times, and the memory that they take."""

import base64
import gzip
import itertools
import json
import random
import sys
import tracemalloc
from datetime import datetime

import pytest
from django.utils import timezone

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

from tests.transfer.conftest import assert_equal, outcomes
from workflow_storage import Attempt, ExecutionState, WorkflowRun
from workflow_storage.deltas import encode_state, is_delta
from workflow_storage.testing import changed_state, in_threads, new_run, stored_run
from workflow_storage.transfer import (
    DamagedLine,
    ExportFileError,
    copy_runs,
    export_runs,
    import_runs,
)
from workflow_storage.validation import equal_checkpoints


class TestLines:
    def test_a_run_is_a_line_and_each_of_its_states_is_one_after_it(self, two, tmp_path):
        source, _ = two
        run = stored_run(source, status="running", inputs={"a": 1})
        source.states.save_state(run.id, {"b": "ä"}, "node", attempt=1, tokens=7)
        source.states.save_state(run.id, {"b": "x" * 9000}, "node")
        source.states.save_state(run.id, {"b": "x" * 9000, "c": 1}, "node")
        source.states.save_state(run.id, {"b": "x" * 9000, "c": 2}, "node")

        list(export_runs(source, tmp_path / "runs.jsonl"))

        lines = (tmp_path / "runs.jsonl").read_text("utf-8").splitlines()
        of_run, *of_states = map(json.loads, lines)
        assert of_run["workflow_storage"] == 2
        assert of_run["run"]["inputs"] == {"a": 1}
        assert of_run["run"]["started_at"] == run.started_at.isoformat()
        assert (of_run["first_step"], of_run["last_step"]) == (0, 3)
        assert [state["step"] for state in of_states] == [0, 1, 2, 3]
        first = source.states.get_state(run.id, 0)
        assert of_states[0] == {
            "run_id": run.id,
            "step": 0,
            "node_id": "node",
            "created_at": first["created_at"].isoformat(),
            "attempt": 1,
            "tokens": 7,
            "state": {"b": "ä"},
            "crc32": lines[1][-10:-2],
        }
        assert is_delta(base64.b85decode(of_states[3]["stored"]))

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

    def test_a_damaged_line_of_a_run_is_reported_and_the_rest_goes_in(self, two, tmp_path):
        source, target = two
        path = tmp_path / "runs.jsonl"
        for number in range(4):
            stored_run(source, id=f"run-{number}")
        list(export_runs(source, path))
        lines = path.read_text().splitlines()
        good = json.loads(lines[0])
        del good["crc32"]
        an_attempt = dict.fromkeys(Attempt._fields) | {"number": 1, "status": "failed"}
        damaged = [
            lines[1][:-5],
            "not JSON",
            "[]",
            '{"workflow_storage": 1}',
            json.dumps({**good, "run": {**good["run"], "status": "done"}}),
            json.dumps({**good, "run": {**good["run"], "started_at": "yesterday"}}),
            json.dumps({**good, "run": {**good["run"], "unknown": 1}}),
            json.dumps({**good, "unknown": 1}),
            json.dumps({**good, "first_step": 0}),
            json.dumps({**good, "first_step": 1, "last_step": 0}),
            json.dumps({**good, "first_step": "0", "last_step": "1"}),
            json.dumps({**good, "attempts": None}),
            json.dumps({**good, "attempts": [{"number": 1}]}),
            json.dumps({**good, "attempts": [{**an_attempt, "number": 0}]}),
            json.dumps({**good, "attempts": [{**an_attempt, "ended_at": "yesterday"}]}),
            "\xff".encode("latin1").decode("utf-8", "surrogateescape"),
        ]
        text = "\n".join(["", *damaged, *lines[2:], ""])
        path.write_bytes(text.encode("utf-8", "surrogateescape"))

        results = list(import_runs(path, target))

        bad = [result for result in results if isinstance(result, DamagedLine)]
        assert [line.number for line in bad] == list(range(2, 2 + len(damaged)))
        assert all(line.reason for line in bad)
        assert [run.id for run in target.runs.iter_runs()] == ["run-1", "run-0"]

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


class TestDamagedStates:
    """Three runs of six states each, of which one is damaged on its way."""

    @pytest.fixture
    def lines(self, two, tmp_path):
        source, _ = two
        for number in range(3):
            run = stored_run(source, id=f"run-{number}", status="completed")
            writer = source.states.writer(run.id)
            for step in range(6):
                writer.save_state(changed_state({}, "grow", 5000 + step), f"node {step}")
        list(export_runs(source, tmp_path / "good.jsonl"))
        return (tmp_path / "good.jsonl").read_bytes().splitlines(keepends=True)

    def imported(self, two, tmp_path, lines):
        """Import lines, and return the damaged ones and what became of each run."""
        path = tmp_path / "runs.jsonl"
        path.write_bytes(b"".join(lines))
        results = list(import_runs(path, two[1]))
        damaged = [result for result in results if isinstance(result, DamagedLine)]
        return damaged, {
            result.run_id: result for result in results if not isinstance(result, DamagedLine)
        }

    def steps(self, two, run_id):
        """Return how many states the target has of a run, which are those of the source."""
        ours, theirs = (store.states.get_state_history(run_id) for store in two)
        assert all(map(equal_checkpoints, ours, theirs))
        return len(theirs)

    @pytest.mark.parametrize("seed", range(14))
    def test_a_flipped_bit_is_reported_by_line_and_the_rest_goes_in(
        self, two, tmp_path, lines, seed
    ):
        chance = random.Random(seed)
        number = 7 + seed % 7  # of the second run
        line = bytearray(lines[number])
        while line == lines[number] or b"\n" in line[:-1]:  # or it would be two lines
            line = bytearray(lines[number])
            line[chance.randrange(len(line) - 1)] ^= 1 << chance.randrange(8)

        damaged, runs = self.imported(two, tmp_path, [*lines[:number], bytes(line), *lines[14:]])

        assert [one.number for one in damaged] == [number + 1]
        assert {runs[name].outcome for name in ("run-0", "run-2")} == {"copied"}
        assert (self.steps(two, "run-0"), self.steps(two, "run-2")) == (6, 6)
        assert self.steps(two, "run-1") == max(0, number - 8)
        if number == 7:
            assert "run-1" not in runs
        else:
            assert (runs["run-1"].outcome, runs["run-1"].states) == ("refused", number - 8)
            assert f"line {number + 1} is damaged. " in runs["run-1"].reason
            assert "What comes before it is in the target." in runs["run-1"].reason

    def test_states_without_their_run_are_reported_once(self, two, tmp_path, lines):
        damaged, runs = self.imported(two, tmp_path, [*lines[:7], *lines[8:]])
        assert [(one.number, one.reason) for one in damaged] == [
            (8, "the run run-1 does not come before it")
        ]
        assert set(runs) == {"run-0", "run-2"}

        damaged, runs = self.imported(two, tmp_path, lines[1:])
        assert [(one.number, one.reason) for one in damaged] == [
            (1, "the run run-2 does not come before it")
        ]
        assert runs["run-1"].outcome == "copied"

    @pytest.mark.parametrize("cut", [1, 40, 3000])
    def test_a_file_that_ends_too_early_gives_what_is_there(self, two, tmp_path, lines, cut):
        whole = b"".join(lines)[:-cut]

        _, runs = self.imported(two, tmp_path, [whole])

        assert [runs[name].outcome for name in ("run-2", "run-1")] == ["copied", "copied"]
        complete = cut == 1  # the end of the last line
        assert runs["run-0"].outcome == ("copied" if complete else "refused")
        assert self.steps(two, "run-0") == len(whole.splitlines()) - 15 - (not complete)
        # The whole file brings the rest.
        _, runs = self.imported(two, tmp_path, lines)
        assert runs["run-0"].outcome == ("unchanged" if complete else "updated")
        assert self.steps(two, "run-0") == 6

    def test_lines_that_are_missing_or_in_another_order_are_noticed(self, two, tmp_path, lines):
        _, runs = self.imported(two, tmp_path, [*lines[:3], *lines[4:]])
        assert "line 4 has something else in its place" in runs["run-2"].reason
        assert (self.steps(two, "run-2"), self.steps(two, "run-1")) == (2, 6)

        _, runs = self.imported(two, tmp_path, [*lines[:8], lines[9], lines[8], *lines[10:]])
        assert runs["run-1"].outcome == "refused"

    def test_a_damaged_line_is_reported_where_nothing_of_it_was_needed(self, two, tmp_path, lines):
        self.imported(two, tmp_path, lines)
        two[1].states.save_state("run-1", {}, "node")

        damaged, runs = self.imported(two, tmp_path, [*lines[:9], b"damaged\n", *lines[10:]])

        assert [one.number for one in damaged] == [10]
        assert runs["run-1"].outcome == "refused"

    def test_a_state_that_was_changed_on_purpose_goes_in_without_its_checksum(self, two, tmp_path):
        source, target = two
        run = stored_run(source)
        source.states.save_state(run.id, {"answer": 41}, "node")
        path = tmp_path / "runs.jsonl"
        list(export_runs(source, path))
        first, second = path.read_text().splitlines()
        changed = json.loads(second)
        del changed["crc32"]
        path.write_text(f"{first}\n{json.dumps({**changed, 'state': {'answer': 42}})}\n")

        (done,) = import_runs(path, target)

        assert done.outcome == "copied"
        assert target.states.get_latest_state(run.id) == {"answer": 42}

    @pytest.mark.parametrize(
        "change",
        [
            {"state": []},
            {"state": {"a": float("nan")}},
            {"node_id": ""},
            {"node_id": 7},
            {"step": -1},
            {"created_at": "yesterday"},
            {"created_at": None},
            {"attempt": "one"},
            {"tokens": "many"},
            {"unknown": 1},
            {"stored": ""},
            {"run_id": None},
        ],
        ids=str,
    )
    def test_a_state_that_is_none_is_a_damaged_line(self, two, tmp_path, change):
        source, target = two
        run = stored_run(source)
        source.states.save_state(run.id, {"answer": 41}, "node")
        path = tmp_path / "runs.jsonl"
        list(export_runs(source, path))
        first, second = path.read_text().splitlines()
        changed = json.loads(second)
        del changed["crc32"]
        path.write_text(f"{first}\n{json.dumps({**changed, **change})}\n")

        damaged, done = import_runs(path, target)

        assert (damaged.number, bool(damaged.reason)) == (2, True)
        assert (done.outcome, target.states.get_latest_state(run.id)) == ("refused", None)

    def test_of_a_run_whose_state_cannot_be_read_what_comes_before_is_exported(
        self, two, tmp_path, lines
    ):
        source, target = two
        ExecutionState.objects.using(source.alias).filter(run_id="run-1", step=2).update(
            state_json="damaged", state_delta=None
        )

        results = {result.run_id: result for result in export_runs(source, tmp_path / "runs")}

        assert {name: result.outcome for name, result in results.items()} == {
            "run-0": "copied",
            "run-1": "refused",
            "run-2": "copied",
        }
        assert "at step 2 cannot be rebuilt" in results["run-1"].reason
        imported = {result.run_id: result for result in import_runs(tmp_path / "runs", target)}
        assert imported["run-1"].outcome == "refused"
        assert [self.steps(two, f"run-{number}") for number in (0, 2)] == [6, 6]
        assert [one["step"] for one in target.states.iter_steps("run-1")] == [0, 1]

    def test_a_stored_text_with_line_breaks_comes_back(self, two, tmp_path):
        source, target = two
        run = stored_run(source)
        source.states.save_state(run.id, {}, "node")
        ExecutionState.objects.using(source.alias).update(state_json='{"a":\n1}')

        list(export_runs(source, tmp_path / "runs"))
        (done,) = import_runs(tmp_path / "runs", target)

        assert done.outcome == "copied"
        assert target.states.get_latest_state(run.id) == {"a": 1}


def test_several_that_import_one_file_do_not_disturb_each_other(two, tmp_path):
    source, target = two
    for number in range(3):
        run = stored_run(source, id=f"run-{number}")
        writer = source.states.writer(run.id)
        for step in range(70):
            writer.save_state(changed_state({}, "grow", 5000 + step), "node")
    path = tmp_path / "runs.jsonl.zst"
    list(export_runs(source, path))

    for result in itertools.chain(*in_threads(3, lambda _: list(import_runs(path, target)))):
        assert (result.outcome != "refused", result.reason) == (True, "")

    assert_equal(source, target)


def peak(work):
    """Return how many bytes it took at most to go through something."""
    tracemalloc.start()
    try:
        for _ in work:
            pass
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_states_of_a_run(two, tmp_path):
    source, target = two
    run, text = stored_run(source), random.Random(1).randbytes(100_000).hex()
    writer = source.states.writer(run.id)
    path = tmp_path / "runs.jsonl"
    peaks = []
    for count in (40, 200):
        for step in range(source.states.writer(run.id).save_state({}, "node") + 1, count):
            writer.save_state({"text": text, "step": step}, "node")
        peaks.append(
            (
                peak(copy_runs(source, target)),
                peak(export_runs(source, path)),
                peak([target.runs.delete(run.id), import_runs(path, target)][1]),
            )
        )
    for small, large in zip(*peaks, strict=True):
        assert large < small * 1.6  # what later states are based on grows with their logarithm


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_runs(two, tmp_path, monkeypatch):
    source, target = two
    monkeypatch.setattr("workflow_storage.paging.SMALL_PAGE", 0)
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
        bomb = b'{"workflow_storage": 2, "run": "' + b" " * 20_000_000 + b'"}\n'
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
            file.write(b'{"workflow_storage": 2, "run": [{}' + b",{}" * 5_000_000 + b"]}\n")
            file.write(good_lines[1])

        tracemalloc.start()
        try:
            damaged, done = import_runs(path, target)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()

        assert damaged == DamagedLine(1, "it holds more values than any run or state")
        assert done.outcome == "copied"
        assert peak < 40_000_000

    def test_a_small_delta_that_unpacks_to_gigabytes_fills_no_memory(
        self, two, tmp_path, good_lines
    ):
        source, target = two
        path = tmp_path / "runs.jsonl"
        run = stored_run(source)
        source.states.save_state(run.id, {"a": 1}, "node")
        source.states.save_state(run.id, {"a": 2}, "node")
        list(export_runs(source, path))
        of_run, first, second, *_ = path.read_text().splitlines()
        state = json.loads(second)
        del state["crc32"], state["state"]
        frame = zstd.compress(b"{" + b" " * (300 * 2**20) + b"}")
        bomb = encode_state(b"{" + b" " * 5000 + b"}", b"{}")[:1] + bytes(12) + frame
        state["stored"] = base64.b85encode(bomb).decode()
        lines = [of_run, first, json.dumps(state), good_lines[1].decode()]
        path.write_text("\n".join(lines))

        tracemalloc.start()
        try:
            damaged, refused, done = import_runs(path, target)
            _, most = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()

        assert "its state has 314,572,802 bytes, and 268,435,456 is the most" in damaged.reason
        assert (refused.outcome, done.outcome) == ("refused", "copied")
        assert most < 10_000_000

    def test_many_states_that_unpack_to_much_fill_no_memory(self, two, tmp_path):
        source, target = two
        path = tmp_path / "runs.jsonl"
        run = stored_run(source)
        writer = source.states.writer(run.id)
        for step in range(64):
            writer.save_state({"text": "x" * 900_000, "step": step}, "node")
        list(export_runs(source, path))
        assert path.stat().st_size < 1_000_000

        damaged, refused = import_runs(path, target, max_line=1_000_000)

        assert "take too much memory" in damaged.reason
        assert (refused.outcome, refused.states) == ("refused", damaged.number - 2)
        assert len(target.states.get_state_history(run.id)) == damaged.number - 2
        (done,) = import_runs(path, target, max_line=2_000_000)
        assert done.outcome == "updated"

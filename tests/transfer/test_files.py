"""Files of runs: compressed, damaged, replaced, streams, and those that cannot be."""

import os
import random
import subprocess

import pytest

from tests.transfer.conftest import assert_equal, filled, outcomes
from workflow_storage.testing import stored_run
from workflow_storage.transfer import (
    DamagedLine,
    ExportFileError,
    export_runs,
    import_runs,
)
from workflow_storage.validation import equal_runs


class TestFiles:
    @pytest.mark.parametrize("name", ["runs.jsonl", "runs.jsonl.gz", "runs.jsonl.zst"])
    def test_what_is_exported_and_imported_is_the_same(self, two, tmp_path, name):
        source, target = two
        filled(source)
        path = tmp_path / name

        exported = list(export_runs(source, path))
        assert {result.outcome for result in exported} == {"copied"}
        assert [file.name for file in tmp_path.iterdir()] == [name]
        assert set(outcomes(import_runs(path, target)).values()) == {"copied"}

        assert_equal(source, target)
        assert set(outcomes(import_runs(path, target)).values()) == {"unchanged"}
        beginning = path.read_bytes()[:4]
        assert beginning[:2] == {".gz": b"\x1f\x8b", ".zst": b"\x28\xb5"}.get(path.suffix, b'{"')

    @pytest.mark.parametrize("suffix", [".gz", ".zst"])
    def test_a_file_that_ends_too_early_gives_what_is_there(self, two, tmp_path, suffix):
        path = tmp_path / f"runs.jsonl{suffix}"
        source, target = two
        for number in range(200):
            noise = random.Random(number).randbytes(3000).hex()
            stored_run(source, id=f"run-{number}", inputs=noise)
        list(export_runs(source, path))
        path.write_bytes(path.read_bytes()[:-20_000])

        *good, last = import_runs(path, target)

        assert isinstance(last, DamagedLine)
        assert len(good) > 20
        assert target.runs.count_runs() == len(good)

        path.write_bytes(b"")
        assert [type(result) for result in import_runs(path, target)] == [DamagedLine]

    def test_a_compressed_file_with_a_flipped_bit_gives_what_comes_before(self, two, tmp_path):
        source, target = two
        for number in range(200):
            stored_run(source, inputs=random.Random(number).randbytes(3000).hex())
        for suffix in (".gz", ".zst"):
            path = tmp_path / f"runs{suffix}"
            list(export_runs(source, path))
            data = bytearray(path.read_bytes())
            for place in range(len(data) // 2, len(data) // 2 + 50):
                data[place] ^= 0xFF
            path.write_bytes(data)
            assert any(isinstance(result, DamagedLine) for result in import_runs(path, target))

    @pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
    def test_no_flipped_bit_changes_a_run(self, two, tmp_path, suffix):
        source, target = two
        for number in range(5):
            stored_run(source, id=f"run-{number}", inputs="some text", outputs=[number])
        path = tmp_path / f"runs.jsonl{suffix}"
        list(export_runs(source, path))
        data = path.read_bytes()
        originals = {run.id: run for run in source.runs.iter_runs()}
        chance = random.Random(3)

        for _ in range(60):
            damaged = bytearray(data)
            damaged[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            path.write_bytes(damaged)
            list(import_runs(path, target))
            for run in target.runs.iter_runs():
                assert equal_runs(run, originals[run.id])
                target.runs.delete(run.id)

    @pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
    def test_no_runs_are_a_file_too(self, two, tmp_path, suffix):
        path = tmp_path / f"runs.jsonl{suffix}"
        assert list(export_runs(two[0], path)) == []
        assert list(import_runs(path, two[1])) == []

    def test_a_file_that_is_replaced_keeps_its_mode(self, two, tmp_path):
        stored_run(two[0])
        path = tmp_path / "runs.jsonl"
        path.touch(0o600)
        list(export_runs(two[0], path))
        assert path.stat().st_mode & 0o777 == 0o600

    def test_links_and_pipes_stay_what_they_are(self, two, tmp_path):
        run = stored_run(two[0])
        (tmp_path / "real").write_text("old")
        (tmp_path / "link").symlink_to("real")
        list(export_runs(two[0], tmp_path / "link"))
        assert (tmp_path / "link").is_symlink()
        assert run.id in (tmp_path / "real").read_text()

        os.mkfifo(tmp_path / "pipe")
        with subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE) as reader:
            list(export_runs(two[0], tmp_path / "pipe"))
            assert run.id.encode() in reader.communicate(timeout=30)[0]
        assert (tmp_path / "pipe").is_fifo()
        with pytest.raises(ExportFileError, match="is a directory"):
            list(export_runs(two[0], tmp_path))

    @pytest.mark.parametrize("name", ["n" * 250, "n" * 300, "real/runs.jsonl"])
    def test_a_name_that_cannot_be_is_an_error_of_the_file(self, two, tmp_path, name):
        (tmp_path / "real").touch()
        stored_run(two[0])
        with pytest.raises(ExportFileError, match=r"too long|Not a directory"):
            list(export_runs(two[0], tmp_path / name))

    def test_a_file_that_is_not_compressed_says_so(self, two, tmp_path):
        (tmp_path / "runs.gz").write_text("plain\n")
        (result,) = import_runs(tmp_path / "runs.gz", two[1])
        assert "ot a gzip" in result.reason

    def test_a_file_that_cannot_be_opened_is_an_error(self, two, tmp_path):
        for use in (
            lambda path: export_runs(two[0], path),
            lambda path: import_runs(path, two[1]),
        ):
            with pytest.raises(ExportFileError, match="No such file or directory"):
                list(use(tmp_path / "gone" / "runs.jsonl"))

    def test_an_export_that_is_broken_off_leaves_no_file(self, two, tmp_path):
        stored_run(two[0])
        stored_run(two[0])
        exporting = export_runs(two[0], tmp_path / "runs.jsonl")
        next(exporting)
        exporting.close()
        assert list(tmp_path.iterdir()) == []

"""``import_runs``: runs from a file, and what is said of a damaged one."""

from tests.management.conftest import run_transfer


def test_damaged_lines_are_named_and_the_command_fails(target, redis_url, tmp_path):
    (tmp_path / "runs.jsonl").write_text("\n{}\nno JSON\n")

    _, err, error = run_transfer("import_runs", f"{tmp_path}/runs.jsonl", "--backend", redis_url)

    assert "Line 2: it is no run" in err
    assert "Line 3: it is no JSON" in err
    assert error == "2 of them did not go well; see above."

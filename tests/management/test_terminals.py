"""The commands as real processes: in terminals of any width, in pipes, in any encoding, stopped."""

import os
import re
import signal
import subprocess
import time
from datetime import timedelta

import pytest
from django.utils import timezone
from rich.cells import cell_len

from tests.management.terminals import MANAGE, ROOT, Terminal, piped, shown_in_terminal
from workflow_storage import export_runs
from workflow_storage.testing import stored_run

pytestmark = pytest.mark.slow

FIRST = "019a0b1c-2d3e-7000-8000-000000000001"
SECOND = "019a0b1c-2d3f-7000-8000-000000000002"


def store_two(backend):
    stored_run(
        backend,
        id=FIRST,
        workflow_name="invoice-extraction",
        status="failed",
        current_node="extract",
        error_message="ValueError: no total in the document\nTraceback …",
        duration_seconds=1234.5678,
        total_tokens=123_456_789,
        total_cost_usd=12.3456,
        labels={"tenant": "acme"},
    )
    stored_run(backend, id=SECOND, workflow_name="日本語のワークフロー-ü", status="completed")
    for number in range(3):
        backend.states.save_state(FIRST, {"n": number, "text": "日本語 ü"}, "extract-the-total")


@pytest.fixture
def stored(source):
    store_two(source)
    return source


COMMANDS = [
    ["list_runs"],
    ["show_run", FIRST],
    ["show_run", FIRST, "--diff"],
    ["run_stats", "--since=7d"],
    ["prune_runs", "--older-than=0s", "--dry-run"],
    ["update_runs", "label", "--workflow=invoice-extraction", "--set=a=b", "--dry-run"],
    ["fail_stalled_runs", "--idle=1h", "--dry-run"],
    ["check_runs"],
]
NUMBERS = ("1234.568", "123,456,789", "12.3456")


def without_prose(lines):
    """Leave out what a terminal wraps by itself: JSON, errors, ids, sums."""
    return [
        line for line in lines if not re.search(r"^  |^id|checked|^[~+-]|^failed in|From", line)
    ]


def assert_fits(lines, columns):
    for line in without_prose(lines):
        assert cell_len(line) <= columns, line
        for number in NUMBERS:
            # A number is there as a whole, or not at all.
            assert not (number[:4] in line and number not in line and "019a" not in line), line


def test_a_list_fits_into_a_narrow_terminal(stored, sqlite_url):
    lines, code = shown_in_terminal("list_runs", "--backend", sqlite_url, columns=40)

    assert code == 0
    assert_fits(lines, 40)
    assert "Workflow" in lines[0]
    together = "".join("".join(line[15:29] for line in lines).split())
    assert "invoice-extraction" in together
    assert "019a0b1c-2d3e" in "\n".join(lines)


LONG_NAME = "document-ingestion-nightly-eur"


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_a_name_of_thirty_characters_can_be_read(source, sqlite_url, columns):
    for number in range(3):
        stored_run(
            source,
            id=f"019a0b1c-2d3{number}-7000-8000-000000000001",
            workflow_name=LONG_NAME,
            status="failed",
            current_node="extract-the-total",
            error_message="ValueError: no total in the document",
        )

    for command in (["list_runs"], ["run_stats"]):
        lines, code = shown_in_terminal(*command, "--backend", sqlite_url, columns=columns)

        assert code == 0
        assert_fits(lines, columns)
        text = "\n".join(lines)
        if columns >= 80:
            assert LONG_NAME in text
        else:
            # Between words.
            assert "nightly-eur" in text.split()
            assert re.search(r"\bdocument-(ingestion-)?\s", text)
        if command == ["list_runs"]:
            assert ("ValueError" in text) == (columns >= 80)
            assert all(f"019a0b1c-2d3{number}" in text for number in range(3))


@pytest.mark.slow
@pytest.mark.parametrize("columns", [40, 80, 200])
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_fits_into_every_terminal(stored, sqlite_url, command, columns):
    lines, code = shown_in_terminal(*command, "--backend", sqlite_url, columns=columns)

    assert code == 0
    assert_fits(lines, columns)
    assert "Traceback (most" not in "\n".join(lines)


@pytest.mark.slow
def test_a_wide_terminal_shows_all_columns_in_colour_unless_that_is_not_wanted(stored, sqlite_url):
    terminal = Terminal("list_runs", "--backend", sqlite_url, columns=200)
    assert terminal.end() == 0
    assert "\x1b[31mfailed" in terminal.shown
    for shown in (FIRST, *NUMBERS, "ValueError: no total in the document", "extract"):
        assert shown in "\n".join(terminal.lines)
    for options, env in ((["--no-color"], {}), ([], {"NO_COLOR": "1"})):
        plain = Terminal("list_runs", "--backend", sqlite_url, *options, columns=200, **env)
        plain.end()
        assert "\x1b" not in plain.shown


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_writes_in_every_encoding(stored, sqlite_url, command, encoding):
    done = piped(*command, "--backend", sqlite_url, env={"PYTHONIOENCODING": encoding})

    assert (done.returncode, done.stderr) == (0, b"")
    done.stdout.decode(encoding)
    assert b"\x1b" not in done.stdout


def test_what_reads_no_further_gets_no_traceback(source, sqlite_url):
    for _ in range(300):
        stored_run(source, workflow_name="w" * 250)
    for arguments in (["list_runs", "--limit=300", "--format=jsonl"],):
        assert_head_is_quiet(*arguments, "--backend", sqlite_url)


def test_monitoring_fails_although_nobody_reads_to_the_end(source, sqlite_url):
    for _ in range(300):
        stored_run(source, workflow_name="w" * 250)
    arguments = ["list_runs", "--limit=300", "--fail-if-any", "--backend", sqlite_url]

    assert code_after_first_line(*arguments) == 1
    assert code_after_first_line(*arguments, "--status=failed") == 0


def code_after_first_line(*arguments):
    process = subprocess.Popen([*MANAGE, *arguments], cwd=ROOT, stdout=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    return process.wait(60)


def assert_head_is_quiet(*arguments):
    process = subprocess.Popen(
        [*MANAGE, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ["list_runs", "--limit=300"],
        ["list_runs", "--limit=300", "--format=csv"],
        ["list_runs", "--watch=0.1"],
        ["show_run", FIRST, "--format=json"],
        ["show_run", FIRST, "--steps=all"],
        ["show_run", FIRST, "--state"],
        ["run_stats", "--by=label:n"],
        ["export_runs", "/dev/stdout"],
    ],
    ids=" ".join,
)
def test_every_reader_may_stop_reading(stored, sqlite_url, command):
    for number in range(300):
        stored_run(stored, workflow_name="w" * 250, labels={"n": f"{number:0200}"})
    for number in range(300):
        stored.states.save_state(FIRST, {"text": "x" * 2000}, f"{number:0100}")
    assert_head_is_quiet(*command, "--backend", sqlite_url)


def unread(*arguments):
    """Return the exit code of a command whose output, of both kinds, nobody reads."""
    read, write = os.pipe()
    os.close(read)
    try:
        return subprocess.run(
            [*MANAGE, *arguments],
            cwd=ROOT,
            stdout=write,
            stderr=write,
            timeout=60,
            check=False,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        ).returncode
    finally:
        os.close(write)


@pytest.mark.slow
def test_what_changes_runs_is_done_though_nobody_reads_it(source, target, sqlite_url, redis_url):
    ended = stored_run(source, status="failed")
    stored_run(source, id="open", status="running")

    assert unread("copy_runs", "--from", sqlite_url, "--to", redis_url) == 0
    assert unread("update_runs", "cancel", ended.id, "open", "--no-input", "--backend", sqlite_url)
    assert source.runs.get("open").status == "cancelled"
    assert unread("prune_runs", "--older-than=0s", "--no-input", "--backend", sqlite_url) == 0
    assert (source.runs.count_runs(), target.runs.count_runs()) == (0, 2)


@pytest.mark.slow
@pytest.mark.parametrize("output", [[], ["--format=jsonl"]], ids=str)
def test_a_repair_goes_on_though_its_reader_stops_reading(source, sqlite_url, output):
    from django.db import connections

    for number in range(300):
        stored_run(source, id=f"{number:03}" + "x" * 33, labels={"n": "1"})
    with connections[source.alias].cursor() as cursor:
        cursor.execute("DELETE FROM workflow_run_labels")
    check = ["check_runs", *output, "--backend", sqlite_url]

    assert code_after_first_line(*check) == 1
    assert source.runs.count_runs(labels={"n": "1"}) == 0
    assert code_after_first_line(*check, "--repair") == 0
    assert source.runs.count_runs(labels={"n": "1"}) == 300
    assert unread(*check) == 0


@pytest.mark.slow
def test_what_is_done_run_by_run_goes_on_though_its_reader_stops_reading(
    source, target, sqlite_url, redis_url, tmp_path
):
    ago = timezone.now() - timedelta(hours=1)
    for number in range(300):
        stored_run(source, id=f"{number:03}" + "x" * 33, status="running", started_at=ago)
    store, path = ["--backend", sqlite_url], str(tmp_path / "runs.jsonl")

    for command in (
        ["fail_stalled_runs", "--idle=1m", *store],
        ["update_runs", "label", "--status=failed", "--set=a=b", "--no-input", *store],
        ["export_runs", path, *store],
        ["import_runs", path, "--backend", redis_url],
    ):
        assert code_after_first_line(*command, "--format=jsonl") == 0, command

    assert source.runs.count_runs(status="failed") == 300
    assert target.runs.count_runs(labels={"a": "b"}) == 300


@pytest.mark.slow
def test_usage_errors_exit_with_2_and_others_with_1(stored, sqlite_url):
    wrong = piped("list_runs", "--limit", "0", "--backend", sqlite_url)
    assert wrong.returncode == 2
    missing = piped("show_run", "gone", "--backend", sqlite_url)
    assert missing.returncode == 1
    assert missing.stderr.count(b"\n") == 1
    assert missing.stderr.startswith(b"CommandError: Workflow run not found: gone")


@pytest.mark.slow
def test_every_command_works_on_every_backend_as_a_process(any_backend, any_url, tmp_path):
    store_two(any_backend)
    export, archive = tmp_path / "runs.jsonl.gz", tmp_path / "archive.jsonl.zst"
    copied = f"sqlite:///{tmp_path}/copied.db"
    on_it = ["--backend", any_url]
    for command, said in (
        (["list_runs", *on_it], "ValueError: no total"),
        (["show_run", "019a0b1c-2d3e", *on_it], "extract-the-total"),
        (["run_stats", "--by=status", *on_it], "failed"),
        (["update_runs", "label", FIRST, "--set=seen=yes", *on_it], "1 run labelled."),
        (["fork_run", FIRST, "--step=1", *on_it], "pending"),
        (["fail_stalled_runs", "--idle=0s", *on_it], "0 runs set to failed."),
        (["export_runs", export, *on_it], "3 runs: 3 written"),
        (["import_runs", export, *on_it], "3 unchanged"),
        (["copy_runs", "--from", any_url, "--to", copied], "3 copied"),
        (["check_runs", "--repair", *on_it], "3 runs with 5 states checked: 0 problems."),
        (["record_command", "nightly", *on_it, "--", "list_runs", *on_it], "019a0b1c"),
        (
            ["prune_runs", "--older-than=0s", "--no-input", "--archive", archive, *on_it],
            "3 runs deleted.",
        ),
    ):
        done = piped(*command)
        assert (done.returncode, done.stderr) == (0, b""), command
        assert said in done.stdout.decode(), command
    assert [run.status for run in any_backend.runs.iter_runs()] == ["pending"]


@pytest.mark.slow
def test_it_is_asked_before_anything_is_deleted(stored, sqlite_url):
    for answer, left in (("n\n", 2), ("y\n", 0)):
        terminal = Terminal("prune_runs", "--older-than=0s", "--backend", sqlite_url)
        terminal.wait_for("Delete 2 runs? [y/N]")
        assert stored.runs.count_runs() == 2
        terminal.press(answer)
        assert terminal.end() == 0
        assert stored.runs.count_runs() == left
        assert ("Nothing was deleted." in terminal.shown) == bool(left)


@pytest.mark.slow
def test_it_is_asked_before_several_runs_are_changed(source, sqlite_url):
    for _ in range(2):
        stored_run(source, workflow_name="w")
    terminal = Terminal("update_runs", "cancel", "--workflow=w", "--backend", sqlite_url)
    terminal.wait_for("Cancel 2 runs? [y/N]")
    terminal.press("y\n")
    assert terminal.end() == 0
    assert source.runs.count_runs(status="cancelled") == 2


def many(backend, count=4000, states=1):
    """Store so many runs that a command takes a while for them."""
    from django.db import transaction

    with transaction.atomic(using=backend.alias):
        for number in range(count):
            run = stored_run(backend, status="completed", labels={"n": str(number)})
            for _ in range(states):
                backend.states.save_state(run.id, {"text": "x" * 500}, "node")


LONG = [
    (["prune_runs", "--older-than=0s", "--no-input"], r"Interrupted after [\d,]+ runs? deleted"),
    (
        ["prune_runs", "--older-than=0s", "--no-input", "--states-only", "--keep-states=0"],
        r"Interrupted after [\d,]+ states? deleted",
    ),
    (["prune_runs", "--older-than=0s", "--no-input", "--archive=ARCHIVE"], "Interrupted"),
    (["check_runs"], r"Interrupted: .*Go on with --before"),
    (["export_runs", "FILE"], r"Interrupted after [\d,]+ runs?\. The file was not written\."),
    (["import_runs", "EXPORT"], r"Interrupted after [\d,]+ runs?\. Run the same command again"),
    (["copy_runs", "--from=URL", "--to=OTHER"], r"Interrupted after [\d,]+ runs?\. Run the same"),
    (
        ["update_runs", "label", "--status=completed", "--set=a=b", "--no-input"],
        r"Interrupted after [\d,]+ runs? labelled",
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("command", "said"), LONG, ids=[" ".join(one) for one, _ in LONG])
def test_ctrl_c_leaves_a_sound_store_and_says_what_was_done(
    source, target, sqlite_url, redis_url, tmp_path, command, said
):
    many(source, 8000 if command == ["check_runs"] else 4000 if len(command) == 3 else 1500)
    export = tmp_path / "export.jsonl"
    if "EXPORT" in command:
        list(export_runs(source, export))
    names = {
        "ARCHIVE": tmp_path / "archive.jsonl.gz",
        "EXPORT": export,
        "FILE": tmp_path / "file.jsonl",
        "URL": sqlite_url,
        "OTHER": redis_url,
    }
    words = [_replaced(word, names) for word in command]
    store = {"import_runs": redis_url, "copy_runs": None}.get(command[0], sqlite_url)
    terminal = Terminal(*words, *(["--backend", store] if store else []), columns=120)
    # What is found has been counted, or else the bar is there.
    terminal.wait_for("Workflow" if command[0] == "prune_runs" else "runs")
    time.sleep(0.2)
    terminal.press_ctrl_c()
    code = terminal.end()

    text = " ".join(terminal.lines)
    assert code == 130, text
    assert re.search(said, text), text
    assert "Traceback" not in text
    for checked in (sqlite_url, redis_url):
        assert piped("check_runs", "--backend", checked).returncode == 0


def test_what_is_found_stands_above_the_bar(source, sqlite_url):
    from django.db import connections

    for number in range(30):
        stored_run(source, id=f"run-{number:02}", status="completed")
    with connections[source.alias].cursor() as cursor:
        cursor.execute("UPDATE workflow_runs SET duration_seconds = -1")
    command = ["check_runs", "--backend", sqlite_url]

    lines, code = shown_in_terminal(*command)
    assert code == 1
    assert [line for line in lines if "negative" in line] == [
        f"run-{number:02}: its duration is negative" for number in range(29, -1, -1)
    ]
    assert any("30/30 runs" in line for line in lines)
    lines, _ = shown_in_terminal(*command, "--format=jsonl", columns=200)
    assert not any("/30 runs" in line for line in lines)
    assert sum(line.startswith('{"run_id": "run-') for line in lines) == 30


@pytest.mark.slow
def test_stalled_runs_that_are_failed_stay_failed_after_ctrl_c(source, sqlite_url):
    ago = timezone.now() - timedelta(hours=1)
    for number in range(800):
        stored_run(source, id=f"{number:04}", status="running", started_at=ago)
    arguments = ["fail_stalled_runs", "--idle=1m", "--format=jsonl", "--backend", sqlite_url]
    terminal = Terminal(*arguments)
    terminal.wait_for("Stalled: no sign")
    terminal.press_ctrl_c()

    assert terminal.end() == 130
    said = re.search(r"Interrupted after ([\d,]+) runs? set to failed", "".join(terminal.lines))
    failed = int(said[1].replace(",", ""))
    assert 0 < failed < 800
    assert source.runs.count_runs(status="failed") in {failed, failed + 1}
    again = piped(*arguments)
    assert again.returncode == 0
    assert source.runs.count_runs(status="failed") == 800


def _replaced(word, names):
    name, _, value = word.partition("=")
    return f"{name}={names[value]}" if value in names else str(names.get(word, word))


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ["list_runs", "--watch=0.2"],
        ["show_run", "followed", "--follow", "--interval=0.2"],
        ["copy_runs", "--from=URL", "--to=OTHER", "--watch=0.2"],
    ],
    ids=" ".join,
)
def test_what_goes_on_and_on_is_ended_with_ctrl_c(source, target, sqlite_url, redis_url, command):
    stored_run(source, id="followed", workflow_name="followed", status="running")
    names = {"URL": sqlite_url, "OTHER": redis_url}
    words = [_replaced(word, names) for word in command]
    store = [] if command[0] == "copy_runs" else ["--backend", sqlite_url]
    terminal = Terminal(*words, *store)
    terminal.wait_for("1 run" if command[0] == "copy_runs" else "followed")
    terminal.press_ctrl_c()

    assert terminal.end() == 130
    assert "Traceback" not in terminal.shown


@pytest.mark.slow
def test_a_prune_that_is_killed_can_be_run_again(source, sqlite_url):
    many(source)
    process = subprocess.Popen(
        [*MANAGE, "prune_runs", "--older-than=0s", "--no-input", "-v0", "--backend", sqlite_url],
        cwd=ROOT,
    )
    deadline = time.monotonic() + 60
    while source.runs.count_runs() == 4000 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()

    assert piped("check_runs", "--backend", sqlite_url).returncode == 0
    done = piped("prune_runs", "--older-than=0s", "--no-input", "--backend", sqlite_url)
    assert done.returncode == 0
    assert source.runs.count_runs() == 0

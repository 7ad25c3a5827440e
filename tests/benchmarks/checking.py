"""``check_runs`` over ten million states: time, memory, and where it goes on after Ctrl-C."""

import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from django.core.management import call_command
from django.db import connections

from tests.benchmarks import samples
from tests.benchmarks.measure import Report, console
from tests.benchmarks.scale import fill, memory_now, peak_memory
from workflow_storage import StorageBackend, create_storage_backend
from workflow_storage.factory import forget

ROOT = Path(__file__).parents[2]

STATES_OF_A_RUN = 100
RUNS_AT_ONCE = 10_000
"""Runs whose states are made in one statement."""

ALLOWED = 1.3
"""What a check may take of time, beside reading alone, and a state among ten million beside others."""

ALLOWED_MB = 16
"""What it may take more of memory, at any number of states."""


class Checked(NamedTuple):
    """What a check has looked at, and what it took."""

    runs: int
    states: int
    seconds: float
    memory: float
    """How much the memory of the process grew, in MB."""
    before: str | None = None
    """The run to go on after."""


def run(*, quick: bool) -> None:
    sizes = [100_000, 1_000_000] if quick else [1_000_000, 10_000_000]
    report = Report("Check of states: SQLite, time of a state")
    memory = Report("Check of states: SQLite, growth of the process's memory", unit="MB")
    few, many = sizes
    with samples.folder() as folder:
        url = f"sqlite:///{folder}/few.db"
        backend = _filled(url, few)
        read = min(_read(backend, few) for _ in range(2))
        checks = [_checked(url) for _ in range(2)]
        taken = min(one.seconds for one in checks) / few
        report.add(f"check_runs, {few:,}", taken, "read alone", read, ALLOWED)
        memory.add(f"check_runs, {few:,}", checks[0].memory, "at most", ALLOWED_MB, 1)
        forget(backend.runs.alias)

        url = f"sqlite:///{folder}/many.db"
        backend = _filled(url, many)
        begun = _interrupted(url, after=taken * many / 2)
        assert begun.before is not None
        rest = _checked(url, before=begun.before)
        assert begun.runs + rest.runs == many // STATES_OF_A_RUN
        # The run in which it was interrupted is looked at again.
        assert many <= begun.states + rest.states < many + STATES_OF_A_RUN
        taken_of_many = (begun.seconds + rest.seconds) / many
        report.add(f"check_runs, {many:,}", taken_of_many, f"of {few:,}", taken, ALLOWED)
        for name, one in ((f"its first {begun.states:,}", begun), ("the rest of it", rest)):
            memory.add(name, one.memory, "at most", ALLOWED_MB, 1)
        console.print(
            f"Interrupted after {begun.runs:,} runs with {begun.states:,} states, gone on with "
            f"--before: {rest.runs:,} runs with {rest.states:,} states."
        )
        forget(backend.runs.alias)
    report.print()
    memory.print()


def _filled(url: str, states: int) -> StorageBackend:
    backend = create_storage_backend(url)
    count = states // STATES_OF_A_RUN
    with console.status(f"making {states:,} states"):
        fill(backend, count, states=0)
        with connections[backend.runs.alias].cursor() as cursor:
            for first in range(0, count, RUNS_AT_ONCE):
                cursor.execute(
                    "INSERT INTO execution_states (run_id, step, node_id, created_at, attempt, "
                    "state_json) WITH RECURSIVE steps(step) AS (SELECT 0 UNION ALL "
                    "SELECT step + 1 FROM steps WHERE step < %s) SELECT runs.id, step, 'node', "
                    'runs.started_at, 1, \'{"step":\' || step || \',"text":"x"}\' FROM '
                    "(SELECT id, started_at FROM workflow_runs WHERE id >= %s ORDER BY id "
                    "LIMIT %s) AS runs CROSS JOIN steps",
                    [STATES_OF_A_RUN - 1, f"{first:036}", RUNS_AT_ONCE],
                )
            cursor.execute("ANALYZE")
    return backend


def _read(backend: StorageBackend, states: int) -> float:
    """Return the seconds that it takes to read a state, with its run."""
    start, count = time.process_time(), 0
    for one in backend.runs.iter_runs():
        count += sum(1 for _ in backend.states.iter_state_history(one.id))
    assert count == states
    return (time.process_time() - start) / states


def _checked(url: str, before: str | None = None) -> Checked:
    out = io.StringIO()
    begin, start = memory_now(), time.process_time()
    call_command("check_runs", backend=url, before=before, stdout=out)
    taken = time.process_time() - start
    return Checked(*_counts(out.getvalue()), taken, max(peak_memory() - begin, 1))


def _interrupted(url: str, after: float) -> Checked:
    """Check in a process of its own, and press Ctrl-C after so many seconds of its time."""
    process = subprocess.Popen(
        [sys.executable, "manage.py", "check_runs", "--backend", url],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    begin = 0.0
    while (taken := _cpu_seconds(process.pid)) < after:
        assert process.poll() is None, "it ended before it was interrupted"
        if not begin and taken > after / 10:
            begin = _status(process.pid, "VmRSS")
        time.sleep(0.1)
    memory = max(_status(process.pid, "VmHWM") - begin, 1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130, said
    found = re.search(r"--before (\w+)", said)
    return Checked(*_counts(said), taken, memory, found and found[1])


def _counts(text: str) -> tuple[int, int]:
    found = re.search(r"([\d,]+) runs? with ([\d,]+) states? checked: 0 problems", text)
    assert found, text
    runs, states = (int(number.replace(",", "")) for number in found.groups())
    return runs, states


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # see proc(5)


def _status(pid: int, name: str) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024

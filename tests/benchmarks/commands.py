"""What the commands cost beside the calls of the repositories that they make, and their memory."""

import io
from collections.abc import Callable
from datetime import timedelta
from itertools import islice
from typing import Any

from django.core.management import call_command

from tests.benchmarks import checking, samples
from tests.benchmarks.measure import Report, console, medians
from tests.benchmarks.scale import START, fill, memory_now, peak_memory
from workflow_storage import StorageBackend, create_storage_backend
from workflow_storage.factory import forget

ALLOWED = 1.3
"""What a command may take, beside the call alone."""

ALLOWED_MB = 16
"""What a command may take more of memory, at any number of runs."""


def run(*, quick: bool) -> None:
    size = 100_000 if quick else 1_000_000
    with samples.folder() as folder:
        _measure("SQLite", f"sqlite:///{folder}/commands.db", size, quick=quick)
    with samples.postgres_url() as url:
        if url:
            _measure("PostgreSQL", url, size, quick=quick)
    checking.run(quick=True)  # see LONG in __main__ for what is larger


def _measure(name: str, url: str, size: int, *, quick: bool) -> None:
    backend = create_storage_backend(url)
    with console.status(f"{name}: making {size:,} runs"):
        fill(backend, size, states=1)
    slices = size // 50
    report = Report(f"Commands: {name}, {size:,} runs, beside the calls alone")
    memory = Report(f"Commands: {name}, growth of the process's memory", unit="MB")
    for what, (command, call) in _pairs(backend, url, size, slices).items():
        before = memory_now()
        command()
        memory.add(what, max(peak_memory() - before, 1), "at most", ALLOWED_MB, 1)
        taken = medians({"command": command, "call": call}, 2 if quick else 3)
        report.add(what, taken["command"], "the call alone", taken["call"], ALLOWED)
    before = memory_now()
    left = backend.runs.count_runs()
    call_command(
        "prune_runs", older_than="0s", interactive=False, backend=url, stdout=io.StringIO()
    )
    pruned = left - backend.runs.count_runs()
    memory.add(
        f"prune_runs of {pruned:,}", max(peak_memory() - before, 1), "at most", ALLOWED_MB, 1
    )
    report.print()
    memory.print()
    forget(backend.runs.alias)


def _pairs(
    backend: StorageBackend, url: str, size: int, slices: int
) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    runs, states = backend
    end = START + timedelta(seconds=size + 1)

    def call(command: str, **options: Any) -> None:
        call_command(command, backend=url, stdout=io.StringIO(), **options)

    def read_states() -> None:
        for one in islice(runs.iter_runs(), slices):
            for _ in states.iter_state_history(one.id):
                pass

    def prune(**options: Any) -> None:
        call("prune_runs", older_than=end, interactive=False, limit=slices, **options)

    def ended() -> int:
        return sum(1 for _ in runs.iter_finished(before=end, limit=slices))

    def delete() -> int:
        return runs.delete_finished(before=end, limit=slices)

    return {
        "run_stats": (lambda: call("run_stats"), runs.summarize),
        "run_stats --by status,day": (
            lambda: call("run_stats", by="status,day"),
            lambda: runs.summarize(by=("status", "day")),
        ),
        f"check_runs, {slices:,} runs": (lambda: call("check_runs", limit=slices), read_states),
        f"prune_runs --dry-run, {slices:,} runs": (lambda: prune(dry_run=True), ended),
        f"prune_runs, {slices:,} runs": (prune, lambda: (ended(), delete())),
        f"prune_runs -v 0, {slices:,} runs": (lambda: prune(verbosity=0), delete),
    }

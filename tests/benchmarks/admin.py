"""The pages of the admin at a million runs, beside ten thousand, and beside their budgets."""

import json
import multiprocessing
import os
import random
import statistics
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from itertools import islice
from multiprocessing.connection import Connection
from typing import Any, NamedTuple
from urllib.parse import urlencode

from django.db import connections
from rich.table import Table

from tests.benchmarks import samples
from tests.benchmarks.measure import console
from workflow_storage import StorageBackend, create_storage_backend
from workflow_storage.factory import forget

SMALL, LARGE = 10_000, 1_000_000
DAYS = 60
WORKFLOWS = 64
RARE_EVERY = 40
"""One run of the workflow with few runs is in each so-manieth part of the table."""
STEPS = 3
LONG_STEPS = 300
RATIO = 2.0
LIST, RUN, WORKFLOW, WEEK, MONTH = 100, 50, 150, 250, 600
"""Milliseconds of server time."""
TRACEBACK = "".join(
    f'  File "/srv/app/nodes/{name}.py", line {line}, in {name}\n    return call({name})\n'
    for line, name in enumerate(("fetch", "parse", "extract", "validate", "store") * 3)
)


class Page(NamedTuple):
    """A page that is asked for."""

    what: str
    path: str
    budget: float
    """Milliseconds."""
    same_work: bool = True
    """Whether it is as much work at any number of runs, if there are as many rows."""
    cached: bool = False
    """Whether what was summed up before may be used."""


class Measured(NamedTuple):
    """A page at one size."""

    seconds: float
    queries: int
    rows: int
    """Of the list, if it is one."""


def run(*, quick: bool) -> None:
    small, large = (2_000, 10_000) if quick else (SMALL, LARGE)
    rounds = 0 if quick else 9
    with samples.folder() as folder:
        urls = {size: f"sqlite:///{folder}/{size}.db" for size in (small, large)}
        _fill_all("SQLite", urls)
        if not quick:
            _compare("SQLite without ANALYZE", urls, rounds)
        _analyze(urls)
        _compare("SQLite", urls, rounds)
    with samples.postgres_url() as small_url, samples.postgres_url() as large_url:
        if small_url and large_url:
            urls = {small: small_url, large: large_url}
            _fill_all("PostgreSQL", urls)
            _analyze(urls)
            _compare("PostgreSQL", urls, rounds)


def _compare(name: str, urls: dict[int, str], rounds: int) -> None:
    small, large = urls
    table = Table(
        title=f"Admin: {name}, {large:,} runs, server time of a page, median",
        title_justify="left",
        box=None,
        header_style="bold",
    )
    for column in ("page", "queries", f"{small:,}", f"{large:,}", "ratio", "budget", ""):
        table.add_column(column, justify="left" if column == "page" else "right")
    with _site(urls[small]) as at_small, _site(urls[large]) as at_large:
        pages = zip(pages_of(small), pages_of(large), strict=True)
        for page, of_large in pages:
            ours = _medians({at_small: page, at_large: of_large}, rounds)
            seconds, queries, rows = ours[at_large]
            ratio = seconds / ours[at_small].seconds
            same_work = page.same_work and rows == ours[at_small].rows
            is_good = seconds * 1e3 <= page.budget and (ratio <= RATIO or not same_work)
            table.add_row(
                page.what,
                f"{queries}"
                if queries == ours[at_small].queries
                else f"{ours[at_small].queries}, {queries}",
                f"{ours[at_small].seconds * 1e3:.0f} ms",
                f"{seconds * 1e3:.0f} ms",
                f"{ratio:.1f}" if same_work else "",
                f"≤ {page.budget:g} ms",
                "[green]ok[/]" if is_good else "[red]missed[/]",
            )
    console.print(table)
    console.print()


def _medians(asked: dict[Connection, Page], rounds: int) -> dict[Connection, Measured]:
    taken: dict[Connection, list[Measured]] = {site: [] for site in asked}
    # The first time is to count the queries, and to warm up if there are others.
    for number in range(rounds + 1):
        for site, page in asked.items():
            site.send((page.path, page.cached, number == 0))
            answer = site.recv()
            if isinstance(answer, str):
                raise AssertionError(f"{page.what}: {answer}")
            taken[site].append(Measured(*answer))
    return {
        site: times[0]._replace(
            seconds=statistics.median(one.seconds for one in times[1:] or times)
        )
        for site, times in taken.items()
    }


def pages_of(count: int) -> list[Page]:
    """Return the pages that are measured with so many runs."""
    runs = "/admin/workflow_storage/workflowrun/"
    states = "/admin/workflow_storage/executionstate/"
    middle, long_run = run_id(count // 2, count), run_id(long_number(count), count)
    late = run_id(int(count * (1 - 3.5 / DAYS)), count)

    def listed(what: str, budget: float = LIST, **parameters: Any) -> Page:
        return Page(f"list, {what}", f"{runs}?{urlencode(parameters, doseq=True)}", budget)

    def searched(what: str, term: str, **parameters: Any) -> Page:
        return listed(f"search for {what}", q=term, **parameters)

    windowed = [
        listed("at least 60 s", slower=60),
        listed("at least an hour", slower=3600),
        listed("at least 0.10 USD", cost="0.1"),
        listed("at least 0.10 USD, in the middle of 7 days", cost="0.1", before=late),
        listed("at least 10 USD, which none is", cost="10"),
        listed("failed today", status__exact="failed", ended="24h"),
        listed("ended in the last hour", ended="1h"),
        listed("started by a run", children=1),
        listed("by duration", sort="duration"),
        listed("by cost", sort="cost"),
        searched("a text of an error", "timed out"),
        searched("a text that no error has", "never said"),
        searched("a text of an error in 7 days", "timed out", since="7d"),
    ]
    overviews = [
        Page(f"overview, {what}", f"{runs}overview/?since={since}", budget, same_work=False)
        for what, since, budget in (
            ("a day", "24h", WEEK),
            ("7 days", "7d", WEEK),
            ("30 days", "30d", MONTH),
        )
    ]
    return [
        Page("list, first page", runs, LIST),
        listed("a page in the middle", before=middle),
        listed("the page before one in the middle", after=middle),
        *(
            listed(status, status__exact=status)
            for status in ("pending", "running", "completed", "failed", "cancelled")
        ),
        listed("failed or cancelled", status__exact=["failed", "cancelled"]),
        listed("completed or failed", status__exact=["completed", "failed"]),
        listed("failed, a page in the middle", status__exact="failed", before=middle),
        listed("a workflow", WORKFLOW, workflow="workflow-07"),
        listed("a workflow, in the middle", WORKFLOW, workflow="workflow-07", before=middle),
        listed("a workflow with few runs", WORKFLOW, workflow="rare-a"),
        listed("two workflows with few runs", WORKFLOW, workflow=["rare-a", "rare-b"]),
        listed("a workflow, failed", WORKFLOW, workflow="workflow-07", status__exact="failed"),
        listed("few runs, failed", WORKFLOW, workflow="rare-a", status__exact="failed"),
        listed("few runs, 7 days", WORKFLOW, workflow="rare-a", since="7d"),
        listed("a label", label="tenant=t7"),
        listed("a label, in the middle", label="tenant=t7", before=middle),
        listed("a label with few runs", label="ticket=few"),
        listed("a label, failed", label="tenant=t7", status__exact="failed"),
        listed("a label, 7 days", label="tenant=t7", since="7d"),
        listed("a label of nearly all runs", label="stage=live"),
        listed("a label of nearly all, an hour", label="stage=live", since="1h"),
        listed("a label of nearly all, a time long ago", label="stage=live", until="50d"),
        listed("a label of nearly all, running", label="stage=live", status__exact="running"),
        listed("a label of nearly all, few runs", label="stage=live", workflow="rare-a"),
        listed("two labels", label=["stage=live", "tenant=t7"]),
        *(listed(since, since=since) for since in ("1h", "24h", "7d", "30d")),
        listed("before 30 days ago", until="30d"),
        listed("failed, 24 h", status__exact="failed", since="24h"),
        listed("stalled", stalled=1),
        listed("waiting", waiting=1),
        listed("children of a run", parent=run_id(count // 20, count)),
        *(page._replace(same_work=False) for page in windowed),
        searched("the beginning of an id", middle[:18]),
        searched("an id", middle),
        searched("the beginning of workflows", "workflow-1"),
        searched("the beginning of nearly all workflows", "work"),
        searched("the beginning of two workflows with few runs", "rare"),
        searched("a workflow", "workflow-07"),
        searched("a label", "tenant=t7"),
        Page("run", f"{runs}{middle}/change/", RUN),
        Page(f"run of {LONG_STEPS} steps", f"{runs}{long_run}/change/", RUN),
        Page("states of a run", f"{states}?run__id__exact={middle}", RUN),
        Page(f"states of a run of {LONG_STEPS}", f"{states}?run__id__exact={long_run}", RUN),
        Page("all states", states, RUN),
        Page(f"state of a run of {LONG_STEPS}", f"{runs}{long_run}/states/150/", RUN),
        Page("compare two runs", f"{runs}{middle}/compare/{run_id(count // 2 + 1, count)}/", RUN),
        *overviews,
        overviews[-1]._replace(what="overview, 30 days again", budget=RUN, cached=True),
        Page(
            "overview, 7 days of a workflow",
            f"{runs}overview/?since=7d&workflow=workflow-07",
            WEEK,
            same_work=False,
        ),
    ]


@contextmanager
def _site(url: str) -> Iterator[Connection]:
    """Start a process with the sample site on a database, which answers how long a page took."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(url, theirs))
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        ours.close()
        process.join()


def _serve(url: str, asked: Connection) -> None:
    os.environ |= {
        "DJANGO_SETTINGS_MODULE": "testproject.settings",
        "DATABASE_URL": url,
        "DEBUG": "0",
    }
    import django

    django.setup()
    from django.contrib.auth import get_user_model
    from django.core.cache import cache
    from django.core.management import call_command
    from django.test import Client
    from django.test.utils import CaptureQueriesContext

    call_command("migrate", verbosity=0)
    user, _ = get_user_model().objects.get_or_create(
        username="benchmark", is_superuser=True, is_staff=True
    )
    client = Client(SERVER_NAME="localhost")
    client.force_login(user)
    client.get("/admin/workflow_storage/workflowrun/")  # which compiles templates
    while True:
        try:
            path, is_cached, is_counted = asked.recv()
        except EOFError:
            return
        if not is_cached:
            cache.clear()
        queries = 0
        start = time.perf_counter()
        if is_counted:
            with CaptureQueriesContext(connections["default"]) as captured:
                response = client.get(path)
            queries = len(captured)
        else:
            response = client.get(path)
        taken = time.perf_counter() - start
        if response.status_code == 200:
            shown = (getattr(response, "context_data", None) or {}).get("cl")
            asked.send((taken, queries, len(shown.result_list) if shown else 0))
        else:
            asked.send(f"{path} answered {response.status_code}")


# The runs


def run_id(number: int, count: int) -> str:
    """Return the id of a run: a UUIDv7 by the time of its start, as `started` makes it."""
    milliseconds = int(started(number, count).timestamp() * 1000)
    return str(uuid.UUID(int=milliseconds << 80 | 7 << 76 | 2 << 62 | number))


def started(number: int, count: int) -> datetime:
    """Return when a run was started: all of them are spread evenly over the days."""
    return NOW - timedelta(days=DAYS) * (1 - (number + 1) / (count + 1))


def long_number(count: int) -> int:
    """Return the number of the run that has many steps."""
    return count // 2 + 7


NOW = datetime.now(UTC)

RUN_COLUMNS = (
    "id",
    "workflow_name",
    "status",
    "inputs",
    "outputs",
    "error_message",
    "started_at",
    "completed_at",
    "duration_seconds",
    "total_tokens",
    "total_cost_usd",
    "heartbeat_at",
    "current_node",
    "waiting_for",
    "attempt",
    "attempt_started_at",
    "worker",
    "parent_id",
    "labels",
)
LABEL_COLUMNS = ("run_id", "name", "value", "started_at")
STATE_COLUMNS = (
    "run_id",
    "step",
    "node_id",
    "created_at",
    "attempt",
    "duration_seconds",
    "tokens",
    "cost_usd",
    "state_json",
)


def _rows(count: int) -> Iterator[tuple[Any, list[Any], list[Any]]]:
    """Yield the row of each run, those of its labels and those of its states."""
    chance = random.Random(1)
    weights = [1 / (1 + number) ** 0.5 for number in range(WORKFLOWS)]
    names = [f"workflow-{number:02}" for number in range(WORKFLOWS)]
    rare_every = max(1, count // RARE_EVERY)
    nodes = ("fetch", "parse", "extract")
    for number in range(count):
        identity, begun = run_id(number, count), started(number, count)
        name = chance.choices(names, weights)[0]
        if number % rare_every in (5, 6):
            name = ("rare-a", "rare-b")[number % rare_every - 5]
        (status,) = chance.choices(
            ("completed", "failed", "cancelled", "pending", "running"), (88, 6, 3, 2, 1)
        )
        has_ended = status not in ("pending", "running")
        seconds = chance.lognormvariate(2, 1.5) if has_ended else None
        labels = {
            "stage": "test" if number % 50 == 0 else "live",
            "tenant": f"t{int(100 * chance.random() ** 2)}",
            "user": f"u{chance.randrange(10_000)}",
        }
        if number % rare_every == 9:
            labels["ticket"] = "few"
        error = f"Traceback (most recent call last):\n{TRACEBACK}"
        error += ("TimeoutError: timed out", "ValueError: no total")[number % 2]
        run_row = (
            identity,
            name,
            status,
            json.dumps({"file": f"invoice-{number}.pdf", "text": "x" * 200}),
            json.dumps({"total": number, "lines": ["y" * 40] * 5}) if has_ended else None,
            error if status == "failed" else None,
            begun,
            begun + timedelta(seconds=seconds) if seconds is not None else None,
            seconds,
            chance.randrange(20_000),
            chance.lognormvariate(-5, 1),
            # Half of what runs is alive.
            NOW + timedelta(days=1) if status == "running" and number % 2 else None,
            nodes[number % STEPS],
            "approval by finance" if status == "pending" and number % 4 == 0 else None,
            1,
            begun,
            "host-1:4242",
            run_id(number // 10, count) if number % 10 == 3 else None,
            json.dumps(labels),
        )
        steps = LONG_STEPS if number == long_number(count) else STEPS
        state_rows = [
            (
                identity,
                step,
                nodes[step % STEPS],
                begun + timedelta(seconds=step),
                1,
                1.0,
                100,
                0.001,
                json.dumps({"step": step, "messages": [{"role": "user", "content": "z" * 150}]}),
            )
            for step in range(steps)
        ]
        yield run_row, [(identity, *label, begun) for label in labels.items()], state_rows


def _fill_all(name: str, urls: dict[int, str]) -> None:
    for count, url in urls.items():
        backend = create_storage_backend(url)
        with console.status(f"{name}: making {count:,} runs"):
            rows = _rows(count)
            while batch := list(islice(rows, 20_000)):
                _insert(backend, "workflow_runs", RUN_COLUMNS, [run for run, _, _ in batch])
                labels = [label for _, labels, _ in batch for label in labels]
                _insert(backend, "workflow_run_labels", LABEL_COLUMNS, labels)
                states = [state for _, _, states in batch for state in states]
                _insert(backend, "execution_states", STATE_COLUMNS, states)
        forget(backend.alias)


def _insert(
    backend: StorageBackend, table: str, columns: tuple[str, ...], rows: list[tuple[Any, ...]]
) -> None:
    connection = connections[backend.alias]
    names = ", ".join(columns)
    with connection.cursor() as cursor:
        if connection.vendor == "postgresql":
            with cursor.copy(f"COPY {table} ({names}) FROM STDIN") as copy:
                for row in rows:
                    copy.write_row(row)
            return
        places = ", ".join(["%s"] * len(columns))
        adapted = [
            tuple(
                value.replace(tzinfo=None) if isinstance(value, datetime) else value
                for value in row
            )
            for row in rows
        ]
        cursor.execute("BEGIN")
        cursor.executemany(f"INSERT INTO {table} ({names}) VALUES ({places})", adapted)
        cursor.execute("COMMIT")


def _analyze(urls: dict[int, str]) -> None:
    for url in urls.values():
        backend = create_storage_backend(url)
        with connections[backend.alias].cursor() as cursor:
            vendor = connections[backend.alias].vendor
            cursor.execute("ANALYZE" if vendor == "sqlite" else "VACUUM ANALYZE")
        forget(backend.alias)

"""The contract as a pytest suite, for our backends and for anybody else's.

Subclass `StorageContract` and give it a fixture ``backend`` that yields an empty
`StorageBackend`. A fixture ``open_backend`` that gives a picklable callable, which opens
the same store again, adds the tests that write from several processes::

    class TestMyBackend(StorageContract):
        @pytest.fixture
        def open_backend(self, tmp_path):
            return functools.partial(open_my_store, str(tmp_path))

        @pytest.fixture
        def backend(self, open_backend):
            return open_backend()

Needs pytest and hypothesis, which are in the extra ``test``.
"""

# Tests are named after what they check, and use plain numbers and assert.

from __future__ import annotations

import asyncio
import functools
import itertools
import json
import math
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from enum import Enum, IntEnum
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import UUID

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.db import connections
from django.utils import timezone
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from workflow_storage import (
    Checkpoint,
    InvalidFieldError,
    InvalidStatusError,
    RunAlreadyExistsError,
    RunChangedError,
    RunNotFoundError,
    RunStatus,
    StatusConflictError,
    StepConflictError,
    StorageBackend,
    StorageError,
    WorkflowRun,
)
from workflow_storage.base import PAGE_SIZE
from workflow_storage.validation import equal_runs, run_fields

if TYPE_CHECKING:
    from collections.abc import Callable

_R = TypeVar("_R")

STATUSES = list(RunStatus)
TERMINAL = [status for status in STATUSES if status.is_terminal]
NOT_TERMINAL = [status for status in STATUSES if not status.is_terminal]

# The fixtures stay the same from example to example, on purpose: every example adds to
# the same store.
against_the_store = settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.differing_executors,
        HealthCheck.too_slow,
    ],
)

any_text = st.text(st.characters(exclude_categories=()), max_size=20)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**40), 10**40)
    | st.floats(allow_nan=False, allow_infinity=False)
    | any_text,
    lambda children: (
        st.lists(children, max_size=4) | st.dictionaries(any_text, children, max_size=4)
    ),
    max_leaves=12,
)
json_objects = st.dictionaries(any_text, json_values, max_size=5)
storable_text = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=36
)


class NotJSON:
    """Something that JSON has no form for, with a name that is the same in every process."""

    def __repr__(self) -> str:
        return "NotJSON"


NOT_JSON = NotJSON()

AWKWARD_VALUES = [
    "a bare string",
    "",
    0,
    False,
    [],
    {},
    1e23,
    -0.0,
    5e-324,
    1.7976931348623157e308,
    10**40,
    -(2**63) - 1,
    {"": {"": ""}},
    {"\0": "\0", "a\0b": ["\0\0"]},
    {"\ud800": "\udfff", "pair": "\ud83d\ude00", "reversed": "\ude00\ud83d"},
    {"text that looks escaped": ["\\u0000", "\\\\u0000", "\\ud800", "\\", "\\\0"]},
    {"emoji": "\N{GRINNING FACE}", "中文": "日本語", "line": "\u2028\x7f"},
    {"1": "one", "1.0": "two", "true": True, "null": None},
    ["'; DROP TABLE workflow_runs; --", "%s", "%(x)s", "{}", '"'],
]


# No two slices of it are alike.
_PROSE = "".join(chr(0x20 + number * number * number % 0x24F) for number in range(40_000))

StateChange = tuple[str, int, bool]
state_changes = st.tuples(
    st.sampled_from(["grow", "grow", "grow", "edit", "shrink", "replace", "clear"]),
    st.integers(0, 20_000),
    st.booleans(),
)


def changed_state(state: dict[str, Any], change: str, size: int) -> dict[str, Any]:
    """Give the next state of a run: one that grew, or changed otherwise, by a size in bytes."""
    prose = _PROSE[size : 2 * size]
    messages = list(state.get("messages", []))
    if change == "grow":
        return {**state, "messages": [*messages, prose]}
    if change == "edit" and messages:
        messages[len(messages) // 2] = prose[:100]
        return {**state, "messages": messages}
    if change == "shrink":
        return {**state, "messages": messages[: len(messages) // 2]}
    return {"other": prose} if change == "replace" else {}


def new_run(workflow_name: str = "contract", **fields: Any) -> WorkflowRun:
    """Make a run that is not stored yet."""
    return WorkflowRun(workflow_name=workflow_name, **fields)


def stored_run(backend: StorageBackend, **fields: Any) -> WorkflowRun:
    """Store a new run and give it."""
    run = new_run(**fields)
    backend.runs.add(run)
    return run


def read_run(backend: StorageBackend, run: WorkflowRun) -> WorkflowRun:
    """Read a run that must be there."""
    stored = backend.runs.get(run.id)
    assert stored is not None
    return stored


def in_json(value: object) -> str:
    """Give a value as JSON text: equal only for values equal type for type, in order."""
    return json.dumps(json.loads(json.dumps(value)))


def nested(depth: int) -> dict[str, Any]:
    """Give a dict that holds a dict that holds a dict, and so on."""
    value: dict[str, Any] = {}
    for _ in range(depth):
        value = {"a": value}
    return value


def ids(runs: list[WorkflowRun]) -> list[str]:
    """Give the ids of some runs, in their order."""
    return [run.id for run in runs]


def newest_first(runs: list[WorkflowRun]) -> list[str]:
    """Give the ids of some runs in the order of the contract."""
    return [run.id for run in sorted(runs, key=lambda run: (run.started_at, run.id), reverse=True)]


def in_threads(count: int, work: Callable[[int], _R]) -> list[_R]:
    """Run a function in several threads at once, each with its number."""

    def worker(number: int) -> _R:
        try:
            return work(number)
        finally:
            connections.close_all()

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(worker, range(count), timeout=60))


def outcome(work: Callable[[], object]) -> str:
    """Give the name of the error that a call raises, or ``done``."""
    try:
        work()
    except StorageError as exc:
        return type(exc).__name__
    return "done"


def _save_states(
    open_backend: Callable[[], StorageBackend], run_id: str, writer: int, count: int
) -> list[int]:
    """Save states large enough to be based on one another, half of them by a writer."""
    states = open_backend().states
    state_writer = states.writer(run_id)
    steps = []
    for number in range(count):
        state = {"writer": writer, "count": number, "text": "text " * 1000}
        if number % 2:
            steps.append(states.save_state(run_id, state, f"writer-{writer}"))
        else:
            steps.append(state_writer.save_state(state, f"writer-{writer}"))
    return steps


class RunsContract:
    """What `AbstractWorkflowRunRepository` promises."""

    def test_add_stores_every_field(self, backend: StorageBackend) -> None:
        start = timezone.now() - timedelta(hours=1)
        fields: dict[str, Any] = {
            "id": "a-task-id",
            "workflow_name": "every field",
            "status": "failed",
            "config_snapshot": {"model": "m"},
            "inputs": {"customer": 42},
            "outputs": [1, 2],
            "error_message": "it broke",
            "started_at": start,
            "completed_at": start + timedelta(seconds=1),
            "duration_seconds": 0.75,
            "total_tokens": 2**63 - 1,
            "total_cost_usd": 0.1,
            "heartbeat_at": start + timedelta(microseconds=1),
        }

        backend.runs.add(WorkflowRun(**fields))

        stored = backend.runs.get("a-task-id")
        assert stored is not None
        assert {name: getattr(stored, name) for name in fields} == fields

    def test_get_of_an_unknown_run_gives_none(self, backend: StorageBackend) -> None:
        assert backend.runs.get("unknown") is None

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

    @pytest.mark.parametrize(
        "fields",
        [
            {"id": ""},
            {"id": "x" * 37},
            {"id": "nul\0"},
            {"id": "\ud800"},
            {"id": 42},
            {"id": None},
            {"workflow_name": ""},
            {"workflow_name": "x" * 257},
            {"workflow_name": "nul\0"},
            {"workflow_name": "\udfff"},
            {"status": "done"},
            {"status": None},
            {"started_at": None},
            {"started_at": "2026-01-01"},
            {"completed_at": "yesterday", "status": "failed"},
            {"completed_at": datetime(2026, 1, 1, tzinfo=UTC), "status": "running"},
            {"duration_seconds": 1.0, "status": "pending"},
            {"duration_seconds": math.nan, "status": "failed"},
            {"total_tokens": 2**63},
            {"total_tokens": 1.5},
            {"total_tokens": True},
            {"total_cost_usd": math.inf},
            {"total_cost_usd": Decimal("sNaN")},
            {"started_at": datetime(1, 1, 1, tzinfo=timezone.get_fixed_timezone(330))},
            {"started_at": datetime(9999, 12, 31, 23, tzinfo=timezone.get_fixed_timezone(-330))},
            {"total_cost_usd": "1.0"},
            {"total_cost_usd": 10**400},
            {"error_message": b"bytes"},
            {"inputs": math.nan},
            {"outputs": {"x": [-math.inf]}},
            {"config_snapshot": {"key": NOT_JSON}},
            {"inputs": {("a", "tuple"): 1}},
            {"inputs": {1, 2}},
            {"inputs": Decimal("NaN")},
        ],
        ids=repr,
    )
    def test_add_refuses_what_it_cannot_store_as_it_is(
        self, backend: StorageBackend, fields: dict[str, Any]
    ) -> None:
        run = new_run(**{"id": "refused", "workflow_name": "refused", **fields})

        with pytest.raises((InvalidFieldError, InvalidStatusError), match=next(iter(fields))[:6]):
            backend.runs.add(run)

        assert backend.runs.count_runs() == 0

    def test_add_refuses_a_time_without_time_zone(self, backend: StorageBackend) -> None:
        with pytest.raises(ValueError, match="started_at is a naive datetime"):
            backend.runs.add(new_run(started_at=datetime(2026, 1, 1)))

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

    def test_add_of_a_taken_id_raises_and_leaves_the_stored_run(
        self, backend: StorageBackend
    ) -> None:
        run = stored_run(backend, inputs="first")

        with pytest.raises(RunAlreadyExistsError, match=f"already exists: {run.id}"):
            backend.runs.add(new_run(id=run.id, inputs="second"))

        assert read_run(backend, run).inputs == "first"

    @pytest.mark.parametrize("status", TERMINAL)
    def test_add_of_an_ended_run_completes_it(
        self, backend: StorageBackend, status: RunStatus
    ) -> None:
        start = timezone.now() - timedelta(seconds=10)
        run = stored_run(backend, status=status, started_at=start)

        stored = read_run(backend, run)
        assert stored.completed_at is not None
        assert stored.duration_seconds == (stored.completed_at - start).total_seconds()

    def test_times_are_exact_to_the_microsecond_in_any_time_zone(
        self, backend: StorageBackend
    ) -> None:
        start = datetime.fromisoformat("2026-03-29T02:30:00.123457+05:30")
        run = stored_run(backend, started_at=start)

        stored = read_run(backend, run).started_at
        assert stored == start
        assert timezone.is_aware(stored)

    @pytest.mark.parametrize("value", AWKWARD_VALUES, ids=ascii)
    def test_awkward_payloads_come_back_equal(self, backend: StorageBackend, value: Any) -> None:
        run = stored_run(backend, inputs=value, config_snapshot=value)
        backend.runs.update(run.id, outputs=value)

        stored = read_run(backend, run)
        for field in ("inputs", "config_snapshot", "outputs"):
            assert json.dumps(getattr(stored, field)) == in_json(value)

    @against_the_store
    @given(value=json_values)
    def test_any_json_value_comes_back_equal(self, backend: StorageBackend, value: Any) -> None:
        run = stored_run(backend, inputs=value)

        assert json.dumps(read_run(backend, run).inputs) == in_json(value)

    def test_dates_decimals_uuids_and_models_come_back_in_json_form(
        self, backend: StorageBackend
    ) -> None:
        class Invoice(BaseModel):
            number: int
            due: date

        run = stored_run(
            backend,
            inputs={
                "date": date(2026, 2, 1),
                "datetime": datetime(2026, 2, 1, 3, 4, 5, 678901, tzinfo=UTC),
                "timedelta": timedelta(hours=1),
                "decimal": Decimal("10.50"),
                "uuid": UUID(int=7),
                "model": Invoice(number=1, due=date(2026, 2, 1)),
            },
        )

        assert read_run(backend, run).inputs == {
            "date": "2026-02-01",
            "datetime": "2026-02-01T03:04:05.678901Z",
            "timedelta": "PT1H",
            "decimal": "10.50",
            "uuid": "00000000-0000-0000-0000-000000000007",
            "model": {"number": 1, "due": "2026-02-01"},
        }

    def test_what_cannot_be_stored_in_an_error_message_is_replaced(
        self, backend: StorageBackend
    ) -> None:
        run = stored_run(backend, error_message="a\0b \ud800 \ud83d\ude00")
        assert read_run(backend, run).error_message == "a\ufffdb \ufffd \N{GRINNING FACE}"

        backend.runs.update(run.id, error_message="\0")
        assert read_run(backend, run).error_message == "\ufffd"

        backend.runs.update_status(run.id, "failed", error_message="\udfff")
        assert read_run(backend, run).error_message == "\ufffd"

    @against_the_store
    @given(message=any_text)
    def test_any_error_message_can_be_stored(self, backend: StorageBackend, message: str) -> None:
        run = stored_run(backend)

        backend.runs.update_status(run.id, "failed", error_message=message)

        stored = read_run(backend, run).error_message
        assert stored is not None
        assert "\0" not in stored
        if message.isprintable():
            assert stored == message

    @against_the_store
    @given(cost=st.floats(allow_nan=False, allow_infinity=False))
    def test_any_finite_cost_comes_back_equal(self, backend: StorageBackend, cost: float) -> None:
        run = stored_run(backend, total_cost_usd=cost)

        assert read_run(backend, run).total_cost_usd == cost

    def test_list_by_workflow_gives_its_newest_runs_first(self, backend: StorageBackend) -> None:
        now = timezone.now()
        runs = [stored_run(backend, started_at=now - timedelta(hours=age)) for age in (2, 0, 1)]
        stored_run(backend, workflow_name="another")

        assert ids(backend.runs.list_by_workflow("contract")) == newest_first(runs)
        assert ids(backend.runs.list_by_workflow("contract", limit=2)) == newest_first(runs)[:2]
        assert backend.runs.list_by_workflow("unknown") == []
        assert backend.runs.list_by_workflow("impossible\0") == []

    def test_runs_that_start_at_the_same_time_are_listed_by_id_descending(
        self, backend: StorageBackend
    ) -> None:
        now = timezone.now()
        names = ["b", "B", "a", "_", "ä", "Z", "z", "aa"]
        for name in names:
            stored_run(backend, id=name, started_at=now)

        assert ids(backend.runs.list_runs()) == sorted(names, reverse=True)

    def test_list_runs_filters_by_status_name_and_start(self, backend: StorageBackend) -> None:
        now = timezone.now()
        runs = [
            stored_run(backend, workflow_name=name, status=status, started_at=now - age)
            for name in ("a", "b")
            for status in STATUSES
            for age in (timedelta(0), timedelta(hours=1), timedelta(hours=2))
        ]
        list_runs, count_runs = backend.runs.list_runs, backend.runs.count_runs

        def check(expected: list[WorkflowRun], **filters: Any) -> None:
            assert ids(list_runs(**filters)) == newest_first(expected)
            assert count_runs(**filters) == len(expected)
            assert ids(list(backend.runs.iter_runs(**filters))) == newest_first(expected)

        check(runs)
        check([run for run in runs if run.workflow_name == "a"], workflow_name="a")
        check([run for run in runs if run.status == "failed"], status="failed")
        check([run for run in runs if run.status == "failed"], status=RunStatus.FAILED)
        check([run for run in runs if run.status in TERMINAL], status=TERMINAL)
        check([], status=[])
        hour_ago = now - timedelta(hours=1)
        check([run for run in runs if run.started_at >= hour_ago], started_after=hour_ago)
        check([run for run in runs if run.started_at < hour_ago], started_before=hour_ago)
        check(
            [
                run
                for run in runs
                if run.workflow_name == "b"
                and run.status in {"failed", "running"}
                and run.started_at == hour_ago
            ],
            workflow_name="b",
            status={"failed", "running"},
            started_after=hour_ago,
            started_before=now,
        )

    def test_filters_that_make_no_sense_raise(self, backend: StorageBackend) -> None:
        with pytest.raises(InvalidStatusError, match="Invalid run status: 'done'"):
            backend.runs.list_runs(status="done")
        with pytest.raises(InvalidStatusError):
            backend.runs.count_runs(status=["failed", "done"])
        with pytest.raises(ValueError, match="started_after is a naive datetime"):
            backend.runs.list_runs(started_after=datetime(2026, 1, 1))
        for limit in (-1, 10**30, 1.5, True):
            with pytest.raises(ValueError, match="limit"):
                backend.runs.list_runs(limit=limit)  # type: ignore[arg-type]
        with pytest.raises(InvalidStatusError):
            backend.runs.list_runs(status=5)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="no such filter"):
            backend.runs.list_runs(name="x")  # type: ignore[call-arg]
        assert backend.runs.list_runs(limit=0) == []

    @against_the_store
    @given(
        ages=st.lists(st.integers(0, 3), max_size=12),
        page_size=st.integers(1, 5),
        status=st.sampled_from([None, "failed", ["failed", "pending"]]),
    )
    def test_pages_after_a_run_give_every_run_once_in_order(
        self, backend: StorageBackend, ages: list[int], page_size: int, status: Any
    ) -> None:
        start = datetime(2026, 1, 1, tzinfo=UTC)
        workflow_name = WorkflowRun().id
        runs = [
            stored_run(
                backend,
                workflow_name=workflow_name,
                started_at=start - timedelta(seconds=age),
                status=("failed", "pending", "running")[number % 3],
            )
            for number, age in enumerate(ages)
        ]
        wanted = [
            run for run in runs if status is None or run.status == status or run.status in status
        ]

        paged: list[str] = []
        before: str | None = None
        while page := backend.runs.list_runs(
            workflow_name=workflow_name, status=status, before=before, limit=page_size
        ):
            assert len(page) <= page_size
            paged += ids(page)
            before = paged[-1]

        assert paged == newest_first(wanted)

    def test_a_page_after_an_unknown_run_raises(self, backend: StorageBackend) -> None:
        with pytest.raises(RunNotFoundError, match="Workflow run not found: gone"):
            backend.runs.list_runs(before="gone")

    def test_a_page_after_a_deleted_run_is_found_by_the_run_itself(
        self, backend: StorageBackend
    ) -> None:
        now = timezone.now()
        old, new = (stored_run(backend, started_at=now - timedelta(hours=h)) for h in (1, 0))
        backend.runs.delete(new.id)

        assert ids(backend.runs.list_runs(before=new)) == [old.id]

    def test_iter_runs_goes_on_while_its_runs_are_deleted(self, backend: StorageBackend) -> None:
        for _ in range(PAGE_SIZE + 50):
            stored_run(backend)

        seen = set()
        for run in backend.runs.iter_runs(workflow_name="contract"):
            seen.add(run.id)
            backend.runs.delete(run.id)

        assert len(seen) == PAGE_SIZE + 50
        assert backend.runs.count_runs() == 0

    def test_update_changes_the_given_fields_only(self, backend: StorageBackend) -> None:
        run = stored_run(backend, inputs={"a": 1}, outputs="old", total_tokens=1)
        other = stored_run(backend, outputs="other")

        backend.runs.update(run.id, outputs={"b": 2}, total_tokens=None, total_cost_usd=Decimal(2))

        stored = read_run(backend, run)
        assert stored.inputs == {"a": 1}
        assert stored.outputs == {"b": 2}
        assert stored.total_tokens is None
        assert stored.total_cost_usd == 2.0
        assert read_run(backend, other).outputs == "other"

    @pytest.mark.parametrize(
        "fields",
        [
            {"id": "new"},
            {"status": "failed"},
            {"workflow_name": "new"},
            {"started_at": None},
            {"completed_at": None},
            {"unknown": 1},
            {"total_tokens": "many"},
            {"inputs": math.nan},
        ],
        ids=repr,
    )
    def test_update_of_a_fixed_or_invalid_field_changes_nothing(
        self, backend: StorageBackend, fields: dict[str, Any]
    ) -> None:
        run = stored_run(backend, outputs="old")

        with pytest.raises(ValueError, match=next(iter(fields))):
            backend.runs.update(run.id, outputs="new", **fields)

        assert read_run(backend, run).outputs == "old"

    def test_changes_to_an_unknown_run_raise(self, backend: StorageBackend) -> None:
        message = "Workflow run not found: gone"
        with pytest.raises(RunNotFoundError, match=message):
            backend.runs.update("gone", outputs=1)
        with pytest.raises(RunNotFoundError, match=message):
            backend.runs.update("gone")
        with pytest.raises(RunNotFoundError, match=message):
            backend.runs.update_status("gone", "failed")
        with pytest.raises(RunNotFoundError, match=message):
            backend.runs.update_status("gone", "failed", expected="running")
        with pytest.raises(RunNotFoundError, match=message):
            backend.runs.heartbeat("gone")
        with pytest.raises(RunNotFoundError, match=message):
            backend.runs.delete("gone")

    @pytest.mark.parametrize(("old", "new"), list(itertools.product(STATUSES, TERMINAL)))
    def test_update_status_to_a_terminal_one_sets_its_times(
        self, backend: StorageBackend, old: RunStatus, new: RunStatus
    ) -> None:
        start = timezone.now() - timedelta(seconds=90, microseconds=1)
        run = stored_run(backend, status=old, started_at=start)

        before = timezone.now()
        backend.runs.update_status(run.id, new, outputs={"x": 1})

        stored = read_run(backend, run)
        assert stored.status == new
        assert stored.outputs == {"x": 1}
        assert stored.completed_at is not None
        assert before <= stored.completed_at <= timezone.now()
        assert stored.duration_seconds == (stored.completed_at - start).total_seconds()

    @pytest.mark.parametrize(("old", "new"), list(itertools.product(TERMINAL, NOT_TERMINAL)))
    def test_leaving_a_terminal_status_clears_its_times(
        self, backend: StorageBackend, old: RunStatus, new: RunStatus
    ) -> None:
        run = stored_run(backend, status=old)

        backend.runs.update_status(run.id, new)

        stored = read_run(backend, run)
        assert stored.status == new
        assert stored.completed_at is None
        assert stored.duration_seconds is None

    @against_the_store
    @given(
        start=st.datetimes(datetime(1971, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC)),
        seconds=st.integers(0, 10**15).map(lambda number: number / 10**6),
    )
    def test_durations_are_exact(
        self, backend: StorageBackend, start: datetime, seconds: float
    ) -> None:
        completed = start + timedelta(seconds=seconds)
        run = stored_run(backend, started_at=start)

        backend.runs.update_status(run.id, "completed", completed_at=completed)

        stored = read_run(backend, run)
        assert stored.completed_at == completed
        assert stored.duration_seconds == (completed - start).total_seconds()

    def test_update_status_takes_given_times(self, backend: StorageBackend) -> None:
        run = stored_run(backend)
        completed = run.started_at + timedelta(seconds=5)

        backend.runs.update_status(
            run.id, "completed", completed_at=completed, duration_seconds=2.5
        )

        stored = read_run(backend, run)
        assert stored.completed_at == completed
        assert stored.duration_seconds == 2.5

    def test_update_status_refuses_result_times_of_a_run_that_goes_on(
        self, backend: StorageBackend
    ) -> None:
        run = stored_run(backend)
        with pytest.raises(InvalidFieldError, match="duration_seconds belongs to"):
            backend.runs.update_status(run.id, "running", duration_seconds=1.0)
        assert read_run(backend, run).status == "pending"

    def test_update_status_refuses_an_unknown_status(self, backend: StorageBackend) -> None:
        run = stored_run(backend)
        with pytest.raises(InvalidStatusError, match="Use one of: pending, running"):
            backend.runs.update_status(run.id, "done")
        with pytest.raises(InvalidStatusError):
            backend.runs.update_status(run.id, "failed", expected="done")
        with pytest.raises(ValueError, match="expected is empty"):
            backend.runs.update_status(run.id, "failed", expected=[])
        assert read_run(backend, run).status == "pending"

    def test_update_status_with_expected_changes_only_a_run_in_that_status(
        self, backend: StorageBackend
    ) -> None:
        run = stored_run(backend, status="running", outputs="old")

        with pytest.raises(StatusConflictError, match="is running, expected failed or pending"):
            backend.runs.update_status(
                run.id, "completed", expected=["pending", "failed"], outputs="new"
            )
        stored = read_run(backend, run)
        assert (stored.status, stored.outputs) == ("running", "old")

        backend.runs.update_status(
            run.id, "completed", expected={"pending", "running"}, outputs="new"
        )
        stored = read_run(backend, run)
        assert (stored.status, stored.outputs) == ("completed", "new")

    def test_heartbeat_sets_heartbeat_at(self, backend: StorageBackend) -> None:
        run = stored_run(backend)
        before = timezone.now()

        backend.runs.heartbeat(run.id)

        heartbeat = read_run(backend, run).heartbeat_at
        assert heartbeat is not None
        assert before <= heartbeat <= timezone.now()

    def test_delete_removes_the_run_and_its_states(self, backend: StorageBackend) -> None:
        run, other = stored_run(backend), stored_run(backend)
        for stored in (run, other):
            backend.states.save_state(stored.id, {}, "node")

        backend.runs.delete(run.id)

        assert backend.runs.get(run.id) is None
        assert backend.states.get_state_history(run.id) == []
        assert len(backend.states.get_state_history(other.id)) == 1

    def test_a_deleted_id_can_be_used_again(self, backend: StorageBackend) -> None:
        run = stored_run(backend)
        backend.states.save_state(run.id, {}, "node")
        backend.runs.delete(run.id)

        backend.runs.add(new_run(id=run.id))

        assert backend.states.save_state(run.id, {}, "node") == 0

    def test_delete_finished_deletes_what_ended_before(self, backend: StorageBackend) -> None:
        now = timezone.now()
        start = now - timedelta(days=10)
        for name in ("a", "b"):
            for status in STATUSES:
                for ended in (now - timedelta(days=2), now):
                    times = {"completed_at": ended} if status.is_terminal else {}
                    run = stored_run(
                        backend, workflow_name=name, status=status, started_at=start, **times
                    )
                    backend.states.save_state(run.id, {}, "node")
        before = now - timedelta(days=1)

        assert (
            backend.runs.delete_finished(before=before, workflow_name="a", statuses="failed") == 1
        )
        assert backend.runs.count_runs(workflow_name="a", status="failed") == 1
        assert backend.runs.delete_finished(before=before, batch_size=2) == 5
        assert backend.runs.delete_finished(before=before) == 0

        left = list(backend.runs.iter_runs())
        assert len(left) == 14
        assert all(run.completed_at is None or run.completed_at >= before for run in left)
        assert all(len(backend.states.get_state_history(run.id)) == 1 for run in left)

    def test_delete_finished_refuses_what_would_delete_unfinished_runs(
        self, backend: StorageBackend
    ) -> None:
        stored_run(backend, status="running")
        now = timezone.now()
        with pytest.raises(InvalidStatusError, match="Invalid run status: 'running'"):
            backend.runs.delete_finished(before=now, statuses=["failed", "running"])
        with pytest.raises(ValueError, match="batch_size is 0"):
            backend.runs.delete_finished(before=now, batch_size=0)
        with pytest.raises(ValueError, match="before is a naive datetime"):
            backend.runs.delete_finished(before=datetime(2026, 1, 1))
        assert backend.runs.count_runs() == 1

    def test_list_stalled_gives_running_runs_without_a_sign_of_life(
        self, backend: StorageBackend
    ) -> None:
        old = timezone.now() - timedelta(hours=2)
        silent = stored_run(backend, status="running", started_at=old)
        beating = stored_run(backend, status="running", started_at=old)
        backend.runs.heartbeat(beating.id)
        saving = stored_run(backend, status="running", started_at=old)
        backend.states.save_state(saving.id, {}, "node")
        once_beating = stored_run(
            backend, status="running", started_at=old, heartbeat_at=old + timedelta(minutes=1)
        )
        stored_run(backend, status="running")
        for status in set(STATUSES) - {RunStatus.RUNNING}:
            stored_run(backend, status=status, started_at=old)

        stalled = backend.runs.list_stalled(timedelta(hours=1))

        assert ids(stalled) == newest_first([silent, once_beating])
        assert backend.runs.list_stalled(timedelta(hours=3)) == []

    def test_the_newest_checkpoint_is_the_sign_of_life(self, backend: StorageBackend) -> None:
        now = timezone.now()
        old = now - timedelta(hours=2)
        pruned = stored_run(backend, status="running", started_at=old)
        copied = stored_run(backend, status="running", started_at=old)
        backend.states.save_state(pruned.id, {}, "node")
        for step, at in enumerate((now, old)):
            backend.states.append(
                copied.id,
                [Checkpoint(step=step, node_id="node", state_data={}, created_at=at)],
            )
        assert ids(backend.runs.list_stalled(timedelta(hours=1))) == [copied.id]

        backend.states.delete_states(pruned.id)

        stalled = backend.runs.list_stalled(timedelta(hours=1))
        assert ids(stalled) == newest_first([pruned, copied])

    def test_a_run_that_has_just_been_set_to_running_is_not_stalled(
        self, backend: StorageBackend
    ) -> None:
        run = stored_run(backend, started_at=timezone.now() - timedelta(days=1))

        backend.runs.update_status(run.id, "running")

        assert backend.runs.list_stalled(timedelta(hours=1)) == []

    def test_fail_stalled_fails_stalled_runs(self, backend: StorageBackend) -> None:
        old = timezone.now() - timedelta(hours=2)
        run = stored_run(backend, status="running", started_at=old)
        alive = stored_run(backend, status="running")

        assert backend.runs.fail_stalled(timedelta(hours=1)) == 1

        stored = read_run(backend, run)
        assert stored.status == "failed"
        assert stored.error_message is not None
        assert "no sign of life for more than 1:00:00" in stored.error_message
        assert read_run(backend, alive).status == "running"

    def test_fail_stalled_measures_a_run_that_had_a_duration(self, backend: StorageBackend) -> None:
        start = timezone.now() - timedelta(hours=2)
        run = new_run(status="running", started_at=start, heartbeat_at=start, duration_seconds=5.0)
        backend.runs.put(run)

        assert backend.runs.fail_stalled(timedelta(hours=1)) == 1

        failed = read_run(backend, run)
        assert failed.completed_at is not None
        assert failed.duration_seconds == pytest.approx(7200, abs=60)

    def test_fail_stalled_keeps_the_result_of_a_run_that_finishes_meanwhile(
        self, backend: StorageBackend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        old = timezone.now() - timedelta(hours=2)
        run = stored_run(backend, status="running", started_at=old)
        deleted = stored_run(backend, status="running", started_at=old)
        stalled = backend.runs.list_stalled(timedelta(hours=1))
        monkeypatch.setattr(backend.runs, "list_stalled", lambda idle: stalled)
        backend.runs.update_status(run.id, "completed", outputs="result")
        backend.runs.delete(deleted.id)

        assert backend.runs.fail_stalled(timedelta(hours=1)) == 0

        stored = read_run(backend, run)
        assert (stored.status, stored.outputs) == ("completed", "result")

    def test_fail_stalled_leaves_a_run_that_gives_a_sign_of_life_meanwhile(
        self, backend: StorageBackend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        old = timezone.now() - timedelta(hours=2)
        beating, saving = (stored_run(backend, status="running", started_at=old) for _ in "ab")
        stalled = backend.runs.list_stalled(timedelta(hours=1))
        monkeypatch.setattr(backend.runs, "list_stalled", lambda idle: stalled)
        backend.runs.heartbeat(beating.id)
        backend.states.save_state(saving.id, {}, "node")

        assert backend.runs.fail_stalled(timedelta(hours=1)) == 0

    @pytest.mark.parametrize("idle", [60, None, timedelta(seconds=-1), timedelta.max])
    def test_list_stalled_takes_a_timedelta(self, backend: StorageBackend, idle: Any) -> None:
        with pytest.raises((TypeError, ValueError), match="Pass a timedelta"):
            backend.runs.list_stalled(idle)

    def test_put_stores_a_run_exactly_and_replaces_only_what_was_read(
        self, backend: StorageBackend
    ) -> None:
        start = timezone.now() - timedelta(hours=1)
        run = new_run(
            id="put",
            status="failed",
            inputs={"a": [1, 1.0, True]},
            started_at=start,
            heartbeat_at=start + timedelta(minutes=1),
            total_cost_usd=0.5,
        )
        assert run.completed_at is None

        backend.runs.put(run)

        stored = read_run(backend, run)
        assert equal_runs(stored, run)
        assert run_fields(stored)["duration_seconds"] is None
        with pytest.raises(RunAlreadyExistsError):
            backend.runs.put(run)
        backend.states.save_state(run.id, {"kept": True}, "node")
        later = new_run(
            id="put",
            workflow_name="another",
            status="completed",
            started_at=start,
            completed_at=start + timedelta(minutes=2),
            duration_seconds=7.5,
        )
        with pytest.raises(RunChangedError, match="put is not as it was read"):
            backend.runs.put(later, over=new_run(id="put", status="failed", started_at=start))
        assert equal_runs(read_run(backend, run), stored)

        backend.runs.put(later, over=stored)

        assert equal_runs(read_run(backend, run), later)
        assert ids(backend.runs.list_by_workflow("another")) == ["put"]
        assert backend.runs.list_by_workflow("contract") == []
        assert ids(backend.runs.list_runs(status="completed")) == ["put"]
        assert backend.states.get_latest_state(run.id) == {"kept": True}
        for over in (new_run(id="gone"), later):
            with pytest.raises(RunNotFoundError):
                backend.runs.put(new_run(id="gone"), over=over)
        assert backend.runs.count_runs() == 1

    def test_put_refuses_what_cannot_be_stored(self, backend: StorageBackend) -> None:
        with pytest.raises(InvalidFieldError, match="inputs is not JSON"):
            backend.runs.put(new_run(inputs=math.nan))
        with pytest.raises(TypeError, match="Pass a WorkflowRun"):
            backend.runs.put("run")  # type: ignore[arg-type]

    def test_delete_unchanged_deletes_only_what_is_as_it_was_read(
        self, backend: StorageBackend
    ) -> None:
        run = stored_run(backend, status="completed", inputs={"n": 1})
        other = stored_run(backend)
        read = read_run(backend, run)
        backend.states.save_state(run.id, {}, "node")
        with pytest.raises(RunChangedError):
            backend.runs.delete_unchanged(read, None)
        last = backend.states.get_latest_checkpoint(run.id)
        backend.runs.update(run.id, inputs={"n": 1.0})
        with pytest.raises(RunChangedError):
            backend.runs.delete_unchanged(read, last)
        read = read_run(backend, run)

        backend.runs.delete_unchanged(read, last)

        assert backend.runs.get(run.id) is None
        assert backend.states.get_state_history(run.id) == []
        assert ids(list(backend.runs.iter_runs())) == [other.id]
        with pytest.raises(RunNotFoundError):
            backend.runs.delete_unchanged(read, last)


class StatesContract:
    """What `AbstractExecutionStateRepository` promises."""

    def test_save_state_numbers_the_steps_of_each_run_from_zero(
        self, backend: StorageBackend
    ) -> None:
        run, other = stored_run(backend), stored_run(backend)

        steps = [backend.states.save_state(run.id, {"n": n}, f"node-{n}") for n in range(3)]

        assert steps == [0, 1, 2]
        assert backend.states.save_state(other.id, {}, "node") == 0

    def test_a_checkpoint_has_step_node_state_and_time(self, backend: StorageBackend) -> None:
        run = stored_run(backend)
        before = timezone.now()
        backend.states.save_state(run.id, {"a": 1}, "first")
        backend.states.save_state(run.id, {"b": 2}, "second")

        checkpoint = backend.states.get_latest_checkpoint(run.id)

        assert checkpoint is not None
        assert before <= checkpoint.pop("created_at") <= timezone.now()  # type: ignore[misc]
        assert checkpoint == {"step": 1, "node_id": "second", "state_data": {"b": 2}}
        assert backend.states.get_latest_state(run.id) == {"b": 2}

    def test_any_step_of_the_past_can_be_read(self, backend: StorageBackend) -> None:
        run = stored_run(backend)
        for number in range(40):
            backend.states.save_state(run.id, {"n": number}, f"node-{number}")

        history = backend.states.get_state_history(run.id)

        assert [checkpoint["step"] for checkpoint in history] == list(range(40))
        assert [checkpoint["state_data"]["n"] for checkpoint in history] == list(range(40))
        assert list(backend.states.iter_state_history(run.id)) == history
        for after in (-2, 0, 17, 38, 39, 2**40):
            found = list(backend.states.iter_state_history(run.id, after=after))
            assert found == history[max(after + 1, 0) :]
        assert [backend.states.get_state(run.id, step) for step in range(40)] == history
        for step in (40, -1, 2**40, 10**5000):
            assert backend.states.get_state(run.id, step) is None
        assert backend.states.get_state(run.id, True) == history[1]
        for no_step in ("0", "", None):
            with pytest.raises(TypeError, match="step is a"):
                backend.states.get_state(run.id, no_step)  # type: ignore[arg-type]
            with pytest.raises(TypeError, match="step is a"):
                list(backend.states.iter_state_history(run.id, after=no_step))  # type: ignore[arg-type]

    def test_a_run_without_states_has_an_empty_history(self, backend: StorageBackend) -> None:
        run = stored_run(backend)
        for run_id in (run.id, "unknown"):
            assert backend.states.get_latest_state(run_id) is None
            assert backend.states.get_latest_checkpoint(run_id) is None
            assert backend.states.get_state(run_id, 0) is None
            assert backend.states.get_state_history(run_id) == []

    def test_save_state_of_an_unknown_run_raises(self, backend: StorageBackend) -> None:
        with pytest.raises(RunNotFoundError, match="Workflow run not found: gone"):
            backend.states.save_state("gone", {}, "node")

    @pytest.mark.parametrize(
        ("state", "error"),
        [
            (None, TypeError),
            ([], TypeError),
            ("text", TypeError),
            ({"x": NOT_JSON}, TypeError),
            ({"x": {1}}, TypeError),
            ({"x": b""}, TypeError),
            ({(1, 2): 1}, TypeError),
            ({"x": math.nan}, ValueError),
            ({"x": [math.inf]}, ValueError),
        ],
        ids=repr,
    )
    def test_save_state_refuses_what_is_not_a_json_object(
        self, backend: StorageBackend, state: Any, error: type[Exception]
    ) -> None:
        run = stored_run(backend)

        with pytest.raises(error, match="state_data is") as caught:
            backend.states.save_state(run.id, state, "node")

        assert isinstance(caught.value, StorageError)
        assert backend.states.get_state_history(run.id) == []

    def test_save_state_refuses_what_cannot_be_read_back(self, backend: StorageBackend) -> None:
        run = stored_run(backend)
        endless: dict[str, Any] = {}
        endless["self"] = endless
        for state in (endless, nested(200_000)):
            with pytest.raises(InvalidFieldError, match="state_data is not JSON"):
                backend.states.save_state(run.id, state, "node")

    @pytest.mark.parametrize("node_id", ["", "x" * 129, "nul\0", "\ud800", None])
    def test_save_state_refuses_an_impossible_node_id(
        self, backend: StorageBackend, node_id: Any
    ) -> None:
        run = stored_run(backend)
        with pytest.raises(InvalidFieldError, match="node_id"):
            backend.states.save_state(run.id, {}, node_id)
        assert backend.states.get_latest_state(run.id) is None

    @pytest.mark.parametrize("value", AWKWARD_VALUES, ids=ascii)
    def test_awkward_states_come_back_equal(self, backend: StorageBackend, value: Any) -> None:
        run = stored_run(backend)
        backend.states.save_state(run.id, {"value": value}, "node")

        assert json.dumps(backend.states.get_latest_state(run.id)) == in_json({"value": value})

    @against_the_store
    @given(states=st.lists(json_objects, min_size=1, max_size=6))
    def test_any_states_come_back_equal(
        self, backend: StorageBackend, states: list[dict[str, Any]]
    ) -> None:
        run = stored_run(backend)
        for state in states:
            backend.states.save_state(run.id, state, "node")

        stored = [
            checkpoint["state_data"] for checkpoint in backend.states.get_state_history(run.id)
        ]
        assert json.dumps(stored) == in_json(states)
        assert json.dumps(backend.states.get_latest_state(run.id)) == in_json(states[-1])

    @settings(against_the_store, max_examples=8)
    @given(changes=st.lists(state_changes, min_size=1, max_size=20))
    def test_large_states_that_change_in_any_way_come_back_equal(
        self, backend: StorageBackend, changes: list[StateChange]
    ) -> None:
        run = stored_run(backend)
        writer = backend.states.writer(run.id)
        states: list[dict[str, Any]] = []
        for change, size, remembers in changes:
            states.append(changed_state(states[-1] if states else {}, change, size))
            save = (
                writer.save_state
                if remembers
                else functools.partial(backend.states.save_state, run.id)
            )
            assert save(states[-1], "node") == len(states) - 1

        history = backend.states.get_state_history(run.id)
        assert [checkpoint["state_data"] for checkpoint in history] == states
        for checkpoint in history:
            step = checkpoint["step"]
            assert backend.states.get_state(run.id, step) == checkpoint
            assert next(backend.states.iter_state_history(run.id, after=step - 1)) == checkpoint
        assert backend.states.get_latest_state(run.id) == states[-1]

    def test_deeply_nested_states_come_back_equal(self, backend: StorageBackend) -> None:
        run = stored_run(backend)
        backend.states.save_state(run.id, nested(500), "node")

        assert backend.states.get_latest_state(run.id) == nested(500)

    def test_large_states_come_back_equal(self, backend: StorageBackend) -> None:
        run = stored_run(backend)
        states = [{"text": "x" * 5_000_000}, {"text": "ä" * 2_000_000}, {"text": "\0" * 500_000}]
        for state in states:
            backend.states.save_state(run.id, state, "node")

        for step, state in enumerate(states):
            checkpoint = backend.states.get_state(run.id, step)
            assert checkpoint is not None
            assert checkpoint["state_data"] == state

    def test_changing_a_dict_after_saving_it_changes_nothing_stored(
        self, backend: StorageBackend
    ) -> None:
        run = stored_run(backend)
        state: dict[str, Any] = {"messages": ["first"]}
        backend.states.save_state(run.id, state, "node")
        state["messages"].append("second")

        assert backend.states.get_latest_state(run.id) == {"messages": ["first"]}

    @pytest.mark.parametrize("keep_last", [0, 1, 5, 9, 10, 11])
    def test_delete_states_keeps_the_newest_readable(
        self, backend: StorageBackend, keep_last: int
    ) -> None:
        run, other = stored_run(backend), stored_run(backend)
        for number in range(10):
            for stored in (run, other):
                backend.states.save_state(stored.id, {"n": number, "text": "x" * 99}, "node")

        deleted = backend.states.delete_states(run.id, keep_last=keep_last)

        kept = min(keep_last, 10)
        assert deleted == 10 - kept
        history = backend.states.get_state_history(run.id)
        assert [checkpoint["step"] for checkpoint in history] == list(range(10 - kept, 10))
        assert [checkpoint["state_data"]["n"] for checkpoint in history] == list(
            range(10 - kept, 10)
        )
        assert backend.states.save_state(run.id, {"n": 10}, "node") == (10 if kept else 0)
        assert backend.states.get_latest_state(run.id) == {"n": 10}
        assert len(backend.states.get_state_history(other.id)) == 10

    @pytest.mark.parametrize("keep_last", [1, 2, 7, 16, 19])
    def test_delete_states_keeps_large_states_readable_and_the_history_growing(
        self, backend: StorageBackend, keep_last: int
    ) -> None:
        run = stored_run(backend)
        writer = backend.states.writer(run.id)
        state: dict[str, Any] = {}
        states = []
        for number in range(60):
            state = changed_state(state, "grow", 1000 + number)
            states.append(state)
            save = (
                writer.save_state
                if number % 3
                else functools.partial(backend.states.save_state, run.id)
            )
            assert save(state, "node") == number
            if number % 20 == 19:
                backend.states.delete_states(run.id, keep_last=keep_last)
                history = backend.states.get_state_history(run.id)
                assert [kept["step"] for kept in history] == list(
                    range(number + 1 - keep_last, number + 1)
                )
                assert [kept["state_data"] for kept in history] == states[-keep_last:]

        first = 60 - keep_last
        for step in range(60):
            checkpoint = backend.states.get_state(run.id, step)
            assert (checkpoint is not None) == (step >= first)
            if checkpoint is not None:
                assert checkpoint["state_data"] == states[step]

    def test_a_writer_notices_that_the_run_was_written_to_and_begun_anew(
        self, backend: StorageBackend
    ) -> None:
        run = stored_run(backend)
        writer = backend.states.writer(run.id)
        for number in range(5):
            writer.save_state(changed_state({}, "grow", 6000 + number), "writer")
        backend.states.delete_states(run.id)
        for number in range(5):
            backend.states.save_state(run.id, changed_state({}, "grow", 7000 + number), "other")

        assert writer.save_state(changed_state({}, "grow", 8000), "writer") == 5
        assert backend.states.save_state(run.id, changed_state({}, "grow", 8001), "other") == 6
        assert writer.save_state(changed_state({}, "grow", 8002), "writer") == 7

        sizes = [7000, 7001, 7002, 7003, 7004, 8000, 8001, 8002]
        assert [
            checkpoint["state_data"] for checkpoint in backend.states.get_state_history(run.id)
        ] == [changed_state({}, "grow", size) for size in sizes]

    def test_a_writer_of_an_unknown_or_deleted_run_raises(self, backend: StorageBackend) -> None:
        with pytest.raises(RunNotFoundError):
            backend.states.writer("gone").save_state({}, "node")
        run = stored_run(backend)
        writer = backend.states.writer(run.id)
        writer.save_state({}, "node")
        backend.runs.delete(run.id)
        with pytest.raises(RunNotFoundError):
            writer.save_state({}, "node")

    @pytest.mark.parametrize("first", [0, 6])
    def test_append_stores_checkpoints_exactly(self, backend: StorageBackend, first: int) -> None:
        run = stored_run(backend)
        at = datetime(2020, 2, 29, 1, 2, 3, 456789, tzinfo=UTC)
        state: dict[str, Any] = {}
        checkpoints = []
        for step in range(first, first + 20):
            state = changed_state(state, "grow", 900 + step)
            checkpoints.append(
                Checkpoint(
                    step=step,
                    node_id=f"node-{step}",
                    state_data=state,
                    created_at=at + timedelta(seconds=step),
                )
            )

        assert backend.states.append(run.id, iter(checkpoints[:9])) == 9
        writer = backend.states.writer(run.id)
        assert writer.append(checkpoints[9:15]) == 6
        assert writer.append(checkpoints[15:]) == 5
        assert backend.states.append(run.id, []) == 0

        assert backend.states.get_state_history(run.id) == checkpoints
        assert backend.states.get_latest_checkpoint(run.id) == checkpoints[-1]
        assert writer.save_state({"new": True}, "node") == first + 20

    def test_append_refuses_a_step_that_does_not_follow(self, backend: StorageBackend) -> None:
        run = stored_run(backend)
        backend.states.save_state(run.id, {}, "node")
        at = timezone.now()

        def checkpoint(step: Any, state: Any = None, node_id: str = "node") -> Checkpoint:
            return Checkpoint(step=step, node_id=node_id, state_data=state or {}, created_at=at)

        for step in (0, 2):
            with pytest.raises(StepConflictError, match=f"run {run.id} is 1, not {step}"):
                backend.states.append(run.id, [checkpoint(step)])
        for bad, error in (
            (checkpoint(1, {"x": math.nan}), ValueError),
            (checkpoint(1, ["no dict"]), TypeError),
            (checkpoint(1, node_id=""), ValueError),
            (checkpoint(-1), ValueError),
        ):
            with pytest.raises(error):
                backend.states.append(run.id, [bad])
        for unknown in ("gone", "impossible\0"):
            for nothing_or_something in ([], [checkpoint(0)]):
                with pytest.raises(RunNotFoundError):
                    backend.states.append(unknown, nothing_or_something)
        assert [kept["step"] for kept in backend.states.get_state_history(run.id)] == [0]

    def test_append_goes_on_after_what_others_have_written(self, backend: StorageBackend) -> None:
        run = stored_run(backend)
        writer = backend.states.writer(run.id)
        at = timezone.now()
        states = [changed_state({}, "grow", 5000 + number) for number in range(6)]
        for step in range(6):
            if step % 2:
                backend.states.save_state(run.id, states[step], "other")
            else:
                writer.append(
                    [Checkpoint(step=step, node_id="own", state_data=states[step], created_at=at)]
                )

        history = backend.states.get_state_history(run.id)
        assert [checkpoint["state_data"] for checkpoint in history] == states

    def test_delete_states_of_an_unknown_run_raises(self, backend: StorageBackend) -> None:
        with pytest.raises(RunNotFoundError):
            backend.states.delete_states("gone")
        with pytest.raises(ValueError, match="keep_last is -1"):
            backend.states.delete_states(stored_run(backend).id, keep_last=-1)


class ConcurrencyContract:
    """What holds when several threads and processes use a store at once."""

    def test_concurrent_states_of_one_run_from_threads_are_all_kept(
        self, backend: StorageBackend
    ) -> None:
        run = stored_run(backend)

        steps = in_threads(8, lambda n: _save_states(lambda: backend, run.id, n, 10))

        self._check_history(backend, run, steps)

    def test_concurrent_states_of_one_run_from_processes_are_all_kept(
        self, backend: StorageBackend, open_backend: Callable[[], StorageBackend] | None
    ) -> None:
        if open_backend is None:
            pytest.skip("give a fixture open_backend to test with several processes")
        run = stored_run(backend)

        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(3, mp_context=context) as pool:
            futures = [
                pool.submit(_save_states, open_backend, run.id, writer, 20) for writer in range(3)
            ]
            steps = [future.result(timeout=60) for future in futures]

        self._check_history(backend, run, steps)

    def _check_history(
        self, backend: StorageBackend, run: WorkflowRun, steps: list[list[int]]
    ) -> None:
        history = backend.states.get_state_history(run.id)
        total = sum(map(len, steps))
        assert [checkpoint["step"] for checkpoint in history] == list(range(total))
        assert sorted(itertools.chain(*steps)) == list(range(total))
        for writer, own_steps in enumerate(steps):
            assert own_steps == sorted(own_steps)
            for count, step in enumerate(own_steps):
                state = history[step]["state_data"]
                assert (state["writer"], state["count"]) == (writer, count)

    def test_of_concurrent_adds_of_one_id_one_succeeds(self, backend: StorageBackend) -> None:
        outcomes = in_threads(
            6, lambda n: outcome(lambda: backend.runs.add(new_run(id="same", inputs=n)))
        )

        assert sorted(outcomes) == ["RunAlreadyExistsError"] * 5 + ["done"]
        stored = backend.runs.get("same")
        assert stored is not None
        assert stored.inputs == outcomes.index("done")

    def test_of_concurrent_changes_from_one_status_one_succeeds(
        self, backend: StorageBackend
    ) -> None:
        run = stored_run(backend)

        outcomes = in_threads(
            6,
            lambda n: outcome(
                lambda: backend.runs.update_status(run.id, "running", expected="pending", outputs=n)
            ),
        )

        assert sorted(outcomes) == ["StatusConflictError"] * 5 + ["done"]
        assert read_run(backend, run).outputs == outcomes.index("done")

    def test_everything_at_once_on_a_few_runs_fails_only_as_promised(
        self, backend: StorageBackend
    ) -> None:
        names = [f"run-{number}" for number in range(5)]
        allowed = {"done", "RunNotFoundError", "RunAlreadyExistsError"}

        def work(number: int) -> set[str]:
            seen = set()
            for turn in range(12):
                name = names[(number + turn) % 5]
                state = {"text": str(number) * (100 if turn % 2 else 6000)}
                for call in (
                    functools.partial(backend.runs.add, new_run(id=name)),
                    functools.partial(backend.states.save_state, name, state, "node"),
                    functools.partial(backend.runs.update_status, name, "completed"),
                    functools.partial(backend.states.delete_states, name, keep_last=2),
                    functools.partial(backend.runs.delete, name),
                ):
                    seen.add(outcome(call))
                if number == 0:
                    finished = functools.partial(
                        backend.runs.delete_finished, before=timezone.now()
                    )
                    seen.add(outcome(finished))
            return seen

        assert set().union(*in_threads(6, work)) <= allowed
        for run in backend.runs.iter_runs():
            steps = [state["step"] for state in backend.states.iter_state_history(run.id)]
            assert steps == list(range(steps[0], steps[0] + len(steps))) if steps else True

    def test_deleting_a_run_that_is_written_to_leaves_no_states(
        self, backend: StorageBackend
    ) -> None:
        for _ in range(5):
            run = stored_run(backend)

            def save_or_delete(number: int, run: WorkflowRun = run) -> str:
                if number == 0:
                    return outcome(lambda: backend.runs.delete(run.id))
                return outcome(lambda: _save_states(lambda: backend, run.id, number, 5))

            outcomes = in_threads(4, save_or_delete)

            assert outcomes[0] == "done"
            assert set(outcomes[1:]) <= {"done", "RunNotFoundError"}
            assert backend.runs.get(run.id) is None
            assert backend.states.get_state_history(run.id) == []


class AsyncContract:
    """What the async twins promise: the same."""

    def test_every_async_twin_of_the_runs_does_the_same(self, backend: StorageBackend) -> None:
        runs = backend.runs
        old = timezone.now() - timedelta(hours=2)

        async def use() -> None:
            run = new_run(status="running", started_at=old)
            await runs.aadd(run)
            with pytest.raises(RunAlreadyExistsError):
                await runs.aadd(new_run(id=run.id))
            assert ids(await runs.alist_stalled(timedelta(hours=1))) == [run.id]
            assert await runs.afail_stalled(timedelta(hours=1)) == 1
            await runs.aupdate_status(run.id, "running", expected="failed")
            await runs.aupdate(run.id, outputs=1)
            await runs.aheartbeat(run.id)
            stored = await runs.aget(run.id)
            assert stored is not None
            assert (stored.status, stored.outputs) == ("running", 1)
            assert ids(await runs.alist_runs(status="running")) == [run.id]
            assert ids(await runs.alist_by_workflow("contract")) == [run.id]
            assert [found.id async for found in runs.aiter_runs()] == [run.id]
            assert await runs.acount_runs(status="failed") == 0
            copied = new_run(id="copied")
            await runs.aput(copied)
            await runs.aput(copied, over=copied)
            await runs.adelete_unchanged(copied, None)
            await runs.aupdate_status(run.id, "completed")
            assert await runs.adelete_finished(before=timezone.now()) == 1
            with pytest.raises(RunNotFoundError):
                await runs.adelete(run.id)

        async_to_sync(use)()

    def test_every_async_twin_of_the_states_does_the_same(self, backend: StorageBackend) -> None:
        states = backend.states
        run = stored_run(backend)

        async def use() -> None:
            for number in range(3):
                assert await states.asave_state(run.id, {"n": number}, "node") == number
            latest = await states.aget_latest_checkpoint(run.id)
            assert latest is not None
            assert latest["step"] == 2
            assert await states.aget_latest_state(run.id) == {"n": 2}
            assert await states.aget_state(run.id, 2) == latest
            history = await states.aget_state_history(run.id)
            assert [checkpoint["step"] for checkpoint in history] == [0, 1, 2]
            assert [found async for found in states.aiter_state_history(run.id)] == history
            assert await states.writer(run.id).asave_state({"n": 3}, "node") == 3
            assert await states.adelete_states(run.id, keep_last=1) == 3
            at = timezone.now()
            last = [Checkpoint(step=4, node_id="node", state_data={}, created_at=at)]
            assert await states.aappend(run.id, last) == 1
            last[0]["step"] = 5
            assert await states.writer(run.id).aappend(last) == 1

        async_to_sync(use)()

    def test_async_calls_that_run_at_once_do_not_mix(self, backend: StorageBackend) -> None:
        async def one_run(number: int) -> tuple[Any, Any]:
            run = new_run(inputs=number)
            await backend.runs.aadd(run)
            for step in range(3):
                await backend.states.asave_state(run.id, {"run": number, "step": step}, "node")
            stored = await backend.runs.aget(run.id)
            assert stored is not None
            return stored.inputs, await backend.states.aget_latest_state(run.id)

        async def use() -> list[tuple[Any, Any]]:
            try:
                return await asyncio.gather(*(one_run(number) for number in range(20)))
            finally:
                await sync_to_async(connections.close_all)()

        expected = [(number, {"run": number, "step": 2}) for number in range(20)]
        assert asyncio.run(use()) == expected


class StorageContract(RunsContract, StatesContract, ConcurrencyContract, AsyncContract):
    """The whole contract; subclass it with a fixture ``backend``."""

    @pytest.fixture
    def open_backend(self) -> Callable[[], StorageBackend] | None:
        """Give a picklable callable that opens the same store in another process."""
        return None

"""``manage.py show_run ID``: one run, its steps and states, and what changed in them."""

from __future__ import annotations

import json
import time
from argparse import ArgumentTypeError
from typing import TYPE_CHECKING, Any

from django.core.management.base import CommandError

from workflow_storage.base import Checkpoint
from workflow_storage.exceptions import DamagedStateError
from workflow_storage.management.arguments import given, seconds, whole_number
from workflow_storage.management.base import StorageCommand, found_known, found_run
from workflow_storage.management.changes import (
    checkpoint_at,
    compared,
    state_before,
    write_changes,
)
from workflow_storage.management.output import Record, plain
from workflow_storage.management.readable import NAMED, known_steps, note, unreadable_error
from workflow_storage.management.run_columns import run_as_dict
from workflow_storage.management.run_details import (
    ATTEMPT_RECORD,
    STEP_RECORD,
    Steps,
    attempts_of,
    end_of,
    steps_range,
    write_attempts,
    write_end,
    write_fields,
    write_steps,
)
from workflow_storage.management.text import as_count, as_seconds, as_text, as_usd, one_line
from workflow_storage.status import TERMINAL_STATUSES, RunStatus

if TYPE_CHECKING:
    from argparse import ArgumentParser
    from collections.abc import Iterator

    from workflow_storage.base import Step, StorageBackend
    from workflow_storage.management.output import Output
    from workflow_storage.models import WorkflowRun

LAST = "last"

_STATE_RECORD = Record(("run_id", *Checkpoint.__annotations__), lambda state: state)
_STATES_RECORD = Record((*_STATE_RECORD.keys, "problem"), lambda state: state)


def step_or_last(value: object) -> int | None:
    """Read a step; None for the last one."""
    return None if value == LAST else whole_number(value)


def steps_to_compare(value: object) -> tuple[int | None, int | None]:
    """Read ``7`` (and the step before it) or ``3..9``; None for what is not said."""
    if value == LAST:
        return None, None
    steps = steps_range(value)
    if steps.last is None:
        raise ArgumentTypeError(f"{value!r} are no two steps. Write 7 or 3..9.")
    return (None if steps.first == steps.last else steps.first), steps.last


class Command(StorageCommand):
    """Shows a run."""

    help = (
        "Shows a workflow run: its fields, attempts and steps, always the last ones and those that "
        "failed; with --format json everything there is of it, states too."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add the id, and what to show of it."""
        super().add_arguments(parser)
        parser.add_argument(
            "run_id", metavar="ID", help="The id of the run, or a beginning that no other id has."
        )
        what = parser.add_mutually_exclusive_group()
        what.add_argument(
            "--steps",
            type=steps_range,
            metavar="STEPS",
            help="Which steps: all, 7, 3..9, 3.. or ..9. Default: the first, the last, those that failed.",
        )
        what.add_argument(
            "--state",
            nargs="?",
            const=LAST,
            metavar="STEP",
            help="The state after a step, as JSON. Default: the last step.",
        )
        what.add_argument(
            "--diff",
            nargs="?",
            const=LAST,
            metavar="STEP|A..B",
            help="What a step changed in the state, or all from step A to step B. Default: the last.",
        )
        what.add_argument("--compare", metavar="ID", help="What is different in another run.")
        what.add_argument(
            "--follow",
            action="store_true",
            help="Write new steps as they come, until the run has ended; exit with 1 unless it is "
            "completed.",
        )
        parser.add_argument(
            "--interval",
            type=seconds,
            default=1.0,
            metavar="SECONDS",
            help="How often --follow looks. Default: 1.",
        )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._problems: list[str] = []

    def show(self, backend: StorageBackend, output: Output, options: dict[str, Any]) -> None:
        """Write what was asked for."""
        found = found_known(backend, options["run_id"])
        run = found.run
        if options["state"] is not None:
            self._state(backend, output, run, step_or_last(options["state"]))
        elif options["diff"] is not None:
            self._diff(backend, output, run, *steps_to_compare(options["diff"]))
        elif options["compare"]:
            other = found_known(backend, options["compare"])
            write_changes(output, compared(backend, run), compared(backend, other.run))
            found = found if found.problem is not None else other
        elif options["follow"]:
            self._follow(backend, output, run, seconds(options["interval"]))
        else:
            self._page(backend, output, run, given(steps_range, options["steps"]))
        problems = [one for one in (found.problem, *self._problems) if one is not None]
        if problems:
            more = "; …" if len(problems) > NAMED else ""
            problem = "; ".join(problems[:NAMED]) + more
            raise unreadable_error([found._replace(problem=problem)])

    def code_of_broken_pipe(self) -> int:
        """Return 1 if something cannot be read."""
        return int(bool(self._problems))

    def _page(
        self, backend: StorageBackend, output: Output, run: WorkflowRun, which: Steps | None
    ) -> None:
        if output.is_table:
            attempts = attempts_of(backend, run, self._problems)
            write_fields(output, run)
            write_attempts(output, attempts)
            self._problems += write_steps(output, backend, run, attempts, which)
            write_end(output, run)
            return
        states = self._states(backend, run, which or Steps())
        if output.format == "csv":
            output.rows(states, (), _STATES_RECORD)
            return
        attempts = attempts_of(backend, run, self._problems)
        records = [ATTEMPT_RECORD.of(one) for one in attempts]
        whole = plain({**run_as_dict(run), "attempts": records})
        if output.format == "jsonl":
            output.json(whole)
            output.rows(states, (), _STATES_RECORD)
            return
        text = json.dumps(whole, indent=2).removesuffix("\n}")
        output.raw(f'{text},\n  "states": ')
        output.json_list(states, indent="  ")
        output.raw("}\n")

    def _states(
        self, backend: StorageBackend, run: WorkflowRun, which: Steps
    ) -> Iterator[dict[str, Any]]:
        """Yield states as programs get them; of one that cannot be rebuilt, all else that is known."""
        after = which.first - 1
        while True:
            begun_after = after
            states = backend.states.iter_state_history(run.id, after=after)
            try:
                for state in known_steps(states, self._problems):
                    if which.last is not None and state["step"] > which.last:
                        return
                    after = state["step"]
                    yield {"run_id": run.id, **state, "problem": None}
                return
            except DamagedStateError as exc:
                after = exc.step
                if after <= begun_after or (which.last is not None and after > which.last):
                    return
                problem = f"its state of step {after} cannot be rebuilt: {exc.reason}"
                note(self._problems, problem)
                yield {**_step_at(backend, run, after), "problem": problem}

    def _state(
        self, backend: StorageBackend, output: Output, run: WorkflowRun, step: int | None
    ) -> None:
        checkpoint = checkpoint_at(backend, run, step)
        if checkpoint is None:
            raise CommandError(f"Workflow run {run.id} has no states.")
        if output.is_table:
            output.json_for_people(checkpoint["state_data"])
        elif output.format == "csv":
            output.rows([{"run_id": run.id, **checkpoint}], (), _STATE_RECORD)
        else:
            output.json(checkpoint["state_data"])

    def _diff(
        self,
        backend: StorageBackend,
        output: Output,
        run: WorkflowRun,
        first: int | None,
        last: int | None,
    ) -> None:
        after = checkpoint_at(backend, run, last)
        if after is None:
            raise CommandError(f"Workflow run {run.id} has no states.")
        if first is None:
            before = state_before(backend, run, after["step"])
        else:
            before = checkpoint_at(backend, run, first)
        if output.is_table:
            since = "the beginning" if before is None else f"step {before['step']}"
            output.line(f"From {since} to step {after['step']} ({as_text(after['node_id'])}):")
        write_changes(output, before["state_data"] if before else {}, after["state_data"])

    def _follow(
        self, backend: StorageBackend, output: Output, run: WorkflowRun, pause: float
    ) -> None:
        steps = self._new_steps(backend, run.id, pause)
        if output.is_table:
            output.line(f"{as_text(run.workflow_name)} {as_text(run.id)}")
            for step in steps:
                output.line(_step_line(step))
        else:
            output.rows(steps, (), STEP_RECORD)
        ended = found_run(backend, run.id)
        if ended.status != RunStatus.COMPLETED:
            raise CommandError(f"Workflow run {run.id} {end_of(ended)}")
        if output.is_table:
            output.line(f"completed in {as_seconds(ended.duration_seconds)} s")

    def _new_steps(self, backend: StorageBackend, run_id: str, pause: float) -> Iterator[Step]:
        last = -1
        while True:
            # Read before the steps, so that none is missed that comes before the end.
            run = found_run(backend, run_id)
            steps = backend.states.iter_steps(run_id, after=last)
            for step in known_steps(steps, self._problems):
                last = step["step"]
                yield step
            self.stdout.flush()
            if run.status in TERMINAL_STATUSES:
                return
            time.sleep(pause)


def _step_at(backend: StorageBackend, run: WorkflowRun, number: int) -> dict[str, Any]:
    """Return a step as programs get states, without its state."""
    steps = known_steps(backend.states.iter_steps(run.id, after=number - 1), [])
    step = next(steps, None)
    known: dict[str, Any] = {**step} if step is not None and step["step"] == number else {}
    return {**dict.fromkeys(_STATE_RECORD.keys), **known, "run_id": run.id, "step": number}


def _step_line(step: Step) -> str:
    usage = [
        (as_seconds(step["duration_seconds"]), "s"),
        (as_count(step["tokens"]), "tokens"),
        (as_usd(step["cost_usd"]), "USD"),
    ]
    known = ", ".join(f"{text} {unit}" for text, unit in usage if text)
    line = f"{step['step']:>5}  {as_text(step['created_at'])}  {one_line(step['node_id'])}"
    return f"{line}  {known}".rstrip()

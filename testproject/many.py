"""Many plausible runs of the last 30 days, for ``demo --many``: what is stored, not how.

`many_runs` yields them one by one, oldest first by and large, in memory that does not grow with
their number. It is a pure function: the same count, seed and time give the same runs; another time
moves them. What the workflows do stands in `stories`.
"""

from __future__ import annotations

import math
import uuid
from bisect import bisect_left
from collections import deque
from datetime import datetime, timedelta
from itertools import accumulate
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple

from django.utils import timezone

from testproject.stories import (
    LONG,
    LOST_CONNECTION,
    TENANTS,
    WORKFLOWS,
    Failure,
    Step,
    Story,
    Workflow,
)
from workflow_storage import WorkflowRun
from workflow_storage.base import Attempt, Checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterator

SEED = 2024
LABEL = {"demo": "many"}
"""A label of every run, to find and delete them by."""
DAYS = 30
WITH_STATES = 200
"""So many of the newest runs have all their checkpoints."""
WITH_LAST_STATE = 100
"""So many before them have the last one only, as if the others had been pruned."""

_RECENT = timedelta(days=3)
_BY_HOUR = (1, 1, 2, 2, 1, 1, 2, 4, 9, 13, 15, 14, 10, 12, 15, 15, 13, 10, 6, 4, 3, 3, 2, 1)
_NIGHT = range(7)
_WEEKEND = 0.3
# The newest runs, the last one first; fewer of a small number of runs.
_ROLES: tuple[str, ...] = (
    *("running", "waiting", "stalled", "long", "running", "queued", "waiting", "running"),
    *("stalled", "waiting", "running", "waiting", "stalled", "queued", "running", "waiting"),
)
_FORKS = (20, 45, 90, 150)
"""The runs that are forks, counted from the newest one."""
_FIRST_ID_MS = 1_700_000_000_000


class ManyRun(NamedTuple):
    """A run with all that belongs to it, to be stored exactly as it is."""

    run: WorkflowRun
    attempts: list[Attempt]
    checkpoints: list[Checkpoint]


class _End(NamedTuple):
    """How an attempt ends, or that it goes on."""

    status: str
    stop: int
    """The step that it does not get over."""
    failure: Failure | None = None
    gap: float = 0.0
    """Seconds until the next attempt."""
    silent: float = 0.0
    """Seconds without a sign of life before somebody notices."""


class _Stage(NamedTuple):
    """An attempt, in seconds since the run began."""

    end: _End
    started: float
    ended: float


class _Course(NamedTuple):
    """What happens in a run, in seconds since it began."""

    stages: list[_Stage]
    saved: list[tuple[int, float, float]]
    """Of each step: its attempt, when it was saved, and how long it took."""

    @property
    def seconds(self) -> float:
        return self.stages[-1].ended if self.stages else 0.0


class _Child(NamedTuple):
    """A run that another one starts."""

    workflow: Workflow
    parent: WorkflowRun
    seconds: float
    """How long its parent takes."""


class _Told(NamedTuple):
    """A run together with what it was made from."""

    one: ManyRun
    workflow: Workflow
    story: Story


def many_runs(count: int, *, seed: int = SEED, now: datetime) -> Iterator[ManyRun]:
    """Yield plausible runs of the 30 days before a time.

    Args:
        count: how many.
        seed: decides about everything that is left to chance.
        now: when; no time of a run is later.
    """
    timetable = _Timetable(now)
    roles = _ROLES[: math.ceil(count / 8) if count > 1 else 0]
    children: deque[_Child] = deque()
    forkable: _Told | None = None
    for number in range(count):
        rank = count - 1 - number
        rng = Random(f"{seed}/{number}")
        run_id = _run_id(rng, number)
        started = timetable.at(min(1.0, (number + rng.random()) / (count - len(roles))))
        role = roles[rank] if rank < len(roles) else None
        if role is not None:
            told = _special(rng, run_id, role, now)
        elif rank in _FORKS and forkable is not None:
            told = _fork(rng, run_id, forkable, now)
        elif children:
            told = _child(rng, run_id, children.popleft(), now)
        else:
            told = _usual(rng, run_id, started, now)
            children.extend(_children(rng, told))
        if rank < WITH_STATES and len(told.one.checkpoints) > 2 and role is None:
            forkable = told
        yield told.one._replace(checkpoints=_kept(told.one.checkpoints, rank))


class _Timetable:
    """When runs begin: more of them on weekdays than at weekends, and by day than by night."""

    def __init__(self, now: datetime) -> None:
        self._first = now - timedelta(days=DAYS)
        self._until = list(accumulate(self._weight(hour) for hour in range(24 * DAYS)))

    def _weight(self, hour: int) -> float:
        moment = timezone.localtime(self._first + timedelta(hours=hour))
        return _BY_HOUR[moment.hour] * (_WEEKEND if moment.weekday() >= 5 else 1.0)

    def at(self, part: float) -> datetime:
        """Return when this part of all runs has begun, 0 to 1."""
        place = part * self._until[-1]
        hour = bisect_left(self._until, place)
        before = self._until[hour - 1] if hour else 0.0
        within = (place - before) / (self._until[hour] - before)
        return self._first + timedelta(hours=hour + within)


def _usual(rng: Random, run_id: str, started: datetime, now: datetime) -> _Told:
    by_night = timezone.localtime(started).hour in _NIGHT
    weights = [one.by_night if by_night else one.by_day for one in WORKFLOWS]
    workflow = rng.choices(WORKFLOWS, weights)[0]
    story = workflow.tell(rng)
    ends = _ends(rng, workflow, story, is_recent=now - started < _RECENT)
    course = _course(rng, story, ends, _seconds(rng, workflow))
    started = min(started, now - timedelta(seconds=course.seconds + rng.uniform(1, 60)))
    return _told(rng, run_id, workflow, story, course=course, started=started)


def _special(rng: Random, run_id: str, role: str, now: datetime) -> _Told:
    """Return a run of a kind that there are few of, which are not over."""
    workflow = LONG if role == "long" else rng.choice(WORKFLOWS)
    if role == "waiting":
        workflow = next(one for one in WORKFLOWS if one.waits_before)
    story = workflow.tell(rng)
    while role == "waiting" and not any(step.node == workflow.waits_before for step in story.steps):
        story = workflow.tell(rng)
    count = len(story.steps)
    hours, ends = 0.0, [_End("completed", count)]
    if role == "waiting":
        hours, ends = rng.uniform(0.5, 50), [_End("pending", _wait(workflow, story) or 0)]
    elif role == "queued":
        hours, ends = rng.uniform(0.005, 0.1), []
    elif role == "long":
        hours = 2.0
    else:
        ends = [_End("running", rng.randrange(max(1, count // 3), count))]
        if rng.random() < 0.4:
            ends.insert(0, _transient(rng, workflow, story, ends[0].stop))
        hours = rng.uniform(3, 20) if role == "stalled" else 0.0
    course = _course(rng, story, ends, _seconds(rng, workflow) * (1 if hours else 3))
    started = now - timedelta(hours=hours, seconds=course.seconds)
    told = _told(rng, run_id, workflow, story, course=course, started=started)
    if role == "stalled":
        told.one.run.heartbeat_at = started + timedelta(seconds=course.seconds)
    elif role == "running":
        # The heartbeat of a few seconds ago, in a node that has taken some time already.
        run = told.one.run
        lasting = (now - (run.heartbeat_at or run.started_at)).total_seconds()
        run.heartbeat_at = now - timedelta(seconds=rng.uniform(0, min(20.0, lasting)))
    return told


def _child(rng: Random, run_id: str, child: _Child, now: datetime) -> _Told:
    """Return a run that begins and ends while its parent runs."""
    workflow, parent, seconds = child
    story = workflow.tell(rng)
    ends = [_End("completed", len(story.steps))]
    if rng.random() < workflow.failure_rate:
        ends = [_failed(rng, workflow, story)]
    course = _course(rng, story, ends, min(_seconds(rng, workflow), seconds * 0.3))
    started = parent.started_at + timedelta(seconds=seconds * rng.uniform(0.05, 0.5))
    told = _told(rng, run_id, workflow, story, course=course, started=started)
    told.one.run.parent_id = parent.id
    told.one.run.labels["tenant"] = parent.labels["tenant"]
    return told


def _children(rng: Random, told: _Told) -> Iterator[_Child]:
    run = told.one.run
    # One that went on in a later attempt did not run all the time between.
    if told.workflow.children is None or run.status != "completed" or run.attempt > 1:
        return
    name, most, part = told.workflow.children
    if rng.random() < part:
        workflow = next(one for one in WORKFLOWS if one.name == name)
        for _ in range(rng.randint(1, most)):
            yield _Child(workflow, run, run.duration_seconds or 0.0)


def _fork(rng: Random, run_id: str, parent: _Told, now: datetime) -> _Told:
    """Return a run that goes on from the middle of another one, with its history up to there."""
    one, workflow, story = parent
    step = rng.randrange(len(one.checkpoints) - 1)
    first, ends = step + 1, [_End("completed", len(story.steps))]
    course = _course(rng, story, ends, _seconds(rng, workflow), first=first)
    forked = (one.run.completed_at or one.run.started_at) + timedelta(seconds=1)
    latest = now - timedelta(seconds=course.seconds + 1)
    started = forked + max(timedelta(0), latest - forked) * rng.uniform(0, 0.9)
    if started > latest:
        return _usual(rng, run_id, started, now)
    told = _told(rng, run_id, workflow, story, course=course, started=started, first=first)
    told.one.run.parent_id, told.one.run.forked_from_step = one.run.id, step
    told.one.run.labels = dict(one.run.labels)
    return told._replace(
        one=told.one._replace(checkpoints=one.checkpoints[:first] + told.one.checkpoints)
    )


def _ends(rng: Random, workflow: Workflow, story: Story, *, is_recent: bool) -> list[_End]:
    """Return how each attempt of a run ends."""
    rate = workflow.failure_rate
    if is_recent and workflow.recent_failure_rate is not None:
        rate = workflow.recent_failure_rate
    chance, count = rng.random(), len(story.steps)
    if chance < rate:
        # Some try again what will not work.
        failed = _failed(rng, workflow, story)
        tries = rng.choices([1, 2, 3], [6, 3, 1])[0]
        return [failed._replace(gap=_pause(rng)) for _ in range(tries)]
    if chance < rate + workflow.cancel_rate:
        return [_End("cancelled", rng.randrange(1, count))]
    ends = [_End("completed", count)]
    wait = _wait(workflow, story)
    if wait is not None:
        ends.insert(0, _End("pending", wait, gap=rng.uniform(600, 100_000)))
    while len(ends) < 3 and rng.random() < 0.08:
        ends.insert(0, _transient(rng, workflow, story, ends[0].stop))
    return ends


def _failed(rng: Random, workflow: Workflow, story: Story) -> _End:
    found = [
        (number, failure)
        for failure in workflow.failures
        for number, step in enumerate(story.steps)
        if step.node.startswith(failure.node)
    ]
    # The first kind of failure is the most frequent one.
    usual = [place for place in found if place[1] is workflow.failures[0]]
    stop, failure = rng.choice(usual if usual and rng.random() < 0.6 else found)
    return _End("failed", stop, failure)


def _transient(rng: Random, workflow: Workflow, story: Story, stop: int) -> _End:
    """Return how an attempt ends that another one goes on from, before it comes to a step."""
    end = _failed(rng, workflow, story)
    if end.failure is not None and end.failure.is_transient and end.stop <= stop:
        return end._replace(gap=_pause(rng))
    stop = rng.randint(0, min(stop, len(story.steps) - 1))
    if rng.random() < 0.1:
        return _End("failed", stop, gap=_pause(rng), silent=900 + rng.uniform(0, 300))
    return _End("failed", stop, LOST_CONNECTION, gap=_pause(rng))


def _wait(workflow: Workflow, story: Story) -> int | None:
    nodes = [step.node for step in story.steps]
    return nodes.index(workflow.waits_before) if workflow.waits_before in nodes else None


def _pause(rng: Random) -> float:
    return round(rng.lognormvariate(5, 1), 3)


def _seconds(rng: Random, workflow: Workflow) -> float:
    return workflow.median_seconds * rng.lognormvariate(0, workflow.sigma)


def _course(
    rng: Random, story: Story, ends: list[_End], seconds: float, *, first: int = 0
) -> _Course:
    """Return what happens when, if all steps take so many seconds together."""
    whole = sum(step.weight for step in story.steps)
    needed = [
        round(max(0.002, seconds * step.weight / whole * rng.uniform(0.7, 1.4)), 3)
        for step in story.steps
    ]
    clock, stages, saved = 0.0, [], []
    for attempt, end in enumerate(ends, 1):
        started = clock
        for number in range(first, end.stop):
            clock += needed[number]
            saved.append((attempt, clock, needed[number]))
        first = max(first, end.stop)
        if end.status not in ("completed", "pending"):
            clock += needed[end.stop] * rng.uniform(0.2, 0.9)  # in the node that did not end
        clock += end.silent
        stages.append(_Stage(end, started, clock))
        clock += end.gap
    return _Course(stages, saved)


def _told(
    rng: Random,
    run_id: str,
    workflow: Workflow,
    story: Story,
    *,
    course: _Course,
    started: datetime,
    first: int = 0,
) -> _Told:
    """Return the run that has gone through this course, which began then, with a step."""
    steps = story.steps[first : first + len(course.saved)]
    checkpoints = [
        Checkpoint(
            step=first + number,
            node_id=step.node,
            state_data=step.state,
            created_at=started + timedelta(seconds=saved_at),
            attempt=attempt,
            duration_seconds=seconds,
            tokens=step.tokens,
            cost_usd=_cost(workflow, step),
        )
        for number, (step, (attempt, saved_at, seconds)) in enumerate(
            zip(steps, course.saved, strict=True)
        )
    ]
    attempts = [
        _attempt(rng, number, stage, story=story, checkpoints=checkpoints, started=started)
        for number, stage in enumerate(course.stages, 1)
    ]
    run = WorkflowRun(
        id=run_id,
        workflow_name=workflow.name,
        inputs=story.inputs,
        config_snapshot=story.config,
        started_at=started,
        labels={
            **LABEL,
            "tenant": rng.choices(TENANTS, [8, 5, 3, 2, 1, 1])[0],
            "environment": rng.choices(["production", "staging"], [6, 1])[0],
            **story.labels,
        },
        **_sums(workflow, steps),
        **_newest(workflow, attempts),
    )
    if run.status == "completed":
        run.outputs = story.outputs
    return _Told(ManyRun(run, attempts, checkpoints), workflow, story)


def _attempt(
    rng: Random,
    number: int,
    stage: _Stage,
    *,
    story: Story,
    checkpoints: list[Checkpoint],
    started: datetime,
) -> Attempt:
    end, ended = stage.end, started + timedelta(seconds=stage.ended)
    nodes = [one["node_id"] for one in checkpoints if (one.get("attempt") or 0) <= number]
    node = nodes[-1] if nodes else None
    error = None
    if end.status not in ("completed", "pending"):
        node = story.steps[end.stop].node
    if end.failure is not None:
        error = end.failure.text(node or "")
    elif end.silent:
        error = f"Stalled: no sign of life for more than 0:15:00, found at {ended}."
    elif end.status == "cancelled" and rng.random() < 0.5:
        error = rng.choice(["Cancelled by dana: the wrong file", "Cancelled by emil: not needed"])
    return Attempt(
        number=number,
        started_at=started + timedelta(seconds=stage.started),
        ended_at=None if end.status == "running" else ended,
        status=end.status,
        error_message=error,
        node=node,
        worker=f"worker-{rng.randint(1, 4)}:{rng.randrange(1000, 32_000)}",
    )


def _newest(workflow: Workflow, attempts: list[Attempt]) -> dict[str, Any]:
    """Return what a run says of its newest attempt, and of the time of all of them."""
    if not attempts:
        return {"status": "pending"}
    newest = attempts[-1]
    spent = [
        (one.ended_at - one.started_at).total_seconds()
        for one in attempts
        if one.ended_at is not None and one.started_at is not None
    ]
    is_open = newest.status in ("running", "pending")
    heartbeat = newest.started_at if len(attempts) > 1 else None
    if is_open:
        heartbeat = newest.ended_at or newest.started_at
    return {
        "status": newest.status,
        "error_message": newest.error_message,
        "current_node": newest.node,
        "waiting_for": workflow.waits_for if newest.status == "pending" else None,
        "attempt": newest.number,
        "attempt_started_at": newest.started_at,
        "worker": newest.worker,
        "heartbeat_at": heartbeat,
        "completed_at": None if is_open else newest.ended_at,
        "duration_seconds": round(math.fsum(spent), 6) if spent else None,
    }


def _sums(workflow: Workflow, steps: list[Step]) -> dict[str, Any]:
    tokens = [step.tokens for step in steps if step.tokens is not None]
    costs = [cost for step in steps if (cost := _cost(workflow, step)) is not None]
    return {
        "total_tokens": sum(tokens) if tokens else None,
        "total_cost_usd": round(math.fsum(costs), 6) if costs else None,
    }


def _cost(workflow: Workflow, step: Step) -> float | None:
    if step.tokens is None or workflow.usd_per_million_tokens is None:
        return None
    return round(step.tokens * workflow.usd_per_million_tokens / 1_000_000, 6)


def _kept(checkpoints: list[Checkpoint], rank: int) -> list[Checkpoint]:
    if rank < WITH_STATES:
        return checkpoints
    return checkpoints[-1:] if rank < WITH_STATES + WITH_LAST_STATE else []


def _run_id(rng: Random, number: int) -> str:
    """Return a UUIDv7 that depends on nothing but chance, in the order of the runs."""
    fields = (_FIRST_ID_MS + number * 1000) << 80 | 7 << 76 | rng.getrandbits(12) << 64
    return str(uuid.UUID(int=fields | 0b10 << 62 | rng.getrandbits(62)))

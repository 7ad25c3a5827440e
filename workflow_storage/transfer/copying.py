"""Runs copied or moved from one store to another, and the rules of what may replace what.

`jsonlines` brings what it reads from a file into a store by the same rules.
"""

from __future__ import annotations

import itertools
import random
import time
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, Unpack

from django.utils import timezone

from workflow_storage.base import Damage, checkpoint_of
from workflow_storage.exceptions import (
    CannotMoveError,
    DamagedStateError,
    RunAlreadyExistsError,
    RunChangedError,
    RunNotFoundError,
    SameStoreError,
    StepConflictError,
    StorageError,
    StorageUnavailableError,
)
from workflow_storage.filters import valid_filters
from workflow_storage.paging import emptied
from workflow_storage.status import TERMINAL_STATUSES, RunStatus
from workflow_storage.validation import equal_checkpoints, equal_runs

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from datetime import datetime

    from workflow_storage.base import Attempt, Checkpoint, RunFilters, StorageBackend
    from workflow_storage.deltas import EncodedCheckpoint
    from workflow_storage.models import WorkflowRun

STATES_AT_ONCE = 20
"""Checkpoints that are appended in one transaction, and held in memory for that."""

BYTES_AT_ONCE = 16 * 2**20
"""Bytes of the states of these, about, at most."""

PROBE = "workflow_storage: are these two stores one?"
"""The workflow of a run that is stored in the target for a moment."""

MAX_ATTEMPTS = 20
"""Times that a run is tried while another process copies it to the same store."""

_FIRST_PAUSE = 0.001
_LONGEST_PAUSE = 0.1

# What happens then; the next time, this process finds what the other one wrote.
_COPIED_BY_ANOTHER = (
    RunAlreadyExistsError,
    RunChangedError,
    RunNotFoundError,
    SameStoreError,
    StepConflictError,
)

Outcome = Literal["copied", "updated", "unchanged", "refused"]


class Transferred(NamedTuple):
    """What became of one run."""

    run_id: str
    outcome: Outcome
    """copied: it was not there; updated: it had changed, or had new states; refused: see reason."""
    states: int = 0
    """How many checkpoints were written."""
    deleted: bool = False
    """Whether it was deleted from the source."""
    reason: str = ""
    """Why it was refused, or not deleted."""


def copy_runs(
    source: StorageBackend,
    target: StorageBackend,
    *,
    move: bool = False,
    overwrite: bool = False,
    before: str | WorkflowRun | None = None,
    limit: int | None = None,
    **filters: Unpack[RunFilters],
) -> Iterator[Transferred]:
    """Copy runs with all their states and attempts from one store to another, newest first.

    Afterwards a run is the same in both: every field, step, node and time. A run that is
    there already gets what is new. It is refused if it is another run with the same id, or if
    it is not clear that the source has the newer one; the others are copied nevertheless.

    Args:
        source: where the runs are.
        target: where they go.
        move: delete each finished run from the source once it has been read back equal.
        overwrite: where a run differs and neither is newer, as after a change of labels or outputs,
            of which no time is kept, take that of the source, rather than refuse it.
        before: only runs after this one, or the run with this id, in the order of `list_runs`.
        limit: how many runs at most; None for all.
        **filters: which runs; see `RunFilters`.

    Yields:
        What became of each run, once it is done. The copying goes on with the iteration.

    Raises:
        SameStoreError: (a CannotMoveError) before anything is done, if the two are one store.
        CannotMoveError: before anything is done, with `move` and if one of them has a
            transaction open: a rollback would lose what was deleted elsewhere.
        StorageUnavailableError: if a store does not answer; call it again to go on.
    """
    if move and (source.in_transaction() or target.in_transaction()):
        raise CannotMoveError
    _refuse_same_store(source, target)
    refuse_useless(target)
    for run in readable(source.readable_pages(before=before, limit=limit, **filters)):
        if isinstance(run, Transferred):
            yield run
            continue
        with suppress(RunNotFoundError):  # deleted in the source meanwhile
            yield _copied(run, source, target, move=move, overwrite=overwrite)


def readable(
    pages: Iterable[list[WorkflowRun | Damage]],
) -> Iterator[WorkflowRun | Transferred]:
    """Yield the runs of some pages, and hold none of them; one that cannot be read is refused."""
    for page in pages:
        for run in emptied(page):
            if isinstance(run, Damage):
                reason = f"{run.problem}. Run check_runs to see what else is damaged."
                yield Transferred(str(run.run_id), "refused", reason=reason)
            else:
                yield run


def copy_changed_runs(
    source: StorageBackend,
    target: StorageBackend,
    *,
    since: datetime,
    move: bool = False,
    overwrite: bool = False,
    **filters: Unpack[RunFilters],
) -> Iterator[Transferred]:
    """Copy what is likely to have changed since a time, for who has copied all before it.

    These are the runs that were started since, those that have not ended, and those that had not
    ended when they were copied. It misses what else was changed in runs that have ended, such as
    their labels, which `copy_runs` finds, and brings with `overwrite`.

    Args:
        source: as for `copy_runs`; the same goes for all that is not said here.
        target: not the same store, which is not looked into again.
        since: when the copying before this one began.
        move: delete each finished run from the source once it has been read back equal.
        overwrite: take that of the source where neither is newer.
        **filters: which runs; see `RunFilters`.

    Yields:
        What became of each run; of one that is met twice, twice.
    """
    if move and (source.in_transaction() or target.in_transaction()):
        raise CannotMoveError
    wanted = valid_filters(filters)
    for run in _changed_since(source, target, since, filters):
        if isinstance(run, Transferred):
            yield run
            continue
        with suppress(RunNotFoundError):
            current = _current(run.id, source)
            if not wanted.match_none and wanted.matches(current):
                yield _copied(current, source, target, move=move, overwrite=overwrite)


def _changed_since(
    source: StorageBackend, target: StorageBackend, since: datetime, filters: RunFilters
) -> Iterator[WorkflowRun | Transferred]:
    given = filters.get("started_after")
    started: RunFilters = {**filters, "started_after": max(since, given or since)}
    yield from readable(source.readable_pages(**started))
    not_ended: RunFilters = {**filters, "status": _NOT_ENDED}
    yield from readable(source.readable_pages(**not_ended))
    # Without the filters that can be different there by now.
    names = filters.get("workflow_name")
    yield from target.runs.iter_runs(workflow_name=names, status=_NOT_ENDED)


_NOT_ENDED = tuple(status for status in RunStatus if not status.is_terminal)


class History(Protocol):
    """The checkpoints and attempts of a run, wherever they come from."""

    def attempts(self) -> list[Attempt]:
        """Return the attempts of the run."""

    def newest_step(self) -> int | None:
        """Return the step of the newest checkpoint; None if there is none."""

    def at(self, step: int) -> Checkpoint | None:
        """Return the checkpoint with a step, or None."""

    def after(self, step: int) -> Iterator[EncodedCheckpoint]:
        """Yield the checkpoints after a step, as they are stored.

        Raises:
            DamagedStateError: at one that cannot be read.
        """

    def passed(self, step: int) -> None:
        """Know that those before a step are not asked for any more."""


class _StoredHistory:
    """The checkpoints and attempts of a run in a store, read when they are asked for."""

    def __init__(self, store: StorageBackend, run: WorkflowRun) -> None:
        self._runs, self._states = store
        self._run = run
        self._run_id = run.id

    def attempts(self) -> list[Attempt]:
        return attempts_of(self._run, self._runs.list_attempts(self._run_id))

    def at(self, step: int) -> Checkpoint | None:
        return self._states.get_state(self._run_id, step)

    def newest_step(self) -> int | None:
        newest = self._states.get_latest_checkpoint(self._run_id)
        return None if newest is None else newest["step"]

    def after(self, step: int) -> Iterator[EncodedCheckpoint]:
        return self._states.iter_encoded(self._run_id, after=step)

    def passed(self, step: int) -> None:
        pass


def attempts_of(run: WorkflowRun, attempts: list[Attempt]) -> list[Attempt]:
    """Return those of a run's attempts that it knew of when it was read, before they were."""
    return [attempt for attempt in attempts if attempt.number <= run.attempt]


def _copied(
    run: WorkflowRun,
    source: StorageBackend,
    target: StorageBackend,
    *,
    move: bool,
    overwrite: bool,
) -> Transferred:
    # As it is now; it was read together with others, some time ago.
    run = _current(run.id, source)
    done = bring_up_to_date(run, _StoredHistory(source, run), target, overwrite=overwrite)
    if done.outcome == "refused":
        return done
    if not move or run.status not in TERMINAL_STATUSES:
        if source.runs.get(run.id) is None:
            return done._replace(reason="It was deleted in the source while it was copied.")
        return done
    try:
        last = _newest_if_equal(run, source, target)
        source.runs.delete_unchanged(run, last)
    except StorageUnavailableError:
        raise
    except RunNotFoundError:
        return done  # another process has moved it, too
    except StorageError as exc:
        return done._replace(reason=f"It was copied, but not deleted: {exc}")
    return done._replace(deleted=True)


def _current(run_id: str, store: StorageBackend) -> WorkflowRun:
    run = store.runs.get(run_id)
    if run is None:
        raise RunNotFoundError(run_id)
    return run


def bring_up_to_date(
    run: WorkflowRun, history: History, target: StorageBackend, *, overwrite: bool = False
) -> Transferred:
    """Bring the run in the target up to date, or say why not.

    Args:
        run: the run as it is to be.
        history: its checkpoints and attempts.
        target: where.
        overwrite: see `copy_runs`.
    """
    for attempt in range(MAX_ATTEMPTS):
        try:
            return _updated(run, history, target, overwrite=overwrite)
        except StorageUnavailableError:
            raise
        except DamagedStateError as exc:
            return Transferred(run.id, "refused", reason=str(exc))
        except StorageError as exc:
            if not isinstance(exc, _COPIED_BY_ANOTHER) or attempt == MAX_ATTEMPTS - 1:
                return Transferred(run.id, "refused", reason=str(exc))
            # So that those who meet come apart.
            time.sleep(random.uniform(0, min(_FIRST_PAUSE * 2**attempt, _LONGEST_PAUSE)))
    raise AssertionError("unreachable")


def _updated(
    run: WorkflowRun, history: History, target: StorageBackend, *, overwrite: bool
) -> Transferred:
    stored = target.runs.get(run.id)
    if stored is None:
        target.runs.put(run, attempts=history.attempts())
        return _appended(run.id, history, -1, target)
    last = target.states.get_latest_checkpoint(run.id)
    reason = _conflict(run, history, stored, last, overwrite=overwrite)
    if reason:
        return Transferred(run.id, "refused", reason=reason)
    done = _appended(run.id, history, -1 if last is None else last["step"], target)
    if done.outcome == "refused":
        return done
    if equal_runs(stored, run):
        return done._replace(outcome="updated" if done.states else "unchanged")
    target.runs.put(run, over=stored, attempts=history.attempts())
    return done._replace(outcome="updated")


def _appended(run_id: str, history: History, after: int, target: StorageBackend) -> Transferred:
    """Append the checkpoints after a step; if one cannot be read, those before it."""
    writer = target.states.writer(run_id)
    count = 0
    batch: list[EncodedCheckpoint] = []

    def append() -> None:
        nonlocal count
        if batch:
            count += writer.append_encoded(batch)
            history.passed(batch[-1].step)
            batch.clear()

    try:
        for checkpoint in history.after(after):
            batch.append(checkpoint)
            if len(batch) == STATES_AT_ONCE or _size(batch) > BYTES_AT_ONCE:
                append()
    except DamagedStateError as exc:
        append()
        reason = f"{exc} What comes before it is in the target."
        return Transferred(run_id, "refused", count, reason=reason)
    append()
    return Transferred(run_id, "copied", count)


def _size(checkpoints: list[EncodedCheckpoint]) -> int:
    return sum(len(checkpoint.text) for checkpoint in checkpoints)


def _conflict(
    run: WorkflowRun,
    history: History,
    stored: WorkflowRun,
    last: Checkpoint | None,
    *,
    overwrite: bool,
) -> str | None:
    """Return why a run in the target is not just an earlier form of this one, if it is not."""
    if (stored.workflow_name, stored.started_at) != (run.workflow_name, run.started_at):
        return (
            f"The target has another run with this id, of {stored.workflow_name!r}, started at "
            f"{stored.started_at}. Delete one of them."
        )
    newest = history.newest_step()
    behind = newest is not None and last is not None and newest < last["step"]
    ahead = newest is not None and (last is None or newest > last["step"])
    if newest is not None and last is not None and not behind:
        same_step = history.at(last["step"])
        if same_step is not None and not equal_checkpoints(same_step, last):
            return (
                f"The target has another state at step {last['step']}. The run went on "
                "differently in both; delete it in one of them."
            )
    if behind:
        return (
            f"The target has states up to step {last['step']}, which are not here. "  # type: ignore[index]
            "It went on there, or began anew here; delete it in one of them."
        )
    if ahead and last is not None:
        following = next(history.after(last["step"]), None)
        if following is not None and following.step != last["step"] + 1:
            return (
                f"The target has states up to step {last['step']}, and the next one here is step "
                f"{following.step}; those between were deleted here. Delete the run in the "
                "target, to copy those that are left."
            )
    return None if equal_runs(stored, run) else _unclear(run, stored, wins=ahead or overwrite)


def _unclear(run: WorkflowRun, stored: WorkflowRun, *, wins: bool) -> str | None:
    """Return why it is not clear that the run is newer here than in the target, if it is not.

    Args:
        run: the run as it is here.
        stored: as it is in the target.
        wins: whether it is the one that is taken where no time tells.
    """
    here, there = _last_change(run), _last_change(stored)
    if there > here:
        return (
            f"It was changed in the target, at {there}, after it was here, at {here}. "
            "Delete it in one of them, or copy it the other way."
        )
    if there == here and not wins:
        return (
            "It is not the same in the target, and neither is newer: its last change of status "
            f"or heartbeat was at {here} in both. Delete it in one of them, or copy it with "
            "overwrite=True (--overwrite) to have it as it is here."
        )
    return None


def _last_change(run: WorkflowRun) -> datetime:
    moments = (run.started_at, run.attempt_started_at, run.heartbeat_at, run.completed_at)
    return max(moment for moment in moments if moment is not None)


def _newest_if_equal(
    run: WorkflowRun, source: StorageBackend, target: StorageBackend
) -> Checkpoint | None:
    """Read a run back from the target, and return its newest checkpoint in the source.

    Raises:
        StorageError: unless the run, all its attempts and all its states are equal in both.
    """
    unequal = StorageError(
        "It does not read back equal from the target. Move it again, in case it was changed "
        "meanwhile; if this comes again, compare the two."
    )
    read = target.runs.get(run.id)
    if read is None or not equal_runs(read, run):
        raise unequal
    if source.runs.list_attempts(run.id) != target.runs.list_attempts(run.id):
        raise unequal
    here = source.states.iter_encoded(run.id)
    first = next(here, None)
    if first is None:
        return None
    # The target may also have older ones, which the source has deleted since.
    there = target.states.iter_encoded(run.id, after=first.step - 1)
    last = last_if_equal(run.id, itertools.chain([first], here), there)
    if last is None:
        raise unequal
    return checkpoint_of(run.id, last)


def last_if_equal(
    run_id: str, ones: Iterable[EncodedCheckpoint], others: Iterable[EncodedCheckpoint]
) -> EncodedCheckpoint | None:
    """Return the last of some checkpoints, if others are the same ones; None unless they are."""
    last = None
    for one, other in itertools.zip_longest(ones, others):
        if one is None or other is None or not _are_equal(run_id, one, other):
            return None
        last = one
    return last


def _are_equal(run_id: str, one: EncodedCheckpoint, other: EncodedCheckpoint) -> bool:
    """Whether two stores have the same checkpoint; they may write its state differently."""
    if one.text == other.text:
        # What is left of them, without a state to compare.
        one, other = (given._replace(text=b"{}") for given in (one, other))
    return equal_checkpoints(checkpoint_of(run_id, one), checkpoint_of(run_id, other))


def refuse_useless(target: StorageBackend) -> None:
    """Read from a target, so that one that refuses everything says so once, not for each run."""
    target.runs.list_runs(limit=1)


def _refuse_same_store(source: StorageBackend, target: StorageBackend) -> None:
    """Tell by a run that is stored for a moment whether two stores are one.

    Their names cannot tell: one database has many URLs.
    """
    from workflow_storage.models import WorkflowRun

    if source is target or (source.alias is not None and source.alias == target.alias):
        raise SameStoreError
    if type(source.runs) is not type(target.runs):
        return
    now = timezone.now()
    # Those of processes that were killed at this point.
    target.runs.delete_finished(before=now - timedelta(minutes=1), workflow_name=PROBE)
    probe = WorkflowRun(workflow_name=PROBE, status=RunStatus.CANCELLED)
    target.runs.add(probe)
    try:
        same = source.runs.get(probe.id) is not None
    finally:
        target.runs.delete(probe.id)
    if same:
        raise SameStoreError

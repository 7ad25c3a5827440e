"""Runs as JSON Lines: exported to a file, and imported from it by the rules of `copying`."""

from __future__ import annotations

from pathlib import Path
from typing import IO, TYPE_CHECKING, Unpack

from workflow_storage.base import checkpoint_of
from workflow_storage.deltas import EncodedCheckpoint, History, apply_delta, is_delta
from workflow_storage.exceptions import (
    DamagedStateError,
    RunNotFoundError,
    StorageError,
    StorageUnavailableError,
)
from workflow_storage.transfer.copying import (
    Transferred,
    attempts_of,
    bring_up_to_date,
    readable,
    refuse_useless,
)
from workflow_storage.transfer.files import is_cut_to_nothing, reading, writing
from workflow_storage.transfer.lines import (
    DamagedLine,
    RunLine,
    StateLine,
    read_lines,
    run_line,
    state_line,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from workflow_storage.base import Attempt, Checkpoint, RunFilters, StorageBackend
    from workflow_storage.models import WorkflowRun

MAX_LINE = 256 * 2**20
"""Bytes of the longest line that `import_runs` reads, and of the largest state, unless it is told
otherwise."""

_HELD_AT_ONCE = 4
"""Of so many states of the greatest size, those that later ones are based on may hold the bytes."""


def export_runs(
    source: StorageBackend,
    path: str | Path,
    *,
    before: str | WorkflowRun | None = None,
    limit: int | None = None,
    **filters: Unpack[RunFilters],
) -> Iterator[Transferred]:
    """Write runs to a file of JSON Lines, newest first: a line for a run, and one for each state.

    The line of a run is ``{"workflow_storage": 2, "run": {…}, "attempts": [{…}, …],
    "first_step": 0, "last_step": 9, "crc32": "…"}``, with the fields of `WorkflowRun` and `Attempt`.
    Those of its states follow in the order of their steps: ``{"run_id": "…", "step": 0,
    "node_id": "…", "created_at": "…", …, "state": {…}, "crc32": "…"}``, with the fields of `Step`
    that are known. A state that is stored as a delta (see `workflow_storage.deltas`) has in place of
    ``state`` the key ``stored``, with its bytes in base 85 (`base64.b85encode`). Times are in
    ISO 8601 with their offset; ``crc32`` is of the bytes before its own key. The file appears under
    its name once it is complete, and replaces the one that was there; a pipe or ``/dev/stdout`` is
    written to.

    Args:
        source: where the runs are.
        path: the file; compressed with gzip or zstd if it ends in ``.gz`` or ``.zst``.
        before: only runs after this one, or the run with this id, in the order of `list_runs`.
        limit: how many runs at most; None for all.
        **filters: which runs; see `RunFilters`.

    Yields:
        Each run, once it is written. Of one with a state that cannot be read, what comes before
        it is written, and it is refused.

    Raises:
        ExportFileError: if the file cannot be written.
        StorageUnavailableError: if the store does not answer.
    """
    with writing(Path(path)) as file:
        for run in readable(source.readable_pages(before=before, limit=limit, **filters)):
            yield run if isinstance(run, Transferred) else exported(run, source, file)


def import_runs(
    path: str | Path, target: StorageBackend, *, max_line: int = MAX_LINE
) -> Iterator[Transferred | DamagedLine]:
    """Store the runs of a file that `export_runs` wrote; the same holds as for `copy_runs`.

    The memory that it takes grows neither with the runs nor with the states of a run.

    Args:
        path: the file; gzip or zstd if it ends in ``.gz`` or ``.zst``.
        target: where the runs go.
        max_line: bytes of the longest line, and of the largest state; more is damage, so that a
            small file that unpacks to gigabytes fills no memory.

    Yields:
        Each line that is damaged, after which it goes on; and what became of each run. A run whose
        states are not all in the file, or of which one is damaged, is refused, and what comes
        before is stored. A file that cannot be decompressed any further is a damaged line, too.

    Raises:
        ExportFileError: if the file cannot be opened, or declares to unpack to what no runs do.
        StorageUnavailableError: if the store does not answer; call it again to go on.
    """
    path = Path(path)
    refuse_useless(target)
    with reading(path) as file:
        if is_cut_to_nothing(path):
            yield DamagedLine(1, "the file is empty, which no compressed file is")
            return
        lines = Lines(file, max_line)
        follows_damage, without_run = False, None
        while (line := lines.next()) is not None:
            if isinstance(line, DamagedLine):
                follows_damage = True
                yield line
            elif isinstance(line, RunLine):
                follows_damage = False
                history = FileHistory(line, lines, max_line)
                done = bring_up_to_date(line.run, history, target)
                yield from history.rest()
                if done.reason:
                    done = done._replace(reason=f"Line {line.number}: {done.reason}")
                yield done
            elif not follows_damage and line.run_id != without_run:
                # Of the states of a run whose own line is damaged, that line was reported.
                without_run = line.run_id
                yield DamagedLine(line.number, f"the run {line.run_id} does not come before it")


def exported(run: WorkflowRun, source: StorageBackend, file: IO[bytes]) -> Transferred:
    """Write a run with its states to a file, and say what became of it."""
    steps = [step["step"] for step in source.states.iter_steps(run.id)]
    first, last = (steps[0], steps[-1]) if steps else (None, None)
    try:
        # After the steps, for a run that has been deleted meanwhile is not one without states.
        attempts = attempts_of(run, source.runs.list_attempts(run.id))
    except RunNotFoundError:
        return Transferred(run.id, "refused", reason="It was deleted before it was written.")
    file.write(run_line(run, attempts, first, last))
    count = 0
    if first is not None:
        try:
            for state in source.states.iter_encoded(run.id):
                if state.step != first + count:
                    break
                file.write(state_line(run.id, state))
                count += 1
                if state.step == last:
                    return Transferred(run.id, "copied", count)
        except StorageUnavailableError:
            raise
        except StorageError as exc:
            return Transferred(run.id, "refused", count, reason=f"It is not complete: {exc}")
        reason = "It is not complete: states were deleted while it was written."
        return Transferred(run.id, "refused", count, reason=reason)
    return Transferred(run.id, "copied", 0)


class Lines:
    """The lines of a file, of which one can be looked at before it is taken."""

    def __init__(self, file: IO[bytes], max_line: int) -> None:
        self._lines = read_lines(file, max_line)
        self._following: RunLine | StateLine | DamagedLine | None = None

    def look(self) -> RunLine | StateLine | DamagedLine | None:
        """Return the next line; None after the last one."""
        if self._following is None:
            self._following = next(self._lines, None)
        return self._following

    def next(self) -> RunLine | StateLine | DamagedLine | None:
        """Take the next line."""
        line, self._following = self.look(), None
        return line


class FileHistory:
    """The checkpoints of a run that are read from a file as they are needed, and only forwards.

    What was read is held until it is stored, for another process may copy the same run to the same
    store, and then both go on from what is there.
    """

    def __init__(self, line: RunLine, lines: Lines, max_state: int) -> None:
        self._line = line
        self._lines = lines
        self._max_state = max_state
        self._history = History(line.run.id)
        self._held: list[EncodedCheckpoint] = []
        self._next_step = line.first_step
        self._damaged: list[DamagedLine] = []
        self._error: DamagedStateError | None = None

    def attempts(self) -> list[Attempt]:
        """Return the attempts of the run."""
        return self._line.attempts

    def newest_step(self) -> int | None:
        """Return the step of the last checkpoint; None if there is none."""
        return self._line.last_step

    def at(self, step: int) -> Checkpoint | None:
        """Return the checkpoint with a step, or None."""
        found = next(self.after(step - 1), None)
        if found is None or found.step != step:
            return None
        return checkpoint_of(self._line.run.id, found)

    def after(self, step: int) -> Iterator[EncodedCheckpoint]:
        """Yield the checkpoints after a step, as they are stored."""
        self.passed(step)
        last = step
        while True:
            # Others may have let go of some meanwhile.
            held = next((one for one in self._held if one.step > last), None) or self._read()
            if held is None:
                return
            if held.step > last:
                last = held.step
                yield held
            else:
                self.passed(step)

    def passed(self, step: int) -> None:
        """Let go of those before a step."""
        self._held = [one for one in self._held if one.step >= step]

    def rest(self) -> Iterator[DamagedLine]:
        """Go through the lines of the run that nobody needed, and yield those that are damaged."""
        while self._error is None and self._next_step is not None:
            self._held.clear()
            try:
                self._read()
            except DamagedStateError:
                break
        yield from self._damaged
        while isinstance(line := self._lines.look(), StateLine) and (
            line.run_id == self._line.run.id
        ):
            self._lines.next()

    def _read(self) -> EncodedCheckpoint | None:
        """Return the next checkpoint, and hold it; None after the last one.

        Raises:
            DamagedStateError: if it is not there, or cannot be used.
        """
        if self._error is not None:
            raise self._error
        step = self._next_step
        if step is None:
            return None
        line = self._lines.look()
        if isinstance(line, StateLine) and (line.run_id, line.step) == (self._line.run.id, step):
            self._lines.next()
            try:
                state = self._rebuilt(line)
            except (ValueError, StorageError) as exc:
                reason = exc.reason if isinstance(exc, DamagedStateError) else str(exc)
                raise self._broken(step, DamagedLine(line.number, reason)) from exc
        elif isinstance(line, DamagedLine):
            self._lines.next()
            raise self._broken(step, line)
        elif line is None:
            raise self._broken(step, None, "the file ends before it")
        else:
            raise self._broken(step, None, f"line {line.number} has something else in its place")
        self._held.append(state)
        self._next_step = step + 1 if step < (self._line.last_step or 0) else None
        return state

    def _rebuilt(self, line: StateLine) -> EncodedCheckpoint:
        text = line.stored
        if is_delta(text):
            base = self._history.base(line.step)
            if base is None:
                raise ValueError("the state that it is a difference to is not before it")
            text = apply_delta(text, base, limit=self._max_state)
        if self._history.held + len(text) > _HELD_AT_ONCE * self._max_state:
            raise ValueError(
                "the states of its run take too much memory. If you trust the file, raise "
                "max_line (--max-line)"
            )
        return self._history.encoded(line.step, line.stored, text, line.columns)

    def _broken(self, step: int, line: DamagedLine | None, reason: str = "") -> DamagedStateError:
        if line is not None:
            self._damaged.append(line)
            reason = f"line {line.number} is damaged"
        self._error = DamagedStateError(self._line.run.id, step, reason, "Export the run again.")
        return self._error

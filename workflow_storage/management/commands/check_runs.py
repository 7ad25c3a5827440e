"""``manage.py check_runs``: whether all that is stored is as it has to be."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

from django.core.management.base import CommandError

from workflow_storage.base import Damage
from workflow_storage.exceptions import StorageError
from workflow_storage.management.arguments import add_selection
from workflow_storage.management.base import StorageCommand, selected
from workflow_storage.management.checking import problems_of
from workflow_storage.management.output import Record
from workflow_storage.management.progress import LongCommand
from workflow_storage.management.text import counted, one_line
from workflow_storage.validation import invalid_fields

if TYPE_CHECKING:
    from argparse import ArgumentParser
    from collections.abc import Iterator

    from workflow_storage.base import StorageBackend
    from workflow_storage.management.output import Output
    from workflow_storage.models import WorkflowRun

RECORD = Record(Damage._fields, lambda damage: damage._asdict())


class Command(LongCommand, StorageCommand):
    """Checks what is stored."""

    help = (
        "Checks that every state can be rebuilt, steps are contiguous, attempts and times make "
        "sense, labels and indexes are complete, and the tables are those of this version. Exits "
        "with 1 if something is wrong."
    )

    _runs = _states = _found = _repaired = 0
    _last: str | None = None

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add the selection, the repairing and the going on."""
        super().add_arguments(parser)
        add_selection(parser)
        parser.add_argument(
            "--repair",
            action="store_true",
            help="Repair what can be repaired without loss: indexes, and labels in them.",
        )

    def show(self, backend: StorageBackend, output: Output, options: dict[str, Any]) -> None:
        """Check, write what is wrong, and fail if something is."""
        damages = self._counted(self._damages(backend, options))
        if output.is_table:
            for damage in damages:
                self.tell(output, _line(damage))
            self.say(self._summary(), options)
        else:
            output.rows(damages, (), RECORD)
        left = self._found - self._repaired
        if left:
            raise CommandError(f"{counted(left, 'problem')} found.")

    def interruption(self) -> str:
        """Return what was done, and where to go on."""
        return f"Interrupted: {self._summary()} {self._going_on()}"

    def code_of_broken_pipe(self) -> int:
        """Return 1 if something was found that is not repaired."""
        return int(self._found > self._repaired)

    def goes_on_unread(self, options: dict[str, Any]) -> bool:
        """Return whether it repairs, which is not to be left half done."""
        return bool(options["repair"])

    def _summary(self) -> str:
        repaired = f", {self._repaired:,} of them repaired" if self._repaired else ""
        return (
            f"{counted(self._runs, 'run')} with {counted(self._states, 'state')} checked: "
            f"{counted(self._found, 'problem')}{repaired}."
        )

    def _going_on(self) -> str:
        return f"Go on with --before {self._last}." if self._last else "Nothing was passed yet."

    def _counted(self, damages: Iterator[Damage]) -> Iterator[Damage]:
        for damage in damages:
            self._found += 1
            self._repaired += damage.repaired
            yield damage

    def _damages(self, backend: StorageBackend, options: dict[str, Any]) -> Iterator[Damage]:
        selection = selected(backend, options)
        repair = options["repair"]
        filters = selection.filters.values()
        if selection.before is None and all(value is None for value in filters):
            yield from backend.check_whole(repair=repair)
        total = selection.count(backend) if self.stderr.isatty() else None
        with self.progress(total, options) as advance:
            try:
                for page in selection.pages(backend):
                    fields = [
                        [] if isinstance(run, Damage) else invalid_fields(run) for run in page
                    ]
                    # By what a damaged run has to be found, nobody can tell.
                    sound = [
                        run
                        for run, damaged in zip(page, fields, strict=True)
                        if not isinstance(run, Damage) and not damaged
                    ]
                    yield from backend.check_indexes(sound, repair=repair)
                    for run, damaged in zip(page, fields, strict=True):
                        yield from self._damages_of(backend, run, damaged)
                        self._runs += 1
                        advance(1)
                        if not isinstance(run, Damage) and isinstance(run.started_at, datetime):
                            self._last = run.id
            except StorageError as exc:
                raise CommandError(f"{exc} {self._going_on()}") from exc

    def _damages_of(
        self, backend: StorageBackend, run: WorkflowRun | Damage, damaged: list[tuple[str, Any]]
    ) -> Iterator[Damage]:
        if isinstance(run, Damage):
            yield run
            return
        for problem in problems_of(backend, run, damaged, self._count_states):
            yield Damage(run.id, problem)

    def _count_states(self, number: int) -> None:
        self._states += number


def _line(damage: Damage) -> str:
    where = "" if damage.run_id is None else f"{damage.run_id}: "
    return one_line(f"{where}{damage.problem}{' (repaired)' if damage.repaired else ''}")

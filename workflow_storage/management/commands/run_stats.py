"""``manage.py run_stats``: how many runs, how they ended, how long they took, what they cost."""

from __future__ import annotations

from argparse import ArgumentTypeError
from typing import TYPE_CHECKING, Any

from workflow_storage.management.arguments import add_selection
from workflow_storage.management.base import StorageCommand, selected
from workflow_storage.management.statistics import (
    compared_groups,
    in_all,
    statistics_columns,
    statistics_record,
)
from workflow_storage.summaries import TIMES, valid_groups

if TYPE_CHECKING:
    from argparse import ArgumentParser

    from workflow_storage.base import StorageBackend
    from workflow_storage.management.output import Output


def groups(value: object) -> tuple[str, ...]:
    """Read what to group by, with commas between, or a list of it; ``workflow`` is for short.

    Raises:
        ArgumentTypeError: for an unknown group.
    """
    names = value.split(",") if isinstance(value, str) else list(value)  # type: ignore[call-overload]
    named = [str(name).strip() for name in names]
    if named == ["all"]:
        return ()
    try:
        return valid_groups("workflow_name" if name == "workflow" else name for name in named)
    except ValueError as exc:
        raise ArgumentTypeError(str(exc)) from exc


class Command(StorageCommand):
    """Sums runs up."""

    help = (
        "Sums workflow runs up by group: how many, the share of those that were completed of those "
        "that were completed or failed, durations, tokens and cost; with --since, beside the time "
        "before of the same length; with --limit N, the newest N runs, beside the N before them."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add the groups and the selection."""
        super().add_arguments(parser)
        parser.add_argument(
            "--by",
            type=groups,
            default=("workflow_name",),
            metavar="NAME,NAME",
            help="What the groups are: workflow, status, hour, day, week, month, label:NAME, or "
            "all. Default: workflow.",
        )
        add_selection(parser)

    def show(self, backend: StorageBackend, output: Output, options: dict[str, Any]) -> None:
        """Write a line for each group."""
        by = groups(options["by"])
        rows = compared_groups(backend, by, selected(backend, options))
        with_changes = any(row.before is not None for row in rows)
        if output.is_table and len(rows) > 1:
            is_by_time = any(name in TIMES for name in by)
            rows.append(in_all(rows, with_before=with_changes and not is_by_time))
        columns = statistics_columns(by, with_changes=with_changes)
        output.rows(rows, columns, statistics_record(by), nothing="No runs.")

"""What the commands print: tables for people, JSON, JSON Lines and CSV for programs.

A table is as wide as the terminal, and leaves columns out where that is narrow (see `layout`). In a
pipe it is plain aligned text, as wide as it is. What programs read is always all of it, one record
after another as they come.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from argparse import ArgumentTypeError
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO, cast

from django.core.management.base import OutputWrapper
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from workflow_storage.management.layout import (
    GAP,
    ColumnCells,
    Kind,
    cut_to,
    fitted,
    folded,
)
from workflow_storage.management.text import one_line, writable

if TYPE_CHECKING:
    from argparse import ArgumentParser
    from collections.abc import Callable, Iterable, Mapping, Sequence

FORMATS = ("table", "json", "jsonl", "csv")

NARROWEST = 20
"""Columns of a terminal that says that it has fewer."""


class Column(NamedTuple):
    """A column of a table."""

    name: str
    """What it is called in ``--columns``, in JSON and in CSV."""
    title: str
    cell: Callable[[Any], str]
    """Returns what is shown of a row."""
    kind: Kind = "text"
    rank: int = 0
    """0 is never left out; the greatest is left out first."""
    least: int = 8
    """Characters that a text is cut to, at least."""
    style: Callable[[Any], str] | None = None
    """Returns the colour of the cell."""
    folds: bool = False
    """Whether it goes on in the next line where it is cut otherwise."""


class Record(NamedTuple):
    """How the rows of a table are handed to programs."""

    keys: Sequence[str]
    """In the order in which they are written."""
    of: Callable[[Any], Mapping[str, Any]]


def add_format(parser: ArgumentParser) -> None:
    """Add ``--format``."""
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="table",
        help="table for people, the others for programs. Default: table.",
    )


class UnbreakableStream:
    """A stream that drops its text once nobody reads any further, where others raise.

    Args:
        stream: where the text goes.
        is_of_process: whether the process ends with the command, and flushes it once more.
    """

    def __init__(self, stream: OutputWrapper, *, is_of_process: bool) -> None:
        self._stream = stream
        self._is_of_process = is_of_process
        self._is_read = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> None:
        """Write a text as it is."""
        self._do(lambda: self._stream.write(text, ending="", style_func=str))

    def flush(self) -> None:
        """Hand on what is still held."""
        self._do(self._stream.flush)

    def _do(self, action: Callable[[], object]) -> None:
        if not self._is_read:
            return
        try:
            action()
        except BrokenPipeError:
            self._is_read = False
            if self._is_of_process:
                leave_unread(self._stream)


def unbreakable(stream: OutputWrapper, *, is_of_process: bool) -> OutputWrapper:
    """Return what writes to a stream for as long as somebody reads it."""
    inner = UnbreakableStream(stream, is_of_process=is_of_process)
    wrapped = OutputWrapper(cast("TextIO", inner))
    wrapped.style_func = stream.style_func
    return wrapped


def leave_unread(stream: OutputWrapper) -> None:
    """Let what is still to be written at the exit of the process go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Output:
    """Standard output, in the format that was asked for.

    Args:
        stdout: that of the command.
        options: those of the command.

    Attributes:
        format: table, json, jsonl or csv.
        is_terminal: whether somebody looks at it.
        width: the columns of the terminal; None for as many as it takes.

    Raises:
        ArgumentTypeError: if there is no such format.
    """

    def __init__(self, stdout: OutputWrapper, options: Mapping[str, Any]) -> None:
        self.format: str = options.get("format") or "table"
        if self.format not in FORMATS:
            raise ArgumentTypeError(
                f"{self.format!r} is no format. Use one of: {', '.join(FORMATS)}."
            )
        self._stdout = stdout
        self.is_terminal = stdout.isatty()
        self._encoding: str = getattr(stdout, "encoding", None) or "utf-8"
        has_colour = (
            (self.is_terminal or bool(options.get("force_color")))
            and not options.get("no_color")
            and not os.environ.get("NO_COLOR")
        )
        self._console = Console(file=io.StringIO(), force_terminal=True) if has_colour else None
        terminal = shutil.get_terminal_size().columns if self.is_terminal else None
        self.width = None if terminal is None else max(terminal, NARROWEST)
        self.ellipsis = "…" if writable("…", self._encoding) == "…" else "..."

    @property
    def is_table(self) -> bool:
        """Whether people read it."""
        return self.format == "table"

    def line(self, text: str | Text = "") -> None:
        """Write a line for people."""
        self._write(self._coloured(text) + "\n")

    def rows(
        self,
        rows: Iterable[Any],
        columns: Sequence[Column],
        record: Record,
        nothing: str = "",
    ) -> int:
        """Write rows, and return how many there were.

        Args:
            rows: anything; a table holds all of them, the other formats one.
            columns: of the table.
            record: what programs get.
            nothing: what people read if there are none.
        """
        if self.format == "table":
            held = list(rows)
            if held:
                self._table(held, columns)
            elif nothing:
                self.line(nothing)
            return len(held)
        if self.format == "csv":
            return self._csv(rows, record)
        records = ({key: record.of(row)[key] for key in record.keys} for row in rows)
        return self._lines(records) if self.format == "jsonl" else self.json_list(records)

    def json(self, value: Any) -> None:
        """Write a value, on one line for ``--format jsonl``."""
        indent = None if self.format == "jsonl" else 2
        self._write(json.dumps(plain(value), indent=indent) + "\n")

    def json_for_people(self, value: Any) -> None:
        """Write a value as JSON that can be read, and is still JSON, on a terminal and in a pipe."""
        for line in json.dumps(value, indent=2, ensure_ascii=False).splitlines():
            self._write(self._as_json(line) + "\n")

    def json_list(self, records: Iterable[Any], *, indent: str = "") -> int:
        """Write a list, one record at a time, for all of them may not fit into memory."""
        count = 0
        for entry in records:
            text = json.dumps(plain(entry), indent=2).replace("\n", f"\n{indent}  ")
            self._write(f"{',' if count else '['}\n{indent}  {text}")
            count += 1
        self._write(f"\n{indent}]\n" if count else "[]\n")
        return count

    def raw(self, text: str) -> None:
        """Write a text as it is."""
        self._write(text)

    def _lines(self, records: Iterable[Any]) -> int:
        count = 0
        for count, entry in enumerate(records, 1):  # noqa: B007
            self._write(json.dumps(plain(entry)) + "\n")
        return count

    def _csv(self, rows: Iterable[Any], record: Record) -> int:
        self._csv_line(record.keys)
        count = 0
        for count, row in enumerate(rows, 1):  # noqa: B007
            values = record.of(row)
            self._csv_line([_csv_cell(values[key]) for key in record.keys])
        return count

    def _csv_line(self, values: Iterable[str]) -> None:
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow(values)
        text = line.getvalue()
        self._write(one_line(text.rstrip("\n")) + "\n" if self.is_terminal else text)

    def _table(self, rows: Sequence[Any], columns: Sequence[Column]) -> None:
        texts = [
            ColumnCells(
                column.title,
                [writable(one_line(column.cell(row)), self._encoding) for row in rows],
                column.kind,
                column.rank,
                column.least,
                column.folds,
            )
            for column in columns
        ]
        if self.width is None:
            widths = {place: text.natural for place, text in enumerate(texts)}
        else:
            widths = fitted(texts, self.width)
        heads = {place: [texts[place].title] for place in widths}
        self._table_row(heads, columns, widths, dict.fromkeys(widths, "bold"))
        for number, row in enumerate(rows):
            cells = {
                place: folded(texts[place].cells[number], widths[place])
                if columns[place].folds
                else [texts[place].cells[number]]
                for place in widths
            }
            styles = {place: (columns[place].style or _plain)(row) for place in widths}
            self._table_row(cells, columns, widths, styles)

    def _table_row(
        self,
        cells: Mapping[int, list[str]],
        columns: Sequence[Column],
        widths: Mapping[int, int],
        styles: Mapping[int, str],
    ) -> None:
        for number in range(max(map(len, cells.values()))):
            line = Text()
            for place, width in widths.items():
                text = cells[place][number] if number < len(cells[place]) else ""
                # A beginning of an id is as good as the id, and can be pasted.
                text = cut_to(text, width, "" if columns[place].kind == "id" else self.ellipsis)
                padding = " " * (width - cell_len(text))
                if line:
                    line.append(" " * GAP)
                if columns[place].kind == "number":
                    line.append(padding)
                line.append(text, style=styles[place])
                if columns[place].kind != "number":
                    line.append(padding)
            line.rstrip()
            self.line(line)

    def _coloured(self, text: str | Text) -> str:
        if isinstance(text, str):
            return text
        if self._console is None:
            return text.plain
        with self._console.capture() as captured:
            self._console.print(text, end="", soft_wrap=True)
        return captured.get()

    def _as_json(self, text: str) -> str:
        return "".join(
            character
            if character.isprintable() and writable(character, self._encoding) == character
            else json.dumps(character)[1:-1]
            for character in text
        )

    def _write(self, text: str) -> None:
        self._stdout.write(writable(text, self._encoding), ending="")


def plain(value: Any) -> Any:
    """Return a value as JSON has it, times as ISO 8601 text."""
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def _csv_cell(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else _csv_text(plain(value))


def _csv_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _plain(_row: Any) -> str:
    return ""

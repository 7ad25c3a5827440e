"""A management command as a process of its own: its output passed on and kept, signals sent on to it."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
import threading
from codecs import getincrementaldecoder
from collections import deque
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from django.conf import settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

KEPT_CHARACTERS = 10_000
"""Characters of the output that are kept: the last."""

_READ_AT_ONCE = 65_536
_SENT_ON = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT")


class Ended(NamedTuple):
    """How a process ended."""

    exit_code: int
    """As a shell has it: 128 and the number of the signal, if one killed it."""
    signal: str | None
    """The signal that killed it, such as SIGTERM."""
    was_told: str | None
    """The signal that this process got, and sent on to it."""
    output: str
    """The last of what it wrote, to standard output and standard error."""
    output_characters: int
    """How much it wrote."""


def run_child(
    arguments: Sequence[str],
    write_out: Callable[[str], object],
    write_err: Callable[[str], object],
    *,
    python_path: str | None = None,
) -> Ended:
    """Run a management command, pass on what it writes, and return how it ended.

    It is in a session of its own, so that Ctrl-C reaches it once: from here.

    Args:
        arguments: its name and its arguments.
        write_out: takes its standard output, bit by bit.
        write_err: takes its standard error.
        python_path: a folder to look for modules in first, as ``--pythonpath``.
    """
    tail = _Tail()
    with (
        subprocess.Popen(
            [*_manage(), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=_environment(python_path),
            start_new_session=True,
        ) as process,
        _sending_on(process) as told,
    ):
        assert process.stdout is not None
        assert process.stderr is not None
        with selectors.DefaultSelector() as selector:
            for stream, write in ((process.stdout, write_out), (process.stderr, write_err)):
                decoder = getincrementaldecoder("utf-8")(errors="replace")
                selector.register(stream, selectors.EVENT_READ, (decoder, write))
            while selector.get_map():
                for key, _ in selector.select():
                    decoder, write = key.data
                    chunk = os.read(key.fd, _READ_AT_ONCE)
                    text = decoder.decode(chunk, final=not chunk)
                    tail.add(text)
                    write(text)
                    if not chunk:
                        selector.unregister(key.fileobj)
        code = process.wait()
    killed_by = signal.Signals(-code).name if code < 0 else None
    return Ended(
        128 - code if code < 0 else code,
        killed_by,
        told[0] if told else None,
        tail.text,
        tail.characters,
    )


class _Tail:
    """The last of a text that comes bit by bit."""

    def __init__(self) -> None:
        self.characters = 0
        self._parts: deque[str] = deque()
        self._kept = 0

    def add(self, text: str) -> None:
        self.characters += len(text)
        self._parts.append(text)
        self._kept += len(text)
        while self._kept - len(self._parts[0]) >= KEPT_CHARACTERS:
            self._kept -= len(self._parts.popleft())

    @property
    def text(self) -> str:
        return "".join(self._parts)[-KEPT_CHARACTERS:]


@contextmanager
def _sending_on(process: subprocess.Popen[bytes]) -> Iterator[list[str]]:
    """Send signals on to a process, and yield the names of those that came."""
    told: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield told
        return

    def send_on(number: int, _frame: Any) -> None:
        told.append(signal.Signals(number).name)
        process.send_signal(number)

    numbers = [getattr(signal, name) for name in _SENT_ON if hasattr(signal, name)]
    before = {
        number: signal.signal(number, send_on)
        for number in numbers
        if signal.getsignal(number) is not signal.SIG_IGN  # nohup, or a shell's background
    }
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _manage() -> list[str]:
    """Return what runs a management command of this project: as this process was begun, if it was so."""
    name = sys.argv[0]
    # As a script, django/__main__.py would have its own folder searched for modules first.
    begun_so = Path(name).name in {"manage.py", "django-admin"} and Path(name).is_file()
    return [sys.executable, name] if begun_so else [sys.executable, "-m", "django"]


def _environment(python_path: str | None) -> dict[str, str]:
    paths = [*([python_path] if python_path else []), *filter(None, sys.path)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(paths)}
    module = getattr(settings, "SETTINGS_MODULE", None)
    return {**environment, "DJANGO_SETTINGS_MODULE": module} if module else environment

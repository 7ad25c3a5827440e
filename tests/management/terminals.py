"""Real processes in a real terminal: a pty of some width, keys pressed, and what is on the screen."""

import errno
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
MANAGE = (sys.executable, "manage.py")
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
TIMEOUT = 60
# An empty COLUMNS is none; the tests have one of their own.
OF_TERMINALS = {"TERM": "xterm-256color", "COLUMNS": "", "LINES": ""}


class Terminal:
    """A command in a terminal.

    Args:
        arguments: those of manage.py.
        columns: how wide it is.
        env: what is different in the environment.
    """

    def __init__(self, *arguments, columns=80, **env):
        self._end, end = pty.openpty()
        fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        self.process = subprocess.Popen(
            [*MANAGE, *map(str, arguments)],
            cwd=ROOT,
            stdin=end,
            stdout=end,
            stderr=end,
            start_new_session=True,
            env={**os.environ, **OF_TERMINALS, **env},
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509
        )
        os.close(end)
        self.shown = ""

    def wait_for(self, text):
        """Read until a text is there."""
        deadline = time.monotonic() + TIMEOUT
        while text not in self.shown:
            assert time.monotonic() < deadline, self.shown
            assert self._read(), f"it ended without {text!r}: {self.shown}"

    def press(self, keys):
        os.write(self._end, keys.encode())

    def press_ctrl_c(self):
        self.press("\x03")

    def end(self):
        """Return the exit code, once it has ended; all that it showed is in `shown`."""
        while self._read():
            pass
        os.close(self._end)
        return self.process.wait(TIMEOUT)

    @property
    def lines(self):
        """The lines without what is no character; what is written over another one comes after it."""
        return re.split(r"\r?\n|\r", ESCAPES.sub("", self.shown))

    def _read(self):
        if not select.select([self._end], [], [], TIMEOUT)[0]:
            self.process.send_signal(signal.SIGKILL)
            raise AssertionError(f"nothing more came: {self.shown}")
        try:
            chunk = os.read(self._end, 65536)
        except OSError as exc:
            if exc.errno != errno.EIO:  # what Linux says at the end
                raise
            return False
        self.shown += chunk.decode(errors="replace")
        return bool(chunk)


def shown_in_terminal(*arguments, columns=80, **env):
    """Return the lines that a command shows, and its exit code."""
    terminal = Terminal(*arguments, columns=columns, **env)
    code = terminal.end()
    lines = terminal.lines
    while lines and not lines[-1]:
        lines.pop()
    return lines, code


def piped(*arguments, env=None):
    """Return what a command writes into pipes."""
    return subprocess.run(
        [*MANAGE, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        timeout=TIMEOUT,
        check=False,
        env={**os.environ, **(env or {})},
    )

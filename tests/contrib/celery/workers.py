"""Celery workers that the tests start, and what becomes of them."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.servers import wait_until

ROOT = Path(__file__).parents[3]
APP = "tests.contrib.celery.project"


class Worker:
    """A worker with its log."""

    def __init__(self, process, log):
        self.process = process
        self.log = log

    @property
    def said(self):
        return self.log.read_text()

    @property
    def children(self):
        """The ids of its child processes."""
        listed = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(self.process.pid)],
            capture_output=True,
            text=True,
            check=False,
        )
        return [int(pid) for pid in listed.stdout.split()]

    def kill(self):
        """Kill it and its children, which say nothing any more."""
        children = self.children
        self.process.kill()
        for pid in children:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(timeout=30)


@contextmanager
def celery_worker(folder, store, *options, prefix, broker=None, queue=None, heartbeat=30):
    """Start a worker that is ready when the block begins, and end it after the block."""
    log = Path(folder) / f"worker-{time.monotonic_ns()}.log"
    environment = {
        **os.environ,
        "DJANGO_SETTINGS_MODULE": "tests.contrib.celery.settings",
        "TEST_STORE": store,
        "TEST_PREFIX": prefix,
        "TEST_HEARTBEAT": str(heartbeat),
        **({"TEST_BROKER": broker} if broker else {}),
        **({"TEST_QUEUE": queue} if queue else {}),
    }
    with log.open("w") as out:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "celery", "-A", APP, "worker", "--loglevel", "INFO"),
                *("--without-gossip", "--without-mingle", "--hostname", f"{log.stem}@%h", *options),
            ],
            cwd=ROOT,
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    worker = Worker(process, log)
    try:
        wait_until(lambda: " ready." in worker.said or process.poll() is not None)
        assert process.poll() is None, worker.said
        yield worker
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            worker.kill()

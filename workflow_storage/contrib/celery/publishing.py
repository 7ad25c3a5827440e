"""A task that is sent: its run waits. In whichever process sends it: a site, a worker, or beat.

The run is stored before the message is sent, so that no worker is faster. In a transaction of the
caller's it is stored once that is committed, since a worker would wait for its end otherwise; whoever
begins the task before stores the run itself. If that is rolled back, nothing is stored, and the message
is sent nevertheless: the run begins with the task.
"""

from __future__ import annotations

import sys
import threading
from asyncio.events import _get_running_loop
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, TypeVar

from celery import current_task
from django.db import connections

from workflow_storage.contrib import tasks
from workflow_storage.contrib.celery.messages import task_of_message
from workflow_storage.contrib.celery.options import options_of, project_backend
from workflow_storage.exceptions import StatusConflictError
from workflow_storage.recorder import describe_error
from workflow_storage.status import RunStatus

if TYPE_CHECKING:
    from collections.abc import Callable

    from workflow_storage.base import StorageBackend

_T = TypeVar("_T")

NOT_SENT = "The message of the task could not be sent to the broker."
TRIED_AGAIN = "The task asked to be tried again."


class _Message:
    """A message that is being sent."""

    def __init__(self, run_id: str, backend: StorageBackend) -> None:
        self.run_id = run_id
        self.backend = backend
        self.is_sent = False
        self.is_stored = True


class _Sending(threading.local):
    message: _Message | None = None
    """What was to be sent last in this thread, until it is known that it was. Celery does not say if
    it was not."""
    is_recording = False
    """Whether a run is being stored: errors of that are logged, and a log handler may send a task."""


_sending = _Sending()


def before_task_publish(
    sender: str, headers: dict[str, Any], body: Any, routing_key: str, **kwargs: Any
) -> None:
    """Store a run that waits."""
    # In protocol 1 there is no id here; the run begins with the task then.
    if "id" not in headers or _sending.is_recording:
        return
    _sending.is_recording = True
    try:
        fail_unsent()
        _sending.message = outside_of_event_loops(
            lambda: _about_to_send(str(headers["id"]), headers, body, routing_key)
        )
    finally:
        _sending.is_recording = False


def after_task_publish(sender: str, headers: dict[str, Any], **kwargs: Any) -> None:
    """Note that a message was sent."""
    if _sending.message is not None:
        _sending.message.is_sent = True
        _sending.message = None


def request_finished(**kwargs: Any) -> None:
    """Fail the run of a task that a view could not send."""
    fail_unsent()


def fail_unsent() -> None:
    """Fail the run of what was to be sent last in this thread, and was not."""
    message, _sending.message = _sending.message, None
    if message is not None and message.is_stored:
        outside_of_event_loops(lambda: _fail(message.run_id, message.backend))


def outside_of_event_loops(call: Callable[[], _T]) -> _T:
    """Return what a call returns, which uses a database: not in a thread where an event loop runs.

    Celery itself sends what async code has it send, and blocks the loop for as long.
    """
    if _get_running_loop() is None:
        return call()

    def called() -> _T:
        try:
            return call()
        finally:
            connections.close_all()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(copy_context().run, called).result()


@tasks.logs_errors
def _fail(run_id: str, backend: StorageBackend) -> None:
    with suppress(StatusConflictError):
        backend.runs.update_status(
            run_id, RunStatus.FAILED, expected=RunStatus.PENDING, error_message=NOT_SENT
        )


@tasks.logs_errors
def _about_to_send(
    task_id: str, headers: dict[str, Any], body: Any, routing_key: str
) -> _Message | None:
    options = options_of(headers["task"])
    if not options.record:
        return None
    backend = project_backend()
    message = _Message(tasks.run_id_of(task_id), backend)
    is_retry = bool(headers.get("retries"))
    task = None if is_retry else task_of_message(headers, body, routing_key, options, backend)
    if backend.in_transaction():
        if task is not None:
            backend.on_commit(lambda: _committed(task_id, task, message))
        message.is_stored = False
    elif tasks.recorded(task_id) is not None:
        _sends_itself_again(task_id, headers)
    elif task is not None:
        tasks.enqueue(task, backend, again=True)
    return message


@tasks.logs_errors
def _committed(_task_id: str, task: tasks.Task, message: _Message) -> None:
    if message.is_sent:
        tasks.enqueue(task, message.backend)


def _sends_itself_again(task_id: str, headers: dict[str, Any]) -> None:
    """Let the run wait before another worker can begin its next attempt: a retry, or `replace`."""
    replaced = headers.get("replaced_task_nesting", 0)
    if replaced > current_task.request.get("replaced_task_nesting", 0):
        tasks.put_back(task_id)
        return
    exc = sys.exc_info()[1]  # a task is mostly retried where that is handled
    tasks.put_back(task_id, TRIED_AGAIN if exc is None else describe_error(exc))

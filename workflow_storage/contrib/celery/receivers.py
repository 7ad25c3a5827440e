"""Which receiver hears of which signal of Celery."""

from __future__ import annotations

from typing import Any

from celery import signals
from django.core.signals import request_finished

from workflow_storage.contrib.celery import publishing, reporting, working

_UID = "workflow_storage.contrib.celery"


def connect_receivers() -> None:
    """Listen to Celery, in whichever process this is."""
    for signal, receiver in (
        (signals.before_task_publish, publishing.before_task_publish),
        (signals.after_task_publish, publishing.after_task_publish),
        (signals.task_prerun, working.task_prerun),
        (signals.task_postrun, working.task_postrun),
        (signals.task_received, reporting.task_received),
        (signals.task_failure, reporting.task_failure),
        (signals.task_retry, reporting.task_retry),
        (signals.task_revoked, reporting.task_revoked),
        (signals.task_unknown, reporting.task_unknown),
        (signals.worker_init, _begin_tasks_last),
    ):
        signal.connect(receiver, weak=False, dispatch_uid=_UID)
    request_finished.connect(publishing.request_finished, dispatch_uid=_UID)


def _begin_tasks_last(**kwargs: Any) -> None:
    """Begin the run of a task after Celery has closed the connections that the last task has left.

    It connects what does that when a worker begins, and would close the one that the run has opened.
    """
    signals.task_prerun.disconnect(dispatch_uid=_UID)
    signals.task_prerun.connect(working.task_prerun, weak=False, dispatch_uid=_UID)

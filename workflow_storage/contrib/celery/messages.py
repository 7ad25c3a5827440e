"""What the message of a task says of its run, for who sends it and for who carries it out."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from celery import current_app, current_task
from celery.utils.saferepr import saferepr

from workflow_storage.contrib import tasks
from workflow_storage.recorder.opening import id_around
from workflow_storage.serialization import payload_json

if TYPE_CHECKING:
    from celery.app.task import Context
    from celery.app.task import Task as CeleryTask

    from workflow_storage.base import StorageBackend
    from workflow_storage.contrib.options import TaskOptions


def task_of_message(
    headers: dict[str, Any],
    body: Any,
    routing_key: str,
    options: TaskOptions,
    backend: StorageBackend,
) -> tasks.Task:
    """Return the task of a message that is about to be sent."""
    args, kwargs, _ = body
    task_id = str(headers["id"])
    return tasks.Task(
        task_id,
        options.workflow_name or headers.get("shadow") or headers["task"],
        _inputs(headers, args, kwargs) if options.inputs else None,
        _labels(task_id, routing_key, headers.get("root_id"), headers.get("group")),
        id_around(backend) or _recorded_parent(headers.get("parent_id")),
    )


def task_of_request(
    task: CeleryTask[Any, Any], options: TaskOptions, backend: StorageBackend
) -> tasks.Task:
    """Return the task that is about to be carried out in this thread."""
    request: Context = task.request
    headers = {
        "task": task.name,
        "argsrepr": request.get("argsrepr"),
        "kwargsrepr": request.get("kwargsrepr"),
    }
    task_id = str(request.id)
    queue = (request.delivery_info or {}).get("routing_key")
    return tasks.Task(
        task_id,
        options.workflow_name or request.shadow or task.name,
        _inputs(headers, request.args, request.kwargs) if options.inputs else None,
        _labels(task_id, queue, request.root_id, request.group),
        id_around(backend) or request.parent_id,
    )


def _labels(task_id: str, queue: Any, root_id: Any, group: Any) -> dict[str, str]:
    labels = {"queue": queue, "group": group}
    if root_id != task_id:
        labels["root"] = root_id
    return {name: str(value) for name, value in labels.items() if value}


def _recorded_parent(parent_id: str | None) -> str | None:
    """Return the task that another one comes from, unless this is it and it is not recorded."""
    if parent_id is None:
        return None
    here = current_task.request.id if current_task else None
    return None if parent_id == here and tasks.recorded(parent_id) is None else parent_id


def _inputs(headers: dict[str, Any], args: Any, kwargs: Any) -> Any:
    """Return the arguments of a task by parameter, or as text if they are no JSON or are hidden."""
    shown = {"args": headers["argsrepr"], "kwargs": headers["kwargsrepr"]}
    if _are_hidden(headers, args, kwargs):
        return shown
    try:
        payload_json("inputs", [args, kwargs])
    except ValueError:
        return {"args": saferepr(args), "kwargs": saferepr(kwargs)}
    task = current_app.tasks.get(headers["task"])
    if task is not None:
        try:
            return dict(inspect.signature(task.run).bind(*args, **kwargs).arguments)
        except (TypeError, ValueError):
            pass
    return {"args": args, "kwargs": kwargs}


def _are_hidden(headers: dict[str, Any], args: Any, kwargs: Any) -> bool:
    """Whether who sent the task gave other texts for the logs than its arguments (``argsrepr=``)."""
    amqp, levels = current_app.amqp, current_app.conf.get("task_repr_maxlevels", 3)  # from 5.7 on
    return any(
        text is not None
        and _with_lists(text) != _with_lists(saferepr(value or empty, size, maxlevels=levels))
        for text, value, empty, size in (
            (headers["argsrepr"], args, (), amqp.argsrepr_maxsize),
            (headers["kwargsrepr"], kwargs, {}, amqp.kwargsrepr_maxsize),
        )
    )


def _with_lists(text: str) -> str:
    """Return a text in which tuples look like the lists that a message makes of them."""
    return text.translate(_LISTS).replace(",]", "]")


_LISTS = str.maketrans("()", "[]")

"""Tasks of the library that is there: Django's own, or the backport."""

import time
from importlib import import_module
from pathlib import Path

from tests.settings import TASKS_LIBRARY
from workflow_storage import create_storage_backend, current_run
from workflow_storage.contrib.django_tasks import record_task
from workflow_storage.recorder.run import run_around

task = import_module(TASKS_LIBRARY).task


@task
def add(a, b=0):
    return a + b


@task(priority=7, queue_name="default", backend="database")
def add_later(a, b=0):
    return a + b


@task
def fail(message):
    raise ValueError(message)


@task
def leave():
    raise SystemExit(3)


@task
def not_json():
    return object()


@task(takes_context=True)
def with_context(context, word):
    return f"{word} {context.attempt}"


@task
def checkpointed(pages):
    run = current_run()
    for page in pages:
        with run.node(page):
            run.add_usage(tokens=10, cost_usd=0.1)
            run.save_state({**(run.state or {}), page: True})
    return run.run_id


@task
async def asynchronous(page):
    run = current_run()
    await run.asave_state({"page": page}, page)
    return run.run_id


@task
def outer():
    return add.enqueue(1).id


@task
def ask():
    current_run().suspend("approval by finance")


@task
@record_task(False)
def quiet():
    return run_around() is None


@record_task(workflow_name="greeting", inputs=False)
@task
def named(password):
    return len(password)


@task
def two_steps(folder):
    """Save a checkpoint; the first time, wait until somebody says so, then save another one."""
    run, folder = current_run(), Path(folder)
    if not run.done("first"):
        run.save_state({"by": run.attempt}, "first")
        (folder / "first").touch()
        while not (folder / "go").exists():
            time.sleep(0.02)
    run.save_state({**run.state, "then": run.attempt}, "second")
    return run.attempt


@task
def wait(folder):
    (Path(folder) / "begun").touch()
    while not (Path(folder) / "go").exists():
        time.sleep(0.02)


@task
def break_store():
    """Take the tables of the store away, as if its database were gone."""
    from django.db import connections

    with connections[create_storage_backend().alias].cursor() as cursor:
        cursor.execute("ALTER TABLE workflow_runs RENAME TO gone")
    return "done"

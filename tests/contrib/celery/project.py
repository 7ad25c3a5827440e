"""A Celery app with tasks for the tests, in the test itself and in the workers that it starts."""

import json
import os
import signal
import time
from pathlib import Path

from celery import Celery, chord, group, shared_task
from celery.exceptions import Ignore, Reject
from django.db import connections, transaction

from tests.servers import REDIS_URL
from workflow_storage import current_run, record_run
from workflow_storage.contrib.celery import record_task

PREFIX = os.environ.get("TEST_PREFIX", "workflow_storage_test_celery:")
QUEUE = os.environ.get("TEST_QUEUE", "workflow_storage_test")

app = Celery("workflow_storage_tests", set_as_current=True)
app.conf.update(
    broker_url=os.environ.get("TEST_BROKER", REDIS_URL),
    broker_connection_retry_on_startup=True,
    broker_transport_options={"global_keyprefix": PREFIX, "visibility_timeout": 3600},
    result_backend=REDIS_URL,
    result_backend_transport_options={"global_keyprefix": PREFIX},
    result_expires=600,
    task_default_queue=QUEUE,
    task_publish_retry=False,
    worker_prefetch_multiplier=1,
    worker_hijack_root_logger=False,
)
if app.conf.broker_url.startswith("amqp"):
    app.conf.broker_transport_options = {}


@shared_task
def add(x, y=0):
    return x + y


@shared_task
def steps(count):
    run = current_run()
    for number in range(count):
        with run.node(f"node-{number}"):
            run.add_usage(tokens=1)
            run.save_state({"n": number})
    return {"attempt": run.attempt, "step": run.step}


@shared_task
def fail(message):
    raise ValueError(message)


@shared_task(bind=True, max_retries=5)
def try_again(self, failures, countdown=0):
    run = current_run()
    run.save_state({"tried": (run.state or {"tried": 0})["tried"] + 1}, "node")
    if self.request.retries < failures:
        try:
            raise OSError(f"no route {self.request.retries}")
        except OSError as exc:
            raise self.retry(exc=exc, countdown=countdown) from exc
    return run.state["tried"]


@shared_task(autoretry_for=(OSError,), max_retries=1, retry_backoff=False, default_retry_delay=0)
def never():
    raise OSError("no route")


@shared_task(bind=True, max_retries=1)
def try_again_in_a_transaction(self):
    with transaction.atomic(using=current_run().backend.alias):
        if self.request.retries == 0:
            raise self.retry(exc=OSError("no route"), countdown=0)
    return self.request.retries


@shared_task(bind=True)
def sends_itself(self, **options):
    """Return what the run is once the next attempt can begin elsewhere."""
    backend = current_run().backend
    self.apply_async(task_id=self.request.id, **options)
    return backend.runs.get(self.request.id).status


@shared_task(bind=True)
def sends_itself_nowhere(self):
    nowhere = {"transport_options": {"max_retries": 0}}
    with app.connection_for_write("redis://127.0.0.1:1/0", **nowhere) as connection:
        self.apply_async(task_id=self.request.id, retries=1, connection=connection)


@shared_task(ignore_result=True)
def ignored(x):
    return x


@shared_task
def sets_outputs():
    current_run().outputs = {"set": True}


@shared_task
def returns_no_json():
    return {1, 2}


@shared_task(bind=True)
def replaced(self, x, by="task"):
    if by == "chain":
        return self.replace(add.s(x, 1) | add.s(10))
    if by == "group":
        return self.replace(group(add.s(x, 1), add.s(x, 2)))
    return self.replace(add.s(x, 1))


@shared_task(bind=True)
def mapped(self, xs):
    chord(group(add.s(x) for x in xs), total.s()).apply_async()


@shared_task
def total(values):
    return sum(values)


@shared_task(acks_late=True)
def reject(requeue=False):
    run = current_run()
    if requeue and run.attempt > 1:
        return run.attempt
    raise Reject("not now", requeue=requeue)


@shared_task
def ignore():
    raise Ignore("nothing to do")


@shared_task
def approve(amount):
    run = current_run()
    if run.state is None:
        run.save_state({"amount": amount}, "check")
        run.suspend("approval by finance")
    return run.state["amount"]


@shared_task(soft_time_limit=1)
def exceeds_softly():
    with current_run().node("waiting"):
        time.sleep(30)


@shared_task(time_limit=1)
def exceeds():
    time.sleep(30)


@shared_task
def kill_itself():
    os.kill(os.getpid(), signal.SIGKILL)


@shared_task(acks_late=True, reject_on_worker_lost=True)
def kill_itself_once():
    run = current_run()
    if run.attempt > 1:
        return run.attempt
    run.save_state({"n": 1}, "before")
    os.kill(os.getpid(), signal.SIGKILL)
    return None


@shared_task
def exit_process():
    raise SystemExit(3)


@shared_task
def wait_at_most(path):
    Path(path).write_text(str(os.getpid()))
    time.sleep(30)


@shared_task(acks_late=True)
def wait_for(path):
    """Tell the process in the first file, and wait for the second."""
    run = current_run()
    run.save_state({"attempt": run.attempt}, "waiting")
    Path(f"{path}.{run.attempt}").write_text(str(os.getpid()))
    for _ in range(600):
        if Path(f"{path}.go").exists():
            break
        time.sleep(0.05)
    run.save_state({"attempt": run.attempt, "went": True}, "went")
    return run.attempt


@shared_task
def taken_over():
    run = current_run()
    run.backend.runs.update_status(run.run_id, "running", worker="other")
    return 1


@shared_task
@record_task(False)
def unrecorded():
    return add.delay(1, 1).id


@shared_task
@record_task(workflow_name="secret work", inputs=False)
def secret(password):
    return len(password)


@shared_task
def nested(at_once=False):
    with record_run("inside", backend=current_run().backend):
        return (add.apply if at_once else add.apply_async)((1, 2)).id


@shared_task
def who_is_connected():
    """Return the process, and what the database calls the connection of its store."""
    backend = current_run().backend
    assert connections[backend.alias].connection is not None, "closed since the run has begun"
    with connections[backend.alias].cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        number = cursor.fetchone()[0]
    time.sleep(0.2)  # so that another process takes the next task
    return json.dumps([os.getpid(), number])

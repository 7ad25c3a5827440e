"""Views of the project that record runs, in transactions of their own (ATOMIC_REQUESTS)."""

from django.db import transaction
from django.http import HttpResponse
from django.urls import path

from workflow_storage import record_run


def fail(request):
    with record_run("view", run_id="failing"):
        raise ValueError("the view failed")


def complete(request):
    with record_run("view", run_id="completing") as run:
        run.save_state({"n": 1}, "node")
    return HttpResponse("ok")


@transaction.non_atomic_requests
async def complete_async(request):
    async with record_run("view", run_id="async") as run:
        await run.asave_state({"n": 1}, "node")
    return HttpResponse("ok")


urlpatterns = [
    path("fail", fail),
    path("complete", complete),
    path("async", complete_async),
]

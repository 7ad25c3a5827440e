"""A site whose one view records a run, for an ASGI server; its store is STORAGE_URL."""

import os

import dj_database_url
import django
from django.conf import settings

url = os.environ["STORAGE_URL"]
is_redis = url.startswith("redis")
database = dj_database_url.parse("sqlite://:memory:" if is_redis else url)
if not is_redis:
    # A server takes about 100 connections; a pool lets 500 requests share a few.
    database["OPTIONS"] = {"pool": {"min_size": 1, "max_size": 8, "timeout": 60}}

settings.configure(
    SECRET_KEY="only-for-tests",
    ALLOWED_HOSTS=["127.0.0.1"],
    ROOT_URLCONF=__name__,
    INSTALLED_APPS=["workflow_storage"],
    DATABASES={"default": database},
    WORKFLOW_STORAGE=f"{url}&max_connections=8" if is_redis else "default",
    USE_TZ=True,
)
django.setup()

from django.core.asgi import get_asgi_application  # noqa: E402
from django.core.management import call_command  # noqa: E402
from django.db import connection  # noqa: E402
from django.http import HttpResponse  # noqa: E402
from django.urls import path  # noqa: E402

from workflow_storage import record_run  # noqa: E402


async def record(request, number):
    async with record_run("request", inputs=number) as run:
        for step in range(3):
            await run.asave_state({"number": number, "step": step}, "node")
        if number % 10 == 9:
            raise ValueError("every tenth fails")
        run.outputs = number
    return HttpResponse(run.run_id)


urlpatterns = [path("<int:number>", record)]
call_command("migrate", verbosity=0)
connection.close()
application = get_asgi_application()

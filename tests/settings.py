"""The sample site's settings, on a SQLite database that Django's test runner makes."""

from importlib.util import find_spec

from testproject.settings import *  # noqa: F403
from testproject.settings import DATABASES, INSTALLED_APPS

DATABASES["default"] = {
    "ENGINE": "django.db.backends.sqlite3",
    "NAME": ":memory:",
}
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]

# Django has tasks from 6.0 on; before that they come from the backport.
TASKS_LIBRARY = "django.tasks" if find_spec("django.tasks") else "django_tasks"
INSTALLED_APPS = [
    *INSTALLED_APPS,
    "django_tasks_db",
    "workflow_storage.contrib.celery",
    "workflow_storage.contrib.django_tasks",
]
TASKS = {
    "default": {"BACKEND": f"{TASKS_LIBRARY}.backends.immediate.ImmediateBackend"},
    "database": {"BACKEND": "django_tasks_db.DatabaseBackend"},
}

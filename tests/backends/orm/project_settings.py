"""A project whose tests project_tests.py are, on the server of PROJECT_URL."""

import os

import dj_database_url

OWN_CONNECTION = os.environ["PROJECT_OWN_CONNECTION"] == "1"
SECRET_KEY = "only-for-tests"
ALLOWED_HOSTS = ["*"]
INSTALLED_APPS = ["workflow_storage"]
DATABASES = {"default": dj_database_url.parse(os.environ["PROJECT_URL"])}
DATABASES["default"]["ATOMIC_REQUESTS"] = True
WORKFLOW_STORAGE = {"backend": "default", "own_connection": OWN_CONNECTION}
ROOT_URLCONF = "tests.backends.orm.project_urls"
USE_TZ = True
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

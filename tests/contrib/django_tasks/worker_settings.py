"""A site whose tasks wait in its database, for workers that are processes of their own.

The environment says which database (SITE_DATABASE), which store (SITE_STORE), and the setting of the
integration (SITE_TASKS), as JSON.
"""

import json
import os

import dj_database_url

from tests.settings import *  # noqa: F403
from tests.settings import DATABASES, TASKS

DEBUG = False
DATABASES["default"] = dj_database_url.parse(os.environ["SITE_DATABASE"])
if DATABASES["default"]["ENGINE"] == "django.db.backends.sqlite3":
    DATABASES["default"]["OPTIONS"] = {
        "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;",
        "transaction_mode": "IMMEDIATE",
        "timeout": 20,
    }
TASKS["default"] = TASKS["database"]
WORKFLOW_STORAGE = os.environ["SITE_STORE"]
WORKFLOW_STORAGE_DJANGO_TASKS = json.loads(os.environ["SITE_TASKS"])

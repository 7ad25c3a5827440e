"""The sample site's settings, on a SQLite database that Django's test runner makes."""

from testproject.settings import *  # noqa: F403
from testproject.settings import DATABASES

DATABASES["default"] = {
    "ENGINE": "django.db.backends.sqlite3",
    "NAME": ":memory:",
}
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]

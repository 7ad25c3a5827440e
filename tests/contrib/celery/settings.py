"""The settings of a worker that the tests start; its store is that of the test."""

import os

from tests.settings import *  # noqa: F403

WORKFLOW_STORAGE_CELERY = {
    "backend": os.environ["TEST_STORE"],
    "heartbeat": float(os.environ.get("TEST_HEARTBEAT", "30")),
}

"""Every Celery task as a recorded run. Add this app to INSTALLED_APPS; that is all.

It hears of tasks by Celery's signals: `publishing` in whichever process sends one, `working` where it
runs, and `reporting` in the main process of a worker, which tells of those that cannot tell themselves.
"""

from workflow_storage.contrib.celery.options import record_task

__all__ = ["record_task"]

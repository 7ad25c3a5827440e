"""Every task of Django's tasks as a recorded run. Add this app to INSTALLED_APPS; that is all.

It hears of tasks by their signals, from ``django.tasks`` (Django 6.0 and later) and from the backport
``django-tasks``, whichever backend runs them.
"""

from workflow_storage.contrib.options import record_task

__all__ = ["record_task"]

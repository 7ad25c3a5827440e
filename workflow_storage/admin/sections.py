"""What other apps show on the page of a run: each a section of its own, below what it has itself."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import TYPE_CHECKING, Protocol

from django.db import OperationalError, ProgrammingError, connections
from django.db.transaction import atomic

from workflow_storage.factory import configured_alias

if TYPE_CHECKING:
    from django.contrib.admin import AdminSite
    from django.http import HttpRequest
    from django.utils.safestring import SafeString

    from workflow_storage.models import WorkflowRun


class Section(Protocol):
    """Returns the HTML of a section, or nothing where there is nothing to show, or not to this user."""

    def __call__(
        self, request: HttpRequest, site: AdminSite, run: WorkflowRun
    ) -> SafeString | None: ...


logger = logging.getLogger(__name__)

_sections: list[Section] = []


def register_section(section: Section) -> Section:
    """Show a section on the page of each run; for a module ``admin`` of an app, as a decorator."""
    if section not in _sections:
        _sections.append(section)
    return section


def sections_of(request: HttpRequest, site: AdminSite, run: WorkflowRun) -> list[SafeString]:
    """Return the sections of other apps on the page of a run.

    The database of the runs need not be one that the tables of the other app were made in. The page
    of the run is there all the same.
    """
    found = []
    connection = connections[configured_alias()]
    for section in _sections:
        # In a transaction, a statement that failed would make all that follow fail.
        within = atomic(connection.alias) if connection.in_atomic_block else nullcontext()
        try:
            with within:
                found.append(section(request, site, run))
        except (OperationalError, ProgrammingError):
            logger.exception("A section on the page of the run %s cannot be shown", run.pk)
    return [section for section in found if section]

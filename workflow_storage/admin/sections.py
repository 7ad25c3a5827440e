"""What other apps show on the page of a run: each a section of its own, below what it has itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

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


_sections: list[Section] = []


def register_section(section: Section) -> Section:
    """Show a section on the page of each run; for a module ``admin`` of an app, as a decorator."""
    if section not in _sections:
        _sections.append(section)
    return section


def sections_of(request: HttpRequest, site: AdminSite, run: WorkflowRun) -> list[SafeString]:
    """Return the sections of other apps on the page of a run."""
    found = (section(request, site, run) for section in _sections)
    return [section for section in found if section]

"""Which values of payloads and states are secrets, and are not shown to whoever may not see them.

The pages of the admin and its downloads ask `mask_for` and show what the mask leaves.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured

if TYPE_CHECKING:
    from collections.abc import Iterable

    from django.http import HttpRequest

MASKED = "••••••"
"""What is shown instead of a secret."""

SECRETS = (
    "token",
    "password",
    "passphrase",
    "secret",
    "authorization",
    "cookie",
    "api key",
)
"""What the key of a secret ends in; `WORKFLOW_STORAGE_SECRETS` in the settings adds more."""

PERMISSION = "workflow_storage.view_secrets"

# A capital after a small letter, and both ends of the last of several capitals, for it can belong
# to the word before (ACCESStoken) or begin the next one (APIKey).
_WORD_CHANGES = re.compile(
    r"(?<=[^\W_A-Z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|(?<=[A-Z]{2})(?=[a-z])"
)
_SEPARATORS = re.compile(r"[\W_]+")
_DIGITS = "0123456789"


def _written_together(ending: str) -> str:
    return "".join(_words(ending))


def _words(key: str) -> list[str]:
    spaced = _WORD_CHANGES.sub(" ", key)
    return [word.casefold() for word in _SEPARATORS.split(spaced) if word]


class Mask:
    """Hides what stands under keys that end in certain words.

    A key is split into words at everything but letters and digits, and where its case changes:
    ``X-API-Key``, ``api_key``, ``apiKey`` and ``apikey`` all end in the words ``api key``. A
    number at the end, as in ``password2``, does not count.
    """

    def __init__(self, endings: Iterable[str]) -> None:
        self._endings = frozenset(map(_written_together, endings))
        self._longest = max(map(len, self._endings), default=0)
        self._known: dict[str, bool] = {}

    def hides(self, key: str) -> bool:
        """Whether what stands under a key is hidden."""
        if not self._endings:
            return False
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = self._ends_in_secret(key)
        return known

    def hides_path(self, path: Iterable[str | int]) -> bool:
        """Whether what a path of keys and indexes leads to is hidden, by any of its keys."""
        return any(isinstance(step, str) and self.hides(step) for step in path)

    def masked(self, value: Any) -> Any:
        """Return a JSON value with `MASKED` for everything under the key of a secret.

        Returns:
            The value itself where nothing in it is hidden; otherwise a copy of its dicts and
            lists.
        """
        return self._masked_copy(value) if self._endings and self._hides_any(value) else value

    def _ends_in_secret(self, key: str) -> bool:
        words = _words(key)
        unnumbered = list(words)
        while unnumbered and not unnumbered[-1].strip(_DIGITS):
            del unnumbered[-1]
        if unnumbered:
            unnumbered.append(unnumbered.pop().rstrip(_DIGITS))
        return self._matches(words) or self._matches(unnumbered)

    def _matches(self, words: list[str]) -> bool:
        ending = ""
        for word in reversed(words):
            ending = word + ending
            if len(ending) > self._longest:
                return False
            if ending in self._endings:
                return True
        return False

    def _hides_any(self, value: Any) -> bool:
        rest = [value]
        while rest:
            item = rest.pop()
            if isinstance(item, dict):
                if any(map(self.hides, item)):
                    return True
                rest.extend(item.values())
            elif isinstance(item, list | tuple):
                rest.extend(item)
        return False

    def _masked_copy(self, value: Any) -> Any:
        # Copies are filled after they are put in their place: no recursion, however deep.
        top = [value]
        rest: list[Any] = [top]
        while rest:
            copy = rest.pop()
            for place, item in list(copy.items() if isinstance(copy, dict) else enumerate(copy)):
                if isinstance(copy, dict) and self.hides(place):
                    copy[place] = MASKED
                elif isinstance(item, dict | list | tuple):
                    copy[place] = dict(item) if isinstance(item, dict) else list(item)
                    rest.append(copy[place])
        return top[0]


NO_MASK = Mask(())
"""Hides nothing."""


def mask_for(request: HttpRequest, extra: Iterable[str] = ()) -> Mask:
    """Return what hides secrets from the user of a request.

    Args:
        request: whose user sees all with the permission ``workflow_storage.view_secrets``.
        extra: more words that keys of secrets end in.

    Raises:
        ImproperlyConfigured: if `WORKFLOW_STORAGE_SECRETS` is no list of texts.
    """
    return NO_MASK if request.user.has_perm(PERMISSION) else mask_for_all(extra)


def mask_for_all(extra: Iterable[str] = ()) -> Mask:
    """Return what hides secrets from those who may not see them, as in what is read by many.

    Raises:
        ImproperlyConfigured: if `WORKFLOW_STORAGE_SECRETS` is no list of texts.
    """
    return Mask((*SECRETS, *_configured_secrets(), *extra))


def _configured_secrets() -> tuple[str, ...]:
    secrets = getattr(settings, "WORKFLOW_STORAGE_SECRETS", ())
    # A single text would be taken for a list of letters.
    if not isinstance(secrets, list | tuple | set | frozenset) or not all(
        isinstance(secret, str) for secret in secrets
    ):
        raise ImproperlyConfigured(
            f"WORKFLOW_STORAGE_SECRETS is {secrets!r}. "
            'Make it a list of what keys of secrets end in, such as ["iban", "session id"].'
        )
    return tuple(secrets)

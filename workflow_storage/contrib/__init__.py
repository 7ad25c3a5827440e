"""Integrations: each is an app of its own to add to INSTALLED_APPS, and imports its library itself."""

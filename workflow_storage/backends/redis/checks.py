"""What ``manage.py check`` says about a Redis server or cluster, which is asked for a second."""

from __future__ import annotations

from typing import TYPE_CHECKING

from django.core.checks import CheckMessage, Warning

if TYPE_CHECKING:
    from workflow_storage.backends.redis.connection import RedisStore


def check_durability(store: RedisStore) -> list[CheckMessage]:
    """Check how the servers keep what they are given; one that does not answer says nothing."""
    forgetful, evicting = [], []
    for address, persists, policy in store.durability():
        if persists is False:
            forgetful.append(address)
        if policy is not None and policy.startswith("allkeys-"):
            evicting.append(f"{address} ({policy})")
    messages: list[CheckMessage] = []
    if forgetful:
        messages.append(
            Warning(
                "Workflow runs are stored in Redis, which forgets them when it restarts: "
                f"{', '.join(forgetful)} has neither an append-only file nor snapshots.",
                hint="Set 'appendonly yes' (nothing acknowledged is older than a second when it "
                "is lost), or 'save' for snapshots.",
                id="workflow_storage.W004",
            )
        )
    if evicting:
        messages.append(
            Warning(
                "Workflow runs are stored in Redis, which deletes them when its memory is full: "
                f"{', '.join(evicting)}.",
                hint="Set 'maxmemory-policy noeviction'; writes then fail with an error instead.",
                id="workflow_storage.W005",
            )
        )
    return messages

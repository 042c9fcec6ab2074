"""Which replica gets a request: pure functions of a key and the replicas' loads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from hashlib import blake2b

__all__ = ["SLACK", "ranked", "route"]

SLACK = 1.25
"""How much more than its even share a replica may have in flight before a request goes elsewhere."""


def ranked(key: str, names: Mapping[str, int]) -> list[str]:
    """Return the names in the order in which a key prefers them.

    Rendezvous hashing (Thaler and Ravishankar, 1998): a replica that goes takes only its own keys along, and
    gets the same ones again when it comes back.
    """

    def weight(name: str) -> bytes:
        return blake2b(f"{key}\0{name}".encode(), digest_size=16).digest()

    return sorted(names, key=weight, reverse=True)


def route(key: str | None, loads: Mapping[str, int]) -> str:
    """Return the replica for one more request.

    What shares a key shares a replica, and so its cache of prefixes, until that replica has more than
    `SLACK` times its even share (Mirrokni, Thorup and Zadimoghaddam, 2018: bounded loads); then the next one
    in the key's own order. Without a key: the one with the least to do.

    Args:
        key: what belongs together, e.g. a conversation.
        loads: requests in flight by replica; at least one replica.
    """
    if key is None:
        return min(loads, key=lambda name: loads[name])
    most = math.ceil(SLACK * (sum(loads.values()) + 1) / len(loads))
    return next(name for name in ranked(key, loads) if loads[name] < most)

"""Ids of responses, items and calls, and how to tell those that a server of this project made."""

from __future__ import annotations

import secrets
from hashlib import blake2b

__all__ = ["is_own_id", "new_id"]


def new_id(prefix: str) -> str:
    """Return a fresh id such as `msg_4f…`: 16 random hexadecimal digits and 8 that check them."""
    random = secrets.token_hex(8)
    return f"{prefix}_{random}{_check(random)}"


def is_own_id(name: str) -> bool:
    """Whether `new_id` made this id, here or in another process (wrong once in 2^32 foreign ids)."""
    digits = name.rpartition("_")[2]
    return len(digits) == 24 and _check(digits[:16]) == digits[16:]


def _check(random: str) -> str:
    return blake2b(random.encode(), digest_size=4, person=b"gym-sdk").hexdigest()

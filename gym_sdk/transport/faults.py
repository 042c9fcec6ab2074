"""Whose fault a failure is: it decides about retries, and about the replica that failed."""

from __future__ import annotations

import errno
from enum import StrEnum

from gym_sdk.errors import DeadlineError, TransportError

__all__ = ["Fault", "fault_of"]


class Fault(StrEnum):
    """Whose fault a failed try is."""

    BROKEN = "broken"
    """The replica's: refused, reset, silent, garbled, or 5xx. Enough of them in a row open its circuit."""
    BUSY = "busy"
    """Nobody's: 429. The replica gets fewer calls at once, after a pause."""
    LOCAL = "local"
    """This machine's: no file, no port. Treated as `BUSY`, since fewer calls at once help."""
    PASSING = "passing"
    """Nobody's: 408, 409, 425. The call is tried again."""
    FINAL = "final"
    """The request's, or nobody can tell: trying again would not help. The replica is well."""


_PASSING = frozenset({408, 409, 425})
_SCARCE = frozenset({errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL, errno.ENOBUFS, errno.ENOMEM})


def fault_of(error: Exception) -> Fault:
    """Return whose fault an error is that a try failed with."""
    if isinstance(error, DeadlineError):
        return Fault.BROKEN
    if not isinstance(error, TransportError) or not error.retryable:
        return Fault.FINAL
    if error.status == 429:
        return Fault.BUSY
    if error.status in _PASSING:
        return Fault.PASSING
    cause = getattr(error.__cause__, "os_error", error.__cause__)  # aiohttp's errors wrap the system's
    if isinstance(cause, OSError) and cause.errno in _SCARCE:
        return Fault.LOCAL
    return Fault.BROKEN

"""The captures of one server: begun, found, ended, and dropped when nobody uses them."""

from __future__ import annotations

import re
import time

from backends.server.capture import Capture, CaptureLimits
from gym_sdk.errors import PolicyError

__all__ = ["CaptureStore"]

_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")


class CaptureStore:
    """The captures of one server.

    Args:
        limits: how many, how long, how large.
    """

    def __init__(self, limits: CaptureLimits | None = None) -> None:
        self.limits = limits or CaptureLimits()
        self._captures: dict[str, Capture] = {}

    def __len__(self) -> int:
        return len(self._captures)

    def begin(self, rollout_id: str) -> Capture:
        """Begin a capture.

        Raises:
            PolicyError: the id is in use (409), cannot be one (400), or there are too many (503).
        """
        self.sweep()
        if not _ID.fullmatch(rollout_id):
            raise PolicyError(
                "a rollout id has 1 to 128 letters, digits, `-` or `_`",
                code="invalid_value",
                param="rollout_id",
            )
        if rollout_id in self._captures:
            raise PolicyError(
                f"the capture {rollout_id!r} was begun already; every rollout needs an id of its own",
                status=409,
                code="capture_exists",
            )
        if len(self._captures) >= self.limits.max_captures:
            raise PolicyError(
                f"there are {len(self._captures)} captures, the most that this server keeps; end some with "
                f"DELETE /rollouts/ID (those unused for {self.limits.ttl_s:g} s are dropped)",
                status=503,
                code="too_many_captures",
            )
        capture = self._captures[rollout_id] = Capture(rollout_id, self.limits)
        return capture

    def get(self, rollout_id: str) -> Capture:
        """Return a capture, and note that it is in use.

        Raises:
            PolicyError: there is no such capture (404).
        """
        capture = self._captures.get(rollout_id)
        if capture is not None and self._is_expired(capture):
            self._captures.pop(rollout_id)
            capture = None
        if capture is None:
            raise PolicyError(
                f"there is no capture {rollout_id!r}; begin it with POST /rollouts/{rollout_id} "
                "(`client.capture` does). A capture ends with DELETE, and is dropped when nobody uses it for "
                f"{self.limits.ttl_s:g} s; at most {self.limits.max_captures} are kept",
                status=404,
                code="capture_not_found",
            )
        capture.touch()
        return capture

    async def end(self, rollout_id: str) -> Capture:
        """Take a capture out of the store and abort what is in flight for it.

        Raises:
            PolicyError: there is no such capture (404).
        """
        capture = self.get(rollout_id)
        del self._captures[rollout_id]
        await capture.end()
        return capture

    def sweep(self) -> None:
        """Drop the captures that nobody has used for too long."""
        for rollout_id in [key for key, capture in self._captures.items() if self._is_expired(capture)]:
            del self._captures[rollout_id]

    def _is_expired(self, capture: Capture) -> bool:
        return not capture.in_flight and capture.used_at <= time.monotonic() - self.limits.ttl_s

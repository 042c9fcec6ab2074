"""HTTP for judges: the policy's transport, with the routes that judges need."""

from __future__ import annotations

from gym_sdk.transport.http import HttpTransport

__all__ = ["JudgeTransport"]


class JudgeTransport(HttpTransport):
    """Sends JSON to any route; errors are sorted as for a policy."""

    async def post(self, path: str, body: bytes) -> bytes:
        """Send a body to a path under the API's root, and return the answer's.

        Raises:
            TransportError: it did not get there or no answer came back; `retryable` says more.
            PolicyError: the server refused it.
        """
        return await self._post(f"{self.base_url}{path}", body)

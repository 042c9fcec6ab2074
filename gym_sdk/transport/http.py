"""Requests over HTTP: one aiohttp session, no connection limit, pydantic's JSON."""

from __future__ import annotations

import email.utils
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
from pydantic import ValidationError
from pydantic_core import from_json, to_json

from gym_sdk.errors import (
    ConfigurationError,
    ContextOverflowError,
    PolicyError,
    TokenContractError,
    TransportError,
)
from gym_sdk.schema import TOKEN_FORM_HEADER, Response, ResponseRequest, TokenForm

if TYPE_CHECKING:
    import torch

__all__ = ["HttpTransport"]

_RETRYABLE = frozenset({408, 409, 425, 429})
_JSON = {"Content-Type": "application/json"}


class HttpTransport:
    """Speaks to an OpenAI-compatible server.

    Deadlines are the caller's: cancelling a call closes its connection, at which the server aborts the
    generation.

    Args:
        base_url: the API's root, ending in `/v1`.
        api_key: sent as a bearer token.
        headers: sent with every request.
        connect_s: deadline for a new connection.

    Raises:
        ConfigurationError: `base_url` is not an HTTP address.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        headers: Mapping[str, str] | None = None,
        connect_s: float = 10.0,
    ) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise ConfigurationError(
                f"base_url must be an address such as http://localhost:8000/v1, not {base_url!r}"
            )
        self.base_url = base_url.rstrip("/")
        self.root_url = self.base_url.removesuffix("/v1")
        self._headers = {**_JSON, **(headers or {})}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._connect_s = connect_s
        self._session: aiohttp.ClientSession | None = None

    async def open(self) -> None:
        """Open the session."""
        if self._session is None:
            # aiohttp's default of 100 connections would cap a fleet of rollouts.
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),
                headers=self._headers,
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._connect_s),
                cookie_jar=aiohttp.DummyCookieJar(),
            )

    async def respond(self, request: ResponseRequest, *, token_form: TokenForm = "item") -> Response:
        """Send one request to `/responses`; see `Transport.respond`."""
        url = f"{self.base_url}/responses"
        body = await self._send("POST", url, request.to_wire_json(), {TOKEN_FORM_HEADER: token_form})
        try:
            return Response.model_validate_json(body)
        except ValidationError as error:
            for detail in error.errors(include_url=False):
                cause = detail.get("ctx", {}).get("error")
                if isinstance(cause, TokenContractError):
                    raise cause from error
            raise TransportError(f"{url} answered with no Response: {error}", retryable=False) from error

    async def update_weights(self, source: str | Path | Mapping[str, torch.Tensor], *, version: str) -> None:
        """Tell the server to load a folder that it can see; see `Transport.update_weights`."""
        if not isinstance(source, str | Path):
            raise ConfigurationError(
                "tensors cannot be sent over HTTP; save them to a folder that the server sees (FolderSync)"
            )
        body = {"model_path": str(source), "weight_version": version}
        await self._post(f"{self.root_url}/update_weights_from_disk", to_json(body))

    async def serving(self) -> HttpTransport:
        """Return this transport; see `ServingTransport`."""
        return self

    async def fetch(self, method: str, path: str) -> bytes:
        """Send a request without a body to a path under the server's root.

        Raises:
            TransportError: as for `Transport.respond`.
            PolicyError: as for `Transport.respond`.
        """
        return await self._send(method, f"{self.root_url}{path}", None)

    async def aclose(self) -> None:
        """Close the session and its connections."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def _post(self, url: str, body: bytes) -> bytes:
        return await self._send("POST", url, body)

    async def _send(
        self, method: str, url: str, body: bytes | None, headers: Mapping[str, str] | None = None
    ) -> bytes:
        if self._session is None:
            raise ConfigurationError("the client is not open; use `async with GymClient(...) as client`")
        try:
            async with self._session.request(method, url, data=body, headers=headers) as answer:
                data = await answer.read()
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            message = f"no answer from {url}: {type(error).__name__}: {error}"
            if isinstance(error, aiohttp.ClientConnectorError):
                message += "; is the server running? `gym-sdk serve MODEL` starts one"
            raise TransportError(message, retryable=not isinstance(error, aiohttp.InvalidURL)) from error
        if answer.status >= 400:
            raise _refusal(url, answer.status, data, answer.headers.get("Retry-After"))
        return data


def _refusal(url: str, status: int, data: bytes, retry_after: str | None) -> Exception:
    error = _error_object(data)
    message = error.get("message") or data[:500].decode(errors="replace") or "no message"
    text = f"{url} answered {status}: {message}"
    if status in _RETRYABLE or status >= 500:
        return TransportError(text, retryable=True, status=status, retry_after_s=_retry_after_s(retry_after))
    code, param = error.get("code"), error.get("param")
    if code == "context_length_exceeded":
        return ContextOverflowError(str(message), param=param)
    return PolicyError(text, status=status, code=code, param=param)


def _error_object(data: bytes) -> dict[str, Any]:
    try:
        body = from_json(data)
    except ValueError:
        return {}
    error = body.get("error") if isinstance(body, dict) else None
    return error if isinstance(error, dict) else {}


def _retry_after_s(value: str | None) -> float | None:
    """Read `Retry-After`: seconds, or an HTTP date."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        when = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, when.timestamp() - time.time())

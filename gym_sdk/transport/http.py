"""Requests over HTTP: one aiohttp session, no connection limit, pydantic's JSON."""

from __future__ import annotations

import email.utils
import time
import urllib.parse
from collections.abc import AsyncIterator, Mapping
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
from gym_sdk.schema.weights import AdapterWeights, BroadcastWeights, WeightsGroup
from gym_sdk.transport.base import AnyWeights
from gym_sdk.transport.tensors import TensorStream

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

    async def update_weights(self, source: AnyWeights, *, version: str) -> None:
        """Tell the server where to find weights, or send it tensors; see `Transport.update_weights`.

        Tensors must not change before this returns; of those on a GPU, one at a time is copied to the CPU.
        """
        if isinstance(source, Mapping):
            await self._send_tensors(source, version)
            return
        match source:
            case AdapterWeights():
                route, body = "load_lora_adapter", {"lora_path": str(source.path)}
            case BroadcastWeights():
                route, body = "update_weights_from_distributed", _broadcast(source)
            case _:
                route, body = "update_weights_from_disk", {"model_path": str(source)}
        await self._post(f"{self.root_url}/{route}", to_json({**body, "weight_version": version}))

    async def weight_ranks(self) -> int:
        """Ask the server; see `Transport.weight_ranks`."""
        data = await self.fetch("GET", "/get_world_size")
        try:
            return int(from_json(data)["world_size"])
        except (ValueError, TypeError, KeyError) as error:
            text = data[:200]
            raise TransportError(f"/get_world_size answered {text!r}, no size", retryable=False) from error

    async def join_weights_group(self, group: WeightsGroup) -> None:
        """Have the server's engine join; see `Transport.join_weights_group`."""
        body = {
            "group_name": group.name,
            "master_address": group.address,
            "master_port": group.port,
            "backend": group.backend,
            "rank_offset": group.first_rank,
            "world_size": group.world_size,
        }
        await self._post(f"{self.root_url}/init_weights_update_group", to_json(body))

    async def leave_weights_group(self, name: str) -> None:
        """Have the server's engine leave; see `Transport.leave_weights_group`."""
        await self._post(f"{self.root_url}/destroy_weights_update_group", to_json({"group_name": name}))

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

    async def _send_tensors(self, tensors: Mapping[str, torch.Tensor], version: str) -> None:
        stream = TensorStream.of(tensors)
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(stream.nbytes)}
        query = urllib.parse.urlencode({"weight_version": version})
        url = f"{self.root_url}/update_weights_from_tensor?{query}"
        # the server is asked first: one that refuses would close the connection under a large body
        await self._send("POST", url, stream.pieces(), headers, expect100=True)

    async def _send(
        self,
        method: str,
        url: str,
        body: bytes | AsyncIterator[bytes | memoryview] | None,
        headers: Mapping[str, str] | None = None,
        *,
        expect100: bool = False,
    ) -> bytes:
        if self._session is None:
            raise ConfigurationError("the client is not open; use `async with GymClient(...) as client`")
        sending = self._session.request(method, url, data=body, headers=headers, expect100=expect100)
        try:
            async with sending as answer:
                data = await answer.read()
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            message = f"no answer from {url}: {type(error).__name__}: {error}"
            if isinstance(error, aiohttp.ClientConnectorError):
                message += "; is the server running? `gym-sdk serve MODEL` starts one"
            raise TransportError(message, retryable=not isinstance(error, aiohttp.InvalidURL)) from error
        if answer.status >= 400:
            raise _refusal(url, answer.status, data, answer.headers.get("Retry-After"))
        return data


def _broadcast(source: BroadcastWeights) -> dict[str, Any]:
    return {
        "names": [spec.name for spec in source.tensors],
        "dtypes": [spec.dtype for spec in source.tensors],
        "shapes": [list(spec.shape) for spec in source.tensors],
        "group_name": source.group,
        "bucket_bytes": source.bucket_bytes,
    }


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

"""Requests over HTTP: model calls over connections of their own kind, everything else over aiohttp."""

from __future__ import annotations

import asyncio
import io
import logging
import ssl
import urllib.parse
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import aiohttp
from multidict import CIMultiDict
from pydantic_core import from_json, to_json
from yarl import URL

from gym_sdk.errors import ConfigurationError, GymError, TransportError
from gym_sdk.schema import TOKEN_FORM_HEADER, TOKEN_FORMS, Response, ResponseRequest, TokenForm, Turn
from gym_sdk.schema.weights import AdapterWeights, BroadcastWeights, WeightsGroup
from gym_sdk.transport.answers import read_answer, read_body, refusal
from gym_sdk.transport.base import AnyWeights
from gym_sdk.transport.connections import EXCHANGE, Exchange, allowed_connections, open_socket
from gym_sdk.transport.pool import ConnectionPool
from gym_sdk.transport.tensors import TensorStream

if TYPE_CHECKING:
    import torch

__all__ = ["HttpTransport", "http_transports"]

_log = logging.getLogger(__name__)

_HEADERS = {
    "Content-Type": "application/json",
    "Accept": "application/json",
    "Accept-Encoding": "identity",  # token ids cost more to inflate than to read
}
_KEY_HEADER = "Idempotency-Key"
_ID_HEADER = "X-Request-Id"
_IDS_KNOWN = 8192
"""Of how many tries the ids are remembered."""

_NOT_OPEN = "the client is not open; use `async with GymClient(...) as client`"
_DNS_S = 60
_BUFFER_BYTES = 2**20
_LARGE_BYTES = 2**20
_CLOSE_S = 1.0
_STALE_TRIES = 3
"""How often a request may meet a pooled connection that the server has just closed."""


class HttpTransport:
    """Speaks to an OpenAI-compatible server.

    Deadlines are the caller's: cancelling a call closes its connection, at which the server aborts the
    generation.

    Args:
        base_url: the API's root, ending in `/v1`.
        api_key: sent as a bearer token.
        headers: sent with every request.
        connect_s: deadline for a new connection.
        body_stall_s: how long nothing may come in the middle of an answer. Before its head, a server may be
            silent for as long as it generates.
        max_answer_bytes: the largest body that is read.
        max_connections: connections at once; calls beyond wait. By default as many as this process may have
            files, less some; several transports in one process should share them (`http_transports`).

    Raises:
        ConfigurationError: `base_url` is not an HTTP address.
    """

    takes_request_ids = True

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        headers: Mapping[str, str] | None = None,
        connect_s: float = 10.0,
        body_stall_s: float = 60.0,
        max_answer_bytes: int = 256 * 2**20,
        max_connections: int | None = None,
    ) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise ConfigurationError(
                f"base_url must be an address such as http://localhost:8000/v1, not {base_url!r}"
            )
        self.base_url = base_url.rstrip("/")
        self.root_url = self.base_url.removesuffix("/v1")
        self.max_connections = max_connections or allowed_connections()
        self._headers = {**_HEADERS, **(headers or {})}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._connect_s = connect_s
        self._body_stall_s = body_stall_s
        self._max_answer_bytes = max_answer_bytes
        self._responses_url = f"{self.base_url}/responses"
        self._address = _parsed(self._responses_url)
        self._heads = {form: _head(self._address, self._headers, form) for form in TOKEN_FORMS}
        self._calls: ConnectionPool | None = None
        self._sent: OrderedDict[str, None] = OrderedDict()
        self._echoes = False
        self._connector: aiohttp.TCPConnector | None = None
        self._session: aiohttp.ClientSession | None = None

    async def open(self) -> None:
        """Open the session."""
        if self._session is None:
            self._calls = ConnectionPool(
                self._address,
                connect_s=self._connect_s,
                stall_s=self._body_stall_s,
                most_bytes=self._max_answer_bytes,
                most_connections=self.max_connections,
            )
            self._connector = aiohttp.TCPConnector(
                limit=self.max_connections, ttl_dns_cache=_DNS_S, socket_factory=open_socket
            )
            self._session = aiohttp.ClientSession(
                connector=self._connector,
                headers=self._headers,
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._connect_s),
                cookie_jar=aiohttp.DummyCookieJar(),
                read_bufsize=_BUFFER_BYTES,
            )

    async def respond(
        self,
        request: ResponseRequest,
        *,
        token_form: TokenForm = "item",
        request_id: str | None = None,
        attempt: int = 1,
    ) -> Response:
        """Send one request to `/responses`; see `Transport.respond`.

        Args:
            request: what to send.
            token_form: where the tokens shall stand in the response.
            request_id: the same for all tries of a call: a server that knows `Idempotency-Key` samples once.
            attempt: counts the tries of a call, from 1.
        """
        body = await self._ask(request, token_form, request_id, attempt)
        return read_answer(self._responses_url, body, Response.model_validate_json)

    async def turn(
        self,
        request: ResponseRequest,
        *,
        token_form: TokenForm = "item",
        request_id: str | None = None,
        attempt: int = 1,
    ) -> Turn:
        """Send one request to `/responses`, and read of the answer what a rollout needs; see `respond`."""
        body = await self._ask(request, token_form, request_id, attempt)
        return read_answer(self._responses_url, body, Turn.read)

    async def _ask(
        self, request: ResponseRequest, token_form: TokenForm, request_id: str | None, attempt: int
    ) -> bytes:
        """Make a model call; return the body of its success."""
        if self._calls is None:
            raise ConfigurationError(_NOT_OPEN)
        sent = None
        parts = [self._heads[token_form]]
        if request_id is not None:
            sent = self._new_id(request_id, attempt)
            parts.append(f"{_KEY_HEADER}: {request_id}\r\n{_ID_HEADER}: {sent}\r\n".encode())
        body = request.to_wire_json()
        parts += (b"Content-Length: %d\r\n\r\n" % len(body), body)
        answer = await self._calls.exchange(b"".join(parts))
        url = self._responses_url
        if not 200 <= answer.status < 300:
            raise refusal(url, answer.status, answer.body, CIMultiDict(answer.headers))
        if sent is not None:
            self._check_echo(url, sent, answer.headers.get(_ID_HEADER.lower()))
        return answer.body

    async def probe(self) -> None:
        """Ask whether the server is there.

        Raises:
            TransportError: it is not, or says that it is not well.
            PolicyError: it refuses to say.
        """
        await self.fetch("GET", "/health")

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
        """Close the session and its connections, without waiting for peers that read no more."""
        calls, self._calls = self._calls, None
        if calls is not None:
            calls.close()
        session, self._session, self._connector = self._session, None, None
        if session is not None:
            try:
                async with asyncio.timeout(_CLOSE_S):
                    await session.close()
            except TimeoutError:
                _log.debug("%s: connections were left to the system to close", self.base_url)

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
        url: str | URL,
        body: bytes | AsyncIterator[bytes | memoryview] | None,
        headers: Mapping[str, str] | None = None,
        *,
        expect100: bool = False,
    ) -> bytes:
        """Send a request, and return the body of its success."""
        repeatable = body is None or isinstance(body, bytes)
        for tries_left in reversed(range(_STALE_TRIES)):
            exchange = Exchange()
            EXCHANGE.set(exchange)
            try:
                return await self._exchange(exchange, method, url, body, headers, expect100)
            except GymError:
                raise
            except (TimeoutError, aiohttp.ClientError, OSError) as error:
                # the server closed it while it lay in the pool: that is no failure
                is_stale = not exchange.is_fresh and not exchange.is_answered and _is_hang_up(error)
                if not (is_stale and repeatable and tries_left):
                    raise self._no_answer(url, error) from error
        raise AssertionError  # the last try returns or raises

    async def _exchange(
        self,
        exchange: Exchange,
        method: str,
        url: str | URL,
        body: bytes | AsyncIterator[bytes | memoryview] | None,
        headers: Mapping[str, str] | None,
        expect100: bool,
    ) -> bytes:
        if self._session is None:
            raise ConfigurationError(_NOT_OPEN)
        # aiohttp sends bytes in one piece, which holds up the loop, and warns of it where they are many
        data = io.BytesIO(body) if isinstance(body, bytes) and len(body) > _LARGE_BYTES else body
        async with self._session.request(
            method, url, data=data, headers=headers, expect100=expect100, allow_redirects=False
        ) as answer:
            exchange.is_answered = True
            try:
                content = await read_body(
                    answer, most_bytes=self._max_answer_bytes, stall_s=self._body_stall_s
                )
            except GymError:
                answer.close()  # what it still brings is nobody's answer
                raise
        if not 200 <= answer.status < 300:
            raise refusal(str(url), answer.status, content, answer.headers)
        return content

    def _no_answer(self, url: str | URL, error: Exception) -> TransportError:
        message = f"no answer from {url}: {type(error).__name__}: {error}"
        if isinstance(error, aiohttp.ClientConnectorError):
            message += "; is the server running? `gym-sdk serve MODEL` starts one"
            if self._connector is not None:
                self._connector.clear_dns_cache()  # it may come back at another address
        hopeless = isinstance(error, aiohttp.InvalidURL | aiohttp.ClientSSLError | ssl.SSLError)
        return TransportError(message, retryable=not hopeless)

    def _new_id(self, request_id: str, attempt: int) -> str:
        if not (request_id.isascii() and request_id.isprintable()):
            raise ConfigurationError(f"request_id must be printable ASCII, not {request_id!r:.80}")
        sent = f"{request_id}-{attempt}"
        known = self._sent
        known[sent] = None
        if len(known) > _IDS_KNOWN:
            known.popitem(last=False)
        return sent

    def _check_echo(self, url: str, sent: str, got: str | None) -> None:
        """Check that an answer is the one to its request, as far as the server says so.

        Some servers echo the id, others make one of their own: a foreign id counts only once one was echoed,
        or if it is that of another request.
        """
        if got == sent:
            self._echoes = True
        elif got is not None and (self._echoes or got in self._sent):
            raise TransportError(
                f"{url} answered {got!r}, but was asked {sent!r}: something mixes up answers",
                retryable=True,
            )


def http_transports(base_urls: Sequence[str], **options: Any) -> list[HttpTransport]:
    """Return a transport for each address; they share the connections that this process can have.

    Args:
        base_urls: the replicas' addresses.
        **options: further arguments of `HttpTransport`.

    Raises:
        ConfigurationError: there is none, one is no HTTP address, or one occurs twice.
    """
    if isinstance(base_urls, str) or not base_urls:
        raise ConfigurationError("give the addresses of at least one replica, as a list")
    if len({url.rstrip("/") for url in base_urls}) < len(base_urls):
        raise ConfigurationError(f"each replica has an address of its own, not {list(base_urls)}")
    share = allowed_connections(len(base_urls))
    return [HttpTransport(url, **{"max_connections": share, **options}) for url in base_urls]


def _parsed(url: str) -> URL:
    try:
        return URL(url)
    except ValueError as error:
        raise ConfigurationError(f"base_url {url!r} is no address: {error}") from error


def _head(url: URL, headers: Mapping[str, str], form: TokenForm) -> bytes:
    """Return the head of a model call, as far as it is the same for all."""
    lines = [f"POST {url.raw_path_qs} HTTP/1.1", f"Host: {url.host_port_subcomponent}"]
    for name, value in {**headers, TOKEN_FORM_HEADER: form}.items():
        if not (name.isascii() and name.isprintable() and name and ":" not in name):
            raise ConfigurationError(f"{name!r} is no name of a header")
        if not value.isprintable():
            raise ConfigurationError(f"the header {name} holds a character that cannot be sent")
        lines.append(f"{name}: {value}")
    return "".join(f"{line}\r\n" for line in lines).encode()


def _is_hang_up(error: Exception) -> bool:
    """Return whether the peer closed the connection before it answered anything."""
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return isinstance(error.message, str)  # else it is the part of a head
    if isinstance(error, aiohttp.ClientConnectorError):
        return False
    return isinstance(error, ConnectionError | aiohttp.ClientOSError)


def _broadcast(source: BroadcastWeights) -> dict[str, Any]:
    return {
        "names": [spec.name for spec in source.tensors],
        "dtypes": [spec.dtype for spec in source.tensors],
        "shapes": [list(spec.shape) for spec in source.tensors],
        "group_name": source.group,
        "bucket_bytes": source.bucket_bytes,
    }

"""Connections to one address, kept open between requests."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections import deque
from typing import Any

from yarl import URL

from gym_sdk.errors import ConfigurationError, GymError, TransportError
from gym_sdk.transport.connection import Connection, HangUpError, WireAnswer
from gym_sdk.transport.connections import open_socket
from gym_sdk.transport.gate import Gate
from gym_sdk.transport.pacing import Pacer

__all__ = ["ConnectionPool"]

_IDLE_S = 30.0
"""How long a connection may lie unused."""
_DNS_S = 60.0
_STALE_S = 1.0
"""A connection that ends so soon after a request was sent had ended before; later, the server gave it up."""
_STALE_TRIES = 3
"""How often a request may meet a connection that the server has just closed."""

_Address = tuple[int, int, int, str, Any]


class ConnectionPool:
    """Sends requests to one address. It belongs to one event loop.

    Written for many short exchanges: a request costs about a third of what it does with a general client.
    No redirects, cookies, proxies or pipelining.

    Args:
        url: of the server; scheme, host and port count.
        connect_s: deadline of a new connection, in seconds.
        stall_s: how long nothing may come in the middle of an answer, in seconds.
        most_bytes: how large an answer's body may be.
        most_connections: how many there may be at once; requests beyond wait.
        verify: how a server's certificate is checked; by the system's authorities, by default.

    Raises:
        ConfigurationError: the address has no host.
    """

    def __init__(
        self,
        url: URL,
        *,
        connect_s: float,
        stall_s: float,
        most_bytes: int,
        most_connections: int,
        verify: ssl.SSLContext | None = None,
    ) -> None:
        if not url.raw_host or url.port is None:
            raise ConfigurationError(f"{url} names no host")
        self._what = str(url)
        self._host, self._port = url.raw_host, url.port
        self._ssl = (verify or ssl.create_default_context()) if url.scheme == "https" else None
        self._connect_s = connect_s
        self._stall_s = stall_s
        self._most_bytes = most_bytes
        self._gate = Gate(most_connections)
        self._pacer = Pacer()
        self._idle: deque[Connection] = deque()  # the newest right
        self._busy: set[Connection] = set()
        self._sweeper: asyncio.TimerHandle | None = None
        self._literal = _literal_address(self._host, self._port)
        self._addresses: list[_Address] = []
        self._resolved_at = 0.0
        self._resolving: asyncio.Task[list[_Address]] | None = None
        self._is_closed = False

    async def exchange(self, request: bytes) -> WireAnswer:
        """Send a request; return its answer.

        A connection that the server closed while it lay unused is no failure: another one is taken.

        Raises:
            TransportError: there was no answer, or none that can be read.
            ConfigurationError: the pool is closed.
        """
        if not self._gate.try_enter():
            await self._gate.enter()
        try:
            for tries_left in reversed(range(_STALE_TRIES)):
                connection = self._newest_idle() if tries_left else None
                if connection is None:
                    connection = await self._connect()
                self._busy.add(connection)
                try:
                    answer = await connection.exchange(request)
                except HangUpError as error:
                    if connection.uses > 1 and not error.is_answered and error.after_s < _STALE_S:
                        continue
                    raise TransportError(f"no answer from {self._what}: {error}", retryable=True) from error
                finally:
                    self._busy.discard(connection)
                if not connection.is_closed:
                    self._keep(connection)
                return answer
        finally:
            self._gate.leave()
        raise AssertionError  # the last try has a connection of its own

    def close(self) -> None:
        """Close all connections at once; requests under way fail."""
        self._is_closed = True
        if self._sweeper is not None:
            self._sweeper.cancel()
        if self._resolving is not None:
            self._resolving.cancel()
        for connection in (*self._idle, *self._busy):
            connection.close()
        self._idle.clear()

    def _newest_idle(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if not connection.is_closed:
                return connection
        return None

    def _keep(self, connection: Connection) -> None:
        if self._is_closed:
            connection.close()
            return
        loop = asyncio.get_running_loop()
        connection.idle_since = loop.time()
        self._idle.append(connection)
        if self._sweeper is None:
            self._sweeper = loop.call_later(_IDLE_S, self._sweep)

    def _sweep(self) -> None:
        """Close what has not been used for long."""
        loop = asyncio.get_running_loop()
        oldest = loop.time() - _IDLE_S
        while self._idle and (self._idle[0].is_closed or self._idle[0].idle_since <= oldest):
            self._idle.popleft().close()
        self._sweeper = loop.call_later(_IDLE_S / 2, self._sweep) if self._idle else None

    async def _connect(self) -> Connection:
        """Open a connection.

        Raises:
            TransportError: there is none in time.
        """
        if self._is_closed:
            raise ConfigurationError("the client is not open; use `async with GymClient(...) as client`")
        failure: OSError | TimeoutError
        try:
            async with asyncio.timeout(self._connect_s):
                addresses = await self._resolve()
                for address in addresses[:-1]:
                    try:
                        return await self._connect_to(address)
                    except OSError:
                        continue
                return await self._connect_to(addresses[-1])
        except TimeoutError:
            failure = TimeoutError(f"no connection within {self._connect_s:g} s")
        except GymError:
            raise
        except OSError as error:
            failure = error
        self._addresses = []  # it may come back at another address
        raise TransportError(
            f"no answer from {self._what}: {type(failure).__name__}: {failure}; is the server running? "
            "`gym-sdk serve MODEL` starts one",
            retryable=not isinstance(failure, ssl.SSLError),
        ) from failure

    async def _connect_to(self, address: _Address) -> Connection:
        loop = asyncio.get_running_loop()
        opened = open_socket(address)
        try:
            opened.setblocking(False)
            opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await loop.sock_connect(opened, address[4])
            _, connection = await loop.create_connection(
                lambda: Connection(
                    self._what, most_bytes=self._most_bytes, stall_s=self._stall_s, pacer=self._pacer
                ),
                sock=opened,
                ssl=self._ssl,
                server_hostname=self._host if self._ssl is not None else None,
            )
        except BaseException:
            opened.close()
            raise
        return connection

    async def _resolve(self) -> list[_Address]:
        """Return the server's addresses; many who ask at once share one look-up."""
        if self._literal is not None:
            return [self._literal]
        loop = asyncio.get_running_loop()
        if self._addresses and loop.time() - self._resolved_at < _DNS_S:
            return self._addresses
        if self._resolving is None or self._resolving.done():
            self._resolving = loop.create_task(self._look_up())
        return await asyncio.shield(self._resolving)

    async def _look_up(self) -> list[_Address]:
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        if not found:
            raise OSError(f"{self._host} has no address")
        self._addresses, self._resolved_at = list(found), loop.time()
        return self._addresses


def _literal_address(host: str, port: int) -> _Address | None:
    """Return the address that a host is already, which takes no look-up."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    if address.version == 6:
        return socket.AF_INET6, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (host, port, 0, 0)
    return socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (host, port)

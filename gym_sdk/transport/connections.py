"""Connections: how many there may be, and how one that leads nowhere is noticed."""

from __future__ import annotations

import logging
import resource
import socket
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

__all__ = ["EXCHANGE", "Exchange", "allowed_connections", "open_socket"]

_log = logging.getLogger(__name__)

_OTHER_FILES = 512
"""How many files are left to the rest of the process: stores, pipes of tools, servers, the interpreter."""

_MOST = 131_072
"""Connections that are asked for where the system sets no limit."""

_LEAST = 16

_DEAD_S = 60
"""After how long without any sign a peer is asked for one, and after how long unsent bytes are given up."""


@dataclass(slots=True)
class Exchange:
    """How far a request has come."""

    is_fresh: bool = False
    """Whether a connection was opened for it, rather than taken from the pool."""
    is_answered: bool = False
    """Whether the head of its answer has come."""


EXCHANGE: ContextVar[Exchange] = ContextVar("EXCHANGE")
"""The request that is being sent, for whoever opens its connection."""


def allowed_connections(shares: int = 1) -> int:
    """Let this process have as many files open as the system allows; return how many connections that makes.

    Only the soft limit is raised, and no further than 131,072 connections need.

    Args:
        shares: among how many transports they are divided.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST + _OTHER_FILES
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):  # some systems refuse what they say is allowed
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            _log.debug("the limit of open files is raised from %d to %d", soft, wanted)
            soft = wanted
    files = wanted if soft == resource.RLIM_INFINITY else soft
    # where there are few files, the others get half of them
    return max(_LEAST, max(files - _OTHER_FILES, files // 2) // shares)


def open_socket(address: tuple[Any, ...]) -> socket.socket:
    """Open a socket for `getaddrinfo`'s address, which notices that its peer is gone.

    An answer may take an hour, in silence. Only keep-alive probes tell such a silence from a machine that is
    switched off; and closing must not wait for a peer that reads no more.
    """
    family, kind, protocol = address[:3]
    opened = socket.socket(family, kind, protocol)
    for level, name, value in _OPTIONS:
        with suppress(OSError):
            opened.setsockopt(level, name, value)
    exchange = EXCHANGE.get(None)
    if exchange is not None:
        exchange.is_fresh = True
    return opened


def _options() -> list[tuple[int, int, int]]:
    options = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
    for name, value in (
        ("TCP_KEEPIDLE", _DEAD_S),
        ("TCP_KEEPINTVL", 15),
        ("TCP_KEEPCNT", 4),
        ("TCP_USER_TIMEOUT", _DEAD_S * 2000),  # milliseconds
    ):
        if hasattr(socket, name):  # they differ between systems
            options.append((socket.IPPROTO_TCP, getattr(socket, name), value))
    return options


_OPTIONS = _options()

"""API keys: one set for the model's routes, one for all."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Iterator

from aiohttp import web

from backends.server.errors import Handler
from backends.server.operation.config import AccessConfig
from backends.server.operation.kinds import RouteKind, kind_of, route_of
from gym_sdk.errors import PolicyError

__all__ = ["KEYS", "Keys", "check_access", "require_keys", "sees_details"]


class Keys:
    """The keys of one server, as digests: comparing those takes the same time whatever was sent.

    Args:
        config: the keys.
    """

    def __init__(self, config: AccessConfig) -> None:
        self._model = tuple(_digests(config.api_keys))
        self._admin = tuple(_digests(config.admin_api_keys))

    @property
    def needed(self) -> bool:
        """Whether there is any key."""
        return bool(self._model or self._admin)

    def check(self, request: web.Request, kind: RouteKind) -> None:
        """Check that a request may call a route of this kind.

        Raises:
            PolicyError: it has no key, or a wrong one (401), or one that does not open this route (403).
        """
        if kind is RouteKind.PUBLIC or not self.needed:
            return
        sent = list(_digests(_sent(request)))
        if _any_equal(sent, self._admin):
            return
        if not _any_equal(sent, self._model):
            said = "the API key is wrong" if sent else "an API key is needed"
            raise PolicyError(
                f"{said}: send it as `Authorization: Bearer KEY` or `x-api-key: KEY`",
                status=401,
                code="invalid_api_key",
            )
        if kind is RouteKind.ADMIN:
            how = "" if self._admin else "; this server was started without one (--admin-api-key)"
            raise PolicyError(
                f"this route needs an admin API key{how}", status=403, code="insufficient_permissions"
            )

    def known(self, request: web.Request) -> bool:
        """Return whether a request comes with a key, or none is needed."""
        try:
            self.check(request, RouteKind.MODEL)
        except PolicyError:
            return False
        return True


KEYS = web.AppKey("keys", Keys)


@web.middleware
async def require_keys(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Let through what comes with the key that its route needs."""
    check_access(request)
    return await handler(request)


def check_access(request: web.Request) -> None:
    """Check a request's key before the middlewares do, which is after its body was asked for.

    Raises:
        PolicyError: as `Keys.check`.
    """
    request.app[KEYS].check(request, kind_of(route_of(request)))


def sees_details(request: web.Request) -> bool:
    """Return whether who asks a public route may see more than that the server is there."""
    return request.app[KEYS].known(request)


def _sent(request: web.Request) -> Iterator[str]:
    """Yield the keys that a request comes with: OpenAI's clients send one header, Anthropic's the other."""
    scheme, _, credentials = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer" and credentials.strip():
        yield credentials.strip()
    if key := request.headers.get("x-api-key", "").strip():
        yield key


def _digests(keys: Iterable[str]) -> Iterator[bytes]:
    return (hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest() for key in keys)


def _any_equal(sent: Iterable[bytes], keys: tuple[bytes, ...]) -> bool:
    """Compare everything with everything, so that the time does not tell which one was near."""
    found = False
    for digest in sent:
        for key in keys:
            found |= hmac.compare_digest(digest, key)
    return found

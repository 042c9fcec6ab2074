"""Where the replicas are: addresses, or a router that lists them."""

from __future__ import annotations

from collections.abc import Sequence

import aiohttp

from backends.sglang.client import clean_address
from gym_sdk.errors import ConfigurationError

__all__ = ["workers"]

_WITHIN_S = 10.0


async def workers(url: str, *, api_key: str | None = None) -> list[str] | None:
    """Return the addresses that an sglang-router lists; None if the server at `url` is no router.

    A router passes on neither aborts nor pauses nor weights, so its workers are spoken to directly.

    Raises:
        ConfigurationError: it lists workers that take requests only together (prefill and decode apart) or
            do not speak HTTP.
        aiohttp.ClientError, TimeoutError: nothing answers there.
    """
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    timeout = aiohttp.ClientTimeout(total=_WITHIN_S)
    async with (
        aiohttp.ClientSession(headers=headers, timeout=timeout) as session,
        session.get(f"{url}/workers") as answer,
    ):
        if answer.status != 200:
            return None
        try:
            body = await answer.json(content_type=None)
            listed = body["workers"]
            found = [str(worker["url"]) for worker in listed]
        except (ValueError, TypeError, KeyError):
            return None
    _check_kinds(url, listed)
    return [clean_address(address) for address in found]


def _check_kinds(url: str, listed: Sequence[dict[str, object]]) -> None:
    for worker in listed:
        for name, wanted in (("worker_type", "regular"), ("connection_mode", "HTTP")):
            if str(worker.get(name, wanted)).lower() != wanted.lower():
                raise ConfigurationError(
                    f"the router at {url} lists {worker['url']} with {name}={worker[name]!r}; "
                    f"only {wanted!r} is supported"
                )

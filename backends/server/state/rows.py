"""How a response is written on disk: as two compressed JSON objects, what was said and the tokens."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import from_json, to_json

from backends.server.state.stored import StoredResponse
from gym_sdk.errors import TokenContractError
from gym_sdk.schema import Response, TokenDelta, as_items
from gym_sdk.tokens import CallTokens

__all__ = ["DAMAGED", "extension_of", "pack_body", "pack_tokens", "unpack_body", "unpack_tokens"]

DAMAGED = (zlib.error, ValueError, KeyError, TypeError, ValidationError, TokenContractError)
"""What reading raises where the file has other content than was written."""

_LEVEL = 1


def pack_body(stored: StoredResponse) -> bytes:
    """Return everything but the tokens."""
    response = stored.response.without_tokens()
    output = [item.without_tokens() for item in response.output]
    wire = response.model_copy(update={"output": output}).to_wire()
    wire.pop("token_delta", None)
    return _pack({"response": wire, "input": [item.to_wire() for item in stored.input], "size": stored.size})


def unpack_body(data: bytes, scope: str) -> StoredResponse:
    """Return a response without its tokens."""
    body = _unpack(data)
    response = Response.model_validate(body["response"])
    return StoredResponse(response, tuple(as_items(body["input"])), scope, body["size"])


def extension_of(response: Response) -> str | None:
    """Return the response whose tokens this one's begin with, if whoever asked for it has them."""
    delta = response.in_form("compact").get("token_delta")
    return None if delta is None else delta["extends"]


def pack_tokens(response: Response, extends: str | None) -> bytes | None:
    """Return the tokens, without those of the response that they extend; None if there are none."""
    tokens = response.tokens
    return None if tokens is None else _pack(TokenDelta.of(tokens, extends).to_wire())


def unpack_tokens(data: bytes, known: Mapping[str, CallTokens]) -> tuple[CallTokens, str | None]:
    """Return the tokens and the response that they extend, given the tokens of that one."""
    delta = TokenDelta.model_validate(_unpack(data))
    return delta.resolve(known), delta.extends


def _pack(value: Any) -> bytes:
    return zlib.compress(to_json(value), _LEVEL)


def _unpack(data: bytes) -> dict[str, Any]:
    value = from_json(zlib.decompress(data))
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value

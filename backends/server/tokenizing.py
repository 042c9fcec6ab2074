"""Text to tokens and back, in vLLM's shape, and the size of a Messages prompt."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, TypeVar

from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field

from backends.policy import Policy
from backends.requests import check_model
from backends.server.answering import CAPTURES, POLICY, read_body
from backends.server.errors import json_response
from backends.server.surfaces import ChatSurface, prompt_request
from gym_sdk.errors import PolicyError

__all__ = ["DetokenizeRequest", "TokenizeAnswer", "TokenizeRequest", "add_tokenizing_routes"]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, defer_build=True)
    model: str | None = None


class TokenizeRequest(_Body):
    """The body of `POST /tokenize`: a prompt, or what a chat completion is asked with."""

    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool | None = None
    """Whether the tokenizer adds its own to a prompt (default: yes). Chats have those of their template."""
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    return_token_strs: bool | None = None


class TokenizeAnswer(BaseModel):
    """The answer of `POST /tokenize`."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(_Body):
    """The body of `POST /detokenize`."""

    tokens: list[int] = Field(max_length=2**24)


def add_tokenizing_routes(app: web.Application) -> None:
    """Add the routes to an application that has a policy."""
    for root in ("", "/v1"):
        app.router.add_post(f"{root}/tokenize", _tokenize)
        app.router.add_post(f"{root}/detokenize", _detokenize)
    for root in ("/v1", "/rollouts/{rollout_id}/v1"):
        app.router.add_post(f"{root}/messages/count_tokens", _count_tokens)


async def _tokenize(http: web.Request) -> web.Response:
    policy = http.app[POLICY]
    asked = _read_as(TokenizeRequest, await read_body(http), policy)
    ids = await (_prompt_ids(asked, policy) if asked.messages is None else _chat_ids(asked, policy))
    tokenizer = policy.renderer.tokenizer
    texts = [tokenizer.convert_ids_to_tokens(number) for number in ids] if asked.return_token_strs else None
    length = policy.engine.info.context_length
    return json_response(TokenizeAnswer(count=len(ids), max_model_len=length, tokens=ids, token_strs=texts))


async def _prompt_ids(asked: TokenizeRequest, policy: Policy) -> list[int]:
    if asked.prompt is None:
        raise PolicyError("prompt: send either `prompt` or `messages`", code="invalid_value", param="prompt")
    for name in ("tools", "chat_template_kwargs"):
        if getattr(asked, name) is not None:
            raise PolicyError(f"{name} goes with `messages`", code="invalid_value", param=name)
    tokenizer: Any = policy.renderer.tokenizer  # the protocol has only what parsing needs
    added = asked.add_special_tokens is not False
    ids: list[int] = await asyncio.to_thread(tokenizer.encode, asked.prompt, add_special_tokens=added)
    return ids


async def _chat_ids(asked: TokenizeRequest, policy: Policy) -> list[int]:
    """Return the prompt of a chat completion of the same messages: what was sampled comes as it was."""
    refused: Mapping[str, bool] = {
        "prompt": asked.prompt is not None,
        "add_special_tokens": bool(asked.add_special_tokens),
        "add_generation_prompt": not asked.add_generation_prompt,
        "continue_final_message": asked.continue_final_message,
    }
    for name, is_refused in refused.items():
        if is_refused:
            raise PolicyError(
                f"{name}: messages are tokenized as the prompt of a chat completion, which ends with the "
                "generation prompt and has the template's special tokens",
                code="unsupported_parameter",
                param=name,
            )
    body = asked.model_dump(include={"messages", "tools", "chat_template_kwargs"}, exclude_none=True)
    chat = ChatSurface().read(body, model=policy.name, form="item")
    try:
        return await policy.prompt_token_ids(chat.requests[0])
    except PolicyError as error:
        raise chat.worded(error) from error


async def _detokenize(http: web.Request) -> web.Response:
    policy = http.app[POLICY]
    asked = _read_as(DetokenizeRequest, await read_body(http), policy)
    size = policy.engine.info.vocab_size
    for index, number in enumerate(asked.tokens):
        if not 0 <= number < size:
            param = f"tokens[{index}]"
            raise PolicyError(
                f"{param} is {number}; this model's ids are those below {size}",
                code="invalid_value",
                param=param,
            )
    text = await asyncio.to_thread(policy.renderer.tokenizer.decode, asked.tokens)
    return json_response({"prompt": text})


async def _count_tokens(http: web.Request) -> web.Response:
    scope = http.match_info.get("rollout_id", "")
    if scope:
        http.app[CAPTURES].get(scope)
    request, words = prompt_request(await read_body(http))
    try:
        count = await http.app[POLICY].count_input_tokens(request, scope=scope)
    except PolicyError as error:
        raise words(error) from error
    return json_response({"input_tokens": count})


_Read = TypeVar("_Read", bound=_Body)


def _read_as(kind: type[_Read], body: Mapping[str, Any], policy: Policy) -> _Read:
    asked = kind.model_validate(body)
    check_model(asked.model, policy.name)
    return asked

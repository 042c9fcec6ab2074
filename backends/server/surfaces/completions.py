"""`POST /v1/completions`: OpenAI's oldest API, with token ids as prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from pydantic import ValidationError

from backends.completing import TEXT_OFFSET, Completer, CompletionRequest
from backends.requests import LOG_PROBS, invalid, refuse
from backends.server.errors import Problem, validation_error
from backends.server.sse import KEEP_ALIVE
from backends.server.surfaces.chat_request import read_choices, read_stream_options
from backends.server.surfaces.completion_object import (
    DONE,
    data_event,
    ending_of,
    fingerprint,
    text_parts,
    usage_of,
)
from backends.server.surfaces.fields import FieldReader
from backends.server.surfaces.surface import Asked, renamed
from backends.server.unfolding import TextGrown, Unfolding
from backends.snapshots import Snapshot
from gym_sdk.errors import PolicyError
from gym_sdk.schema import Response, ResponseRequest, TokenForm, tokens_to_wire

__all__ = ["CompletionSurface"]

_SAME_FIELDS = ("model", "temperature", "top_p", "top_k", "stop", "seed", "user")
_PASSED = ("frequency_penalty", "presence_penalty", "prompt_cache_key")
_OWN_FIELDS = frozenset(
    {
        *("prompt", "max_tokens", "n", "best_of", "logprobs", "echo", "stream", "stream_options"),
        *("skip_special_tokens", "add_special_tokens"),
    }
)
_NEUTRAL: Mapping[str, Any] = {"logit_bias": {}, "suffix": ""}
_WHY = {
    "suffix": "nothing is inserted here: a completion goes on after its prompt",
    "logit_bias": "tokens cannot be made likelier here: the log-probs would not be the policy's",
}
_NAMES = {"input": "prompt", "max_output_tokens": "max_tokens", "top_logprobs": "logprobs"}
_MAX_TOKENS = 16
"""OpenAI's default."""
_MAX_CHOICES = 2048


class CompletionSurface:
    """Reads and writes Completions.

    Args:
        completer: what continues the prompts.
    """

    name = "completions"
    has_forms = False

    def __init__(self, completer: Completer) -> None:
        self._completer = completer

    def read(self, body: dict[str, Any], *, model: str, form: TokenForm) -> Asked:
        """Read a request's body; see `Surface.read`."""
        fields = FieldReader(body)
        _check_fields(fields)
        streams = bool(fields.flag("stream"))
        options = read_stream_options(body, streams=streams)
        settings = _settings(fields)
        choices = read_choices(fields, settings)
        _check_best_of(fields, len(choices))
        prompts = _prompts(fields)
        if len(prompts) * len(choices) > _MAX_CHOICES:
            raise invalid("prompt", f"and `n` make more than {_MAX_CHOICES} choices")
        echo = bool(fields.flag("echo"))
        if echo and settings.include:
            raise refuse("echo", "`echo` goes without `logprobs`: prompts are not scored here")
        flags = {
            name: fields.flag(name) is not False for name in ("skip_special_tokens", "add_special_tokens")
        }
        requests = [
            CompletionRequest(
                prompt,
                choice,
                echo=echo,
                hides_special=flags["skip_special_tokens"],
                adds_special=flags["add_special_tokens"],
            )
            for prompt in prompts
            for choice in choices
        ]
        events = CompletionEvents(len(choices), include_usage=bool(options.get("include_usage")))
        return Asked(
            requests,
            partial(_completion, choices=len(choices)),
            events if streams else None,
            answerer=self._completer,
            worded=_worded,
        )


class CompletionEvents:
    """The chunks of `POST /v1/completions`. A choice's token fields travel in its last chunk.

    Args:
        choices: how many there are of each prompt.
        include_usage: whether a last chunk carries the usage.
    """

    def __init__(self, choices: int, *, include_usage: bool = False) -> None:
        self._count = choices
        self._include_usage = include_usage
        self._head: dict[str, Any] = {}
        self._unfoldings: list[Unfolding] = []
        self._done: dict[int, Response] = {}

    keep_alive = KEEP_ALIVE

    def opening(self, responses: Sequence[Response]) -> bytes:
        """Return nothing: there is no text yet."""
        self._head = _head(responses[0])
        self._unfoldings = [Unfolding() for _ in responses]
        return b""

    def progress(self, choice: int, snapshot: Snapshot) -> bytes:
        """Return the text that is new, and at the end the finish reason with the token fields."""
        chunks = []
        for change in self._unfoldings[choice].take(snapshot):
            if isinstance(change, TextGrown):
                scores = _old_shape(change.log_probs) if change.log_probs else None
                body = {"index": choice, "text": change.delta, "logprobs": scores, "finish_reason": None}
                chunks.append(self._chunk(body))
        if snapshot.done:
            response = self._done[choice] = snapshot.response
            body = {"index": choice, "text": "", "logprobs": None, **_ending(response)}
            chunks.append(self._chunk(body, fingerprint(response)))
        return b"".join(chunks)

    def closing(self) -> bytes:
        """Return the usage and `[DONE]`."""
        if not self._include_usage:
            return DONE
        responses = [response for _, response in sorted(self._done.items())]
        head = {**self._head, "system_fingerprint": fingerprint(responses[-1])}
        return data_event({**head, "choices": [], "usage": usage_of(responses, choices=self._count)}) + DONE

    def failure(self, problem: Problem) -> bytes:
        """Return an error object, which the openai package raises."""
        return data_event({"error": problem.to_wire()})

    def _chunk(self, choice: dict[str, Any], version: str | None = None) -> bytes:
        usage = {"usage": None} if self._include_usage else {}
        return data_event({**self._head, "system_fingerprint": version, "choices": [choice], **usage})


def _worded(error: PolicyError) -> PolicyError:
    return renamed(error, lambda name: _NAMES.get(name, name))


def _check_fields(fields: FieldReader) -> None:
    known = {*_SAME_FIELDS, *_PASSED, *_OWN_FIELDS}
    for name, value in fields.items():
        if name not in known and value is not None and value != _NEUTRAL.get(name):
            raise refuse(name, _WHY.get(name, f"the parameter {name!r} is not supported by this server"))


def _settings(fields: FieldReader) -> ResponseRequest:
    """Return how to sample."""
    asked = {name: fields.get(name) for name in (*_SAME_FIELDS, *_PASSED) if fields.get(name) is not None}
    limit = fields.get("max_tokens")
    asked["max_output_tokens"] = _MAX_TOKENS if limit is None else limit
    top = fields.whole("logprobs", 0, 20)
    if top is not None:
        asked |= {"top_logprobs": top, "include": [LOG_PROBS]}
    try:
        return ResponseRequest.model_validate(asked)
    except ValidationError as error:
        raise _worded(validation_error(error)) from error


def _check_best_of(fields: FieldReader, count: int) -> None:
    if fields.whole("best_of", 1, 20) not in (None, count):
        raise refuse("best_of", "all choices that are made are returned: `best_of` must be `n`")


def _prompts(fields: FieldReader) -> list[str | list[int]]:
    prompt = fields.get("prompt")
    if isinstance(prompt, str) or _is_ids(prompt):
        return [prompt]
    if isinstance(prompt, list) and prompt and all(isinstance(one, str) or _is_ids(one) for one in prompt):
        return prompt
    raise invalid("prompt", "must be text, a list of token ids, or a list of either, and not empty")


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(entry) is int for entry in value)


def _completion(responses: Sequence[Response], *, choices: int) -> dict[str, Any]:
    return {
        **_head(responses[0]),
        "system_fingerprint": fingerprint(responses[-1]),
        "choices": [
            {
                "index": index,
                "text": response.output_text,
                "logprobs": _log_probs(response),
                **_ending(response),
            }
            for index, response in enumerate(responses)
        ],
        "usage": usage_of(responses, choices=choices),
    }


def _head(response: Response) -> dict[str, Any]:
    return {
        "id": response.id.replace("resp_", "cmpl-", 1),
        "object": "text_completion",
        "created": int(response.created_at),
        "model": response.model,
    }


def _ending(response: Response) -> dict[str, Any]:
    tokens = {} if response.tokens is None else tokens_to_wire(response.tokens)
    return {**ending_of(response), **tokens}


def _log_probs(response: Response) -> dict[str, Any] | None:
    scored = [part.logprobs for part in text_parts(response) if part.logprobs is not None]
    return _old_shape(scored[0]) if scored else None


def _old_shape(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return log-probs as lists, one for each field of the tokens."""
    return {
        "tokens": [_spelled(entry) for entry in entries],
        "token_logprobs": [entry["logprob"] for entry in entries],
        "top_logprobs": [_scores(entry) for entry in entries],
        "text_offset": [entry[TEXT_OFFSET] for entry in entries],
    }


def _scores(entry: Mapping[str, Any]) -> dict[str, float]:
    """Return the likeliest tokens with their scores, the sampled one among them."""
    scores: dict[str, float] = {}
    for one in (entry, *entry["top_logprobs"]):
        # of two tokens that are spelled alike, the sampled or the likelier one
        scores.setdefault(_spelled(one), one["logprob"])
    return scores


def _spelled(entry: Mapping[str, Any]) -> str:
    """Return a token's text; of one that holds a part of a character the bytes, as OpenAI writes them."""
    data = bytes(entry["bytes"])
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

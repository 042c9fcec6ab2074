"""A generation request as SGLang's `/generate` takes it."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from backends.engine import GenerationRequest, SamplingParams, check_room
from backends.requests import refuse
from gym_sdk.errors import ConfigurationError

__all__ = ["GRAMMAR_BACKEND", "check_prompt", "check_sampling", "generate_body", "reports"]

_COOLEST = 1e-6
"""SGLang samples greedily below this temperature."""
_ONLY_THE_LIKELIEST = 1e-9

GRAMMAR_BACKEND = "llguidance"
"""The one of SGLang's that reads our grammars."""


def check_prompt(request: GenerationRequest, *, vocab_size: int, context_length: int) -> list[int]:
    """Return a request's prompt as a list. An id outside the vocabulary would end the SGLang process.

    Raises:
        ContextOverflowError: it leaves no room for a token.
        ConfigurationError: it is empty, or something in it is no id of the vocabulary.
    """
    check_room(request, context_length)
    ids = request.prompt_token_ids
    prompt = ids.tolist() if hasattr(ids, "tolist") else list(ids)
    # the types one by one: JSON has no difference between True and 1, and SGLang takes 1.5 for a token
    if set(map(type, prompt)) != {int} or not 0 <= min(prompt) <= max(prompt) < vocab_size:
        where = next(place for place, value in enumerate(prompt) if not _is_id(value, vocab_size))
        raise ConfigurationError(
            f"prompt_token_ids[{where}] is {prompt[where]!r}; "
            f"an id must be an integer from 0 to {vocab_size - 1}"
        )
    return prompt


def _is_id(value: object, vocab_size: int) -> bool:
    return type(value) is int and 0 <= value < vocab_size


def check_sampling(sampling: SamplingParams, *, seeded: bool, grammar_backend: str | None) -> None:
    """Refuse what this SGLang would ignore or answer with other log-probs.

    Args:
        sampling: how to sample.
        seeded: whether SGLang honours seeds.
        grammar_backend: what reads its grammars.

    Raises:
        PolicyError: `param` names the field.
    """
    if sampling.seed is not None and not seeded:
        raise refuse(
            "seed",
            "seed: this SGLang ignores seeds; start it with --enable-deterministic-inference (GPUs only)",
        )
    if 0.0 < sampling.temperature < _COOLEST:
        raise refuse(
            "temperature",
            f"temperature must be 0 or at least {_COOLEST:g}, not {sampling.temperature:g}: SGLang would "
            "sample greedily and report the log-probs of temperature 1",
        )
    if sampling.grammar is None:
        return
    if grammar_backend != GRAMMAR_BACKEND:
        raise refuse(
            "grammar",
            f"this SGLang reads grammars by {grammar_backend or 'nothing'}; start it with "
            f"--grammar-backend {GRAMMAR_BACKEND}",
        )
    if sampling.temperature not in (0.0, 1.0):
        raise refuse(
            "temperature",
            f"with a grammar, temperature must be 0 or 1 on SGLang, not {sampling.temperature:g}: it tells "
            "log-probs without the grammar at temperature 1 only; the embedded engine takes any temperature",
        )


def reports(sampling: SamplingParams) -> bool:
    """Whether SGLang is to report the likeliest tokens as it samples: not under a grammar's mask."""
    return sampling.top_log_probs > 0 and sampling.grammar is None


def generate_body(
    prompt: Sequence[int],
    sampling: SamplingParams,
    *,
    rid: str,
    max_new_tokens: int,
    seeded: bool,
    stream: bool,
    adapter: str | None = None,
) -> dict[str, Any]:
    """Return the body of `/generate`. What could come from a default of the server is said, too."""
    return {
        "rid": rid,
        "input_ids": prompt,
        "return_logprob": True,
        # from the first prompt token on (0) they would defeat the prefix cache
        "logprob_start_len": -1,
        "top_logprobs_num": sampling.top_log_probs if reports(sampling) else 0,
        "stream": stream,
        **({"lora_path": adapter} if adapter is not None else {}),
        "sampling_params": {
            "max_new_tokens": max_new_tokens,
            "temperature": sampling.temperature,
            **_truncation(sampling),
            "min_p": 0.0,
            "frequency_penalty": 0.0,
            "presence_penalty": 0.0,
            "repetition_penalty": 1.0,
            "min_new_tokens": 0,
            "n": 1,
            "stop_token_ids": sorted(sampling.stop_token_ids),
            # SGLang ignores `stop_token_ids`, too, where it ignores the model's own EOS
            "ignore_eos": not sampling.stop_token_ids,
            "skip_special_tokens": False,
            "no_stop_trim": True,
            **({"sampling_seed": _seed(sampling)} if seeded else {}),
            **({"ebnf": sampling.grammar} if sampling.grammar is not None else {}),
        },
    }


def _truncation(sampling: SamplingParams) -> dict[str, Any]:
    if sampling.top_k == 1 and sampling.temperature > 0.0:
        # SGLang takes top_k 1 for greedy, with the log-probs of temperature 1 or not, as the batch has it;
        # the smallest nucleus is the likeliest token, too
        return {"top_p": _ONLY_THE_LIKELIEST, "top_k": -1}
    return {"top_p": sampling.top_p, "top_k": sampling.top_k or -1}


def _seed(sampling: SamplingParams) -> int:
    # without one, a deterministic SGLang takes the same seed for all, and a group would be one rollout
    return secrets.randbits(63) if sampling.seed is None else sampling.seed % 2**63
